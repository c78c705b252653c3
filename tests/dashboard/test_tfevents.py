"""TensorBoard's event files, against those that its own package writes."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from keel.dashboard.foreign import EventTable
from keel.dashboard.tfevents import BrokenRecord, EventFile, event

pytest.importorskip("tensorboard")


def written(folder: Path, steps: int, first: int = 1) -> Path:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))
    for step in range(first, first + steps):
        writer.add_scalar("train/loss", 1 / step, step)
        writer.add_scalar("new_style", step * 2.5, step, new_style=True)
        writer.add_scalar("exact", step / 3, step, double_precision=True)
    writer.add_text("text", "hello", 1)
    writer.add_histogram("weights", np.arange(9.0), 1)
    writer.close()
    return max(folder.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns)


def test_scalars_are_those_that_tensorboard_wrote(tmp_path):
    written(tmp_path, 30)
    table = EventTable(tmp_path)
    table.refresh()
    assert set(table.columns) == {"train/loss", "new_style", "exact"}
    steps, values = table.points("train/loss")
    assert steps.tolist() == list(range(1, 31))
    np.testing.assert_allclose(values, [1 / step for step in range(1, 31)], rtol=1e-6)
    np.testing.assert_array_equal(table.points("new_style")[1], [2.5 * step for step in range(1, 31)])
    np.testing.assert_allclose(table.points("exact")[1], [step / 3 for step in range(1, 31)], rtol=1e-6)
    assert table.broken_lines == 0


def test_a_file_that_grows_is_read_on(tmp_path):
    whole = written(tmp_path / "whole", 30).read_bytes()
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "events.out.tfevents.1"
    table = EventTable(tmp_path / "run")
    for end in (0, 5, 100, 701, 702, len(whole) - 1, len(whole)):  # in the middle of records too
        path.write_bytes(whole[:end])  # in place
        table.refresh()
    assert table.points("train/loss")[0].tolist() == list(range(1, 31))
    assert table.position.epoch == 0
    (tmp_path / "run" / "events.out.tfevents.2").write_bytes(written(tmp_path / "more", 5, 31).read_bytes())
    table.refresh()
    assert table.points("train/loss")[0].tolist() == list(range(1, 36))
    path.write_bytes(whole[:800])
    table.refresh()
    assert table.position.epoch == 1  # what was read is void


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 4000,
        struct.pack("<QI", 4, 0) + b"\xff\xff\xff\xff" + b"\0" * 4,
        struct.pack("<QI", 2**40, 0) + b"x" * 100,
        struct.pack("<QI", 3, 0) + b"\x2a\x7f\x01" + b"\0" * 4,
    ],
)
def test_noise_ends_a_file_and_nothing_else(tmp_path, data):
    path = written(tmp_path, 3)
    with path.open("ab") as handle:
        handle.write(data)
    file = EventFile(path)
    rows = file.read()
    assert sum("train/loss" in scalars for _, scalars in rows) == 3
    assert file.broken
    assert file.read() == []


def test_a_message_that_ends_too_early_is_none():
    with pytest.raises(BrokenRecord):
        event(b"\x2a\x05abc")


def test_zeros_that_a_file_claims_to_hold_are_not_read(tmp_path):
    path = tmp_path / "events.out.tfevents.1"
    with path.open("wb") as handle:
        handle.truncate(1 << 40)
    file = EventFile(path)
    assert file.read() == []
    assert file.broken
