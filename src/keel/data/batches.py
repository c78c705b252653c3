"""Rows into batches: seeded order, packing, padding. Order is a function of (seed, step), so resuming needs
no cursor."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Hashable, Sequence
from functools import lru_cache

import torch
from torch import Tensor


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any values; the same on every machine and in every process."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@lru_cache(maxsize=8)
def permutation(rows: int, seed: int, epoch: int) -> Sequence[int]:
    """The order of `rows` rows in pass `epoch`, in eight bytes a row."""
    generator = torch.Generator().manual_seed(derive_seed("order", seed, epoch))
    return array("q", torch.randperm(rows, generator=generator).numpy().tobytes())


def rows_of_step(rows: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Row indices of optimiser step `step` (from 0). Passes follow each other without a short batch
    between."""
    start = step * batch_size
    return [
        permutation(rows, seed, position // rows)[position % rows]
        for position in range(start, start + batch_size)
    ]


def pad(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """Right-pad to the longest: ids (B, S) and lengths (B,)."""
    lengths = [len(row) for row in rows]
    width = max(lengths)
    ids = torch.full((len(rows), width), value, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.as_tensor(row, dtype=torch.long)
    return ids, torch.tensor(lengths)


def by_length(
    lengths: Sequence[int],
    rows: int | None = None,
    tokens: int | None = None,
    together: Sequence[Hashable] | None = None,
) -> list[list[int]]:
    """Indices in parts of similar length, shortest first: at most `rows` in a part, and at most `tokens` with
    the padding (a row that is longer has a part of its own). All in one part where neither is given.

    together: rows with the same value, which begin alike, stand side by side, in one part where it holds them
    all.
    """
    alike = _alike(lengths, together)
    if rows is None and tokens is None:
        return [[index for group in alike for index in group]] if lengths else []
    parts: list[list[int]] = []
    for group in alike:
        whole = [*(parts[-1] if parts else []), *group]
        if parts and not _fits(whole, lengths, rows, tokens) and _fits(group, lengths, rows, tokens):
            parts.append([])
        for index in group:
            if not parts or (parts[-1] and not _fits([*parts[-1], index], lengths, rows, tokens)):
                parts.append([])
            parts[-1].append(index)
    return [part for part in parts if part]


def _alike(lengths: Sequence[int], together: Sequence[Hashable] | None) -> list[list[int]]:
    """Indices by what they have in common, those with the shorter longest row first, each sorted by
    length."""
    groups: dict[Hashable, list[int]] = {}
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        groups.setdefault(index if together is None else (together[index],), []).append(index)
    return sorted(groups.values(), key=lambda group: (lengths[group[-1]], group[-1]))


def _fits(part: Sequence[int], lengths: Sequence[int], rows: int | None, tokens: int | None) -> bool:
    longest = max(lengths[i] for i in part)
    return (rows is None or len(part) <= rows) and (tokens is None or len(part) * longest <= tokens)


def useful_tokens(rows: Sequence[tuple[tuple[int, ...], int]]) -> int:
    """Tokens of rows, each given by its prompt and its length with it, that nobody can do without: every
    different prompt's once, and every response's but the last, which nothing follows."""
    responses = sum(length - len(prompt) - 1 for prompt, length in rows)
    return responses + sum(map(len, {prompt for prompt, _ in rows}))


def pairs_of(length: int) -> int:
    """Pairs of a token and one that it attends to, itself included, in so many tokens."""
    return length * (length + 1) // 2


def useful_pairs(rows: Sequence[tuple[tuple[int, ...], int]]) -> int:
    """As `useful_tokens`, of pairs of a token and one that it attends to."""
    responses = sum(pairs_of(length - 1) - pairs_of(len(prompt)) for prompt, length in rows if length)
    return responses + sum(pairs_of(len(prompt)) for prompt in {prompt for prompt, _ in rows})


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """(B,) lengths → (B, width), True at the first `length` positions."""
    return torch.arange(width, device=lengths.device)[None, :] < lengths[:, None]


def pack_stream(documents: Sequence[Sequence[int]], length: int) -> list[list[int]]:
    """Join documents (each ending in EOS) and cut into rows of `length` tokens; the last row may be shorter.

    Every row after the first starts with the last token of the row before it, so that each token of the
    stream is predicted once.
    """
    stream = [token for document in documents for token in document]
    starts = range(0, max(len(stream) - 1, 1), length - 1)
    return [stream[start : start + length] for start in starts]


def pack_examples(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Group examples into rows of at most `capacity` tokens: first-fit, longest first. Returns their
    indices.

    The first row with enough room is found in a tree of the room in rows: each node holds the largest of its
    two halves.
    """
    leaves = 1
    while leaves < len(lengths):
        leaves *= 2
    room = array("q", [capacity]) * (2 * leaves)  # rows not begun yet have all of it
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"example {index} has {length} tokens, more than a row of {capacity}")
        node = 1
        while node < leaves:
            node *= 2
            node += room[node] < length
        if node - leaves == len(rows):
            rows.append([])
        rows[node - leaves].append(index)
        room[node] -= length
        while node := node // 2:
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows
