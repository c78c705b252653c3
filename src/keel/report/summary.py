"""The report's verdict and its table of measures as plain text, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from keel.report import health
from keel.report.notes import Notes, mapping
from keel.report.page import measures, verdicts, write_read
from keel.report.reading import Run, read, readable
from keel.report.reward_models import in_short


@dataclass(frozen=True, slots=True)
class Report:
    """What was made of a run."""

    page: Path
    text: str  # the summary
    notes: tuple[str, ...]  # what of the run could not be read or shown


def report(run: Path) -> Report:
    """Write the page and the summary of a run. Errors as of `page.write`."""
    found = read(run, Notes(strict=False))
    page = write_read(run, found)
    with readable(run):
        text = _summary(found)
    return Report(page, text, found.notes.lines)


def summary(run: Path) -> str:
    """Verdicts, what was found in training, then a table of models × measures for each finished evaluate
    stage, and what of the run cannot be read. Lines of plain text.

    Raises UsageError when there is no run, or nothing of it can be read.
    """
    found = read(run, Notes(strict=False))
    with readable(run):
        text = _summary(found)
    return "\n".join([text, *(["", *map(unshown, found.notes.lines)] if found.notes.lines else [])])


def unshown(note: str) -> str:
    """A note in a line of its own."""
    return f"not shown: {note}"


def _summary(found: Run) -> str:
    of, lines = found.notes.of, list[str]()
    diagnosed = health.diagnoses(found)
    for _, one in verdicts(found, diagnosed):
        against = f"{one.model} against {one.reference}: " if one.model else ""
        lines += [against + one.text, *(f"  {note}" for note in one.notes)]
    for name, one in diagnosed.items():
        for line in of(f"the findings of {name}", lambda one=one: health.lines(one), []):
            if line.level == "done":
                lines.append(f"{name}: {line.evidence}")
            elif line.level != "note":
                lines.append(
                    f"{name}: {line.level}, {line.name} from step {line.step}: {line.evidence}; {line.remedy}"
                )
    for stage in found.with_models:
        head = [stage.name, *stage.result["models"]]
        measured = of(f"the measures of {stage.name}", lambda stage=stage: measures(stage.result), [])
        rows = [
            [("  " if row.part else "") + row.label, *(_cell(c.value, c.interval) for c in row.cells)]
            for row in measured
        ]
        lines += ["", *table([head, *rows])]
        of_reward = mapping(stage.result.get("reward_model"))
        if said := of(
            f"the reward model in {stage.name}", lambda of_reward=of_reward: in_short(of_reward), ""
        ):
            lines += ["", f"reward model on comparisons: {said}"]
    return "\n".join(lines)


def _cell(value: str, interval: str) -> str:
    return f"{value} ({interval})" if interval else value


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of plain text, columns aligned on the left."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
