"""Linear layers on the CPU: what surrounds their products costs as much as the products, and need not.

**In bfloat16** oneDNN makes a program for every shape that it meets: some milliseconds and most of a MiB
each. In training every micro-batch has another number of tokens, in sampling every step may have another
number of rows. Here the rows of a product are filled up with zeros to one of eight sizes between a power of
two and the next (they are copied anyway, to cast them), and cut off again behind it. Weights are cast once in
a gradient step; for products without gradient they are laid out as oneDNN wants them, too.

**In float32** a sampler's products of few rows have their matrices laid out, too (`lay_out`): otherwise a
matrix is copied in every product, and of a large one no cache holds the copy.

**In both precisions** a gated feed-forward part is one step of autograd that keeps its input and its two
products and nothing else. Within `grads_in_place`, which only keel's own training loops enter, the gradient
of a weight is added where it is kept, instead of being made, added and thrown away in every micro-batch.
Everywhere else gradients go back through autograd, so that `torch.autograd.grad`, `backward(inputs=...)` and
hooks see them.

Results and gradients are those of the layers themselves under autocast, or without it, to rounding (tests).
What is not here: gradients of gradients, of which torch says that it has none; `torch.func`'s transforms go
through the layers' own forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import cache
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, silu
from torch.nn.modules.dropout import _DropoutNd
from torch.optim.optimizer import register_optimizer_step_post_hook

from keel.accel.cpu_products import faster, in_parts, prefers_columns, product, size_of
from keel.accel.modules import (
    Kept,
    Patched,
    is_patched,
    patched_class,
    plain_class,
    pulled,
    surrounded,
    transformed,
    twin_parameters,
)
from keel.accel.patches import difference, disabled, enabled, gradients_differ, refuse, tried
from keel.accel.processor import memory

LEAST = 8  # rows, and the step between sizes up to 64
GATED = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")  # classes that are known to be gated so
WORTH = 2**15  # weights of a matrix from which a step of autograd of our own pays in float32
# products with a matrix that is laid out beforehand: torch's own, for compiled models
PACKS = all(
    hasattr(torch.ops.mkldnn, name)
    for name in ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
) and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
# the same in float32
PACKS_FLOAT32 = all(
    hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
) and bool(torch.backends.mkldnn.is_available())
USUAL = 64  # rows that the layout is chosen for
LARGE = 2**20  # weights of a matrix from which oneDNN multiplies few rows faster than MKL on any processor
BETWEEN = 4  # rows from one size to the next, up to 64, of products with them, each of which takes long
FEW = 256  # rows from which a product takes much longer than to lay its matrix out
# bytes of matrices laid out in float32, which is as much as the weights themselves; for so many products of
# each, or more, also a share of the machine's memory: a second of copying is paid back then. These are laid
# out after so many: a reply that may be long is often short
PACKED_AT_MOST, MANY, SHARE, AFTER = 2**28, 32, 1 / 8, 8


def sized(rows: int, least: int = LEAST) -> int:
    """The least size that holds so many rows: at most an eighth more of them, or fewer than `least`."""
    step = max(least, 1 << max(0, (rows - 1).bit_length() - 4))
    return -(-rows // step) * step


def patch_linears(model: nn.Module) -> nn.Module:
    """Change the model's linear layers and gated feed-forward parts, where they are what they look like;
    their own forward still runs wherever there is nothing to gain. Those of LoRA stay as they are."""
    why = _product_differs()
    if why is not None:
        refuse("cpu_linear", type(model).__name__, why)
        return model
    verdicts: dict[type[nn.Module], str | None] = {}  # of gated parts, by class
    for name, module in model.named_modules():
        if type(module) is nn.Linear and ".lora_" not in name:
            module.__class__ = _Linear  # pyright: ignore[reportAttributeAccessIssue]  # see `Patched`
        elif _looks_gated(module):
            kind = type(module)
            if kind not in verdicts:
                verdicts[kind] = tried(lambda part=module: _gated_differs(part, gradients=True))
                if verdicts[kind] is not None and kind.__name__ in GATED:
                    refuse("cpu_linear", kind.__name__, str(verdicts[kind]))
            if verdicts[kind] is None and tried(lambda part=module: _gated_differs(part)) is None:
                module.__class__ = _gated(kind)  # pyright: ignore[reportAttributeAccessIssue]
    return model


# ---------------------------------------------------------------- modules


def _linear_forward(self: Any, input: Tensor) -> Tensor:
    if (found := _by_layout(self, input)) is not None:
        return found
    dtype = _computed_in(input, self.weight)
    if dtype is None:
        return nn.Linear.forward(self, input)
    with torch.autocast("cpu", enabled=False):
        casts = _casts.get() or _CastCache()
        if torch.is_grad_enabled():
            rows, weight = casts.rows(input, self.weight, dtype), casts.of(self.weight, dtype)
            bias = None if self.bias is None else casts.of(self.bias, dtype)
            given = (input, rows, self.weight, weight, self.bias, bias)
            return _like(_Product.apply(*given), input)  # pyright: ignore[reportArgumentType]
        rows = casts.rows(input, self.weight, dtype)
        if dtype == torch.float32:
            return _like(product(rows, self.weight, self.bias), input)
        return _like(casts.packed(self)(rows), input)


_Linear = patched_class(nn.Linear, "cpu_linear", _linear_forward)


@cache
def _gated(kind: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, x: Tensor) -> Tensor:
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        dtypes = {_computed_in(x, layer.weight) if _is_plain(layer) else None for layer in layers}
        dtype = dtypes.pop() if len(dtypes) == 1 else None
        around = any(map(surrounded, self.children()))  # of what gates, too
        if dtype is None or around or not torch.is_grad_enabled():
            return kind.forward(self, x)  # pyright: ignore[reportReturnType]
        with torch.autocast("cpu", enabled=False):
            casts, weights = _casts.get() or _CastCache(), [layer.weight for layer in layers]
            rows = casts.rows(x, weights[0], dtype)
            given = (x, rows, *weights, *(casts.of(weight, dtype) for weight in weights))
            return _like(_Gated.apply(*given), x)  # pyright: ignore[reportArgumentType]

    return patched_class(kind, "cpu_linear", forward)


def _looks_gated(module: nn.Module) -> bool:
    """Whether a module has the parts of down(silu(gate(x)) · up(x)), and nothing else that computes."""
    layers: list[Any] = [getattr(module, f"{name}_proj", None) for name in ("gate", "up", "down")]
    if isinstance(module, Patched) or not all(_is_plain(layer) for layer in layers):
        return False
    drops = any("drop" in name and value for name, value in vars(module).items() if isinstance(value, float))
    if drops or any(isinstance(child, _DropoutNd) for child in module.modules()):
        return False
    names = {f"{name}_proj.weight" for name in ("gate", "up", "down")}
    return {name for name, _ in module.named_parameters()} == names


# ---------------------------------------------------------------- self-tests


def _gated_differs(module: Any, *, gradients: bool = False) -> str | None:
    """A feed-forward part's own forward against one step of autograd: on two rows, and with their
    gradients."""
    kind = plain_class(module)
    gate, up, down = (layer.weight for layer in (module.gate_proj, module.up_proj, module.down_proj))
    x = torch.linspace(-2, 3, 2 * gate.shape[1], dtype=gate.dtype).view(2, -1)
    with torch.no_grad(), torch.autocast("cpu", enabled=False), disabled():
        theirs: Any = kind.forward(module, x)
        ours = linear(silu(linear(x, gate)) * linear(x, up), down)
    why = difference("values of the gated part", ours, theirs, rough=1e-3)
    if why is not None or not gradients or gate.dtype != torch.float32:
        return why
    x.requires_grad_()
    with (
        torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False), disabled(),
        twin_parameters(module, 2**22) as twins,
    ):  # fmt: skip
        weights = [layer.weight for layer in (module.gate_proj, module.up_proj, module.down_proj)]
        step: Any = _Gated.apply(x, x.detach(), *weights, *(weight.detach() for weight in weights))  # pyright: ignore
        theirs, at = kind.forward(module, x), [x, *twins]
        return gradients_differ("gradients of the gated part", pulled(step, at), pulled(theirs, at))


@cache
def _product_differs() -> str | None:
    """torch's own product against those here, in the precisions that there are. Of torch, not of a model:
    once."""
    x = torch.linspace(-2, 3, 3 * 16).view(3, 16)
    layer = nn.Linear(16, 8, device="meta").to_empty(device="cpu")  # draws nothing at random
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-1, 2, 8 * 16).view(8, 16).sin())
        layer.bias.copy_(torch.linspace(0, 1, 8))

    def trial() -> str | None:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            given = x.clone().requires_grad_()
            at = [given, layer.weight, layer.bias]
            ours: Any = _Product.apply(
                given, given.detach(), layer.weight, layer.weight.detach(), layer.bias, layer.bias.detach()
            )  # pyright: ignore
            theirs = linear(given, layer.weight, layer.bias)
            pairs = [(ours, theirs), *zip(pulled(ours, at), pulled(theirs, at), strict=True)]
            packed = PrepackedWeight(layer)(x.bfloat16()).float()
            half = linear(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16()).float()
            pairs.append((PrepackedWeight(layer, torch.float32)(x), theirs))
        why = difference("products in bfloat16", packed, half, rough=3e-2)
        return next((w for a, b in pairs if (w := difference("products or their gradients", a, b))), why)

    return tried(trial)


def _is_plain(layer: Any) -> bool:
    return (
        (type(layer) is nn.Linear or is_patched(layer, "cpu_linear"))
        and layer.bias is None
        and layer.weight.device.type == "cpu"
        and not surrounded(layer)
    )


def packed_at_most(times: int) -> int:
    """Bytes of matrices that may be laid out in float32 for whoever multiplies `times` with each of them."""
    large = times >= MANY and enabled("linear_layouts")
    return PACKED_AT_MOST if not large else max(PACKED_AT_MOST, int(memory() * SHARE))


def packs(layer: Any) -> torch.dtype | None:
    """The precision in which a layer's matrix may be laid out for products without gradient, by whoever
    computes in its place; None if it may not."""
    known = type(layer) is nn.Linear or is_patched(layer, "cpu_linear")
    if not known or surrounded(layer) or transformed() or layer.weight.device.type != "cpu":
        return None
    if layer.weight.dtype != torch.float32 or not enabled("cpu_linear"):
        return None
    if torch.is_autocast_enabled("cpu"):
        return torch.bfloat16 if torch.get_autocast_dtype("cpu") == torch.bfloat16 else None
    return torch.float32 if PACKS_FLOAT32 and torch.backends.mkldnn.enabled else None


def _computed_in(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """In which precision a product is taken here; None: as torch does it."""
    if transformed() or x.device.type != "cpu" or weight.dtype != torch.float32 or not x.numel():
        return None
    if not enabled("cpu_linear"):
        return None
    if torch.is_autocast_enabled("cpu"):
        half = torch.get_autocast_dtype("cpu") == torch.bfloat16
        return torch.bfloat16 if half and x.dtype in (torch.float32, torch.bfloat16) else None
    if x.dtype != torch.float32:
        return None
    # frozen weights, too, by the library that multiplies without gradient: what is scored is then, to the
    # bit, what is trained
    ours = torch.is_grad_enabled() and weight.requires_grad and weight.numel() >= WORTH
    rows = x.shape[:-1].numel()
    return torch.float32 if ours or faster(rows, weight) or in_parts(rows, weight) else None


# ---------------------------------------------------------------- steps of autograd


class _Kept(Kept):
    weight: Tensor  # of a product
    weights: tuple[Tensor, Tensor, Tensor]  # of a gated part
    dtype: torch.dtype  # of x
    shape: torch.Size


class _Product(torch.autograd.Function):
    """x Wᵀ + b. x: (…, k); rows: (M, k) x as it is multiplied; own, own_bias: W (n, k) and b (n,) likewise.
    Returns (M, n), of which `_like` takes what is x's: no view, so that whoever reads it may change it in
    place."""

    @staticmethod
    def forward(
        ctx: _Kept,
        x: Tensor,
        rows: Tensor,
        weight: Tensor,
        own: Tensor,
        bias: Tensor | None,
        own_bias: Tensor | None,
    ) -> Tensor:
        kept: Any = rows if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(kept, own)
        ctx.weight, ctx.dtype, ctx.shape = weight, x.dtype, x.shape
        return product(rows, own, own_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Kept, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, own = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        of_input = of_weight = of_bias = None
        if ctx.needs_input_grad[2]:
            of_weight = _added(ctx.weight, gradient, rows)
        if ctx.needs_input_grad[4]:
            of_bias = gradient.sum(dim=0, dtype=torch.float32)
        if ctx.needs_input_grad[0]:
            of_input = _back(gradient, own)[: ctx.shape[:-1].numel()].to(ctx.dtype).view(ctx.shape)
        return of_input, None, of_weight, None, of_bias, None


class _Gated(torch.autograd.Function):
    """down(silu(gate(x)) · up(x)) (2002.05202). x: (…, d); rows: (M, d) x as it is multiplied; the last
    three: the weights likewise. Returns (M, d), as `_Product` does."""

    @staticmethod
    def forward(
        ctx: _Kept, x: Tensor, rows: Tensor, gate: Tensor, up: Tensor, down: Tensor, *own: Tensor
    ) -> Tensor:
        a, b = product(rows, own[0]), product(rows, own[1])
        kept: Any = rows if any(ctx.needs_input_grad[2:4]) else None
        ctx.save_for_backward(kept, a, b, *own)
        ctx.weights, ctx.dtype, ctx.shape = (gate, up, down), x.dtype, x.shape
        return product(silu(a).mul_(b), own[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: _Kept, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, a, b, gate, up, down = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        of_weights: list[Tensor | None] = [None, None, None]
        s = silu(a)
        if ctx.needs_input_grad[4]:
            of_weights[2] = _added(ctx.weights[2], gradient, s * b)
        of_product = _back(gradient, down)
        of_up = s.mul_(of_product)
        of_gate = torch.ops.aten.silu_backward(of_product.mul_(b), a)
        for which, of in ((0, of_gate), (1, of_up)):
            if ctx.needs_input_grad[2 + which]:
                of_weights[which] = _added(ctx.weights[which], of, rows)
        of_input = None
        if ctx.needs_input_grad[0]:
            both = _summed(of_gate, gate, of_up, up)
            of_input = both[: ctx.shape[:-1].numel()].to(ctx.dtype).view(ctx.shape)
        return of_input, None, *of_weights, None, None, None


def _back(gradient: Tensor, weight: Tensor) -> Tensor:
    """(M, k): the gradient of a product's input, of the (M, n) gradient of its result. weight: (n, k)."""
    if gradient.dtype == torch.float32 and faster(len(gradient), weight):
        return product(gradient, weight.t())
    return gradient @ weight


def _summed(one: Tensor, gate: Tensor, other: Tensor, up: Tensor) -> Tensor:
    """(M, k): the sum of (M, n) gradients times their matrices (n, k)."""
    if one.dtype == torch.float32 and faster(len(one), gate):
        return _back(one, gate).add_(_back(other, up))
    return (one @ gate).addmm_(other, up)


def _added(weight: Tensor, gradient: Tensor, rows: Tensor) -> Tensor | None:
    """gᵀ x, the gradient of a weight, for autograd to pass on; within `grads_in_place` it is added to the
    weight's own, and None returned. gradient: (M, n); rows: (M, k)."""
    if not _in_place.get() or _awaited(weight):
        return (gradient.t() @ rows).float()
    if weight.grad is None:
        weight.grad = (gradient.t() @ rows).float()
    elif rows.dtype == torch.float32:
        weight.grad.addmm_(gradient.t(), rows)
    else:
        weight.grad.add_(gradient.t() @ rows)
    return None


_in_place: ContextVar[bool] = ContextVar("in_place", default=False)
_among_processes: ContextVar[bool] = ContextVar("among_processes", default=False)


@contextlib.contextmanager
def grads_in_place(*, among_processes: bool = False) -> Iterator[None]:
    """Within it a backward may add gradients of weights where they are kept, without going through autograd:
    to be entered around `loss.backward()` alone, by whoever wants the gradients of all weights and nothing
    else. What `torch.autograd.grad` or `backward(inputs=...)` would return is not there within it.

    among_processes: also in one of several processes of a group. Whoever says so sums the gradients over them
    after the backward; a wrapper that does it while torch adds them (DDP) would not see these."""
    token, other = _in_place.set(True), _among_processes.set(among_processes)
    try:
        yield
    finally:
        _in_place.reset(token)
        _among_processes.reset(other)


def _awaited(weight: Tensor) -> bool:
    """Whether a weight's gradient goes on from it: it was computed itself, or hooks are called when torch
    adds it, somebody's own or those of processes that average theirs."""
    hooked = (
        not weight.is_leaf or weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None)
    )
    if hooked or _among_processes.get():
        return bool(hooked)
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _like(rows: Tensor, x: Tensor) -> Tensor:
    """(M, n) as (…, n), with as many rows as x has."""
    count = x.shape[:-1].numel()
    return (rows if len(rows) == count else rows[:count]).view(*x.shape[:-1], -1)


def _filled(x: Tensor, dtype: torch.dtype, size: int) -> Tensor:
    """(…, k) as (M, k) in `dtype`, with zeros behind the rows of x. size: M."""
    count = x.shape[:-1].numel()
    flat = x.detach().reshape(count, x.shape[-1])
    if size == count:
        return flat.to(dtype).contiguous()
    filled = torch.empty(size, x.shape[-1], dtype=dtype)
    filled[:count] = flat
    filled[count:] = 0
    return filled


# ---------------------------------------------------------------- what is cast once


class PrepackedWeight:
    """A linear layer's matrix (n, k) in bfloat16 or float32, laid out once as oneDNN wants it; otherwise it
    would be laid out in every product, which for few rows takes longer than the product. Without gradient."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype = torch.bfloat16) -> None:
        weight = layer.weight.detach().to(dtype)
        self._packs = PACKS if dtype == torch.bfloat16 else PACKS_FLOAT32
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, USUAL) if self._packs else weight
        self._bias = None if layer.bias is None else layer.bias.detach().to(dtype)

    def __call__(self, rows: Tensor) -> Tensor:
        """(M, k) → (M, n), both in that precision."""
        if not self._packs:
            return linear(rows, self._weight, self._bias)
        return torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")


def prepacked(layer: nn.Linear, dtype: torch.dtype = torch.bfloat16) -> PrepackedWeight:
    """A layer's matrix laid out. In bfloat16 the one that the layer itself multiplies with, within
    `cast_cache`; in float32, where the layer multiplies with its own weight, nobody else's."""
    if dtype == torch.float32:
        return PrepackedWeight(layer, dtype)
    return (_casts.get() or _CastCache()).packed(layer)


class _LaidOut:
    """A layer's matrix within `lay_out`: how many products it had, and what it was when it was laid out."""

    def __init__(self) -> None:
        self.times, self._of = 0, None
        self._packed: PrepackedWeight | None = None

    def __call__(self, layer: nn.Linear) -> PrepackedWeight | None:
        """Laid out, from the product on that pays for it."""
        self.times += 1
        if self.times <= AFTER:
            return None
        weights = [w for w in (layer.weight, layer.bias) if w is not None]
        now = [(id(w), 0 if w.is_inference() else w._version) for w in weights]
        if self._packed is None or self._of != now:
            self._packed, self._of = PrepackedWeight(layer, torch.float32), now
        return self._packed


_laid_out: ContextVar[dict[int, _LaidOut] | None] = ContextVar("laid_out", default=None)


@contextlib.contextmanager
def lay_out(model: nn.Module, times: int) -> Iterator[None]:
    """Within it the model's own linear layers multiply few rows in float32 with matrices that are laid out
    once, without gradient: for whoever multiplies up to `times` with each of them. Nothing where that would
    take more memory than `packed_at_most`, or a layer is divided among processes. What `packed_layers` is for
    a few kinds of models, for all others, and for those with adapters; the layers' own forward, hooks and
    adapters stay in effect."""
    found: list[Any] = [module for module in model.modules() if type(module) is _Linear]
    layers = [layer for layer in found if _lays_out(layer)]
    size = sum(layer.weight.nbytes for layer in layers)
    fits = enabled("linear_layouts") and PACKS_FLOAT32 and torch.backends.mkldnn.enabled
    fits = fits and size <= packed_at_most(times)
    token = _laid_out.set({id(layer): _LaidOut() for layer in layers} if fits else None)
    try:
        yield
    finally:
        _laid_out.reset(token)


def lays_out_from() -> int:
    """Weights of a matrix from which `lay_out` takes it."""
    return LARGE if prefers_columns() else WORTH


def _lays_out(layer: nn.Linear) -> bool:
    weight, least = layer.weight, lays_out_from()
    plain = type(weight) in (Tensor, nn.Parameter) and weight.dtype == torch.float32
    return plain and weight.device.type == "cpu" and weight.numel() >= least


def _by_layout(layer: nn.Linear, x: Tensor) -> Tensor | None:
    """A product by a matrix that is laid out, within `lay_out`; None where it is not taken so."""
    if torch.compiler.is_compiling():  # which cannot read what stands behind it
        return None
    held = _laid_out.get()
    if held is None or id(layer) not in held or not 0 < (count := x.shape[:-1].numel()) < FEW:
        return None
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or x.dtype != torch.float32:
        return None
    if transformed() or not enabled("cpu_linear") or x.device.type != "cpu":
        return None
    if (packed := held[id(layer)](layer)) is None:
        return None
    return _like(packed(_filled(x, torch.float32, sized(count, BETWEEN))), x)


_optimiser_steps = 0  # of all optimisers of the process


def _count_step(*_: object) -> None:
    global _optimiser_steps
    _optimiser_steps += 1


# fused optimisers change weights without changing their versions; the hook counts, and changes nothing
register_optimizer_step_post_hook(_count_step)


class _CastCache:
    """Weights in bfloat16, each cast once between two steps of an optimiser, and the last input, which
    several layers may have in common."""

    def __init__(self) -> None:
        self._steps = _optimiser_steps
        self._made: dict[tuple[Any, ...], tuple[tuple[Tensor, ...], list[int], Any]] = {}
        self._last: tuple[Any, int, Tensor] | None = None

    def of(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        if dtype == weight.dtype:
            return weight.detach()
        return self._once("cast", lambda: weight.detach().to(dtype), weight)

    def packed(self, layer: nn.Linear) -> PrepackedWeight:
        bias = [] if layer.bias is None else [layer.bias]
        return self._once("packed", lambda: PrepackedWeight(layer), layer.weight, *bias)

    def _once(self, kind: str, make: Callable[[], Any], *weights: Tensor) -> Any:
        """What was made of these weights, as long as they are what they were. Those made in inference mode
        have no version to know that by."""
        if any(weight.is_inference() for weight in weights):
            return make()
        if self._steps != _optimiser_steps:
            self._made.clear()
            self._steps = _optimiser_steps
        key, versions = (kind, *map(id, weights)), [weight._version for weight in weights]
        held = self._made.get(key)  # which keeps the weights, so that no other has their id
        if held is None or held[1] != versions:
            held = self._made[key] = weights, versions, make()
        return held[2]

    def rows(self, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """x (…, k) as it is multiplied with a weight: as many rows as are multiplied best."""
        count = x.shape[:-1].numel()
        size = sized(count) if dtype == torch.bfloat16 else size_of(count, weight)
        if x.is_inference():
            return _filled(x, dtype, size)
        if self._last is not None:
            known, version, filled = self._last
            if known() is x and version == x._version and filled.dtype == dtype and len(filled) == size:
                return filled
        filled = _filled(x, dtype, size)
        self._last = ref(x), x._version, filled
        return filled


_casts: ContextVar[_CastCache | None] = ContextVar("casts", default=None)


@contextlib.contextmanager
def cast_cache() -> Iterator[None]:
    """Within it each weight is cast once, and again after an operation changed it in place or an optimiser
    took a step. Holds the casts until it ends: to be entered around many forwards with the same weights."""
    if _casts.get() is not None:
        yield
        return
    token = _casts.set(_CastCache())
    try:
        yield
    finally:
        _casts.reset(token)
