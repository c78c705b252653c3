"""What policy, reference and critic say of sampled responses, before the first gradient step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad as pad_right

from keel.algorithms import kl
from keel.data.batches import length_mask, pad
from keel.masked import at_least_float32, token_logp
from keel.models.forward import response_logits, response_logits_and_hidden, response_scores, response_tokens
from keel.types import Completion


@dataclass(frozen=True, slots=True)
class Scored:
    """Completions as tensors, with each model's view of them."""

    ids: Tensor  # (B, S) prompt + response, right-padded
    prompt_lengths: Tensor  # (B,)
    mask: Tensor  # (B, T) True at response tokens, the stop token included
    logp: Tensor  # (B, T) log π(a_t | s_t)
    ref_logp: Tensor  # (B, T) log π_ref(a_t | s_t)
    exact_kl: Tensor  # (B, T) KL(π(·|s_t) ‖ π_ref(·|s_t)) over the whole vocabulary, in nats
    values: Tensor  # (B, T) V(s_t); zeros without a critic


def score(
    completions: Sequence[Completion],
    policy: Any,
    reference: Any,
    *,
    temperature: float,
    pad_id: int,
    device: torch.device,
    micro_batch: int,
    critic: Any = None,
    value_head: nn.Module | None = None,
) -> Scored:
    """One forward of each model over each response, in parts of `micro_batch`; no gradient.

    critic: a model with a score head. value_head: a head on the policy's last hidden states instead.
    """
    ids, _ = pad([c.prompt_ids + c.ids for c in completions], pad_id)
    prompt_lengths = torch.tensor([len(c.prompt_ids) for c in completions])
    lengths = torch.tensor([len(c.ids) for c in completions])
    ends = prompt_lengths + lengths
    order = ends.argsort(stable=True)  # rows of similar length share a forward
    mask = length_mask(lengths, int(lengths.max()))
    parts: list[tuple[Tensor, ...]] = []
    with torch.no_grad():
        for start in range(0, len(completions), micro_batch):
            rows = order[start : start + micro_batch]
            reach, width = int(ends[rows].max()), int(lengths[rows].max())
            x, starts = ids[rows, :reach].to(device), prompt_lengths[rows].to(device)
            tokens = response_tokens(x, starts, width)
            if value_head is not None:
                logits, hidden = response_logits_and_hidden(policy, x, starts, width)
                values = value_head(at_least_float32(hidden)).squeeze(-1)
            else:
                logits = response_logits(policy, x, starts, width)
                values = (
                    response_scores(critic, x, starts, width)
                    if critic is not None
                    else torch.zeros(tokens.shape)
                )
            ref_logits = logits if reference is policy else response_logits(reference, x, starts, width)
            parts.append(
                (
                    token_logp(logits, tokens, temperature),
                    token_logp(ref_logits, tokens, temperature),
                    kl.exact(logits, ref_logits, temperature),
                    values,
                )
            )
    logp, ref_logp, exact_kl, values = (
        torch.where(mask, _in_order(column, order, mask.shape[1]), 0.0) for column in zip(*parts, strict=True)
    )
    return Scored(ids, prompt_lengths, mask, logp, ref_logp, exact_kl, values)


def _in_order(parts: Sequence[Tensor], order: Tensor, width: int) -> Tensor:
    """Parts of different widths as one (B, width) tensor on the CPU, in the order the rows came in."""
    padded = torch.cat([pad_right(part.cpu(), (0, width - part.shape[1])) for part in parts])
    return padded[order.argsort()]
