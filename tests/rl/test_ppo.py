"""PPO's settings do what they say."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from keel.errors import DataError, UsageError
from keel.models import optim
from keel.models.load import ModelSource, scorer
from keel.models.tokenizer import train_tokenizer
from keel.rewards.shaping import RunningScale
from keel.rl import loop, rollout
from keel.rl.ppo import PPO
from keel.rl.rollout import LoopState
from keel.rl.setup import make_optimizers
from keel.stages.loop_utils import copy_state


@pytest.fixture
def run_ppo(run: Any, data: Any, tiny_model: Path, tiny_reward: Path, tmp_path: Path) -> Any:
    """Run one PPO stage on the tiny model; returns its directory and its metrics."""

    def go(name: str = "run", **settings: Any) -> tuple[Path, list[dict[str, float]]]:
        defaults = {
            "kind": "ppo",
            "model": str(tiny_model),
            "reward": str(tiny_reward),
            "data": str(data.prompts),
            "lr": 1e-3,
            "batch_size": 8,
            "updates": 2,
            "epochs": 2,
            "sampling": {"max_new_tokens": 5},
        }
        run({"stages": {"ppo": defaults | settings}}, tmp_path / name)
        stage = tmp_path / name / "stages" / "ppo"
        return stage, [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]

    return go


def same_weights(one: Path, other: Path) -> bool:
    a, b = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (one, other))
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("sharing", "lora"),
    [
        pytest.param("separate", None, id="separate"),
        pytest.param("trunk", {"r": 4, "alpha": 8}, id="trunk-lora"),
        pytest.param("separate", {"r": 4, "alpha": 8}, id="separate-lora", marks=pytest.mark.slow),
        pytest.param("trunk", None, id="trunk", marks=pytest.mark.slow),
    ],
)
def test_lora_and_gradient_checkpointing_run_and_save_a_plain_model(
    sharing: str, lora: Any, run_ppo: Any, tiny_model: Path
) -> None:
    stage, plain = run_ppo("plain", sharing=sharing, lora=lora)
    again, checkpointed = run_ppo("checkpointed", sharing=sharing, lora=lora, gradient_checkpointing=True)
    assert not same_weights(stage / "model", tiny_model)
    assert [row["val/ratio_first"] for row in plain + checkpointed] == [1.0] * 4
    for one, other in zip(plain, checkpointed, strict=True):  # the same computation, in another order
        assert other == pytest.approx(one, rel=1e-3, abs=1e-4)
    saved = AutoModelForCausalLM.from_pretrained(again / "model").state_dict()
    assert saved.keys() == AutoModelForCausalLM.from_pretrained(tiny_model).state_dict().keys()


@pytest.mark.parametrize(
    ("kind", "sharing"),
    [
        ("gpt2", "separate"),
        ("gpt_neox", "separate"),
        ("gpt_neo", "trunk"),
        pytest.param("gpt2", "trunk", marks=pytest.mark.slow),
        pytest.param("gpt_neox", "trunk", marks=pytest.mark.slow),
        pytest.param("gpt_neo", "separate", marks=pytest.mark.slow),
    ],
)
def test_other_architectures_run_with_a_first_ratio_of_exactly_1(
    kind: str, sharing: str, run_ppo: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """With the dropout that some of them have by default; the scored log-probabilities agree with the
    update's."""
    sizes = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48},
        "gpt_neox": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
        },
        "gpt_neo": {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
        },
    }
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, vocab_size=300, **sizes[kind])
    ).save_pretrained(tmp_path / kind)
    tokenizer.save_pretrained(tmp_path / kind)
    _, rows = run_ppo(model=str(tmp_path / kind), sharing=sharing, micro_batch=3)
    assert [row["val/ratio_first"] for row in rows] == [1.0, 1.0]
    assert max(row["policy/logp_mismatch"] for row in rows) < 1e-5
    assert all(row["grad_norm"] > 0 for row in rows)


def test_with_lora_only_adapters_and_the_value_head_are_trained(open_ppo: Any) -> None:
    _, setup = open_ppo(lora={"r": 4, "alpha": 8})
    for model in (setup.roles.policy, setup.roles.critic):
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trained
        assert all("lora" in name or "score" in name for name in trained)


def test_half_precision_runs_with_a_first_ratio_of_exactly_1(run_ppo: Any, tiny_model: Path) -> None:
    for sharing in ("separate", "trunk"):
        _, rows = run_ppo(
            sharing,
            sharing=sharing,
            model={"path": str(tiny_model), "dtype": "bfloat16"},
            micro_batch=3,
            lora={"r": 4},
        )
        assert [row["val/ratio_first"] for row in rows] == [1.0, 1.0]


def test_the_policy_stays_as_it_was_while_the_critic_warms_up(open_ppo: Any) -> None:
    for sharing in ("separate", "trunk"):
        tasks, setup = open_ppo(sharing=sharing, critic_warmup=1, lr=1e-2)
        optimizers = make_optimizers(setup.config, setup.roles)
        before, values = copy_state(setup.roles.policy), copy_state(setup.roles.value_modules[0])
        collected = loop.collect(PPO(setup), tasks[:8], LoopState(0.05, RunningScale()), 1)
        loop.learn(PPO(setup), optimizers, collected.episodes, 1, LoopState(0.05, RunningScale()))
        assert all(torch.equal(before[k], v) for k, v in setup.roles.policy.state_dict().items())
        assert any(
            not torch.equal(values[k], v) for k, v in setup.roles.value_modules[0].state_dict().items()
        )
        loop.learn(PPO(setup), optimizers, collected.episodes, 2, LoopState(0.05, RunningScale()))
        assert any(not torch.equal(before[k], v) for k, v in setup.roles.policy.state_dict().items())


def test_another_reference_is_what_the_kl_is_measured_against(
    run_ppo: Any, tiny_model: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.lm_head.weight.mul_(3.0)
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "other")
    assert run_ppo("own", updates=1)[1][0]["objective/kl_exact"] == pytest.approx(0.0, abs=1e-6)
    assert run_ppo("twice", old_logp="trainer", updates=1)[1][0]["objective/kl_exact"] == 0.0
    for lora in (None, {"r": 2}):
        _, rows = run_ppo(f"other-{lora}", reference=str(tmp_path / "other"), lora=lora, updates=1)
        assert rows[0]["objective/kl_exact"] > 1.0


@pytest.mark.usefixtures("accel_on")
@pytest.mark.parametrize("sharing", ["separate", pytest.param("trunk", marks=pytest.mark.slow)])
def test_experience_takes_no_forward_of_the_policy_besides_sampling(sharing: str, open_ppo: Any) -> None:
    """Unless it is asked for; what is learned from is the same to rounding."""
    found, asked = {}, []
    for how in ({}, {"old_logp": "trainer"}, {"importance_cap": 2.0}):
        tasks, setup = open_ppo(sharing=sharing, entropy_coef=0.1, **how)
        with torch.no_grad():  # a policy that has moved away from its reference
            setup.roles.policy.lm_head.weight.mul_(1.3)
        done = rollout.sample(setup, tasks[:8], 1)
        calls: list[Any] = []
        rollout.score_tokens(setup, done)  # what is tried out on a model is tried by now
        handle = setup.roles.policy.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        scored = rollout.score_tokens(setup, done)
        handle.remove()
        asked.append(len(calls))
        found[len(found)] = scored
        collected = loop.collect(PPO(setup), tasks[:8], LoopState(0.05, RunningScale()), 1)
        assert all(c.hidden is None for c in collected.experience.completions)  # not kept any longer
    assert asked == [0, 1, 1]
    for name in ("logp", "ref_logp", "exact_kl", "values"):
        torch.testing.assert_close(getattr(found[0], name), getattr(found[1], name), rtol=0, atol=1e-5)
    assert torch.equal(found[1].logp, found[2].logp)
    assert found[0].exact_kl.sum() > 0.1


def test_how_far_the_sampler_is_from_the_trainer_is_measured_in_the_first_step(run_ppo: Any) -> None:
    for name, how in (("sampler", {}), ("trainer", {"old_logp": "trainer"})):
        _, rows = run_ppo(name, mini_batch=4, **how)
        assert all(0 < row["rollout/sampler_drift"] < 1e-5 for row in rows)
        assert all(row["val/ratio_first"] == 1.0 for row in rows)


def test_every_phase_of_an_update_says_how_far_it_is_from_its_floor(run_ppo: Any) -> None:
    stage, _ = run_ppo(updates=1)
    (times,) = [json.loads(line) for line in (stage / "times.jsonl").read_text().splitlines()]
    for phase in ("rollout", "forward", "score", "train", "optimizer"):
        assert times[f"{phase}/roofline"] > 0, phase
    assert times["optimizer"] < times["train"]


def test_the_epochs_end_when_the_policy_has_moved_far_enough(run_ppo: Any) -> None:
    _, rows = run_ppo(epochs=4, mini_batch=4, lr=1e-2, max_approx_kl=1e-6)
    assert [row["policy/epochs"] for row in rows] == [1.0, 1.0]
    # means over the two steps that were taken, not over the eight there might have been
    assert all(0.5 < row["val/ratio"] < 2 and row["policy/entropy_avg"] > 4 for row in rows)


@pytest.mark.parametrize("sharing", [pytest.param("trunk", marks=pytest.mark.slow), "separate"])
def test_a_policy_that_went_too_far_goes_on_more_slowly(
    sharing: str, run_ppo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    step = optim.step
    monkeypatch.setattr(
        optim, "step", lambda o, scale, *more: (rates.append(scale), step(o, scale, *more))[1]
    )
    how = {
        "epochs": 2,
        "mini_batch": 4,
        "lr": 1e-2,
        "schedule": "constant",
        "warmup": 0,
        "sharing": sharing,
        "updates": 3,
    }
    _, free = run_ppo("free", **how, desired_kl=None)
    assert {row["policy/lr_factor"] for row in free} == set(rates) == {1.0}
    assert min(row["policy/approxkl_max"] for row in free) > 1e-3
    rates.clear()
    _, held = run_ppo("held", **how, desired_kl=1e-6)
    assert [row["policy/lr_factor"] for row in held] == pytest.approx([1, 1 / 2, 1 / 4])
    # the first step of an update shows nothing yet; what it did is known at the second
    # and the first update's rates rise
    policy = [1 / 4, 1 / 4, 3 / 8, 1 / 2, 1 / 2, 1 / 4, 1 / 4, 1 / 4, 1 / 4, 1 / 8, 1 / 8, 1 / 8]
    steps = rates[:: 1 if sharing == "trunk" else 2]
    assert steps == pytest.approx(policy)
    if sharing == "separate":  # whose critic keeps its own
        assert set(rates[1::2]) == {1.0}


def test_an_update_within_the_limit_is_left_as_it_is(run_ppo: Any) -> None:
    how = {"epochs": 2, "mini_batch": 4, "lr": 1e-4}
    _, free = run_ppo("free", **how, desired_kl=1e6)
    _, held = run_ppo("held", **how)
    assert 0 < max(row["policy/approxkl_max"] for row in free) < 0.1
    assert free == held


def test_early_stopping_keeps_the_best_weights(
    run_ppo: Any, data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out measures made to fall after the first evaluation: the run ends, with the weights of update
    1."""
    scores, weights = iter([3.0, 2.0, 1.0, 0.0]), []

    def falling(setup: rollout.Setup, tasks: Any) -> dict[str, float]:
        weights.append(copy_state(setup.roles.policy))
        score = next(scores)
        return {"eval/objective/scores": score, "eval/objective/kl": 0.0, "eval/objective/rlhf_reward": score}

    monkeypatch.setattr(rollout, "evaluate", falling)
    stage, rows = run_ppo(updates=4, eval_every=1, eval_data=str(data.prompts), patience=2)
    assert [row["step"] for row in rows] == [1, 2, 3]
    kept = AutoModelForCausalLM.from_pretrained(stage / "model").state_dict()
    assert all(torch.equal(kept[k], v) for k, v in weights[0].items() if k in kept)
    assert any(not torch.equal(kept[k], v) for k, v in weights[2].items() if k in kept)


def test_the_pretraining_mix_pulls_towards_its_texts(run_ppo: Any, data: Any) -> None:
    _, rows = run_ppo(ptx={"data": str(data.text), "coef": 5.0}, updates=6, lr=1e-2)
    assert rows[-1]["loss/ptx"] < 0.8 * rows[0]["loss/ptx"]
    assert rows[0]["loss/ptx"] == pytest.approx(math.log(300), rel=0.2)


@pytest.mark.slow  # numbers: tests/golden; a KL in the loss: trap 16
def test_dual_clip_entropy_bonus_and_a_kl_in_the_loss_run(run_ppo: Any) -> None:
    settings = {"dual_clip": 3.0, "entropy_coef": 0.01, "mini_batch": 4}
    for estimator in ("k2", "k3"):
        _, rows = run_ppo(estimator, kl={"coef": 0.2, "where": "loss", "estimator": estimator}, **settings)
        assert [row["val/ratio_first"] for row in rows] == [1.0, 1.0]


def test_a_reward_models_scale_is_used_or_not_as_the_config_says(open_ppo: Any) -> None:
    """The tiny reward model carries mean 0.5 and standard deviation 2."""
    rewards = {}
    for normalize in ("none", "model", "running"):
        tasks, setup = open_ppo(
            shaping={"normalize": normalize, "clip": None, "missing_stop_penalty": 0.0}, kl={"coef": 0.0}
        )
        collected = loop.collect(PPO(setup), tasks[:8], LoopState(0.0, RunningScale()), 1)
        rewards[normalize] = collected.episodes.rewards.sum(dim=1), collected.experience.rated.raw
    scores = rewards["none"][1]
    torch.testing.assert_close(rewards["none"][0], scores)
    torch.testing.assert_close(rewards["model"][0], (scores - 0.5) / 2)
    torch.testing.assert_close(rewards["running"][0], (scores - scores.mean()) / scores.std())
    assert collected.reward_scaler.count == 8


def samples(stage: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (stage / "samples.jsonl").read_text().splitlines()]


def test_trap_28_ppo_asks_an_encoder_by_text(run_ppo: Any, tiny_bert: Path, tmp_path: Path) -> None:
    """[trl 1979, 3595] Its scores are those of transformers' own call on prompt and completion."""
    scorer(ModelSource(str(tiny_bert)), 3).save_pretrained(tmp_path / "encoder")
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.save_pretrained(tmp_path / "encoder")
    stage, _ = run_ppo(reward=str(tmp_path / "encoder"), micro_batch=3, shaping={"normalize": "running"})
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "encoder").eval()
    for row in samples(stage):
        with torch.no_grad():
            expected = model(**tokenizer(row["prompt"], row["completion"], return_tensors="pt")).logits.item()
        assert next(iter(row["rewards"].values())) == pytest.approx(expected, abs=1e-4)


def test_trap_28_ppo_asks_a_decoder_with_another_vocabulary_by_text(
    run_ppo: Any, tiny_reward: Path, tmp_path: Path
) -> None:
    """Same size of vocabulary, other merges: the policy's ids would be taken for other words."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny_reward).eval()
    model.save_pretrained(tmp_path / "reward")
    tokenizer = train_tokenizer(["pigs and hens and foxes", "is it a cat or is it a dog"] * 9, 290, 48)
    tokenizer.save_pretrained(tmp_path / "reward")
    stage, _ = run_ppo(reward=str(tmp_path / "reward"), sampling={"max_new_tokens": 5, "temperature": 0.3})
    for row in samples(stage):
        ids = tokenizer(row["prompt"])["input_ids"] + tokenizer(row["completion"])["input_ids"]
        ids += [tokenizer.eos_token_id] * (row["stop_reason"] == "eos")
        with torch.no_grad():
            expected = model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1]).item()
        assert next(iter(row["rewards"].values())) == pytest.approx(expected, abs=1e-4)


def test_trap_the_value_model_thrown_away_after_training(run_ppo: Any, tiny_model: Path) -> None:
    """[trl 3293] The critic is kept, trained, and loads with transformers; a head on the trunk likewise."""
    from safetensors.torch import load_file

    stage, _ = run_ppo("separate", sharing="separate")
    critic = AutoModelForSequenceClassification.from_pretrained(stage / "critic")
    assert critic.score.weight.shape == (1, 32)
    start = AutoModelForCausalLM.from_pretrained(tiny_model).model.state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in critic.model.state_dict().items())
    assert AutoTokenizer.from_pretrained(stage / "critic").eos_token == "<|end|>"
    stage, _ = run_ppo("trunk", sharing="trunk")
    assert {k: tuple(v.shape) for k, v in load_file(stage / "value_head.safetensors").items()} == {
        "weight": (1, 32),
        "bias": (1,),
    }
    assert not list(stage.glob(".*"))


def test_half_precision_weights_are_not_trained_themselves(run_ppo: Any, tiny_model: Path) -> None:
    with pytest.raises(UsageError, match="bfloat16"):
        run_ppo(model={"path": str(tiny_model), "dtype": "bfloat16"})


def test_a_scale_that_the_reward_model_does_not_have_is_not_made_up(
    run_ppo: Any, tiny_reward: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_reward, bare)
    settings = json.loads((bare / "config.json").read_text())
    del settings["keel_reward"]
    (bare / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UsageError, match="normalize"):
        run_ppo("model", reward=str(bare))
    run_ppo("running", reward=str(bare), shaping={"normalize": "running"})


def test_early_stopping_compares_rewards_in_one_unit(open_ppo: Any) -> None:
    """Normalised scores minus the config's β times the KL, whatever β has become."""
    tasks, setup = open_ppo(kl={"coef": 0.25, "target": 1.0})
    found = rollout.evaluate(setup, tasks[:8])
    scores, kl = found["eval/objective/scores"], found["eval/objective/kl"]
    assert found["eval/objective/rlhf_reward"] == pytest.approx((scores - 0.5) / 2.0 - 0.25 * kl, abs=1e-6)


def test_rows_of_the_pretraining_mix_that_are_cut_are_counted(
    open_ppo: Any, data: Any, stage_run: Any
) -> None:
    short = {"max_length": 8, "sampling": {"max_new_tokens": 1}}
    open_ppo(**short)  # its own prompts fit
    open_ppo(ptx={"data": str(data.text)}, too_long="truncate", **short)
    assert stage_run.facts["rows_cut"] == 24
    with pytest.raises(DataError, match=r"text.jsonl:1: .* more than the 8"):
        open_ppo(ptx={"data": str(data.text)}, **short)


def test_a_reward_model_that_reads_less_than_the_policy_writes_is_refused_up_front(
    run_ppo: Any, tiny_reward: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short"
    shutil.copytree(tiny_reward, short)
    settings = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 8}))
    with pytest.raises(UsageError, match="8"):
        run_ppo(reward=str(short))
