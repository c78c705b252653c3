"""Uncertain pairs first, against random order: `python benchmarks/active.py [--model SFT] [--seeds 0,1,2]`.

On the help desk, whose truth is known. A pool of pairs waits for votes: one a pair, by one of its annotators,
with their biases and errors. The reward model is a small one that can be trained again after each hundred
votes: a linear head on the states of a frozen SFT model (of `keel run helpdesk`), by the Bradley–Terry loss;
an ensemble of five, each on a bootstrap sample of the votes. After 100 votes on pairs drawn at random the
next hundred are drawn

    random      at random
    uncertain   80 % by what a vote would tell (`keel.feedback.priorities.information`: the mutual information
                of the vote and the five heads), 20 % at random, as `keel label` does it
    entropy     the same with a single head: the entropy of its forecast

Accuracy is that of the heads' mean on test pairs, by the gold reward. Printed are the accuracies by votes,
their differences with Student's interval over seeds, and how many votes each order needed for the accuracy
that the random one has after 400, 800 and 1,600, on curves made monotone (isotonic regression).
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
import torch
from transformers import AutoModelForCausalLM

from keel.config import read
from keel.data.batches import by_length
from keel.evaluation.measures import across_runs
from keel.feedback.priorities import information
from keel.models.load import load_tokenizer
from keel.pipeline.pipeline import Pipeline
from keel.worlds import helpdesk

RECIPE = Path(__file__).parents[1] / "recipes" / "helpdesk.yaml"
BATCH, LAST, HEADS, RANDOM_SHARE, RIDGE = 100, 2000, 5, 0.2, 10.0
SHOWN, TARGETS = (100, 200, 400, 800, 1600, 2000), (400, 800, 1600)
ORDERS = ("random", "uncertain", "entropy")
POINTS = {"chosen": 1.0, "tie": 0.5, "rejected": 0.0}
Array = np.ndarray[Any, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="an SFT model of the help desk; default: the recipe's, trained here")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--pool", type=int, default=3000)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("active.json"))
    settings = parser.parse_args()
    torch.set_num_threads(1)
    states = States(settings.model or sft())
    test = list(helpdesk.rows("test_comparisons", settings.test, 7))
    judged, gold = states.differences(test), np.array([gold_difference(row) for row in test])
    curves: dict[str, dict[str, list[float]]] = {}
    for seed in settings.seeds.split(","):
        pool = list(helpdesk.rows("comparisons", settings.pool, 100 + int(seed)))
        found = Pool(states.differences(pool), votes(pool, int(seed)), judged, gold)
        curves[seed] = {order: found.curve(order, int(seed)) for order in ORDERS}
        settings.out.write_text(json.dumps(curves))
        print(f"seed {seed}: " + ", ".join(f"{o} {curves[seed][o][-1]:.3f}" for o in ORDERS), flush=True)
    print(as_text(curves))


def sft() -> str:
    """The SFT model of the recipe, in runs/helpdesk."""
    pipeline = Pipeline(read(RECIPE, ["threads=1"]), Path("runs/helpdesk"))
    for stage in ("base", "sft"):
        pipeline.run(only=stage)
    return "runs/helpdesk/stages/sft/model"


class States:
    """What a frozen model's states say of a reply."""

    def __init__(self, folder: str) -> None:
        self.tokenizer = load_tokenizer(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def differences(self, rows: Sequence[Any]) -> Array:
        """(N, d) features of the chosen reply minus those of the rejected one."""
        texts = [
            self.tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False)
            for row in rows
            for side in ("chosen", "rejected")
        ]
        ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        found: list[Any] = [None] * len(ids)
        with torch.no_grad():
            for part in by_length([len(one) for one in ids], 64):
                for place, features in zip(part, self._features([ids[i] for i in part]), strict=True):
                    found[place] = features
        both = np.stack(found)
        return both[0::2] - both[1::2]

    def _features(self, batch: Sequence[Sequence[int]]) -> list[Array]:
        """Of each text its last two states, the mean of the last layer's and of the middle layer's."""
        longest = max(map(len, batch))
        ids = torch.zeros(len(batch), longest, dtype=torch.long)  # causal: what stands behind changes nothing
        for i, one in enumerate(batch):
            ids[i, : len(one)] = torch.tensor(one)
        layers = self.model(input_ids=ids, output_hidden_states=True).hidden_states
        last, middle = layers[-1], layers[len(layers) // 2]
        return [
            torch.cat([last[i, n - 1], last[i, n - 2], last[i, :n].mean(0), middle[i, :n].mean(0)]).numpy()
            for i, n in enumerate(map(len, batch))
        ]


def votes(pool: Sequence[Any], seed: int) -> Array:
    """(N,) one vote on each pair: 1 for the side called chosen, ½ for a tie."""
    return np.array([POINTS[random.Random(f"{seed} {i}").choice(row["votes"])["choice"]]
                     for i, row in enumerate(pool)])  # fmt: skip


def gold_difference(row: Any) -> float:
    asked = row["prompt"][-1]["content"]
    sides = [helpdesk.gold(asked, row[side][0]["content"], {}) for side in ("chosen", "rejected")]
    return sides[0]["total"] - sides[1]["total"]


class Pool:
    """Pairs that wait for votes, and test pairs to be right about."""

    def __init__(self, features: Array, said: Array, judged: Array, gold: Array) -> None:
        scale = features.std(axis=0) + 1e-6
        self.features, self.judged = features / scale, (judged / scale)[gold != 0]
        self.said, self.better = said, gold[gold != 0] > 0

    def curve(self, order: str, seed: int) -> list[float]:
        """Accuracy after 100, 200 … votes, the pairs drawn in this order."""
        rng = random.Random(seed)  # the first hundred are the same for every order
        shuffled = rng.sample(range(len(self.said)), len(self.said))
        taken, found = shuffled[:BATCH], list[float]()
        while True:
            heads = self.heads(taken, 1 if order == "entropy" else HEADS, seed)
            scores = (self.judged @ heads.T).mean(axis=1)
            found.append(float(((scores > 0) == self.better).mean()))
            if len(taken) == LAST:
                return found
            there = set(taken)
            left = [i for i in shuffled if i not in there]
            if order != "random":
                told = information((self.features[left] @ heads.T).T)
                drawn = rng.sample(left, round(RANDOM_SHARE * BATCH))
                ranked = [left[k] for k in np.argsort(-told, kind="stable")]
                left = [*drawn, *(i for i in ranked if i not in set(drawn))]
            taken = [*taken, *left[:BATCH]]

    def heads(self, taken: Sequence[int], count: int, seed: int) -> Array:
        """(M, d) heads by the penalised likelihood. A single one learns from every vote once."""
        features, said = self.features[list(taken)], self.said[list(taken)]
        rng = np.random.default_rng([seed, len(taken)])
        times = rng.multinomial(len(taken), np.full(len(taken), 1 / len(taken)), size=count)
        return np.stack([fitted(features, said, t if count > 1 else np.ones(len(taken))) for t in times])


def fitted(features: Array, said: Array, times: Array) -> Array:
    """(d,) by Newton's method."""
    head = np.zeros(features.shape[1])
    for _ in range(12):
        p = 1 / (1 + np.exp(-np.clip(features @ head, -30, 30)))
        curvature = features.T @ (features * (times * p * (1 - p))[:, None]) + RIDGE * np.eye(len(head))
        head = head + np.linalg.solve(curvature, features.T @ (times * (said - p)) - RIDGE * head)
    return head


# ---------------------------------------------------------------- what came out


def monotone(curve: Sequence[float]) -> list[float]:
    """Isotonic regression: neighbours that fall are pooled."""
    blocks: list[list[float]] = []
    for value in curve:
        blocks.append([value, 1.0])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, m), (b, n) = blocks[-2:]
            blocks[-2:] = [[(a * m + b * n) / (m + n), m + n]]
    return [value for value, count in blocks for _ in range(int(count))]


def votes_needed(curve: Sequence[float], target: float) -> float | None:
    """Votes at which a monotone curve reaches an accuracy, linear between its points; None: never."""
    for k, value in enumerate(curve):
        if value >= target:
            before = curve[k - 1] if k else value
            share = 1.0 if k == 0 or value == before else (target - before) / (value - before)
            return BATCH * (k + share) if k else float(BATCH)
    return None


def as_text(curves: dict[str, dict[str, list[float]]]) -> str:
    lines = [
        f"{'votes':>6}"
        + "".join(f"  {order:>9}" for order in ORDERS)
        + "   uncertain − random, entropy − random"
    ]
    for size in SHOWN:
        at = {order: [curve[order][size // BATCH - 1] for curve in curves.values()] for order in ORDERS}
        apart = [interval(np.subtract(at[order], at["random"]).tolist()) for order in ORDERS[1:]]
        means = "".join(f"  {np.mean(at[order]):>9.3f}" for order in ORDERS)
        lines.append(f"{size:>6}{means}   {apart[0]}, {apart[1]}")
    for target in TARGETS:
        for order in ORDERS[1:]:
            lines.append(
                f"{order}: votes for the accuracy of random after {target}: {needed(curves, order, target)}"
            )
    return "\n".join(lines)


def needed(curves: dict[str, dict[str, list[float]]], order: str, target: int) -> str:
    """The votes of each seed, and the mean ratio to those of the random order, where every seed got there."""
    found: list[float | None] = []
    ratios: list[float] = []
    for curve in curves.values():
        by_random = monotone(curve["random"])
        accuracy = by_random[target // BATCH - 1]
        own, votes_ = votes_needed(by_random, accuracy), votes_needed(monotone(curve[order]), accuracy)
        found.append(votes_)
        if votes_ is not None and own is not None:
            ratios.append(math.log(votes_ / own))
    listed = ", ".join(f"{v:.0f}" if v is not None else f"more than {LAST}" for v in found)
    if len(ratios) < len(found) or len(ratios) < 2:
        return listed
    measure = across_runs(ratios)
    low, mean, high = (math.exp(measure[name]) for name in ("low", "mean", "high"))
    return f"{listed}; {mean:.2f} times as many as random ({low:.2f} to {high:.2f})"


def interval(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:+.3f}"
    found = across_runs(values)
    return f"{found['mean']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"


if __name__ == "__main__":
    main()
