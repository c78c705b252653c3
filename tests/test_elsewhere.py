"""Names of other tools: in messages, on the page, and a TRL config as keel's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from keel.cli.main import app
from keel.config import KINDS, RunConfig, elsewhere, importing, parse
from keel.config.reading import dotted_settings
from keel.errors import UsageError

PAGE = Path(__file__).parents[1] / "docs" / "coming-from.md"
REWARD = {"reward": "r"}


def message(kind: str, **settings: Any) -> str:
    more = REWARD if kind in ("ppo", "grpo") else {}
    stage = {"kind": kind, "model": "gpt2", "data": "d.jsonl", **more, **settings}
    with pytest.raises(UsageError) as found:
        parse({"name": "one", "stages": {"one": stage}})
    return str(found.value)


@pytest.mark.parametrize(
    ("kind", "key", "ours"),
    [
        ("grpo", "beta", "`kl.coef`"),
        ("ppo", "beta", "`kl.coef`"),
        ("sft", "learning_rate", "`lr`"),
        ("grpo", "num_generations", "`samples_per_prompt`"),
        ("grpo", "max_completion_length", "`sampling.max_new_tokens`"),
        ("sft", "gradient_accumulation_steps", "`batch_size`"),
        ("ppo", "num_train_epochs", "`updates`"),
        ("sft", "num_train_epochs", "`epochs`"),
        ("ppo", "eps_clip", "`clip`"),
        ("grpo", "eps_clip", "`clip_low`"),
        ("ppo", "top_p", "no such setting"),
        ("evaluate", "top_p", "`sampling.top_p`"),
        ("reward", "logging_steps", "no such setting"),
        ("sft", "lora_r", "`lora.r`"),
    ],
)
def test_a_name_of_another_tool_is_translated_for_the_stage(kind: str, key: str, ours: str) -> None:
    said = message(kind, **{key: 1})
    assert f"one.{key}: unknown key; " in said
    assert ours in said
    assert "did you mean" not in next(line for line in said.splitlines() if f".{key}:" in line)


def test_a_setting_that_a_stage_lacks_is_not_named() -> None:
    assert "samples_per_prompt" not in message("sft", num_generations=1)


@pytest.mark.parametrize("method", ["kto", "DAPO", "rm", "rejection-sampling"])
def test_a_method_of_another_tool_is_translated(method: str) -> None:
    with pytest.raises(UsageError) as found:
        parse({"name": "one", "stages": {"one": {"kind": method}}})
    assert "in keel that is {kind: " in str(found.value)


def test_a_slip_of_the_finger_still_names_the_nearest() -> None:
    assert "did you mean 'batch_size'?" in message("sft", batchsize=1)
    assert "did you mean" not in message("sft", lerning=1)  # nothing is near


def test_every_translation_exists_in_every_stage_that_it_is_given_for() -> None:
    """And each is one in some stage: a setting that was renamed would be in none."""
    for word in elsewhere.WORDS:
        used = [
            kind
            for kind, config in KINDS.items()
            if any(elsewhere.word_for(name, kind, dotted_settings(config)) is word for name in word.theirs)
        ]
        assert used, word
        assert set(used) >= set(word.kinds) or not word.ours, word
    assert "name" in RunConfig.model_fields


def test_no_translation_is_a_key_of_keel_itself() -> None:
    """Else a right key in one stage would be called unknown only by its kind."""
    for kind, config in KINDS.items():
        for word in elsewhere.WORDS:
            own = [name for name in word.theirs if name in config.model_fields]
            assert all(elsewhere.word_for(name, kind, dotted_settings(config)) is not word for name in own)


def test_the_methods_are_configs() -> None:
    for written in elsewhere.METHODS.values():
        settings = yaml.safe_load(f"{{{written}}}")
        assert settings["kind"] in KINDS
        if set(settings) > {"kind"}:
            more = REWARD if settings["kind"] == "grpo" else {}
            parse({"name": "one", "stages": {"one": {"model": "gpt2", "data": "d", **more, **settings}}})


def test_the_page_has_the_table() -> None:
    text = PAGE.read_text("utf-8")
    for cells in elsewhere.rows():
        assert f"| {' | '.join(cells)} |" in text
    for name, written in elsewhere.METHODS.items():
        assert f"| `{name}` | `{{{written}}}` |" in text


# ---------------------------------------------------------------- TRL's configs

BASE = {"model_name_or_path": "gpt2", "dataset_name": "owner/data"}


def imported(method: str, **values: Any) -> dict[str, Any]:
    found = importing.from_trl({**BASE, **values}, method)
    parse(found.config)
    return found.config["stages"][method]


def test_defaults_that_differ_are_written_out() -> None:
    stage = imported("sft")
    assert (stage["lr"], stage["epochs"], stage["batch_size"], stage["betas"]) == (2e-5, 3.0, 8, [0.9, 0.999])
    assert (stage["schedule"], stage["max_length"], stage["holdout"]) == ("linear", 1024, 0.0)


def test_steps() -> None:
    stage = imported("dpo", per_device_train_batch_size=4, gradient_accumulation_steps=8, max_steps=50)
    assert (stage["batch_size"], stage["micro_batch"], stage["max_steps"]) == (32, 4, 50)
    assert imported("dpo", max_steps=50, warmup_steps=5)["warmup"] == 0.1
    assert imported("dpo", warmup_ratio=0.2)["warmup"] == 0.2
    with pytest.raises(UsageError, match="warmup_steps"):
        importing.from_trl({**BASE, "warmup_steps": 5}, "dpo")


def test_grpo() -> None:
    more = {"reward_funcs": ["mine.short", "owner/model"], "reward_weights": [1.0, 0.5]}
    stage = imported("grpo", beta=0.04, loss_type="dr_grpo", scale_rewards=False, num_iterations=2, **more)
    assert stage["kl"] == {"coef": 0.04, "estimator": "k3", "where": "loss"}
    assert (stage["reduce"], stage["scale"], stage["samples_per_prompt"]) == (512.0, "none", 8)
    assert (stage["clip_low"], stage["clip_high"], stage["epochs"]) == (0.2, 0.2, 2)
    assert stage["shaping"]["missing_stop_penalty"] == 0.0
    function, model = stage["reward"]
    assert (function["kind"], function["function"]) == ("python", "mine.short")
    assert (model["kind"], model["model"], model["weight"]) == ("learned", "owner/model", 0.5)


def test_batches_that_are_sampled_once_for_several_steps() -> None:
    stage = imported("grpo", steps_per_generation=4, reward_funcs="mine.f")
    assert (stage["batch_size"], stage["mini_batch"]) == (32, 8)


@pytest.mark.parametrize(
    ("method", "values", "named"),
    [
        ("grpo", {"reward_funcs": "mine.f", "top_p": 0.9}, "top_p"),
        ("grpo", {"reward_funcs": "mine.f", "loss_type": "sapo"}, "loss_type"),
        ("grpo", {}, "reward_funcs"),
        ("grpo", {"reward_funcs": "mine.f", "num_generations": 3}, "num_generations"),
        ("dpo", {"loss_type": ["sigmoid", "bco_pair"]}, "loss_type"),
        ("dpo", {"sync_ref_model": True}, "sync_ref_model"),
        ("sft", {"loss_type": "dft"}, "loss_type"),
        ("sft", {"neftune_noise_alpha": 5}, "neftune_noise_alpha"),
        ("sft", {"lr_scheduler_type": "polynomial"}, "lr_scheduler_type"),
    ],
)
def test_what_keel_does_otherwise_is_refused_by_name(method: str, values: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        importing.from_trl({**BASE, **values}, method)


def test_the_command(tmp_path: Path) -> None:
    file = tmp_path / "trl.yaml"
    file.write_text(yaml.safe_dump({**BASE, "logging_steps": 5, "use_peft": True}))
    done = CliRunner().invoke(app, ["import-config", "sft", str(file)])
    assert done.exit_code == 0
    config = parse(yaml.safe_load(done.stdout))
    assert (config.stages["sft"].kind, config.seed) == ("sft", 42)
    assert "batch_size 8 is of one device" in done.stderr
