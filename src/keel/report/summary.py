"""The report's verdict and its table of measures as plain text, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from keel.report.page import measures, verdicts
from keel.report.reading import read


def summary(run: Path) -> str:
    """Verdicts, then a table of models × measures for each finished evaluate stage. Lines of plain text.

    Raises what `keel.report.reading.read` raises.
    """
    found = read(run)
    lines: list[str] = []
    for _, one in verdicts(found):
        against = f"{one.model} against {one.reference}: " if one.model else ""
        lines += [against + one.text, *(f"  {note}" for note in one.notes)]
    for stage in found.stages:
        if stage.kind == "evaluate" and stage.result.get("models"):
            head = [stage.name, *stage.result["models"]]
            rows = [
                [("  " if row.part else "") + row.label, *(_cell(c.value, c.interval) for c in row.cells)]
                for row in measures(stage.result)
            ]
            lines += ["", *table([head, *rows])]
    return "\n".join(lines)


def _cell(value: str, interval: str) -> str:
    return f"{value} ({interval})" if interval else value


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of plain text, columns aligned on the left."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
