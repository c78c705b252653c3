"""A stage's memory before it is run: which models it holds, what each of its phases does with them, where its
peak is.

What the stages do is written here a second time, as arithmetic; `benchmarks/memory.py` measures how far the
two agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, cast

from keel.accel.cpu_linear import MANY
from keel.config import (
    BestOfNConfig,
    ClassifierConfig,
    CollectConfig,
    DistillConfig,
    DPOConfig,
    EvaluateConfig,
    LoraConfig,
    OnPolicy,
    RewardConfig,
    Stage,
    Supervised,
    Training,
)
from keel.models.quantize import KINDS
from keel.pipeline import stage_kinds
from keel.plan import activation_memory, model_memory, predicted_layout
from keel.plan.model_memory import Forward, Lora, Model
from keel.plan.model_shapes import Head, Shape
from keel.plan.peaks import Pass, Phase, fullest, resident, training, with_parts
from keel.stages.best_of_n import PROMPTS_AT_ONCE

SAMPLED_AT_ONCE = 64  # rows of a batch of rollout.engine.generate
KEPT_SHARE = 4  # of rollout.stream: what waits for a slot takes a 1/4 of what the slots hold, at most
# tokens of a question to a judge, besides prompt and replies; its answer is taken to be as long as a reply
QUESTION = 200
CLASSIFIED_AT_ONCE = 64  # rows of a forward of a reward that is a classifier or measures similarity
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of the longest row: its prompt (0 where there is none) and what is learned from, or is
    sampled."""

    prompt: int
    answer: int
    other: int | None = None  # of a pair the shorter side; None: as long as the longer one
    beside: Lengths | None = None  # of other data that it learns from: a pretraining mix, demonstrations

    @property
    def total(self) -> int:
        return self.prompt + self.answer

    def within(self, limit: int | None) -> Lengths:
        """Cut to `limit` tokens as the stages cut: the prompt gives way."""
        if limit is None or self.total <= limit:
            return self
        answer = min(self.answer, limit)
        return Lengths(limit - answer, answer, None if self.other is None else min(self.other, limit))

    @staticmethod
    def of_all(rows: Sequence[Lengths]) -> Lengths:
        """A row as long as the longest, of which as much is answer as of any, so that no row takes more."""
        answer, total = (max(getattr(row, name) for row in rows) for name in ("answer", "total"))
        return Lengths(
            total - answer, answer, max((row.other for row in rows if row.other is not None), default=None)
        )


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model that a config names."""

    shape: Shape
    counted: int | None = None  # parameters, where they were counted on the model itself
    members: int = 1  # of an ensemble
    judges: bool = False  # a classifier or a sentence embedder, in float32 and with batches of its own
    adapter: Lora | None = None  # as which a reward model was trained on the stage's own base
    quantize: str | None = None  # a reward model of its own: 8bit, 4bit
    writes: bool = False  # a language model that judges in words


@dataclass(frozen=True, slots=True)
class StageModels:
    """Who is who in a stage. `rewards`: of its learned rewards and classifiers, by the name of the term."""

    model: ModelRef
    reference: ModelRef | None = None
    rewards: Mapping[str, ModelRef] = field(default_factory=dict)


def phases(stage: Stage, refs: StageModels, lengths: Lengths, device: Device) -> list[Phase] | None:
    """The phases of a stage with the most that each holds; None for a kind without a memory model."""
    memory = stage_kinds.kind_of(stage.kind).memory
    return stage_kinds.resolve(memory)(stage, refs, lengths, device) if memory else None


def lora_of(stage: Stage) -> Lora | None:
    """The adapters that a stage trains."""
    lora: LoraConfig | None = getattr(stage, "lora", None)
    if lora is None:
        return None
    targets = lora.target_modules
    return Lora(lora.r, targets if isinstance(targets, str) else tuple(targets), lora.dropout > 0)


def _held_in(dtype: str, quantize: str | None) -> str:
    """How weights lie in memory, in the words of `memory.WEIGHT`."""
    return dtype if quantize is None else KINDS[quantize]


def _trained(stage: Training, found: ModelRef, device: Device, *, dropout: bool = False) -> Model:
    lora, dtype = lora_of(stage), _held_in(stage.model.dtype, stage.model.quantize)
    return Model(
        found.shape,
        dtype,
        trained=True,
        lora=lora,
        checkpointing=stage.gradient_checkpointing,
        dropout=dropout,
        device=device,
        counted=found.counted,
    )


def learners(stage: Training, refs: StageModels, device: Device) -> dict[str, Model]:
    """What a stage trains, by the roles of its phases."""
    if stage.on_policy:
        found = roles(cast("OnPolicy", stage), refs, device)
        return {role: model for role, model in found.items() if model.trained}
    model = _trained(stage, refs.model, device)
    if stage.leaves in ("reward model", "classifier"):
        return {"model": replace(model, head="score", labels=stage.outputs)}
    return {"policy" if hasattr(stage, "reference") else "model": model}  # what has a reference is a policy


def cut_over_ranks(stage: Training, refs: StageModels, device: Device) -> dict[str, Model]:
    """What a stage cuts by `fsdp`, by the roles of its phases: reward models with weights of their own stay
    whole."""
    if stage.on_policy:
        found = roles(cast("OnPolicy", stage), refs, device)
        cut = ("policy", "reference", "critic")
        return {role: model for role, model in found.items() if role in cut or not model.base}
    return learners(stage, refs, device)


def reads_first(stage: Training, refs: StageModels, device: Device) -> dict[str, Model]:
    """A reference with weights of its own that reads all rows before anything is trained, and is gone
    then."""
    if stage.on_policy or refs.reference is None or not getattr(stage, "asks_reference", False):
        return {}
    return {"reference": _frozen(refs.reference, stage.model.dtype, device)}


def _frozen(found: ModelRef, dtype: str, device: Device, head: Head = "lm") -> Model:
    return Model(found.shape, dtype, head=head, device=device, counted=found.counted)


def rows_at_once(stage: Training, whole: int, length: int) -> int:
    """Rows of one forward and backward, if all take `length` tokens."""
    if stage.micro_tokens is not None:
        return min(max(1, stage.micro_tokens // max(1, length)), whole)
    return min(stage.rows_at_once or whole, whole)


def _with_best(phase: Phase, models: Mapping[str, Model], role: str, patience: int | None) -> Phase:
    """With the copy of the best weights that early stopping keeps."""
    if patience is None:
        return phase
    return Phase(phase.name, with_parts(phase.parts, role, copy=model_memory.weights(models[role])))


# ---------------------------------------------------------------- stages with fixed rows


def language(stage: Supervised, refs: StageModels, lengths: Lengths, device: Device) -> list[Phase]:
    """Language modelling with the model's own dropout."""
    model = _trained(stage, refs.model, device, dropout=True)
    rows = rows_at_once(stage, stage.batch_size, lengths.total)
    if getattr(stage, "loss_on", None) == "all" or stage.cuts_texts:
        lengths = Lengths(0, lengths.total)
    read = predicted_layout.forward(
        model, [predicted_layout.answer(i, lengths.prompt, lengths.answer) for i in range(rows)]
    )
    logits = model_memory.loss_logits(model, rows * lengths.answer)
    if stage.fills_rows and not stage.cuts_texts:  # examples side by side, each of which sees itself alone
        read = Forward(rows, lengths.total, masked=True)
        logits += read.tokens * lengths.total * model.bytes  # what the mask is made from
    models = {"model": model}
    phase = training(models, [Pass("model", [read], logits)], accumulates=rows < stage.batch_size)
    return [_with_best(phase, models, "model", stage.patience)]


def _sides(
    row: Callable[[int, int, int], predicted_layout.Row], pairs: int, lengths: Lengths
) -> list[predicted_layout.Row]:
    """Both sides of so many pairs."""
    sides = (lengths.answer, lengths.answer if lengths.other is None else lengths.other)
    return [row(pair, lengths.prompt, side) for pair in range(pairs) for side in sides]


def _read(model: Model, rows: Sequence[predicted_layout.Row]) -> list[Forward]:
    """The forwards in which a reward model and the losses of pairs read rows."""
    return [
        predicted_layout.forward(model, part)
        for part in predicted_layout.parts(rows, predicted_layout.best_rows(model))
    ]


def _working(model: Model, reads: Sequence[Forward]) -> float:
    """What the largest of forwards without gradient, one after the other, holds at most."""
    return max(activation_memory.working(model, read) for read in reads)


def reward_model(stage: RewardConfig, refs: StageModels, lengths: Lengths, device: Device) -> list[Phase]:
    """A head on the last token, which reads both sides of a pair; before, samples to scale the scores by."""
    model = replace(_trained(stage, refs.model, device, dropout=True), head="score")
    rows = rows_at_once(stage, stage.batch_size, lengths.total * 2)
    reads = _read(model, _sides(predicted_layout.scored, rows, lengths))
    steps = _scored_steps(stage, model, reads, rows)
    if not stage.normalize or model.shape.is_encoder:
        return [steps]
    prompt = Lengths(lengths.prompt, stage.sampling.max_new_tokens)
    dtype = _held_in(stage.model.dtype, stage.model.quantize)
    sampler = {"sampler": _frozen(refs.model, dtype, device)}
    return [_rollout(sampler, "sampler", SAMPLED_AT_ONCE, prompt, name="samples"), steps]


def classifier(stage: ClassifierConfig, refs: StageModels, lengths: Lengths, device: Device) -> list[Phase]:
    """A head with an output for each label."""
    trained = _trained(stage, refs.model, device, dropout=True)
    model = replace(trained, head="score", labels=stage.outputs)
    rows = rows_at_once(stage, stage.batch_size, lengths.total)
    return [_scored_steps(stage, model, [Forward(rows, lengths.total)], rows)]


def _scored_steps(stage: Supervised, model: Model, reads: list[Forward], rows: int) -> Phase:
    """The gradient steps of a model with a score head."""
    models = {"model": model}
    phase = training(models, [Pass("model", reads)], accumulates=rows < stage.batch_size)
    return _with_best(phase, models, "model", stage.patience)


def preferences(stage: DPOConfig, refs: StageModels, lengths: Lengths, device: Device) -> list[Phase]:
    """The reference's log-probabilities first, then both sides of a pair in one step, a few rows a
    forward."""
    policy, found = _trained(stage, refs.model, device), []
    models = {"policy": policy}
    if stage.asks_reference:
        found.append(_reference(stage, refs, lengths, device))
    sides = 1 if stage.loss == "kto" else 2
    count = rows_at_once(stage, stage.batch_size, sides * lengths.total)
    rows = _responses(stage, count, lengths)
    tokens = sum(row.asked for row in rows)
    # `joined` copies them
    logits = model_memory.loss_logits(policy, tokens) + model_memory.kept_states(policy, tokens)
    phase = training(
        models, [Pass("policy", _read(policy, rows), logits)], accumulates=count < stage.batch_size
    )
    return [*found, _with_best(phase, models, "policy", stage.patience)]


def _responses(stage: DPOConfig, count: int, lengths: Lengths) -> list[predicted_layout.Row]:
    """Those of so many pairs; with KTO, where examples meet by chance, of so many prompts."""
    if stage.loss == "kto":
        return [predicted_layout.answer(i, lengths.prompt, lengths.answer) for i in range(count)]
    return _sides(predicted_layout.answer, count, lengths)


def _reference(stage: DPOConfig, refs: StageModels, lengths: Lengths, device: Device) -> Phase:
    """The log-probabilities of all responses, in parts of as many rows as the micro-batch has examples."""
    held = {"policy": replace(_trained(stage, refs.model, device), trained=False, lora=None)}
    if refs.reference:
        held["reference"] = _frozen(refs.reference, stage.model.dtype, device)
    role = "reference" if refs.reference else "policy"
    model = replace(held[role], trained=False)
    rows = rows_at_once(stage, stage.batch_size, lengths.total)
    part = max(predicted_layout.parts(_responses(stage, rows, lengths), rows), key=len)
    tokens = sum(row.asked for row in part)
    logits = model_memory.loss_logits(model, tokens) + model_memory.kept_states(model, tokens)
    inside = _working(model, _read(model, part))
    parts = with_parts(
        resident(held), role, logits=logits, activations=inside, casts=model_memory.casts(model)
    )
    return Phase("reference", parts)


def best_of_n(stage: BestOfNConfig, refs: StageModels, lengths: Lengths, device: Device) -> list[Phase]:
    dtype = _held_in(stage.model.dtype, stage.model.quantize)
    sampler = {"sampler": _frozen(refs.model, dtype, device)}
    held = sampler | _rewards(refs, stage.model.dtype, device)
    rows = PROMPTS_AT_ONCE * stage.samples_per_prompt
    found = [_sampled(stage, held, "sampler", rows, lengths, name="samples")]
    found += _judging(held, stage.batch_size, lengths, stage.samples_per_prompt)
    return [*found, *language(stage, refs, lengths, device)]


# ---------------------------------------------------------------- stages that sample


def collect(stage: CollectConfig, refs: StageModels, lengths: Lengths, device: Device) -> list[Phase]:
    held = {"sampler": _frozen(refs.model, stage.dtype, device)}
    return [_sampled(stage, held, "sampler", stage.batch_size, lengths)]


def on_policy(stage: OnPolicy, refs: StageModels, lengths: Lengths, device: Device) -> list[Phase]:
    """Every update: rollout, the rewards' scores, everybody's log-probabilities and values, gradient
    steps."""
    models = roles(stage, refs, device)
    policy, whole = models["policy"], stage.batch_size
    kept = _head_inputs(stage, policy, lengths)
    on_the_way, read = _in_a_round(stage, lengths)
    sampled = _sampled(stage, models, "policy", min(stage.rollout.rows_at_once, on_the_way), read)
    judged = _judging(models, rows_at_once(stage, whole, lengths.total), lengths, stage.samples_per_prompt)
    found = [
        Phase(phase.name, with_parts(phase.parts, "policy", activations=kept)) for phase in [sampled, *judged]
    ]
    part = _fullest_part(stage, policy, whole, lengths)
    inside = kept + activation_memory.working(policy, predicted_layout.forward(policy, part))
    logits = model_memory.score_logits(policy, sum(row.asked for row in part))
    parts = with_parts(resident(models), "policy", activations=inside, logits=logits)
    for role in ("reference", "critic") if kept else ("policy", "reference", "critic"):
        if role in models:
            parts = with_parts(parts, role, casts=model_memory.casts(models[role]))
    found.append(Phase("forward", parts))
    found.append(_steps(stage, models, lengths))
    if stage.ptx:  # after the policy's gradient is there
        text = (lengths.beside or lengths).total
        rows = rows_at_once(stage, stage.ptx.batch_size, text)
        read = predicted_layout.forward(policy, [predicted_layout.answer(i, 0, text) for i in range(rows)])
        logits = model_memory.loss_logits(policy, read.tokens)
        found.append(training(models, [Pass("policy", [read], logits)], accumulates=True, name="ptx"))
    if stage.offload:
        found = [_without_resting(phase, models) for phase in found]
    return [_with_best(phase, models, "policy", stage.patience) for phase in found]


def _in_a_round(stage: OnPolicy, lengths: Lengths) -> tuple[int, Lengths]:
    """Responses that are sampled together, at most, and what of the longest is read and what sampled. With
    `rollout.partial` those of several updates, each read again with all that it has."""
    partial = stage.rollout.partial
    if not partial or partial >= lengths.answer:
        return stage.batch_size, lengths
    rounds = min(stage.updates, math.ceil(lengths.answer / partial))
    return stage.batch_size * rounds, Lengths(lengths.total - partial, partial)


def distillation(stage: OnPolicy, refs: StageModels, lengths: Lengths, device: Device) -> list[Phase]:
    """Every update: rollout, scores of rewards that are logged, the student's log-probabilities, and gradient
    steps in which the teacher reads the same rows first."""
    models = roles(stage, refs, device)
    student, teacher, whole = models["policy"], models["reference"], stage.batch_size
    kept = _head_inputs(stage, student, lengths)
    before = [
        _sampled(stage, models, "policy", min(stage.rollout.rows_at_once, whole), lengths),
        *_judging(models, rows_at_once(stage, whole, lengths.total), lengths, stage.samples_per_prompt),
    ]
    found = [Phase(p.name, with_parts(p.parts, "policy", activations=kept)) for p in before]
    of_data = cast("DistillConfig", stage).demonstrated  # replies, with prompts of their own
    mini = stage.mini_batch or whole + of_data
    part = _fullest_part(stage, student, mini, lengths, of_data)
    tokens, read = sum(row.asked for row in part), predicted_layout.forward(student, part)
    asked = activation_memory.working(teacher, predicted_layout.forward(teacher, part))
    logits = model_memory.divergence_logits(student, teacher, tokens)
    step = training(models, [Pass("policy", [read], logits)], accumulates=len(part) < mini)
    moments = [with_parts(step.parts, "reference", casts=model_memory.casts(teacher))]
    alone = with_parts(resident(models), "reference", activations=asked, casts=model_memory.casts(teacher))
    found.append(fullest("train", [*moments, alone]))
    return [_with_best(phase, models, "policy", stage.patience) for phase in found]


def _steps(stage: OnPolicy, models: Mapping[str, Model], lengths: Lengths) -> Phase:
    """The gradient steps of critic and policy, which read the same rows."""
    policy, mini = models["policy"], stage.mini_batch or stage.batch_size
    part = _fullest_part(stage, policy, mini, lengths)
    tokens, learns = sum(row.asked for row in part), stage.entropy_coef > 0
    logits = model_memory.loss_logits(policy, tokens, entropy=True, entropy_learns=learns)
    passes = [Pass("policy", [predicted_layout.forward(policy, part)], logits)]
    if "critic" in models:
        passes = [Pass("critic", [predicted_layout.forward(models["critic"], part)]), *passes]
    return training(models, passes, accumulates=len(part) < mini)


def _fullest_part(
    stage: OnPolicy, model: Model, count: int, lengths: Lengths, others: int = 0
) -> list[predicted_layout.Row]:
    """Of the parts in which so many episodes of an update go through a forward. They are of as many prompts
    as can be. others: replies of the data beside those that are sampled, each to a prompt of its own."""
    prompts, data = stage.batch_size // stage.samples_per_prompt, lengths.beside or lengths
    # a mini-batch is drawn at random: it may be of the longer kind as far as there is one
    longer = data.total >= lengths.total
    of_data = min(others, count) if longer else max(0, count - stage.batch_size)
    rows = [
        predicted_layout.answer(i % prompts, lengths.prompt, lengths.answer) for i in range(count - of_data)
    ]
    rows += [predicted_layout.answer(prompts + i, data.prompt, data.answer) for i in range(of_data)]
    at_once = None if stage.micro_tokens else min(stage.rows_at_once or count, count)
    found = predicted_layout.parts(rows, at_once, stage.micro_tokens)
    return max(
        found, key=lambda part: activation_memory.working(model, predicted_layout.forward(model, part))
    )


def _without_resting(phase: Phase, models: Mapping[str, Model]) -> Phase:
    """A phase without the frozen models that lie on the CPU meanwhile: the reference works in one phase, and
    of the reward models one at a time in another, where it is the one with activations."""

    def here(role: str, kinds: Mapping[str, float]) -> bool:
        if role == "reference":
            return phase.name == "forward"
        resting = role.startswith("reward") and models[role].base and models[role].head == "score"
        return not resting or "activations" in kinds

    return Phase(phase.name, {role: kinds for role, kinds in phase.parts.items() if here(role, kinds)})


def roles(stage: OnPolicy, refs: StageModels, device: Device) -> dict[str, Model]:
    """The models that an on-policy stage holds, as models/roles.py shares them."""
    policy = _trained(stage, refs.model, device)
    models = {"policy": policy}
    shared = (
        stage.sharing == "adapters"
    )  # one frozen base; what differs between the roles is adapters and heads
    if stage.lora is None or stage.reference is not None:
        found = refs.reference or refs.model
        dtype = _held_in(stage.reference_dtype or stage.model.dtype, stage.reference_quantize)
        models["reference"] = _frozen(found, dtype, device)
    if stage.critic and getattr(stage, "sharing", None) != "trunk":
        models["critic"] = replace(policy, head="score", base=not shared, counted=None)
    return models | _rewards(refs, stage.model.dtype, device, policy if shared else None)


def _rewards(refs: StageModels, dtype: str, device: Device, base: Model | None = None) -> dict[str, Model]:
    """Reward models and classifiers, each member of an ensemble a role of its own. base: what those that were
    trained as adapters on it are put on."""
    models: dict[str, Model] = {}
    for name, found in refs.rewards.items():
        on_base = base is not None and found.adapter is not None
        held_in = base.dtype if base is not None and on_base else _held_in(dtype, found.quantize)
        for member in range(1, found.members + 1):
            role = ("reward" if name == "reward" else f"reward {name}") + (
                f" {member}" if found.members > 1 else ""
            )
            head: Head = "lm" if found.writes else "none" if found.judges else "score"
            model = _frozen(found, "float32" if found.judges else held_in, device, head)
            models[role] = replace(model, lora=found.adapter, base=False) if on_base else model
    return models


def _rollout(
    models: dict[str, Model],
    role: str,
    rows: int,
    lengths: Lengths,
    *,
    name: str = "rollout",
    kept: float = 0.0,
    steps: int | None = None,
) -> Phase:
    """The prompts' forward, with logits of every prompt token; then one token at a time with the whole cache,
    of which one layer is counted twice, for copies of rows that enter and move. kept: the share of the cache
    that rows which wait for a slot have besides. steps: the most tokens of a response, if not what `lengths`
    says."""
    model = models[role]
    copies = model_memory.casts(model) + model_memory.laid_out(
        model, lengths.total - lengths.prompt if steps is None else steps
    )
    base = with_parts(resident(models), role, casts=copies)
    one_layer = 1 + 1 / model.shape.layers
    prefill = with_parts(
        base,
        role,
        kv_cache=model_memory.kv_cache(model, rows, lengths.prompt),
        activations=activation_memory.working(model, Forward(rows, lengths.prompt)),
        logits=model_memory.sampling_logits(model, rows, lengths.prompt),
    )
    end = with_parts(
        base,
        role,
        kv_cache=model_memory.kv_cache(model, rows, lengths.total) * (one_layer + kept),
        activations=activation_memory.working(model, Forward(rows, lengths.total), new=1),
        logits=model_memory.sampling_logits(model, rows, 1),
    )
    return fullest(name, [prefill, end])


def _sampled(
    stage: OnPolicy | BestOfNConfig | CollectConfig | EvaluateConfig,
    models: dict[str, Model],
    role: str,
    rows: int,
    lengths: Lengths,
    *,
    name: str = "rollout",
) -> Phase:
    """Sampling with the stage's engine. A server computes in memory of its own, which nobody here knows."""
    if stage.rollout.vllm:
        return Phase(name, resident(models))
    # of conversations that wait, and once more while they are read
    kept = 2 / KEPT_SHARE if getattr(stage, "uses_tools", False) else 0.0
    return _rollout(models, role, rows, lengths, name=name, kept=kept)


def _head_inputs(stage: OnPolicy, policy: Model, lengths: Lengths) -> float:
    """Bytes of what the head was given at each token that was sampled, kept until it is scored; 0 where
    log π_old is not the sampler's, or a server keeps nothing."""
    if not stage.trusts_sampler or stage.rollout.vllm:
        return 0
    return stage.batch_size * lengths.answer * policy.shape.hidden * policy.bytes


def _judging(models: dict[str, Model], rows: int, lengths: Lengths, samples: int = 1) -> list[Phase]:
    """The rewards' forwards, one after the other. samples: rows of one prompt."""
    found: list[Phase] = []
    for role, model in models.items():
        if role.startswith("reward") and model.head == "lm":
            question = lengths.prompt + 2 * lengths.answer + QUESTION
            asked = Lengths(question, lengths.answer).within(model.shape.context)
            rows_of_it = min(SAMPLED_AT_ONCE, rows)  # whose answers may be longer, and mostly are not
            found.append(_rollout(models, role, rows_of_it, asked, name="score", steps=MANY))
        elif role.startswith("reward"):
            own = lengths.within(model.shape.context)
            reads = [Forward(CLASSIFIED_AT_ONCE, own.total)]
            if model.head != "none":
                few = range(min(rows, predicted_layout.best_rows(model)))
                reads = _read(
                    model, [predicted_layout.scored(i // samples, own.prompt, own.answer) for i in few]
                )
            inside = _working(model, reads)
            parts = with_parts(resident(models), role, activations=inside, casts=model_memory.casts(model))
            found.append(Phase("score", parts))
    return [max(found, key=lambda phase: phase.total)] if found else []


def evaluate(stage: EvaluateConfig, refs: StageModels, lengths: Lengths, device: Device) -> list[Phase]:
    """The reference, and one model after the other: its samples, the rewards' scores, the exact KL."""
    models = {"model": _frozen(refs.model, stage.dtype, device)}
    if len(stage.models) > 1:
        models["reference"] = _frozen(refs.reference or refs.model, stage.dtype, device)
    models |= _rewards(refs, stage.dtype, device)
    rows = stage.batch_size
    found = [_sampled(stage, models, "model", rows, lengths), *_judging(models, rows, lengths)]
    model = models["model"]
    inside = activation_memory.working(model, Forward(rows, lengths.total))
    logits = model_memory.score_logits(model, rows * lengths.answer)
    parts = with_parts(
        resident(models), "model", activations=inside, logits=logits, casts=model_memory.casts(model)
    )
    return [*found, Phase("forward", parts)]
