"""Rewards as the config names them: mixtures, ensembles, functions of a user's, in every stage that takes
rewards."""

from __future__ import annotations

import contextlib
import importlib
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from keel.errors import KeelError, UsageError
from keel.models.load import ModelSource, scorer
from keel.rewards import learned
from keel.stages import reward

FUNCTIONS = Path(__file__).parent / "rewards_for_tests.py"
CPU = torch.device("cpu")


@pytest.fixture
def run_stage(run: Any, data: Any, tiny_model: Path, tmp_path: Path) -> Any:
    """Run one stage that learns from its samples; returns its directory and its metrics."""

    def go(kind: str, reward: Any, name: str = "run", **more: Any) -> tuple[Path, list[dict[str, float]]]:
        settings = {
            "kind": kind,
            "model": str(tiny_model),
            "reward": reward,
            "data": str(data.prompts),
            "lr": 1e-3,
            "batch_size": 8,
            "samples_per_prompt": 2,
            "updates": 2,
            "sampling": {"max_new_tokens": 5},
            **more,
        }
        run({"stages": {"s": settings}}, tmp_path / name)
        stage = tmp_path / name / "stages" / "s"
        return stage, [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]

    return go


def samples(stage: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (stage / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_rules_and_a_reward_model_are_mixed_and_logged_by_name(
    kind: str, run_stage: Any, tiny_reward: Path
) -> None:
    """The sum is of the learned reward on its own scale (mean 0.5, std 2) and of the rules as they come."""
    reward = [
        {"kind": "learned", "model": str(tiny_reward), "name": "taste", "weight": 2.0},
        {"kind": "length", "high": 2, "slack": 4, "weight": 0.5},
        f"python:{FUNCTIONS}:red",
    ]
    stage, rows = run_stage(kind, reward)
    for row in rows:
        taste, length, red = (row[f"rewards/{name}/mean"] for name in ("taste", "length", "red"))
        assert row["objective/scores"] == pytest.approx(2.0 * taste + 0.5 * length + red, abs=1e-5)
    for sample in samples(stage):
        assert sample["rewards"].keys() == {"taste", "length", "red"}
        assert sample["rewards"]["red"] == float("red" in sample["completion"])
        assert sample["rewards"]["length"] == max(0.0, 1 - max(0, sample["length"] - 2) / 4)


def test_a_learned_reward_is_weighed_on_its_own_scale(run_stage: Any, tiny_reward: Path) -> None:
    _, rows = run_stage(
        "ppo", [{"kind": "learned", "model": str(tiny_reward), "weight": 2.0}], kl={"coef": 0.0},
        shaping={"clip": None, "missing_stop_penalty": 0.0},
    )  # fmt: skip
    row = rows[0]
    assert row["objective/rlhf_reward"] == pytest.approx(
        2 * (row["objective/scores"] / 2 - 0.5) / 2.0, abs=1e-5
    )


def test_none_drops_out_of_the_mixture(run_stage: Any) -> None:
    stage, rows = run_stage(
        "grpo", [f"python:{FUNCTIONS}:sometimes", {"kind": "length", "high": 9}], updates=3
    )
    assert any(0 < row["rewards/sometimes/applies"] < 1 for row in rows)
    for row in samples(stage):
        assert (row["rewards"]["sometimes"] is None) == ("cat" in row["prompt"])


def test_each_task_of_a_mixture_has_rewards_of_its_own(run_stage: Any, data: Any, tmp_path: Path) -> None:
    """Rows of the other data set get None from a reward that is meant for one of them."""
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"prompt": f"so {n}?"}) + "\n" for n in range(12)))
    reward = [
        {"kind": "length", "high": 3, "name": "animals", "source_filter": str(data.prompts)},
        {"kind": "regex", "pattern": "e", "name": "numbers", "source_filter": str(other)},
    ]
    stage, rows = run_stage("grpo", reward, data=[str(data.prompts), str(other)], updates=4)
    assert all(row["rewards/animals/applies"] + row["rewards/numbers/applies"] == 1 for row in rows)
    for sample in samples(stage):
        numbers = any(character.isdigit() for character in sample["prompt"])
        assert (sample["rewards"]["numbers"] is None, sample["rewards"]["animals"] is None) == (
            not numbers,
            numbers,
        )


@pytest.mark.parametrize("kind", ["ppo", "best_of_n", "evaluate"])
def test_a_reward_for_the_only_source_is_for_all_of_its_rows(
    kind: str, run: Any, data: Any, tiny_model: Path, tmp_path: Path
) -> None:
    """A single data set is a source like those of a mixture, and so is a single set of held-out prompts."""
    held = tmp_path / "held.jsonl"
    held.write_text('{"prompt": "the cat?"}\n')
    reward: list[dict[str, Any]] = [{"kind": "length", "high": 3, "source_filter": str(data.prompts)}]
    settings: dict[str, Any] = {"kind": kind, "data": str(data.prompts), "sampling": {"max_new_tokens": 4}}
    if kind == "evaluate":
        settings |= {"models": [str(tiny_model)]}
    else:
        settings |= {"model": str(tiny_model), "batch_size": 4}
    if kind == "ppo":
        reward.append({"kind": "regex", "pattern": "e", "source_filter": str(held)})
        settings |= {"updates": 1, "eval_data": str(held), "eval_every": 1}
    if kind == "best_of_n":
        settings |= {"samples_per_prompt": 2, "max_steps": 1}
    run({"stages": {"s": {**settings, "reward": reward}}}, tmp_path / "run")
    assert (tmp_path / "run" / "stages" / "s" / "result.json").exists()


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("broken", "reward 'broken' raised ValueError: no .*sample 0"),
        ("too_few", "reward 'too_few' returned 1 values for 8 samples"),
        ("not_a_number", "reward 'not_a_number'.*sample 0"),
    ],
)
def test_a_reward_that_fails_names_the_sample(function: str, reason: str, run_stage: Any) -> None:
    with pytest.raises(KeelError, match=reason):
        run_stage("grpo", f"python:{FUNCTIONS}:{function}")


@pytest.mark.parametrize(
    ("reward", "reason"),
    [
        ("python:nowhere.at_all", "nowhere cannot be imported"),
        (f"python:{FUNCTIONS}:blue", "has no function 'blue'"),
        ([{"kind": "answer", "column": "solution"}], "solution"),
        ([{"kind": "classifier", "model": "MODEL"}], "is no text classifier"),
        ([{"kind": "learned", "model": "REWARD", "combine": "min"}], "`combine` has no effect"),
    ],
)
def test_a_reward_that_cannot_be_used_is_refused(
    reward: Any, reason: str, run_stage: Any, tiny_model: Path, tiny_reward: Path
) -> None:
    for term in reward if isinstance(reward, list) else ():
        term["model"] = {"MODEL": str(tiny_model), "REWARD": str(tiny_reward)}.get(term.get("model"), "")
        if not term["model"]:
            del term["model"]
    with pytest.raises(UsageError, match=reason):
        run_stage("grpo", reward)


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_a_text_classifier_is_a_reward(kind: str, run_stage: Any, tiny_bert: Path, tmp_path: Path) -> None:
    model = scorer(ModelSource(str(tiny_bert)), 3)
    model.config.id2label, model.config.label2id = {0: "good"}, {"good": 0}
    model.save_pretrained(tmp_path / "classifier")
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.save_pretrained(tmp_path / "classifier")
    term = {"kind": "classifier", "model": str(tmp_path / "classifier"), "label": "good"}
    stage, _ = run_stage(kind, [term])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier").eval()
    for row in samples(stage):
        with torch.no_grad():
            expected = model(**tokenizer(row["completion"], return_tensors="pt")).logits.sigmoid().item()
        assert row["rewards"]["classifier"] == pytest.approx(expected, abs=1e-4)


# ---------------------------------------------------------------- ensembles


@pytest.fixture(scope="module")
def ensemble(run: Any, data: Any, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three members trained for a few steps."""
    folder = tmp_path_factory.mktemp("ensemble")
    settings = {
        "kind": "reward",
        "model": str(tiny_model),
        "data": str(data.pairs),
        "lr": 1e-3,
        "batch_size": 4,
        "max_steps": 4,
        "members": 3,
        "normalize": 8,
        "sampling": {"max_new_tokens": 5},
    }
    run({"stages": {"reward": settings}}, folder)
    return folder / "stages" / "reward"


def test_members_differ_and_travel_as_one_folder(ensemble: Path) -> None:
    members = learned.load_members(str(ensemble / "model"), device=CPU)
    assert len(members) == 3
    heads = [member.model.score.weight for member in members]
    assert not torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[1], heads[2])
    assert all(member.scaled for member in members)
    assert not list(ensemble.rglob("checkpoints"))
    logs = [(ensemble / "metrics.jsonl").read_text()]
    logs += [(ensemble / "members" / str(n) / "metrics.jsonl").read_text() for n in (2, 3)]
    assert len(set(logs)) == 3  # another order of the data, another start
    result = json.loads((ensemble / "result.json").read_text())
    assert len(result["members"]) == 3
    assert 0 <= result["accuracy"]["mean"] <= 1


def test_one_member_is_in_memory_at_a_time(
    run: Any, data: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none while the comparisons are encoded, for which the tokenizer and the model's config do."""
    with contextlib.suppress(ImportError):  # it logs an exception, whose frames would hold the model
        importlib.import_module("bitsandbytes")
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []
    original, encode = reward.scorer, learned.encode

    def counted(*args: Any, **kwargs: Any) -> Any:
        alive.append(sum(model() is not None for model in made))
        model = original(*args, **kwargs)
        made.append(weakref.ref(model))
        return model

    def without_weights(judge: learned.RewardModel, *args: Any) -> Any:
        assert {parameter.device.type for parameter in judge.model.parameters()} == {"meta"}
        return encode(judge, *args)

    monkeypatch.setattr(reward, "scorer", counted)
    monkeypatch.setattr(learned, "encode", without_weights)
    for lora in (None, {"r": 2}):
        settings = {
            "kind": "reward",
            "model": str(tiny_model),
            "data": str(data.pairs),
            "batch_size": 4,
            "max_steps": 1,
            "members": 3,
            "normalize": 4,
            "sampling": {"max_new_tokens": 3},
            "lora": lora,
        }
        run({"stages": {"reward": settings}}, tmp_path / str(bool(lora)))
    assert alive == [0] * 6


def test_an_ensemble_rewards_what_its_members_agree_on(ensemble: Path, run_stage: Any) -> None:
    ways: list[str | None] = [None, "mean", "min", "mean_minus_std"]
    terms = [
        {"kind": "learned", "model": str(ensemble / "model"), "name": str(way), "combine": way}
        for way in ways
    ]
    terms[-1] |= {"std_penalty": 2.0}
    stage, _ = run_stage("ppo", terms)
    members = learned.load_members(str(ensemble / "model"), device=CPU)
    row = samples(stage)[0]
    ids = (
        members[0].tokenizer(row["prompt"])["input_ids"]
        + members[0].tokenizer(row["completion"])["input_ids"]
    )
    ids += [members[0].tokenizer.eos_token_id] * (row["stop_reason"] == "eos")
    scores = torch.stack(
        [(learned.score(m, [{"input_ids": ids}]) - m.mean) / m.std for m in members]
    ).flatten()
    expected = {
        "None": scores.mean(), "mean": scores.mean(), "min": scores.min(),
        "mean_minus_std": scores.mean() - 2.0 * scores.std(correction=0),
    }  # fmt: skip
    assert row["rewards"].keys() == expected.keys()
    if (
        len(ids) == len(members[0].tokenizer(row["prompt"])["input_ids"]) + row["length"]
    ):  # read as it was sampled
        for way, score in expected.items():
            assert row["rewards"][way] == pytest.approx(score.item(), abs=1e-4), way


def test_combined_by_hand() -> None:
    scores = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    assert learned.combined(scores, "mean").tolist() == [2.0, 0.0]
    assert learned.combined(scores, "min").tolist() == [1.0, 0.0]
    assert learned.combined(scores, "mean_minus_std", 0.5).tolist() == [1.5, 0.0]


def test_an_ensemble_is_judged_by_its_mean(
    ensemble: Path, run: Any, data: Any, tiny_model: Path, tmp_path: Path
) -> None:
    judge = {
        "kind": "evaluate",
        "models": [str(tiny_model)],
        "reward": str(ensemble / "model"),
        "data": str(data.prompts),
        "comparisons": str(data.pairs),
        "sampling": {"max_new_tokens": 5},
        "best_of": [4],
    }
    run({"stages": {"judge": judge}}, tmp_path)
    result = json.loads((tmp_path / "stages" / "judge" / "result.json").read_text())
    assert 0 <= result["reward_model"]["accuracy"]["mean"] <= 1
    plain, best = result["models"].values()
    assert list(result["models"])[1].endswith("best of 4")
    assert best["proxy"]["mean"] > plain["proxy"]["mean"]
    assert best["kl"]["mean"] == pytest.approx(torch.log(torch.tensor(4.0)).item() - 3 / 4)
    assert best["proxy_lift"]["low"] >= 0  # never worse than the first of its own samples


def test_what_cannot_be_used_is_said_before_anything_is_trained(run: Any, data: Any, tmp_path: Path) -> None:
    """The base model is never trained, though it comes first."""
    llama = {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    base = {
        "kind": "pretrain",
        "data": str(data.text),
        "model": {"vocab_size": 300, "init": llama},
        "max_length": 16,
        "max_steps": 1,
    }
    for number, (term, reason) in enumerate(
        [
            ("python:nothere.f", "nothere cannot be imported"),
            ({"kind": "regex", "pattern": "(("}, "regex"),
            ({"kind": "length", "low": 9, "high": 3}, "length"),
            ({"kind": "answer"}, "no column 'answer'"),
        ]
    ):
        settings = {"kind": "grpo", "model": "base", "reward": [term], "data": str(data.prompts)}
        with pytest.raises(UsageError, match=reason):
            run({"stages": {"base": base, "grpo": settings}}, tmp_path / str(number))
        assert not (tmp_path / str(number) / "stages").exists()


def test_another_text_of_a_function_is_another_reward(
    run: Any, data: Any, tiny_model: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.py"
    settings = {
        "kind": "grpo",
        "model": str(tiny_model),
        "reward": f"python:{own}:f",
        "data": str(data.prompts),
        "batch_size": 4,
        "samples_per_prompt": 2,
        "updates": 1,
        "sampling": {"max_new_tokens": 4},
    }
    found = []
    for value in ("1.0", "2.0", "2.0"):
        own.write_text(f"def f(prompts, completions, **kwargs):\n    return [{value}] * len(prompts)\n")
        pipeline = run({"stages": {"s": settings}}, tmp_path / "run")
        row = json.loads((tmp_path / "run" / "stages" / "s" / "metrics.jsonl").read_text().splitlines()[-1])
        found.append((pipeline.fingerprint("s"), row["objective/scores"]))
    assert [score for _, score in found] == [1.0, 2.0, 2.0]
    assert found[0][0] != found[1][0] == found[2][0]


def test_only_learned_rewards_are_clipped_and_on_their_own_scale(run_stage: Any, tiny_reward: Path) -> None:
    """With a clip of 1e-6 nothing is left of the learned reward, and all of the rule."""
    reward = [{"kind": "learned", "model": str(tiny_reward)}, {"kind": "length", "high": 99, "weight": 7.0}]
    _, rows = run_stage(
        "ppo", reward, kl={"coef": 0.0}, shaping={"clip": 1e-6, "missing_stop_penalty": 0.0}
    )  # fmt: skip
    assert rows[0]["objective/rlhf_reward"] == pytest.approx(7.0, abs=1e-4)


def test_a_reward_that_crashes_loses_nothing(run: Any, data: Any, tiny_model: Path, tmp_path: Path) -> None:
    """The same command goes on from the last checkpoint, to the bytes of a run in which nothing crashed."""
    own, mark = tmp_path / "own.py", tmp_path / "crash"
    own.write_text(
        "import os\n\ncalls = 0\n\n\ndef f(completions, **kwargs):\n    global calls\n    calls += 1\n"
        f"    if calls == 3 and os.path.exists({str(mark)!r}):\n        os.abort()\n"
        "    return [float(len(c)) for c in completions]\n"
    )
    settings = {
        "kind": "grpo", "model": str(tiny_model), "reward": f"python:{own}:f", "data": str(data.prompts),
        "batch_size": 4, "samples_per_prompt": 2, "updates": 4, "save_every": 1,
        "sampling": {"max_new_tokens": 4},
    }  # fmt: skip
    run({"stages": {"s": settings}}, tmp_path / "whole")
    mark.touch()
    with pytest.raises(KeelError, match="reward 'f' crashed: its process was ended by SIGABRT"):
        run({"stages": {"s": settings}}, tmp_path / "cut")
    mark.unlink()
    run({"stages": {"s": settings}}, tmp_path / "cut")
    logs = [(tmp_path / name / "stages/s/metrics.jsonl").read_bytes() for name in ("whole", "cut")]
    assert logs[0] == logs[1]


def test_a_row_that_makes_a_reward_fail_is_left_out_of_training(
    run: Any, tiny_model: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    answers = ["1", "2", "", "4"]
    rows.write_text("".join(json.dumps({"prompt": "the cat?", "answer": a}) + "\n" for a in answers))
    stage = {
        "kind": "grpo", "model": str(tiny_model), "reward": [{"kind": "answer"}], "batch_size": 4,
        "updates": 1, "samples_per_prompt": 2, "sampling": {"max_new_tokens": 4},
        "data": {"source": str(rows)},
    }  # fmt: skip
    with pytest.raises(UsageError, match=r"rows\.jsonl:3: .*is blank"):
        run({"stages": {"s": stage}}, tmp_path / "run")
    stage["data"] = {"source": str(rows), "on_bad": "skip"}
    pipeline = run({"stages": {"s": stage}}, tmp_path / "run")
    done = json.loads((tmp_path / "run" / "stages" / "s" / "stage.json").read_text())
    assert "3 rows" in done["data"]
    assert "1 skipped" in done["data"]
    assert pipeline.is_done("s")
