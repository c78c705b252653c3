"""GRPO and its curriculum on tasks of reasoning-gym, from a tiny model that was pretrained on them.

Three tasks at a level that the model learns, six that are hopeless for it, and two that it has solved. It is
pretrained and fine-tuned on the first and the last. Then GRPO learns from all eleven, once in turn and once
with a curriculum by success rate, all else the same: four prompts an update, eight replies to each. What is
measured is the success on held-out questions of the first three, before and after, and how many replies were
sampled until it has risen by three quarters of what it rises by in turn.

A success at one moment is of 300 replies, and its standard error a quarter of all that is gained. So a curve
is the rising one that is nearest to all evaluations (isotonic regression), and where it reaches the target is
read between two of them, not before the first. The target: the success after SFT and ¾ of the way from there
to the mean of the last five evaluations in turn. A run that does not get there counts as if it got there at
its end, which makes it look better than it is, and is named.

Intervals are of 95 %: of a success over different questions (each asked several times), of the ratio
Student's over seeds, of its logarithm.

    python benchmarks/gym.py [--seeds 0,1,2,3,4] [--updates 160] [--runs runs]

What is done already is not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any

import keel
from keel.evaluation.measures import across_runs, mean_interval

LEARNABLE: dict[str, dict[str, int]] = {  # task → settings; what success is measured on
    "letter_counting": {"min_words": 2, "max_words": 4},
    "gcd": {"max_numbers": 2, "min_value": 1, "max_value": 40},
    "count_bits": {"max_n": 500},
}
HOPELESS: list[dict[str, dict[str, int]]] = [
    {
        "spell_backward": {"min_word_len": 9, "max_word_len": 10},
        "chain_sum": {"min_terms": 4, "max_terms": 4, "min_digits": 4, "max_digits": 4},
        "lcm": {"max_numbers": 2, "min_value": 500, "max_value": 999},
    },
    {
        "spell_backward": {"min_word_len": 7, "max_word_len": 8},
        "chain_sum": {"min_terms": 3, "max_terms": 3, "min_digits": 5, "max_digits": 5},
        "lcm": {"max_numbers": 2, "min_value": 1000, "max_value": 9999},
    },
]
SOLVED: dict[str, dict[str, int]] = {
    "count_bits": {"min_n": 1, "max_n": 6},
    "gcd": {"max_numbers": 2, "min_value": 1, "max_value": 2},
}
MODEL = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 256, "tie_word_embeddings": True,
    "initializer_range": 0.06,
}  # fmt: skip
MODELS = ("sft", "in_turn", "curriculum")
EVERY, LAST = 4, 5  # updates between evaluations; evaluations that the end of a run is the mean of
WAY = 0.75  # of the rise in turn, which both runs have to make


def sources(split: str, rows: int, *levels: dict[str, dict[str, int]]) -> list[dict[str, Any]]:
    """The tasks of these levels, alike often."""
    return [
        {"source": f"gym:{task}/{split}", "rows": rows, "weight": 1.0, "options": settings}
        for level in levels
        for task, settings in level.items()
    ]


def config(seed: int, asked: argparse.Namespace) -> dict[str, Any]:
    """The stages of one seed."""
    sampling = {"max_new_tokens": 12}
    known = (LEARNABLE, SOLVED)
    grpo = {
        "kind": "grpo", "model": "sft", "reward": {"kind": "gym", "partial": False},
        "data": sources("prompts", 600, LEARNABLE, *HOPELESS, SOLVED), "updates": asked.updates,
        "eval_data": sources("test_prompts", asked.held_out, LEARNABLE), "eval_every": EVERY,
        "batch_size": 32, "samples_per_prompt": 8, "mini_batch": 32, "micro_batch": 32, "lr": asked.lr,
        "schedule": "constant", "kl": {"coef": 0.0}, "sampling": sampling, "save_every": 80,
    }  # fmt: skip
    stages = {
        "base": {
            "kind": "pretrain", "data": sources("text", 300, *known), "max_length": 192, "batch_size": 8,
            "model": {"vocab_size": 260, "init": MODEL}, "lr": 3e-3, "weight_decay": 0.1, "save_every": 500,
        },
        "sft": {
            "kind": "sft", "model": "base", "data": sources("demonstrations", 4000, *known), "lr": 2e-3,
            "batch_size": 32, "max_steps": asked.sft_steps, "save_every": 500,
        },
        "in_turn": grpo,
        "curriculum": {**grpo, "curriculum": {"by": "task", "threshold": 1.0, "memory": 128}},
        "judge": {
            "kind": "evaluate", "models": list(MODELS), "sampling": sampling,
            "data": sources("test_prompts", asked.held_out, LEARNABLE),
            "reward": {"kind": "gym", "partial": False},
        },
    }  # fmt: skip
    return {
        "name": f"gym-{seed}", "seed": seed, "dtype": "float32", "threads": 1, "device": "cpu",
        "stages": stages,
    }  # fmt: skip


def curve(run: keel.Run, stage: str) -> tuple[list[float], list[float]]:
    """(replies, success on held-out questions) of each evaluation."""
    rows = run.metrics(stage)[["episode", "eval/objective/scores"]].dropna()
    return rows["episode"].tolist(), rows["eval/objective/scores"].tolist()


def rising(values: list[float]) -> list[float]:
    """The values that never fall and are nearest to these by their squares: what falls is pooled."""
    pools: list[tuple[float, int]] = []  # (sum, count)
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] >= pools[-1][0] / pools[-1][1]:
            last, before = pools.pop(), pools.pop()
            pools.append((before[0] + last[0], before[1] + last[1]))
    return [total / count for total, count in pools for _ in range(count)]


def reached(replies: list[float], success: list[float], start: float, target: float) -> float | None:
    """Replies until a success is reached, the first evaluation's at least; start: the success of no replies.
    None where it is not."""
    points = list(zip([0.0, *replies], rising([start, *success]), strict=True))
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y1 >= target:
            between = x0 + (x1 - x0) * max(0.0, target - y0) / (y1 - y0) if y1 > y0 else x0
            return max(between, replies[0])
    return None


def success(run: keel.Run, model: str) -> dict[str, list[float]]:
    """Held-out question → the success of each time that it was asked."""
    asked: dict[str, list[float]] = {}
    for line in (run.path / "stages" / "judge" / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["model"] == model:
            asked.setdefault(row["prompt"][-1]["content"], []).append(row["proxy"])
    return asked


def shown(values: list[float]) -> str:
    """Their mean with its interval."""
    found = mean_interval(values)
    return f"{found['mean']:.3f} ({found['low']:.3f} to {found['high']:.3f}, n {found['n']})"


def saving(run: keel.Run, before: float) -> tuple[list[float], str]:
    """(replies in turn and with the curriculum until the target, a note). before: the success after SFT."""
    curves = [curve(run, stage) for stage in ("in_turn", "curriculum")]
    end = statistics.fmean(curves[0][1][-LAST:])
    target = before + WAY * (end - before)
    found = [reached(*points, before, target) for points in curves]
    ends = [replies[-1] for replies, _ in curves]
    late = " not reached" if None in found else ""
    note = f"target {target:.3f}{late}" + (" no rise in turn" if end <= before else "")
    return [value if value is not None else last for value, last in zip(found, ends, strict=True)], note


def main() -> None:
    """Print a line for each seed, and the ratio over all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--updates", type=int, default=160)
    parser.add_argument("--sft-steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--held-out", type=int, default=100, help="questions of each task")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    asked = parser.parse_args()
    logs: list[float] = []
    pooled: dict[str, list[float]] = {model: [] for model in MODELS}
    print("seed | success on held-out questions: SFT | in turn | curriculum | replies until the same success")
    for seed in map(int, asked.seeds.split(",")):
        run = keel.run(config(seed, asked), runs=asked.runs, progress=False)
        asked_of = {model: success(run, model) for model in MODELS}
        measured = {model: [*map(statistics.fmean, found.values())] for model, found in asked_of.items()}
        for model, values in measured.items():
            pooled[model] += values
        replies, note = saving(run, statistics.fmean(itertools.chain(*asked_of["sft"].values())))
        logs.append(math.log(replies[1] / replies[0]))
        print(
            seed, *map(shown, measured.values()), *(f"{n:,.0f}" for n in replies), note, sep=" | ", flush=True
        )
    print("all", *map(shown, pooled.values()), sep=" | ")
    if len(logs) > 1:
        found = across_runs(logs)
        mean, low, high = (math.exp(found[name]) for name in ("mean", "low", "high"))
        print(f"replies with / without the curriculum: {mean:.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
