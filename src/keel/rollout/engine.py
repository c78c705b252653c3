"""keel's own engine: rows stream through the slots of one key–value cache. Token ids in, token ids out."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from keel.accel import decode_graphs, decode_static, decode_step
from keel.accel.kv_slots import Slots
from keel.accel.last_layer import last_layer_at
from keel.accel.modules import evaluating
from keel.data.chat import reply_text
from keel.data.stops import StopTexts
from keel.models.head import capture_head_input, head_of
from keel.models.precision import autocast_on, computing, keep_bf16_copies
from keel.rollout import reference_engine
from keel.rollout.protocol import GenerationRequest, TokenCount
from keel.rollout.sampling import check_context, pick, uniform_draws
from keel.types import Completion, Sampling, StopReason

SPARE_COLUMNS = (
    32  # of the cache, beyond the longest sequence: a shift to the left is due after as many steps
)


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
            hidden=request.keep_head_inputs, work=count,
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
) -> list[Completion]:
    """Sample with a key–value cache of `batch_size` slots. A prompt that is given several times is read once;
    a row that has ended leaves at once, and a waiting prompt takes its slot.

    stop_ids: the EOS id first. stop_texts: strings that end a response, too. Each row draws its own random
    numbers, so what else is in the batch does not change what it is given. hidden: keep what the head was
    given for each token, so that nobody has to compute it again (not for a model whose head keel does not
    know). work: counts. UsageError if a prompt and its response cannot fit the context.
    """
    check_context(model, prompts, sampling)
    draws = uniform_draws(len(prompts), sampling, seed)
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
        done = None
        if decode_step.keeps_slots(model):  # else by the model's own forward alone
            done = _stream(
                model, prompts, draws, sampling, stop_ids, stop_texts, pad_id, batch_size, seen, steps, work
            )
        if done is None:
            done = [
                reference_engine.complete(model, prompt, row, sampling, stop_ids, seen, stop_texts)
                for prompt, row in zip(prompts, draws, strict=True)
            ]
            work.computed += sum(map(reference_engine.tokens_read, done))
    work.useful += sum(map(len, {tuple(prompt) for prompt in prompts})) + sum(len(c.ids) - 1 for c in done)
    return done


def text_of(tokenizer: PreTrainedTokenizerBase, completion: Completion) -> str:
    """The response as rewards and reports see it: without the token or the string that ended it, with the
    tags that belong to a reply (`<think>`), special tokens or not."""
    ids = completion.ids[:-1] if completion.ended and not completion.stop else completion.ids
    text = reply_text(tokenizer, ids)
    return text[: text.find(completion.stop)] if completion.stop else text


def _stream(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    draws: Tensor,
    sampling: Sampling,
    stop_ids: Sequence[int],
    stop_texts: StopTexts | None,
    pad_id: int,
    batch_size: int,
    seen: list[Tensor] | None,
    steps: decode_graphs.Captured | None,
    work: TokenCount,
) -> list[Completion] | None:
    """All prompts through the slots; None if the model keeps no keys and values. seen: where
    `capture_head_input` puts what the head is given. steps: the recorded ones."""
    device = next(model.parameters()).device
    longest = max(len(prompt) for prompt in prompts) + sampling.max_new_tokens
    # transformers' own cache makes float32 of the values where the rotated keys are
    kept = torch.bfloat16 if autocast_on(model, device) else None
    slots = Slots(min(batch_size, len(prompts)), longest + SPARE_COLUMNS, device, kept)
    if steps is not None:
        forward = decode_graphs.Step(model, steps, slots, longest, seen)
    else:
        forward = decode_step.Step(model, longest) if decode_step.fits(model) else None
    draws = draws.to(device)
    drawn = _Drawn.open(draws, stop_ids, stop_texts)
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
            asked = [tuple(prompts[i]) for i in fresh]
            logits, source = _read(model, asked, slots, pad_id)
            if logits is None:
                return None
            work.computed += len(set(asked)) * max(map(len, asked))
            rows = torch.cat([rows, torch.tensor(fresh, device=device)])
            newest, made = (torch.cat([x, x.new_zeros(len(fresh))]) for x in (newest, made))
        # 2. or every row takes a step
        else:
            fresh = ()
            slots.make_room()
            work.computed += decode_static.rows_of(slots) if steps else len(slots)
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
        going = (made < sampling.max_new_tokens) & ~drawn.ended(rows, newest, made, part)
        if not bool(going.all()):
            order = slots.keep(going)
            rows, newest, made = rows[order], newest[order], made[order]
    return _completions(prompts, drawn)


@dataclass
class _Drawn:
    """What has been drawn so far, by prompt and token."""

    tokens: Tensor  # (N, max_new_tokens)
    logps: Tensor  # (N, max_new_tokens)
    stop_ids: Tensor
    stop_texts: StopTexts | None
    hidden: Tensor | None = None  # (N, max_new_tokens, d)
    ends: dict[int, tuple[int, str]] = field(default_factory=dict)  # prompt → length and stop string

    @classmethod
    def open(cls, draws: Tensor, stop_ids: Sequence[int], stop_texts: StopTexts | None) -> _Drawn:
        """Nothing yet; draws: (N, max_new_tokens)."""
        tokens, logps = (
            torch.zeros_like(draws, dtype=torch.long),
            torch.zeros_like(draws, dtype=torch.float32),
        )
        if stop_texts is not None:
            stop_texts = replace(stop_texts, closing=stop_texts.closing.to(draws.device))
        return cls(tokens, logps, torch.tensor(list(stop_ids), device=draws.device), stop_texts)

    def ended(self, rows: Tensor, newest: Tensor, made: Tensor, part: slice) -> Tensor:
        """(n,) by slot: whether the newest token is a stop, or a stop string stands in what the rows of
        `part` have by now."""
        found = torch.isin(newest, self.stop_ids)
        if (stops := self.stop_texts) is None:
            return found
        maybe = torch.zeros_like(found)
        maybe[part] = stops.may_end(newest[part])
        for slot in maybe.nonzero().flatten().tolist():
            row, length = int(rows[slot]), int(made[slot])
            if stop := stops.within(self.tokens[row, :length].tolist()):
                self.ends[row], found[slot] = (length, stop), True
        return found

    def put(self, where: tuple[Tensor, Tensor], tokens: Tensor, logps: Tensor, last: Tensor | None) -> None:
        """A token of some prompts; last: what the head was given for it."""
        self.tokens[where] = tokens
        self.logps[where] = logps.to(self.logps.dtype)
        if last is None:
            return
        if self.hidden is None:  # as zeros, which take no memory before they are written
            self.hidden = last.new_zeros(*self.tokens.shape, last.shape[-1])
        self.hidden[where] = last


def last_given(seen: list[Tensor], source: Tensor | None = None) -> Tensor:
    """(n, d) what the head was given at the last position of each row, or of the rows `source`; the list is
    emptied."""
    given = seen.pop()
    seen.clear()
    last = given[:, -1] if given.dim() == 3 else given
    return last if source is None else last[source]


def _read(
    model: PreTrainedModel, prompts: Sequence[tuple[int, ...]], slots: Slots, pad_id: int
) -> tuple[Tensor | None, Tensor]:
    """Read each distinct prompt once, padded on the left, into the slots of all that have it: (n, V) logits
    of their first tokens, None if the model keeps no keys and values; and (n,) which of the distinct prompts
    each has."""
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
            past_key_values=cache, use_cache=True, **_last_only(model),
        )  # fmt: skip
    source = [where[prompt] for prompt in prompts]
    index = torch.tensor(source, device=device)
    return output.logits[:, -1][index] if slots.admit(cache, lengths, source) else None, index


def _step(model: PreTrainedModel, newest: Tensor, slots: Slots) -> Tensor:
    """(n,) newest tokens → (n, V) logits, by the model's own forward."""
    mask = slots.mask()
    return model(
        input_ids=newest[:, None],
        attention_mask=None if mask is None else mask.long(),
        position_ids=slots.positions[:, None],
        past_key_values=slots.cache,
        use_cache=True,
    ).logits[:, -1]


def _last_only(model: Any) -> dict[str, int]:
    """The argument by which a model makes logits of the last position only, where it has one."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}


def _completions(prompts: Sequence[Sequence[int]], drawn: _Drawn) -> list[Completion]:
    """Each row up to its first stop token."""
    tokens, logps, hidden, stops = drawn.tokens, drawn.logps, drawn.hidden, drawn.stop_ids
    ends = torch.isin(tokens, stops)
    ended = ends.any(dim=1).tolist()
    lengths = torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, tokens.shape[1]).tolist()
    eos = int(stops[0])
    done = []
    for i, (prompt, ids, logp, length, stopped) in enumerate(
        zip(prompts, tokens.tolist(), logps.tolist(), lengths, ended, strict=True)
    ):
        reason: StopReason = "length" if not stopped else "eos" if ids[length - 1] == eos else "stop"
        stop = ""
        if i in drawn.ends and drawn.ends[i][0] < length + (not stopped):  # else a stop token came with it
            (length, stop), reason = drawn.ends[i], "stop"
        kept = None if hidden is None else hidden[i, :length]
        done.append(Completion(tuple(prompt), tuple(ids[:length]), reason, tuple(logp[:length]), stop, kept))
    return done
