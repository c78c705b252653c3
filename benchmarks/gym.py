"""GRPO and its curriculum on tasks of reasoning-gym, from a tiny model that was pretrained on them.

Three tasks, each at an easy, a middle and a hopeless level. The model is pretrained on questions and answers
of the first two and fine-tuned. Then GRPO learns from all nine, once in turn and once with a curriculum by
success rate, with everything else the same. What is measured is the success on held-out questions of the
middle levels: before and after, with 95 % intervals, and how many replies were sampled until the run with the
curriculum has the success that the other one ends with. The ratio's interval is Student's over seeds, of its
logarithm.

    python benchmarks/gym.py [--seeds 0,1,2] [--updates 60] [--runs runs]

What is done already is not run again.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import keel

# task → settings of its levels: easy, middle, hopeless
LEVELS: dict[str, tuple[dict[str, int], dict[str, int], dict[str, int]]] = {
    "spell_backward": (
        {"min_word_len": 3, "max_word_len": 3},
        {"min_word_len": 4, "max_word_len": 5},
        {"min_word_len": 9, "max_word_len": 12},
    ),
    "chain_sum": (
        {"max_terms": 2, "min_digits": 1, "max_digits": 1},
        {"max_terms": 2, "min_digits": 2, "max_digits": 2},
        {"min_terms": 5, "max_terms": 6, "min_digits": 4, "max_digits": 4},
    ),
    "count_bits": ({"max_n": 15}, {"max_n": 500}, {"min_n": 10**8, "max_n": 2 * 10**9}),
}
MODEL = {
    "model_type": "llama", "hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 256, "tie_word_embeddings": True,
    "initializer_range": 0.06,
}  # fmt: skip
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57}  # 0.975 quantile by the number of seeds


def sources(split: str, levels: tuple[int, ...], rows: int) -> list[dict[str, Any]]:
    """Each task at these levels, alike often."""
    return [
        {"source": f"gym:{task}/{split}", "rows": rows, "weight": 1.0, "options": settings[level]}
        for task, settings in LEVELS.items()
        for level in levels
    ]


def config(seed: int, asked: argparse.Namespace) -> dict[str, Any]:
    """The stages of one seed."""
    held_out = sources("test_prompts", (1,), asked.held_out)
    sampling = {"max_new_tokens": 14}
    grpo = {
        "kind": "grpo", "model": "sft", "reward": {"kind": "gym", "partial": False},
        "data": sources("prompts", (0, 1, 2), 600), "eval_data": sources("test_prompts", (1,), 64),
        "eval_every": 5, "updates": asked.updates, "batch_size": 128, "samples_per_prompt": 8,
        "mini_batch": 64, "micro_batch": 64, "lr": asked.lr, "schedule": "constant", "kl": {"coef": 0.0},
        "sampling": sampling, "save_every": 20,
    }  # fmt: skip
    stages = {
        "base": {
            "kind": "pretrain", "data": sources("text", (0, 1), asked.texts), "max_length": 128,
            "model": {"vocab_size": 320, "init": MODEL}, "batch_size": 8, "lr": 3e-3, "weight_decay": 0.1,
            "epochs": asked.epochs, "save_every": 500,
        },
        "sft": {
            "kind": "sft", "model": "base", "data": sources("demonstrations", (0, 1), 60), "lr": 3e-4,
            "batch_size": 16,
        },
        "in_turn": grpo,
        "curriculum": {**grpo, "curriculum": {"by": "task", "threshold": 1.0, "memory": 128}},
        "judge": {
            "kind": "evaluate", "models": ["sft", "in_turn", "curriculum"], "data": held_out,
            "reward": {"kind": "gym", "partial": False}, "sampling": sampling,
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


def shown(measure: Any) -> str:
    """A measure with its interval."""
    return f"{measure['mean']:.3f} ({measure['low']:.3f} to {measure['high']:.3f})"


def main() -> None:
    """Print a line for each seed, and the ratio over all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--texts", type=int, default=3000, help="for each task and level")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--held-out", type=int, default=200, help="questions of each task")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    asked = parser.parse_args()
    ratios: list[float] = []
    print("seed  SFT | in turn | curriculum: success on held-out questions | replies until the same success")
    for seed in map(int, asked.seeds.split(",")):
        run = keel.run(config(seed, asked), runs=asked.runs, progress=False)
        models = run.result("judge")["models"]
        success = [shown(models[name]["proxy"]) for name in ("sft", "in_turn", "curriculum")]
        plain, chosen = curve(run, "in_turn"), curve(run, "curriculum")
        target = plain[-1][1]
        episodes = [reached(points, target) for points in (plain, chosen)]
        print(seed, *success, *episodes, sep=" | ", flush=True)
        if episodes[0] and episodes[1]:
            ratios.append(episodes[1] / episodes[0])
    logs = [math.log(ratio) for ratio in ratios]
    if len(logs) in STUDENT:
        mean = sum(logs) / len(logs)
        error = math.sqrt(sum((x - mean) ** 2 for x in logs) / (len(logs) - 1) / len(logs))
        low, high = (math.exp(mean + side * STUDENT[len(logs)] * error) for side in (-1, 1))
        print(f"replies with / without the curriculum: {math.exp(mean):.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
