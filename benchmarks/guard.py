"""This keel against an earlier one, in pairs in one run: processor's seconds of a step, and of `keel --help`.

    make bench-guard AGAINST=HEAD~20
    python benchmarks/guard.py WHEEL_OR_GIT_REF [KIND …] [--pairs 5] [--threads 1] [--loss 0.10]

Each measurement is a process of its own, and the two take turns; the one that goes first changes with each
pair. Processor time is counted and not the clock's, so that other work on the machine says less; a pair's
ratio is new over old. Ends with 3 where the median ratio of any kind is above 1 + LOSS. Models, rows and
settings are those of `peers.py`, with fewer steps; kinds are its kinds, `engine` (64 responses, sampled and
nothing else) and `help`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import peers  # pyright: ignore[reportImplicitRelativeImport]

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("help", "sft", "reward", "dpo", "ppo-auto", "grpo", "engine")  # the short list that runs by default
EVERY = ("help", "engine", *peers.KINDS)
STEPS = 4  # or updates; the first is the warm-up


def unpacked(name: str, folder: Path) -> Path:
    """The source of a wheel, or of a git ref of this repository, in `folder`: what goes into PYTHONPATH."""
    if name.endswith(".whl"):
        with zipfile.ZipFile(name) as wheel:
            wheel.extractall(folder)
        return folder
    archive = folder / "source.tar"
    subprocess.run(
        ["git", "-C", str(ROOT), "archive", "--output", str(archive), name, "src", "recipes"], check=True
    )
    with tarfile.open(archive) as source:
        source.extractall(folder, filter="data")
    return folder / "src"


def stage_seconds(kind: str, folder: Path) -> float:
    """In a process of its own: processor's seconds of a step, the median over all but the first."""
    from keel.config import parse
    from keel.pipeline.pipeline import Pipeline

    config = peers.keel_config(kind, folder, "cpu")
    stage = config["stages"]["stage"]
    stage["updates" if "updates" in stage else "max_steps"] = STEPS
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as temporary:
        progress = lambda *step: ends.append(time.process_time())  # noqa: E731
        Pipeline(parse(config), Path(temporary), say=lambda line: None, progress=progress).run()
    return statistics.median(b - a for a, b in itertools.pairwise(ends))


def engine_seconds(folder: Path) -> float:
    """In a process of its own: seconds of the processor for 64 responses, the median without the first."""
    import torch
    from transformers import AutoModelForCausalLM

    from keel.rollout.engine import generate
    from keel.types import Sampling

    policy: Any = AutoModelForCausalLM.from_pretrained(folder / "ending").eval()
    drawn = torch.Generator().manual_seed(1)
    shape = (peers.BATCH, peers.PROMPT)
    prompts = torch.randint(4, policy.config.vocab_size, shape, generator=drawn).tolist()
    asked: Any = {"stop_ids": [2], "pad_id": 0, "seed": 0, "batch_size": peers.BATCH}
    ends: list[float] = []
    for _ in range(STEPS + 1):
        generate(policy, prompts, Sampling(peers.RESPONSE), **asked)
        ends.append(time.process_time())
    return statistics.median(b - a for a, b in itertools.pairwise(ends))


def help_seconds() -> float:
    """Processor's seconds of `keel --help`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "keel", "--help"], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def measured(kind: str, source: Path, folder: Path, threads: int) -> float:
    """Of the keel in `source`, in a process of its own."""
    environment = {
        **os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    command = [sys.executable, __file__, "--side", kind, "--folder", str(folder), "--threads", str(threads)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{kind} failed with {source}:\n{done.stderr[-3000:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def compare(
    kinds: Sequence[str], old: Path, folder: Path, pairs: int, threads: int
) -> dict[str, list[tuple[float, float]]]:
    """Kind → (old, new) of each pair; a line a kind."""
    found: dict[str, list[tuple[float, float]]] = {}
    print(f"{'':<12}{'old, s':>9}{'new, s':>9}{'ratio':>8}   ratios of the pairs")
    for kind in kinds:
        rows: list[tuple[float, float]] = []
        for number in range(pairs):
            sides = {"old": old, "new": ROOT / "src"}
            order = ("old", "new") if number % 2 == 0 else ("new", "old")
            seconds = {side: measured(kind, sides[side], folder, threads) for side in order}
            rows.append((seconds["old"], seconds["new"]))
        found[kind] = rows
        a, b = (statistics.median(row[side] for row in rows) for side in (0, 1))
        listed = " ".join(f"{ratio:.2f}" for ratio in ratios(rows))
        print(f"{kind:<12}{a:>9.3f}{b:>9.3f}{statistics.median(ratios(rows)):>8.2f}   {listed}", flush=True)
    return found


def ratios(rows: Sequence[tuple[float, float]]) -> list[float]:
    """New over old, pair by pair."""
    return [new / old for old, new in rows]


def lost(found: Mapping[str, Sequence[tuple[float, float]]], loss: float) -> list[str]:
    """The kinds whose median ratio is above 1 + loss."""
    return [kind for kind, rows in found.items() if statistics.median(ratios(rows)) > 1 + loss]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("against", nargs="?", help="a wheel, or a git ref")
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(EVERY)}; default: {', '.join(KINDS)}")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--loss", type=float, default=0.10)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.side:
        _side(settings)
        return
    if settings.against is None:
        parser.error("name what to compare with: a wheel of the last release, or a git ref")
    if odd := [kind for kind in settings.kinds if kind not in EVERY]:
        parser.error(f"{odd[0]!r} is none of {', '.join(EVERY)}")
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        peers.prepare(Path(one))
        old = unpacked(settings.against, Path(other))
        found = compare(settings.kinds or KINDS, old, Path(one), settings.pairs, settings.threads)
    if slower := lost(found, settings.loss):
        print(f"slower by more than {100 * settings.loss:.0f} %: {', '.join(slower)}", file=sys.stderr)
        raise SystemExit(3)


def _side(settings: Any) -> None:
    """Measure one side, in this process."""
    if settings.side == "help":
        seconds = help_seconds()
    else:
        import torch

        torch.set_num_threads(settings.threads)
        of_side = engine_seconds if settings.side == "engine" else partial(stage_seconds, settings.side)
        seconds = of_side(settings.folder)
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
