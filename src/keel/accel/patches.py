"""The table of everything that computes in a model's place, the switch that turns it off, and its self-tests.

A path of this folder replaces code of transformers by code that is meant to compute the same numbers faster.
A new release of transformers may change what "the same" is. So a path is tried against the model's own
forward at its first use with a model, by values and by gradients; where the two differ it is off for that
model, which one warning says, and the model's own code runs.

All of it, or single paths, can be switched off:

* `KEEL_ACCEL=0` in the environment; `KEEL_ACCEL=-last_layer,-head` for some;
* `keel.accel.disabled()` as a context; `disabled("last_layer")` for some;
* `accel: off` in a run's config.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

VARIABLE = "KEEL_ACCEL"
TESTED_WITH = "transformers 5.23, torch 2.13"


@dataclass(frozen=True, slots=True)
class Patch:
    """One path: what it replaces, how it is tried, and when it can go."""

    name: str  # by which it is switched off
    where: str  # the module that holds it
    replaces: str
    self_test: str
    goes_when: str
    tested_with: str = TESTED_WITH


PATCHES: Mapping[str, Patch] = {
    patch.name: patch
    for patch in (
        Patch(
            "attention",
            "keel.accel.attention",
            "the kernel `sdpa`, by `keel_sdpa` on prepared models: takes rows without padding",
            "at preparation: the last hidden states of padded rows under either name",
            "transformers' sdpa takes packed rows without padding on every device",
        ),
        Patch(
            "branch_attention",
            "keel.accel.branch_attention",
            "attention of sequences that begin alike, in float32 on the CPU: the common start asks once",
            "with `batch_layout`: states and gradients of sequences that share a start",
            "torch's flex attention has a backward on the CPU",
        ),
        Patch(
            "half_attention",
            "keel.accel.half_attention",
            "attention of short rows under autocast on the CPU, in float32, by products in bfloat16",
            "once: values and gradients, causal and under a mask, against torch's kernel",
            "torch's kernel is faster in bfloat16 than in float32, forward and backward",
        ),
        Patch(
            "cpu_linear",
            "keel.accel.cpu_linear",
            "forward of nn.Linear and of gated feed-forward parts, on the CPU",
            "at preparation: values and gradients of each kind of part",
            "torch adds a weight's gradient where it is kept, and oneDNN makes no program for every shape",
        ),
        Patch(
            "cpu_products",
            "keel.accel.cpu_products",
            "MKL's products of many rows in float32 inside `cpu_linear`, by oneDNN's, on AMD with AVX-512",
            "once: products with a matrix and with a transposed one against torch's",
            "torch, or the MKL that it is built with, multiplies with AVX-512 there",
        ),
        Patch(
            "wide_products",
            "keel.accel.cpu_products",
            "MKL's products of few rows with wide results, in float32: in parts, on AMD with AVX2 alone",
            "once: products in parts, with a bias and without, against torch's",
            "MKL takes no longer at once than in parts there",
        ),
        Patch(
            "column_products",
            "keel.accel.cpu_products",
            "oneDNN's products in decode steps and prompts in float32: by MKL, on AMD with AVX2 alone",
            "with `decode_step` and `prompt_reading`",
            "a call of oneDNN's takes no longer than one of MKL's there",
        ),
        Patch(
            "linear_layouts",
            "keel.accel.cpu_linear",
            "products of few rows inside `cpu_linear` while a model samples in float32: by oneDNN, laid out",
            "once: products with a matrix that is laid out against torch's",
            "torch lays a matrix out once for many products without gradient",
        ),
        Patch(
            "norm_and_rope",
            "keel.accel.norm_and_rope",
            "forward of RMS norms, and the rotation inside attention modules, on the CPU in float32",
            "at preparation: values and gradients of each norm and of each rotation",
            "transformers calls torch's fused rms_norm, and torch has a fused rotation",
        ),
        Patch(
            "half_embedding",
            "keel.accel.half_embedding",
            "the gradient of nn.Embedding in half precision on the CPU, by sums in float32",
            "once: values and gradients of repeated tokens and of padding against torch's in float64",
            "torch sums the gradient of an embedding in float32 and rounds it once",
        ),
        Patch(
            "batch_layout",
            "keel.accel.batch_layout",
            "padded batches, by rows that share a common start and rows without padding",
            "at first use: states and gradients of three sequences read so and apart",
            "transformers has it for every model",
        ),
        Patch(
            "last_layer",
            "keel.accel.last_layer",
            "the last decoder layer of Llama, Mistral, Qwen2, Qwen3, by the same at some positions",
            "at first use: the layer's states and gradients, with and without masks, rows, and a cache",
            "transformers takes the positions that are wanted",
        ),
        Patch(
            "head",
            "keel.models.head",
            "logits of all positions, by those of some, a few at a time",
            "at first use: logits and gradients of given hidden states",
            "transformers' models give hidden states and a head that is called separately",
        ),
        Patch(
            "kv_slots",
            "keel.accel.kv_slots",
            "transformers' cache, by slots that rows come to and leave",
            "at first use: logits of decode steps with rows of several lengths",
            "transformers' continuous batching runs on the CPU, with one's own sampling",
        ),
        Patch(
            "kept_turns",
            "keel.accel.kept_turns",
            "reading a conversation again at each turn, by the keys and values of what was read before",
            "at first use: logits of rows of several lengths that left their slots and went on",
            "transformers' continuous batching takes what it has read, with one's own sampling",
        ),
        Patch(
            "own_cache",
            "keel.accel.own_cache",
            "a whole forward for each token, by the cache that a model makes itself, where it has no slots",
            "at first use: logits of decode steps, with rows taken twice and rows that leave",
            "transformers' caches take rows that come and go, whatever they hold",
        ),
        Patch(
            "decode_step",
            "keel.accel.decode_step",
            "forward of one new token a row of Llama, Mistral, Qwen2, Qwen3",
            "at first use: logits of decode steps with rows of several lengths",
            "a step of transformers' own modules is bound by its products",
        ),
        Patch(
            "prompt_reading",
            "keel.accel.packed_layers",
            "forward over prompts before decode steps, in float32 on the CPU",
            "at first use: logits, keys and values of prompts of several lengths",
            "a forward of transformers' own modules without gradient is bound by its products",
        ),
        Patch(
            "row_attention",
            "keel.accel.row_attention",
            "torch's kernel in a decode step of many rows, in float32 on the CPU: each reads its own tokens",
            "once: values for rows of several lengths, against torch's kernel",
            "torch's kernel reads a row's keys as fast as memory gives them",
        ),
        Patch(
            "decode_streams",
            "keel.rollout.streams",
            "threads inside each operation of a decode step on the CPU, by one thread for a part of the rows",
            "none: each thread takes the step that was tried",
            "torch's operations on few rows are as fast with two threads as two of them on one thread each",
        ),
        Patch(
            "token_blocks",
            "keel.rollout.sampling",
            "the cumulative sum over a vocabulary that a token is drawn by, on the CPU: by blocks of tokens",
            "none: it takes logits, and nothing of a model",
            "torch's cumulative sum is as fast as its softmax",
        ),
        Patch(
            "decode_graphs",
            "keel.accel.decode_graphs",
            "the decode step on CUDA, by one recorded as a CUDA graph",
            "at first use: logits of the step that is recorded, with rows of several lengths",
            "transformers records its decode steps",
        ),
    )
}


class AccelWarning(UserWarning):
    """A path is off for a model, and why."""


# ---------------------------------------------------------------- the switch

_off: ContextVar[frozenset[str] | None] = ContextVar(
    "accel_off", default=None
)  # None: as the environment says


def parse_switch(text: str) -> frozenset[str]:
    """The paths that a value of `KEEL_ACCEL` switches off. "", "1", "on": none; "0", "off": all; otherwise
    names, each with "-" before it, separated by commas. ValueError for anything else."""
    value = text.strip().lower()
    if value in ("", "1", "on", "true", "yes"):
        return frozenset()
    if value in ("0", "off", "false", "no"):
        return frozenset(PATCHES)
    parts = [part.strip() for part in value.split(",")]
    if not all(part.startswith("-") for part in parts):
        raise ValueError(
            f"{VARIABLE}={text!r}: expected 0, 1, or paths to leave out such as -last_layer,-head"
        )
    return _checked([part[1:] for part in parts])


def _checked(names: Collection[str]) -> frozenset[str]:
    unknown = sorted(set(names) - set(PATCHES))
    if unknown:
        raise ValueError(f"accel has no path {unknown[0]!r}; it has {', '.join(PATCHES)}")
    return frozenset(names)


@cache
def _parsed(text: str) -> frozenset[str]:
    return parse_switch(text)


def switched_off() -> frozenset[str]:
    """Names of the paths that are switched off here and now."""
    off = _off.get()
    return _parsed(os.environ.get(VARIABLE, "")) if off is None else off


def enabled(name: str) -> bool:
    """Whether a path is switched on."""
    off = _off.get()
    if off is None:
        off = _parsed(os.environ.get(VARIABLE, ""))
    return name not in off


@contextmanager
def disabled(*names: str) -> Iterator[None]:
    """Within it these paths are off, in this thread; all of them without a name. ValueError for a name that
    is none."""
    token = _off.set(switched_off() | (_checked(names) if names else frozenset(PATCHES)))
    try:
        yield
    finally:
        _off.reset(token)


@contextmanager
def all_enabled() -> Iterator[None]:
    """Within it every path is on, whatever the environment says: for tests of the paths themselves."""
    token = _off.set(frozenset())
    try:
        yield
    finally:
        _off.reset(token)


def state() -> str:
    """ "on", "off", or "on without …": what the numbers of a run depend on."""
    off = switched_off()
    return "on" if not off else "off" if off == frozenset(PATCHES) else f"on without {', '.join(sorted(off))}"


# ---------------------------------------------------------------- self-tests

# by module: by path and what its trial depends on, why it is off; None where it passed
_verdicts: WeakKeyDictionary[nn.Module, dict[tuple[str, Hashable], str | None]] = WeakKeyDictionary()


def trusted(
    name: str,
    key: nn.Module,
    trial: Callable[[], str | None],
    *,
    depends_on: Hashable = None,
    say: bool = True,
) -> bool:
    """Whether a path is on, and computes what the model's own forward computes.

    key: the module that the verdict is kept with. trial: run at the first use; returns what differs, or None.
    Its errors count as a difference, but running out of memory, which says nothing of the model, does not.
    depends_on: a second trial is run where this is another. say: warn of a refusal; off for models that the
    path does not claim.
    """
    if not enabled(name):
        return False
    verdicts = _verdicts.setdefault(key, {})
    asked = name, depends_on
    if asked not in verdicts:
        said = any(path == name and reason is not None for (path, _), reason in verdicts.items())
        verdicts[asked] = why = tried(trial)
        if why is not None and say and not said:
            refuse(name, type(key).__name__, why)
    return verdicts[asked] is None


def tried(trial: Callable[[], str | None]) -> str | None:
    """What a trial says differs, or the error that it ended with; None where nothing does. Whoever asks first
    may be in inference mode, whose tensors have no gradient to try."""
    try:
        with torch.inference_mode(False):
            return trial()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a foreign forward raises, the path is not for it
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


def refuse(name: str, owner: str, why: str) -> None:
    """The one line about a path that is off."""
    warnings.warn(
        f"accel: {name} is off for {owner}, whose own code runs instead: {why}", AccelWarning, stacklevel=1
    )


def refusals(model: nn.Module) -> dict[str, str]:
    """Of a model that was used: the paths that were tried and are off, and why."""
    return {
        name: why
        for module in model.modules()
        for (name, _), why in _verdicts.get(module, {}).items()
        if why is not None
    }


def forget_verdicts(model: nn.Module) -> None:
    """Try every path of a model anew at its next use."""
    for module in model.modules():
        _verdicts.pop(module, None)


def difference(what: str, ours: Tensor, theirs: Tensor, *, rough: float | None = None) -> str | None:
    """How two (…, channels) tensors differ beyond rounding; None if they do not.

    No number may be off by more than a share of the largest; nine in ten channels by no more than that share
    of their own, since one channel that is large everywhere says nothing of the others. In half precision,
    where a rounding is 1/256 and a few layers make percents of it, the shares are so large that only coarse
    errors are found.
    """
    if ours.shape != theirs.shape:
        return f"{what}: shape {tuple(ours.shape)} where the model has {tuple(theirs.shape)}"
    of_all, of_own = (rough, rough) if rough is not None else _shares(ours, theirs)
    a, b = (x.detach().double().reshape(-1, x.shape[-1] if x.dim() else 1) for x in (ours, theirs))
    gap, size = (a - b).abs().amax(0), b.abs().amax(0)
    most = float(size.max())
    most_channels = float((gap <= of_own * size + 1e-12 * most).double().mean()) >= 0.9
    if bool((gap <= of_all * most).all()) and most_channels:
        return None
    return f"{what} differ by {float(gap.max()) / (most or 1.0):.1e} of their size"


def _shares(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Of the largest number, and of a channel's own, that two ways to compute may differ by."""
    if {ours.dtype, theirs.dtype} & {torch.float16, torch.bfloat16}:
        return 5e-2, 15e-2
    fast = theirs.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return (1e-2, 3e-2) if fast else (1e-4, 1e-4)


def gradients_differ(what: str, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> str | None:
    """As `difference`, of gradients at several tensors. What is tiny beside the largest of them all is
    rounding: the gradient of a bias of keys is zero but for that."""
    largest = max((float(x.detach().abs().max()) for x in theirs if x.numel()), default=0.0)
    half = any(x.dtype in (torch.float16, torch.bfloat16) for x in theirs)  # adapters on them are not
    rough, noise = (5e-2, 2e-2) if half else (1e-3, 1e-5)
    for a, b in zip(ours, theirs, strict=True):
        gap = float((a.detach().double() - b.detach().double()).abs().max()) if b.numel() else 0.0
        if not gap <= rough * float(b.detach().abs().max() if b.numel() else 0.0) + noise * largest:
            return f"{what} differ by {gap / (largest or 1.0):.1e} of the largest"
    return None


def table() -> list[dict[str, str]]:
    """The paths as rows of text, with whether each is switched on."""
    return [
        {
            "name": patch.name,
            "state": "on" if enabled(patch.name) else "off",
            "where": patch.where,
            "replaces": patch.replaces,
            "self-test": patch.self_test,
            "tested with": patch.tested_with,
            "switch off": f"{VARIABLE}=-{patch.name}",
            "goes when": patch.goes_when,
        }
        for patch in PATCHES.values()
    ]
