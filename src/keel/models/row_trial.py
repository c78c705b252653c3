"""Whether a language model reads rows as keel lays them out: beside others, padded on the right, without a
mask. What it says of a token may depend on nothing behind it and on no other row. Tried once on every model.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from keel.accel.modules import plain_of, undisturbed
from keel.accel.patches import difference, tried
from keel.accel.trial_inputs import trial_ids
from keel.errors import UsageError

LONG, SHORT = 8, 5  # tokens of the two rows
# share of the largest logit that rounding may make in half precision, where it moves tokens between experts
HALF = 0.2

_verdicts: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


def check_rows(model: Any) -> None:
    """UsageError, which names the model's type, where rows beside each other are not what each is alone.

    model: a language model, or what is called like one and has `get_base_model`.
    """
    module = model if isinstance(model, nn.Module) else model.get_base_model()
    if module not in _verdicts:
        device = next(module.parameters()).device
        with undisturbed(module), torch.no_grad(), torch.autocast(device.type, enabled=False):
            _verdicts[module] = tried(lambda: _differs(model))
    if (why := _verdicts[module]) is not None:
        kind = plain_of(module).config.get_text_config().model_type
        what = "rows beside each other, padded on the right" if why.startswith("logits") else "a row of text"
        raise UsageError(f"this {kind} model cannot read {what}: {why}")


def take_as_tried(model: nn.Module) -> None:
    """Another rank has tried the same model, whose weights are not here, and nothing was found."""
    _verdicts[model] = None


def _differs(model: Any) -> str | None:
    module = model if isinstance(model, nn.Module) else model.get_base_model()
    device, config = next(module.parameters()).device, plain_of(module).config
    first, second = trial_ids(config, LONG, 1), trial_ids(config, SHORT, 2)
    rows = [first, second + [0] * (LONG - SHORT)]
    together = model(input_ids=torch.tensor(rows, device=device), use_cache=False).logits
    whole, part, other = (
        model(input_ids=torch.tensor([row], device=device), use_cache=False).logits[0]
        for row in (first, first[:SHORT], second)
    )
    rough = HALF if whole.dtype in (torch.float16, torch.bfloat16) else None
    return (
        difference("logits of a token, by what stands behind it,", whole[:SHORT], part, rough=rough)
        or difference("logits beside another row", together[0], whole, rough=rough)
        or difference("logits of a padded row", together[1, :SHORT], other, rough=rough)
    )
