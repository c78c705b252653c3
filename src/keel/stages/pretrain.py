"""Pretraining: language modelling on a packed stream of text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from keel.config import PretrainConfig
from keel.data import chat
from keel.data.batches import pack_stream
from keel.errors import UsageError
from keel.models.load import causal_lm, context_length, model_config
from keel.models.tokenizer import train_tokenizer
from keel.rundir.stage_run import StageRun
from keel.stages import language, prepare
from keel.types import Record, TextRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_VOCABULARY = 4096


def run(config: PretrainConfig, stage_run: StageRun) -> dict[str, Any]:
    """1. text  2. a tokenizer, trained when none is given  3. rows of a packed stream  4. the loop  5. save.

    Departure worth knowing: rows are cut from one stream, so a token may attend to the document before its
    own; an EOS stands between them. That is how GPT-2 and its successors are trained.
    """
    dataset, records, held_out = prepare.train_and_eval(config, stage_run, ("text",))
    source = prepare.source_of(config.model, stage_run)
    if config.model.init is not None and config.model.tokenizer is None:
        # the texts held out are not seen by the tokenizer either
        limit = context_length(model_config(source)) or config.max_length or 512
        texts = [_plain(record) for record in records]
        tokenizer = train_tokenizer(texts, config.model.vocab_size or DEFAULT_VOCABULARY, limit)
        chat.with_chat_template(tokenizer)
        if config.model.chat_template:
            tokenizer.chat_template = config.model.chat_template
    else:
        tokenizer = prepare.open_tokenizer(
            config.model, stage_run, conversational=dataset.conversational, reads=dataset.records
        )
    length = prepare.limit_of(config, stage_run, source)
    if length is None:
        raise UsageError(f"{stage_run.name}: set max_length; the model's config names no context length")
    pad_id = chat.ensure_pad(tokenizer)
    rows, held_out_rows = _rows(tokenizer, records, length), _rows(tokenizer, held_out, length)

    model = prepare.to_train(
        causal_lm(source, language.model_seed(stage_run), vocab=tokenizer), config, stage_run
    )
    result = language.fit(stage_run, config, model, pad_id, rows, held_out_rows)
    prepare.save_model(stage_run, model, tokenizer, config, "A base language model")
    return result


def _rows(
    tokenizer: PreTrainedTokenizerBase, records: list[Record], length: int
) -> list[language.LanguageRow]:
    documents = [chat.document_ids(tokenizer, record) for record in records if isinstance(record, TextRecord)]
    return (
        [language.LanguageRow(ids, [True] * len(ids)) for ids in pack_stream(documents, length)]
        if documents
        else []
    )


def _plain(record: Record) -> str:
    text = record.text if isinstance(record, TextRecord) else ""
    return text if isinstance(text, str) else "\n".join(turn["content"] for turn in text)
