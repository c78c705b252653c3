"""How well a judge's reliability is estimated against people's votes, on the help desk, where truth is known.

A scripted judge names the better reply by the gold reward with a given probability, on 1,000 pairs with the
votes of three to five of the world's annotators, who err and share a bias. Beside the estimate stands what a
plain count of agreement with people's posterior would say.

    python benchmarks/judge_reliability.py [--seeds 3] [--pairs 1000]

With --train RUN, a finished run of the recipe helpdesk, whose reward model goes on from where it is: what a
biased judge does to a reward model that is refreshed. People vote on one pair in four, the judge on all: it
names the longer reply nine times in ten, whatever is better. Three labels of the same pairs: people's votes
alone; the majority of all votes, the judge's being one of them; and as `collect` has it, the judge's word by
its reliability against people's, or not at all where that is not better than a coin with certainty. Each
trains on for as many steps, and is measured by how often it ranks test pairs as the gold reward. The seed
draws pairs, votes, what the judge says, and the training.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keel.config import parse
from keel.evaluation.judge_reliability import JudgeReliability, against_people, people_posterior, weighed
from keel.evaluation.measures import Measure, across_runs, points_share
from keel.pipeline.pipeline import Pipeline
from keel.rewards import learned
from keel.types import PreferenceRecord, Vote
from keel.worlds import helpdesk

RELIABILITIES = (0.6, 0.7, 0.8, 0.9)
TRAINED, TESTED, VOTED = 1200, 500, 4  # pairs; people vote on one in so many
LONGER = 0.9  # how often the biased judge names the longer reply
ARMS = ("people alone", "majority", "weighed")


def compared(seed: int, pairs: int) -> tuple[list[PreferenceRecord], list[int]]:
    """Pairs with a better side by the gold reward, and which it is: 2 chosen, 0 rejected."""
    records, better = list[PreferenceRecord](), list[int]()
    for row in helpdesk.rows("comparisons", 4 * pairs, seed):
        prompt = row["prompt"][-1]["content"]
        gold = [
            helpdesk.gold(prompt, row[side][-1]["content"], row)["total"] for side in ("chosen", "rejected")
        ]
        if gold[0] != gold[1] and len(better) < pairs:
            votes = tuple(Vote(vote["annotator"], vote["choice"]) for vote in row["votes"])
            records.append(PreferenceRecord("", "", "", votes=votes))
            better.append(2 if gold[0] > gold[1] else 0)
    return records, better


def estimates(seeds: int, pairs: int) -> None:
    """Print a line for each seed and reliability."""
    print("seed  reliability  estimate (95 % interval)  plain agreement")
    for seed in range(seeds):
        records, better = compared(seed, pairs)
        posterior = people_posterior(records)
        for reliability in RELIABILITIES:
            rng = random.Random(seed)
            right = [rng.random() < reliability for _ in better]
            said = [side if is_right else 2 - side for side, is_right in zip(better, right, strict=True)]
            found = against_people(posterior, said).right_side
            plain = sum(p[s] + p[1] / 2 for p, s in zip(posterior, said, strict=True)) / len(said)
            interval = f"{found['mean']:.3f} ({found['low']:.3f} to {found['high']:.3f})"
            print(f"{seed:<4}  {sum(right) / len(right):<11.3f}  {interval:<24}  {plain:.3f}")


# ---------------------------------------------------------------- reward models


def labelled(
    rows: Sequence[dict[str, Any]], seed: int
) -> tuple[dict[str, list[float | None]], JudgeReliability]:
    """Label → P(chosen is better) of each pair, None for a pair without one; and what is known of the
    judge."""
    rng = random.Random(f"judge {seed}")
    said: list[int] = []
    for row in rows:
        words = [len(row[side][-1]["content"].split()) for side in ("chosen", "rejected")]
        longer = 2 if words[0] > words[1] else 0 if words[0] < words[1] else rng.choice((0, 2))
        said.append(longer if rng.random() < LONGER else 2 - longer)
    known = range(0, len(rows), VOTED)
    votes = [
        tuple(Vote(v["annotator"], v["choice"]) for v in row["votes"]) if i in known else ()
        for i, row in enumerate(rows)
    ]
    posterior = people_posterior([PreferenceRecord("", "", "", votes=one) for one in votes])
    judge = against_people(posterior[known], [said[i] for i in known])
    points = {"chosen": 1.0, "tie": 0.5, "rejected": 0.0}
    of_people = [[points[vote.choice] for vote in one] for one in votes]
    shares = [float(np.mean([*one, choice / 2])) for one, choice in zip(of_people, said, strict=True)]
    alone = posterior @ np.linspace(0.0, 1.0, 3)
    by_word = weighed(posterior, [(judge, said)])
    counted: list[float | None] = [
        float(p) if judge.counts or i in known else None
        for i, p in enumerate(by_word if judge.counts else alone)
    ]
    return {
        "people alone": [float(alone[i]) if i in known else None for i in range(len(rows))],
        "majority": [None if share == 0.5 else float(share > 0.5) for share in shares],
        "weighed": counted,
    }, judge


def trained(run: Path, rows: Sequence[dict[str, Any]], labels: Sequence[float | None], seed: int) -> Measure:
    """The share of test pairs that a reward model trained on these labels ranks as the gold reward does."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = [
            {
                "prompt": row["prompt"],
                "chosen": row[a],
                "rejected": row[b],
                "p_chosen": p if a == "chosen" else 1 - p,
            }
            for row, p in zip(rows, labels, strict=True)
            if p is not None
            for a, b in [("chosen", "rejected") if p >= 0.5 else ("rejected", "chosen")]
        ]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
        stage = {
            "kind": "reward", "model": str(run / "stages" / "reward" / "model"), "lr": 5e-4, "batch_size": 16,
            "data": str(folder / "rows.jsonl"), "labels": "soft", "max_steps": TRAINED // 16, "normalize": 0,
            "holdout": 0, "epochs": 100,
        }  # fmt: skip
        head = {"name": "judged", "seed": seed, "threads": 1, "device": "cpu", "dtype": "float32"}
        pipeline = Pipeline(parse({**head, "stages": {"reward": stage}}), folder / "run", lambda line: None)
        pipeline.run()
        return ranked(pipeline.stage_directory("reward") / "model", seed)


def ranked(model: Path, seed: int) -> Measure:
    """The share of test pairs that a reward model ranks as the gold reward does."""
    reward = learned.load(str(model), device=torch.device("cpu"))
    tests = [row for row in helpdesk.rows("test_comparisons", TESTED, seed + 1) if difference(row)]
    sides = [
        learned.encode(reward, tuple(row["prompt"]), tuple(row[side]))
        for row in tests
        for side in ("chosen", "rejected")
    ]
    scores = learned.score(reward, sides).tolist()
    return points_share(
        [
            0.5 if a == b else float((a > b) == (difference(row) > 0))
            for row, a, b in zip(tests, scores[0::2], scores[1::2], strict=True)
        ]
    )


def difference(row: dict[str, Any]) -> float:
    """The gold reward of the chosen reply minus that of the rejected one."""
    asked = row["prompt"][-1]["content"]
    chosen, rejected = (
        helpdesk.gold(asked, row[side][-1]["content"], row)["total"] for side in ("chosen", "rejected")
    )
    return chosen - rejected


def reward_models(run: Path, seeds: int) -> None:
    """Print a line for each seed, and what they come to."""
    means: dict[str, list[float]] = {arm: [] for arm in ("before", *ARMS)}
    known = "the judge's reliability"
    print(f"seed  {known:<35}" + "".join(f"{arm:<24}" for arm in means))
    for seed in range(seeds):
        rows = list(helpdesk.rows("comparisons", TRAINED, seed))
        labels, judge = labelled(rows, seed)
        right, cells = judge.right_side, list[str]()
        for arm in means:
            if arm == "before":
                found = ranked(run / "stages" / "reward" / "model", seed)
            else:
                found = trained(run, rows, labels[arm], seed)
            means[arm].append(found["mean"])
            cells.append(f"{found['mean']:.3f} ({found['low']:.3f} to {found['high']:.3f})")
        known = f"{right['mean']:.2f} ({right['low']:.2f} to {right['high']:.2f})"
        known += "" if judge.counts else ", not counted"
        print(f"{seed:<6}{known:<35}" + "".join(f"{cell:<24}" for cell in cells), flush=True)
    for arm in means if seeds > 1 else ():
        of_all = across_runs(means[arm])
        print(f"{arm}: {of_all['mean']:.3f} ({of_all['low']:.3f} to {of_all['high']:.3f}) over {seeds} seeds")
    if seeds > 1:
        gains = [a - b for a, b in zip(means["weighed"], means["majority"], strict=True)]
        gain = across_runs(gains)
        print(f"weighed minus majority: {gain['mean']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--train", type=Path, help="a finished run of the recipe helpdesk")
    asked = parser.parse_args()
    if asked.train:
        reward_models(asked.train.resolve(), asked.seeds)
    else:
        estimates(asked.seeds, asked.pairs)


if __name__ == "__main__":
    main()
