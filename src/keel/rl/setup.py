"""What a stage that learns from its own samples starts from: prompts, models, rewards. Data and tokens come
first, so that a bad row is found before any weights are read."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keel.config import OnPolicy, methods
from keel.config.sampler import AT_ONCE
from keel.data import chat
from keel.data.batches import derive_seed
from keel.distributed import group, sharded
from keel.errors import UsageError
from keel.models.load import ModelSource, count_parameters
from keel.models.logprobs import scores_at
from keel.models.lora_targets import notes
from keel.models.machine_speed import speed
from keel.models.offload import offload
from keel.models.phase_cost import PhaseCost, decode_cost, forward_cost, optimizer_cost, train_cost
from keel.models.precision import compute_dtype, computing
from keel.models.quantize import rest_in
from keel.models.roles import Roles, open_roles
from keel.models.shared_base import Base, open_base
from keel.rl import heldout_judge, teacher
from keel.rl.rollout import PromptExample, Setup
from keel.rollout import Engine, KeelEngine, ReferenceEngine
from keel.rundir.stage_run import StageRun
from keel.stages import build_rewards, language, lazy_rows, prepare, supervised_loop, tool_use
from keel.stages.loop_utils import optimizer_for, put_back, state_of
from keel.stages.samplers import open_sampler
from keel.stages.tool_use import ToolUse
from keel.types import Prompt, PromptRecord, Record, TextRecord

C = TypeVar("C", bound=OnPolicy)


def read_prompts(
    config: OnPolicy, run: StageRun, source: ModelSource
) -> tuple[
    Sequence[PromptExample],
    Sequence[PromptExample],
    tuple[language.LanguageRow, ...],
    PreTrainedTokenizerBase,
    ToolUse | None,
]:
    """Prompts to learn on, held-out prompts, rows of the pretraining mix, the tokenizer, and the tools that
    episodes are played with; no weights are read."""
    dataset = prepare.read(run, config.data, ("prompt",))
    held_out = prepare.read(run, config.eval_data, ("prompt",)) if config.eval_data else None
    mix = prepare.read(run, config.ptx.data, ("text",)) if config.ptx else None
    conversational = any(rows.conversational for rows in (dataset, held_out, mix) if rows)
    tokenizer = prepare.open_tokenizer(
        config.model, run, conversational=conversational, reads=dataset.records
    )
    prepare.look_for_marks(run, tokenizer, dataset.records)
    limit = prepare.limit_of(config, run, source)
    room = prepare.room_of(run, limit, config.sampling.max_new_tokens)
    chat.stop_ids(tokenizer, config.sampling.stop)
    too_long = prepare.TooLong(run, config.too_long, room)
    tools = tool_use.open_tools(config, run, tokenizer)
    render = tools.render if tools else _as_it_is
    if tools:
        tools.too_long = too_long

    def task(record: PromptRecord, ids: tuple[int, ...]) -> PromptExample:
        return PromptExample(record.prompt, ids, record.columns)

    tasks = lazy_rows.of_prompts(dataset.records, tokenizer, too_long, task, render)
    held = lazy_rows.of_prompts(held_out.records, tokenizer, too_long, task, render) if held_out else ()
    ptx: list[language.LanguageRow] = []
    if mix:
        text_limit = prepare.TooLong(run, config.too_long, limit)

        def rows(record: Record) -> list[language.LanguageRow] | None:
            assert isinstance(record, TextRecord)
            fitting = [r for r in chat.text_rows(tokenizer, record) if text_limit.fits(record, len(r.ids))]
            cut = [language.LanguageRow(ids[:limit], counts[:limit]) for ids, counts in fitting]
            return [row for row in cut if row.counted] or None

        ptx = [row for part in prepare.encode_all(run, mix.records, rows) for row in part]
        too_long.cut, too_long.left_out = (
            too_long.cut + text_limit.cut,
            too_long.left_out + text_limit.left_out,
        )
    too_long.report()
    return tasks, held, tuple(ptx), tokenizer, tools


def _as_it_is(prompt: Prompt) -> Prompt:
    return prompt


def _reference_of(config: OnPolicy, run: StageRun, source: ModelSource) -> ModelSource | None:
    """The reference policy; None for what the policy starts from, in the policy's own precision."""
    dtype, quantize = config.reference_dtype or config.model.dtype, config.reference_quantize
    if quantize is not None:
        dtype = rest_in(dtype)
    if config.reference is not None:
        path, remote = run.resolve(config.reference), config.model.trust_remote_code
        rows = None if config.imitates else source.rows  # a teacher is nothing of the policy's
        return ModelSource(path, None, dtype, remote, quantize=quantize, rows=rows)
    if config.reference_dtype is None and quantize is None:
        return None
    return replace(source, dtype=dtype, quantize=quantize)


def open_engine(
    config: OnPolicy,
    policy: PreTrainedModel,
    run: StageRun,
    tokenizer: PreTrainedTokenizerBase,
    length: int | None,
) -> Engine:
    """What samples from the policy. length: tokens of the longest prompt and its response; None where nobody
    knows. UsageError where the config names no engine, or something else."""
    if config.rollout.vllm:
        return open_sampler(
            config.rollout, policy, run, tokenizer, length=length,
            trust_remote_code=config.model.trust_remote_code,
        )  # fmt: skip
    opener = methods.engine(config.engine, config.engine_args)
    if opener is None:
        slots = config.rollout.concurrency or AT_ONCE["keel"]
        return KeelEngine(policy, slots) if config.engine == "keel" else ReferenceEngine(policy)
    engine = opener(policy)
    if not isinstance(engine, Engine):
        raise UsageError(
            f"rollout engine {config.engine!r} opens as {type(engine).__name__}, which has no `generate`"
        )
    return engine


def _offload(run: StageRun, roles: Roles, opened: Sequence[build_rewards.LoadedReward]) -> None:
    """Send frozen models with weights of their own to the CPU. UsageError where there are none."""
    frozen: list[torch.nn.Module] = [reward.model for one in opened for reward in one.models]
    if isinstance(roles.reference, torch.nn.Module):
        frozen.append(roles.reference)
    shared = {id(p) for p in roles.policy.parameters()}
    apart = [model for model in frozen if not any(id(p) in shared for p in model.parameters())]
    if not apart:
        raise UsageError(
            f"{run.name}: `offload` has no effect: reference and reward models are on the policy's"
            " own weights, or there are none"
        )
    for model in apart:
        offload(model, run.device)


def _costs(
    config: OnPolicy,
    roles: Roles,
    opened: Sequence[build_rewards.LoadedReward],
    dtype: torch.dtype,
    *,
    through_text: bool,
) -> dict[str, PhaseCost]:
    """What each phase costs at least. A phase is left out whose work nobody here knows: sampling in another
    place, what a teacher reads in tokens of its own. through_text: whether there is such a teacher."""
    learners: list[nn.Module] = [roles.policy, *roles.value_modules]
    other = roles.reference if isinstance(roles.reference, nn.Module) else roles.policy
    # a teacher is asked nothing while samples are scored, but once in each gradient step
    reads = [] if config.imitates else [other, *roles.value_modules]
    taught = [forward_cost(other, dtype)] if config.imitates and not through_text else []
    elsewhere = config.rollout.vllm or methods.is_plugin("keel.engines", config.engine)
    if not config.trusts_sampler or elsewhere:
        reads.append(roles.policy)
    adapters = config.lora is not None
    trained = [train_cost(model, dtype, adapters=adapters) for model in learners]
    costs = {
        "train": reduce(add, [*trained, *taught]),
        "optimizer": optimizer_cost([p for model in learners for p in model.parameters()]),
    }
    if not elsewhere:
        costs["rollout"] = decode_cost(roles.policy, dtype)
    scorers = [reward.model for one in opened for reward in one.models]
    for phase, models in (("forward", reads), ("score", scorers)):
        if models:
            costs[phase] = reduce(add, (forward_cost(model, dtype) for model in models))
    return costs


def _told(
    run: StageRun,
    config: OnPolicy,
    roles: Roles,
    opened: Sequence[build_rewards.LoadedReward],
    *,
    through_text: bool,
) -> None:
    """Say how large the models are, what each phase costs at least, and what the machine can do."""
    for model in (roles.policy, roles.critic):
        supervised_loop.say_units(run, model)
    dtype = compute_dtype(roles.policy, run.device)
    run.computes_in = str(dtype).removeprefix("torch.")
    run.costs = _costs(config, roles, opened, dtype, through_text=through_text)
    run.speed = speed(run.device, dtype)
    trained = sum(count_parameters(m, trainable=True) for m in (roles.policy, *roles.value_modules))
    run.facts |= {"parameters": count_parameters(roles.policy), "trained_parameters": trained}


def open_stage(
    config: C, run: StageRun, *, sharing: Literal["separate", "trunk", "adapters", "none"]
) -> tuple[Sequence[PromptExample], Sequence[PromptExample], Setup[C]]:
    """Prompts, held-out prompts, and the models; sharing "none": without a critic. Data and tokens come
    first, so that a bad row is found before any weights are read."""
    source = prepare.source_of(config.model, run)
    tasks, held, ptx, tokenizer, tools = read_prompts(config, run, source)
    reference = _reference_of(config, run, source)
    seed = derive_seed(run.seed, "model")
    base = open_base(source, seed, run.device) if config.sharing == "adapters" else None
    opened = build_rewards.load_rewards(
        config.reward, run, dtype=config.model.dtype, trust_remote_code=config.model.trust_remote_code,
        base=base,
    )  # fmt: skip
    if tools:
        build_rewards.check_episodes(opened, tokenizer, run.name)
    lengths = (lazy_rows.sizes(rows, lambda task: len(task.ids)) for rows in (tasks, held))
    longest = max(itertools.chain.from_iterable(lengths)) + config.sampling.max_new_tokens
    rewards = None
    if opened:  # a stage that imitates need not have any
        rewards = build_rewards.mixture(
            opened, run, tokenizer, longest, normalize=config.shaping.normalize == "model",
            batch_size=config.rows_at_once or config.batch_size,
        )  # fmt: skip
    theirs = teacher.check(config, reference, tokenizer, longest, run) if config.imitates else None
    judge = heldout_judge.open_judge(config, run, tokenizer, longest, base)
    cut, on_base = _cutter(base), _on_base(base, [*opened, *(judge.opened if judge else ())])
    roles = open_roles(
        source,
        reference,
        sharing=sharing,
        adapters=prepare.adapters_of(config.lora) if config.lora else None,
        gradient_checkpointing=config.gradient_checkpointing,
        device=run.device,
        seed=seed,
        base=base,
        cut=cut,
        # code that a model brings is imported by each rank
        opened=(lambda work: work()) if source.trust_remote_code else sharded.opened,
        same_vocabulary=not config.imitates,  # a head may have more rows than its tokenizer has tokens
    )
    for scorer in on_base:
        cut(scorer)
    for line in notes(roles.policy) if config.lora else ():
        run.say(f"{run.name}: {line}")
    if config.offload:
        _offload(run, roles, opened)
    _told(run, config, roles, opened, through_text=theirs is not None)
    run.facts |= {"rows": len(tasks), "steps": config.updates}
    return (
        tasks,
        held,
        Setup(
            config, roles, open_engine(config, roles.policy, run, tokenizer, None if tools else longest),
            rewards, opened, build_rewards.read_text(opened, tokenizer), tokenizer, run, ptx,
            judge, tools, theirs,
        ),
    )  # fmt: skip


def _on_base(base: Base | None, loaded: Sequence[build_rewards.LoadedReward]) -> list[Any]:
    """The reward models that are adapters on a base; to be asked before any of its weights are cut."""
    shared = set[int]() if base is None else {id(parameter) for parameter in base.model.parameters()}
    models: list[Any] = [reward.model for one in loaded for reward in one.models]
    return [model for model in models if any(id(p) in shared for p in model.parameters())]


def _cutter(base: Base | None) -> Callable[[Any], None]:
    """What cuts the models of a stage over the ranks; of a base that several are on each rank keeps one part.
    Nothing where weights are whole."""
    shared = None if base is None else sharded.SharedParts(base.model.parameters())

    def cut(model: Any) -> None:
        if isinstance(model, nn.Linear):  # a value head on the policy
            sharded.shard(model)
            return
        supervised_loop.among_ranks(model, shared)
        # a first forward of all ranks makes torch's streams, without which nobody has it whole again
        # (`sharded.whole_here`)
        device = sharded.device_of(model)
        nothing = torch.zeros(1, 1, dtype=torch.long, device=device)
        with torch.no_grad(), computing(model, device):
            if model.can_generate():
                model(input_ids=nothing)
            else:
                scores_at(model, nothing, nothing[0])

    return cut if group.is_sharded() else lambda model: None


def make_optimizers(
    config: OnPolicy, roles: Roles, value_lr: float | None = None
) -> list[torch.optim.Optimizer]:
    """One for the policy (and its value head); one more for a separate critic, whose gradient is clipped by
    itself."""
    groups: list[tuple[Sequence[nn.Module], float]] = [([roles.policy], config.lr)]
    if roles.value_head is not None:
        groups.append(([roles.value_head], value_lr or config.lr))
    made: list[torch.optim.Optimizer] = [optimizer_for(config, *groups)]
    if roles.critic is not None:
        made.append(optimizer_for(config, ([roles.critic], value_lr or config.lr)))
    return made


def training_state(setup: Setup[OnPolicy], optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    """Everything that training changes, for a checkpoint."""
    modules = {
        "policy": setup.roles.policy,
        **{f"value{i}": m for i, m in enumerate(setup.roles.value_modules)},
    }
    return {name: state_of(m) for name, m in modules.items()} | {
        f"optimizer{i}": o.state_dict() for i, o in enumerate(optimizers)
    }


def placing(setup: Setup[OnPolicy], optimizers: Sequence[torch.optim.Optimizer]) -> sharded.Placing:
    """What a rank keeps of a checkpoint's tensors."""
    policy = setup.roles.policy
    values = {f"value{i}": m for i, m in enumerate(setup.roles.value_modules)}
    return sharded.Placing(
        {"policy": policy, "best": policy, **values}, {f"optimizer{i}": o for i, o in enumerate(optimizers)},
        _in_snapshot,
    )  # fmt: skip


def _in_snapshot(path: group.Path) -> group.Path:
    """Where a checkpoint has what a snapshot of the monitor has there, too."""
    match path:
        case ("snapshots", _, "modules", *rest):
            return tuple(rest)
        case ("snapshots", _, "optimizers", number, *rest):
            return (f"optimizer{number}", *rest)
        case _:
            return path


def restore_training(
    setup: Setup[OnPolicy], optimizers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Any]
) -> None:
    """Put a checkpoint's `training_state` back."""
    put_back(setup.roles.policy, tensors["policy"])
    for i, module in enumerate(setup.roles.value_modules):
        put_back(module, tensors[f"value{i}"])
    for i, optimizer in enumerate(optimizers):
        optimizer.load_state_dict(tensors[f"optimizer{i}"])
