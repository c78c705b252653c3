"""Items and votes in other tools' shapes: each that is written is read back equal, and what the tools
themselves write is read as they mean it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from keel.data.load import load
from keel.errors import DataError, UsageError
from keel.feedback import formats
from keel.feedback.formats import Labels, as_task, label_studio
from keel.feedback.formats.base import item_json, vote_json
from keel.types import DataSource, PreferenceRecord
from keel.votes.kinds import Answer, NewItem, PastJudgement, Project, Reply, Scale, Task

CHAT = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "héllo\n\nwörld 你好"}]


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


def judged(key: str, person: str, answer: Answer, shown: tuple[int, ...] | None = None) -> PastJudgement:
    return PastJudgement(key, person, answer, 1_700_000_000.123456, 7.25, shown, person == "llm")


def of_task(task: Task) -> Labels:
    """Votes of every sort on items of every sort."""
    plain = ['one reply, with "quotes" and a\nline', "another <b>reply</b>"]
    replies = {
        "pairwise": [
            [Reply(t, s) for t, s in zip(plain, ("sft", "ppo"), strict=True)],
            [Reply(said(t)) for t in plain],
        ],
        "ranking": [
            [Reply(t, "sft") for t in (*plain, "a third")],
            [Reply(said(t)) for t in (*plain, "last")],
        ],
    }.get(task, [[Reply(plain[0], "sft")], [Reply(said(plain[1]))]])
    items = [
        NewItem("one", "What is it?", replies[0], {"topic": "things", "level": 3}),
        NewItem("two", CHAT, replies[1], {"topic": "greetings"}, None, 0.5),
        NewItem("three", "Which?", replies[0]),
    ]
    answers: dict[Task, list[Answer]] = {
        "pairwise": [
            Answer(choice="b", strength=2, comment="why: “so”"),
            Answer(choice="both_bad"),
            Answer(choice="b"),
            Answer(choice="a", strength=1),
            Answer(choice="cannot_judge"),
            Answer(choice="tie"),
        ],
        "thumbs": [
            Answer(choice="up"),
            Answer(choice="up", comment="good"),
            Answer(choice="down"),
            Answer(choice="down"),
            Answer(choice="cannot_judge"),
            Answer(choice="down"),
        ],
        "rating": [
            Answer(ratings={"helpful": n, "honest": 6 - n}, comment="c" * (n == 2))
            for n in (1, 2, 3, 4, 5, 5)
        ],
        "ranking": [
            Answer(ranking=[[2], [0, 1]]),
            Answer(ranking=[[0], [1], [2]], comment="close"),
            Answer(ranking=[[0, 1, 2]]),
            Answer(ranking=[[1], [2], [0]]),
            Answer(ranking=[[2], [1], [0]]),
            Answer(ranking=[[1, 2], [0]]),
        ],
        "edit": [Answer(text=f"better {n}\nand 'longer'", comment="x" * (n % 2)) for n in range(6)],
    }
    where = [("one", "kim"), ("one", "llm"), ("one", "lee"), ("two", "kim"), ("two", "lee"), ("three", "kim")]
    votes = [
        judged(key, who, answer, tuple(range(len(replies[0])))[:: -1 if who == "lee" else 1])
        for (key, who), answer in zip(where, answers[task], strict=True)
    ]
    return Labels(task, items, votes)


def plainly(labels: Labels) -> dict[str, Any]:
    """Labels as JSON, whatever the order."""
    votes = sorted(json.dumps({"key": v.key, **vote_json(v)}, sort_keys=True) for v in labels.votes)
    items = sorted(json.dumps(item_json(item), sort_keys=True) for item in labels.items)
    return {"task": labels.task, "items": items, "votes": votes, "words": dict(labels.adjudicated)}


TASKS: tuple[Task, ...] = ("pairwise", "rating", "ranking", "edit", "thumbs")
TRAINING = (
    ("pairwise", "preference"),
    ("thumbs", "unpaired"),
    ("ranking", "ranked"),
    ("edit", "demonstration"),
    ("rating", "ratings"),
)
LOSSLESS = [
    *((task, "keel", suffix) for task in TASKS for suffix in formats.SUFFIXES),
    *((task, name, ".json") for task in TASKS for name in ("label_studio", "argilla")),
    *((task, name, suffix) for task, name in TRAINING for suffix in (".jsonl", ".csv", ".parquet")),
]


@pytest.mark.parametrize(("task", "name", "suffix"), LOSSLESS)
def test_what_is_written_is_read_back_equal(task: Any, name: str, suffix: str, tmp_path: Path) -> None:
    labels, path = of_task(task), tmp_path / f"labels{suffix}"
    items = labels.items
    if suffix == ".csv":  # a table has text in its cells, and 3 would be read as "3"
        items = [NewItem(i.key, i.prompt, i.replies) for i in items]
    if suffix == ".parquet":  # a column is of one type: texts or conversations
        items = [NewItem(i.key, CHAT, items[1].replies, i.columns, i.gold, i.priority) for i in items]
    labels = Labels(task, items, labels.votes)
    formats.write(labels, path, name)
    found = formats.read(path)
    assert not found.notes
    assert plainly(found) == plainly(labels)
    again = tmp_path / f"again{suffix}"
    formats.write(found, again, name)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("task", "name"), [("pairwise", "preference"), ("pairwise", "keel"), ("ranking", "ranked")]
)
def test_a_reviewers_word_and_known_answers_go_along(task: Any, name: str, tmp_path: Path) -> None:
    labels = of_task(task)
    first, *others = labels.items
    gold = {"pairwise": Answer(choice="a"), "ranking": Answer(ranking=[[0], [1, 2]])}[task]
    items = [NewItem(first.key, first.prompt, first.replies, first.columns, gold), *others]
    words = {"one": ("max", labels.votes[0].answer, "clear"), "two": ("max", labels.votes[0].answer, "")}
    labels = Labels(task, items, labels.votes, (), words)
    formats.write(labels, tmp_path / "labels.jsonl", name)
    assert plainly(formats.read(tmp_path / "labels.jsonl")) == plainly(labels)


def test_preferences_are_rows_that_a_stage_trains_on(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    formats.write(of_task("pairwise"), path, "preference")
    records = load([DataSource(str(path))], ("preference",), 0).records
    one = next(r for r in records if isinstance(r, PreferenceRecord) and r.prompt == "What is it?")
    assert one.chosen == "another <b>reply</b>"
    assert [(vote.annotator, vote.choice) for vote in one.votes] == [
        ("kim", "chosen"),
        ("llm", "tie"),
        ("lee", "chosen"),
    ]
    assert one.p_chosen == pytest.approx(5 / 6)
    assert one.columns["topic"] == "things"


@pytest.mark.parametrize(
    ("task", "name", "kind", "rows"),
    [
        ("thumbs", "unpaired", "unpaired", 3),
        ("edit", "demonstration", "demonstration", 6),
        ("pairwise", "unpaired", "unpaired", 4),
        ("rating", "unpaired", "unpaired", 1),
        ("ranking", "ranked", "preference", 7),
    ],
)
def test_every_type_is_read_by_the_loader(task: Any, name: str, kind: Any, rows: int, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    labels = of_task(task)
    if task == "rating":  # the mean of both scales is 3 wherever one mirrors the other
        one = judged("one", "kim", Answer(ratings={"helpful": 5, "honest": 4}))
        labels = Labels("rating", labels.items, [one])
    formats.write(labels, path, name)
    assert len(load([DataSource(str(path))], (kind,), 0).records) == rows


def test_a_rating_is_a_thumb_by_its_own_scale() -> None:
    """4 is below the middle of 0 to 10, and would be above that of 1 to 5."""
    items = [NewItem(key, "p", [Reply(key)]) for key in ("four", "six", "middle")]
    votes = [
        judged(key, "kim", Answer(ratings={"clear": value}))
        for key, value in (("four", 4), ("six", 7), ("middle", 5))
    ]
    labels = Labels("rating", items, votes, scales=(Scale("clear", 0, 10),))
    rows = {row["completion"]: row["label"] for row in formats.rows_of(labels, "unpaired")}
    assert rows == {"four": False, "six": True}


@pytest.mark.parametrize("task", TASKS)
def test_through_the_database_everything_comes_back(task: Any, tmp_path: Path) -> None:
    pytest.importorskip("sqlalchemy")
    from keel.votes import open_store

    labels = of_task(task)
    more: dict[str, Any] = {
        "rating": {"scales": (Scale("helpful"), Scale("honest"))}, "pairwise": {"strength": True},
    }.get(task, {})  # fmt: skip
    with open_store(f"sqlite:///{tmp_path / 'label.db'}") as store:
        store.create_project(Project("there", task=task, **more), None)
        formats.into_project(store, "there", labels)
        formats.into_project(store, "there", labels)  # the same again changes nothing
        assert plainly(formats.of_project(store, "there")) == plainly(labels)
        formats.write(formats.of_project(store, "there"), tmp_path / "out.jsonl", "keel")
        assert plainly(formats.read(tmp_path / "out.jsonl")) == plainly(labels)


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "task", "replies", "sources"),
    [
        (
            {"prompt": "p", "a": "x", "b": "y", "model_a": "m", "model_b": "n"},
            "pairwise",
            ["x", "y"],
            ["m", "n"],
        ),
        ({"prompt": CHAT, "response_1": "x", "response_2": "y"}, "pairwise", ["x", "y"], [None, None]),
        (
            {"prompt": "p", "completions": ["x", "y", "z"], "models": ["m", "n", "o"]},
            "ranking",
            ["x", "y", "z"],
            ["m", "n", "o"],
        ),
        ({"prompt": "p", "replies": [{"content": "x", "source": "m"}]}, "rating", ["x"], ["m"]),
        ({"question": "p", "answer": "x", "model": "m"}, "rating", ["x"], ["m"]),
        ({"prompt": "p", "completion": "x"}, "edit", ["x"], [None]),
    ],
)
def test_rows_that_nobody_has_judged(
    row: Any, task: str, replies: list[str], sources: list[str | None], tmp_path: Path
) -> None:
    found = formats.read(write(tmp_path / "items.jsonl", [{**row, "topic": "t"}]))
    assert (found.task, found.votes) == (task, [])
    assert [reply.content for reply in found.items[0].replies] == replies
    assert [reply.source for reply in found.items[0].replies] == sources
    assert found.items[0].columns == {"topic": "t"}
    again = formats.read(write(tmp_path / "again.jsonl", [{**row, "topic": "t"}]))
    assert again.items[0].key == found.items[0].key


def test_the_chosen_side_is_not_always_the_first(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(200)]
    items = formats.read(write(tmp_path / "pairs.jsonl", rows)).items
    first = sum(str(item.replies[0].content).startswith("good") for item in items)
    assert 70 < first < 130


def test_known_data_sets_bring_their_votes(tmp_path: Path) -> None:
    rows = [
        {
            "instruction": "add",
            "input": f"{n}",
            "response1": "x",
            "response2": "y",
            "annotator1": 1,
            "annotator2": 2,
            "annotator3": 0,
        }
        for n in range(3)
    ]
    found = formats.read(write(tmp_path / "pandalm.jsonl", rows))
    assert found.task == "pairwise"
    votes = [v for v in found.votes if v.key == found.items[0].key]
    first = found.items[0].replies[0].content
    side = "a" if first == [{"role": "assistant", "content": "x"}] else "b"
    assert {v.person: v.answer.choice for v in votes} == {
        "annotator1": side,
        "annotator2": "b" if side == "a" else "a",
        "annotator3": "tie",
    }


def test_an_export_of_label_studios_own(tmp_path: Path) -> None:
    """As its page on export shows a project with the template "LLM Ranker" or "Pairwise"."""
    tasks = [
        {
            "id": 7,
            "data": {"prompt": "p", "answer1": "x", "answer2": "y", "topic": "t"},
            "annotations": [
                {
                    "id": 1,
                    "completed_by": {"id": 3, "email": "kim@example.org"},
                    "lead_time": 12.5,
                    "created_at": "2026-01-02T03:04:05.678901Z",
                    "was_cancelled": False,
                    "result": [
                        {
                            "from_name": "pw",
                            "to_name": "a,b",
                            "type": "pairwise",
                            "value": {"selected": "right"},
                        },
                        {
                            "from_name": "note",
                            "to_name": "a",
                            "type": "textarea",
                            "value": {"text": ["longer"]},
                        },
                    ],
                },
                {"id": 2, "completed_by": 4, "was_cancelled": True, "result": []},
                {
                    "id": 3,
                    "completed_by": 4,
                    "was_cancelled": False,
                    "result": [
                        {
                            "from_name": "c",
                            "to_name": "a",
                            "type": "choices",
                            "value": {"choices": ["Both bad"]},
                        }
                    ],
                },
            ],
            "predictions": [],
        }
    ]
    found = formats.read(write(tmp_path / "export.json", tasks))
    assert found.items[0].key == "7"
    assert [(v.person, v.answer.choice, v.answer.comment, v.seconds) for v in found.votes] == [
        ("kim@example.org", "b", "longer", 12.5),
        ("4", "both_bad", "", None),
    ]
    assert found.votes[0].at == pytest.approx(1767323045.678901)


def test_tables_and_records_of_argillas_own(tmp_path: Path) -> None:
    table = [
        {
            "prompt": "p",
            "response-1": "x",
            "response-2": "y",
            "preference.responses": ["response-2", "response-1", "tie"],
            "preference.responses.users": ["u1", "u2", "u3"],
            "preference.responses.status": ["submitted", "discarded", "submitted"],
            "_server_id": "q",
        }
    ]
    found = formats.read(write(tmp_path / "table.jsonl", table))
    assert {v.person: v.answer.choice for v in found.votes} == {"u1": "b", "u3": "tie"}
    records = [
        {
            "id": "r1",
            "fields": {"instruction": "p", "response-1": "x", "response-2": "y"},
            "metadata": {"topic": "t"},
            "suggestions": {},
            "vectors": {},
            "responses": {
                "ranking": [
                    {
                        "value": [{"value": "response-2", "rank": 1}, {"value": "response-1", "rank": 2}],
                        "user_id": "u1",
                    }
                ]
            },
        }
    ]
    found = formats.read(write(tmp_path / "records.json", records))
    assert (found.items[0].key, found.items[0].columns) == ("r1", {"topic": "t"})
    assert found.votes[0].answer == Answer(choice="b")


def test_a_folder_of_potatos(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "data_files: [data/items.json]\nitem_properties: {id_key: id, text_key: text}\n"
    )
    (tmp_path / "data").mkdir()
    write(
        tmp_path / "data" / "items.json",
        [{"id": "i1", "text": ["x", "y"], "prompt": "p"}, {"id": "i2", "text": ["v", "w"], "prompt": "q"}],
    )
    labels = {
        "kim": {
            "i1": [[{"schema": "better", "name": "selection"}, "B"]],
            "i2": [[{"schema": "better", "name": "scale_value"}, "-2"]],
        },
        "lee": {"i1": {"better": {"selection": "tie"}}},
    }
    for person, given in labels.items():
        folder = tmp_path / "annotation_output" / person
        folder.mkdir(parents=True)
        state = {"user_id": person, "instance_id_to_label_to_value": given}
        (folder / "user_state.json").write_text(json.dumps(state))
    found = formats.read(tmp_path)
    assert [item.prompt for item in found.items] == ["p", "q"]
    assert {(v.key, v.person): v.answer for v in found.votes} == {
        ("i1", "kim"): Answer(choice="b"),
        ("i2", "kim"): Answer(choice="a", strength=2),
        ("i1", "lee"): Answer(choice="tie"),
    }


def test_a_log_of_votes_like_the_arenas(tmp_path: Path) -> None:
    def talk(reply: str, rounds: int = 1) -> list[dict[str, str]]:
        return [{"role": "user", "content": "hi"}, {"role": "assistant", "content": reply}] * rounds

    rows = [
        {
            "question_id": "q1",
            "model_a": "m",
            "model_b": "n",
            "winner": "model_b",
            "judge": "arena_user_1",
            "conversation_a": talk("x"),
            "conversation_b": talk("y"),
            "turn": 1,
            "tstamp": 1682351591.1,
        },
        {
            "question_id": "q2",
            "model_a": "m",
            "model_b": "n",
            "winner": "tie (bothbad)",
            "judge": "arena_user_2",
            "conversation_a": talk("v"),
            "conversation_b": talk("w"),
            "turn": 1,
            "tstamp": 1682351592.1,
        },
        {
            "question_id": "q3",
            "model_a": "m",
            "model_b": "n",
            "winner": "model_a",
            "judge": "arena_user_2",
            "conversation_a": talk("v", 2),
            "conversation_b": talk("w", 2),
            "turn": 2,
            "tstamp": 1682351593.1,
        },
    ]
    found = formats.read(write(tmp_path / "arena.jsonl", rows))
    assert found.notes == ("1 votes on later rounds left out",)
    assert [(v.key, v.person, v.answer.choice) for v in found.votes] == [
        ("q1", "arena_user_1", "b"),
        ("q2", "arena_user_2", "both_bad"),
    ]
    assert [reply.source for reply in found.items[0].replies] == ["m", "n"]


@pytest.mark.parametrize("task", TASKS)
def test_label_studios_config_names_what_the_tasks_hold(task: Any) -> None:
    config = ElementTree.fromstring(label_studio.labelling_config(Project("p", task=task, strength=True)))
    names = {tag.get("name") for tag in config.iter() if tag.get("name")}
    fields = {str(tag.get("value"))[1:] for tag in config.iter() if str(tag.get("value", "")).startswith("$")}
    for row in formats.rows_of(of_task(task), "label_studio"):
        assert fields <= row["data"].keys()
        said = {result["from_name"] for annotation in row["annotations"] for result in annotation["result"]}
        assert said - {"honest"} <= names


def test_without_sources_nobody_can_tell_who_wrote_a_reply(tmp_path: Path) -> None:
    for name in ("label_studio", "argilla", "keel", "preference"):
        rows = list(formats.rows_of(of_task("pairwise"), name, sources=False))
        assert "ppo" not in json.dumps(rows)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "p", "a": "x", "b": " "}], r"items\.jsonl:1: \"b\" is empty"),
        ([{"prompt": "p", "a": "x"}], r"items\.jsonl:1: there are no replies to judge: it has prompt, a"),
        (
            [{"id": 1, "prompt": "p", "a": "x", "b": "y"}, {"id": 1, "prompt": "p", "a": "x", "b": "z"}],
            r"items\.jsonl:2: item '1' stands above with another prompt or other replies",
        ),
        (
            [{"prompt": "p", "a": "x", "b": "y"}, {"prompt": "p", "completions": ["x"]}],
            r"items\.jsonl:2: this row is for a rating task",
        ),
        ([], "holds no rows"),
        (
            [
                {
                    "id": 1,
                    "data": {"prompt": "p", "answer1": "x", "answer2": "y"},
                    "annotations": [{"result": [{"type": "pairwise", "value": {"selected": "up"}}]}],
                }
            ],
            r"items\.jsonl:1: \"selected\" is 'up', not left or right",
        ),
    ],
)
def test_a_bad_row_is_named(rows: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        formats.read(write(tmp_path / "items.jsonl", rows))


def test_a_bad_target_writes_nothing(tmp_path: Path) -> None:
    labels = of_task("pairwise")
    there = write(tmp_path / "there.jsonl", [{}])
    for path, name, message in (
        (there, "keel", "is there already"),
        (tmp_path / "x.txt", "keel", "must end in"),
        (tmp_path / "x.csv", "argilla", r"is written as \.json"),
        (tmp_path / "x.jsonl", "trl", "no format 'trl'"),
        (tmp_path / "no" / "x.jsonl", "keel", "no folder"),
        (
            tmp_path / "x.jsonl",
            "ranked",
            "a pairwise task makes no ranked rows; it makes preference, unpaired",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            formats.write(labels, path, name)
    with pytest.raises(UsageError, match="no item has votes"):
        formats.write(Labels("pairwise", labels.items), tmp_path / "x.jsonl", "preference")
    assert [path.name for path in tmp_path.iterdir()] == ["there.jsonl"]


def test_a_pair_becomes_two_single_replies_and_single_replies_no_pair() -> None:
    found = as_task(of_task("pairwise"), "thumbs")
    assert [item.key for item in found.items][:2] == ["one/1", "one/2"]
    assert (found.votes, found.notes) == ((), ("votes of a pairwise task are left out",))
    with pytest.raises(DataError, match="a pairwise task needs two replies; it has 1"):
        as_task(of_task("edit"), "pairwise")
