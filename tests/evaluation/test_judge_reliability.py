"""A judge's reliability against people's votes: by hand, of known truth, and on the help desk."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from keel.evaluation.judge_reliability import FEWEST, against_people, people_posterior, weighed
from keel.types import PreferenceRecord, Vote
from keel.worlds import helpdesk


def of(choices: list[list[str]]) -> list[PreferenceRecord]:
    names = ("kim", "lee", "ann", "bob")
    return [
        PreferenceRecord("", "", "", votes=tuple(Vote(who, c) for who, c in zip(names, one)))  # pyright: ignore[reportArgumentType]
        for one in choices
    ]


def test_where_people_are_certain_the_share_of_agreement_is_the_reliability() -> None:
    """40 pairs, the truth known; the judge is right on 30: with one added to each cell of the symmetric
    counts (of 40 in a category 30 right, 10 wrong, no tie), (31 + ½)/43."""
    truth = np.array([2] * 20 + [0] * 20)
    posterior = np.eye(3)[truth]
    said = [2] * 15 + [0] * 5 + [0] * 15 + [2] * 5
    found = against_people(posterior, said)
    assert found.right_side["mean"] == pytest.approx(31.5 / 43)
    assert found.right_side["n"] == 40
    assert found.counts


def test_which_side_is_called_chosen_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    posterior = rng.dirichlet(np.ones(3), 60)
    said = rng.integers(0, 3, 60).tolist()
    turn = rng.random(60) < 0.5
    turned = np.where(turn[:, None], posterior[:, ::-1], posterior)
    other = [2 - choice if t else choice for choice, t in zip(said, turn)]
    one, two = against_people(posterior, said), against_people(turned, other)
    np.testing.assert_allclose(one.confusion, two.confusion, atol=1e-9)
    assert one.right_side["mean"] == pytest.approx(two.right_side["mean"])


@pytest.mark.parametrize("reliability", [0.6, 0.8, 0.95])
def test_a_known_reliability_is_found_where_people_err_themselves(reliability: float) -> None:
    """2,000 pairs, three people who are right with 0.85: with their posterior for the truth itself a judge of
    0.95 would look like one of 0.88."""
    rng = np.random.default_rng(3)
    truth = rng.random(2000) < 0.5
    right = rng.random((2000, 3)) < 0.85
    names = [["chosen" if t == r else "rejected" for r in row] for t, row in zip(truth, right)]
    posterior = people_posterior(of(names))
    told = np.where(rng.random(2000) < reliability, truth, ~truth)
    found = against_people(posterior, [2 if t else 0 for t in told])
    assert found.right_side["mean"] == pytest.approx(reliability, abs=0.03)
    assert found.right_side["low"] < found.right_side["mean"] < found.right_side["high"]


def test_judges_that_agree_cannot_outvote_people() -> None:
    """Nine judges say the same wrong thing on every pair, people the right one: their word counts against
    them, if at all."""
    posterior = people_posterior(of([["chosen"] * 3] * 15 + [["rejected"] * 3] * 15))
    found = against_people(posterior, [0] * 15 + [2] * 15)
    assert found.right_side["mean"] < 0.1
    assert not found.counts


def test_too_few_pairs_or_a_coin_do_not_count() -> None:
    sure = np.eye(3)[[2] * (FEWEST - 1)]
    assert not against_people(sure, [2] * (FEWEST - 1)).counts
    assert against_people(np.eye(3)[[2] * FEWEST], [2] * FEWEST).counts
    assert not against_people(np.eye(3)[[2, 0] * 50], [2, 2, 0, 0] * 25).counts
    assert not against_people(np.eye(3)[[2] * 100], [1] * 100).counts  # who always says tie
    nothing = against_people(np.zeros((0, 3)), [])
    assert (nothing.right_side["n"], nothing.counts) == (0, False)


def test_labels_by_hand() -> None:
    """People: 0.6 for chosen, 0.4 for rejected. A judge of 0.8 for it: 0.48 / (0.48 + 0.08); against it:
    0.12 / (0.12 + 0.32)."""
    judge: Any = against_people(
        np.eye(3)[[2] * 4000 + [0] * 4000], [2] * 3200 + [0] * 800 + [0] * 3200 + [2] * 800
    )
    assert judge.right_side["mean"] == pytest.approx(0.8, abs=1e-3)
    people = np.array([[0.4, 0.0, 0.6]] * 3)
    found = weighed(people, [(judge, [2, 0, None])])
    np.testing.assert_allclose(found, [0.48 / 0.56, 0.12 / 0.44, 0.6], atol=2e-3)
    np.testing.assert_allclose(weighed(np.array([[0.25, 0.5, 0.25]]), []), [0.5])


def test_a_reviewers_word_is_the_truth_and_pairs_without_votes_have_the_prior() -> None:
    records = [*of([["chosen"] * 3] * 6 + [["rejected"] * 3] * 3), PreferenceRecord("", "", "")]
    posterior = people_posterior(records, {0: 0.0})
    np.testing.assert_allclose(posterior[0], [1, 0, 0])
    assert posterior[1, 2] > 0.9
    assert posterior[9, 0] == pytest.approx(posterior[9, 2])  # sides mean nothing
    assert people_posterior([PreferenceRecord("", "", "")]).tolist() == [[1 / 3, 1 / 3, 1 / 3]]


@pytest.fixture(scope="module")
def compared() -> list[tuple[PreferenceRecord, int]]:
    """1,000 pairs of the help desk, one side of which is better by the gold reward: the votes of three to
    five annotators, who err and share a bias, and which side it is, 2 or 0."""
    found: list[tuple[PreferenceRecord, int]] = []
    for row in helpdesk.rows("comparisons", 4000, 5):
        prompt = row["prompt"][-1]["content"]
        chosen, rejected = (
            helpdesk.gold(prompt, row[side][-1]["content"], row)["total"] for side in ("chosen", "rejected")
        )
        if chosen != rejected:
            votes = tuple(Vote(vote["annotator"], vote["choice"]) for vote in row["votes"])
            found.append((PreferenceRecord("", "", "", votes=votes), 2 if chosen > rejected else 0))
        if len(found) == 1000:
            return found
    raise AssertionError("too few pairs")


@pytest.mark.parametrize("reliability", [0.7, 0.85])
def test_on_the_help_desk_a_judge_of_known_reliability_is_measured_within_three_points(
    reliability: float, compared: list[tuple[PreferenceRecord, int]]
) -> None:
    rng = random.Random(7)
    right = [rng.random() < reliability for _ in compared]
    said = [better if is_right else 2 - better for (_, better), is_right in zip(compared, right)]
    found = against_people(people_posterior([record for record, _ in compared]), said)
    assert found.right_side["n"] == 1000
    assert found.right_side["mean"] == pytest.approx(sum(right) / 1000, abs=0.03)
