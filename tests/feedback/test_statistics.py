"""What the votes of a project say, on votes whose makers are known."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from keel.feedback import statistics
from keel.votes.kinds import Answer, Project, Reply, Scale, VoteRow

PAIRS = Project("pairs")


def vote(item: int, person: str, answer: Answer, **more: Any) -> VoteRow:
    replies = more.pop("replies", [Reply("one reply", "old"), Reply("another", "new")])
    given: dict[str, Any] = {
        "key": str(item), "is_model": False, "shown": (0, 1), "seconds": 5.0, "at": float(item),
        "counted": True, "how": "random", "version": 1, "prompt": "?", "columns": {}, "gold": None, **more,
    }  # fmt: skip
    return VoteRow(item=item, person=person, answer=answer, replies=replies, **given)


def crowd(
    reliabilities: Sequence[float], items: int, votes: int, seed: int = 0, first_side: float = 0.0
) -> list[VoteRow]:
    """Each item's better reply is drawn, and annotator k names it with the k-th probability; with that of
    `first_side` it says instead what stands first."""
    rng = np.random.default_rng(seed)
    rows: list[VoteRow] = []
    for item in range(items):
        better = int(rng.integers(2))
        for who in rng.choice(len(reliabilities), votes, replace=False):
            shown = (0, 1) if rng.random() < 0.5 else (1, 0)
            named = better if rng.random() < reliabilities[who] else 1 - better
            named = shown[0] if rng.random() < first_side else named
            rows.append(vote(item, f"p{who:02}", Answer(choice="ab"[named]), shown=shown))
    return rows


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


def alpha_of(rows: Sequence[VoteRow]) -> dict[str, Any]:
    found = statistics.agreement(rows, PAIRS)
    assert found is not None
    return found["choice"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_annotators_of_known_reliability_are_ranked_rightly(seed: int) -> None:
    known = [0.97, 0.92, 0.87, 0.82, 0.77, 0.72, 0.67, 0.62, 0.57, 0.5]
    table = statistics.of_votes(crowd(known, 500, 5, seed), PAIRS)["people"]
    found = {person["name"]: person["reliability"] for person in table}
    assert spearman(known, [found[f"p{k:02}"] for k in range(len(known))]) > 0.9
    assert [p["name"] for p in table] == sorted(found, key=lambda name: -found[name])


def test_a_model_is_measured_against_people_and_moves_none_of_their_numbers() -> None:
    people = crowd([0.95] * 4, 100, 3)
    truth = {row.item: row.answer.choice for row in people}
    against = [
        vote(item, "llm", Answer(choice="b" if choice == "a" else "a"), is_model=True)
        for item, choice in truth.items()
    ]
    alone = statistics.of_votes(people, PAIRS)
    both = statistics.of_votes([*people, *against], PAIRS)
    model = both["people"][-1]
    assert model["name"] == "llm"
    assert model["is_model"]
    assert model["reliability"] < 0.2
    assert [p for p in both["people"] if not p["is_model"]] == alone["people"]
    for name in ("agreement", "sides", "length", "order", "drift"):
        assert both[name] == alone[name]
    assert both["counts"]["by_models"] == len(against)


def test_alpha_is_one_where_all_agree_and_its_interval_holds_what_many_votes_say() -> None:
    same = [vote(item, who, Answer(choice="ab"[item % 2])) for item in range(20) for who in ("kim", "lee")]
    found = alpha_of(same)
    assert found["mean"] == found["low"] == found["high"] == 1.0
    assert found["n"] == 20
    true = (2 * 0.8 - 1) ** 2  # two who are right in 80 % of the cases agree in 68 %, by chance in half
    inside = 0
    for seed in range(30):
        alpha = alpha_of(crowd([0.8] * 6, 80, 2, seed))
        inside += alpha["low"] <= true <= alpha["high"]
    assert inside >= 24  # of 30 it should be 28 or 29; fewer than 24 happens once in a thousand times


def test_sides_are_symmetric_without_a_bias_and_a_bias_is_found() -> None:
    fair = statistics.of_votes(crowd([0.8] * 6, 400, 3), PAIRS)["sides"]
    assert fair["low"] < 0.5 < fair["high"]
    biased = statistics.of_votes(crowd([0.8] * 6, 400, 3, first_side=0.3), PAIRS)
    assert biased["sides"]["low"] > 0.55
    assert biased["sides"]["mean"] == pytest.approx(0.65, abs=0.04)
    assert all(p["first_side"]["mean"] > 0.5 for p in biased["people"])


def test_votes_on_one_item_are_worth_less_than_on_as_many() -> None:
    """Ten people who all say the same of each item are one vote."""
    rng = np.random.default_rng(0)
    rows: list[VoteRow] = []
    for item in range(30):
        choice = Answer(choice="ab"[int(rng.integers(2))])
        rows += [vote(item, f"p{k}", choice) for k in range(10)]
    found = statistics.of_votes(rows, PAIRS)["sides"]
    assert found["n"] == 300
    assert found["high"] - found["low"] > 0.25


def test_longer_replies_that_are_preferred_are_seen() -> None:
    rng = np.random.default_rng(0)
    rows: list[VoteRow] = []
    for item in range(300):
        sizes = [int(size) for size in rng.integers(20, 400, 2)]
        odds = math.log(sizes[0] / sizes[1])  # slope 1
        choice = "a" if rng.random() < 1 / (1 + math.exp(-odds)) else "b"
        rows.append(vote(item, "kim", Answer(choice=choice), replies=[Reply("x" * n) for n in sizes]))
    found = statistics.of_votes(rows, PAIRS)["length"]
    assert found["longer"]["low"] > 0.55
    assert found["slope"]["low"] < 1 < found["slope"]["high"]
    assert found["slope"]["low"] > 0.5


def test_a_drift_is_seen_and_none_where_there_is_none() -> None:
    rows = crowd([0.9] * 5, 300, 3)
    steady = statistics.of_votes(rows, PAIRS)["drift"]
    assert len(steady["windows"]) == statistics.WINDOWS
    assert steady["change"]["agrees"]["low"] < 0 < steady["change"]["agrees"]["high"]
    # towards the end they answer at random, and fast
    rng = np.random.default_rng(1)
    tired = [
        vote(row.item, row.person, Answer(choice="ab"[int(rng.integers(2))]), shown=row.shown, seconds=1.0)
        if row.item > 200
        else row
        for row in rows
    ]
    change = statistics.of_votes(tired, PAIRS)["drift"]["change"]
    assert change["agrees"]["high"] < 0
    assert change["seconds"]["high"] < 0


def test_gold_items_count_for_people_alone() -> None:
    gold = [
        vote(item, who, Answer(choice=choice), gold=Answer(choice="a"))
        for item in range(10)
        for who, choice in (("kim", "a"), ("lee", "b" if item < 4 else "a"))
    ]
    found = statistics.of_votes(gold, PAIRS)
    assert {p["name"]: p["gold"]["mean"] for p in found["people"]} == {"kim": 1.0, "lee": 0.6}
    assert found["gold"]["mean"] == 0.8
    assert found["agreement"] is None
    assert found["order"] is None


def test_the_order_of_sources_and_the_votes_until_it_changes() -> None:
    """Of 100 votes 60 are for the new model: about as many more as would make it clear, and 21 for the old
    one change it."""
    rows = [vote(item, "kim", Answer(choice="b" if item < 60 else "a")) for item in range(100)]
    found = statistics.of_votes(rows, PAIRS)["order"]
    assert [entry["name"] for entry in found["ranked"]] == ["new", "old"]
    assert found["ranked"][0]["wins"] == 0.6
    pair = found["neighbours"][0]
    assert pair["difference"]["mean"] == pytest.approx(math.log(60 / 40), abs=0.02)
    assert found["until_changed"] == 21
    # se of a log-odds of 100 votes is 1/√24, so that it takes n with 1.96/√(0.24·n) < 0.405
    needed = pair["until_clear"] + 100
    assert pair["until_clear"] == found["until_clear"]
    assert needed == pytest.approx(1.96**2 / 0.24 / 0.405**2, abs=8)
    assert 0.95 < pair["sure"] < 0.99


def test_as_many_further_votes_as_it_says_make_the_order_clear() -> None:
    rng = np.random.default_rng(3)
    pool = [vote(item, "kim", Answer(choice="b" if rng.random() < 0.58 else "a")) for item in range(6000)]
    clear: list[bool] = []
    for start in range(0, 5000, 500):
        first = pool[start : start + 100]
        more = statistics.of_votes(first, PAIRS)["order"]["until_clear"]
        if more is not None and 0 < more < 800:
            later = statistics.of_votes(pool[start : start + 100 + more], PAIRS)["order"]
            clear.append(later["until_clear"] == 0)
    assert clear
    assert sum(clear) >= len(clear) * 0.3


def test_rankings_are_pairs_and_ratings_have_a_scale_each() -> None:
    replies = [Reply(f"reply {k}", name) for k, name in enumerate(("a", "b", "c"))]
    ranked = [
        vote(item, who, Answer(ranking=[[2], [0, 1]]), replies=replies, shown=(2, 1, 0))
        for item in range(12)
        for who in ("kim", "lee")
    ]
    found = statistics.of_votes(ranked, Project("ranks", task="ranking"))
    assert found["agreement"]["choice"]["mean"] == 1.0
    assert found["order"]["ranked"][0]["name"] == "c"
    assert found["sides"]["mean"] == 1.0
    rng = np.random.default_rng(0)
    project = Project("rates", task="rating", scales=(Scale("helpful"), Scale("honest", 0, 10)))
    rated: list[VoteRow] = []
    for item in range(60):
        truth = int(rng.integers(1, 6))
        for who, noise in (("kim", 0), ("lee", 0), ("max", 4)):
            value = int(np.clip(truth + rng.integers(-noise, noise + 1), 1, 5))
            answer = Answer(ratings={"helpful": value, "honest": 2 * value})
            rated.append(vote(item, who, answer, replies=[Reply("reply", "ppo")]))
    found = statistics.of_votes(rated, project)
    assert set(found["agreement"]) == {"helpful", "honest"}
    assert found["people"][-1]["name"] == "max"
    assert found["people"][0]["reliability"] > 0.7
    assert found["scales"]["honest"]["ppo"]["mean"] == 2 * found["scales"]["helpful"]["ppo"]["mean"]


@pytest.mark.parametrize("task", ["pairwise", "rating", "ranking", "edit", "thumbs"])
def test_no_votes_and_one_vote_say_nothing(task: Any) -> None:
    project = Project("few", task=task, scales=(Scale("helpful"),))
    one = {
        "pairwise": Answer(choice="a"), "rating": Answer(ratings={"helpful": 3}),
        "thumbs": Answer(choice="up"), "ranking": Answer(ranking=[[0], [1]]), "edit": Answer(text="better"),
    }[task]  # fmt: skip
    for rows in ([], [vote(0, "kim", one, seconds=None)], [vote(0, "kim", Answer(choice="cannot_judge"))]):
        found = statistics.of_votes(rows, project)
        assert found["agreement"] is None
        assert found["drift"] is None
        json.dumps(found, allow_nan=False)
        assert found["counts"]["votes"] == len(rows)


def test_every_number_is_json() -> None:
    json.dumps(statistics.of_votes(crowd([0.9, 0.7, 0.6], 60, 2), PAIRS), allow_nan=False)
