"""Every recipe through the real loading code: two steps a stage, with tiny stand-ins for its models and
data."""

from __future__ import annotations

import gc
import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from keel.config import (
    ClassifierConfig,
    CollectConfig,
    DataConfig,
    EvaluateConfig,
    OnPolicy,
    PPOConfig,
    RewardConfig,
    RunConfig,
    Supervised,
    Training,
    read,
)
from keel.pipeline.pipeline import Pipeline

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
COMMAND = re.compile(r"# +(keel run .+)")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A tiny Llama with the context of a real one, for recipes that set max_length."""
    gc.freeze()
    folder = tmp_path_factory.mktemp("recipes") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class StandIns:
    """Tiny files and models in the places of a recipe's."""

    model: Path
    encoder: Path  # for classifiers to start from, and for similarity
    judge: str  # an address
    pairs: Path
    files: Mapping[str, Path]  # what a recipe names → rows of the same columns

    def file(self, source: str) -> str:
        if source.startswith(("world:", "gym:")):
            return source
        found = self.files.get(source) or (self.files[".txt"] if source.endswith(".txt") else None)
        assert found, f"a stand-in for {source} is needed here"
        return str(found)


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def stand_ins(
    tmp_path_factory: pytest.TempPathFactory, model: Path, tiny_bert: Path, standing_judge: Any
) -> StandIns:
    """For each data set of the hub a file with its columns: HH-RLHF's one string a side, GSM8K's worked
    solutions, UltraFeedback's conversations, TL;DR's posts; for texts a book of some paragraphs."""
    folder = tmp_path_factory.mktemp("recipes")
    animals, colours = ("cat", "dog", "fox", "hen", "owl", "pig"), ("red", "blue", "pink")
    starts = [f"\n\nHuman: is the {animal} red?\n\nAssistant:" for animal in animals]
    pairs = [{"chosen": f"{s} it is {c}.", "rejected": f"{s} {c}"} for s in starts for c in colours]
    solutions = [
        {"question": f"{a} + {b}?", "answer": f"It is {a}+{b}=<<{a}+{b}={a + b}>>{a + b}.\n#### {a + b}"}
        for a in range(3, 7)
        for b in range(3, 7)
    ]

    def chat(question: str, reply: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]

    chats = [
        {"chosen": chat(f"the {a}?", f"it is {c}."), "rejected": chat(f"the {a}?", c)}
        for a in animals
        for c in colours
    ]
    posts = [
        {"prompt": f"POST: the {a} is {c}.\n\nTL;DR:", "completion": f" {a}: {c}."}
        for a in animals
        for c in colours
    ]
    summaries = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " it is so."} for row in posts
    ]
    book = folder / "book.txt"
    paragraphs = [
        f"so the {a} is {c}, and the {a} is not so {c} as it was." for a in animals for c in colours
    ]
    book.write_text("\n\n".join(paragraphs), encoding="utf-8")
    files = {
        "Anthropic/hh-rlhf": _write(folder / "pairs.jsonl", pairs),
        "openai/gsm8k": _write(folder / "solutions.jsonl", solutions),
        "trl-lib/ultrafeedback_binarized": _write(folder / "chats.jsonl", chats),
        "trl-lib/tldr": _write(folder / "posts.jsonl", posts),
        "trl-lib/tldr-preference": _write(folder / "summaries.jsonl", summaries),
        ".txt": book,
    }
    return StandIns(model, tiny_bert, standing_judge.address, files["Anthropic/hh-rlhf"], files)


def _tiny(config: RunConfig, stand_ins: StandIns) -> list[str]:
    """Overrides that make a config tiny and leave its form as it is: what is done to rows, rewards,
    methods."""
    changes = ["threads=1", "device=cpu"]
    for name, stage in config.stages.items():
        few = {"batch_size": 4}
        rows = 300 if stage.kind == "pretrain" else 16  # a tokenizer is trained on the 300

        def source(one: DataConfig, rows: int = rows) -> dict[str, Any]:
            kept = one.model_dump(exclude_defaults=True, exclude={"rows", "split"})
            if not one.source.startswith(("world:", "gym:")):
                kept.pop("options", None)
            return {**kept, "source": stand_ins.file(one.source), "rows": rows}

        for setting in ("data", "eval_data", "comparisons"):
            found: Any = getattr(stage, setting, None)
            if isinstance(found, dict):
                few[setting] = {label: [source(one) for one in own] for label, own in found.items()}
            elif found:
                few[setting] = [
                    one.model_dump(exclude_defaults=True) if one.stage else source(one) for one in found
                ]
        for setting, outside in stage.references():
            if outside in config.stages:
                continue
            if setting == "model":
                few["model.path"] = str(stand_ins.encoder if stage.kind == "classifier" else stand_ins.model)
            elif setting == "teacher":
                few["teacher"] = str(stand_ins.model)
            elif setting == "models":
                few["models"] = [m if m in config.stages else str(stand_ins.model) for m in stage.models]  # pyright: ignore[reportAttributeAccessIssue]
            else:
                assert setting == "similarity", f"{name}: a stand-in for {setting} is needed here"
        if terms := getattr(stage, "reward", None):
            few["reward"] = [_term(term, stand_ins) for term in terms]
        if isinstance(stage, Supervised):
            few |= {"max_steps": 2, "micro_batch": 2, "save_every": 1}
        if isinstance(stage, ClassifierConfig):
            few["max_length"] = 32
        if isinstance(stage, RewardConfig):
            few["normalize"] = 4
        if isinstance(stage, Training) and stage.model.init:
            few |= {"model.init.hidden_size": 32, "model.init.num_hidden_layers": 1}
        if isinstance(stage, OnPolicy):
            batch = max(4, 2 * stage.samples_per_prompt)
            few |= {"updates": 2, "batch_size": batch, "micro_batch": min(stage.micro_batch or 4, 4)}
            few |= {} if stage.mini_batch is None else {"mini_batch": batch // 2}
        if isinstance(stage, CollectConfig):
            few["pairs"] = 4
            if stage.asks_people:  # a world's annotators vote at once
                few |= {"annotators": "world:helpdesk", "label": None}
        if isinstance(stage, PPOConfig):
            few["critic_warmup"] = min(stage.critic_warmup, 1)
        if hasattr(stage, "sampling"):
            few["sampling.max_new_tokens"] = 8
        changes += [f"{name}.{setting}={json.dumps(value)}" for setting, value in few.items()]
    return changes


def _term(term: Any, stand_ins: StandIns) -> dict[str, Any]:
    changes: dict[str, Any] = {"model": str(stand_ins.encoder)} if term.kind == "similarity" else {}
    if term.kind == "judge" and term.address is not None:
        changes["address"] = stand_ins.judge
    elif term.kind == "judge":  # another stage's model
        changes["max_new_tokens"] = 8
    if term.source_filter is not None:
        changes["source_filter"] = stand_ins.file(term.source_filter)
    return {**term.model_dump(exclude_none=True), **changes}


LONG = (  # by `make test-slow`; what the others run has the same kinds of stages
    "arithmetic", "distill", "generative-rm", "gsm8k-grpo", "gsm8k-sft-ppo", "gym", "hh-rlhf", "llama2-7b",
    "llama3.2-1b", "mini-rlhf", "overoptimization", "rounds", "showdown",
)  # fmt: skip


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] if path.stem in LONG else []) for path in RECIPES],
    ids=lambda path: path.stem,
)
def test_recipe_runs(path, stand_ins, tmp_path, monkeypatch):
    monkeypatch.setattr(Pipeline, "_report", lambda self: None)
    config = read(path, _tiny(read(path), stand_ins))
    Pipeline(config, tmp_path / "run", str).run()
    for name, stage in config.stages.items():
        folder = tmp_path / "run" / "stages" / name
        assert json.loads((folder / "result.json").read_text())
        if stage.kind == "evaluate":
            assert json.loads((folder / "result.json").read_text())["models"].keys() >= set(stage.models)
        elif stage.kind == "collect":
            assert (folder / "comparisons.jsonl").read_text().count("\n") in range(1, 5)
        else:
            first = 0 if getattr(stage, "judge", None) else 1  # a judge is asked before any update, too
            steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()]
            assert steps == list(range(first, 3))
            assert (folder / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_introduces_itself(path):
    config = read(path)
    assert config.name == path.stem
    assert 20 < len(config.description) < 110
    page = (FOLDER.parent / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert path.stem in re.findall(r"[\w.-]+", " ".join(re.findall(r"^## (.+)", page, re.MULTILINE)))


EMBEDDED = [p for p in RECIPES if re.search(r"\b(world|gym):\w", p.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("path", [p for p in RECIPES if p not in EMBEDDED], ids=lambda path: path.stem)
def test_the_command_in_a_recipe_replaces_everything_from_outside(path, model, tmp_path):
    commands = [shlex.split(line) for line in COMMAND.findall(path.read_text(encoding="utf-8"))]
    assert {words[2] for words in commands} == {path.stem}
    mine = [
        re.sub(r"\bMODEL\b", str(model), re.sub(r"[A-Z]+(-TEST)?\.(jsonl|txt)", rf"{tmp_path}/\g<0>", word))
        for word in max(commands, key=len)[3:]
    ]
    config = read(path, mine)
    named = {
        source
        for stage in config.stages.values()
        for setting, source in stage.references()
        if setting != "similarity" and stage.kind != "classifier"
    }
    assert named - {*config.stages} == {str(model)}
    sources = [source for stage in config.stages.values() for source in _all_sources(stage)]
    assert all(str(tmp_path) in source.source for source in sources)
    assert all(source.split == "train" and not source.options for source in sources)  # as files have it


def test_llama2_has_the_published_settings():
    stages: dict[str, Any] = read(FOLDER / "llama2-7b.yaml").stages
    sft, reward, ppo = stages["sft"], stages["reward"], stages["ppo"]
    assert sft.model.path == "meta-llama/Llama-2-7b-hf"
    assert (sft.lr, sft.epochs, sft.batch_size) == (2e-5, 3, 4)
    assert (reward.lr, reward.epochs, reward.batch_size) == (1e-5, 1, 4)
    assert (ppo.lr, ppo.batch_size, ppo.mini_batch, ppo.epochs) == (1.41e-5, 64, 4, 4)
    assert (ppo.kl.coef, ppo.clip, ppo.max_grad_norm) == (0.2, 0.2, 1.0)
    assert (ppo.sampling.max_new_tokens, ppo.sampling.temperature) == (128, 0.7)


def _all_sources(stage: Any) -> list[DataConfig]:
    found: list[DataConfig] = []
    for setting in ("data", "eval_data", "comparisons"):
        value = getattr(stage, setting, None) or []
        found += [one for own in value.values() for one in own] if isinstance(value, dict) else value
    return found


def _behind(config: RunConfig, names: Iterable[str]) -> set[str]:
    """Stages among `names`, and all that these are made from."""
    own = {name for name in names if name in config.stages}
    return own | {one for name in own for one in _behind(config, config.stages[name].inputs())}


def _sources(config: RunConfig, *, judging: bool) -> set[tuple[str, str]]:
    """(source, split) that judged models come from, or that they are judged on: by an evaluate stage, or by
    the judge of the stage that trains them. (A judge may know what they may not.)"""
    judges = [stage for stage in config.stages.values() if isinstance(stage, EvaluateConfig)]
    own = {n: stage for n, stage in config.stages.items() if getattr(stage, "judge", None)}
    judged = _behind(config, {*own, *(name for stage in judges for name in stage.models)})
    found: list[DataConfig] = []
    for name, stage in config.stages.items():
        if isinstance(stage, Training | CollectConfig) and name in judged and not judging:
            data: Any = stage.data
            found += [one for own in data.values() for one in own] if isinstance(data, dict) else data
        elif isinstance(stage, EvaluateConfig) and judging:
            found += _all_sources(stage)
        elif name in own and judging:
            found += getattr(stage, "eval_data", None) or []
    return {(one.source, one.split) for one in found}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_nothing_is_judged_on_rows_that_it_was_trained_on(path):
    config = read(path)
    assert _sources(config, judging=True)
    assert not _sources(config, judging=True) & _sources(config, judging=False)


@pytest.mark.real
def test_hh_rlhf_on_real_data_and_a_real_model(tmp_path):
    folder = Path(os.environ["KEEL_REAL_DATA"])
    rows = next(folder.rglob("helpful.jsonl"))
    model = next(folder.rglob("tinytalk-3m"))
    data = [f"{stage}.data.source={rows}" for stage in ("sft", "reward", "ppo")]
    data += [f"{stage}.data.rows=200" for stage in ("sft", "reward", "ppo")]
    data += [f"judge.data={{source: {rows}, rows: 16, on_bad: skip}}"]
    small = [
        "sft.batch_size=8",
        "sft.max_steps=4",
        "reward.batch_size=8",
        "reward.max_steps=4",
        "reward.normalize=16",
    ]
    small += ["ppo.updates=2", "ppo.batch_size=8", "ppo.mini_batch=4", "ppo.micro_batch=4"]
    config = read(FOLDER / "hh-rlhf.yaml", [f"sft.model={model}", *data, *small, "threads=1", "device=cpu"])
    pipeline = Pipeline(config, tmp_path / "run", str)
    pipeline.run()
    result = json.loads((tmp_path / "run" / "stages" / "judge" / "result.json").read_text())
    facts = json.loads((tmp_path / "run" / "stages" / "judge" / "stage.json").read_text())["facts"]
    assert result["models"]["ppo"]["kl"]["n"] == 16 - facts["rows_left_out"] > 4
