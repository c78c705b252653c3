"""`keel label`: projects, people, votes; and the pages on which people judge."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keel.cli.progress import say
from keel.errors import UsageError

if TYPE_CHECKING:
    from keel.votes.store import Store

app = typer.Typer(
    no_args_is_help=True, help="Where people compare, rate, rank and edit replies, and what they said."
)

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


def _print(value: Any, text: str, as_json: bool) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2) if as_json else text)


def _note(note: str) -> None:
    say(f"keel label: {note}")


def _open(db: str | None, *, create: bool = False) -> Store:
    from keel.votes import open_store

    return open_store(db, create=create)


def _web() -> None:
    """UsageError where a package of the extra is missing."""
    try:
        import fastapi  # noqa: F401
        import itsdangerous  # noqa: F401
        import markdown_it  # noqa: F401
        import mdit_py_plugins  # noqa: F401
        import nh3  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError(f"keel label needs {error.name}: pip install 'keel-rlhf[label]'") from None


def _task(task: str | None) -> Any:
    from keel.votes.kinds import TASKS

    if task is not None and task not in TASKS:
        raise UsageError(f"--task is {task!r}, not one of {', '.join(TASKS)}")
    return task


@app.command()
def serve(
    file: Annotated[
        Path | None, typer.Argument(help="A file of pairs: a project of its name is made of it.")
    ] = None,
    db: DbOption = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; 0.0.0.0: every one.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8011,
    url: Annotated[
        str | None,
        typer.Option("--url", help="Where people find it, if not there: https://label.example.org"),
    ] = None,
    task: TaskOption = None,
    votes: VotesOption = 1,
    log: Annotated[bool, typer.Option("--log", help="Log each request, without codes or tokens.")] = False,
    rate: Annotated[float, typer.Option("--rate", min=0.1, help="Requests a second of one person.")] = 50.0,
) -> None:
    """Serve the pages. The first time it prints the admin's one-time link."""
    _web()
    from keel.feedback import serving

    listener = serving.listen(host, port)
    base = (url or serving.address_of(listener, host)).rstrip("/")
    with _open(db, create=True) as store:
        if file is not None:
            name, added, known = serving.quick_project(store, file, _task(task), votes)
            say(f"keel label: project {name}: {added} items added, {known} were there")
        link = serving.first_link(store, base)
        say(f"keel label: {store.database.shown}")
        print(f"Open this link once, as the admin: {link}" if link else base, flush=True)
        if not link:
            say("keel label: sign in by your link; keel label invite makes more")
        serving.serve(store, listener, say=say, requests=log, rate=rate, url=url)


@app.command()
def create(
    project: ProjectArgument,
    task: TaskOption = "pairwise",
    db: DbOption = None,
    title: Annotated[str, typer.Option("--title", help="What people see.")] = "",
    instructions: Annotated[Path | None, typer.Option(help="Markdown file, shown beside the work.")] = None,
    examples: Annotated[Path | None, typer.Option(help="Markdown file, folded below it.")] = None,
    votes: VotesOption = 1,
    scale: Annotated[
        list[str] | None,
        typer.Option("--scale", help='Of a rating: "polite 1 5 rude | courteous"; repeat it.'),
    ] = None,
    strength: Annotated[bool, typer.Option("--strength", help="Ask how much better a side is.")] = False,
    order: Annotated[
        str, typer.Option("--order", help="random, or uncertain: by keel label rank.")
    ] = "random",
    gold_share: Annotated[float, typer.Option(min=0, max=1, help="Share of hidden checks.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of the order of items and sides.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Make a project."""
    from keel.votes import commands
    from keel.votes.kinds import Project

    wanted: Any = order
    made, code = commands.create(
        db,
        Project(
            project,
            task=_task(task),
            title=title,
            instructions=_read(instructions),
            examples=_read(examples),
            votes_per_item=votes,
            scales=_scales(scale or []),
            strength=strength,
            order=wanted,
            gold_share=gold_share,
            seed=seed,
        ),
    )
    text = f"{made.name}: {made.task}, {made.votes_per_item} votes an item"
    if code:
        text += f"\nadmin's one-time link: {_link(code)}"
    _print({"project": made.name, "task": made.task, "admin_code": code}, text, as_json)


def _read(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None


def _scales(lines: list[str]) -> Any:
    from keel.feedback.scales import scales_of_text

    return scales_of_text("\n".join(lines))


def _link(code: str, url: str | None = None) -> str:
    return f"{(url or 'http://127.0.0.1:8011').rstrip('/')}/join/{code}"


@app.command()
def add(
    project: ProjectArgument,
    file: Annotated[Path, typer.Argument(help="JSONL, JSON, CSV or parquet; or a folder of Potato's.")],
    db: DbOption = None,
    format: Annotated[
        str | None, typer.Option("--format", help="Shape of the rows; default: by the first row.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Add a file's items, with the votes it brings. What is there stays as it is."""
    from keel.feedback import exchange

    with _open(db) as store:
        added = exchange.add(store, project, file, format=format, say=_note)
    _print(dataclasses.asdict(added), f"{added.added} items added, {added.known} were there", as_json)


@app.command("from-run")
def from_run(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    models: Annotated[str, typer.Option("--models", help="Its models between commas: sft,ppo")],
    pairs: Annotated[int, typer.Option("--pairs", min=1, help="How many prompts.")] = 200,
    project: Annotated[str | None, typer.Option("--project", help="Name; default: the run's.")] = None,
    db: DbOption = None,
    votes: VotesOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Make a project of two models' replies to the same prompts."""
    from keel.feedback import formats
    from keel.feedback.formats import from_run as runs
    from keel.votes.kinds import Project

    labels = runs.read(run, [name.strip() for name in models.split(",")], pairs)
    for note in labels.notes:
        _note(note)
    name = project or run.resolve().name
    with _open(db, create=True) as store:
        if name not in {one.name for one in store.projects()}:
            store.create_project(Project(name, task=labels.task, votes_per_item=votes), by=None)
        added = formats.into_project(store, name, labels)
    _print({"project": name, **dataclasses.asdict(added)}, f"{name}: {added.added} items added", as_json)


@app.command()
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
    link = _link(commands.invite(db, wanted, project, name, days, again), url)
    _print({"link": link, "role": role, "project": project, "days": days}, link, as_json)


@app.command()
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
    _print(
        rows, _table(rows, ("name", "role", "done", "today", "paused", "is_model")) or "nobody yet", as_json
    )


@app.command()
def projects(db: DbOption = None, as_json: JsonOption = False) -> None:
    """List projects with their counts."""
    from keel.votes import commands

    rows = commands.projects(db)
    _print(
        rows, _table(rows, ("name", "task", "items", "counted", "wanted", "title")) or "no project", as_json
    )


def _table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> str:
    """Rows as text under their headings; columns that no row has are left out."""
    if not rows:
        return ""
    named = [column for column in columns if any(row.get(column) not in (None, "") for row in rows)]
    cells = [named, *[["" if row.get(c) is None else str(row[c]) for c in named] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(named))]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths)).rstrip() for line in cells)


@app.command()
def stats(project: ProjectArgument, db: DbOption = None, as_json: JsonOption = False) -> None:
    """Say how far people agree, who is reliable, and what is still open."""
    from keel.feedback import statistics

    with _open(db) as store:
        numbers = statistics.of_project(store, project)
    _print(numbers, _numbers(numbers), as_json)


def _numbers(numbers: dict[str, Any]) -> str:
    counts = numbers["counts"]
    lines = [f"{counts['votes']} votes of {counts['people']} people on {counts['items']} items"]
    for name, alpha in (numbers["agreement"] or {}).items():
        ends = "" if alpha["low"] is None else f" ({alpha['low']:.2f} to {alpha['high']:.2f})"
        lines.append(f"agreement, {name}: α {alpha['mean']:.2f}{ends}, {alpha['n']} items")
    rows = [
        {
            "name": one["name"],
            "reliability": "" if one["reliability"] is None else f"{one['reliability']:.2f}",
            "votes": one["votes"],
            "model": "model" if one["is_model"] else "",
        }
        for one in numbers["people"]
    ]
    return "\n".join([*lines, *([_table(rows, ("name", "reliability", "votes", "model"))] if rows else [])])


@app.command()
def rank(
    project: ProjectArgument,
    reward: Annotated[str, typer.Option("--reward", help="Reward models between commas; more is better.")],
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put first what reward models are unsure of, for projects with the order "uncertain"."""
    from keel.feedback import priorities

    with _open(db) as store:
        count = priorities.rank(store, project, [name.strip() for name in reward.split(",")])
    _print({"project": project, "ranked": count}, f"{count} items have a priority", as_json)


@app.command()
def ask(
    project: ProjectArgument,
    url: Annotated[str, typer.Option("--url", help="OpenAI-compatible address: http://localhost:8000/v1")],
    model: Annotated[str, typer.Option("--model", help="The model's name there.")],
    key_env: Annotated[
        str | None, typer.Option("--key-env", help="Environment variable that holds the key.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Its name here; default: the model's.")] = None,
    most: Annotated[int | None, typer.Option("--most", min=1, help="Judge at most this many items.")] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", min=1, help="Seconds to wait for an answer.")
    ] = 120.0,
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let a language model judge too, in both orders. It is marked as a model and fills no one's place."""
    from keel.feedback import model_annotator

    key = os.environ.get(key_env) if key_env else None
    if key_env and not key:
        raise UsageError(f"--key-env: the environment has no {key_env}")
    endpoint = model_annotator.Endpoint(url, model, key, timeout=timeout)
    with _open(db) as store:
        person = model_annotator.annotator(store, name or model, project)
        asked = model_annotator.annotate(store, project, person.id, endpoint, most=most, say=say)
    text = f"{asked.judged} judged, {asked.undecided} undecided between both orders, {asked.skipped} left out"
    _print(dataclasses.asdict(asked), text, as_json)


@app.command()
def export(
    project: ProjectArgument,
    to: Annotated[str, typer.Option("--to", help="keel, preference, unpaired, ranked, …")] = "preference",
    out: Annotated[Path | None, typer.Option("--out", help="Default: PROJECT-FORMAT.jsonl here.")] = None,
    sources: Annotated[
        bool, typer.Option("--sources/--no-sources", help="With where replies come from.")
    ] = True,
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a project's votes as training rows, or for another tool."""
    from keel.feedback import formats

    path = out or Path(f"{project}-{to}.jsonl")
    with _open(db) as store:
        count = formats.write(formats.of_project(store, project), path, to, sources=sources)
    _print({"project": project, "to": to, "out": str(path), "rows": count}, f"{path}: {count} rows", as_json)


@app.command()
def verify(
    head: Annotated[
        str | None,
        typer.Option("--head", help="The head that an earlier check printed: nothing was cut off."),
    ] = None,
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check the log of all changes. Exits with 3, naming the row, where something was changed behind it."""
    from keel.votes import commands

    report = commands.verify(db, head)
    text = (
        f"{report.rows} rows of the log hold; head {report.head}"
        if report.broken is None
        else f"row {report.broken} of the log does not hold: {report.reason}"
    )
    _print(dataclasses.asdict(report), text, as_json)
    if report.broken is not None:
        raise typer.Exit(3)


@app.command()
def backup(
    file: Annotated[Path, typer.Argument(help="A file that is not there yet.")],
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write everything into one file, while people work."""
    from keel.votes import commands

    report = commands.backup(db, file)
    _print({"out": str(file), "rows": report.rows, "head": report.head}, f"{file}: verified", as_json)


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(help="A file that backup wrote.")],
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring a backup into an empty database, SQLite or PostgreSQL."""
    from keel.votes import commands

    report = commands.restore(file, db)
    _print({"rows": report.rows, "head": report.head}, f"restored and verified, head {report.head}", as_json)


@app.command("sign-out")
def sign_out(
    name: Annotated[str, typer.Argument(help="Whose sessions and tokens to end.")],
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """End all sessions and API tokens of a person: for a lost device, or a token that others have seen."""
    from keel.votes import commands

    ended = commands.sign_out(db, name)
    _print({"person": name, "ended": ended}, f"{name}: {ended} sessions and tokens ended", as_json)


@app.command()
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
    _print(dataclasses.asdict(found), text, as_json)
