"""A reward model on pairs that three people judged, where they agree and where they do not:

    python benchmarks/pandalm.py TESTSET.json MODEL [key=value …]

TESTSET.json is PandaLM's test set (999 pairs, `annotator1` to `annotator3`), MODEL a small language model.
Its instructions are dealt into two halves; a reward model learns from one half's votes and is judged on the
other, and the other way round, so that every pair is judged once by a model that has not seen its
instruction. Settings (`lr=…`) are the reward stage's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from keel.config import parse
from keel.evaluation.measures import wilson
from keel.pipeline.pipeline import Pipeline

PEOPLE = ("annotator1", "annotator2", "annotator3")
GROUPS = ("all pairs", "unanimous", "split")


def main() -> None:
    source, model, *settings = sys.argv[1:]
    folder = Path("runs/pandalm")
    folder.mkdir(parents=True, exist_ok=True)
    write_halves(json.loads(Path(source).read_text(encoding="utf-8")), folder)
    changes = dict(setting.split("=", 1) for setting in settings)
    right: dict[str, list[float]] = {group: [0.0, 0.0] for group in GROUPS}
    for fold, other in (("a", "b"), ("b", "a")):
        tree = {"name": fold, "stages": stages(folder, model, fold, other, changes)}
        Pipeline(parse(tree), folder / fold, print).run()
        result = json.loads((folder / fold / "stages" / "judge" / "result.json").read_text())["reward_model"]
        for group in GROUPS:
            accuracy = result["accuracy"] if group == GROUPS[0] else result["by_margin"].get(group)
            if accuracy:
                right[group][0] += accuracy["mean"] * accuracy["n"]
                right[group][1] += accuracy["n"]
    for group, (hits, n) in right.items():
        share = wilson(hits, n)
        print(f"{group:<10} {share['mean']:.3f} ({share['low']:.3f} to {share['high']:.3f}) of {n:.0f}")


def stages(folder: Path, model: str, fold: str, other: str, changes: dict[str, Any]) -> dict[str, Any]:
    held_out = {"source": str(folder / f"{other}.jsonl")}
    return {
        "reward": {
            "kind": "reward",
            "model": model,
            "data": str(folder / f"{fold}.jsonl"),
            "too_long": "skip",
            "lr": 1e-4,
            "batch_size": 16,
            "epochs": 2,
            "sampling": {"max_new_tokens": 16},
            **{key: yaml.safe_load(value) for key, value in changes.items()},
        },
        "judge": {
            "kind": "evaluate",
            "models": [model],
            "reward": "reward",
            "data": {**held_out, "rows": 8},
            "comparisons": held_out,
            "too_long": "truncate",
            "sampling": {"max_new_tokens": 1},
        },
    }


def write_halves(rows: list[dict[str, Any]], folder: Path) -> None:
    """a.jsonl and b.jsonl, with the pairs of every other instruction each."""
    halves: dict[str, list[str]] = {"a": [], "b": []}
    seen: dict[str, str] = {}
    for row in rows:
        replies = [row[f"response{number}"] for number in (1, 2)]
        if not all(isinstance(reply, str) and reply.strip() for reply in replies) or replies[0] == replies[1]:
            continue  # nothing to compare
        prompt = f"{row['instruction']}\n{row['input']}".strip()
        half = seen.setdefault(prompt, "ab"[len(seen) % 2])
        said = [row[who] for who in PEOPLE]
        chosen, rejected = (1, 2) if said.count(1) >= said.count(2) else (2, 1)
        choice = {0: "tie", chosen: "chosen", rejected: "rejected"}
        pair = {
            "prompt": prompt + "\n",
            "chosen": row[f"response{chosen}"],
            "rejected": row[f"response{rejected}"],
            "votes": [
                {"annotator": who, "choice": choice[vote]} for who, vote in zip(PEOPLE, said, strict=True)
            ],
        }
        halves[half].append(json.dumps(pair))
    for name, lines in halves.items():
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
