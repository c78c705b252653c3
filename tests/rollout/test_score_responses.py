"""What the models say of sampled responses, against one plain unpadded forward of each row."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from keel.models import logprobs
from keel.models.load import ModelSource, scorer
from keel.rollout.engine import generate
from keel.rollout.score_responses import score
from keel.types import Completion, Sampling

DONE = [
    Completion((5, 6, 7), (20, 21, 1), "eos"),
    Completion((9,), (30, 31, 32, 33, 34), "length"),
    Completion((40, 41, 42, 43, 44, 45), (50,), "stop"),
]


@pytest.fixture(scope="module")
def models(tiny_model: Path) -> tuple[Any, Any, Any]:
    """Policy, reference and critic, in float64."""
    policy, reference = (AutoModelForCausalLM.from_pretrained(tiny_model).double().eval() for _ in range(2))
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(7)).double())
    return policy, reference, scorer(ModelSource(str(tiny_model)), 3).double().eval()


def alone(model: Any, done: Completion, temperature: float) -> Tensor:
    """log softmax(logits / T) at each response position, (T, V), from a batch of one without padding."""
    with torch.no_grad():
        logits = model(torch.tensor([[*done.prompt_ids, *done.ids]])).logits[0]
    return (logits[len(done.prompt_ids) - 1 : -1] / temperature).log_softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_every_number_is_that_of_the_row_alone(
    models: tuple[Any, Any, Any], temperature: float, micro_batch: int
) -> None:
    policy, reference, critic = models
    scored = score(
        DONE,
        policy,
        reference,
        temperature=temperature,
        pad_id=0,
        device=torch.device("cpu"),
        micro_batch=micro_batch,
        critic=critic,
    )
    assert scored.mask.sum(dim=1).tolist() == [3, 5, 1]
    assert scored.prompt_lengths.tolist() == [3, 1, 6]
    for i, done in enumerate(DONE):
        n, p = len(done.ids), len(done.prompt_ids)
        assert scored.ids[i, : p + n].tolist() == [*done.prompt_ids, *done.ids]
        logp, ref = alone(policy, done, temperature), alone(reference, done, temperature)
        own = torch.arange(n), torch.tensor(done.ids)
        torch.testing.assert_close(scored.logp[i, :n], logp[own], rtol=0, atol=1e-10)
        torch.testing.assert_close(scored.ref_logp[i, :n], ref[own], rtol=0, atol=1e-10)
        torch.testing.assert_close(
            scored.exact_kl[i, :n], (logp.exp() * (logp - ref)).sum(-1), rtol=0, atol=1e-10
        )
        with torch.no_grad():
            hidden = critic.model(torch.tensor([[*done.prompt_ids, *done.ids]])).last_hidden_state[0]
            values = (hidden @ critic.score.weight.T).squeeze(-1)
        torch.testing.assert_close(scored.values[i, :n], values[p - 1 : p - 1 + n], rtol=0, atol=1e-10)
        for field in (scored.logp, scored.ref_logp, scored.exact_kl, scored.values):
            assert field[i, n:].abs().sum() == 0
    assert scored.exact_kl[scored.mask].min() > 0


def test_a_head_on_the_trunk_reads_the_last_hidden_state_before_each_token(
    models: tuple[Any, Any, Any],
) -> None:
    policy, reference, _ = models
    torch.manual_seed(0)
    head = torch.nn.Linear(32, 1).double()
    scored = score(
        DONE,
        policy,
        reference,
        temperature=1.0,
        pad_id=0,
        device=torch.device("cpu"),
        micro_batch=2,
        value_head=head,
    )
    for i, done in enumerate(DONE):
        n, p = len(done.ids), len(done.prompt_ids)
        with torch.no_grad():
            hidden = policy.model(torch.tensor([[*done.prompt_ids, *done.ids]])).last_hidden_state[0]
            expected = head(hidden[p - 1 : p - 1 + n]).squeeze(-1)
        torch.testing.assert_close(scored.values[i, :n], expected, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("accel_on")
@pytest.mark.parametrize("value_head", [False, True])
def test_with_the_samplers_hidden_states_the_policy_is_not_asked_again(
    models: tuple[Any, Any, Any], value_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers as by its own forwards, by chunks of the logits too; log π is what the sampler
    said."""
    policy, reference, critic = models
    torch.manual_seed(0)
    head = torch.nn.Linear(32, 1).double() if value_head else None
    prompts, stops = [[5, 6, 7], [9], [40, 41, 42, 43], [9]], [1, *range(100, 160)]
    drawn = generate(
        policy, prompts, Sampling(9, temperature=0.7), stop_ids=stops, pad_id=0, seed=1, hidden=True
    )
    assert len({len(c.ids) for c in drawn}) > 1
    options: Any = {
        "temperature": 0.7,
        "pad_id": 0,
        "device": torch.device("cpu"),
        "critic": None if head else critic,
        "value_head": head,
    }
    expected = score([replace(c, hidden=None) for c in drawn], policy, reference, **options)
    monkeypatch.setattr(policy, "forward", None)  # cannot be called
    for at_once, limits in ((2**26, {"micro_batch": 3}), (4 * 2 * 300, {"micro_tokens": 20})):
        monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", at_once)
        found = score(drawn, policy, reference, **options, **limits)
        for field in fields(found):
            one, other = getattr(found, field.name), getattr(expected, field.name)
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5 if field.name == "logp" else 1e-6)
        for row, c in enumerate(drawn):
            assert found.logp[row, : len(c.ids)].tolist() == pytest.approx(c.logp, abs=1e-6)
