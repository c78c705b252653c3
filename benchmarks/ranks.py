"""Two processes of one thread each against one process of one thread: seconds of a training step, or memory.

    python benchmarks/ranks.py [KIND …] [--pairs N] [--ranks N] [--strategy ddp|fsdp] [--size small]
                               [--picture FILE.svg]
    python benchmarks/ranks.py [KIND …] --memory [--ranks N] [--strategy fsdp] [--size middle]

The untrained Llama of `peers.py` (7.3 M parameters) and keel's settings beside it: 64 rows a step, 16 at a
time, prompts of 32 tokens and responses of 64 at most; float32 on the CPU. The two sides take turns, each in
processes of its own; of each run the median step counts, the first two left out (they make what is made
once). Printed: medians over the pairs, and the machine's load before and after, since on a machine that
others use the ratio says little.

Beside the measured step stands what is foreseen: a process's seconds shared out, and the bytes that
`keel plan --nproc` counts at the bandwidth that `keel doctor --distributed` measures between the same
processes. `--picture` draws both against the number of ranks; beyond those that were measured it shows what
is foreseen, had every rank a core of its own and the bandwidth of these.

`--memory`: the peak of a rank's resident memory above what it is once everything is imported, of the fullest
rank, from opening the models to saving them, a checkpoint among it, in the same way as `memory.py` (freed
memory is given back at once). 4 rows of 48 tokens a step, one at a time, on an untrained Llama of 91 M
parameters (`--size deep`: 124 M), so that weights, gradients and AdamW's states count and activations do not.
Beside it what `keel plan --nproc` says, whose arithmetic is that of cards.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import memory
import peers
import yaml

STEPS, FIRST = 8, 2
PHASES = ("rollout", "forward", "score", "train")  # of a step, one after the other
peers.SIZES["middle"] = {  # 91 M parameters
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "tie_word_embeddings": True,
}
peers.SIZES["deep"] = {  # 124 M parameters: of each layer, and of what is no layer, a smaller share
    **peers.SIZES["middle"],
    "hidden_size": 640,
    "intermediate_size": 1728,
    "num_hidden_layers": 24,
    "num_attention_heads": 10,
}
RESPONSE = 16  # tokens, of --memory
DRAWN = (1, 2, 4, 8, 16)  # ranks
COLOURS = {  # of others black
    ("sft", "ddp"): "#2563eb",
    ("sft", "fsdp"): "#7c3aed",
    ("ppo", "ddp"): "#d97706",
    ("ppo", "fsdp"): "#dc2626",
    ("grpo", "ddp"): "#059669",
}
FEW = {"batch_size": 4, "micro_batch": 1}
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def config(folder: Path, kind: str) -> dict[str, Any]:
    stage = peers.keel_stage(kind, folder, "cpu")
    stage["updates" if kind in ("ppo", "grpo") else "max_steps"] = STEPS
    return {"name": kind, "threads": 1, "device": "cpu", "stages": {kind: stage}}


def step_seconds(folder: Path, kind: str, ranks: int, strategy: str, name: str) -> float:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**config(folder, kind), "distributed": {"strategy": strategy}}))
    command = [sys.executable, "-m", "keel", "run", str(path), "--runs", str(folder / "runs"), "--name", name]
    command += ["--nproc", str(ranks)] if ranks > 1 else []
    if (folder / "runs" / name).exists():
        raise SystemExit(f"{name} was run already: what it took then is not what it takes now")
    ended = subprocess.run(
        command, env={**os.environ, **ENVIRONMENT}, check=False, capture_output=True, text=True
    )
    if ended.returncode:
        raise SystemExit(ended.stderr)
    log = folder / "runs" / name / "stages" / kind / "times.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return statistics.median(sum(line.get(phase, 0.0) for phase in PHASES) for line in lines[FIRST:])


def bandwidth(ranks: int) -> float:
    """Bytes a second in and out of a rank, in the largest all-reduce of the doctor's."""
    command = [sys.executable, "-m", "keel", "doctor", "--distributed", "--nproc", str(ranks), "--json"]
    told = subprocess.run(
        command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False
    )
    return float(json.loads(told.stdout)["measured"]["reductions"][-1]["bytes_per_second"])


def foreseen(
    folder: Path, kind: str, strategy: str, one: float, rate: float, ranks: Iterable[int]
) -> dict[int, float]:
    """Seconds of a step by the number of ranks, from those of one process."""
    from keel.config import parse
    from keel.pipeline.pipeline import Pipeline
    from keel.plan import planner, rank_memory

    found = {1: one}
    for count in ranks:
        if count > 1:
            whole = Pipeline(parse(config(folder, kind)), folder / "runs" / "foreseen")
            (entry,) = planner.plan(whole, rank_memory.Asked(count))
            way = entry["ranks"]["strategies"][strategy]
            found[count] = one / count + way["sent_a_step"] * way["steps_an_update"] / rate
    return found


@dataclass(frozen=True)
class Speed:
    """What was measured of a kind, and what is foreseen."""

    kind: str
    strategy: str
    measured: dict[int, float]  # seconds of a step by ranks
    foreseen: dict[int, float]


def speed(folder: Path, kind: str, asked: argparse.Namespace) -> Speed:
    """Measure a kind, and print it."""
    before, pairs = os.getloadavg()[0], list[tuple[float, float]]()
    for number in range(asked.pairs):
        one, several = (
            step_seconds(folder, kind, ranks, asked.strategy, f"{kind}-{asked.strategy}-{ranks}-{number}")
            for ranks in (1, asked.ranks)
        )
        pairs.append((one, several))
    one, several = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratios = [a / b for a, b in pairs]
    rate = bandwidth(asked.ranks)
    expected = foreseen(folder, kind, asked.strategy, one, rate, {*DRAWN, asked.ranks})
    print(
        f"{kind} {asked.strategy}: {one:.3f} s a step on 1 process, {several:.3f} s on "
        f"{asked.ranks}: {statistics.median(ratios):.2f} times as fast (pairs: "
        f"{', '.join(f'{ratio:.2f}' for ratio in ratios)}; load {before:.1f} before, "
        f"{os.getloadavg()[0]:.1f} after); foreseen {expected[asked.ranks]:.3f} s at {rate / 1e9:.2f} GB/s",
        flush=True,
    )
    return Speed(kind, asked.strategy, {1: one, asked.ranks: several}, expected)


def picture(found: Sequence[Speed]) -> str:
    """Seconds of a step against ranks, both doubling by the same step: dots are measured, lines foreseen,
    dashed lines what no sending would leave."""
    width, height, left, top, right = 560, 320, 56, 16, 130
    highest = max(max(one.measured.values()) for one in found) * 1.2
    lowest = min(one.measured[1] for one in found) / DRAWN[-1] / 1.2

    def point(ranks: int, seconds: float) -> tuple[float, float]:
        x = left + math.log2(ranks) / math.log2(DRAWN[-1]) * (width - left - right)
        share = math.log2(seconds / lowest) / math.log2(highest / lowest)
        return x, height - 44 - share * (height - 44 - top)

    def line(seconds: dict[int, float], style: str) -> str:
        points = " ".join("{:.1f},{:.1f}".format(*point(n, s)) for n, s in sorted(seconds.items()))
        return f'<polyline points="{points}" fill="none" {style}/>'

    grey = 'font-family="sans-serif" font-size="12" fill="#555"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"'
        ' aria-label="Seconds of a step against ranks">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="{height - 8}" {grey}>ranks; up: seconds of a step</text>',
    ]
    for ranks in DRAWN:
        x = point(ranks, lowest)[0]
        parts.append(f'<text x="{x:.1f}" y="{height - 26}" text-anchor="middle" {grey}>{ranks}</text>')
    for power in range(math.ceil(math.log2(lowest)), math.floor(math.log2(highest)) + 1):
        x, y = point(1, 2.0**power)
        parts.append(f'<text x="{x - 12:.1f}" y="{y + 4:.1f}" text-anchor="end" {grey}>{2.0**power:g}</text>')
        parts.append(f'<path d="M{left} {y:.1f}H{width - right}" stroke="#eee"/>')
    labels = list[float]()  # heights that are taken: below one another where lines end side by side
    for one in sorted(found, key=lambda one: -one.foreseen[DRAWN[-1]]):
        colour = COLOURS.get((one.kind, one.strategy), "#111")
        alone = {n: one.measured[1] / n for n in DRAWN}
        parts.append(line(alone, 'stroke="#999" stroke-dasharray="2 3"'))
        parts.append(line(one.foreseen, f'stroke="{colour}" stroke-width="1.5"'))
        for ranks, seconds in one.measured.items():
            x, y = point(ranks, seconds)
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
        x, y = point(DRAWN[-1], one.foreseen[DRAWN[-1]])
        labels.append(max([y, *(taken + 14 for taken in labels[-1:])]))
        name = f"{one.kind}, {one.strategy}"
        coloured = grey.replace("#555", colour)
        parts.append(f'<text x="{x + 8:.1f}" y="{labels[-1] + 4:.1f}" {coloured}>{name}</text>')
    return "\n".join([*parts, "</svg>\n"])


# ---------------------------------------------------------------- memory


def config_of_few(folder: Path, kind: str, strategy: str) -> dict[str, Any]:
    whole = config(folder, kind)
    more = {"updates": 2, "epochs": 1} if kind in ("ppo", "grpo") else {"max_steps": 2}
    whole["stages"][kind] |= FEW | more | ({"samples_per_prompt": 2} if kind == "grpo" else {})
    return {**whole, "distributed": {"strategy": strategy, "timeout": 300}}


def measure(folder: Path, kind: str, strategy: str, name: str) -> None:
    """In a process that is measured, one rank or alone: import, look, run, look."""
    import torch

    from keel.config import parse
    from keel.distributed import launch, records
    from keel.pipeline import following, pipeline

    torch.set_num_threads(1)
    # what is kept for later is not what a stage needs
    pipeline.keep_freed_memory = following.keep_freed_memory = lambda: False
    modules = ("peft", "keel.report", "transformers.models.llama.modeling_llama", launch.__name__)
    of_torch = ("checkpoint", "fsdp", "tensor")
    for module in (*modules, *(f"torch.distributed.{part}" for part in of_torch)):
        importlib.import_module(module)
    for one in memory.ROWS:
        importlib.import_module(f"keel.{memory.MODULES.get(one, f'stages.{one}')}")
    whole = pipeline.Pipeline(parse(config_of_few(folder, kind, strategy)), folder / "runs" / name)
    phases = memory.by_phase(whole.run)
    (folder / f"{name}-{records.rank()}.json").write_text(json.dumps(phases))


def peaks(folder: Path, kind: str, ranks: int, strategy: str) -> dict[str, int]:
    """Bytes at the peak of each phase, of the rank that has most there."""
    from keel.distributed import launch

    name = f"{kind}-{ranks}-{strategy}"
    command = [sys.executable, __file__, kind, "--measure", name, "--folder", str(folder)]
    command += ["--strategy", strategy]
    environment = {**ENVIRONMENT, **memory.ENVIRONMENT}
    if ranks == 1:
        subprocess.run(command, env={**os.environ, **environment}, check=True, stdout=subprocess.DEVNULL)
    elif (outcome := launch.run(command, ranks, environment)).code:
        raise SystemExit(outcome.line)
    found = [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(ranks)]
    return {phase: max(one.get(phase, 0) for one in found) for phase in found[0]}


def planned(folder: Path, kind: str, ranks: int, strategy: str) -> float:
    """Bytes of the fullest rank by `keel plan --nproc`."""
    from keel.config import parse
    from keel.pipeline.pipeline import Pipeline
    from keel.plan import planner, rank_memory

    whole = Pipeline(parse(config_of_few(folder, kind, strategy)), folder / "runs" / "planned")
    (entry,) = planner.plan(whole, rank_memory.Asked(ranks))
    return entry["ranks"]["strategies"][strategy]["peak"]


def memory_of(folder: Path, kind: str, asked: argparse.Namespace) -> str:
    one, several = (peaks(folder, kind, ranks, asked.strategy) for ranks in (1, asked.ranks))
    least, most = (planned(folder, kind, *how) for how in ((1, "ddp"), (asked.ranks, asked.strategy)))
    peak, of_rank = max(one.values()), max(several.values())
    mib = memory.MIB
    shown = ", ".join(f"{p} {one.get(p, 0) / mib:.0f} / {several.get(p, 0) / mib:.0f}" for p in several)
    return (
        f"{kind} {asked.strategy}: {peak / mib:.0f} MiB on 1 process, {of_rank / mib:.0f} MiB a rank on "
        f"{asked.ranks}: {of_rank / peak:.2f} of it (planned: {least / mib:.0f} and {most / mib:.0f} MiB, "
        f"{most / least:.2f}). By phase: {shown}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", default=["sft"], help="sft, ppo …; of one strategy: sft-fsdp")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--strategy", choices=["ddp", "fsdp"], help="ddp; of --memory fsdp")
    parser.add_argument("--size", choices=list(peers.SIZES), help="small; of --memory middle")
    parser.add_argument("--memory", action="store_true", help="memory in place of time")
    parser.add_argument("--picture", type=Path, help="write seconds against ranks to this SVG file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.memory or asked.measure:
        peers.RESPONSE = peers.ANSWER = RESPONSE
    asked.strategy = asked.strategy or ("fsdp" if asked.memory else "ddp")
    if asked.measure:
        measure(asked.folder, asked.kinds[0], asked.strategy, asked.measure)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        peers.prepare(folder, asked.size or ("middle" if asked.memory else "small"))
        if asked.memory:
            for kind in asked.kinds:
                print(memory_of(folder, kind, asked), flush=True)
            return
        found: list[Speed] = []
        for kind in asked.kinds:
            name, _, strategy = kind.partition("-")
            found.append(speed(folder, name, argparse.Namespace(**{
                **vars(asked), "strategy": strategy or asked.strategy,
            })))  # fmt: skip
    if asked.picture:
        asked.picture.write_text(picture(found))


if __name__ == "__main__":
    main()
