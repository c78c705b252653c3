"""Episodes with tools against a peer's: keel's side plays as a stage does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def test_keels_side_plays_episodes_of_several_turns(
    script: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    episodes = script("episodes")
    monkeypatch.setattr(episodes, "LLAMA", episodes.LLAMA | {"hidden_size": 64, "num_hidden_layers": 1})
    monkeypatch.setattr(episodes, "TEXTS", 200)
    episodes.prepare(tmp_path, prompts=1, mean=3)
    found = episodes.of_keel(tmp_path, turns=2, dtype="float32")(0, episodes.SAMPLES)
    assert found["turns"] == 2 * episodes.SAMPLES
    assert found["calls"] == episodes.SAMPLES  # what the last turn calls is not run
    assert found["tokens"] > found["turns"]
