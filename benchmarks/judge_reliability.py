"""How well a judge's reliability is estimated against people's votes, on the help desk, where truth is known.

A scripted judge names the better reply by the gold reward with a given probability, on 1,000 pairs with the
votes of three to five of the world's annotators, who err and share a bias. Beside the estimate stands what a
plain count of agreement with people's posterior would say.

    python benchmarks/judge_reliability.py [--seeds 3] [--pairs 1000]
"""

from __future__ import annotations

import argparse
import random

from keel.evaluation.judge_reliability import against_people, people_posterior
from keel.types import PreferenceRecord, Vote
from keel.worlds import helpdesk

RELIABILITIES = (0.6, 0.7, 0.8, 0.9)


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


def main() -> None:
    """Print a line for each seed and reliability."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=1000)
    asked = parser.parse_args()
    print("seed  reliability  estimate (95 % interval)  plain agreement")
    for seed in range(asked.seeds):
        records, better = compared(seed, asked.pairs)
        posterior = people_posterior(records)
        for reliability in RELIABILITIES:
            rng = random.Random(seed)
            right = [rng.random() < reliability for _ in better]
            said = [side if is_right else 2 - side for side, is_right in zip(better, right, strict=True)]
            found = against_people(posterior, said).right_side
            plain = sum(p[s] + p[1] / 2 for p, s in zip(posterior, said, strict=True)) / len(said)
            interval = f"{found['mean']:.3f} ({found['low']:.3f} to {found['high']:.3f})"
            print(f"{seed:<4}  {sum(right) / len(right):<11.3f}  {interval:<24}  {plain:.3f}")


if __name__ == "__main__":
    main()
