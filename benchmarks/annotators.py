"""Whose votes to believe: `python benchmarks/annotators.py [--rows N] [--train] [--set stages.reward.lr=3e-4
…]`.

On the help desk, where the truth is known: how well the labels of `labels: soft | majority | reliability`
agree with the gold reward, and how well the estimated reliability of the annotators agrees with how often
they really name the better reply. With --train, also the gold accuracy of a reward model trained with each
(the stages base, sft and reward of a recipe, by default recipes/helpdesk.yaml; minutes to an hour).
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from keel.config import read
from keel.data.records import parse
from keel.evaluation.annotators import agreement
from keel.evaluation.measures import points_share
from keel.evaluation.reliability import labels, of_annotators
from keel.pipeline.pipeline import Pipeline
from keel.rewards import learned
from keel.types import PreferenceRecord
from keel.worlds import helpdesk

KINDS: tuple[Literal["soft", "majority", "reliability"], ...] = ("soft", "majority", "reliability")
RECIPE = Path(__file__).parents[1] / "recipes" / "helpdesk.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4000, help="comparisons")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", action="store_true", help="train a reward model with each kind of label")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the recipe, dotted.key=value")
    settings = parser.parse_args()
    pairs = of_world("comparisons", settings.rows, settings.seed)
    people(pairs)
    print(
        f"\n{'labels':<12}  {'right side':<20}  {'Brier':>6}  {'log loss':>8}"
        + ("  reward model" if settings.train else "")
    )
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            model = f"  {trained(settings, kind, Path(folder) / 'run')}" if settings.train else ""
            print(f"{kind:<12}  {quality(pairs, kind)}{model}", flush=True)


def of_world(split: str, rows: int, seed: int) -> list[PreferenceRecord]:
    records = [
        parse(row, "preference", f"{split}:{i}") for i, row in enumerate(helpdesk.rows(split, rows, seed))
    ]
    return [record for record in records if isinstance(record, PreferenceRecord)]


def gold_difference(record: PreferenceRecord) -> float:
    """The gold total of the chosen reply minus that of the rejected one."""
    asked: Any = record.prompt[-1]
    sides: Sequence[Any] = (record.chosen, record.rejected)
    chosen, rejected = (helpdesk.gold(asked["content"], side[0]["content"], {})["total"] for side in sides)
    return chosen - rejected


def people(pairs: Sequence[PreferenceRecord]) -> None:
    """Print how they agree, and each one's reliability: as drawn, as it turned out, as estimated without the
    truth."""
    agreed, reliability = agreement(pairs), of_annotators(pairs)
    if agreed is None or reliability is None:
        raise SystemExit("too few rows: no pair has two votes")
    alpha = agreed["alpha"]
    print(
        f"{agreed['votes']} votes on {agreed['pairs']} pairs:"
        f" alpha {alpha['nominal']:.3f} nominal, {alpha['ordinal']:.3f} ordinal,"
    )
    print(
        f"Fleiss {agreed['fleiss']:.3f}, mean Cohen {agreed['cohen']:.3f},"
        f" unanimous {agreed['unanimous']['mean']:.3f}\n"
    )
    points: dict[str, list[float]] = {name: [] for name in reliability}
    for record in pairs:
        if difference := gold_difference(record):
            better = "chosen" if difference > 0 else "rejected"
            for vote in record.votes:
                points[vote.annotator].append(0.5 if vote.choice == "tie" else float(vote.choice == better))
    names = sorted(reliability, key=lambda name: int(name[1:]))
    drawn = [helpdesk.RELIABILITIES[int(name[1:]) - 1] for name in names]
    true = [float(np.mean(points[name])) for name in names]
    estimated = [reliability[name]["dawid_skene"] for name in names]
    print(f"{'annotator':<10} {'drawn':>6} {'names the better':>17} {'estimated':>10}")
    for name, *row in zip(names, drawn, true, estimated):
        print(f"{name:<10} {row[0]:>6.2f} {row[1]:>17.3f} {row[2]:>10.3f}")
    r = np.corrcoef([drawn, true, estimated])
    print(f"correlation of the estimate with what was drawn {r[0, 2]:.3f}, with what they do {r[1, 2]:.3f}")


def quality(pairs: Sequence[PreferenceRecord], kind: Literal["soft", "majority", "reliability"]) -> str:
    """How far the labels are from the truth, over the pairs where one side is better."""
    rows = [
        (p, d > 0) for p, r in zip(labels(pairs, kind), pairs) if p is not None and (d := gold_difference(r))
    ]
    right = points_share([0.5 if p == 0.5 else float((p > 0.5) == better) for p, better in rows])
    brier = sum((p - better) ** 2 for p, better in rows) / len(rows)
    loss = -sum(math.log(max(p if better else 1 - p, 1e-3)) for p, better in rows) / len(rows)
    return f"{right['mean']:.3f} ({right['low']:.3f}–{right['high']:.3f})  {brier:>6.4f}  {loss:>8.3f}"


def trained(settings: argparse.Namespace, kind: str, folder: Path) -> str:
    """Share of test pairs that a reward model trained on these labels ranks as the gold reward does."""
    changes = [
        f"reward.data.rows={settings.rows}",
        f"reward.labels={kind}",
        f"seed={settings.seed}",
        *settings.set,
    ]
    pipeline = Pipeline(read(settings.recipe, changes), folder, lambda line: None)
    for stage in ("base", "sft", "reward"):  # the first two are the same for every kind, and run once
        pipeline.run(only=stage)
    reward = learned.load(str(pipeline.stage_directory("reward") / "model"), device=torch.device("cpu"))
    pairs = [r for r in of_world("test_comparisons", 500, settings.seed + 1) if gold_difference(r)]
    sides = [learned.encode(reward, r.prompt, side) for r in pairs for side in (r.chosen, r.rejected)]
    scores = learned.score(reward, sides).tolist()
    hits = [float((c > j) == (gold_difference(r) > 0)) for r, c, j in zip(pairs, scores[0::2], scores[1::2])]
    share = points_share(hits)
    return f"{share['mean']:.3f} ({share['low']:.3f}–{share['high']:.3f})"


if __name__ == "__main__":
    main()
