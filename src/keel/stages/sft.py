"""Supervised fine-tuning on demonstrations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from keel.config import SFTConfig
from keel.data import chat
from keel.data.batches import pack_examples
from keel.data.stored.tokens import Tokens
from keel.errors import UsageError
from keel.models import packing
from keel.models.load import causal_lm
from keel.rundir.stage_run import StageRun
from keel.stages import language, lazy_rows, prepare
from keel.stages.lazy_rows import LazyRows
from keel.types import Record, TextRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def run(config: SFTConfig, stage_run: StageRun) -> dict[str, Any]:
    """1. demonstrations  2. tokens, with a mask of those that count  3. rows, packed if asked  4. the loop
    5. save."""
    dataset, records, held_out = prepare.train_and_eval(config, stage_run, ("demonstration", "text"))
    source = prepare.source_of(config.model, stage_run)
    tokenizer = prepare.open_tokenizer(
        config.model,
        stage_run,
        conversational=dataset.conversational,
        reads=dataset.records,
        teaches=True,
    )
    prepare.look_for_marks(stage_run, tokenizer, dataset.records)
    limit = prepare.limit_of(config, stage_run, source)
    too_long = prepare.TooLong(stage_run, config.too_long, limit)
    rows, held_out_rows = (
        encode(part, tokenizer, config, too_long) if part else [] for part in (records, held_out)
    )
    too_long.report()
    if config.packing:
        if limit is None:
            raise UsageError(
                f"{stage_run.name}: packing needs max_length; the model's config names no context length"
            )
        rows = _packed(rows, limit)

    model = prepare.opened(
        lambda: causal_lm(source, language.model_seed(stage_run), vocab=tokenizer), source, config
    )
    model = prepare.to_train(model, config, stage_run)
    if config.packing:
        _try_packing(stage_run, model, rows)
    result = language.fit(stage_run, config, model, chat.ensure_pad(tokenizer), rows, held_out_rows)
    prepare.save_model(stage_run, model, tokenizer, config, "A supervised fine-tuned language model")
    return result


def encode(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    config: SFTConfig,
    too_long: prepare.TooLong,
) -> Sequence[language.LanguageRow]:
    """The rows that demonstrations, texts or conversations are trained as; a conversation may be a row for
    each of its turns."""
    limit, all_count = too_long.limit, config.loss_on == "all"
    texts = isinstance(records[0], TextRecord)

    def fits(record: Record, tokens: Tokens) -> bool:
        ids, response = tokens
        if not texts:
            longest = len(ids) + len(response)
            return too_long.fits(record, longest, truncatable=limit is None or len(response) < limit)
        if not too_long.fits(record, len(ids)):
            return False
        counts = response[:limit]
        if not any([True] * len(counts[1:]) if all_count else counts[1:]):
            raise UsageError(f"{record.origin}: no token of the answer is left within {limit} tokens")
        return True

    def build(number: int, tokens: Tokens) -> language.LanguageRow:
        ids, response = tokens
        if texts:
            ids, counts = (
                ids[:limit],
                [True] * len(ids[:limit]) if all_count else list(map(bool, response[:limit])),
            )
            return language.LanguageRow(ids, counts)
        excess = 0 if limit is None else max(0, len(ids) + len(response) - limit)
        prompt = ids[excess:]  # the prompt gives way, from its start; the response stays whole
        return language.LanguageRow(prompt + response, [all_count] * len(prompt) + [True] * len(response))

    return lazy_rows.encode(records, tokenizer, too_long, fits, build)


def _packed(rows: Sequence[language.LanguageRow], limit: int) -> Sequence[language.LanguageRow]:
    """Rows of several examples each, at most `limit` tokens."""
    groups = pack_examples(lazy_rows.sizes(rows, lambda row: len(row.ids)), limit)
    if isinstance(rows, LazyRows):
        return LazyRows(len(groups), lambda index: _pack([rows[i] for i in groups[index]]))
    return [_pack([rows[i] for i in group]) for group in groups]


def _try_packing(stage_run: StageRun, model: Any, rows: Sequence[language.LanguageRow]) -> None:
    """UsageError where the model cannot read the rows as packed, before anything is trained."""
    longest = max(max(Counter(row.segments or ()).values(), default=0) for row in rows)
    try:
        packing.way_of(model, longest)
    except UsageError as error:
        raise UsageError(f"{stage_run.name}: {error}") from None


def _pack(examples: list[language.LanguageRow]) -> language.LanguageRow:
    return language.LanguageRow(
        [token for row in examples for token in row.ids],
        [counts for row in examples for counts in row.counts],
        [number for number, row in enumerate(examples) for _ in row.ids],
    )
