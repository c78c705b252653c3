"""Findings and actions in the report: in the verdict, in the list below it, and on the terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from keel.report import health, summary, write
from keel.report.reading import read
from keel.report.verdict import verdict

sys.path.insert(0, str(Path(__file__).parent))
from fake_run import write_run

FALL = {
    "step": 40,
    "event": "finding",
    "check": "judge_falls",
    "severity": "act",
    "evidence": "the judge fell from 0.7 at step 30 to 0.5",
    "cause": "the reward model is over-optimised",
    "remedy": "lower kl.target",
}
BACK = {"event": "rollback", "checks": ["judge_falls"], "kl_coef": 0.075, "lr_factor": 0.5, "to": 30}


def ill(folder: Path, *rows: dict) -> Path:
    run = write_run(folder / "run")
    events = run / "stages" / "ppo" / "events.jsonl"
    events.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_a_healthy_run_says_so_in_its_verdict_and_on_the_page(tmp_path):
    run = write_run(tmp_path / "run")
    assert "at KL 5.2 nats (target 6.0), no finding in training." in summary(run)
    page = write(run).read_text(encoding="utf-8")
    assert "<b>ppo</b>: no finding." in page


def test_what_was_found_and_done_stands_in_the_verdict_and_below_it(tmp_path):
    run = ill(tmp_path, FALL, {**BACK, "step": 40}, {**FALL, "step": 55}, {**BACK, "step": 55})
    text = summary(run)
    assert "; in training the proxy rose, the judge fell from step 40: rolled back twice." in text
    assert (
        "ppo: act, judge falls from step 40: the judge fell from 0.7 at step 30 to 0.5; lower kl.target"
        in text
    )
    assert "ppo: rolled back at step 55 for judge falls, back to the weights of step 30" in text
    page = write(run).read_text(encoding="utf-8")
    findings = page[page.index('<section id="findings">') :]
    assert findings.index("the judge fell from 0.7") < findings.index("β 0.075, learning rate × 0.5")
    assert "Remedy: lower kl.target." in findings
    assert page.index("<h1>") < page.index('<section id="findings">')


def test_other_findings_are_named_or_counted(tmp_path):
    stop = {
        "event": "stop",
        "checks": ["kl_too_high"],
        "kl_coef": 0.1,
        "lr_factor": 1.0,
        "to": 20,
        "step": 30,
    }
    high = {**FALL, "check": "kl_too_high", "step": 30}
    one = health.diagnoses(read(ill(tmp_path / "a", high, stop)))["ppo"]
    assert health.said(one) == "kl too high from step 30: stopped"
    assert "the weights of step 20 were kept" in health.action_sentence(stop)
    mild = [
        {**FALL, "check": c, "severity": s}
        for c, s in (("repetition", "warn"), ("length_drift", "note"), ("clip_fraction", "warn"))
    ]
    assert health.said(health.diagnoses(read(ill(tmp_path / "b", *mild)))["ppo"]) == "2 warnings, 1 note"


def test_a_model_that_was_not_watched_has_nothing_said_of_it():
    judged = {"gold": {"mean": 0.8, "low": 0.7, "high": 0.9, "n": 9}, "kl": {"mean": 5.0}}
    result = {"reference": "sft", "models": {"sft": judged, "dpo": judged}}
    (one,) = verdict(result, {}, {"ppo": "ill"})
    assert "training" not in one.text
