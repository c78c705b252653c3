"""The gradient of an embedding in half precision on the CPU, summed in float32.

torch adds what the tokens of a batch send back one after the other, in the precision of the weights. In
bfloat16 a sum that has come to 256 no longer grows by ones: of a token that is met a thousand times a batch
the larger part is lost, and the gradient of all embeddings was 12 % off in a batch of 8,192 tokens where
those of other weights were off by 0.5 %. Here a row's sum is taken in float32 and rounded once. It holds a
float32 row for each distinct token of the batch. The values are torch's own to the bit. Left to torch:
embeddings of a class of their own (Gemma's), sparse ones, and those scaled by frequency or by a largest norm.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from keel.accel.modules import Kept, patched_class, transformed
from keel.accel.patches import difference, enabled, refuse, tried

HALF = (torch.float16, torch.bfloat16)


def patch_embeddings(model: nn.Module) -> nn.Module:
    """Change the model's embeddings in half precision on the CPU; the model."""
    fitting: list[nn.Module] = [m for m in model.modules() if type(m) is nn.Embedding and _fits(m)]
    if fitting and (why := _tried()) is not None:
        refuse("half_embedding", "nn.Embedding", why)
        return model
    for module in fitting:
        module.__class__ = _with_sums(nn.Embedding)  # see `Patched`
    return model


def _fits(module: nn.Embedding) -> bool:
    half = module.weight.dtype in HALF and module.weight.device.type == "cpu"
    return half and not (module.sparse or module.scale_grad_by_freq or module.max_norm is not None)


class _Lookup(torch.autograd.Function):
    """Rows of a table (V, d) by ids (…): (…, d). Ids equal to `pad` send nothing back."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, pad: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows, ctx.pad = len(table), pad
        return F.embedding(ids, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Kept, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,), (ids,) = gradients, ctx.saved_tensors
        rows, pad = ctx.rows, ctx.pad  # pyright: ignore[reportAttributeAccessIssue]
        met, place = ids.reshape(-1).unique(return_inverse=True)
        flat = gradient.reshape(-1, gradient.shape[-1]).float()
        sums = flat.new_zeros(len(met), flat.shape[-1]).index_add_(0, place, flat)
        if pad is not None:
            sums[met == pad] = 0.0
        return (
            gradient.new_zeros(rows, flat.shape[-1]).index_copy_(0, met, sums.to(gradient.dtype)),
            None,
            None,
        )


@cache
def _with_sums(kind: type[nn.Embedding]) -> type[nn.Module]:
    def forward(self: Any, input: Tensor) -> Tensor:
        learns = self.weight.requires_grad and torch.is_grad_enabled()
        if learns and _fits(self) and enabled("half_embedding") and not transformed():
            return _Lookup.apply(self.weight, input, self.padding_idx)  # pyright: ignore[reportReturnType]
        return kind.forward(self, input)

    return patched_class(kind, "half_embedding", forward)


@cache
def _tried() -> str | None:
    """The sums here against torch's in float64, of three tokens that come several times each."""

    def trial() -> str | None:
        ids = torch.tensor([[0, 2, 2, 3], [3, 3, 0, 2]])
        pull = torch.linspace(-1.0, 2.0, 32).view(2, 4, 4).bfloat16()
        found = []
        for dtype, lookup in ((torch.bfloat16, _Lookup.apply), (torch.float64, _torchs)):
            table = torch.linspace(-2.0, 3.0, 20).view(5, 4).bfloat16().to(dtype).requires_grad_()
            with torch.enable_grad():
                read: Any = lookup(table, ids, 3)
            found.append((read, *torch.autograd.grad(read, table, pull.to(dtype))))
        (ours, pulled), (theirs, exact) = found
        return difference("values", ours, theirs) or difference("gradients", pulled, exact, rough=1e-2)

    return tried(trial)


def _torchs(table: Tensor, ids: Tensor, pad: int | None) -> Tensor:
    return F.embedding(ids, table, padding_idx=pad)
