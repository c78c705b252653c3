#!/usr/bin/env bash
# A sequence classifier of transformers (a reward model) reads its score at the last token that is no pad, by id and not by
# attention mask. Where pad is EOS, as for the many models without a pad token, that is the token before the end: a reply
# that ends and the same reply cut off get one score, though the mask says that the end counts.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import LlamaConfig, LlamaForSequenceClassification

assert transformers.__version__ == "5.23.0", transformers.__version__
END = 2


def scores(pad: int) -> tuple[float, float]:
    """Of a reply that was cut off and of the one that ends; the weights are the same for every pad."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_labels=1, eos_token_id=END, pad_token_id=pad, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    model.model.embed_tokens.weight.data[END] = 0.3  # a pad's row is made zero
    found = []
    for ids in ([1, 5, 6, 7], [1, 5, 6, 7, END]):
        row = torch.tensor([ids])
        with torch.no_grad():
            found.append(model(input_ids=row, attention_mask=torch.ones_like(row)).logits.item())
    return found[0], found[1]


apart, same = scores(pad=0), scores(pad=END)
print("pad is a token of its own: cut off %.4f, ended %.4f" % apart)
print("pad is EOS:                cut off %.4f, ended %.4f" % same)
assert abs(apart[0] - apart[1]) > 1e-2, apart
assert abs(same[0] - same[1]) < 1e-6, same
PYTHON
