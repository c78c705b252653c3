"""What is tested here is on, also where the environment switches it off for the rest of the tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from keel.accel import patches


@pytest.fixture(autouse=True)
def _accel_on() -> Iterator[None]:
    with patches.all_enabled():
        yield
