"""One decode step of a Llama-shaped model (Llama, Mistral, Qwen2, Qwen3) in the fewest operations.

With few rows a step of transformers' own modules spends its time between operations, not in them: masks,
positions and caches are made anew, norms and rotations are many small operations. Here the model's own
projections are called (so that adapters and quantised layers stay in effect) and all else is a handful of
fused operations. The result is that of the model's own forward: before the first use with a model a few steps
are compared with it (`decode_trial`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, rms_norm, silu
from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM
from transformers.activations import SiLUActivation

from keel.accel.cpu_linear import AFTER, PrepackedWeight, packs, prepacked, sized
from keel.accel.cpu_products import prefers_columns
from keel.accel.decode_trial import COLUMNS, decoded_otherwise, precision_of
from keel.accel.decode_trial import Step as AnyStep
from keel.accel.kv_slots import Slots
from keel.accel.modules import plain_of, surrounded, with_cache
from keel.accel.packed_layers import KeysAndValues, PackedLayers, laid_out, packs_head, prompts_differ
from keel.accel.patches import disabled, enabled, trusted
from keel.accel.row_attention import Look
from keel.accel.trial_inputs import beyond_windows

SHAPES = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
ROTATIONS = ("default", "linear", "llama3", "yarn")  # those that do not depend on how long a sequence is


class Step:
    """The step for one model, up to `columns` positions. Made anew for each call of the engine, which takes
    up to `steps` of them, as weights change. On a CPU its matrices are laid out once; where that is in
    float32, the step and the reading of prompts are those of `packed_layers`, which leaves some as they
    are."""

    def __init__(self, model: nn.Module, columns: int, steps: int = 0, *, at_once: bool = False) -> None:
        """at_once: large matrices are laid out before the first step, not after some (`cpu_linear.AFTER`)."""
        self.model = plain_of(model)
        config, trunk = self.model.config, self.model.model
        positions = torch.arange(max(columns, COLUMNS), device=trunk.embed_tokens.weight.device)
        cos, sin = trunk.rotary_emb(trunk.embed_tokens.weight[:1].float(), positions[None])
        half = sin.shape[-1] // 2
        self.cos = cos[0]  # (positions, d)
        self.sin = torch.cat(
            [-sin[0, :, :half], sin[0, :, half:]], dim=-1
        )  # signed, for halves that swap places
        self.half, self.groups = half, config.num_key_value_heads
        self.heads = config.num_attention_heads
        self.dtype, self._steps = _packs(self.model), steps
        self.whole = self.packed = None
        if self.dtype == torch.float32:
            self._before = 0 if at_once or not _waits(self.model, steps) else AFTER
            self.whole = self._layers(0 if self._before else steps)
        elif self.dtype:
            self.packed = [_Layer.of(layer, self.dtype) for layer in trunk.layers]

    def _layers(self, steps: int) -> PackedLayers:
        return PackedLayers(self.model, self.cos, self.sin, steps)

    @property
    def reads(self) -> bool:
        """Whether `read` may be called: switched on, and tried against the model's own forward, as it is now
        and as it will be."""
        plain, whole = self.model, self.whole
        if whole is None:
            return False

        def trial() -> str | None:
            why = prompts_differ(plain, whole)
            later = why is None and _waits(plain, self._steps)
            return prompts_differ(plain, self._layers(self._steps)) if later else why

        return trusted("prompt_reading", plain, trial, depends_on=_tried_as(plain, self._steps))

    @property
    def by_itself(self) -> bool:
        """Whether nothing of the model's own forward runs in `read` and in a step, so that several threads
        may call them at once, and a hook on the head is not called."""
        return self.whole is not None and self.whole.has_head and self.reads

    def read(
        self, ids: Tensor, own: Tensor | None, seen: list[Tensor] | None = None
    ) -> tuple[Tensor, KeysAndValues]:
        """As `PackedLayers.read`."""
        assert self.whole is not None
        return self.whole.read(ids, own, seen)

    def __call__(self, ids: Tensor, slots: Slots, seen: list[Tensor] | None = None) -> Tensor:
        """(n,) newest tokens → (n, V) logits; the keys and values go into the newest column of `slots`. seen:
        where what the head is given is put, if the step is one `by_itself`."""
        if self.whole is not None:
            if self._before:
                self._before -= 1
                if not self._before:
                    self.whole = self._layers(self._steps)
            return self.whole.step(ids, slots, seen)
        trunk, positions, look = self.model.model, slots.positions, Look.of(slots, self.heads)
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]  # (n, 1, d)
        x = trunk.embed_tokens(ids)
        if self.packed is not None:
            return self._by_packed(x, slots, cos, sin, look)
        for layer, held in zip(trunk.layers, slots.layers, strict=True):
            x = x + self._attention(
                layer.self_attn, _norm(layer.input_layernorm, x), held, slots, cos, sin, look
            )
            h, mlp = _norm(layer.post_attention_layernorm, x), layer.mlp
            x = x + mlp.down_proj(mlp.act_fn(mlp.gate_proj(h)) * mlp.up_proj(h))
        return self.model.lm_head(_norm(trunk.norm, x))

    def _by_packed(self, x: Tensor, slots: Slots, cos: Tensor, sin: Tensor, look: Look) -> Tensor:
        """(n, d) embeddings → (n, V) logits. Rows behind the n fill a size up; nobody reads them."""
        assert self.packed is not None
        assert self.dtype is not None
        trunk, n, dtype = self.model.model, len(x), self.dtype
        size = sized(n)
        x = _filled(x, size)
        for layer, own, held in zip(trunk.layers, self.packed, slots.layers, strict=True):
            h = _norm(layer.input_layernorm, x).to(dtype)
            q, k, v = own.q(h)[:n], own.k(h)[:n], own.v(h)[:n]
            attended = self._attended(layer.self_attn, q, k, v, held, slots, cos, sin, look)
            x = x + own.out(_filled(attended.to(dtype), size))
            h = _norm(layer.post_attention_layernorm, x).to(dtype)
            x = x + own.down(silu(own.gate(h)).mul_(own.up(h)))
        return self.model.lm_head(_norm(trunk.norm, x)[:n])

    def _attention(
        self, own: Any, h: Tensor, held: Any, slots: Slots, cos: Tensor, sin: Tensor, look: Look
    ) -> Tensor:
        q, k, v = own.q_proj(h), own.k_proj(h), own.v_proj(h)
        return own.o_proj(self._attended(own, q, k, v, held, slots, cos, sin, look))

    def _attended(
        self,
        own: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        held: Any,
        slots: Slots,
        cos: Tensor,
        sin: Tensor,
        look: Look,
    ) -> Tensor:
        """(n, …) queries, keys and values of the newest tokens → (n, heads · d)."""
        n, column = len(q), slots.column
        if hasattr(own, "q_norm"):
            q = _norm(own.q_norm, q.view(n, self.heads, -1)).flatten(1)
            k = _norm(own.k_norm, k.view(n, self.groups, -1)).flatten(1)
        both = torch.cat([q, k], dim=1).view(n, self.heads + self.groups, -1)
        both = slots.round(both * cos + both.roll(self.half, dims=-1) * sin)
        held.k[:n, :, column] = both[:, self.heads :]
        held.v[:n, :, column] = v.view(n, self.groups, -1)
        # autocast would make bfloat16 of what attention is given, whatever it is kept in
        with torch.autocast(q.device.type, enabled=False):
            return look.attend(both[:, : self.heads].to(held.k.dtype), held.k, held.v, own.scaling)


class _Layer(NamedTuple):
    """A layer's matrices, laid out."""

    q: PrepackedWeight
    k: PrepackedWeight
    v: PrepackedWeight
    out: PrepackedWeight
    gate: PrepackedWeight
    up: PrepackedWeight
    down: PrepackedWeight

    @classmethod
    def of(cls, layer: Any, dtype: torch.dtype) -> _Layer:
        own, mlp = layer.self_attn, layer.mlp
        layers = (own.q_proj, own.k_proj, own.v_proj, own.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        return cls(*(prepacked(own, dtype) for own in layers))


def _packs(model: Any) -> torch.dtype | None:
    """The precision in which a model computes, where that is on the CPU and every layer is one that may be
    laid out in it; None otherwise."""
    layers = model.model.layers
    gates = [layer.mlp.act_fn for layer in layers]
    if not all(isinstance(gate, (SiLUActivation, nn.SiLU)) and not surrounded(gate) for gate in gates):
        return None
    parts = [
        getattr(part, f"{name}_proj")
        for layer in layers
        for part, names in ((layer.self_attn, "qkvo"), (layer.mlp, ("gate", "up", "down")))
        for name in names
    ]
    found = {packs(part) for part in parts}
    return found.pop() if len(found) == 1 else None


def fits(model: nn.Module, steps: int = 0) -> bool:
    """Whether the step is this model's: switched on, of the right shape, and tried against the model's own
    forward, as it is for up to so many steps."""
    if not enabled("decode_step") or not enabled("kv_slots") or not has_shape(model):
        return False
    plain = plain_of(model)

    def trial() -> str | None:
        def step(at_once: bool) -> str | None:
            make = lambda slots, columns: Step(plain, columns, steps, at_once=at_once)  # noqa: E731
            return decoded_otherwise(plain, make)

        why = step(at_once=False)
        return step(at_once=True) if why is None and _waits(plain, steps) else why

    return trusted("decode_step", plain, trial, depends_on=_tried_as(plain, steps))


def _tried_as(plain: nn.Module, steps: int) -> tuple[object, ...]:
    """What a trial of the step and of the reading depends on."""
    held = laid_out(plain, steps) if _packs(plain) == torch.float32 else ()
    return *precision_of(plain), *held, prefers_columns()


def _waits(plain: nn.Module, steps: int) -> bool:
    """Whether more of a model is laid out for so many steps than for a few."""
    return _packs(plain) == torch.float32 and laid_out(plain, steps) != laid_out(plain, 0)


def by_itself(model: nn.Module, columns: int, steps: int = 0) -> Step | None:
    """A step for up to `columns` positions that calls nothing of the model's own, of which `steps` are taken
    at most; None where there is none for this model. To be asked before a hook is put on the head."""
    if not fits(model, steps) or _packs(plain := plain_of(model)) != torch.float32 or not packs_head(plain):
        return None  # before anything is laid out, which whoever samples otherwise does once more
    step = Step(model, columns, steps)
    return step if step.by_itself else None


def lays_out(model: nn.Module, steps: int = 0) -> bool:
    """Whether the step multiplies with matrices of its own, and of the model's modules only the head does, if
    that."""
    return fits(model, steps) and _packs(plain_of(model)) is not None


def has_shape(model: nn.Module) -> bool:
    """Whether a model is one that the step is written for: its class, plain rotations, full attention
    everywhere, and no hook on a module whose forward would be passed by."""
    plain = plain_of(model)
    if type(plain) not in SHAPES:
        return False
    config = plain.config
    sliding = getattr(config, "sliding_window", None) is not None and getattr(
        config, "use_sliding_window", True
    )
    hooked = any(surrounded(module) for module in _passed_by(plain))
    return not sliding and not hooked and plain.model.rotary_emb.rope_type in ROTATIONS


def _passed_by(plain: Any) -> Iterator[nn.Module]:
    """The modules of a model whose forward the step does not call."""
    trunk = plain.model
    yield from (plain, trunk, trunk.norm)
    for layer in trunk.layers:
        attention = layer.self_attn
        yield from (layer, attention, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm)
        yield from (norm for name in ("q_norm", "k_norm") if (norm := getattr(attention, name, None)))


def keeps_slots(model: nn.Module, longest: int = 0, steps: int = 0) -> bool:
    """Whether prompts are sampled through `Slots`: switched on, and the model's own forward computes with
    them as its cache what it computes without one, in sequences of up to `longest` tokens (tried once more
    where longer ones meet a window). Models with a decode step of their own are tried with that, for up to
    so many steps."""
    if not enabled("kv_slots"):
        return False
    if fits(model, steps):
        return True
    plain = plain_of(model)
    longer = beyond_windows(plain.config, longest)

    def make_step(_: Slots, __: int) -> AnyStep:
        def step(newest: Tensor, slots: Slots) -> Tensor:
            mask = slots.mask()
            with disabled():
                return plain(
                    input_ids=newest[:, None], attention_mask=None if mask is None else mask.long(),
                    position_ids=slots.positions[:, None], **with_cache(plain, slots.cache),
                ).logits[:, -1]  # fmt: skip

        return step

    return trusted(
        "kv_slots",
        plain,
        lambda: decoded_otherwise(plain, make_step, longer),
        depends_on=(longer, *precision_of(plain)),
        say=False,
    )


def _filled(x: Tensor, rows: int) -> Tensor:
    """(n, d) with zeros behind it, up to so many rows."""
    return x if len(x) == rows else pad(x, (0, 0, 0, rows - len(x)))


def _norm(norm: Any, x: Tensor) -> Tensor:
    """torch's rms_norm; for float32 on the CPU, where that is six operations, in four."""
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return rms_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.variance_epsilon)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = torch.addcmul(
        length.new_tensor(norm.variance_epsilon), length, length, value=1 / x.shape[-1]
    ).rsqrt_()
    return (x * scale).mul_(norm.weight)
