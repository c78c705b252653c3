"""What a start costs, by the processor and by the clock."""

from __future__ import annotations

import pytest


@pytest.fixture
def startup(script):
    return script("startup")


def test_the_clock_stands_beside_the_processors_seconds(startup, tmp_path):
    (processor, clock), last = startup._keel(
        tmp_path, tmp_path, code="import time; time.sleep(0.5); print(7)"
    )
    assert last == "7"
    assert clock > 0.5
    assert 0 < processor < clock
    assert (
        startup.cell("keel", [(1.0, 2.0), (3.0, 5.0), (2.0, 3.0)])
        == "keel 2.00 (1.00, 3.00, 2.00), clock 3.00"
    )


def test_the_first_step_is_by_both(startup, monkeypatch, tmp_path):
    monkeypatch.setattr(startup, "_keel", lambda *given, **named: ((1.0, 2.0), "0.9"))
    found = startup.measured(tmp_path, tmp_path)
    assert found["run, to its first step"] == (0.9, 2.0)
    assert found["--help"] == (1.0, 2.0)
