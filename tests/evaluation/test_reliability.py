"""Annotators' reliability: against crowd-kit, slow reference implementations, and worlds where the truth is
known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas
import pytest
from crowdkit.aggregation import DawidSkene as DawidSkeneOfCrowdKit
from scipy.optimize import minimize

from keel.data.records import parse
from keel.evaluation.annotators import Votes, of_pairs, of_table
from keel.evaluation.reliability import crowd_bradley_terry, dawid_skene, labels, of_annotators
from keel.types import PreferenceRecord, Vote
from keel.worlds import helpdesk

PEOPLE = "abcdef"


def crowd(seed: int, items: int = 80) -> tuple[list[list[int | None]], np.ndarray[Any, Any]]:
    """Votes of six people who are right with these probabilities, and the truth; four votes in ten are
    missing."""
    rng = np.random.default_rng(seed)
    right = np.array([0.95, 0.9, 0.8, 0.7, 0.5, 0.34])
    truth = rng.choice(3, items, p=[0.5, 0.2, 0.3])
    said = np.where(
        rng.random((items, 6)) < right, truth[:, None], (truth[:, None] + rng.integers(1, 3, (items, 6))) % 3
    )
    rows = [[None if rng.random() < 0.4 else int(vote) for vote in row] for row in said]
    return [row if any(v is not None for v in row) else [0, *row[1:]] for row in rows], truth


def slow_dawid_skene(votes: Votes, rounds: int, smoothing: float) -> tuple[Any, Any, Any]:
    """The paper's two steps with loops and plain probabilities, as little like the tested code as can be."""
    triples = list(zip(votes.item.tolist(), votes.annotator.tolist(), votes.choice.tolist()))
    n, a, k = votes.items, len(votes.names), votes.categories
    z = [[0.0] * k for _ in range(n)]
    for i, _, c in triples:
        z[i][c] += 1 / sum(j == i for j, _, _ in triples)

    def maximised() -> tuple[list[float], list[list[list[float]]]]:
        prior = [sum(z[i][t] for i in range(n)) / n for t in range(k)]
        said = [[[smoothing] * k for _ in range(k)] for _ in range(a)]
        for i, who, c in triples:
            for t in range(k):
                said[who][t][c] += z[i][t]
        return prior, [[[x / sum(row) for x in row] for row in one] for one in said]

    prior, confusion = maximised()
    for _ in range(rounds):
        for i in range(n):
            joint = [
                prior[t] * math.prod(confusion[w][t][c] for j, w, c in triples if j == i) for t in range(k)
            ]
            z[i] = [x / sum(joint) for x in joint]
        prior, confusion = maximised()
    return z, prior, confusion


@pytest.mark.parametrize("smoothing", [0.5, 2.0])
def test_em_takes_the_papers_steps(smoothing: float) -> None:
    votes = of_table(crowd(1, 25)[0], 3, PEOPLE)
    found = dawid_skene(votes, smoothing=smoothing, tolerance=0.0, most=7)
    posterior, prior, confusion = slow_dawid_skene(votes, 7, smoothing)
    np.testing.assert_allclose(found.posterior, posterior, atol=1e-9)
    np.testing.assert_allclose(found.prior, prior, atol=1e-9)
    np.testing.assert_allclose(found.confusion, confusion, atol=1e-9)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its own, about pandas
def test_em_is_that_of_crowd_kit() -> None:
    rows, _ = crowd(0)
    found = dawid_skene(of_table(rows, 3, PEOPLE), tolerance=0.0, most=25)
    said = [(i, PEOPLE[a], v) for i, row in enumerate(rows) for a, v in enumerate(row) if v is not None]
    other = DawidSkeneOfCrowdKit(n_iter=25, tol=-math.inf).fit(
        pandas.DataFrame(said, columns=["task", "worker", "label"])
    )
    probabilities = other.probas_.sort_index()[[0, 1, 2]].to_numpy()
    np.testing.assert_allclose(found.posterior, probabilities, atol=1e-6)
    confusion = other.errors_.reindex(pandas.MultiIndex.from_product([list(PEOPLE), range(3)])).fillna(0)[
        [0, 1, 2]
    ]
    theirs = confusion.to_numpy().reshape(6, 3, 3).transpose(0, 2, 1)
    np.testing.assert_allclose(found.confusion, theirs, atol=1e-6)


def test_em_finds_truth_and_reliability_better_than_the_majority() -> None:
    rows, truth = crowd(0, 600)
    votes = of_table(rows, 3, PEOPLE)
    found = dawid_skene(votes)
    right = (found.posterior.argmax(axis=1) == truth).mean()
    majority = (votes.counts().argmax(axis=1) == truth).mean()
    assert right > majority + 0.03
    np.testing.assert_allclose(found.reliability, [0.95, 0.9, 0.8, 0.7, 0.5, 0.34], atol=0.06)


def test_an_item_without_votes_gets_the_prior_and_has_no_part_in_it() -> None:
    rows, _ = crowd(2, 40)
    with_, without = (dawid_skene(of_table(r, 3, PEOPLE)) for r in ([*rows, [None] * 6], rows))
    np.testing.assert_allclose(with_.prior, without.prior)
    np.testing.assert_allclose(with_.posterior[-1], with_.prior, atol=1e-5)


def comparisons(seed: int, items: int = 12, each: int = 400) -> tuple[Any, ...]:
    """Comparisons of a few things by people of known η: winner, loser, annotator; and the things' scores."""
    rng = np.random.default_rng(seed)
    scores, eta = rng.normal(0, 1.5, items), np.array([0.98, 0.9, 0.8, 0.65, 0.5, 0.2])
    i = rng.integers(0, items, each * 6)
    j = (i + rng.integers(1, items, each * 6)) % items
    who = np.repeat(np.arange(6), each)
    wins = rng.random(each * 6) < 1 / (1 + np.exp(scores[j] - scores[i]))
    wins ^= rng.random(each * 6) > eta[who]  # the unreliable say the opposite
    return np.where(wins, i, j), np.where(wins, j, i), who, scores, eta


def test_crowd_bt_is_the_penalised_maximum() -> None:
    """The same objective in loops, maximised by scipy without its gradient."""
    winner, loser, who, _, _ = comparisons(0, items=4, each=15)
    weight = np.tile([1.0, 0.5], 45)
    found = crowd_bradley_terry(winner, loser, who, weight=weight, items=4, annotators=6)

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    def loss(x: Any) -> float:
        s, eta = x[:4], [sigmoid(g) for g in x[4:]]
        total = 0.0
        for i, j, a, w in zip(winner, loser, who, weight):
            total += w * math.log(eta[a] * sigmoid(s[i] - s[j]) + (1 - eta[a]) * sigmoid(s[j] - s[i]))
        total += sum(0.5 * math.log(sigmoid(v) * sigmoid(-v)) for v in s)
        return -total - sum(math.log(e * (1 - e)) for e in eta)

    best = minimize(loss, [0.0] * 4 + [2.0] * 6, method="BFGS", options={"gtol": 1e-6})
    np.testing.assert_allclose(found.scores, best.x[:4], atol=1e-4)
    np.testing.assert_allclose(found.reliability, [sigmoid(g) for g in best.x[4:]], atol=1e-4)


def test_crowd_bt_finds_scores_and_reliability() -> None:
    winner, loser, who, scores, eta = comparisons(1)
    found = crowd_bradley_terry(winner, loser, who, items=12, annotators=6)
    np.testing.assert_allclose(found.reliability, eta, atol=0.1)
    assert np.corrcoef(found.scores, scores)[0, 1] > 0.95
    believed = crowd_bradley_terry(winner, loser, np.zeros_like(who), items=12, annotators=1)
    assert np.corrcoef(believed.scores, scores)[0, 1] < np.corrcoef(found.scores, scores)[0, 1]


# ---------------------------------------------------------------- pairs


@pytest.fixture(scope="module")
def pairs() -> list[PreferenceRecord]:
    rows = [parse(r, "preference", "w") for r in helpdesk.rows("comparisons", 1200, 0)]
    return [row for row in rows if isinstance(row, PreferenceRecord)]


def gold_difference(record: PreferenceRecord) -> float:
    asked: Any = record.prompt[-1]
    sides: Any = (record.chosen, record.rejected)
    totals = [helpdesk.gold(asked["content"], side[0]["content"], {})["total"] for side in sides]
    return totals[0] - totals[1]


def test_the_helpdesks_annotators_are_told_apart(pairs: list[PreferenceRecord]) -> None:
    """With the truth known: how often each names the better side, and what is estimated without it."""
    found = of_annotators(pairs)
    assert found is not None
    assert sum(one["votes"] for one in found.values()) == sum(len(r.votes) for r in pairs)
    points: dict[str, list[float]] = {name: [] for name in found}
    for record in pairs:
        if (difference := gold_difference(record)) != 0:
            better = "chosen" if difference > 0 else "rejected"
            for vote in record.votes:
                points[vote.annotator].append(0.5 if vote.choice == "tie" else float(vote.choice == better))
    true = [float(np.mean(points[name])) for name in found]
    estimated = [one["dawid_skene"] for one in found.values()]
    assert np.corrcoef(true, estimated)[0, 1] > 0.9
    assert min(found, key=lambda name: found[name]["dawid_skene"]) == "a12"  # reliability 0.1
    drawn = [helpdesk.RELIABILITIES[int(name[1:]) - 1] for name in found]
    assert np.corrcoef(drawn, estimated)[0, 1] > 0.8
    assert "bradley_terry" not in found["a1"]  # every reply stands in one pair


def test_labels_by_reliability_are_nearer_to_the_truth(pairs: list[PreferenceRecord]) -> None:
    differences = [gold_difference(record) for record in pairs]

    def wrong(kind: Any) -> float:
        found = labels(pairs, kind)
        return float(np.mean([(p - (d > 0)) ** 2 for p, d in zip(found, differences) if p is not None and d]))

    assert wrong("reliability") < wrong("soft") - 0.005
    assert wrong("reliability") < wrong("majority") - 0.005


def test_labels_do_not_depend_on_which_side_is_called_chosen(pairs: list[PreferenceRecord]) -> None:
    other: dict[str, Any] = {"chosen": "rejected", "rejected": "chosen", "tie": "tie"}
    turned = [
        PreferenceRecord(
            r.prompt,
            r.rejected,
            r.chosen,
            1 - (r.p_chosen or 0),
            None,
            tuple(Vote(v.annotator, other[v.choice]) for v in r.votes),
        )
        if i % 3
        else r
        for i, r in enumerate(pairs)
    ]
    for i, (one, two) in enumerate(zip(labels(pairs, "reliability"), labels(turned, "reliability"))):
        assert one == pytest.approx(1 - (two or 0) if i % 3 else two, abs=1e-5)
    ours, theirs = of_annotators(pairs), of_annotators(turned)
    assert ours is not None
    assert theirs is not None
    assert all(ours[name] == pytest.approx(theirs[name], abs=1e-5) for name in ours)


def record(p: float | None, *votes: tuple[str, Any]) -> PreferenceRecord:
    return PreferenceRecord("q", "a", "b", p_chosen=p, votes=tuple(Vote(*vote) for vote in votes))


def test_soft_and_majority_labels() -> None:
    records = [record(p) for p in (None, 0.75, 0.5, 0.25, 1.0)]
    assert labels(records, "soft") == [None, 0.75, 0.5, 0.25, 1.0]
    assert labels(records, "majority") == [None, 1.0, 0.5, 0.0, 1.0]


def test_pairs_without_named_votes_keep_their_share() -> None:
    known = [record(0.5, ("a", "chosen"), ("b", "rejected"))] + [
        record(1.0, ("a", "chosen"), ("c", "chosen"))
    ] * 9
    found = labels(
        [*known, record(0.3), record(None), record(0.5, ("", "chosen"), ("", "rejected"))], "reliability"
    )
    assert found[-3:] == [0.3, None, 0.5]
    assert found[0] is not None
    assert found[0] > 0.6  # a agrees with c elsewhere, b with nobody


@pytest.mark.parametrize(
    "votes", [(), (("", "chosen"), ("", "tie")), (("a", "chosen"),), (("a", "chosen"), ("a", "tie"))]
)
def test_without_two_named_annotators_nothing_can_be_estimated(votes: Any) -> None:
    assert of_annotators([record(0.5, *votes)] * 3) is None
    with pytest.raises(ValueError, match="two annotators who are named"):
        labels([record(0.5, *votes)] * 3, "reliability")


def test_replies_that_stand_in_many_pairs_are_ranked_too() -> None:
    def compared(a: int, b: int, *choices: Any) -> PreferenceRecord:
        votes = tuple(Vote(who, choice) for who, choice in zip("xyz", choices))
        return PreferenceRecord("q", f"r{a}", f"r{b}", p_chosen=0.5, votes=votes)

    rows = [compared(a, b, "chosen", "chosen", "rejected") for a in range(4) for b in range(a + 1, 4)]
    found = of_annotators(rows)
    assert found is not None
    assert found["x"]["bradley_terry"] > 0.7 > 0.4 > found["z"]["bradley_terry"]
    votes = of_pairs(rows, named=True)
    assert len(votes.item) == 2 * 18
