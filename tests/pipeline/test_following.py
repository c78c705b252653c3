"""A stage on several ranks: what its record holds of the others'."""

from __future__ import annotations

from typing import Any

import pytest

from keel.config import SFTConfig
from keel.pipeline import following


def test_what_another_rank_notes_stands_in_the_record_once(
    stage_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank has rows of its own, and only one of them may be cut."""

    def stage(config: Any, run: Any) -> dict[str, Any]:
        run.note("of this rank")
        return {"done": True}

    said: list[str] = []
    stage_run.say = said.append
    monkeypatch.setattr(following, "resolve", lambda place: stage)
    others = lambda own: [own, ([*own[0], "of another rank"], 0)]  # noqa: E731
    monkeypatch.setattr(following.group, "gathered", others)
    config = SFTConfig.model_validate({"kind": "sft", "model": "a/b", "data": "d.jsonl"})
    assert following.run_stage(config, stage_run) == {"done": True}
    assert stage_run.facts["notes"] == ["of this rank", "of another rank"]
    assert said == ["stage: of this rank", "stage: of another rank"]
