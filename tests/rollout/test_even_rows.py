"""Sampling from models that keep no keys and values for each position, with the cache that they make: token
for token what a whole forward gives for each."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from keel.accel import disabled, own_cache
from keel.data.stops import stop_texts
from keel.models.logprobs import head_inputs, token_logprobs
from keel.rollout import engine, even_rows
from keel.rollout.engine import KeelEngine
from keel.rollout.protocol import GenerationRequest, TokenCount
from keel.rollout.reference_engine import ReferenceEngine
from keel.types import Completion, Sampling

sys.path.insert(0, str(Path(__file__).parents[1] / "architectures"))
import zoo

pytestmark = pytest.mark.usefixtures("accel_on")
WAYS = {
    "lfm2": "own cache",  # convolutions
    "qwen3_5_text": "own cache",  # linear attention
    "mamba2": "own cache",  # state space alone, under another name of its cache
    "falcon_h1": "own cache",  # both kinds of state in one layer
    "bamba": "own cache",  # does not ask its cache for positions
    "minimax": "own cache",  # a cache class of its own
    "recurrent_gemma": "own cache, one row at a time",  # makes no cache; mixes the rows of a step
    "rwkv": "own cache, one row at a time",  # states in a list
}
PROMPTS = [[5, 6], [9, 8, 7, 3, 20], [5, 6], [5, 6, 11], [*range(30, 60)], [*range(30, 60)], [77]]


def request(temperature: float, **more: Any) -> GenerationRequest:
    sampling = Sampling(max_new_tokens=10, temperature=temperature)
    return replace(GenerationRequest(PROMPTS, sampling, [zoo.EOS, *range(3, 250, 9)], zoo.PAD, 3), **more)


def said(completions: list[Completion]) -> list[Any]:
    return [(one.prompt_ids, one.ids, one.stop_reason, one.stop) for one in completions]


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.slow if kind in ("lfm2", "minimax") else ()) for kind in WAYS],
)
def test_tokens_are_those_of_the_reference_engine(kind: str) -> None:
    model = zoo.build(kind)
    for temperature in (0.0, 1.0):
        asked, count = request(temperature, keep_head_inputs=True), TokenCount()
        ours = KeelEngine(model, batch_size=4).generate(asked, count)
        assert said(ours) == said(ReferenceEngine(model).generate(asked))
        assert 0 < count.useful <= count.computed
    assert engine.way_of(model, 40) == WAYS[kind]
    assert len({len(one.ids) for one in ours}) > 1  # rows leave at different times
    for one in ours:  # temperature 1: what a forward over all of it says
        ids = torch.tensor([[*one.prompt_ids, *one.ids]])
        index = torch.arange(len(one.prompt_ids) - 1, ids.shape[1] - 1)
        with torch.no_grad():
            inputs = head_inputs(model, ids, index)
            logp = token_logprobs(inputs, ids[0, index + 1]).logp
        torch.testing.assert_close(torch.tensor(one.logp), logp, atol=1e-4, rtol=1e-4)
        if one.hidden is not None:
            torch.testing.assert_close(one.hidden, inputs.values, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_what_else_is_sampled_changes_nothing(batch_size: int) -> None:
    model, asked = zoo.build("lfm2"), request(1.0)
    together = KeelEngine(model, batch_size=batch_size).generate(asked)
    assert said(together) == said(ReferenceEngine(model).generate(asked))


def test_strings_end_a_response() -> None:
    model, tokenizer = zoo.build("lfm2"), zoo.tokenizer()
    free = KeelEngine(model).generate(request(1.0, stop_ids=()))
    letters = {tokenizer.decode([i]) for one in free for i in one.ids}
    letter = min(text for text in letters if text.isascii())
    asked = request(1.0, stop_ids=(), stop_texts=stop_texts(tokenizer, (letter,)))
    found = KeelEngine(model).generate(asked)
    assert said(found) == said(ReferenceEngine(model).generate(asked))
    assert {one.stop for one in found} == {letter, ""}


@pytest.mark.parametrize("kind", ["llama", "lfm2"])
def test_without_stop_ids_rows_run_to_the_end(kind: str) -> None:
    for one in KeelEngine(zoo.build(kind)).generate(request(1.0, stop_ids=())):
        assert (len(one.ids), one.stop_reason) == (10, "length")


def test_switched_off_every_token_is_a_whole_forward() -> None:
    model, counts = zoo.build("lfm2"), (TokenCount(), TokenCount())
    KeelEngine(model).generate(request(0.0), counts[0])
    with disabled("own_cache"):
        KeelEngine(model).generate(request(0.0), counts[1])
    assert counts[0].computed < counts[1].computed / 2
    assert counts[0].useful == counts[1].useful


def test_a_cache_that_forgets_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial can fail, and what is sampled then is right all the same."""
    model = zoo.build("lfm2")
    pick = own_cache.OwnCache.pick
    monkeypatch.setattr(own_cache.OwnCache, "pick", lambda self, rows: pick(self, rows.flip(0)))
    own = own_cache.OwnCache.step
    monkeypatch.setattr(own_cache.OwnCache, "step", lambda self, newest: own(self, newest) * 1.01)
    assert engine.way_of(model, 40) == "whole forwards"
    asked = request(0.0)
    assert said(KeelEngine(model).generate(asked)) == said(ReferenceEngine(model).generate(asked))


def test_rows_beyond_a_window_are_tried_anew() -> None:
    """A cache that forgets what lies before a window is right for short sequences alone."""
    model = zoo.build("gemma3_text")
    trials = {engine.way_of(model, length) for length in (8, 40)}
    assert trials == {"slots"}
    asked = request(0.0, stop_ids=())
    assert said(KeelEngine(model).generate(asked)) == said(ReferenceEngine(model).generate(asked))


def test_groups_hold_what_costs_fewer_steps_together() -> None:
    prompts = [[0] * n for n in (1, 3, 12, 2, 11, 3)]
    groups = [[len(prompts[i]) for i in group] for group in even_rows.groups(prompts, 3, 10)]
    assert groups == [[1, 2, 3], [3, 11, 12]]
    assert [len(g) for g in even_rows.groups(prompts, 6, 2)] == [2, 2, 2]
    assert [*even_rows.groups([], 3, 10)] == []
