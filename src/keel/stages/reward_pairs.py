"""Comparisons as a reward model reads them."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from keel.data.stored.inputs import InputSink, StoredInputs, name_of_inputs
from keel.data.stored.records import numbers_of, release
from keel.data.stored.tokens import Tokens, folders_of, rows_print, tokenizer_print
from keel.errors import DataError, UsageError
from keel.rewards import learned
from keel.stages import lazy_rows, prepare
from keel.types import PreferenceRecord, Record


@dataclass(frozen=True, slots=True)
class RewardPair:
    """A comparison as the model reads it."""

    chosen: learned.Inputs
    rejected: learned.Inputs
    p_chosen: float  # what `labels` makes of the votes for `chosen`; 1 when nobody's votes are known
    margin: float


def encode(
    records: Sequence[Record],
    labels: Sequence[float],
    reward: learned.RewardModel,
    too_long: prepare.TooLong,
    equal: prepare.EqualPairs,
    *,
    needed: bool = True,
) -> Sequence[RewardPair]:
    """The comparisons as the model reads them, with these labels. A pair whose response alone is too long is
    an error, or left out: cutting it would change what was judged."""
    limit, margins = too_long.limit, np.nan_to_num(numbers_of(records, "margin"))
    if reward.is_encoder:
        return _encode_texts(records, labels, reward, too_long, equal, needed=needed)

    def fits(record: Record, tokens: Tokens) -> bool:
        prompt, *sides = tokens
        longest = max(map(len, sides))
        if not too_long.fits(record, len(prompt) + longest):
            return False
        if limit is not None and longest >= limit:
            too_long.fits(record, len(prompt) + longest, truncatable=False)
            return False
        return equal.differ(*sides)

    def build(number: int, tokens: Tokens) -> RewardPair:
        chosen, rejected = ({"input_ids": learned.fit(tokens[0], side, limit)} for side in tokens[1:])
        return RewardPair(chosen, rejected, labels[number], float(margins[number]))

    return lazy_rows.encode(records, reward.tokenizer, too_long, fits, build, needed=needed)


def _encode_texts(
    records: Sequence[Record],
    labels: Sequence[float],
    reward: learned.RewardModel,
    too_long: prepare.TooLong,
    equal: prepare.EqualPairs,
    *,
    needed: bool,
) -> Sequence[RewardPair]:
    """As `encode`, for a model that reads prompt and response as two texts."""
    margins, numbers = np.nan_to_num(numbers_of(records, "margin")), array("q")  # of the pairs that are kept

    def name() -> str:
        settings = (too_long.limit, too_long.policy)
        parts = (rows_print(records), tokenizer_print(reward.tokenizer), "pairs", *settings)
        return name_of_inputs([sys.modules[__name__], learned], *parts)

    with InputSink(too_long.stage_run.preparation.cache, name) as sink:
        for number, record in enumerate(records):
            if sides := _encode_two_texts(reward, record, too_long, equal):
                numbers.append(number)
                for side in sides:
                    sink.add(side)
        inputs = sink.done({"made_from": folders_of(records)})
    if len(records) and not numbers and needed:
        raise DataError(f"stage {too_long.stage_run.name!r}: no usable row is left of {len(records)}")

    def build(index: int) -> RewardPair:
        number = numbers[index]
        return RewardPair(inputs[2 * index], inputs[2 * index + 1], labels[number], float(margins[number]))

    if not isinstance(inputs, StoredInputs):
        return [build(index) for index in range(len(numbers))]
    release(records)
    return lazy_rows.LazyRows(len(numbers), build, inputs.sizes().reshape(-1, 2).max(axis=1))


def _encode_two_texts(
    reward: learned.RewardModel, record: Record, too_long: prepare.TooLong, equal: prepare.EqualPairs
) -> list[learned.Inputs]:
    """Both sides of a pair with its prompt; [] where it is left out."""
    assert isinstance(record, PreferenceRecord)
    whole = [learned.encode(reward, record.prompt, side, 10**9) for side in (record.chosen, record.rejected)]
    longest = max(len(side["input_ids"]) for side in whole)
    if not too_long.fits(record, longest):
        return []
    if too_long.limit is not None and longest > too_long.limit:
        try:
            whole = [
                learned.encode(reward, record.prompt, side, too_long.limit)
                for side in (record.chosen, record.rejected)
            ]
        except UsageError:  # the response alone is longer: cutting it would change what was judged
            too_long.fits(record, longest, truncatable=False)
            return []
    return whole if equal.differ(whole[0]["input_ids"], whole[1]["input_ids"]) else []
