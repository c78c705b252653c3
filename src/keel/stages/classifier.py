"""A text classifier from labelled texts: an encoder (BERT, 1810.04805) or a decoder with a head on its last
token.

What it leaves is read by `rewards.classifier`, and is trained on what is read there: text as the tokenizer
encodes it by itself, special tokens included.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from keel.algorithms import classification
from keel.config import ClassifierConfig, DataConfig
from keel.data import chat, files
from keel.data.batches import derive_seed
from keel.data.holdout import hold_out
from keel.data.identity import RowKeys, as_keys, shared
from keel.distributed import group
from keel.errors import DataError, UsageError
from keel.evaluation.measures import wilson
from keel.models.load import ModelSource, model_config, score_head, scorer
from keel.models.tokenizer import EOS, train_tokenizer, with_own_pad
from keel.rewards.classifier import encoded, forward, longest_input
from keel.rundir.stage_run import StageRun
from keel.stages import prepare, supervised_loop
from keel.stages.loop_utils import add_metrics, forward_parts
from keel.stages.pretrain import DEFAULT_VOCABULARY
from keel.types import TextRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CLS = "<|cls|>"


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
    tokenizer, limit = _tokenizer(
        config, stage_run, source, [text for texts_of_label in texts.values() for text in texts_of_label]
    )
    source, tokenizer = with_own_pad(source, tokenizer)
    too_long = prepare.TooLong(stage_run, config.too_long, limit)
    rows, held_out_rows = (_rows(config, stage_run, tokenizer, part, too_long) for part in (texts, held_out))
    too_long.report()
    pad_id = chat.ensure_pad(tokenizer)

    model = scorer(source, derive_seed(stage_run.seed, "model"), vocab=tokenizer, labels=config.labels)
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
) -> tuple[dict[str, list[TextRecord]], dict[str, list[TextRecord]]]:
    """label → texts to train on, and to evaluate on. UsageError if a label has too few to hold one out.

    A text that stands under two labels is on one side under both, and is held out only where a label has no
    other texts: nobody knows which label is right.
    """
    texts = {label: _read(config, stage_run, config.data[label]) for label in config.labels}
    keys = {label: RowKeys.of(texts_of_label) for label, texts_of_label in texts.items()}
    contradicting = _contradicting(stage_run, keys)
    if config.eval_data is not None:
        evaluated = {label: _read(config, stage_run, config.eval_data[label]) for label in config.labels}
        every = array("Q", [key for of_label in keys.values() for key in of_label.prompts])
        seen = sum(shared(RowKeys.of(of_label).prompts, every) for of_label in evaluated.values())
        stage_run.facts["held_out_seen"] = seen
        if seen:
            stage_run.say(f"{stage_run.name}: {seen:,} texts of eval_data are trained on")
        return texts, evaluated
    stage_run.facts["held_out_seen"] = 0  # by the way they are chosen
    apart: set[int] = set()  # the keys of what is held out
    for label, texts_of_label in texts.items():
        if len(texts_of_label) < 2 and config.holdout > 0:
            joined = " (the paragraphs of a .txt file are one text)" if config.passages else ""
            raise UsageError(
                f"{stage_run.name}: label {label!r} has one text{joined}, of which none can be held "
                "out; give more, `eval_data`, or `holdout: 0`"
            )
        of_label = keys[label].prompts
        clear = [text for text, key in zip(texts_of_label, of_label, strict=True) if key not in contradicting]
        if len(clear) > 1 or not apart & {*of_label}:
            chosen = clear if len(clear) > 1 else texts_of_label
            apart |= {*RowKeys.of(_held_out(config, stage_run, label, chosen)).prompts}
    trained, held_out = (
        {
            label: [
                text
                for text, key in zip(texts_of_label, keys[label].prompts, strict=True)
                if (key in apart) is wanted
            ]
            for label, texts_of_label in texts.items()
        }
        for wanted in (False, True)
    )
    return trained, held_out


def _held_out(
    config: ClassifierConfig, stage_run: StageRun, label: str, texts: Sequence[TextRecord]
) -> list[TextRecord]:
    """The texts of one label to evaluate on: equal ones, and those of one `group`, stay together."""
    where = f"{stage_run.name}: label {label!r}: "
    seed = derive_seed(stage_run.seed, label)
    split = hold_out(texts, RowKeys.of(texts), config.holdout, seed, config.group, where)
    return [texts[i] for i in split.held_out]


def _contradicting(stage_run: StageRun, keys: Mapping[str, RowKeys]) -> set[int]:
    """The keys of texts under two labels or more; counted, with the repeated ones, and said."""
    each = [np.unique(as_keys(of_label.prompts)) for of_label in keys.values()]
    texts, labels = np.unique(np.concatenate(each), return_counts=True)
    twice = {int(key) for key in texts[labels > 1]}
    duplicates = sum(of_label.repeats().duplicates for of_label in keys.values())
    stage_run.facts |= {
        "distinct_prompts": len(texts),
        "duplicate_rows": duplicates,
        "contradictions": len(twice),
    }
    if twice or duplicates:
        stage_run.say(
            f"{stage_run.name}: {duplicates:,} texts repeat earlier ones of their label, {len(twice):,} "
            "stand under two labels"
        )
    return twice


def _read(config: ClassifierConfig, stage_run: StageRun, sources: Sequence[DataConfig]) -> list[TextRecord]:
    """The texts of one label. With `passages` the paragraphs of a .txt file are one text, which they are in a
    book."""
    texts: list[TextRecord] = []
    for source in sources:
        records = [
            replace(record, text=chat.prompt_text(None, record.text))
            for record in prepare.read(stage_run, [source], ("text",)).records
            if isinstance(record, TextRecord)
        ]
        if config.passages and files.suffix_of(Path(source.source)) == ".txt":
            records = [TextRecord("\n\n".join(str(record.text) for record in records), origin=source.source)]
        texts += records
    return texts


def _tokenizer(
    config: ClassifierConfig, stage_run: StageRun, source: ModelSource, texts: Sequence[TextRecord]
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
        tokenizer = train_tokenizer((str(text.text) for text in texts), size, limit or 512)
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
    texts: Mapping[str, Sequence[TextRecord]],
    too_long: prepare.TooLong,
) -> list[ClassifierRow]:
    """All labels' rows, weighted so that every label counts the same; DataError for a label without any.

    Texts of one label stand together: the loop draws them in an order of its own.
    """
    if not any(texts.values()):
        return []
    rows: list[ClassifierRow] = []
    for index, label in enumerate(config.labels):
        rows_of_label = [
            ClassifierRow(row, index)
            for text in texts[label]
            for row in (
                _passages(tokenizer, text, too_long.limit, stage_run)
                if config.passages
                else _whole(tokenizer, text, too_long)
            )
        ]
        if not rows_of_label:
            raise DataError(
                f"{stage_run.name}: label {label!r} has no usable text left of {len(texts[label])}"
            )
        rows += rows_of_label
    counts = Counter(row.label for row in rows)
    return [replace(row, weight=len(rows) / (len(counts) * counts[row.label])) for row in rows]


def _whole(
    tokenizer: PreTrainedTokenizerBase, text: TextRecord, too_long: prepare.TooLong
) -> list[dict[str, list[int]]]:
    """A text as one row; what is too long is an error, left out, or keeps its start (`too_long`)."""
    (row,) = encoded(tokenizer, [str(text.text)], None)
    if not too_long.fits(text, len(row["input_ids"])):
        return []
    return encoded(tokenizer, [str(text.text)], too_long.limit)


def _passages(
    tokenizer: PreTrainedTokenizerBase, text: TextRecord, limit: int | None, stage_run: StageRun
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
    whole = tokenizer(str(text.text), add_special_tokens=False, verbose=False)["input_ids"]
    count = max(1, math.ceil(len(whole) / (limit - special)))
    size = math.ceil(len(whole) / count) + special
    columns = tokenizer(
        str(text.text), truncation=True, max_length=size, return_overflowing_tokens=True, verbose=False
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

    parts = forward_parts(config, [_size(row) for row in rows])
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
