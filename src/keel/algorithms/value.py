"""The clipped value loss of PPO."""

from __future__ import annotations

import torch
from torch import Tensor

from keel.algorithms.masked import keep, masked_mean


def clipped(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped value loss of the reference code to 1707.06347 and 1909.08593 (no paper states it).

        V_clip = V_old + clip(V − V_old, −ε, ε)        L = mean ½ max((V − R)², (V_clip − R)²)

    values, old_values, returns, mask: (B, T); old_values and returns are constants. clip=inf turns the clip
    off. denominator: the counted positions of the whole optimiser step; with it the losses and metrics of
    micro-batches add up to those of the batch. None means the positions counted in this call.

    Returns the loss and, detached: `clipfrac`, share of positions where the clip raises the loss; `mse`, mean
    (V − R)²; `value`, mean V.
    """
    values, old_values, returns = (
        keep(values, mask),
        keep(old_values.detach(), mask),
        keep(returns.detach(), mask),
    )
    within = old_values + (values - old_values).clamp(-clip, clip)
    error, clipped_error = (values - returns).square(), (within - returns).square()
    loss = masked_mean(0.5 * torch.maximum(error, clipped_error), mask, denominator=denominator)
    with torch.no_grad():
        # within the clip V_clip is V but for its rounding, which raises nothing
        raised = (clipped_error > error) & ((values - old_values).abs() > clip)
        per_token = {"clipfrac": raised, "mse": error, "value": values}
        metrics = {name: masked_mean(x, mask, denominator=denominator) for name, x in per_token.items()}
    return loss, metrics
