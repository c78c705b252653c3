"""`keel bench`: models on benchmarks that others use, too."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keel.api.terminal import show, show_json
from keel.cli.progress import progress, say

app = typer.Typer(no_args_is_help=True, help="Models on benchmarks that others use, too.")


@app.callback()
def bench() -> None:
    """Models on benchmarks that others use, too."""


@app.command()
def reward(
    model: Annotated[
        str,
        typer.Argument(
            help="A reward model (folder, hub id, runs/NAME/stages/STAGE), or a YAML file with one reward as "
            "in a config: a judge, a classifier."
        ),
    ],
    on: Annotated[
        str,
        typer.Option(
            "--on",
            help="A file or folder: RewardBench 1 or 2, LLMBar, or pairs of your own; or a YAML file that "
            "says how pairs are read, as `data` of a config.",
        ),
    ],
    benchmark: Annotated[
        str | None,
        typer.Option(help="rewardbench, rewardbench2, llmbar or pairs; default: by the columns."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for result, report and what a judge said.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Replies in one forward.")] = 16,
    dtype: Annotated[str, typer.Option(help="Of the model: auto, float32, bfloat16 or float16.")] = "auto",
    trust: Annotated[
        bool, typer.Option("--trust", help="Run Python that comes with the model, or that the file names.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Judge a reward model, an ensemble or a judge by the published rules of a benchmark, read from files."""
    from keel.cli import bench_reward
    from keel.report import reward_bench

    with progress() as draw:
        run = bench_reward.Bench(
            model, on, benchmark, out, batch_size=batch_size, dtype=dtype, trust=trust, say=say, progress=draw
        )
        found = run.run()
    if as_json:
        show_json(found)
    else:
        show(reward_bench.as_text(found))
        show(f"report: {run.directory / 'report.html'}")
