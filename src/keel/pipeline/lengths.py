"""Rows that a stage would stop at for their length, found before any stage trains.

A row is encoded as its stage encodes it, by the tokenizer that the stage will have: that of the model at the
root of its chain, with the chat templates on the way. Rows with fewer bytes than there is room for tokens
cannot be too long, and are not encoded.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keel.config import Stage
from keel.data import chat
from keel.errors import DataError, UsageError
from keel.models.load import ModelSource, context_length, model_config
from keel.pipeline.preflight import Sources, from_outside, reads_both_ways
from keel.stages import prepare
from keel.types import Conversation, PreferenceRecord, PromptRecord, Record, TextRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUDGET = 30.0  # seconds of a stage's rows; it meets the others itself
BEYOND = 2.0  # seconds of rows behind the first that is too long: what helps it must help them, too
EVERY = 256  # rows between two looks at the clock
_PLAIN = {"role", "content"}
_AROUND = 8  # tokens that stand around a row without turns, at most: BOS, EOS, SentencePiece's spaces


@dataclass(frozen=True, slots=True)
class _Reader:
    """What a stage reads its rows with."""

    name: str
    stage: Stage
    tokenizers: Sequence[PreTrainedTokenizerBase]  # one, or one for each model that answers
    limit: int
    encoder: bool  # it reads prompt and reply as a pair, without a template

    @property
    def policy(self) -> str:
        return getattr(self.stage, "too_long", "error")


def check(sources: Sources, name: str, *, hub: bool = False) -> None:
    """Measure the rows of a stage whose `too_long` lets one stop it. DataError for such rows, which names the
    first one and what is true of all, and for one that the chat template cannot write; both name the stage.

    hub: tokenizers may be fetched. Nothing is measured where the tokenizer is not there yet.
    """
    stage = sources.config.stages[name]
    policy = getattr(stage, "too_long", "skip")
    if policy == "skip" or stage.cuts_texts:
        return
    models = [place for setting, place in stage.references() if setting in ("model", "models")]
    tokenizers = [of_model(sources, place, hub) for place in models]
    if stage.starts_from is not None:
        tokenizers = [tokenizer_of(sources, name, hub=hub)]
    found = [tokenizer for tokenizer in tokenizers if tokenizer is not None]
    contexts = [_context(sources, place, hub) for place in models]
    limit = min((one for one in (getattr(stage, "max_length", None), *contexts) if one), default=None)
    if not found or limit is None:
        return
    config = sources.root_config(name, hub) if stage.leaves == "reward model" else None
    reader = _Reader(name, stage, found, limit, config is not None and reads_both_ways(config))
    for setting, accept in stage.all_data():
        if (there := from_outside(setting)) and not (stage.replies and accept == ("preference",)):
            _measure(sources, reader, sources.load_data(there, accept, name).records)


def tokenizer_of(sources: Sources, name: str, *, hub: bool = False) -> PreTrainedTokenizerBase | None:
    """The tokenizer that a stage will work with; None where a stage has yet to train it, or it is not on this
    machine."""
    stage = sources.config.stages[name]
    start = stage.starts_from
    if start is None:
        return None
    if start.tokenizer is not None or (start.path is not None and start.path not in sources.config.stages):
        tokenizer = _loaded(sources, stage, str(start.tokenizer or sources.resolve(str(start.path))), hub)
    else:
        tokenizer = tokenizer_of(sources, start.path, hub=hub) if start.path else None
    if tokenizer is not None and start.chat_template:
        tokenizer.chat_template = start.chat_template
    return tokenizer


def of_model(sources: Sources, place: str, hub: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model that a stage only reads: another stage's, or one from outside."""
    if place in sources.config.stages:
        return tokenizer_of(sources, place, hub=hub)
    return _loaded(sources, None, sources.resolve(place), hub)


def _loaded(sources: Sources, stage: Stage | None, place: str, hub: bool) -> PreTrainedTokenizerBase | None:
    if not hub and not Path(place).exists():
        return None
    revision = stage.starts_from.revision if stage and stage.starts_from else None
    remote = stage is not None and sources.trusts(stage)
    try:
        return sources.tokenizers.load(place, trust_remote_code=remote, revision=revision)
    except UsageError:  # the stage says why; a plan runs no code that comes with a model
        return None


def _context(sources: Sources, place: str, hub: bool) -> int | None:
    if place in sources.config.stages:
        return sources.context(place, hub)
    found = sources.resolve(place)
    if not hub and not Path(found).exists():
        return None
    try:
        return context_length(model_config(ModelSource(found)))
    except UsageError:
        return None


def _measure(sources: Sources, reader: _Reader, records: Sequence[Record]) -> None:
    new = reader.stage.replies.max_new_tokens if reader.stage.replies else 0
    header = max(map(_header, reader.tokenizers))
    until, shapes = time.monotonic() + BUDGET, set[frozenset[str]]()
    faults: list[_Fault] = []
    for number, record in enumerate(records):
        if number % EVERY == EVERY - 1 and time.monotonic() > until:
            if not faults:
                sources.say(
                    f"{reader.name}: the lengths of {number:,} of {len(records):,} rows were checked in "
                    f"{BUDGET:g} s; it checks the others itself, before it trains"
                )
            break
        room = reader.limit - new if isinstance(record, PromptRecord) else reader.limit
        turns, size = _size(record)
        shape = frozenset(key for turn in turns for key in turn)
        around = header * (len(turns) + 1) if turns else _AROUND
        if shape in shapes and shape <= _PLAIN and size + around <= room:
            continue
        shapes.add(shape)
        found = filter(None, (_measure_one(reader, record, one, room) for one in reader.tokenizers))
        if fault := next(found, None):
            until = min(until, time.monotonic() + BEYOND) if not faults else until
            faults.append(fault)
    if faults:
        first = faults[0]
        hopeless = sum(fault.hopeless for fault in faults)
        raise prepare.too_long_error(
            first.record, first.tokens, first.room, reader.name, reader.policy,
            rows=len(faults), hopeless=hopeless,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Fault:
    """A row that is too long."""

    record: Record
    tokens: int
    room: int
    hopeless: bool  # its response alone is


def _measure_one(
    reader: _Reader, record: Record, tokenizer: PreTrainedTokenizerBase, room: int
) -> _Fault | None:
    try:
        whole, answer = _length(reader, tokenizer, record)
    except (UsageError, DataError) as error:
        where = "" if record.origin in str(error) else f"{record.origin}: "
        raise DataError(f"{reader.name}: {where}{error}") from None
    if whole > room and (reader.policy == "error" or answer >= room):
        return _Fault(record, whole, room, answer >= room)
    return None


def _length(reader: _Reader, tokenizer: Any, record: Record) -> tuple[int, int]:
    """Tokens of a row as the stage writes it, and of what it must not lose of it (a reply)."""
    if isinstance(record, PreferenceRecord) and reader.encoder:
        asked = chat.prompt_text(None, record.prompt)
        sides = [chat.completion_text(side) for side in (record.chosen, record.rejected)]
        pairs = [tokenizer(asked, side, split_special_tokens=True, verbose=False) for side in sides]
        alone = [tokenizer(side, split_special_tokens=True, verbose=False) for side in sides]
        whole, answer = (max(len(one["input_ids"]) for one in found) for found in (pairs, alone))
        return whole, answer
    if isinstance(record, TextRecord):
        if reader.stage.leaves == "classifier":
            return len(tokenizer(chat.prompt_text(None, record.text), verbose=False)["input_ids"]), 0
        if not isinstance(record.text, str):
            chat.with_chat_template(tokenizer)
        return max(len(row[0]) for row in chat.text_rows(tokenizer, record)), 0
    if not isinstance(record.prompt, str):
        chat.with_chat_template(tokenizer)
    prompt = len(chat.prompt_ids(tokenizer, record.prompt))
    if isinstance(record, PromptRecord):
        return prompt, 0
    sides = (record.chosen, record.rejected) if isinstance(record, PreferenceRecord) else (record.completion,)
    replies = [len(chat.completion_ids(tokenizer, record.prompt, side)) for side in sides]
    return prompt + max(replies), max(replies)


def _header(tokenizer: Any) -> int:
    """Tokens that stand around a turn, at most: those of a template with one letter in it, twice over."""
    if not tokenizer.chat_template:
        return 32
    try:
        return 2 * len(chat.prompt_ids(tokenizer, ({"role": "user", "content": "a"},)))
    except (UsageError, DataError):
        return 1 << 30  # what cannot be guessed is encoded


def _size(record: Record) -> tuple[Conversation, int]:
    """The turns of a row, and the bytes of its texts."""
    turns: list[Any] = []
    size = 0
    for side in ("text", "prompt", "completion", "chosen", "rejected"):
        part = getattr(record, side, None)
        if isinstance(part, str):
            size += len(part.encode("utf-8", "surrogatepass"))
        elif part is not None:
            turns += part
            size += sum(len(str(turn.get("content")).encode("utf-8", "surrogatepass")) for turn in part)
    return tuple(turns), size
