"""The evaluation stage's measures, against models looked at by hand."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from keel.errors import UsageError
from keel.rewards import learned


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
        directory = tmp_path / "runs" / name  # a model's folder holds nothing that changes
        defaults = {
            "kind": "evaluate",
            "models": [str(tiny_model), str(other_model)],
            "reward": str(tiny_reward),
            "data": str(data.prompts),
            "sampling": {"max_new_tokens": 6},
        }
        run({"stages": {"judge": defaults | settings}}, directory)
        stage = directory / "stages" / "judge"
        samples = [json.loads(line) for line in (stage / "samples.jsonl").read_text().splitlines()]
        return json.loads((stage / "result.json").read_text()), samples

    return go


@pytest.fixture
def with_code(tiny_model: Path, tiny_reward: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tiny language model and reward model as types of their own, which come with the Python that makes
    them."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    code = (
        "import torch\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'keel-own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
        "class OwnForSequenceClassification(LlamaPreTrainedModel):\n    config_class = OwnConfig\n"
        "    def __init__(self, config):\n        super().__init__(config)\n"
        "        self.model = LlamaModel(config)\n"
        "        self.score = torch.nn.Linear(config.hidden_size, 1, bias=False)\n        self.post_init()\n"
    )
    found = []
    for source, head in ((tiny_model, "ForCausalLM"), (tiny_reward, "ForSequenceClassification")):
        folder = tmp_path / f"own{head}"
        shutil.copytree(source, folder)
        (folder / "code_of_own.py").write_text(code)
        config = json.loads((folder / "config.json").read_text())
        own = {"AutoConfig": "code_of_own.OwnConfig", f"AutoModel{head}": f"code_of_own.Own{head}"}
        config |= {"model_type": "keel-own", "architectures": [f"Own{head}"], "auto_map": own}
        (folder / "config.json").write_text(json.dumps(config))
        found.append(str(folder))
    yield found
    for name in [name for name in sys.modules if name.startswith("transformers_modules.")]:
        del sys.modules[name]


@pytest.mark.parametrize("kind", ["evaluate", "best_of_n"])
@pytest.mark.parametrize("trusted", [True, False])
def test_models_and_rewards_with_code_of_their_own_run_where_they_are_trusted(
    kind: str, trusted: bool, with_code: Any, run: Any, data: Any, tmp_path: Path
) -> None:
    model, reward = with_code
    rows = {"source": str(data.prompts), "rows": 2}
    settings: dict[str, Any] = {
        "kind": kind,
        "reward": reward,
        "data": rows,
        "sampling": {"max_new_tokens": 3},
    }
    if kind == "evaluate":
        settings |= {"models": [model], "trust_remote_code": trusted}
    else:
        settings |= {
            "model": {"path": model, "trust_remote_code": trusted},
            "samples_per_prompt": 2,
            "max_steps": 1,
        }
    if trusted:
        run({"stages": {"s": settings}}, tmp_path / "run")
        assert (tmp_path / "run" / "stages" / "s" / "result.json").exists()
    else:
        with pytest.raises(UsageError, match="trust_remote_code"):
            run({"stages": {"s": settings}}, tmp_path / "run")


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


def test_samples_are_what_was_sampled_blanks_included(judge: Any) -> None:
    """So that their scores can be computed again."""
    _, samples = judge("blanks", sampling={"max_new_tokens": 12})
    assert any(row["completion"] != row["completion"].strip() for row in samples)


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


@pytest.fixture
def voted(data: Any, tmp_path: Path) -> Path:
    """The pairs with votes, kinds and positions."""
    rows = [json.loads(line) for line in data.pairs.read_text().splitlines()]
    for i, row in enumerate(rows):
        row["votes"] = {"chosen": 3, "rejected": i % 2}
        row |= {"kind": "odd" if i % 3 else "even", "first": "chosen" if i % 4 else "rejected"}
    path = tmp_path / "voted.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_reward_model_is_judged_by_more_than_its_accuracy(
    judge: Any, voted: Path, tiny_reward: Path, tokenizer: Any
) -> None:
    found = judge("judged", comparisons=str(voted), subset="kind", position="first")[0]["reward_model"]
    rows = [json.loads(line) for line in voted.read_text().splitlines()]
    assert list(found) == [
        "accuracy",
        "by_margin",
        "by_subset",
        "calibration",
        "length",
        "position",
        "offset",
    ]
    assert {name: one["n"] for name, one in found["by_subset"].items()} == {
        kind: sum(row["kind"] == kind for row in rows) for kind in ("even", "odd")
    }
    assert found["by_margin"]["unanimous"]["n"] + found["by_margin"]["split"]["n"] == len(rows)
    assert found["position"]["reward"]["first"]["n"] == len(rows)
    loaded = learned.load(str(tiny_reward), device=torch.device("cpu"))
    sides = [
        learned.encode(loaded, row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")
    ]
    scores = learned.score(loaded, sides).double().numpy()
    difference = scores[0::2] - scores[1::2]
    shares = np.array([3 / (3 + i % 2) for i in range(len(rows))])
    brier = np.mean((1 / (1 + np.exp(-difference)) - shares) ** 2)
    assert found["calibration"]["brier"]["mean"] == pytest.approx(brier, abs=1e-6)
    longer = [len(row["chosen"]) - len(row["rejected"]) for row in rows]
    expected = (difference * longer).sum() / np.sqrt((difference**2).sum() * np.square(longer).sum())
    assert found["length"]["pairs"]["pearson"] == pytest.approx(expected, abs=1e-4)


def test_an_ensemble_is_asked_whether_its_members_disagree(
    judge: Any, voted: Path, tiny_reward: Path, tmp_path: Path
) -> None:
    ensemble = tmp_path / "ensemble"
    shutil.copytree(tiny_reward, ensemble)
    other = AutoModelForSequenceClassification.from_pretrained(tiny_reward)
    with torch.no_grad():
        other.score.weight.copy_(other.score.weight.flip(1))
    other.save_pretrained(ensemble / "members" / "2")
    AutoTokenizer.from_pretrained(tiny_reward).save_pretrained(ensemble / "members" / "2")
    found = judge("ensemble", comparisons=str(voted), reward=str(ensemble))[0]["reward_model"]
    assert 0 < found["disagreement"]["auroc"] < 1
    assert found["disagreement"]["std_wrong"]["mean"] > 0


def test_columns_of_comparisons_that_are_not_there_are_named(judge: Any, voted: Path, data: Any) -> None:
    from keel.errors import DataError, UsageError

    with pytest.raises(UsageError, match="`subset` names a column of `comparisons`, and there are none"):
        judge("none", subset="kind")
    with pytest.raises(UsageError, match="subset: no comparison has a column 'sort'; they have first, kind"):
        judge("other", comparisons=str(voted), subset="sort")
    with pytest.raises(DataError, match=r"'kind' is 'even'.*chosen or rejected"):
        judge("wrong", comparisons=str(voted), position="kind")
    rows = [json.loads(line) | {"kind": str(i)} for i, line in enumerate(voted.read_text().splitlines())]
    voted.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UsageError, match="at most 50 kinds"):
        judge("many", comparisons=str(voted), subset="kind")


def test_models_with_other_vocabularies_have_no_kl(
    judge: Any, tiny_model: Path, tmp_path: Path, tokenizer: Any
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.resize_token_embeddings(310)
    model.save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    with pytest.raises(UsageError, match="vocabulary of 310"):
        judge("wide", models=[str(tiny_model), str(tmp_path / "wide")])


def test_the_best_of_several_n_are_those_of_each_n_alone(judge: Any, tiny_model: Path) -> None:
    """They share their samples: as many are drawn as the largest n asks for."""
    alone = {n: judge(f"best-{n}", best_of=[n])[0]["models"] for n in (2, 4)}
    together, _ = judge("best", best_of=[4, 2])
    names = [f"{tiny_model} best of {n}" for n in (4, 2)]
    assert list(together["models"])[2:] == names
    for n, name in zip((4, 2), names, strict=True):
        assert together["models"][name] == alone[n][name]
    assert together["models"][names[0]]["proxy"]["mean"] >= together["models"][names[1]]["proxy"]["mean"]
