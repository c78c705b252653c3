"""`keel bench reward`: classifiers, ensembles and judges on files in their published form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from keel.cli import bench_reward, main
from keel.errors import DataError, RewardError, UsageError
from keel.models.load import ModelSource, scorer
from keel.report import reward_bench as page
from keel.rewards import learned
from keel.rewards.judge import client

pytest.importorskip("openai")


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A few questions of RewardBench 2's form."""
    rows = [
        {"id": str(i), "prompt": f"the {animal}?", "chosen": ["it is red."], "num_correct": 1,
         "rejected": ["it is blue.", "it is pink.", "so."], "total_completions": 4, "subset": subset}
        for i, (animal, subset) in enumerate([("cat", "Math"), ("dog", "Math"), ("<b>fox</b>", "Focus")])
    ]  # fmt: skip
    path = tmp_path / "two.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"the {a}?", "chosen": " it is red.", "rejected": " it is blue."}
        for a in ("cat", "dog", "hen")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*words: str) -> Any:
    return CliRunner().invoke(main.app, ["bench", "reward", *words], catch_exceptions=False)


def judge_file(folder: Path, **settings: Any) -> str:
    path = folder / "judge.yaml"
    path.write_text(
        json.dumps({"kind": "judge", "model": "scripted", "rubric": "red is good", "tries": 2, **settings})
    )
    return str(path)


def test_a_reward_model_is_scored_as_its_own_forward_says(
    two: Path, tiny_reward: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    told = run(str(tiny_reward), "--on", str(two), "--out", str(out), "--dtype", "float32", "--json")
    assert told.exit_code == 0
    found = json.loads(told.stdout)
    assert found == json.loads((out / "result.json").read_text())
    model = learned.load(str(tiny_reward), device=torch.device("cpu"))
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    points: dict[str, list[float]] = {}
    for asked, row in zip(map(json.loads, two.read_text().splitlines()), rows, strict=True):
        turns = ({"role": "user", "content": asked["prompt"]},)  # its tokenizer has a chat template
        replies = [({"role": "assistant", "content": r},) for r in (*asked["chosen"], *asked["rejected"])]
        expected = learned.score(model, [learned.encode(model, turns, reply) for reply in replies]).tolist()
        assert row["scores"] == pytest.approx(expected, abs=1e-5)
        points.setdefault(asked["subset"], []).append(float(max(expected) == expected[0]))
    by_hand = sum(sum(own) / len(own) for own in points.values()) / 2
    assert found["score"]["mean"] == by_hand
    assert (found["benchmark"], found["questions"], found["reward"]) == ("rewardbench2", 3, "learned")
    text = (out / "report.html").read_text()
    assert "RewardBench 2" in text
    assert "<b>fox</b>" not in text


@pytest.mark.slow
def test_an_ensemble_is_scored_on_its_members_scales(
    pairs: Path, tiny_model: Path, tokenizer: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "two-members"
    for member, (mean, std) in enumerate([(0.5, 2.0), (-1.0, 0.5)], 1):
        place = folder if member == 1 else folder / "members" / "2"
        model = scorer(ModelSource(str(tiny_model)), member)
        model.config.pad_token_id = tokenizer.pad_token_id
        learned.save_scale(model, mean, std, members=2)
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
    assert (
        run(str(folder), "--on", str(pairs), "--out", str(tmp_path / "out"), "--dtype", "float32").exit_code
        == 0
    )
    members = learned.load_members(str(folder), device=torch.device("cpu"))
    row = json.loads((tmp_path / "out" / "scores.jsonl").read_text().splitlines()[0])
    inputs = [learned.encode(members[0], "the cat?", reply) for reply in (" it is red.", " it is blue.")]
    scaled = [(learned.score(m, inputs) - m.mean) / m.std for m in members]
    assert row["scores"] == pytest.approx(((scaled[0] + scaled[1]) / 2).tolist(), abs=1e-5)


def test_a_judge_is_asked_in_both_orders_and_nothing_twice(
    pairs: Path, scripted_judge: Any, tmp_path: Path
) -> None:
    judge = scripted_judge()
    file = judge_file(tmp_path, address=judge.address, mode="pairwise")
    told = run(file, "--on", str(pairs), "--out", str(tmp_path / "out"))
    assert told.exit_code == 0
    assert "In both orders" in told.stdout
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert found["score"]["mean"] == 1.0
    assert {name: m["mean"] for name, m in found["position"].items()} == {
        "right in front": 1.0, "right behind": 1.0, "agreement": 1.0,
    }  # fmt: skip
    assert len(judge.asked) == 6
    run(file, "--on", str(pairs), "--out", str(tmp_path / "out"))
    assert len(judge.asked) == 6


@pytest.mark.parametrize("mode", ["pointwise", pytest.param("ranking", marks=pytest.mark.slow), "pairwise"])
def test_a_judge_finds_the_best_of_four(mode: str, two: Path, scripted_judge: Any, tmp_path: Path) -> None:
    file = judge_file(tmp_path, address=scripted_judge().address, mode=mode)
    found = json.loads(run(file, "--on", str(two), "--out", str(tmp_path / "out"), "--json").stdout)
    assert found["score"]["mean"] == 1.0
    assert (tmp_path / "out" / "errors.jsonl").read_text() == ""


def test_a_judge_without_an_answer_is_an_error_or_a_guess(
    pairs: Path, scripted_judge: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)
    judge = scripted_judge(lambda text, n: scripted_judge.said("?"))
    where = ("--on", str(pairs), "--out", str(tmp_path / "out"))
    with pytest.raises(
        RewardError, match=r"judge 'judge' has no verdict on .*pairs\.jsonl:1 \(prompt 'the cat\?'\)"
    ):
        run(judge_file(tmp_path, address=judge.address), *where)
    found = json.loads(
        run(judge_file(tmp_path, address=judge.address, on_failure="none"), *where, "--json").stdout
    )
    assert (found["score"]["mean"], found["unanswered"]) == (0.5, 3)


def test_a_rule_or_a_classifier_of_a_config_is_a_reward_too(pairs: Path, tmp_path: Path) -> None:
    file = tmp_path / "rule.yaml"
    file.write_text("reward: {kind: keywords, words: [red]}\n")
    found = json.loads(run(str(file), "--on", str(pairs), "--out", str(tmp_path / "out"), "--json").stdout)
    assert (found["score"]["mean"], found["reward"]) == (1.0, "keywords")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["nowhere/at/all", "--on", "PAIRS"], "no model at nowhere/at/all"),
        (["REWARD", "--on", "nowhere.jsonl"], "no file nowhere.jsonl"),
        (
            ["REWARD", "--on", "PAIRS", "--benchmark", "rewardbench3"],
            "is not one of rewardbench, rewardbench2",
        ),
        (["REWARD", "--on", "PAIRS", "--dtype", "int4"], "is not one of auto, float32"),
        (["REWARD", "--on", "PAIRS", "--benchmark", "rewardbench"], "'subset' is NoneType, not text"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], reason: str, pairs: Path, tiny_reward: Path, tmp_path: Path
) -> None:
    given = [{"PAIRS": str(pairs), "REWARD": str(tiny_reward)}.get(word, word) for word in words]
    with pytest.raises(UsageError, match=reason):
        run(*given, "--out", str(tmp_path / "out"))


def test_settings_of_pairs_are_given_as_a_data_source(pairs: Path, tmp_path: Path) -> None:
    """A bad row's error says how, and what is left out is counted."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text(pairs.read_text() + json.dumps({"prompt": "p", "chosen": "c", "rejected": " "}) + "\n")
    reward, source = tmp_path / "reward.yaml", tmp_path / "test.yaml"
    reward.write_text(json.dumps({"kind": "keywords", "words": ["red"]}))
    out = ("--out", str(tmp_path / "out"))
    with pytest.raises(DataError, match=r"on_bad: skip \(--on takes .* YAML file .* source: .*bad\.jsonl"):
        run(str(reward), "--on", str(bad), *out)
    source.write_text(json.dumps({"source": str(bad), "on_bad": "skip"}))
    assert "left out: 1." in run(str(reward), "--on", str(source), *out).output
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (found["questions"], found["skipped"]) == (3, 1)
    with pytest.raises(UsageError, match="--benchmark llmbar has no effect"):
        run(str(reward), "--on", str(source), "--benchmark", "llmbar", *out)
    source.write_text(json.dumps({"data": {"source": str(bad), "on_bda": "skip"}}))
    with pytest.raises(UsageError, match="on_bad"):
        run(str(reward), "--on", str(source), *out)
    source.write_text(json.dumps({"data": str(bad), "on_bad": "skip"}))
    with pytest.raises(UsageError, match="`on_bad` has no effect beside `data`: write it within"):
        run(str(reward), "--on", str(source), *out)
    reward.write_text(json.dumps({"reward": {"kind": "keywords", "words": ["red"]}, "weight": -1}))
    with pytest.raises(UsageError, match="`weight` has no effect beside `reward`"):
        run(str(reward), "--on", str(pairs), *out)


@pytest.mark.slow
def test_a_file_with_code_needs_trust_and_two_rewards_are_refused(pairs: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    (tmp_path / "mine.py").write_text("def score(completions):\n    return [len(c) for c in completions]\n")
    file.write_text(json.dumps({"kind": "python", "function": f"{tmp_path / 'mine.py'}:score"}))
    where = ("--on", str(pairs), "--out", str(tmp_path / "out"))
    with pytest.raises(UsageError, match="--trust runs it"):
        run(str(file), *where)
    assert run(str(file), *where, "--trust").exit_code == 0
    file.write_text(
        json.dumps({"reward": [{"kind": "keywords", "words": ["a"]}, {"kind": "length", "high": 3}]})
    )
    with pytest.raises(UsageError, match="holds 2 rewards"):
        run(str(file), *where)
    file.write_text(json.dumps({"kind": "jugde", "model": "x"}))
    with pytest.raises(UsageError, match="judge"):
        run(str(file), *where)


def test_the_folder_is_named_after_both(tmp_path: Path) -> None:
    named = bench_reward.Bench("runs/mine/stages/reward", "data/reward-bench-2/test.parquet", None, None)
    assert named.directory == Path("bench/mine-reward-on-reward-bench-2-test")


def test_the_page_says_what_is_missing() -> None:
    measure = {"mean": 0.5, "low": None, "high": None, "n": 3}
    found = {
        "model": "m", "benchmark": "rewardbench2", "questions": 3, "score": measure,
        "subsets": {"Math": measure},
        "length": {}, "missing_subsets": ["Ties"], "unanswered": 2, "cut": 1,
    }  # fmt: skip
    text = page.as_text(found)
    assert "no questions of Ties" in text
    assert "2 questions have no answer" in text
    assert "only the beginning" in text


def test_a_penalty_is_read_the_other_way_round_and_tokens_cannot_be_counted(
    pairs: Path, tmp_path: Path
) -> None:
    file = tmp_path / "rule.yaml"
    for weight, score in ((1.0, 0.0), (-0.5, 1.0)):
        file.write_text(json.dumps({"kind": "keywords", "words": ["blue"], "weight": weight}))
        told = run(str(file), "--on", str(pairs), "--out", str(tmp_path / "out"), "--json")
        assert json.loads(told.stdout)["score"]["mean"] == score
    for term, words in (
        ({"kind": "length", "high": 3}, "counts the tokens of a policy.*`unit: words`"),
        ({"kind": "overlong", "max_length": 9, "buffer": 3}, "counts the tokens of a policy"),
    ):
        file.write_text(json.dumps(term))
        with pytest.raises(UsageError, match=words):
            run(str(file), "--on", str(pairs), "--out", str(tmp_path / "out"))


def test_a_pairwise_penalty_keeps_its_position(pairs: Path, scripted_judge: Any, tmp_path: Path) -> None:
    file = judge_file(tmp_path, address=scripted_judge().address, mode="pairwise", weight=-1)
    found = json.loads(run(file, "--on", str(pairs), "--out", str(tmp_path / "out"), "--json").stdout)
    assert found["score"]["mean"] == found["position"]["right in front"]["mean"] == 0.0


def test_llmbar_needs_both_orders(scripted_judge: Any, tmp_path: Path) -> None:
    """One order would be counted as both."""
    folder = tmp_path / "Natural"
    folder.mkdir()
    row = {"input": "the cat?", "output_1": "red", "output_2": "blue", "label": 1}
    (folder / "dataset.json").write_text(json.dumps([row]))
    judge = scripted_judge()
    where = ("--on", str(tmp_path), "--out", str(tmp_path / "out"))
    with pytest.raises(UsageError, match="LLMBar is judged in both orders"):
        run(judge_file(tmp_path, address=judge.address, mode="pairwise", both_orders=False), *where)
    assert judge.asked == []
    assert run(judge_file(tmp_path, address=judge.address, mode="pairwise"), *where).exit_code == 0
