"""Which day it is in a run: the config's `date`, else the day of its first start, where a template asks.

A template that writes today's date makes two runs differ, and a run that goes on tomorrow another than one
that does not. So the date is part of the run, kept in its config.yaml, and of the fingerprint of stages whose
models' templates ask for it.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import yaml
from transformers.utils.hub import cached_file

from keel.data import chat
from keel.pipeline.preflight import Sources

_FILES = ("chat_template.jinja", "tokenizer_config.json")


def kept(directory: Path) -> datetime.date | None:
    """The date that a run's config.yaml keeps; None for a run that has none."""
    try:
        value = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8")).get("date")
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return None
    try:
        return value if isinstance(value, datetime.date) else datetime.date.fromisoformat(str(value))
    except ValueError:
        return None


def asks(sources: Sources, name: str, *, hub: bool = False) -> bool:
    """Whether the template of a model that a stage uses writes the date.

    hub: templates that are not on this machine are fetched; else they are taken not to ask.
    """
    stage, given = sources.config.stages[name], sources.config.date is not None
    start = stage.starts_from
    models = {model: True for setting, model in stage.references() if setting != "similarity"}
    if start is not None and start.chat_template is not None:
        if chat.asks_for_date(start.chat_template, given=given):
            return True
        models.pop(start.path or "", None)
    elif start is not None and start.tokenizer is not None:
        models = {start.tokenizer: True, **models}
    return any(_asks(sources, model, given, hub) for model in models)


def _asks(sources: Sources, model: str, given: bool, hub: bool) -> bool:
    if model in sources.config.stages:
        return asks(sources, model, hub=hub)
    return chat.asks_for_date(_template(sources.resolve(model), hub), given=given)


def _template(place: str, hub: bool) -> str:
    """The chat templates in a model's files; "" where there are none."""
    texts: list[str] = []
    for name in _FILES:
        path = Path(place) / name
        if not Path(place).exists():
            options: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
            try:
                found = cached_file(place, name, local_files_only=not hub, **options)
            except OSError:  # neither here nor to be had
                found = None
            path = Path(found) if found else path
        try:
            text = path.read_text(encoding="utf-8")
            texts.append(
                text if name.endswith("jinja") else json.dumps(json.loads(text).get("chat_template"))
            )
        except (OSError, ValueError, AttributeError):
            continue
    return "\n".join(texts)
