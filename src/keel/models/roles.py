"""Who is who in PPO, and what they share in memory. Decided here and nowhere else.

`separate` keeps four sets of weights: policy, reference, critic, reward model. `trunk` keeps three: the
critic is a head on the policy's last hidden states. With LoRA the reference is the policy with its adapters
off: one fewer. `adapters` keeps one: policy, critic and reward model are adapters on a frozen base, which is
the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from keel.data.batches import derive_seed
from keel.distributed import group
from keel.errors import UsageError
from keel.models.load import (
    ModelSource,
    causal_lm,
    checkpoint_activations,
    disable_dropout,
    model_config,
    scorer,
)
from keel.models.lora import Adapters, add_adapters
from keel.models.seeding import seed_head
from keel.models.shared_base import Base, open_base

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True, slots=True)
class Roles:
    """The models of a PPO run besides the reward model."""

    policy: Any
    reference: Any  # called like a model; frozen
    critic: Any | None  # a model with a score head …
    value_head: nn.Linear | None  # … or a head on the policy's hidden states

    @property
    def value_modules(self) -> list[nn.Module]:
        return [module for module in (self.critic, self.value_head) if module is not None]


class AdaptersOff:
    """The policy as it was before LoRA: the reference without a copy of the weights."""

    def __init__(self, policy: PeftModel) -> None:
        self.policy: Any = policy
        self.keel_auto = getattr(policy, "keel_auto", False)  # see keel.models.precision

    @property
    def config(self) -> Any:
        return self.policy.config

    def get_output_embeddings(self) -> Any:
        return self.policy.get_output_embeddings()

    def get_base_model(self) -> Any:
        return self.policy.get_base_model()

    def __call__(self, **inputs: Any) -> Any:
        with self.policy.disable_adapter():
            return self.policy(**inputs)


def open_roles(
    source: ModelSource,
    reference: ModelSource | None,
    *,
    sharing: Literal["separate", "trunk", "adapters", "none"],
    adapters: Adapters | None,
    gradient_checkpointing: bool,
    device: torch.device,
    seed: int,
    base: Base | None = None,
    cut: Callable[[Any], None] = lambda model: None,
    opened: Callable[[Callable[[], Any]], Any] = lambda work: work(),
    same_vocabulary: bool = True,
) -> Roles:
    """Load the roles; sharing "none": without a critic. `reference` None: it is what the policy starts from.
    Dropout is off in all of them.

    base: the frozen weights to put adapters on, where they are open already; opened here if needed for
    `sharing: adapters`. cut: is given each model as soon as it is on the device, where its weights are cut
    over ranks; of models on one base the base's own comes last, and those of the rewards the caller has.
    opened: opens a model that will be cut, which goes to the device then.

    UsageError for a reference with another vocabulary than the policy's, where `same_vocabulary`: their KL
    is not defined.
    """
    if reference is not None and same_vocabulary:
        _check_vocabularies(source, reference)
    if sharing == "adapters" and base is None:
        base = open_base(source, seed, device)
    policy = opened(lambda: causal_lm(source, seed)) if base is None else base.language_model()
    if sharing == "trunk" and not hasattr(policy.config, "hidden_size"):
        raise UsageError("sharing: trunk needs a model whose config has hidden_size")
    if adapters is not None:
        policy = add_adapters(policy, adapters, seed)
    if base is not None and reference is None:
        frozen: Any = base.model
    elif adapters is not None and reference is None:
        frozen = AdaptersOff(policy)
    else:
        frozen = opened(lambda: causal_lm(reference or source, seed)).requires_grad_(False)
        _to(frozen, device)
        disable_dropout(frozen.eval())
        cut(frozen)
    head = _value_head(policy, seed).to(device) if sharing == "trunk" else None
    critic = _critic(source, adapters, seed, base, opened) if sharing in ("separate", "adapters") else None
    for model in (policy,) if critic is None else (policy, critic):
        disable_dropout(model)
        _to(model, device)
        model.eval()
        if gradient_checkpointing:
            checkpoint_activations(model)
            # recomputation only happens in train mode; with dropout at 0 the numbers are the same
            model.train()
        cut(model)
    if head is not None:
        cut(head)
    if base is not None and reference is None:
        cut(frozen)  # last: the others are made of its modules
    return Roles(policy, frozen, critic, head)


def _critic(
    source: ModelSource,
    adapters: Adapters | None,
    seed: int,
    base: Base | None,
    opened: Callable[[Callable[[], Any]], Any],
) -> Any:
    """A critic of its own, or of the base with adapters."""
    own = derive_seed("value", seed)
    critic = opened(lambda: scorer(source, own)) if base is None else base.scorer(own)
    if getattr(critic, "score", None) is None:
        raise UsageError(f"no value head fits a {type(critic).__name__}; set sharing: trunk")
    return critic if adapters is None else add_adapters(critic, adapters, own, train_head=True)


def _to(model: Any, device: torch.device) -> None:
    """On its device; not yet, where its weights are cut over ranks: they go there unit by unit."""
    if not group.is_sharded():
        model.to(device)


def _value_head(policy: Any, seed: int) -> nn.Linear:
    """A critic on the policy's own hidden states."""
    head = nn.Linear(policy.config.get_text_config().hidden_size, 1, dtype=torch.float32)
    seed_head(head, derive_seed("value", seed))
    return head


def _check_vocabularies(policy: ModelSource, reference: ModelSource) -> None:
    ours, theirs = (model_config(source).get_text_config().vocab_size for source in (policy, reference))
    if ours != theirs:
        raise UsageError(
            f"the policy {policy.path!r} has a vocabulary of {ours}, the reference {reference.path!r} of "
            f"{theirs}; their KL is not defined"
        )
