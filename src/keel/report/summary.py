"""The report's verdict and its table of measures as plain text, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from keel.report import health
from keel.report.page import measures, verdicts
from keel.report.reading import Run, read, readable
from keel.report.reward_models import in_short


def summary(run: Path) -> str:
    """Verdicts, what was found in training, then a table of models × measures for each finished evaluate
    stage. Lines of plain text.

    Raises what `keel.report.reading.read` raises.
    """
    with readable(run):
        return _summary(read(run))


def _summary(found: Run) -> str:
    lines: list[str] = []
    diagnosed = health.diagnoses(found)
    for _, one in verdicts(found, diagnosed):
        against = f"{one.model} against {one.reference}: " if one.model else ""
        lines += [against + one.text, *(f"  {note}" for note in one.notes)]
    for name, one in diagnosed.items():
        for line in health.lines(one):
            if line.level == "done":
                lines.append(f"{name}: {line.evidence}")
            elif line.level != "note":
                lines.append(
                    f"{name}: {line.level}, {line.name} from step {line.step}: {line.evidence}; {line.remedy}"
                )
    for stage in found.with_models:
        head = [stage.name, *stage.result["models"]]
        rows = [
            [("  " if row.part else "") + row.label, *(_cell(c.value, c.interval) for c in row.cells)]
            for row in measures(stage.result)
        ]
        lines += ["", *table([head, *rows])]
        if said := in_short(stage.result.get("reward_model") or {}):
            lines += ["", f"reward model on comparisons: {said}"]
    return "\n".join(lines)


def _cell(value: str, interval: str) -> str:
    return f"{value} ({interval})" if interval else value


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of plain text, columns aligned on the left."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
