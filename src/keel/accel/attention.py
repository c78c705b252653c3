"""Sequences of different lengths without padding: one row of all their tokens for everything that a model
computes token by token, and rows side by side, padded, for attention alone (padding-free batches; 2412.13663
has the unpadding of encoders).

A model is given one row of tokens and a mask that stands for the rows. The kernel here lays queries, keys and
values out by it, calls the kernel that transformers has under "sdpa", and takes from the result what is no
padding. Whether a model hands that mask on as it is, is tried out on it once (`batch_layout`).

The kernel has a name of its own, `keel_sdpa`, for which transformers makes the masks of sdpa. Only the
configs of prepared models carry the name; transformers does not write it into a saved config.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from keel.accel import branch_attention, half_attention
from keel.accel.branch_attention import Branches
from keel.accel.modules import undisturbed
from keel.accel.patches import difference, disabled, enabled, trusted
from keel.accel.processor import has_half_tiles

NAME, PLAIN = "keel_sdpa", "sdpa"
KERNELS = (NAME, PLAIN)  # those that are torch's
_ROWS = "keel_rows"  # the name under which a mask carries what it stands for


@dataclass(frozen=True, slots=True)
class Rows:
    """T tokens as R rows of W, the rest of which is padding; each token sees those before it in its row. A
    token that several rows begin with stands in the first of them, and again in the others."""

    rows: int
    width: int
    where: Tensor  # (T,) each token's place in the flattened (R, W), ascending
    source: Tensor  # (R·W,) the token at each place; 0 at padding
    padding: Tensor  # (P,) places without a token, or with one that stands elsewhere
    again: tuple[Tensor, Tensor] | None = None  # (A,) places with a token that stands elsewhere, and which
    branches: Branches | None = None  # the same rows, in which each token asks once

    @staticmethod
    def of(
        where: Tensor,
        rows: int,
        width: int,
        device: torch.device,
        again: tuple[Tensor, Tensor] | None = None,
        branches: Branches | None = None,
    ) -> Rows:
        """where, again: on the CPU; all else on `device`."""
        source, free = torch.zeros(rows * width, dtype=torch.long), torch.ones(rows * width, dtype=torch.bool)
        source[where], free[where] = torch.arange(len(where)), False
        padding = free.nonzero().squeeze(1)
        if again is not None:
            source[again[0]] = again[1]
            again = again[0].to(device), again[1].to(device)
        return Rows(rows, width, where.to(device), source.to(device), padding.to(device), again, branches)

    def laid_out(self, x: Tensor) -> Tensor:
        """(1, T, …) → (R, W, …); at padding, which nobody sees, the first token's."""
        laid: Any = _LaidOut.apply(x.flatten(0, 1), self)
        return laid.view(self.rows, self.width, *x.shape[2:])

    def taken(self, x: Tensor) -> Tensor:
        """(R, W, …) → (1, T, …)."""
        taken: Any = _Taken.apply(x.flatten(0, 1), self)
        return taken[None]


class _Kept(FunctionCtx):
    rows: Rows


class _LaidOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Kept, x: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return x.index_select(0, rows.source)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Kept, *gradients: Tensor) -> tuple[Tensor, None]:
        rows, (gradient,) = ctx.rows, gradients
        summed = gradient.index_select(0, rows.where)
        if rows.again is not None:
            places, tokens = rows.again
            summed.index_add_(0, tokens, gradient.index_select(0, places))
        return summed, None


class _Taken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Kept, x: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return x.index_select(0, rows.where)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Kept, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].index_select(0, ctx.rows.source).index_fill_(0, ctx.rows.padding, 0), None


def mask_for(rows: Rows, dtype: torch.dtype) -> Tensor:
    """What a model is given as attention mask: (1, 1, 1, 1), by its shape one that transformers hands on as
    it is."""
    mask = torch.zeros(1, 1, 1, 1, dtype=dtype, device=rows.where.device)
    setattr(mask, _ROWS, rows)
    return mask


def rows_of(mask: Tensor | None) -> Rows | None:
    """The rows that a mask stands for, if it is one of these."""
    return getattr(mask, _ROWS, None)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """Transformers' attention by torch's kernels, (B, H, S, D) → (B, S, H, D), on whatever rows the mask
    stands for.

    On a CPU in bfloat16 torch's backward is six times slower than in float32, and without AMX its forward
    three times. Where several positions ask at once there (as they do in training), short rows are attended
    to by `half_attention`, long ones in float32; so is, without AMX, a single position.
    """
    kernel = ALL_ATTENTION_FUNCTIONS[PLAIN]
    rows = rows_of(attention_mask)
    if rows is None and not enabled("attention"):
        return kernel(module, query, key, value, attention_mask, **more)
    several = query.shape[2] > 1 or not has_half_tiles()
    if query.device.type == "cpu" and several and torch.is_autocast_enabled("cpu"):
        half = torch.get_autocast_dtype("cpu") == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            return _attend_cast(module, (query, key, value), attention_mask, more, half=half), None
    if rows is None:
        return kernel(module, query, key, value, attention_mask, **more)
    if branch_attention.fits(module, query, rows.branches, more):
        assert rows.branches is not None
        scale = more.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return branch_attention.branch_attend(query, key, value, rows.branches, scale), None
    query, key, value = (rows.laid_out(x.transpose(1, 2)).transpose(1, 2) for x in (query, key, value))
    return rows.taken(kernel(module, query, key, value, None, **more)[0]), None


def _attend_cast(
    module: nn.Module,
    heads: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    more: dict[str, Any],
    *,
    half: bool,
) -> Tensor:
    """As `attend`, where autocast would have it in half precision on a CPU, of queries, keys and values; (B,
    S, H, D). half: in bfloat16."""
    rows = rows_of(mask)
    query, key, value = heads
    if rows is not None:
        query, key, value = (rows.laid_out(x.transpose(1, 2)).transpose(1, 2) for x in heads)
        mask = None
    if half and half_attention.fits(module, query, key, mask, more):
        attended = half_attention.half_attend(module, query, key, value, mask, more)
    else:
        kernel = ALL_ATTENTION_FUNCTIONS[PLAIN]
        attended = kernel(module, query.float(), key.float(), value.float(), mask, **more)[0]
    return attended if rows is None else rows.taken(attended)


# under a name of its own it changes nothing for models that do not ask for it; at import, so that a pickled
# model, which asks for it, finds it
AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


# ---------------------------------------------------------------- which models use it


def patch_attention(model: nn.Module) -> None:
    """Let a model whose kernel is sdpa use the one here, if its hidden states stay what they are."""
    configs = [config for config in _configs(model) if config._attn_implementation == PLAIN]
    if not configs or not all(map(_takes_any_name, _transformers_of(model))):
        return
    configs = _own_copies(model, configs)
    _rename(configs, NAME)
    trunk = next(_transformers_of(model)).base_model
    if not trusted("attention", model, lambda: _differs(trunk, configs), say=False):
        _rename(configs, PLAIN)


def restore_attention(model: nn.Module) -> None:
    """The opposite of `patch_attention`."""
    _rename([config for config in _configs(model) if config._attn_implementation == NAME], PLAIN)


def _rename(configs: list[PreTrainedConfig], name: str) -> None:
    for config in configs:
        config._attn_implementation = name


def _own_copies(model: nn.Module, configs: list[PreTrainedConfig]) -> list[PreTrainedConfig]:
    """Copies of some configs, in their place in the model: another model may have the same one."""
    copies = {id(config): copy.deepcopy(config) for config in configs}
    for module in model.modules():
        if (config := vars(module).get("config")) is not None and id(config) in copies:
            vars(module)["config"] = copies[id(config)]
    return list(copies.values())


def _configs(model: nn.Module) -> list[PreTrainedConfig]:
    """The configs that a model's modules read, each once."""
    held = (vars(module).get("config") for module in model.modules())
    return list({id(config): config for config in held if isinstance(config, PreTrainedConfig)}.values())


def _transformers_of(model: nn.Module) -> Iterator[PreTrainedModel]:
    return (module for module in model.modules() if isinstance(module, PreTrainedModel))


def _takes_any_name(model: PreTrainedModel) -> bool:
    """Whether the model looks its kernel up by name, and does nothing else by that name; a config with
    configs in it (of images and text) is left alone."""
    try:
        source = inspect.getsource(sys.modules[type(model).__module__])
    except (OSError, TypeError, KeyError):
        return False
    alone = model.config.get_text_config() is model.config
    return alone and "ALL_ATTENTION_FUNCTIONS" in source and '"sdpa"' not in source


def _differs(trunk: nn.Module, configs: list[PreTrainedConfig]) -> str | None:
    """Two rows, one of them padded on the right, with transformers' kernel and with the one here."""
    device = next(trunk.parameters()).device
    ids = torch.tensor([[1, 2, 3, 4, 5], [3, 1, 2, 0, 0]], device=device)
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], device=device)
    states = []
    with undisturbed(trunk), torch.no_grad(), torch.autocast(device.type, enabled=False):
        for name in (NAME, PLAIN):
            _rename(configs, name)
            with disabled():
                found: Any = trunk(input_ids=ids, attention_mask=real)
            states.append(found[0][real.bool()])
    _rename(configs, NAME)
    return difference("states of padded rows", *states)
