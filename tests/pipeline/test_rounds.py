"""`rounds`: the stages that it is short for, what they learn from, and the picture of what they brought."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from keel.config import parse, read
from keel.errors import UsageError
from keel.pipeline.pipeline import Pipeline, resolved
from keel.report import reading, rounds


@pytest.fixture
def config(roomy_model: Path) -> dict[str, Any]:
    def of(split: str, number: int) -> dict[str, Any]:
        return {"source": f"world:helpdesk/{split}", "rows": number}

    few = {"batch_size": 2}
    short = {"max_new_tokens": 6}
    return {
        "name": "tiny",
        "threads": 1,
        "device": "cpu",
        "rounds": {"n": 3, "reward": "reward", "policy": "ppo", "annotators": "world:helpdesk", "pairs": 4},
        "stages": {
            "reward": {
                "kind": "reward",
                "model": str(roomy_model),
                "data": of("comparisons", 6),
                "max_steps": 1,
                "normalize": 4,
                "sampling": short,
                **few,
            },
            "ppo": {
                "kind": "ppo",
                "model": str(roomy_model),
                "reward": [{"kind": "learned", "model": "reward"}],
                "data": of("prompts", 8),
                "updates": 1,
                "epochs": 1,
                "sampling": short,
                **few,
            },
            "judge": {
                "kind": "evaluate",
                "models": [str(roomy_model), "ppo"],
                "gold": "world:helpdesk",
                "data": of("test_prompts", 3),
                "sampling": short,
            },
        },
    }


def test_rounds_are_written_out_as_stages(config: Any, roomy_model: Path) -> None:
    stages = parse(config).stages
    assert list(stages) == [
        "reward", "ppo", "collect-2", "reward-2", "ppo-2", "collect-3", "reward-3", "ppo-3", "judge",
    ]  # fmt: skip
    assert stages["collect-3"].inputs() == ["ppo-2"]
    assert stages["collect-3"].sampling.max_new_tokens == 6
    assert [source.source for source in stages["reward-3"].data] == [
        "world:helpdesk/comparisons", "stage:collect-2", "stage:collect-3",
    ]  # fmt: skip
    assert stages["reward-3"].model.path == str(roomy_model)
    assert stages["ppo-3"].model.path == "ppo-2"
    assert stages["ppo-3"].reference == str(roomy_model)
    assert stages["ppo-3"].reward[0].model == "reward-3"
    assert stages["judge"].models == [str(roomy_model), "ppo", "ppo-2", "ppo-3"]


def test_a_resolved_config_reads_as_itself(config: Any) -> None:
    once = parse(config)
    assert parse(resolved(once)) == once


def test_what_the_config_says_of_a_later_round_wins(config: Any) -> None:
    config["stages"]["ppo-2"] = {"updates": 7}
    stages = parse(config).stages
    assert (stages["ppo"].updates, stages["ppo-2"].updates, stages["ppo-3"].updates) == (1, 7, 1)
    assert list(stages)[4] == "ppo-2"


def test_an_override_reaches_into_a_later_round_alone(config: Any, tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    stages = read(
        path, ["ppo.sampling.temperature=0.9", "ppo-2.sampling.max_new_tokens=7", "collect-2.pairs=3"]
    ).stages
    found = [stages[name].sampling for name in ("ppo", "ppo-2", "ppo-3")]
    assert [sampling.max_new_tokens for sampling in found] == [6, 7, 6]
    assert [sampling.temperature for sampling in found] == [0.9] * 3
    assert (stages["collect-2"].pairs, stages["collect-3"].pairs) == (3, 4)
    with pytest.raises(UsageError, match="no stage or setting 'ppo-4'; did you mean"):
        read(path, ["ppo-4.updates=3"])


def test_one_round_is_the_config_as_it_stands(config: Any) -> None:
    config["rounds"]["n"] = 1
    assert list(parse(config).stages) == ["reward", "ppo", "judge"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"policy": "pppo"}, "`rounds.policy` 'pppo' is no stage of kind ppo or grpo"),
        ({"reward": "ppo"}, "`rounds.reward` 'ppo' is no stage of kind reward"),
        ({"n": 0}, r"rounds\.n"),
        ({"n": "many"}, r"rounds\.n"),
        ({"pair": 3}, r"rounds\.pair: unknown key"),
        ({"annotators": "world:nowhere"}, "nowhere"),
    ],
)
def test_rounds_that_cannot_be_are_refused(change: Any, reason: str, config: Any, tmp_path: Path) -> None:
    config["rounds"] |= change
    with pytest.raises(UsageError, match=reason):
        Pipeline(parse(config), tmp_path, str).sources.check(list(parse(config).stages))


def test_rounds_of_a_policy_with_another_reward_are_refused(config: Any) -> None:
    config["stages"]["ppo"]["reward"] = {"kind": "length", "high": 4}
    with pytest.raises(
        UsageError, match="`rounds` has no effect: 'ppo' is not trained on the reward 'reward'"
    ):
        parse(config)


@pytest.mark.parametrize(
    ("stage", "data", "reason"),
    [
        ("reward", "stage:nothing", "'nothing' is no stage of kind collect"),
        ("reward", "stage:judge", "'judge' is no stage of kind collect"),
        ("reward", "stage:collect-2", "which comes after it"),
        ("ppo-2", "stage:collect-2", "are for `data` of reward and dpo stages"),
    ],
)
def test_data_of_a_stage_that_does_not_fit_is_refused(
    stage: str, data: str, reason: str, config: Any
) -> None:
    config["stages"].setdefault(stage, {})["data"] = data
    with pytest.raises(UsageError, match=reason):
        parse(config)


@pytest.mark.slow
def test_all_rounds_run_and_the_page_shows_the_gold_of_each(config: Any, run: Any, tmp_path: Path) -> None:
    pipeline = run(config, tmp_path / "run")
    assert all(pipeline.is_done(name) for name in pipeline.config.stages)
    models = json.loads((tmp_path / "run" / "stages" / "judge" / "result.json").read_text())["models"]
    found = reading.read(tmp_path / "run")
    by, known = rounds.by_round(found)
    assert by == "gold"
    assert [(k, value["mean"]) for k, value in known] == [
        (k, measures["gold"]["mean"]) for k, measures in enumerate(models.values())
    ]
    drawn = rounds.picture(found)
    assert drawn is not None
    assert drawn.figure["data"][0]["x"] == [0, 1, 2, 3]
    stage = next(stage for stage in found.stages if stage.name == "reward-2")
    assert "collect-2" in stage.inputs
