"""A decode step whose shapes do not change, for the models of `lean`: what can be recorded once and replayed.

`lean.Step` has other shapes in every step: the newest column moves, rows come and go. Here the shapes are a
number of rows and a width, both from a short list; what changes in between (tokens, the newest column, where
each row begins) stands in tensors that are written before the step. Rows beyond those in use compute what
nobody reads. They see what is left of earlier rows in the cache, or zeros, so that they are finite where the
model is.

Nothing in here knows of graphs: it computes on every device, and tests compare it with `lean.Step` on the
CPU.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from keel.accel import decode_step
from keel.accel.kv_slots import Slots
from keel.accel.modules import plain_of

COLUMNS = 128  # widths are multiples of it
HALVINGS = 3  # of the rows


def rows_of(slots: Slots) -> int:
    """The rows that a step computes: as many as there are slots, or a half, a quarter, an eighth of them."""
    sizes = (math.ceil(slots.capacity / 2**halvings) for halvings in range(HALVINGS, -1, -1))
    return next(size for size in sizes if size >= len(slots))


def width_of(slots: Slots) -> int:
    """The columns that a step reads: 1, 2, 3, 4, 6, 8, 12, 16 … times `COLUMNS`, but no more than there
    are."""
    needed, size = math.ceil((slots.column + 1) / COLUMNS), 1
    while size < needed:
        size = size * 3 // 2 if size & (size - 1) == 0 and size > 1 else 1 << size.bit_length()
    return min(size * COLUMNS, slots.columns)


class Bf16Copies:
    """A model's matrices in the type that autocast would cast them to, where they stay: autocast itself
    either casts in every step, or keeps casts that are gone with it. None without autocast."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._held: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []
        if not torch.is_autocast_enabled(device.type):
            return
        dtype, made = torch.get_autocast_dtype(device.type), dict[nn.Parameter, nn.Parameter]()
        for module in model.modules():
            if not isinstance(module, nn.Linear):
                continue
            for name, own in module.named_parameters(recurse=False):
                if own.dtype == torch.float32:
                    if own not in made:
                        made[own] = nn.Parameter(torch.empty_like(own, dtype=dtype), requires_grad=False)
                    self._held.append((module, name, own, made[own]))

    @property
    def tensors(self) -> list[Tensor]:
        """Each once."""
        return list({copy.data_ptr(): copy for *_, copy in self._held}.values())

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it, the linear layers multiply with casts of what their weights are now. A matrix that is
        embedding and head stays what it is as an embedding."""
        try:
            for module, name, own, copy in self._held:
                copy.copy_(own)
                module._parameters[name] = copy
            yield
        finally:
            for module, name, own, _ in self._held:
                module._parameters[name] = own


class Static:
    """The step of one model, with the cache, inputs and outputs that it works on."""

    def __init__(self, model: nn.Module) -> None:
        self._model: Callable[[], Any] = weakref.ref(model)  # whoever keeps a step must not keep the model
        self._device = next(model.parameters()).device
        self.rows = self.columns = 0  # of the cache
        self.cache: list[tuple[Tensor, Tensor]] = []  # each layer's k, v: (rows, heads, columns, d)

    @property
    def tensors(self) -> list[Tensor]:
        """What is held between steps."""
        if not self.rows:
            return []
        return [*(held for layer in self.cache for held in layer), self.logits, self.hidden]

    def take(self, ids: Tensor, slots: Slots, *, moved: bool) -> None:
        """Write the inputs: (n,) newest tokens; moved: whether other rows are in the slots than before, or
        elsewhere."""
        n = len(ids)
        self.ids[:n] = ids
        self.column.fill_(slots.column)
        if moved:
            self.starts[:n] = slots.starts
            self.starts[n:] = 0  # so that rows of which nobody reads anything have columns to look at

    def make(self, rows: int, columns: int) -> None:
        """A cache for so many rows and columns, and what belongs to it. What there was is gone."""
        self.cache, self.rows, self.columns = [], 0, 0  # before there is another
        # rows of which nobody reads anything may stand at any position
        table = decode_step.Step(self._model(), columns)
        plain = table.model
        self.cos, self.sin, self.half = table.cos, table.sin, table.half
        self.heads, self.groups = table.heads, table.groups
        embedded = plain.model.embed_tokens(torch.zeros(1, dtype=torch.long, device=self._device))
        value = plain.model.layers[0].self_attn.v_proj(embedded).view(self.groups, -1)
        shape = (rows, self.groups, columns, value.shape[1])
        self.cache = [(value.new_zeros(shape), value.new_zeros(shape)) for _ in plain.model.layers]
        self.ids, self.starts = (torch.zeros(rows, dtype=torch.long, device=self._device) for _ in range(2))
        self.column = torch.zeros(1, dtype=torch.long, device=self._device)
        self._index = torch.arange(columns, device=self._device)
        logits, hidden = self._step(1, min(COLUMNS, columns))
        self.logits, self.hidden = (x.new_zeros(rows, x.shape[1]) for x in (logits, hidden))
        self.rows, self.columns = rows, columns

    def clear(self) -> None:
        """Zeros in the cache. What no row may see counts as nothing only where it is finite, and a policy
        that went astray and was put back leaves NaN."""
        for layer in self.cache:
            for held in layer:
                held.zero_()

    def __call__(self, rows: int, width: int) -> None:
        """The step for the inputs as they stand: keys and values of the newest column, `logits` and `hidden`
        of the rows."""
        logits, hidden = self._step(rows, width)
        self.logits[:rows] = logits
        self.hidden[:rows] = hidden

    def _step(self, rows: int, width: int) -> tuple[Tensor, Tensor]:
        """(rows, V) logits, and (rows, d) what the head was given."""
        plain = plain_of(self._model())
        trunk, starts, kind = plain.model, self.starts[:rows], self._device.type
        index, dtype = self._index[:width], self.cache[0][1].dtype
        own = (index >= starts[:, None]) & (index <= self.column)
        # as numbers: torch's kernels would make them of a mask in every layer
        mask = torch.zeros(rows, width, dtype=dtype, device=self._device).masked_fill_(~own, -math.inf)
        positions = self.column - starts
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]  # (rows, 1, d)
        # what `Bf16Copies` does not hold is cast in every step: a cast that autocast keeps would be gone when
        # the step is replayed
        casting = torch.autocast(
            kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
        )
        with casting, _writing_without_order():
            x = trunk.embed_tokens(self.ids[:rows])
            for layer, (keys, values) in zip(trunk.layers, self.cache, strict=True):
                h, seen = _norm(layer.input_layernorm, x), (keys[:rows], values[:rows])
                x = x + self._attention(layer.self_attn, h, seen, cos, sin, mask[:, None, None])
                h, mlp = _norm(layer.post_attention_layernorm, x), layer.mlp
                x = x + mlp.down_proj(mlp.act_fn(mlp.gate_proj(h)) * mlp.up_proj(h))
            hidden = _norm(trunk.norm, x)
            return plain.lm_head(hidden), hidden

    def _attention(
        self, own: Any, h: Tensor, cache: tuple[Tensor, Tensor], cos: Tensor, sin: Tensor, mask: Tensor
    ) -> Tensor:
        """As in `lean.Step`, but that the column is a tensor and the width that of the mask."""
        (keys, values), rows, width = cache, len(h), mask.shape[-1]
        q, k = own.q_proj(h), own.k_proj(h)
        if hasattr(own, "q_norm"):
            q = _norm(own.q_norm, q.view(rows, self.heads, -1)).flatten(1)
            k = _norm(own.k_norm, k.view(rows, self.groups, -1)).flatten(1)
        both = torch.cat([q, k], dim=1).view(rows, self.heads + self.groups, -1)
        both = (both * cos + both.roll(self.half, dims=-1) * sin).to(keys.dtype)
        keys.index_copy_(2, self.column, both[:, self.heads :, None])
        values.index_copy_(2, self.column, own.v_proj(h).to(values.dtype).view(rows, self.groups, 1, -1))
        q = both[:, : self.heads].reshape(rows, self.groups, -1, both.shape[-1])
        out = scaled_dot_product_attention(
            q, keys[:, :, :width], values[:, :, :width], attn_mask=mask, scale=own.scaling
        )
        return own.o_proj(out.reshape(rows, -1))


@contextmanager
def _writing_without_order() -> Iterator[None]:
    """Where deterministic kernels are asked for, torch sorts the places that it writes to. Here they are one
    column, and nothing else in a step has kernels of both kinds."""
    strict, warn = (
        torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
    )  # fmt: skip
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warn)


def _norm(norm: Any, x: Tensor) -> Tensor:
    return rms_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.variance_epsilon)
