"""How reliable each annotator is, estimated without known answers, and labels of pairs made with that."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from keel.evaluation.annotators import CHOICES, Array, Votes, of_pairs
from keel.types import PreferenceRecord

if TYPE_CHECKING:
    import torch

_TINY = 1e-10  # probabilities are not lower than this, so that no vote is impossible
# Votes added to each cell of a confusion matrix when labels are made: who has few votes counts little.
SMOOTHING = 1.0


@dataclass(frozen=True, slots=True)
class DawidSkene:
    """What EM found: N items, A annotators, K categories."""

    posterior: Array  # (N, K) P(true category | all votes on the item)
    prior: Array  # (K,)
    confusion: Array  # (A, K, K) P(annotator says l | true category k), at [a, k, l]

    @property
    def reliability(self) -> Array:
        """(A,) probability that an annotator says the true category: Σ_k p_k π_a(k|k)."""
        return np.einsum("k,akk->a", self.prior, self.confusion)

    @property
    def right_side(self) -> Array:
        """(A,) for votes on pairs read from both sides: P(an annotator names the better side | one is
        better), a tie counting one half. Unlike `reliability` it does not ask people to agree on what is a
        tie."""
        return self.confusion[:, 2, 2] + self.confusion[:, 2, 1] / 2


def dawid_skene(
    votes: Votes, *, smoothing: float = 0.0, tolerance: float = 1e-6, most: int = 500
) -> DawidSkene:
    """Annotators' confusion matrices and the items' true categories by EM (Dawid & Skene, Applied Statistics
    28, 1979).

        E:  P(z_i = k | votes) ∝ p_k Π_a π_a(l_ia | k)        M:  π_a(l|k) ∝ Σ_i P(z_i = k) [a said l of i] +
        smoothing

    EM starts from the share of the votes and ends after `most` iterations, or when no posterior moves by more
    than `tolerance`. An item without votes gets the prior, and has no part in it.
    """
    counts, kinds = votes.counts().astype(np.float64), votes.categories
    voted = counts.sum(axis=1) > 0
    posterior = np.where(voted[:, None], counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), 1 / kinds)
    prior, confusion = _maximised(votes, posterior, voted, smoothing)
    for _ in range(most):
        log_said = np.log(confusion)[votes.annotator, :, votes.choice]  # (V, K) log π_a(l|k)
        log_joint = np.log(np.maximum(prior, _TINY)) + np.stack(
            [np.bincount(votes.item, log_said[:, k], minlength=votes.items) for k in range(kinds)], axis=1
        )
        joint = np.exp(log_joint - log_joint.max(axis=1, keepdims=True))
        previous, posterior = posterior, joint / joint.sum(axis=1, keepdims=True)
        prior, confusion = _maximised(votes, posterior, voted, smoothing)
        if np.abs(posterior - previous).max() <= tolerance:
            break
    return DawidSkene(posterior, prior, confusion)


def _maximised(votes: Votes, posterior: Array, voted: Array, smoothing: float) -> tuple[Array, Array]:
    """The M step: (K,) prior and (A, K, K) confusion."""
    kinds, cells = votes.categories, votes.annotator * votes.categories + votes.choice
    said = np.stack(
        [
            np.bincount(cells, posterior[votes.item, k], minlength=len(votes.names) * kinds)
            for k in range(kinds)
        ]
    )  # (K, A·K)
    said = np.maximum(said.reshape(kinds, -1, kinds).transpose(1, 0, 2) + smoothing, _TINY)
    return posterior[voted].mean(axis=0), said / said.sum(axis=2, keepdims=True)


@dataclass(frozen=True, slots=True)
class CrowdBradleyTerry:
    """Scores of I things that were compared, and how reliable each of A annotators is."""

    scores: Array  # (I,) s
    reliability: Array  # (A,) η: 1 always follows the scores, ½ knows nothing, 0 always says the opposite


def crowd_bradley_terry(
    winner: Array,
    loser: Array,
    annotator: Array,
    *,
    weight: Array | None = None,
    items: int,
    annotators: int,
    regularisation: float = 0.5,
) -> CrowdBradleyTerry:
    """Scores and annotators' reliability from comparisons (Crowd-BT: Chen et al., WSDM 2013, sections 3 and
    4.1).

        P(a says i ≻ j) = η_a σ(s_i − s_j) + (1 − η_a) σ(s_j − s_i)

    The penalised likelihood's maximum by L-BFGS. As in the paper every thing wins and loses against a virtual
    one of score 0, `regularisation` times. Departure: η has a prior Beta(2, 2), so that it stays off 0 and 1.

    It is made for things that are compared many times. Where each stands in one pair, the scores follow that
    pair's few votes, every η comes out near 1, and only their order means something: then trust
    `dawid_skene`.

    winner, loser, annotator: (V,) indices; weight: (V,), 1 when None (a tie is half a vote for each side).
    """
    import torch  # takes a second, and Dawid & Skene need none of it
    from torch.nn.functional import logsigmoid

    first, second, who = (
        torch.as_tensor(np.asarray(x), dtype=torch.long) for x in (winner, loser, annotator)
    )
    share = torch.as_tensor(np.ones(len(first)) if weight is None else weight, dtype=torch.float64)
    scores = torch.zeros(items, dtype=torch.float64, requires_grad=True)
    # the search starts at η = σ(2) = 0.88: most annotators mostly follow the scores
    logit = torch.full((annotators,), 2.0, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [scores, logit],
        max_iter=500,
        tolerance_grad=1e-7,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def penalised() -> torch.Tensor:
        optimiser.zero_grad()
        difference = scores[first] - scores[second]
        follows = logsigmoid(logit)[who] + logsigmoid(difference)
        opposes = logsigmoid(-logit)[who] + logsigmoid(-difference)
        likelihood = (share * torch.logaddexp(follows, opposes)).sum()
        virtual = regularisation * (logsigmoid(scores) + logsigmoid(-scores)).sum()
        loss = -(likelihood + virtual + (logsigmoid(logit) + logsigmoid(-logit)).sum())
        loss.backward()
        return loss

    optimiser.step(penalised)  # pyright: ignore[reportArgumentType]
    return CrowdBradleyTerry(scores.detach().numpy(), logit.detach().sigmoid().numpy())


def of_annotators(records: Sequence[PreferenceRecord]) -> dict[str, dict[str, float]] | None:
    """Name → `votes`, `dawid_skene` (`right_side`) and, where the average reply stands in two pairs or more,
    `bradley_terry` (its `reliability`). None where no pair has the votes of two annotators whose names are
    known."""
    if not _can_be_compared(records):
        return None
    votes = of_pairs(records, named=True)
    votes_of = np.bincount(votes.annotator, minlength=len(votes.names)) // 2  # each was read from both sides
    right_side = dawid_skene(votes, smoothing=SMOOTHING).right_side
    by_name = {
        name: {"votes": int(n), "dawid_skene": float(share)}
        for name, n, share in zip(votes.names, votes_of, right_side, strict=True)
    }
    if (crowd := _crowd(records, votes.names)) is not None:
        for name, share in zip(votes.names, crowd.reliability, strict=True):
            by_name[name]["bradley_terry"] = float(share)
    return by_name


def labels(
    records: Sequence[PreferenceRecord], kind: Literal["soft", "majority", "reliability"]
) -> list[float | None]:
    """P(chosen is better) of each pair as a label; None where nothing is known of it.

    soft: the share of its votes. majority: the side that most prefer, ½ where as many prefer either.
    reliability: the posterior by Dawid–Skene of all pairs together, a true tie counting one half; pairs
    without a named vote keep their share. ValueError for reliability where no pair has two annotators' votes.
    """
    shares = [record.p_chosen for record in records]
    if kind == "soft":
        return shares
    if kind == "majority":
        return [p if p is None or p == 0.5 else float(p > 0.5) for p in shares]
    if not _can_be_compared(records):
        raise ValueError("no pair has the votes of two annotators who are named")
    posterior = dawid_skene(of_pairs(records, named=True), smoothing=SMOOTHING).posterior
    weights = np.linspace(0.0, 1.0, len(CHOICES))  # rejected, tie, chosen
    return [
        float(posterior[i] @ weights) if any(vote.annotator for vote in record.votes) else record.p_chosen
        for i, record in enumerate(records)
    ]


def _can_be_compared(records: Sequence[PreferenceRecord]) -> bool:
    return any(len({vote.annotator for vote in r.votes if vote.annotator}) > 1 for r in records)


def _crowd(records: Sequence[PreferenceRecord], names: Sequence[str]) -> CrowdBradleyTerry | None:
    """Crowd-BT on the votes whose annotators are known; equal replies to one prompt are one thing. None where
    the average thing stands in fewer than two pairs."""
    things: dict[str, int] = {}

    def thing(prompt: object, reply: object) -> int:
        return things.setdefault(json.dumps([prompt, reply]), len(things))

    index_of = {name: a for a, name in enumerate(names)}
    rows: list[tuple[int, int, int, float]] = []
    pairs = 0
    for record in records:
        named = [vote for vote in record.votes if vote.annotator]
        if not named:
            continue
        pairs += 1
        chosen, rejected = thing(record.prompt, record.chosen), thing(record.prompt, record.rejected)
        for vote in named:
            share = {"chosen": 1.0, "tie": 0.5, "rejected": 0.0}[vote.choice]
            if share > 0:
                rows.append((chosen, rejected, index_of[vote.annotator], share))
            if share < 1:
                rows.append((rejected, chosen, index_of[vote.annotator], 1 - share))
    if len(things) > pairs:
        return None
    winner, loser, who, weight = (np.array(column) for column in zip(*rows))
    return crowd_bradley_terry(winner, loser, who, weight=weight, items=len(things), annotators=len(names))
