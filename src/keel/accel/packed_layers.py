"""The layers of a Llama-shaped model (Llama, Mistral, Qwen2, Qwen3) without gradient, on the CPU in float32:
for what a sampler does, a step of few rows and the reading of prompts.

Matrices are laid out once a call of the engine, as oneDNN wants them; without it each product lays its matrix
out anew, which for 64 rows takes as long as the product. Queries, keys and values are one product. A norm's
weights are multiplied into the matrices behind it, so that what is left of the norm is a division of each row
by √(|x|² + d·eps), and silu, the product of the gated halves and the sums with the residual stream are taken
by oneDNN where it writes a product's result. Queries come scaled. Of the last layer of prompts only the last
position goes on behind its keys and values, as only that makes logits.

On AMD's processors with AVX2 alone a call of oneDNN's takes some 40 µs besides the product, and its products
of many rows are slower than MKL's: there Wᵀ of a small matrix is laid out instead, row by row, and MKL
multiplies; rows are not filled up to a size then. Of a large one MKL copies all in every product: with 8 rows
and a matrix of 17 MB oneDNN takes a third of its time, with 64 rows two thirds. Prompts of many tokens are
read with the layers' own weights there.

What it costs: as much memory as the weights, as long as a call takes. So what is larger than 256 MiB, and
than an eighth of the machine's memory where a response may have 32 tokens or more, stays as the model has it
(`laid_out`), and is multiplied with as `cpu_products` does; so it is in the first steps of a call, as many
replies that may be long end soon (`decode_step`). The numbers are the model's own up to rounding; they are
tried before the first use with a model (`decode_step.fits`, `prompts_differ`).
Left out: layers with adapters, hooks or other precisions, whose own forward runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention, silu

from keel.accel.cpu_linear import BETWEEN, LARGE, LEAST, PACKS_FLOAT32, USUAL, packed_at_most, packs, sized
from keel.accel.cpu_products import prefers_columns, product
from keel.accel.decode_trial import SEQUENCES, STEPS, own_logits, prompts_read
from keel.accel.kv_slots import Slots
from keel.accel.modules import undisturbed
from keel.accel.patches import difference, disabled
from keel.accel.row_attention import Look

MANY = 512  # tokens of prompts from which MKL is faster where it is preferred at all

KeysAndValues = list[tuple[Tensor, Tensor]]  # of each layer: (B, groups, S, D)


_reorder: Any = torch.ops.mkldnn._reorder_linear_weight if PACKS_FLOAT32 else None
_onednn: Any = torch.ops.mkldnn._linear_pointwise.default if PACKS_FLOAT32 else None
_onednn_with: Any = torch.ops.mkldnn._linear_pointwise.binary if PACKS_FLOAT32 else None


class Matrix:
    """x Wᵀ + b with W (n, k). factor: (k,) that x is multiplied by before."""

    def __init__(
        self,
        layers: Sequence[Any],
        factor: Tensor | None = None,
        *,
        laid_out: bool = True,
        scales: Sequence[float] = (),
    ) -> None:
        """layers: linear layers with one input, whose results stand side by side. laid_out: W once more, as
        oneDNN wants it, or Wᵀ where MKL is faster, with the factor in it; else the layers' own weights are
        read. scales: by which the results of the first layers are multiplied, if they are laid out."""
        weights = [layer.weight.detach() for layer in layers]
        biases = [None if layer.bias is None else layer.bias.detach() for layer in layers]
        for i, scale in enumerate(scales if laid_out else ()):
            bias = biases[i]
            weights[i], biases[i] = weights[i] * scale, None if bias is None else bias * scale
        self._factor, turned = None if laid_out else factor, False
        self.large = laid_out and sum(weight.numel() for weight in weights) >= LARGE
        if laid_out:
            weight = weights[0] if len(weights) == 1 else torch.cat(weights)
            weight = weight if factor is None else weight * factor
            if any(bias is not None for bias in biases):
                zeros = zip(biases, weights, strict=True)
                biases = [torch.cat([torch.zeros(len(w)) if b is None else b for b, w in zeros])]
            turned = prefers_columns() and not self.large
            weight = weight.t().contiguous() if turned else _reorder(weight, USUAL)
            weights, biases = [weight], biases[:1]
        self._parts = [*zip(weights, biases, strict=True)]
        self.by_onednn, self._turned = laid_out and not turned, turned

    def __call__(self, x: Tensor, then: str = "none") -> Tensor:
        """(M, k) → (M, n). then: "swish" is silu."""
        x = x if self._factor is None else x * self._factor
        found = [self._product(x, *part, then) for part in self._parts]
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None, then: str) -> Tensor:
        if self.by_onednn:
            return _onednn(x, weight, bias, then, [], "")
        found = self._mkl(x, weight, bias)
        return silu(found, inplace=True) if then == "swish" else found

    def with_other(self, x: Tensor, other: Tensor, how: str) -> Tensor:
        """(M, k) → (M, n), times or plus another (M, n): "mul", "add"."""
        (weight, bias), *_ = self._parts
        x = x if self._factor is None else x * self._factor
        if self.by_onednn:
            return _onednn_with(x, other, weight, bias, how)
        if self._turned and how == "add" and bias is None:
            return torch.addmm(other, x, weight)
        found = self._mkl(x, weight, bias)
        return found.mul_(other) if how == "mul" else found.add_(other)

    def _mkl(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self._turned:
            return product(x, weight, bias)
        return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)


class Layer(NamedTuple):
    """The matrices of a layer."""

    qkv: Matrix
    out: Matrix
    gate: Matrix
    up: Matrix
    down: Matrix
    before: Tensor  # () √(d · eps) of the norm before attention
    between: Tensor  # and of the one before the gated part
    heads: tuple[Tensor, Tensor] | None  # of norms of queries and keys: (H + G, D) weights, and √(D · eps)
    scaling: float  # of scores; 1 where queries come scaled

    @classmethod
    def of(cls, layer: Any, queries: int, groups: int, *, laid_out: bool = True) -> Layer:
        own, mlp = layer.self_attn, layer.mlp
        first, second = layer.input_layernorm, layer.post_attention_layernorm
        heads, scales, scaling = None, (own.scaling,), 1.0 if laid_out else own.scaling
        if hasattr(own, "q_norm"):  # which takes a scale away again that comes before it
            sides = _factor(own.q_norm) * own.scaling, _factor(own.k_norm)
            heads = torch.cat([side.expand(n, -1) for side, n in zip(sides, (queries, groups))])
            heads, scales, scaling = (heads, _least(own.q_norm)), (), 1.0
        read = [own.q_proj, own.k_proj, own.v_proj]
        parts = (
            ([own.o_proj], None), ([mlp.gate_proj], _factor(second)), ([mlp.up_proj], _factor(second)),
            ([mlp.down_proj], None),
        )  # fmt: skip
        qkv = Matrix(read, _factor(first), laid_out=laid_out, scales=scales)
        out, gate, up, down = (Matrix(*part, laid_out=laid_out) for part in parts)
        return cls(qkv, out, gate, up, down, _least(first), _least(second), heads, scaling)

    @property
    def large(self) -> bool:
        """Whether one of its matrices is, and is laid out."""
        return any(matrix.large for matrix in (self.qkv, self.out, self.gate, self.up, self.down))

    def behind(self, x: Tensor, attended: Tensor) -> Tensor:
        """(M, d) residual stream and (M, H · D) what was attended → (M, d), the layer's result."""
        x = self.out.with_other(attended, x, "add")
        h = _normed(x, self.between)
        return self.down.with_other(self.up.with_other(h, self.gate(h, "swish"), "mul"), x, "add")


class Stack(NamedTuple):
    """All layers, and the matrix of the keys and values of the last one, of which prompts need no more."""

    layers: list[Layer]
    last: Matrix

    @property
    def large(self) -> bool:
        """Whether one of the matrices is, and is laid out."""
        return any(layer.large for layer in self.layers)


class PackedLayers:
    """All layers of a model, its last norm, and its head where that can be laid out, too."""

    def __init__(self, model: Any, cos: Tensor, sin: Tensor, steps: int = 0) -> None:
        """cos, sin: (positions, D), the sine signed for halves that swap places. steps: how many are taken,
        at most."""
        config, trunk = model.config, model.model
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.cos, self.sin, self.embed = cos, sin, trunk.embed_tokens
        layers, head = laid_out(model, steps)
        self._few, self._many = self._stack(trunk, laid_out=layers), None
        self.layers = self._few.layers
        if prefers_columns() and self._few.large:
            self._many = self._stack(trunk, laid_out=False)
        self._norm, self._head = trunk.norm, model.lm_head
        self._least = _least(trunk.norm)
        self.nbytes = _nbytes(*_parts(model))
        self._fills_up = not (layers and prefers_columns()) or self._few.large
        self._between = BETWEEN if self._few.large else LEAST
        self._packed_head = None
        if packs_head(model):
            self._packed_head = Matrix([model.lm_head], _factor(trunk.norm), laid_out=head)

    def _stack(self, trunk: Any, *, laid_out: bool) -> Stack:
        last = trunk.layers[-1]
        parts = [last.self_attn.k_proj, last.self_attn.v_proj]
        layers = [Layer.of(layer, self.heads, self.groups, laid_out=laid_out) for layer in trunk.layers]
        return Stack(layers, Matrix(parts, _factor(last.input_layernorm), laid_out=laid_out))

    def _size(self, rows: int) -> int:
        """To how many rows so many are filled up: oneDNN makes a program for each number of them, MKL does
        not."""
        return sized(rows, self._between) if self._fills_up else rows

    @property
    def has_head(self) -> bool:
        """Whether the head's module is not called, nor a hook on it."""
        return self._packed_head is not None

    def logits(self, x: Tensor, n: int, seen: list[Tensor] | None) -> Tensor:
        """(M, d) → (n, V) of the first n. seen: where (n, d), what the head is given, is put, unless a hook
        on the head does it."""
        unit = _normed(x, self._least)
        if self._packed_head is None:
            return self._head(unit[:n] * _factor(self._norm))
        if seen is not None:
            seen.append(unit[:n] * _factor(self._norm))
        if self._packed_head.by_onednn:
            unit = _filled(unit, sized(len(unit), BETWEEN))
        return self._packed_head(unit)[:n]

    # ---------------------------------------------------------------- one token of each row

    def step(self, ids: Tensor, slots: Slots, seen: list[Tensor] | None = None) -> Tensor:
        """(n,) newest tokens → (n, V) logits; the keys and values go into the newest column of `slots`."""
        n, positions = len(ids), slots.positions
        size = self._size(n)  # rows behind the n fill a size up; nobody reads them
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]  # (n, 1, D)
        look = Look.of(slots, self.heads)
        x = self.embed(_filled(ids, size))
        for layer, held in zip(self.layers, slots.layers, strict=True):
            both, v = self._parts(layer.qkv(_normed(x, layer.before))[:n])
            both = self._rotated(layer, both, cos, sin)
            held.k[:n, :, slots.column] = both[:, self.heads :]
            held.v[:n, :, slots.column] = v
            attended = look.attend(both[:, : self.heads], held.k, held.v, layer.scaling)
            x = layer.behind(x, _filled(attended, size))
        return self.logits(x, n, seen)

    def _parts(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """(…, (H + 2 G) · D) → (…, H + G, D) queries and keys, (…, G, D) values."""
        parts = qkv.view(*qkv.shape[:-1], self.heads + 2 * self.groups, -1)
        both, v = parts.split_with_sizes((self.heads + self.groups, self.groups), dim=-2)
        return both, v

    def _rotated(self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, first: int = 0) -> Tensor:
        """(M, …, D) queries, or keys, or both, the head number `first` of them first."""
        if layer.heads is not None:
            weight, least = layer.heads
            x = _normed(x, least).mul_(weight[first : first + x.shape[-2]])
        return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, dims=-1), sin)

    # ---------------------------------------------------------------- prompts

    def read(
        self, ids: Tensor, own: Tensor | None, seen: list[Tensor] | None = None
    ) -> tuple[Tensor, KeysAndValues]:
        """Read prompts: (B, W) ids, padded on the left; own: (B, W) True at a row's own tokens, or None where
        all are. (B, V) logits behind the last tokens, and each layer's keys and values."""
        if self.reads_many and ids.numel() >= MANY:
            return self.read_many(ids, own, seen)
        return self._read(self._few, self._size(ids.numel()), ids, own, seen)

    @property
    def reads_many(self) -> bool:
        """Whether prompts of many tokens are read with the layers' own weights."""
        return self._many is not None

    def read_many(
        self, ids: Tensor, own: Tensor | None, seen: list[Tensor] | None = None
    ) -> tuple[Tensor, KeysAndValues]:
        """`read`, with the layers' own weights."""
        assert self._many is not None
        return self._read(self._many, ids.numel(), ids, own, seen)

    def _read(
        self, stack: Stack, size: int, ids: Tensor, own: Tensor | None, seen: list[Tensor] | None
    ) -> tuple[Tensor, KeysAndValues]:
        """size: rows of the products."""
        rows, width = ids.shape
        count, kept = rows * width, KeysAndValues()
        places = torch.arange(width)[None] if own is None else (own.cumsum(1) - 1).clamp_(min=0)
        cos, sin = (table[places].unsqueeze(2) for table in (self.cos, self.sin))  # (1 or B, W, 1, D)
        mask = None
        if own is not None:  # what stands before a row's own tokens looks at itself, so that it is finite
            before = torch.ones(width, width, dtype=torch.bool).tril()
            mask = own[:, None, None, :] & before | torch.eye(width, dtype=torch.bool)
        x = self.embed(_filled(ids.flatten(), size))
        for layer in stack.layers[:-1]:
            both, v = self._parts(layer.qkv(_normed(x, layer.before))[:count].view(rows, width, -1))
            both = self._rotated(layer, both, cos, sin)
            q, k, v = (
                part.transpose(1, 2) for part in (both[:, :, : self.heads], both[:, :, self.heads :], v)
            )
            # as views they would hold the queries of all layers, too
            k, v = k.contiguous(), v.contiguous()
            kept.append((k, v))
            attended = _attended(q, k, v, mask, layer.scaling).transpose(1, 2).reshape(count, -1)
            x = layer.behind(x, _filled(attended, size))
        x = self._read_last(stack, x, (rows, width), cos, sin, mask, kept)
        return self.logits(x, rows, seen), kept

    def _read_last(
        self,
        stack: Stack,
        x: Tensor,
        shape: tuple[int, int],
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        kept: KeysAndValues,
    ) -> Tensor:
        """The last layer: the keys and values of all tokens, which are put to those kept, and all else at the
        last token of each row. (M, d) → (B or more, d)."""
        layer, (rows, width) = stack.layers[-1], shape
        h = _normed(x, layer.before)
        both = stack.last(h)[: rows * width].view(rows, width, 2 * self.groups, -1)
        k = self._rotated(layer, both[:, :, : self.groups], cos, sin, self.heads).transpose(1, 2)
        v = both[:, :, self.groups :].transpose(1, 2).contiguous()
        kept.append((k, v))
        last, size = torch.arange(width - 1, rows * width, width), self._size(rows)
        q = self._parts(layer.qkv(_filled(h[last], size))[:rows])[0][:, : self.heads]
        q = self._rotated(layer, q, cos[:, -1], sin[:, -1])[:, :, None]
        seen = None if mask is None else mask[:, :, -1:]
        attended = _attended(q, k, v, seen, layer.scaling, last=True).reshape(rows, -1)
        return layer.behind(_filled(x[last], size), _filled(attended, size))


def prompts_differ(model: Any, layers: PackedLayers) -> str | None:
    """What differs between `read` and the model's own forward, for prompts of several lengths and of one, in
    each way in which it reads; None if nothing does."""
    ways = (layers.read, layers.read_many) if layers.reads_many else (layers.read,)
    return next((why for read in ways if (why := _read_otherwise(model, read)) is not None), None)


def _read_otherwise(model: Any, read: Callable[..., tuple[Tensor, KeysAndValues]]) -> str | None:
    device = next(model.parameters()).device
    lengths = ([len(row) - STEPS for row in SEQUENCES], [min(map(len, SEQUENCES))] * len(SEQUENCES))
    for counts in lengths:
        prompts = [row[:count] for row, count in zip(SEQUENCES, counts, strict=True)]
        width = max(counts)
        ids = torch.tensor([[*[0] * (width - len(row)), *row] for row in prompts])
        own = torch.arange(width) >= width - torch.tensor(counts)[:, None]
        with undisturbed(model), torch.no_grad():
            with disabled():
                theirs = torch.cat(own_logits(model, prompts, device, 1))
                cache: Any = prompts_read(model, prompts, device)
            ours, kept = read(ids, None if bool(own.all()) else own)
        if (why := difference("logits behind prompts", ours, theirs)) is not None:
            return why
        for (k, v), layer in zip(kept, cache.layers, strict=True):
            for name, mine, their in (("keys", k, layer.keys), ("values", v, layer.values)):
                pairs = [(x.transpose(1, 2)[own].flatten(1)) for x in (mine, their)]
                if (why := difference(f"{name} of prompts", *pairs)) is not None:
                    return why
    return None


def packs_head(model: Any) -> bool:
    """Whether a head is called by nobody, since it is a plain one."""
    return packs(model.lm_head) == torch.float32


def laid_out(model: Any, steps: int) -> tuple[bool, bool]:
    """Whether a model's layers are laid out for so many steps, and its head: up to `packed_at_most` of all
    that is."""
    most = packed_at_most(steps)
    return _nbytes(*model.model.layers) <= most, _nbytes(*_parts(model)) <= most


def _parts(model: Any) -> tuple[Any, ...]:
    return (*model.model.layers, model.lm_head)


def _nbytes(*parts: Any) -> int:
    """Of the matrices of parts of a model."""
    return sum(p.nbytes for part in parts for p in part.parameters() if p.dim() == 2)


def _attended(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, *, last: bool = False
) -> Tensor:
    """(B, H, S, D) queries of all positions, or (B, H, 1, D) of the last one."""
    causal = mask is None and not last
    shared = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=shared
    )


def _normed(x: Tensor, least: Tensor) -> Tensor:
    """x / √(|x|² + d · eps); a root-mean-square norm but for its weights and √d."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(least)


def _factor(norm: Any) -> Tensor:
    """What is left of a norm: (d,)."""
    return norm.weight.detach() * math.sqrt(norm.weight.shape[-1])


def _least(norm: Any) -> Tensor:
    return torch.tensor(math.sqrt(norm.weight.shape[-1] * norm.variance_epsilon))


def _filled(x: Tensor, rows: int) -> Tensor:
    """(n, …) with zeros behind it, up to so many rows."""
    return x if len(x) == rows else pad(x, (*[0] * (2 * x.dim() - 1), rows - len(x)))
