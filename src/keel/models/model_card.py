"""What the card of a saved model says for whoever takes it elsewhere: usage that runs, the prompt's format,
how a score is read, the base and its licence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import huggingface_hub
import yaml
from jinja2 import TemplateError

from keel.data import chat
from keel.errors import UsageError
from keel.models.load import score_head
from keel.models.tokenizer import knows_conversations

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HERE = 'from_pretrained(".")'  # as code in a saved card opens the folder that it lies in
_END = "## Base and licence"
_SAID = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"})


def licence(base: str, *, download: bool = True) -> str | None:
    """The licence that the card of a base model names; None where that is not known here. download: of a hub
    id its card may be fetched, not only be looked for in the cache."""
    place = Path(base) / "README.md"
    if not Path(base).is_dir():
        try:
            place = Path(huggingface_hub.hf_hub_download(base, "README.md", local_files_only=not download))
        except (OSError, ValueError):
            return None
    if not place.is_file():
        return None
    found = re.match(r"\A---\n(.*?)\n---", place.read_text(encoding="utf-8"), re.S)
    values = yaml.safe_load(found.group(1)) if found else None
    named = cast("dict[str, Any]", values).get("license") if isinstance(values, dict) else None
    return str(named) if named else None


def licence_text(named: str | None, base: str | None) -> str:
    """What is known of a model's licence. base: None where it was trained from new weights."""
    if named:
        return f"That of the base model `{base}`: {named}."
    if base:
        return f"Not known: the card of the base model `{base}` names none here. It binds this model too."
    return "Not set: the model was trained from new weights; its licence is its owner's to choose."


def saved(
    head: Mapping[str, Any],
    title: str,
    about: str,
    base: str | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    called: str | None = None,
) -> str:
    """The card that a stage saves with its model. head: its YAML. about: what it is and what it was trained
    on. base: path or hub id; None where it was trained from new weights. called: how the card names the base,
    where that is not its path."""
    named = licence(base, download=False) if base else None
    head = {**head, **({"license": named} if named else {})}
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n# {title}\n\n{about}\n\n"
        f"{usage(model, tokenizer)}\n\n{_END}\n\n{licence_text(named, base and (called or base))}\n"
    )


def usage_in(card: str) -> str | None:
    """The sections that `usage` wrote into a saved card; None where there are none."""
    found = re.search(rf"^## Usage\n.*?(?=^{_END}$)", card, re.S | re.M)
    return found.group(0).rstrip() if found else None


def usage(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Sections of a card, as Markdown: code that loads the folder and asks the model, the format of its
    prompts, how its scores are read."""
    config: Any = model.config
    scores = "SequenceClassification" in type(model).__name__
    auto = "AutoModelForSequenceClassification" if scores else "AutoModelForCausalLM"
    asks = _classifies(config) if scores and config.num_labels > 1 else _scores(model, tokenizer)
    code = [
        *(["import torch"] if scores else []),
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.{HERE}",
        f"model = {auto}.{HERE}",
        *(asks if scores else _generates(_template(model, tokenizer))),
    ]
    parts = ["## Usage\n\n```python\n" + "\n".join(code) + "\n```"]
    classifies = scores and config.num_labels > 1
    if not classifies and _template(model, tokenizer) and (shown := _format(tokenizer)):
        parts.append(f"## Prompt format\n\nThe chat template writes a conversation so:\n\n```\n{shown}\n```")
    if scores and config.num_labels == 1:
        parts.append(_reading(config))
    return "\n\n".join(parts)


def _template(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether prompts are to go through the chat template: a model that has seen plain text alone is asked
    with plain text."""
    config: Any = model.config
    of_reward = (getattr(config, "keel_reward", None) or {}).get("prompts")
    return knows_conversations(config, tokenizer) and of_reward != "text" and bool(tokenizer.chat_template)


def _generates(template: bool) -> list[str]:
    asked = (
        'inputs = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], '
        'add_generation_prompt=True, return_dict=True, return_tensors="pt")'
        if template
        else 'inputs = tokenizer("Hello", return_tensors="pt", return_token_type_ids=False)'
    )
    return [
        asked,
        "ids = model.generate(**inputs, max_new_tokens=32)",
        'print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))',
    ]


def _scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A reply's score where keel reads it: at the token that ends the reply."""
    if score_head(model) is None:
        return ['inputs = tokenizer("Hello", "Hi", return_tensors="pt")', *_asked("float(logits)")]
    end = chat.eos_id(tokenizer)
    if not _template(model, tokenizer):
        lines = ['ids = tokenizer("Hello Hi", return_tensors="pt")["input_ids"]', _with(end)]
    else:
        lines = [
            'turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]',
            "ids = tokenizer.apply_chat_template(turns, return_dict=False, return_tensors='pt')",
        ]
        behind = len(chat.ending(tokenizer)) - 1
        if behind < 0:
            lines.append(_with(chat.reply_end(tokenizer)))
        elif behind:
            lines.append(f"ids = ids[:, :-{behind}]  # without what the template writes behind the end")
    return [*lines, "inputs = {'input_ids': ids}", *_asked("float(logits)")]


def _with(end: int) -> str:
    return f"ids = torch.cat([ids, torch.tensor([[{end}]])], dim=1)  # the end of the reply, where it is read"


def _classifies(config: Any) -> list[str]:
    return [
        'inputs = tokenizer("Hello", return_tensors="pt")',
        *_asked("model.config.id2label[int(logits.argmax())]"),
    ]


def _asked(shown: str) -> list[str]:
    return ["with torch.no_grad():", "    logits = model(**inputs).logits", f"print({shown})"]


def _format(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        return ""
    try:
        return str(tokenizer.apply_chat_template([dict(turn) for turn in _SAID], tokenize=False)).rstrip("\n")
    except (TemplateError, UsageError, ValueError, TypeError):
        return ""


def _reading(config: Any) -> str:
    scale = getattr(config, "keel_reward", None)
    normalised = (
        f" Replies of the model that it was made for scored {scale['mean']:.4g} on average, with a standard "
        f"deviation of {scale['std']:.4g}."
        if isinstance(scale, dict)
        else ""
    )
    return (
        "## The score\n\nOne number, higher is better, read at the token that ends the reply. It has no "
        "zero: only differences between replies to one prompt mean something, and sigmoid(a − b) is the "
        f"probability that the first is preferred (Bradley–Terry).{normalised} "
        "A pipeline of transformers puts a sigmoid on it unless it is asked with "
        '`function_to_apply="none"`.'
    )
