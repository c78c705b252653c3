"""`keel plan`: what a config would do, from its data and the shapes of its models: rows, tokens, steps,
memory. Nothing is trained or downloaded."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from keel.config import (
    AnyStage,
    BestOfNConfig,
    ClassifierConfig,
    CollectConfig,
    DPOConfig,
    EvaluateConfig,
    OnPolicy,
    PretrainConfig,
    SFTConfig,
    Supervised,
    Training,
)
from keel.data import chat
from keel.data.batches import derive_seed, holdout_count, split_holdout
from keel.data.load import Dataset
from keel.errors import UsageError
from keel.models.device_info import free_memory
from keel.models.load import ModelSource, count_parameters, load_tokenizer, model_config
from keel.pipeline.fingerprint import device_of
from keel.pipeline.pipeline import Pipeline
from keel.pipeline.preflight import from_outside, main_data_of, trusts
from keel.plan import card_fit, model_shapes, stage_memory
from keel.plan.stage_memory import Lengths, ModelRef, StageModels
from keel.stages import preference_rows
from keel.stages.pretrain import DEFAULT_VOCABULARY
from keel.types import DemonstrationRecord, PreferenceRecord, Record, TextRecord, UnpairedRecord

CHARACTERS_A_TOKEN = 4  # a rule of thumb, used where no tokenizer exists yet
SAMPLE = 200  # rows whose tokens are counted
USABLE = 0.85  # of the memory that is free: `plan` is within 15 % of what was measured
CANDIDATES = 20  # rows, the longest in characters, among which the longest in tokens is looked for


def plan(pipeline: Pipeline) -> list[dict[str, Any]]:
    """One entry a stage: kind, inputs, data, rows, type, tokens (None where unknown), steps, parameters,
    state, memory.

    `tokens_measured`: every row was tokenised; otherwise the tokens are an estimate. `memory`: see `_memory`;
    None where the shape of one of its models is unknown.
    """
    pipeline.sources.check(list(pipeline.config.stages))
    return [_stage(pipeline, name) for name in pipeline.config.stages]


def _stage(pipeline: Pipeline, name: str) -> dict[str, Any]:
    stage = pipeline.config.stages[name]
    datasets = _datasets(pipeline, name)
    rows = sum(len(dataset.records) for dataset in datasets) + _collected(pipeline, stage)
    tokenizer = _tokenizer(pipeline, name)
    tokens = sum(_tokens(tokenizer, dataset) or 0 for dataset in datasets) or None
    entry: dict[str, Any] = {
        "stage": name, "kind": stage.kind, "inputs": stage.inputs(), "data": pipeline.sources.summary(name, ahead=True), "rows": rows,
        "type": datasets[0].kind if datasets else main_data_of(stage)[0][1][0],
        "tokens": tokens, "tokens_measured": tokenizer is not None and rows <= SAMPLE,
        "parameters": _parameters(pipeline, name, tokenizer), "done": pipeline.is_done(name),
    }  # fmt: skip
    if isinstance(stage, Supervised):
        kept = rows if stage.eval_data else rows - holdout_count(rows, stage.holdout)
        if isinstance(stage, DPOConfig) and not stage.data_stages():
            kept = _examples(pipeline, name, stage, datasets[0])
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
    if isinstance(stage, Training) and stage.micro_batch == "auto" and datasets:
        entry["micro_batch"] = micro_batch(pipeline, name)
    entry["memory"] = (
        _memory(pipeline, name, _longest(pipeline, name, tokenizer, datasets), entry.get("micro_batch"))
        if datasets
        else None
    )
    return entry


def micro_batch(pipeline: Pipeline, name: str) -> int | None:
    """What `micro_batch: auto` comes to on this machine as it is now: what is free on the device, less what
    its allocator and the libraries take. None where the shape of a model is unknown."""
    stage, cast = pipeline.config.stages[name], _cast(pipeline, name)
    datasets = _datasets(pipeline, name) or [pipeline.sources.load_data(*d) for d in main_data_of(stage)]
    if cast is None:
        return None
    assert isinstance(stage, Training)
    lengths = _longest(pipeline, name, _tokenizer(pipeline, name), datasets)
    device = device_of(pipeline.config)
    kind = _kind(device)

    def peak(stage: AnyStage) -> float:
        return max(phase.total for phase in stage_memory.phases(stage, cast, lengths, kind))

    return card_fit.micro_batch(stage, peak, USABLE * free_memory(device))


def _kind(device: torch.device) -> stage_memory.Device:
    return "cuda" if device.type == "cuda" else "cpu"


def _datasets(pipeline: Pipeline, name: str) -> list[Dataset]:
    """What a stage learns from, as far as it is no other stage's."""
    there = [
        (from_outside(sources), accept) for sources, accept in main_data_of(pipeline.config.stages[name])
    ]
    return [pipeline.sources.load_data(sources, accept) for sources, accept in there if sources]


def _collected(pipeline: Pipeline, stage: AnyStage) -> int:
    """Rows that a stage gets from others, at most."""
    makers = [pipeline.config.stages[name] for _, name in stage.data_stages()]
    return sum(maker.pairs for maker in makers if isinstance(maker, CollectConfig))


def _examples(pipeline: Pipeline, name: str, stage: DPOConfig, dataset: Dataset) -> int:
    """What a stage of preferences learns from: pairs or examples, without those held out and undecided
    ones."""
    records = dataset.records
    share = 0.0 if stage.eval_data else stage.holdout
    kept, _ = split_holdout(len(records), share, derive_seed(pipeline.config.seed, name))
    return preference_rows.count(stage, [records[i] for i in kept])


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
    """Where the weights that `name` works on come from, back through the config: a stage that starts from no
    other stage, or the path or hub id of a model that is only evaluated."""
    stage = pipeline.config.stages.get(name)
    if stage is None:
        return name
    if not isinstance(stage, Training):
        return _root(pipeline, stage.inputs()[0])
    return _root(pipeline, stage.model.path) if stage.model.path in pipeline.config.stages else name


def _place(pipeline: Pipeline, name: str) -> Path | None:
    """The folder of the model that `name` starts from at the root of its chain; None where it is not on this
    machine."""
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
        remote = trusts(stage or pipeline.config.stages[name])
        return load_tokenizer(str(place), trust_remote_code=remote) if place and place.exists() else None
    except UsageError:
        return None


def _config(pipeline: Pipeline, name: str, tokenizer: Any | None) -> Any | None:
    """The transformers configuration of the model a stage works on; None when it is not on this machine."""
    root = pipeline.config.stages.get(_root(pipeline, name))
    new = root.model if isinstance(root, Training) and root.model.init else None
    place = _place(pipeline, name)
    if new is None and place is None:
        return None
    remote = trusts(root or pipeline.config.stages[name])
    init = new.init.model_dump() if new and new.init else None
    config = model_config(ModelSource(str(place), init, trust_remote_code=remote))
    if new and init is not None and "vocab_size" not in init:
        config.vocab_size = len(tokenizer) if tokenizer else new.vocab_size or DEFAULT_VOCABULARY
    return config


def _parameters(pipeline: Pipeline, name: str, tokenizer: Any | None) -> int | None:
    """Parameters of the model a stage works on; None when neither its config is on this machine nor its shape
    known."""
    stage, root = pipeline.config.stages[name], pipeline.config.stages.get(_root(pipeline, name))
    scores = stage.kind in ("reward", "classifier")
    labels = len(stage.data) if isinstance(stage, ClassifierConfig) else 1
    config = _config(pipeline, name, tokenizer)
    if config is None:
        shape = model_shapes.known(_origin(pipeline, name))
        return shape and shape.parameters("score" if scores else "lm", labels)
    remote = isinstance(root, Training) and root.model.trust_remote_code
    family: Any = AutoModelForCausalLM
    if scores:
        family = AutoModelForSequenceClassification
        config.num_labels = labels
    with torch.device("meta"):
        return count_parameters(family.from_config(config, trust_remote_code=remote))


# ---------------------------------------------------------------- memory


def _memory(
    pipeline: Pipeline, name: str, lengths: Lengths, micro_batch: int | None = None
) -> dict[str, Any] | None:
    """`longest`: `prompt` and `answer` of a row as long as the longest, whose answer is as long as any, in
    tokens; `phases`: phase → role → kind → bytes on this machine's device; `peak` and `peak_phase`; `cards`:
    size in GB → whether the stage fits, and settings that would make it fit; `estimated`: a model is of a
    type that keel does not know block by block."""
    stage = pipeline.config.stages[name]
    cast = _cast(pipeline, name)
    if cast is None:
        return None
    if micro_batch is not None:  # what `auto` comes to
        stage = stage.model_copy(update={"micro_batch": micro_batch})
    device = _kind(device_of(pipeline.config))
    phases = stage_memory.phases(stage, cast, lengths, device)
    fullest = max(phases, key=lambda phase: phase.total)

    def peak(stage: AnyStage) -> float:
        limit = getattr(stage, "max_length", None)
        return max(phase.total for phase in stage_memory.phases(stage, cast, lengths.within(limit), "cuda"))

    found = card_fit.fits(stage, peak, lengths.total)
    models = [cast.model, *([cast.reference] if cast.reference else []), *cast.rewards.values()]
    return {
        "device": device,
        "longest": {"prompt": lengths.prompt, "answer": lengths.answer},
        "phases": {phase.name: _whole(phase.parts) for phase in phases},
        "peak": round(fullest.total),
        "peak_phase": fullest.name,
        "cards": {str(fit.gb): {"fits": fit.fits, "with": fit.settings} for fit in found},
        "estimated": not all(model.shape.known for model in models),
    }


def _whole(parts: dict[str, dict[str, float]]) -> dict[str, dict[str, int]]:
    return {
        role: {kind: round(value) for kind, value in kinds.items() if value} for role, kinds in parts.items()
    }


def _cast(pipeline: Pipeline, name: str) -> StageModels | None:
    """The shapes of a stage's models; None where one is unknown."""
    stage = pipeline.config.stages[name]
    rewards: dict[str, ModelRef] = {}
    for term in getattr(stage, "reward", None) or []:
        if term.kind in ("learned", "classifier", "similarity"):
            # an adapter alone has the shape of its base
            on = name if pipeline.sources.is_bare(term.model) else term.model
            found = _found(pipeline, on, "score", judges=term.kind != "learned")
            if found is None:
                return None
            if term.kind == "learned":
                found = replace(
                    found, adapter=pipeline.sources.adapter(stage, term.model), quantize=term.quantize
                )
            rewards[term.log_name] = found
    if isinstance(stage, EvaluateConfig):
        models = [_found(pipeline, model, "lm") for model in stage.models]
        if any(model is None for model in models):
            return None
        whole = sorted((m for m in models if m), key=lambda m: m.shape.parameters())
        reference = models[stage.models.index(stage.reference or stage.models[0])]
        return StageModels(whole[-1], reference, rewards)
    if isinstance(stage, CollectConfig):
        model = _found(pipeline, stage.model, "lm")
        return model and StageModels(model)
    assert isinstance(stage, Training)
    model = _found(pipeline, name, "score" if stage.kind in ("reward", "classifier") else "lm")
    named = getattr(stage, "reference", None)
    reference = _found(pipeline, named, "lm") if named else None
    return None if model is None or (named and reference is None) else StageModels(model, reference, rewards)


def _found(
    pipeline: Pipeline, name: str, head: model_shapes.Head, *, judges: bool = False
) -> ModelRef | None:
    """What a stage's name, a path or a hub id stands for; None where its shape is unknown."""
    stage = pipeline.config.stages.get(name)
    if stage is None:
        path = Path(pipeline.sources.resolve(name))
        config = model_config(ModelSource(str(path))) if (path / "config.json").exists() else None
        members = 1 + len(list((path / "members").glob("*"))) if config else 1
    else:
        config, members = _config(pipeline, name, _tokenizer(pipeline, name)), getattr(stage, "members", 1)
    shape = model_shapes.known(_origin(pipeline, name)) if config is None else model_shapes.of_config(config)
    if shape is None:
        return None
    counted = _parameters(pipeline, name, _tokenizer(pipeline, name)) if stage and not shape.known else None
    return ModelRef(shape, counted, members, judges)


def _origin(pipeline: Pipeline, name: str) -> str:
    """The path or hub id that the model of `name` comes from, at the root of its chain."""
    root = _root(pipeline, name)
    stage = pipeline.config.stages.get(root)
    return (stage.model.path or root) if isinstance(stage, Training) else root


def _longest(pipeline: Pipeline, name: str, tokenizer: Any | None, datasets: list[Dataset]) -> Lengths:
    """Tokens of the longest rows that a stage will see: of the rows longest in characters, as the stage
    writes them."""
    stage = pipeline.config.stages[name]
    limit = getattr(stage, "max_length", None) or _context(pipeline, name)
    packed = isinstance(stage, SFTConfig) and stage.packing
    if (
        isinstance(stage, PretrainConfig)
        or packed
        or (isinstance(stage, ClassifierConfig) and stage.passages)
    ):
        return Lengths(0, limit or 512)
    records = [record for dataset in datasets for record in dataset.records]
    candidates = sorted(records, key=lambda record: _length(None, record))[-CANDIDATES:]
    rows = [_lengths(tokenizer, record) for record in candidates]
    if isinstance(stage, OnPolicy | BestOfNConfig | CollectConfig | EvaluateConfig):
        new = stage.sampling.max_new_tokens
        prompt = max(row.total for row in rows)
        return Lengths(min(prompt, max(1, limit - new)) if limit else prompt, new)
    return Lengths.of_all(rows).within(limit)


def _context(pipeline: Pipeline, name: str) -> int | None:
    context = pipeline.sources.context(name)
    shape = model_shapes.known(_origin(pipeline, name)) if context is None else None
    return shape.context if shape else context


def _lengths(tokenizer: Any | None, record: Record) -> Lengths:
    """Of one record."""
    if isinstance(record, TextRecord):
        return Lengths(0, math.ceil(_length(tokenizer, record)))
    prompt = _count(tokenizer, record.prompt)
    if isinstance(record, PreferenceRecord):
        shorter, longer = sorted(_count(tokenizer, side) + 1 for side in (record.chosen, record.rejected))
        return Lengths(prompt, longer, shorter)
    if isinstance(record, DemonstrationRecord | UnpairedRecord):
        return Lengths(prompt, _count(tokenizer, record.completion) + 1)  # its EOS
    return Lengths(prompt, 0)


def _count(tokenizer: Any | None, part: Any) -> int:
    """Tokens of a text, or of turns as keel's template writes them where the tokenizer brings none."""
    text = part if isinstance(part, str) else chat.prompt_text(None, part)
    if tokenizer is None:
        return math.ceil(len(text) / CHARACTERS_A_TOKEN)
    return len(tokenizer(text, verbose=False)["input_ids"])


def as_json(entries: list[dict[str, Any]]) -> str:
    return json.dumps({"stages": entries}, ensure_ascii=False, indent=2)
