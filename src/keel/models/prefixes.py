"""Sequences that begin alike are read as one: their common start once, what differs side by side behind it (2410.20305).

The two sides of a comparison have their prompt in common, and so have all samples of a group. Each token sees the common start
and what stands before it in its own sequence, by a mask of its own and with the position that it has there, so that the states
are those of the sequences read one by one. Whether a model takes such a mask is tried out on it once; whether reading
together pays is reckoned from its sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import takewhile
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from keel.models.head import evaluating
from keel.models.last_layer import DEARER, MASK_AT_MOST, looked_at, weight_of
from keel.models.load import has_dropout

WORTH = 0.95  # of the cost of reading apart
WINDOWS = ("sliding_window", "window_size", "attention_window", "attention_chunk_size")  # names in a config
KINDS = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gpt_neox",
    "gpt2",
)  # model types that take masks (tests)
_tried: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

Forward = Callable[..., Tensor]  # input_ids (R, W) and more inputs → (R, W, d)


@dataclass(frozen=True, slots=True)
class Layout:
    """R rows of W tokens in which B sequences are read together."""

    ids: Tensor  # (R, W)
    inputs: dict[str, Tensor]  # positions (R, W) and mask (R, 1, W, W); none where each row is a sequence
    index: Tensor  # (N,) into the flattened ids: the positions that were asked for


def read(key: nn.Module, model: Any, forward: Forward, ids: Tensor, index: Tensor) -> Tensor:
    """(N, d) states at `index` of the flattened (B, S) ids, which are padded on the right; no token behind the last position
    asked for in a row is needed. key: the module that stands for the model in what is remembered of it."""
    found = _laid_out(key, model, forward, ids, index)
    if found is None:
        found = Layout(ids, {}, index)
    count(model, found.ids.numel())
    with looked_at(model, found.index, found.ids.shape):
        states = forward(input_ids=found.ids, **found.inputs)
    return states.flatten(0, 1).index_select(0, found.index)


# ---------------------------------------------------------------- how much was read


_read: ContextVar[dict[int, int] | None] = ContextVar("read", default=None)


@contextmanager
def counting() -> Iterator[Callable[[], int]]:
    """Within it, a function that says how many tokens the model that read most was given, with padding."""
    tokens: dict[int, int] = {}
    token = _read.set(tokens)
    try:
        yield lambda: max(tokens.values(), default=0)
    finally:
        _read.reset(token)


def count(model: Any, tokens: int) -> None:
    """A model was given so many tokens."""
    if (counted := _read.get()) is not None:
        counted[id(model)] = counted.get(id(model), 0) + tokens


# ---------------------------------------------------------------- which sequences


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences by their numbers, and how many tokens they begin with in common."""

    rows: list[int]
    common: int
    width: int  # tokens of the common start and of all that follows


def _laid_out(key: nn.Module, model: Any, forward: Forward, ids: Tensor, index: Tensor) -> Layout | None:
    """The layout, where some sequences are worth reading together and the model can."""
    config = model.config.get_text_config()
    if len(ids) < 2 or not len(index) or (getattr(model, "training", False) and has_dropout(model)):
        return None  # what is drawn at random, each sequence draws for itself
    reach = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    reach.scatter_reduce_(0, index // ids.shape[1], index % ids.shape[1] + 1, "amax")
    sequences = [row[:end] for row, end in zip(ids.tolist(), reach.tolist(), strict=True)]
    weight = _weight(config)
    if weight is None:
        return None
    groups = together(sequences, weight, width_limit(len(ids), _dtype(key).itemsize, window_of(config)))
    if not groups or not _takes_masks(key, model, forward):
        return None
    return _layout(sequences, groups, ids, index, _dtype(key))


def together(sequences: Sequence[Sequence[int]], weight: float, widest: float) -> list[Group]:
    """How the sequences of a forward are read, each in one of the groups; empty where apart."""
    return worth_it(grouped(sequences, weight, widest), [*map(len, sequences)], weight)


def grouped(sequences: Sequence[Sequence[int]], weight: float, widest: float) -> list[Group]:
    """The sequences in groups that are worth reading together, each at most `widest` tokens wide.

    weight: what a token's products with the weights cost, in units of one token's attention to another.
    """
    groups: list[Group] = []
    order = sorted(range(len(sequences)), key=lambda i: tuple(sequences[i]))
    for before, i in zip([-1, *order], order):
        length = len(sequences[i])
        if groups and length:
            last = groups[-1]
            common = min(last.common, _in_common(sequences[before], sequences[i]))
            lengths = [len(sequences[row]) for row in last.rows] + [length]
            width = common + sum(n - common for n in lengths)
            apart = _cost(last.width, weight) + _cost(length, weight)
            if common > 0 and width <= widest and _cost(width, weight) < WORTH * apart:
                groups[-1] = Group([*last.rows, i], common, width)
                continue
        groups.append(Group([i], length, length))
    return groups


def worth_it(groups: Sequence[Group], lengths: Sequence[int], weight: float) -> list[Group]:
    """The groups, if their rows, all padded to the widest of them, cost less than all sequences padded to the longest; wide groups
    are taken apart until they do. Empty if they never do. lengths: of the sequences."""
    groups = sorted(groups, key=lambda group: group.width)
    apart = len(lengths) * _cost(max(lengths), weight)
    while any(len(group.rows) > 1 for group in groups):
        if len(groups) * _cost(groups[-1].width, weight) < WORTH * apart:
            return groups
        widest = next(group for group in reversed(groups) if len(group.rows) > 1)
        groups.remove(widest)
        alone = [Group([row], lengths[row], lengths[row]) for row in widest.rows]
        groups = sorted([*groups, *alone], key=lambda group: group.width)
    return []


def _in_common(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other)))


def _cost(width: int, weight: float) -> float:
    return width * weight + DEARER * width * width


def _weight(config: Any) -> float | None:
    """`last_layer.weight_of`; None where layers differ."""
    hidden = getattr(config, "hidden_size", None) or 1024
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    return weight_of(hidden, inner) if isinstance(hidden, int) and isinstance(inner, int) else None


def window_of(config: Any) -> int | None:
    """Tokens that a position of the model sees at most, where its config bounds them."""
    return min((w for name in WINDOWS if isinstance(w := getattr(config, name, None), int)), default=None)


def width_limit(rows: int, itemsize: int, window: int | None) -> float:
    """Tokens of a row that is no wider than the model's window, and whose mask, for as many rows, is no bigger than allowed.
    itemsize: bytes of a number of the mask."""
    of_mask = (MASK_AT_MOST / (itemsize * rows)) ** 0.5
    return of_mask if window is None else min(of_mask, window)


# ---------------------------------------------------------------- how they are laid out


def _layout(
    sequences: Sequence[Sequence[int]],
    groups: Sequence[Group],
    ids: Tensor,
    index: Tensor,
    dtype: torch.dtype,
) -> Layout:
    width = max(group.width for group in groups)
    tokens, positions, branches = ([[0] * width for _ in groups] for _ in range(3))
    where = torch.zeros(ids.shape, dtype=torch.long)
    for row, group in enumerate(groups):
        common, at = group.common, group.common
        tokens[row][:common] = sequences[group.rows[0]][:common]
        positions[row][:common] = range(common)
        for branch, i in enumerate(group.rows, start=1):
            own = sequences[i][common:]
            end = at + len(own)
            tokens[row][at:end], positions[row][at:end] = own, range(common, common + len(own))
            branches[row][at:end] = [branch] * len(own)
            where[i, :common] = row * width + torch.arange(common)
            where[i, common : common + len(own)] = row * width + torch.arange(at, end)
            at = end
        branches[row][at:] = [-1] * (width - at)
    device = ids.device
    branch = torch.tensor(branches, device=device)
    seen = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    seen &= torch.ones(width, width, dtype=torch.bool, device=device).tril()
    mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, torch.finfo(dtype).min)
    return Layout(
        torch.tensor(tokens, device=device),
        {"position_ids": torch.tensor(positions, device=device), "attention_mask": mask[:, None]},
        where.to(device).flatten()[index],
    )  # fmt: skip


# ---------------------------------------------------------------- whether a model can


def _takes_masks(key: nn.Module, model: Any, forward: Forward) -> bool:
    """Whether the model's states are the same for sequences read together and apart: tried out once."""
    if key not in _tried:
        _tried[key] = getattr(model.config, "_attn_implementation", None) in ("sdpa", "eager") and _same(
            key, model, forward
        )
    return _tried[key]


def _same(key: nn.Module, model: Any, forward: Forward) -> bool:
    device, vocab = next(key.parameters()).device, model.config.get_text_config().vocab_size
    sequences = [
        [i % vocab for i in row] for row in ([1, 2, 3, 4, 5], [1, 2, 3, 6, 7, 8, 9], [1, 2, 3, 5, 4, 6])
    ]
    ids = torch.tensor([row + [0] * (7 - len(row)) for row in sequences], device=device)
    index = torch.tensor(
        [row * 7 + i for row, own in enumerate(sequences) for i in range(len(own))], device=device
    )
    together = _layout(sequences, [Group([0, 1, 2], 3, 12)], ids, index, _dtype(key))
    with evaluating(model), torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            apart = forward(input_ids=ids).flatten(0, 1)[index]
            found = forward(input_ids=together.ids, **together.inputs).flatten(0, 1)[together.index]
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError):
            return False
    rough = 3e-2 if apart.dtype in (torch.float16, torch.bfloat16) else 1e-4
    return torch.allclose(found.float(), apart.float(), rtol=rough, atol=rough * float(apart.abs().max()))


def _dtype(key: nn.Module) -> torch.dtype:
    return next((p.dtype for p in key.parameters() if p.is_floating_point()), torch.float32)
