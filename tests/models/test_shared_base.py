"""One frozen base under several roles: exact, apart from each other, and small."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from keel.accel import decode_step
from keel.errors import UsageError
from keel.models.load import ModelSource, scorer
from keel.models.logprobs import scores_at
from keel.models.lora import Adapters, add_adapters, merged
from keel.models.roles import Roles, open_roles
from keel.models.shared_base import Base, on_the_same_weights, open_base
from keel.rollout import reference_engine
from keel.rollout.engine import generate
from keel.types import Sampling

IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
INDEX = torch.tensor([1, 2, 7, 8])  # two positions of each row
CPU = torch.device("cpu")


def opened(path: Path, r: int = 2, **settings: Any) -> tuple[Base, Roles]:
    source = ModelSource(str(path), dtype=settings.pop("dtype", "float32"))
    base = open_base(source, 1, CPU)
    defaults: dict[str, Any] = {"gradient_checkpointing": False, "device": CPU, "seed": 1, "base": base}
    roles = open_roles(source, None, sharing="adapters", adapters=Adapters(r=r), **(defaults | settings))
    return base, roles


def disturb(*models: Any) -> None:
    """Adapters that do something: B is 0 at the start."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for model in models:
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn(p.shape, generator=generator))


def gradients(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if p.grad is not None}


def held(*models: Any) -> int:
    """Bytes of all parameters and buffers, each storage once."""
    tensors = [t for model in models for t in (*model.parameters(), *model.buffers())]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def test_four_roles_hold_at_most_1_15_times_the_bytes_of_one_model(tmp_path: Path) -> None:
    """Hidden size 512 and rank 8: adapters weigh less the wider a model is."""
    config = LlamaConfig(
        vocab_size=4000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    alone = held(AutoModelForCausalLM.from_pretrained(tmp_path))
    base, roles = opened(tmp_path, r=8)
    reward = add_adapters(base.scorer(3), Adapters(r=8), 3, train_head=True).requires_grad_(False)
    everybody = held(roles.policy, roles.reference, roles.critic, reward)
    assert alone < everybody <= 1.15 * alone
    separate = open_roles(
        base.source, None, sharing="separate", adapters=None, gradient_checkpointing=False, device=CPU, seed=1
    )
    assert held(separate.policy, separate.reference, separate.critic) > 2.8 * alone


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_the_reference_is_the_base_model_to_the_bit_whatever_the_adapters_say(
    tiny_model: Path, dtype: str
) -> None:
    stored = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    alone = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=stored).eval()
    _, roles = opened(tiny_model, dtype=dtype)
    disturb(roles.policy, roles.critic)
    with torch.no_grad():
        expected = alone(IDS).logits
        assert torch.equal(roles.reference(input_ids=IDS).logits, expected)
        moved = roles.policy(input_ids=IDS).logits
        roles.critic(input_ids=IDS)
        assert torch.equal(roles.reference(input_ids=IDS).logits, expected)
        assert torch.equal(roles.policy(input_ids=IDS).logits, moved)
    assert not torch.allclose(moved, expected, atol=1e-2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_gradient_crosses_roles(tiny_model: Path, checkpointing: bool) -> None:
    base, roles = opened(tiny_model, gradient_checkpointing=checkpointing)
    reward = add_adapters(base.scorer(3), Adapters(r=2), 3, train_head=True).requires_grad_(False)
    disturb(roles.policy, roles.critic)
    trained = {
        id(m): {n for n, p in m.named_parameters() if p.requires_grad} for m in (roles.policy, roles.critic)
    }
    losses = {
        id(roles.policy): lambda: roles.policy(input_ids=IDS, use_cache=False).logits.logsumexp(-1).sum(),
        id(roles.critic): lambda: scores_at(roles.critic, IDS, INDEX).sum(),
    }
    for learner, other in ((roles.policy, roles.critic), (roles.critic, roles.policy)):
        scores_at(reward, IDS, INDEX)
        roles.reference(input_ids=IDS)
        losses[id(learner)]().backward()
        assert gradients(learner) == trained[id(learner)]
        assert not gradients(other)
        assert not gradients(base.model)
        assert not gradients(reward)
        learner.zero_grad(set_to_none=True)


def test_both_at_once_have_the_gradients_of_each_alone_also_where_activations_are_recomputed(
    tiny_model: Path,
) -> None:
    """With one model and a switch, the policy's recomputed activations would go through the critic's
    adapter."""
    found = []
    for checkpointing in (False, True):
        _, roles = opened(tiny_model, gradient_checkpointing=checkpointing)
        disturb(roles.policy, roles.critic)
        policy = roles.policy(input_ids=IDS, use_cache=False).logits.logsumexp(-1).sum()
        value = scores_at(roles.critic, IDS, INDEX).sum()
        (policy + value).backward()
        found.append(
            {
                n: p.grad
                for m in (roles.policy, roles.critic)
                for n, p in m.named_parameters()
                if p.requires_grad
            }
        )
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5)


def test_what_is_trained_stays_so_whatever_is_used_in_between(tiny_model: Path) -> None:
    base, roles = opened(tiny_model)

    def trained() -> list[str]:
        models = {"policy": roles.policy, "critic": roles.critic, "base": base.model}
        return [
            f"{role}.{n}" for role, m in models.items() for n, p in m.named_parameters() if p.requires_grad
        ]

    before = trained()
    assert before
    assert all("lora_" in name or "score" in name for name in before)
    assert not any(name.startswith("base.") for name in before)
    with torch.no_grad():
        for model in (roles.reference, roles.critic, roles.policy):
            model(input_ids=IDS)
    generate(roles.policy, IDS.tolist(), Sampling(4), stop_ids=[0], pad_id=0, seed=1)
    merged(roles.critic)
    merged(roles.policy)
    assert trained() == before


@pytest.mark.parametrize(
    ("kind", "tied"),
    [
        pytest.param(
            kind, tied, marks=() if (number + tied) % 2 else pytest.mark.slow
        )  # each once by default
        for number, kind in enumerate(["llama", "gpt2", "gpt_neox", "gpt_neo", "qwen2", "gemma2", "opt"])
        for tied in (False, True)
    ],
)
def test_a_scorer_on_the_base_is_the_scorer_that_would_be_loaded(
    kind: str, tied: bool, tmp_path: Path
) -> None:
    sizes: dict[str, dict[str, Any]] = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48},
        "gpt_neo": {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
        },
        "opt": {
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 32,
        },
    }
    usual = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=300, pad_token_id=0, tie_word_embeddings=tied, **sizes.get(kind, usual)
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    base, roles = opened(tmp_path)
    loaded = scorer(ModelSource(str(tmp_path)), 7).eval()
    with torch.no_grad():
        values = [scores_at(m, IDS, INDEX) for m in (base.scorer(7).eval(), loaded)]
        assert torch.equal(*values)
        disturb(roles.critic)
        before = scores_at(roles.critic, IDS, INDEX)
        weights = copy.deepcopy(base.model.state_dict())
        whole = merged(roles.critic)
        torch.testing.assert_close(scores_at(whole, IDS, INDEX), before, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(value, weights[name]) for name, value in base.model.state_dict().items())
    assert not {p.data_ptr() for p in whole.parameters()} & {p.data_ptr() for p in base.model.parameters()}


def test_a_model_without_a_score_head_for_its_family_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    base, _ = opened(tiny_model)
    config = AutoConfig.for_model("gpt2", vocab_size=300, n_embd=32, n_layer=1, n_head=2, n_positions=48)
    config.save_pretrained(tmp_path)  # another family than the base's
    with pytest.raises(UsageError, match="no score head fits the base of a LlamaForCausalLM"):
        Base(base.model, ModelSource(str(tmp_path))).scorer(0)


@pytest.mark.usefixtures("accel_on")
def test_the_engine_takes_its_lean_step_with_the_policys_adapter_in_effect(tiny_model: Path) -> None:
    base, roles = opened(tiny_model)
    disturb(roles.policy)
    assert decode_step.fits(roles.policy)
    prompts, sampling = [[5, 6, 7], [9, 8]], Sampling(8, temperature=0)
    done = generate(roles.policy, prompts, sampling, stop_ids=[1], pad_id=0, seed=1)
    none = torch.zeros(8, dtype=torch.float64)
    expected = [reference_engine.complete(roles.policy, prompt, none, sampling, [1]) for prompt in prompts]
    assert [c.ids for c in done] == [c.ids for c in expected]
    assert [c.ids for c in generate(base.model, prompts, sampling, stop_ids=[1], pad_id=0, seed=1)] != [
        c.ids for c in done
    ]


def test_modules_on_the_same_weights_are_others_on_the_same_parameters(tiny_model: Path) -> None:
    base, _ = opened(tiny_model)
    twin = on_the_same_weights(base.model)
    assert not {id(m) for m in twin.modules()} & {id(m) for m in base.model.modules()}
    assert [id(p) for p in twin.parameters()] == [id(p) for p in base.model.parameters()]
