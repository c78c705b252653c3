"""A real run, watched by `keel run --watch` and stopped from its page."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from keel.dashboard.runs import Runs

MODEL = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


def asked(address: str, headers: dict[str, str] | None = None, data: bytes | None = None) -> str:
    request = urllib.request.Request(address, data, headers or {})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return answer.read().decode()


def base(run: Any) -> dict[str, Any]:
    return run.state()["stages"][0]


@pytest.mark.slow
def test_a_run_is_watched_stopped_and_goes_on(tmp_path: Path):
    stage = {
        "kind": "pretrain", "model": {"init": MODEL, "vocab_size": 400}, "max_length": 64, "batch_size": 2,
        "data": {"source": "world:helpdesk/text", "rows": 400}, "epochs": 100, "save_every": 20,
    }  # fmt: skip
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump({"name": "tiny", "threads": 1, "stages": {"base": stage}}))
    command = [sys.executable, "-m", "keel", "run", str(config), "--runs", str(tmp_path / "runs"), "--watch"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        found = None
        while found is None:
            line = process.stderr.readline()
            assert line, "the run ended"
            found = re.match(r"dashboard: (http://127\.0\.0\.1:\d+)/$", line)
        address = found[1]
        runs, until = Runs(tmp_path / "runs"), time.monotonic() + 240
        while not ((all_ := runs.all()) and all_[0].state()["stages"] and (base(all_[0])["step"] or 0) > 40):
            assert time.monotonic() < until
            time.sleep(0.3)
        run = all_[0]
        assert base(run)["status"] == "running", (tmp_path / "runs/tiny/.lock").read_text()
        assert base(run)["steps"] > 1000
        assert base(run)["left"] > 0
        assert run.state()["memory_mib"] > 100
        page = asked(f"{address}/")
        assert 'data-run="tiny"' in page
        csrf = re.search(r'name="csrf" content="([^"]+)"', page)
        assert csrf is not None
        headers = {"Origin": address, "X-Keel-CSRF": csrf[1], "Content-Type": "application/json"}
        body = json.dumps({"run": "tiny"}).encode()
        assert json.loads(asked(f"{address}/api/stop", headers, body)) == {"stopped": "tiny"}
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted; the same command goes on from the last checkpoint" in errors
    assert base(run)["status"] == "interrupted"
    with pytest.raises(urllib.error.URLError):
        asked(address)
    process = subprocess.Popen(command[:-1], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert any("going on after step" in line for line in process.stderr)
    finally:
        process.kill()
        process.wait()
