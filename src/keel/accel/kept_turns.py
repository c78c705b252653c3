"""A conversation that goes on where it stopped: keys and values of what was read and written stay, and only
what came since is read.

A row whose turn has ended leaves its slot with a copy of its keys and values (`Kept`). To go on, rows are
read side by side, the last C tokens of each, where C is the most that any of them has not read yet: what
stands before them is what was kept. A row that has less to read reads some of its tokens once more, so that
no row has padding between its tokens, and masks by distance (windows) stay right. The result goes into slots
as prompts do. Whether a model's own forward takes that is tried at its first use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from keel.accel.decode_trial import COLUMNS, own_logits, precision_of, prompts_read
from keel.accel.kv_slots import Slots
from keel.accel.modules import logits_of_last, plain_of, undisturbed, with_cache
from keel.accel.patches import difference, disabled, trusted
from keel.accel.trial_inputs import beyond_windows, trial_ids

# a row's tokens: those that were read before it was left, those that came since, and some that follow
SEQUENCES = (((1, 2, 3, 4, 5), (2, 4), (3, 1)), ((5, 3), (1, 4, 2, 1), (2, 5)), ((2, 4, 1), (5,), (3, 4)))
FOLLOWING = 2


@dataclass(frozen=True, slots=True)
class Kept:
    """The keys and values of a row that left its slot, of its first `length` tokens: (heads, length, d) of
    each layer."""

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    length: int


def keep(slots: Slots, row: int) -> Kept:
    """Those of a row, whose slot may be taken afterwards."""
    columns = slice(int(slots.starts[row]), slots.column)
    keys = [layer.k[row, :, columns].clone() for layer in slots.layers]
    values = [layer.v[row, :, columns].clone() for layer in slots.layers]
    return Kept(keys, values, columns.stop - columns.start)


def unread(tokens: Sequence[int], kept: Kept | None) -> int:
    """How many of a row's tokens have no keys and values."""
    return len(tokens) - (kept.length if kept else 0)


def read_on(
    model: nn.Module, rows: Sequence[tuple[Sequence[int], Kept | None]], slots: Slots, pad_id: int
) -> Tensor:
    """Read what rows have not read yet, all of their tokens and what was kept of each given, and put them
    into slots: (n, V) logits behind their last tokens. To be called without gradient."""
    lengths = [len(tokens) for tokens, _ in rows]
    width = max(unread(tokens, kept) for tokens, kept in rows)  # C
    past = max(0, max(lengths) - width)  # columns before those that are read
    device = slots.starts.device
    ids = torch.tensor(
        [[*[pad_id] * (width - len(tokens)), *tokens[-width:]] for tokens, _ in rows], device=device
    )
    columns = torch.arange(past + width, device=device)
    starts = torch.tensor([past + width - length for length in lengths], device=device)[:, None]
    cache = _past([kept for _, kept in rows], lengths, past, width) if past else DynamicCache()
    logits = model(
        input_ids=ids, attention_mask=(columns >= starts).long(),
        position_ids=(columns[past:] - starts).clamp(min=0), **with_cache(model, cache),
        **logits_of_last(model),
    ).logits[:, -1]  # fmt: skip
    if not slots.admit(cache, lengths, range(len(rows))):
        raise RuntimeError("the cache has no keys and values for each position, as it had when it was tried")
    return logits


def _past(kept: Sequence[Kept | None], lengths: Sequence[int], past: int, width: int) -> DynamicCache:
    """What stands before the last `width` tokens of each row, in `past` columns, on the right of them."""
    cache, some = DynamicCache(), next(one for one in kept if one is not None)
    for layer, sides in enumerate(zip(some.keys, some.values, strict=True)):
        made = [held.new_zeros(len(kept), held.shape[0], past, held.shape[2]) for held in sides]
        for row, (one, length) in enumerate(zip(kept, lengths, strict=True)):
            count = max(0, length - width)
            if one is not None and count:
                made[0][row, :, past - count :] = one.keys[layer][:, :count]
                made[1][row, :, past - count :] = one.values[layer][:, :count]
        cache.update(made[0], made[1], layer)
    return cache


# ---------------------------------------------------------------- self-test


def fits(model: nn.Module, longest: int = 0) -> bool:
    """Whether a model's own forward goes on from what was kept, in sequences of up to `longest` tokens, and
    computes what it computes without."""
    plain = plain_of(model)
    longer = beyond_windows(plain.config, longest)
    return trusted(
        "kept_turns", plain, lambda: _goes_on_otherwise(plain, longer),
        depends_on=(longer, *precision_of(plain)), say=False,
    )  # fmt: skip


def _goes_on_otherwise(model: nn.Module, longer: int) -> str | None:
    """What differs between the model's own forward over whole sequences and rows that were read, left, and
    went on; None if nothing does. longer: tokens by which the sequences are longer than `SEQUENCES`."""
    device, config = next(model.parameters()).device, plain_of(model).config
    first = [(*trial_ids(config, longer, seed), *row[0]) for seed, row in enumerate(SEQUENCES)]
    then = [(*start, *row[1]) for start, row in zip(first, SEQUENCES, strict=True)]
    whole = [(*start, *row[2]) for start, row in zip(then, SEQUENCES, strict=True)]
    half = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.bfloat16
    slots = Slots(len(whole), COLUMNS + longer, device, torch.bfloat16 if half else None)
    with undisturbed(model), torch.no_grad():
        with disabled():
            theirs = own_logits(model, whole, device, FOLLOWING + 1)
            cache = prompts_read(model, first, device)
        if not slots.admit(cache, [*map(len, first)], range(len(first))):
            return "it keeps no keys and values for each position"
        kept = [keep(slots, row) for row in range(len(first))]
        slots.keep(torch.zeros(len(first), dtype=torch.bool, device=device))
        logits = read_on(model, list(zip(then, kept, strict=True)), slots, 0)
        for number in range(FOLLOWING + 1):
            expected = torch.stack([rows[number] for rows in theirs])
            if (why := difference(f"logits {number} tokens after going on", logits, expected)) is not None:
                return why
            if number < FOLLOWING:
                logits = _stepped(model, [row[2][number] for row in SEQUENCES], slots)
    return None


def _stepped(model: nn.Module, newest: Sequence[int], slots: Slots) -> Tensor:
    """(n, V) logits behind a token more of each row, by the model's own forward."""
    mask = slots.mask()
    with disabled():
        logits = model(
            input_ids=torch.tensor(newest, device=slots.starts.device)[:, None],
            attention_mask=None if mask is None else mask.long(), position_ids=slots.positions[:, None],
            **with_cache(model, slots.cache),
        ).logits[:, -1]  # fmt: skip
    slots.step()
    return logits
