#!/usr/bin/env bash
# An adapter that targets `embed_tokens` or `lm_head` is saved by peft with the base's whole matrix. Saved while it is merged
# (`merge_adapter()`, as before sampling or an evaluation), that matrix holds the adapter's change already: opened again, the
# change is there twice in that layer, without a word about it, and disabled it leaves no base model. One on other layers is
# saved right, merged or not. Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check peft==0.21.2 transformers==5.23.0 torch==2.13.0 numpy==2.4.6
HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 "$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

assert version("peft") == "0.21.2", version("peft")
torch.manual_seed(0)
small = LlamaConfig(
    vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    tie_word_embeddings=False, initializer_range=0.2,
)  # fmt: skip
LlamaForCausalLM(small).save_pretrained(f"{sys.argv[1]}/base")
ids = torch.arange(9)[None]


def base() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(f"{sys.argv[1]}/base").eval()


@torch.no_grad()
def logp(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=ids).logits.log_softmax(-1)


def off(layer: str, merged: bool) -> tuple[float, float, float]:
    """By how much an adapter on that layer, saved and opened, is off the trained model and, disabled, off the base, in nats;
    and its change of the layer's weights as a multiple of what was trained."""
    torch.manual_seed(0)
    model = get_peft_model(base(), LoraConfig(r=4, lora_alpha=8, target_modules=[layer]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    trained = logp(model.eval())
    if merged:
        model.merge_adapter()
        assert torch.allclose(logp(model), trained, atol=1e-5)
    model.save_pretrained(f"{sys.argv[1]}/{layer}-{merged}")
    again = PeftModel.from_pretrained(base(), f"{sys.argv[1]}/{layer}-{merged}").eval()
    opened = logp(again)
    with again.disable_adapter():
        disabled = logp(again)
    if merged:
        model.unmerge_adapter()
    name = next(name for name in base().state_dict() if f"{layer}.weight" in name)
    start = base().state_dict()[name]
    wanted = model.merge_and_unload().state_dict()[name] - start
    change = again.merge_and_unload().state_dict()[name] - start
    times = (change * wanted).sum() / (wanted * wanted).sum()
    assert torch.allclose(change, times * wanted, atol=1e-5)
    return (opened - trained).abs().max().item(), (disabled - logp(base())).abs().max().item(), times.item()


for layer in ("embed_tokens", "lm_head", "q_proj"):
    for merged in (False, True):
        opened, disabled, times = off(layer, merged)
        print(f"{layer:12} saved {'merged' if merged else 'unmerged'}: opened it is off the trained model by", end=" ")
        print(f"{opened:.4f} nats, disabled off the base by {disabled:.4f}; its change is there {times:.3f} times")
        if merged and layer != "q_proj":
            assert opened > 0.1 and disabled > 0.1 and abs(times - 2) < 1e-3
        else:
            assert opened < 1e-4 and disabled < 1e-4 and abs(times - 1) < 1e-3
PYTHON
