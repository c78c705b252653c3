"""Classifiers as rewards, against transformers' own call on each text alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from keel.errors import UsageError
from keel.rewards.classifier import Classifier

TEXTS = ["it is red.", "so it is blue, so it is.", "the cat is pink.", ""]
NAMES = {0: "bad", 1: "fair", 2: "good"}


def save(base: Path, folder: Path, **config: Any) -> Path:
    """A seeded head on a tiny model, saved with its tokenizer."""
    torch.manual_seed(4)
    model = AutoModelForSequenceClassification.from_pretrained(base, **config)
    with torch.no_grad():
        head = getattr(model, "score", None) or model.classifier
        head.weight.normal_()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def three_labels(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    labels = {name: i for i, name in NAMES.items()}
    return save(tiny_bert, tmp_path_factory.mktemp("classifier"), id2label=NAMES, label2id=labels)


def alone(folder: Path, text: str) -> torch.Tensor:
    """(L,) logits of one unpadded text."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    inputs = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits[0]


def rate(reward: Classifier, *completions: Any, prompts: Any = None) -> torch.Tensor:
    return torch.tensor(
        reward(prompts=prompts or ["?"] * len(completions), completions=list(completions), completion_ids=[])
    )


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_reward_is_the_softmax_of_the_named_label(three_labels: Path, batch_size: int) -> None:
    z = torch.stack([alone(three_labels, text) for text in TEXTS])
    assert z.std() > 0.1
    p = z.exp() / z.exp().sum(dim=1, keepdim=True)
    decided = (z.argmax(dim=1) == 2).float()
    expected = {
        "logit": z[:, 2],
        "probability": p[:, 2],
        "log_probability": p[:, 2].log(),
        "decision": decided,
    }
    for output, values in expected.items():
        for label in ("good", 2):
            reward = Classifier(str(three_labels), label, output=output, batch_size=batch_size)
            torch.testing.assert_close(rate(reward, *TEXTS), values, rtol=0, atol=1e-5)


def test_the_probabilities_of_all_labels_add_up_to_one(three_labels: Path) -> None:
    total = sum(
        rate(Classifier(str(three_labels), name, output="probability"), *TEXTS) for name in NAMES.values()
    )
    torch.testing.assert_close(total, torch.ones(4))


@pytest.mark.parametrize(("labels", "index"), [(1, 0), (3, 1)])
def test_labels_that_stand_alone_are_squashed_alone(
    tiny_bert: Path, tmp_path: Path, labels: int, index: int
) -> None:
    """One output, or several of a multi-label model: σ, not softmax (which would say 1 for a single
    output)."""
    kind = {} if labels == 1 else {"problem_type": "multi_label_classification"}
    folder = save(tiny_bert, tmp_path, num_labels=labels, **kind)
    z = [alone(folder, text)[index].item() for text in TEXTS]
    expected = torch.tensor([1 / (1 + math.exp(-value)) for value in z])
    label = None if labels == 1 else "LABEL_1"
    torch.testing.assert_close(rate(Classifier(str(folder), label, output="probability"), *TEXTS), expected)
    torch.testing.assert_close(rate(Classifier(str(folder), label), *TEXTS), expected.log())
    torch.testing.assert_close(rate(Classifier(str(folder), label, output="logit"), *TEXTS), torch.tensor(z))
    decided = [float(value > 0) for value in z]
    assert rate(Classifier(str(folder), label, output="decision"), *TEXTS).tolist() == decided


def test_a_log_probability_stays_finite_where_the_probability_is_zero(three_labels: Path) -> None:
    reward = Classifier(str(three_labels), "bad")
    assert reward.of_label(torch.tensor([[-500.0, 0.0, 0.0]])).item() == pytest.approx(-500 - math.log(2))


def test_trap_23_a_decoder_is_read_at_its_last_token_though_pad_is_eos(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = save(tiny_model, tmp_path, num_labels=2)
    texts = [text for text in TEXTS if text]
    expected = torch.stack([alone(folder, text)[1] for text in texts])
    reward = Classifier(str(folder), 1, output="logit")
    reward.tokenizer.pad_token = reward.tokenizer.eos_token
    reward.model.config.pad_token_id = reward.tokenizer.eos_token_id
    torch.testing.assert_close(rate(reward, *texts), expected, rtol=0, atol=1e-5)
    assert math.isfinite(rate(reward, "").item())


def test_it_reads_the_completion_or_the_prompt_too(three_labels: Path) -> None:
    reward = Classifier(str(three_labels), 0, output="logit", reads="prompt+completion")
    expected = alone(three_labels, "the cat? it is red.")[0].item()
    assert rate(reward, " it is red.", prompts=["the cat?"]).item() == pytest.approx(expected, abs=1e-5)
    turns = [{"role": "user", "content": "the cat?"}]
    reply = [{"role": "assistant", "content": "it is red."}]
    expected = alone(three_labels, "user: the cat?\nassistant: it is red.")[0].item()
    assert rate(reward, reply, prompts=[turns]).item() == pytest.approx(expected, abs=1e-5)
    only = Classifier(str(three_labels), 0, output="logit")
    assert rate(only, reply, prompts=[turns]).item() == pytest.approx(
        alone(three_labels, "it is red.")[0].item(), abs=1e-5
    )


def test_what_is_too_long_keeps_its_start(three_labels: Path) -> None:
    """48 positions: [CLS], 46 words, [SEP]. The tokenizer's own settings are left as they were."""
    reward = Classifier(str(three_labels), 0, output="logit")
    reward.tokenizer.truncation_side = "left"
    expected = alone(three_labels, "cat " * 46)[0].item()
    assert rate(reward, "cat " * 46 + "red " * 30).item() == pytest.approx(expected, abs=1e-5)
    assert reward.tokenizer.truncation_side == "left"


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("great", "has no label 'great'; its labels are 'bad' \\(0\\), 'fair' \\(1\\), 'good' \\(2\\)"),
        (3, "has no label 3; its labels are"),
        (-1, "has no label -1"),
        (None, "needs a label; its labels are"),
        (True, "has no label True"),
    ],
)
def test_an_unknown_label_is_answered_with_all_labels(three_labels: Path, label: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Classifier(str(three_labels), label)


def test_what_is_no_classifier_is_refused(tiny_bert: Path, three_labels: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no text classifier \(its architecture is BertForMaskedLM\)"):
        Classifier(str(tiny_bert), 0)
    with pytest.raises(UsageError, match="cannot be loaded"):
        Classifier(str(tmp_path / "none"), 0)
    with pytest.raises(UsageError, match="output: 'odds' is not one of probability"):
        Classifier(str(three_labels), 0, output="odds")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="reads: 'prompt'"):
        Classifier(str(three_labels), 0, reads="prompt")  # pyright: ignore[reportArgumentType]


def test_a_classifier_without_its_head_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    """transformers would make one up and go on."""
    folder = save(tiny_bert, tmp_path, num_labels=2)
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"incomplete: it has no classifier\.weight"):
        Classifier(str(folder), 0)


def test_weights_that_can_run_code_are_not_loaded(three_labels: Path, tmp_path: Path) -> None:
    for file in three_labels.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(
        AutoModelForSequenceClassification.from_pretrained(three_labels).state_dict(),
        tmp_path / "pytorch_model.bin",
    )
    with pytest.raises(UsageError, match=r"cannot be loaded.*safetensors"):
        Classifier(str(tmp_path), 0)
