"""Comparisons with the scores of a reward model: what `evaluation.reward_models` measures it on.

All that is kept of a comparison is a few numbers. Its tokens wait in a file where there are many.
"""

from __future__ import annotations

import json
import sys
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
import torch

from keel.config import EvaluateConfig
from keel.data import chat
from keel.data.stored.inputs import Inputs, InputSink, name_of_inputs
from keel.data.stored.records import facts_of, release
from keel.data.stored.tokens import rows_print, tokenizer_print
from keel.errors import DataError, UsageError
from keel.evaluation import reward_models
from keel.rewards import learned
from keel.rundir.stage_run import StageRun
from keel.types import PreferenceRecord, Record

AT_ONCE = 8_192  # comparisons whose rows are put together in forwards of similar length
MOST_SUBSETS = 50  # more kinds than this are not kinds: every row has its own


def compared(
    stage_run: StageRun,
    config: EvaluateConfig,
    members: Sequence[learned.RewardModel],
    records: Sequence[Record],
) -> reward_models.Compared:
    """The comparisons with the scores of the reward model, or of all members of an ensemble. All pairs that
    the reward model can read; others are an error, or left out and counted (`too_long`)."""
    seen = _Seen(
        _column(stage_run, "subset", config.subset, records),
        _column(stage_run, "position", config.position, records),
    )
    for form in facts_of(records)["forms"]:
        if said := learned.other_form(members[0], form == "conversational"):
            stage_run.note(f"comparisons: the reward model {said}")
    sides = _sides(stage_run, config, members[0], records, seen)
    if seen.left_out:
        stage_run.say(
            f"{stage_run.name}: {seen.left_out} comparisons left out, longer than the reward model reads"
        )
    if not len(sides):
        raise UsageError(f"{stage_run.name}: the reward model can read none of {len(records)} comparisons")
    seen.check(stage_run, config)
    starts = range(0, len(sides), 2 * AT_ONCE)
    parts = [_scores(config, members, sides[start : start + 2 * AT_ONCE]) for start in starts]
    scores = np.concatenate(parts, axis=1)
    return reward_models.Compared(
        chosen=scores[:, 0::2],
        rejected=scores[:, 1::2],
        means=np.array([member.mean for member in members]),
        stds=np.array([member.std for member in members]),
        p_chosen=seen.p_chosen,
        votes=seen.votes,
        prompts=seen.prompts,
        lengths=np.array(seen.lengths, dtype=np.float64).reshape(-1, 2).T,
        subsets=seen.subsets,
        chosen_first=seen.chosen_first,
    )


# ---------------------------------------------------------------- what is known of a pair without a model


Column = Callable[[PreferenceRecord], str | None]


@dataclass
class _Seen:
    """What is kept of the pairs that the reward model can read, in their order."""

    subset: Column | None
    position: Column | None
    p_chosen: list[float | None] = field(default_factory=list[float | None])
    votes: list[int] = field(default_factory=list[int])
    prompts: array[int] = field(default_factory=lambda: array("Q"))  # 64 bits of each
    lengths: array[int] = field(default_factory=lambda: array("q"))  # chosen, rejected, chosen, …
    subsets: list[str | None] = field(default_factory=list[str | None])
    chosen_first: list[bool | None] = field(default_factory=list[bool | None])
    left_out: int = 0
    _names: dict[str, str] = field(default_factory=dict[str, str])  # one copy of each subset's name

    def add(self, stage_run: StageRun, config: EvaluateConfig, pair: PreferenceRecord) -> None:
        """One more pair."""
        self.p_chosen.append(pair.p_chosen)
        self.votes.append(len(pair.votes))
        prompt = json.dumps(pair.prompt, default=str).encode("utf-8", "surrogatepass")
        self.prompts.append(int.from_bytes(blake2b(prompt, digest_size=8).digest(), "big"))
        self.lengths.extend(len(chat.completion_text(side)) for side in (pair.chosen, pair.rejected))
        if self.subset is not None:
            name = self.subset(pair)
            self.subsets.append(None if name is None else self._names.setdefault(name, name))
        if self.position is not None:
            self.chosen_first.append(_is_first(stage_run, config, pair, self.position(pair)))

    def check(self, stage_run: StageRun, config: EvaluateConfig) -> None:
        """UsageError where a column says nothing of the pairs, or too much."""
        for setting, name, values in (
            ("subset", config.subset, self.subsets),
            ("position", config.position, self.chosen_first),
        ):
            if name is not None and all(value is None for value in values):
                raise UsageError(
                    f"{stage_run.name}: {setting}: no comparison that can be read has a column {name!r}"
                )
        if len(self._names) > MOST_SUBSETS:
            raise UsageError(
                f"{stage_run.name}: subset: {config.subset!r} has {len(self._names)} values in "
                f"{len(self.votes)} comparisons; name a column of at most {MOST_SUBSETS} kinds"
            )


def _column(stage_run: StageRun, setting: str, name: str | None, records: Sequence[Record]) -> Column | None:
    """A column of a pair as text, None where the pair lacks it; None without a `name`. UsageError if no pair
    has it."""
    if name is None:
        return None
    known = facts_of(records)["columns"]
    if name not in known:
        raise UsageError(
            f"{stage_run.name}: {setting}: no comparison has a column {name!r}; they have "
            f"{', '.join(known) or 'none besides the pair'}"
        )

    def value(pair: PreferenceRecord) -> str | None:
        found = pair.columns.get(name)
        return None if found is None else str(found)

    return value


def _is_first(
    stage_run: StageRun, config: EvaluateConfig, pair: PreferenceRecord, value: str | None
) -> bool | None:
    if value not in (None, "chosen", "rejected"):
        raise DataError(
            f"{pair.origin}: {config.position!r} is {value!r}; stage {stage_run.name!r} takes it for "
            "`position`, chosen or rejected"
        )
    return None if value is None else value == "chosen"


# ---------------------------------------------------------------- what the model reads, and its scores


def _sides(
    stage_run: StageRun,
    config: EvaluateConfig,
    reward: learned.RewardModel,
    records: Sequence[Record],
    seen: _Seen,
) -> Sequence[Inputs]:
    """Chosen, rejected, chosen, … of the pairs that the reward model can read, each of which is added to
    `seen`."""
    what = f"{stage_run.name}: tokenising comparisons"

    def name() -> str:
        model = reward.model.config.to_json_string()  # its context, and how it is read
        parts = (rows_print(records), tokenizer_print(reward.tokenizer), model, repr(reward.reading))
        return name_of_inputs([sys.modules[__name__], learned], *parts)

    with InputSink(stage_run.preparation.cache, name) as sink:
        for number, pair in enumerate(records, 1):
            assert isinstance(pair, PreferenceRecord)
            if number % 512 == 0:
                stage_run.preparation.progress(what, number, len(records))
            try:
                sides = [learned.encode(reward, pair.prompt, side) for side in (pair.chosen, pair.rejected)]
            except UsageError as error:
                if config.too_long == "error":
                    raise UsageError(f"{pair.origin}: {error}; set too_long: skip") from None
                seen.left_out += 1
                continue
            for side in sides:
                sink.add(side)
            seen.add(stage_run, config, pair)
        release(records)
        return sink.done()


def _scores(
    config: EvaluateConfig, members: Sequence[learned.RewardModel], sides: Sequence[Inputs]
) -> reward_models.Array:
    """(M, 2·P) raw scores."""
    pair_of_side = [i // 2 for i in range(len(sides))]
    scores = [
        learned.score(member, sides, batch_size=config.batch_size, together=pair_of_side).double()
        for member in members
    ]
    return torch.stack(scores).numpy()
