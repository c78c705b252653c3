"""Every rate of times.jsonl has a chart."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_rate_that_is_defined_is_drawn():
    defined = set(
        re.findall(r"^\| `train/(\w+)` \|", (ROOT / "docs" / "metrics.md").read_text("utf-8"), re.M)
    )
    script = (ROOT / "src" / "keel" / "dashboard" / "static" / "run.js").read_text("utf-8")
    drawn = re.search(r"const RATES = \{(.*)\};", script)
    assert drawn is not None
    assert (
        set(re.findall(r"(\w+): \[", drawn[1]))
        == defined
        == {"tokens_per_second", "useful", "mfu", "roofline"}
    )
