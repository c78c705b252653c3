"""keel's own engine: rows stream through the slots of one key–value cache. Token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from keel.accel import decode_graphs, decode_static, decode_step, own_cache
from keel.accel.kv_slots import Slots
from keel.accel.last_layer import last_layer_at
from keel.accel.modules import evaluating, logits_of_last, with_cache
from keel.data.batches import pairs_of
from keel.data.chat import own_text, reply_text
from keel.data.stops import StopTexts
from keel.models.head import capture_head_input, head_of
from keel.models.precision import autocast_on, computing, keep_bf16_copies
from keel.rollout import even_rows, reference_engine
from keel.rollout.drawn import Asked, Drawn, completions_of, last_given, limits_of
from keel.rollout.protocol import GenerationRequest, Rows, TokenCount
from keel.rollout.sampling import check_context, pick, uniform_draws
from keel.types import Completion, Sampling

# columns of the cache beyond the longest sequence, and their share of it: a shift to the left, which reads
# and writes all that is kept, is due after as many steps
SPARE_COLUMNS, SPARE_SHARE = 32, 16


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
    check_context(model, prompts, sampling, limits)
    if draws is None:
        draws = uniform_draws(len(prompts), sampling, seed, rows)
    device = next(model.parameters()).device
    head = head_of(model) if hidden else None
    looking = nullcontext() if head is None else capture_head_input(head)
    with (
        evaluating(model),
        keep_bf16_copies(model),
        torch.no_grad(),
        computing(model, device),
        looking as seen,
        decode_graphs.recorded_steps(model, device, reading=seen is not None) as steps,
    ):
        work = work or TokenCount()
        draws = draws.to(device)
        most = limits_of(limits, draws)
        asked = Asked(model, prompts, draws, sampling, stop_ids, stop_texts, pad_id, seen, work, most)
        done = _sampled(asked, batch_size, steps)
    work.useful += sum(map(len, {tuple(prompt) for prompt in prompts})) + sum(len(c.ids) - 1 for c in done)
    lengths = [(len(c.prompt_ids), len(c.prompt_ids) + len(c.ids) - 1) for c in done]
    work.pairs += sum(pairs_of(whole) - pairs_of(prompt) for prompt, whole in lengths)
    return done


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


def way_of(model: PreTrainedModel, longest: int) -> Way:
    """How `generate` samples sequences of up to `longest` tokens: by the fastest way in which the model's
    logits are those of its own forward. Tried at first use, under the model's precision (`computing`)."""
    if decode_step.keeps_slots(model, longest):
        return "slots"
    together = own_cache.rows_at_once(model, longest)
    if together is None:
        return "whole forwards"
    return "own cache" if together else "own cache, one row at a time"


def _sampled(asked: Asked, batch_size: int, steps: decode_graphs.Captured | None) -> list[Completion]:
    way = way_of(asked.model, asked.longest)
    if way == "whole forwards":
        return reference_engine.sample(asked)
    if way == "slots":
        return _stream(asked, batch_size, steps)
    return even_rows.sample(asked, batch_size if way == "own cache" else 1)


def _stream(asked: Asked, batch_size: int, steps: decode_graphs.Captured | None) -> list[Completion]:
    """All prompts through the slots. steps: the recorded ones."""
    model, prompts, sampling, draws = asked.model, asked.prompts, asked.sampling, asked.draws
    device, longest, seen = draws.device, asked.longest, asked.seen
    # transformers' own cache makes float32 of the values where the rotated keys are
    kept = torch.bfloat16 if autocast_on(model, device) else None
    spare = max(SPARE_COLUMNS, longest // SPARE_SHARE)
    slots = Slots(min(batch_size, len(prompts)), longest + spare, device, kept)
    if steps is not None:
        forward = decode_graphs.Step(model, steps, slots, longest, seen)
    else:
        forward = decode_step.Step(model, longest) if decode_step.fits(model) else None
    drawn = Drawn.open(draws, asked.stop_ids, asked.stop_texts)
    # of similar length, so that little is padded; equal ones side by side, so that they are read once
    waiting = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), tuple(prompts[i]), i))
    rows = newest = made = torch.zeros(
        0, dtype=torch.long, device=device
    )  # (n,) by slot: prompt, token, how many
    while waiting or len(slots):
        # 1. waiting prompts take free slots, several at a time
        free = slots.capacity - len(slots)
        if waiting and (not len(slots) or free >= max(1, slots.capacity // 8)):
            fresh, waiting = waiting[:free], waiting[free:]
            new = [tuple(prompts[i]) for i in fresh]
            logits, source = _read(model, new, slots, asked.pad_id)
            asked.work.computed += len(set(new)) * max(map(len, new))
            asked.work.passes += 1
            rows = torch.cat([rows, torch.tensor(fresh, device=device)])
            newest, made = (torch.cat([x, x.new_zeros(len(fresh))]) for x in (newest, made))
        # 2. or every row takes a step
        else:
            fresh = ()
            slots.make_room()
            asked.work.computed += decode_static.rows_of(slots) if steps else len(slots)
            asked.work.passes += 1
            logits, source = forward(newest, slots) if forward else _step(model, newest, slots), None
            slots.step()
        # 3. a token each
        part = slice(len(rows) - len(fresh), None) if fresh else slice(None)
        chosen, logp = pick(logits, draws[rows[part], made[part]], sampling)
        drawn.put((rows[part], made[part]), chosen, logp, last_given(seen, source) if seen else None)
        newest, made = newest.clone(), made.clone()
        newest[part] = chosen
        made[part] += 1
        # 4. rows that have ended leave
        going = (made < asked.limits[rows]) & ~drawn.ended(rows, newest, made, part)
        if not bool(going.all()):
            order = slots.keep(going)
            rows, newest, made = rows[order], newest[order], made[order]
    return completions_of(prompts, drawn, asked.limits)


def _read(
    model: PreTrainedModel, prompts: Sequence[tuple[int, ...]], slots: Slots, pad_id: int
) -> tuple[Tensor, Tensor]:
    """Read each distinct prompt once, padded on the left, into the slots of all that have it: (n, V) logits
    of their first tokens, and (n,) which of the distinct prompts each has."""
    distinct = list(dict.fromkeys(prompts))
    where = {prompt: i for i, prompt in enumerate(distinct)}
    lengths = [len(prompt) for prompt in distinct]
    width, device = max(lengths), slots.starts.device
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in distinct], device=device)
    own = (
        torch.arange(width, device=device)[None, :]
        >= torch.tensor([width - n for n in lengths], device=device)[:, None]
    )
    cache = DynamicCache()
    last = torch.arange(width - 1, len(distinct) * width, width, device=device)
    with last_layer_at(model, last, ids.shape):
        output = model(
            input_ids=ids, attention_mask=own.long(), position_ids=(own.cumsum(1) - 1).clamp(min=0),
            **with_cache(model, cache), **logits_of_last(model),
        )  # fmt: skip
    source = [where[prompt] for prompt in prompts]
    index = torch.tensor(source, device=device)
    if not slots.admit(cache, lengths, source):
        raise RuntimeError("the cache has no keys and values for each position, as it had when it was tried")
    return output.logits[:, -1][index], index


def _step(model: PreTrainedModel, newest: Tensor, slots: Slots) -> Tensor:
    """(n,) newest tokens → (n, V) logits, by the model's own forward."""
    mask = slots.mask()
    return model(
        input_ids=newest[:, None],
        attention_mask=None if mask is None else mask.long(),
        position_ids=slots.positions[:, None],
        **with_cache(model, slots.cache),
    ).logits[:, -1]
