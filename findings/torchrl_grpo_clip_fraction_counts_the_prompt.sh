#!/usr/bin/env bash
# GRPOLoss of torchrl takes its loss over the tokens of the reply, and what it logs over all of them: clip_fraction and kl_approx
# are means over the prompt too, where every log-ratio is zero. Of a reply of four tokens two are clipped: the
# share is 0.5 by itself, 0.125 behind twelve other tokens and 0.05 behind 36. The loss is the same three times. So the same
# policy drifts less the longer its prompts are, and a KL that is held against a bound is out by as much.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torchrl==0.14.1 tensordict==0.14.3 torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from tensordict import TensorDict
from torchrl.modules.distributions.discrete import LLMMaskedCategorical
from torchrl.objectives.llm import GRPOLoss

assert version("torchrl") == "0.14.1", version("torchrl")
RATIO = torch.tensor([0.5, 0.0, -0.5, 0.01])  # log-ratios of the reply's tokens: the first and third are clipped


class Actor(torch.nn.Module):
    """A model that gives these logits."""

    in_keys = [("tokens", "full")]

    def __init__(self, logits: torch.Tensor, counted: torch.Tensor):
        super().__init__()
        self.logits, self.counted = torch.nn.Parameter(logits), counted

    def get_dist(self, rows, logits_key="logits", **_):
        return LLMMaskedCategorical(logits=self.logits, mask=self.counted)


def logged(prompt: int) -> dict[str, float]:
    """What the loss says of two replies of four tokens behind so many others."""
    length = prompt + 4
    reply = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[0, 1, 2, 3], [4, 3, 2, 1]])
    logits = torch.cat([torch.randn(2, prompt, 5), reply], dim=1)
    ids = torch.cat([torch.zeros(2, prompt, dtype=torch.long), tokens], dim=1)
    counted = torch.arange(length).expand(2, -1) >= prompt
    before = torch.zeros(2, length)
    before[:, prompt:] = reply.log_softmax(-1).gather(-1, tokens[..., None])[..., 0] - RATIO
    advantage = torch.tensor([1.0, -1.0])[:, None, None].expand(2, length, 1)
    rows = TensorDict({("tokens", "full"): ids, ("log_probs", "full"): before, "advantage": advantage}, [2])
    said = GRPOLoss(Actor(logits, counted), entropy_bonus=False)(rows)
    return {name: getattr(said, name).item() for name in ("loss_objective", "clip_fraction", "kl_approx")}


share, kl = (RATIO.abs() > 0.2).float().mean().item(), -RATIO.mean().item()
first = logged(0)
for prompt in (0, 12, 36):
    said = logged(prompt)
    print(f"{prompt} tokens before the reply:", {name: round(value, 5) for name, value in said.items()})
    assert abs(said["loss_objective"] - first["loss_objective"]) < 1e-6
    assert abs(said["clip_fraction"] - share * 4 / (prompt + 4)) < 1e-6
    assert abs(said["kl_approx"] - kl * 4 / (prompt + 4)) < 1e-6
print(f"by hand, over the reply: {share} clipped, KL {kl:.5f}")
PYTHON
