"""The head of a causal language model: what it is given, and what becomes of that, a few positions at a time.

The hidden states are taken where the model itself hands them to its head, so that whatever stands before
(adapters, a final projection) is in them. What an architecture does to the logits afterwards is known for
some and tried out on every model: one whose logits come out otherwise has no head here, and its own forward
is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from keel.accel.modules import evaluating
from keel.models.precision import computing

FACTORS = ("logit_scale", "lm_head_multiplier")  # names in a config: Cohere's, Falcon-H1's
# by the linear layer: factor, cap and vocabulary; None: no head. (A Head would keep the layer, and the model
# with it.)
_known: WeakKeyDictionary[nn.Module, tuple[float, float | None, int] | None] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Head:
    """(…, d) → (…, V): logits = cap · tanh(factor · linear(hidden) / cap)."""

    linear: Any
    factor: float  # Cohere, Granite, Falcon-H1
    cap: float | None  # Gemma 2 and 3
    vocab: int

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.linear(hidden)
        if self.factor != 1:
            logits = logits * self.factor
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


def head_of(model: Any) -> Head | None:
    """The head of a language model, tried out once; None if its logits are not what `Head` says.

    `model` may be something else that is called like a model and has `get_output_embeddings` and `config`.
    """
    linear = getattr(model, "get_output_embeddings", lambda: None)()
    if linear is None or (_adapted(linear) and not hasattr(model, "peft_config")):
        return None  # whether a head's adapters are on is only known while the model runs
    if linear not in _known:
        _known[linear] = _tried(model, linear)
    known = _known[linear]
    return None if known is None else Head(linear, *known)


def _adapted(linear: Any) -> bool:
    return any(hasattr(linear, name) for name in ("lora_A", "modules_to_save"))


def _tried(model: Any, linear: Any) -> tuple[float, float | None, int] | None:
    """Factor, cap and vocabulary, if they make the model's own logits of hidden states small and large."""
    config = model.config.get_text_config()
    factor = 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    for name in FACTORS:
        factor *= getattr(config, name, None) or 1.0
    head = Head(linear, factor, getattr(config, "final_logit_softcapping", None), 0)
    device = next(linear.parameters()).device
    ids, given = torch.arange(4, device=device)[None], []
    asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}

    def other(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        noise = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(0))
        noise *= torch.tensor([0.1, 1.0, 10.0, 100.0])[:, None]
        given.append(noise.to(inputs[0]))
        return (given[-1], *inputs[1:])

    with evaluating(model), torch.no_grad(), computing(model, device):
        try:
            with _before(linear, other):
                logits = model(**asked).logits
            with capture_head_input(head, skip_logits=True) as seen:
                model(**asked)
            ours = head(given[-1])
        except (
            RuntimeError,
            ValueError,
            TypeError,
            IndexError,
        ):  # a model that wants more than ids, or all positions
            return None
    own = len(given) == len(seen) == 1 and seen[0].shape[:2] == ids.shape and ours.shape == logits.shape
    rough = 1e-2 if ours.dtype in (torch.float16, torch.bfloat16) else 1e-4
    if not own or not torch.allclose(ours.float(), logits.float(), rtol=rough, atol=rough):
        return None
    return factor, head.cap, logits.shape[-1]


@contextmanager
def capture_head_input(head: Head, *, skip_logits: bool = False) -> Iterator[list[Tensor]]:
    """Within it, a list of what the head was given, (…, d), call by call. skip_logits: the head itself is
    given no position, so that a forward of the model makes no logits."""
    seen: list[Tensor] = []

    def look(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        seen.append(inputs[0])
        return (inputs[0][:, :0], *inputs[1:]) if skip_logits else None

    with _before(head.linear, look):
        yield seen


@contextmanager
def _before(module: Any, hook: Any) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
