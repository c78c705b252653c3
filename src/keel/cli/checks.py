"""What was tried, and what to do about what is not well: `keel doctor --distributed`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was tried."""

    name: str
    ok: bool
    found: str
    mend: str = ""  # what to do about it


def in_lines(checks: Sequence[Mapping[str, Any]]) -> str:
    """For people: a line a check, and what to do about what is not well. checks: as dictionaries."""
    width = max((len(check["name"]) for check in checks), default=0)
    lines: list[str] = []
    for check in checks:
        lines.append(f"{'ok ' if check['ok'] else 'BAD'} {check['name']:<{width}}  {check['found']}")
        if check["mend"]:
            lines.append(f"    {'':<{width}}  → {check['mend']}")
    return "\n".join(lines)
