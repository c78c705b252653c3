"""A language model beside people: how reliable it is, measured against their votes, and labels of pairs in
which its word counts as far as that.

People's votes come first: by Dawid and Skene's model they say how probable it is of each pair that one side
is better (`reliability.dawid_skene`). The judge has a confusion matrix too, found by EM with what people say
of a pair as the pair's prior. So judges who agree with each other cannot outvote people about what is true.
What is measured is whether a judge sides with people. Where all people share a bias, a judge that has it
looks reliable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from keel.evaluation.annotators import CHOICES, Array, of_pairs
from keel.evaluation.measures import Measure, wilson
from keel.evaluation.reliability import SMOOTHING, dawid_skene
from keel.types import PreferenceRecord

FEWEST = 20  # pairs that people and a judge both compared, below which its word does not count
_REJECTED, _TIE, _CHOSEN = range(len(CHOICES))


@dataclass(frozen=True, slots=True)
class JudgeReliability:
    """What is known of one judge. Categories as in CHOICES: rejected, tie, chosen."""

    confusion: Array  # (K, K) P(judge says l | true category k), the same from both sides
    # P(it names the better side | one is better), a tie counting one half; with Wilson's interval for as many
    # pairs as have a better side. `n`: pairs that people and it compared
    right_side: Measure

    @property
    def counts(self) -> bool:
        """Whether its word counts: on enough pairs it is better than a coin, with certainty."""
        return self.right_side["n"] >= FEWEST and self.right_side["low"] > 0.5


def people_posterior(records: Sequence[PreferenceRecord], words: Mapping[int, float] | None = None) -> Array:
    """(N, K) probabilities of each pair's true category by people's named votes; of a pair without votes, the
    prior.

    words: pair → what a reviewer said of it, P(chosen is better): 1, ½ (a tie) or 0.
    """
    if any(vote.annotator for record in records for vote in record.votes):
        votes = of_pairs(records, named=True)
        posterior = dawid_skene(votes, smoothing=SMOOTHING).posterior[: len(records)].copy()
    else:
        posterior = np.full((len(records), len(CHOICES)), 1 / len(CHOICES))
    for pair, word in (words or {}).items():
        posterior[pair] = np.eye(len(CHOICES))[{0.0: _REJECTED, 0.5: _TIE, 1.0: _CHOSEN}[word]]
    return posterior


def against_people(
    posterior: Array, said: Sequence[int | None], *, tolerance: float = 1e-8, most: int = 1000
) -> JudgeReliability:
    """The reliability of a judge whose choices are `said` (0, 1, 2 as in CHOICES; None: it did not vote).

    posterior: (N, K), of the pairs that people compared, by their votes alone.

        E:  γ_i(k) ∝ P_i(k) π(l_i | k)        M:  π(l | k) ∝ Σ_i γ_i(k) [l_i = l] + smoothing

    P_i stays what people say, and each pair is read from both sides, so that what is called chosen does not
    matter. With P_i for the truth itself (no E step) a judge would look the worse the less sure people are.
    """
    voted = [i for i, choice in enumerate(said) if choice is not None]
    choice = np.array([said[i] for i in voted], dtype=np.int64)
    prior = np.asarray(posterior, dtype=np.float64)[voted]
    both = np.concatenate([prior, prior[:, ::-1]])  # (2n, K)
    told = np.concatenate([choice, len(CHOICES) - 1 - choice])
    one_hot = np.eye(len(CHOICES))[told]
    gamma, confusion = both, _maximised(both, one_hot)
    for _ in range(most):
        joint = both * confusion[:, told].T
        gamma = joint / joint.sum(axis=1, keepdims=True)
        previous, confusion = confusion, _maximised(gamma, one_hot)
        if np.abs(confusion - previous).max() <= tolerance:
            break
    right = float(confusion[_CHOSEN, _CHOSEN] + confusion[_CHOSEN, _TIE] / 2)
    decided = float(1 - gamma[: len(voted), _TIE].sum() / len(voted)) * len(voted) if voted else 0.0
    interval = wilson(right * decided, decided) if decided > 0 else {"mean": 0.5, "low": 0.0, "high": 1.0}
    return JudgeReliability(confusion, {**interval, "n": len(voted)})


def _maximised(gamma: Array, one_hot: Array) -> Array:
    """(K, K) the M step."""
    said = gamma.T @ one_hot + SMOOTHING
    return said / said.sum(axis=1, keepdims=True)


def weighed(posterior: Array, judges: Sequence[tuple[JudgeReliability, Sequence[int | None]]]) -> Array:
    """(N,) P(chosen is better) of each pair, a true tie counting one half: people's posterior times what each
    judge says, by its confusion matrix."""
    joint = np.asarray(posterior, dtype=np.float64).copy()
    for reliability, said in judges:
        for i, choice in enumerate(said):
            if choice is not None:
                joint[i] *= reliability.confusion[:, choice]
    joint /= joint.sum(axis=1, keepdims=True)
    return joint @ np.linspace(0.0, 1.0, len(CHOICES))
