"""The plain engine: every token is read off a forward over the whole sequence. Slow, and right for any model;
keel's own engine is tested against it, and it serves models that keep no keys and values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from keel.accel.modules import evaluating
from keel.data.stops import StopTexts
from keel.models.head import capture_head_input, head_of
from keel.models.precision import computing, keep_bf16_copies
from keel.models.row_trial import check_rows
from keel.rollout.drawn import Asked, limits_of
from keel.rollout.protocol import GenerationRequest, TokenCount
from keel.rollout.sampling import check_context, pick, uniform_draws
from keel.types import Completion, Sampling, StopReason


class ReferenceEngine:
    """An `Engine`: one prompt after the other, one forward over all of its tokens for each new token."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def generate(self, request: GenerationRequest, count: TokenCount | None = None) -> list[Completion]:
        """One completion a prompt, in order. The tokens are those of `KeelEngine`, up to rounding."""
        model, sampling = self.model, request.sampling
        if not request.prompts:
            return []
        check_context(model, request.prompts, sampling, request.limits)
        draws = request.draws
        if draws is None:
            draws = uniform_draws(len(request.prompts), sampling, request.seed, request.rows)
        most = limits_of(request.limits, draws).tolist()
        device = next(model.parameters()).device
        head = head_of(model) if request.keep_head_inputs else None
        looking = nullcontext() if head is None else capture_head_input(head)
        with (
            evaluating(model), keep_bf16_copies(model), torch.no_grad(), computing(model, device),
            looking as seen,
        ):  # fmt: skip
            completions = [
                complete(model, prompt, row[:limit], sampling, request.stop_ids, seen, request.stop_texts)
                for prompt, row, limit in zip(request.prompts, draws, most, strict=True)
            ]
        if count is not None:
            prompts = {tuple(prompt) for prompt in request.prompts}
            count.useful += sum(map(len, prompts)) + sum(len(c.ids) - 1 for c in completions)
            count.computed += sum(map(tokens_read, completions))
            count.passes += sum(len(c.ids) for c in completions)
        return completions


def sample(asked: Asked) -> list[Completion]:
    """One completion a prompt, in order. To be called without gradient. UsageError, which names the model's
    type, where its forward fails or looks ahead."""
    check_rows(asked.model)
    done = [
        complete(
            asked.model, prompt, draws[:limit], asked.sampling, asked.stop_ids, asked.seen, asked.stop_texts
        )
        for prompt, draws, limit in zip(asked.prompts, asked.draws, asked.limits.tolist(), strict=True)
    ]
    asked.work.computed += sum(map(tokens_read, done))
    asked.work.passes += sum(len(c.ids) for c in done)
    return done


def tokens_read(completion: Completion) -> int:
    """Tokens that the model was given for a completion: everything again for each new one."""
    new = len(completion.ids)
    return len(completion.prompt_ids) * new + math.comb(new, 2)


def complete(
    model: PreTrainedModel,
    prompt: Sequence[int],
    draws: Tensor,
    sampling: Sampling,
    stop_ids: Sequence[int],
    seen: list[Tensor] | None = None,
    stop_texts: StopTexts | None = None,
) -> Completion:
    """One prompt's completion. draws: (max_new_tokens,) uniform numbers. To be called without gradient. seen:
    where `models.head.capture_head_input` puts what the head is given, which is then kept."""
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
