"""One vLLM server that samples for several ranks: what it is asked, and what a run makes of it, do not depend
on how many there are. The server is the scripted one of tests/rollout; vLLM itself is in
test_vllm_real.py."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

from keel.distributed import group, launch
from keel.errors import EngineError, KeelError
from keel.rollout import GenerationRequest, NextTurn, TokenCount
from keel.rollout.protocol import HoldsWeights, Rows, TakesTurns
from keel.rollout.vllm import SharedEngine
from keel.types import Completion, Sampling

SCRIPTED = Path(__file__).parents[1] / "rollout" / "scripted_vllm.py"
_spec = importlib.util.spec_from_file_location("scripted_vllm", SCRIPTED)
assert _spec is not None
assert _spec.loader is not None
scripted_vllm = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(scripted_vllm)
GENERATE, ScriptedVllm = scripted_vllm.GENERATE, scripted_vllm.ScriptedVllm
WORKER = Path(__file__).with_name("worker.py")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


# ---------------------------------------------------------------- ranks as threads


class Threads:
    """Ranks of a run that are threads, for what an engine does between them."""

    def __init__(self, size: int, patch: pytest.MonkeyPatch) -> None:
        self.size, self.own = size, threading.local()
        self.meeting, self.told = threading.Barrier(size, timeout=20.0), list[Any]([None] * size)
        patch.setattr(group, "rank", lambda: self.own.rank)
        patch.setattr(group, "is_first", lambda: self.own.rank == 0)
        patch.setattr(group, "gathered", self.gathered)
        patch.setattr(group, "from_first_or_error", self.from_first_or_error)

    def gathered(self, value: Any) -> list[Any]:
        self.told[self.own.rank] = value
        self.meeting.wait()
        found = list(self.told)
        self.meeting.wait()
        return found

    def from_first_or_error(self, work: Callable[[], Any]) -> Any:
        value: Any = None
        if self.own.rank == 0:
            try:
                value = work()
            except KeelError as error:
                value = error
        value = self.gathered(value)[0]
        if isinstance(value, KeelError):
            raise value
        return value

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """What each rank's work returns or raises."""
        found: list[Any] = [None] * self.size

        def one(rank: int) -> None:
            self.own.rank = rank
            try:
                found[rank] = work(rank)
            except BaseException as error:
                found[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


class Server:
    """The first rank's engine: a row's response is its number among all, and its request's seed."""

    def __init__(self) -> None:
        self.calls: list[list[GenerationRequest]] = []
        self.taken = 0

    def take_weights(self) -> None:
        self.taken += 1

    def generate_all(self, requests: Sequence[GenerationRequest]) -> list[list[Completion]]:
        self.calls.append(list(requests))
        if any(3 in prompt for request in requests for prompt in request.prompts):
            raise EngineError("it is gone")
        found: list[list[Completion]] = []
        for request in requests:
            numbers = request.rows.numbers if request.rows else range(len(request.prompts))
            found.append(
                [
                    Completion(
                        tuple(prompt), (number, request.seed), "stop", (-0.1 * number, -2.0), "e" * number
                    )
                    for prompt, number in zip(request.prompts, numbers, strict=True)
                ]
            )  # fmt: skip
        return found


def asked(prompts: Sequence[Sequence[int]], numbers: Sequence[int], seed: int = 7) -> GenerationRequest:
    return GenerationRequest(prompts, Sampling(max_new_tokens=9), [1], 0, seed, rows=Rows(numbers, 9))


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> Callable[..., Any]:
    """Work for each of three ranks that share a server; what each returns, and the server."""

    def go(work: Callable[[SharedEngine, int], Any]) -> tuple[list[Any], Server]:
        threads, server = Threads(3, monkeypatch), Server()
        model: Any = SimpleNamespace()

        def of(rank: int) -> Any:
            first: Any = server if rank == 0 else None
            return work(SharedEngine(model, first, tokenizer), rank)

        return threads.run(of), server

    return go


def test_each_rank_gets_its_own_of_one_call(three: Any, tokenizer: Any) -> None:
    """One rank has no prompts, one asks by another seed (as in evaluations, where each has a part of its
    own); the weights are taken once."""

    def work(engine: SharedEngine, rank: int) -> Any:
        assert isinstance(engine, HoldsWeights)
        assert isinstance(engine, TakesTurns)
        engine.take_weights()
        if rank == 1:
            return engine.idle()
        prompts = [[4, 5], [6]] if rank == 0 else [[8, 8, 8]]
        request = asked(prompts, [2, 5] if rank == 0 else [0], seed=rank)
        request = replace(
            request,
            stop_texts=GenerationRequest.of(tokenizer, [], Sampling(stop=("e",)), 0).stop_texts,
        )
        count = TokenCount()
        return engine.generate(request, count), count

    (first, idle, last), server = three(work)
    assert idle is None
    assert first[0] == [
        Completion((4, 5), (2, 0), "stop", (-0.2, -2.0), "ee"),
        Completion((6,), (5, 0), "stop", (-0.5, -2.0), "eeeee"),
    ]
    assert last[0] == [Completion((8, 8, 8), (0, 2), "stop", (-0.0, -2.0), "")]
    assert (first[1].useful, last[1].computed) == (2 + 1 + 2, 3 + 1)
    assert [len(requests) for requests in server.calls] == [2]
    assert all(r.stop_texts is not None and r.stop_texts.texts == ("e",) for r in server.calls[0])
    assert server.taken == 1


def test_conversations_of_different_lengths_go_on_together(three: Any) -> None:
    """Rank 0 has three turns, rank 1 none, rank 2 one; then all ask once more."""

    def work(engine: SharedEngine, rank: int) -> Any:
        turns: list[tuple[int, ...]] = []

        def answer(row: int, completion: Completion) -> NextTurn | None:
            turns.append(completion.ids)
            return NextTurn([*completion.prompt_ids, 9], 5) if len(turns) < 3 - rank else None

        if rank == 1:
            engine.idle()
        else:
            engine.converse(asked([[4 + rank]], [rank]), answer)
        return turns, engine.generate(asked([[rank + 10]], [rank]))[0].prompt_ids

    found, server = three(work)
    assert [(len(turns), after) for turns, after in found] == [(3, (10,)), (0, (11,)), (1, (12,))]
    assert [[len(r.prompts) for r in requests] for requests in server.calls] == [[1, 1], [1], [1], [1, 1, 1]]
    assert len({request.seed for request in (calls[0] for calls in server.calls)}) == 3  # each turn its own


def test_what_the_server_fails_with_is_met_by_all(three: Any) -> None:
    found, _ = three(lambda engine, rank: engine.generate(asked([[rank + 1]], [rank])))
    assert [(type(error), str(error)) for error in found] == [(EngineError, "it is gone")] * 3


@pytest.mark.parametrize("fails", [False, True])
def test_the_server_answers_while_the_ranks_tell_each_other_other_things(three: Any, fails: bool) -> None:
    """Its thread speaks with no other rank: here it does not even know which rank it is. Rank 1 has no
    prompts."""

    def work(engine: SharedEngine, rank: int) -> Any:
        request = asked([[rank + 4], [3 if fails else 8]], [rank, rank + 3])
        pending = engine.ask(None if rank == 1 else request)
        done: list[Any] = []

        def answering() -> None:
            try:
                done.append(pending.answered())
            except BaseException as error:
                done.append(error)

        beside = threading.Thread(target=answering)
        if rank == 0:
            beside.start()
        others = group.gathered(rank)

        def came() -> list[Completion]:
            beside.join()
            if isinstance(done[0], BaseException):
                raise done[0]
            return done[0]

        return others, pending.taken(came)

    found, server = three(work)
    assert [len(requests) for requests in server.calls] == [2]
    if fails:
        assert [(type(error), str(error)) for error in found] == [(EngineError, "it is gone")] * 3
        return
    assert [others for others, _ in found] == [[0, 1, 2]] * 3
    assert [[(c.prompt_ids, c.ids[0]) for c in own] for _, own in found] == [
        [((4,), 0), ((8,), 3)], [], [((6,), 2), ((8,), 5)],
    ]  # fmt: skip


# ---------------------------------------------------------------- ranks as processes


@pytest.fixture
def server(tiny_model: Path) -> Iterator[Any]:
    one = ScriptedVllm(tiny_model)
    yield one
    one.kill()


def by_server(stages: dict[str, Any], address: str) -> dict[str, Any]:
    """Stages that sample from a server."""
    sampler = {"engine": "vllm", "address": address, "concurrency": 8}
    own = {"old_logp": "trainer"}  # the server's are in float32
    return {
        name: {
            **stage,
            "rollout": {**stage.get("rollout", {}), **sampler},
            **(own if stage["kind"] in ("ppo", "grpo") else {}),
        }
        for name, stage in stages.items()
    }


def rows_asked(calls: Sequence[tuple[str, Any]]) -> Counter[tuple[Any, ...]]:
    """What a server was asked for, in any order; probes aside."""
    bodies = [body for route, body in calls if route == GENERATE and "seed" in body["sampling_params"]]
    return Counter(
        (tuple(b["token_ids"]), b["sampling_params"]["seed"], b["sampling_params"]["max_tokens"])
        for b in bodies
    )


def close(one: Any, other: Any, within: float, path: str = "") -> None:
    """The same JSON, up to rounding."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key, value in one.items():
            close(value, other[key], within, f"{path}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for number, value in enumerate(one):
            close(value, other[number], within, f"{path}/{number}")
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=within, abs=within), path
    else:
        assert one == other, path


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def same(alone: Path, together: Path, stage: str, *files: str) -> None:
    """Weights, and lines of files, are those of one process."""
    for name in files:
        left, right = (lines_of(run / "stages" / stage / name) for run in (alone, together))
        assert left
        close(left, right, 1e-6, f"{stage}/{name}")
    for path in (alone / "stages" / stage / "model").rglob("*.safetensors"):
        weights, others = load_file(path), load_file(together / path.relative_to(alone))
        for name, tensor in weights.items():
            assert float((tensor - others[name]).abs().max()) < 1e-6, (stage, name)


@pytest.mark.ranks
@pytest.mark.parametrize(("ranks", "strategy"), [(2, "ddp"), (3, "ddp"), (2, "fsdp"), (3, "fsdp")])
def test_what_is_asked_and_learned_is_that_of_one_process(
    ranks: int, strategy: str, server: Any, in_float64: Any, on_policy_kinds: dict[str, Any]
) -> None:
    """On three ranks one has no prompts of what grpo samples again, and of an evaluation."""
    kinds = ["ppo", "grpo"] + (["distill", "online-dpo"] if strategy == "ddp" else [])
    stages = by_server({kind: on_policy_kinds[kind] for kind in kinds}, server.address)
    found: list[tuple[Path, Counter[Any], int]] = []
    for count, way in ((1, "ddp"), (ranks, strategy)):
        server.calls.clear()
        named = {f"{kind}-{ranks}-{strategy}": stage for kind, stage in stages.items()}
        place = in_float64(named, count, way) / way
        found.append((place, rows_asked(server.calls), server.count("/collective_rpc")))
    assert found[0][1:] == found[1][1:]
    for name in named:
        same(found[0][0], found[1][0], name, "metrics.jsonl", "samples.jsonl")
        facts = [json.loads((run / "stages" / name / "stage.json").read_text())["facts"] for run, *_ in found]
        assert facts[0]["engines"] == facts[1]["engines"]
        times = lines_of(found[1][0] / "stages" / name / "times.jsonl")
        one = lines_of(found[0][0] / "stages" / name / "times.jsonl")
        for row, other in zip(one, times, strict=True):  # of all ranks: four digits of each are kept
            tokens = [r.get("rollout", 0) * r.get("rollout/tokens_per_second", 0) for r in (row, other)]
            assert tokens[0] == pytest.approx(tokens[1], rel=0.05), name
        assert any(row.get("rollout/tokens_per_second", 0) > 0 for row in times)


@pytest.mark.ranks
@pytest.mark.parametrize(("ranks", "strategy"), [(2, "ddp"), (3, "ddp"), (2, "fsdp")])
def test_what_older_weights_have_sampled_is_that_of_one_process(
    ranks: int, strategy: str, server: Any, in_float64: Any, on_policy_kinds: dict[str, Any]
) -> None:
    """Ahead of its turn, and in rounds: the server is asked for the same rows, and given the same weights."""
    kinds = ("grpo-ahead", "grpo-partial")
    stages = by_server({kind: on_policy_kinds[kind] for kind in kinds}, server.address)
    named = {f"{kind}-{ranks}-{strategy}": stage for kind, stage in stages.items()}
    found: list[tuple[Path, Counter[Any], int]] = []
    for count, way in ((1, "ddp"), (ranks, strategy)):
        server.calls.clear()
        place = in_float64(named, count, way) / way
        found.append((place, rows_asked(server.calls), server.count("/collective_rpc")))
    assert found[0][1:] == found[1][1:]
    for name in named:
        same(found[0][0], found[1][0], name, "metrics.jsonl", "samples.jsonl")
    ahead, partial = (lines_of(found[1][0] / "stages" / name / "metrics.jsonl") for name in named)
    assert [row["rollout/staleness"] for row in ahead] == [0, 1, 1]
    assert any(row["rollout/carried"] > 0 for row in partial)
    assert all(row["rollout/staleness_kl"] > 0 for row in ahead[1:])


@pytest.mark.ranks
def test_a_server_that_dies_beside_the_training_costs_no_update(
    program: Path, on_policy_kinds: dict[str, Any], config_file: Callable[..., Path], tmp_path: Path
) -> None:
    """It samples for the second update while the first trains. Where it cannot be had again that one is kept,
    on all ranks; the same command goes on."""
    stage = grpo(on_policy_kinds, program)
    sampler = {**stage["rollout"], "ahead": 1, "restarts": 0}
    stage |= {"rollout": sampler, "importance_cap": 1.5, "save_every": 9}
    path = config_file(tmp_path / "config.yaml", {"g": stage})
    runs = ("run", path, "--runs", tmp_path, "--nproc", 2, "--name", "cut")
    (program / "deadly").write_text("9")  # behind a probe and the six rows of the first update
    cut = keel(*runs)
    assert cut.returncode == 1, cut.stderr[-3000:]
    assert len([line for line in cut.stderr.splitlines() if "the vLLM server died" in line]) == 1
    metrics = tmp_path / "cut/stages/g/metrics.jsonl"
    assert [row["step"] for row in lines_of(metrics)] == [1]
    again = keel(*runs)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "going on after step 1" in again.stderr
    assert [row["rollout/staleness"] for row in lines_of(metrics)] == [0, 0, 1, 1]
    assert all_gone(started(program))


@pytest.mark.ranks
def test_a_server_samples_with_adapters_that_are_cut(
    tiny_model: Path, in_float64: Any, on_policy_kinds: dict[str, Any]
) -> None:
    one = ScriptedVllm(tiny_model, lora=True)
    stage = by_server({"grpo": {**on_policy_kinds["grpo"], "lora": {"r": 2}}}, one.address)["grpo"]
    found: list[tuple[Path, Counter[Any], int]] = []
    for count, way in ((1, "ddp"), (2, "fsdp")):
        one.calls.clear()
        place = in_float64({"cut-lora": stage}, count, way) / way
        found.append((place, rows_asked(one.calls), one.count("/v1/load_lora_adapter")))
    one.kill()
    assert found[0][1:] == found[1][1:]
    assert found[0][2] > 1
    same(found[0][0], found[1][0], "cut-lora", "metrics.jsonl", "samples.jsonl")


@pytest.mark.ranks
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_episodes_with_tools_whose_turns_differ_are_those_of_one_process(
    strategy: str, clerk: Path, in_float64: Any, episode_kinds: dict[str, Any]
) -> None:
    one = ScriptedVllm(clerk)
    stages = by_server(episode_kinds, one.address)
    played = {
        key: stages["grpo"][key] for key in ("environment", "max_turns", "data", "sampling", "rollout")
    } | {"reward": {"kind": "environment"}}
    named = {
        f"grpo-{strategy}": stages["grpo"],
        f"judge-{strategy}": {**played, "kind": "evaluate", "models": [str(clerk)], "best_of": [2]},
    }
    found: list[tuple[Path, Counter[Any]]] = []
    for count, way in ((1, "ddp"), (3, strategy)):
        one.calls.clear()
        found.append((in_float64(named, count, way, how="episodes") / way, rows_asked(one.calls)))
    one.kill()
    assert found[0][1] == found[1][1]
    same(found[0][0], found[1][0], f"grpo-{strategy}", "metrics.jsonl", "samples.jsonl")
    same(found[0][0], found[1][0], f"judge-{strategy}", "samples.jsonl")
    assert lines_of(found[0][0] / "stages" / f"grpo-{strategy}" / "metrics.jsonl")[0]["rollout/turns"] > 1


@pytest.mark.ranks
def test_models_are_judged_and_the_best_chosen_as_by_one_process(
    server: Any, in_float64: Any, data: Any, tiny_model: Path, tiny_reward: Path
) -> None:
    """More ranks than prompts."""
    common = {
        "data": {"source": str(data.prompts), "rows": 2}, "sampling": {"max_new_tokens": 6},
        "reward": str(tiny_reward), "rollout": {"engine": "vllm", "address": server.address},
    }  # fmt: skip
    stages = {
        "judge": {"kind": "evaluate", "models": [str(tiny_model)], "best_of": [2], **common},
        "best": {
            "kind": "best_of_n", "model": str(tiny_model), "samples_per_prompt": 3, "holdout": 0,
            "batch_size": 2, "max_steps": 1, "lr": 1e-3, **common,
        },
    }  # fmt: skip
    found: list[tuple[Path, Counter[Any]]] = []
    for count in (1, 3):
        server.calls.clear()
        found.append((in_float64(stages, count, "ddp") / "ddp", rows_asked(server.calls)))
    assert found[0][1] == found[1][1]
    same(found[0][0], found[1][0], "judge", "samples.jsonl")
    same(found[0][0], found[1][0], "best", "best.jsonl", "metrics.jsonl")


# ---------------------------------------------------------------- what goes wrong


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """An environment whose `vllm` is the scripted server. `pids` holds a line for each start."""
    place = tmp_path / "env"
    (place / "bin").mkdir(parents=True)
    line = f'exec {sys.executable} {SCRIPTED} {place} "$@"'
    (place / "bin" / "vllm").write_text(f"#!/bin/sh\nexport PYTHONPATH=\n{line}\n")
    (place / "bin" / "vllm").chmod(0o755)
    return place


def keel(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "keel", *map(str, arguments)]
    environment = {**os.environ, **ENVIRONMENT}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def started(program: Path) -> list[int]:
    return [int(line) for line in (program / "pids").read_text().split()]


def all_gone(pids: Sequence[int], seconds: float = 20.0) -> bool:
    def lives(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    end = time.monotonic() + seconds
    while any(map(lives, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(lives, pids))


def grpo(on_policy_kinds: dict[str, Any], program: Path) -> dict[str, Any]:
    stage = {
        key: value for key, value in on_policy_kinds["grpo"].items() if key not in ("eval_every", "eval_data")
    }
    sampler = {"engine": "vllm", "environment": str(program), "concurrency": 1, "restarts": 1}
    return {**stage, "updates": 4, "save_every": 2, "resample": 0, "rollout": sampler, "old_logp": "trainer"}


@pytest.mark.ranks
def test_a_server_that_dies_costs_no_update_and_one_that_stays_away_ends_all_ranks_with_one_line(
    program: Path, on_policy_kinds: dict[str, Any], config_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = config_file(tmp_path / "config.yaml", {"g": grpo(on_policy_kinds, program)})
    runs = ("run", path, "--runs", tmp_path, "--nproc", 2, "--name")
    whole = keel(*runs, "whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert all_gone(started(program))
    variables = json.loads((program / "variables").read_text())
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} & variables.keys()
    (program / "deadly").write_text("9")
    hurt = keel(*runs, "hurt")
    assert hurt.returncode == 0, hurt.stderr[-3000:]
    assert "it is started again" in hurt.stderr
    metrics = [lines_of(tmp_path / name / "stages/g/metrics.jsonl") for name in ("whole", "hurt")]
    assert [row["step"] for row in metrics[1]] == [1, 2, 3, 4]
    close(metrics[0], metrics[1], 1e-5)
    facts = json.loads((tmp_path / "hurt/stages/g/stage.json").read_text())["facts"]["engines"][0]
    assert facts["restarts"] == 1
    # no start is left to it in update 4: what was done is kept, and the same command goes on
    (program / "deadly").write_text("24")
    none = keel(*runs, "none", "stages.g.rollout.restarts=0")
    assert none.returncode == 1, none.stderr[-3000:]
    told = [line for line in none.stderr.splitlines() if "the vLLM server died" in line]
    assert len(told) == 1, none.stderr[-3000:]
    done = len(lines_of(tmp_path / "none/stages/g/metrics.jsonl"))
    assert done == 3
    again = keel(*runs, "none", "stages.g.rollout.restarts=0")
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"going on after step {done}" in again.stderr
    close(metrics[0], lines_of(tmp_path / "none/stages/g/metrics.jsonl"), 1e-5)
    assert all_gone(started(program))


@pytest.mark.ranks
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_takes_the_server_with_it_and_the_same_command_goes_on(
    rank: int, program: Path, on_policy_kinds: dict[str, Any], config_file: Callable[..., Path],
    tmp_path: Path, differences: Callable[[Path, Path], list[str]],
) -> None:  # fmt: skip
    stage = {**grpo(on_policy_kinds, program), "save_every": 1}
    path = config_file(tmp_path / "config.yaml", {"g": stage}, distributed={"timeout": 20})
    arguments = ("run", path, "--runs", tmp_path, "--name")
    whole = keel(*arguments, "whole", "--nproc", 2)
    assert whole.returncode == 0, whole.stderr[-3000:]
    fault = ("fault", "kill", rank, 9, *arguments, "killed")
    command = [sys.executable, str(WORKER), *map(str, fault)]
    with tempfile.TemporaryDirectory() as folder:
        more = {**ENVIRONMENT, "KEEL_TEST_FAULT_MET": str(Path(folder) / "met")}
        outcome = launch.run(command, 2, more)
    assert outcome.code == 1
    assert "SIGKILL" in outcome.line
    assert all_gone(started(program))
    again = keel(*arguments, "killed", "--nproc", 2)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "going on after step 2" in again.stderr
    left = differences(tmp_path / "whole", tmp_path / "killed")
    assert [name for name in left if not name.endswith("server.log")] == ["config.yaml"]
