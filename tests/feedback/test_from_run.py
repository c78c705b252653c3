"""Pairs straight from a run, and which of them people should judge first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from keel.errors import UsageError
from keel.feedback import priorities
from keel.feedback.formats import from_run, into_project
from keel.feedback.formats.base import Labels
from keel.votes.kinds import ItemRow, NewItem, Project, Reply


@pytest.fixture(scope="module")
def finished(run: Any, roomy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two models and an evaluate stage that judged one of them beside the one they come from."""
    folder = tmp_path_factory.mktemp("from-run") / "tiny"
    common = {"kind": "sft", "model": str(roomy_model), "max_steps": 1, "batch_size": 2, "holdout": 0}
    data = {"source": "world:helpdesk/demonstrations", "rows": 4}
    prompts = {"source": "world:helpdesk/test_prompts", "rows": 8}
    stages = {
        "sft": {**common, "data": data, "lr": 0.03},
        "other": {**common, "data": data, "lr": 0.05},
        "judge": {
            "kind": "evaluate",
            "models": ["sft", "other"],
            "data": prompts,
            "sampling": {"max_new_tokens": 6},
        },
    }
    run({"stages": stages}, folder)
    return folder


def test_samples_of_an_evaluate_stage_become_pairs(finished: Path) -> None:
    labels = from_run.read(finished, ["sft", "other"], 5)
    rows = [json.loads(line) for line in (finished / "stages/judge/samples.jsonl").read_text().splitlines()]
    said = {(row["model"], row["prompt"][-1]["content"]): row["completion"].strip() for row in rows}
    assert 0 < len(labels.items) <= 5
    for item in labels.items:
        assert [reply.source for reply in item.replies] == ["sft", "other"]
        assert not isinstance(item.prompt, str)
        assert item.prompt[-1]["role"] == "user"
        for reply in item.replies:
            assert said[str(reply.source), item.prompt[-1]["content"]] == reply.content
    assert from_run.read(finished, ["sft", "other"], 5) == labels
    assert from_run.read(finished, ["sft", "other"], 5, seed=1).items != labels.items


def test_episodes_with_tools_become_pairs_of_turns(finished: Path, tmp_path: Path) -> None:
    """As an evaluate stage with tools writes its samples."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    path = run / "stages/judge/samples.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]

    def turns(row: dict[str, Any]) -> list[dict[str, Any]]:
        call = {"type": "function", "function": {"name": "look", "arguments": {"at": row["model"]}}}
        called = {"role": "assistant", "content": "", "tool_calls": [call]}
        tool = {"role": "tool", "name": "look", "content": "seen"}
        return [called, tool, {"role": "assistant", "content": "Same."}]

    played = [json.dumps({**row, "completion": turns(row)}) for row in rows]
    path.write_text("\n".join(played) + "\n")
    labels = from_run.read(run, ["sft", "other"], 5)
    assert len(labels.items) == 5
    for item in labels.items:
        assert [[turn["role"] for turn in reply.content] for reply in item.replies] == [
            ["assistant", "tool", "assistant"]
        ] * 2


def test_models_whose_stage_plays_episodes_do_not_answer_without_tools(
    finished: Path, roomy_model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["stages"]["judge"]["environment"] = "world:shop"
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    with pytest.raises(UsageError, match="run an evaluate stage of these models with the same `tools`"):
        from_run.read(run, ["sft", str(roomy_model)], 4)


def test_models_that_nobody_judged_answer_now_and_of_three_each_two_in_turn(
    finished: Path, roomy_model: Path
) -> None:
    third = str(roomy_model)  # a folder outside the run
    labels = from_run.read(finished, ["sft", "other", third], 6)
    sides = [tuple(reply.source for reply in item.replies) for item in labels.items]
    assert len(set(sides)) > 1
    assert set(sides) <= {("sft", "other"), ("sft", third), ("other", third)}
    assert all(reply.content for item in labels.items for reply in item.replies)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (["sft"], "pairs need two models or more, not sft"),
        (["sft", "ppo"], "has no stage 'ppo'; it has sft, other, judge"),
        (["sft", "judge"], "the stage 'judge' of .* has left no model"),
    ],
)
def test_what_cannot_be_compared_is_said(finished: Path, models: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        from_run.read(finished, models, 5)
    with pytest.raises(UsageError, match="no run at"):
        from_run.read(finished / "nothing", models, 5)


# ---------------------------------------------------------------- uncertain ones first


def test_information_is_highest_where_the_models_contradict_each_other() -> None:
    """By hand: two models that forecast 0.9 and 0.1 tell ln 2 − H(0.1) of each other; one alone H of its
    forecast."""
    odds = np.log(9.0)
    differences = np.array([[odds, 0.0, odds], [-odds, 0.0, odds]])
    own = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    found = priorities.information(differences)
    assert found == pytest.approx([np.log(2) - own, 0.0, 0.0], abs=1e-9)
    assert priorities.information(differences[:1]) == pytest.approx([own, np.log(2), own])


def test_a_ranking_has_the_mean_of_its_pairs() -> None:
    def item(replies: int) -> ItemRow:
        return ItemRow(1, "k", "p", tuple(Reply(str(n)) for n in range(replies)), {}, None, None, 1)

    def score(prompts: Any, replies: Any) -> Any:
        return np.array([[float(reply) for reply in replies]])

    pair, three = priorities.of_items([item(2), item(3)], score)
    entropies = priorities.information(np.array([[-1.0, -2.0, -1.0]]))
    assert pair == pytest.approx(entropies[0])
    assert three == pytest.approx(entropies.mean())


def test_ranked_items_come_first_and_random_ones_beside_them(
    finished: Path, run: Any, tmp_path: Path
) -> None:
    pytest.importorskip("sqlalchemy")
    from keel.votes import open_store
    from keel.votes.kinds import Answer

    reward = {
        "kind": "reward",
        "model": str(finished / "stages/sft/model"),
        "max_steps": 1,
        "batch_size": 2,
        "normalize": 0,
        "data": {"source": "world:helpdesk/comparisons", "rows": 4},
        "holdout": 0,
        "members": 2,
    }
    run({"stages": {"reward": reward}}, tmp_path / "run")
    items = [
        NewItem(f"i{n}", f"question {n}", [Reply(f"reply {n} " + "long " * n), Reply("other")])
        for n in range(40)
    ]
    with open_store(f"sqlite:///{tmp_path / 'label.db'}") as store:
        store.create_project(Project("pairs", order="uncertain", random_share=0.25), None)
        into_project(store, "pairs", Labels("pairwise", items))
        assert priorities.rank(store, "pairs", [str(tmp_path / "run/stages/reward")]) == 40
        rows = {row.item: row for row in store.items("pairs")}
        assert all(row.priority is not None and row.priority >= 0 for row in rows.values())
        kim = store.add_person("kim")
        given: list[tuple[int, str]] = []
        while (one := store.next_item("pairs", kim.id)) is not None:
            store.cast("pairs", kim.id, one.item, Answer(choice="a"), f"c{one.item}")
            given.append((one.item, one.how))
        uncertain = [rows[item].priority for item, how in given if how == "uncertain"]
        assert uncertain == sorted(uncertain, reverse=True)
        assert 0 < sum(how == "random" for _, how in given) < 25
        assert {row.how for row in store.votes("pairs")} == {"random", "uncertain"}
        assert priorities.rank(store, "pairs", [str(tmp_path / "run/stages/reward")]) == 0
        store.add_items("pairs", [NewItem("new", "p", [Reply("x"), Reply("y")])], None)
        with pytest.raises(UsageError, match="is no reward model"):
            priorities.rank(store, "pairs", [str(finished / "stages/sft")])
        store.create_project(Project("thumbs", task="thumbs"), None)
        with pytest.raises(UsageError, match="a thumbs project cannot be ranked"):
            priorities.rank(store, "thumbs", ["x"])
