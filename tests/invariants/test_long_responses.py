"""What a long response costs in training: twice the tokens, twice the memory, whatever the layout."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from keel.models import optim
from keel.models.logprobs import head_inputs, response_index, token_logprobs
from keel.models.precision import prepare_model

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "memory.py"
LENGTHS, PROMPT = (256, 512, 1024), 16  # shorter ones are read by branches, up to a bound of memory


@pytest.fixture(scope="module")
def memory() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("memory", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["memory"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["memory"]


def small(**more: Any) -> Any:
    torch.manual_seed(0)
    return prepare_model(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=2 * LENGTHS[-1], **more,
            )
        ).train(),
        "float32",
    )  # fmt: skip


def gradient(model: Any, length: int, rows: int) -> None:
    """Of log-probabilities and entropies of responses to one prompt, the last of them half as long."""
    draws = torch.Generator().manual_seed(length)
    prompt = torch.randint(64, (1, PROMPT), generator=draws).expand(rows, -1)
    ids = torch.cat([prompt, torch.randint(64, (rows, length), generator=draws)], dim=1)
    mask = torch.ones(rows, length, dtype=torch.bool)
    if rows > 1:
        mask[-1, length // 2 :] = False
    index = response_index(mask, torch.full((rows,), PROMPT), ids.shape[1])
    said = token_logprobs(head_inputs(model, ids, index), ids.flatten()[index + 1], entropy=True)
    optim.backward(said.logp.mean())


def peaks(memory: Any, model: Any, rows: int) -> list[int]:
    found = []
    gradient(model, 16, rows)  # which tries its paths
    for length in LENGTHS:
        with memory.Tensors() as tensors:
            gradient(model, length, rows)
        found.append(tensors.peak)
    return found


@pytest.mark.usefixtures("accel_on")
@pytest.mark.parametrize("rows", [1, 3])
def test_memory_of_an_update_is_linear_in_the_length_of_responses(memory: Any, rows: int) -> None:
    short, middle, long = peaks(memory, small(), rows)
    assert long - middle < 2.1 * (middle - short)


def test_and_the_measure_sees_what_grows_by_the_square(memory: Any) -> None:
    short, middle, long = peaks(memory, small(attn_implementation="eager"), 1)
    assert long - middle > 2.5 * (middle - short)
