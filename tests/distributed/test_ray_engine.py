"""A vLLM server that Ray places: in an actor and a placement group of its own. The server is the scripted one
of tests/rollout."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from keel.cli.main import app
from keel.config import parse
from keel.errors import EngineError, UsageError
from keel.rollout.vllm.server import Launch

_spec = importlib.util.spec_from_file_location("ray_jobs", Path(__file__).with_name("ray_jobs.py"))
assert _spec is not None
assert _spec.loader is not None
jobs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(jobs)
SCRIPTED = Path(__file__).parents[1] / "rollout" / "scripted_vllm.py"
KEEPER = "ServerKeeper"
Differences = Callable[[Path, Path], list[str]]


def sampler(**more: Any) -> Any:
    rollout = {"engine": "vllm", **more}
    stage = {"kind": "grpo", "model": "m", "data": "d", "reward": "r", "rollout": rollout}
    parsed: Any = parse({"name": "x", "stages": {"s": stage}}).stages["s"]
    return parsed.rollout


# ---------------------------------------------------------------- what is asked


@pytest.mark.parametrize(
    ("args", "cards"),
    [
        ([], 1),
        (["--tensor-parallel-size", "4"], 4),
        (["--tensor_parallel_size=4", "-pp", "2"], 8),
        (["-tp", "2", "--data-parallel-size=3", "-tp=1"], 3),
        (["--max-num-seqs", "7"], 1),
    ],
)
def test_a_server_has_the_cards_that_its_arguments_name(args: list[str], cards: int) -> None:
    assert sampler(args=args).cards() == cards


@pytest.mark.parametrize("args", [["-tp"], ["--tensor-parallel-size=two"], ["-pp", "0"]])
def test_a_count_of_cards_that_is_none_is_refused(args: list[str]) -> None:
    with pytest.raises(ValueError, match=r"`rollout.args`: .*: write a number of cards"):
        sampler(args=args).cards()


def test_a_server_that_shares_a_card_stands_beside_the_first_rank() -> None:
    assert sampler().placeable
    assert not sampler(sleep=True).placeable
    assert not sampler(devices="1").placeable
    assert not sampler(address="http://host:1").placeable


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What a dry run says of two stages with a server."""
    monkeypatch.chdir(tmp_path)
    for name in ("OMP_NUM_THREADS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KEEL_ENGINES", str(tmp_path))

    def said(one: dict[str, Any], other: dict[str, Any], *more: str) -> str:
        stage = {"kind": "grpo", "model": "m", "data": "d.jsonl", "reward": "r"}
        stages = {
            name: {**stage, "rollout": {"engine": "vllm", **rollout}}
            for name, rollout in (("a", one), ("b", other))
        }
        path = tmp_path / "c.yaml"
        path.write_text(json.dumps({"name": "c", "device": "cpu", "stages": stages}))
        words = ["launch", str(path), "--ray", "--nproc", "2", "--dry-run", *more]
        return CliRunner().invoke(app, words, catch_exceptions=False).stdout

    return said


def test_a_dry_run_says_what_is_asked_for_the_server(plain: Callable[..., str], tmp_path: Path) -> None:
    group = "a vLLM server (a, b) in a placement group of its own: 1 CPU and 2 GPU where there are any, else "
    assert f"{group}as many CPUs as a rank" in plain({"args": ["-tp", "2"]}, {})
    assert f"{group}3 CPU" in plain({"args": ["-tp", "2"]}, {}, "threads=3")
    assert "(b) in a placement group of its own: 1 CPU and 1 GPU" in plain(
        {"args": ["-tp", "2"]}, {}, "--only", "b"
    )
    both = plain({"sleep": True}, {"address": "http://host:1"})
    assert both.endswith("; a vLLM server (a) beside the first rank, of which Ray counts nothing\n")
    assert "placement group" not in both
    with pytest.raises(UsageError, match=r"^b: `rollout\.args`: -tp x: write a number of cards"):
        plain({}, {"args": ["-tp", "x"]})
    (tmp_path / "vllm" / "bin").mkdir(parents=True)
    (tmp_path / "vllm" / "bin" / "vllm").touch()
    (tmp_path / "vllm" / "keel-engine.json").write_text('{"device": "cpu"}')
    assert "of its own: as many CPUs as a rank" in plain({"args": ["-tp", "2"]}, {})


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """What a cluster of some machines would give a job: CPUs of a rank, of the server, and the machines, by
    number, on which the server leaves room for the ranks, and those on which it does not."""
    ray_cluster = pytest.importorskip("keel.distributed.ray_cluster")

    def go(machines: list[tuple[int, int]], ranks: int, nodes: int, engine: int, **more: Any) -> Any:
        told = [
            {"NodeID": str(n), "Alive": True, "Resources": {"CPU": cpus, **({"GPU": gpus} if gpus else {})}}
            for n, (cpus, gpus) in enumerate(machines)
        ]
        monkeypatch.setattr(ray_cluster.ray, "nodes", lambda: told)
        job = ray_cluster.Job(
            "auto", ranks, nodes, more.get("cpus"), more.get("card"), 0, Path(), {}, Path(), engine=engine
        )
        cpus = job.cpus or ray_cluster._share(job)
        ray_cluster._check_room(job, cpus)
        ray_cluster._check_room_of_engine(job, cpus)
        return cpus, ray_cluster.bundle_of_engine(job, cpus), *ray_cluster._able(job, cpus)

    return go


def test_the_server_is_kept_off_machines_where_the_ranks_would_have_no_room(room: Any) -> None:
    assert room([(1, 0), (2, 0)], 2, 2, 1) == (1, {"CPU": 1}, ["1"], ["0"])
    assert room([(4, 0), (4, 0)], 2, 1, 0) == (1, {"CPU": 1}, ["0", "1"], [])
    assert room([(8, 0)], 3, 1, 0) == (2, {"CPU": 2}, ["0"], [])  # it takes part like a fourth rank
    assert room([(9, 4)], 2, 1, 2) == (4, {"CPU": 1, "GPU": 2}, ["0"], [])  # with cards it takes one CPU
    assert room([(9, 4)], 2, 1, 0) == (3, {"CPU": 3}, ["0"], [])  # the package for processors
    machines = [(8, 2), (8, 2), (8, 4), (8, 0)]
    assert room(machines, 4, 1, 2, cpus=1)[2:] == (["0", "1", "2"], [])
    assert room(machines, 6, 1, 2, cpus=1)[2:] == (["0", "1", "2"], [])
    assert room([(8, 2), (8, 2), (8, 4)], 6, 3, 2, cpus=1)[2:] == (["2"], ["0", "1"])


def test_what_a_cluster_never_holds_is_refused_with_what_to_do(room: Any) -> None:
    with pytest.raises(UsageError) as refused:
        room([(8, 2), (8, 2)], 4, 1, 1, cpus=1)
    assert str(refused.value) == (
        "a vLLM server of 1 CPU and 1 GPU on one machine, beside 4 ranks of 1 CPU and 1 GPU each: the Ray "
        "cluster never has room for it; ask for fewer ranks, let it share the first rank's card "
        "(rollout.sleep: true), or name a server elsewhere (rollout.address)"
    )
    with pytest.raises(UsageError, match="of 1 CPU and 3 GPU on one machine"):
        room([(8, 2), (8, 2)], 1, 1, 3, cpus=1)
    with pytest.raises(UsageError, match="ask for fewer ranks, or name a server elsewhere"):
        room([(1, 0), (1, 0)], 2, 2, 1)


def test_a_server_that_finds_no_room_in_time_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ray_cluster = pytest.importorskip("keel.distributed.ray_cluster")

    class Group:
        waits = 3

        def wait(self, seconds: float) -> bool:
            time.sleep(0.01)
            self.waits -= 1
            return self.waits == 0

    monkeypatch.setattr(ray_cluster, "FOR_PLACE", 0.0)
    ray_cluster._await_place(Group(), print)
    assert capsys.readouterr().out == "keel: waiting for Ray to place the vLLM server\n"
    monkeypatch.setenv(ray_cluster.A_START, "0.001")
    with pytest.raises(EngineError, match=r"no room for the vLLM server in 0\.01 s"):
        ray_cluster._await_place(Group(), print)


def test_what_the_machine_of_the_actor_lacks_is_said_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_ray = pytest.importorskip("keel.rollout.vllm.on_ray")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(on_ray.socket, "gethostname", lambda: "node-b")
    launch = Launch(tmp_path / "env" / "bin" / "vllm", str(tmp_path / "start"), "float32")

    def fault(folder: Path) -> str:
        address, said = on_ray.ServerKeeper().start(launch, tmp_path / "log", "key", str(folder), "owner")
        assert address == ""
        return said

    assert fault(tmp_path / "none") == f"node-b does not see {tmp_path}/none, in which the run works"
    assert "node-b, where Ray has placed the server: there is no vLLM in" in fault(tmp_path)
    (tmp_path / "env" / "bin").mkdir(parents=True)
    launch.program.touch()
    assert "put runs (or rollout.folder) on a file system that all machines share" in fault(tmp_path)


# ---------------------------------------------------------------- on a cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of two raylets, one with one CPU, the other with two."""
    with jobs.cluster(1, 2) as address:
        yield address


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment whose `vllm` is the scripted server. `pids` holds a line for each start."""
    place = tmp_path_factory.mktemp("engine") / "env"
    (place / "bin").mkdir(parents=True)
    line = f'exec {sys.executable} {SCRIPTED} {place} "$@"'
    (place / "bin" / "vllm").write_text(f"#!/bin/sh\nexport PYTHONPATH=\n{line}\n")
    (place / "bin" / "vllm").chmod(0o755)
    return place


@pytest.fixture(scope="module")
def config(
    program: Path, tmp_path_factory: pytest.TempPathFactory, on_policy_kinds: dict[str, Any],
    config_file: Callable[..., Path],
) -> Path:  # fmt: skip
    """GRPO by a server, with a checkpoint after each of some updates."""
    left_out = ("eval_every", "eval_data")
    stage = {key: value for key, value in on_policy_kinds["grpo"].items() if key not in left_out}
    rollout = {"engine": "vllm", "environment": str(program), "concurrency": 1, "restarts": 2}
    stage |= {"updates": 4, "save_every": 1, "resample": 0, "old_logp": "trainer", "rollout": rollout}
    folder = tmp_path_factory.mktemp("ray")
    return config_file(folder / "config.yaml", {"g": stage}, distributed={"timeout": 20})


@pytest.fixture(scope="module")
def undisturbed(config: Path) -> Path:
    done = jobs.keel("run", config, "--runs", config.parent, "--name", "undisturbed", "--nproc", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    return config.parent / "undisturbed"


@pytest.fixture
def apart(undisturbed: Path, differences: Differences) -> Callable[[Path], list[str]]:
    """In what a run differs from the undisturbed one, but for its name and the server's log."""

    def go(run: Path) -> list[str]:
        found = differences(undisturbed, run)
        return [name for name in found if name != "config.yaml" and not name.endswith("server.log")]

    return go


def servers(program: Path) -> list[int]:
    """The processes that serve or have served, in the order of their starts."""
    path = program / "pids"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def until_gone(*pids: int, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while left := [pid for pid in pids if jobs.is_alive(pid)]:
        assert time.monotonic() < end, left
        time.sleep(0.05)


def assert_nothing_serves(program: Path) -> None:
    until_gone(*servers(program), *jobs.workers(KEEPER))
    assert jobs.workers(KEEPER) == []


def engine_facts(run: Path) -> dict[str, Any]:
    return json.loads((run / "stages" / "g" / "stage.json").read_text())["facts"]["engines"][0]


class TestCluster:
    pytestmark = jobs.on_ranks

    def test_a_server_that_ray_places_changes_no_byte(
        self, config: Path, program: Path, apart: Any, cluster: str, tmp_path: Path
    ) -> None:
        """It stands where the ranks leave room: two, one a machine, leave one CPU on the second."""
        options = ("--ray", "--address", cluster, "--nproc", 1, "--nodes", 2, "--runs", tmp_path)
        done = jobs.keel("launch", config, *options, "--name", "ray", "--json")
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads(done.stdout)["stages"]["g"]["status"] == "done"
        assert apart(tmp_path / "ray") == []
        at = re.findall(r"a vLLM server starts at http://([\d.]+):\d+ ", done.stderr)
        variables = json.loads((program / "variables").read_text())
        assert at in (["127.0.0.3"], ["127.0.0.1"])  # the loopback interface beside the first rank
        assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} & variables.keys()
        assert len(variables["VLLM_API_KEY"]) > 20
        assert_nothing_serves(program)

    def test_a_server_that_dies_is_started_again_by_its_actor(
        self, config: Path, program: Path, apart: Any, cluster: str, tmp_path: Path
    ) -> None:
        (program / "deadly").write_text("9")
        options = ("--ray", "--address", cluster, "--nproc", 1, "--nodes", 2, "--runs", tmp_path)
        hurt = jobs.keel("launch", config, *options, "--name", "hurt")
        assert hurt.returncode == 0, hurt.stderr[-3000:]
        assert "it is started again" in hurt.stderr
        assert engine_facts(tmp_path / "hurt")["restarts"] == 1
        assert apart(tmp_path / "hurt") == []
        assert_nothing_serves(program)

    def test_an_actor_that_is_killed_is_followed_by_another_and_nothing_is_lost(
        self, config: Path, program: Path, apart: Any, cluster: str, tmp_path: Path
    ) -> None:
        with jobs.launched(config, cluster, tmp_path) as process:
            jobs.await_updates(tmp_path / "tiny", 2, "g")
            (keeper,) = jobs.workers(KEEPER)
            os.kill(keeper, signal.SIGKILL)
            until_gone(servers(program)[-1])  # which ends with it
            said = process.communicate(timeout=300)[1]
        assert process.returncode == 0, said[-3000:]
        assert "it is started again" in said
        assert engine_facts(tmp_path / "tiny")["restarts"] == 1
        assert apart(tmp_path / "tiny") == []
        assert_nothing_serves(program)

    def test_a_rank_that_is_killed_takes_the_server_with_it_and_the_next_start_has_another(
        self, config: Path, program: Path, apart: Any, cluster: str, tmp_path: Path
    ) -> None:
        with jobs.launched(config, cluster, tmp_path, "--max-restarts", "1") as process:
            jobs.await_updates(tmp_path / "tiny", 2, "g")
            before = servers(program)
            os.kill(jobs.worker_of(tmp_path / "tiny", 1), signal.SIGKILL)
            until_gone(before[-1], seconds=60)
            said = process.communicate(timeout=300)[1]
        assert process.returncode == 0, said[-3000:]
        assert "starting again, 1 of at most 1 times" in said
        assert len(servers(program)) == len(before) + 1
        assert apart(tmp_path / "tiny") == []
        assert_nothing_serves(program)

    @pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
    def test_whatever_ends_the_command_ends_the_server(
        self, how: signal.Signals, config: Path, program: Path, cluster: str, tmp_path: Path
    ) -> None:
        with jobs.launched(config, cluster, tmp_path) as process:
            jobs.await_updates(tmp_path / "tiny", 1, "g")
            process.send_signal(how)
            process.communicate(timeout=60)
        assert process.returncode == (130 if how == signal.SIGINT else -how)
        assert_nothing_serves(program)

    def test_a_server_with_cards_of_its_own_stands_beside_the_first_rank(
        self, config: Path, program: Path, apart: Any, cluster: str, tmp_path: Path
    ) -> None:
        """And ends with its worker, which Ray kills with all its children."""
        with jobs.launched(
            config, cluster, tmp_path, "--max-restarts", "1", 'stages.g.rollout.devices="0"'
        ) as process:
            jobs.await_updates(tmp_path / "tiny", 2, "g")
            assert jobs.workers(KEEPER) == []
            before = servers(program)
            os.kill(jobs.worker_of(tmp_path / "tiny", 1), signal.SIGKILL)
            until_gone(before[-1], seconds=60)
            said = process.communicate(timeout=300)[1]
        assert process.returncode == 0, said[-3000:]
        assert json.loads((program / "variables").read_text())["CUDA_VISIBLE_DEVICES"] == "0"
        assert apart(tmp_path / "tiny") == []
        assert_nothing_serves(program)

    def test_what_the_cluster_never_holds_is_refused_and_leaves_nothing(
        self, config: Path, program: Path, cluster: str, tmp_path: Path
    ) -> None:
        options = ("--ray", "--address", cluster, "--nproc", 1, "--runs", tmp_path)
        crowded = jobs.keel("launch", config, *options, "--nodes", 2, "threads=2")
        assert crowded.returncode == 2
        full = jobs.keel("launch", config, "--ray", "--address", cluster, "--nproc", 3, "--runs", tmp_path)
        assert full.returncode == 2
        (told,) = jobs.of_keel(full.stderr)
        assert "a vLLM server of 1 CPU on one machine, beside 3 ranks of 1 CPU each: the Ray cluster" in told
        assert not (tmp_path / "tiny").exists()
