"""What results depend on besides the config."""

from __future__ import annotations

import keel
from keel.pipeline import fingerprint


def test_code_counts_and_the_report_does_not(monkeypatch, tmp_path):
    package = tmp_path / "keel"
    for name in ("__init__.py", "cli/main.py", "report/page.py", "rl/ppo.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("1")
    monkeypatch.setattr(keel, "__file__", str(package / "__init__.py"))
    code_print = fingerprint.code_print.__wrapped__
    first = code_print()
    for name in ("cli/main.py", "report/page.py"):
        (package / name).write_text("2")
    assert code_print() == first
    (package / "rl" / "ppo.py").write_text("2")
    assert code_print() != first
