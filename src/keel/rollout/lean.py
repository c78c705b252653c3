"""One decode step of a Llama-shaped model (Llama, Mistral, Qwen2, Qwen3) in the fewest operations.

With few rows a step of transformers' own modules spends its time between operations, not in them: masks, positions and
caches are made anew, norms and rotations are many small operations. Here the model's own projections are called
(so that adapters and quantised layers stay in effect) and all else is a handful of fused operations. The result is that
of the model's own forward; the engine's tests compare the two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention
from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

from keel.rollout.slots import Slots

SHAPES = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
ROTATIONS = ("default", "linear", "llama3", "yarn")  # those that do not depend on how long a sequence is


class Step:
    """The step for one model, up to `columns` positions. Made anew for each call of the engine, as weights change."""

    def __init__(self, model: Any, columns: int) -> None:
        self.model = model.get_base_model() if hasattr(model, "peft_config") else model
        config, trunk = self.model.config, self.model.model
        positions = torch.arange(columns, device=trunk.embed_tokens.weight.device)
        cos, sin = trunk.rotary_emb(trunk.embed_tokens.weight[:1].float(), positions[None])
        half = sin.shape[-1] // 2
        self.cos = cos[0]  # (positions, d)
        self.sin = torch.cat(
            [-sin[0, :, :half], sin[0, :, half:]], dim=-1
        )  # signed, for halves that swap places
        self.half, self.groups = half, config.num_key_value_heads
        self.heads = config.num_attention_heads

    def __call__(self, ids: Tensor, slots: Slots) -> Tensor:
        """(n,) newest tokens → (n, V) logits; the keys and values go into the newest column of `slots`."""
        trunk, positions, mask = self.model.model, slots.positions, slots.mask()
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]  # (n, 1, d)
        if mask is not None:
            mask = mask[:, None, None, :]
        x = trunk.embed_tokens(ids)
        for layer, held in zip(trunk.layers, slots.layers, strict=True):
            x = x + self._attention(
                layer.self_attn, _norm(layer.input_layernorm, x), held, slots, cos, sin, mask
            )
            h, mlp = _norm(layer.post_attention_layernorm, x), layer.mlp
            x = x + mlp.down_proj(mlp.act_fn(mlp.gate_proj(h)) * mlp.up_proj(h))
        return self.model.lm_head(_norm(trunk.norm, x))

    def _attention(
        self, own: Any, h: Tensor, held: Any, slots: Slots, cos: Tensor, sin: Tensor, mask: Tensor | None
    ) -> Tensor:
        n, column = len(h), slots.column
        q, k = own.q_proj(h), own.k_proj(h)
        if hasattr(own, "q_norm"):
            q = _norm(own.q_norm, q.view(n, self.heads, -1)).flatten(1)
            k = _norm(own.k_norm, k.view(n, self.groups, -1)).flatten(1)
        both = torch.cat([q, k], dim=1).view(n, self.heads + self.groups, -1)
        both = both * cos + both.roll(self.half, dims=-1) * sin
        held.k[:n, :, column] = both[:, self.heads :]
        held.v[:n, :, column] = own.v_proj(h).view(n, self.groups, -1)
        keys, values = (kept[:n, :, slots.low : column + 1] for kept in (held.k, held.v))
        # the heads that share keys and values are as many queries to them
        q = both[:, : self.heads].reshape(n, self.groups, -1, both.shape[-1]).to(keys.dtype)
        out = scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=own.scaling)
        return own.o_proj(out.reshape(n, -1))


def fits(model: Any) -> bool:
    """Whether the lean step is this model's: its class, plain rotations, full attention everywhere, and no hook on a
    module whose forward would be passed by."""
    plain = model.get_base_model() if hasattr(model, "peft_config") else model
    if type(plain) not in SHAPES:
        return False
    config = plain.config
    sliding = getattr(config, "sliding_window", None) is not None and getattr(
        config, "use_sliding_window", True
    )
    hooked = any(
        module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook")
        for layer in plain.model.layers
        for module in (layer, layer.self_attn, layer.mlp)
    )
    return not sliding and not hooked and plain.model.rotary_emb.rope_type in ROTATIONS


def _norm(norm: Any, x: Tensor) -> Tensor:
    return rms_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.variance_epsilon)
