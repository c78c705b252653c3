"""Votes as rows for training: what the numbers of a project become, by hand."""

from __future__ import annotations

import pytest

from keel.data import records
from keel.votes.kinds import Answer, NewItem, PastJudgement, Project, Reply, Scale
from keel.votes.rows import TYPES, rows


@pytest.fixture
def ask(store):
    """Makes a project, brings in answers {item key: {person: answer}} and gives its rows."""

    def ask(items, said, project, words=None, **options):
        store.create_project(project, None)
        store.add_items(project.name, items, None)
        store.import_votes(
            project.name,
            [
                PastJudgement(key, person, answer, is_model=person.startswith("model"))
                for key, answers in said.items()
                for person, answer in answers.items()
            ],
            None,
        )
        admin = store.add_person("reviewer", "admin")
        for key, answer in (words or {}).items():
            store.adjudicate(project.name, admin.id, store.item_id(project.name, key), answer)
        found = list(rows(store, project.name, **options))
        kind = {"preference": "preference", "unpaired": "unpaired", "demonstration": "demonstration"}
        for row in found:  # each is a record that keel reads
            records.parse(row, kind[TYPES[project.task]], "here")
        return found

    return ask


def _pair(key, **more):
    return NewItem(key, "Why?", [Reply("left", "m1"), Reply("right", "m2")], **more)


def _votes(row, name="votes"):
    return {vote["annotator"]: vote["choice"] for vote in row[name]}


def test_what_more_people_prefer_is_chosen_and_every_vote_is_kept(ask):
    a, b, tie = Answer("a"), Answer("b"), Answer("tie")
    found = ask(
        [_pair(key, columns={"topic": key, "chosen": "no"}) for key in "pqrst"],
        {
            "p": {"Ann": b, "Bob": b, "Cem": a},
            "q": {"Ann": a, "Bob": b},
            "r": {"Ann": Answer("both_bad"), "Bob": a, "Cem": tie},
            "s": {"Ann": Answer("cannot_judge")},
        },
        Project("p", votes_per_item=3),
    )
    assert [(row["key"], row["chosen"], row["rejected"]) for row in found] == [
        ("p", "right", "left"), ("q", "left", "right"), ("r", "left", "right"),
    ]  # fmt: skip
    assert _votes(found[0]) == {"Ann": "chosen", "Bob": "chosen", "Cem": "rejected"}
    assert _votes(found[1]) == {"Ann": "chosen", "Bob": "rejected"}
    assert _votes(found[2]) == {"Ann": "tie", "Bob": "chosen", "Cem": "tie"}
    assert found[0]["topic"] == "p"
    assert "m1" not in str(found)


def test_strength_points_to_the_chosen_side(ask):
    said = {
        "p": {"Ann": Answer("b", strength=3), "Bob": Answer("b", strength=2), "Cem": Answer("a", strength=1)}
    }
    (row,) = ask([_pair("p")], said, Project("p", votes_per_item=3, strength=True))
    assert row["strength"] == pytest.approx((3 + 2 - 1) / 3)


def test_surplus_gold_and_models_are_left_out_unless_asked_for(ask, store):
    a, b = Answer("a"), Answer("b")
    said = {"p": {"Ann": a, "Bob": b, "Cem": b, "model-x": b}, "g": {"Ann": a}}
    (row,) = ask([_pair("p"), _pair("g", gold=a)], said, Project("p"))
    assert _votes(row) == {"Ann": "chosen"}
    (row,) = rows(store, "p", surplus=True)
    assert _votes(row) == {"Ann": "rejected", "Bob": "chosen", "Cem": "chosen"}
    (row,) = rows(store, "p", models=True)
    assert row["votes"] == [
        {"annotator": "Ann", "choice": "chosen"},
        {"annotator": "model-x", "choice": "rejected", "is_model": True},
    ]


def test_a_reviewers_word_is_the_label_and_the_votes_stay_beside_it(ask, store):
    said = {"p": {"Ann": Answer("a"), "Bob": Answer("a")}, "q": {"Ann": Answer("a")}}
    words = {"p": Answer("b"), "q": Answer("tie")}
    first, second = ask([_pair("p"), _pair("q")], said, Project("p", votes_per_item=2), words)
    assert (first["chosen"], first["p_chosen"], first["adjudicated"]) == ("right", 1.0, "chosen")
    assert _votes(first, "people_votes") == {"Ann": "rejected", "Bob": "rejected"}
    assert "votes" not in first
    assert (second["p_chosen"], second["adjudicated"]) == (0.5, "tie")
    first, _ = rows(store, "p", adjudicated="beside")
    assert (first["chosen"], first["adjudicated"]) == ("left", "rejected")
    assert _votes(first) == {"Ann": "chosen", "Bob": "chosen"}


def test_turns_and_texts_become_conversations_together(ask):
    turns = [{"role": "user", "content": "Why?"}]
    reply = [{"role": "assistant", "content": "left"}]
    items = [
        NewItem("both", turns, [Reply(reply), Reply("right")]),
        NewItem("reply", "Why?", [Reply(reply), Reply("right")]),
        NewItem("prompt", turns, [Reply("left"), Reply("right")]),
    ]
    found = ask(items, {item.key: {"Ann": Answer("a")} for item in items}, Project("p"))
    expected = (turns, reply, [{"role": "assistant", "content": "right"}])
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in found] == [expected] * 3


def test_a_ranking_is_a_row_for_each_two_replies(ask):
    item = NewItem("k", "Why?", [Reply(text) for text in "xyz"])
    said = {"k": {"Ann": Answer(ranking=[[2], [0, 1]]), "Bob": Answer(ranking=[[2], [1], [0]])}}
    found = ask([item], said, Project("p", task="ranking", votes_per_item=2))
    assert [(row["chosen"], row["rejected"], *_votes(row).values()) for row in found] == [
        ("y", "x", "tie", "chosen"), ("z", "x", "chosen", "chosen"), ("z", "y", "chosen", "chosen"),
    ]  # fmt: skip


def test_ratings_and_thumbs_are_labels_of_single_replies(ask):
    scales = (Scale("good", 1, 5), Scale("kind", 0, 10))
    items = [NewItem(key, "Why?", [Reply(f"reply {key}")]) for key in "pqr"]
    said = {
        "p": {"Ann": Answer(ratings={"good": 5, "kind": 6}), "Bob": Answer(ratings={"good": 4, "kind": 8})},
        "q": {"Ann": Answer(ratings={"good": 1, "kind": 1})},
        "r": {"Ann": Answer(ratings={"good": 3, "kind": 5})},  # exactly the middle: no label
    }
    found = ask(items, said, Project("p", task="rating", scales=scales, votes_per_item=2))
    assert [(row["completion"], row["label"]) for row in found] == [("reply p", True), ("reply q", False)]
    assert found[0]["ratings"] == {"good": 4.5, "kind": 7.0}
    assert found[0]["score"] == pytest.approx((3.5 / 4 + 0.7) / 2)


def test_thumbs_are_what_most_say(ask):
    items = [NewItem(key, "Why?", [Reply(f"reply {key}")]) for key in "pqr"]
    up, down = Answer("up"), Answer("down")
    said = {
        "p": {"Ann": up, "Bob": up, "Cem": down}, "q": {"Ann": down, "Bob": Answer("cannot_judge")},
        "r": {"Ann": up, "Bob": down},
    }  # fmt: skip
    found = ask(items, said, Project("p", task="thumbs", votes_per_item=3))
    assert [(row["completion"], row["label"]) for row in found] == [("reply p", True), ("reply q", False)]
    assert _votes(found[0], "people_votes") == {"Ann": "up", "Bob": "up", "Cem": "down"}


def test_an_edit_is_a_demonstration(ask):
    item = NewItem("k", "Why?", [Reply("draft")])
    said = {"k": {"Ann": Answer(text="better"), "Bob": Answer(text="best"), "Cem": Answer(text="best")}}
    found = ask([item], said, Project("p", task="edit", votes_per_item=3))
    assert [(row["prompt"], row["completion"]) for row in found] == [("Why?", "better"), ("Why?", "best")]
