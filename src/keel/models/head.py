"""The head of a causal language model: what it is given, and what becomes of that, a few positions at a time.

The hidden states are taken where the model itself hands them to its head, so that whatever stands before
(adapters, a final projection) is in them. What an architecture does to the logits afterwards is known for
some and tried out on every model: one whose logits come out otherwise has no head here, and its own forward
is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from keel.accel.batch_layout import KINDS
from keel.accel.modules import HasConfig, is_foreign, pulled, undisturbed
from keel.accel.patches import difference, disabled, enabled, trusted
from keel.models.precision import computing

FACTORS = ("logit_scale", "lm_head_multiplier")  # names in a config: Cohere's, Falcon-H1's


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
    """The head of a language model, tried out once; None if its logits are not what `Head` says, or the path
    `head` of `keel.accel` is off.

    `model` may be something else that is called like a model and has `get_output_embeddings` and `config`.
    """
    if not enabled("head"):
        return None
    linear = getattr(model, "get_output_embeddings", lambda: None)()
    if linear is None or (_adapted(linear) and not hasattr(model, "peft_config")):
        return None  # whether a head's adapters are on is only known while the model runs
    if _output_hooked(model):
        return None
    head = _supposed(model, linear)
    known = model.config.get_text_config().model_type in KINDS
    depends_on = next(linear.parameters()).dtype
    if not trusted("head", linear, lambda: _differs(model, head), depends_on=depends_on, say=known):
        return None
    return head


def _adapted(linear: nn.Module) -> bool:
    return any(hasattr(linear, name) for name in ("lora_A", "modules_to_save"))


def _output_hooked(model: Any) -> bool:
    """Whether a hook of others' sees, and may change, the logits that the model itself returns."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    hooks = (hook for part in (model, plain) for hook in getattr(part, "_forward_hooks", {}).values())
    return any(is_foreign(hook) for hook in hooks)


def _supposed(model: HasConfig, linear: Any) -> Head:
    """The head as the model's config describes it."""
    config = model.config.get_text_config()
    factor = 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    for name in FACTORS:
        factor *= getattr(config, name, None) or 1.0
    vocab = getattr(linear, "out_features", None) or linear.weight.shape[0]
    return Head(linear, factor, getattr(config, "final_logit_softcapping", None), vocab)


def _differs(model: Any, head: Head) -> str | None:
    """Whether `head` makes the model's own logits of hidden states small and large, and their gradients."""
    module = model if isinstance(model, nn.Module) else model.get_base_model()
    device = next(head.linear.parameters()).device
    ids, given = torch.arange(4, device=device)[None], list[Tensor]()
    asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}

    def other(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        noise = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(0))
        noise *= torch.tensor([0.1, 1.0, 10.0, 100.0])[:, None]
        given.append(noise.to(inputs[0]).requires_grad_())
        return (given[-1], *inputs[1:])

    with undisturbed(module), torch.inference_mode(False), computing(model, device):
        with disabled(), torch.enable_grad(), _before(head.linear, other):
            logits = model(**asked).logits
        with disabled(), torch.no_grad(), capture_head_input(head, skip_logits=True) as seen:
            model(**asked)
        if len(given) != 1 or len(seen) != 1 or seen[0].shape[:2] != ids.shape:
            return "it calls its head otherwise"
        with torch.enable_grad():
            ours = head(given[0])
        rows = zip(ours[0], logits[0], strict=True)
        why = next(filter(None, (difference("logits", a[None], b[None]) for a, b in rows)), None)
        if why is not None or not logits.requires_grad:
            return why
        rough = 3e-2 if ours.dtype in (torch.float16, torch.bfloat16) else 1e-3
        return difference(
            "gradients of logits", pulled(ours, given)[0], pulled(logits, given)[0], rough=rough
        )


@contextmanager
def capture_head_input(head: Head, *, skip_logits: bool = False) -> Iterator[list[Tensor]]:
    """Within it, a list of what the head was given, (…, d), call by call. skip_logits: the head itself is
    given no position, so that a forward of the model makes no logits."""
    seen: list[Tensor] = []

    def look(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        seen.append(inputs[0])
        return (inputs[0][:, :0], *inputs[1:]) if skip_logits else None

    with _before(head.linear, look):
        yield seen


@contextmanager
def _before(module: nn.Module, hook: Callable[[nn.Module, tuple[Any, ...]], object]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
