"""A plan as text for a terminal."""

from __future__ import annotations

from typing import Any

from keel.pipeline import stage_kinds
from keel.plan import card_fit, rank_memory


def as_text(entries: list[dict[str, Any]]) -> str:
    """The plan as lines for a terminal."""
    lines = []
    for entry in entries:
        about = "" if entry["tokens_measured"] else "≈"
        facts = [f"{entry['rows']:,} rows ({entry['type']})"]
        facts += [f"{about}{entry['tokens']:,} tokens"] if entry["tokens"] else []
        facts += (
            [f"{entry['steps']:,} {'updates' if 'episodes' in entry else 'steps'}"]
            if "steps" in entry
            else []
        )
        facts += (
            [f"{entry['episodes']:,} episodes", f"{entry['gradient_steps']:,} gradient steps"]
            if "episodes" in entry
            else []
        )
        facts += (
            [f"{entry['parameters']:,} parameters"]
            if entry["parameters"]
            else ["parameters unknown until the model is here"]
        )
        facts += [f"micro_batch {entry['micro_batch']} here"] if entry.get("micro_batch") else []
        source = f" ← {', '.join(entry['inputs'])}" if entry["inputs"] else ""
        lines += [
            f"{entry['stage']} ({entry['kind']}){source}{'  [done]' if entry['done'] else ''}",
            f"    {entry['data']}",
            f"    {' · '.join(facts)}",
            *(f"    {line}" for line in (*entry["reading"], *entry["notes"])),
            *(
                _memory_lines(entry["memory"])
                if entry["memory"]
                else [f"    {_without_memory(entry['kind'])}"]
            ),
            *(f"    {line}" for line in (rank_memory.as_lines(entry["ranks"]) if entry.get("ranks") else [])),
        ]
    return "\n".join(lines)


def _without_memory(kind: str) -> str:
    """Why nothing is said of a stage's memory."""
    if stage_kinds.kind_of(kind).memory is None:
        return f"memory unknown: the package that adds {kind!r} has no memory model of it"
    return "memory unknown until the shapes of its models are"


def _memory_lines(memory: dict[str, Any]) -> list[str]:
    """The peak by kind and by role, each phase, and the cards."""
    parts = memory["phases"][memory["peak_phase"]]
    by_kind: dict[str, int] = {}
    for kinds in parts.values():
        for kind, value in kinds.items():
            by_kind[kind] = by_kind.get(kind, 0) + value
    by_role = {role: sum(kinds.values()) for role, kinds in parts.items()}
    totals = {
        name: sum(sum(kinds.values()) for kinds in phase.values()) for name, phase in memory["phases"].items()
    }
    about = (
        ", a rough estimate: keel does not know this type of model block by block"
        if memory["estimated"]
        else ""
    )
    fits = [card_fit.Fit(int(gb), card["fits"], card["with"]) for gb, card in memory["cards"].items()]
    lines = [
        f"    memory {_gb(memory['peak'])} GB at its peak, {memory['peak_phase']}: {_named(by_kind)}{about}"
    ]
    if len(by_role) > 1:
        lines.append(f"    by role: {_named(by_role)}")
    if len(totals) > 1:
        lines.append(f"    by phase: {_named(totals)}")
    return [*lines, f"    {card_fit.as_text(fits)}"]


def _named(values: dict[str, int]) -> str:
    return ", ".join(f"{name} {_gb(value)}" for name, value in values.items())


def _gb(value: float) -> str:
    """Bytes as GB (10⁹), with three digits."""
    return f"{value / card_fit.GB:.3g}" if value < 999.5 * card_fit.GB else f"{value / card_fit.GB:,.0f}"
