"""Pictures and pages: what a run shows its reader."""

from keel.report.page import write
from keel.report.summary import summary

__all__ = ["summary", "write"]
