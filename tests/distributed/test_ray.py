"""`keel launch --ray`: what is asked of Ray, and runs on a cluster of two machines that are really one."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from typer.testing import CliRunner

from keel.cli import launch_ray
from keel.cli.main import app
from keel.distributed.launch import Outcome, of_workers
from keel.distributed.records import Record
from keel.errors import UsageError

_spec = importlib.util.spec_from_file_location("ray_jobs", Path(__file__).with_name("ray_jobs.py"))
assert _spec is not None
assert _spec.loader is not None
jobs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(jobs)
keel, launched, of_keel, worker_of = jobs.keel, jobs.launched, jobs.of_keel, jobs.worker_of
await_updates, assert_nothing_is_left = jobs.await_updates, jobs.assert_nothing_is_left
WITHIN = 60.0  # seconds in which a job ends once a rank is gone
Differences = Callable[[Path, Path], list[str]]


# ---------------------------------------------------------------- what is asked


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("OMP_NUM_THREADS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "c.yaml"
    path.write_text("name: c\ndevice: cpu\nstages:\n  s: {kind: sft, model: m, data: d.jsonl}\n")
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--ray", "--ray needs --nproc N"),
        ("--ray --nproc 2 --nodes hosts.txt", "with --ray: give a number of machines; Ray chooses which"),
        ("--ray --nproc 2 --address head", "write HOST:PORT"),
        ("--ray --nproc 9999 --nodes 99", "989901 ranks: at most 65,536"),
        ("--ray --nproc 2 --ssh x", "--ssh has no effect with --ray"),
        ("--ray --nproc 2 --port 3", "--port has no effect with --ray"),
        ("--ray --nproc 2 --slurm", "--slurm has no effect with --ray"),
        ("--nproc 2 --address auto", "--address has no effect without --ray"),
    ],
)
def test_what_cannot_be_asked_of_ray_is_refused(options: str, message: str, plain: Path) -> None:
    outcome = CliRunner().invoke(app, ["launch", str(plain), *options.split()])
    assert isinstance(outcome.exception, UsageError)
    assert message in str(outcome.exception)


def test_the_address_of_a_ray_client_is_refused(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://10.0.0.1:10001")
    outcome = CliRunner().invoke(app, ["launch", str(plain), "--ray", "--nproc", "2", "--dry-run"])
    assert isinstance(outcome.exception, UsageError)
    assert "give --address HOST:PORT" in str(outcome.exception)


def test_a_dry_run_says_what_would_be_asked(plain: Path) -> None:
    def said(*more: str) -> str:
        arguments = ["launch", str(plain), "--ray", "--nproc", "4", "--dry-run", *more]
        return CliRunner().invoke(app, arguments, catch_exceptions=False).stdout

    assert "ray at auto: 4 workers of Ray Train, wherever they fit; each a rank's share" in said()
    spread = said("--nodes", "2", "--address", "10.0.0.1:6379", "--max-restarts", "3", "threads=2")
    assert "ray at 10.0.0.1:6379: 8 workers of Ray Train, spread over 2 machines; each 2 CPU;" in spread
    assert "at most 3 times" in spread
    assert "1 GPU where there are any" in said("device=auto")
    assert "1 GPU;" in said("device=cuda")
    assert not list(plain.parent.glob("runs*"))


def test_without_the_extra_one_line_names_it(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_ray.importlib.util, "find_spec", lambda name: None)
    outcome = CliRunner().invoke(app, ["launch", str(plain), "--ray", "--nproc", "2"])
    assert isinstance(outcome.exception, UsageError)
    assert str(outcome.exception) == "--ray needs Ray: pip install 'keel-rlhf[ray]'"


def test_who_is_to_blame_is_said_in_one_line() -> None:
    """What only Ray knows comes before what other ranks noticed of it."""
    lost = Record(0, "a", "lost", "the other ranks do not answer", 1, 0.0)
    killed = of_workers(2, {0: lost}, {0: None, 1: "its process was killed"}, ["a", "b"])
    assert killed.line.startswith("rank 1 of 2 on b: its process was killed; what is done is kept")
    hung = Record(1, "b", "hung", "has not answered for 10 s", 1, 0.0)  # left by rank 0, which ends itself
    assert of_workers(2, {0: hung}, {0: "its process was killed"}, ["a", "b"]).line == (
        "rank 1 of 2 on b: has not answered for 10 s"
    )
    own = Record(1, "b", "own", "the disk is full", 1, 0.0)
    assert of_workers(2, {0: lost, 1: own}, {1: "killed"}, ["a", "b"]).line == (
        "rank 1 of 2 on b: the disk is full"
    )
    usage = Record(0, "a", "own", "no stage", 2, 0.0)
    assert of_workers(2, {0: usage}, {}, ["a", "b"]) == Outcome(2, "no stage")
    assert "failed without a word" in of_workers(2, {}, {0: None}, ["a", "b"]).line


# ---------------------------------------------------------------- on a cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of two raylets with one CPU each."""
    with jobs.cluster() as address:
        yield address


@pytest.fixture(scope="module")
def config(
    tmp_path_factory: pytest.TempPathFactory,
    on_policy_kinds: dict[str, Any],
    config_file: Callable[..., Path],
) -> Path:
    """PPO with a checkpoint after each of some updates."""
    folder = tmp_path_factory.mktemp("ray")
    stage = {**on_policy_kinds["ppo"], "save_every": 1, "updates": 6}
    return config_file(folder / "config.yaml", {"ppo": stage}, distributed={"timeout": 20})


@pytest.fixture(scope="module")
def undisturbed(config: Path) -> Path:
    done = keel("run", config, "--runs", config.parent, "--name", "undisturbed", "--nproc", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    return config.parent / "undisturbed"


class TestCluster:
    pytestmark = jobs.on_ranks

    def test_ppo_on_two_machines_of_ray_leaves_the_bytes_of_two_ranks(
        self, config: Path, undisturbed: Path, cluster: str, tmp_path: Path, differences: Differences
    ) -> None:
        options = ("--ray", "--address", cluster, "--nproc", 1, "--nodes", 2, "--runs", tmp_path)
        done = keel("launch", config, *options, "--name", "ray", "--json")
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads(done.stdout)["stages"]["ppo"]["status"] == "done"
        assert "ppo: done in" in done.stderr
        assert differences(undisturbed, tmp_path / "ray") == ["config.yaml"]  # which holds its name
        assert not list((tmp_path / "ray").glob(".ranks-*"))

    @pytest.mark.parametrize("rank", [0, 1])
    def test_a_worker_that_is_killed_is_replaced_and_the_bytes_are_the_same(
        self, rank: int, config: Path, undisturbed: Path, cluster: str, tmp_path: Path,
        differences: Differences,
    ) -> None:  # fmt: skip
        with launched(config, cluster, tmp_path, "--max-restarts", "1") as process:
            await_updates(tmp_path / "tiny", 2)
            os.kill(worker_of(tmp_path / "tiny", rank), signal.SIGKILL)
            said = process.communicate(timeout=300)[1]
        assert process.returncode == 0, said[-3000:]
        told = of_keel(said)
        assert told[0].startswith(f"keel: rank {rank} of 2 on ")
        assert "its process was killed" in told[0]
        assert told[1:] == ["keel: starting again, 1 of at most 1 times"]
        assert "going on after step" in said
        assert differences(undisturbed, tmp_path / "tiny") == ["config.yaml"]

    def test_a_worker_that_is_killed_ends_the_job_with_one_line_where_none_may_replace_it(
        self, config: Path, cluster: str, tmp_path: Path
    ) -> None:
        with launched(config, cluster, tmp_path) as process:
            await_updates(tmp_path / "tiny", 1)
            os.kill(worker_of(tmp_path / "tiny", 1), signal.SIGKILL)
            since = time.monotonic()
            said = process.communicate(timeout=300)[1]
        assert time.monotonic() - since < WITHIN
        assert process.returncode == 1, said[-3000:]
        (told,) = of_keel(said)
        assert told.startswith("keel: rank 1 of 2 on ")
        assert told.endswith("the same command goes on")
        assert_nothing_is_left(tmp_path / "tiny")

    def test_a_rank_that_stands_still_ends_the_job(self, config: Path, cluster: str, tmp_path: Path) -> None:
        with launched(config, cluster, tmp_path) as process:
            await_updates(tmp_path / "tiny", 1)
            os.kill(worker_of(tmp_path / "tiny", 1), signal.SIGSTOP)
            since = time.monotonic()
            said = process.communicate(timeout=300)[1]
        assert time.monotonic() - since < WITHIN
        assert process.returncode == 1, said[-3000:]
        (told,) = of_keel(said)
        assert told.startswith("keel: rank 1 of 2 on ")
        assert "has not answered for 10 s" in told
        assert_nothing_is_left(tmp_path / "tiny")

    def test_an_interrupt_ends_all_workers(self, config: Path, cluster: str, tmp_path: Path) -> None:
        with launched(config, cluster, tmp_path) as process:
            await_updates(tmp_path / "tiny", 1)
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=60)[1]
        assert process.returncode == 130
        assert of_keel(said) == ["keel: interrupted; the same command goes on from the last checkpoint"]
        assert_nothing_is_left(tmp_path / "tiny")

    def test_what_is_wrong_everywhere_is_said_once_and_not_tried_again(
        self, config: Path, cluster: str, tmp_path: Path
    ) -> None:
        options = ("--ray", "--address", cluster, "--runs", tmp_path, "--max-restarts", 5)
        wrong = keel("launch", config, "ppo.model=/no/such/model", *options, "--nproc", 2)
        assert wrong.returncode == 2, wrong.stderr[-3000:]
        (told,) = of_keel(wrong.stderr)
        assert "/no/such/model" in told
        crowded = keel("launch", config, *options, "--nproc", 3)
        assert crowded.returncode == 2
        assert "3 ranks of 1 CPU each on 1 machines: the Ray cluster has room for 2 on 2" in crowded.stderr
        assert not (tmp_path / "tiny").exists()

    def test_a_ray_of_its_own_ends_with_the_command(
        self, config: Path, undisturbed: Path, tmp_path: Path, differences: Differences
    ) -> None:
        """Whose processes listen nowhere but on the loopback interface, and are gone with it."""
        options = ("--ray", "--address", "local", "--nproc", "2", "--runs", str(tmp_path), "--name", "own")
        command = [sys.executable, "-m", "keel", "launch", str(config), *options]
        process = subprocess.Popen(
            command, env={**os.environ, **jobs.ENVIRONMENT}, stderr=subprocess.PIPE, text=True
        )
        await_updates(tmp_path / "own", 1)
        ours = [process.pid, *jobs.children_of(process.pid)]
        assert len(ours) > 5
        assert {host for pid in ours for host in listens_at(pid)} == {"0100007F"}
        said = process.communicate(timeout=300)[1]
        assert process.returncode == 0, said[-3000:]
        assert differences(undisturbed, tmp_path / "own") == ["config.yaml"]
        until = time.monotonic() + 10
        while (left := [pid for pid in ours if jobs.is_alive(pid)]) and time.monotonic() < until:
            time.sleep(0.05)
        assert left == []

    def test_a_cluster_that_is_not_there_is_one_line(self, config: Path, tmp_path: Path) -> None:
        runs = tmp_path / "a" / "runs"
        gone = keel("launch", config, "--ray", "--nproc", 2, "--runs", runs, "--address", "127.0.0.4:7")
        assert gone.returncode == 2
        (told,) = of_keel(gone.stderr)
        assert "no Ray cluster at 127.0.0.4:7" in told
        assert "ray start --head" in told
        assert list(tmp_path.iterdir()) == []

    def test_a_start_that_came_to_no_work_is_none(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """`--fresh` is of the first start that works, not of one whose workers died before."""
        from keel.distributed import on_ray

        before: list[int] = []

        class Workers:
            def __len__(self) -> int:
                return 1

            def execute_single(self, number: int, work: Any, *given: Any) -> tuple[str, int]:
                if len(list(tmp_path.glob("start-*"))) == 1:
                    raise RuntimeError("the worker is gone")
                return "host", 1

            def execute(
                self, work: Any, host: str, port: int, starts: int, folder: str, *_: str
            ) -> list[str]:
                before.append(starts)
                (Path(folder) / on_ray._WORKED).touch()
                return [host]

        monkeypatch.setattr(on_ray, "ray", mock.MagicMock())
        settings: Any = mock.MagicMock(records=str(tmp_path))
        with pytest.raises(RuntimeError, match="is gone"):
            on_ray.RankBackend().on_start(Workers(), settings)
        for _ in range(2):
            on_ray.RankBackend().on_start(Workers(), settings)
        assert before == [0, 1]


def listens_at(pid: int) -> set[str]:
    """The addresses at which a process listens, the last 32 bits as the kernel writes them."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in _table(name)]
    listening = {row[9]: row[1].rpartition(":")[0][-8:] for row in rows if row[3] == "0A"}
    found: set[str] = set()
    with contextlib.suppress(OSError):
        for handle in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                inode = os.readlink(handle).removeprefix("socket:[").removesuffix("]")
                found |= {listening[inode]} if inode in listening else set()
    return found


def _table(name: str) -> list[str]:
    return Path(f"/proc/net/{name}").read_text().splitlines()[1:]
