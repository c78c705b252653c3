"""Rows that stream through the slots of one key–value cache: prompts, and conversations that go on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from keel.accel import decode_graphs, decode_static, decode_step, kept_turns
from keel.accel.kept_turns import Kept
from keel.accel.kv_slots import Slots
from keel.accel.last_layer import last_layer_at
from keel.accel.modules import logits_of_last, with_cache
from keel.models.precision import autocast_on
from keel.rollout.drawn import Asked, Drawn, completions_of, last_given
from keel.rollout.protocol import Answer, GenerationRequest, turn_seed
from keel.rollout.sampling import pick, uniform_draws
from keel.types import Completion

# columns of the cache beyond the longest sequence, and their share of it: a shift to the left, which reads
# and writes all that is kept, is due after as many steps
SPARE_COLUMNS, SPARE_SHARE = 32, 16
KEPT_SHARE = 4  # rows that wait for a slot keep a 1/4 of what the slots hold, at most; others are read again
TOGETHER = 8  # rows that go on are read together once they are 1/8 of those in slots, or slots are all free
ALIKE = 32  # tokens to read, up to which rows are alike; beyond, within powers of two


class Turns:
    """The conversations of a request: what each row has so far, and those that go on."""

    def __init__(self, asked: Asked, request: GenerationRequest, answer: Answer) -> None:
        self._asked, self._answer, self._longest = asked, answer, asked.longest
        self.whole = [tuple(prompt) for prompt in request.prompts]  # of each row, all tokens so far
        self.turn = [0] * len(self.whole)
        self.ready: dict[int, Kept | None] = {}  # rows that go on, the first to do so first
        self._held = 0  # tokens that these keep

        @lru_cache(maxsize=4)
        def draws(turn: int) -> Tensor:
            seed = turn_seed(request.seed, turn)
            return uniform_draws(len(request.prompts), request.sampling, seed, request.rows)

        self._draws = draws

    def take(self, drawn: Drawn, row: int, made: int, slots: Slots, slot: int) -> None:
        """A row has ended its turn, with `made` tokens, and is still in its slot."""
        prompt = self.whole[row]
        completion = drawn.completion(row, prompt, made)
        read = self.whole[row] = (*prompt, *completion.ids)
        following = self._answer(row, completion)
        if following is None:
            return
        whole = self.whole[row] = tuple(following.prompt)
        most, draws = self._asked.limits, self._asked.draws
        if not 0 < following.limit <= min(draws.shape[1], self._longest - len(whole)):
            raise ValueError(
                "a turn begins within the tokens that its row began with, and leaves some, but no more than "
                "max_new_tokens"
            )
        self.turn[row] += 1
        draws[row] = self._draws(self.turn[row])[row].to(draws.device)
        most[row] = following.limit
        drawn.forget(row)
        kept = None
        room = slots.capacity * slots.columns // KEPT_SHARE - self._held
        if whole[: len(read)] == read and len(read) - 1 <= room:
            kept = kept_turns.keep(slots, slot)
            self._held += kept.length
        self.ready[row] = kept

    def next(self, slots: Slots) -> list[tuple[int, Kept | None]]:
        """Rows that are read together now, with what they keep; none where it is better to wait for more of
        them. Those that have about as much to read as the first."""
        free = slots.capacity - len(slots)
        if not self.ready or not free or len(self.ready) < min(free, len(slots) // TOGETHER):
            return []

        def size(row: int) -> int:
            return max(ALIKE, kept_turns.unread(self.whole[row], self.ready[row]) - 1).bit_length()

        first = size(next(iter(self.ready)))
        # a few at a time: each takes what it keeps once more while it is read
        most = min(free, max(1, slots.capacity // KEPT_SHARE))
        rows = [row for row in self.ready if size(row) == first][:most]
        taken = [(row, self.ready.pop(row)) for row in rows]
        self._held -= sum(kept.length for _, kept in taken if kept)
        return taken


class Stream:
    """All prompts of a request through the slots; with `turns`, and what follows on them."""

    def __init__(
        self, asked: Asked, batch_size: int, steps: decode_graphs.Captured | None, turns: Turns | None = None
    ) -> None:
        """steps: the recorded ones."""
        model, prompts = asked.model, asked.prompts
        device, longest = asked.draws.device, asked.longest
        # transformers' own cache makes float32 of the values where the rotated keys are
        kept = torch.bfloat16 if autocast_on(model, device) else None
        self.asked, self.turns, self._recorded, self._stopped = asked, turns, steps is not None, False
        spare = max(SPARE_COLUMNS, longest // SPARE_SHARE)
        self.slots = Slots(min(batch_size, len(prompts)), longest + spare, device, kept)
        if steps is not None:
            self._forward = decode_graphs.Step(model, steps, self.slots, longest, asked.seen)
        else:
            self._forward = asked.step
            if asked.step is None and decode_step.fits(model, asked.steps):
                self._forward = decode_step.Step(model, longest, asked.steps)
        self._seen = asked.seen if asked.step else None  # a hook fills it otherwise
        self.drawn = Drawn.open(asked.draws, asked.stop_ids, asked.stop_texts)
        # of similar length, so that little is padded; equal ones side by side, so that they are read once
        self.waiting = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), tuple(prompts[i]), i))
        # (n,) by slot: prompt, token, how many
        self.rows = self.newest = self.made = torch.zeros(0, dtype=torch.long, device=device)

    def run(self) -> list[Completion]:
        """One completion a prompt, in order: the last of each, with turns."""
        asked, slots = self.asked, self.slots
        while not self._stopped and (self.waiting or len(slots) or (self.turns and self.turns.ready)):
            # 1. rows that go on, or waiting prompts, take free slots, several at a time; or all take a step
            logits, source, fresh = self._going_on() or self._begun() or self._stepped()
            # 2. a token each
            part = slice(len(self.rows) - fresh, None) if fresh else slice(None)
            rows, made = self.rows[part], self.made[part]
            chosen, logp = pick(logits, asked.draws[rows, made], asked.sampling)
            last = last_given(asked.seen, source) if asked.seen else None
            self.drawn.put((rows, made), chosen, logp, last)
            self.newest = torch.cat([self.newest[:-fresh], chosen]) if fresh else chosen
            self.made = torch.cat([self.made[:-fresh], made + 1]) if fresh else made + 1
            # 3. rows that have ended leave
            self._leave(part)
        return completions_of(asked.prompts, self.drawn, asked.limits) if self.turns is None else []

    def stop(self) -> None:
        """End before the next step, whatever is missing then."""
        self._stopped = True

    def _leave(self, part: slice) -> None:
        ended = self.drawn.ended(self.rows, self.newest, self.made, part)
        going = (self.made < self.asked.limits[self.rows]) & ~ended
        if bool(going.all()):
            return
        if self.turns is not None:
            for slot in (~going).nonzero().flatten().tolist():
                self.turns.take(self.drawn, int(self.rows[slot]), int(self.made[slot]), self.slots, slot)
        order = self.slots.keep(going)
        self.rows, self.newest, self.made = self.rows[order], self.newest[order], self.made[order]

    def _admitted(self, rows: Sequence[int]) -> None:
        device = self.rows.device
        self.rows = torch.cat([self.rows, torch.tensor(rows, device=device)])
        self.newest, self.made = (torch.cat([x, x.new_zeros(len(rows))]) for x in (self.newest, self.made))

    def _going_on(self) -> tuple[Tensor, Tensor | None, int] | None:
        """(n, V) logits of rows that go on, which of those of the forward each has, and how many they are;
        None where none does yet."""
        if self.turns is None or not (taken := self.turns.next(self.slots)):
            return None
        asked, whole = self.asked, self.turns.whole
        read = [(whole[row], kept) for row, kept in taken]
        asked.work.computed += len(read) * max(kept_turns.unread(*one) for one in read)
        asked.work.passes += 1
        logits = kept_turns.read_on(asked.model, read, self.slots, asked.pad_id)
        self._admitted([row for row, _ in taken])
        return logits, None, len(taken)

    def _begun(self) -> tuple[Tensor, Tensor | None, int] | None:
        """As `_going_on`, of prompts that begin."""
        slots, asked = self.slots, self.asked
        free = slots.capacity - len(slots)
        if not self.waiting or (len(slots) and free < max(1, slots.capacity // 8)):
            return None
        fresh, self.waiting = self.waiting[:free], self.waiting[free:]
        new = [tuple(asked.prompts[i]) for i in fresh]
        logits, source = self._read(new)
        asked.work.computed += len(set(new)) * max(map(len, new))
        asked.work.passes += 1
        self._admitted(fresh)
        return logits, source, len(fresh)

    def _stepped(self) -> tuple[Tensor, Tensor | None, int]:
        """(n, V) logits of all rows in slots after a step of each."""
        slots, asked = self.slots, self.asked
        slots.make_room()
        asked.work.computed += decode_static.rows_of(slots) if self._recorded else len(slots)
        asked.work.passes += 1
        forward, newest = self._forward, self.newest
        if isinstance(forward, decode_step.Step):
            logits = forward(newest, slots, self._seen)
        else:
            logits = forward(newest, slots) if forward else _step(asked.model, newest, slots)
        slots.step()
        return logits, None, 0

    def _read(self, prompts: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        """Read each distinct prompt once, padded on the left, into the slots of all that have it: (n, V)
        logits of their first tokens, and (n,) which of the distinct prompts each has."""
        slots, asked, forward = self.slots, self.asked, self._forward
        distinct = list(dict.fromkeys(prompts))
        where = {prompt: i for i, prompt in enumerate(distinct)}
        source, lengths = [where[prompt] for prompt in prompts], [len(prompt) for prompt in distinct]
        width, device = max(lengths), slots.starts.device
        ids = torch.tensor([[asked.pad_id] * (width - len(p)) + list(p) for p in distinct], device=device)
        behind = torch.tensor([width - n for n in lengths], device=device)[:, None]
        own = torch.arange(width, device=device)[None, :] >= behind
        if isinstance(forward, decode_step.Step) and forward.reads:
            logits, kept = forward.read(ids, None if min(lengths) == width else own, self._seen)
            slots.take(kept, lengths, source)
        else:
            logits, cache = _read(asked.model, ids, own)
            if not slots.admit(cache, lengths, source):
                raise RuntimeError(
                    "the cache has no keys and values for each position, as it had when it was tried"
                )
        index = torch.tensor(source, device=device)
        return logits[index], index


def _read(model: PreTrainedModel, ids: Tensor, own: Tensor) -> tuple[Tensor, DynamicCache]:
    """By the model's own forward: (B, W) ids, True at a row's own, → (B, V) logits behind the last ones, and
    their keys and values."""
    cache, (rows, width) = DynamicCache(), ids.shape
    last = torch.arange(width - 1, rows * width, width, device=ids.device)
    with last_layer_at(model, last, ids.shape):
        output = model(
            input_ids=ids, attention_mask=own.long(), position_ids=(own.cumsum(1) - 1).clamp(min=0),
            **with_cache(model, cache), **logits_of_last(model),
        )  # fmt: skip
    return output.logits[:, -1], cache


def _step(model: PreTrainedModel, newest: Tensor, slots: Slots) -> Tensor:
    """(n,) newest tokens → (n, V) logits, by the model's own forward."""
    mask = slots.mask()
    return model(
        input_ids=newest[:, None],
        attention_mask=None if mask is None else mask.long(),
        position_ids=slots.positions[:, None],
        **with_cache(model, slots.cache),
    ).logits[:, -1]
