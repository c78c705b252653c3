"""Norms and rotations as one step of autograd each, on the CPU.

A root-mean-square norm (1910.07467) is six small operations in transformers' modules and some ten backward,
the rotation of queries and keys (2104.09864) eight and as many; on a CPU a small model spends a third of a
training step there, in reading and writing memory. Here each is one step that keeps only its input: its
result is the module's to the bit, its gradient rounds in another order. A module is changed if it is of such
a kind by what it computes, and its own forward still runs for anything but float32 on the CPU.
"""

from __future__ import annotations

from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ROTATION = "apply_rotary_pos_emb"  # as transformers' attention modules name it


def patch_norms_and_rope(model: nn.Module) -> nn.Module:
    """Change the model's norms and attention modules where what is here computes the same; the model."""
    for module in model.modules():
        kind = type(module)
        if kind.__module__ == __name__:  # changed already
            continue
        if kind.__name__.endswith("RMSNorm") and _same_norm(module):
            module.__class__ = _with_norm(kind)
        elif (rotation := _rotation_of(kind)) is not None and _same_rotation(rotation):
            module.__class__ = _with_rotation(kind)
    return model


def _ours(*tensors: Tensor) -> bool:
    return all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors)


# ---------------------------------------------------------------- norms


class _Norm(torch.autograd.Function):
    """x · weight / √(mean x² + eps) over the last axis."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = x.pow(2).mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (gradient,) = gradients
        x, weight, scale = ctx.saved_tensors
        unit = x * scale
        both = (gradient * unit).reshape(-1, x.shape[-1])
        of_weight = both.sum(dim=0) if ctx.needs_input_grad[1] else None
        along = torch.mv(both, weight).div_(-x.shape[-1]).view(scale.shape)
        return (gradient * weight).addcmul_(unit, along).mul_(scale), of_weight, None


@cache
def _with_norm(kind: type[nn.Module]) -> type[nn.Module]:
    plain = kind.forward

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if _ours(hidden_states, self.weight):
            return _Norm.apply(hidden_states, self.weight, self.variance_epsilon)  # pyright: ignore[reportReturnType]
        return plain(self, hidden_states)

    return type(kind.__name__, (kind,), {"forward": forward})


def _same_norm(module: Any) -> bool:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not isinstance(weight, Tensor) or not isinstance(eps, float) or not _ours(weight):
        return False
    x = torch.linspace(-2.0, 3.0, 2 * weight.shape[-1]).view(2, -1)
    with torch.no_grad():
        return torch.allclose(module(x), _Norm.apply(x, weight, eps), rtol=1e-4, atol=1e-6)  # pyright: ignore[reportArgumentType]


# ---------------------------------------------------------------- rotations


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of halves of x's last axis, turned by angles whose cosines and sines broadcast with it."""
    return _Rotation.apply(x, cos, sin)  # pyright: ignore[reportReturnType]


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate_halves(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        swapped = torch.cat(sin.chunk(2, dim=-1)[::-1], dim=-1)
        return _rotate_halves(gradients[0], cos, swapped, -1), None, None


def _rotate_halves(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """sign: -1 the other way."""
    half = x.shape[-1] // 2
    turned = x * cos
    turned[..., :half].sub_(x[..., half:] * sin[..., :half], alpha=sign)
    turned[..., half:].add_(x[..., :half] * sin[..., half:], alpha=sign)
    return turned


def _rotation_of(kind: type[nn.Module]) -> Any:
    """The function by which the module's forward rotates; None if it does not."""
    forward: Any = kind.forward
    if ROTATION not in getattr(getattr(forward, "__code__", None), "co_names", ()):
        return None
    return forward.__globals__.get(ROTATION)


@cache
def _same_rotation(rotation: Any) -> bool:
    q, k = torch.linspace(-2.0, 3.0, 2 * 24).view(2, 1, 2, 3, 4)
    angles = torch.linspace(0.1, 2.0, 12).view(1, 3, 4)
    cos, sin = angles.cos(), angles.sin()
    try:
        theirs = rotation(q, k, cos, sin)
    except (TypeError, ValueError, RuntimeError):  # another function under the same name
        return False
    ours = (_rotate_halves(x, cos.unsqueeze(1), sin.unsqueeze(1), 1) for x in (q, k))
    return all(
        a.shape == b.shape and torch.allclose(a, b, atol=1e-6) for a, b in zip(theirs, ours, strict=True)
    )


@cache
def _with_rotation(kind: type[nn.Module]) -> type[nn.Module]:
    """The module's own forward, in which another function stands under the rotation's name."""
    own: Any = kind.forward
    plain = _rotation_of(kind)

    def rotate(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any
    ) -> tuple[Tensor, ...]:
        if more or named or cos.shape[-1] != q.shape[-1] or not _ours(cos, sin):
            return plain(q, k, cos, sin, *more, **named)
        if not _ours(q, k):  # what autocast made of them; the product with float32 angles is float32
            if q.device.type != "cpu" or q.dtype != torch.bfloat16 or k.dtype != torch.bfloat16:
                return plain(q, k, cos, sin)
            q, k = q.float(), k.float()
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin)

    forward = FunctionType(
        own.__code__, {**own.__globals__, ROTATION: rotate}, own.__name__, own.__defaults__, own.__closure__
    )
    forward.__kwdefaults__ = own.__kwdefaults__
    return type(kind.__name__, (kind,), {"forward": forward})
