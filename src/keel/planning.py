"""`keel plan`: what a config would do, from its data and the shapes of its models. Nothing is trained or downloaded."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from keel.config import EvaluateConfig, PPOConfig, Supervised, Training
from keel.data import chat, load
from keel.data.load import Dataset
from keel.models.load import ModelSource, count_parameters, load_tokenizer, model_config
from keel.pipeline import Pipeline, data_of
from keel.types import Record, UsageError

CHARACTERS_A_TOKEN = 4  # a rule of thumb, used where no tokenizer exists yet
SAMPLE = 200  # rows whose tokens are counted


def plan(pipeline: Pipeline) -> list[dict[str, Any]]:
    """One entry a stage: kind, inputs, data, rows, type, tokens (None where unknown), steps, parameters, state."""
    pipeline.check(list(pipeline.config.stages))
    return [_stage(pipeline, name) for name in pipeline.config.stages]


def _stage(pipeline: Pipeline, name: str) -> dict[str, Any]:
    stage = pipeline.config.stages[name]
    sources, accept = data_of(stage)[0]
    dataset = pipeline.load_data(sources, accept)
    rows = len(dataset.records)
    tokens, exact = _tokens(pipeline, name, dataset)
    entry: dict[str, Any] = {
        "stage": name, "kind": stage.kind, "inputs": stage.inputs(), "data": load.summary(dataset), "rows": rows, "type": dataset.kind,
        "tokens": tokens, "tokens_measured": exact, "parameters": _parameters(pipeline, name), "done": pipeline.is_done(name),
    }  # fmt: skip
    if isinstance(stage, Supervised):
        kept = rows - (
            0
            if stage.eval_data
            else min(1000, max(1, round(rows * stage.holdout)))
            if stage.holdout and rows > 1
            else 0
        )
        if stage.kind == "pretrain":
            length = stage.max_length or pipeline.context(name) or 512
            kept = math.ceil((tokens or 0) * kept / max(rows, 1) / (length - 1)) or kept
        steps = math.ceil(stage.epochs * kept / stage.batch_size)
        entry["steps"] = min(steps, stage.max_steps) if stage.max_steps else steps
    elif isinstance(stage, PPOConfig):
        mini = stage.batch_size // (stage.mini_batch or stage.batch_size)
        entry |= {
            "steps": stage.updates,
            "episodes": stage.updates * stage.batch_size,
            "gradient_steps": stage.updates * stage.epochs * mini,
        }
    return entry


def _tokens(pipeline: Pipeline, name: str, dataset: Dataset) -> tuple[int | None, bool]:
    """Tokens of the data (measured on the first rows), and whether a tokenizer measured them."""
    tokenizer = _tokenizer(pipeline, name)
    texts = [_text(record) for record in dataset.records[:SAMPLE]]
    if not texts:
        return None, False
    counts = [
        len(tokenizer(text)["input_ids"]) if tokenizer else len(text) / CHARACTERS_A_TOKEN for text in texts
    ]
    return round(sum(counts) / len(counts) * len(dataset.records)), tokenizer is not None


def _text(record: Record) -> str:
    parts = [
        getattr(record, side)
        for side in ("text", "prompt", "completion", "chosen", "rejected")
        if hasattr(record, side)
    ]
    return "".join(part if isinstance(part, str) else chat.prompt_text(None, part) for part in parts)


def _root(pipeline: Pipeline, name: str) -> Training | None:
    """The stage whose `model` setting names the weights that `name` starts from, back through the config."""
    stage = pipeline.config.stages[name]
    if isinstance(stage, EvaluateConfig):
        return _root(pipeline, stage.models[0]) if stage.models[0] in pipeline.config.stages else None
    assert isinstance(stage, Training)
    return _root(pipeline, stage.model.path) if stage.model.path in pipeline.config.stages else stage


def _tokenizer(pipeline: Pipeline, name: str) -> Any:
    stage = _root(pipeline, name)
    if stage is None:
        return None
    place = stage.model.path or stage.model.tokenizer
    if place is None:  # a stage of this config trains one: there if it has run
        place = next(
            (str(d) for n in pipeline.config.stages if (d := pipeline.stage_directory(n) / "model").exists()),
            None,
        )
    try:
        return load_tokenizer(place) if place and Path(place).exists() else None
    except UsageError:
        return None


def _parameters(pipeline: Pipeline, name: str) -> int | None:
    """Parameters of the model a stage trains; None when its config is not on this machine."""
    stage = _root(pipeline, name)
    if stage is None:
        return None
    if stage.model.path is not None and not (Path(stage.model.path) / "config.json").exists():
        return None
    init = stage.model.init.model_dump() if stage.model.init else None
    config = model_config(ModelSource(stage.model.path, init))
    if init is not None and "vocab_size" not in init and stage.model.vocab_size:
        config.vocab_size = stage.model.vocab_size
    with torch.device("meta"):
        return count_parameters(AutoModelForCausalLM.from_config(config))


def as_text(entries: list[dict[str, Any]]) -> str:
    """The plan as lines for a terminal."""
    lines = []
    for entry in entries:
        about = "≈" if not entry["tokens_measured"] else ""
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
