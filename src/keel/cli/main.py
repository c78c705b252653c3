"""The command line: parse, call, print. Results on stdout; logs and progress on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

import keel
from keel.api.terminal import show, show_json
from keel.cli import bench, boundary, engine, interrupts, label, startup
from keel.cli.progress import progress, say
from keel.distributed import records
from keel.errors import UsageError
from keel.rundir import run_status

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="The whole RLHF pipeline on one machine.",
    pretty_exceptions_enable=False,
)
recipes_app = typer.Typer(invoke_without_command=True, help="Complete configs, one per known use.")
app.add_typer(recipes_app, name="recipes")
app.add_typer(label.app, name="label")
app.add_typer(bench.app, name="bench")
app.add_typer(engine.app, name="engine")

ConfigArgument = Annotated[Path, typer.Argument(help="A config file, or a recipe's name.")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(help="dotted.key=value, values in YAML: ppo.kl.coef=0.1")
]
RunsOption = Annotated[Path, typer.Option("--runs", help="Folder of the run directories.")]
NameOption = Annotated[str | None, typer.Option("--name", help="Name of the run; default: the config's.")]
TrustOption = Annotated[
    bool, typer.Option("--trust", help="Run code that CONFIG brings; its folder is trusted from now on.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
NodeOption = Annotated[
    str | None,
    typer.Option("--node", help="With --nproc: which ranks these are, FIRST/OF@HOST:PORT of all machines."),
]
RestartsOption = Annotated[
    int, typer.Option("--max-restarts", min=0, max=1000, help="Start again so often where a rank fails.")
]
PortOption = Annotated[
    int, typer.Option("--port", min=1, max=65535, help="Where the first machine listens for the others.")
]
PORT = 29500  # torch's own, too
WhileStdinOption = Annotated[bool, typer.Option("--while-stdin", hidden=True)]


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 failure, 2 bad usage, config or data, 3 a check did not hold, 130
    interrupted."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():  # the libraries' download bars; read when they are imported
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    warnings.showwarning = _show_warning
    codes = os.environ.pop(records.CODES, None)  # for this process, not for the ranks that it starts
    code = boundary.guarded(lambda: app(standalone_mode=True))
    if codes is not None:
        records.leave_code(codes, code)
    sys.exit(code)


_show_with_place = warnings.showwarning


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A note of keel's own as one plain line: its place in keel's code means nothing to a user."""
    if category.__module__.partition(".")[0] == "keel":
        say(f"keel: note: {message}")
    else:
        _show_with_place(message, category, filename, lineno, file, line)


def _version(asked: bool) -> None:
    if asked:
        show(f"keel {keel.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Of an error show where it was raised, on any command.")
    ] = False,
) -> None:
    """The whole RLHF pipeline on one machine."""


@app.command()
def run(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    runs: RunsOption = Path("runs"),
    name: NameOption = None,
    only: Annotated[str | None, typer.Option(help="Run this stage alone; its inputs must be done.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what was done before.")] = False,
    trust: TrustOption = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before long work is done again.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for people's votes; else the run ends.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Serve a dashboard of the run for as long as it lasts.")
    ] = False,
    keep_watching: Annotated[
        bool, typer.Option("--keep-watching", help="As --watch, and leave the dashboard open at the end.")
    ] = False,
    nproc: Annotated[
        int | None, typer.Option("--nproc", min=1, help="Ranks to run on, on this machine; default: 1.")
    ] = None,
    node: NodeOption = None,
    max_restarts: RestartsOption = 0,
    while_stdin: WhileStdinOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run every stage of CONFIG; skip what is unchanged, go on with what was cut off."""
    if while_stdin:
        interrupts.end_with_stdin()
    pipeline = pipeline_of(config, overrides, runs, name)
    from keel import report  # these after what they import, too: see `startup`
    from keel.cli import consent, ranks

    place = ranks.place_of(node, nproc, max_restarts)
    if nproc is not None:
        ranks.check(nproc)
    if not records.is_watched():  # else whoever started this rank has asked
        consent.of_first(_place(config), pipeline.config, trust)
    if nproc is not None and (nproc > 1 or place or max_restarts):
        flags = {"--fresh": fresh, "--yes": yes, "--wait": wait, "--json": as_json}
        named = {"--runs": str(runs), "--name": name, "--only": only}
        command = ["run", str(config), *(overrides or []), *(flag for flag, on in flags.items() if on)]
        command += [part for flag, value in named.items() if value is not None for part in (flag, value)]
        with _watched(pipeline.directory, watch, keep_watching):
            code = ranks.run(command, nproc, pipeline.config, place, max_restarts)
        raise typer.Exit(code)
    if not yes and sys.stdin.isatty() and sys.stderr.isatty():
        pipeline.confirm = _asked
    pipeline.wait = wait
    with _watched(pipeline.directory, watch, keep_watching), progress() as draw:
        pipeline.progress = draw
        pipeline.run(only=only, fresh=fresh)
    if records.rank():
        return  # the first one shows what came of it
    if as_json:
        show_json(run_status.outcome(pipeline))
    else:
        show(report.summary(pipeline.directory))
        show(f"report: {pipeline.directory / 'report.html'}")


@app.command()
def launch(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    nodes: Annotated[
        str | None,
        typer.Option(help="A file with one host a line; with --slurm and --ray how many machines."),
    ] = None,
    nproc: Annotated[int | None, typer.Option("--nproc", min=1, help="Ranks on each machine.")] = None,
    runs: RunsOption = Path("runs"),
    name: NameOption = None,
    only: Annotated[str | None, typer.Option(help="Run this stage alone; its inputs must be done.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what was done before.")] = False,
    trust: TrustOption = False,
    port: PortOption = PORT,
    ssh: Annotated[str, typer.Option(help="What reaches a host, in place of ssh; with its options.")] = "",
    max_restarts: RestartsOption = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the commands and run none of them.")
    ] = False,
    slurm: Annotated[
        bool, typer.Option("--slurm", help="Print a script for sbatch in place of ssh.")
    ] = False,
    ray: Annotated[
        bool, typer.Option("--ray", help="As workers of Ray Train, in place of ssh; --nodes N spreads them.")
    ] = False,
    address: Annotated[
        str | None,
        typer.Option("--address", help="With --ray: its cluster, HOST:PORT, auto (default) or local."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run CONFIG on several machines: by ssh, from here, by Ray, or as a job of SLURM."""
    if address is not None and not ray:
        raise UsageError("--address has no effect without --ray")
    pipeline = pipeline_of(config, overrides, runs, name)
    from keel.cli import consent
    from keel.cli import launch as launching

    named = {"--runs": str(runs), "--name": name, "--only": only}
    flags = {"--fresh": fresh, "--json": as_json, "--trust": trust}
    elsewhere = {"--ssh": bool(ssh), "--port": port != PORT}
    if ray:
        _unused({"--slurm": slurm, **elsewhere}, "--ray, which starts the ranks")
        return _by_ray(
            pipeline, (nodes, nproc, address, max_restarts), config, overrides, named, flags, dry_run
        )
    command = ["run", str(config), *(overrides or []), *(flag for flag, on in flags.items() if on)]
    command += [part for flag, value in named.items() if value is not None for part in (flag, value)]
    if slurm:
        _unused({**elsewhere, "--dry-run": dry_run}, "--slurm, which prints a script and runs nothing")
        return show(launching.slurm(command, pipeline.directory, nodes, nproc, max_restarts), end="")
    found, chosen = launching.parts(launching.hosts_of(nodes), nproc, port), launching.words(ssh)
    if dry_run:
        return show("\n".join(shlex.join(line) for _, line in launching.commands(found, command, chosen)))
    consent.to_run(_place(config), pipeline.config, trust)
    raise typer.Exit(launching.ended(launching.run(found, command, chosen, max_restarts, plain=as_json)))


def _unused(given: dict[str, bool], beside: str) -> None:
    """UsageError for the first option that was given and has no effect."""
    if option := next((option for option, on in given.items() if on), None):
        raise UsageError(f"{option} has no effect with {beside}")


def _by_ray(
    pipeline: Any,
    wanted: tuple[str | None, int | None, str | None, int],
    config: Path,
    overrides: list[str] | None,
    named: dict[str, str | None],
    flags: dict[str, bool],
    dry_run: bool,
) -> None:
    """`keel launch --ray`. wanted: machines, ranks on each, the cluster's address, restarts."""
    from keel.cli import consent, launch_ray
    from keel.cli import launch as launching

    asked = launch_ray.asked(pipeline, *wanted, named["--only"])
    if dry_run:
        return show(launch_ray.as_text(asked))
    consent.to_run(_place(config), pipeline.config, flags["--trust"])
    arguments = launch_ray.Arguments(
        str(config), tuple(overrides or ()), str(named["--runs"]), named["--name"], named["--only"],
        flags["--fresh"], flags["--json"], boundary.shows_tracebacks(),
    )  # fmt: skip
    raise typer.Exit(launching.ended(launch_ray.run(asked, arguments)))


@app.command()
def clean(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    stage: Annotated[str | None, typer.Option(help="Only what is kept of this stage.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what is kept of stages that were run again with other settings, and remove it if you agree."""
    from keel.cli import clean as cleaning

    removed = cleaning.clean(run, stage, agree=(lambda question: True) if yes else _agreed, say=say)
    if as_json:
        show_json(removed)


@app.command()
def plan(
    config: Annotated[Path | None, typer.Argument(help="A config file, or a recipe's name.")] = None,
    overrides: OverridesArgument = None,
    runs: RunsOption = Path("runs"),
    name: NameOption = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Instead of CONFIG: a model folder or a common model's hub id."),
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", help="With --model: sft, reward, dpo, grpo or ppo (default).")
    ] = None,
    nproc: Annotated[
        int | None, typer.Option("--nproc", min=2, max=65536, help="Say it of so many ranks, too.")
    ] = None,
    card: Annotated[str, typer.Option("--card", help="With --nproc: the size of each card.")] = "80GB",
    bandwidth: Annotated[
        float | None,
        typer.Option(
            "--bandwidth", min=0.001, help="With --nproc: GB/s in and out of a rank (doctor --distributed)."
        ),
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(
            "--tflops", min=0.001, help="With --nproc: TFLOP/s that a card reaches (doctor --bench)."
        ),
    ] = None,
    reading: Annotated[
        float | None,
        typer.Option(
            "--reading", min=0.001, help="With --tflops: GB/s at which a card reads (doctor --bench)."
        ),
    ] = None,
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say what CONFIG would do: data, tokens, steps, parameters, memory. Trains nothing.

    With --model and no CONFIG: what a method's models of that size take, the textbook's sum beside real
    totals.
    """
    if nproc is not None and model is not None:
        raise UsageError("--nproc needs a config: with --model the cards are counted already")
    of_ranks = {"--bandwidth": bandwidth, "--tflops": tflops, "--reading": reading, "--card": card != "80GB"}
    if nproc is None and (idle := next((option for option, given in of_ranks.items() if given), None)):
        raise UsageError(f"{idle} has no effect without --nproc")
    if (tflops is None) != (reading is None):
        raise UsageError("--tflops and --reading go together: seconds need both")
    if (config is None) == (model is None):
        raise UsageError("give a config or recipe to plan, or --model with a model's hub id: one of them")
    if model is not None:
        from keel.plan import rule_of_thumb

        table = rule_of_thumb.as_json if as_json else rule_of_thumb.as_text
        show(table(model, method or "ppo"))
        return
    if method is not None or config is None:
        raise UsageError("--method has no effect without --model: a config names its methods itself")
    pipeline = pipeline_of(config, overrides, runs, name)
    from keel.cli import consent
    from keel.plan import disk, planner, rank_memory, text

    pipeline.sources.code = consent.to_plan(_place(config), pipeline.config, trust)
    asked = nproc and rank_memory.Asked(
        nproc, rank_memory.card_of(card), bandwidth and bandwidth * rank_memory.GB,
        rank_memory.speed_of(tflops, reading),
    )  # fmt: skip
    entries = planner.plan(pipeline, asked or None)
    if as_json:
        for entry in entries:
            entry["disk"] = disk.as_dict(disk.need(pipeline, entry["stage"]))
        show(planner.as_json(entries))
    else:
        show(f"{text.as_text(entries)}\n{disk.line(pipeline, entries)}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run directory.")], as_json: JsonOption = False
) -> None:
    """Write the run's report.html again and print its verdict."""
    from keel import report as reports

    if not any((run / name).exists() for name in ("config.yaml", "manifest.json", "stages")):
        raise UsageError(f"no run at {run}: there is no config.yaml in it")
    made = reports.report(run)
    if as_json:
        stages = {
            name: {"status": run_status.status(run, name, facts)}
            for name, facts in run_status.manifest(run).items()
        }
        results = run_status.results(run)
        show_json({"report": str(made.page), "stages": stages, "results": results, "notes": made.notes})
    else:
        show(made.text)
        for note in made.notes:
            show(reports.unshown(note))
        show(f"report: {made.page}")


@app.command()
def diagnose(
    path: Annotated[Path, typer.Argument(help="A run, one of its stages, or a trainer_state.json of TRL.")],
    as_json: JsonOption = False,
) -> None:
    """Say what the metrics of PATH show: findings by stage. Exits with 3 where something is going wrong."""
    from keel.cli import diagnose as diagnosing

    found = diagnosing.diagnose(path)
    show(diagnosing.as_json(found) if as_json else diagnosing.as_text(found))
    if diagnosing.urgent(found):
        raise typer.Exit(3)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run directories with a finished evaluate stage.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The page; default: compare.html beside the first run.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Rank the models of one run or several by gold reward, else by proxy; runs that differ in their seed are
    pooled."""
    from keel.report import compare

    found = compare.compare(runs)
    page = out or runs[0].resolve().parent / "compare.html"
    compare.write(found, page)
    if as_json:
        show(compare.as_json(found, page))
    else:
        show(compare.as_text(found))
        show(f"\npage: {page}")


@app.command()
def sweep(
    config: ConfigArgument,
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            help="dotted.key=1,2,3 is swept, values in YAML between commas; one value is an override."
        ),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Seeds between commas: 0,1,2; default: the config's.")
    ] = None,
    runs: RunsOption = Path("runs"),
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the sweep; default: the config's, -sweep.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Points that run at the same time.")] = 1,
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run CONFIG over settings and seeds. Points share stages that no setting changes; what is done is
    skipped."""
    place = _place(config)
    with startup.importing():
        startup.load()
        from keel.cli import consent, sweep
        from keel.report import sweeps

    directory, points = sweep.points(place, settings or [], sweep.seeds_of(seeds), runs, name, say)
    consent.to_run(place, points[0].pipeline.config, trust)
    facts = sweep.Sweep(place, directory, points, jobs, say).run()
    if as_json:
        show_json(facts)
    else:
        show(sweeps.as_text(facts))
        show(f"\npage: {facts['report']}")
    if any(point["status"] == "failed" for point in facts["points"]):
        raise typer.Exit(1)


@app.command()
def dashboard(
    runs: Annotated[Path, typer.Argument(help="A folder of runs, or one run.")] = Path("runs"),
    host: Annotated[
        str, typer.Option(help="Address to serve on; any but this machine's own asks for a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes one that is free.")] = 8012,
    most_pages: Annotated[
        int, typer.Option(min=1, max=1000, help="Pages that may be open at a time; others wait.")
    ] = 64,
    wait: Annotated[bool, typer.Option("--wait", hidden=True)] = False,
    while_stdin: Annotated[bool, typer.Option("--while-stdin", hidden=True)] = False,
) -> None:
    """Watch the runs in RUNS live in a browser: keel's, TRL's and TensorBoard's."""
    from keel.cli import dashboard as watching

    watching.serve(
        runs, host, port, lambda link: print(link, flush=True),
        wait=wait, while_stdin=while_stdin, most_pages=most_pages,
    )  # fmt: skip


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="A model folder, a hub id, or runs/NAME/stages/STAGE.")],
    prompt: Annotated[str | None, typer.Option("--prompt", help="Answer this and end.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.7,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    date: Annotated[
        str | None, typer.Option("--date", help="The day for templates that write one: 2026-11-28; today.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Talk to a model. A line is a turn; an empty line or Ctrl-D ends."""
    folder = _model_folder(model)
    with startup.importing():
        startup.load_transformers()
        from keel.cli.chat import Talk

    talk = Talk(folder, temperature, max_new_tokens, seed, date)
    if talk.note:
        show(talk.note, sys.stderr)
    if prompt is not None:
        answer = talk.answer(prompt)
        show(json.dumps({"prompt": prompt, "completion": answer}, ensure_ascii=False) if as_json else answer)
        return
    while True:
        try:
            line = input("you: " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not line.strip():
            return
        answer = talk.answer(line)
        show(
            json.dumps({"prompt": line, "completion": answer}, ensure_ascii=False) if as_json else answer,
        )


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="runs/NAME, runs/NAME/STAGE, or a model folder.")],
    to: Annotated[
        str, typer.Option("--to", help="gguf, ollama (gguf and a Modelfile) or hub (with a card).")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="The file or folder; default: NAME-STAGE here.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the matrices in a GGUF: float32, float16 or bfloat16.")
    ] = "float32",
    as_json: JsonOption = False,
) -> None:
    """Write a run's MODEL in the form that another program takes. Of a run alone: its last language model."""
    from keel.cli import export as exporting

    target = exporting.export(model, to, out, dtype)
    show(json.dumps({"model": model, "to": to, "out": str(target)}) if as_json else target)


@app.command()
def push(
    model: Annotated[str, typer.Argument(help="runs/NAME, runs/NAME/STAGE, or a model folder.")],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the hub; made where it is not there.")],
    public: Annotated[
        bool, typer.Option("--public", help="A new repository is public; else private.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; default: the main one.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Upload a run's MODEL with a full card to the Hugging Face hub, as whoever is logged in there."""
    from keel.cli import export as exporting

    address = exporting.push(model, repo, private=not public, revision=revision)
    show(json.dumps({"model": model, "repo": repo, "url": address}) if as_json else address)


@recipes_app.callback(invoke_without_command=True)
def recipes(context: typer.Context, as_json: JsonOption = False) -> None:
    """List the recipes."""
    if context.invoked_subcommand is not None:
        return
    from keel.config.reading import read_mapping  # not validated: that loads what a loss is made of

    found = {
        path.stem: read_mapping(path).get("description", "")
        for path in sorted(_recipes_folder().glob("*.yaml"))
    }
    width = max(map(len, found))
    show(
        json.dumps(found, ensure_ascii=False, indent=2)
        if as_json
        else "\n".join(f"{n:<{width}}  {d}" for n, d in found.items())
    )


@recipes_app.command("show")
def recipes_show(name: str) -> None:
    """Print a recipe."""
    show(_recipe(name).read_text(encoding="utf-8"), end="")


@recipes_app.command("copy")
def recipes_copy(
    name: str, to: Annotated[Path | None, typer.Argument(help="Where to; default: NAME.yaml here.")] = None
) -> None:
    """Copy a recipe to edit it."""
    target = to or Path(f"{name}.yaml")
    if target.is_dir():
        target = target / f"{name}.yaml"
    recipe = _recipe(name)
    if target.exists():
        raise UsageError(f"{target} is there already; it was not overwritten")
    if not target.parent.is_dir():
        raise UsageError(f"there is no folder {target.parent}")
    shutil.copyfile(recipe, target)
    show(target)


@app.command()
def schema() -> None:
    """Print the JSON Schema of the config, for editors."""
    from keel.config import RunConfig

    show(json.dumps(RunConfig.model_json_schema(), indent=2, ensure_ascii=False))


@app.command("import-config")
def import_config(
    method: Annotated[str, typer.Argument(help="TRL's trainer: sft, reward, dpo, kto, grpo or rloo.")],
    file: Annotated[Path, typer.Argument(help="What `trl METHOD --config FILE` reads.")],
) -> None:
    """Print a TRL config as a keel config, with notes on what differs."""
    import yaml

    from keel.config import importing
    from keel.config.reading import read_mapping

    found = importing.from_trl(read_mapping(file), method)
    for note in found.notes:
        say(f"keel: note: {note}")
    show(yaml.safe_dump(found.config, sort_keys=False, allow_unicode=True), end="")


@app.command()
def doctor(
    model: Annotated[
        str | None, typer.Argument(help="A model to look at: a folder, a hub id, or runs/NAME/stages/STAGE.")
    ] = None,
    distributed: Annotated[
        bool, typer.Option("--distributed", help="Try several ranks: whether they can work together.")
    ] = False,
    nproc: Annotated[
        int | None, typer.Option("--nproc", min=1, help="With --distributed: ranks on each machine.")
    ] = None,
    shared: Annotated[
        Path | None, typer.Option("--shared", help="With --distributed: a folder that all should see.")
    ] = None,
    nodes: Annotated[
        str | None, typer.Option(help="With --distributed: a file with one host a line, to try them all.")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="With --distributed: a vLLM server's address, or vllm: the one installed here."),
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="With --engine: the variable with the server's key.")
    ] = None,
    port: PortOption = PORT,
    ssh: Annotated[str, typer.Option(help="What reaches a host, in place of ssh; with its options.")] = "",
    node: NodeOption = None,
    while_stdin: WhileStdinOption = False,
    bench: Annotated[
        bool, typer.Option("--bench", help="Measure how fast this machine is, and keep it for all runs.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="With --bench: as `threads` of the runs.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the environment and whether keel can work in it; or what a model's own files say of it; or with
    --bench how fast the machine is."""
    if while_stdin:
        interrupts.end_with_stdin()
    if distributed:
        from keel.cli import doctor_ranks
        from keel.cli import launch as launching

        if bench or threads is not None:
            raise UsageError("--bench and --threads have no effect with --distributed: ask for one of them")
        asked = doctor_ranks.Asked(
            nproc, shared, nodes, port, launching.words(ssh), node, as_json, engine, api_key_env
        )
        raise typer.Exit(doctor_ranks.command(asked, model))
    of_ranks = {
        "--nproc": nproc, "--shared": shared, "--nodes": nodes, "--node": node, "--ssh": ssh,
        "--port": port != PORT, "--engine": engine, "--api-key-env": api_key_env,
    }  # fmt: skip
    if idle := next((option for option, given in of_ranks.items() if given), None):
        raise UsageError(f"{idle} has no effect without --distributed")
    if model is not None and bench:
        raise UsageError("--bench measures the machine: give it no model")
    if threads is not None and not bench:
        raise UsageError("--threads has no effect without --bench")
    if model is not None:
        _describe(model, as_json)
        return
    from keel.cli import doctor as examining

    found = examining.bench(threads) if bench else examining.facts()
    in_words = examining.bench_text if bench else examining.as_text
    show(json.dumps(found, indent=2) if as_json else in_words(found))
    if found.get("missing"):
        raise typer.Exit(1)


def _describe(model: str, as_json: bool) -> None:
    """What a model's own files say of it."""
    from keel.models.facts import read_facts

    lines = read_facts(_model_folder(model)).describe()
    show(json.dumps({"model": model, "facts": lines}, indent=2) if as_json else "\n".join(lines))


# ---------------------------------------------------------------- parts of the commands


def _asked(question: str) -> bool:
    """What a person on a terminal says."""
    show(f"{question} [y/N] ", sys.stderr, end="")
    return sys.stdin.readline().strip().casefold() in ("y", "yes")


def _agreed(question: str) -> bool:
    """As `_asked`; without a terminal nobody agrees."""
    return sys.stdin.isatty() and sys.stderr.isatty() and _asked(question)


def _watched(run: Path, watch: bool, keep: bool) -> contextlib.AbstractContextManager[None]:
    """A dashboard of a run beside it, where one is asked for: by the first rank alone."""
    if records.rank() or not (watch or keep):
        return contextlib.nullcontext()
    from keel.cli import dashboard as watching

    return watching.beside(run, say, keep=keep)


def pipeline_of(config: Path, overrides: list[str] | None, runs: Path, name: str | None) -> Any:
    """The pipeline of a config, as the command line names it. A config that cannot be read is an error before
    anything of models is imported."""
    with startup.importing():
        from keel.config import read

        settings = read(_place(config), [*(overrides or []), *([f"name={json.dumps(name)}"] if name else [])])
        startup.load()
        from keel.pipeline.pipeline import Pipeline
        from keel.plan import disk, planner

    return Pipeline(settings, runs / settings.name, say, fit=planner.micro_batch, room=disk.room)


def _model_folder(model: str) -> str:
    """A folder or a hub id; of a stage's folder the model in it. UsageError for what is not there, and for a
    run."""
    from keel.models.hub import may_be_on_hub

    place = Path(model)
    inside = place / "model"
    beside = (
        len(place.parts) > 1 and Path(place.parts[0]).is_dir()
    )  # runs/NAME is no model of an owner `runs`
    if not place.exists() and (beside or model.count("/") > 1 or not may_be_on_hub(model)):
        raise UsageError(
            f"no model at {model}: give a folder, a hub id (OWNER/NAME) or runs/NAME/stages/STAGE"
        )
    if place.is_dir() and (place / "stages").is_dir():
        stages = sorted(one.name for one in (place / "stages").iterdir() if (one / "model").is_dir())
        raise UsageError(f"{model} is a run: name a stage of it, {model}/stages/{{{','.join(stages)}}}")
    return str(inside) if (inside / "config.json").exists() else model


def _place(config: Path) -> Path:
    """The file of a config, or of the recipe with that name."""
    from keel.config import recipes

    return recipes.config_path(config)


def _recipes_folder() -> Path:
    from keel.config import recipes

    return recipes.folder()


def _recipe(name: str) -> Path:
    from keel.config import recipes

    return recipes.path_of(name)


if __name__ == "__main__":
    main()
