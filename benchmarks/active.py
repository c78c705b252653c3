"""Uncertain pairs first, against random order: `python benchmarks/active.py [--folder DIR] [--seeds 0,1,2]`.

On the help desk, whose truth is known. A pool of pairs waits for votes, one vote a pair by one of its
annotators. After 100 votes on pairs drawn at random, and each time the votes have doubled, a small reward model
(an ensemble of three) is trained on all votes so far from the same SFT model; then the next pairs are drawn: at
random, or 80 % of them by what a vote would tell (`keel.feedback.priorities`, mutual information of three
members) and 20 % at random, as `keel label` does it. Accuracy is that of the members' mean on test pairs, by
the gold reward.

Printed are both accuracies by votes, their difference over seeds, and how many votes the uncertain order needed
for the accuracy that the random order ends with. A run that was stopped goes on in the same folder.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keel.config import parse
from keel.evaluation.measures import across_runs
from keel.feedback import priorities
from keel.pipeline.pipeline import Pipeline
from keel.worlds import helpdesk

SIZES = (100, 200, 400, 800)
RANDOM_SHARE = 0.2
MODEL = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 192, "tie_word_embeddings": True,
    "initializer_range": 0.06,
}  # fmt: skip
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/active"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--pool", type=int, default=1600)
    parser.add_argument("--test", type=int, default=400)
    settings = parser.parse_args()
    settings.folder.mkdir(parents=True, exist_ok=True)
    start = sft(settings.folder)
    test = list(helpdesk.rows("test_comparisons", settings.test, 7))
    seeds = [int(seed) for seed in settings.seeds.split(",")]
    curves = {seed: curves_of(settings, start, test, seed) for seed in seeds}
    (settings.folder / "active.json").write_text(json.dumps(curves, indent=1))
    print(as_text(curves))


def sft(folder: Path) -> str:
    """A small model that was pretrained and shown demonstrations, as in recipes/helpdesk.yaml but smaller."""
    base = {
        "kind": "pretrain", "data": {"source": "world:helpdesk/text", "rows": 8000}, "max_length": 128,
        "model": {"vocab_size": 1024, "init": MODEL}, "batch_size": 8, "lr": 3e-3, "weight_decay": 0.01,
    }  # fmt: skip
    tuned = {
        "kind": "sft", "model": "base", "data": {"source": "world:helpdesk/demonstrations", "rows": 100},
        "lr": 3e-4, "batch_size": 16,
    }  # fmt: skip
    run(folder / "start", 0, {"base": base, "sft": tuned})
    return str(folder / "start" / "stages" / "sft" / "model")


def run(folder: Path, seed: int, stages: dict[str, Any]) -> None:
    config = {"name": folder.name, "seed": seed, "threads": 1, "dtype": "float32", "stages": stages}
    pipeline = Pipeline(parse(config), folder, lambda line: None)
    pipeline._report = lambda: None
    pipeline.run()


def curves_of(
    settings: argparse.Namespace, start: str, test: Sequence[Row], seed: int
) -> dict[str, list[float]]:
    """Order → accuracy after each number of votes. Both orders begin with the same votes."""
    pool = [
        voted(row, random.Random(f"{seed} {i}"))
        for i, row in enumerate(helpdesk.rows("comparisons", settings.pool, 100 + seed))
    ]
    found: dict[str, list[float]] = {}
    for arm in ("random", "uncertain"):
        rng = random.Random(seed)
        order = rng.sample(range(len(pool)), len(pool))
        taken, found[arm] = order[: SIZES[0]], []
        for size, following in zip(SIZES, (*SIZES[1:], None)):
            name = f"seed-{seed}-{'both' if size == SIZES[0] else arm}-{size}"
            score = trained(settings.folder / name, seed, start, [pool[i] for i in taken])
            found[arm].append(accuracy(score, test))
            print(f"{name}: {len(taken)} votes, accuracy {found[arm][-1]:.3f}", flush=True)
            if following is not None:
                left = [i for i in order if i not in set(taken)]
                if arm == "uncertain":
                    left = uncertain_first(score, pool, left, following - size, rng)
                taken = [*taken, *left[: following - size]]
    return found


def voted(row: Row, rng: random.Random) -> Row:
    """A pair with one of its votes."""
    vote = rng.choice(row["votes"])
    return {**{name: row[name] for name in ("prompt", "chosen", "rejected")}, "votes": [vote]}


def trained(folder: Path, seed: int, start: str, rows: Sequence[Row]) -> priorities.Scorer:
    """A reward model of three members, trained on these votes."""
    data = folder.with_suffix(".jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {
        "kind": "reward", "model": start, "data": str(data), "members": 3, "lr": 1e-3, "batch_size": 8, "epochs": 2,
        "holdout": 0, "normalize": 0,
    }  # fmt: skip
    run(folder, seed, {"reward": stage})
    return priorities.scorer([str(folder / "stages" / "reward")])


def differences(score: priorities.Scorer, rows: Sequence[Row]) -> Any:
    """(M, N) r_m(chosen) − r_m(rejected)."""
    sides = [
        score([row["prompt"] for row in rows], [row[name] for row in rows]) for name in ("chosen", "rejected")
    ]
    return sides[0] - sides[1]


def uncertain_first(
    score: priorities.Scorer, pool: Sequence[Row], left: Sequence[int], count: int, rng: random.Random
) -> list[int]:
    """`count` of what is left: most by information, the others at random."""
    information = priorities.information(differences(score, [pool[i] for i in left]))
    ranked = [left[k] for k in np.argsort(-information, kind="stable")]
    drawn = rng.sample(list(left), round(RANDOM_SHARE * count))
    return [*drawn, *(i for i in ranked if i not in set(drawn))]


def accuracy(score: priorities.Scorer, test: Sequence[Row]) -> float:
    """Share of test pairs whose better reply, by the gold reward, the mean of the members prefers."""
    gold = np.array([gold_difference(row) for row in test])
    found = differences(score, test).mean(axis=0)
    decided = gold != 0
    return float((np.sign(found) == np.sign(gold))[decided].mean())


def gold_difference(row: Row) -> float:
    sides = [
        helpdesk.gold(row["prompt"][-1]["content"], row[s][0]["content"], {}) for s in ("chosen", "rejected")
    ]
    return sides[0]["total"] - sides[1]["total"]


# ---------------------------------------------------------------- what came out


def votes_needed(curve: Sequence[float], target: float) -> float | None:
    """Votes at which a curve reaches an accuracy, linear in the logarithm of the votes; None where it never
    does."""
    best = np.maximum.accumulate(curve)
    if best[0] >= target:
        return float(SIZES[0])
    for k in range(1, len(SIZES)):
        if best[k] >= target:
            share = (target - best[k - 1]) / (best[k] - best[k - 1])
            return math.exp(math.log(SIZES[k - 1]) + share * math.log(SIZES[k] / SIZES[k - 1]))
    return None


def as_text(curves: dict[int, dict[str, list[float]]]) -> str:
    lines = [f"{'votes':>6}  {'random':>7}  {'uncertain':>9}  difference (95 % over {len(curves)} seeds)"]
    for k, size in enumerate(SIZES):
        arms = {arm: [curve[arm][k] for curve in curves.values()] for arm in ("random", "uncertain")}
        apart = [u - r for r, u in zip(arms["random"], arms["uncertain"], strict=True)]
        lines.append(
            f"{size:>6}  {np.mean(arms['random']):>7.3f}  {np.mean(arms['uncertain']):>9.3f}  {interval(apart)}"
        )
    needed = [votes_needed(curve["uncertain"], max(curve["random"])) for curve in curves.values()]
    own = [votes_needed(curve["random"], max(curve["random"])) for curve in curves.values()]
    lines.append("votes of the uncertain order for the best accuracy of the random one, against its own:")
    lines += [
        f"  seed {seed}: {'more than ' + str(SIZES[-1]) if u is None else round(u)} against {round(r or 0)}"
        for seed, u, r in zip(curves, needed, own, strict=True)
    ]
    if None not in needed and len(curves) > 1:
        ratio = [math.log((u or 1) / (r or 1)) for u, r in zip(needed, own, strict=True)]
        found = across_runs(ratio)
        bounds = [math.exp(found[name]) for name in ("mean", "low", "high")]
        lines.append(f"  ratio {bounds[0]:.2f} ({bounds[1]:.2f} to {bounds[2]:.2f})")
    return "\n".join(lines)


def interval(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:+.3f}"
    found = across_runs(values)
    return f"{found['mean']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"


if __name__ == "__main__":
    main()
