"""GRPO and its curriculum on tasks of reasoning-gym, from a tiny model that was pretrained on them.

Three tasks at a level that the model learns, the same at one that is hopeless for it, and two that it has
solved. It is pretrained and fine-tuned on the first and the last. Then GRPO learns from all eight, once in
turn and once with a curriculum by success rate, all else the same. What is measured is the success on
held-out questions of the first three, before and after, and how many replies were sampled until the run with
the curriculum has the success that the other one ends with. Intervals are of 95 %: of a success over
different questions (each asked several times), of the ratio Student's over seeds, of its logarithm.

    python benchmarks/gym.py [--seeds 0,1,2] [--updates 60] [--runs runs]

What is done already is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import keel
from keel.evaluation.measures import mean_interval

LEARNABLE: dict[str, dict[str, int]] = {  # task → settings; what success is measured on
    "letter_counting": {"min_words": 2, "max_words": 4},
    "gcd": {"max_numbers": 2, "min_value": 1, "max_value": 40},
    "count_bits": {"max_n": 500},
}
HOPELESS: dict[str, dict[str, int]] = {
    "spell_backward": {"min_word_len": 9, "max_word_len": 10},
    "chain_sum": {"min_terms": 4, "max_terms": 4, "min_digits": 4, "max_digits": 4},
    "lcm": {"max_numbers": 2, "min_value": 500, "max_value": 999},
}
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
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57}  # 0.975 quantile by the number of seeds


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
        "data": sources("prompts", 600, LEARNABLE, HOPELESS, SOLVED),
        "eval_data": sources("test_prompts", 50, LEARNABLE), "eval_every": 4, "updates": asked.updates,
        "batch_size": 128, "samples_per_prompt": 8, "mini_batch": 64, "micro_batch": 64, "lr": asked.lr,
        "schedule": "constant", "kl": {"coef": 0.0}, "sampling": sampling, "save_every": 20,
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


def curve(run: keel.Run, stage: str) -> list[tuple[float, float]]:
    """(episodes, success on held-out questions), each the mean of three evaluations in a row."""
    frame = run.metrics(stage)
    rows = frame[["episode", "eval/objective/scores"]].dropna().to_numpy().tolist()
    return [(rows[i][0], sum(value for _, value in rows[i - 2 : i + 1]) / 3) for i in range(2, len(rows))]


def reached(points: list[tuple[float, float]], target: float) -> float | None:
    """Episodes until a success is reached."""
    return next((episodes for episodes, value in points if value >= target), None)


def success(run: keel.Run, model: str) -> list[float]:
    """Mean success at each different held-out question."""
    asked: dict[str, list[float]] = {}
    for line in (run.path / "stages" / "judge" / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["model"] == model:
            asked.setdefault(row["prompt"][-1]["content"], []).append(row["proxy"])
    return [sum(values) / len(values) for values in asked.values()]


def shown(values: list[float]) -> str:
    """Their mean with its interval."""
    found = mean_interval(values)
    return f"{found['mean']:.3f} ({found['low']:.3f} to {found['high']:.3f}, n {found['n']})"


def main() -> None:
    """Print a line for each seed, and the ratio over all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--sft-steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--held-out", type=int, default=100, help="questions of each task")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    asked = parser.parse_args()
    ratios: list[float] = []
    pooled: dict[str, list[float]] = {model: [] for model in MODELS}
    print("seed  SFT | in turn | curriculum: success on held-out questions | replies until the same success")
    for seed in map(int, asked.seeds.split(",")):
        run = keel.run(config(seed, asked), runs=asked.runs, progress=False)
        measured = {model: success(run, model) for model in MODELS}
        for model, values in measured.items():
            pooled[model] += values
        plain, chosen = curve(run, "in_turn"), curve(run, "curriculum")
        target = plain[-1][1]
        episodes = [reached(points, target) for points in (plain, chosen)]
        print(seed, *map(shown, measured.values()), *episodes, sep=" | ", flush=True)
        if episodes[0] and episodes[1]:
            ratios.append(episodes[1] / episodes[0])
    print("all", *map(shown, pooled.values()), sep=" | ")
    logs = [math.log(ratio) for ratio in ratios]
    if len(logs) in STUDENT:
        mean = sum(logs) / len(logs)
        error = math.sqrt(sum((x - mean) ** 2 for x in logs) / (len(logs) - 1) / len(logs))
        low, high = (math.exp(mean + side * STUDENT[len(logs)] * error) for side in (-1, 1))
        print(f"replies with / without the curriculum: {math.exp(mean):.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
