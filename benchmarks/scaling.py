"""Cost grows linearly: `python benchmarks/scaling.py [--threads N] [--repeats N] [--picture FILE.svg]`.

Seconds of a PPO update (rollout, scores, training; 2 epochs, trunk) on an untrained Llama of 7.3 M parameters
while one of three sizes is doubled twice: episodes a batch, tokens a response (no response ends early),
samples a prompt with the prompts of a batch fixed. The sizes take turns in one run, and each number is the
median over the rounds. What is looked for: no doubling takes more than 2.1 times as long.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import peers
import torch

from keel.config import parse
from keel.pipeline.pipeline import Pipeline

BASE = {"batch": 32, "length": 32, "samples": 4}
PROMPTS = 8  # of a batch, while the samples of each are doubled
UPDATES = 3  # of which the first is the warm-up


def seconds(folder: Path, *, batch: int, length: int, samples: int) -> float:
    """Of one update, the mean of those after the first."""
    stage: dict[str, Any] = {
        "kind": "ppo",
        "model": str(folder / "plain"),
        "reward": str(folder / "scorer"),
        "sharing": "trunk",
        "lr": 1e-6,
        "data": {"source": str(folder / "rows.jsonl"), "columns": {"prompt": "prompt"}},
        "updates": UPDATES,
        "epochs": 2,
        "batch_size": batch,
        "micro_batch": 16,
        "samples_per_prompt": samples,
        "sampling": {"max_new_tokens": length},
        "save_every": 1000,
    }
    ends: list[float] = []
    config = {
        "name": "scaling",
        "threads": torch.get_num_threads(),
        "device": "cpu",
        "stages": {"ppo": stage},
    }
    with tempfile.TemporaryDirectory() as temporary:
        Pipeline(
            parse(config),
            Path(temporary),
            say=lambda line: None,
            progress=lambda *step: ends.append(time.perf_counter()),
        ).run()
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def sizes(what: str, factor: int) -> dict[str, int]:
    size = dict(BASE)
    if what == "samples":
        size["samples"] *= factor
        size["batch"] = PROMPTS * size["samples"]
    else:
        size[what] *= factor
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--picture", type=Path, help="write the curves to this SVG file")
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    measurements: dict[str, dict[int, list[float]]] = {what: {1: [], 2: [], 4: []} for what in BASE}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        peers.prepare(folder)
        for _ in range(settings.repeats):
            for what, factors in measurements.items():
                for factor, times in factors.items():
                    times.append(seconds(folder, **sizes(what, factor)))
    medians = {
        what: {f: statistics.median(times) for f, times in factors.items()}
        for what, factors in measurements.items()
    }
    print(f"{'doubled':<9}{'× 1, s':>8}{'× 2, s':>8}{'× 4, s':>8}   ratios")
    for what, at in medians.items():
        print(f"{what:<9}{at[1]:>8.2f}{at[2]:>8.2f}{at[4]:>8.2f}   {at[2] / at[1]:.2f}, {at[4] / at[2]:.2f}")
    if settings.picture:
        settings.picture.write_text(picture(medians))


def picture(medians: dict[str, dict[int, float]]) -> str:
    """Seconds against size, both as multiples of the smallest, on straight axes; the dashed line is exactly
    linear."""
    width, height, left, top, colours = 520, 300, 48, 16, ("#2563eb", "#d97706", "#059669")
    highest = max(4.2, max(at[4] / at[1] for at in medians.values()) * 1.05)

    def point(size: float, cost: float) -> str:
        x = left + (size - 1) / 3.2 * (width - left - 150)
        y = height - 40 - (cost - 0) / highest * (height - 40 - top)
        return f"{x:.1f},{y:.1f}"

    style = 'font-family="sans-serif" font-size="12" fill="#555"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"'
        ' aria-label="Cost against size">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<polyline points="{point(1, 1)} {point(4, 4)}" fill="none" stroke="#999" stroke-dasharray="4 4"/>',
    ]
    for size in (1, 2, 4):
        x, y = point(size, 0).split(",")
        parts.append(f'<text x="{x}" y="{float(y) + 18:.1f}" text-anchor="middle" {style}>× {size}</text>')
        x, y = point(1, size).split(",")
        parts.append(
            f'<text x="{left - 10}" y="{float(y) + 4:.1f}" text-anchor="end" {style}>× {size}</text>'
        )
    parts.append(f'<text x="{left}" y="{height - 6}" {style}>size; up: seconds of an update</text>')
    for row, (what, at) in enumerate(medians.items()):
        points = " ".join(point(size, cost / at[1]) for size, cost in at.items())
        colour, y = colours[row], top + 20 + 20 * row
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [
            f'<circle cx="{p.split(",")[0]}" cy="{p.split(",")[1]}" r="3" fill="{colour}"/>'
            for p in points.split()
        ]
        parts.append(
            f'<text x="{width - 140}" y="{y}" {style}><tspan fill="{colour}">●</tspan> {what}</text>'
        )
    parts.append(
        f'<text x="{width - 140}" y="{top + 80}" {style}>╌ exactly linear</text></svg>\n',
    )
    return "\n".join(parts)


if __name__ == "__main__":
    main()
