"""Results as JSON are those of the settings that were asked for, never of others that were run before."""

from __future__ import annotations

from pathlib import Path


def test_results_of_other_settings_are_not_given_as_these(keel, write, chain):
    path = write("tiny.yaml", {"sft": chain["sft"], "again": {**chain["sft"], "model": "sft"}})
    assert keel("run", path).code == 0
    done = keel("run", path, "sft.lr=1e-4", "--only", "sft", "--json")
    assert done.code == 0, done.err
    assert "sft: run again, since settings changed (lr 2e-05 → 0.0001)" in done.err
    assert done.json["stages"]["sft"]["result"]["perplexity"] > 1
    assert done.json["stages"]["again"]["result"] is None
    assert Path("runs/tiny/stages/again/result.json").exists()  # the danger is there
    report = keel("report", "runs/tiny", "--json").json
    assert report["results"].keys() == {"sft"}
    assert report["stages"] == {"sft": {"status": "done"}, "again": {"status": "out of date"}}
