"""The loop over fixed rows that pretraining, supervised fine-tuning and the reward model share; each brings
its rows and an objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import Tensor
from torch.optim import Optimizer

from keel import accel
from keel.accel import batch_layout
from keel.accel.cpu_linear import cast_cache
from keel.config import Supervised
from keel.data.batches import rows_of_step, useful_pairs
from keel.distributed import gradients, group, sharded
from keel.models import optim
from keel.models.load import count_parameters, score_head
from keel.models.logprobs import backbone
from keel.models.machine_speed import speed
from keel.models.phase_cost import optimizer_cost, train_cost
from keel.models.precision import autocast_on, compute_dtype
from keel.models.row_trial import check_rows, take_as_tried
from keel.rundir.stage_run import StageRun
from keel.stages.loop_utils import (
    EarlyStop,
    add_metrics,
    copy_state,
    due,
    lr_scale,
    optimizer_for,
    put_back,
    seed_step,
    share_of,
    state_of,
    total_steps,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RowT = TypeVar("RowT")


@dataclass(frozen=True, slots=True)
class Objective(Generic[RowT]):
    """What a stage learns from its rows."""

    # rows of a micro-batch and the denominator of the whole step → their part of the step's loss, and metrics
    # that add up over the micro-batches
    loss: Callable[[Sequence[RowT], float], tuple[Tensor, dict[str, Tensor]]]
    # what a row adds to the denominator: its counted tokens, or 1
    weight: Callable[[RowT], int]
    # tokens of a row's forward; micro-batches are made of rows of similar size
    size: Callable[[RowT], int]
    # held-out metrics; early stopping watches `eval_loss`
    evaluate: Callable[[Sequence[RowT]], dict[str, float]]
    # a row's tokens, for `num_tokens`; None: they are not counted
    length: Callable[[RowT], int] | None = None
    # a step's summed metrics → the metrics as they are logged
    named: Callable[[dict[str, float]], dict[str, float]] = dict
    # gets all rows of a step, before the first micro-batch
    begin: Callable[[Sequence[RowT]], None] | None = None
    # what a row's tokens attend within, as `useful_pairs` takes it; None: attention is no part of the floor
    sequences: Callable[[RowT], Sequence[tuple[tuple[int, ...], int]]] | None = None


class Stream(Generic[RowT]):
    """Rows that come in an order of their own and are not numbered: they are taken as they come."""

    def __len__(self) -> int:
        """Rows of one pass."""
        raise NotImplementedError

    def take(self, count: int) -> list[RowT]:
        """The next rows."""
        raise NotImplementedError

    def cursor(self) -> dict[str, int]:
        """Where the next row begins, for a checkpoint."""
        raise NotImplementedError

    def seek(self, cursor: dict[str, int]) -> None:
        """Go on from there."""
        raise NotImplementedError


def fit(
    stage_run: StageRun,
    config: Supervised,
    model: PreTrainedModel,
    rows: Sequence[RowT] | Stream[RowT],
    held_out: Sequence[RowT],
    objective: Objective[RowT],
) -> None:
    """Train, evaluate, stop early, checkpoint. The model ends with the weights to keep."""
    _opened(stage_run, config, model)
    steps, optimizer = total_steps(config, len(rows)), optimizer_for(config, ([model], config.lr))
    stopping, best, seen, first = EarlyStop(config.patience), None, 0, 0
    stage_run.facts |= {"rows": len(rows), "held_out_rows": len(held_out), "steps": steps}
    group.agree("the rows of a stage", (len(rows), len(held_out), steps))
    placed = sharded.Placing({"model": model, "best": model}, {"optimizer": optimizer})
    if checkpoint := stage_run.restore(placed):
        put_back(model, checkpoint.tensors["model"])
        optimizer.load_state_dict(checkpoint.tensors["optimizer"])
        stopping, best = stopping.restored(checkpoint.values["stopping"]), checkpoint.tensors["best"]
        first, seen = checkpoint.step, checkpoint.values["seen"]
        if isinstance(rows, Stream):
            rows.seek(checkpoint.values["cursor"])
    for step in range(first + 1, steps + 1):
        if stopping.stop:
            break
        # 1. the rows of this step
        chosen = _rows_of(rows, config.batch_size, step, stage_run.seed)
        if step == first + 1:
            group.agree(f"the rows of step {step}", [objective.size(row) for row in chosen])
        # 2. the gradient, micro-batch by micro-batch
        model.train()
        seed_step(stage_run.seed, step)
        with stage_run.timed("train"):
            sums = _gradient(stage_run, config, objective, chosen)
            # 3. the optimiser's step
            scale, where = lr_scale(config, step - 1, steps), f"{stage_run.name}, step {step}"
            with stage_run.stepping():
                stepped = optim.step(optimizer, scale, config.max_grad_norm, where)
        metrics = objective.named(group.summed(sums)) | {
            "grad_norm": stepped["grad_norm"], "learning_rate": stepped["lr"],
            "epoch": step * config.batch_size / len(rows),
        }  # fmt: skip
        if objective.length is not None:
            seen += sum(objective.length(row) for row in chosen)
            metrics["num_tokens"] = seen
        # 4. held-out rows, and whether to go on
        if held_out and due(step, steps, config.eval_every):
            with stage_run.timed("evaluate"):
                metrics |= objective.evaluate(held_out)
            stopping = stopping.see(-metrics["eval_loss"])
            if config.patience is not None and stopping.waited == 0:
                best = copy_state(model)
        # 5. what happened, and where to go on from
        stage_run.log(step, steps, metrics)
        if due(step, steps, config.save_every) or stopping.stop:
            where_in_data = {"cursor": rows.cursor()} if isinstance(rows, Stream) else {}
            values = {"stopping": stopping.values(), "seen": seen, **where_in_data}
            _save(stage_run, step, model, optimizer, best, values)
    if best is not None:
        put_back(model, best)


def _opened(stage_run: StageRun, config: Supervised, model: PreTrainedModel) -> None:
    """Count the model's parameters, make it one of all ranks, and say what a step costs at least and what the
    machine can do, for the shares in times.jsonl."""
    stage_run.facts["parameters"] = count_parameters(model)
    stage_run.facts["trained_parameters"] = count_parameters(model, trainable=True)
    among_ranks(model)
    say_units(stage_run, model)
    dtype = compute_dtype(model, stage_run.device)
    stage_run.computes_in = str(dtype).removeprefix("torch.")
    stage_run.costs |= {
        "train": train_cost(model, dtype, adapters=config.lora is not None),
        "optimizer": optimizer_cost(list(model.parameters())),
    }
    stage_run.speed = speed(stage_run.device, dtype)


def _save(
    stage_run: StageRun,
    step: int,
    model: PreTrainedModel,
    optimizer: Optimizer,
    best: Any,
    values: dict[str, Any],
) -> None:
    """A checkpoint after `step`, with the same weights on all ranks."""
    if not group.is_sharded():
        group.agree(f"the weights after step {step}", gradients.checksum(model, trained=True))
    tensors = {"model": state_of(model), "optimizer": optimizer.state_dict(), "best": best}
    stage_run.save(step, tensors, values)


def among_ranks(model: PreTrainedModel, shared: sharded.SharedParts | None = None) -> None:
    """Make the model one of all ranks: the first one's weights on each, or cut over them, as the config asks.
    Nothing for a process alone, and for a model that is cut already. shared: of frozen weights that other
    models have, too."""
    if group.size() == 1 or sharded.is_cut(model):
        return
    if not sharded.is_from_first(model):
        gradients.same_weights(model)
    if not group.is_sharded():
        return
    accel.restore(model)  # torch's own classes are what is cut
    plain: Any = model
    plain = plain.get_base_model() if hasattr(model, "peft_config") else model
    head = score_head(plain)
    if head is None and plain.can_generate():
        _check_rows(model)  # while its weights are whole: a trial does without hooks
    # a scorer is never called itself: its trunk and its head are
    casts = autocast_on(model, sharded.computes_on())
    group.agree("whether they multiply in bfloat16", casts)
    sharded.shard(model, None if head is None else [backbone(model), head], shared, casts=casts)


def say_units(stage_run: StageRun, model: Any) -> None:
    """Say where a model that is cut is in one piece while it computes."""
    if sharded.is_cut(model) and not sharded.layers_of(model):
        stage_run.note(
            f"no layers were found in a {type(model).__name__}: each rank has all of its weights whole while "
            "it computes"
        )


def _check_rows(model: Any) -> None:
    models = [model]
    if hasattr(model, "peft_config"):  # what is under the adapters is a reference where they are off
        models.append(model.get_base_model())
    for one in models:
        if not sharded.is_from_first(model):
            check_rows(one)
            continue
        group.only_first(lambda one=one: check_rows(one))
        if not group.is_first():
            take_as_tried(one)


def _rows_of(rows: Sequence[RowT] | Stream[RowT], count: int, step: int, seed: int) -> list[RowT]:
    """The rows of a step, the first of which is 1."""
    if isinstance(rows, Stream):
        return rows.take(count)
    return [rows[i] for i in rows_of_step(len(rows), count, step - 1, seed)]


def _gradient(
    stage_run: StageRun, config: Supervised, objective: Objective[RowT], rows: Sequence[RowT]
) -> dict[str, float]:
    """Add the gradient of this rank's share of a step's loss. It is summed over micro-batches, each divided
    by the denominator of the whole step, so that the split does not change it; so is the one over several
    ranks. Returns the loss and what else was measured, summed alike."""
    denominator, sums = sum(objective.weight(row) for row in rows), dict[str, float]()
    if objective.begin is not None:
        objective.begin(rows)
    share = share_of(config, rows, objective.size)
    with batch_layout.counting() as read, cast_cache():
        for part in share.parts:
            value, measured = objective.loss(part, denominator)
            optim.backward(value)
            add_metrics(sums, {"loss": value.detach(), **measured})
        for part in share.borrowed:
            optim.backward(0.0 * objective.loss(part, denominator)[0])
    own = [row for part in share.parts for row in part]
    size, attended = sum(map(objective.size, own)), 0
    if objective.sequences is not None:
        attended = useful_pairs([one for row in own for one in objective.sequences(row)])
    # rows that begin alike are read together, and then less is read than they have tokens
    stage_run.count("train", min(size, read()), read(), passes=read.passes, pairs=attended)
    return sums
