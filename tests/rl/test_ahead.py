"""`rollout.ahead`: which weights sample, what is in flight when a run is cut off, what corrects for it."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from keel.config import parse
from keel.errors import EngineError, UsageError
from keel.rl import loop, rollout, setup
from keel.rollout import HoldsWeights, ReferenceEngine
from keel.rollout.vllm import SharedEngine


@pytest.fixture
def trained(run: Any, data: Any, tiny_model: Path, tiny_reward: Path, tmp_path: Path) -> Any:
    """A run of GRPO that samples ahead: its folder and its metrics."""

    def go(name: str = "run", **more: Any) -> tuple[Path, list[dict[str, float]]]:
        stage = {
            "kind": "grpo", "model": str(tiny_model), "reward": str(tiny_reward),
            "data": str(data.prompts), "batch_size": 4, "samples_per_prompt": 2, "updates": 3, "lr": 3e-3,
            "sampling": {"max_new_tokens": 4}, "rollout": {"ahead": 1}, "importance_cap": 1.2,
            "save_every": 1, "control": "off",
        }  # fmt: skip
        run({"stages": {"rl": stage | more}}, tmp_path / name)
        folder = tmp_path / name / "stages" / "rl"
        return folder, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    return go


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    """Each rollout's seed, and a number of the weights that sampled."""
    seen: list[tuple[int, float]] = []
    original = rollout.draw

    def draw(opened: Any, prompts: Any, dealt: Any, seed: int) -> Any:
        weights = next(iter(opened.roles.policy.parameters()))
        seen.append((seed, float(weights.detach().double().abs().sum())))
        return original(opened, prompts, dealt, seed)

    monkeypatch.setattr(rollout, "draw", draw)
    return seen


def test_an_update_learns_from_what_the_weights_before_the_last_update_said(
    trained: Any, draws: list[tuple[int, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And weighs each token by the ratio of both policies, up to the cap."""
    collect, corrected = loop.collect, list[bool]()

    def collecting(*given: Any) -> Any:
        batch = collect(*given)
        mask, scored = batch.episodes.mask, batch.experience.scored
        then = rollout.sampled_logp(batch.experience.completions, mask)
        ratio = (scored.logp - then).exp().clamp(max=1.2)
        torch.testing.assert_close(batch.episodes.weights[mask], ratio[mask])
        corrected.append(bool((ratio[mask] - 1).abs().max() > 1e-3))
        return batch

    monkeypatch.setattr(loop, "collect", collecting)
    _, rows = trained()
    assert corrected == [False, True, True]
    seeds, weights = [seed for seed, _ in draws], [number for _, number in draws]
    assert len(draws) == len(set(seeds)) == 3
    assert weights[0] == weights[1]  # of update 1 and, before it trains, of update 2
    assert weights[2] != weights[1]
    assert [row["rollout/staleness"] for row in rows] == [0, 1, 1]
    assert rows[0]["rollout/staleness_kl"] < 1e-9
    assert all(row["rollout/staleness_kl"] > 1e-6 for row in rows[1:])
    assert all(0 <= row["rollout/importance_capped"] <= 1 for row in rows)
    assert "rollout/sampler_drift" in rows[0]  # which is of rounding alone
    assert not any("rollout/sampler_drift" in row for row in rows[1:])
    assert all(row["val/ratio_first"] == 1 for row in rows)


def test_a_run_that_was_cut_off_goes_on_with_what_was_in_flight(
    trained: Any, monkeypatch: pytest.MonkeyPatch, differences: Callable[[Path, Path], list[str]]
) -> None:
    whole, _ = trained("whole")
    with monkeypatch.context() as patched:
        original = loop.learn

        def learn(algorithm: Any, optimizers: Any, episodes: Any, update: int, state: Any) -> Any:
            if update == 2:
                raise KeyboardInterrupt
            return original(algorithm, optimizers, episodes, update, state)

        patched.setattr(loop, "learn", learn)
        with pytest.raises(KeyboardInterrupt):
            trained("cut")
    cut, _ = trained("cut")
    assert differences(whole.parent.parent, cut.parent.parent) == []


class Apart(ReferenceEngine):
    """Samples with a copy of the weights."""

    def __init__(self, model: Any) -> None:
        super().__init__(copy.deepcopy(model))
        self.trained, self.training, self.beside = model, threading.Event(), 0

    def take_weights(self) -> None:
        self.model.load_state_dict(self.trained.state_dict())
        self.training.clear()

    def generate(self, request: Any, count: Any = None) -> Any:
        if threading.current_thread() is not threading.main_thread():
            assert self.training.wait(60), "nothing trained meanwhile"
            self.beside += 1
        return super().generate(request, count)

    def generate_all(self, requests: Any) -> Any:
        return [self.generate(request) for request in requests]


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
def test_an_engine_with_weights_of_its_own_samples_while_the_update_trains(
    shared: bool, trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the numbers are those of sampling first. shared: as one that several ranks share."""
    alone, rows = trained("alone", engine="reference")
    opened: list[Apart] = []
    learn = loop.learn

    def learning(*given: Any) -> Any:
        opened[0].training.set()
        return learn(*given)

    def open_engine(config: Any, policy: Any, run: Any, tokenizer: Any, length: Any) -> Any:
        opened.append(Apart(policy))
        return SharedEngine(policy, cast("Any", opened[0]), tokenizer) if shared else opened[0]

    monkeypatch.setattr(setup, "open_engine", open_engine)
    monkeypatch.setattr(loop, "learn", learning)
    beside, others = trained("beside", engine="reference")
    assert isinstance(opened[0], HoldsWeights)
    assert opened[0].beside == 2
    assert rows == others
    assert (alone / "model" / "model.safetensors").read_bytes() == (
        beside / "model" / "model.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_what_fails_beside_the_training_ends_the_run(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Apart):
        def generate(self, request: Any, count: Any = None) -> Any:
            if threading.current_thread() is not threading.main_thread():
                raise UsageError("the server is gone")
            return super().generate(request, count)

    monkeypatch.setattr(setup, "open_engine", lambda config, policy, *_: Broken(policy))
    with pytest.raises(UsageError, match="the server is gone"):
        trained(updates=2)


@pytest.mark.slow
def test_an_engine_that_fails_beside_the_training_costs_no_update(
    trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What trained meanwhile is kept, although no checkpoint was due; the same command goes on."""

    class Gone(Apart):
        def generate(self, request: Any, count: Any = None) -> Any:
            if threading.current_thread() is not threading.main_thread():
                raise EngineError("the server is gone")
            return super().generate(request, count)

    with monkeypatch.context() as patched:
        patched.setattr(setup, "open_engine", lambda config, policy, *_: Gone(policy))
        with pytest.raises(EngineError, match="the server is gone"):
            trained(save_every=10)
    _, rows = trained(save_every=10)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["rollout/staleness"] for row in rows] == [0, 0, 1]  # nothing was in flight


@pytest.mark.slow
def test_what_a_sampler_refuses_costs_no_update(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine of another package that gives nothing of use, say: the updates before it are kept."""
    original, calls = rollout.draw, list[int]()

    def draw(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise UsageError("engine 'mine' returned 3 completions for 4 prompts")
        return original(*given)

    monkeypatch.setattr(rollout, "draw", draw)
    for _ in range(2):  # the second goes on
        try:
            _, rows = trained(rollout={}, save_every=10)
        except UsageError:
            assert len(calls) == 2
    assert len(calls) == 4  # three updates, one of them twice
    assert [row["step"] for row in rows] == [1, 2, 3]


@pytest.mark.slow
def test_weights_that_are_put_back_sample_again(
    trained: Any, draws: list[tuple[int, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    see = loop.Monitor.see

    def seeing(self: Any, update: int, metrics: Any, state: Any) -> Any:
        self.rollbacks += update == 2
        return see(self, update, metrics, state)

    monkeypatch.setattr(loop.Monitor, "see", seeing)
    _, rows = trained()
    assert [row["rollout/staleness"] for row in rows] == [0, 1, 0]
    assert len(draws) == 4
    assert draws[2][0] == draws[3][0]  # the same prompts, the same random numbers


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"importance_cap": None}, "set `importance_cap`"),
        ({"resample": 1}, "`rollout.ahead` does not go with `resample`"),
        ({"curriculum": {}}, "`rollout.ahead` does not go with `curriculum`"),
        ({"environment": "world:shop"}, "`rollout.ahead` does not go with `tools` or `environment`"),
        ({"updates": 1}, "`rollout.ahead` has no effect with one update"),
        ({"rollout": {"ahead": 2}}, "rollout.ahead: must be at most 1, not 2"),
        ({"rollout": {"ahead": 1, "engine": "vllm", "sleep": True}}, "when `rollout.sleep` has it sleep"),
    ],
)
def test_what_cannot_be_sampled_ahead_is_refused(more: dict[str, Any], message: str) -> None:
    stage = {
        "kind": "grpo", "model": "m", "reward": [{"kind": "length", "high": 2}], "data": "d",
        "rollout": {"ahead": 1}, "importance_cap": 2.0,
    }  # fmt: skip
    parse({"name": "x", "stages": {"rl": stage}})
    with pytest.raises(UsageError, match=message):
        parse({"name": "x", "stages": {"rl": stage | more}})
