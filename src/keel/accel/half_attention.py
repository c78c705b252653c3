"""Attention of short rows in bfloat16, forward and backward, on the CPU.

torch's own kernel (flash attention) is no faster in bfloat16 than in float32 there, and its backward six
times slower: its tiles are converted by hand. So attention was computed in float32 while all other products
were in bfloat16, and had become a quarter of a training step. Here it is five batched products that oneDNN
takes in bfloat16, with a softmax in float32 between them, as one step of autograd: half the time for rows of
up to some hundred tokens.

What it costs: the probabilities are kept for the backward (2 bytes for each pair of tokens and head), which
the flash kernel makes again. So long rows go the old way. Scores and probabilities are rounded to bfloat16,
as transformers' own eager attention rounds them under autocast. Left out: dropout, caps on scores, and
gradients of gradients.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import repeat_kv

from keel.accel.patches import difference, enabled, gradients_differ, refuse, tried

AT_MOST = 256  # tokens of a row
KEPT_AT_MOST = 2**26  # bytes of probabilities of one layer
# what a kernel may be given, and is not known here
_LEFT_OUT = ("softcap", "position_bias", "cache", "s_aux")


def fits(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, more: dict[str, Any]) -> bool:
    """Whether attention of (B, H, Q, D) queries to (B, H', K, D) keys is computed here, under autocast to
    bfloat16 on the CPU."""
    rows, heads, asking, _ = query.shape
    keys = key.shape[2]
    if not 1 < asking <= keys <= AT_MOST or 2 * rows * heads * asking * keys > KEPT_AT_MOST:
        return False
    if more.get("dropout") or any(more.get(name) is not None for name in _LEFT_OUT):
        return False
    causal = more.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if mask is None and not (causal is True and asking == keys):
        return False
    known = query.dtype in (torch.float32, torch.bfloat16)
    return known and enabled("half_attention") and _is_right()


def half_attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, more: dict[str, Any]
) -> Tensor:
    """(B, H, Q, D) → (B, Q, H, D) in bfloat16; what `fits` says yes to. mask: additive, or bool and True
    where a key is seen, (B or 1, 1, Q, K); None: each token sees those before it and itself."""
    groups = getattr(module, "num_key_value_groups", 1)
    key, value = (repeat_kv(x.to(torch.bfloat16), groups) for x in (key, value))
    scale = more.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    rows, heads, asking, width = query.shape
    flat = (x.to(torch.bfloat16).reshape(rows * heads, -1, width) for x in (query, key, value))
    attended: Any = _Attention.apply(*flat, scale, _additive(mask, asking, query.device), heads)
    return attended.view(rows, heads, asking, -1).transpose(1, 2)


def _additive(mask: Tensor | None, length: int, device: torch.device) -> Tensor:
    """(B or 1, 1, Q, K) in float32, to be added to scores."""
    if mask is None:
        return torch.full((1, 1, length, length), torch.finfo(torch.float32).min, device=device).triu_(1)
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, device=device).masked_fill_(~mask, torch.finfo(torch.float32).min)
    return mask.float()


class _Kept(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]
    scale: float


class _Attention(torch.autograd.Function):
    """P = softmax(scale · Q Kᵀ + mask), O = P V. With G the gradient of O: dV = Pᵀ G, dP = G Vᵀ,
    dS = P (dP − Σ P dP), dQ = scale · dS K, dK = scale · dSᵀ Q. q, k, v: (B·H, …, D) in bfloat16."""

    @staticmethod
    def forward(
        ctx: _Kept, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor, heads: int
    ) -> Tensor:
        scores = torch.bmm(q, k.transpose(1, 2)).float().mul_(scale)
        scores.view(-1, heads, *scores.shape[1:]).add_(mask)
        p = torch.softmax(scores, dim=-1).to(torch.bfloat16)
        ctx.save_for_backward(q, k, v, p)
        ctx.scale = scale
        return torch.bmm(p, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Kept, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        q, k, v, p = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        of_v = torch.bmm(p.transpose(1, 2), gradient)
        of_p = torch.bmm(gradient, v.transpose(1, 2)).float()
        of_scores = torch.ops.aten._softmax_backward_data(of_p, p.float(), -1, torch.float32).mul_(ctx.scale)
        of_scores = of_scores.to(torch.bfloat16)
        return torch.bmm(of_scores, k), torch.bmm(of_scores.transpose(1, 2), q), of_v, None, None, None


# ---------------------------------------------------------------- self-test


def _is_right() -> bool:
    return _differs() is None


@cache
def _differs() -> str | None:
    """torch's own kernel in float32 against `_Attention`, by values and gradients, causal and under a mask.
    Of torch, not of a model: once."""

    def trial() -> str | None:
        shape = (2, 2, 9, 16)
        given = [torch.linspace(-20, 30 + i, 2 * 2 * 9 * 16).sin().view(shape) for i in range(3)]
        seen = (torch.arange(9)[:, None] >= torch.arange(9)) & (torch.arange(9) != 1) | torch.eye(9).bool()
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            for mask in (None, seen[None, None]):
                at = [x.to(torch.bfloat16).requires_grad_() for x in given]
                plain = [x.detach().float().requires_grad_() for x in at]
                ours = half_attend(nn.Identity(), at[0], at[1], at[2], mask, {}).float()
                q, k, v = plain
                theirs = scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None).transpose(1, 2)
                pull = torch.linspace(-3, 4, ours.numel()).cos().view(ours.shape)
                found = torch.autograd.grad(ours, at, pull)
                expected = [x.to(torch.bfloat16) for x in torch.autograd.grad(theirs, plain, pull)]
                why = difference("attention in bfloat16", ours, theirs, rough=5e-2)
                why = why or gradients_differ("gradients of attention in bfloat16", found, expected)
                if why is not None:
                    return why
        return None

    why = tried(trial)
    if why is not None:
        refuse("half_attention", "torch", why)
    return why
