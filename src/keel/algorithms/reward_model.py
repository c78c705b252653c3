"""The loss of a reward model that learns from comparisons."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from keel.algorithms.masked import at_least_float32


def bradley_terry(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None = None,
    p_chosen: Tensor | None = None,
    center: float = 0.0,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Bradley–Terry (2203.02155, eq. 1) with margin (2307.09288, eq. 2), soft labels, centring (2312.09244).

        Δ = r_chosen − r_rejected
        L = mean −[p log σ(Δ − m) + (1 − p) log σ(−(Δ − m))] + c (r_chosen + r_rejected)²

    chosen, rejected: (B,) scores. margin m: (B,) in reward units, 0 when None. p_chosen p: (B,) in [0, 1],
    the share of the votes for `chosen`; 1 when None. denominator: the pairs of the whole optimiser step; with
    it the losses and metrics of micro-batches add up to those of the batch. None means the pairs of this
    call.

    Returns the loss and, detached: `margin`, mean Δ; `mean_reward`, mean of all scores; and two *sums* over
    the pairs whose label is not a tie (p = ½): `correct`, how many are ranked as the label says (equal scores
    count one half), and `decided`, how many there are. With `denominator` None also `accuracy`, correct /
    decided (0 when none is): a ratio, so never to be averaged over batches; divide the sums instead.
    """
    chosen, rejected = at_least_float32(chosen), at_least_float32(rejected)
    delta = chosen - rejected
    x = delta if margin is None else delta - margin
    p = torch.ones_like(delta) if p_chosen is None else p_chosen.to(delta)
    losses = -(p * logsigmoid(x) + (1 - p) * logsigmoid(-x)) + center * (chosen + rejected).square()
    pairs = max(len(delta), 1) if denominator is None else denominator
    with torch.no_grad():
        decided = p != 0.5
        agreement = (torch.sign(delta) * torch.sign(p - 0.5) + 1) / 2
        correct, number = (agreement * decided).sum(), decided.sum()
        metrics = {
            "margin": delta.sum() / pairs,
            "mean_reward": (chosen + rejected).sum() / (2 * pairs),
            "correct": correct,
            "decided": number.to(correct),
        }
        if denominator is None:
            metrics["accuracy"] = correct / number.clamp(min=1)
    return losses.sum() / pairs, metrics
