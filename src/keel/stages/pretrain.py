"""Pretraining: language modelling on a packed stream of text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from keel.config import PretrainConfig
from keel.data import chat, stream
from keel.data.batches import pack_stream
from keel.data.stored.records import facts_of
from keel.errors import UsageError
from keel.models.load import ModelSource, causal_lm, context_length, model_config
from keel.models.tokenizer import check_reads, train_tokenizer
from keel.rundir.stage_run import StageRun
from keel.stages import language, prepare
from keel.stages.supervised_loop import Stream
from keel.types import Record, TextRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_VOCABULARY = 4096
_TOKENIZER_READS = 1 << 26  # characters of a stream that a new tokenizer is trained on


def run(config: PretrainConfig, stage_run: StageRun) -> dict[str, Any]:
    """1. text  2. a tokenizer, trained when none is given  3. rows of a packed stream  4. the loop  5. save.

    Departure worth knowing: rows are cut from one stream, so a token may attend to the document before its
    own; an EOS stands between them. That is how GPT-2 and its successors are trained.
    """
    source = prepare.source_of(config.model, stage_run)
    if config.streams:
        tokenizer, rows, held_out_rows = _streamed(config, stage_run, source)
    else:
        dataset, records, held_out = prepare.train_and_eval(config, stage_run, ("text",))
        texts = (chat.prompt_text(None, _text(record)) for record in records)
        tokenizer = _tokenizer(config, stage_run, source, texts, dataset.conversational)
        length = _length(config, stage_run, source)
        rows, held_out_rows = _rows(tokenizer, records, length), _rows(tokenizer, held_out, length)
    pad_id = chat.ensure_pad(tokenizer)

    model = prepare.opened(
        lambda: causal_lm(source, language.model_seed(stage_run), vocab=tokenizer), source, config
    )
    model = prepare.to_train(model, config, stage_run)
    result = language.fit(stage_run, config, model, pad_id, rows, held_out_rows)
    if isinstance(rows, StreamedRows) and (bad := rows.tokens.texts.bad):
        first = next(iter(bad.values()))
        stage_run.say(f"{stage_run.name}: {len(bad):,} bad rows skipped; the first: {first}")
        stage_run.facts["skipped"] = len(bad)
    prepare.save_model(stage_run, model, tokenizer, config, "A base language model")
    return result


def _tokenizer(
    config: PretrainConfig,
    stage_run: StageRun,
    source: ModelSource,
    texts: Iterable[str],
    conversational: bool,
) -> PreTrainedTokenizerBase:
    """The model's tokenizer; for a new model without one, one that is trained on the texts. Those held out
    are not among them."""
    if config.model.init is None or config.model.tokenizer is not None:
        opened = prepare.open_tokenizer(config.model, stage_run, conversational=conversational, teaches=True)
        check_reads(opened, prepare.first_words(texts), config.model.tokenizer or str(source.path))
        return opened
    limit = context_length(model_config(source)) or config.max_length or 512
    tokenizer: Any = train_tokenizer(texts, config.model.vocab_size or DEFAULT_VOCABULARY, limit)
    chat.with_chat_template(tokenizer)
    if config.model.chat_template:
        tokenizer.chat_template = config.model.chat_template
    tokenizer.keel_conversations = conversational  # for `prepare.save_model`
    return tokenizer


def _length(config: PretrainConfig, stage_run: StageRun, source: ModelSource) -> int:
    length = prepare.limit_of(config, stage_run, source)
    if length is None:
        raise UsageError(f"{stage_run.name}: set max_length; the model's config names no context length")
    return length


def _rows(
    tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], length: int
) -> list[language.LanguageRow]:
    documents = [chat.document_ids(tokenizer, record) for record in records if isinstance(record, TextRecord)]
    return [_row(ids) for ids in pack_stream(documents, length)] if documents else []


def _row(ids: Sequence[int]) -> language.LanguageRow:
    return language.LanguageRow(ids, [True] * len(ids))


def _text(record: Record) -> Any:
    return record.text if isinstance(record, TextRecord) else ""


# ---------------------------------------------------------------- texts that are read as they are trained on


def _streamed(
    config: PretrainConfig, stage_run: StageRun, source: ModelSource
) -> tuple[PreTrainedTokenizerBase, StreamedRows, list[language.LanguageRow]]:
    """The tokenizer, the rows as they come, and those held out."""
    texts = stream.TextStream(
        stream.shards_of([one.plain() for one in config.data]), stage_run.seed, config.shuffle_buffer
    )
    if config.eval_data is not None:
        held_out: Sequence[Any] = prepare.read(stage_run, config.eval_data, ("text",)).records
    else:
        held_out = stream.held_out(texts, config.holdout)
        texts = replace(texts, left_out=frozenset(map(stream.text_key, held_out)))
    talks = not held_out or "conversational" in facts_of(held_out)["forms"]  # the rest is like them
    tokenizer = _tokenizer(config, stage_run, source, texts.texts(_TOKENIZER_READS), talks)
    length = _length(config, stage_run, source)
    tokens = stream.estimated_tokens(texts.shards, tokenizer)
    rows = math.ceil(tokens / max(length - 1, 1))
    stage_run.say(
        f"{stage_run.name}: a stream of {len(texts.shards):,} files, some {tokens:,} tokens, shuffled in "
        f"a buffer of {config.shuffle_buffer:,} texts"
    )
    stage_run.facts |= {"shards": len(texts.shards), "estimated_tokens": tokens}
    return (
        tokenizer,
        StreamedRows(stream.TokenStream(texts, tokenizer, length), rows),
        _rows(tokenizer, held_out, length),
    )


class StreamedRows(Stream[language.LanguageRow]):
    """Rows of a token stream, in the order in which they come."""

    def __init__(self, tokens: stream.TokenStream, count: int) -> None:
        self.tokens, self.count = tokens, count

    def __len__(self) -> int:
        """Rows of one pass over the texts, by an estimate."""
        return self.count

    def take(self, count: int) -> list[language.LanguageRow]:
        return [_row(self.tokens.row()) for _ in range(count)]

    def cursor(self) -> dict[str, int]:
        return stream.as_values(self.tokens.cursor())

    def seek(self, cursor: dict[str, int]) -> None:
        self.tokens.seek(stream.Cursor(**cursor))
