"""A new user who does what a message says, to the letter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from keel.config import KINDS
from keel.config.labelled import LabelledSource

_BARE = re.compile(r"\b((?:on_bad|too_long|packing|max_length|holdout): ?[\w.]+)")


class NoAdviceError(AssertionError):
    """The message names no setting that could be written down."""


def settings_in(message: str, fills: Mapping[str, str]) -> dict[str, Any]:
    """The settings that a message tells to set; `fills` are what only the person knows, in place of what a
    message leaves open."""
    for asked, known in fills.items():
        message = message.replace(asked, known)
    found: dict[str, Any] = {}
    for setting, text in re.findall(
        r"stages\.\w+\.(\w+): .*`(\{.*\})`", message
    ):  # that very setting's value
        found[setting] = yaml.safe_load(text)
    said = [text for text in message.split("`")[1::2] if re.match(r"\w+: ", text)]
    for text in () if found else said or _BARE.findall(message):
        found = {**yaml.safe_load(f"{{{text}}}"), **found}  # of several ways the first
    if not found:
        raise NoAdviceError(message)
    left = re.findall(r"\b(?:YOUR_COLUMN|COLUMN|VALUE|FILE)\b", str(found))
    assert not left, f"the message leaves open what the person could not know: {message}"
    return found


def apply(stage: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Write the settings where the schema has them: beside the stage's own, or beside its data."""
    kind = KINDS[stage["kind"]]
    for key, value in settings.items():
        if key in ("data", "eval_data"):
            stage[key] = value
        elif key in LabelledSource.model_fields:
            for place in ("data", "eval_data"):
                if place in stage:
                    given = stage[place]
                    given = {"source": given} if isinstance(given, str) else given
                    stage[place] = {**given, key: value}
        else:
            assert key in kind.model_fields, f"a {stage['kind']} stage has no {key}"
            stage[key] = value
