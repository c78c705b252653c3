"""A teacher with another tokenizer, asked through text.

Its distribution over the student's tokens does not exist, but it gives each stretch of the student's reply a
probability, in tokens of its own. Both tokenisations are laid beside each other; where both have an end, a
chunk ends, and with i over the student's and j over the teacher's tokens of a chunk c

    gap_c = Σ_j log p(b_j | prefix) − Σ_i log π(a_i | prefix)

−gap_c, summed over the chunks, is a sample of KL(π ‖ p) over texts, and Σ_c gap_c Σ_i ∇ log π(a_i) an
estimate of minus the gradient that `keel.algorithms.distillation` has in full: with the same tokenizer every
chunk is a token, and the two are the same in expectation. As there, no gradient flows through what is
sampled later. The mean gap of the batch is subtracted as a baseline. It is a sample where the full divergence
is exact, so it is noisier: it takes more replies an update. (A text has other tokenisations than the one
that was sampled or made. Their probability is left out on both sides.)

The teacher reads the prompt in its own chat template, and the reply's text; the token that ends the student's
reply is compared with the one that ends the teacher's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from keel.data import chat
from keel.data.batches import by_length, pad
from keel.distributed import group, sharded
from keel.errors import UsageError
from keel.models.load import context_length
from keel.models.logprobs import head_inputs, response_index, scatter_to_mask, token_logprobs
from keel.models.tokenizer import known_ids
from keel.types import Completion, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Gaps:
    """What a teacher makes of replies, at the student's tokens."""

    gap: Tensor  # (B, T) of the chunk that the token is in, in nats; 0 where nothing is compared
    share: Tensor  # (B, T) −gap divided by the chunk's tokens: what they have of the sampled KL
    mask: Tensor  # (B, T) True at tokens of a chunk; the end of a reply that was cut off may be in none

    @property
    def sampled_kl(self) -> Tensor:
        """(B,) a sample of KL(π ‖ p), in nats a reply."""
        return self.share.sum(dim=1)


def ends_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, list[int | None]]:
    """The text of some tokens without space around it, and how many of its characters each token brings it
    to; None within a character. Reads the text once for each token."""
    whole = chat.reply_text(tokenizer, ids)
    before, bare = len(whole) - len(whole.lstrip()), whole.strip()
    ends: list[int | None] = []
    for number in range(1, len(ids) + 1):
        part = chat.reply_text(tokenizer, ids[:number])
        inside = min(max(len(part) - before, 0), len(bare))
        ends.append(inside if whole.startswith(part) and not part.endswith("\ufffd") else None)
    return bare, ends


def chunks(student: Sequence[int | None], teacher: Sequence[int | None]) -> list[tuple[int, int]]:
    """Of two tokenisations of one text, by how far each token brings it: (tokens of the first, of the second)
    up to the end of each chunk. A token that brings it no further belongs to the one before."""

    def last(ends: Sequence[int | None]) -> dict[int, int]:
        known = [(end, number) for number, end in enumerate(ends, 1) if end]
        return {
            end: max(number for _, number in same) for end, same in groupby(known, key=lambda one: one[0])
        }

    ours, theirs = last(student), last(teacher)
    return [(ours[end], theirs[end]) for end in sorted(ours.keys() & theirs.keys())]


@dataclass(frozen=True, slots=True)
class _Laid:
    """A reply in both tokenisations."""

    prompt: list[int]  # the teacher's tokens
    reply: list[int]
    chunks: list[tuple[int, int]]

    def within(self, room: int | None) -> _Laid:
        """Cut to so many tokens of the teacher's; None: as it is."""
        kept = len(self.reply) if room is None else room - len(self.prompt)
        if kept < 1 and self.reply:
            raise UsageError(
                f"the teacher reads {room} tokens, and a prompt is {len(self.prompt)} of its own: lower "
                "max_length, or take a teacher that reads more"
            )
        return _Laid(self.prompt, self.reply[:kept], [pair for pair in self.chunks if pair[1] <= kept])


def _laid(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, prompt: Prompt, completion: Completion
) -> _Laid:
    by_token = completion.ended and not completion.stop  # the last token is no text
    own = list(completion.ids[:-1] if by_token else completion.ids)
    text, ours = ends_of(student, own)
    said: Any = chat.reply_text(student, own)
    if not isinstance(prompt, str):
        said = ({"role": "assistant", "content": text},)
    *reply, end = chat.sampled_ids(teacher, prompt, said)
    same, theirs = ends_of(teacher, reply)
    found = chunks(ours, theirs) if same == text else [(len(own), len(reply))] if own and reply else []
    if by_token:
        reply, found = [*reply, end], [*found, (len(own) + 1, len(reply) + 1)]
    return _Laid(chat.prompt_ids(teacher, prompt), reply, found)


def gaps(
    teacher: Any,
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    logp: Tensor,
    *,
    temperature: float,
    device: torch.device,
    micro_batch: int | None = None,
    micro_tokens: int | None = None,
) -> Gaps:
    """What the teacher makes of B replies; no gradient. tokenizers: the student's and the teacher's. logp:
    (B, T) log π of the student's tokens. micro_batch, micro_tokens: rows and tokens of one forward.
    UsageError for a prompt that leaves the teacher no room for a reply; of a reply it is asked about as much
    as it has room for."""
    room = context_length(teacher.config)
    laid = [_laid(*tokenizers, *one).within(room) for one in zip(prompts, completions, strict=True)]
    theirs = _logprobs(
        teacher, tokenizers[1], laid, temperature, device, micro_batch=micro_batch, micro_tokens=micro_tokens
    )
    gap, share, mask = (
        torch.zeros_like(logp),
        torch.zeros_like(logp),
        torch.zeros(logp.shape, dtype=torch.bool),
    )
    for row, (one, said) in enumerate(zip(laid, theirs, strict=True)):
        i = j = 0
        for to, until in one.chunks:
            value = float(said[j:until].sum() - logp[row, i:to].double().sum())
            gap[row, i:to], share[row, i:to], mask[row, i:to] = value, -value / (to - i), True
            i, j = to, until
    return Gaps(gap, share, mask)


def lend(teacher: Any, device: torch.device, parts: int = 0) -> None:
    """Where a teacher is cut over ranks, its forwards that others make beyond the `parts` of this rank, for
    nothing; every rank has to ask."""
    if not sharded.is_cut(teacher):
        return
    nothing = torch.zeros(1, 1, dtype=torch.long, device=device)
    with torch.no_grad():
        for _ in range(max(group.gathered_late(parts)) - parts):
            head_inputs(teacher, nothing, nothing[0])


def _logprobs(
    teacher: Any,
    tokenizer: PreTrainedTokenizerBase,
    laid: Sequence[_Laid],
    temperature: float,
    device: torch.device,
    *,
    micro_batch: int | None,
    micro_tokens: int | None,
) -> list[Tensor]:
    """(N,) log p of the teacher's tokens of each reply, float64 on the CPU."""
    found: list[Tensor] = [torch.zeros(0, dtype=torch.float64)] * len(laid)
    lengths = [len(one.prompt) + len(one.reply) for one in laid]
    with torch.no_grad():
        parts = list(by_length(lengths, micro_batch, micro_tokens))
        lend(teacher, device, len(parts))
        for rows in parts:
            ids, _ = pad([[*laid[row].prompt, *laid[row].reply] for row in rows], chat.ensure_pad(tokenizer))
            counted = torch.tensor([len(laid[row].reply) for row in rows])
            mask = torch.arange(int(counted.max()))[None, :] < counted[:, None]
            starts = torch.tensor([len(laid[row].prompt) for row in rows])
            index = response_index(mask, starts, ids.shape[1])
            tokens = ids.flatten()[index + 1]
            inputs = head_inputs(teacher, ids.to(device), index.to(device))
            vocab = known_ids(tokenizer)
            said = token_logprobs(inputs, tokens.to(device), temperature, vocab=vocab).logp
            whole = scatter_to_mask(said.double().cpu(), mask)
            for place, row in enumerate(rows):
                found[row] = whole[place, : len(laid[row].reply)]
    return found
