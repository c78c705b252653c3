"""Policy, reference, critic: what they are and what they share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from keel.errors import UsageError
from keel.models.load import ModelSource
from keel.models.logprobs import scores_at
from keel.models.lora import Adapters
from keel.models.roles import Roles, open_roles

IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
INDEX = torch.tensor([1, 2, 7, 8])  # two positions of each row


def roles_of(
    path: Path,
    sharing: Any = "trunk",
    adapters: Adapters | None = None,
    reference: ModelSource | None = None,
    **settings: Any,
) -> Roles:
    defaults: dict[str, Any] = {"gradient_checkpointing": False, "device": torch.device("cpu"), "seed": 1}
    return open_roles(
        ModelSource(str(path)), reference, sharing=sharing, adapters=adapters, **(defaults | settings)
    )


def disturb(model: Any) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)


@pytest.mark.parametrize("adapters", [None, Adapters(r=2)], ids=["full", "lora"])
@pytest.mark.parametrize("sharing", ["separate", "trunk"])
def test_the_reference_is_the_starting_model_and_stays_it(
    tiny_model: Path, adapters: Adapters | None, sharing: Any
) -> None:
    """With LoRA it is the policy with its adapters off: exactly the base model, even after training."""
    roles = roles_of(tiny_model, sharing, adapters)
    base = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    with torch.no_grad():
        expected = base(IDS).logits
        assert torch.equal(roles.policy(input_ids=IDS).logits, expected)
        disturb(roles.policy)
        assert torch.equal(roles.reference(input_ids=IDS).logits, expected)
        assert not torch.allclose(roles.policy(input_ids=IDS).logits, expected, atol=1e-3)


@pytest.mark.parametrize("adapters", [None, Adapters(r=2)], ids=["full", "lora"])
def test_a_separate_critic_shares_nothing_with_the_policy_and_a_trunk_everything(
    tiny_model: Path, adapters: Adapters | None
) -> None:
    roles = roles_of(tiny_model, "separate", adapters)
    policy = {p.data_ptr() for p in roles.policy.parameters()}
    assert not policy & {p.data_ptr() for p in roles.critic.parameters()}
    assert roles.value_modules == [roles.critic]
    assert roles.critic.score.weight.requires_grad
    trunk = roles_of(tiny_model, "trunk", adapters)
    assert trunk.critic is None
    assert trunk.value_modules == [trunk.value_head]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trap_15_dropout_is_off_whatever_the_mode(
    tmp_path: Path, tokenizer: Any, checkpointing: bool
) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=48,
        resid_pdrop=0.5,
        embd_pdrop=0.5,
        attn_pdrop=0.5,
        pad_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    roles = roles_of(tmp_path, "separate", gradient_checkpointing=checkpointing)
    for model in (roles.policy, roles.critic, roles.reference):
        with torch.no_grad():
            results = [
                model.train(mode)(input_ids=IDS, use_cache=False).logits for mode in (True, False, True)
            ]
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("adapters", [None, Adapters(r=2)], ids=["full", "lora"])
def test_gradient_checkpointing_changes_no_gradient(tiny_model: Path, adapters: Adapters | None) -> None:
    gradients = []
    for checkpointing in (False, True):
        policy = roles_of(tiny_model, "trunk", adapters, gradient_checkpointing=checkpointing).policy
        disturb(policy)  # LoRA's A has no gradient while B is 0
        policy(input_ids=IDS, use_cache=False).logits.logsumexp(-1).sum().backward()
        gradients.append({name: p.grad for name, p in policy.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)
    assert any(g.abs().max() > 0 for g in gradients[0].values())


def test_a_reference_with_another_vocabulary_is_refused_before_any_weights_are_read(
    tiny_model: Path, tmp_path: Path, tokenizer: Any
) -> None:
    config = GPT2Config(vocab_size=77, n_embd=32, n_layer=1, n_head=2, n_positions=48)
    config.save_pretrained(tmp_path)  # no weights at all
    sizes = rf"a vocabulary of {len(tokenizer)}, the reference .* of 77"
    with pytest.raises(UsageError, match=sizes):
        roles_of(tiny_model, reference=ModelSource(str(tmp_path)))
    twin = roles_of(tiny_model, reference=ModelSource(str(tiny_model)))
    assert torch.equal(twin.reference(input_ids=IDS).logits, twin.policy(input_ids=IDS).logits)


@pytest.mark.parametrize("sharing", ["separate", "trunk"])
def test_a_value_head_on_a_backbone_in_half_precision_is_float32(tiny_model: Path, sharing: Any) -> None:
    source = ModelSource(str(tiny_model), dtype="bfloat16")
    roles = open_roles(
        source,
        None,
        sharing=sharing,
        adapters=Adapters(r=2),
        gradient_checkpointing=False,
        device=torch.device("cpu"),
        seed=1,
    )
    for module in (roles.policy, *roles.value_modules):
        assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    if roles.critic is not None:
        scores_at(roles.critic, IDS, INDEX).sum().backward()
        gradients = [p.grad for p in roles.critic.parameters() if p.requires_grad]
        assert any(g is not None and g.any() for g in gradients)
