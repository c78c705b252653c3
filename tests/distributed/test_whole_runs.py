"""`keel run --nproc` as a person uses it: killed, stopped and failing ranks, and what the same command makes
of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from keel.distributed import launch

pytestmark = pytest.mark.ranks
WORKER = Path(__file__).with_name("worker.py")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
WITHIN = 60.0  # seconds in which a job ends once a rank is gone
Differences = Callable[[Path, Path], list[str]]


def keel(*arguments: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "keel", *map(str, arguments)]
    environment = {**os.environ, **ENVIRONMENT}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def with_fault(what: str, rank: int, step: int, *arguments: object) -> launch.Outcome:
    """A run on two ranks one of which meets a fault; it is over soon afterwards."""
    command = [sys.executable, str(WORKER), "fault", what, str(rank), str(step), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        met = Path(folder) / "met"
        outcome = launch.run(command, 2, {**ENVIRONMENT, "KEEL_TEST_FAULT_MET": str(met)})
        assert time.time() - float(met.read_text()) < WITHIN
    return outcome


@pytest.fixture(scope="module")
def config(
    tmp_path_factory: pytest.TempPathFactory, all_kinds: dict[str, Any], config_file: Callable[..., Path]
) -> Path:
    """Two stages of some steps, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("config")
    more = {"max_steps": 6, "save_every": 1, "eval_every": 2, "batch_size": 4}
    stages = {"tuned": {**all_kinds["tuned"], **more}, "dpo": {**all_kinds["dpo"], **more, "model": "tuned"}}
    return config_file(folder / "config.yaml", stages, distributed={"timeout": 20})


@pytest.fixture(scope="module")
def undisturbed(config: Path) -> Path:
    done = keel("run", config, "--runs", config.parent, "--name", "undisturbed", "--nproc", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    return config.parent / "undisturbed"


def steps_of(run: Path, stage: str) -> int:
    log = run / "stages" / stage / "metrics.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_two_runs_on_two_ranks_are_alike_to_the_byte_and_a_finished_one_stays(
    config: Path, undisturbed: Path, tmp_path: Path, differences: Differences
) -> None:
    again = keel("run", config, "--runs", tmp_path, "--name", "again", "--nproc", 2, "--json")
    assert again.returncode == 0, again.stderr[-3000:]
    assert differences(undisturbed, tmp_path / "again") == ["config.yaml"]  # which holds its name
    assert {s["status"] for s in json.loads(again.stdout)["stages"].values()} == {"done"}
    third = keel("run", config, "--runs", tmp_path, "--name", "again", "--json")
    assert {s["status"] for s in json.loads(third.stdout)["stages"].values()} == {"done before"}


@pytest.mark.parametrize(("rank", "step"), [(1, 3), (0, 4), (1, 9)])
def test_a_run_one_of_whose_ranks_is_killed_goes_on_by_the_same_command_to_the_same_bytes(
    rank: int, step: int, config: Path, undisturbed: Path, tmp_path: Path, differences: Differences
) -> None:
    arguments = ("run", config, "--runs", tmp_path, "--name", "killed")
    outcome = with_fault("kill", rank, step, *arguments)
    assert outcome.code == 1
    assert f"rank {rank} of 2" in outcome.line
    assert "SIGKILL" in outcome.line
    assert keel(*arguments, "--nproc", 2).returncode == 0
    assert differences(undisturbed, tmp_path / "killed") == ["config.yaml"]


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_begun_on_two_ranks_and_ended_on_one_or_four_differs_by_rounding(
    strategy: str, ranks: int, config: Path, undisturbed: Path, tmp_path: Path
) -> None:
    arguments = ("run", config, f"distributed.strategy={strategy}", "--runs", tmp_path, "--name", "changed")
    assert with_fault("kill", 1, 4, *arguments).code == 1
    begun = steps_of(tmp_path / "changed", "tuned")
    assert 0 < begun < 6
    done = keel(*arguments, *(("--nproc", ranks) if ranks > 1 else ()))
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"going on after step {begun}" in done.stderr
    for path in undisturbed.glob("stages/*/model/*.safetensors"):
        one, other = load_file(path), load_file(tmp_path / "changed" / path.relative_to(undisturbed))
        for name, tensor in one.items():
            assert float((tensor - other[name]).abs().max()) < 1e-5, name


def test_cut_weights_are_gone_on_with_to_the_same_bytes(
    config: Path, tmp_path: Path, differences: Differences
) -> None:
    arguments = ("run", config, "distributed.strategy=fsdp", "--runs", tmp_path, "--nproc", 2, "--name")
    assert keel(*arguments, "whole").returncode == 0
    killed = ("run", config, "distributed.strategy=fsdp", "--runs", tmp_path, "--name", "killed")
    assert with_fault("kill", 0, 5, *killed).code == 1
    # what lies in host memory goes on from what lay elsewhere
    again = keel("run", config, "distributed.offload=true", *arguments[2:], "killed")
    assert again.returncode == 0, again.stderr[-3000:]
    assert "`offload` changes nothing on the CPU" in again.stderr
    assert differences(tmp_path / "whole", tmp_path / "killed") == ["config.yaml"]


@pytest.mark.parametrize(("kind", "step"), [("distill", 12), ("online-dpo", 2)])
def test_cut_students_and_pairs_are_gone_on_with_to_the_same_bytes(
    kind: str, step: int, tmp_path: Path, on_policy_kinds: dict[str, Any], config_file: Callable[..., Path],
    differences: Differences,
) -> None:  # fmt: skip
    stage = {**on_policy_kinds[kind], "updates": 2, "save_every": 1}
    path = config_file(
        tmp_path / "config.yaml", {kind: stage}, distributed={"timeout": 20, "strategy": "fsdp"}
    )
    arguments = ("run", path, "--runs", tmp_path, "--nproc", 2, "--name")
    whole = keel(*arguments, "whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert with_fault("kill", 0, step, "run", path, "--runs", tmp_path, "--name", "killed").code == 1
    again = keel(*arguments, "killed")
    assert again.returncode == 0, again.stderr[-3000:]
    assert "going on after step 1" in again.stderr
    assert differences(tmp_path / "whole", tmp_path / "killed") == ["config.yaml"]


def test_roles_on_one_base_that_is_cut_are_gone_on_with(
    tmp_path: Path, one_base_kinds: dict[str, Any], config_file: Callable[..., Path],
    differences: Differences,
) -> None:  # fmt: skip
    """By two ranks to the same bytes, by another number of them to rounding; with weights to go back to."""
    more = {"save_every": 1, "control": {"on_finding": "rollback"}}
    stages = {name: one_base_kinds[name] for name in ("scores", "others")}
    stages["ppo"] = {**one_base_kinds["one-base"], **more}
    path = config_file(tmp_path / "config.yaml", stages, distributed={"timeout": 20, "strategy": "fsdp"})
    arguments = ("run", path, "--runs", tmp_path, "--name")
    whole = keel(*arguments, "whole", "--nproc", 2)
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert with_fault("kill", 1, 13, *arguments, "killed").code == 1
    shutil.copytree(tmp_path / "killed", tmp_path / "fewer")
    again = keel(*arguments, "killed", "--nproc", 2)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "going on after step 1" in again.stderr
    assert differences(tmp_path / "whole", tmp_path / "killed") == ["config.yaml"]
    alone = keel(*arguments, "fewer")
    assert alone.returncode == 0, alone.stderr[-3000:]
    assert "going on after step 1" in alone.stderr
    for saved in (tmp_path / "whole").glob("stages/ppo/**/*.safetensors"):
        one, other = load_file(saved), load_file(tmp_path / "fewer" / saved.relative_to(tmp_path / "whole"))
        assert all(float((tensor - other[name]).abs().max()) < 1e-5 for name, tensor in one.items())


def test_cut_policies_are_gone_on_with_to_the_same_bytes(
    tmp_path: Path,
    on_policy_kinds: dict[str, Any],
    config_file: Callable[..., Path],
    differences: Differences,
) -> None:
    """The critic learns from the first update on, the policy from the second, with a batch in flight."""
    more = {"save_every": 1, "rollout": {"ahead": 1}, "importance_cap": 2.0}
    stage = {key: value for key, value in on_policy_kinds["ppo"].items() if key != "curriculum"} | more
    path = config_file(tmp_path / "config.yaml", {"ppo": stage}, distributed={"timeout": 20})
    arguments = ("run", path, "distributed.strategy=fsdp", "--runs", tmp_path, "--nproc", 2, "--name")
    whole = keel(*arguments, "whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    killed = ("run", path, "distributed.strategy=fsdp", "--runs", tmp_path, "--name", "killed")
    assert with_fault("kill", 1, 12, *killed).code == 1
    again = keel(*arguments, "killed")
    assert again.returncode == 0, again.stderr[-3000:]
    assert "going on after step 1" in again.stderr
    assert differences(tmp_path / "whole", tmp_path / "killed") == ["config.yaml"]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("raise", "ValueError: a reward of mine is broken"),
        ("stop", "has not answered for 10 s"),
        ("spin", "did not come to where the others waited"),
    ],
)
def test_a_rank_that_raises_stops_or_hangs_ends_the_job_with_one_line(
    fault: str, words: str, config: Path, tmp_path: Path
) -> None:
    outcome = with_fault(fault, 1, 3, "run", config, "--runs", tmp_path)
    assert outcome.code == 1
    assert words in outcome.line
    assert "rank 1 of 2 on " in outcome.line
    assert "\n" not in outcome.line
    left = [p.name for p in (tmp_path / "tiny").rglob("*") if "partial" in p.name or p.name.endswith(".gone")]
    assert left == []
    assert keel("run", config, "--runs", tmp_path, "--nproc", 2).returncode == 0


def test_what_each_rank_does_by_itself_may_take_one_longer_than_the_timeout(tmp_path: Path) -> None:
    """A long response, a tool, a judge that is asked again."""
    out = tmp_path / "found.json"
    outcome = launch.run([sys.executable, str(WORKER), "late", str(out)], 2)
    assert outcome.code == 0, outcome.line
    assert json.loads(out.read_text()) == [[2, 3], [1, 3]]


def test_a_gradient_that_is_not_finite_on_one_rank_ends_all_at_the_same_step(
    config: Path, tmp_path: Path
) -> None:
    outcome = with_fault("nan", 1, 3, "run", config, "--runs", tmp_path)
    assert outcome.code == 1
    assert outcome.line.startswith("tuned, step 3: the gradient is not finite")
    assert steps_of(tmp_path / "tiny", "tuned") == 2


def test_pairs_are_collected_and_models_judged_as_by_one_process(
    data: Any, tiny_model: Path, tiny_reward: Path, tmp_path: Path, config_file: Callable[..., Path]
) -> None:
    """`collect` is the first rank's work alone; it ends the run where it waits for people."""
    common = {"data": str(data.prompts), "sampling": {"max_new_tokens": 6}}
    judge = {
        "kind": "evaluate", "models": [str(tiny_model)], "reward": str(tiny_reward), "best_of": [2],
        "batch_size": 8, **common,
    }  # fmt: skip
    pairs = {"kind": "collect", "model": str(tiny_model), "pairs": 4, "annotators": "people", **common}
    path = config_file(tmp_path / "config.yaml", {"judge": judge, "pairs": pairs})
    one, two = (keel("run", path, "--runs", tmp_path, "--name", f"on-{n}", "--nproc", n) for n in (1, 2))
    assert one.returncode == two.returncode == 3, two.stderr[-3000:]
    waits = [[line for line in done.stderr.splitlines() if "wait for people" in line] for done in (one, two)]
    assert waits[0][0].replace("on-1", "on-2") == waits[1][0]
    alone, together = (tmp_path / f"on-{n}" / "stages" for n in (1, 2))
    assert (alone / "pairs/pairs.jsonl").read_bytes() == (together / "pairs/pairs.jsonl").read_bytes()
    results = [json.loads((run / "judge/result.json").read_text()) for run in (alone, together)]
    samples = [
        [json.loads(line) for line in (run / "judge/samples.jsonl").read_text().splitlines()]
        for run in (alone, together)
    ]
    assert [row["completion"] for row in samples[0]] == [row["completion"] for row in samples[1]]
    means = [result["models"][str(tiny_model)] for result in results]
    assert means[0].keys() == means[1].keys()
    for name, value in means[0].items():
        if isinstance(value, dict) and "mean" in value:
            assert value["mean"] == pytest.approx(means[1][name]["mean"], rel=1e-5, abs=1e-5), name


def test_torchrun_starts_the_ranks_as_well(
    config: Path, undisturbed: Path, tmp_path: Path, differences: Differences
) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [sys.executable, *launcher, "keel", "run", str(config), "--runs", str(tmp_path)]
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert differences(undisturbed, tmp_path / "tiny") == ["config.yaml"]
    # as torchrun starts it: its own parser refuses --nproc, of which it has longer forms
    keel_run = [sys.executable, "-m", "keel", "run", str(config), "--runs", str(tmp_path), "--nproc", "2"]
    twice = subprocess.run(
        keel_run, env={**environment, "RANK": "0", "WORLD_SIZE": "2"}, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert twice.returncode != 0
    assert "--nproc has no effect under torchrun" in twice.stderr


def test_an_interrupted_run_ends_its_ranks_and_says_one_line(config: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "keel", "run", str(config), "--runs", str(tmp_path), "--nproc", "2"]
    process = subprocess.Popen(
        command, env={**os.environ, **ENVIRONMENT}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 120
    while steps_of(tmp_path / "tiny", "tuned") < 1 and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert [line for line in said.splitlines() if line.startswith("keel: ")] == [
        "keel: interrupted; the same command goes on from the last checkpoint"
    ]
    assert keel("run", config, "--runs", tmp_path, "--nproc", 2).returncode == 0
