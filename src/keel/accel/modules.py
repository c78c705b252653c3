"""What a module is: whether it draws at random, how to try it without a trace, and how to give it another
forward."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol, SupportsIndex

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig, PreTrainedModel

# hooks that do nothing but compute, so that whoever computes in a module's place or tries it must have them:
# keel's own on adapters of another precision, and transformers'
COMPUTING_HOOKS = ("_in_own_precision", "make_inputs_require_grads")
# transformers leaves it on a model that was asked for hidden states once; it records within such a call alone
IDLE_HOOKS = ("output_capturing_hook",)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
TWIN_AT_MOST = 2**16  # numbers of a parameter whose gradient a trial compares


class HasConfig(Protocol):
    """A language model, or what is called like one (a policy without its adapters)."""

    @property
    def config(self) -> PreTrainedConfig: ...


class Kept(FunctionCtx):
    """What a step of autograd keeps from its forward for its backward; torch hands over one of its own."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """In evaluation mode, and back: no dropout is drawn, and a model with gradient checkpointing keeps a
    cache."""
    training = getattr(model, "training", False)
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def has_dropout(model: nn.Module) -> bool:
    """Whether a forward in train mode draws anything at random; False after `disable_dropout`."""
    saved = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)
    for module in model.modules():
        config = vars(module).get("config")
        of_its_own = module is not saved and isinstance(config, PreTrainedConfig) and dropout_rates(config)
        if of_its_own or dropout_rates(module) or (isinstance(module, _DropoutNd) and module.p > 0):
            return True
    return False


def dropout_rates(owner: object) -> list[str]:
    """Attributes that are the rate of some dropout, and not 0."""
    return [
        name
        for name, value in vars(owner).items()
        if "drop" in name and isinstance(value, float) and 0 < value <= 1
    ]


def plain_of(model: Any) -> Any:
    """The language model, without peft's wrapper; adapters, which sit inside it, stay in effect."""
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) and isinstance(model, nn.Module) else model


def logits_of_last(model: Any, count: int = 1) -> dict[str, int]:
    """The argument by which a model makes logits of the last positions only, where it has one."""
    takes = inspect.signature(plain_of(model).forward).parameters
    return {"logits_to_keep": count} if "logits_to_keep" in takes else {}


def transformed() -> bool:
    """Whether somebody records or transforms a forward, `torch.compile`, `torch.jit.trace` or `torch.func`:
    they take a module's own operations better than steps of autograd of our own, or take those not at all."""
    return bool(
        torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    )


def surrounded(module: nn.Module) -> bool:
    """Whether others' code stands around a module's forward, which whoever computes in its place would pass
    by: hooks that do more than compute, or a forward of its own, as offloading libraries put one there."""
    hooks = (hook for name in HOOKS for hook in (getattr(module, name, None) or {}).values())
    return any(map(is_foreign, hooks)) or "forward" in vars(module) or hasattr(module, "_hf_hook")


def is_foreign(hook: object) -> bool:
    """Whether a hook is none of those that only compute, or record nothing unless they are asked."""
    return getattr(hook, "__name__", "") not in (*COMPUTING_HOOKS, *IDLE_HOOKS)


# ---------------------------------------------------------------- trying a module


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """For trials: within it the model is in evaluation mode, without hooks of others, and draws from a random
    state of its own. transformers' hooks stay: a model that returns router logits computes with what they
    record. Afterwards every module's mode, hooks and the random state are what they
    were."""
    modes = [(module, module.training) for module in model.modules()]
    hooks = [
        (held, list(held.items()))
        for module in model.modules()
        for name in HOOKS
        if (held := getattr(module, name, None))
    ]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    try:
        for module, _ in modes:
            module.training = False
        for held, items in hooks:  # the same dictionary: handles that remove a hook know it by identity
            held.clear()
            held.update((key, hook) for key, hook in items if not is_foreign(hook))
        with torch.random.fork_rng(devices=[index or 0 for index in devices]):
            yield
    finally:
        for held, items in hooks:
            held.clear()
            held.update(items)
        for module, training in modes:
            module.training = training


@contextmanager
def twin_parameters(module: nn.Module, at_most: int = TWIN_AT_MOST) -> Iterator[list[Tensor]]:
    """Within it the module's small parameters are others with the same numbers, which want a gradient: a
    trial differentiates by them without a trace in `.grad` or in hooks. The list of them, each once. at_most:
    numbers of a parameter."""
    twins: dict[int, nn.Parameter] = {}
    places: list[tuple[nn.Module, str, nn.Parameter]] = []
    for part in module.modules():
        for name, own in part._parameters.items():
            if type(own) is nn.Parameter and own.is_floating_point() and own.numel() <= at_most:
                if id(own) not in twins:
                    twins[id(own)] = nn.Parameter(own.detach(), requires_grad=True)
                places.append((part, name, own))
    try:
        for part, name, own in places:
            part._parameters[name] = twins[id(own)]
        yield list(twins.values())
    finally:
        for part, name, own in places:
            part._parameters[name] = own


def pulled(value: Tensor, at: list[Tensor]) -> list[Tensor]:
    """Gradients of a fixed function of `value` at some tensors; zeros where it does not depend on one."""
    weights = torch.linspace(-1, 2, value.numel(), dtype=torch.float32, device=value.device).view_as(value)
    gradients = torch.autograd.grad((value.float() * weights).sum(), at, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(at, gradients, strict=True)]


# ---------------------------------------------------------------- another forward


class Patched:
    """Mixed in front of a module's class: `forward` is keel's, and the class behind it is the module's own.

    A module is patched by its `__class__`, not by an attribute `forward` of its own: an attribute would hold
    the module in a cycle, and would go on to compute with the first module in shallow copies (DataParallel
    makes them). The class is made at run time and has no name to be found by, so a pickle holds the module's
    own class: what is read back is a plain module, which is tried and patched at its first use. Deep copies
    stay patched.
    """

    keel_plain: ClassVar[type[nn.Module]]  # the class as transformers or torch has it
    keel_patch: ClassVar[str]  # the path's name

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        _, _, *state = super().__reduce_ex__(max(2, int(protocol)))
        return _as_plain, (self.keel_plain,), *state

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin


def _as_plain(plain: type[nn.Module]) -> nn.Module:
    """An empty module, for pickle to fill. It stands in this package so that reading a pickle imports it, and
    with it the attention kernel that the model's config names."""
    return plain.__new__(plain)


def patched_class(plain: type[nn.Module], patch: str, forward: Callable[..., Any]) -> type[nn.Module]:
    """A subclass of a module's class with another forward, under the same name."""
    named = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    body = {**named, "forward": forward, "keel_plain": plain, "keel_patch": patch}
    return type(plain.__name__, (Patched, plain), body)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """A module's class as transformers or torch has it."""
    return module.keel_plain if isinstance(module, Patched) else type(module)


def is_patched(module: nn.Module, patch: str) -> bool:
    """Whether a path changed this module's forward."""
    return isinstance(module, Patched) and module.keel_patch == patch


def restore_classes(model: nn.Module) -> None:
    """Give every module its own class back."""
    for module in model.modules():
        if isinstance(module, Patched):
            module.__class__ = module.keel_plain  # pyright: ignore[reportAttributeAccessIssue]
