"""Uncertain pairs first, against random order: `python benchmarks/active.py [--model SFT] [--seeds 5]`.

On the help desk, whose truth is known. A pool of pairs waits for votes: one a pair, by one of its annotators,
with their biases and errors. The reward model is a small one that can be trained again after each batch of
votes: a linear head on states and log-likelihood of a frozen SFT model (of `keel run helpdesk`), by the
Bradley–Terry loss; an ensemble of five, each on a bootstrap sample of the votes. After 100 votes on pairs
drawn at random the next hundred are drawn

    random      at random
    uncertain   80 % by what a vote would tell (`keel.feedback.priorities.information`: the mutual information
                of the vote and the five heads), 20 % at random, as `keel label` does it
    entropy     the same with a single head: the entropy of its forecast
    spread      the same by the standard deviation of the five heads' scores
    half        as uncertain, half at random
    small       as uncertain, and the heads trained again after each 25 votes: no batch is chosen by what is
                known before it
    diverse     80 % so that together they tell most: one after the other by the variance that is left of the
                head's forecast (Laplace's approximation) when those chosen before are known
    members     the same with the five heads in the place of the posterior: it needs their scores alone

The second time each vote is for the better side, so that there are no errors of annotators: what is left is
the learner. Accuracy is that of the heads' mean on test pairs, by the gold reward. Printed are the accuracies
by votes, their differences with Student's interval over seeds (of the votes, first draws and bootstraps; the
pool is one), and how many votes each order needed for the accuracy that the random one has after 400, 800
and 1,200, on curves made monotone (isotonic regression); and the accuracy with the whole pool.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
BATCH, HEADS, RIDGE = 100, 5, 10.0
SHOWN, TARGETS = (200, 400, 800, 1200, 1600), (400, 800, 1200)


class Order(NamedTuple):
    """How the next pairs are chosen."""

    by: str = "information"
    heads: int = HEADS
    random_share: float = 0.2
    batch: int = BATCH


ORDERS = {
    "random": Order("random"), "uncertain": Order(), "entropy": Order(heads=1), "spread": Order("spread"),
    "half": Order(random_share=0.5), "small": Order(batch=25), "diverse": Order("diverse"),
    "members": Order("members"),
}  # fmt: skip
POINTS = {"chosen": 1.0, "tie": 0.5, "rejected": 0.0}
Array = np.ndarray[Any, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="an SFT model of the help desk; default: the recipe's, trained here")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--orders", default=",".join(ORDERS))
    parser.add_argument("--labels", default="votes,truth", help="votes of annotators, and without errors")
    parser.add_argument("--last", type=int, default=1600, help="votes up to which it goes")
    parser.add_argument("--pool", type=int, default=2200)
    parser.add_argument("--test", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("active.json"))
    settings = parser.parse_args()
    torch.set_num_threads(1)
    states = States(settings.model or sft())
    test = list(helpdesk.rows("test_comparisons", settings.test, 7))
    judged, gold = states.differences(test), np.array([gold_difference(row) for row in test])
    pool = list(helpdesk.rows("comparisons", settings.pool, 100))
    features = states.differences(pool)
    found: dict[str, Any] = {}
    for labels in settings.labels.split(","):
        curves: dict[str, dict[str, list[float]]] = {}
        whole: list[float] = []
        for seed in range(settings.seeds):
            said = truths(pool) if labels == "truth" else votes(pool, seed)
            waiting = Pool(features, said, judged, gold, settings.last)
            orders = {name: ORDERS[name] for name in settings.orders.split(",")}
            curves[str(seed)] = {name: waiting.curve(order, seed) for name, order in orders.items()}
            whole.append(waiting.accuracy(waiting.heads(range(len(said)), HEADS, seed)))
            found[labels] = {"curves": curves, "whole": whole}
            settings.out.write_text(json.dumps(found))
            last = ", ".join(f"{name} {curve[-1]:.3f}" for name, curve in curves[str(seed)].items())
            print(f"{labels}, seed {seed}: {last}; the whole pool {whole[-1]:.3f}", flush=True)
        print(f"{labels}; accuracy with all {len(pool)}: {np.mean(whole):.3f}")
        print(as_text(curves, settings.last), flush=True)


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
        """Of each text the last layer's state at its end, the mean of the middle layer's states, and its
        log-likelihood (that of the prompt is the same for both replies)."""
        longest = max(map(len, batch))
        ids = torch.zeros(len(batch), longest, dtype=torch.long)  # causal: what stands behind changes nothing
        for i, one in enumerate(batch):
            ids[i, : len(one)] = torch.tensor(one)
        out = self.model(input_ids=ids, output_hidden_states=True)
        last, middle = out.hidden_states[-1], out.hidden_states[len(out.hidden_states) // 2]
        logp = out.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return [
            torch.cat([last[i, n - 1], middle[i, :n].mean(0), logp[i, : n - 1].sum()[None]]).numpy()
            for i, n in enumerate(map(len, batch))
        ]


def votes(pool: Sequence[Any], seed: int) -> Array:
    """(N,) one vote on each pair: 1 for the side called chosen, ½ for a tie."""
    return np.array([POINTS[random.Random(f"{seed} {i}").choice(row["votes"])["choice"]]
                     for i, row in enumerate(pool)])  # fmt: skip


def truths(pool: Sequence[Any]) -> Array:
    """(N,) the vote of somebody who makes no errors."""
    return np.array([0.5 + 0.5 * np.sign(gold_difference(row)) for row in pool])


def gold_difference(row: Any) -> float:
    asked = row["prompt"][-1]["content"]
    sides = [helpdesk.gold(asked, row[side][0]["content"], {}) for side in ("chosen", "rejected")]
    return sides[0]["total"] - sides[1]["total"]


class Pool:
    """Pairs that wait for votes, and test pairs to be right about."""

    def __init__(self, features: Array, said: Array, judged: Array, gold: Array, last: int) -> None:
        self.last = last
        scale = features.std(axis=0) + 1e-6
        self.features, self.judged = features / scale, (judged / scale)[gold != 0]
        self.said, self.better = said, gold[gold != 0] > 0

    def accuracy(self, heads: Array) -> float:
        """Of the heads' mean on the test pairs."""
        return float((((self.judged @ heads.T).mean(axis=1) > 0) == self.better).mean())

    def curve(self, order: Order, seed: int) -> list[float]:
        """Accuracy after 100, 200 … votes, the pairs drawn in this order."""
        rng = random.Random(seed)  # the first hundred are the same for every order
        shuffled = rng.sample(range(len(self.said)), len(self.said))
        taken, found = shuffled[:BATCH], list[float]()
        while True:
            heads = self.heads(taken, order.heads, seed)
            if len(taken) % BATCH == 0:
                found.append(self.accuracy(heads))
            if len(taken) == self.last:
                return found
            there = set(taken)
            left = [i for i in shuffled if i not in there]
            if order.by != "random":
                drawn = rng.sample(left, round(order.random_share * order.batch))
                rest = [i for i in left if i not in set(drawn)]
                left = [*drawn, *self.chosen(order, heads, taken, rest, order.batch - len(drawn))]
            taken = [*taken, *left[: order.batch]]

    def chosen(
        self, order: Order, heads: Array, taken: Sequence[int], left: Sequence[int], count: int
    ) -> list[int]:
        """The next pairs by an order."""
        apart = (self.features[list(left)] @ heads.T).T  # (M, N)
        if order.by == "diverse":
            spread = posterior(self.features[list(taken)], heads.mean(axis=0))
            return [left[k] for k in greedy(self.features[list(left)], spread, apart.mean(axis=0), count)]
        if order.by == "members":
            return [left[k] for k in together(apart, count)]
        told = information(apart) if order.by == "information" else apart.std(axis=0)
        return [left[k] for k in np.argsort(-told, kind="stable")[:count]]

    def heads(self, taken: Sequence[int], count: int, seed: int) -> Array:
        """(M, d) heads by the penalised likelihood. A single one learns from every vote once."""
        features, said = self.features[list(taken)], self.said[list(taken)]
        rng = np.random.default_rng([seed, len(taken)])
        times = rng.multinomial(len(taken), np.full(len(taken), 1 / len(taken)), size=count)
        given = [t if count > 1 else np.ones(len(taken)) for t in times]
        return np.stack([fitted(features, said, t) for t in given])


def fitted(features: Array, said: Array, times: Array) -> Array:
    """(d,) by Newton's method, to three digits. It begins at zero: from elsewhere its first step may be too
    long."""
    head = np.zeros(features.shape[1])
    for _ in range(8):
        p = 1 / (1 + np.exp(-np.clip(features @ head, -30, 30)))
        curvature = features.T @ (features * (times * p * (1 - p))[:, None]) + RIDGE * np.eye(len(head))
        step = np.linalg.solve(curvature, features.T @ (times * (said - p)) - RIDGE * head)
        head = head + step
        if np.abs(step).max() < 1e-3 * max(np.abs(head).max(), 1e-9):
            break
    return head


def posterior(features: Array, head: Array) -> Array:
    """(d, d) the covariance of a head after votes on these pairs, by Laplace's approximation."""
    p = 1 / (1 + np.exp(-np.clip(features @ head, -30, 30)))
    return np.linalg.inv(features.T @ (features * (p * (1 - p))[:, None]) + RIDGE * np.eye(len(head)))


def together(differences: Array, count: int) -> list[int]:
    """(M, N) scores of M heads → the pairs that together tell most about which of several models is right:
    one after the other, each by the variance that is left of the models' scores when those before it are
    known. So no second pair is asked that says what the first does.
    """
    centred = (differences - differences.mean(axis=0)).T / np.sqrt(max(len(differences) - 1, 1))
    return greedy(centred, np.eye(len(differences)), differences.mean(axis=0), count)


def greedy(features: Array, covariance: Array, scores: Array, count: int) -> list[int]:
    """(N, k) features, (k, k) covariance of what they are multiplied by, (N,) mean scores → `count` rows, by
    the information gain of a vote on each, ½ log(1 + v·p(1 − p)), v its variance given votes on those before.
    """
    p = 1 / (1 + np.exp(-np.clip(scores, -30, 30)))
    weight = p * (1 - p)
    spread = features @ covariance
    variance = (spread * features).sum(axis=1)
    chosen: list[int] = []
    for _ in range(min(count, len(features))):
        gain = variance * weight
        gain[chosen] = -1.0
        best = int(gain.argmax())
        chosen.append(best)
        row = spread[best] / np.sqrt(1 / weight[best] + variance[best])
        along = features @ row
        spread -= along[:, None] * row[None, :]
        variance -= along * along
    return chosen


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


def as_text(curves: dict[str, dict[str, list[float]]], last: int) -> str:
    orders = list(curves["0"])
    lines = ["accuracy, and its difference to random"]
    for size in (size for size in SHOWN if size <= last):
        at = {order: [curve[order][size // BATCH - 1] for curve in curves.values()] for order in orders}
        apart = {o: interval(np.subtract(at[o], at["random"]).tolist()) for o in orders if o != "random"}
        cells = [f"random {np.mean(at['random']):.3f}"]
        cells += [f"{order} {np.mean(at[order]):.3f} {said}" for order, said in apart.items()]
        lines.append(f"{size:>6}  " + "; ".join(cells))
    for target in (target for target in TARGETS if target < last):
        for order in orders[1:]:
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
    listed = ", ".join(f"{v:.0f}" if v is not None else f"more than {BATCH * len(by_random)}" for v in found)
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
