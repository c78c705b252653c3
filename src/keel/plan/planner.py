"""`keel plan`: what a config would do, from its data and the shapes of its models: rows, tokens, steps,
memory. Nothing is trained or downloaded."""

from __future__ import annotations

import heapq
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from keel.config import Stage, Training
from keel.config.stage import DataSetting
from keel.data import chat, files, stream
from keel.data.holdout import holdout_count
from keel.data.load import Dataset
from keel.data.stored.records import picked, release
from keel.errors import UsageError
from keel.models import facts, lora, lora_targets
from keel.models.device_info import free_memory
from keel.models.load import ModelSource, count_parameters, model_config
from keel.models.load_errors import explained
from keel.pipeline import held_out, lengths, stage_kinds, teachers
from keel.pipeline.device import device_of
from keel.pipeline.pipeline import Pipeline
from keel.pipeline.preflight import from_outside
from keel.plan import card_fit, model_shapes, rank_memory, stage_memory
from keel.plan.model_memory import Lora
from keel.plan.stage_memory import Lengths, ModelRef, StageModels
from keel.stages import prepare, samplers
from keel.stages.pretrain import DEFAULT_VOCABULARY
from keel.types import DemonstrationRecord, PreferenceRecord, Prompt, Record, TextRecord, UnpairedRecord

CHARACTERS_A_TOKEN = 4  # a rule of thumb, used where no tokenizer exists yet
SAMPLE = 200  # rows whose tokens are counted
USABLE = 0.85  # of the memory that is free: `plan` is within 15 % of what was measured
CANDIDATES = 20  # rows, the longest in characters, among which the longest in tokens is looked for


def plan(pipeline: Pipeline, ranks: rank_memory.Asked | None = None) -> list[dict[str, Any]]:
    """One entry a stage: kind, inputs, data, rows, type, tokens (None where unknown), steps, parameters,
    state, memory.

    `tokens_measured`: every row was tokenised; otherwise the tokens are an estimate. `memory`: see `_memory`;
    None where the shape of one of its models is unknown. ranks: the entry has what `rank_memory.as_dict` says
    of them, too; None where nothing can be said.
    """
    with pipeline.sources.tokenizers.kept():
        pipeline.sources.check(list(pipeline.config.stages))
        with pipeline.dated():
            for name in pipeline.config.stages:
                lengths.check(pipeline.sources, name)
                teachers.check(pipeline.sources, name)
            return [_stage(pipeline, name, ranks) for name in pipeline.config.stages]


def _stage(pipeline: Pipeline, name: str, ranks: rank_memory.Asked | None = None) -> dict[str, Any]:
    stage = pipeline.config.stages[name]
    datasets = _datasets(pipeline, name)
    rows = sum(len(dataset.records) for dataset in datasets) + _collected(pipeline, stage)
    tokenizer = _tokenizer(pipeline, name)
    tokens = sum(_tokens(tokenizer, dataset) or 0 for dataset in datasets) or _streamed(stage, tokenizer)
    entry: dict[str, Any] = {
        "stage": name,
        "kind": stage.kind,
        "inputs": stage.inputs(),
        "data": pipeline.sources.summary(name, ahead=True),
        "rows": rows,
        "type": _type(stage, datasets),
        "tokens": tokens,
        "tokens_measured": tokenizer is not None and rows <= SAMPLE,
        "parameters": _parameters(pipeline, name, tokenizer),
        "notes": _notes(pipeline, name, tokenizer),
        "done": pipeline.is_done(name) or pipeline.is_kept(name),
        "reading": _reading(pipeline, name, tokenizer),
    }
    entry |= stage.planned_steps(_examples(pipeline, name, datasets, rows, tokens))
    if getattr(stage, "micro_batch", None) == "auto" and datasets:
        entry["micro_batch"] = micro_batch(pipeline, name)
    known = _longest(pipeline, name, tokenizer, datasets) if datasets or stage.streams else None
    at_once = entry.get("micro_batch")
    entry["memory"] = None if known is None else _memory(pipeline, name, known, at_once)
    if ranks is not None:
        sampler = getattr(stage, "rollout", None)
        note = samplers.card_note(sampler) if sampler is not None and ranks.ranks > 1 else None
        entry["notes"] = [*entry["notes"], *([note] if note else [])]
        entry["ranks"] = None if known is None else _on_ranks(pipeline, name, known, at_once, ranks)
    return entry


def _on_ranks(
    pipeline: Pipeline, name: str, lengths: Lengths, micro_batch: int | None, asked: rank_memory.Asked
) -> dict[str, Any] | None:
    """See `rank_memory.as_dict`; None where the shape of one of its models is unknown."""
    stage, refs = pipeline.config.stages[name], models(pipeline, name)
    kind = stage_kinds.kind_of(stage.kind)
    if refs is None or kind.memory is None or (kind.ranks and not isinstance(stage, Training)):
        return None  # the last: what trains nothing has its models whole on each rank
    if micro_batch is not None:
        stage = stage.model_copy(update={"micro_batch": micro_batch})
    chosen = pipeline.config.distributed
    asked = replace(asked, offload=chosen.offload, mixed_precision=chosen.mixed_precision)
    found = rank_memory.on_ranks(stage, refs, lengths, asked)
    return rank_memory.as_dict(found, asked, rank_memory.split_of(stage, refs, lengths, asked, found))


def micro_batch(pipeline: Pipeline, name: str) -> int | None:
    """What `micro_batch: auto` comes to on this machine as it is now: what is free on the device, less what
    its allocator and the libraries take. None where the shape of a model is unknown."""
    stage, refs = pipeline.config.stages[name], models(pipeline, name)
    datasets = _datasets(pipeline, name) or [pipeline.sources.load_data(*d) for d in stage.main_data()]
    if refs is None or stage_kinds.kind_of(stage.kind).memory is None:
        return None
    lengths = _longest(pipeline, name, _tokenizer(pipeline, name), datasets)
    device = device_of(pipeline.config)
    kind = _kind(device)

    def peak(stage: Stage) -> float:
        return _peak(stage, refs, lengths, kind)

    return card_fit.micro_batch(stage, peak, USABLE * free_memory(device))


def _peak(stage: Stage, refs: StageModels, lengths: Lengths, device: stage_memory.Device) -> float:
    """Bytes at the peak of a stage whose kind has a memory model."""
    return max(phase.total for phase in stage_memory.phases(stage, refs, lengths, device) or ())


def _kind(device: torch.device) -> stage_memory.Device:
    return "cuda" if device.type == "cuda" else "cpu"


def _datasets(pipeline: Pipeline, name: str) -> list[Dataset]:
    """What a stage learns from, as far as it is no other stage's."""
    return _loaded(pipeline, pipeline.config.stages[name].main_data())


def _loaded(pipeline: Pipeline, settings: list[DataSetting]) -> list[Dataset]:
    there = [(from_outside(sources), accept) for sources, accept in settings]
    return [pipeline.sources.load_data(sources, accept) for sources, accept in there if sources]


def _type(stage: Stage, datasets: list[Dataset]) -> str:
    """The type of the rows that a stage works on; "none" for one that reads no data."""
    return datasets[0].kind if datasets else next(iter(stage.record_types), "none")


def _collected(pipeline: Pipeline, stage: Stage) -> int:
    """Rows that a stage gets from others, at most."""
    makers = [pipeline.config.stages[name] for _, name in stage.data_stages()]
    return sum(getattr(maker, "pairs", 0) for maker in makers)


def _examples(pipeline: Pipeline, name: str, datasets: list[Dataset], rows: int, tokens: int | None) -> int:
    """What a stage trains on: rows, pairs or examples, without those held out."""
    stage = pipeline.config.stages[name]
    share = 0.0 if getattr(stage, "eval_data", None) else getattr(stage, "holdout", 0.0)
    count = stage_kinds.kind_of(stage.kind).examples
    if count is not None and datasets and not stage.data_stages():
        records = datasets[0].records
        split = held_out.split_of(pipeline.config, name, datasets[0])
        trained = records if split is None else picked(records, split.train)
        return stage_kinds.resolve(count)(stage, trained)
    trained = rows - _held_out_rows(pipeline, name, datasets, rows, share)
    if stage.streams:
        length = getattr(stage, "max_length", None) or pipeline.sources.context(name) or 512
        return math.ceil((tokens or 0) / (length - 1))
    if stage.cuts_texts:
        length = getattr(stage, "max_length", None) or pipeline.sources.context(name) or 512
        return math.ceil((tokens or 0) * trained / max(rows, 1) / (length - 1)) or trained
    return trained


def _held_out_rows(pipeline: Pipeline, name: str, datasets: list[Dataset], rows: int, share: float) -> int:
    """Rows that a stage holds out: what it will, or about so many where other stages make its rows."""
    stage = pipeline.config.stages[name]
    if len(datasets) == 1 and len(datasets[0].records) == rows and not stage.data_stages():
        split = held_out.split_of(pipeline.config, name, datasets[0])
        if split is not None:
            return len(split.held_out)
    return holdout_count(rows, share)


def _tokens(tokenizer: PreTrainedTokenizerBase | None, dataset: Dataset) -> int | None:
    """Tokens of the data: counted on rows spread evenly over it, and extrapolated to all of them."""
    records = dataset.records[:: max(1, math.ceil(len(dataset.records) / SAMPLE))]
    if not records:
        return None
    counts = [_length(tokenizer, record) for record in records]
    return round(sum(counts) / len(counts) * len(dataset.records))


def _streamed(stage: Stage, tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """Tokens of what a stage reads as a stream; None where it does not."""
    sources = [source for some, _ in stage.streamed_data() for source in some]
    if not sources:
        return None
    if tokenizer is None:
        return sum(files.size_of(source.source) for source in sources) // CHARACTERS_A_TOKEN
    return stream.estimated_tokens(stream.shards_of(sources), tokenizer)


def _length(tokenizer: PreTrainedTokenizerBase | None, record: Record) -> float:
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
    start = stage.starts_from
    if start is None:
        return _root(pipeline, stage.inputs()[0]) if stage.inputs() else name
    return _root(pipeline, start.path) if start.path in pipeline.config.stages else name


def _folder(pipeline: Pipeline, name: str) -> Path | None:
    """The folder of the model that `name` starts from at the root of its chain; None where it is not on this
    machine."""
    root = _root(pipeline, name)
    stage = pipeline.config.stages.get(root)
    path = root if stage is None else stage.starts_from.path if stage.starts_from else None
    folder = Path(pipeline.sources.resolve(path)) if path else None
    return folder if folder and (folder / "config.json").exists() else None


def _tokenizer(pipeline: Pipeline, name: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the stage's own chain; None where there is none yet, or none on this machine."""
    root = _root(pipeline, name)
    stage = pipeline.config.stages.get(root)
    start, folder = stage and stage.starts_from, _folder(pipeline, name)
    if folder is None and start and start.init:
        if start.tokenizer:
            folder = Path(start.tokenizer)
        elif pipeline.is_done(root):  # it has trained one
            folder = pipeline.stage_directory(root) / "model"
    try:
        remote = pipeline.sources.trusts(stage or pipeline.config.stages[name])
        if folder is None or not folder.exists():
            return None
        return pipeline.sources.tokenizers.load(str(folder), trust_remote_code=remote)
    except UsageError:
        return None


def _config(pipeline: Pipeline, name: str, tokenizer: PreTrainedTokenizerBase | None) -> Any | None:
    """The transformers configuration of the model a stage works on; None when it is not on this machine."""
    root = pipeline.config.stages.get(_root(pipeline, name))
    start, folder = root and root.starts_from, _folder(pipeline, name)
    new = start if start and start.init else None
    if new is None and folder is None:
        return None
    remote = pipeline.sources.trusts(root or pipeline.config.stages[name])
    init = new.init.model_dump() if new and new.init else None
    config = model_config(ModelSource(str(folder), init, trust_remote_code=remote))
    if new and init is not None and "vocab_size" not in init:
        config.get_text_config().vocab_size = (
            len(tokenizer) if tokenizer else new.vocab_size or DEFAULT_VOCABULARY
        )
    return config


def _reading(pipeline: Pipeline, name: str, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """What is special about how the model that a stage works on is read and sampled; empty where nothing is,
    or its config is not on this machine."""
    stage = pipeline.config.stages[name]
    packing, sampling = stage.fills_rows and not stage.cuts_texts, stage.replies is not None
    if not (packing or sampling) or (stage.starts_from is None and not stage.inputs()):
        return []
    config = _config(pipeline, name, tokenizer)
    longest = getattr(stage, "max_length", None)
    return [] if config is None else facts.reading_of(config, longest, packing=packing, sampling=sampling)


def parameters(pipeline: Pipeline, name: str) -> int | None:
    """Parameters of the model a stage works on; None where nobody knows yet."""
    return _parameters(pipeline, name, _tokenizer(pipeline, name))


def _parameters(pipeline: Pipeline, name: str, tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """Parameters of the model a stage works on; None when neither its config is on this machine nor its shape
    known."""
    model = _without_weights(pipeline, name, tokenizer)
    if model is None:
        stage, shape = pipeline.config.stages[name], model_shapes.known(_origin(pipeline, name))
        return shape and shape.parameters(_head(stage), stage.outputs)
    return count_parameters(model)


def _notes(pipeline: Pipeline, name: str, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """Lines on what a stage's adapters do not reach."""
    config = getattr(pipeline.config.stages[name], "lora", None)
    model = None if config is None else _without_weights(pipeline, name, tokenizer)
    if config is None or model is None:
        return []
    settings = lora.settings_for(model, prepare.adapters_of(config))
    return lora_targets.notes(lora.with_adapters(model, settings))


def _without_weights(pipeline: Pipeline, name: str, tokenizer: PreTrainedTokenizerBase | None) -> Any | None:
    """The model that a stage works on, on the meta device; None when its config is not on this machine."""
    stage, root = pipeline.config.stages[name], pipeline.config.stages.get(_root(pipeline, name))
    head = _head(stage)
    config = _config(pipeline, name, tokenizer)
    if config is None:
        return None
    remote = root is not None and root.starts_from is not None and pipeline.sources.trusts(root)
    family: Any = AutoModelForCausalLM
    if head == "score":
        family = AutoModelForSequenceClassification
        config.num_labels = stage.outputs
    with explained(_origin(pipeline, name), "model"), torch.device("meta"):
        return family.from_config(config, trust_remote_code=remote)


def _head(stage: Stage) -> model_shapes.Head:
    return "score" if stage.leaves in ("reward model", "classifier") else "lm"


# ---------------------------------------------------------------- memory


def _memory(
    pipeline: Pipeline, name: str, lengths: Lengths, micro_batch: int | None = None
) -> dict[str, Any] | None:
    """`longest`: `prompt` and `answer` of a row as long as the longest, whose answer is as long as any, in
    tokens; `phases`: phase → role → kind → bytes on this machine's device; `peak` and `peak_phase`;
    `card_peak`: bytes at the peak on a GPU; `cards`:
    size in GB → whether the stage fits, and settings that would make it fit; `estimated`: a model is of a
    type that keel does not know block by block."""
    stage = pipeline.config.stages[name]
    refs = models(pipeline, name)
    if refs is None or stage_kinds.kind_of(stage.kind).memory is None:
        return None
    if micro_batch is not None:  # what `auto` comes to
        stage = stage.model_copy(update={"micro_batch": micro_batch})
    device = _kind(device_of(pipeline.config))
    phases = stage_memory.phases(stage, refs, lengths, device) or []
    fullest = max(phases, key=lambda phase: phase.total)

    def peak(stage: Stage) -> float:
        limit = getattr(stage, "max_length", None)
        return _peak(stage, refs, lengths.within(limit), "cuda")

    cards = card_fit.fits(stage, peak, lengths.total)
    shown = [refs.model, *([refs.reference] if refs.reference else []), *refs.rewards.values()]
    return {
        "device": device,
        "longest": {"prompt": lengths.prompt, "answer": lengths.answer},
        "phases": {phase.name: _whole(phase.parts) for phase in phases},
        "peak": round(fullest.total),
        "peak_phase": fullest.name,
        "card_peak": round(peak(stage)),
        "cards": {str(fit.gb): {"fits": fit.fits, "with": fit.settings} for fit in cards},
        "estimated": not all(model.shape.known for model in shown),
    }


def _whole(parts: dict[str, dict[str, float]]) -> dict[str, dict[str, int]]:
    return {
        role: {kind: round(value) for kind, value in kinds.items() if value} for role, kinds in parts.items()
    }


def models(pipeline: Pipeline, name: str) -> StageModels | None:
    """The shapes of a stage's models; None where one is unknown."""
    stage = pipeline.config.stages[name]
    rewards = _reward_models(pipeline, name)
    if rewards is None:
        return None
    reference = getattr(stage, "reference", None)
    if stage.starts_from is not None:
        model = _shape(pipeline, name, _head(stage))
        frozen = _shape(pipeline, reference, "lm") if reference else None
        return (
            None if model is None or (reference and frozen is None) else StageModels(model, frozen, rewards)
        )
    named = [source for setting, source in stage.references() if setting in ("model", "models")]
    shapes = [shape for source in named if (shape := _shape(pipeline, source, "lm")) is not None]
    if not named or len(shapes) < len(named):
        return None
    largest = max(shapes, key=lambda ref: ref.shape.parameters())
    return StageModels(largest, shapes[named.index(reference or named[0])], rewards)


def _reward_models(pipeline: Pipeline, name: str) -> dict[str, ModelRef] | None:
    """The shapes of what a stage is rewarded by, by the name of the term; None where one is unknown."""
    stage = pipeline.config.stages[name]
    rewards: dict[str, ModelRef] = {}
    for term in getattr(stage, "reward", None) or []:
        if term.kind == "judge" and term.in_process:
            ref = _shape(pipeline, term.model, "lm")
            if ref is None:
                return None
            rewards[term.log_name] = replace(ref, writes=True)
        elif term.kind in ("learned", "classifier", "similarity"):
            # an adapter alone has the shape of its base
            on = name if pipeline.sources.is_bare(term.model) else term.model
            ref = _shape(pipeline, on, "score", judges=term.kind != "learned")
            if ref is None:
                return None
            if term.kind == "learned":
                ref = replace(ref, adapter=_adapter(pipeline, stage, term.model), quantize=term.quantize)
            rewards[term.log_name] = ref
    return rewards


def _adapter(pipeline: Pipeline, stage: Stage, name: str) -> Lora | None:
    """As which adapter a reward model was trained, or will be, on the model that `stage` starts from;
    None for one with weights of its own."""
    base = stage.starts_from and stage.starts_from.path
    if not stage.on_policy or base is None:
        return None
    maker = pipeline.config.stages.get(name)
    if maker is not None:
        same_base = maker.starts_from is not None and maker.starts_from.path == base
        return stage_memory.lora_of(maker) if same_base and maker.leaves == "reward model" else None
    place, base_place = Path(pipeline.sources.resolve(name)), Path(pipeline.sources.resolve(base))
    folder = lora.folder_of(str(place)) if place.exists() else None
    if folder is None or not base_place.exists() or not lora.belongs_to(folder, ModelSource(str(base_place))):
        return None
    settings = lora.settings_of(folder)
    targets = settings.target_modules
    return Lora(settings.r, targets if isinstance(targets, str) else tuple(targets))


def _shape(
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
    return (stage and stage.starts_from and stage.starts_from.path) or root


def _longest(
    pipeline: Pipeline, name: str, tokenizer: PreTrainedTokenizerBase | None, datasets: list[Dataset]
) -> Lengths:
    """Tokens of the longest rows that a stage will see: of the rows longest in characters, as the stage
    writes them."""
    stage = pipeline.config.stages[name]
    limit = getattr(stage, "max_length", None) or _context(pipeline, name)
    if stage.fills_rows:
        return Lengths(0, limit or 512)
    rows = _longest_rows(tokenizer, datasets)
    if stage.replies is not None:
        new = stage.replies.max_new_tokens
        prompt = max(row.total for row in rows)
        other = _loaded(pipeline, stage.mixed_data())
        beside = Lengths.of_all(_longest_rows(tokenizer, other)).within(limit) if other else None
        return Lengths(min(prompt, max(1, limit - new)) if limit else prompt, new, beside=beside)
    return Lengths.of_all(rows).within(limit)


def _longest_rows(tokenizer: PreTrainedTokenizerBase | None, datasets: list[Dataset]) -> list[Lengths]:
    """Of the rows that are longest in characters."""
    records = (record for dataset in datasets for record in dataset.records)
    candidates = heapq.nlargest(CANDIDATES, records, key=lambda record: _length(None, record))
    for dataset in datasets:
        release(dataset.records)
    return [_lengths(tokenizer, record) for record in candidates]


def _context(pipeline: Pipeline, name: str) -> int | None:
    context = pipeline.sources.context(name)
    shape = model_shapes.known(_origin(pipeline, name)) if context is None else None
    return shape.context if shape else context


def _lengths(tokenizer: PreTrainedTokenizerBase | None, record: Record) -> Lengths:
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


def _count(tokenizer: PreTrainedTokenizerBase | None, part: Prompt) -> int:
    """Tokens of a text, or of turns as keel's template writes them where the tokenizer brings none."""
    text = part if isinstance(part, str) else chat.prompt_text(None, part)
    if tokenizer is None:
        return math.ceil(len(text) / CHARACTERS_A_TOKEN)
    return len(tokenizer(text, verbose=False)["input_ids"])


def as_json(entries: list[dict[str, Any]]) -> str:
    return json.dumps({"stages": entries}, ensure_ascii=False, indent=2)
