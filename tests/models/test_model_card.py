"""A saved card's code runs as it stands and finds what keel finds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from keel.export import card as export_card
from keel.export.models import Model
from keel.models.model_card import saved, usage_in
from keel.rewards import learned

NEWLINE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
NO_END = NEWLINE.replace("+ eos_token ", "")
PLAIN = "plain text"


def asked(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the card's code prints, run in the folder."""
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(compile("\n".join(code), "card", "exec"), {})
    return capsys.readouterr().out.removesuffix("\n")


def left(folder: Path, model: Any, template: str | None, tokenizer: Any, base: Path) -> str:
    """A folder as a stage leaves it, and its card."""
    if template is not None:
        tokenizer.chat_template = None if template is PLAIN else template
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text = saved({"tags": ["keel"]}, "stage", "A model.", str(base), model, tokenizer)
    (folder / "README.md").write_text(text)
    return text


@pytest.mark.parametrize("template", [None, NEWLINE, NO_END, PLAIN])
def test_a_reward_models_card_gives_the_score_that_keel_gives(
    tiny_reward: Path, tmp_path: Path, template: str | None, monkeypatch: Any, capsys: Any
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_reward)
    text = left(tmp_path, model, template, AutoTokenizer.from_pretrained(tiny_reward), tiny_reward)
    reward = learned.load(str(tmp_path), device=torch.device("cpu"))
    user: Any = {"role": "user", "content": "Hello"}
    reply: Any = {"role": "assistant", "content": "Hi"}
    prompt, completion = ("Hello", " Hi") if template is PLAIN else ((user,), (reply,))
    expected = float(learned.score(reward, [learned.encode(reward, prompt, completion)]))
    assert float(asked(tmp_path, monkeypatch, capsys)) == pytest.approx(expected, abs=1e-5)
    assert 'function_to_apply="none"' in text
    assert "0.5 on average, with a standard deviation of 2" in text
    assert ("## Prompt format" in text) == (template is not PLAIN)


@pytest.mark.parametrize("template", [None, NEWLINE, PLAIN])
def test_a_language_models_card_samples_from_it(
    tiny_model: Path, tmp_path: Path, template: str | None, monkeypatch: Any, capsys: Any
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    text = left(tmp_path, model, template, AutoTokenizer.from_pretrained(tiny_model), tiny_model)
    assert asked(tmp_path, monkeypatch, capsys)
    assert "## The score" not in text


def test_a_classifiers_card_names_a_label(
    tiny_model: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    config = AutoConfig.from_pretrained(tiny_model, id2label={0: "good", 1: "bad"})
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, config=config)
    left(tmp_path, model, None, AutoTokenizer.from_pretrained(tiny_model), tiny_model)
    assert asked(tmp_path, monkeypatch, capsys) in ("good", "bad")


def test_the_licence_of_the_base_is_handed_on(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    text = left(tmp_path / "m", model, None, AutoTokenizer.from_pretrained(tiny_model), tmp_path / "base")
    assert yaml.safe_load(text.split("---")[1])["license"] == "mit"
    assert ": mit." in text.split("## Base and licence")[1]
    text = left(tmp_path / "n", model, None, AutoTokenizer.from_pretrained(tiny_model), tmp_path / "none")
    assert "license" not in yaml.safe_load(text.split("---")[1])
    assert "Not known" in text


def test_an_exported_card_has_the_usage_of_the_saved_one_under_its_name(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    text = left(tmp_path / "mine", model, None, AutoTokenizer.from_pretrained(tiny_model), tiny_model)
    found = export_card._use(Model(tmp_path / "mine"))
    assert 'AutoTokenizer.from_pretrained("mine")' in found
    assert found.replace('"mine"', '"."') == usage_in(text)
