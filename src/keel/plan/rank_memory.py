"""A stage on n ranks, by strategy: the memory of the fullest rank, whether it fits a card, and the bytes that
a rank sends and receives.

ddp: every rank has weights, gradients and optimiser whole, and 1/n of the rows. fsdp: 1/n of weights,
gradients and optimiser, and whole at a time the embeddings with the head and two layers: the one that
computes and the next, whose weights are on their way; with `dtype: auto` their matrices in bfloat16. Each
has the policy whole while it samples (not where a vLLM server does), the base whole while reward models on it
score, and what `_opened_by_each` names before it is cut. The first has a model whole in host memory when it
is opened and saved.

Bytes are those of ring algorithms: a sum of S bytes over n ranks (all-reduce) makes each send
2 (n − 1) / n · S and receive as much, gathering or scattering them half of it. So NCCL does, and
`distributed.scatter` in place of gloo, whose own scattered sum is an all-reduce.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch

from keel.config import Stage, Training
from keel.distributed import half_gather
from keel.distributed.gradients import BUCKET
from keel.errors import UsageError
from keel.models import machine_speed
from keel.models.machine_speed import Speed
from keel.pipeline import stage_kinds
from keel.plan import card_fit, model_memory, predicted_layout, stage_memory, step_seconds
from keel.plan.model_memory import TRAINED, Model
from keel.plan.peaks import Parts, Phase
from keel.plan.stage_memory import Lengths, StageModels

Strategy = Literal["ddp", "fsdp"]
STRATEGIES: tuple[Strategy, ...] = ("ddp", "fsdp")
LAYERS_AT_ONCE = 2
SAVED = (
    model_memory.WEIGHT["auto"] - model_memory.WEIGHT["bfloat16"]
)  # bytes of a weight gathered in bfloat16
GB = 10**9


@dataclass(frozen=True, slots=True)
class Asked:
    """What `keel plan --nproc` asks."""

    ranks: int
    card: int = 80  # GB of each
    bandwidth: float | None = None  # bytes a second in and out of a rank
    speed: Speed | None = None  # of a card; None: seconds are not reckoned
    offload: bool = False  # fsdp: what is cut lies in host memory
    mixed_precision: bool = True  # fsdp: matrices are gathered in bfloat16, where models multiply in it


@dataclass(frozen=True, slots=True)
class OnRanks:
    """A stage on n ranks by one strategy."""

    runs: bool  # whether keel can
    peak: float = 0.0  # bytes, of the fullest rank
    peak_phase: str = ""
    phases: Mapping[str, float] = field(default_factory=dict)
    fits: bool = False  # the card that was asked about
    settings: Mapping[str, Any] | None = None  # dotted, that would make it fit; None: none of them does
    sent: Mapping[str, float] = field(default_factory=dict)  # bytes of an optimiser step: `bytes_of_step`
    steps: int = 1  # optimiser steps of an update; 1 where a step is one
    seconds: Mapping[str, float] = field(default_factory=dict)  # of a step or update: `step_seconds`
    host: float = 0.0  # bytes in host memory of a rank, where what is cut lies there
    opened: float = 0.0  # fsdp: bytes in the first rank's host memory, where it opens a model and saves one


def card_of(text: str) -> int:
    """ "80GB", "80" → 80. UsageError for anything else."""
    found = re.fullmatch(r"\s*([1-9]\d{0,4})\s*(gb)?\s*", text.lower())
    if not found:
        raise UsageError(f"--card {text}: write the size of a card in GB: 80GB")
    return int(found[1])


def speed_of(tflops: float | None, reading: float | None) -> Speed | None:
    """A card's, from TFLOP/s and GB/s; where none are given, what `keel doctor --bench` measured on a card of
    this machine, if it did."""
    if tflops is not None and reading is not None:
        return Speed(tflops * 1e12, {1: reading * GB})
    if not torch.cuda.is_available():
        return None
    found = machine_speed.speed(torch.device("cuda"), torch.bfloat16)
    return found if found.kept else None


def on_ranks(stage: Stage, refs: StageModels, lengths: Lengths, asked: Asked) -> dict[str, OnRanks]:
    """By strategy. refs, lengths: as of `stage_memory.phases`."""
    with half_gather.wanted(asked.mixed_precision):
        return {strategy: _on_ranks(stage, refs, lengths, asked, strategy) for strategy in STRATEGIES}


def _on_ranks(stage: Stage, refs: StageModels, lengths: Lengths, asked: Asked, strategy: Strategy) -> OnRanks:
    if strategy not in stage_kinds.kind_of(stage.kind).ranks or not isinstance(stage, Training):
        return OnRanks(False)

    def peak(stage: Stage) -> float:
        stage, own = _training(stage), lengths.within(getattr(stage, "max_length", None))
        if strategy == "fsdp" and stage.uncut() is not None:
            return math.inf
        return max(phase.total for phase in phases(stage, refs, own, asked.ranks, strategy, asked.offload))

    if strategy == "fsdp" and stage.uncut() is not None:
        return OnRanks(False)
    found = phases(stage, refs, lengths, asked.ranks, strategy, asked.offload)
    host = in_host_memory(stage, refs, asked.ranks) if strategy == "fsdp" and asked.offload else 0.0
    fullest = max(found, key=lambda phase: phase.total)
    fit = card_fit.fit(stage, peak, lengths.total, asked.card)
    return OnRanks(
        True, fullest.total, fullest.name, {phase.name: phase.total for phase in found}, fit.fits,
        fit.settings, bytes_of_step(stage, refs, lengths, asked.ranks, strategy), _steps_of_update(stage),
        seconds_of_step(stage, refs, lengths, asked, strategy), host,
        whole_in_host_memory(stage, refs) if strategy == "fsdp" else 0.0,
    )  # fmt: skip


def _steps_of_update(stage: Training) -> int:
    """Optimiser steps of an update; 1 where a step is one."""
    planned = stage.planned_steps(stage.batch_size)
    return planned.get("gradient_steps", planned["steps"]) // max(1, planned["steps"])


def _training(stage: Stage) -> Training:
    assert isinstance(stage, Training)
    return stage


def share(stage: Training, ranks: int) -> Training:
    """The stage with the rows that one rank has of a step, at most."""

    def part(rows: int, whole: int = 1) -> int:
        return math.ceil(rows / whole / ranks) * whole

    samples = getattr(stage, "samples_per_prompt", 1) if stage.on_policy else 1
    update: dict[str, Any] = {"batch_size": part(stage.batch_size, samples)}
    if (mini_batch := getattr(stage, "mini_batch", None)) is not None:
        update["mini_batch"] = part(mini_batch)
    return stage.model_copy(update=update)


# ---------------------------------------------------------------- memory


def phases(
    stage: Training,
    refs: StageModels,
    lengths: Lengths,
    ranks: int,
    strategy: Strategy,
    offload: bool = False,
) -> list[Phase]:
    """What each phase holds on the fullest rank, on CUDA. offload: fsdp's, whose parts lie in host memory."""
    own, models = share(stage, ranks), stage_memory.learners(stage, refs, "cuda")
    if strategy == "ddp":
        found = stage_memory.phases(own, refs, lengths, "cuda") or []
        return [*found, _summing(found[-1], models)]
    with predicted_layout.plain():
        found = stage_memory.phases(own, refs, lengths, "cuda") or []
    shared = stage_memory.cut_over_ranks(stage, refs, "cuda")
    all_cut = stage_memory.reads_first(stage, refs, "cuda") | shared
    sampler = getattr(stage, "rollout", None)
    by_server = sampler is not None and sampler.vllm
    cut = [Phase(p.name, _cut(p, all_cut, ranks, by_server=by_server)) for p in found]
    last = [*cut, _last_gradients(cut[-1], models, ranks)]
    all_of_it = [_opening(cut[-1].parts, shared), *last] if _opened_by_each(stage) else last
    return [_offloaded(p, all_cut, models, ranks) for p in all_of_it] if offload else all_of_it


def _offloaded(phase: Phase, cut: Mapping[str, Model], trained: Mapping[str, Model], ranks: int) -> Phase:
    """A phase without the parts that lie in host memory: on the card is what is whole at a time."""
    parts: Parts = {}
    for role, kinds in phase.parts.items():
        own = dict(kinds)
        if role in cut:
            part = model_memory.weights(cut[role]) / ranks
            if own.get("weights", 0.0) <= part * (1 + 1e-9):  # else it is whole, not cut yet
                own = {k: v for k, v in own.items() if k not in ("weights", "optimizer", "copy")}
            if "gradients" in own and role in trained:
                own["gradients"] -= model_memory.gradients(trained[role]) / ranks
        parts[role] = own
    return Phase(phase.name, parts)


def in_host_memory(stage: Training, refs: StageModels, ranks: int) -> float:
    """fsdp with offload: bytes of a rank's parts of weights, and of gradients, optimiser states and the copy
    that early stopping keeps."""
    kept = sum(model_memory.weights(m) for m in stage_memory.cut_over_ranks(stage, refs, "cuda").values())
    learners = stage_memory.learners(stage, refs, "cuda")
    kept += sum(model_memory.gradients(m) + model_memory.optimizer(m) for m in learners.values())
    if getattr(stage, "patience", None) is not None:
        kept += model_memory.weights(next(iter(learners.values())))
    return kept / ranks


def whole_in_host_memory(stage: Training, refs: StageModels) -> float:
    """fsdp: bytes of the largest model that is cut, which the first rank opens in its host memory, and
    gathers there at the end to save it."""
    return max(map(model_memory.weights, stage_memory.cut_over_ranks(stage, refs, "cuda").values()))


def _summing(train: Phase, models: Mapping[str, Model]) -> Phase:
    """ddp: gradients that are summed in buckets, each a copy; one larger than a bucket is one by itself."""
    parts = _after_backward(train.parts)
    for role, model in models.items():
        whole = model_memory.gradients(model)
        largest = model_memory.embedding_gradient(model)
        parts[role] |= {"gradients": whole, "bucket": max(largest, min(whole, BUCKET))}
    return Phase("sum of gradients", parts)


def _after_backward(parts: Parts) -> Parts:
    gone = ("activations", "logits", "gradients")
    return {role: {k: v for k, v in kinds.items() if k not in gone} for role, kinds in parts.items()}


def _opened_by_each(stage: Training) -> bool:
    """fsdp: whether each rank has the model whole on its card before it is cut: packed rows are tried on it,
    several roles are put on it. Else it lies in host memory (`stages.prepare.to_train`)."""
    return bool(getattr(stage, "packing", False) or getattr(stage, "sharing", None) == "adapters")


def _opening(cut: Parts, models: Mapping[str, Model]) -> Phase:
    """fsdp: the largest model whole before it is cut, the others cut. cut: of another phase."""
    largest = max(models, key=lambda role: model_memory.weights(models[role]))
    parts: Parts = {role: {"weights": kinds["weights"]} for role, kinds in cut.items()}
    return Phase("open", {**parts, largest: {"weights": model_memory.weights(models[largest])}})


def _cut(phase: Phase, models: Mapping[str, Model], ranks: int, *, by_server: bool = False) -> Parts:
    """What a rank keeps of the roles that are cut, and what is whole at a time: of one role, since they
    compute one after the other, of all of the policy while it samples, unless a server does, and of the base
    while reward models that are cut with it score."""
    found: Parts = {}
    working = next((role for role in models if role in phase.parts), "")  # one of them at a time
    wholly = phase.name in ("rollout", "samples")
    wholly |= phase.name == "score" and any(role.startswith("reward") for role in models)
    for role, kinds in phase.parts.items():
        model = models.get(role)
        if model is None:
            found[role] = dict(kinds)
            continue
        per_weight = model_memory.weights(model) / max(1, model.parameters)
        (root, layer), (root_in_half, layer_in_half) = _units(model), _in_half(model)
        own = {k: v / ranks if k in ("weights", "optimizer", "copy") else v for k, v in kinds.items()}
        if layer_in_half:  # what is multiplied is what was gathered
            own.pop("casts", None)
        if role == working and wholly:
            own["gathered"] = 0.0 if by_server and phase.name != "score" else gathered(model)
        elif role == working:
            at_once = root_in_half + LAYERS_AT_ONCE * layer_in_half
            own["gathered"] = per_weight * (root + LAYERS_AT_ONCE * layer) - SAVED * at_once
        if "gradients" in kinds:
            own["gradients"] = model_memory.gradients(model) / ranks + TRAINED * (
                _trained(model, root) + LAYERS_AT_ONCE * _trained(model, layer)
            )
            if model.lora is None:
                own["gradients"] -= SAVED * (root_in_half + LAYERS_AT_ONCE * layer_in_half)
        found[role] = own
    return found


def _last_gradients(train: Phase, models: Mapping[str, Model], ranks: int) -> Phase:
    """fsdp: the end of a backward, where the gradient of embeddings and head is there twice, as it is and as
    it is sent."""
    parts = _after_backward(train.parts)
    for role, model in models.items():
        whole = model_memory.gradients(model) / ranks
        parts[role]["gradients"] = whole + TRAINED * 2 * _trained(model, _units(model)[0])
        if model.lora is None:
            parts[role]["gradients"] -= SAVED * _in_half(model)[0]
    return Phase("end of backward", parts)


def _in_half(model: Model) -> tuple[float, float]:
    """Of the weights of `_units` those that are gathered in bfloat16."""
    return model_memory.halved(model) if half_gather.is_wanted() else (0.0, 0.0)


def gathered(model: Model) -> float:
    """Bytes of a model as ranks gather it, whole; also of one whose base is another role's."""
    root, layer = _in_half(model)
    return model_memory.weights(replace(model, base=True)) - SAVED * (root + model.shape.layers * layer)


def _units(model: Model) -> tuple[float, float]:
    """Weights of what is no layer, and of a layer."""
    layer = sum(x.parameters for x in model.shape.linears()) + model.shape.norms * model.shape.hidden
    return max(0, model.parameters - model.shape.layers * layer), layer


def _trained(model: Model, weights: float) -> float:
    """Of so many weights of a unit those that learn, at most."""
    return weights if model.lora is None else min(weights, model.trained_parameters / model.shape.layers)


# ---------------------------------------------------------------- communication


def bytes_of_step(
    stage: Training, refs: StageModels, lengths: Lengths, ranks: int, strategy: Strategy
) -> dict[str, float]:
    """What a rank sends for an optimiser step, and receives, by what it is; the fewer bytes of metrics and,
    in RL, of sampled responses left out, and what held-out rows take."""
    models = stage_memory.learners(stage, refs, "cuda").values()
    trained = sum(model_memory.gradients(model) for model in models)
    way = (ranks - 1) / ranks  # of what is gathered or scattered
    if strategy == "ddp":
        return {"gradients": 2 * way * trained}
    own = share(stage, ranks)
    rows = getattr(own, "mini_batch", None) or own.batch_size
    parts = math.ceil(rows / stage_memory.rows_at_once(own, rows, lengths.total))
    # each role on one base gathers all of it for itself
    weights = sum(map(gathered, models))
    found = {"weights": parts * 2 * way * weights, "gradients": parts * way * trained}
    if not stage.on_policy:
        return found
    cut = stage_memory.cut_over_ranks(stage, refs, "cuda")
    reference = cut.get("reference", cut["policy"])  # it may be the policy with its adapters off
    if getattr(stage, "imitates", False):
        teacher = {"teacher": parts * way * gathered(reference)}
        return found | teacher | _for_samples(stage, own, cut, [], lengths, way)
    scoring = [cut["policy"], reference, *(model for role, model in cut.items() if role == "critic")]
    return found | _for_samples(stage, own, cut, scoring, lengths, way)


def _for_samples(
    stage: Training, own: Training, cut: Mapping[str, Model], scoring: Sequence[Model], lengths: Lengths,
    way: float,
) -> dict[str, float]:  # fmt: skip
    """fsdp, in RL: bytes of an update before it trains, as part of an optimiser step's. The policy is
    gathered once to sample from it, and whoever scores the samples for each part of them. own: a rank's
    share."""
    served = getattr(stage, "rollout").vllm  # noqa: B009  stages that sample have one
    parts = math.ceil(own.batch_size / stage_memory.rows_at_once(own, own.batch_size, lengths.total))
    sampling = 0.0 if served else gathered(cut["policy"])
    found = {"sampling": sampling, "scoring": parts * sum(map(gathered, scoring))}
    return {name: way * value / _steps_of_update(stage) for name, value in found.items()}


# ---------------------------------------------------------------- seconds


def seconds_of_step(
    stage: Training, refs: StageModels, lengths: Lengths, asked: Asked, strategy: Strategy
) -> dict[str, float]:
    """What a step (an update, in RL) takes a rank at least, by phase; empty where nobody said how fast a card
    is. `sending` is among them where the bandwidth is known."""
    if asked.speed is None:
        return {}
    own = share(stage, asked.ranks)
    within = lengths.within(getattr(stage, "max_length", None))
    cut = asked.ranks if strategy == "fsdp" else 1
    found = step_seconds.phases(own, refs, within, cut, asked.speed)
    if asked.bandwidth is not None:
        sent = sum(bytes_of_step(stage, refs, lengths, asked.ranks, strategy).values())
        found["sending"] = _steps_of_update(stage) * sent / asked.bandwidth
    return found


def split_of(
    stage: Stage, refs: StageModels, lengths: Lengths, asked: Asked, found: Mapping[str, OnRanks]
) -> step_seconds.Split | None:
    """How to share the cards between a vLLM server and training, by the first strategy that fits; None where
    there is no server, or nothing to reckon with."""
    sampler = getattr(stage, "rollout", None)
    strategy: Strategy | None = next((s for s in STRATEGIES if s in found and found[s].fits), None)
    served = isinstance(stage, Training) and sampler is not None and sampler.vllm
    if not served or strategy is None or asked.speed is None:
        return None
    by_cards = {
        n: seconds_of_step(_training(stage), refs, lengths, replace(asked, ranks=n), strategy)
        for n in range(1, asked.ranks)
    }
    rollout = {n: phases["rollout"] for n, phases in by_cards.items()}
    rest = {n: sum(phases.values()) - phases["rollout"] for n, phases in by_cards.items()}
    return step_seconds.best_split(rollout, rest, asked.ranks)


# ---------------------------------------------------------------- as it is shown


def as_dict(
    found: Mapping[str, OnRanks], asked: Asked, split: step_seconds.Split | None = None
) -> dict[str, Any]:
    """For JSON: bytes and seconds."""
    strategies: dict[str, Any] = {}
    for name, one in found.items():
        if not one.runs:
            strategies[name] = {"runs": False}
            continue
        strategies[name] = {
            "runs": True,
            "peak": round(one.peak),
            "peak_phase": one.peak_phase,
            "phases": {phase: round(value) for phase, value in one.phases.items()},
            "fits": one.fits,
            "with": one.settings if one.settings is None else dict(one.settings),
            "sent_a_step": round(sum(one.sent.values())),
            "sent_by": {what: round(value) for what, value in one.sent.items()},
            "steps_an_update": one.steps,
            "seconds_a_step": asked.bandwidth and sum(one.sent.values()) / asked.bandwidth,
            "seconds_by_phase": dict(one.seconds),
            "host_memory": round(one.host),
            "host_memory_of_first": round(one.opened),
        }
    shared = {} if split is None else {"split": asdict(split)}
    return {"nproc": asked.ranks, "card_gb": asked.card, "strategies": strategies, **shared}


def as_lines(ranks: Mapping[str, Any]) -> list[str]:
    """Of `as_dict`, for people."""
    lines, where = [], f"{ranks['nproc']} × {ranks['card_gb']} GB"
    for name, one in ranks["strategies"].items():
        if not one["runs"]:
            lines.append(f"{where}, {name}: not for this stage")
            continue
        settings = one["with"]
        if one["fits"]:
            fits = "fits"
        elif settings is None:
            fits = "does not fit by any setting"
        else:
            fits = f"fits with {card_fit.settings_text(settings)}"
        sent = f"a rank sends {_gb(one['sent_a_step'])} GB a gradient step, and receives as much"
        if one["steps_an_update"] > 1:
            sent += f" ({one['steps_an_update']} steps an update)"
        if one["seconds_a_step"] is not None:
            sent += f": {one['seconds_a_step']:.2g} s"
        peak = f"{_gb(one['peak'])} GB a rank at its peak, {one['peak_phase']}"
        if one["host_memory"]:
            peak += f", and {_gb(one['host_memory'])} GB in host memory"
        if one["host_memory_of_first"]:
            peak += (
                f" (the first rank: {_gb(one['host_memory_of_first'])} GB in host memory to open and save)"
            )
        lines.append(f"{where}, {name}: {peak}; {fits}; {sent}")
        if by_phase := one["seconds_by_phase"]:
            each = ", ".join(f"{phase} {seconds:.2g}" for phase, seconds in by_phase.items())
            lines.append(f"{where}, {name}: at least {sum(by_phase.values()):.3g} s: {each}")
    if split := ranks.get("split"):
        lines.append(
            f"a vLLM server on cards of its own: {split['engine']}, and {split['training']} that train: at "
            f"least {split['ahead']:.3g} s an update with rollout.ahead, {split['in_turn']:.3g} s without"
        )
    return lines


def _gb(value: float) -> str:
    return f"{value / GB:.3g}"
