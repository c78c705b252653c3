"""Classification of whole sequences: weighted cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from keel.algorithms.masked import at_least_float32


def cross_entropy(
    logits: Tensor, labels: Tensor, weights: Tensor, denominator: float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = −(1/B) Σ_i w_i log softmax(z_i)_{y_i}, in nats.

    logits: (B, L), z. labels: (B,), the index y of each row's label. weights: (B,), w: with w = N / (K·n_y),
    where n_y of N rows have the label y and K labels there are, every label counts the same in the mean over
    all rows (the "balanced" weights of King & Zeng, 2001). denominator: B of the whole optimiser step, so
    that the parts of its micro-batches add up; None: the rows of this call.

    Returns the loss and, detached, `correct`: how many rows have their label's output highest.
    """
    logp = at_least_float32(logits).log_softmax(dim=-1)
    taken = logp.gather(-1, labels[:, None])[:, 0]
    loss = -(weights.to(taken) * taken).sum() / (denominator or len(labels))
    with torch.no_grad():
        return loss, {"correct": (logits.argmax(dim=-1) == labels).sum()}
