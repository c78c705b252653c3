"""`keel label`: projects, people, votes; and the pages on which people judge."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from keel.cli.label_common import (
    SAFETY,
    VOTES,
    WORK,
    DbOption,
    JsonOption,
    ProjectArgument,
    TaskOption,
    VotesOption,
    app,
    link_to,
    opened,
    print_result,
    say_note,
    table,
)
from keel.cli.progress import say
from keel.errors import UsageError


def _web() -> None:
    """UsageError where a package of the extra is missing."""
    try:
        import fastapi  # noqa: F401
        import itsdangerous  # noqa: F401
        import latex2mathml  # noqa: F401
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


@app.command(rich_help_panel=WORK)
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
    with opened(db, create=True) as store:
        if file is not None:
            name, added, known = serving.quick_project(store, file, _task(task), votes, say_note)
            say(f"keel label: project {name}: {added} items added, {known} were there")
        link = serving.first_link(store, base, say_note)
        say(f"keel label: {store.database.shown}")
        print(f"Open this link once, as the admin: {link}" if link else base, flush=True)
        if not link:
            say("keel label: sign in by your link; keel label invite makes more")
        serving.serve(store, listener, say=say, requests=log, rate=rate, url=url)


@app.command(rich_help_panel=WORK)
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
    made, code, replaced = commands.create(
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
        text += f"\nadmin's one-time link: {link_to(code)}"
        if replaced:
            say_note("the admin's link that was printed before works no longer")
    print_result({"project": made.name, "task": made.task, "admin_code": code}, text, as_json)


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


@app.command(rich_help_panel=WORK)
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

    with opened(db) as store:
        added = exchange.add(store, project, file, format=format, say=say_note)
    print_result(dataclasses.asdict(added), f"{added.added} items added, {added.known} were there", as_json)


@app.command("from-run", rich_help_panel=WORK)
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
        say_note(note)
    name = project or run.resolve().name
    with opened(db, create=True) as store:
        made = Project(name, task=labels.task, votes_per_item=votes)
        added = formats.into_project(store, name, labels, make=made)
    print_result(
        {"project": name, **dataclasses.asdict(added)}, f"{name}: {added.added} items added", as_json
    )


@app.command(rich_help_panel=WORK)
def projects(db: DbOption = None, as_json: JsonOption = False) -> None:
    """List projects with their counts."""
    from keel.votes import commands

    rows = commands.projects(db)
    print_result(
        rows,
        table(rows, ("name", "task", "items", "counted", "wanted", "paused", "title")) or "no project",
        as_json,
    )


@app.command(rich_help_panel=VOTES)
def stats(project: ProjectArgument, db: DbOption = None, as_json: JsonOption = False) -> None:
    """Say how far people agree, who is reliable, and what is still open."""
    from keel.feedback import statistics

    with opened(db) as store:
        numbers = statistics.of_project(store, project)
    print_result(numbers, _numbers(numbers), as_json)


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
    return "\n".join([*lines, *([table(rows, ("name", "reliability", "votes", "model"))] if rows else [])])


@app.command(rich_help_panel=WORK)
def rank(
    project: ProjectArgument,
    reward: Annotated[str, typer.Option("--reward", help="Reward models between commas; more is better.")],
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put first what reward models are unsure of, for projects with the order "uncertain"."""
    from keel.feedback import priorities

    with opened(db) as store:
        count = priorities.rank(store, project, [name.strip() for name in reward.split(",")])
    print_result({"project": project, "ranked": count}, f"{count} items have a priority", as_json)


@app.command(rich_help_panel=VOTES)
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
    with opened(db) as store:
        person = model_annotator.annotator(store, name or model, project)
        asked = model_annotator.annotate(store, project, person.id, endpoint, most=most, say=say)
    text = f"{asked.judged} judged, {asked.undecided} undecided between both orders, {asked.skipped} left out"
    print_result(dataclasses.asdict(asked), text, as_json)


@app.command(rich_help_panel=VOTES)
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
    with opened(db) as store:
        count = formats.write(formats.of_project(store, project), path, to, sources=sources)
    print_result(
        {"project": project, "to": to, "out": str(path), "rows": count}, f"{path}: {count} rows", as_json
    )


@app.command(rich_help_panel=SAFETY)
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
    print_result(dataclasses.asdict(report), text, as_json)
    if report.broken is not None:
        raise typer.Exit(3)


@app.command(rich_help_panel=SAFETY)
def backup(
    file: Annotated[Path, typer.Argument(help="A file that is not there yet.")],
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write everything into one file, while people work."""
    from keel.votes import commands

    report = commands.backup(db, file)
    print_result({"out": str(file), "rows": report.rows, "head": report.head}, f"{file}: verified", as_json)


@app.command(rich_help_panel=SAFETY)
def restore(
    file: Annotated[Path, typer.Argument(help="A file that backup wrote.")],
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring a backup into an empty database, SQLite or PostgreSQL."""
    from keel.votes import commands

    report = commands.restore(file, db)
    print_result(
        {"rows": report.rows, "head": report.head}, f"restored and verified, head {report.head}", as_json
    )


from keel.cli import label_people  # noqa: E402, F401 - its commands come after these
