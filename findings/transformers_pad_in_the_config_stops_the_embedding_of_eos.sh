#!/usr/bin/env bash
# A decoder of transformers makes its embedding with the config's pad as padding_idx, for which torch computes no gradient.
# Where pad is EOS, as after `config.pad_token_id = config.eos_token_id`, the model in memory learns the embedding of EOS (or
# of the token that ends a turn), and the same model saved and opened again never does: its outputs, loss and other gradients
# are equal, that row's gradient is 0, though the loss does depend on the row. Llama, Mistral, Qwen 3, Gemma 2 and Phi 3 do
# so, GPT-2 and GPT-NeoX do not. Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 torch==2.13.0 numpy==2.4.6
HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 "$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

assert transformers.__version__ == "5.23.0", transformers.__version__
transformers.logging.set_verbosity_error()
END = 2
# Two turns, each with its end, in rows that need no padding.
ids = torch.tensor([[1, 5, 6, END, 7, 8, END, 9], [1, 6, END, 5, 8, 7, END, 5]])
small = dict(
    vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, head_dim=8, bos_token_id=1, eos_token_id=END, pad_token_id=None, initializer_range=0.2,
)  # fmt: skip


def gradients(model: Any) -> tuple[float, torch.Tensor]:
    """The loss, and what it makes of the rows of the input's embedding."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), model.get_input_embeddings().weight.grad.clone()


def slope(model: Any) -> float:
    """By how much the loss follows one number of EOS's row, without autograd."""
    weight, losses = model.get_input_embeddings().weight, []
    with torch.no_grad():
        for step in (1e-2, -2e-2, 1e-2):
            weight[END, 0] += step
            losses.append(model(input_ids=ids, labels=ids).loss.item())
    return (losses[0] - losses[1]) / 2e-2


for kind in ("llama", "mistral", "qwen3", "gemma2", "phi3", "gpt2", "gpt_neox"):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**small, "tie_word_embeddings": False})
    model = AutoModelForCausalLM.from_config(config).eval()
    model.config.pad_token_id = model.config.eos_token_id
    model.save_pretrained(f"{sys.argv[1]}/{kind}")
    again = AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{kind}").eval()
    (loss, memory), (same, opened) = gradients(model), gradients(again)
    others = [row for row in range(20) if row != END]
    before, after, true = memory[END, 0].item(), opened[END, 0].item(), slope(again)
    print(f"{kind:8} loss {loss:.4f} and {same:.4f}; EOS: gradient {before:+.4f} in memory, {after:+.4f} opened; slope {true:+.4f}")
    assert abs(loss - same) < 1e-5
    assert torch.allclose(memory[others], opened[others], atol=1e-5)
    assert abs(before - true) < 2e-3 and abs(before) > 3e-3
    if kind in ("gpt2", "gpt_neox"):
        assert torch.allclose(memory[END], opened[END], atol=1e-5)
    else:
        assert memory[END].norm() > 0.01 and not opened[END].any()
PYTHON
