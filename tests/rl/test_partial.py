"""`rollout.partial`: what an update learns from, by which weights its tokens were drawn, and what a run that
was cut off goes on with."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from keel.config import parse
from keel.data.stops import stop_texts
from keel.distributed.group import Group
from keel.errors import EngineError, RewardError, UsageError
from keel.rl import loop, partial, rollout
from keel.rl.rollout import PromptExample
from keel.rollout.sampling import uniform_draws
from keel.rundir.stage_run import StageRun
from keel.types import Completion

SAMPLING = {"max_new_tokens": 9, "temperature": 1.5}
STILL = 1e-30  # a learning rate at which no weight in float32 moves


@pytest.fixture
def trained(run: Any, data: Any, tiny_model: Path, tiny_reward: Path, tmp_path: Path) -> Any:
    """A run of GRPO with partial rollouts: its folder and its metrics."""

    def go(name: str = "run", **more: Any) -> tuple[Path, list[dict[str, float]]]:
        stage = {
            "kind": "grpo", "model": str(tiny_model), "reward": str(tiny_reward),
            "data": str(data.prompts), "batch_size": 4, "samples_per_prompt": 2, "updates": 4, "lr": 3e-3,
            "sampling": SAMPLING, "rollout": {"partial": 3},
            "importance_cap": 1.2, "save_every": 1, "control": "off",
        }  # fmt: skip
        run({"stages": {"rl": stage | more}}, tmp_path / name)
        folder = tmp_path / name / "stages" / "rl"
        return folder, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    return go


@pytest.fixture
def learned(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each update learned from."""
    seen: list[Any] = []
    collect = loop.collect

    def collecting(*given: Any) -> Any:
        seen.append(collect(*given))
        return seen[-1]

    monkeypatch.setattr(loop, "collect", collecting)
    return seen


def responses(batches: list[Any]) -> list[list[Completion]]:
    return [list(batch.experience.completions) for batch in batches]


def test_weights_that_stand_still_give_the_responses_of_whole_rollouts(
    trained: Any, learned: list[Any]
) -> None:
    """The same prompts, groups, tokens and ends in each update, and nothing is left over."""
    stops = {**SAMPLING, "stop": ["e", "o", "i", "th"]}
    still: dict[str, Any] = {"lr": STILL, "sampling": stops, "updates": 3, "save_every": 10}
    _, rows = trained("whole", **still, rollout={})
    whole, lengths = responses(learned), {len(c.ids) for batch in responses(learned) for c in batch}
    learned.clear()
    _, carried = trained("partial", **still)
    for ours, theirs in zip(responses(learned), whole, strict=True):
        assert [replace(c, logp=()) for c in ours] == [replace(c, logp=()) for c in theirs]
        for mine, own in zip(ours, theirs, strict=True):
            assert mine.logp == pytest.approx(own.logp, abs=1e-4)
    assert 9 in lengths  # some were cut off,
    assert len(lengths) > 3  # others ended in any round
    assert [row["objective/scores"] for row in carried] == pytest.approx(
        [row["objective/scores"] for row in rows], abs=1e-4
    )
    assert [row["rollout/in_flight"] > 0 for row in carried] == [True, True, False]
    assert carried[0]["rollout/carried"] == 0
    assert all(row["rollout/carried"] > 0 for row in carried[1:])


@pytest.mark.slow
def test_each_token_is_weighed_by_what_has_changed_since_its_own_round(
    trained: Any, learned: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[tuple[int, ...], tuple[tuple[float, ...], float]] = {}  # a prefix → log π, and which weights
    completed = rollout.completed

    def completing(setup: Any, request: Any, count: Any) -> list[Completion]:
        weights = float(next(iter(setup.roles.policy.parameters())).detach().double().abs().sum())
        done = completed(setup, request, count)
        if request.draws is not None:  # else it is an evaluation, of whole responses
            drawn.update({(*c.prompt_ids, *c.ids): (c.logp, weights) for c in done})
            assert all(len(c.ids) <= 3 for c in done)
        return done

    monkeypatch.setattr(rollout, "completed", completing)
    _, rows = trained()
    several = 0
    for batch in learned:
        mask, scored = batch.episodes.mask, batch.experience.scored
        for c in batch.experience.completions:
            parts = [drawn[(*c.prompt_ids, *c.ids[:end])] for end in (3, 6, 9) if end < len(c.ids)]
            parts.append(drawn[(*c.prompt_ids, *c.ids)])
            assert c.logp == tuple(value for logp, _ in parts for value in logp)
            several += len({weights for _, weights in parts}) > 1
        then = rollout.sampled_logp(batch.experience.completions, mask)
        ratio = (scored.logp - then).exp().clamp(max=1.2)
        torch.testing.assert_close(batch.episodes.weights[mask], ratio[mask])
    assert several > 0
    assert [row["rollout/staleness"] == 0 for row in rows] == [True, False, False, False]
    assert all(row["rollout/staleness"] <= 2 for row in rows)  # three rounds for nine tokens
    assert all(row["rollout/staleness_kl"] > 1e-7 for row in rows[1:])


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on_with_what_was_on_its_way(
    trained: Any, monkeypatch: pytest.MonkeyPatch, differences: Callable[[Path, Path], list[str]]
) -> None:
    whole, _ = trained("whole")
    with monkeypatch.context() as patched:
        original = loop.learn

        def learn(algorithm: Any, optimizers: Any, episodes: Any, update: int, state: Any) -> Any:
            if update == 3:
                raise KeyboardInterrupt
            return original(algorithm, optimizers, episodes, update, state)

        patched.setattr(loop, "learn", learn)
        with pytest.raises(KeyboardInterrupt):
            trained("cut")
    cut, _ = trained("cut")
    assert differences(whole.parent.parent, cut.parent.parent) == []


@pytest.mark.slow
@pytest.mark.parametrize("fails", ["reward", "engine", "evaluation"])
def test_what_fails_in_an_update_loses_no_response(
    fails: str,
    trained: Any,
    data: Any,
    monkeypatch: pytest.MonkeyPatch,
    differences: Callable[[Path, Path], list[str]],
) -> None:
    """Neither those that had ended when a reward failed, nor the order in which others are begun when an
    engine did, nor what was on its way when held-out prompts could not be judged."""
    more: dict[str, Any] = {"save_every": 10}
    if fails == "evaluation":
        more |= {"eval_data": str(data.prompts), "eval_every": 1}
    whole, _ = trained("whole", **more)
    where, name = {
        "reward": (loop, "collect"), "engine": (rollout, "completed"), "evaluation": (rollout, "evaluate"),
    }[fails]  # fmt: skip
    calls, original, error = 0, getattr(where, name), EngineError if fails == "engine" else RewardError

    def failing(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error("not now")
        return original(*given)

    with monkeypatch.context() as patched:
        patched.setattr(where, name, failing)
        with pytest.raises(error, match="not now"):
            trained("cut", **more)
    cut, _ = trained("cut", **more)
    assert differences(whole.parent.parent, cut.parent.parent) == []


def test_a_stop_string_that_two_rounds_have_drawn_ends_a_response(tokenizer: Any) -> None:
    stops = stop_texts(tokenizer, ["dog."])
    before, new = (tokenizer(text)["input_ids"] for text in ("the d", "og. the cat"))
    row = partial.Row(None, list(before), [0.0] * len(before), [(0, len(before))])  # pyright: ignore
    completion = Completion(tuple(before), tuple(new), "length", tuple(range(len(new))))
    partial._go_on(row, completion, 1, 100, stops)
    assert (row.stop_reason, row.stop) == ("stop", "dog.")
    assert tokenizer.decode(row.ids) == "the dog."
    assert row.rounds[-1] == (1, len(row.ids) - len(before))
    assert len(row.logp) == len(row.ids)
    alone = partial.Row(None, list(before), [], [(0, len(before))])  # pyright: ignore
    partial._go_on(alone, Completion((), tuple(new), "length", ()), 1, len(before) + len(new), None)
    assert (alone.stop_reason, alone.stop) == ("length", "")


def test_an_engine_that_looks_at_no_limits_makes_no_response_longer() -> None:
    row = partial.Row(None, [7] * 8, [0.0] * 8, [(0, 8)])  # pyright: ignore
    partial._go_on(row, Completion((), (8, 9, 1), "eos", (-1.0, -2.0, -3.0)), 1, 9, None)
    assert (row.ids[7:], row.logp[7:], row.rounds[-1]) == ([7, 8], [0.0, -1.0], (1, 1))
    assert row.stop_reason == "length"


def test_what_several_responses_begin_with_is_read_again_once(
    trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where samples of a prompt are alike: tokens that somebody needs are more than none."""
    counted: list[tuple[int, int]] = []
    count = StageRun.count

    def counting(self: Any, phase: str, useful: int = 0, computed: int = 0, **more: Any) -> None:
        if phase == "rollout":
            counted.append((useful, computed))
        count(self, phase, useful, computed, **more)

    monkeypatch.setattr(StageRun, "count", counting)
    trained(sampling={**SAMPLING, "temperature": 0.01}, updates=2, lr=STILL)
    assert len(counted) > 2
    assert all(0 < useful <= computed for useful, computed in counted)


@pytest.mark.slow
def test_weights_that_are_put_back_sample_again(
    trained: Any, learned: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    see = loop.Monitor.see

    def seeing(self: Any, update: int, metrics: Any, state: Any) -> Any:
        self.rollbacks += update == 2
        return see(self, update, metrics, state)

    monkeypatch.setattr(loop.Monitor, "see", seeing)
    _, rows = trained()
    assert rows[1]["rollout/staleness"] > 0
    assert rows[2]["rollout/staleness"] == 0  # all of it by the weights that were there
    assert [len(batch) for batch in responses(learned)] == [4] * 4


def test_ranks_share_a_round_and_know_all_of_it(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    """The samples of a prompt are one rank's. Rank 1 samples here; what rank 0 told it ends a row. An engine
    that draws its own numbers is told which of the round's rows it has."""
    prompts = [PromptExample(f"p{n}", (n + 3,), {}) for n in range(3)]
    stage = {
        "kind": "grpo", "model": "m", "reward": "r", "data": "d", "samples_per_prompt": 2, "batch_size": 6,
        "updates": 9, "importance_cap": 2.0, "rollout": {"partial": 2}, "sampling": SAMPLING,
    }  # fmt: skip
    config: Any = parse({"name": "x", "stages": {"rl": stage}}).stages["rl"]
    asked: list[Any] = []

    def completed(setup: Any, request: Any, count: Any) -> list[Completion]:
        asked.append(request)
        return [Completion(tuple(p), (5, 6), "length", (-1.0, -2.0)) for p in request.prompts]

    def gathered(own: Any) -> list[Any]:
        others = [n for n in range(6) if n not in own[0]]
        return [(others, [Completion((), (7, 1), "eos", (-3.0, -4.0))] * len(others)), own]

    monkeypatch.setattr(rollout, "completed", completed)
    monkeypatch.setattr(partial.group, "_group", Group(1, 2))
    monkeypatch.setattr(partial.group, "all_here", lambda: None)
    monkeypatch.setattr(partial.group, "gathered", gathered)
    setup: Any = SimpleNamespace(
        config=config, tokenizer=tokenizer, engine=None, rewards=None, roles=SimpleNamespace(policy=None),
        run=SimpleNamespace(seed=0, timed=lambda phase: nullcontext()),
    )  # fmt: skip
    one = partial.Partial(setup, lambda update: prompts)
    one._round(1)
    assert [(r.prompts, r.rows.numbers, r.rows.of) for r in asked] == [([(4,), (4,)], [2, 3], 6)]
    draws = uniform_draws(6, config.sampling.plain(), rollout.seed_of(setup, 1))
    assert torch.equal(asked[0].draws, draws[2:4, :2])
    assert [row.ids for row in one.rows[1]] == [[7, 1], [7, 1], [5, 6], [5, 6], [7, 1], [7, 1]]
    assert [row.stop_reason for row in one.rows[1]] == ["eos", "eos", None, None, "eos", "eos"]
    assert [row.logp for row in one.rows[1]][1:3] == [[-3.0, -4.0], [-1.0, -2.0]]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"importance_cap": None}, "set `importance_cap`"),
        ({"resample": 1}, "`rollout.partial` does not go with `resample`"),
        ({"curriculum": {}}, "`rollout.partial` does not go with `curriculum`"),
        ({"environment": "world:shop"}, "`rollout.partial` does not go with `tools` or `environment`"),
        ({"updates": 1}, "`rollout.partial` has no effect with one update"),
        ({"rollout": {"partial": 2, "ahead": 1}}, "both say what older weights sample"),
        ({"sampling": {"max_new_tokens": 2}}, "`rollout.partial` of 2 has no effect"),
        ({"rollout": {"partial": 0}}, "rollout.partial: must be at least 1, not 0"),
    ],
)
def test_what_cannot_be_carried_over_is_refused(more: dict[str, Any], message: str) -> None:
    stage = {
        "kind": "grpo", "model": "m", "reward": [{"kind": "length", "high": 2}], "data": "d",
        "rollout": {"partial": 2}, "importance_cap": 2.0,
    }  # fmt: skip
    parse({"name": "x", "stages": {"rl": stage}})
    with pytest.raises(UsageError, match=message):
        parse({"name": "x", "stages": {"rl": stage | more}})
