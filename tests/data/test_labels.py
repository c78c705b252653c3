"""`label:PROJECT`: people's votes as a source of rows, and as a part of a fingerprint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sqlalchemy")

from keel import load_data
from keel.config import parse
from keel.data import load
from keel.data.chat import completion_text
from keel.data.stored.cache import Cache
from keel.data.stored.tokens import Preparation
from keel.errors import UsageError
from keel.pipeline.pipeline import Pipeline
from keel.types import DataSource, DemonstrationRecord, PreferenceRecord
from keel.votes import open_store
from keel.votes.kinds import Answer, NewItem, PastJudgement, Project, Reply, Scale


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A database that the environment names, with a project of six pairs and votes on three of them."""
    monkeypatch.setenv("KEEL_LABEL_DB", f"sqlite:///{tmp_path / 'label.db'}")
    with open_store() as store:
        store.create_project(Project("colours"), None)
        items = [
            NewItem(f"i{n}", f"the {n}?", [Reply(f" it is red {n}."), Reply(f" it is blue {n}.")], {"n": n})
            for n in range(6)
        ]
        store.add_items("colours", items, None)
        vote(store, "kim", {"i0": "a", "i1": "b", "i2": "tie"})
        yield store


def vote(store: Any, who: str, choices: dict[str, str]) -> None:
    store.import_votes("colours", [PastJudgement(k, who, Answer(choice=c)) for k, c in choices.items()], None)


def test_votes_are_preference_rows_with_who_cast_them(store: Any) -> None:
    vote(store, "lee", {"i0": "b"})
    found = load_data("label:colours", surplus=True)
    assert (found.kind, found.sources) == ("preference", ("label:colours",))
    one, two, tied = found.records
    assert isinstance(one, PreferenceRecord)
    assert isinstance(two, PreferenceRecord)
    assert isinstance(tied, PreferenceRecord)
    assert [(v.annotator, v.choice) for v in one.votes] == [("kim", "chosen"), ("lee", "rejected")]
    assert (one.p_chosen, two.p_chosen, tied.p_chosen) == (0.5, 1.0, 0.5)
    assert (two.chosen, two.rejected) == (" it is blue 1.", " it is red 1.")
    assert two.columns == {"n": 1, "key": "i1", "source": "label:colours"}
    assert two.origin == "label:colours:2"


def test_peoples_ratings_are_scores_to_learn(store: Any) -> None:
    """By the project's scales as criteria, or by the share of their ranges; a thumb made of them is no
    hindrance."""
    store.create_project(Project("rated", task="rating", scales=(Scale("good"), Scale("kind"))), None)
    store.add_items("rated", [NewItem("p", "which?", [Reply("red")])], None)
    told = {"good": 5, "kind": 2}
    store.import_votes("rated", [PastJudgement("p", "ada", Answer(ratings=told))], None)
    rubric = [{"name": "good", "weight": 2.0, "description": ""}, {"name": "kind", "weight": 1.0}]
    for settings, answer, right in (
        ({"rubric": rubric, "scale": (1, 5)}, '{"scores": {"good": 5, "kind": 2}}', 4),
        ({"rubric": "kind?", "scale": (0, 1)}, '{"scores": {"score": 0.62}}', 0.625),  # (1 + 1/4) / 2
    ):
        verdicts = {"mode": "pointwise", "reasons": False, **settings}
        (one,) = load.load([DataSource("label:rated", verdicts=verdicts)], ("demonstration",), 0).records
        assert isinstance(one, DemonstrationRecord)
        assert completion_text(one.completion) == answer
        assert one.columns["score"] == right


def test_the_fingerprint_follows_what_was_said_and_not_where_it_lies(store: Any, tmp_path: Path) -> None:
    source = [DataSource("label:colours")]
    before = load.fingerprint(source)
    assert load.fingerprint(source) == before
    assert (
        load.fingerprint([DataSource("label:colours", options={"db": str(tmp_path / "label.db")})]) == before
    )
    store.backup(tmp_path / "copy.db")
    assert load.fingerprint([DataSource(f"label:colours@sqlite:///{tmp_path / 'copy.db'}")]) == before
    vote(store, "kim", {"i3": "a"})
    assert load.fingerprint(source) != before


def test_what_is_read_is_what_counts_in_the_fingerprint(store: Any) -> None:
    """Votes that come in between are seen by neither; a run that starts later sees them in both."""
    preparation = Preparation(Cache())
    source = [DataSource("label:colours")]
    print_ = load.fingerprint(source, preparation.cache)
    vote(store, "kim", {"i3": "a"})
    assert len(load.load(source, ("preference",), 0, preparation).records) == 3
    assert load.fingerprint(source, preparation.cache) == print_
    later = Preparation(Cache())
    assert len(load.load(source, ("preference",), 0, later).records) == 4
    assert load.fingerprint(source, later.cache) != print_


def test_a_reward_stage_reads_the_database_and_later_votes_train_it_again(
    store: Any, run: Any, tiny_model: Path, tmp_path: Path
) -> None:
    config = {
        "stages": {
            "reward": {
                "kind": "reward", "model": str(tiny_model), "normalize": 0, "max_steps": 1, "batch_size": 2,
                "data": "label:colours", "holdout": 0,
            }
        }
    }  # fmt: skip
    pipeline = run(config, tmp_path / "run")
    assert pipeline.is_done("reward")
    assert Pipeline(pipeline.config, tmp_path / "run", str).is_done("reward")
    vote(store, "kim", {"i4": "b"})
    assert not Pipeline(pipeline.config, tmp_path / "run", str).is_done("reward")


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("label:shapes", {}, "label:shapes: there is no project named 'shapes'"),
        ("label:", {}, "label:: write label:PROJECT"),
        ("label:colours@", {}, "label:colours: write label:PROJECT, or"),
        ("label:colours", {"modles": True}, "unknown option 'modles'; did you mean models"),
        ("label:colours", {"models": "yes"}, "option models is true or false"),
        ("label:colours", {"adjudicated": "no"}, "option adjudicated is label or beside"),
        ("label:colours@x.db", {"db": "y.db"}, "label:colours: the database is given twice"),
        ("label:colours@/no/such.db", {}, "label:colours: /no/such.db is not there"),
        ("label:empty", {}, "label:empty: there is nothing to learn from yet: 0 of 0 votes are in"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(store: Any, source: str, options: Any, message: str) -> None:
    store.create_project(Project("empty"), None)
    config = {
        "name": "tiny",
        "stages": {
            "reward": {"kind": "reward", "model": "x/y", "data": {"source": source, "options": options}}
        },
    }
    with pytest.raises(UsageError, match=message) as raised:
        load_data(source, **options)
    assert "\n" not in str(raised.value)
    with pytest.raises(UsageError, match=message):
        Pipeline(parse(config), Path("no run")).sources.check(["reward"])


def test_a_password_is_not_shown(store: Any) -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(Exception, match=r"label|postgresql") as raised:
        load_data("label:colours@postgresql://me:secret@127.0.0.1:9/label")
    assert "secret" not in str(raised.value)


def test_without_the_extra_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    for name in [name for name in sys.modules if name.startswith("keel.votes.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(
        UsageError, match=r"label:colours: labels need sqlalchemy: pip install 'keel-rlhf\[label\]'"
    ):
        load_data("label:colours")
