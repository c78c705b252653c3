"""Controllers of a run's coefficients: plain numbers in, plain numbers out."""

from __future__ import annotations

import math
from typing import Literal


def adaptive_kl(coef: float, kl: float, target: float, episodes: int, horizon: float) -> float:
    """The next KL coefficient β (1909.08593, section 2.2).

        e = clip(KL / target − 1, −0.2, 0.2)        β ← β (1 + e · episodes / horizon)

    kl and target are in the same unit: nats per *response*, a sum over its tokens, averaged over responses.
    episodes: responses sampled since the last call. Departure: episodes / horizon counts as 1 at most, since
    above 5 the paper's factor turns negative and the KL would be maximised.
    Raises ValueError if kl is NaN, or target or horizon is not above 0.
    """
    if math.isnan(kl):
        raise ValueError("the KL is NaN: there is nothing to adapt its coefficient to")
    if not (target > 0 and horizon > 0):
        raise ValueError(f"target and horizon must be above 0, not {target} and {horizon}")
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * min(episodes / horizon, 1.0))


SLOWEST, FASTER = 0.5, 1.1  # factors on the share from one update to the next
FLOOR = 1 / 64  # below which the share is not cut: what the measure then shows is no step's doing


def kl_adaptive_lr(lr_factor: float, kl: float, limit: float) -> float:
    """The next share, in (0, 1], of the learning rate, after an update that measured `kl` from its own start.

    kl and limit are in nats a token. To second order the KL of a step grows with the square of its length
    (1502.05477), so that √(limit / kl) of the share would have stayed within the limit; a cut is to a half at
    most and never below 1/64, and within the limit the share recovers by a tenth, to 1 at most.
    """
    if kl > limit:
        return max(FLOOR, lr_factor * max(SLOWEST, math.sqrt(limit / kl)))
    return min(1.0, lr_factor * FASTER)


def schedule(
    step: int,
    total: int,
    warmup: int,
    kind: Literal["linear", "cosine", "constant"] = "cosine",
    floor: float = 0.0,
) -> float:
    """The factor, in [0, 1], on the peak learning rate at `step`, counted from 0, of `total` optimiser steps.

    It rises over the first `warmup` steps, 1/warmup, 2/warmup, … 1 (never 0: no step is wasted), then falls
    linearly or along a cosine towards `floor`, which it would reach at step `total`; "constant" stays at 1.
    Raises ValueError for an unknown kind.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    match kind:
        case "constant":
            return 1.0
        case "linear":
            return floor + (1 - floor) * (1 - progress)
        case "cosine":
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    raise ValueError(f"kind must be linear, cosine or constant, not {kind!r}")
