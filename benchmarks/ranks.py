"""Two processes of one thread each against one of one thread: seconds of a training step.

    python benchmarks/ranks.py [KIND …] [--pairs N] [--ranks N] [--strategy ddp|fsdp] [--size small]

The untrained Llama of `peers.py` (7.3 M parameters) and keel's settings beside it: 64 rows a step, 16 at a
time, prompts of 32 tokens and responses of 64 at most; float32 on the CPU. The two sides take turns, each in
processes of its own; of each run the median step counts, the first two left out (they make what is made
once). Printed: medians over the pairs, and the machine's load before and after, since on a machine that
others use the ratio says little.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import peers
import yaml

STEPS, FIRST = 8, 2
PHASES = ("rollout", "forward", "score", "train")  # of a step, one after the other


def config(folder: Path, kind: str) -> dict[str, Any]:
    stage = peers.keel_stage(kind, folder, "cpu")
    stage["updates" if kind in ("ppo", "grpo") else "max_steps"] = STEPS
    return {"name": kind, "threads": 1, "device": "cpu", "stages": {kind: stage}}


def step_seconds(folder: Path, kind: str, ranks: int, strategy: str, name: str) -> float:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**config(folder, kind), "distributed": {"strategy": strategy}}))
    command = [sys.executable, "-m", "keel", "run", str(path), "--runs", str(folder / "runs"), "--name", name]
    command += ["--nproc", str(ranks)] if ranks > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(ended.stderr)
    log = folder / "runs" / name / "stages" / kind / "times.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return statistics.median(sum(line.get(phase, 0.0) for phase in PHASES) for line in lines[FIRST:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", default=["sft"])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--strategy", default="ddp", choices=["ddp", "fsdp"])
    parser.add_argument("--size", default="small", choices=list(peers.SIZES))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        peers.prepare(folder, asked.size)
        for kind in asked.kinds:
            before, pairs = os.getloadavg()[0], list[tuple[float, float]]()
            for number in range(asked.pairs):
                one, several = (
                    step_seconds(folder, kind, ranks, asked.strategy, f"{kind}-{ranks}-{number}")
                    for ranks in (1, asked.ranks)
                )
                pairs.append((one, several))
            one, several = (statistics.median(side) for side in zip(*pairs, strict=True))
            ratios = [a / b for a, b in pairs]
            print(
                f"{kind} {asked.strategy}: {one:.3f} s a step on 1 process, {several:.3f} s on "
                f"{asked.ranks}: {statistics.median(ratios):.2f} times as fast (pairs: "
                f"{', '.join(f'{ratio:.2f}' for ratio in ratios)}; load {before:.1f} before, "
                f"{os.getloadavg()[0]:.1f} after)"
            )


if __name__ == "__main__":
    main()
