"""Agreement of annotators, against arrays worked out by hand and other people's libraries."""

from __future__ import annotations

from typing import Any

import krippendorff
import numpy as np
import pytest
from statsmodels.stats.inter_rater import cohens_kappa
from statsmodels.stats.inter_rater import fleiss_kappa as fleiss_of_statsmodels

from keel.evaluation import annotators
from keel.evaluation.annotators import (
    agreement,
    cohen_kappa,
    fleiss_kappa,
    krippendorff_alpha,
    of_pairs,
    of_table,
    pairwise_kappa,
)
from keel.types import PreferenceRecord, Vote


def table(seed: int, items: int = 60, people: int = 5, missing: float = 0.3) -> list[list[int | None]]:
    """Votes that agree more than chance, some missing, in three categories."""
    rng = np.random.default_rng(seed)
    truth = rng.choice(3, items, p=[0.5, 0.2, 0.3])
    said = np.where(rng.random((items, people)) < 0.6, truth[:, None], rng.integers(0, 3, (items, people)))
    return [[None if rng.random() < missing else int(vote) for vote in row] for row in said]


def pair(*choices: tuple[str, str], name: str = "") -> PreferenceRecord:
    """A record with these (annotator, choice) as its votes."""
    points: dict[str, float] = {"chosen": 1.0, "tie": 0.5, "rejected": 0.0}
    share = sum(points[choice] for _, choice in choices) / len(choices) if choices else None
    votes: Any = tuple(Vote(who, choice) for who, choice in choices)  # type: ignore[arg-type]
    return PreferenceRecord(f"q{name}", f"a{name}", f"b{name}", p_chosen=share, votes=votes)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("level", ["nominal", "ordinal"])
def test_alpha_is_krippendorffs(level: Any, seed: int) -> None:
    rows = table(seed)
    mine = krippendorff_alpha(of_table(rows, 3, "abcde").counts(), level)
    data = [[np.nan if v is None else v for v in column] for column in zip(*rows)]
    other = krippendorff.alpha(reliability_data=data, level_of_measurement=level, value_domain=np.arange(3.0))
    assert mine == pytest.approx(other, abs=1e-6)
    assert 0.1 < other < 0.9


def test_alpha_of_krippendorffs_own_example() -> None:
    """Krippendorff (2011), "Computing Krippendorff's Alpha-Reliability", example C: nominal 0.743, ordinal
    0.815."""
    a = [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None]
    b = [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3]
    c = [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None]
    d = [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None]
    rows = [[None if v is None else v - 1 for v in row] for row in zip(a, b, c, d)]
    counts = of_table(rows, 5, "abcd").counts()
    assert krippendorff_alpha(counts) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(counts, "ordinal") == pytest.approx(0.815, abs=5e-4)


@pytest.mark.parametrize("seed", range(4))
def test_fleiss_is_that_of_statsmodels(seed: int) -> None:
    counts = of_table(table(seed, missing=0.0), 3, "abcde").counts()
    assert fleiss_kappa(counts) == pytest.approx(fleiss_of_statsmodels(counts), abs=1e-6)


def test_fleiss_with_other_numbers_of_votes_by_hand() -> None:
    # P of the items: 1, (4 + 1 − 3)/6 = 1/3; the lone vote is left out; shares 4/5 and 1/5
    expected = (2 / 3 - (0.64 + 0.04)) / (1 - (0.64 + 0.04))
    assert fleiss_kappa(np.array([[2, 0], [2, 1], [0, 1]])) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(4))
def test_cohen_is_that_of_statsmodels_for_every_two(seed: int) -> None:
    rows = table(seed)
    found = pairwise_kappa(of_table(rows, 3, "abcde"))
    assert len(found) == 10
    for (one, other), (kappa, n) in found.items():
        i, j = "abcde".index(one), "abcde".index(other)
        both = [(row[i], row[j]) for row in rows if row[i] is not None and row[j] is not None]
        crossed = np.zeros((3, 3))
        for a, b in both:
            crossed[a, b] += 1
        assert n == len(both)
        assert kappa == pytest.approx(cohens_kappa(crossed).kappa, abs=1e-6)


def test_nothing_but_one_category_is_no_agreement_and_no_crash() -> None:
    same = np.array([[3, 0], [2, 0]])
    assert krippendorff_alpha(same) is None
    assert fleiss_kappa(same) is None
    assert cohen_kappa([1, 1], [1, 1], 2) is None
    assert cohen_kappa([], [], 2) is None
    assert krippendorff_alpha(np.array([[1, 0], [0, 1]])) is None  # nobody voted twice
    assert fleiss_kappa(np.array([[1, 0], [0, 1]])) is None


def test_the_first_of_several_votes_of_one_annotator_counts() -> None:
    votes = annotators.Votes(
        np.array([0, 0, 0, 1, 1]), np.array([0, 0, 1, 0, 1]), np.array([0, 1, 0, 1, 1]), 2, 2, ("a", "b")
    )
    assert pairwise_kappa(votes) == {("a", "b"): (1.0, 2)}


def test_which_side_is_called_chosen_changes_no_statistic() -> None:
    """Sorting the sides by their votes, as data sets do, must not look like agreement."""
    rng = np.random.default_rng(3)
    choices = ("chosen", "rejected", "tie")
    plain = [
        pair(*((f"a{a}", str(rng.choice(choices, p=[0.45, 0.45, 0.1]))) for a in range(3)), name=str(i))
        for i in range(400)
    ]
    other = {"chosen": "rejected", "rejected": "chosen", "tie": "tie"}
    by_votes = [
        r
        if r.p_chosen is None or r.p_chosen >= 0.5
        else pair(*((v.annotator, other[v.choice]) for v in r.votes))
        for r in plain
    ]
    found, other_way = agreement(plain), agreement(by_votes)
    assert found is not None
    assert other_way is not None
    assert other_way["alpha"] == pytest.approx(found["alpha"])
    assert [other_way[name] for name in ("fleiss", "cohen")] == pytest.approx(
        [found["fleiss"], found["cohen"]]
    )
    assert abs(found["alpha"]["nominal"]) < 0.1  # they vote at random
    naive = krippendorff_alpha(of_pairs(by_votes).counts()[: len(by_votes)])
    assert naive is not None
    assert naive < -0.05  # as the sides stand, agreement by chance is overestimated


def test_agreement_of_pairs() -> None:
    records = [
        pair(("a", "chosen"), ("b", "chosen")),
        pair(("a", "chosen"), ("b", "rejected"), ("c", "tie")),
        pair(("", "chosen"), ("", "chosen")),
        pair(("a", "chosen")),
        pair(),
    ]
    found = agreement(records)
    assert found is not None
    assert (found["pairs"], found["votes"]) == (3, 7)
    assert found["unanimous"]["mean"] == pytest.approx(2 / 3)
    assert found["fleiss"] == fleiss_kappa(of_pairs(records[:3]).counts())
    kappas = pairwise_kappa(of_pairs(records[:2], named=True))
    known = [(k, n) for k, n in kappas.values() if k is not None]
    assert found["cohen"] == pytest.approx(sum(k * n for k, n in known) / sum(n for _, n in known))
    assert agreement(records[3:]) is None
    assert agreement([]) is None
