"""What is written is documented: every logged name, every setting, every command and path of the README."""

from __future__ import annotations

import json
import re
import shlex
import typing
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel

from keel.cli import main
from keel.config import RunConfig, parse
from keel.diagnosis.watch import CHECKS
from keel.pipeline.pipeline import Pipeline
from keel.worlds.shop import CHAT_TEMPLATE

ROOT = Path(__file__).parents[1]
METRICS = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
SECTIONS = {
    "pretrain": "pretrain and sft",
    "sft": "pretrain and sft",
    "reward": "reward",
    "classifier": "classifier",
    "dpo": "dpo",
    "ppo": "ppo and grpo",
    "grpo": "ppo and grpo",
    "online_dpo": "ppo and grpo",
    "distill": "ppo and grpo",
    "best_of_n": "best_of_n",
    "collect": "collect",
    "evaluate": "evaluate",
}


def _defined() -> dict[tuple[str, str], set[str]]:
    """(section, file) → names in the first column of its table. A file with a section of its own has file
    ""."""
    found: dict[tuple[str, str], set[str]] = {}
    section = file = ""
    for line in METRICS.splitlines():
        if line.startswith("## "):
            section, file = line[3:], ""
        elif line.startswith("### "):
            file = line[4:]
        elif cell := re.match(r"\| `([^`]+)` \| (\S.*?) \| (\S.*?) \| (\S.*?) \|$", line):
            found.setdefault((section, file), set()).add(cell[1])
        else:
            assert not line.startswith("| `"), f"a row without all four cells: {line}"
    return found


@pytest.fixture(scope="module")
def written(
    tiny_reward: Path, standing_judge: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], set[str]]:
    """(section, file) → names, of a tiny run over all stages with every optional measure switched on."""
    experts = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "output_router_logits": True,
    }

    def rows(split: str, number: int = 12) -> dict[str, Any]:
        return {"source": f"world:helpdesk/{split}", "rows": number}

    few: dict[str, Any] = {"batch_size": 4, "max_steps": 2, "eval_every": 1}
    stream = tmp_path_factory.mktemp("stream") / "texts.jsonl"  # one of its rows is bad
    stream.write_text('{"text": ""}\n' + '{"text": "the cat is red, so it is."}\n' * 200, encoding="utf-8")
    marked = stream.with_name("marked.jsonl")
    turns = '{"prompt": "\\n\\nHuman: the cat?\\n\\nAssistant:", "completion": " it is red."}\n'
    marked.write_text(turns * 4, encoding="utf-8")
    logs = stream.with_name("mine.py")
    logs.write_text(
        "def score(completions, log_metric, log_extra):\n    log_metric('size', 1)\n"
        "    log_extra('size', [len(c) for c in completions])\n    return [len(c) for c in completions]\n"
    )
    short = {"max_new_tokens": 6}
    judge = {"model": "scripted", "address": standing_judge.address}
    stages = {
        "base": {
            "kind": "pretrain",
            "data": rows("text", 60),
            "model": {"init": {"model_type": "mixtral", **experts}},
            **few,
        },
        "streamed": {
            "kind": "pretrain",
            "data": {"source": str(stream), "on_bad": "skip"},
            "stream": True,
            "model": "base",
            "max_length": 64,
            **few,
        },
        "sft": {"kind": "sft", "model": "base", "data": rows("demonstrations"), **few},
        "marked": {"kind": "sft", "model": "sft", "data": str(marked), "holdout": 0, "max_steps": 1},
        "reward": {
            "kind": "reward",
            "model": "sft",
            "data": rows("comparisons", 30),
            "normalize": 4,
            "sampling": short,
            **few,
        },
        "rewards": {
            "kind": "reward",
            "model": "sft",
            "data": rows("comparisons", 30),
            "normalize": 0,
            "members": 2,
            **few,
        },
        "genre": {
            "kind": "classifier",
            "model": "sft",
            "data": {"asked": rows("text"), "told": rows("text", 8)},
            "passages": True,
            **few,
        },
        **{
            loss: {"kind": "dpo", "model": "sft", "data": rows("comparisons", 30), "loss": loss, **few}
            for loss in ("sigmoid", "kto", "orpo")
        },
        "ppo": {
            "kind": "ppo",
            "model": "sft",
            "reward": "reward",
            "data": rows("prompts"),
            "batch_size": 4,
            "updates": 3,
            "epochs": 2,
            "sampling": short,
            "kl": {"target": 1.0},
            "judge": "world:helpdesk",
            "control": {"on_finding": "adjust", "reward_bound": -1e6},
            "ptx": {"data": rows("text"), "batch_size": 2},
            "rollout": {"ahead": 1},
            "importance_cap": 2.0,
            "eval_every": 1,
            "eval_data": rows("prompts", 4),
        },
        "grpo": {
            "kind": "grpo",
            "model": "sft",
            "reward": [
                "reward",
                {"kind": "length", "high": 9},
                f"python:{logs}:score",
                {"kind": "judge", "mode": "ranking", **judge},
            ],
            "data": rows("prompts"),
            "batch_size": 4,
            "samples_per_prompt": 2,
            "updates": 2,
            "sampling": short,
            "resample": 1,
        },
        "carried": {
            "kind": "grpo",
            "model": "sft",
            "reward": {"kind": "length", "high": 9},
            "data": rows("prompts", 4),
            "batch_size": 2,
            "samples_per_prompt": 2,
            "updates": 2,
            "sampling": short,
            "rollout": {"partial": 2},
            "importance_cap": 2.0,
        },
        "clerk": {
            "kind": "grpo",
            "model": {"path": "sft", "chat_template": CHAT_TEMPLATE},
            "environment": "world:shop",
            "reward": {"kind": "environment"},
            "curriculum": {"by": "source"},
            "data": {"source": "world:shop/prompts", "rows": 4},
            "batch_size": 2,
            "samples_per_prompt": 2,
            "updates": 1,
            "sampling": short,
        },
        "online": {
            "kind": "online_dpo",
            "model": "sft",
            "reward": {"kind": "length", "high": 1, "slack": 60, "unit": "characters"},
            "data": rows("prompts"),
            "batch_size": 4,
            "updates": 1,
            "sampling": short,
        },
        "distilled": {
            "kind": "distill",
            "model": "sft",
            "teacher": "base",
            "data": rows("prompts"),
            "batch_size": 4,
            "updates": 1,
            "sampling": short,
        },
        "best": {
            "kind": "best_of_n",
            "model": "sft",
            "reward": ["reward", {"kind": "length", "high": 9}],
            "data": rows("prompts"),
            "samples_per_prompt": 2,
            "sampling": short,
            "holdout": 0.2,
            **few,
        },
        "collect": {
            "kind": "collect",
            "model": "sft",
            "data": rows("prompts", 4),
            "pairs": 3,
            "annotators": ["world:helpdesk", {"judge": judge}],
            "sampling": short,
        },
        "judge": {
            "kind": "evaluate",
            "models": ["sft", "ppo"],
            "reward": [
                "reward",
                {"kind": "length", "high": 9},
                {"kind": "judge", "on_failure": "none", **judge},
            ],
            "gold": "world:helpdesk",
            "data": rows("test_prompts", 4),
            "comparisons": rows("comparisons", 5),
            "subset": "form",
            "position": "first",
            "sampling": short,
        },
        "clerks": {
            "kind": "evaluate",
            "models": ["clerk"],
            "environment": "world:shop",
            "data": {"source": "world:shop/test_prompts", "rows": 2},
            "sampling": short,
        },
        "cut": {  # a reward model that reads fewer tokens than such replies have in its own
            "kind": "evaluate",
            "models": ["sft"],
            "reward": str(tiny_reward),
            "data": rows("test_prompts", 2),
            "sampling": {"max_new_tokens": 40},
        },
    }
    pipeline = Pipeline(
        parse({"name": "tiny", "threads": 1, "device": "cpu", "stages": stages}),
        tmp_path_factory.mktemp("docs") / "run",
        str,
    )
    pipeline._report = lambda: None
    pipeline.run()
    names: dict[tuple[str, str], set[str]] = {}
    for name, stage in pipeline.config.stages.items():
        folder = pipeline.stage_directory(name)
        for path in folder.glob("*.jsonl"):
            own_section = path.name == "times.jsonl"
            where = (path.name, "") if own_section else (SECTIONS[stage.kind], path.name)
            for line in path.read_text(encoding="utf-8").splitlines():
                names.setdefault(where, set()).update(json.loads(line))
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        flat = {*result} | {measure for measures in result.get("models", {}).values() for measure in measures}
        names.setdefault((SECTIONS[stage.kind], "result.json"), set()).update(flat)
        mark = json.loads((folder / "stage.json").read_text(encoding="utf-8"))
        names.setdefault(("stage.json", ""), set()).update({*mark} | {*mark["facts"]})
    return names


def _plain(names: set[str]) -> set[str]:
    """Names with what a run chooses left open."""
    open_parts = (
        (r"^gold/.+", "gold/PART"),
        (r"^reward/.+", "reward/NAME"),
        (r"^rewards/logged/.+", "rewards/logged/NAME"),
        (r"^curriculum/rate/.+", "curriculum/rate/VALUE"),
        (r"^rewards/.+/(mean|std|applies)$", r"rewards/NAME/\1"),
    )
    for pattern, name in open_parts:
        names = {re.sub(pattern, name, one) for one in names}
    return names


def test_every_logged_name_is_defined(written):
    defined = _defined()
    undefined = {where: _plain(names) - defined.get(where, set()) for where, names in written.items()}
    assert not {where: names for where, names in undefined.items() if names}


def test_every_check_is_documented_with_its_changes():
    page = (ROOT / "docs" / "diagnosis.md").read_text(encoding="utf-8")
    rows = {
        row[0].strip("` "): row
        for row in (line.strip("|").split("|") for line in page.splitlines())
        if len(row) == 6
    }
    words = {"raise_kl": "β", "cut_lr": "lr"}
    for name, check in CHECKS.items():
        assert name in rows, f"{name} is not in docs/diagnosis.md"
        assert {word.strip() for word in rows[name][5].split(",")} - {""} == {words[c] for c in check.changes}
        assert len(check.look.__doc__ or "") > 80, f"{name} does not say why its limits are where they are"
    assert {name for name in rows if name.islower() and name.isidentifier()} - {"check"} == set(CHECKS)
    assert "docs/diagnosis.md" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_defined_name_is_logged(written):
    dead = {where: names - _plain(written.get(where, set())) for where, names in _defined().items()}
    assert not {where: names for where, names in dead.items() if names}


def test_samples_hold_what_the_page_says(written):
    assert {"rewards", "kl", "stop_reason"} <= written["ppo and grpo", "samples.jsonl"]
    assert {"proxy", "gold"} <= written["evaluate", "samples.jsonl"]
    assert {name for name in written["evaluate", "result.json"] if name.startswith("gold/")} == {
        "gold/helpful", "gold/harmless", "gold/honest",
    }  # fmt: skip


def _groups(group: type[BaseModel]) -> set[type[BaseModel]]:
    """The settings classes inside `group`, itself included."""
    found: set[type[BaseModel]] = {group}
    pending: list[Any] = [field.annotation for field in group.model_fields.values()]
    while pending:
        annotation = pending.pop()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            if annotation not in found:
                found.add(annotation)
                pending += [field.annotation for field in annotation.model_fields.values()]
        else:
            pending += typing.get_args(annotation)
    return found


def test_every_setting_has_a_description():
    groups = _groups(RunConfig)
    assert len(groups) > 12
    bare = [
        f"{g.__name__}.{n}"
        for g in groups
        for n, f in g.model_fields.items()
        if not (f.description or "").strip().endswith((".", "…"))
    ]
    assert not bare
    assert not [group.__name__ for group in groups if not group.__doc__]


# ---------------------------------------------------------------- the pages


PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def _commands(page: Path) -> list[list[str]]:
    """The words of each `keel …` line of the page's code blocks and inline code."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()] + inline
    return [shlex.split(line, comments=True) for line in lines if re.match(r"keel [a-z]", line)]


@cache
def _command() -> Any:
    return typer.main.get_command(main.app)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_on_the_pages_exist(page):
    for words in _commands(page):
        command = _command()
        arguments = words[1:]
        while arguments and arguments[0] in getattr(command, "commands", {}):
            command = command.commands[arguments.pop(0)]
        assert not getattr(command, "commands", None) or not arguments, f"{page.name}: {shlex.join(words)}"
        options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        used = {word.partition("=")[0] for word in arguments if word.startswith("-")}
        assert used <= options, f"{page.name}: {shlex.join(words)}"


def test_the_readme_shows_the_main_commands():
    shown = {words[1] for words in _commands(ROOT / "README.md")}
    assert {"run", "plan", "report", "chat", "recipes", "schema", "doctor"} <= shown


def test_configs_in_the_readme_are_valid():
    import yaml

    blocks = re.findall(
        r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL
    )
    assert blocks
    for block in blocks:
        tree = yaml.safe_load(block)
        assert parse(tree if "stages" in tree else {"name": "shown", "stages": tree})


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_between_the_pages_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_a_list_begins_after_an_empty_line(page):
    """The repository's browser reads `text\\n- item` as a list, the site's Markdown does not."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for block in re.split(r"\n\s*\n", text):
        lines = block.strip("\n").splitlines()
        items = [number for number, line in enumerate(lines) if re.match(r"([-*]|\d+\.) ", line)]
        assert not items or lines[0].startswith("#") or items[0] == 0, f"{page.name}: {lines[items[0]]}"


def test_each_boundary_names_tests_that_exist() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    section = text.partition("## What keel trusts")[2].partition("\n`make fuzz`")[0]
    boundaries = re.findall(r"^- (?:\*\*)?(.*?)\n(?=- |\Z)", section + "\n", re.DOTALL | re.MULTILINE)
    assert len(boundaries) == 15
    for boundary in boundaries:
        named = re.findall(r"`(tests/[^`]+)`", boundary)
        if not boundary.startswith("Network"):
            assert named, boundary
        assert [path for path in named if not (ROOT / path).exists()] == []
