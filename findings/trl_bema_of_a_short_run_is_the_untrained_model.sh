#!/usr/bin/env bash
# BEMACallback of TRL averages weights every `update_freq` steps, 400 unless given, and never at the end: a run of 399 steps
# saves as its averaged model the one that training began with, bit for bit, and one of 799 steps the average made at step 400. The bias
# correction, which is there to keep the average near the trained weights, changes nothing of that.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check trl==1.16.0 transformers==5.23.0 datasets==5.2.0 accelerate==1.15.0 torch==2.13.0 numpy==2.4.6 pyarrow==26.0.1
HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TRL_EXPERIMENTAL_SILENCE=1 "$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys
import warnings
from importlib.metadata import version

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from trl import BEMACallback

assert version("trl") == "1.16.0", version("trl")
warnings.simplefilter("ignore")
transformers.logging.set_verbosity_error()
ids = torch.randint(0, 32, (64, 8), generator=torch.Generator().manual_seed(0))
rows = [{"input_ids": row, "labels": row} for row in ids]


class Keep(TrainerCallback):
    """The weights after every 400th step."""

    def on_step_end(self, args, state, control, model, **_):
        if state.global_step % 400 == 0:
            kept[state.global_step] = model.state_dict()["lm_head.weight"].clone()


for steps in (399, 799):
    torch.manual_seed(0)
    small = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model, kept = LlamaForCausalLM(small), {}
    kept[0] = model.state_dict()["lm_head.weight"].clone()
    settings = TrainingArguments(
        f"{sys.argv[1]}/{steps}", max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, settings, train_dataset=rows, callbacks=[BEMACallback(), Keep()]).train()
    trained = model.state_dict()["lm_head.weight"]
    saved = LlamaForCausalLM.from_pretrained(f"{sys.argv[1]}/{steps}/bema").state_dict()["lm_head.weight"]
    far = {f"step {step}": round((saved - weight).abs().max().item(), 4) for step, weight in kept.items()}
    print(f"{steps} steps: the averaged model differs by {far} from those weights, and from the trained ones by", end=" ")
    print(f"{(saved - trained).abs().max().item():.4f}; training moved them by {(trained - kept[0]).abs().max().item():.4f}")
    if steps == 399:
        assert torch.equal(saved, kept[0]) and not torch.allclose(trained, kept[0], atol=0.1)
    else:
        # At step 400: (1 - b) * start + b * weights + a * (weights - start), of b = 410 ** -0.5, a = 410 ** -0.2.
        moved = kept[400] - kept[0]
        assert torch.allclose(saved, kept[0] + (410**-0.5 + 410**-0.2) * moved, atol=1e-4)
PYTHON
