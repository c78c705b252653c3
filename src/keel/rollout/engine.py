"""keel's own engine: rows stream through the slots of one key–value cache. Token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keel.accel import cpu_linear, decode_graphs, decode_step, kept_turns, own_cache
from keel.accel.modules import evaluating
from keel.data.batches import pairs_of
from keel.data.chat import own_text, reply_text
from keel.data.stops import StopTexts
from keel.models.head import capture_head_input, head_of
from keel.models.precision import as_here, computing, keep_bf16_copies
from keel.rollout import even_rows, reference_engine
from keel.rollout.drawn import Asked, limits_of
from keel.rollout.protocol import Answer, GenerationRequest, Rows, TokenCount
from keel.rollout.rounds import in_rounds
from keel.rollout.sampling import check_context, uniform_draws
from keel.rollout.stream import Stream, Turns
from keel.rollout.streams import sample_in_streams
from keel.types import Completion, Sampling


class KeelEngine:
    """An `Engine`: samples from a causal language model of transformers, in place and on its device.

    model: its weights are read at each call, and are left as they are. batch_size: rows that are sampled at
    the same time.
    """

    def __init__(self, model: PreTrainedModel, batch_size: int = 64) -> None:
        self.model, self.batch_size = model, batch_size

    def generate(self, request: GenerationRequest, count: TokenCount | None = None) -> list[Completion]:
        """One completion a prompt, in order; see `generate`."""
        return generate(
            self.model, request.prompts, request.sampling, stop_ids=request.stop_ids, pad_id=request.pad_id,
            seed=request.seed, stop_texts=request.stop_texts, batch_size=self.batch_size,
            hidden=request.keep_head_inputs, work=count, rows=request.rows, limits=request.limits,
            draws=request.draws,
        )  # fmt: skip

    def converse(self, request: GenerationRequest, answer: Answer, count: TokenCount | None = None) -> None:
        """As of `TakesTurns`: a row that is answered takes a slot again, and what it has read stays read. In
        rounds where the model keeps something else than keys and values of each position."""
        if not request.prompts:
            return
        work, outside = count or TokenCount(), as_here(answer)
        with _opened(self.model, request, work, turns=True) as (asked, steps):
            slots = way_of(self.model, asked.longest, asked.steps) == "slots"
            if slots and kept_turns.fits(self.model, asked.longest):
                turns = Turns(asked, request, outside)
                Stream(asked, self.batch_size, steps, turns).run()
                lengths = [(len(p), len(whole) - 1) for p, whole in zip(request.prompts, turns.whole)]
                work.useful += sum(map(len, {tuple(prompt) for prompt in request.prompts}))
                work.useful += sum(whole - prompt for prompt, whole in lengths)
                work.pairs += sum(pairs_of(whole) - pairs_of(prompt) for prompt, whole in lengths)
                return
        in_rounds(self, request, answer, count)


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    seed: int,
    stop_texts: StopTexts | None = None,
    batch_size: int = 64,
    hidden: bool = False,
    work: TokenCount | None = None,
    rows: Rows | None = None,
    limits: Sequence[int] | None = None,
    draws: Tensor | None = None,
) -> list[Completion]:
    """Sample with a key–value cache of `batch_size` slots. A prompt that is given several times is read once;
    a row that has ended leaves at once, and a waiting prompt takes its slot. A model that keeps something
    else (states of recurrences) is sampled with the cache that it makes itself: see `rollout.even_rows`.

    stop_ids: the EOS id first; without any, rows run to max_new_tokens. stop_texts: strings that end a
    response, too. Each row draws its own random numbers, so what else is in the batch does not change what it
    is given. hidden: keep what the head was given for each token, so that nobody has to compute it again (not
    for a model whose head keel does not know). work: counts. rows: which of all rows of the seed the prompts
    are. limits: (N,) the most tokens of each response, where that is less than max_new_tokens. draws: (N,
    max_new_tokens) numbers in [0, 1) in place of those of the seed. UsageError if a prompt and its response
    cannot fit the context, or the model's forward fails.
    """
    if not prompts:
        return []
    request = GenerationRequest(
        prompts, sampling, stop_ids, pad_id, seed, stop_texts, hidden, limits, rows, draws
    )  # fmt: skip
    work = work or TokenCount()
    with _opened(model, request, work) as (asked, steps):
        done = _sampled(asked, batch_size, steps)
    work.useful += sum(map(len, {tuple(prompt) for prompt in prompts})) + sum(len(c.ids) - 1 for c in done)
    lengths = [(len(c.prompt_ids), len(c.prompt_ids) + len(c.ids) - 1) for c in done]
    work.pairs += sum(pairs_of(whole) - pairs_of(prompt) for prompt, whole in lengths)
    return done


@contextmanager
def _opened(
    model: PreTrainedModel, request: GenerationRequest, work: TokenCount, *, turns: bool = False
) -> Iterator[tuple[Asked, decode_graphs.Captured | None]]:
    """What every way to sample works on, and recorded steps; within it the model samples. turns: rows go on,
    which they do by the model's own forward."""
    check_context(model, request.prompts, request.sampling, request.limits)
    draws = None if request.draws is None else request.draws.clone()  # later turns write theirs over it
    if draws is None:
        draws = uniform_draws(len(request.prompts), request.sampling, request.seed, request.rows)
    device = next(model.parameters()).device
    head = head_of(model) if request.keep_head_inputs else None
    draws = draws.to(device)
    asked = Asked(
        model, request.prompts, draws, request.sampling, request.stop_ids, request.stop_texts,
        request.pad_id, None if head is None else [], work, limits_of(request.limits, draws),
    )  # fmt: skip
    with evaluating(model), keep_bf16_copies(model), torch.no_grad(), computing(model, device):
        plainly = request.prompts and not turns and not decode_graphs.records(device)
        step = decode_step.by_itself(model, asked.longest, asked.steps) if plainly else None
        if step is not None:
            yield replace(asked, step=step), None
            return
        # whose linear layers multiply: under a step with matrices of its own only a head that is read
        laid = model
        if device.type == "cpu" and decode_step.lays_out(model, asked.steps):
            laid = None if head is None else head.linear
        with (
            nullcontext() if laid is None else cpu_linear.lay_out(laid, asked.steps),
            nullcontext() if head is None else capture_head_input(head) as seen,
            decode_graphs.recorded_steps(model, device, reading=seen is not None) as steps,
        ):
            yield replace(asked, seen=seen), steps


def text_of(tokenizer: PreTrainedTokenizerBase, completion: Completion) -> str:
    """The response as rewards and reports see it: without the token or the string that ended it, with the
    tags that belong to a reply (`<think>`), special tokens or not. Of an episode with tools: what the model
    itself said."""
    if completion.dialogue is not None:
        return own_text(completion.dialogue.turns)
    ids = completion.ids[:-1] if completion.ended and not completion.stop else completion.ids
    text = reply_text(tokenizer, ids)
    return text[: text.find(completion.stop)] if completion.stop else text


Way = Literal["slots", "own cache", "own cache, one row at a time", "whole forwards"]


def way_of(model: PreTrainedModel, longest: int, steps: int = 0) -> Way:
    """How `generate` samples sequences of up to `longest` tokens, `steps` of them new: by the fastest way in
    which the model's logits are those of its own forward. Tried at first use, under the model's precision
    (`computing`)."""
    if decode_step.keeps_slots(model, longest, steps):
        return "slots"
    together = own_cache.rows_at_once(model, longest)
    if together is None:
        return "whole forwards"
    return "own cache" if together else "own cache, one row at a time"


def _sampled(asked: Asked, batch_size: int, steps: decode_graphs.Captured | None) -> list[Completion]:
    way = way_of(asked.model, asked.longest, asked.steps) if asked.step is None else "slots"
    if way == "whole forwards":
        return reference_engine.sample(asked)
    if way == "slots":
        return sample_in_streams(asked, batch_size, steps)
    return even_rows.sample(asked, batch_size if way == "own cache" else 1)
