"""Masked sums, means and whitening, and log-probabilities of tokens. A mask is True where it counts.

What stands at a position that does not count (padding, a sentinel, NaN, infinity) reaches neither a result
nor a gradient. `keep` is how: it replaces such values before any arithmetic, because 0 · NaN in a backward
pass is NaN, so multiplying by the mask afterwards would be too late.

Half precision is computed in float32; float64 stays float64.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

Reduction = Literal["token", "sequence"] | float
"""How (B, T) becomes one number; see `reduced`."""


def at_least_float32(x: Tensor) -> Tensor:
    """`x` itself if it is float32 or float64, else (half precision, integers, booleans) as float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def keep(x: Tensor, mask: Tensor) -> Tensor:
    """`x` where `mask` is True and 0 elsewhere, in at least float32; shapes broadcast."""
    return torch.where(mask, at_least_float32(x), 0.0)


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of `x` over the counted positions: of all of them, or along `dim`. 0 when none counts."""
    kept = keep(x, mask)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(
    x: Tensor, mask: Tensor, dim: int | None = None, denominator: Tensor | float | None = None
) -> Tensor:
    """Mean of `x` over the counted positions: of all of them, or along `dim`. 0 when none counts, never NaN.

    denominator: divide by this instead of the number of positions counted here. With the number counted in a
    whole optimiser step, the results of its micro-batches add up to the mean over the step, however it was
    split. A denominator of 0 gives 0 (nothing counts anywhere).
    """
    total = masked_sum(x, mask, dim)
    if denominator is None:
        counted = torch.broadcast_to(mask, torch.broadcast_shapes(x.shape, mask.shape))
        denominator = counted.sum() if dim is None else counted.sum(dim)
    divisor = torch.as_tensor(denominator, dtype=total.dtype, device=total.device)
    return total / torch.where(divisor == 0, 1.0, divisor)


def masked_var(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Population variance (divided by n, not n − 1) over the counted positions; 0 when one or none counts."""
    mean = masked_mean(x, mask, dim)
    centred = keep(x, mask) - (mean if dim is None else mean.unsqueeze(dim))
    return masked_mean(centred.square(), mask, dim)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(x − mean) / √(var + 1e-8) over all counted positions; 0 at the others.

    x, mask: any one shape. shift_mean=False adds the mean back (rewards whose sign must stay meaningful).
    The variance is the population's. Where the counted values are all equal (or only one counts), the centred
    values are exactly 0: rounding errors of the mean are not blown up to unit variance.
    """
    values, mean, variance = keep(x, mask), masked_mean(x, mask), masked_var(x, mask)
    low = values.masked_fill(~mask, float("inf")).amin()
    high = values.masked_fill(~mask, float("-inf")).amax()
    centred = torch.where(high > low, values - mean, 0.0)
    whitened = centred * torch.rsqrt(variance + 1e-8)
    return keep(whitened if shift_mean else whitened + mean, mask)


def extent(mask: Tensor) -> Tensor:
    """(B, T) → (B,): the columns up to and with the last counted one of each row; 0 where none counts. Of a
    mask without holes it is the number that counts."""
    if not mask.shape[1]:
        return torch.zeros(len(mask), dtype=torch.long, device=mask.device)
    return (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(dim=1)


def count(mask: Tensor, reduce: Reduction = "token") -> Tensor:
    """What a micro-batch adds to the denominator of `reduced`: counted positions, or sequences that have any.

    mask: (B, T). Returns a 0-dim integer tensor; sum it over the micro-batches of an optimiser step.
    """
    return mask.sum() if reduce == "token" else mask.any(dim=1).sum()


def reduced(
    x: Tensor, mask: Tensor, reduce: Reduction = "token", denominator: Tensor | float | None = None
) -> Tensor:
    """One number from (B, T): the normalisation that a policy loss and everything added to it share.

    "token": the sum over counted positions divided by their number. "sequence": the mean over sequences of
    each one's own mean. A constant length L: each sequence's sum divided by L, averaged over sequences
    (2503.20783). A sequence without any counted position is not a sequence here, so rows of padding change
    nothing.

    denominator: the `count` of the whole optimiser step; None means that of this call.
    Raises ValueError for any other `reduce`.
    """
    if reduce == "token":
        return masked_mean(x, mask, denominator=denominator)
    if reduce == "sequence":
        per_sequence = masked_mean(x, mask, dim=1)
    elif isinstance(reduce, (int, float)) and not isinstance(reduce, bool) and reduce > 0:
        per_sequence = masked_sum(x, mask, dim=1) / reduce
    else:
        raise ValueError(f'reduce must be "token", "sequence" or a positive length, not {reduce!r}')
    return masked_mean(per_sequence, mask.any(dim=1), denominator=denominator)


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) over the last dimension, in at least float32.

    Raises ValueError unless temperature > 0: greedy decoding has no distribution to take a ratio of.
    """
    return torch.log_softmax(_tempered(logits, temperature), dim=-1)


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature in at least float32. ValueError unless temperature > 0."""
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    logits = at_least_float32(logits)
    return logits if temperature == 1.0 else logits / temperature


def token_logp(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log π(id) under softmax(logits / temperature): (…, V) logits and (…) ids → (…).

    Every id must lie in [0, V), also where it will not count.
    """
    return log_softmax(logits, temperature).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """H = −Σ_v π_v log π_v in nats, π = softmax(logits / temperature): (…, V) → (…).

    A token whose logit is −∞ adds 0, to the gradient too.
    """
    logp = log_softmax(logits, temperature)
    logp = logp.masked_fill(logp == float("-inf"), 0.0)  # 0 · log 0 = 0, and e⁰ · 0 is also 0
    return -(logp.exp() * logp).sum(dim=-1)


def token_logp_and_entropy(
    logits: Tensor, ids: Tensor, temperature: float = 1.0, *, with_entropy: bool = True
) -> tuple[Tensor, Tensor]:
    """`token_logp` and `entropy` of the same logits, (N, V) and (N,) → two of (N,), with gradient to both,
    from one softmax and with fewer passes over it: it is all that is kept for the backward pass. with_entropy
    False: the entropies are 0. Raises ValueError unless temperature > 0."""
    return _TokenLogp.apply(logits, ids, temperature, with_entropy)  # pyright: ignore[reportReturnType]


class _Kept(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]
    temperature: float
    dtype: torch.dtype


class _TokenLogp(torch.autograd.Function):
    """With x the logits / T, p = softmax(x), y = log p, H = −Σ_v p_v y_v:
    ∂y_a/∂x = 1_a − p, ∂H/∂x = −p (y + H).

    p is computed once, and is what the backward multiplies with. With m the largest x, whose p is at least
    1/V: y = x − m + log p_m, and H = −log p_m − Σ_v p_v (x_v − m), a sum of what is not negative.
    """

    @staticmethod
    def forward(
        ctx: _Kept, logits: Tensor, ids: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        x = _tempered(logits, temperature)
        p = torch.softmax(x, dim=-1)
        largest, log_largest = x.amax(dim=-1), p.amax(dim=-1).log_()
        logp = (x.gather(-1, ids[:, None]).squeeze(-1) - largest).add_(log_largest)
        h = torch.zeros_like(logp)
        if with_entropy:  # 0 · −∞ is no number; below −10⁴ p is 0 as well
            below = (x - largest[:, None]).clamp_(min=-1e4)
            h = -torch.linalg.vecdot(p, below).add_(log_largest)
        ctx.save_for_backward(p, ids, h)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        ctx.set_materialize_grads(False)
        return logp, h

    @staticmethod
    @once_differentiable
    def backward(ctx: _Kept, *gradients: Tensor | None) -> tuple[Tensor | None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        of_logp, of_entropy = gradients
        p, ids, h = ctx.saved_tensors
        if of_logp is None and of_entropy is None:
            return None, None, None, None
        if of_entropy is None:
            assert of_logp is not None
            found = p * -of_logp[:, None]
        else:
            # where p is 0 its log is −∞, and 0 · −∞ is no number; below −10⁴ p is 0 as well
            factor = p.log().clamp_(min=-1e4).add_(h[:, None]).mul_(-of_entropy[:, None])
            if of_logp is not None:
                factor.sub_(of_logp[:, None])
            found = factor.mul_(p)
        if of_logp is not None:
            found.scatter_add_(-1, ids[:, None], of_logp[:, None])
        if ctx.temperature != 1.0:
            found.div_(ctx.temperature)
        return found.to(ctx.dtype), None, None, None
