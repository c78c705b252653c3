"""The balancing loss of mixtures of experts (2101.03961, equations 4 to 6): transformers' own function on the
routers' logits of a forward, padded positions left out. A loss that backpropagates through a language model
adds it, weighted.

The loss is no sum over tokens: it multiplies the share of tokens that an expert got by its mean probability.
It is made of each forward by itself; those of a step are averaged, by their tokens within a micro-batch, and
by the micro-batch's share of the step. So it depends on the split into micro-batches, as in every trainer,
while its weight against the main loss does not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from keel.errors import UsageError

FUNCTION = "load_balancing_loss_func"  # in a model's module
_collecting: list[Routed] = []


@dataclass
class Routed:
    """The balancing losses of some forwards, by tokens."""

    coef: float
    losses: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (tokens, loss), each ()

    def mean(self) -> Tensor:
        """() the loss of an average token."""
        tokens = torch.stack([count for count, _ in self.losses])
        values = torch.stack([loss for _, loss in self.losses])
        return (tokens * values).sum() / tokens.sum()

    def added_to(self, loss: Tensor, share: Tensor | float) -> tuple[Tensor, dict[str, Tensor]]:
        """A micro-batch's loss with its part of the balancing loss, and that part as a metric; share: of the
        step that the micro-batch is. Without experts the loss as it is."""
        if not self.losses:
            return loss, {}
        balancing = self.mean() * share
        return loss + self.coef * balancing.to(loss), {"router_aux_loss": balancing.detach()}


def mark(model: Any, asked: float | None) -> Any:
    """The model, marked with the weight of its balancing loss: `asked`, or None for what its config asks for.
    UsageError for a weight where the model has no such loss."""
    config = model.config.get_text_config()
    own = _weight_in(config)
    if asked and not hasattr(sys.modules[type(model).__module__], FUNCTION):
        raise UsageError(
            f"model.router_aux_loss_coef has no effect: {config.model_type} has no balancing loss of experts"
        )
    wants = getattr(config, "output_router_logits", False)
    model.keel_router_coef = (own if wants else 0.0) if asked is None else asked
    return model


def _weight_in(config: Any) -> float:
    """The weight in a config, under the name that its type has for it (most, JetMoE, DBRX)."""
    of_ffn = getattr(getattr(config, "ffn_config", None), "moe_loss_weight", None)
    names = ("router_aux_loss_coef", "aux_loss_coef")
    weights = [*(getattr(config, name, None) for name in names), of_ffn]
    return float(next((weight for weight in weights if weight is not None), 0.0))


@contextmanager
def collecting(model: Any) -> Iterator[Routed]:
    """Within it, the balancing losses of the model's forwards with gradient are kept. Nothing is done for a
    model without such a loss, and without gradient."""
    routed = Routed(getattr(model, "keel_router_coef", 0.0))
    if not routed.coef or not torch.is_grad_enabled():
        yield routed
        return
    _collecting.append(routed)
    try:
        yield routed
    finally:
        _collecting.pop()


def wanted() -> bool:
    """Whether somebody collects."""
    return bool(_collecting)


def forward(model: Any, lengths: Tensor, call: Callable[..., Any], **inputs: Any) -> Any:
    """`call(**inputs)`, a forward of the model over (B, S) ids, with its balancing loss collected. lengths:
    (B,) tokens of each row; what stands behind them is padding."""
    ids = inputs["input_ids"]
    mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None].to(ids.device)).long()
    with _with_mask(model, mask):
        # positions that begin anew stand for packed rows, which a mask would join again
        padded = {} if "position_ids" in inputs else {"attention_mask": mask}
        output = call(output_router_logits=True, **padded, **inputs)
    _collecting[-1].losses.append((mask.sum(), output.aux_loss))
    return output


@contextmanager
def _with_mask(model: Any, mask: Tensor) -> Iterator[None]:
    """transformers' function is given a (B, S) mask, whatever mask the forward has: that of packed rows has
    more dimensions."""
    plain = model.get_base_model() if hasattr(model, "peft_config") else model
    module = sys.modules[type(plain).__module__]
    function = getattr(module, FUNCTION)

    def masked(*arguments: Any) -> Any:
        return function(*arguments[:-1], mask)

    setattr(module, FUNCTION, masked)
    try:
        yield
    finally:
        setattr(module, FUNCTION, function)
