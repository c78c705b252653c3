"""One base for all roles: what it changes is memory, and nothing else."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from keel.config import parse
from keel.errors import UsageError
from keel.models import lora
from keel.models.load import ModelSource
from keel.models.shared_base import open_base
from keel.pipeline.pipeline import Pipeline
from keel.rewards import learned, on_base
from keel.rl import rollout
from keel.rl import setup as rl_setup
from keel.rl.setup import make_optimizers, restore_training, training_state
from keel.stages.loop_utils import copy_state

LORA = {"r": 2, "alpha": 16}


@pytest.fixture(scope="module")
def rewarded(run: Any, data: Any, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a reward stage of one member and one of two, trained as adapters."""
    folder = tmp_path_factory.mktemp("rewarded")
    stage = {
        "kind": "reward",
        "model": str(tiny_model),
        "data": str(data.pairs),
        "lora": LORA,
        "lr": 3e-2,
        "batch_size": 8,
        "max_steps": 4,
        "normalize": 0,
    }
    run({"stages": {"reward": stage, "rewards": {**stage, "members": 2}}}, folder)
    return folder / "stages"


@pytest.fixture
def stages(run: Any, data: Any, tiny_model: Path, rewarded: Path, tmp_path: Path) -> Any:
    """Run one on-policy stage; its directory and what was said."""

    def go(name: str, **settings: Any) -> tuple[Path, list[str]]:
        stage = {
            "kind": "ppo",
            "model": str(tiny_model),
            "reward": str(rewarded / "reward" / "model"),
            "data": str(data.prompts),
            "lora": LORA,
            "lr": 1e-2,
            "batch_size": 8,
            "updates": 2,
            "epochs": 2,
            "mini_batch": 4,
            "micro_batch": 3,
            "sampling": {"max_new_tokens": 5},
        }
        said: list[str] = []
        config = {"name": "tiny", "threads": 1, "device": "cpu", "stages": {"one": stage | settings}}
        pipeline = Pipeline(parse(config), tmp_path / "runs" / name, said.append)
        pipeline._report = lambda: None
        pipeline.run()
        return pipeline.stage_directory("one"), said

    return go


def metrics_of(stage: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [
        ("ppo", True),
        pytest.param("grpo", False, marks=pytest.mark.slow),
        pytest.param("ppo", False, marks=pytest.mark.slow),
        pytest.param("grpo", True, marks=pytest.mark.slow),
    ],
)
def test_a_shared_base_gives_the_bytes_of_separate_models(
    kind: str, checkpointing: bool, stages: Any, tiny_reward: Path
) -> None:
    """With a reward model of its own weights: only where policy, reference and critic keep theirs differs."""
    settings = {"kind": kind, "reward": str(tiny_reward), "gradient_checkpointing": checkpointing}
    if kind == "grpo":
        settings |= {"samples_per_prompt": 2}
    one, _ = stages("separate", **settings)
    other, _ = stages("adapters", sharing="adapters", **settings)
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    for folder in ("model", "model/adapter", *(["critic", "critic/adapter"] if kind == "ppo" else [])):
        (weights,) = (one / folder).glob("*.safetensors")
        assert weights.read_bytes() == (other / folder / weights.name).read_bytes()


def opened_on(base: Any, path: Path) -> tuple[list[learned.RewardModel], list[str]]:
    said: list[str] = []
    found = on_base.load_members_on_base(
        str(path), base, dtype="float32", trust_remote_code=False, say=said.append
    )
    return found, said


@pytest.fixture
def base(tiny_model: Path) -> Any:
    return open_base(ModelSource(str(tiny_model)), 0, torch.device("cpu"))


INPUTS = [{"input_ids": [5, 6, 7, 8]}, {"input_ids": [9, 8, 7]}, {"input_ids": [3]}]


def test_a_reward_adapter_on_the_base_gives_the_scores_of_the_whole_reward_model(
    base: Any, rewarded: Path, tiny_model: Path
) -> None:
    """Those of peft's own loader to the bit, those of the merged model up to rounding; with scale and
    tokenizer."""
    (shared,), said = opened_on(base, rewarded / "reward" / "model")
    alone = learned.load(str(rewarded / "reward" / "model"), device=torch.device("cpu"))
    assert not said
    assert (shared.mean, shared.std, shared.scaled) == (alone.mean, alone.std, True)
    assert learned.same_tokenizer(shared.tokenizer, alone.tokenizer)
    scores = learned.score(shared, INPUTS)
    torch.testing.assert_close(scores, learned.score(alone, INPUTS), rtol=1e-4, atol=1e-5)
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    theirs = PeftModel.from_pretrained(plain, rewarded / "reward" / "model" / "adapter").eval()
    assert torch.equal(scores, learned.score(learned.RewardModel(theirs, shared.tokenizer), INPUTS))
    untouched = learned.score(learned.RewardModel(base.scorer(0), shared.tokenizer), INPUTS)
    assert not torch.allclose(scores, untouched, atol=1e-2)


def test_the_members_of_an_ensemble_cost_adapters_only(base: Any, rewarded: Path) -> None:
    members, said = opened_on(base, rewarded / "rewards" / "model")
    assert len(members) == 2
    assert not said
    shared = {p.data_ptr() for p in base.model.parameters()}
    for member in members:
        own = sum(p.numel() for p in member.model.parameters() if p.data_ptr() not in shared)
        assert 0 < own < 0.2 * sum(p.numel() for p in base.model.parameters())
    one, other = (learned.score(member, INPUTS) for member in members)
    assert not torch.allclose(one, other)


def test_a_reward_model_that_is_no_adapter_on_this_base_is_opened_whole_and_that_is_said(
    stages: Any, rewarded: Path, tiny_reward: Path, tiny_model: Path, tmp_path: Path
) -> None:
    one, said = stages("adapter", sharing="adapters")
    assert not any("memory of its own" in line for line in said)
    _, said = stages("whole", sharing="adapters", reward=str(tiny_reward))
    assert any("takes memory of its own: all of its weights were trained" in line for line in said)
    moved = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        moved.lm_head.weight.mul_(1.5)
    moved.save_pretrained(tmp_path / "moved")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "moved")
    _, said = stages("other base", sharing="adapters", model=str(tmp_path / "moved"))
    assert any("takes memory of its own: its adapter was trained on another base" in line for line in said)
    separate, _ = stages("separate")
    for ours, theirs in zip(metrics_of(one), metrics_of(separate), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-2, abs=1e-3)  # the merged reward model rounds otherwise


def test_a_folder_with_nothing_but_an_adapter_is_a_reward_model_for_its_own_base(
    stages: Any, rewarded: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """As peft and TRL save them: known by the name of the base in its settings, and without a scale."""
    bare = tmp_path / "bare"
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    trained = PeftModel.from_pretrained(plain, rewarded / "reward" / "model" / "adapter")
    trained.save_pretrained(bare)
    settings = json.loads((bare / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tiny_model)
    (bare / "adapter_config.json").write_text(json.dumps(settings))
    running = {"shaping": {"normalize": "running"}}
    one, _ = stages("bare", sharing="adapters", reward=str(bare), **running)
    other, _ = stages("kept", sharing="adapters", **running)
    for ours, theirs in zip(metrics_of(one), metrics_of(other), strict=True):
        assert ours["objective/scores"] == theirs["objective/scores"]
    with pytest.raises(UsageError, match="`sharing: adapters`"):
        stages("separate", reward=str(bare), **running)
    settings["base_model_name_or_path"] = "somebody/else"
    (bare / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UsageError, match="trained on another base, and there is no whole model"):
        stages("foreign", sharing="adapters", reward=str(bare), **running)


def test_adapter_files_are_what_peft_reads_and_the_same_for_every_run(
    rewarded: Path, tiny_model: Path
) -> None:
    folder = rewarded / "reward" / "model" / "adapter"
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "base.json",
    }  # fmt: skip
    assert lora.belongs_to(folder, ModelSource(str(tiny_model)))
    assert not lora.belongs_to(folder, ModelSource(str(rewarded / "reward" / "model")))
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["task_type"] == "SEQ_CLS"
    assert settings["target_modules"] == sorted(settings["target_modules"])
    assert "base_model.model.score.weight" in load_file(folder / "adapter_model.safetensors")


# ---------------------------------------------------------------- what is trained and kept


def test_optimizer_and_checkpoint_hold_adapters_and_heads_and_nothing_of_the_base(
    open_ppo: Any, tiny_model: Path
) -> None:
    _, setup = open_ppo(sharing="adapters", lora=LORA)
    optimizers = make_optimizers(setup.config, setup.roles)
    held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    models = [setup.roles.policy, setup.roles.critic]
    trained = {id(p): name for m in models for name, p in m.named_parameters() if p.requires_grad}
    assert held == trained.keys()
    assert all("lora_" in name or "score" in name for name in trained.values())
    state = training_state(setup, optimizers)
    assert {*state["policy"], *state["value0"]} == set(trained.values())
    kept = sum(p.numel() for part in ("policy", "value0") for p in state[part].values())
    assert kept < 0.5 * sum(p.numel() for p in setup.roles.reference.parameters())
    before = copy_state(setup.roles.policy)
    with torch.no_grad():
        for model in models:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.zero_()
    restore_training(setup, optimizers, {**state, "policy": before})
    assert all(torch.equal(value, before[name]) for name, value in copy_state(setup.roles.policy).items())


def test_everything_of_the_base_stays_as_it_was_in_a_run_and_in_saving_it(
    stages: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def watched(*args: Any) -> Any:
        seen.append(open_base(*args))
        return seen[-1]

    monkeypatch.setattr(rl_setup, "open_base", watched)
    stages("watched", sharing="adapters")
    start = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    (base,) = seen
    assert all(torch.equal(value, start[name]) for name, value in base.model.state_dict().items())


# ---------------------------------------------------------------- offload


def test_frozen_models_rest_between_uses_and_change_nothing(
    open_ppo: Any, tiny_reward: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, awake = open_ppo(offload=False)
    moves: list[tuple[str, str]] = []
    whole = LlamaPreTrainedModel.to

    def moved(self: Any, place: Any, *args: Any, **more: Any) -> Any:
        moves.append((type(self).__name__, str(place)))
        return whole(self, "cpu")

    _, resting = open_ppo(offload=True)
    for model in (resting.roles.reference, resting.opened[0].models[0].model):
        assert model.keel_works_on == torch.device("cpu")
        model.keel_works_on = torch.device("cuda:7")
    monkeypatch.setattr(LlamaPreTrainedModel, "to", moved)
    done = rollout.sample(resting, tasks[:4], 1)
    assert not moves
    rated, scored = rollout.rate(resting, tasks[:4], done), rollout.score_tokens(resting, done)
    score, lm = "LlamaForSequenceClassification", "LlamaForCausalLM"
    assert moves == [(score, "cuda:7"), (score, "cpu"), (lm, "cuda:7"), (lm, "cpu")]
    assert torch.equal(rated.total, rollout.rate(awake, tasks[:4], done).total)
    assert torch.equal(scored.ref_logp, rollout.score_tokens(awake, done).ref_logp)


def test_offload_without_effect_is_refused(
    stages: Any, open_ppo: Any, rewarded: Path, tiny_model: Path
) -> None:
    with pytest.raises(UsageError, match="`offload` has no effect on a CPU"):
        stages("cpu", offload=True)
    with pytest.raises(
        UsageError, match="`offload` has no effect: reference and reward models are on the policy's"
    ):
        open_ppo(sharing="adapters", reward=str(rewarded / "reward" / "model"), offload=True)


# ---------------------------------------------------------------- 8 and 4 bits


def test_quantised_weights_without_bitsandbytes_are_refused_before_anything_runs(
    stages: Any, tiny_model: Path, tiny_reward: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        UsageError, match=r"one: quantize needs bitsandbytes.*pip install 'bitsandbytes>=0\.48'"
    ):
        stages("none", model={"path": str(tiny_model), "quantize": "4bit"})
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(__version__="0.43.1"))
    with pytest.raises(UsageError, match=r"0\.48 or newer; here is 0\.43\.1"):
        stages("old", reward={"kind": "learned", "model": str(tiny_reward), "quantize": "8bit"})


@pytest.mark.parametrize("bits", ["4bit", pytest.param("8bit", marks=pytest.mark.slow)])
def test_a_quantised_base_is_shared_and_the_saved_model_is_in_full_precision(
    bits: str, stages: Any, tiny_model: Path
) -> None:
    """bitsandbytes computes on a CPU too. Same bytes as with three quantised models."""
    pytest.importorskip("bitsandbytes", "0.48")
    model = {"path": str(tiny_model), "quantize": bits}
    one, _ = stages("shared", model=model, sharing="adapters")
    other, _ = stages("separate", model=model, reward={"kind": "length", "high": 3})
    again, _ = stages("shared too", model=model, sharing="adapters", reward={"kind": "length", "high": 3})
    assert (other / "metrics.jsonl").read_bytes() == (again / "metrics.jsonl").read_bytes()
    assert [row["val/ratio_first"] for row in metrics_of(one)] == [1.0] * 2
    for folder, family in (("model", AutoModelForCausalLM), ("critic", AutoModelForSequenceClassification)):
        saved = family.from_pretrained(one / folder)
        assert not hasattr(saved.config, "quantization_config")
        assert {p.dtype for p in saved.parameters()} <= {torch.bfloat16, torch.float32}
    start = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).state_dict()
    ends = AutoModelForCausalLM.from_pretrained(one / "model", dtype=torch.bfloat16).state_dict()
    assert torch.equal(start["model.embed_tokens.weight"], ends["model.embed_tokens.weight"])
    name = "model.layers.0.mlp.up_proj.weight"
    change = (ends[name].float() - start[name].float()).abs().max() / start[name].float().abs().max()
    assert 0 < change < 0.5


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_frozen_models_may_be_quantised_by_themselves(bits: str, open_ppo: Any, tiny_reward: Path) -> None:
    pytest.importorskip("bitsandbytes", "0.48")
    tasks, whole = open_ppo()
    _, small = open_ppo(
        reference_quantize=bits, reward={"kind": "learned", "model": str(tiny_reward), "quantize": bits}
    )
    done = rollout.sample(whole, tasks[:4], 1)
    rough, exact = rollout.score_tokens(small, done), rollout.score_tokens(whole, done)
    assert torch.equal(rough.logp, exact.logp)
    assert 0 < (rough.ref_logp - exact.ref_logp).abs().mean() < 0.5
    totals = [rollout.rate(setup, tasks[:4], done).total for setup in (small, whole)]
    assert 0 < (totals[0] - totals[1]).abs().mean() < 0.5
