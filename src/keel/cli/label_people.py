"""`keel label`: who may work, invitations, roles, pauses, and forgetting somebody."""

from __future__ import annotations

import dataclasses
import time
from typing import Annotated, Any

import typer

from keel.cli.label_common import (
    PEOPLE,
    WORK,
    DbOption,
    JsonOption,
    app,
    link_to,
    print_result,
    table,
)
from keel.errors import UsageError


@app.command(rich_help_panel=PEOPLE)
def invite(
    role: Annotated[str, typer.Option("--role", help="annotator, viewer or admin.")] = "annotator",
    project: Annotated[
        str | None, typer.Option("--project", help="The only project they may see; default: every one.")
    ] = None,
    name: Annotated[str, typer.Option("--name", help="Their name; default: they choose.")] = "",
    again: Annotated[
        bool, typer.Option("--again", help="Sign the person of this name in once more.")
    ] = False,
    days: Annotated[float, typer.Option("--days", min=0.01, help="How long the link works.")] = 7.0,
    url: Annotated[str | None, typer.Option("--url", help="Where people find the pages.")] = None,
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print a one-time link for one person."""
    from keel.votes import commands

    wanted: Any = role
    link = link_to(commands.invite(db, wanted, project, name, days, again), url)
    print_result({"link": link, "role": role, "project": project, "days": days}, link, as_json)


@app.command(rich_help_panel=PEOPLE)
def invitations(
    project: Annotated[
        str | None, typer.Argument(help="Only those into it, into all, and of its people.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Also used, withdrawn and expired ones.")] = False,
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """List links that can still be used, by the numbers that `withdraw` takes. No link itself is kept."""
    from keel.votes import commands

    found = [dataclasses.asdict(one) for one in commands.invitations(db, project, closed=every)]
    rows = [
        {
            "number": one["id"],
            "role": one["role"],
            "for": one["name"],
            "into": "signs in again" if one["again"] else one["project"] or "every project",
            "by": one["by"] or "the server",
            "until": time.strftime("%Y-%m-%d %H:%M", time.localtime(one["expires"])),
            "state": one["state"] if every else "",
        }
        for one in found
    ]
    columns = ("number", "role", "for", "into", "by", "until", "state")
    print_result(found, table(rows, columns) or "no invitation", as_json)


@app.command(rich_help_panel=PEOPLE)
def withdraw(
    number: Annotated[int, typer.Argument(min=1, help="As `keel label invitations` lists it.")],
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a link worthless that nobody has used yet."""
    from keel.votes import commands

    found = commands.withdraw(db, number)
    whose = f" for {found.name}" if found.name else ""
    text = f"invitation {number} ({found.role}{whose}) was withdrawn: its link works no longer"
    print_result(dataclasses.asdict(found), text, as_json)


@app.command(rich_help_panel=PEOPLE)
def role(
    name: Annotated[str, typer.Argument(help="Whose role to change.")],
    wanted: Annotated[str, typer.Argument(metavar="ROLE", help="annotator, viewer or admin.")],
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give a person another role, at once. An admin sees every project."""
    from keel.votes import commands

    chosen: Any = wanted
    found = commands.set_role(db, name, chosen)
    print_result(dataclasses.asdict(found), f"{found.name} is {found.role} now", as_json)


ReasonOption = Annotated[str, typer.Option("--reason", help="Why: the people who are paused read it.")]
PersonOption = Annotated[
    str | None, typer.Option("--person", help="One person: in PROJECT, or without one in all.")
]
PausedArgument = Annotated[str | None, typer.Argument(help="The project's name.")]


@app.command(rich_help_panel=WORK)
def pause(
    project: PausedArgument = None,
    person: PersonOption = None,
    reason: ReasonOption = "by an admin",
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """Hand out nothing of a project any more, or nothing to a person. Votes are kept; see resume."""
    if not reason.strip():
        raise UsageError("--reason is empty: say why, or leave it out")
    _set_paused(db, project, person, reason.strip(), as_json)


@app.command(rich_help_panel=WORK)
def resume(
    project: PausedArgument = None,
    person: PersonOption = None,
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let a project, or a person, go on. A person's wrong checks so far are forgiven in the project."""
    _set_paused(db, project, person, None, as_json)


def _set_paused(
    db: str | None, project: str | None, person: str | None, reason: str | None, as_json: bool
) -> None:
    from keel.votes import commands

    if project is None and person is None:
        raise UsageError("name a project, or a person with --person NAME")
    if person is not None:
        commands.pause(db, person, reason, project)
        who = f"{person} in {project}" if project else person
    else:
        commands.pause_project(db, str(project), reason or "")
        who = str(project)
    text = f"{who} is paused: {reason}" if reason else f"{who} goes on"
    print_result({"project": project, "person": person, "paused": reason}, text, as_json)


@app.command(rich_help_panel=PEOPLE)
def people(
    project: Annotated[str | None, typer.Argument(help="Only who may work in it.")] = None,
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """List people, with how far each has come in a project."""
    from keel.votes import commands

    rows = [
        {**dataclasses.asdict(person), **({"done": done.done, "today": done.today} if done else {})}
        for person, done in commands.people(db, project)
    ]
    print_result(
        rows, table(rows, ("name", "role", "done", "today", "paused", "is_model")) or "nobody yet", as_json
    )


@app.command("sign-out", rich_help_panel=PEOPLE)
def sign_out(
    name: Annotated[str, typer.Argument(help="Whose sessions and tokens to end.")],
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """End all sessions and API tokens of a person: for a lost device, or a token that others have seen."""
    from keel.votes import commands

    ended = commands.sign_out(db, name)
    print_result({"person": name, "ended": ended}, f"{name}: {ended} sessions and tokens ended", as_json)


@app.command(rich_help_panel=PEOPLE)
def forget(
    name: Annotated[str, typer.Argument(help="Whose data to remove.")],
    db: DbOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove a person's name, comments and sessions for good. Their votes stay, under a number."""
    from keel.votes import commands

    if not yes and not typer.confirm(f"Remove {name}'s name, comments and sessions for good?", err=True):
        raise typer.Exit(1)
    found = commands.forget(db, name)
    text = f"{name} is {found.name} now: {found.votes} votes stay, {found.comments} comments are gone"
    print_result(dataclasses.asdict(found), text, as_json)
