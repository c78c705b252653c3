"""Every recipe through the real loading code: two steps a stage, with tiny stand-ins for its models and data."""

from __future__ import annotations

import gc
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from keel.config import DataConfig, PPOConfig, RunConfig, Supervised, read
from keel.pipeline import Pipeline

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
        vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=2048,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Comparisons as Anthropic wrote them: one string a side, the prompt at the head of both."""
    path = tmp_path_factory.mktemp("recipes") / "pairs.jsonl"
    starts = [
        f"\n\nHuman: is the {animal} red?\n\nAssistant:"
        for animal in ("cat", "dog", "fox", "hen", "owl", "pig")
    ]
    rows = [
        {"chosen": f"{s} it is {c}.", "rejected": f"{s} {c}"} for s in starts for c in ("red", "blue", "pink")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _stand_ins(config: RunConfig, model: Path, pairs: Path) -> list[str]:
    """Overrides that make a config tiny and leave its form as it is."""
    changes = ["threads=1", "device=cpu"]
    for name, stage in config.stages.items():
        changes.append(f"{name}.batch_size=4")
        rows = 300 if stage.kind == "pretrain" else 24  # a tokenizer is trained on them
        for setting in ("data", "eval_data", "comparisons"):
            sources: list[DataConfig] = getattr(stage, setting, None) or []
            worlds = [s.source.startswith("world:") for s in sources]
            changes += [
                f"{name}.{setting}={json.dumps([{'source': s.source, 'rows': rows} for s in sources])}"
                if all(worlds)
                else f"{name}.{setting}={json.dumps(str(pairs))}"
            ] * bool(sources)
        for setting, source in stage.references():
            if source not in config.stages:
                assert setting == "model", f"{name}: a stand-in for {setting} is needed here"
                changes.append(f"{name}.model.path={model}")
        if isinstance(stage, Supervised):
            changes += [f"{name}.max_steps=2", f"{name}.micro_batch=2", f"{name}.save_every=1"]
        if stage.kind == "reward":
            changes += [f"{name}.normalize=4"]
        if isinstance(stage, PPOConfig):
            changes += [f"{name}.updates=2", f"{name}.mini_batch=2", f"{name}.micro_batch=2"]
            changes += [f"{name}.batch_size={4 * stage.samples_per_prompt}"]
            changes += [f"{name}.critic_warmup={min(stage.critic_warmup, 1)}"]
        if hasattr(stage, "sampling"):
            changes.append(f"{name}.sampling.max_new_tokens=8")
    return changes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs(path, model, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(Pipeline, "_report", lambda self: None)
    config = read(path, _stand_ins(read(path), model, pairs))
    Pipeline(config, tmp_path / "run", str).run()
    for name, stage in config.stages.items():
        folder = tmp_path / "run" / "stages" / name
        assert json.loads((folder / "result.json").read_text())
        if stage.kind == "evaluate":
            assert json.loads((folder / "result.json").read_text())["models"].keys() == set(stage.models)
        else:
            assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()] == [1, 2]
            assert (folder / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_introduces_itself(path):
    config = read(path)
    assert config.name == path.stem
    assert 20 < len(config.description) < 110


@pytest.mark.parametrize("path", [p for p in RECIPES if p.stem != "helpdesk"], ids=lambda path: path.stem)
def test_the_command_in_a_recipe_replaces_everything_from_outside(path, model, pairs):
    commands = [shlex.split(line) for line in COMMAND.findall(path.read_text(encoding="utf-8"))]
    assert {words[2] for words in commands} == {path.stem}
    overrides = max(commands, key=len)[3:]
    mine = [
        re.sub(r"(TRAIN|TEST)\.jsonl", str(pairs), word).replace("=MODEL", f"={model}") for word in overrides
    ]
    config = read(path, mine)
    named = {source for stage in config.stages.values() for source in stage.inputs()} - {*config.stages}
    assert named == {str(model)}
    assert {s.source for stage in config.stages.values() for s in stage.data} == {str(pairs)}  # pyright: ignore[reportAttributeAccessIssue]


def test_llama2_has_the_published_settings():
    stages: dict[str, Any] = read(FOLDER / "llama2-7b.yaml").stages
    sft, reward, ppo = stages["sft"], stages["reward"], stages["ppo"]
    assert sft.model.path == "meta-llama/Llama-2-7b-hf"
    assert (sft.lr, sft.epochs, sft.batch_size) == (2e-5, 3, 4)
    assert (reward.lr, reward.epochs, reward.batch_size) == (1e-5, 1, 4)
    assert (ppo.lr, ppo.batch_size, ppo.mini_batch, ppo.epochs) == (1.41e-5, 64, 4, 4)
    assert (ppo.kl.coef, ppo.clip, ppo.max_grad_norm) == (0.2, 0.2, 1.0)
    assert (ppo.sampling.max_new_tokens, ppo.sampling.temperature) == (128, 0.7)


def _sources(config: RunConfig, kinds: set[bool]) -> set[tuple[str, str]]:
    """(source, split) of the stages that train (True) or judge (False)."""
    stages: list[Any] = [s for s in config.stages.values() if (s.kind != "evaluate") in kinds]
    return {(d.source, d.split) for s in stages for d in [*s.data, *(getattr(s, "comparisons", None) or [])]}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_nothing_is_judged_on_rows_that_it_was_trained_on(path):
    config = read(path)
    assert _sources(config, {False})
    assert not _sources(config, {False}) & _sources(config, {True})


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
