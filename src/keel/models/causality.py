# pyright: strict
"""Whether a language model sees only what stands before: tried, since a class for causal language modelling
does not promise it.

transformers opens encoders (BERT and its kin) as causal language models, and they read both ways unless their
config says `is_decoder: true`. Trained to predict what they can see, they learn to copy, and the loss falls
to nothing without a word.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from keel.accel.batch_layout import KINDS
from keel.accel.modules import undisturbed
from keel.accel.trial_inputs import trial_ids
from keel.errors import UsageError

LENGTH = 40  # tokens of the trial; what stands in the second half must change nothing in the first
ROUGH, ROUGH_HALF = 1e-4, 1e-2  # of the largest logit: above rounding, in float32 and in half precision


def require_causal(model: Any, name: str) -> None:
    """UsageError for a model whose logits at a position depend on later tokens. Costs a short forward of two
    rows, and nothing for types that are known."""
    text = model.config.get_text_config(decoder=True)
    if text.model_type in KINDS:
        return
    weight: Tensor = next(model.parameters())
    ids = [trial_ids(text, LENGTH, seed) for seed in (0, 1)]
    half = LENGTH // 2
    rows = torch.tensor([ids[0], ids[0][:half] + ids[1][half:]], device=weight.device)
    with undisturbed(model), torch.no_grad():
        logits: Tensor = model(input_ids=rows, use_cache=False).logits[:, :half].float()
    gap, largest = float((logits[0] - logits[1]).abs().max()), float(logits.abs().max())
    if gap > (ROUGH if weight.dtype == torch.float32 else ROUGH_HALF) * largest:
        remedy = (
            "; set `is_decoder: true` in its config.json if it was trained as a decoder"
            if hasattr(text, "is_decoder") and not text.is_decoder
            else ""
        )
        raise UsageError(
            f"model {name!r} ({text.model_type}) is no causal language model: what it says at a position "
            f"depends on the tokens behind it{remedy}"
        )
