"""A day's work survives: train, mistype, upgrade, move, fill the disk, be killed, edit data, restore. Every
model that was ever finished is still there, or somebody has said that it may go."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.attack


def models(place: Path) -> set[str]:
    """The weights of all stages, current and kept, by content."""
    found = [
        *place.glob("*/stages/*/model/model.safetensors"),
        *place.glob("*/kept/*/model/model.safetensors"),
    ]
    return {hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def test_a_day_s_work_survives(forked: Any, every_kind: Any, write_config: Any, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    shutil.copy(every_kind["sft"]["data"], rows)
    sft = {**every_kind["sft"], "data": str(rows)}
    dpo = {**every_kind["dpo"], "model": "sft"}
    write_config(tmp_path, {"sft": sft, "dpo": dpo})
    runs, ever, current = tmp_path / "runs", set[str](), tmp_path / "runs" / "r"

    def run(*words: str, code: int | None = 0, **more: Any) -> Any:
        ended = forked("run", "config.yaml", *words, cwd=tmp_path, timeout=90, **more)
        if more.get("kill") is None:
            ended.assert_clean()
        assert ended.code == code, ended.err[-3000:]
        ever.update(models(runs))
        assert models(runs) == ever, "a finished model is gone"
        return ended

    run()  # 1. train
    morning = models(runs)
    assert len(morning) == 2

    assert run("sft.lrr=0.1", code=2).err.count("did you mean 'lr'")  # 2. mistyped: refused
    run("sft.lr=0.1")  # and mistyped so that it means something else
    assert len(ever) == 4
    assert "brought back" in run().err  # taken back: nothing is trained again
    assert len(ever) == 4

    for stage in ("sft", "dpo"):  # 3. an upgrade: made by another version of keel
        record = current / "stages" / stage / "stage.json"
        record.write_text(json.dumps({**json.loads(record.read_text()), "fingerprint": "0" * 64}))
        (current / "stages" / stage / "fingerprint").write_text("0" * 64)
    assert "is kept in" in run().err
    assert len(list((current / "kept").iterdir())) >= 4

    shutil.move(runs, tmp_path / "elsewhere")  # 4. the folder is moved, and moved back
    ended = forked("run", "config.yaml", "--runs", "elsewhere", cwd=tmp_path, timeout=90)
    assert ended.code == 0
    assert ended.err.count("done before, unchanged") == 2
    assert forked("report", "elsewhere/r", cwd=tmp_path).code == 0
    shutil.move(tmp_path / "elsewhere", runs)

    run("sft.lr=0.2", code=1, limits={"RLIMIT_FSIZE": 30_000})  # 5. the disk is full in the middle
    for before in (5, 15, 30, 45):  # 6. killed, again and again
        run("sft.lr=0.2", code=None, kill={"signals": ["SIGKILL"], "before": before})
    run("sft.lr=0.2")

    content = rows.read_text()  # 7. the data are edited, and restored
    rows.write_text(content + '{"prompt": "new?", "completion": " yes."}\n')
    run()
    rows.write_text(content)
    assert "brought back" in run().err
    assert morning <= models(runs)

    assert forked("clean", "runs/r", cwd=tmp_path).code == 0  # 8. nobody has agreed
    assert models(runs) == ever
    assert forked("clean", "runs/r", "--yes", cwd=tmp_path).code == 0  # knowingly
    assert models(runs) == {
        hashlib.sha256((current / "stages" / stage / "model" / "model.safetensors").read_bytes()).hexdigest()
        for stage in ("sft", "dpo")
    }
