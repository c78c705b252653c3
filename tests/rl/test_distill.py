"""Distillation: the gradient is that of the divergence, however the step is split; what is sampled, logged
and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from keel.algorithms.distillation import compare
from keel.config import DistillConfig, parse
from keel.diagnosis.findings import Conditions, conditions
from keel.errors import UsageError
from keel.models import logprobs
from keel.models.phase_cost import forward_cost, train_cost
from keel.models.tokenizer import train_tokenizer
from keel.rewards.shaping import RunningScale
from keel.rl import distill, loop
from keel.rl.distill import Distillation
from keel.rl.rollout import LoopState
from keel.rl.setup import make_optimizers, open_stage

START = LoopState(1.0, RunningScale())


@pytest.fixture(scope="module")
def teacher(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same tokenizer, whose head has more rows than the student's."""
    folder = tmp_path_factory.mktemp("teacher") / "model"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(7)
    model.resize_token_embeddings(model.config.vocab_size + 5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture
def settings(data: Any, tiny_model: Path, teacher: Path) -> dict[str, Any]:
    return {
        "kind": "distill", "model": str(tiny_model), "teacher": str(teacher), "data": str(data.prompts),
        "batch_size": 4, "updates": 2, "lr": 1e-3, "sampling": {"max_new_tokens": 5, "temperature": 0.8},
    }  # fmt: skip


@pytest.fixture
def open_distill(settings: Any, stage_run: Any) -> Any:
    def go(**more: Any) -> tuple[Any, Any, Distillation]:
        config = DistillConfig.model_validate(settings | more)
        taught = distill.read_demonstrations(config, stage_run)
        tasks, _, setup = open_stage(config, stage_run, sharing="none")
        for model in (setup.roles.policy, setup.roles.reference):
            model.double()
        return tasks, setup, Distillation(setup, taught)

    return go


def gradients(setup: Any, algorithm: Distillation, episodes: Any) -> dict[Any, Tensor]:
    """Of one gradient step, as the loop makes them: parameter → gradient."""
    found: list[dict[Any, Tensor]] = []

    def keep(optimizer: Any, *_: Any) -> dict[str, float]:
        found.append({p: p.grad.clone() for group in optimizer.param_groups for p in group["params"]})
        optimizer.zero_grad()
        return {"grad_norm": 0.0, "lr": 0.0}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.optim, "step", keep)
        loop.learn(algorithm, make_optimizers(setup.config, setup.roles), episodes, 1, START)
    return found[0]


def by_hand(setup: Any, episodes: Any, beta: float, top_k: int | None) -> Tensor:
    """Reply by reply through the models' own forwards."""
    policy, teacher = setup.roles.policy, setup.roles.reference
    losses: list[Tensor] = []
    for ids, start, mask in zip(episodes.ids, episodes.prompt_lengths, episodes.mask, strict=True):
        end = int(start + mask.sum())
        y, z = (
            model(input_ids=ids[None, :end]).logits[0, start - 1 : end - 1] for model in (policy, teacher)
        )
        found = compare(y[:, : setup.vocab], z[:, : setup.vocab].detach(), ids[start:end], beta, 0.8, top_k)
        losses.append(found.loss)
    loss = torch.cat(losses).mean()
    policy.zero_grad()
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize(
    ("more", "beta", "top_k"),
    [
        ({}, 1.0, None),
        ({"divergence": "jsd", "beta": 0.3, "top_k": 20, "micro_batch": 1}, 0.3, 20),
        ({"divergence": "forward_kl", "micro_tokens": 24}, 0.0, None),
    ],
)
@pytest.mark.usefixtures("read_apart")
def test_the_gradient_is_that_of_the_mean_divergence_over_all_tokens(
    more: dict[str, Any], beta: float, top_k: int | None, open_distill: Any, data: Any, monkeypatch: Any
) -> None:
    """With replies of the data among the student's, in parts of the batch and of the logits."""
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", 4 * 300 * 6)
    demonstrations = {"data": str(data.demonstrations), "share": 0.34}
    tasks, setup, algorithm = open_distill(demonstrations=demonstrations, **more)
    collected = loop.collect(algorithm, tasks[:4], START, 1)
    assert len(collected.episodes.ids) == 4 + 2
    found = gradients(setup, algorithm, collected.episodes)
    loss = by_hand(setup, collected.episodes, beta, top_k)
    assert len(found) == len(list(setup.roles.policy.parameters()))
    for parameter, gradient in found.items():
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-6, atol=1e-9)
    measured = loop.learn(
        algorithm, make_optimizers(setup.config, setup.roles), collected.episodes, 1, START
    ).metrics
    assert measured["loss/policy_avg"] == pytest.approx(float(loss), rel=1e-9)
    assert (measured["val/ratio"], measured["val/ratio_first"]) == pytest.approx((1.0, 1.0), abs=1e-9)
    # replies of the data have no part in it; measured where the sampler's own numbers are taken (`accel`)
    assert measured.get("rollout/sampler_drift", 0.0) < 1e-4


@pytest.mark.slow
def test_two_runs_are_the_same_bytes(
    run: Any, settings: Any, data: Any, differences: Any, tmp_path: Path
) -> None:
    demonstrations = {"data": str(data.demonstrations), "share": 0.5}
    for name in ("one", "two"):
        run({"stages": {"distill": {**settings, "demonstrations": demonstrations}}}, tmp_path / name)
    assert differences(tmp_path / "one", tmp_path / "two") == []


def test_a_student_comes_to_its_teacher(run: Any, settings: Any, data: Any, tmp_path: Path) -> None:
    held = {"eval_data": {"source": str(data.prompts), "rows": 4}, "eval_every": 3, "patience": 4}
    stage = {**settings, **held, "updates": 6, "batch_size": 16, "lr": 2e-2}
    run({"stages": {"distill": stage}}, tmp_path / "one")
    folder = tmp_path / "one" / "stages" / "distill"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [row["eval/objective/kl"] for row in rows if "eval/objective/kl" in row]
    assert last < first  # from update 3 on
    assert rows[-1]["policy/teacher_kl"] < 0.7 * rows[0]["policy/teacher_kl"]
    assert rows[0]["loss/policy_avg"] == pytest.approx(rows[0]["policy/teacher_kl"])
    silent = {"objective/kl", "objective/scores", "objective/rlhf_reward", "eval/objective/scores"}
    assert not silent & {name for row in rows for name in row}
    result = json.loads((folder / "result.json").read_text())
    assert "scores" not in result
    assert result["kl"]["mean"] == pytest.approx(last, rel=0.5)
    sample = json.loads((folder / "samples.jsonl").read_text().splitlines()[0])
    assert "kl" not in sample


@pytest.mark.slow
def test_rewards_are_logged_and_change_nothing(run: Any, settings: Any, tmp_path: Path) -> None:
    reward = {"reward": {"kind": "keywords", "words": ["red"]}}
    weights = []
    for name, more in (("with", reward), ("without", {})):
        run({"stages": {"distill": {**settings, **more}}}, tmp_path / name)
        folder = tmp_path / name / "stages" / "distill"
        weights.append((folder / "model" / "model.safetensors").read_bytes())
        scores = "objective/scores" in json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
        assert scores == (name == "with")
    assert weights[0] == weights[1]


@pytest.fixture(scope="module")
def other_teacher(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose tokenizer cuts words otherwise."""
    folder = tmp_path_factory.mktemp("other") / "model"
    texts = ["it is red, so the cat is", "the fox is blue and the owl is green"] * 9
    tokenizer = train_tokenizer(texts, 290, 48)
    config = AutoModelForCausalLM.from_pretrained(tiny_model).config
    config.vocab_size, config.eos_token_id = len(tokenizer), tokenizer.eos_token_id
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("more", "remedy"),
    [
        ({"divergence": "jsd"}, "set reverse_kl"),
        ({"top_k": 5}, "leave it out"),
        ({"demonstrations": {"data": "DATA"}}, "leave `demonstrations` out"),
    ],
)
def test_what_a_teacher_of_other_tokens_cannot_say_is_refused_before_anything_is_loaded(
    more: Any, remedy: str, settings: Any, other_teacher: Path, data: Any, stage_run: Any, monkeypatch: Any
) -> None:
    more = {
        key: {"data": str(data.demonstrations)} if key == "demonstrations" else v for key, v in more.items()
    }
    config = DistillConfig.model_validate({**settings, "teacher": str(other_teacher), **more})
    monkeypatch.setattr("keel.rl.setup.open_roles", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(UsageError, match=rf"another tokenizer \('.+' is \d+ to the student, .*{remedy}"):
        open_stage(config, stage_run, sharing="none")


def test_it_is_refused_before_any_stage_trains(
    run: Any, settings: Any, other_teacher: Path, data: Any, tmp_path: Path
) -> None:
    sft = {"kind": "sft", "model": settings["model"], "data": str(data.demonstrations), "max_steps": 1}
    distilled = {**settings, "model": "sft", "teacher": str(other_teacher), "divergence": "jsd"}
    with pytest.raises(UsageError, match=r"^distill: teacher .* another tokenizer .* set reverse_kl"):
        run({"stages": {"sft": sft, "distill": distilled}}, tmp_path)
    assert not (tmp_path / "stages").exists() or not list((tmp_path / "stages").glob("*/metrics.jsonl"))


@pytest.mark.slow
def test_a_teacher_of_other_tokens_is_asked_through_text(
    run: Any, settings: Any, other_teacher: Path, data: Any, tmp_path: Path
) -> None:
    held = {"eval_data": {"source": str(data.prompts), "rows": 4}, "eval_every": 1, "patience": 2}
    stage = {**settings, **held, "teacher": str(other_teacher), "mini_batch": 2, "micro_batch": 1}
    run({"stages": {"distill": stage}}, tmp_path)
    folder = tmp_path / "stages" / "distill"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["loss/policy_avg"] == row["policy/teacher_kl"]
        assert row["val/ratio_first"] == 1.0
        assert {"eval/objective/kl", "policy/entropy_avg"} <= row.keys()
        assert not {"policy/teacher_entropy", "policy/teacher_agreement"} & row.keys()
    notes = json.loads((folder / "stage.json").read_text())["facts"]["notes"]
    assert any("asked through text" in note for note in notes)


@pytest.mark.parametrize(
    ("more", "forwards", "taught", "sampled"),
    [
        ({}, 0, 1, True),
        ({"rollout": {"engine": "vllm", "address": "http://127.0.0.1:9"}}, 1, 1, False),
        ({"teacher": "other"}, 0, 0, True),
    ],
)
def test_the_floor_of_a_phase_is_what_is_read_in_it(
    more: dict[str, Any], forwards: int, taught: int, sampled: bool, settings: Any, other_teacher: Path,
    stage_run: Any,
) -> None:  # fmt: skip
    """While samples are scored the student reads only what a server has sampled, and a teacher nothing; a
    teacher of other tokens is not in the loss; of a server's machine nobody knows anything."""
    more = {**more, "teacher": str(other_teacher)} if more.get("teacher") else more
    config = DistillConfig.model_validate(settings | more)
    _, _, setup = open_stage(config, stage_run, sharing="none")
    student, teacher = setup.roles.policy, setup.roles.reference
    own, costs = forward_cost(student, torch.float32), stage_run.costs
    assert costs.get("forward") == (own if forwards else None)
    assert ("rollout" in costs) == sampled
    learns = train_cost(student, torch.float32, adapters=False)
    assert costs["train"] == (learns + forward_cost(teacher, torch.float32) if taught else learns)


def test_replies_of_the_data_are_more_gradient_steps() -> None:
    stage = {"kind": "distill", "model": "m", "teacher": "t", "data": "d", "batch_size": 8, "mini_batch": 8}
    more = {"demonstrations": {"data": "d", "share": 0.34}, "desired_kl": 0.2}
    config = parse({"name": "x", "stages": {"s": {**stage, **more}}}).stages["s"]
    assert config.planned_steps(100) == {"steps": 100, "episodes": 800, "gradient_steps": 200}


def test_a_teacher_that_reads_too_little_is_refused(settings: Any, stage_run: Any, tmp_path: Path) -> None:
    folder = tmp_path / "short"
    model = AutoModelForCausalLM.from_pretrained(settings["teacher"])
    model.config.max_position_embeddings = 8
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(settings["teacher"]).save_pretrained(folder)
    config = DistillConfig.model_validate({**settings, "teacher": str(folder)})
    with pytest.raises(UsageError, match="reads 8 tokens"):
        open_stage(config, stage_run, sharing="none")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"beta": 0.3}, "`beta` has no effect with `divergence: reverse_kl`"),
        ({"kl": {"coef": 0.1}}, "kl: unknown key"),
        ({"importance_mode": "token_mask"}, "importance_mode: unknown key"),
        ({"curriculum": {}}, "`curriculum` has no effect without `reward`"),
        ({"policy_loss": "cispo"}, "policy_loss: unknown key"),
        ({"reference": "m"}, "reference: unknown key"),
        ({"top_k": 0}, "top_k"),
        ({"demonstrations": {"data": "d", "share": 0.001}}, "leaves no reply of the data"),
        ({"teacher_quantize": "4bit", "teacher_dtype": "float32"}, "`teacher_quantize` needs"),
        ({"max_approx_kl": 0.1}, "`max_approx_kl` has no effect with one gradient step"),
    ],
)
def test_settings_without_effect_are_refused(wrong: dict[str, Any], message: str) -> None:
    stage = {"kind": "distill", "model": "m", "teacher": "t", "data": "d", **wrong}
    with pytest.raises(UsageError, match=message):
        parse({"name": "x", "stages": {"s": stage}})


def test_the_resolved_config_can_be_read_again_and_is_watched_as_one_that_imitates(settings: Any) -> None:
    config = parse({"name": "x", "stages": {"s": settings}})
    tree = config.model_dump(mode="json")
    assert parse(tree).model_dump(mode="json") == tree
    assert conditions(tree["stages"]["s"]).imitates
    assert not Conditions().imitates
