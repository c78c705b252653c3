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
from keel.stages.collect import Voted, comparisons

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
