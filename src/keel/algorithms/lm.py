"""Language modelling: the loss of pretraining, supervised fine-tuning and PPO's pretraining mix."""

from __future__ import annotations

import torch
from torch import Tensor

from keel.algorithms.masked import masked_mean, token_logp


def cross_entropy(
    logits: Tensor, labels: Tensor, mask: Tensor, denominator: Tensor | float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = −mean log π(label | what precedes it) over counted positions, in nats (2203.02155, section 3.5).

    logits: (…, V), already aligned: those that predict `labels`, (…); the caller shifts. mask: (…). Only
    counted positions are computed at all, so labels elsewhere may be anything (−100, say). denominator: the
    counted positions of the whole optimiser step; with it the losses and metrics of micro-batches add up to
    those of the batch. None means the positions counted in this call.

    Returns the loss and, detached, `accuracy`: share of positions where the label has the highest logit.
    """
    logits, labels = logits[mask], labels[mask]
    hits = logits.detach().argmax(dim=-1) == labels
    return likelihood(token_logp(logits, labels), hits, denominator)


def likelihood(
    logp: Tensor, hits: Tensor, denominator: Tensor | float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """`cross_entropy` of log-probabilities, (N,): logp of the counted labels, and hits, whether each was the
    likeliest."""
    counted = torch.ones_like(hits)
    loss = -masked_mean(logp, counted, denominator=denominator)
    return loss, {"accuracy": masked_mean(hits, counted, denominator=denominator)}
