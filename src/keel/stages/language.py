"""The loop of language modelling, which pretraining and supervised fine-tuning share; they differ in their rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from keel.algorithms import lm
from keel.config import Supervised
from keel.data.batches import derive_seed, pad, rows_of_step
from keel.evaluation.measures import mean_interval
from keel.models import optim
from keel.models.forward import packed_mask
from keel.models.load import count_parameters
from keel.runlog import StageRun
from keel.stages.update import (
    EarlyStop,
    add_metrics,
    copy_state,
    due,
    lr_scale,
    micro_batches,
    optimizer_for,
    seed_step,
    total_steps,
)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a batch: a stretch of text, an example, or several packed examples."""

    ids: Sequence[int]
    counts: Sequence[bool]  # True at tokens whose prediction is trained
    segments: Sequence[int] | None = None  # packed examples: the number of the example of each token

    @property
    def counted(self) -> int:
        """Tokens in the loss. A row's first token is never predicted, nor is the first of a packed example."""
        starts = (
            0
            if self.segments is None
            else sum(
                self.counts[i] and self.segments[i] != self.segments[i - 1] for i in range(1, len(self.ids))
            )
        )
        return sum(self.counts[1:]) - starts


def loss(
    model: Any, rows: Sequence[Row], pad_id: int, denominator: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Next-token cross-entropy of the counted tokens, divided by `denominator` (those of the whole step)."""
    device = next(model.parameters()).device
    ids, _ = pad([row.ids for row in rows], pad_id)
    counts = pad([row.counts for row in rows], 0)[0].bool()
    if rows[0].segments is None:
        logits = model(input_ids=ids.to(device), use_cache=False).logits
    else:
        segments = pad([row.segments or () for row in rows], -1)[0]
        counts[:, 1:] &= segments[:, 1:] == segments[:, :-1]
        positions = torch.tensor([_positions(row, ids.shape[1]) for row in rows])
        mask = packed_mask(segments.to(device), next(model.parameters()).dtype)
        logits = model(
            input_ids=ids.to(device), attention_mask=mask, position_ids=positions.to(device), use_cache=False
        ).logits
    return lm.cross_entropy(
        logits[:, :-1], ids[:, 1:].to(device), counts[:, 1:].to(device), denominator=denominator
    )


def fit(
    run: StageRun, config: Supervised, model: Any, pad_id: int, rows: Sequence[Row], held_out: Sequence[Row]
) -> dict[str, Any]:
    """Train, evaluate, stop early, checkpoint. Returns the stage's result; the model ends with the weights to keep."""
    steps = total_steps(config, len(rows))
    optimizer = optimizer_for(config, ([model], config.lr))
    stopping, best, seen, first = EarlyStop(config.patience), None, 0, 0
    run.facts |= {
        "rows": len(rows),
        "held_out_rows": len(held_out),
        "parameters": count_parameters(model),
        "steps": steps,
    }
    run.facts["trained_parameters"] = count_parameters(model, trainable=True)
    if checkpoint := run.restore():
        model.load_state_dict(checkpoint.tensors["model"])
        optimizer.load_state_dict(checkpoint.tensors["optimizer"])
        stopping, best = stopping.restored(checkpoint.values["stopping"]), checkpoint.tensors["best"]
        first, seen = checkpoint.step, checkpoint.values["seen"]

    for step in range(first + 1, steps + 1):
        if stopping.stop:
            break
        # 1. the rows of this step, and the tokens that count in them
        chosen = [rows[i] for i in rows_of_step(len(rows), config.batch_size, step - 1, run.seed)]
        tokens = sum(row.counted for row in chosen)
        # 2. the gradient, micro-batch by micro-batch
        model.train()
        seed_step(run.seed, step)
        metrics: dict[str, float] = {"loss": 0.0}
        with run.timed("train"):
            for part in micro_batches(chosen, config.micro_batch):
                value, measured = loss(model, part, pad_id, tokens)
                value.backward()
                add_metrics(metrics, {"loss": value.detach(), "mean_token_accuracy": measured["accuracy"]})
            # 3. the optimiser's step
            stepped = optim.step(
                optimizer, lr_scale(config, step - 1, steps), config.max_grad_norm, f"{run.name}, step {step}"
            )
        seen += sum(len(row.ids) for row in chosen)
        metrics |= {"grad_norm": stepped["grad_norm"], "learning_rate": stepped["lr"]}
        metrics |= {"epoch": step * config.batch_size / len(rows), "num_tokens": seen}
        # 4. held-out rows, and whether to go on
        if held_out and due(step, steps, config.eval_every):
            with run.timed("evaluate"):
                metrics |= evaluate(model, held_out, pad_id, config.micro_batch or config.batch_size)
            stopping = stopping.see(-metrics["eval_loss"])
            if config.patience is not None and stopping.waited == 0:
                best = copy_state(model)
        # 5. what happened, and where to go on from
        run.log(step, steps, metrics)
        if due(step, steps, config.save_every) or stopping.stop:
            tensors = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "best": best}
            run.save(step, tensors, {"stopping": stopping.values(), "seen": seen})

    if best is not None:
        model.load_state_dict(best)
    return summary(model, held_out, pad_id, config.micro_batch or config.batch_size)


def evaluate(model: Any, rows: Sequence[Row], pad_id: int, batch_size: int) -> dict[str, float]:
    """Loss and accuracy per counted token over all rows (not a mean of batch means)."""
    tokens = sum(row.counted for row in rows)
    totals: dict[str, float] = {}
    model.eval()
    with torch.no_grad():
        for part in micro_batches(rows, batch_size):
            value, measured = loss(model, part, pad_id, tokens)
            add_metrics(totals, {"eval_loss": value, "eval_mean_token_accuracy": measured["accuracy"]})
    return totals


def summary(model: Any, rows: Sequence[Row], pad_id: int, batch_size: int) -> dict[str, Any]:
    """The held-out loss with an interval over rows, each row weighing by its tokens."""
    if not rows:
        return {}
    totals = evaluate(model, rows, pad_id, batch_size)
    per_row, tokens = [], sum(row.counted for row in rows)
    with torch.no_grad():
        for row in rows:
            per_row.append(float(loss(model, [row], pad_id, tokens / len(rows))[0]))
    interval = mean_interval(per_row)
    accuracy = {"mean": totals["eval_mean_token_accuracy"], "n": tokens}
    return {
        "eval_loss": interval,
        "perplexity": math.exp(min(interval["mean"], 50.0)),
        "mean_token_accuracy": accuracy["mean"],
    }


def _positions(row: Row, width: int) -> list[int]:
    """Position of each token within its own example; 0 at padding."""
    positions, segments = [], row.segments or ()
    for i, segment in enumerate(segments):
        positions.append(positions[-1] + 1 if i and segments[i - 1] == segment else 0)
    return positions + [0] * (width - len(positions))


def model_seed(run: StageRun) -> int:
    return derive_seed(run.seed, "model")
