"""Comparisons of a policy's own replies: what annotators of a world say, what people say, and who learns from
them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from keel import worlds
from keel.config import parse
from keel.errors import DataError, UsageError, WaitingError
from keel.pipeline.pipeline import Pipeline
from keel.stages import collect, people
from keel.stages.collect import Voted, comparisons
from keel.votes import open_store
from keel.votes.kinds import Answer

SHORT = {"max_new_tokens": 6}


@pytest.fixture
def stages(roomy_model: Path) -> dict[str, Any]:
    """A model's comparisons by the annotators of the help desk, and a reward model on them and on older
    ones."""
    return {
        "collect": {
            "kind": "collect",
            "model": str(roomy_model),
            "data": {"source": "world:helpdesk/prompts", "rows": 9},
            "pairs": 6,
            "annotators": "world:helpdesk",
            "sampling": {"max_new_tokens": 8},
        },
        "reward": {
            "kind": "reward",
            "model": str(roomy_model),
            "normalize": 0,
            "max_steps": 2,
            "batch_size": 2,
            "data": [{"source": "world:helpdesk/comparisons", "rows": 4}, "stage:collect"],
            "holdout": 0,
        },
    }


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_annotators_vote_on_two_replies_to_each_prompt(run: Any, stages: Any, tmp_path: Path) -> None:
    del stages["reward"]
    run({"stages": stages}, tmp_path / "run")
    folder = tmp_path / "run" / "stages" / "collect"
    pairs, found, result = (
        rows(folder / "pairs.jsonl"),
        rows(folder / "comparisons.jsonl"),
        json.loads((folder / "result.json").read_text()),
    )
    assert len({json.dumps(pair["prompt"]) for pair in pairs}) == len(pairs) == len(found) <= 6
    assert result["comparisons"] + result["same"] == 6
    for pair, row in zip(pairs, found, strict=True):
        assert pair["a"] != pair["b"]
        sides = {row["chosen"][0]["content"], row["rejected"][0]["content"]}
        assert sides == {pair["a"], pair["b"]}
        assert len(row["votes"]) in (3, 4, 5)
        choices = [vote["choice"] for vote in row["votes"]]
        assert choices.count("chosen") >= choices.count("rejected")


def test_what_is_collected_is_learned_from_with_the_rest(run: Any, stages: Any, tmp_path: Path) -> None:
    pipeline = run({"stages": stages}, tmp_path / "run")
    folder = tmp_path / "run" / "stages"
    collected = len(rows(folder / "collect" / "comparisons.jsonl"))
    data = json.loads((folder / "reward" / "stage.json").read_text())["data"]
    assert data.startswith(f"{4 + collected} rows")
    before = pipeline.fingerprint("reward")
    stages["collect"]["pairs"] = 5
    assert (
        Pipeline(parse({"name": "tiny", "threads": 1, "stages": stages}), tmp_path / "x").fingerprint(
            "reward"
        )
        != before
    )


def test_two_runs_collect_the_same_bytes(run: Any, stages: Any, differences: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run({"stages": stages}, tmp_path / name)
    assert differences(tmp_path / "one", tmp_path / "two") == []


def test_people_are_waited_for(run: Any, stages: Any, tmp_path: Path) -> None:
    """The run stops when the replies are there, and goes on when each pair has a vote; the replies stay as
    they are."""
    stages["collect"]["annotators"] = "people"
    folder = tmp_path / "run" / "stages" / "collect"
    with pytest.raises(
        WaitingError, match=r"6 of 6 pairs wait for people, in .*pairs\.jsonl.*into .*votes\.jsonl"
    ):
        run({"stages": stages}, tmp_path / "run")
    pairs, asked = rows(folder / "pairs.jsonl"), (folder / "pairs.jsonl").stat().st_mtime_ns
    votes = [{"pair": pair["pair"], "annotator": "kim", "choice": "b"} for pair in pairs]
    (folder / "votes.jsonl").write_text("".join(json.dumps(vote) + "\n" for vote in votes[:-1]))
    with pytest.raises(WaitingError, match="1 of 6 pairs wait"):
        run({"stages": stages}, tmp_path / "run")
    votes[0]["choice"] = "skip"
    (folder / "votes.jsonl").write_text("".join(json.dumps(vote) + "\n" for vote in votes))
    pipeline = run({"stages": stages}, tmp_path / "run")
    assert (folder / "pairs.jsonl").stat().st_mtime_ns == asked
    found = rows(folder / "comparisons.jsonl")
    assert [row["chosen"][0]["content"] for row in found] == [pair["b"] for pair in pairs[1:]]
    assert all(pipeline.is_done(name) for name in stages)
    before = pipeline.fingerprint("reward")
    # somebody changes their mind: what was made of the vote is made again
    votes[1]["choice"] = "a"
    (folder / "votes.jsonl").write_text("".join(json.dumps(vote) + "\n" for vote in votes))
    fresh = Pipeline(pipeline.config, tmp_path / "run", str)
    assert not fresh.is_done("collect")
    assert fresh.fingerprint("reward") != before
    run({"stages": stages}, tmp_path / "run")
    assert rows(folder / "comparisons.jsonl")[0]["chosen"][0]["content"] == pairs[1]["a"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", r"votes\.jsonl:1 is not JSON"),
        ('{"pair": 99, "annotator": "kim", "choice": "a"}', "`pair` is 99, which is none of the pairs"),
        ('{"pair": 0, "choice": "a"}', "`annotator` is None, not a name"),
        ('{"pair": 0, "annotator": "kim", "choice": "c"}', "`choice` is 'c', not one of a, b, tie, skip"),
        ("[]", "`pair` is None"),
    ],
)  # fmt: skip
def test_a_vote_that_is_none_is_named(line: str, reason: str, run: Any, stages: Any, tmp_path: Path) -> None:
    del stages["reward"]
    stages["collect"]["annotators"] = "people"
    with pytest.raises(WaitingError):
        run({"stages": stages}, tmp_path / "run")
    (tmp_path / "run" / "stages" / "collect" / "votes.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=reason):
        run({"stages": stages}, tmp_path / "run")


def test_the_majority_is_chosen_and_ties_go_to_the_first() -> None:
    pairs = [{"pair": i, "prompt": "p", "a": f"a{i}", "b": f"b{i}"} for i in range(5)]
    said = [(0, "b"), (0, "b"), (0, "a"), (1, "tie"), (2, "a"), (2, "skip"), (3, "tie"), (3, "b")]
    found = comparisons(pairs, [Voted(pair, f"who{i}", choice) for i, (pair, choice) in enumerate(said)])
    assert [(row["chosen"], row["rejected"]) for row in found] == [("b0", "a0"), ("a1", "b1"), ("b3", "a3")]
    assert [vote["choice"] for vote in found[0]["votes"]] == ["chosen", "chosen", "rejected"]
    assert found[1]["votes"] == [{"annotator": "who3", "choice": "tie"}]


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ({"pairs": 10}, DataError, "`pairs` is 10, but there are 9 prompts"),
        (
            {"annotators": "world:arithmetic"}, UsageError,
            "has no annotators; these have some: world:helpdesk",
        ),
        ({"annotators": "kim"}, UsageError, "annotators"),
        ({"sampling": {"temperature": 0}}, UsageError, "draws the same reply twice"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(
    change: Any, error: Any, reason: str, run: Any, stages: Any, tmp_path: Path
) -> None:
    stages["collect"] |= change
    with pytest.raises(error, match=reason):
        run({"stages": {"collect": stages["collect"]}}, tmp_path / "run")


def test_a_world_says_whether_it_has_annotators() -> None:
    assert worlds.annotators("helpdesk")
    with pytest.raises(UsageError, match="no annotators"):
        worlds.annotators("arithmetic")


# ---------------------------------------------------------------- in the pages of keel label


@pytest.fixture
def asked(stages: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The same stages, with people who vote in a database."""
    pytest.importorskip("sqlalchemy")
    stages["collect"] |= {"annotators": "people", "label": {"db": f"sqlite:///{tmp_path / 'label.db'}"}}
    return stages


def opened(tmp_path: Path) -> Any:
    return open_store(f"sqlite:///{tmp_path / 'label.db'}", create=False)


def everybody_votes(store: Any, project: str, name: str, choice: str, most: int = 1000) -> int:
    """One person votes on what they are given, as often as there is something. How often."""
    person = next((p for p in store.people() if p.name == name), None) or store.add_person(name)
    for number in range(most):
        given = store.next_item(project, person.id)
        if given is None:
            return number
        store.cast(project, person.id, given.item, Answer(choice=choice), f"{name}-{given.item}", 3.0)
    return most


def test_people_vote_in_the_pages_and_the_run_goes_on(run: Any, asked: Any, tmp_path: Path) -> None:
    asked["collect"]["label"]["votes"] = 2
    folder = tmp_path / "run" / "stages"
    message = (
        r"12 of 12 votes on 6 pairs are missing, in the project run-collect. People vote on the pages of"
    )
    with pytest.raises(WaitingError, match=message):
        run({"stages": asked}, tmp_path / "run")
    with opened(tmp_path) as store:
        assert everybody_votes(store, "run-collect", "kim", "b") == 6
        assert everybody_votes(store, "run-collect", "lee", "a", 5) == 5
        with pytest.raises(WaitingError, match="1 of 12 votes"):
            run({"stages": asked}, tmp_path / "run")
        assert everybody_votes(store, "run-collect", "lee", "b") == 1
    pipeline = run({"stages": asked}, tmp_path / "run")
    found = rows(folder / "collect" / "comparisons.jsonl")
    assert len(found) == 6
    assert sorted(v["annotator"] for row in found for v in row["votes"]) == ["kim"] * 6 + ["lee"] * 6
    assert all(pipeline.is_done(name) for name in asked)
    # the same again changes nothing
    made = (folder / "reward" / "stage.json").stat().st_mtime_ns
    run({"stages": asked}, tmp_path / "run")
    assert (folder / "reward" / "stage.json").stat().st_mtime_ns == made
    # a person changes their mind: the comparisons and what learned from them are made again
    with opened(tmp_path) as store:
        past = store.history("run-collect", store.person_named("lee").id)[0]
        store.cast("run-collect", store.person_named("lee").id, past.item, Answer(choice="tie"), "second")
    fresh = Pipeline(pipeline.config, tmp_path / "run", str)
    assert not fresh.is_done("collect")
    assert not fresh.is_done("reward")
    run({"stages": asked}, tmp_path / "run")
    assert (folder / "reward" / "stage.json").stat().st_mtime_ns != made


def test_a_run_that_waits_shows_how_many_are_missing_and_goes_on(
    asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int, int]] = []
    lines: list[str] = []

    def somebody_votes() -> None:
        with opened(tmp_path) as store:
            everybody_votes(store, "run-collect", "kim", "a", 3)

    monkeypatch.setattr(people, "pause", somebody_votes)
    config = parse({"name": "tiny", "threads": 1, "device": "cpu", "stages": asked})
    pipeline = Pipeline(
        config, tmp_path / "run", lines.append, lambda *step: seen.append(step[:3]), wait=True
    )
    pipeline._report = lambda: None
    pipeline.run()
    assert [step for step in seen if step[0] == "collect"] == [("collect", 0, 6), ("collect", 3, 6)]
    assert any("6 of 6 votes on 6 pairs are missing" in line for line in lines)
    assert pipeline.is_done("reward")
    assert Pipeline(config, tmp_path / "run", str).is_done("reward")


def test_votes_that_come_in_while_other_stages_run_count_in_the_next_run(
    run: Any, asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reward model is never held to have learned from votes that its comparisons were made without."""
    asked["collect"]["label"]["votes"] = 1
    with pytest.raises(WaitingError):
        run({"stages": asked}, tmp_path / "run")
    with opened(tmp_path) as store:
        everybody_votes(store, "run-collect", "kim", "a")
    write = collect.write_text

    def and_somebody_changes_their_mind(path: Path, text: str) -> None:
        write(path, text)
        with opened(tmp_path) as store:
            person = store.person_named("kim").id
            past = store.history("run-collect", person)[0]
            store.cast("run-collect", person, past.item, Answer(choice="b"), "changed")

    monkeypatch.setattr(collect, "write_text", and_somebody_changes_their_mind)
    pipeline = run({"stages": asked}, tmp_path / "run")
    assert pipeline.is_done("reward")
    fresh = Pipeline(pipeline.config, tmp_path / "run", str)
    assert not fresh.is_done("collect")
    assert not fresh.is_done("reward")


def test_a_reviewers_word_is_the_label_and_the_votes_stay(run: Any, asked: Any, tmp_path: Path) -> None:
    del asked["reward"]
    with pytest.raises(WaitingError):
        run({"stages": asked}, tmp_path / "run")
    with opened(tmp_path) as store:
        everybody_votes(store, "run-collect", "kim", "a", 5)
        reviewer = store.add_person("max", "admin")
        last = next(row for row in store.items("run-collect") if row.missing)
        store.adjudicate("run-collect", reviewer.id, last.item, Answer(choice="b"), "clear")
    run({"stages": asked}, tmp_path / "run")
    folder = tmp_path / "run" / "stages" / "collect"
    pairs = {pair["pair"]: pair for pair in rows(folder / "pairs.jsonl")}
    found = rows(folder / "comparisons.jsonl")
    word = next(row for row in found if "p_chosen" in row)
    pair = pairs[int(last.key.partition("-")[0])]
    assert word["chosen"][0]["content"] == pair["b"]
    assert (word["p_chosen"], word["people_votes"]) == (1.0, [])
    assert len(found) == 6


def test_other_pairs_are_another_project_and_the_same_pairs_the_same(
    run: Any, asked: Any, tmp_path: Path
) -> None:
    """Votes on texts that people saw never count for others, also where two runs have one name."""
    del asked["reward"]
    for folder, pairs in (("one/run", 6), ("two/run", 6), ("three/run", 5)):
        asked["collect"]["pairs"] = pairs
        with pytest.raises(WaitingError):
            run({"stages": asked}, tmp_path / folder)
    with opened(tmp_path) as store:
        assert [project.name for project in store.projects()] == ["run-collect", "run-collect-2"]
        assert store.counts("run-collect")["wanted"] == 6
        everybody_votes(store, "run-collect", "kim", "a")
    asked["collect"]["pairs"] = 6
    run({"stages": asked}, tmp_path / "two/run")
    asked["collect"]["pairs"] = 5
    with pytest.raises(
        WaitingError, match="5 of 5 votes on 5 pairs are missing, in the project run-collect-2"
    ):
        run({"stages": asked}, tmp_path / "three/run")


def test_where_the_database_is_gone_what_was_counted_stands(run: Any, asked: Any, tmp_path: Path) -> None:
    with pytest.raises(WaitingError):
        run({"stages": asked}, tmp_path / "run")
    with opened(tmp_path) as store:
        everybody_votes(store, "run-collect", "kim", "a")
    pipeline = run({"stages": asked}, tmp_path / "run")
    (tmp_path / "label.db").unlink()
    lines: list[str] = []
    fresh = Pipeline(pipeline.config, tmp_path / "run", lines.append)
    assert fresh.is_done("collect")
    assert fresh.is_done("reward")
    assert any("is not there" in line and "counted before stand" in line for line in lines)
    assert not (tmp_path / "label.db").exists()


def test_the_file_still_counts_beside_the_pages(run: Any, asked: Any, tmp_path: Path) -> None:
    del asked["reward"]
    with pytest.raises(WaitingError):
        run({"stages": asked}, tmp_path / "run")
    folder = tmp_path / "run" / "stages" / "collect"
    pairs = rows(folder / "pairs.jsonl")
    with opened(tmp_path) as store:
        everybody_votes(store, "run-collect", "kim", "a", 4)
    votes = [
        {"pair": pair["pair"], "annotator": who, "choice": "b"} for pair in pairs for who in ("kim", "lee")
    ]
    (folder / "votes.jsonl").write_text("".join(json.dumps(vote) + "\n" for vote in votes))
    run({"stages": asked}, tmp_path / "run")
    said = [v for row in rows(folder / "comparisons.jsonl") for v in row["votes"]]
    assert len(said) == 12  # kim's four votes in the pages count once, by what the pages say
    assert sum(vote["annotator"] == "kim" for vote in said) == 6


def test_the_environment_names_the_database_too(
    run: Any, asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del asked["reward"]
    del asked["collect"]["label"]
    monkeypatch.setenv("KEEL_LABEL_DB", f"sqlite:///{tmp_path / 'label.db'}")
    with pytest.raises(WaitingError, match="in the project run-collect"):
        run({"stages": asked}, tmp_path / "run")
    monkeypatch.delenv("KEEL_LABEL_DB")
    with pytest.raises(UsageError, match="its pairs are in the project run-collect of keel label, and no"):
        run({"stages": asked}, tmp_path / "run")


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ({"db": "mysql://here/label"}, "mysql is not supported"),
        ({"db": "sqlite:////no/such/folder/label.db"}, "label.db: there is no folder /no/such/folder"),
    ],
)
def test_a_database_that_cannot_be_used_is_said_before_anything_runs(
    run: Any, asked: Any, label: Any, message: str, tmp_path: Path
) -> None:
    asked["collect"]["label"] = label
    with pytest.raises(UsageError, match=message):
        run({"stages": asked}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_label_of_a_worlds_annotators_would_have_no_effect(stages: Any) -> None:
    stages["collect"]["label"] = {}
    with pytest.raises(UsageError, match="`label` has no effect with `annotators: world:helpdesk`"):
        parse({"name": "tiny", "stages": stages})
