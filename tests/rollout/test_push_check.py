"""Whether a push has arrived, with a copy of the model for the server: in float32, and in bfloat16, where
rounding hides small steps."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from keel.rollout.vllm.push_check import LEAST_HALF, TELLING, PushCheck

IDS = torch.randint(64, (1, 33), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def policy() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
        )
    ).eval()


def logps(model: Any) -> Tensor:  # (N − 1,)
    with torch.no_grad():
        found = model(input_ids=IDS).logits[0, :-1].double().log_softmax(-1)
    return found.gather(-1, IDS[0, 1:, None]).squeeze(-1)


def updates(model: Any, count: int, by: float) -> Iterator[int]:
    """Steps in one direction, as those of a run are in part."""
    with torch.no_grad():
        way = [torch.randn_like(parameter) for parameter in model.parameters()]
        for number in range(count):
            yield number
            for parameter, its in zip(model.parameters(), way, strict=True):
                parameter.add_(by * (its + torch.randn_like(its)))


@pytest.mark.parametrize(
    ("dtype", "by"),
    [
        (torch.float32, 1e-3),
        (torch.bfloat16, 1e-6),
        (torch.bfloat16, 1e-4),
        pytest.param(torch.float32, 1e-6, marks=pytest.mark.slow),
        pytest.param(torch.float32, 1e-4, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, 1e-3, marks=pytest.mark.slow),
    ],
)
def test_weights_that_arrive_raise_no_alarm(policy: Any, dtype: torch.dtype, by: float) -> None:
    check = PushCheck()
    for _ in updates(policy, 100, by):
        served = copy.deepcopy(policy).to(dtype)
        assert check.fault(logps(policy), logps(served), [torch.float32, dtype]) is None
    assert (check.gap > 1e-4) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("last", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_server_that_stays_behind_is_found_once_the_weights_have_moved_visibly(
    policy: Any, dtype: torch.dtype, last: int
) -> None:
    """At once where rounding is small; in 16 bit with the updates, far below the gap that alone is an error.
    last: of the pushes that were loaded."""
    check, older, found = PushCheck(), logps(policy), None
    for number in updates(policy, 200, 5e-5):
        if number <= last:
            served, older = logps(copy.deepcopy(policy).to(dtype)), logps(policy)
        found = check.fault(logps(policy), served, [torch.float32, dtype])
        if found is not None:
            break
    assert found is not None
    assert "keeps older weights" in found
    moved = (logps(policy) - older).abs().mean().item()
    assert moved < (1e-3 if dtype == torch.float32 else 2 * TELLING * LEAST_HALF)
    assert (number == last + 1) == (dtype == torch.float32)


def test_a_server_that_comes_back_with_the_first_weights_is_told_from_one_with_the_last(policy: Any) -> None:
    check, first = PushCheck(), logps(policy)
    for _ in updates(policy, 5, 1e-4):
        assert check.fault(logps(policy), logps(policy), [torch.float32]) is None
    assert "keeps older weights" in str(check.fault(logps(policy), first, [torch.float32]))


def test_another_model_is_refused_at_the_first_push(policy: Any) -> None:
    new = logps(policy)
    assert "differ by 0.1 nats a token (at most 0.05" in str(
        PushCheck().fault(new, new + 0.1, [torch.float32])
    )
    assert PushCheck().fault(new, new + 0.1, [torch.float32, torch.bfloat16]) is None
    assert PushCheck().fault(new, new * torch.nan, [torch.float32]) is not None
