"""The cache of rows that come and go: every row keeps what is its own, and little else is read."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import DynamicCache

from keel.accel import kv_slots
from keel.accel.kv_slots import Slots

HEADS, WIDTH = 2, 4


def prompt_cache(names: list[int], lengths: list[int], wider: int = 0) -> DynamicCache:
    """Prompts padded on the left; a key is its row's name and its token's number. Values are `wider`."""
    cache, most = DynamicCache(), max(lengths)
    keys = torch.full((len(names), HEADS, most, WIDTH), -1.0)
    for row, (name, length) in enumerate(zip(names, lengths, strict=True)):
        keys[row, :, most - length :, 0] = name
        keys[row, :, most - length :, 1] = torch.arange(float(length))
    for layer in range(2):
        cache.update(keys, -torch.nn.functional.pad(keys, (0, wider)), layer)
    return cache


def step(slots: Slots, names: list[int], made: list[int]) -> None:
    slots.make_room()
    for layer in slots.layers:
        for held, sign in ((layer.k, 1), (layer.v, -1)):
            held[: len(names), :, slots.column, 0] = sign * torch.tensor(names)[:, None].float()
            held[: len(names), :, slots.column, 1] = sign * torch.tensor(made)[:, None].float()
    slots.step()


def check(slots: Slots, names: list[int], made: list[int]) -> None:
    for row, (name, count) in enumerate(zip(names, made, strict=True)):
        start = int(slots.starts[row])
        assert slots.column - start == count
        for layer in slots.layers:
            for held, sign in ((layer.k, 1), (layer.v, -1)):
                own = sign * held[row, 0, start : slots.column]
                assert (own[:, 0] == name).all()
                assert own[:, 1].tolist() == list(range(count))


def stream(slots: Slots, lengths: list[int], seed: int, wider: int = 0) -> tuple[int, int]:
    """Rows that take so many steps; the columns that are read, and those that are needed."""
    draw = random.Random(seed)
    waiting, names, made, ends = list(enumerate(lengths)), list[int](), list[int](), list[int]()
    read = needed = 0
    while waiting or names:
        free = slots.capacity - len(names)
        if waiting and (not names or free >= max(1, slots.capacity // 8)):
            fresh, waiting = waiting[:free], waiting[free:]
            sizes = [draw.randrange(1, 5) for _ in fresh]
            slots.admit(prompt_cache([name for name, _ in fresh], sizes, wider), sizes, range(len(fresh)))
            names += [name for name, _ in fresh]
            made += sizes
            ends += [size + length for size, (_, length) in zip(sizes, fresh, strict=True)]
            continue
        step(slots, names, made)
        made = [count + 1 for count in made]
        blocks = slots.blocks()
        assert [row for rows, _ in blocks for row in range(rows.start, rows.stop)] == [*range(len(names))]
        assert all(low <= int(slots.starts[rows].min()) for rows, low in blocks)
        read += sum((rows.stop - rows.start) * (slots.column - low) for rows, low in blocks)
        needed += sum(made)
        going = torch.tensor([count < end for count, end in zip(made, ends, strict=True)])
        if not going.all():
            check(slots, names, made)
            order = slots.keep(going).tolist()
            assert sorted(order) == going.nonzero().flatten().tolist()
            names, made, ends = ([x[i] for i in order] for x in (names, made, ends))
            check(slots, names, made)
    return read, needed


@pytest.mark.parametrize("wider", [0, 3])  # all layers' keys and values in one tensor, or not
@pytest.mark.parametrize(("group", "far", "slots"), [(1, 1, 5), (2, 3, 7), (4, 64, 8)])
def test_rows_keep_their_own_keys_and_values_wherever_they_are_moved(
    monkeypatch: pytest.MonkeyPatch, group: int, far: int, slots: int, wider: int
) -> None:
    monkeypatch.setattr(kv_slots, "GROUP", group)
    monkeypatch.setattr(kv_slots, "FAR", far)
    draw = random.Random(group)
    lengths = [draw.randrange(1, 30) for _ in range(25)]
    held = Slots(slots, 36, torch.device("cpu"))
    stream(held, lengths, seed=far, wider=wider)
    memory = {side.untyped_storage().data_ptr() for layer in held.layers for side in (layer.k, layer.v)}
    assert len(memory) == (4 if wider else 1)


def test_rows_of_different_age_are_not_read_from_the_oldest_ones_first_column(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kv_slots, "FAR", 4)
    monkeypatch.setattr(kv_slots, "WORTH", 0)
    monkeypatch.setattr("tests.accel.test_kv_slots.check", lambda *_: None)
    draw = random.Random(0)
    lengths = [draw.randrange(4, 100) for _ in range(64)]
    read, needed = stream(Slots(16, 120, torch.device("cpu")), lengths, seed=0)
    assert read < 1.25 * needed
    monkeypatch.setattr(kv_slots, "FAR", 10**6)  # which leaves rows where they are
    unordered, needed = stream(Slots(16, 120, torch.device("cpu")), lengths, seed=0)
    assert unordered > 1.35 * needed


def test_rows_of_the_same_age_are_read_together_and_stay_where_they_are() -> None:
    slots = Slots(12, 40, torch.device("cpu"))
    slots.admit(prompt_cache([*range(12)], [3] * 12), [3] * 12, range(12))
    assert slots.blocks() == [(slice(0, 12), 0)]
    going = torch.ones(12, dtype=torch.bool)
    going[4] = False
    assert slots.keep(going).tolist() == [0, 1, 2, 3, 11, 5, 6, 7, 8, 9, 10]  # one row was moved
