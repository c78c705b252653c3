"""Supervised fine-tuning on demonstrations."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from keel.config import SFTConfig
from keel.data import chat
from keel.data.batches import pack_examples
from keel.errors import UsageError
from keel.models import packing
from keel.models.load import causal_lm
from keel.rundir.stage_run import StageRun
from keel.stages import language, prepare
from keel.types import DemonstrationRecord, Record, TextRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def run(config: SFTConfig, stage_run: StageRun) -> dict[str, Any]:
    """1. demonstrations  2. tokens, with a mask of those that count  3. rows, packed if asked  4. the loop
    5. save."""
    dataset, records, held_out = prepare.train_and_eval(config, stage_run, ("demonstration", "text"))
    source = prepare.source_of(config.model, stage_run)
    tokenizer = prepare.open_tokenizer(config.model, stage_run, conversational=dataset.conversational)
    prepare.look_for_marks(stage_run, tokenizer, dataset.records)
    limit = prepare.limit_of(config, stage_run, source)
    too_long = prepare.TooLong(stage_run, config.too_long, limit)
    rows, held_out_rows = (
        [row for rows in encoded for row in rows]  # a conversation may be a row for each of its turns
        for encoded in (
            prepare.encode_all(stage_run, part, lambda record: _encode(tokenizer, record, config, too_long))
            for part in (records, held_out)
        )
    )
    too_long.report()
    if config.packing:
        if limit is None:
            raise UsageError(
                f"{stage_run.name}: packing needs max_length; the model's config names no context length"
            )
        rows = [
            _pack([rows[i] for i in group]) for group in pack_examples([len(row.ids) for row in rows], limit)
        ]

    model = prepare.to_train(
        causal_lm(source, language.model_seed(stage_run), vocab=tokenizer), config, stage_run
    )
    if config.packing:
        _try_packing(stage_run, model, rows)
    result = language.fit(stage_run, config, model, chat.ensure_pad(tokenizer), rows, held_out_rows)
    prepare.save_model(stage_run, model, tokenizer, config, "A supervised fine-tuned language model")
    return result


def _encode(
    tokenizer: PreTrainedTokenizerBase, record: Record, config: SFTConfig, too_long: prepare.TooLong
) -> list[language.LanguageRow] | None:
    if isinstance(record, DemonstrationRecord):
        prompt = chat.prompt_ids(tokenizer, record.prompt)
        response = chat.completion_ids(tokenizer, record.prompt, record.completion)
        if not too_long.fits(
            record,
            len(prompt) + len(response),
            truncatable=len(response) < (too_long.limit or len(response) + 1),
        ):
            return None
        excess = max(0, len(prompt) + len(response) - (too_long.limit or len(prompt) + len(response)))
        prompt = prompt[excess:]  # the prompt gives way, from its start; the response stays whole
        counts = [config.loss_on == "all"] * len(prompt) + [True] * len(response)
        return [language.LanguageRow(prompt + response, counts)]
    assert isinstance(record, TextRecord)
    rows: list[language.LanguageRow] = []
    for ids, counts in chat.text_rows(tokenizer, record):
        if not too_long.fits(record, len(ids)):
            continue
        ids, counts = ids[: too_long.limit], counts[: too_long.limit]
        if config.loss_on == "all":
            counts = [True] * len(ids)
        if not any(counts[1:]):
            raise UsageError(
                f"{record.origin}: no token of the answer is left within {too_long.limit} tokens"
            )
        rows.append(language.LanguageRow(ids, counts))
    return rows or None


def _try_packing(stage_run: StageRun, model: Any, rows: list[language.LanguageRow]) -> None:
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
