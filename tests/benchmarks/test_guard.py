"""The guard against becoming slower: what it compares with, and when it fails."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "guard.py"


@pytest.fixture(scope="module")
def guard(script):
    module = script("guard")
    yield module
    sys.path.remove(str(SCRIPT.parent))


def test_it_fails_where_the_median_pair_is_slower_by_more_than_the_loss(guard):
    found = {"sft": [(1.0, 1.2), (1.0, 1.0), (2.0, 2.1)], "dpo": [(1.0, 1.3), (1.0, 1.0), (1.0, 1.12)]}
    assert guard.lost(found, 0.10) == ["dpo"]
    assert guard.lost(found, 0.04) == ["sft", "dpo"]
    assert guard.lost(found, 0.5) == []


def test_the_two_sides_take_turns_and_another_one_begins_each_pair(guard, monkeypatch, tmp_path, capsys):
    asked = []

    def measured(kind, source, folder, threads):
        asked.append((kind, source.name))
        return {"old": 2.0, "src": 1.0}[source.name]

    monkeypatch.setattr(guard, "measured", measured)
    found = guard.compare(["sft"], tmp_path / "old", tmp_path, 2, 1)
    assert found == {"sft": [(2.0, 1.0), (2.0, 1.0)]}
    assert [source for _, source in asked] == ["old", "src", "src", "old"]
    assert "0.50" in capsys.readouterr().out


def test_a_wheel_is_unpacked_and_what_is_none_ends_it(guard, tmp_path):
    wheel = tmp_path / "keel.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("keel/__init__.py", "__version__ = '0'")
    assert (guard.unpacked(str(wheel), tmp_path / "out") / "keel" / "__init__.py").exists()
    with pytest.raises(subprocess.CalledProcessError):
        guard.unpacked("no-such-ref", tmp_path)


def test_sampling_is_guarded_by_itself(guard, monkeypatch, tmp_path, capsys):
    assert set(guard.KINDS) <= set(guard.EVERY)
    assert {"reward", "engine"} <= set(guard.KINDS)
    guard.peers.prepare(tmp_path, "tiny")
    monkeypatch.setattr(guard, "STEPS", 1)
    monkeypatch.setattr(guard.peers, "RESPONSE", 4)
    guard._side(Namespace(side="engine", folder=tmp_path, threads=torch.get_num_threads()))
    assert json.loads(capsys.readouterr().out)["seconds"] > 0


def test_something_to_compare_with_must_be_named():
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "a wheel of the last release, or a git ref" in done.stderr
