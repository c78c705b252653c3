"""What is tested here is on, also where the environment switches it off for the rest of the tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _fast_paths_on(accel_on: None) -> None:
    pass
