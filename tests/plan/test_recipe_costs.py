"""The table of docs/recipes.md is what `keel plan` says of each recipe, with rows as long as `max_length`.

`PYTHONPATH=src python tests/plan/test_recipe_costs.py` prints the table.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from keel.config import RunConfig, read
from keel.pipeline.pipeline import Pipeline
from keel.plan import planner

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
CARDS = ("24", "80")
LONG = 1024  # tokens of a row where a recipe has no `max_length`
HEAD = "| recipe | stage | at its peak | 24 GB | 80 GB |"


def _row(limit: int) -> dict[str, Any]:
    """A row of every type, its prompt and each reply half of `limit` tokens (without a tokenizer on this
    machine, of four characters each)."""
    asked, said = "word" * (limit // 2), "text" * (limit // 2 - 1)
    answers = {"answer": f"{said}\n#### 7", "question": asked}
    return {"prompt": asked, "completion": said, "chosen": said, "rejected": said[:-4] + "more", **answers}


def _overrides(config: RunConfig, folder: Path) -> list[str]:
    """Rows of the longest kind in the place of data that is not on this machine, and few of a world's."""
    longest = max((getattr(stage, "max_length", None) or 0 for stage in config.stages.values()), default=0)
    changes: list[str] = []
    for name, stage in config.stages.items():
        limit = getattr(stage, "max_length", None) or longest or LONG
        path = folder / f"{limit}.jsonl"
        path.write_text(json.dumps(_row(limit)) + "\n" + json.dumps(_row(limit - 2)) + "\n")
        text = folder / "book.txt"
        text.write_text("\n\n".join(["word " * 200] * 2))
        for setting in ("data", "eval_data", "comparisons"):
            given: Any = getattr(stage, setting, None)
            if not given:
                continue
            if isinstance(given, dict):
                made: Any = {label: [{"source": str(text)}] for label in given}
            else:
                made = [_source(one, path, text) for one in given]
            changes.append(f"{name}.{setting}={json.dumps(made)}")
        if getattr(stage, "reward", None):
            filters = [{**t.model_dump(exclude_none=True), "source_filter": None} for t in stage.reward]  # pyright: ignore[reportAttributeAccessIssue]
            changes.append(f"{name}.reward={json.dumps(filters)}")
    return changes


def _source(one: Any, path: Path, text: Path) -> dict[str, Any]:
    if one.stage:
        return one.model_dump(exclude_defaults=True)
    if one.source.startswith(("world:", "gym:")):
        return {**one.model_dump(exclude_defaults=True), "rows": 200}
    if one.source.endswith(".txt"):
        return {**one.model_dump(exclude_defaults=True, exclude={"rows"}), "source": str(text)}
    kept = one.model_dump(exclude_defaults=True, include={"verdicts"})
    return {"source": str(path), "format": "keel", **kept}


def costs(path: Path, folder: Path) -> list[str]:
    """The rows of a recipe: its hungriest stage, and on each card what it takes to fit."""
    config = read(path, [*_overrides(read(path), folder), "device=cpu"])
    entries = planner.plan(Pipeline(config, folder / "run" / path.stem, lambda line: None))
    known = [entry for entry in entries if entry["memory"]]
    fullest = max(known, key=lambda entry: entry["memory"]["card_peak"])
    return [_line(path.stem, fullest, known)]


def _line(name: str, fullest: dict[str, Any], entries: list[dict[str, Any]]) -> str:
    cells = [_card(entries, card) for card in CARDS]
    peak = fullest["memory"]["card_peak"] / 1e9
    return f"| {name} | `{fullest['stage']}` | {peak:.1f} GB | {cells[0]} | {cells[1]} |"


def _card(entries: list[dict[str, Any]], card: str) -> str:
    """ "fits", or what each stage that does not fit takes to."""
    found: list[str] = []
    for entry in entries:
        fit = entry["memory"]["cards"][card]
        if fit["fits"]:
            continue
        if fit["with"] is None:
            return f"`{entry['stage']}` does not fit"
        settings = (f"{entry['stage']}.{key}={json.dumps(value)}" for key, value in fit["with"].items())
        found.append("`" + " ".join(settings).replace('"', "") + "`")
    return ", ".join(found) or "fits"


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_table_is_what_keel_plan_says(path: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for line in costs(path, tmp_path):
        assert line in page


def test_every_recipe_is_in_the_table() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    table = page.partition(HEAD)[2].partition("\n\n")[0]
    names = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert names == [path.stem for path in RECIPES]


if __name__ == "__main__":
    print(HEAD, "|---|---|---|---|---|", sep="\n")
    for recipe in RECIPES:
        with tempfile.TemporaryDirectory() as made:
            print(*costs(recipe, Path(made)), sep="\n", flush=True)
