#!/usr/bin/env bash
# The gradient of an embedding in bfloat16 is summed in bfloat16 on a CPU, token by token: where 4,000 tokens are the same and
# each sends back 1, its row's gradient is 256, since 256 + 1 is 256 in bfloat16. So is that of LayerNorm's bias, of
# `embedding_bag`, and of a tensor read by an index; of a linear layer's weight and bias the gradient is 4,000. A frequent token
# learns as if the batch had ended early, with random gradients too, and nothing is NaN, infinite or warned of.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch import nn
from torch.nn import functional as F

assert torch.__version__.split("+")[0] == "2.13.0", torch.__version__
torch.set_num_threads(1)  # each thread has a sum of its own for LayerNorm's bias
TOKENS = 4000
same = torch.zeros(TOKENS, dtype=torch.long)


def gradients(dtype: torch.dtype) -> dict[str, float]:
    """What of a sum of 4,000 ones arrives, by what it is the gradient of."""
    table = nn.Embedding(2, 8).to(dtype)
    table(same).sum().backward()
    bag = nn.EmbeddingBag(2, 8, mode="sum").to(dtype)
    bag(same[None]).sum().backward()
    read = torch.zeros(2, 8, dtype=dtype, requires_grad=True)
    read[same].sum().backward()
    norm, linear = nn.LayerNorm(8).to(dtype), nn.Linear(8, 8).to(dtype)
    norm(torch.randn(TOKENS, 8).to(dtype)).sum().backward()
    linear(torch.ones(TOKENS, 8, dtype=dtype)).sum().backward()
    of = {"embedding": table.weight, "embedding bag": bag.weight, "index": read, "LayerNorm bias": norm.bias}
    of |= {"linear weight": linear.weight, "linear bias": linear.bias}
    return {name: value.grad.flatten()[0].item() for name, value in of.items()}


for dtype in (torch.float32, torch.bfloat16):
    print(dtype, gradients(dtype))
stuck = {"embedding", "embedding bag", "index", "LayerNorm bias"}
assert set(gradients(torch.float32).values()) == {TOKENS}
assert {name for name, value in gradients(torch.bfloat16).items() if value == 256} == stuck
assert {value for name, value in gradients(torch.bfloat16).items() if name not in stuck} == {TOKENS}

torch.manual_seed(0)
pulls = torch.randn(TOKENS, 256) * 0.1 + 0.05  # a common direction under noise
table = torch.zeros(2, 256, dtype=torch.bfloat16, requires_grad=True)
F.embedding(same, table).backward(pulls.bfloat16())
exact = pulls.bfloat16().double().sum(0)
off = ((table.grad[0].double() - exact).norm() / exact.norm()).item()
print(f"noisy gradients: {off:.1%} off, where bfloat16 itself rounds by 0.2 %")
assert off > 0.1, off
PYTHON
