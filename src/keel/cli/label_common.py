"""What the commands of `keel label` share: the group itself, options, and how results are printed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keel.cli.progress import say

if TYPE_CHECKING:
    from keel.votes.store import Store

app = typer.Typer(
    no_args_is_help=True, help="Where people compare, rate, rank and edit replies, and what they said."
)
WORK, PEOPLE, VOTES, SAFETY = "Projects", "People", "Votes", "Safety"  # parts of the help

DbOption = Annotated[
    str | None,
    typer.Option(
        "--db", help="Database: sqlite:///FILE or postgresql://…; else KEEL_LABEL_DB, keel-label.db."
    ),
]
ProjectArgument = Annotated[str, typer.Argument(help="The project's name.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
TaskOption = Annotated[
    str | None,
    typer.Option("--task", help="pairwise, rating, ranking, edit or thumbs; default: by the items."),
]
VotesOption = Annotated[int, typer.Option("--votes", min=1, max=100, help="People who judge each item.")]


def print_result(value: Any, text: str, as_json: bool) -> None:
    """A result on stdout: as JSON, or as a text."""
    print(json.dumps(value, ensure_ascii=False, indent=2) if as_json else text)


def say_note(note: str) -> None:
    """Say something on stderr beside the result."""
    say(f"keel label: {note}")


def opened(db: str | None, *, create: bool = False) -> Store:
    """The database that `--db` names."""
    from keel.votes import open_store

    return open_store(db, create=create)


def link_to(code: str, url: str | None = None) -> str:
    """The address at which a code is used."""
    return f"{(url or 'http://127.0.0.1:8011').rstrip('/')}/join/{code}"


def table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> str:
    """Rows as text under their headings; columns that no row has are left out."""
    if not rows:
        return ""
    named = [column for column in columns if any(row.get(column) not in (None, "") for row in rows)]
    cells = [named, *[["" if row.get(c) is None else str(row[c]) for c in named] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(named))]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths)).rstrip() for line in cells)
