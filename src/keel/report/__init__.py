"""Pictures and pages: what a run shows its reader."""

from keel.report.page import write
from keel.report.summary import report, summary, unshown

__all__ = ["report", "summary", "unshown", "write"]
