"""Conversations that keep what they have read: token for token those that read it again at each turn."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from keel.accel import cpu_linear, disabled, kept_turns, kv_slots
from keel.accel.kv_slots import Slots
from keel.accel.patches import refusals
from keel.data.stops import StopTexts
from keel.models import precision
from keel.rollout import stream
from keel.rollout.engine import KeelEngine
from keel.rollout.protocol import GenerationRequest, NextTurn, Rows, TakesTurns, TokenCount
from keel.rollout.reference_engine import ReferenceEngine
from keel.rollout.rounds import in_rounds
from keel.types import Completion, Sampling

sys.path.insert(0, str(Path(__file__).parents[1] / "architectures"))
import zoo

pytestmark = pytest.mark.usefixtures("accel_on")
MOST = 60  # tokens behind a prompt
PROMPTS = [
    [5, 6],
    [9, 8, 7, 3, 20],
    [5, 6],
    [5, 6, 11],
    [*range(30, 50)],
    [*range(30, 50)],
    [77],
    [8, 9],
    [5],
]
WINDOWS = ("gemma3_text", "qwen2+windows")
Conversations = list[list[Completion]]


def request(temperature: float = 1.0, **more: Any) -> GenerationRequest:
    sampling = Sampling(max_new_tokens=MOST, temperature=temperature)
    stops = [zoo.EOS, *range(3, 250, 9)]
    return replace(
        GenerationRequest(PROMPTS, sampling, stops, zoo.PAD, 3, limits=[MOST] * len(PROMPTS)), **more
    )


def held(
    hold: Callable[..., None], asked: GenerationRequest, count: TokenCount | None = None, forget: bool = False
) -> Conversations:
    """Conversations of up to five turns: what is put behind a response depends on it, one token or many.
    forget: what came before is another text in the third turn."""
    found: Conversations = [[] for _ in asked.prompts]

    def answer(row: int, response: Completion) -> NextTurn | None:
        found[row].append(response)
        put = [40 + sum(response.ids) % 50] * (1 + sum(response.ids) % (40 if row % 3 == 1 else 6))
        whole = (*response.prompt_ids, *response.ids, *put)
        if forget and len(found[row]) == 2:
            whole = (11, *whole[1:])
        left = MOST - (len(whole) - len(asked.prompts[row]))
        return NextTurn(whole, left) if left > 0 and len(found[row]) < 2 + row % 4 else None

    hold(asked, answer, count)
    return found


def rounds(engine: Any) -> Callable[..., None]:
    return lambda asked, answer, count: in_rounds(engine, asked, answer, count)


def assert_same(ours: Conversations, theirs: Conversations) -> None:
    assert ours == [
        [replace(b, logp=a.logp) for a, b in zip(mine, other, strict=True)]
        for mine, other in zip(ours, theirs, strict=True)
    ]
    for mine, other in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
        assert mine.logp == pytest.approx(other.logp, abs=2e-4)
        if other.hidden is not None:
            torch.testing.assert_close(mine.hidden, other.hidden, rtol=1e-3, atol=1e-3)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """How many tokens each row had to read when it went on, read by read."""
    found: list[list[int]] = []
    plain = kept_turns.read_on

    def counted(model: Any, rows: Any, *more: Any) -> Any:
        found.append([kept_turns.unread(*row) for row in rows])
        return plain(model, rows, *more)

    monkeypatch.setattr(kept_turns, "read_on", counted)
    return found


def unread(found: Conversations, forgotten: int | None = None) -> int:
    """Tokens that stand behind what was read before a turn; all where what was read is forgotten."""
    return sum(
        len(b.prompt_ids) - (0 if turn == forgotten else len(a.prompt_ids) + len(a.ids) - 1)
        for one in found
        for turn, (a, b) in enumerate(itertools.pairwise(one), 1)
    )


@pytest.mark.parametrize(
    "kind", ["llama", WINDOWS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in WINDOWS[1:])]
)
def test_turns_are_those_that_read_everything_again(kind: str, read: list[list[int]]) -> None:
    model = zoo.build(kind)
    assert kept_turns.fits(model, MOST + max(map(len, PROMPTS)))
    for temperature, size in ((1.0, 3), (0.0, 64)):
        asked, counts = request(temperature, keep_head_inputs=True), (TokenCount(), TokenCount())
        read.clear()
        ours = held(KeelEngine(model, size).converse, asked, counts[0])
        plain = ReferenceEngine(model) if kind == "llama" and temperature else KeelEngine(model)
        theirs = held(rounds(plain), asked, counts[1])
        assert_same(ours, theirs)
        assert (
            sum(map(sum, read))
            == unread(ours)
            < sum(len(turn.prompt_ids) for one in ours for turn in one[1:])
        )
        assert counts[0].useful < counts[1].useful
        assert 0 < counts[0].useful <= counts[0].computed
    assert len({len(one) for one in ours}) > 2
    assert any(turn.stop_reason == "length" for one in ours for turn in one)
    assert isinstance(KeelEngine(model), TakesTurns)


def test_rows_of_a_share_and_stop_strings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A share of the rows draws what it would draw among all of them, in each turn."""
    model = zoo.build("llama")
    whole = held(KeelEngine(model, 4).converse, request())
    share = [1, 4, 6]
    asked = request(prompts=[PROMPTS[i] for i in share], rows=Rows(share, len(PROMPTS)), limits=[MOST] * 3)
    for number, found in zip(share, held(KeelEngine(model).converse, asked), strict=True):
        assert found[0].ids == whole[number][0].ids  # what is put behind depends on the number in a share
    monkeypatch.setattr(StopTexts, "may_end", lambda self, ids: ids > 0)
    for name in ("within", "closed_by"):
        monkeypatch.setattr(StopTexts, name, lambda self, ids: "so" if sum(ids[-2:]) % 3 == 0 else "")
    stops: Any = StopTexts(None, ("so",), torch.zeros(0))  # pyright: ignore[reportArgumentType]
    asked = request(stop_texts=stops, stop_ids=[zoo.EOS, 9])
    ours = held(KeelEngine(model, 4).converse, asked)
    assert_same(ours, held(rounds(KeelEngine(model)), asked))
    assert {turn.stop for one in ours for turn in one} == {"", "so"}


def test_what_cannot_be_kept_is_read_again(monkeypatch: pytest.MonkeyPatch, read: list[list[int]]) -> None:
    """Where there is no room to keep it, and where a row goes on from another text than it has read."""
    model, asked = zoo.build("llama"), request()
    expected = held(rounds(KeelEngine(model)), asked, forget=True)
    assert kept_turns.fits(model)
    read.clear()
    assert_same(held(KeelEngine(model, 4).converse, asked, forget=True), expected)
    assert sum(map(sum, read)) == unread(expected, 2) > unread(expected)
    monkeypatch.setattr(stream, "KEPT_SHARE", 10**6)
    read.clear()
    assert_same(held(KeelEngine(model, 4).converse, asked, forget=True), expected)
    assert sum(map(sum, read)) == sum(len(turn.prompt_ids) for one in expected for turn in one[1:])


def test_a_model_that_goes_on_otherwise_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first use finds it out; so does a switch."""
    asked, plain = request(), DynamicCache.update

    def off(self: Any, keys: Any, values: Any, layer: int, *more: Any) -> Any:
        had = layer < len(self.layers) and self.layers[layer].get_seq_length() > 0
        return plain(self, keys, values * 1.1 if had and keys.shape[2] > 1 else values, layer, *more)

    expected = held(rounds(KeelEngine(zoo.build("llama"))), asked)
    model = zoo.build("llama")
    with disabled("kept_turns"):
        assert not kept_turns.fits(model)
        assert_same(held(KeelEngine(model).converse, asked), expected)
    monkeypatch.setattr(DynamicCache, "update", off)
    assert not kept_turns.fits(model)
    assert_same(held(KeelEngine(model).converse, asked), expected)


def test_a_model_without_slots_plays_in_rounds() -> None:
    model, asked = zoo.build("lfm2"), request()
    assert_same(held(KeelEngine(model).converse, asked), held(rounds(KeelEngine(model)), asked))


def test_given_draws_are_those_of_the_first_turn_and_stay_as_they_are() -> None:
    model = zoo.build("llama")
    draws = torch.rand(len(PROMPTS), MOST, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    asked = request(draws=draws.clone())
    ours = held(KeelEngine(model, 4).converse, asked)
    assert torch.equal(asked.draws, draws)
    assert_same(ours, held(rounds(KeelEngine(model)), asked))
    assert [one[0].ids for one in ours] == [c.ids for c in KeelEngine(model).generate(asked)]


def test_answers_compute_as_whoever_asks_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not without gradient, and in the precision, that the model samples in."""
    monkeypatch.setattr(precision, "fast_in_bfloat16", lambda device: True)
    model, found = precision.mark_precision(zoo.build("llama"), "auto"), set[tuple[bool, ...]]()

    def answer(row: int, response: Completion) -> None:
        weight, x = torch.ones(2, 2, requires_grad=True), torch.ones(2, 2)
        product = torch.nn.functional.linear(x, weight)
        found.add((product.requires_grad, product.dtype == torch.float32, cpu_linear._casts.get() is None))

    KeelEngine(model).converse(request(), answer)
    assert found == {(True, True, True)}
    assert "kept_turns" not in refusals(model)  # so these did not go in rounds
    with torch.no_grad():
        KeelEngine(model).converse(request(), answer)
    assert found == {(True, True, True), (False, True, True)}


def test_no_conversations_are_none() -> None:
    asked: list[int] = []
    count = TokenCount()
    KeelEngine(zoo.build("llama")).converse(
        request(prompts=[], limits=[]), lambda row, _: asked.append(row), count
    )
    assert (asked, count.useful, count.computed) == ([], 0, 0)


def test_a_turn_must_leave_tokens_and_fit() -> None:
    model = zoo.build("llama")
    for following in (NextTurn((5, 6, 7), 0), NextTurn((5,) * 30, MOST), NextTurn((5,), MOST + 5)):
        with pytest.raises(ValueError, match="leaves some"):
            KeelEngine(model).converse(request(), lambda row, turn: following)  # noqa: B023


def test_what_a_row_keeps_is_a_copy() -> None:
    slots = Slots(2, 8, torch.device("cpu"))
    cache = DynamicCache()
    cache.update(torch.ones(2, 1, 3, 2), torch.ones(2, 1, 3, 2), 0)
    assert slots.admit(cache, [2, 3], [0, 1])
    kept = kept_turns.keep(slots, 0)
    slots.layers[0].k.zero_()
    assert (kept.length, kept.keys[0].shape, float(kept.keys[0].sum())) == (2, (1, 2, 2), 4.0)


def test_rows_that_are_moved_by_their_age_go_on_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few columns, and rows that change places at every turn."""
    for name, value in {"GROUP": 2, "WORTH": 0, "FAR": 2}.items():
        monkeypatch.setattr(kv_slots, name, value)
    monkeypatch.setattr(stream, "SPARE_COLUMNS", 1)
    monkeypatch.setattr(stream, "SPARE_SHARE", 10**6)
    blocks, plainly = list[int](), Slots.blocks
    monkeypatch.setattr(Slots, "blocks", lambda self: blocks.append(len(plainly(self))) or plainly(self))
    model, asked = zoo.build("llama"), request(keep_head_inputs=True)
    ours = held(KeelEngine(model, 5).converse, asked)
    assert max(blocks) > 1
    assert_same(ours, held(rounds(KeelEngine(model)), asked))
