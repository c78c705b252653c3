"""Divergences between a student's and a teacher's next-token distributions, position by position.

With π the student's, p the teacher's distribution and M = β p + (1 − β) π, the generalised Jensen–Shannon
divergence of GKD (2306.13649, eq. 1) is

    JSD_β = β KL(p ‖ M) + (1 − β) KL(π ‖ M)        0 < β < 1

As in TRL, β = 0 means the forward KL(p ‖ π) and β = 1 the reverse KL(π ‖ p), the limits of JSD_β / β and
JSD_β / (1 − β). The prefix is a constant: no gradient flows through how it was sampled.

top_k k: the teacher's k likeliest tokens are told apart, all others are one outcome, whose probability under
either model is the sum of theirs. The divergence is taken over these k + 1 outcomes. That is a lower bound
of the whole one (what is put together can only become more alike) with a gradient of its own, 0 where both
models agree on the k and on how much is left; within the rest, the student's proportions stay as they are.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from keel.algorithms.masked import log_softmax


class Compared(NamedTuple):
    """Student and teacher at N positions. Only `loss` has a gradient, and only to the student."""

    loss: Tensor  # (N,) the divergence, in nats
    logp: Tensor  # (N,) log π of the tokens that stand there
    reverse_kl: Tensor  # (N,) KL(π ‖ p), in nats; with top_k over its outcomes
    entropy: Tensor  # (N,) of π, in nats
    teacher_entropy: Tensor  # (N,) of p, in nats; with top_k over its outcomes
    agree: Tensor  # (N,) bool: whether both find the same token the likeliest


def compare(
    logits: Tensor,
    teacher_logits: Tensor,
    tokens: Tensor,
    beta: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Compared:
    """The divergence of a student from a teacher, and what else is measured of the two.

    logits: (N, V) of the student. teacher_logits: (N, V), constants. tokens: (N,) in [0, V). beta: 0 forward
    KL, 1 reverse KL, between them JSD_β. temperature: of both distributions. top_k: see above; None, or
    k ≥ V − 1, tells all tokens apart. Raises ValueError for a beta outside [0, 1], a top_k below 1 and
    logits of two shapes.
    """
    if logits.shape != teacher_logits.shape:
        raise ValueError(f"logits of {tuple(logits.shape)} and of {tuple(teacher_logits.shape)} differ")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be in [0, 1], not {beta}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be 1 or more, not {top_k}")
    if top_k is not None and top_k >= logits.shape[-1] - 1:
        top_k = None
    return Compared(*_Compare.apply(logits, teacher_logits, tokens, beta, temperature, top_k))  # pyright: ignore[reportArgumentType]


class _Compare(torch.autograd.Function):
    """With x the student's logits and T the temperature, ∂/∂x of the divergences is

        reverse KL:  π (log π − log p − KL(π ‖ p)) / T
        forward KL:  (π − p) / T
        JSD_β:       (1 − β) π (log π − log M − KL(π ‖ M)) / T

    It is made in the forward pass, where all of it is at hand, and is all that is kept for the backward. Of
    k + 1 outcomes the last one's is dealt out to the tokens in it by their share of π.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        teacher_logits: Tensor,
        tokens: Tensor,
        beta: float,
        temperature: float,
        top_k: int | None,
    ) -> tuple[Tensor, ...]:
        y = whole = log_softmax(logits, temperature)
        z = log_softmax(teacher_logits, temperature)
        logp = y.gather(-1, tokens[:, None]).squeeze(-1)
        entropy, agree = _entropy(y), y.argmax(dim=-1) == z.argmax(dim=-1)
        chosen = None
        if top_k is not None:
            chosen = z.topk(top_k, dim=-1).indices
            y, z = _coarse(y, chosen), _coarse(z, chosen)
        loss, reverse, gradient = _divergence(y, z, beta)
        if chosen is not None:
            gradient = _dealt_out(gradient, chosen, y, whole)
        if temperature != 1.0:
            gradient = gradient / temperature
        ctx.save_for_backward(gradient.to(logits.dtype))
        found = (loss, logp, reverse.clone(), entropy, _entropy(z), agree)
        ctx.mark_non_differentiable(*found[1:])
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        of_loss = gradients[0]
        given = None if of_loss is None else gradient * of_loss[:, None].to(gradient.dtype)
        return given, None, None, None, None, None


def _divergence(y: Tensor, z: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of log π and log p, (N, K): the divergence and the reverse KL, (N,), and the gradient to the student's
    logits, (N, K), at temperature 1."""
    p, gap = y.exp(), y - z
    reverse = _weighed(p, gap).sum(dim=-1)
    if beta == 1:
        return reverse, reverse, _weighed(p, gap - reverse[:, None])
    q = z.exp()
    if beta == 0:
        return _weighed(q, -gap).sum(dim=-1), reverse, p - q
    mixed = torch.logaddexp(z + math.log(beta), y + math.log1p(-beta))
    above = y - mixed
    of_student = _weighed(p, above).sum(dim=-1)
    loss = beta * _weighed(q, z - mixed).sum(dim=-1) + (1 - beta) * of_student
    return loss, reverse, (1 - beta) * _weighed(p, above - of_student[:, None])


def _weighed(weights: Tensor, values: Tensor) -> Tensor:
    """weights · values, 0 where the weight is 0: 0 · log 0 = 0."""
    return torch.where(weights > 0, weights * values, 0.0)


def _entropy(logp: Tensor) -> Tensor:
    return -_weighed(logp.exp(), logp).sum(dim=-1)


def _coarse(logp: Tensor, chosen: Tensor) -> Tensor:
    """(N, V) → (N, k + 1): the chosen outcomes, and all others as one."""
    rest = logp.scatter(-1, chosen, float("-inf")).logsumexp(dim=-1, keepdim=True)
    return torch.cat([logp.gather(-1, chosen), rest], dim=-1)


def _dealt_out(gradient: Tensor, chosen: Tensor, coarse: Tensor, logp: Tensor) -> Tensor:
    """(N, k + 1) → (N, V): a chosen outcome's own, and of the last one its share. coarse: log π of the
    outcomes."""
    share = (logp - coarse[:, -1:]).exp().nan_to_num(nan=0.0)
    return (share * gradient[:, -1:]).scatter(-1, chosen, gradient[:, :-1])
