"""Language modelling, which pretraining and supervised fine-tuning share; they differ in their rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from keel.accel.cpu_linear import cast_cache
from keel.algorithms import lm
from keel.config import Supervised
from keel.data.batches import derive_seed, pad
from keel.distributed import group, sharded
from keel.evaluation.measures import mean_interval
from keel.models import experts
from keel.models.logprobs import TokenLogprobs, head_inputs, token_logprobs
from keel.models.packing import packed_inputs
from keel.rundir.stage_run import StageRun
from keel.stages import supervised_loop
from keel.stages.loop_utils import add_metrics, forward_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class LanguageRow:
    """One row of a batch: a stretch of text, an example, or several packed examples."""

    ids: Sequence[int]
    counts: Sequence[bool]  # True at tokens whose prediction is trained
    segments: Sequence[int] | None = None  # packed examples: the number of the example of each token

    @property
    def counted(self) -> int:
        """Tokens in the loss. A row's first token is never predicted, nor is the first of a packed
        example."""
        starts = (
            0
            if self.segments is None
            else sum(
                self.counts[i] and self.segments[i] != self.segments[i - 1] for i in range(1, len(self.ids))
            )
        )
        return sum(self.counts[1:]) - starts


def loss(
    model: PreTrainedModel, rows: Sequence[LanguageRow], pad_id: int, denominator: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Next-token cross-entropy of the counted tokens, divided by `denominator` (those of the whole step);
    while training with the balancing loss of experts, where the model has one."""
    predicted, of_row, routed = _predicted(model, rows, pad_id)
    value, measured = lm.likelihood(predicted.logp, predicted.hits, denominator)
    value, of_experts = routed.added_to(value, len(of_row) / denominator)
    return value, measured | of_experts


def _predicted(
    model: PreTrainedModel, rows: Sequence[LanguageRow], pad_id: int
) -> tuple[TokenLogprobs, Tensor, experts.Routed]:
    """Of the N counted tokens of the rows: their log-probabilities and whether each was the likeliest, the
    row of each (N,), on the CPU, and what experts were asked."""
    device = sharded.device_of(model)
    ids, _ = pad([row.ids for row in rows], pad_id)
    counts = pad([row.counts for row in rows], 0)[0].bool()[:, 1:]
    more: dict[str, Any] = {}
    if rows[0].segments is not None:
        segments = pad([row.segments or () for row in rows], -1)[0]
        counts &= segments[:, 1:] == segments[:, :-1]
        more = packed_inputs(model, segments)
    row_index, column = counts.nonzero(as_tuple=True)
    index = row_index * ids.shape[1] + column  # of the token before each that counts
    labels = ids.flatten()[index + 1].to(device)
    lengths = torch.tensor([len(row.ids) for row in rows])
    with experts.collecting(model) as routed:
        given = head_inputs(model, ids.to(device), index.to(device), inputs=more, lengths=lengths)
    return token_logprobs(given, labels, hits=True), row_index, routed


def fit(
    stage_run: StageRun,
    config: Supervised,
    model: PreTrainedModel,
    pad_id: int,
    rows: Sequence[LanguageRow] | supervised_loop.Stream[LanguageRow],
    held_out: Sequence[LanguageRow],
) -> dict[str, Any]:
    """Train on the rows and return the stage's result; the model ends with the weights to keep."""

    def part(rows: Sequence[LanguageRow], denominator: float) -> tuple[Tensor, dict[str, Tensor]]:
        value, measured = loss(model, rows, pad_id, denominator)
        return value, {"mean_token_accuracy": measured.pop("accuracy"), **_of_experts(measured)}

    objective: supervised_loop.Objective[LanguageRow] = supervised_loop.Objective(
        loss=part, weight=lambda row: row.counted, size=_size, length=_size, sequences=_sequences,
        evaluate=lambda rows: evaluate(model, rows, pad_id, config),
    )  # fmt: skip
    supervised_loop.fit(stage_run, config, model, rows, held_out, objective)
    return summary(model, held_out, pad_id, config)


def _of_experts(measured: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in measured.items() if name == "router_aux_loss"}


def _size(row: LanguageRow) -> int:
    return len(row.ids)


def _sequences(row: LanguageRow) -> list[tuple[tuple[int, ...], int]]:
    """The row, or each of its packed examples: none has a prompt that another one shares."""
    if row.segments is None:
        return [((), len(row.ids))]
    return [((), len(list(own))) for _, own in itertools.groupby(row.segments)]


@cast_cache()
def evaluate(
    model: PreTrainedModel, rows: Sequence[LanguageRow], pad_id: int, config: Supervised
) -> dict[str, float]:
    """Loss and accuracy per counted token over all rows (not a mean of batch means)."""
    tokens = sum(row.counted for row in rows)
    totals: dict[str, float] = {}
    model.eval()

    def measures(part: Sequence[int]) -> dict[str, float]:
        value, measured = loss(model, [rows[i] for i in part], pad_id, tokens)
        return {"eval_loss": float(value), "eval_mean_token_accuracy": float(measured["accuracy"])}

    with torch.no_grad():
        for found in group.mapped(forward_parts(config, [_size(row) for row in rows]), measures):
            add_metrics(totals, found)
    return totals


@cast_cache()
def summary(
    model: PreTrainedModel, rows: Sequence[LanguageRow], pad_id: int, config: Supervised
) -> dict[str, Any]:
    """The held-out loss with an interval over rows, each row weighing by its tokens."""
    if not rows:
        return {}
    tokens = sum(row.counted for row in rows)
    model.eval()

    def sums(part: Sequence[int]) -> list[tuple[int, list[float]]]:
        """(row, [−Σ log p, hits]) of the rows of a part."""
        predicted, of_row, _ = _predicted(model, [rows[i] for i in part], pad_id)
        each = torch.stack([-predicted.logp.double(), predicted.hits.double()], 1).cpu()
        return list(zip(part, each.new_zeros(len(part), 2).index_add_(0, of_row, each).tolist(), strict=True))

    with torch.no_grad():
        parts = group.mapped(forward_parts(config, [_size(row) for row in rows]), sums)
    by_row = dict(found for part in parts for found in part)
    interval = mean_interval([by_row[i][0] * len(rows) / tokens for i in range(len(rows))])
    return {
        "eval_loss": interval,
        "perplexity": math.exp(min(interval["mean"], 50.0)),
        "mean_token_accuracy": sum(hits for _, hits in by_row.values()) / tokens,
    }


def model_seed(stage_run: StageRun) -> int:
    """The seed of what a stage's model is initialised with: new weights, or adapters."""
    return derive_seed(stage_run.seed, "model")
