"""Forward passes at the positions a loss needs. Sequences are right-padded, so causal attention needs no mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from keel.masked import at_least_float32
from keel.models.precision import computing


def response_positions(prompt_lengths: Tensor, width: int) -> Tensor:
    """(B,) → (B, T): the positions whose logits predict each response token (the one before it)."""
    return prompt_lengths[:, None] - 1 + torch.arange(width, device=prompt_lengths.device)[None, :]


def at_positions(values: Tensor, positions: Tensor) -> Tensor:
    """Pick (B, T, …) out of (B, S, …) at (B, T) positions; positions past the end repeat the last one."""
    positions = positions.clamp(max=values.shape[1] - 1)
    return values[torch.arange(values.shape[0], device=values.device)[:, None], positions]


def response_tokens(ids: Tensor, prompt_lengths: Tensor, width: int) -> Tensor:
    """(B, S) → (B, T): the response's token ids; past a response's end the value has no meaning."""
    return at_positions(ids, response_positions(prompt_lengths, width) + 1)


def response_logits(model: Any, ids: Tensor, prompt_lengths: Tensor, width: int) -> Tensor:
    """(B, T, V) logits that predict each response token."""
    with computing(model, ids.device):
        logits = model(input_ids=ids, use_cache=False).logits
    return at_positions(logits, response_positions(prompt_lengths, width))


def response_logits_and_hidden(
    model: Any, ids: Tensor, prompt_lengths: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """Logits (B, T, V) and the last hidden states (B, T, d) at the same positions, from one forward."""
    with computing(model, ids.device):
        output = model(input_ids=ids, use_cache=False, output_hidden_states=True)
    positions = response_positions(prompt_lengths, width)
    return at_positions(output.logits, positions), at_positions(output.hidden_states[-1], positions)


def response_scores(scorer: Any, ids: Tensor, prompt_lengths: Tensor, width: int) -> Tensor:
    """(B, T) values of a decoder with a score head: V(s_t), the state before response token t."""
    with computing(scorer, ids.device):
        hidden = backbone(scorer)(input_ids=ids, use_cache=False).last_hidden_state
    hidden = at_positions(hidden, response_positions(prompt_lengths, width))
    values = scorer.score(hidden.to(head_dtype(scorer.score))).squeeze(-1)
    return at_least_float32(values)


def head_dtype(head: Any) -> torch.dtype:
    return next(head.parameters()).dtype


def backbone(model: Any) -> Any:
    """The transformer without its head; LoRA adapters, which sit inside it, stay in effect."""
    plain = model.get_base_model() if hasattr(model, "peft_config") else model
    return plain.base_model


def packed_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask (B, 1, S, S) for packed rows: causal, and only within one's own segment.

    segments: (B, S), the number of the example each position belongs to. Additive, since some architectures
    add the mask to their scores whatever its type.
    """
    same = segments[:, :, None] == segments[:, None, :]
    allowed = same & torch.ones(same.shape[1:], dtype=torch.bool, device=segments.device).tril()
    return torch.zeros(allowed.shape, dtype=dtype, device=segments.device).masked_fill(
        ~allowed, torch.finfo(dtype).min
    )[:, None]
