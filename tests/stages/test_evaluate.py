"""The evaluation stage's measures, against models looked at by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


@pytest.fixture
def other_model(tiny_model: Path, tmp_path: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "other")
    return tmp_path / "other"


@pytest.fixture
def judge(run: Any, data: Any, tiny_model: Path, other_model: Path, tiny_reward: Path, tmp_path: Path) -> Any:
    def go(name: str, **settings: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        defaults = {
            "kind": "evaluate", "models": [str(tiny_model), str(other_model)], "reward": str(tiny_reward), "data": str(data.prompts),
            "sampling": {"max_new_tokens": 6},
        }  # fmt: skip
        run({"stages": {"judge": defaults | settings}}, tmp_path / name)
        stage = tmp_path / name / "stages" / "judge"
        samples = [json.loads(line) for line in (stage / "samples.jsonl").read_text().splitlines()]
        return json.loads((stage / "result.json").read_text()), samples

    return go


def nearly_equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(nearly_equal(one[key], other[key]) for key in one)
    return one == other or one == pytest.approx(other, abs=1e-4)


def test_the_batch_size_changes_memory_and_not_results(judge: Any) -> None:
    (one, samples), (other, others) = judge("five", batch_size=5), judge("all", batch_size=64)
    assert nearly_equal(one, other)
    assert [row["completion"] for row in samples] == [row["completion"] for row in others]


def test_kl_and_proxy_are_those_of_the_row_alone(
    judge: Any, tiny_model: Path, other_model: Path, tiny_reward: Path, tokenizer: Any
) -> None:
    result, samples = judge("run", sampling={"max_new_tokens": 1})
    reference, policy = (
        AutoModelForCausalLM.from_pretrained(path).eval() for path in (tiny_model, other_model)
    )
    kls = []
    for row in samples:
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        with torch.no_grad():
            p, q = (model(ids).logits[0, -1].log_softmax(-1) for model in (policy, reference))
        kls.append((p.exp() * (p - q)).sum().item())
        if row["model"] == str(other_model):
            assert row["kl"] == pytest.approx(kls[-1], abs=1e-5)
        else:
            assert row["kl"] == 0.0
    measured = result["models"][str(other_model)]
    assert measured["kl"]["mean"] == pytest.approx(sum(kls[12:]) / 12, abs=1e-5)
    assert measured["kl"]["low"] < measured["kl"]["mean"] < measured["kl"]["high"]
    assert result["models"][str(tiny_model)]["kl"]["mean"] == 0.0
    assert "win_rate" not in result["models"][str(tiny_model)]
    assert measured["length"]["mean"] == 1.0


def test_both_models_are_given_the_same_draws_for_the_same_prompts(
    judge: Any, tiny_model: Path, tmp_path: Path
) -> None:
    """A model against itself under another name: every reply the same, half the games won."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.save_pretrained(tmp_path / "twin")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "twin")
    result, samples = judge("twins", models=[str(tiny_model), str(tmp_path / "twin")])
    assert [row["completion"] for row in samples[:12]] == [row["completion"] for row in samples[12:]]
    assert result["models"][str(tmp_path / "twin")]["win_rate"]["mean"] == 0.5
    assert len({row["completion"] for row in samples[:12]}) > 1


def test_the_stop_string_ends_a_reply_and_is_no_part_of_its_text(judge: Any, tokenizer: Any) -> None:
    _, samples = judge(
        "stopped",
        sampling={
            "max_new_tokens": 30,
            "temperature": 1.5,
            "stop": ["a", "b", "c", "d", "e", " it", " is", "."],
        },
    )
    ended = [row for row in samples if row["stop_reason"] == "stop"]
    assert ended
    assert not any(row["completion"].endswith((" it", " is", ".")) for row in ended)


def test_the_reward_models_accuracy_is_over_all_comparisons(
    judge: Any, data: Any, tiny_reward: Path, tokenizer: Any
) -> None:
    result, _ = judge("accuracy", comparisons=str(data.pairs), batch_size=5)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_reward).eval()
    rows = [json.loads(line) for line in data.pairs.read_text().splitlines()]

    def score(prompt: str, reply: str) -> float:
        ids = [*tokenizer(prompt)["input_ids"], *tokenizer(reply)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            return model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1]).item()

    hits = [score(row["prompt"], row["chosen"]) > score(row["prompt"], row["rejected"]) for row in rows]
    assert result["reward_model"]["accuracy"]["n"] == len(rows)
    assert result["reward_model"]["accuracy"]["mean"] == pytest.approx(sum(hits) / len(hits))
    assert 0.05 < sum(hits) / len(hits) < 0.95


def test_models_with_other_vocabularies_have_no_kl(
    judge: Any, tiny_model: Path, tmp_path: Path, tokenizer: Any
) -> None:
    from keel.types import UsageError

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.resize_token_embeddings(310)
    model.save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    with pytest.raises(UsageError, match="vocabulary of 310"):
        judge("wide", models=[str(tiny_model), str(tmp_path / "wide")])
