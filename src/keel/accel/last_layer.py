"""The last layer, only at the positions that somebody looks at.

What a loss or a score needs are the states at some positions: those that predict a response, or the last
token of a text. All layers but the last must be computed everywhere, as later positions look at them. The
last layer's keys and values too; its queries, its output matrix and its feed-forward part, seven eighths of
its products with weights, are needed where they are looked at alone. For models that are built like Llama,
with torch's attention and no window. Before it is used in a layer, its states and gradients are compared with
those of the layer's own forward (`_differs`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from keel.accel.attention import KERNELS, NAME, Rows, attend, mask_for, rows_of
from keel.accel.modules import cache_argument, pulled, surrounded, twin_parameters, undisturbed
from keel.accel.norm_and_rope import apply_rope
from keel.accel.patches import difference, disabled, enabled, gradients_differ, trusted

_Layer = LlamaDecoderLayer | MistralDecoderLayer | Qwen2DecoderLayer | Qwen3DecoderLayer
LAYERS = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer)
KINDS = ("llama", "mistral", "qwen2", "qwen3")  # the model types that have them
WORTH = 0.05  # share of the layer that must be saved
OF_LAYER = 7 / 8  # of its products with weights; keys and values are the rest, less where heads share them
MASK_AT_MOST = 2**26  # bytes of the masks of one forward
# a token's attention to another, which goes by small products, in those of a token with a weight
DEARER = 3.0


@contextmanager
def last_layer_at(
    model: object, index: Tensor, shape: Sequence[int], rows: Rows | None = None
) -> Iterator[None]:
    """Within it the last layer's states are computed at `index` of the flattened (B, S) ids, and are zero
    elsewhere; the whole of it where `model` is not one of those, or that would not save much. For one thread
    at a time. rows: those that the ids stand for, where they are one row without padding."""
    layer = _last_of(model) if enabled("last_layer") else None
    if layer is None:
        yield
        return
    index = torch.unique(index)  # sorted
    if not _worth_it(layer, index, shape, rows) or not _is_right(model, layer):
        yield
        return
    again = getattr(layer, "gradient_checkpointing", False)
    # never computed again: its backward comes first, so that there is nothing to wait for, and `forward` will
    # be another
    layer.forward, layer.gradient_checkpointing = partial(_narrow, layer, index), False
    try:
        yield
    finally:
        del layer.forward
        layer.gradient_checkpointing = again


def try_out(model: object) -> None:
    """Try the path on a model now, with its own weights: before somebody lends its layers other ones."""
    layer = _last_of(model) if enabled("last_layer") else None
    if layer is not None:
        _is_right(model, layer)


def _worth_it(layer: _Layer, index: Tensor, shape: Sequence[int], rows: Rows | None) -> bool:
    if not len(index):
        return False
    tokens = shape[0] * shape[1]
    count, length, places = (
        (*shape, index) if rows is None else (rows.rows, rows.width, rows.where.index_select(0, index))
    )
    most = int(torch.bincount(places // length, minlength=count).max())
    config = layer.self_attn.config
    weight = weight_of(config.hidden_size, config.intermediate_size)
    return worth_it(count, length, tokens, len(index), most, weight)


def worth_it(rows: int, length: int, tokens: int, positions: int, most: int, weight: float) -> bool:
    """Whether fewer products with weights outweigh attention that takes a mask, where the whole layer's needs
    none.

    tokens: of the rows, with or without their padding. positions: those looked at, each once, `most` of them
    in one row. weight: see `weight_of`.
    """
    if 4 * rows * most * length > MASK_AT_MOST:
        return False
    whole = tokens * weight + rows * length * DEARER * length / 2
    saved = (tokens - positions) * OF_LAYER * weight
    return saved - DEARER * rows * length * (most - length / 2) > WORTH * whole


def weight_of(hidden: int, inner: int) -> float:
    """A token's products with the weights of a layer, for each of the layer's channels."""
    return 4.0 * hidden + 3.0 * inner


def _last_of(model: object) -> Any:
    """The last layer, if it is one that is known, with nothing around it or its attention, and attention to
    everything before."""
    layers = getattr(_trunk_of(model), "layers", None)
    layer: Any = layers[-1] if layers is not None and len(layers) else None
    if type(layer) not in LAYERS or surrounded(layer) or surrounded(layer.self_attn):
        return None
    attention = layer.self_attn
    window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
    dropped = layer.training and attention.attention_dropout
    plain_kernel = attention.config._attn_implementation in KERNELS and window is None
    return layer if plain_kernel and not dropped else None


def _trunk_of(model: Any) -> Any:
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model  # adapters around it
    return getattr(plain, "base_model", None)


# ---------------------------------------------------------------- self-test


def _is_right(model: object, layer: _Layer) -> bool:
    """Whether `_narrow` computes what the layer's own forward computes: tried once for each precision,
    device, kernel, and with and without adapters."""
    weight, kernel = (
        getattr(layer.input_layernorm, "weight", None),
        layer.self_attn.config._attn_implementation,
    )
    if not isinstance(weight, Tensor):
        return False
    depends_on = weight.dtype, weight.device, kernel, type(layer.self_attn.q_proj)
    return trusted("last_layer", layer, lambda: _differs(_trunk_of(model), layer), depends_on=depends_on)


def _differs(trunk: Any, layer: _Layer) -> str | None:
    """The layer's own forward on 3 rows of 6 positions against `_narrow`: states and gradients without a
    mask, under one, with rows that stand in one row, and with a cache."""
    weight = layer.input_layernorm.weight
    count, length, width = 3, 6, weight.shape[0]
    x = torch.linspace(-40, 50, count * length * width, device=weight.device).sin().to(weight.dtype)
    x = x.view(count, length, width)
    places = torch.arange(length, device=weight.device)[None].expand(count, -1)
    index = torch.tensor([3, 5, 8, 12, 13, 17], device=weight.device)  # one, two and three of a row
    seen = torch.ones(length, length, dtype=torch.bool, device=weight.device).tril()
    seen = seen & (torch.arange(length, device=weight.device) != 1)[None] | torch.eye(
        length, dtype=torch.bool, device=weight.device
    )
    mask = torch.zeros(count, 1, length, length, dtype=weight.dtype, device=weight.device)
    mask = mask.masked_fill(~seen, torch.finfo(weight.dtype).min)
    with (
        undisturbed(trunk), torch.inference_mode(False), torch.enable_grad(), disabled(),
        torch.autocast(weight.device.type, enabled=False), twin_parameters(layer) as twins,
    ):  # fmt: skip
        x = x.clone().requires_grad_()
        angles = trunk.rotary_emb(x, places)
        own: Any = type(layer).forward

        def at_index(states: Tensor | tuple[Tensor, ...]) -> Tensor:
            return (states[0] if isinstance(states, tuple) else states).flatten(0, 1).index_select(0, index)

        cases: list[tuple[str, Tensor, Tensor]] = []
        for name, given in (("states", None), ("states under a mask", mask)):
            theirs = at_index(own(layer, x, attention_mask=given, position_embeddings=angles))
            cases.append((name, at_index(_narrow(layer, index, x, given, angles)), theirs))
        whole, caches = cases[0][2], [DynamicCache(), DynamicCache()]
        number: Any = layer.self_attn.layer_idx
        theirs, ours = ({cache_argument(own): cache} for cache in caches)  # by the name that the model uses
        cached = at_index(own(layer, x, position_embeddings=angles, **theirs))
        cases.append(
            ("states with a cache", at_index(_narrow(layer, index, x, None, angles, **ours)), cached)
        )
        kept = zip(
            *(((c.layers[number].keys, c.layers[number].values)) for c in reversed(caches)), strict=True
        )
        cases += [("keys or values that are kept", ours, theirs) for ours, theirs in kept]  # pyright: ignore
        if layer.self_attn.config._attn_implementation == NAME:
            rows = Rows.of(torch.arange(count * length), count, length, weight.device)
            flat = (
                x.view(1, -1, width),
                mask_for(rows, weight.dtype),
                tuple(a.expand(count, -1, -1).reshape(1, -1, a.shape[-1]) for a in angles),
            )
            cases.append(("states of rows without padding", at_index(_narrow(layer, index, *flat)), whole))  # pyright: ignore
        for name, ours, theirs in cases:
            why = difference(name, ours, theirs)
            at = [x, *twins]
            why = why or gradients_differ(f"gradients of {name}", pulled(ours, at), pulled(theirs, at))
            if why is not None:
                return why
    return None


# ---------------------------------------------------------------- the layer at some positions


def _narrow(
    layer: _Layer,
    index: Tensor,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    past_key_values: Cache | None = None,
    cache: Cache | None = None,
    **more: object,
) -> Tensor:
    """`layer`'s forward on (B, S, d) hidden states, at `index` alone. past_key_values, or cache, which is its
    name from transformers 5.24 on: an empty one, which gets the keys and values of all positions."""
    cache = past_key_values if cache is None else cache
    assert position_embeddings is not None, "the trunk rotates"
    rows_, length, width = hidden_states.shape
    attention = layer.self_attn
    x = layer.input_layernorm(hidden_states)
    rows = rows_of(attention_mask)
    if rows is None:
        queries = _Queries.at(index, rows_, length)
    else:
        queries = _Queries.at(rows.where.index_select(0, index), rows.rows, rows.width)
        attention_mask = None
    # keys and values of all, queries of some
    k = _heads(attention, "k", x)
    v = _heads(attention, "v", x)
    q = _heads(attention, "q", x.flatten(0, 1).index_select(0, index))
    cos, sin = (angle.expand(rows_, length, -1) for angle in position_embeddings)
    k = _rotated(k, cos.unsqueeze(2), sin.unsqueeze(2))
    k, v = ((x if rows is None else rows.laid_out(x)).transpose(1, 2) for x in (k, v))
    if cache is not None:
        k, v = cache.update(k, v, attention.layer_idx)
    q = _rotated(q, *(angle.flatten(0, 1).index_select(0, index).unsqueeze(1) for angle in (cos, sin)))
    attended, _ = attend(
        attention,
        queries.laid_out(q).transpose(1, 2),
        k,
        v.to(k.dtype),
        queries.mask(attention_mask, k.device),
        dropout=0.0,
        scaling=attention.scaling,
    )
    attended = attended.flatten(2).flatten(0, 1).index_select(0, queries.slots)
    h = hidden_states.flatten(0, 1).index_select(0, index) + attention.o_proj(attended)
    h = h + layer.mlp(layer.post_attention_layernorm(h))
    return h.new_zeros(rows_ * length, width).index_copy(0, index, h).view(rows_, length, width)


class _Queries:
    """(N,) positions of B rows as B rows of at most R queries."""

    def __init__(self, rows: int, length: int, most: int, row: Tensor, column: Tensor, slots: Tensor):
        self.rows, self.length, self.most = rows, length, most
        self.row, self.column = row, column  # (N,)
        self.slots = slots  # (N,) into the flattened (B, R)

    @classmethod
    def at(cls, index: Tensor, rows: int, length: int) -> _Queries:
        row, column = index // length, index % length
        counts = torch.bincount(row, minlength=rows)
        most = max(2, int(counts.max()))  # with one alone it would look like a step of a sampler
        within = torch.arange(len(index), device=index.device) - (counts.cumsum(0) - counts)[row]
        return cls(rows, length, most, row, column, row * most + within)

    def laid_out(self, q: Tensor) -> Tensor:
        """(N, H, D) → (B, R, H, D), zero where a row has fewer."""
        laid = q.new_zeros(self.rows * self.most, *q.shape[1:]).index_copy(0, self.slots, q)
        return laid.view(self.rows, self.most, *q.shape[1:])

    def mask(self, whole: Tensor | None, device: torch.device) -> Tensor:
        """(B, 1, R, S): the rows of a (B, 1, S, S) mask, or everything up to each position. Empty slots see
        the first token."""
        if whole is None:
            seen = torch.arange(self.length, device=device) <= self.column[:, None]
        else:
            seen = whole.expand(self.rows, -1, -1, -1)[self.row, 0, self.column]
        laid = seen.new_zeros(self.rows * self.most, self.length)
        if whole is None or whole.dtype == torch.bool:
            laid[:, 0] = True
        laid = laid.index_copy(0, self.slots, seen)
        return laid.view(self.rows, 1, self.most, self.length)


def _heads(attention: Any, which: str, x: Tensor) -> Tensor:
    """(…, d) → (…, heads, D) queries, keys or values."""
    made = getattr(attention, f"{which}_proj")(x)
    made = made.view(*made.shape[:-1], -1, attention.head_dim)
    norm = getattr(attention, f"{which}_norm", None)
    return made if norm is None else norm(made)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return apply_rope(x.to(torch.promote_types(x.dtype, cos.dtype)), cos, sin)
