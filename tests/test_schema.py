"""The schema that editors are given takes what the reader takes: every config that keel ships or shows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from keel.config import RunConfig, parse
from keel.errors import UsageError

ROOT = Path(__file__).parents[1]
VALIDATOR = Draft202012Validator(RunConfig.model_json_schema())


def shown() -> list[Any]:
    """The recipes, and the configs and stages in the README and the docs."""
    configs = {path.name: path.read_text("utf-8") for path in sorted((ROOT / "recipes").glob("*.yaml"))}
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        blocks = re.findall(r"```yaml\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL)
        configs |= {f"{page.name}-{number}": block for number, block in enumerate(blocks)}
    whole = {name: as_config(yaml.safe_load(text)) for name, text in configs.items() if "..." not in text}
    return [pytest.param(tree, id=name) for name, tree in whole.items() if tree is not None]


def as_config(tree: Any) -> dict[str, Any] | None:
    """A config, or stages as one; None for another part of a config."""
    if not isinstance(tree, dict) or "stages" in tree:
        return tree if isinstance(tree, dict) else None
    stages = all(isinstance(stage, dict) and "kind" in stage for stage in tree.values())
    return {"name": "shown", "stages": tree} if stages else None


def complaints(tree: Any) -> list[str]:
    return [f"{'.'.join(map(str, e.absolute_path))}: {e.message[:200]}" for e in VALIDATOR.iter_errors(tree)]


@pytest.mark.parametrize("tree", shown())
def test_what_is_shipped_or_shown_is_valid(tree: dict[str, Any]) -> None:
    assert complaints(tree) == []


def test_enough_is_shown() -> None:
    assert len(shown()) >= len(list((ROOT / "recipes").glob("*.yaml"))) + 4


SFT = {"kind": "sft", "model": "gpt2", "data": "d.jsonl"}
PPO = {"kind": "ppo", "model": "gpt2", "data": "p.jsonl", "reward": "reward"}


@pytest.mark.parametrize(
    ("stage", "valid"),
    [
        (SFT, True),
        (SFT | {"model": {"path": "gpt2"}, "data": ["d.jsonl", {"source": "e.jsonl", "weight": 0.5}]}, True),
        (SFT | {"eval_data": "e.jsonl"}, True),
        (PPO | {"reward": "python:mine.f"}, True),
        (PPO | {"reward": ["r", {"kind": "length", "high": 4}]}, True),
        (PPO | {"reward": {"kind": "length", "high": 4}}, True),
        (PPO | {"control": "rollback"}, True),
        (PPO | {"judge": "world:helpdesk", "eval_every": 5}, True),
        (SFT | {"lerning_rate": 1}, False),
        (SFT | {"model": 3}, False),
        (SFT | {"model": {"pth": "gpt2"}}, False),
        (SFT | {"data": {"sorce": "d.jsonl"}}, False),
        (PPO | {"reward": {"kind": "lenght", "high": 4}}, False),
        (PPO | {"reward": 1.0}, False),
    ],
)
def test_schema_and_reader_agree(stage: dict[str, Any], valid: bool) -> None:
    tree = {"name": "one", "stages": {"one": stage}}
    assert (complaints(tree) == []) == valid
    if valid:
        parse(tree)
    else:
        with pytest.raises(UsageError):
            parse(tree)
