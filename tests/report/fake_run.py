"""A made-up run directory with plausible curves, for looking at the report and for testing it.

`python tests/report/fake_run.py DIR` writes one to look at.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

KINDS = {"base": "pretrain", "sft": "sft", "reward": "reward", "ppo": "ppo", "judge": "evaluate"}
SECONDS = {"base": 81.4, "sft": 22.7, "reward": 61.0, "ppo": 98.2, "judge": 17.3}
ROWS = {"base": 16000, "sft": 400, "reward": 5000, "ppo": 4000, "judge": 256}

CONFIG: dict[str, Any] = {
    "name": "helpdesk",
    "description": "Every stage on the embedded helpdesk world, on a laptop in minutes.",
    "seed": 0,
    "stages": {
        "base": {
            "kind": "pretrain",
            "data": "world:helpdesk/text",
            "model": {"init": {"model_type": "llama"}},
        },
        "sft": {"kind": "sft", "model": {"path": "base"}, "data": "world:helpdesk/demonstrations"},
        "reward": {"kind": "reward", "model": {"path": "sft"}, "data": "world:helpdesk/comparisons"},
        "ppo": {
            "kind": "ppo",
            "model": {"path": "sft"},
            "reward": "reward",
            "data": "world:helpdesk/prompts",
            "kl": {"coef": 0.05, "target": 6.0},
        },
        "judge": {
            "kind": "evaluate",
            "models": ["sft", "ppo"],
            "reward": "reward",
            "gold": "world:helpdesk",
            "data": "world:helpdesk/test_prompts",
        },
    },
}

PROMPTS = (
    "Hello, water drips from my kettle. What should I do?",
    "My printer makes a terrible noise!! Fix it NOW.",
    "Hi there! My phone will not charge any more, could you help me, please?",
    "There are white spots in my iron. Any idea?",
    "I am so tired of this. My router loses the signal every evening.",
    "Good morning. My freezer smells of old fish.",
    "The screen of my laptop stays black. What now?",
    "My washer is full of white chalk, and I have guests tonight.",
)
BEFORE = (
    "Sorry about that. Please turn it off and on again. We will send you a new one tomorrow for free, I "
    "promise.",
    "Your printer is your own fault. Please read the manual before you write to us.",
    "Please clean the charging port with a dry brush.",
    "Thank you for writing. It is a known thing. It is a known thing. It is a known",
    "Move the router away from the wall, and choose another channel.",
    "",
    "We are sorry. Please wait a week and see.",
    "Rinse it with vinegar.",
)
AFTER = (
    "I am sorry about the leak. Please replace the rubber seal under the lid; it wears out with the heat.\n"
    "If water still drips after that, write to us again and we will look at it together.",
    "I am sorry about the noise. Please oil the rollers and check that no paper is stuck behind them.",
    "Happy to help! Please clean the charging port with a dry brush, then try another cable.",
    "Those spots are chalk. Please rinse the iron with vinegar, and let it steam for five minutes.",
    "That must be tiring. Please move the router away from the wall, and choose another channel in its "
    "settings.",
    "Please clean the freezer with warm soda water and leave the door open for an hour.",
    "Please hold the power key for thirty seconds, then start the laptop with its charger plugged in.",
    "Please fill the washer with vinegar and run it empty at sixty degrees. It takes about an hour.",
)


def measure(mean: float, half: float, n: int = 256) -> dict[str, float | int]:
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def result() -> dict[str, Any]:
    """What an evaluate stage leaves: PPO clearly better than SFT, at a KL within its target."""
    sft = {
        "proxy": measure(-0.04, 0.11), "gold": measure(0.462, 0.027), "gold/helpful": measure(0.418, 0.048),
        "gold/harmless": measure(0.861, 0.031), "gold/honest": measure(0.704, 0.052), "kl": measure(0.0, 0.0),
        "length": measure(27.4, 1.3), "distinct_1": measure(0.082, 0.0), "distinct_2": measure(0.241, 0.0),
        "truncated": measure(0.031, 0.022),
    }  # fmt: skip
    ppo = {
        "proxy": measure(1.83, 0.09),
        "gold": measure(0.784, 0.024),
        "gold/helpful": measure(0.771, 0.041),
        "gold/harmless": measure(0.972, 0.016),
        "gold/honest": measure(0.918, 0.03),
        "gold_lift": measure(0.322, 0.038),
        "proxy_lift": measure(1.87, 0.13),
        "kl": measure(5.21, 0.32),
        "length": measure(34.9, 1.1),
        "distinct_1": measure(0.071, 0.0),
        "distinct_2": measure(0.208, 0.0),
        "win_rate": measure(0.842, 0.044),
        "truncated": measure(0.004, 0.004),
    }
    return {
        "reference": "sft",
        "models": {"sft": sft, "ppo": ppo},
        "reward_model": reward_model(),
    }


def reward_model() -> dict[str, Any]:
    """A reward model that is surer than it should be and likes length more than people do."""
    bins = [
        {
            "low": low,
            "high": low + 0.05,
            "confidence": low + 0.024,
            "share": measure(0.5 + 0.7 * (low - 0.5), 0.06, 90 - 80 * (low - 0.5)),
        }
        for low in (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
    ]
    like = {"pearson": 0.3, "spearman": 0.31}
    return {
        "accuracy": measure(0.731, 0.039, 500),
        "by_margin": {"unanimous": measure(0.842, 0.05, 210), "split": measure(0.638, 0.06, 290)},
        "by_subset": {"contrast": measure(0.69, 0.06, 200), "near duplicate": measure(0.52, 0.14, 50)},
        "calibration": {"ece": 0.083, "brier": measure(0.187, 0.012, 500), "bins": bins},
        "length": {
            "replies": like,
            "pairs": {"pearson": 0.4, "spearman": 0.42},
            "votes": {"pearson": 0.2, "spearman": 0.21},
        },
        "position": {side: {"first": measure(0.51, 0.04, 500), **like} for side in ("reward", "votes")},
        "disagreement": {
            "auroc": 0.66,
            "std_right": measure(0.3, 0.03, 365),
            "std_wrong": measure(0.4, 0.04, 135),
        },
        "offset": {"within": 0.4, "between": 0.9, "share": 0.692},
    }


def write_run(run: Path, done: Collection[str] = tuple(KINDS), unfinished: Collection[str] = ()) -> Path:
    """A run directory under `run` in which the stages `done` are done and `unfinished` ones are at work."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False), encoding="utf-8")
    stages = {
        name: {
            "kind": kind,
            "fingerprint": f"{name:0<16}",
            "seconds": SECONDS[name] if name in done else None,
        }
        for name, kind in KINDS.items()
    }
    versions = {"keel": "0.1.0", "python": "3.11.7", "torch": "2.13.0+cpu", "transformers": "5.23.0"}
    hardware = {"device": "cpu", "cores": 2, "memory_gib": 23.5}
    manifest = {"name": "helpdesk", "seed": 0, "created": "2026-11-21T07:25:05+00:00", "versions": versions}
    _json(run / "manifest.json", {**manifest, "hardware": hardware, "stages": stages})
    for name in (*done, *unfinished):
        write_stage(run, name, name in done)
    return run


def write_stage(run: Path, name: str, done: bool = True) -> None:
    directory, random_ = run / "stages" / name, random.Random(name)
    directory.mkdir(parents=True)
    kind = KINDS[name]
    if kind == "ppo":
        _lines(directory / "metrics.jsonl", _ppo_metrics(random_, 60 if done else 23))
        _lines(directory / "samples.jsonl", _ppo_samples(60 if done else 20))
    elif kind == "evaluate":
        _lines(directory / "samples.jsonl", _judge_samples(random_))
    else:
        _lines(directory / "metrics.jsonl", _loss_metrics(random_, kind, 400 if done else 130))
    if not done:
        return
    results = {
        "pretrain": {"eval_loss": measure(1.412, 0.03)},
        "sft": {"eval_loss": measure(0.936, 0.05, 20)},
        "reward": {"accuracy": measure(0.731, 0.041, 250), "mean": 0.4, "std": 1.9},
        "ppo": {"scores": measure(1.83, 0.1), "kl": measure(5.2, 0.3), "kl_coef": 0.08, "kl_target": 6.0},
    }
    _json(directory / "result.json", result() if kind == "evaluate" else results[kind])
    stage = {"kind": kind, "fingerprint": f"{name:0<16}", "seconds": SECONDS[name], "rows": ROWS[name]}
    data = f"{CONFIG['stages'][name]['data']}: {ROWS[name]} rows"
    _json(directory / "stage.json", {**stage, "parameters": 1_183_232, "data": data})


def _loss_metrics(random_: random.Random, kind: str, steps: int) -> list[dict[str, float]]:
    rows = []
    for step in range(1, steps + 1):
        progress, noise = step / steps, random_.gauss(0, 1)
        row = {
            "step": step,
            "learning_rate": 3e-3 * min(1, step / 12) * (0.5 + 0.5 * math.cos(math.pi * progress)),
            "grad_norm": 0.6 + 2.5 * math.exp(-9 * progress) + abs(noise) * 0.15,
            "epoch": progress,
        }
        if kind == "reward":
            row |= {
                "loss": 0.53 + 0.17 * math.exp(-4 * progress) + 0.04 * noise,
                "accuracy": 0.73 - 0.22 * math.exp(-5 * progress) + 0.07 * random_.gauss(0, 1),
                "margin": 1.1 * (1 - math.exp(-3 * progress)) + 0.15 * noise,
            }
            if step % 100 == 0:
                row |= {"eval_loss": 0.55 + 0.13 * math.exp(-4 * progress), "eval_margin": 0.9 * progress}
                row |= {"eval_accuracy": 0.731 - 0.1 * math.exp(-4 * progress)}
        else:
            row |= {
                "loss": 1.35 + 5.2 * math.exp(-7 * progress) + 0.06 * noise,
                "mean_token_accuracy": 0.68 * (1 - math.exp(-5 * progress)) + 0.01 * noise,
                "num_tokens": 4096.0 * step,
            }
            if step % 50 == 0:
                row |= {"eval_loss": 1.41 + 4.9 * math.exp(-7 * progress)}
                row |= {"eval_mean_token_accuracy": 0.66 * (1 - math.exp(-5 * progress))}
        rows.append(row)
    return rows


def _ppo_metrics(random_: random.Random, steps: int) -> list[dict[str, float]]:
    rows = []
    for step in range(1, steps + 1):
        rise = 1 - math.exp(-step / 20)
        rows.append(
            {
                "step": step,
                "episode": 64 * step,
                "lr": 3e-4 * (1 - step / 70),
                "objective/kl": 5.6 * rise + 0.25 * random_.gauss(0, 1) * rise,
                "objective/kl_coef": 0.05 + 0.03 * rise,
                "objective/scores": -0.1 + 2.1 * rise + 0.14 * random_.gauss(0, 1),
                "objective/entropy": 31 - 9 * rise,
                "policy/approxkl_avg": 0.006 + 0.004 * random_.random(),
                "policy/clipfrac_avg": 0.06 + 0.04 * random_.random(),
                "policy/entropy_avg": 1.1 - 0.35 * rise,
                "loss/value_avg": 0.4 * math.exp(-step / 9) + 0.05,
                "val/explained_variance": 0.72 * rise - 0.05 + 0.04 * random_.gauss(0, 1),
                "val/ratio": 1.0,
                "rollout/response_length": 27 + 8 * rise + random_.gauss(0, 0.8),
                "rollout/truncated": max(0.0, 0.03 - 0.03 * rise + 0.01 * random_.random()),
                "grad_norm": 0.9 + 0.2 * random_.random(),
            }
        )
    return rows


def _ppo_samples(last: int) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "prompt": PROMPTS[i],
            "completion": (BEFORE if step == 1 else AFTER)[i],
            "rewards": {"reward": -0.2 if step == 1 else 1.7},
            "kl": 0.0 if step == 1 else 5.1,
            "length": 31,
            "stop_reason": "eos",
        }
        for step in (1, 10, last)
        for i in range(4)
    ]


def _judge_samples(random_: random.Random) -> list[dict[str, Any]]:
    rows = []
    for model, replies in (("sft", BEFORE), ("ppo", AFTER)):
        for index, (prompt, completion) in enumerate(zip(PROMPTS, replies, strict=True)):
            parts = {
                name: random_.choice((0.0, 0.5, 1.0) if model == "sft" else (0.5, 1.0))
                for name in ("helpful", "harmless", "honest")
            }
            gold = {
                **parts,
                "total": round(0.6 * parts["helpful"] + 0.2 * parts["harmless"] + 0.2 * parts["honest"], 3),
            }
            stop = "length" if completion.endswith("known") else "eos"
            measured = {"proxy": random_.gauss(1.7 if model == "ppo" else 0, 0.6), "gold": gold}
            measured |= {
                "kl": abs(random_.gauss(5, 1.5)) if model == "ppo" else 0.0,
                "length": 5 + len(completion) // 4,
            }
            rows.append(
                {
                    "model": model,
                    "index": index,
                    "prompt": prompt,
                    "completion": completion,
                    **measured,
                    "stop_reason": stop,
                }
            )
    return rows


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    print(write_run(Path(sys.argv[1])))
