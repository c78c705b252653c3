"""What a model is to others that keel has loaded, trained and sampled from: it is copied, pickled and
differentiated like any other, and other models of its class give the bytes they gave."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from keel import accel
from keel.accel import modules
from keel.models import logprobs, optim, precision
from keel.models.load import ModelSource
from keel.models.lora import Adapters
from keel.models.roles import Roles, open_roles
from keel.rollout.engine import generate
from keel.types import Sampling

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8, 20, 21, 22], [5, 6, 7, 8, 30, 0, 0], [9, 10, 11, 12, 13, 14, 0]])
INDEX = torch.tensor([3, 4, 5, 7 + 3, 14 + 4])
TOKENS = torch.tensor([20, 21, 22, 30, 14])
SHARINGS = {"separate": None, "trunk": Adapters(r=2), "adapters": Adapters(r=2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=60, hidden_size=64, intermediate_size=600, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1, pad_token_id=0,
    )  # fmt: skip
    place = tmp_path_factory.mktemp("used") / "model"
    LlamaForCausalLM(config).save_pretrained(place)
    return place


def of_transformers_alone(folder: Path) -> list[Tensor]:
    """Logits, gradients, samples and scores of models that keel has nothing to do with."""
    model: Any = LlamaForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    scorer: Any = LlamaForSequenceClassification.from_pretrained(folder, num_labels=1)
    found: list[Tensor] = []
    for each in (model, scorer):
        for half in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                logits = each(input_ids=IDS, attention_mask=IDS != 0).logits
            logits.float().logsumexp(-1).sum().backward()
            found += [logits.detach(), *(p.grad for p in each.parameters() if p.grad is not None)]
            each.zero_grad()
        assert not any(isinstance(module, modules.Patched) for module in each.modules())
    torch.manual_seed(0)
    done = model.generate(IDS[:, :4], max_new_tokens=5, do_sample=True, pad_token_id=0)
    return [*found, done]


def train_and_sample(roles: Roles) -> None:
    """A gradient step of policy and critic, and some samples, as keel's stages take them."""
    learning = [roles.policy, *roles.value_modules]
    optimizer = optim.adamw([(learning, 1e-2)], betas=(0.9, 0.99), weight_decay=0.0)
    inputs = logprobs.head_inputs(roles.policy, IDS, INDEX, hidden=True)
    loss = logprobs.token_logprobs(inputs, TOKENS).logp.sum()
    if roles.critic is not None:
        loss = loss + logprobs.scores_at(roles.critic, IDS, INDEX).sum()
    optim.backward(loss)
    assert optim.step(optimizer, 1.0, 1.0, "test")["grad_norm"] > 0
    generate(roles.policy, [[5, 6, 7], [9], [5, 6, 7]], Sampling(5), stop_ids=[99], pad_id=0, seed=0)


def loss_of(model: Any) -> Tensor:
    logits = model(input_ids=IDS, attention_mask=(IDS != 0).long()).logits
    return (logits * torch.linspace(-1, 2, logits.numel()).view_as(logits)).mean()


def saved_and_read(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("sharing", SHARINGS)
def test_models_that_keel_has_used_are_like_any_other(
    sharing: Any, half: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "fast_in_bfloat16", lambda device: half)
    before = of_transformers_alone(folder)
    roles = open_roles(
        ModelSource(str(folder), dtype="auto"), None, sharing=sharing, adapters=SHARINGS[sharing],
        gradient_checkpointing=False, device=CPU, seed=0,
    )  # fmt: skip
    train_and_sample(roles)
    assert not accel.refusals(roles.policy)
    assert any(isinstance(module, modules.Patched) for module in roles.policy.modules())
    for model in filter(None, (roles.policy, roles.critic)):
        _check_copies(model)
        _check_gradients(model)
    for ours, theirs in zip(of_transformers_alone(folder), before, strict=True):
        assert torch.equal(ours, theirs)


def _check_copies(model: Any) -> None:
    expected = loss_of(model)
    for copied in (saved_and_read, copy.deepcopy):
        make: Callable[[Any], Any] = copied
        twin = make(model)
        torch.testing.assert_close(loss_of(twin), expected)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        torch.testing.assert_close(loss_of(model), expected)


def _check_gradients(model: Any) -> None:
    """Of `torch.autograd.grad` and `torch.func.functional_call`, against transformers' own code."""
    asked = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss_of(model), asked, allow_unused=True)
    assert all(p.grad is None for p in model.parameters())
    weights = {
        name: (1.1 * p.detach()).requires_grad_(p.requires_grad) for name, p in model.named_parameters()
    }
    given = (), {"input_ids": IDS, "attention_mask": (IDS != 0).long()}
    called = torch.func.functional_call(model, weights, *given).logits
    with accel.disabled():
        own = torch.autograd.grad(loss_of(model), asked, allow_unused=True)
        torch.testing.assert_close(called, torch.func.functional_call(model, weights, *given).logits)
    for ours, theirs in zip(found, own, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()) + 1e-9)
    called.float().square().mean().backward()
    assert any(w.grad is not None for w in weights.values())
    assert all(p.grad is None for p in model.parameters())
