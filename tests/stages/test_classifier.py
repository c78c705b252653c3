"""The classifier stage: texts by label in, a model that `keel.rewards.classifier` reads out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from keel.algorithms import classification
from keel.config import ClassifierConfig, parse
from keel.errors import DataError, UsageError
from keel.models.load import ModelSource, load_tokenizer, scorer
from keel.pipeline.pipeline import Pipeline
from keel.plan.planner import plan
from keel.rewards.classifier import Classifier, encoded
from keel.stages import classifier
from keel.stages.loop_utils import micro_batches
from keel.types import TextRecord

BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
SEA = [
    f"the {a} ship and the {b} sea." for a in ("red", "old", "big", "low") for b in ("cold", "deep", "far")
]
HOME = [
    f"the {a} tea in the {b} house." for a in ("red", "old", "big", "low") for b in ("cold", "small", "far")
]


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, str]:
    """Short texts of two labels, one of which has three times as many."""
    found = {}
    for label, rows in (("sea", SEA), ("home", HOME[:4])):
        path = tmp_path / f"{label}.jsonl"
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        found[label] = str(path)
    return found


@pytest.fixture
def books(tmp_path: Path) -> Callable[[int], dict[str, Any]]:
    """Whole texts of many paragraphs, each with its number in it: label → files."""

    def go(count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for label, rows in (("sea", SEA), ("home", HOME)):
            for number in range(count):
                path = tmp_path / f"{label}-{number}.txt"
                path.write_text("\n\n".join(rows[number:] + rows[:number]) + "\n")
                found.setdefault(label, []).append(str(path))
        return found

    return go


@pytest.fixture
def train(run: Any, tmp_path: Path) -> Any:
    """Run one classifier stage; returns its directory."""

    def go(data: Any, name: str = "run", **settings: Any) -> Path:
        defaults = {
            "kind": "classifier",
            "model": {"init": BERT, "vocab_size": 300},
            "data": data,
            "lr": 1e-2,
            "batch_size": 4,
            "max_steps": 30,
            "epochs": 100,
            "holdout": 0.2,
        }
        run({"stages": {"genre": defaults | settings}}, tmp_path / name)
        return tmp_path / name / "stages" / "genre"

    return go


def metrics(stage: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- learning


@pytest.mark.parametrize("init", [BERT, LLAMA], ids=["encoder", "decoder"])
def test_it_learns_and_is_read_as_a_reward(init: Any, train: Any, texts: Any) -> None:
    stage = train(texts, model={"init": init, "vocab_size": 300})
    rows = metrics(stage)
    assert rows[-1]["loss"] < 0.3 * rows[0]["loss"]
    assert rows[-1]["accuracy"] == 1.0
    result = json.loads((stage / "result.json").read_text())
    assert result["accuracy"]["mean"] == rows[-1]["eval_accuracy"] == 1.0
    assert result["classes"].keys() == {"home", "sea"}
    assert result["classes"]["home"]["n"] == 1
    assert result["classes"]["sea"]["n"] == 2
    config = AutoConfig.from_pretrained(stage / "model")
    assert config.id2label == {0: "home", 1: "sea"}
    assert config.label2id == {"home": 0, "sea": 1}
    reward = Classifier(str(stage / "model"), "sea", output="probability")
    sea, home = reward(["", ""], [SEA[-1], HOME[0]])
    assert sea > 0.9 > 0.1 > home


def test_a_language_model_and_adapters_become_a_classifier(train: Any, texts: Any, tiny_model: Path) -> None:
    stage = train(texts, model=str(tiny_model), lora={"r": 4, "alpha": 8})
    assert metrics(stage)[-1]["loss"] < 0.5 * metrics(stage)[0]["loss"]
    _, info = AutoModelForSequenceClassification.from_pretrained(stage / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_twice_the_same_bytes_whatever_the_labels_order(
    train: Any, texts: Any, differences: Any, tmp_path: Path
) -> None:
    train(texts, "one", max_steps=3)
    train(dict(reversed(texts.items())), "two", max_steps=3)
    assert not differences(tmp_path / "one", tmp_path / "two")


def test_a_trained_classifier_is_gone_on_with_only_for_its_own_labels(
    train: Any, texts: Any, tmp_path: Path
) -> None:
    first = train(texts, "first")
    again = train(texts, "again", model=str(first / "model"), max_steps=1, lr=1e-6)
    assert metrics(again)[0]["loss"] < 0.1
    with pytest.raises(UsageError, match="tells apart home, sea, the data home, ship"):
        train({"home": texts["home"], "ship": texts["sea"]}, "other", model=str(first / "model"))


# ---------------------------------------------------------------- the loss


def test_the_loss_is_worked_out_by_hand() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0], [0.0, math.log(4.0)]])
    value, measured = classification.cross_entropy(
        logits, torch.tensor([0, 1, 0]), torch.tensor([1.0, 2.0, 0.5]), 4
    )
    assert float(value) == pytest.approx((math.log(4 / 3) + 2 * math.log(2) + 0.5 * math.log(5)) / 4)
    assert int(measured["correct"]) == 1  # equal outputs: the first label is taken


def test_every_label_counts_the_same(stage_run: Any, tiny_model: Path, texts: Any) -> None:
    config = ClassifierConfig.model_validate({"kind": "classifier", "model": str(tiny_model), "data": texts})
    tokenizer = load_tokenizer(str(tiny_model))
    held = {"sea": [TextRecord(t) for t in SEA], "home": [TextRecord(t) for t in HOME[:4]]}
    too_long = classifier.prepare.TooLong(stage_run, "error", 48)
    rows = classifier._rows(config, stage_run, tokenizer, held, too_long)
    assert [row.label for row in rows] == [0] * 4 + [1] * 12  # in alphabetical order
    assert {row.label: row.weight for row in rows} == {0: 2.0, 1: 2 / 3}


@pytest.mark.parametrize("which", ["tiny_model", "tiny_bert"])
@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_leave_the_gradient_as_it_is(
    which: str, size: int, request: pytest.FixtureRequest
) -> None:
    """Against each row alone, unpadded, by transformers' own forward, in float64."""
    path = str(request.getfixturevalue(which))
    model = scorer(ModelSource(path), 3, labels=["a", "b", "c"]).double().eval()
    tokenizer = load_tokenizer(path)
    some = ["the cat is red.", "so", "the owl is pink, so pink it is.", "it is.", "the fox is blue."]
    rows = [
        classifier.ClassifierRow(row, i % 3, 0.5 + i) for i, row in enumerate(encoded(tokenizer, some, None))
    ]

    def gradients() -> list[torch.Tensor]:
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad(set_to_none=True)
        return found

    for row in rows:
        ids = torch.tensor([row.inputs["input_ids"]])
        z = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        (-row.weight * z.log_softmax(-1)[row.label] / len(rows)).backward()
    expected = gradients()
    for part in micro_batches(rows, size):
        classifier.loss(model, part, 0, len(rows))[0].backward()
    found = gradients()
    assert len(found) == len(expected) > 5
    assert max(float(g.abs().max()) for g in expected) > 1e-2
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


# ---------------------------------------------------------------- passages


def test_a_text_is_cut_into_equal_passages_and_nothing_is_lost(stage_run: Any, tiny_bert: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_bert))
    text = TextRecord(" ".join(SEA[:3]))
    whole = tokenizer(text.text, add_special_tokens=False)["input_ids"]
    rows = classifier._passages(tokenizer, text, 20, stage_run)
    lengths = [len(row["input_ids"]) for row in rows]
    assert len(rows) == math.ceil(len(whole) / 18)
    assert max(lengths) <= 20
    assert max(lengths) - min(lengths) < len(rows)
    ends = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert all((row["input_ids"][0], row["input_ids"][-1]) == ends for row in rows)
    assert [token for row in rows for token in row["input_ids"][1:-1]] == whole
    (short,) = classifier._passages(tokenizer, TextRecord("it is."), 20, stage_run)
    assert short == encoded(tokenizer, ["it is."], None)[0]  # as the reward reads it


def test_a_txt_file_is_one_text_and_books_are_held_out_whole(train: Any, books: Any) -> None:
    stage = train(books(3), passages=True, max_length=16)
    facts = json.loads((stage / "stage.json").read_text())["facts"]
    # six books of twelve paragraphs, about 9 tokens each: two books held out, four trained on
    assert facts["held_out_rows"] * 2 == facts["rows"]
    assert facts["held_out_rows"] > 10
    tokenizer = AutoTokenizer.from_pretrained(stage / "model")
    assert tokenizer.model_max_length == 16
    assert Classifier(str(stage / "model"), "sea").max_length == 16
    first = tokenizer("the sea")["input_ids"]
    assert tokenizer.decode(first) == "<|cls|>the sea<|end|>"
    assert len(tokenizer) == 300 == AutoConfig.from_pretrained(stage / "model").vocab_size


def test_held_out_books_by_name(train: Any, books: Any) -> None:
    found = books(2)
    one, other = ({label: paths[i] for label, paths in found.items()} for i in (0, 1))
    stage = train(one, eval_data=other, holdout=0, passages=True, max_length=16)
    facts = json.loads((stage / "stage.json").read_text())["facts"]
    assert facts["rows"] == facts["held_out_rows"]
    result = json.loads((stage / "result.json").read_text())
    assert result["accuracy"]["n"] == facts["held_out_rows"]
    assert result["accuracy"]["mean"] > 0.9


def test_no_passage_of_a_held_out_book_is_trained_on(stage_run: Any, books: Any) -> None:
    config = ClassifierConfig.model_validate(
        {"kind": "classifier", "model": "m", "data": books(3), "passages": True, "holdout": 0.3}
    )
    kept, held = classifier._texts(config, stage_run)
    assert {label: len(own) for label, own in kept.items()} == {"home": 2, "sea": 2}
    assert {label: len(own) for label, own in held.items()} == {"home": 1, "sea": 1}
    for label in ("home", "sea"):
        assert held[label][0].text not in [text.text for text in kept[label]]
        assert held[label][0].text.count("\n\n") == 11  # a whole book


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "a.jsonl"}, "by label"),
        ({"data": {"source": "a.jsonl"}}, "by label"),
        ({"data": {"sea": "a.jsonl"}}, "at least two"),
        ({"data": {"sea": "a.jsonl", "": "b.jsonl"}}, "without a name"),
        ({"data": {"sea": "a.jsonl", "home": []}}, "at least 1 item"),
        ({"eval_data": {"sea": "a.jsonl", "house": "b.jsonl"}}, "same labels; 'home'"),
        ({"data": {"sea": {"source": "a.jsonl", "weight": 2}, "home": "b.jsonl"}}, "`weight` has no effect"),
        ({"passages": True, "too_long": "skip"}, "`too_long` has no effect with `passages`"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: Any, message: str) -> None:
    stage = {"kind": "classifier", "model": "gpt2", "data": {"sea": "a.jsonl", "home": "b.jsonl"}}
    with pytest.raises(UsageError, match=message):
        parse({"name": "x", "stages": {"genre": stage | settings}})


def test_a_single_book_cannot_be_held_out(train: Any, books: Any) -> None:
    with pytest.raises(
        UsageError, match=r"label 'home' has one text \(the paragraphs of a .txt file are one"
    ):
        train(books(1), passages=True, max_length=16)


def test_a_text_that_is_too_long_is_named(train: Any, texts: Any) -> None:
    with pytest.raises(DataError, match=r"jsonl:\d+: \d+ tokens, more than the 8 of stage 'genre'"):
        train(texts, max_length=8)


def test_rows_of_another_type_are_refused_before_anything_is_trained(
    train: Any, texts: Any, data: Any
) -> None:
    with pytest.raises(DataError, match="wanted: language modelling"):
        train({**texts, "pairs": str(data.pairs)})


def test_a_reward_model_cannot_become_a_classifier(train: Any, texts: Any, tiny_reward: Path) -> None:
    with pytest.raises(UsageError, match="tells apart"):
        train(texts, model=str(tiny_reward))


def test_the_plan_knows_all_labels(books: Any, tmp_path: Path) -> None:
    stage = {
        "kind": "classifier",
        "model": {"init": BERT, "vocab_size": 300},
        "data": books(2),
        "passages": True,
        "max_length": 16,
        "batch_size": 4,
    }
    config = parse({"name": "x", "device": "cpu", "stages": {"genre": stage}})
    (entry,) = plan(Pipeline(config, tmp_path / "run", str))
    assert entry["rows"] == 48  # paragraphs
    assert "home: 24 rows · 2 sources; sea: 24 rows · 2 sources" in entry["data"]
    assert 5 <= entry["steps"] <= 20
    assert entry["parameters"] > 10_000
