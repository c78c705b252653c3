"""What policy, reference and critic say of sampled responses, before the first gradient step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad as pad_right
from transformers import PreTrainedModel

from keel.algorithms import kl
from keel.algorithms.masked import at_least_float32, log_softmax
from keel.data.batches import by_length, length_mask, pad
from keel.distributed import group, sharded
from keel.models.head import head_of
from keel.models.logprobs import HeadInputs, head_inputs, response_index, scatter_to_mask, scores_at
from keel.types import Completion


@dataclass(frozen=True, slots=True)
class Scored:
    """Completions as tensors, with each model's view of them."""

    ids: Tensor  # (B, S) prompt + response, right-padded
    prompt_lengths: Tensor  # (B,)
    # (B, T) True at response tokens, the stop token included; of an episode with tools at the model's own
    mask: Tensor
    logp: Tensor  # (B, T) log π(a_t | s_t)
    ref_logp: Tensor  # (B, T) log π_ref(a_t | s_t)
    exact_kl: Tensor  # (B, T) KL(π(·|s_t) ‖ π_ref(·|s_t)) over the whole vocabulary, in nats
    values: Tensor  # (B, T) V(s_t); zeros without a critic


def score(
    completions: Sequence[Completion],
    policy: PreTrainedModel,
    reference: Any,  # or what is called like a model: `models.roles.AdaptersOff`
    *,
    temperature: float,
    pad_id: int,
    device: torch.device,
    micro_batch: int | None = None,
    micro_tokens: int | None = None,
    critic: PreTrainedModel | None = None,
    value_head: nn.Module | None = None,
    vocab: int | None = None,
) -> Scored:
    """One forward of each model over each response, in parts of `micro_batch` rows or `micro_tokens` tokens;
    no gradient.

    The policy has none where all completions bring the hidden states that they were drawn from: log π is then
    the sampler's own, and the rest is made of the states. critic: a model with a score head. value_head: a
    head on the policy's last hidden states instead. vocab: ids from here on are never drawn
    (`Sampling.vocab`), and have no part in either distribution.
    """
    ids, _ = pad([c.prompt_ids + c.ids for c in completions], pad_id)
    prompt_lengths = torch.tensor([len(c.prompt_ids) for c in completions])
    lengths = torch.tensor([len(c.ids) for c in completions])
    ends = prompt_lengths + lengths
    mask = own_mask(completions, length_mask(lengths, int(lengths.max())))
    known = all(c.hidden is not None for c in completions) and head_of(policy) is not None
    order: list[int] = []
    parts: list[tuple[Tensor, ...]] = []
    with torch.no_grad():
        prompts = [c.prompt_ids for c in completions]
        found = list(by_length(ends.tolist(), micro_batch, micro_tokens, together=prompts))
        for number, rows in enumerate([*found, *_borrowed(policy, found, ends)]):
            reach, width = int(ends[rows].max()), int(lengths[rows].max())
            x, starts = ids[rows, :reach].to(device), prompt_lengths[rows].to(device)
            own = mask[rows, :width].to(device)
            index = response_index(own, starts, reach)
            if known:
                ours = _as_sampled([completions[row] for row in rows], policy, device)
            else:
                ours = head_inputs(policy, x, index, hidden=value_head is not None)
            theirs = ours if reference is policy else head_inputs(reference, x, index)
            columns = compared(ours, theirs, x.flatten()[index + 1], temperature, vocab)
            values = torch.zeros(own.shape)
            if value_head is not None and ours.hidden is not None:
                values = scatter_to_mask(value_head(at_least_float32(ours.hidden)).squeeze(-1), own)
            elif critic is not None:
                values = scatter_to_mask(scores_at(critic, x, index), own)
            if number < len(found):
                order += rows
                parts.append((*(scatter_to_mask(column, own) for column in columns), values))
    logp, ref_logp, exact_kl, values = (
        torch.where(mask, _in_order(column, order, mask.shape[1]), 0.0) for column in zip(*parts, strict=True)
    )
    logp = sampled_logp(completions, mask).to(logp) if known else logp
    return Scored(ids, prompt_lengths, mask, logp, ref_logp, exact_kl, values)


def _borrowed(policy: object, parts: Sequence[Sequence[int]], ends: Tensor) -> list[list[int]]:
    """Parts that are computed for nothing where weights are cut over ranks, so that all make as many
    forwards: of the shortest row. ends: (B,) tokens of each row."""
    if not sharded.is_cut(policy):
        return []
    most = max(group.gathered_late(len(parts)))  # one may still have been sampling
    return [[int(ends.argmin())]] * (most - len(parts))


def compared(
    ours: HeadInputs, theirs: HeadInputs, tokens: Tensor, temperature: float, vocab: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) log π and log π_ref of the tokens, and KL(π ‖ π_ref) over the vocabulary; a part of the logits at
    a time."""
    rows, found = ours.rows_at_once, list[tuple[Tensor, ...]]()
    for a, b, ids in zip(ours.values.split(rows), theirs.values.split(rows), tokens.split(rows), strict=True):
        y = log_softmax(ours.logits(a)[:, :vocab], temperature)
        z = y if theirs is ours else log_softmax(theirs.logits(b)[:, :vocab], temperature)
        found.append((*(x.gather(-1, ids[:, None]).squeeze(-1) for x in (y, z)), kl.between(y, z)))
    logp, ref_logp, exact = (torch.cat(column) for column in zip(*found, strict=True))
    return logp, ref_logp, exact


def own_mask(completions: Sequence[Completion], mask: Tensor) -> Tensor:
    """The (B, T) mask of responses without what tools and templates wrote in them."""
    mask = mask.clone()
    for row, completion in enumerate(completions):
        if completion.dialogue is not None:
            mask[row, : len(completion.ids)] = torch.tensor(completion.dialogue.own)
    return mask


def sampled_logp(completions: Sequence[Completion], mask: Tensor) -> Tensor:
    """(B, T) log-probabilities as the sampler had them; 0 where the mask is False."""
    found = torch.zeros(mask.shape)
    for row, completion in enumerate(completions):
        found[row, : len(completion.logp)] = torch.tensor(completion.logp)
    return torch.where(mask, found, 0.0)


def _as_sampled(
    completions: Sequence[Completion], policy: PreTrainedModel, device: torch.device
) -> HeadInputs:
    """The states that the completions were drawn from, row by row."""
    hidden = torch.cat([c.hidden for c in completions if c.hidden is not None]).to(device)
    return HeadInputs(policy, head_of(policy), hidden, hidden)


def _in_order(parts: Sequence[Tensor], order: Sequence[int], width: int) -> Tensor:
    """Parts of different widths as one (B, width) tensor on the CPU, in the order the rows came in."""
    padded = torch.cat([pad_right(part.cpu(), (0, width - part.shape[1])) for part in parts])
    return padded[torch.tensor(order).argsort()]
