"""How a model reads the sequences of a batch: what several begin with once, and no padding.

The two sides of a comparison have their prompt in common, and so have all samples of a group: their common
start is read once, what differs side by side behind it (2410.20305). Each token sees the common start and
what stands before it in its own sequence, by a mask of its own and with the position that it has there. And
where rows differ in length, all that is computed token by token is computed of one row without padding
(`attention`). Either way the states are those of the sequences read one by one. Whether a model can is tried
out on it once; whether it pays is reckoned from its sizes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from keel.accel import attention
from keel.accel.attention import Rows
from keel.accel.branch_attention import AT_MOST, Branches
from keel.accel.last_layer import DEARER, MASK_AT_MOST, last_layer_at, weight_of
from keel.accel.modules import HasConfig, has_dropout, pulled, twin_parameters, undisturbed
from keel.accel.patches import difference, disabled, enabled, gradients_differ, trusted

WORTH = 0.95  # of the cost of reading apart
MANY, FEW = 32, 8  # sequences of similar length in a forward, without padding and with it
# what a token costs whose queries, keys and values are laid out for attention, in those of one for which they
# are not
LAYING_OUT = 1.08
BRANCHING = 1.02  # the same where common starts are laid out with what follows them
WINDOWS = (  # names in a config
    "sliding_window",
    "sliding_window_size",
    "window_size",
    "attention_window",
    "attention_window_size",
    "attention_chunk_size",
    "local_attention",
)
KINDS = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gpt_neox",
    "gpt2",
)  # model types that can be read in these ways (tests)
# those that may be read without padding, if a trial agrees (tests): of what others make of a row longer than
# any sequence it says nothing
UNPADDED = frozenset({"llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gpt2", "gpt_neox", "opt"})

Forward = Callable[..., Tensor]  # input_ids (R, W) and more inputs → (R, W, d)


@dataclass(frozen=True, slots=True)
class LaidOutBatch:
    """R rows of W tokens in which B sequences are read, or one row of all their tokens."""

    ids: Tensor  # (R, W) or (1, T)
    inputs: dict[str, Tensor]  # positions and a mask; none where each row is a sequence
    index: Tensor  # (N,) into the flattened ids: the positions that were asked for
    rows: Rows | None = None  # those that the one row stands for


def read(key: nn.Module, model: HasConfig, forward: Forward, ids: Tensor, index: Tensor) -> Tensor:
    """(N, d) states at `index` of the flattened (B, S) ids, which are padded on the right; no token behind
    the last position asked for in a row is needed. key: the module that stands for the model in what is
    remembered of it."""
    found = _laid_out(key, model, forward, ids, index) or LaidOutBatch(ids, {}, index)
    count(model, found.ids.numel())
    with last_layer_at(model, found.index, found.ids.shape, found.rows):
        states = forward(input_ids=found.ids, **found.inputs)
    return states.flatten(0, 1).index_select(0, found.index)


def best_rows(kind: str, window: int | None, *, kernels: bool = True, draws: bool = False) -> int:
    """Sequences of similar length that are best read in one forward, where there are more: few, if they may
    be padded to the longest.

    kind: the model's type. window: see `window_of`. kernels: whether it attends by torch's. draws: whether
    something in it is drawn at random.
    """
    return MANY if kind in UNPADDED and window is None and kernels and not draws else FEW


_one_forward: ContextVar[bool] = ContextVar("one_forward", default=False)


@contextmanager
def one_forward() -> Iterator[None]:
    """Within it `best_rows_of` knows no limit: whoever asks reads all rows in one forward. For weights that
    are cut over processes: each of these has to make as many forwards as the others."""
    token = _one_forward.set(True)
    try:
        yield
    finally:
        _one_forward.reset(token)


def best_rows_of(model: HasConfig) -> int:
    """`best_rows` of a model at work."""
    if _one_forward.get():
        return sys.maxsize
    config = model.config.get_text_config()
    kernels = (
        config._attn_implementation in attention.KERNELS
        and enabled("batch_layout")
        and not _turns_by_length(config)
    )
    return best_rows(config.model_type, window_of(config), kernels=kernels, draws=_draws(model))


def _draws(model: Any) -> bool:
    return getattr(model, "training", False) and has_dropout(model)


# ---------------------------------------------------------------- how much was read


class Counted:
    """What models were given, by model."""

    def __init__(self) -> None:
        self._tokens: dict[int, tuple[int, int]] = {}  # and in how many forwards

    def add(self, model: object, tokens: int) -> None:
        """One more forward of a model."""
        before = self._tokens.get(id(model), (0, 0))
        self._tokens[id(model)] = before[0] + tokens, before[1] + 1

    def __call__(self) -> int:
        """Tokens that the model that read most was given, with padding."""
        return max(self._tokens.values(), default=(0, 0))[0]

    @property
    def passes(self) -> int:
        """Forwards of the model that made most."""
        return max((passes for _, passes in self._tokens.values()), default=0)


_read: ContextVar[Counted | None] = ContextVar("read", default=None)


@contextmanager
def counting() -> Iterator[Counted]:
    """Within it what models are given is counted; called, it says how many tokens."""
    counted = Counted()
    token = _read.set(counted)
    try:
        yield counted
    finally:
        _read.reset(token)


def count(model: object, tokens: int) -> None:
    """A model was given so many tokens in a forward."""
    if (counted := _read.get()) is not None:
        counted.add(model, tokens)


# ---------------------------------------------------------------- which sequences


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences by their numbers, and how many tokens they begin with in common."""

    rows: list[int]
    common: int
    width: int  # tokens of the common start and of all that follows


@dataclass(frozen=True, slots=True)
class ReadStrategy:
    """What can be done with the sequences of a forward."""

    together: bool = True  # what they begin with is read once
    unpadded: bool = True  # no padding


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """How the sequences of a forward are read: each in one of the groups."""

    groups: list[Group]
    unpadded: bool

    @property
    def together(self) -> bool:
        return any(len(group.rows) > 1 for group in self.groups)

    @property
    def width(self) -> int:
        return max(group.width for group in self.groups)

    @property
    def tokens(self) -> int:
        """Without padding."""
        return sum(group.width for group in self.groups)

    @property
    def ways(self) -> ReadStrategy:
        """What it takes."""
        return ReadStrategy(self.together, self.unpadded)


def _laid_out(
    key: nn.Module, model: HasConfig, forward: Forward, ids: Tensor, index: Tensor
) -> LaidOutBatch | None:
    """The layout, where another than the rows themselves is worth it and the model can."""
    config = model.config.get_text_config()
    if len(ids) < 2 or not len(index) or not enabled("batch_layout") or _draws(model):
        return None  # what is drawn at random, each sequence draws for itself
    reach = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    reach.scatter_reduce_(0, index // ids.shape[1], index % ids.shape[1] + 1, "amax")
    sequences = [row[:end] for row, end in zip(ids.tolist(), reach.tolist(), strict=True)]
    weight = _weight(config)
    if weight is None or _turns_by_length(config):
        return None
    sizes = (weight, _dtype(key).itemsize, window_of(config))
    found = arranged(sequences, *sizes)
    if found.ways != ReadStrategy(False, False):
        can = _ways_of(key, model, forward)
        found = arranged(sequences, *sizes, can)
    return (
        None
        if found.ways == ReadStrategy(False, False)
        else _layout(sequences, found, ids, index, _dtype(key))
    )


def arranged(
    sequences: Sequence[Sequence[int]],
    weight: float,
    itemsize: int,
    window: int | None,
    can: ReadStrategy = ReadStrategy(),
) -> BatchLayout:
    """How the sequences are read. weight: see `grouped`; itemsize: bytes of a number of a mask; window: see
    `window_of`."""
    lengths = [*map(len, sequences)]
    alone = [Group([i], length, length) for i, length in enumerate(lengths) if length]
    widths = [group.width for group in alone]
    padded, unpadded = _cost(widths, weight), math.inf
    if can.unpadded and (window is None or max(lengths) <= window):
        unpadded = LAYING_OUT * sum(widths) * weight + len(widths) * DEARER * max(widths) ** 2
    least, found = min(padded, unpadded), BatchLayout(alone, unpadded < padded)
    if not can.together:
        return found
    if unpadded < math.inf:
        groups = [group for group in grouped(sequences, weight, math.inf, branches=True) if group.width]
        cost = _cost_of_branches(groups, lengths, weight)
        if any(len(group.rows) > 1 for group in groups) and cost < WORTH * least:
            least, found = cost / WORTH, BatchLayout(groups, True)
    if window is not None and max(lengths) > window:
        return found  # under a mask of its own a row longer than the window would see beyond it
    widest = width_limit(len(sequences), itemsize, window)
    groups = worth_it(grouped(sequences, weight, widest), lengths, weight)
    if groups and _cost([group.width for group in groups], weight) < WORTH * least:
        return BatchLayout(groups, False)
    return found


def grouped(
    sequences: Sequence[Sequence[int]], weight: float, widest: float, *, branches: bool = False
) -> list[Group]:
    """The sequences in groups that are worth reading together, each at most `widest` tokens wide.

    weight: what a token's products with the weights cost, in units of one token's attention to another.
    branches: attention costs what it costs apart; else a group is a row in which it knows a mask.
    """
    cost = _tokens if branches else _cost
    groups: list[Group] = []
    order = sorted(range(len(sequences)), key=lambda i: tuple(sequences[i]))
    for before, i in zip([-1, *order], order):
        length = len(sequences[i])
        if groups and length:
            last = groups[-1]
            common = min(last.common, _in_common(sequences[before], sequences[i]))
            lengths = [len(sequences[row]) for row in last.rows] + [length]
            width = common + sum(n - common for n in lengths)
            apart = cost([last.width], weight) + cost([length], weight)
            if common > 0 and width <= widest and cost([width], weight) < WORTH * apart:
                groups[-1] = Group([*last.rows, i], common, width)
                continue
        groups.append(Group([i], length, length))
    return groups


def worth_it(groups: Sequence[Group], lengths: Sequence[int], weight: float) -> list[Group]:
    """The groups that have tokens, if reading them costs less than reading all sequences apart; wide groups
    are taken apart until it does. Empty if it never does. lengths: of the sequences."""
    groups = sorted((group for group in groups if group.width), key=lambda group: group.width)
    apart = _cost([length for length in lengths if length], weight)
    while any(len(group.rows) > 1 for group in groups):
        if _cost([group.width for group in groups], weight) < WORTH * apart:
            return groups
        widest = next(group for group in reversed(groups) if len(group.rows) > 1)
        groups.remove(widest)
        alone = [Group([row], lengths[row], lengths[row]) for row in widest.rows if lengths[row]]
        groups = sorted([*groups, *alone], key=lambda group: group.width)
    return []


def _in_common(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other)))


def _cost(widths: Sequence[int], weight: float) -> float:
    """Of rows so wide, padded to the widest."""
    rows, width = len(widths), max(widths)
    return rows * width * weight + rows * DEARER * width * width


def _tokens(widths: Sequence[int], weight: float) -> float:
    """Of rows so wide, by their tokens alone."""
    return sum(widths) * weight


def _cost_of_branches(groups: Sequence[Group], lengths: Sequence[int], weight: float) -> float:
    """Of groups of which each token is read once and attends to its own sequence. Beside a sequence that is
    too long for branches all attend by torch's kernel, with the common start again."""
    shared = [group for group in groups if len(group.rows) > 1]
    starts = max((group.common for group in shared), default=0)
    own = [(lengths[i] - group.common, lengths[i]) for group in shared for i in group.rows]
    own += [(group.width, group.width) for group in groups if len(group.rows) == 1]
    scores = len(shared) * starts**2 + len(own) * max(a for a, _ in own) * max(b for _, b in own)
    if max(lengths) > AT_MOST:
        scores = len(own) * max(lengths) ** 2 / 2  # causal, without a mask
    return BRANCHING * sum(group.width for group in groups) * weight + DEARER * scores


def _weight(config: PreTrainedConfig) -> float | None:
    """`last_layer.weight_of`; None where layers differ."""
    hidden = getattr(config, "hidden_size", None) or 1024
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    return weight_of(hidden, inner) if isinstance(hidden, int) and isinstance(inner, int) else None


def _turns_by_length(config: PreTrainedConfig) -> bool:
    """Whether angles of rotation depend on the longest sequence of a forward, so that no token may be left
    out of it."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    return any(kind in repr(given) for kind in ("dynamic", "longrope"))


def window_of(config: PreTrainedConfig) -> int | None:
    """Tokens that a position of the model sees at most, where its config bounds them."""
    return min((w for name in WINDOWS if isinstance(w := getattr(config, name, None), int)), default=None)


def width_limit(rows: int, itemsize: int, window: int | None) -> float:
    """Tokens of a row that is no wider than the model's window, and whose mask, for as many rows, is no
    bigger than allowed. itemsize: bytes of a number of the mask."""
    of_mask = (MASK_AT_MOST / (itemsize * rows)) ** 0.5
    return of_mask if window is None else min(of_mask, window)


# ---------------------------------------------------------------- how they are laid out


def _layout(
    sequences: Sequence[Sequence[int]],
    arrangement: BatchLayout,
    ids: Tensor,
    index: Tensor,
    dtype: torch.dtype,
) -> LaidOutBatch:
    """index: (N,) into the flattened (B, S) ids."""
    device, groups, width = ids.device, arrangement.groups, arrangement.width
    tokens, positions, branches, places = list[int](), list[int](), list[int](), list[int]()
    at = torch.zeros(ids.shape, dtype=torch.long)  # of a position of the ids, its token among all
    for row, group in enumerate(groups):
        common, first = group.common, len(tokens)
        tokens += sequences[group.rows[0]][:common]
        positions += range(common)
        branches += [0] * common
        for branch, i in enumerate(group.rows, start=1):
            own, end = sequences[i][common:], len(sequences[i])
            at[i, :common] = torch.arange(first, first + common)
            at[i, common:end] = torch.arange(len(tokens), len(tokens) + len(own))
            tokens += own
            positions += range(common, end)
            branches += [branch] * len(own)
        places += range(row * width, row * width + group.width)
    where, flat_ids, flat_positions = (torch.tensor(x) for x in (places, tokens, positions))
    asked = at.flatten()[index.cpu()]
    if arrangement.unpadded:
        rows = _rows(sequences, groups, at, device)
        inputs = {
            "position_ids": flat_positions[None].to(device),
            "attention_mask": attention.mask_for(rows, dtype),
        }
        return LaidOutBatch(flat_ids[None].to(device), inputs, asked.to(device), rows)
    size = (len(groups), width)
    mask = _mask(torch.tensor(branches), where, size, dtype, device) if arrangement.together else None
    padded = torch.zeros(2, len(groups) * width, dtype=torch.long)
    padded[:, where] = torch.stack([flat_ids, flat_positions])
    given, numbers = padded.view(2, *size).to(device)
    inputs = {"position_ids": numbers} | ({} if mask is None else {"attention_mask": mask})
    return LaidOutBatch(given, inputs, where[asked].to(device))


def _rows(
    sequences: Sequence[Sequence[int]], groups: Sequence[Group], at: Tensor, device: torch.device
) -> Rows:
    """The sequences as rows for attention, those of a group one after the other. at: (B, S) the token at each
    of their positions."""
    width = max(len(sequences[i]) for group in groups for i in group.rows)
    columns, where, again, parts = torch.arange(width), [], [], []
    for group in groups:
        own = [at[i, group.common : len(sequences[i])].tolist() for i in group.rows]
        parts.append((at[group.rows[0], : group.common].tolist(), own))
        for i in group.rows:
            start = 0 if i == group.rows[0] else group.common
            where.append((columns >= start) & (columns < len(sequences[i])))
            again.append(columns < start)
    where, again = torch.cat(where).nonzero()[:, 0], torch.cat(again).nonzero()[:, 0]
    rows = sum(len(group.rows) for group in groups)
    if not len(again):
        return Rows.of(where, rows, width, device)
    order = [i for group in groups for i in group.rows]
    repeated = again, at[order, :width].flatten().index_select(0, again)
    # who shares with nobody asks as one row
    branches = Branches.of([([], [a]) if len(b) == 1 else (a, b) for a, b in parts])
    return Rows.of(where, rows, width, device, repeated, branches)


def _mask(
    branches: Tensor, where: Tensor, size: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(R, 1, W, W), additive. branches: (T,) 0 for what a row's sequences have in common, otherwise which of
    them a token belongs to."""
    branch = torch.full((size[0] * size[1],), -1)
    branch[where] = branches
    branch = branch.view(size).to(device)
    seen = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    seen &= torch.ones(size[1], size[1], dtype=torch.bool, device=device).tril()
    mask = torch.zeros(seen.shape, dtype=dtype, device=device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


# ---------------------------------------------------------------- whether a model can


def _ways_of(key: nn.Module, model: HasConfig, forward: Forward) -> ReadStrategy:
    """In which ways the model's states are the same as for sequences read apart: tried once, and once more
    when the model begins to train."""
    config = model.config.get_text_config()
    kernel, kind = getattr(model.config, "_attn_implementation", None), config.model_type
    trains = torch.is_grad_enabled() and any(p.requires_grad for p in _module_of(model).parameters())
    depends_on = _dtype(key), next(key.parameters()).device, kernel, trains
    pair, whole = Group([0, 1], 3, 9), Group([0, 1, 2], 3, 12)
    alone = [Group([0], 5, 5), Group([1], 7, 7), Group([2], 6, 6)]

    def right(what: str, *layouts: BatchLayout) -> bool:
        def trial() -> str | None:
            gaps = (_differs(key, model, forward, layout, trains=trains) for layout in layouts)
            return next(filter(None, gaps), None)

        return trusted("batch_layout", key, trial, depends_on=(what, *depends_on), say=kind in KINDS)

    return ReadStrategy(
        together=kernel in (*attention.KERNELS, "eager") and right("together", BatchLayout([whole], False)),
        unpadded=kernel == attention.NAME
        and kind in UNPADDED
        and right("unpadded", BatchLayout([pair, alone[2]], True), BatchLayout(alone, True)),
    )


def _differs(
    key: nn.Module, model: HasConfig, forward: Forward, layout: BatchLayout, *, trains: bool
) -> str | None:
    """Three sequences read by a layout and by the model's own forward: the states, and their gradients where
    it trains."""
    device, vocab = next(key.parameters()).device, model.config.get_text_config().vocab_size
    sequences = [
        [i % vocab for i in row] for row in ([1, 2, 3, 4, 5], [1, 2, 3, 6, 7, 8, 9], [1, 2, 3, 5, 4, 6])
    ]
    ids = torch.tensor([row + [0] * (7 - len(row)) for row in sequences], device=device)
    positions = [row * 7 + i for row, sequence in enumerate(sequences) for i in range(len(sequence))]
    index = torch.tensor(positions, device=device)
    laid = _layout(sequences, layout, ids, index, _dtype(key))
    module = _module_of(model)
    with (
        undisturbed(module), torch.inference_mode(False), torch.set_grad_enabled(trains),
        torch.autocast(device.type, enabled=False), twin_parameters(module) as twins,
    ):  # fmt: skip
        with disabled():
            theirs = forward(input_ids=ids).flatten(0, 1)[index]
        ours = forward(input_ids=laid.ids, **laid.inputs).flatten(0, 1)[laid.index]
        why = difference("states", ours, theirs)
        if why is not None or not trains or not theirs.requires_grad:
            return why
        return gradients_differ("gradients", pulled(ours, twins), pulled(theirs, twins))


def _module_of(model: Any) -> nn.Module:
    """What has the weights: of the policy without its adapters, the policy."""
    return model if isinstance(model, nn.Module) else model.get_base_model()


def _dtype(key: nn.Module) -> torch.dtype:
    return next((p.dtype for p in key.parameters() if p.is_floating_point()), torch.float32)
