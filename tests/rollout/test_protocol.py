"""Engines answer one request alike, and a script stands in for all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from keel.errors import UsageError
from keel.rl import loop, setup
from keel.rl.ppo import PPO
from keel.rl.setup import make_optimizers
from keel.rollout import Engine, GenerationRequest, KeelEngine, ReferenceEngine, ScriptedEngine, TokenCount
from keel.rollout.protocol import check_completions
from keel.types import Completion, Sampling

PROMPTS = [[5, 6, 7], [9, 8], [5, 6, 7], [10, 11, 12, 13]]


def request_of(tokenizer: Any, **more: Any) -> GenerationRequest:
    return GenerationRequest.of(tokenizer, PROMPTS, Sampling(8, temperature=1.5), 3, **more)


@pytest.mark.usefixtures("accel_on")  # without it no head inputs are kept
@pytest.mark.parametrize("keep", [False, True])
def test_keels_engine_and_the_reference_give_the_same_completions(
    keep: bool, tiny_model: Path, tokenizer: Any
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    request = request_of(tokenizer, keep_head_inputs=keep)
    counts = [TokenCount(), TokenCount()]
    one = KeelEngine(model, batch_size=2).generate(request, counts[0])
    other = ReferenceEngine(model).generate(request, counts[1])
    assert [(c.prompt_ids, c.ids, c.stop_reason) for c in one] == [
        (c.prompt_ids, c.ids, c.stop_reason) for c in other
    ]
    for a, b in zip(one, other, strict=True):
        assert a.logp == pytest.approx(b.logp, abs=1e-4)
        assert (a.hidden is not None) == (b.hidden is not None) == keep
        if a.hidden is not None and b.hidden is not None:
            torch.testing.assert_close(a.hidden, b.hidden, rtol=0, atol=1e-4)
    assert counts[0].useful == counts[1].useful
    assert counts[1].computed == sum(
        sum(range(len(c.prompt_ids), len(c.prompt_ids) + len(c.ids))) for c in one
    )
    assert one == KeelEngine(model, batch_size=2).generate(request)


def test_a_request_says_what_ends_a_response(tokenizer: Any, tiny_model: Path) -> None:
    sampling = Sampling(12, temperature=1.5, stop=(".", "so"))
    request = GenerationRequest.of(tokenizer, PROMPTS * 8, sampling, 3)
    assert request.stop_ids[0] == tokenizer.eos_token_id
    assert request.pad_id == tokenizer.pad_token_id
    assert request.stop_texts is not None
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert any(c.stop in (".", "so") for c in KeelEngine(model).generate(request) if c.stop)


def test_all_of_them_are_engines(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert all(
        isinstance(e, Engine) for e in (KeelEngine(model), ReferenceEngine(model), ScriptedEngine([[1]]))
    )
    assert not isinstance(object(), Engine)


def test_a_prompt_that_does_not_fit_is_refused_by_each(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    request = GenerationRequest([[5] * 45], Sampling(4), [1], 0, 0)
    for engine in (KeelEngine(model), ReferenceEngine(model)):
        with pytest.raises(UsageError, match="a prompt of 45 tokens and max_new_tokens 4 exceed"):
            engine.generate(request)


def test_a_script_gives_its_responses_in_order_and_starts_over() -> None:
    engine, count = ScriptedEngine([[7, 8, 1, 9], [9, 2], [4, 4, 4, 4, 4]]), TokenCount()
    request = GenerationRequest(PROMPTS, Sampling(4), [1, 2], 0, 0)
    done = engine.generate(request, count)
    assert [(c.ids, c.stop_reason) for c in done] == [
        ((7, 8, 1), "eos"), ((9, 2), "stop"), ((4, 4, 4, 4), "length"), ((7, 8, 1), "eos"),
    ]  # fmt: skip
    assert [c.prompt_ids for c in done] == [tuple(p) for p in PROMPTS]
    assert [len(c.logp) for c in done] == [3, 2, 4, 3]
    assert engine.requests == [request]
    assert count.useful == count.computed > 0
    assert engine.generate(request)[0].ids == (9, 2)  # it goes on where it was
    assert ScriptedEngine([[1]], logp=None).generate(request)[0].logp == ()
    with pytest.raises(ValueError, match="one token or more"):
        ScriptedEngine([[1], []])


@pytest.mark.parametrize(
    ("completions", "message"),
    [
        ([], "returned 0 completions for 1 prompts"),
        ([Completion((6,), (7,), "length")], "prompt 0: the completion is one of another prompt"),
        ([Completion((5,), (), "length")], "a response of 0 tokens; there must be 1 to 2"),
        ([Completion((5,), (7, 7, 7), "length")], "a response of 3 tokens"),
        ([Completion((5,), (7, 7), "length", (-1.0,))], "1 log-probabilities for 2 tokens"),
    ],
)
def test_what_an_engine_returns_is_checked(completions: list[Completion], message: str) -> None:
    request = GenerationRequest([[5]], Sampling(2), [1], 0, 0)
    with pytest.raises(UsageError, match=message):
        check_completions("mine", request, completions)
    check_completions("mine", request, [Completion((5,), (7, 1), "eos", (-1.0, -1.0))])


def test_a_whole_ppo_stage_on_a_script(
    run: Any, data: Any, tiny_model: Path, tiny_reward: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two updates in which no token is sampled: what is learned from is what the script says."""
    script = ScriptedEngine([[7, 8, 1], [9, 10, 11, 12]])
    monkeypatch.setattr(setup, "open_engine", lambda *_: script)
    stage = {
        "kind": "ppo",
        "model": str(tiny_model),
        "reward": str(tiny_reward),
        "data": str(data.prompts),
        "lr": 1e-3,
        "batch_size": 4,
        "updates": 2,
        "epochs": 2,
        "sampling": {"max_new_tokens": 4},
    }
    run({"stages": {"ppo": stage}}, tmp_path)
    folder = tmp_path / "stages" / "ppo"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["rollout/response_length"] for row in rows] == [3.5, 3.5]
    assert [row["rollout/truncated"] for row in rows] == [0.5, 0.5]
    assert [row["val/ratio_first"] for row in rows] == [1.0, 1.0]
    assert all(row["grad_norm"] > 0 for row in rows)
    assert len(script.requests) == 5  # two updates, and the twelve prompts that the result is measured on
    assert script.requests[0].keep_head_inputs


def test_states_that_an_engine_keeps_unasked_are_not_taken_for_the_trainers(open_ppo: Any) -> None:
    """Else its numbers would be compared with themselves, and `importance_cap` would correct nothing."""
    import dataclasses

    class Keeping(ScriptedEngine):
        def generate(self, request: GenerationRequest, count: Any = None) -> list[Completion]:
            kept = torch.zeros(2, 16)
            return [dataclasses.replace(c, hidden=kept) for c in super().generate(request, count)]

    prompts, opened = open_ppo(batch_size=4, importance_cap=2.0)
    opened = dataclasses.replace(opened, engine=Keeping([[7, 8]]))
    batch = loop.collect(PPO(opened), prompts[:4], loop.LoopState(0.0, loop.RunningScale()), 1)
    assert not batch.experience.logp_from_sampler
    assert float(batch.episodes.weights[batch.episodes.mask].max()) < 0.5  # e⁻⁵ and less, against e⁻¹


def test_a_scripts_tokens_are_what_an_update_learns_from(open_ppo: Any) -> None:
    import dataclasses

    prompts, opened = open_ppo(batch_size=4)
    opened = dataclasses.replace(opened, engine=ScriptedEngine([[7, 8, 1], [9, 10]]))
    batch = loop.collect(PPO(opened), prompts[:4], loop.LoopState(0.0, loop.RunningScale()), 1)
    for row, response in enumerate(([7, 8, 1], [9, 10], [7, 8, 1], [9, 10])):
        start = len(prompts[row].ids)
        assert batch.episodes.ids[row, start : start + len(response)].tolist() == response
    assert batch.episodes.mask.sum(dim=1).tolist() == [3, 2, 3, 2]
    assert not batch.episodes.logp_from_sampler
    learned = loop.learn(
        PPO(opened),
        make_optimizers(opened.config, opened.roles),
        batch.episodes,
        1,
        loop.LoopState(0.0, loop.RunningScale()),
    )
    assert learned.metrics["val/ratio_first"] == 1.0
