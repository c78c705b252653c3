"""What is made of hidden states, a part at a time, against the logits of the model's own forward; and the
memory it takes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from keel.accel.patches import AccelWarning
from keel.algorithms.masked import entropy, token_logp
from keel.models import logprobs, precision
from keel.models.head import Head, head_of
from keel.models.load import checkpoint_activations
from keel.models.logprobs import HeadInputs, head_inputs, token_logprobs
from keel.models.lora import Adapters, add_adapters
from keel.models.roles import AdaptersOff

pytestmark = pytest.mark.usefixtures("accel_on")  # what is tested is among the fast paths
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}
IDS_OF = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 7.0},
    "mixtral": {"num_local_experts": 4},
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 32,
        "vocab_size": 97,
        "initializer_range": 0.3,
    },
    "gpt_neox": {},
    "opt": {"word_embed_proj_dim": 16, "ffn_dim": 48, "init_std": 0.3},
}
IDS = torch.randint(3, 97, (3, 11), generator=torch.Generator().manual_seed(1))
INDEX = torch.tensor([0, 3, 4, 9, 13, 20, 21, 31])  # into the flattened ids
T_ = 0.7


def model_of(kind: str, **more: Any) -> Any:
    own = KINDS[kind]
    sizes = own if kind == "gpt2" else {**SIZES, **own}
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **IDS_OF, **more}))
    # torch multiplies the matrices of several experts at once, but not in float64
    return model.to(torch.float32 if kind == "mixtral" else torch.float64).eval()


def plainly(model: Any) -> tuple[Tensor, Tensor, Tensor]:
    """log π of the tokens, entropies and hits from all of the model's logits."""
    logits = model(input_ids=IDS, use_cache=False).logits.flatten(0, 1)[INDEX]
    tokens = IDS.flatten()[INDEX + 1]
    return token_logp(logits, tokens, T_), entropy(logits, T_), logits.argmax(-1) == tokens


def in_parts(model: Any) -> tuple[Tensor, Tensor, Tensor]:
    return token_logprobs(
        head_inputs(model, IDS, INDEX), IDS.flatten()[INDEX + 1], T_, entropy=True, hits=True
    )


def gradients(model: Any, found: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 2, len(INDEX), dtype=found[0].dtype)
    model.zero_grad(set_to_none=True)
    ((weights * found[0]).sum() + (weights.flip(0) * found[1]).sum()).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.fixture(params=["whole", "parts"])
def budget(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "parts":
        monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", 3 * 97 * 4)
    return request.param


def assert_same(model: Any) -> None:
    ours, theirs = in_parts(model), plainly(model)
    near = {"rtol": 0, "atol": 1e-10 if ours[0].dtype == torch.float64 else 1e-4}
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **near)
    for one, other in zip(gradients(model, ours), gradients(model, theirs), strict=True):
        torch.testing.assert_close(one, other, **near)


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_says_what_its_own_logits_say(kind: str, budget: str) -> None:
    model = model_of(kind)
    assert head_of(model) is not None
    assert_same(model)


def test_logits_are_never_made_at_positions_that_do_not_count() -> None:
    model, seen = model_of("llama"), []
    head_of(model)  # tried out before anything is looked at
    model.lm_head.register_forward_hook(lambda _, inputs, output: seen.append(output.numel() // 97))
    in_parts(model)
    assert seen == [0, len(INDEX)]


class Odd(nn.Module):
    """A head that does something to its logits which nobody else does."""

    def __init__(self, model: Any, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.config, self.change = model, model.config, change

    def get_output_embeddings(self) -> Any:
        return self.model.get_output_embeddings()

    def forward(self, **inputs: Any) -> Any:
        output = self.model(**inputs)
        output.logits = self.change(output.logits)
        return output


@pytest.mark.parametrize(
    "change",
    [lambda x: 30 * torch.tanh(x / 30), lambda x: 1.01 * x, lambda x: x + torch.linspace(0, 1, 97)],
    ids=["cap", "factor", "bias"],
)
def test_a_head_that_is_not_understood_is_left_to_the_model(change: Any, budget: str) -> None:
    model = Odd(model_of("llama"), change)
    with pytest.warns(AccelWarning, match="head is off for Linear"):
        assert head_of(model) is None
    assert_same(model)
    found = head_inputs(model, IDS, INDEX, hidden=True)
    expected = model.model.model(input_ids=IDS, use_cache=False).last_hidden_state.flatten(0, 1)[INDEX]
    torch.testing.assert_close(found.hidden, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]], ids=["blocks", "head"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_are_in_effect_on_the_head_too(targets: Any, checkpointing: bool, budget: str) -> None:
    model = add_adapters(model_of("llama"), Adapters(r=2, target_modules=targets), 0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    model.double()
    if checkpointing:
        checkpoint_activations(model)
        model.train()
    assert head_of(model) is not None
    assert_same(model)
    off = AdaptersOff(model)
    assert (head_of(off) is None) == (targets != "all-linear")
    with torch.no_grad():
        for one, other in zip(in_parts(off), plainly(off), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        assert not torch.allclose(in_parts(off)[0], in_parts(model)[0])


def test_a_head_saved_beside_the_adapters_is_the_one_that_is_read(budget: str) -> None:
    import peft

    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model: Any = peft.get_peft_model(model_of("llama"), settings)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modules_to_save" in name:
                p.mul_(1.5)
    assert_same(model)
    assert head_of(AdaptersOff(model)) is None


def test_trying_a_head_out_draws_no_random_number_and_leaves_the_mode() -> None:
    model = model_of("gpt2").train()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    head_of(model)
    assert torch.equal(torch.rand(1), expected)
    assert model.training
    assert model.transformer.drop.training


def test_a_model_is_not_kept_by_what_is_known_of_its_head() -> None:
    import gc
    import weakref

    model = model_of("llama")
    head_of(model)
    gone = weakref.ref(model.lm_head)
    del model
    gc.collect()
    assert gone() is None


def test_a_token_without_probability_adds_nothing() -> None:
    from keel.algorithms.masked import token_logp_and_entropy

    x = torch.tensor([[1.0, -torch.inf, 0.5], [0.0, 2.0, 1.0]], dtype=torch.float64)
    ids, found = torch.tensor([0, 1]), []
    for make in (token_logp_and_entropy, lambda x, ids: (token_logp(x, ids), entropy(x))):
        leaf = x.clone().requires_grad_()
        logp, h = make(leaf, ids)
        (2 * logp.sum() + 3 * h.sum()).backward()
        found.append((logp.detach(), h.detach(), leaf.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        assert one.isfinite().all()


MEASURED = """
import torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from keel.algorithms.masked import entropy, token_logp
from keel.models.logprobs import HeadInputs, head_inputs, token_logprobs

torch.set_num_threads(1)
sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1)
sizes |= dict(num_attention_heads=2, num_key_value_heads=2)
model = LlamaForCausalLM(LlamaConfig(vocab_size=128_000, max_position_embeddings=640, **sizes))
ids, index = torch.randint(0, 128_000, (1, 640)), torch.arange(100, 612)
tokens = ids.flatten()[index + 1]

def naively():
    logits = model(input_ids=ids).logits[0, index]
    return token_logp(logits, tokens).sum() + entropy(logits.detach()).sum()

def in_parts():
    found = token_logprobs(head_inputs(model, ids, index), tokens, entropy=True)
    return found.logp.sum() + found.entropy.detach().sum()

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))

head_inputs(model, ids[:, :4], torch.arange(2))  # whatever is made once
for value in (in_parts, naively):
    model.zero_grad(set_to_none=True)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    value().backward()
    print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_at_a_vocabulary_of_128_000_the_peak_is_a_quarter_of_the_naive_computation_at_most() -> None:
    """Forward and backward of 512 log-probabilities, gradients of the weights included."""
    exact = {
        "KEEL_ACCEL": "1",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "1048576",
        "MALLOC_TRIM_THRESHOLD_": "1048576",
    }
    command = [sys.executable, "-c", MEASURED]
    done = subprocess.run(command, env=os.environ | exact, check=True, stdout=subprocess.PIPE, text=True)
    ours, naive = map(int, done.stdout.split())
    assert naive > 500_000  # kB: tensors, not the allocator's noise
    assert ours <= naive / 4, (ours, naive)


def test_in_bfloat16_products_the_parts_are_those_of_the_models_own_logits(
    budget: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`dtype: auto`: weights and log-softmax in float32, gradients too."""
    monkeypatch.setattr(precision, "fast_in_bfloat16", lambda device: True)
    model = precision.prepare_model(model_of("llama").float(), "auto")
    with precision.computing(model, IDS.device):
        theirs = plainly(model)
    ours = in_parts(model)
    assert ours[0].dtype == torch.float32
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0.05)
    for one, other in zip(gradients(model, ours), gradients(model, theirs), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0.1, atol=0.1 * float(other.abs().max()))


def test_the_likeliest_token_is_the_first_of_equal_ones() -> None:
    from keel.models.logprobs import _likeliest

    logits = torch.tensor([[1.0, 3.0, 3.0], [1.0, 3.0, 3.0], [5.0, 0.0, 1.0], [0.0, 0.0, 2.0]])
    for rows in (logits, logits.bfloat16()):
        assert _likeliest(rows, torch.tensor([1, 2, 1, 2])).tolist() == [True, False, False, True]
        assert _likeliest(rows, rows.argmax(dim=-1)).all()


def test_a_large_head_on_a_cpu_makes_logits_of_half_its_size_at_a_time() -> None:
    assert logprobs.logits_at_once(2048, 256, "cpu") == logprobs.LOGITS_AT_ONCE
    assert logprobs.logits_at_once(151_936, 896, "cpu") == 2 * 151_936 * 896  # bytes: 448 rows
    assert logprobs.logits_at_once(151_936, 896, "cuda") == logprobs.LOGITS_AT_ONCE
    head = Head(torch.nn.Linear(1, 1), 1.0, None, 151_936)
    assert HeadInputs(None, head, torch.zeros(2, 896), None).rows_at_once == 448
    assert HeadInputs(None, None, torch.zeros(2, 151_936), None).rows_at_once == 110
