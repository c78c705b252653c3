"""Norms and rotations as one step of autograd each, on the CPU.

A root-mean-square norm (1910.07467) is six small operations in transformers' modules and some ten backward,
the rotation of queries and keys (2104.09864) eight and as many; on a CPU a small model spends a third of a
training step there, in reading and writing memory. Here each is one step that keeps only its input: its
result is the module's to the bit, its gradient rounds in another order. A module is changed if it is of such
a kind by what it computes, and its own forward still runs for anything but float32 on the CPU.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, wraps
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from keel.accel.modules import (
    Kept,
    Patched,
    cache_argument,
    patched_class,
    pulled,
    transformed,
    twin_parameters,
)
from keel.accel.patches import difference, disabled, enabled, refuse, tried

# classes that are known to be such norms, and to rotate so
KNOWN = tuple(
    f"{kind}{part}" for kind in ("Llama", "Mistral", "Qwen2", "Qwen3") for part in ("RMSNorm", "Attention")
)
ROTATION = "apply_rotary_pos_emb"  # as transformers' attention modules name it


def patch_norms_and_rope(model: nn.Module) -> nn.Module:
    """Change the model's norms and attention modules where what is here computes the same; the model."""
    verdicts: dict[type[nn.Module], str | None] = {}  # of norms' gradients, by class
    for module in model.modules():
        kind = type(module)
        if isinstance(module, Patched):  # changed already
            continue
        if kind.__name__.endswith("RMSNorm") and _is_norm(module):
            if kind not in verdicts:
                verdicts[kind] = tried(lambda norm=module: _norm_differs(norm, gradients=True))
                if verdicts[kind] is not None and kind.__name__ in KNOWN:
                    refuse("norm_and_rope", kind.__name__, str(verdicts[kind]))
            if verdicts[kind] is None and tried(lambda norm=module: _norm_differs(norm)) is None:
                module.__class__ = _with_norm(kind)  # see `Patched`
        elif (rotation := _rotation_of(kind)) is not None:
            why = _rotation_differs(rotation)
            if why is None:
                module.__class__ = _with_rotation(kind, kind.forward, rotation)
            elif kind.__name__ in KNOWN and kind not in verdicts:
                verdicts[kind] = why
                refuse("norm_and_rope", kind.__name__, why)
    return model


def _ours(*tensors: Tensor) -> bool:
    if transformed() or not enabled("norm_and_rope"):
        return False
    return all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors)


# ---------------------------------------------------------------- norms


class _Norm(torch.autograd.Function):
    """x · weight / √(mean x² + eps) over the last axis."""

    @staticmethod
    def forward(ctx: Kept, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = x.pow(2).mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Kept, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (gradient,) = gradients
        x, weight, scale = ctx.saved_tensors
        unit = x * scale
        both = (gradient * unit).reshape(-1, x.shape[-1])
        of_weight = both.sum(dim=0) if ctx.needs_input_grad[1] else None
        along = torch.mv(both, weight).div_(-x.shape[-1]).view(scale.shape)
        return (gradient * weight).addcmul_(unit, along).mul_(scale), of_weight, None


@cache
def _with_norm(kind: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if _ours(hidden_states, self.weight):
            return _Norm.apply(hidden_states, self.weight, self.variance_epsilon)  # pyright: ignore[reportReturnType]
        return kind.forward(self, hidden_states)  # pyright: ignore[reportReturnType]

    return patched_class(kind, "norm_and_rope", forward)


def _is_norm(module: nn.Module) -> bool:
    """Whether a module has what such a norm computes with."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    right = isinstance(weight, Tensor) and weight.device.type == "cpu" and weight.dtype == torch.float32
    return right and isinstance(eps, float)


def _norm_differs(module: Any, *, gradients: bool = False) -> str | None:
    """The norm's own forward against the one here, on two rows, and with their gradients."""
    forward: Any = type(module).forward
    x = torch.linspace(-2.0, 3.0, 2 * module.weight.shape[-1]).view(2, -1)
    close = {"rough": 1e-4}
    with torch.no_grad(), torch.autocast("cpu", enabled=False), disabled():
        ours: Any = _Norm.apply(x, module.weight, module.variance_epsilon)  # pyright: ignore
        why = difference("values of the norm", ours, forward(module, x), **close)
    if why is not None or not gradients:
        return why
    x.requires_grad_()
    with (
        torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False), disabled(),
        twin_parameters(module) as twins,
    ):  # fmt: skip
        at = [x, *twins]
        ours = _Norm.apply(x, module.weight, module.variance_epsilon)  # pyright: ignore
        pairs = zip(pulled(ours, at), pulled(forward(module, x), at), strict=True)
        return next(
            (why for a, b in pairs if (why := difference("gradients of the norm", a, b, **close))), None
        )


# ---------------------------------------------------------------- rotations


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of halves of x's last axis, turned by angles whose cosines and sines broadcast with it."""
    return _Rotation.apply(x, cos, sin)  # pyright: ignore[reportReturnType]


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Kept, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate_halves(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Kept, *gradients: Tensor) -> tuple[Tensor, None, None]:
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
    forward: Any = inspect.unwrap(kind.forward)  # transformers 5.24 wraps it to rename an argument
    if ROTATION not in getattr(getattr(forward, "__code__", None), "co_names", ()):
        return None
    return forward.__globals__.get(ROTATION)


@cache
def _rotation_differs(rotation: Callable[..., tuple[Tensor, ...]]) -> str | None:
    """transformers' function against the one here, on a few numbers, and with their gradients."""
    angles = torch.linspace(0.1, 2.0, 12).view(1, 3, 4)
    cos, sin = angles.cos(), angles.sin()

    def trial() -> str | None:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            q, k = (x.clone().requires_grad_() for x in torch.linspace(-2.0, 3.0, 2 * 24).view(2, 1, 2, 3, 4))
            theirs = rotation(q, k, cos, sin)
            for x, their in zip((q, k), theirs, strict=True):
                ours = apply_rope(x, cos.unsqueeze(1), sin.unsqueeze(1))
                why = difference("rotated numbers", ours, their, rough=1e-5)
                why = why or difference(
                    "gradients of the rotation", *(pulled(y, [x])[0] for y in (ours, their)), rough=1e-5
                )
                if why is not None:
                    return why
        return None

    return tried(trial)


@cache
def _with_rotation(
    kind: type[nn.Module], own: FunctionType, plain: Callable[..., tuple[Tensor, ...]]
) -> type[nn.Module]:
    """own: the module's forward, in which another function than `plain` stands under the rotation's name."""

    def rotate(*given: Any, **named: Any) -> Any:
        if named or len(given) != 4:  # called otherwise: on one of the two, or along another axis
            return plain(*given, **named)
        q, k, cos, sin = given
        if cos.shape[-1] != q.shape[-1] or not _ours(cos, sin):  # or switched off
            return plain(q, k, cos, sin)
        if not _ours(q, k):  # what autocast made of them; the product with float32 angles is float32
            if q.device.type != "cpu" or q.dtype != torch.bfloat16 or k.dtype != torch.bfloat16:
                return plain(q, k, cos, sin)
            q, k = q.float(), k.float()
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin)

    bare = inspect.unwrap(own)
    forward = FunctionType(
        bare.__code__,
        {**bare.__globals__, ROTATION: rotate},
        bare.__name__,
        bare.__defaults__,
        bare.__closure__,
    )
    forward.__kwdefaults__ = bare.__kwdefaults__
    return patched_class(kind, "norm_and_rope", forward if bare is own else _with_former_names(forward))


def _with_former_names(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that also takes its cache by its name before transformers 5.24, as the wrapped one does."""

    @wraps(forward)
    def renamed(self: nn.Module, *given: Any, **named: Any) -> Any:
        former = named.pop("past_key_values", None)
        if former is not None:
            named[cache_argument(forward)] = former
        return forward(self, *given, **named)

    return renamed
