"""The plain engine: every token is read off a forward over the whole sequence. Slow, and right for any model;
the fast engine is tested against it, and it serves models that keep no keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from keel.data.stops import StopTexts
from keel.rollout.sampling import pick
from keel.types import Completion, Sampling, StopReason


def complete(
    model: Any,
    prompt: Sequence[int],
    draws: Tensor,
    sampling: Sampling,
    stop_ids: Sequence[int],
    seen: list[Tensor] | None = None,
    stop_texts: StopTexts | None = None,
) -> Completion:
    """One prompt's completion. draws: (max_new_tokens,) uniform numbers. To be called without gradient. seen:
    where `models.head.reading` puts what the head is given, which is then kept."""
    ids, logps, hidden = list(prompt), list[float](), list[Tensor]()
    device = next(model.parameters()).device
    reason: StopReason = "length"
    stop = ""
    for draw in draws.to(device):
        logits = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[:, -1]
        token, logp = pick(logits, draw[None], sampling)
        if seen:
            hidden.append(seen.pop()[0, -1])
        ids.append(int(token))
        logps.append(float(logp))
        if ids[-1] in stop_ids:
            reason = "eos" if ids[-1] == stop_ids[0] else "stop"
            break
        if stop_texts is not None and (stop := stop_texts.within(ids[len(prompt) :])):
            reason = "stop"
            break
    kept = torch.stack(hidden) if hidden else None
    return Completion(tuple(prompt), tuple(ids[len(prompt) :]), reason, tuple(logps), stop, kept)
