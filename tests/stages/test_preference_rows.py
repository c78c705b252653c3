"""Comparisons become the rows of preference optimisation, and settings that do not fit their loss are
refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from keel.config import DPOConfig, parse
from keel.errors import DataError, UsageError
from keel.models.load import load_tokenizer
from keel.stages import preference_rows, prepare
from keel.stages.preference_rows import Example, Pair, Response
from keel.types import PreferenceRecord, UnpairedRecord


def config_of(**settings: Any) -> DPOConfig:
    return DPOConfig.model_validate({"kind": "dpo", "model": "m", "data": "d", **settings})


# ---------------------------------------------------------------- KTO


def example(prompt: int, response: int, label: bool = True) -> Example:
    return Example(Response((prompt,), (response, 1)), label)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_trap_27_a_row_is_paired_with_the_next_rows_completion(count: int) -> None:
    """[trl 1911] Cyclic, so that odd batches leave none over."""
    batch = [example(10 + i, 20 + i) for i in range(count)]
    found = preference_rows.mismatched(batch, None)
    assert [(r.prompt[0], r.ids[0]) for r in found] == [(10 + i, 20 + (i + 1) % count) for i in range(count)]


def test_trap_27_a_row_is_never_paired_with_itself_or_an_equal_one() -> None:
    """Neither with itself in a batch that holds it twice, nor with the same completion, nor its prompt's
    other one."""
    twice, same_text, same_prompt = example(10, 20), example(11, 20), example(10, 21)
    other = example(12, 22)
    batch = [twice, twice, same_text, same_prompt, other]
    assert [(r.prompt[0], r.ids[0]) for r in preference_rows.mismatched(batch, None)] == [
        (10, 22), (10, 22), (11, 21), (10, 22), (12, 20),
    ]  # fmt: skip
    assert preference_rows.mismatched([twice, same_text, twice], None) == []
    assert preference_rows.mismatched([twice], None) == []


def test_a_mismatched_prompt_gives_way_to_a_long_completion() -> None:
    one = Example(Response((2, 3, 4, 5), (9, 1)), True)
    other = Example(Response((6,), (7, 7, 7, 1)), False)
    assert preference_rows.mismatched([one, other], 6) == [
        Response((4, 5), (7, 7, 7, 1)),
        Response((6,), (9, 1)),
    ]


def test_pairs_become_examples_whose_kl_is_measured_on_both_sides() -> None:
    pairs = [Pair(Response((10 + i,), (20 + i, 1)), Response((10 + i,), (30 + i, 1))) for i in range(3)]
    found = preference_rows.examples(pairs)
    assert [(e.response.ids[0], e.label) for e in found] == [
        (20, True), (21, True), (22, True), (30, False), (31, False), (32, False),
    ]  # fmt: skip
    read = [r.ids[0] for r in preference_rows.mismatched(found, None)]
    assert sorted(read) == [20, 21, 22, 30, 31, 32]


# ---------------------------------------------------------------- tokens


def encoded(record: Any, tiny_model: Path, stage_run: Any, **settings: Any) -> Any:
    config = config_of(**settings)
    too_long = prepare.TooLong(stage_run, config.too_long, config.max_length)
    equal = prepare.EqualPairs(stage_run)
    tokenizer = load_tokenizer(str(tiny_model))
    return preference_rows.encode_decided(config, tokenizer, [record], too_long, equal)[0]


def test_a_pair_is_one_prompt_and_two_responses_with_one_eos(
    tiny_model: Path, stage_run: Any, tokenizer: Any
) -> None:
    record = PreferenceRecord("the cat?", " it is red.<|end|>", " so")
    pair = encoded(record, tiny_model, stage_run)
    assert tokenizer.decode(pair.chosen.prompt) == tokenizer.decode(pair.rejected.prompt) == "the cat?"
    assert tokenizer.decode(pair.chosen.ids) == " it is red.<|end|>"
    assert tokenizer.decode(pair.rejected.ids) == " so<|end|>"


def test_a_pair_that_is_too_long_is_an_error_or_left_out_or_loses_its_prompts_start_on_both_sides(
    tiny_model: Path, stage_run: Any, tokenizer: Any
) -> None:
    record = PreferenceRecord("the owl? " * 9 + "the cat?", " it is red.", " so", origin="rows.jsonl:3")
    with pytest.raises(DataError, match=r"rows.jsonl:3: \d+ tokens, more than the 12 of stage"):
        encoded(record, tiny_model, stage_run, max_length=12)
    with pytest.raises(DataError, match="no usable row is left of 1"):
        encoded(record, tiny_model, stage_run, max_length=12, too_long="skip")
    pair = encoded(record, tiny_model, stage_run, max_length=12, too_long="truncate")
    assert len(pair.chosen.prompt) + len(pair.chosen.ids) == 12
    assert pair.rejected.prompt == pair.chosen.prompt
    assert tokenizer.decode(pair.chosen.prompt).endswith("the cat?")
    turned = PreferenceRecord(record.prompt, " so", " it is red.")  # the longer side decides, whichever it is
    pair = encoded(turned, tiny_model, stage_run, max_length=12, too_long="truncate")
    assert len(pair.rejected.prompt) + len(pair.rejected.ids) == 12
    assert pair.rejected.prompt == pair.chosen.prompt
    long = UnpairedRecord("a", " red" * 40, True, origin="x")
    with pytest.raises(DataError, match="response alone is longer"):
        encoded(long, tiny_model, stage_run, loss="kto", max_length=12, too_long="truncate")


def test_trap_26_a_row_that_is_cut_keeps_its_whole_reply(
    tiny_model: Path, stage_run: Any, tokenizer: Any
) -> None:
    """[trl PR 3398] Truncation that keeps the end made samples of nothing: whatever is cut, each token of
    both replies stays."""
    for owls in (2, 9, 30):
        record = PreferenceRecord("the owl? " * owls + "the cat?", " it is red.", " so", origin="r.jsonl:1")
        whole = encoded(PreferenceRecord("a", record.chosen, record.rejected), tiny_model, stage_run)
        pair = encoded(record, tiny_model, stage_run, max_length=12, too_long="truncate")
        assert (pair.chosen.ids, pair.rejected.ids) == (whole.chosen.ids, whole.rejected.ids)
        assert pair.chosen.prompt
        assert tokenizer.pad_token_id not in (*pair.chosen.prompt, *pair.chosen.ids, *pair.rejected.ids)


def test_the_side_that_most_votes_prefer_is_the_chosen_one(
    tiny_model: Path, stage_run: Any, tokenizer: Any
) -> None:
    for votes, shares in (("hard", [1.0, 1.0, 1.0]), ("soft", [1.0, 0.75, 0.75])):
        for given, share, first in zip((None, 0.75, 0.25), shares, (True, True, False), strict=True):
            record = PreferenceRecord("the cat?", " red", " so", p_chosen=given)
            pair = encoded(record, tiny_model, stage_run, votes=votes)
            assert pair.p_chosen == share
            assert (tokenizer.decode(pair.chosen.ids[:-1]) == " red") == first


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"loss": "orpo", "reference": "r"}, "`reference` has no effect with `loss: orpo`, which has none"),
        ({"loss": "simpo", "reference": "r"}, "`reference` has no effect with `loss: simpo`, which has none"),
        ({"gamma": 0.5}, "`gamma` has no effect with `loss: sigmoid`: it is for simpo"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "`label_smoothing` has no effect with `loss: ipo`"),
        ({"desirable_weight": 2.0}, "`desirable_weight` has no effect"),
        ({"loss": "simpo", "undesirable_weight": 2.0}, "`undesirable_weight` has no effect"),
        ({"loss": "robust", "votes": "soft"}, "`votes` has no effect with `loss: robust`: it is for sigmoid"),
        ({"loss": "robust", "label_smoothing": 0}, "is `loss: sigmoid`: write that"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"beta": 0}, "beta"),
        ({"loss": "kto", "batch_size": 1}, "`loss: kto` needs `batch_size` of 2 or more"),
        ({"lora": {"dropout": 0.1}}, "`lora.dropout` must be 0"),
        ({"model": {"init": {"model_type": "llama"}, "tokenizer": "t"}}, "starts from a trained model"),
        ({"loss": "hinge"}, "loss"),
    ],
)
def test_settings_that_cannot_work_or_have_no_effect_are_refused(settings: Any, reason: str) -> None:
    stage = {"kind": "dpo", "model": "m", "data": "d", **settings}
    with pytest.raises(UsageError) as caught:
        parse({"name": "x", "stages": {"s": stage}})
    assert reason in str(caught.value)


def test_the_numbers_of_a_loss_are_filled_in_and_read_back() -> None:
    wanted = {"simpo": (2.0, 0.0), "robust": (0.1, 0.1), "sigmoid": (0.1, 0.0), "kto": (0.1, 0.0)}
    for loss, numbers in wanted.items():
        for given in ({}, {"beta": None, "label_smoothing": None}):
            config = config_of(loss=loss, **given)
            assert (config.beta, config.label_smoothing) == numbers
            assert DPOConfig.model_validate(config.model_dump(mode="json")) == config
    assert config_of(loss="simpo", beta=2.5).beta == 2.5
    assert config_of(loss="robust", label_smoothing=0.2).label_smoothing == 0.2
    assert config_of(lr=5e-6).lr == 5e-6
    assert config_of().lr == 1e-6


def test_a_reference_may_be_another_stage_that_writes() -> None:
    stage = {"kind": "dpo", "model": "m", "data": "d", "reference": "r"}
    reward = {"kind": "reward", "model": "m", "data": "d"}
    with pytest.raises(UsageError, match=r"`reference` needs a stage of kind .*dpo.*, but 'r'"):
        parse({"name": "x", "stages": {"r": reward, "s": stage}})
    sft = {"kind": "sft", "model": "m", "data": "d"}
    assert parse({"name": "x", "stages": {"r": sft, "s": stage}}).stages["s"].inputs() == ["m", "r"]
