"""`keel plan`: what a config would do, from its data and the shapes of its models. Nothing is trained or downloaded."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from keel.config import ClassifierConfig, EvaluateConfig, OnPolicy, Supervised, Training
from keel.data import chat
from keel.data.batches import holdout_count
from keel.data.load import Dataset
from keel.models.load import ModelSource, count_parameters, load_tokenizer, model_config
from keel.pipeline import Pipeline
from keel.sources import main_data_of
from keel.stages.pretrain import DEFAULT_VOCABULARY
from keel.types import Record, TextRecord, UsageError

CHARACTERS_A_TOKEN = 4  # a rule of thumb, used where no tokenizer exists yet
SAMPLE = 200  # rows whose tokens are counted


def plan(pipeline: Pipeline) -> list[dict[str, Any]]:
    """One entry a stage: kind, inputs, data, rows, type, tokens (None where unknown), steps, parameters, state.

    `tokens_measured`: every row was tokenised; otherwise the tokens are an estimate.
    """
    pipeline.sources.check(list(pipeline.config.stages))
    return [_stage(pipeline, name) for name in pipeline.config.stages]


def _stage(pipeline: Pipeline, name: str) -> dict[str, Any]:
    stage = pipeline.config.stages[name]
    datasets = [pipeline.sources.load_data(sources, accept) for sources, accept in main_data_of(stage)]
    rows = sum(len(dataset.records) for dataset in datasets)
    tokenizer = _tokenizer(pipeline, name)
    tokens = sum(_tokens(tokenizer, dataset) or 0 for dataset in datasets) or None
    entry: dict[str, Any] = {
        "stage": name, "kind": stage.kind, "inputs": stage.inputs(), "data": pipeline.sources.summary(name), "rows": rows, "type": datasets[0].kind,
        "tokens": tokens, "tokens_measured": tokenizer is not None and rows <= SAMPLE,
        "parameters": _parameters(pipeline, name, tokenizer), "done": pipeline.is_done(name),
    }  # fmt: skip
    if isinstance(stage, Supervised):
        kept = rows if stage.eval_data else rows - holdout_count(rows, stage.holdout)
        if stage.kind == "pretrain" or (isinstance(stage, ClassifierConfig) and stage.passages):
            length = stage.max_length or pipeline.sources.context(name) or 512
            kept = math.ceil((tokens or 0) * kept / max(rows, 1) / (length - 1)) or kept
        steps = math.ceil(stage.epochs * kept / stage.batch_size)
        entry["steps"] = min(steps, stage.max_steps) if stage.max_steps else steps
    elif isinstance(stage, OnPolicy):
        mini = stage.batch_size // (stage.mini_batch or stage.batch_size)
        entry |= {
            "steps": stage.updates,
            "episodes": stage.updates * stage.batch_size,
            "gradient_steps": stage.updates * stage.epochs * mini,
        }
    return entry


def _tokens(tokenizer: Any | None, dataset: Dataset) -> int | None:
    """Tokens of the data: counted on rows spread evenly over it, and extrapolated to all of them."""
    records = dataset.records[:: max(1, math.ceil(len(dataset.records) / SAMPLE))]
    if not records:
        return None
    counts = [_length(tokenizer, record) for record in records]
    return round(sum(counts) / len(counts) * len(dataset.records))


def _length(tokenizer: Any | None, record: Record) -> float:
    sides = ("text", "prompt", "completion", "chosen", "rejected")
    parts = [getattr(record, side) for side in sides if hasattr(record, side)]
    text = "".join(part if isinstance(part, str) else chat.prompt_text(None, part) for part in parts)
    if tokenizer is None:
        return len(text) / CHARACTERS_A_TOKEN
    return len(tokenizer(text, verbose=False)["input_ids"]) + isinstance(record, TextRecord)  # its EOS


def _root(pipeline: Pipeline, name: str) -> str:
    """Where the weights that `name` works on come from, back through the config: a stage that starts from no other
    stage, or the path or hub id of a model that is only evaluated."""
    stage = pipeline.config.stages.get(name)
    if stage is None:
        return name
    if isinstance(stage, EvaluateConfig):
        return _root(pipeline, stage.models[0])
    assert isinstance(stage, Training)
    return _root(pipeline, stage.model.path) if stage.model.path in pipeline.config.stages else name


def _place(pipeline: Pipeline, name: str) -> Path | None:
    """The folder of the model that `name` starts from at the root of its chain; None where it is not on this machine."""
    root = pipeline.config.stages.get(_root(pipeline, name))
    path = _root(pipeline, name) if root is None else root.model.path if isinstance(root, Training) else None
    place = Path(pipeline.sources.resolve(path)) if path else None
    return place if place and (place / "config.json").exists() else None


def _tokenizer(pipeline: Pipeline, name: str) -> Any | None:
    """The tokenizer of the stage's own chain; None where there is none yet, or none on this machine."""
    root = _root(pipeline, name)
    stage = pipeline.config.stages.get(root)
    place = _place(pipeline, name)
    if place is None and isinstance(stage, Training) and stage.model.init:
        if stage.model.tokenizer:
            place = Path(stage.model.tokenizer)
        elif pipeline.is_done(root):  # it has trained one
            place = pipeline.stage_directory(root) / "model"
    try:
        return load_tokenizer(str(place)) if place and place.exists() else None
    except UsageError:
        return None


def _parameters(pipeline: Pipeline, name: str, tokenizer: Any | None) -> int | None:
    """Parameters of the model a stage works on; None when its config is not on this machine."""
    root = pipeline.config.stages.get(_root(pipeline, name))
    new = root.model if isinstance(root, Training) and root.model.init else None
    place = _place(pipeline, name)
    if new is None and place is None:
        return None
    remote = isinstance(root, Training) and root.model.trust_remote_code
    init = new.init.model_dump() if new and new.init else None
    config = model_config(ModelSource(str(place), init, trust_remote_code=remote))
    if new and init is not None and "vocab_size" not in init:
        config.vocab_size = len(tokenizer) if tokenizer else new.vocab_size or DEFAULT_VOCABULARY
    family: Any = AutoModelForCausalLM
    stage = pipeline.config.stages[name]
    if stage.kind in ("reward", "classifier"):
        family = AutoModelForSequenceClassification
        config.num_labels = len(stage.data) if isinstance(stage, ClassifierConfig) else 1
    with torch.device("meta"):
        return count_parameters(family.from_config(config, trust_remote_code=remote))


def as_text(entries: list[dict[str, Any]]) -> str:
    """The plan as lines for a terminal."""
    lines = []
    for entry in entries:
        about = "" if entry["tokens_measured"] else "≈"
        facts = [f"{entry['rows']:,} rows ({entry['type']})"]
        facts += [f"{about}{entry['tokens']:,} tokens"] if entry["tokens"] else []
        facts += (
            [f"{entry['steps']:,} {'updates' if 'episodes' in entry else 'steps'}"]
            if "steps" in entry
            else []
        )
        facts += (
            [f"{entry['episodes']:,} episodes", f"{entry['gradient_steps']:,} gradient steps"]
            if "episodes" in entry
            else []
        )
        facts += (
            [f"{entry['parameters']:,} parameters"]
            if entry["parameters"]
            else ["parameters unknown until the model is here"]
        )
        source = f" ← {', '.join(entry['inputs'])}" if entry["inputs"] else ""
        lines += [
            f"{entry['stage']} ({entry['kind']}){source}{'  [done]' if entry['done'] else ''}",
            f"    {entry['data']}",
            f"    {' · '.join(facts)}",
        ]
    return "\n".join(lines)


def as_json(entries: list[dict[str, Any]]) -> str:
    return json.dumps({"stages": entries}, ensure_ascii=False, indent=2)
