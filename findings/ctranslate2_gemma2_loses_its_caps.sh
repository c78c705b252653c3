#!/usr/bin/env bash
# CTranslate2 converts a Gemma 2 model and leaves out what its config says of logits: final_logit_softcapping,
# attn_logit_softcapping and query_pre_attn_scalar, for which it takes the size of a head (in Gemma 2 27B they differ). What is
# served is another distribution than what was trained: log-probabilities are those of the logits before the cap, off by nats
# where logits come near it, and replies are drawn from something sharper. Without caps, and with that scalar, both agree to 1e-3.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check ctranslate2==4.8.5 transformers==5.23.0 torch==2.13.0 numpy==2.4.6
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import sys
from importlib.metadata import version
from pathlib import Path

import ctranslate2
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

assert version("ctranslate2") == "4.8.5", version("ctranslate2")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)
words = {f"w{i}": i for i in range(61)} | {"<pad>": 61, "<bos>": 62, "<eos>": 63}
ids = torch.randint(0, 61, (1, 24), generator=torch.Generator().manual_seed(3))


def apart(name: str, **options) -> tuple[float, float]:
    """How far CTranslate2's log-probabilities are from transformers', at most, with the final cap and without."""
    torch.manual_seed(0)
    settings = dict(final_logit_softcapping=None, attn_logit_softcapping=None, query_pre_attn_scalar=8) | options
    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=61, bos_token_id=62, eos_token_id=63,
        attn_implementation="eager", **settings,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
        given = model(ids, output_hidden_states=True)
        capped, bare = given.logits[0], model.lm_head(given.hidden_states[-1])[0]
    if config.final_logit_softcapping:
        cap = config.final_logit_softcapping
        assert torch.allclose(capped, cap * torch.tanh(bare / cap), atol=1e-4)
    place = Path(sys.argv[1]) / name
    model.save_pretrained(place)
    spoken = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(
        tokenizer_object=spoken, unk_token="w0", pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(place)
    ctranslate2.converters.TransformersConverter(str(place)).convert(str(place / "converted"))
    engine = ctranslate2.Generator(str(place / "converted"), compute_type="float32", intra_threads=1)
    served = np.array(engine.forward_batch([ids[0].tolist()], return_log_probs=True))[0]
    far = [np.abs(served - logits.log_softmax(-1).numpy()).max() for logits in (capped, bare)]
    print(f"{name}: off by {far[0]:.5f} nats at most, from the logits before the cap by {far[1]:.5f}", flush=True)
    return far[0], far[1]


assert apart("no caps, scalar of a head")[0] < 1e-3
capped, bare = apart("final cap of 5", final_logit_softcapping=5.0)
assert capped > 1 and bare < 1e-3
assert apart("attention cap of 2", attn_logit_softcapping=2.0)[0] > 0.1
assert apart("scalar twice a head", query_pre_attn_scalar=16)[0] > 0.1
PYTHON
