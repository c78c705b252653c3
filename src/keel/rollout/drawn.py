"""What an engine is asked for, what it has drawn so far, and the completions that it makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from keel.accel.decode_step import Step
from keel.data.stops import StopTexts
from keel.rollout.protocol import TokenCount
from keel.types import Completion, Sampling, StopReason


@dataclass(frozen=True, slots=True)
class Asked:
    """What every way to sample works on."""

    model: PreTrainedModel
    prompts: Sequence[Sequence[int]]
    draws: Tensor  # (N, max_new_tokens) uniform numbers, on the model's device
    sampling: Sampling
    stop_ids: Sequence[int]
    stop_texts: StopTexts | None
    pad_id: int
    seen: list[Tensor] | None  # where `models.head.capture_head_input` puts what the head is given
    work: TokenCount
    limits: Tensor  # (N,) the most tokens of each response, on the model's device
    # a step and a reading of prompts that call nothing of the model, and fill `seen` themselves
    step: Step | None = None

    @property
    def steps(self) -> int:
        """The most tokens of a response."""
        return int(self.limits.max()) if len(self.limits) else 0

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and its response."""
        whole = (len(p) + n for p, n in zip(self.prompts, self.limits.tolist(), strict=True))
        return max(whole, default=0)


@dataclass
class Drawn:
    """What has been drawn so far, by prompt and token."""

    tokens: Tensor  # (N, max_new_tokens)
    logps: Tensor  # (N, max_new_tokens)
    stop_ids: Tensor
    stop_texts: StopTexts | None
    hidden: Tensor | None = None  # (N, max_new_tokens, d)
    ends: dict[int, tuple[int, str]] = field(default_factory=dict)  # prompt → length and stop string

    @classmethod
    def open(cls, draws: Tensor, stop_ids: Sequence[int], stop_texts: StopTexts | None) -> Drawn:
        """Nothing yet; draws: (N, max_new_tokens)."""
        tokens, logps = (
            torch.zeros_like(draws, dtype=torch.long),
            torch.zeros_like(draws, dtype=torch.float32),
        )
        if stop_texts is not None:
            stop_texts = replace(stop_texts, closing=stop_texts.closing.to(draws.device))
        return cls(
            tokens, logps, torch.tensor(list(stop_ids), dtype=torch.long, device=draws.device), stop_texts
        )

    def ended(self, rows: Tensor, newest: Tensor, made: Tensor, part: slice | Tensor) -> Tensor:
        """(n,) by slot: whether the newest token is a stop, or a stop string stands in what the rows of
        `part` have by now."""
        found = torch.isin(newest, self.stop_ids)
        if (stops := self.stop_texts) is None:
            return found
        maybe = torch.zeros_like(found)
        maybe[part] = stops.may_end(newest[part])
        for slot in maybe.nonzero().flatten().tolist():
            row, length = int(rows[slot]), int(made[slot])
            if stop := stops.closed_by(self.tokens[row, :length].tolist()):
                self.ends[row], found[slot] = (length, stop), True
        return found

    def put(self, where: tuple[Tensor, Tensor], tokens: Tensor, logps: Tensor, last: Tensor | None) -> None:
        """A token of some prompts; last: what the head was given for it."""
        self.tokens[where] = tokens
        self.logps[where] = logps.to(self.logps.dtype)
        if last is None:
            return
        if self.hidden is None:  # zeros are written, so all of it is resident from here on
            self.hidden = last.new_zeros(*self.tokens.shape, last.shape[-1])
        self.hidden[where] = last

    def completion(self, row: int, prompt: Sequence[int], length: int) -> Completion:
        """Of a row that has ended, with `length` tokens."""
        ids, logp = self.tokens[row, :length].tolist(), self.logps[row, :length].tolist()
        stops = self.stop_ids.tolist()
        reason: StopReason = "length"
        stop = ""
        if ids[-1] in stops:
            reason = "eos" if ids[-1] == stops[0] else "stop"
        elif row in self.ends:
            reason, stop = "stop", self.ends[row][1]
        hidden = None if self.hidden is None else self.hidden[row, :length].clone()
        return Completion(tuple(prompt), tuple(ids), reason, tuple(logp), stop, hidden)

    def forget(self, row: int) -> None:
        """A row draws anew."""
        self.ends.pop(row, None)
        self.tokens[row] = 0


def last_given(seen: list[Tensor], source: Tensor | None = None) -> Tensor:
    """(n, d) what the head was given at the last position of each row, or of the rows `source`; the list is
    emptied."""
    given = seen.pop()
    seen.clear()
    last = given[:, -1] if given.dim() == 3 else given
    return last if source is None else last[source]


def limits_of(limits: Sequence[int] | None, draws: Tensor) -> Tensor:
    """(N,) the most tokens of each response, on the device of (N, max_new_tokens) draws."""
    most = [draws.shape[1]] * len(draws) if limits is None else list(limits)
    return torch.tensor(most, dtype=torch.long, device=draws.device)


def completions_of(prompts: Sequence[Sequence[int]], drawn: Drawn, limits: Tensor) -> list[Completion]:
    """Each row up to its first stop token, or to its limit: (N,)."""
    tokens, logps, hidden, stops = drawn.tokens, drawn.logps, drawn.hidden, drawn.stop_ids
    within = torch.arange(tokens.shape[1], device=tokens.device) < limits[:, None]
    ends = torch.isin(tokens, stops) & within  # behind its limit a row has zeros, which are no tokens
    ended = ends.any(dim=1).tolist()
    lengths = torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, limits).tolist()
    eos = int(stops[0]) if len(stops) else None
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
