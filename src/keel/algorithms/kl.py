"""KL divergence from the reference: estimates from sampled tokens, and the exact sum over the vocabulary."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from keel.algorithms.masked import keep, log_softmax

Kind = Literal["k1", "k2", "k3"]


def estimate(logp: Tensor, ref_logp: Tensor, kind: Kind, mask: Tensor | None = None) -> Tensor:
    """Per-token estimates of KL(π ‖ π_ref) from tokens sampled from π, in nats.

    By J. Schulman, joschu.net/blog/kl-approx.html.

    With d = log π(a|s) − log π_ref(a|s):
        k1 = d                unbiased; single values may be negative
        k2 = ½ d²             biased; never negative
        k3 = e^(−d) − 1 + d   unbiased; never negative

    That is about values. Their *gradients*, when the estimate is used as a loss on on-policy samples
    (2510.01555):
        k1   E[∇d] = E[∇log π] = 0: as a loss it constrains nothing
        k2   E[d ∇log π] = ∇KL(π ‖ π_ref): the right one
        k3   E[(1 − π_ref/π) ∇log π] = ∇KL(π_ref ‖ π): that of the *forward* KL
    So k1 or k3 belong in the reward, and k2 in the loss.

    logp, ref_logp: any one shape. mask: the same shape; where it is False the result is 0, whatever the
    inputs hold. Raises ValueError for an unknown kind.
    """
    if mask is not None:
        logp, ref_logp = keep(logp, mask), keep(ref_logp, mask)
    d = logp - ref_logp
    match kind:
        case "k1":
            return d
        case "k2":
            return 0.5 * d.square()
        case "k3":
            return torch.expm1(-d) + d
    raise ValueError(f"kind must be k1, k2 or k3, not {kind!r}")


def exact(logits: Tensor, ref_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(π ‖ π_ref) = Σ_v π_v (log π_v − log π_ref,v) at each position, in nats: (…, V) → (…).

    Both distributions are taken at `temperature`, that of sampling. A token that π excludes (logit −∞) adds
    0; one that only π_ref excludes makes the KL infinite, as it is.
    """
    return between(log_softmax(logits, temperature), log_softmax(ref_logits, temperature))


def between(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """`exact` of log-probabilities over the vocabulary, both (…, V)."""
    gap = (logp - ref_logp).masked_fill(logp == float("-inf"), 0.0)
    return (logp.exp() * gap).sum(dim=-1)
