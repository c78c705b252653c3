#!/usr/bin/env bash
# A query that may look at nothing (padding) gets zeros from scaled_dot_product_attention if the mask is bool or holds -inf,
# and the mean of all values, those of later tokens included, if the mask holds the smallest finite number, which is what
# transformers' additive masks hold. One mask in two types, two results; each is finite, so that no check for NaN sees it.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch.nn.functional import scaled_dot_product_attention

assert torch.__version__.split("+")[0] == "2.13.0", torch.__version__
torch.manual_seed(0)
query, key, value = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4), torch.arange(12.0).view(1, 1, 3, 4)
allowed = torch.tensor([[False, False, False], [True, True, False], [True, True, True]])
zeros = torch.zeros(3, 3)
rows = {
    "bool": scaled_dot_product_attention(query, key, value, attn_mask=allowed),
    "-inf": scaled_dot_product_attention(query, key, value, attn_mask=zeros.masked_fill(~allowed, -torch.inf)),
    "finfo.min": scaled_dot_product_attention(
        query, key, value, attn_mask=zeros.masked_fill(~allowed, torch.finfo(torch.float32).min)
    ),
}
first = {name: result[0, 0, 0].tolist() for name, result in rows.items()}
print(first)
assert first["bool"] == first["-inf"] == [0.0] * 4 and first["finfo.min"] == [4.0, 5.0, 6.0, 7.0], first
PYTHON
