"""A text classifier from labelled texts: an encoder (BERT, 1810.04805) or a decoder with a head on its last
token.

What it leaves is read by `rewards.classifier`, and is trained on what is read there: text as the tokenizer
encodes it by itself, special tokens included.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from keel.algorithms import classification
from keel.config import ClassifierConfig, DataConfig
from keel.data import chat, files
from keel.data.batches import derive_seed
from keel.data.holdout import hold_out
from keel.data.identity import RowKeys, as_keys, distinct
from keel.data.stored.inputs import Inputs, InputSink, StoredInputs, name_of_inputs
from keel.data.stored.plain import plain_texts
from keel.data.stored.records import Rows, joined, keys_of_rows, picked, release
from keel.data.stored.tokens import BATCH, folders_of, rows_print, tokenizer_print
from keel.distributed import group
from keel.errors import DataError, UsageError
from keel.evaluation.measures import wilson
from keel.models.load import ModelSource, model_config, score_head, scorer
from keel.models.tokenizer import EOS, train_tokenizer, with_own_pad
from keel.rewards import classifier as reader
from keel.rewards.classifier import encoded, forward, longest_input
from keel.rundir.stage_run import StageRun
from keel.stages import lazy_rows, prepare, supervised_loop
from keel.stages.loop_utils import add_metrics, forward_parts
from keel.stages.pretrain import DEFAULT_VOCABULARY
from keel.types import Record, TextRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CLS = "<|cls|>"
Keys = NDArray[np.uint64]  # of texts, as in `data.identity`


@dataclass(frozen=True, slots=True)
class ClassifierRow:
    """One example: a short text, or a passage of a long one."""

    inputs: Mapping[str, list[int]]  # input_ids and, where the tokenizer makes them, token_type_ids
    label: int  # index of its label
    weight: float = 1.0  # w of `algorithms.classification.cross_entropy`


def run(config: ClassifierConfig, stage_run: StageRun) -> dict[str, Any]:
    """1. texts by label  2. a tokenizer, trained when none is given  3. rows  4. the loop  5. save, with the
    labels' names.

    Texts are held out whole and label by label, before they are cut: no passage of a text trained on is
    evaluated on. The saved tokenizer's limit is the longest row of training, so that as a reward the
    classifier reads no more than that.
    """
    texts, held_out = _texts(config, stage_run)
    source = prepare.source_of(config.model, stage_run)
    tokenizer, limit = _tokenizer(config, stage_run, source, joined([*texts.values()]))
    source, tokenizer = with_own_pad(source, tokenizer)
    too_long = prepare.TooLong(stage_run, config.too_long, limit)
    rows, held_out_rows = (_rows(config, stage_run, tokenizer, part, too_long) for part in (texts, held_out))
    too_long.report()
    pad_id = chat.ensure_pad(tokenizer)

    seed = derive_seed(stage_run.seed, "model")
    model = prepare.opened(
        lambda: scorer(source, seed, vocab=tokenizer, labels=config.labels), source, config
    )
    model.config.pad_token_id = pad_id
    model = prepare.to_train(model, config, stage_run, train_head=True)
    result = _fit(stage_run, config, model, pad_id, rows, held_out_rows)
    if limit is not None:
        tokenizer.model_max_length = limit
    prepare.save_model(stage_run, model, tokenizer, config, f"A text classifier ({', '.join(config.labels)})")
    return result


# ---------------------------------------------------------------- texts and rows


def _texts(
    config: ClassifierConfig, stage_run: StageRun
) -> tuple[dict[str, Sequence[Record]], dict[str, Sequence[Record]]]:
    """label → texts to train on, and to evaluate on. UsageError if a label has too few to hold one out.

    A text that stands under two labels is on one side under both, and is held out only where a label has no
    other texts: nobody knows which label is right.
    """
    texts = {label: _read(config, stage_run, config.data[label]) for label in config.labels}
    row_keys = {label: keys_of_rows(of_label) for label, of_label in texts.items()}
    keys = {label: as_keys(of_label.prompts) for label, of_label in row_keys.items()}
    contradicting = _contradicting(stage_run, keys, row_keys)
    if config.eval_data is not None:
        evaluated = {label: _read(config, stage_run, config.eval_data[label]) for label in config.labels}
        every = np.concatenate([*keys.values()])
        asked = (as_keys(keys_of_rows(of_label).prompts) for of_label in evaluated.values())
        seen = sum(int(np.isin(of_label, every).sum()) for of_label in asked)
        stage_run.facts["held_out_seen"] = seen
        if seen:
            stage_run.say(f"{stage_run.name}: {seen:,} texts of eval_data are trained on")
        return texts, evaluated
    stage_run.facts["held_out_seen"] = 0  # by the way they are chosen
    apart = np.zeros(0, dtype=np.uint64)  # the keys of what is held out
    for label, of_label in texts.items():
        if len(of_label) < 2 and config.holdout > 0:
            whole = " (the paragraphs of a .txt file are one text)" if config.passages else ""
            raise UsageError(
                f"{stage_run.name}: label {label!r} has one text{whole}, of which none can be held "
                "out; give more, `eval_data`, or `holdout: 0`"
            )
        clear = np.flatnonzero(~np.isin(keys[label], contradicting))
        if len(clear) > 1 or not np.isin(keys[label], apart).any():
            among = clear if len(clear) > 1 else np.arange(len(of_label))
            held = among[_held_out(config, stage_run, label, picked(of_label, among))]
            apart = np.union1d(apart, keys[label][held])
    sides = {label: np.isin(keys[label], apart) for label in texts}
    trained, held_out = (
        {label: picked(texts[label], np.flatnonzero(side == wanted)) for label, side in sides.items()}
        for wanted in (False, True)
    )
    return trained, held_out


def _held_out(
    config: ClassifierConfig, stage_run: StageRun, label: str, texts: Sequence[Record]
) -> list[int]:
    """The numbers of one label's texts to evaluate on: equal ones, and those of one `group`, stay
    together."""
    where = f"{stage_run.name}: label {label!r}: "
    seed = derive_seed(stage_run.seed, label)
    return hold_out(texts, keys_of_rows(texts), config.holdout, seed, config.group, where).held_out


def _contradicting(stage_run: StageRun, keys: Mapping[str, Keys], row_keys: Mapping[str, RowKeys]) -> Keys:
    """The keys of texts under two labels or more; counted, with the repeated ones, and said."""
    each = [distinct(of_label) for of_label in keys.values()]
    texts, labels = np.unique(np.concatenate(each), return_counts=True)
    twice = texts[labels > 1]
    duplicates = sum(of_label.repeats().duplicates for of_label in row_keys.values())
    stage_run.facts |= {
        "distinct_prompts": len(texts),
        "duplicate_rows": duplicates,
        "contradictions": len(twice),
    }
    if len(twice) or duplicates:
        stage_run.say(
            f"{stage_run.name}: {duplicates:,} texts repeat earlier ones of their label, {len(twice):,} "
            "stand under two labels"
        )
    return twice


def _read(config: ClassifierConfig, stage_run: StageRun, sources: Sequence[DataConfig]) -> Sequence[Record]:
    """The texts of one label. With `passages` the paragraphs of a .txt file are one text, which they are in a
    book."""
    parts: list[Sequence[Record]] = []
    for source in sources:
        records = plain_texts(prepare.read(stage_run, [source], ("text",)).records)
        if config.passages and files.suffix_of(Path(source.source)) == ".txt":
            records = [TextRecord("\n\n".join(map(_text, records)), origin=source.source)]
        parts.append(records)
    return joined(parts)


def _text(record: Record) -> str:
    assert isinstance(record, TextRecord)
    return str(record.text)


def _tokenizer(
    config: ClassifierConfig, stage_run: StageRun, source: ModelSource, texts: Sequence[Record]
) -> tuple[Any, int | None]:
    """The tokenizer, and the longest row in tokens. A new one is trained on the texts trained on, never on
    those held out.

    A new encoder pools what its first token has become, so that its tokenizer puts a token of its own there
    (CLS), and EOS at the end, as BERT's does.
    """
    limit = prepare.limit_of(config, stage_run, source)
    if config.model.init is None or config.model.tokenizer is not None:
        tokenizer = prepare.open_tokenizer(config.model, stage_run, reads=texts)
    else:
        with torch.device("meta"):
            shape = AutoModelForSequenceClassification.from_config(model_config(source))
        encoder = score_head(shape) is None
        size = (config.model.vocab_size or DEFAULT_VOCABULARY) - encoder  # CLS takes one
        tokenizer = train_tokenizer(map(_text, texts), size, limit or 512)
        if encoder:
            tokenizer.add_special_tokens({"cls_token": CLS, "sep_token": EOS})
            ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (CLS, EOS)]
            single, pair = f"{CLS} $A {EOS}", f"{CLS} $A {EOS} $B {EOS}"
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single=single, pair=pair, special_tokens=ends
            )
    readable = longest_input(model_config(source), tokenizer)
    return tokenizer, readable if limit is None else limit if readable is None else min(limit, readable)


def _rows(
    config: ClassifierConfig,
    stage_run: StageRun,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, Sequence[Record]],
    too_long: prepare.TooLong,
) -> Sequence[ClassifierRow]:
    """All labels' rows, weighted so that every label counts the same; DataError for a label without any.

    Texts of one label stand together: the loop draws them in an order of its own.
    """
    if not any(map(len, texts.values())):
        return []
    inputs, counts = group.first_then_all(lambda: _inputs(config, stage_run, tokenizer, texts, too_long))
    weights = [len(inputs) / (len(counts) * count) for count in counts]
    ends = np.cumsum(counts)

    def row(number: int) -> ClassifierRow:
        label = int(np.searchsorted(ends, number, side="right"))
        return ClassifierRow(inputs[number], label, weights[label])

    if isinstance(inputs, StoredInputs):
        return lazy_rows.LazyRows(len(inputs), row, inputs.sizes())
    return [row(number) for number in range(len(inputs))]


def _inputs(
    config: ClassifierConfig,
    stage_run: StageRun,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, Sequence[Record]],
    too_long: prepare.TooLong,
) -> tuple[Sequence[Inputs], list[int]]:
    """What the model reads, label by label, and how many rows each label has. Many are made once, and found
    again by the next start."""
    cache = stage_run.preparation.cache

    def name() -> str:
        every = [(label, rows_print(texts[label])) for label in config.labels]
        settings = (too_long.limit, too_long.policy, config.passages)
        makers = [sys.modules[__name__], reader]
        return name_of_inputs(makers, *every, tokenizer_print(tokenizer), *settings)

    of_files = any(isinstance(of_label, Rows) for of_label in texts.values())
    if of_files and (folder := cache.find(name())) is not None:
        known = StoredInputs(folder, cache)
        too_long.cut += known.facts["cut"]
        too_long.left_out += known.facts["left_out"]
        return known, known.facts["counts"]
    counts: list[int] = []
    before = too_long.cut, too_long.left_out
    with InputSink(cache, name) as sink:
        for label in config.labels:
            first = sink.count
            for inputs in _of_label(config, stage_run, tokenizer, texts[label], too_long):
                sink.add(inputs)
            counts.append(sink.count - first)
            if not counts[-1]:
                raise DataError(
                    f"{stage_run.name}: label {label!r} has no usable text left of {len(texts[label])}"
                )
            release(texts[label])
        cut, left_out = too_long.cut - before[0], too_long.left_out - before[1]
        made_from = sorted({folder for of_label in texts.values() for folder in folders_of(of_label)})
        known = {"counts": counts, "cut": cut, "left_out": left_out, "made_from": made_from}
        return sink.done(known), counts


def _of_label(
    config: ClassifierConfig,
    stage_run: StageRun,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Record],
    too_long: prepare.TooLong,
) -> Iterator[Inputs]:
    """The rows of one label's texts. A text that is too long as a whole is an error, left out, or keeps its
    start (`too_long`)."""
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        stage_run.preparation.progress(f"{stage_run.name}: tokenising", start + len(batch), len(texts))
        if config.passages:
            for text in batch:
                yield from _passages(tokenizer, text, too_long.limit, stage_run)
            continue
        for text, row in zip(batch, encoded(tokenizer, [*map(_text, batch)], None), strict=True):
            length = len(row["input_ids"])
            if not too_long.fits(text, length):
                continue
            longer = too_long.limit is not None and length > too_long.limit
            yield encoded(tokenizer, [_text(text)], too_long.limit)[0] if longer else row


def _passages(
    tokenizer: PreTrainedTokenizerBase, text: Record, limit: int | None, stage_run: StageRun
) -> list[dict[str, list[int]]]:
    """The text cut into the fewest passages of at most `limit` tokens, as equal as can be: no scrap is left
    at its end."""
    if limit is None:
        raise UsageError(
            f"{stage_run.name}: set max_length for `passages`; neither the model nor its tokenizer names a "
            "limit"
        )
    special = tokenizer.num_special_tokens_to_add()
    if limit <= special or not tokenizer.is_fast:
        why = (
            "its tokenizer is a slow one"
            if limit > special
            else f"max_length {limit} leaves no room for text"
        )
        raise UsageError(f"{stage_run.name}: `passages` cannot be cut: {why}")
    whole = tokenizer(_text(text), add_special_tokens=False, verbose=False)["input_ids"]
    count = max(1, math.ceil(len(whole) / (limit - special)))
    size = math.ceil(len(whole) / count) + special
    columns = tokenizer(
        _text(text), truncation=True, max_length=size, return_overflowing_tokens=True, verbose=False
    )
    keys = [key for key in ("input_ids", "token_type_ids") if key in columns]
    return [{key: list(columns[key][i]) for key in keys} for i in range(len(columns["input_ids"]))]


# ---------------------------------------------------------------- the loop's objective


def _fit(
    stage_run: StageRun,
    config: ClassifierConfig,
    model: PreTrainedModel,
    pad_id: int,
    rows: Sequence[ClassifierRow],
    held_out: Sequence[ClassifierRow],
) -> dict[str, Any]:
    """Train on the rows and return the held-out measures; the model ends with the weights to keep."""

    def part(rows: Sequence[ClassifierRow], denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
        value, measured = loss(model, rows, pad_id, denominator)
        return value, {"accuracy": measured["correct"] / denominator}

    objective: supervised_loop.Objective[ClassifierRow] = supervised_loop.Objective(
        loss=part,
        weight=lambda row: 1,
        size=_size,
        length=_size,
        evaluate=lambda rows: evaluate(model, rows, pad_id, config)[0],
        sequences=lambda row: [((), _size(row) + 1)],  # scores are read at the last token
    )
    supervised_loop.fit(stage_run, config, model, rows, held_out, objective)
    return evaluate(model, held_out, pad_id, config)[1] if held_out else {}


def _size(row: ClassifierRow) -> int:
    return len(row.inputs["input_ids"])


def loss(
    model: PreTrainedModel, rows: Sequence[ClassifierRow], pad_id: int, denominator: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted cross-entropy of these rows as their part of a step of `denominator` rows; how many are
    `correct`, and the `labels` (B,) taken."""
    logits = forward(model, [row.inputs for row in rows], pad_id)
    labels = torch.tensor([row.label for row in rows], device=logits.device)
    weights = torch.tensor([row.weight for row in rows], dtype=torch.float64).to(logits.device)
    value, measured = classification.cross_entropy(logits, labels, weights, denominator)
    return value, {**measured, "labels": logits.argmax(dim=-1)}


def evaluate(
    model: PreTrainedModel, rows: Sequence[ClassifierRow], pad_id: int, config: ClassifierConfig
) -> tuple[dict[str, float], dict[str, Any]]:
    """Held-out measures, as metrics and as the stage's result. Accuracy is over all rows, the loss label by
    label.

    Wilson's interval takes rows as independent; passages of one text are less than that, so that it is narrow
    for them.
    """
    model.eval()
    totals: dict[str, float] = {}
    hits, counts = [0] * len(config.labels), [0] * len(config.labels)

    def measures(indices: Sequence[int]) -> tuple[float, list[int]]:
        value, measured = loss(model, [rows[i] for i in indices], pad_id, len(rows))
        return float(value), measured["labels"].tolist()

    parts = forward_parts(config, lazy_rows.sizes(rows, _size))
    with torch.no_grad():
        for indices, (value, labels) in zip(parts, group.mapped(parts, measures), strict=True):
            add_metrics(totals, {"loss": value})
            for row, taken in zip([rows[i] for i in indices], labels, strict=True):
                counts[row.label] += 1
                hits[row.label] += taken == row.label
    accuracy = wilson(sum(hits), len(rows))
    classes = {label: wilson(hits[i], counts[i]) for i, label in enumerate(config.labels)}
    metrics = {"eval_loss": totals["loss"], "eval_accuracy": accuracy["mean"]}
    return metrics, {"accuracy": accuracy, "classes": classes, "eval_loss": totals["loss"]}
