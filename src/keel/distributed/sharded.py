"""Weights that no rank has whole: torch's FSDP2, each decoder layer a unit of its own, the rest another one.

A forward gathers a layer's weights, computes, and lets them go; the backward does so again and leaves each
rank its part of the summed gradient. Optimiser states are of that part, too. So a rank keeps 1/n of weights,
gradients and states, and at a time one layer whole.

Rounding aside the numbers are those of one process: gradients are summed, not averaged, in the weights' own
dtype, which for weights that learn is float32 or more. The first rank alone opens a model whole, in host
memory (`opened`); the others get its modules without weights, and each weight's part of theirs as it is cut.
With `offload` parts, their gradients and the optimiser's states lie in host memory, and a unit's weights are
on the card while it computes.

Every forward takes all ranks. Who has fewer rows than others computes on borrowed ones for nothing
(`stages.loop_utils.share_of`). Only sampling, whose forwards nobody can count beforehand, has the weights
whole on every rank for as long as it lasts (`whole_here`).
"""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from keel.distributed import group, half_gather
from keel.errors import UsageError

M = TypeVar("M")
_NEEDED = (
    "set_force_sum_reduction_for_comms",
    "set_gradient_divide_factor",
    "set_reduce_scatter_unused_params",
    "set_custom_reduce_scatter",
    "set_modules_to_backward_prefetch",
    "reset_iter_state",
)


def opened(work: Callable[[], M]) -> M:
    """A model that will be cut: on the first rank what `work` makes, on the CPU; on the others the same
    modules with nothing in place of weights, until `shard`. Every rank has to ask. Where weights are not cut,
    and for modules that cannot be sent (pickled), `work()` on each."""
    if not group.is_sharded():
        return work()
    made: list[M] = []

    def first() -> bytes | None:
        made.append(work())
        try:
            return pickle.dumps(_skeleton(cast("nn.Module", made[0]))[0])
        except (pickle.PicklingError, AttributeError, TypeError):  # a function within a function, a lock
            return None

    modules = group.from_first(first)
    if modules is None:
        return made[0] if group.is_first() else work()
    model: Any = made[0] if group.is_first() else pickle.loads(modules)
    model.keel_from_first = True
    return model


def is_from_first(model: Any) -> bool:
    """Whether the first rank alone has a model's weights, which are to be cut."""
    return getattr(model, "keel_from_first", False)


class SharedParts:
    """Frozen weights that several models have, of which a rank keeps its part once.

    A unit of each model gathers them for itself, so that one may compute while another's are gone; what they
    gather is the same part. Holds the weights whole as long as it is there itself.
    """

    def __init__(self, weights: Iterable[nn.Parameter]) -> None:
        self._whole = {id(weight): weight for weight in weights}
        self._parts: dict[int, nn.Parameter] = {}  # by the ids of what was cut

    def join(self, model: nn.Module, before: Mapping[str, nn.Parameter]) -> None:
        """A model that was cut takes the parts that others have of the weights. before: its own, as they
        were, by name."""
        cut, places, taken = dict(model.named_parameters()), _places(model), 0
        for name, whole in before.items():
            if id(whole) not in self._whole:
                continue
            part = self._parts.setdefault(id(whole), cut[name])
            for parameters, attribute in places[id(cut[name])] if part is not cut[name] else ():
                parameters[attribute] = part
                taken += 1
        if taken:
            _settle(model)


def shard(
    model: nn.Module,
    roots: Sequence[nn.Module] | None = None,
    shared: SharedParts | None = None,
    *,
    casts: bool = False,
) -> None:
    """Cut a model's weights over the ranks, in place. Optimisers are made afterwards.

    roots: the modules that are called from outside, where that is not the model itself: a scorer's trunk and
    head. shared: by which models with the same frozen weights keep one part of them. casts: every forward of
    the model casts its matrices to bfloat16, so that they are gathered in it (`half_gather`). UsageError for
    quantised weights.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

    if not all(hasattr(FSDPModule, name) for name in _NEEDED):
        raise UsageError(
            f"distributed.strategy: fsdp needs a newer torch than {torch.__version__} (2.13 is tested)"
        )
    if getattr(model, "is_quantized", False) or any(hasattr(p, "quant_state") for p in model.parameters()):
        raise UsageError("quantised weights cannot be sharded: set distributed.strategy: ddp")
    # as they are now: what is cut moves to the device, unit by unit
    named = {n: p.detach() for n, p in model.named_parameters()} if is_from_first(model) else None
    before = dict(model.named_parameters()) if shared is not None else {}
    model.keel_whole = _skeleton(model)  # pyright: ignore[reportArgumentType]
    model.keel_roots = tuple(roots or [model])  # pyright: ignore[reportArgumentType]
    mesh = init_device_mesh(group.device_type(), (group.size(),))
    where = OffloadPolicy()
    if group.is_offloaded():  # pinned pages can be copied while a card computes; without a card are none
        where = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")
    half = half_gather.matrices(model, (roots or [model])[1:]) if casts else set[nn.Parameter]()
    units = [*_layers(model), *(roots or [model])]
    for unit in units:
        if not any(True for _ in unit.parameters()):
            continue
        in_half = [parameter for parameter in unit.parameters() if parameter in half]
        fully_shard(
            unit, mesh=mesh, reshard_after_forward=True, offload_policy=where, ignored_params=half or None
        )
        if in_half:
            half_gather.cut(unit, in_half, mesh, where, computes_on())
            half.difference_update(in_half)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            _settings(module, casts=casts)
    if named is not None:
        _fill(model, named)
    if shared is not None:
        shared.join(model, before)


def _settings(unit: Any, *, casts: bool) -> None:
    """How a unit sums its gradients, and when it is gathered. casts: as of `shard`."""
    from keel.distributed.scatter import SumByParts

    # a factor alone would be multiplied on the way, which gloo cannot
    unit.set_force_sum_reduction_for_comms(True)
    unit.set_gradient_divide_factor(1.0)
    # experts that one rank has no tokens for: all ranks sum the same weights
    unit.set_reduce_scatter_unused_params(True)
    if group.device_type() == "cpu":
        if casts:
            half_gather.sum_by(unit, SumByParts())
        else:
            unit.set_custom_reduce_scatter(SumByParts())
        # a next layer that is gathered early only takes memory: nothing is computed meanwhile
        unit.set_modules_to_backward_prefetch([unit])


def computes_on() -> torch.device:
    """What this rank computes on."""
    kind = group.device_type()
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def device_of(model: Any) -> torch.device:
    """Where a model computes: the weights of one that is cut may lie elsewhere."""
    return computes_on() if is_cut(model) else next(model.parameters()).device


def _settle(model: nn.Module) -> None:
    """Have FSDP2 look at parts that were put in the place of others, where they are to lie; buffers lie where
    the model computes."""
    device = computes_on()
    model.to(torch.device("cpu") if group.is_offloaded() else device)
    for module in model.modules() if group.is_offloaded() else ():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)


def _places(model: nn.Module) -> dict[int, list[tuple[dict[str, Any], str]]]:
    """Where each weight stands in a model's modules, by its id."""
    places: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module._parameters, attribute))
    return places


def _fill(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give each rank its parts of the first one's weights; it gets nothing else. weights: by name, whole; on
    the other ranks without numbers."""
    cut: dict[str, Any] = dict(model.named_parameters())
    if cut.keys() != weights.keys():
        raise AssertionError("the names of weights change when they are cut")
    places = _places(model)
    for name, parameter in cut.items():
        if group.is_first():  # it was cut where it stood
            _deal_out(weights[name], parameter.placements[0].dim)
            continue
        filled = nn.Parameter(_dealt(parameter), requires_grad=parameter.requires_grad)
        for parameters, attribute in places[id(parameter)]:
            parameters[attribute] = filled
    _settle(model)  # buffers of the first rank's come from the CPU


def _deal_out(whole: Tensor, dim: int) -> None:
    """Send the other ranks their parts of a tensor, cut as `torch.chunk` does: the last may have none."""
    for number, part in enumerate(whole.chunk(group.size(), dim)):
        if number and part.numel():
            with group.talking():
                torch.distributed.send(part.cpu().contiguous(), number)


def _dealt(like: Any) -> Tensor:
    """This rank's part of a tensor that has no numbers here yet."""
    part = torch.empty(like.to_local().shape, dtype=like.dtype)
    if part.numel():
        with group.talking():
            torch.distributed.recv(part, 0)
    return _as_part(part if group.is_offloaded() else part.to(computes_on()), like)


def _as_part(part: Tensor, like: Any) -> Tensor:
    """A rank's part as one of a tensor that is cut as another is. `DTensor.from_local` would move it to what
    the ranks compute on."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    meta = TensorMeta(like.shape, like.stride(), part.dtype)
    made: Any = DTensor
    return made(part, DTensorSpec(like.device_mesh, like.placements, meta), requires_grad=False)


def is_cut(model: Any) -> bool:
    """Whether no rank has this model's weights whole."""
    return getattr(model, "keel_whole", None) is not None


def modules_of(model: M) -> M:
    """The plain modules of a model that is cut, which `whole` fills on the first rank."""
    skeleton: tuple[M] = getattr(model, "keel_whole")  # noqa: B009  torch types attributes as modules
    return skeleton[0]


@contextmanager
def whole_here(model: Any) -> Iterator[None]:
    """Within it every rank has a model's weights whole, and makes as many forwards as it likes; none of them
    takes a gradient. Every rank has to enter, and to leave. Nothing for a model that is not sharded."""
    if not is_cut(model):
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    units: list[Any] = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        with group.talking():
            unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)
        # each rank made another number of forwards, by whose order the next backward would gather
        for root in model.keel_roots:
            root.reset_iter_state()


def _layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, by the names that transformers gives to what must stay in one piece; of a model
    that names none the modules of the list with most of the weights."""
    plain: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore
    names = set(getattr(plain, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in names] or _largest_list(model)
    inside = {id(child) for module in found for child in module.modules() if child is not module}
    uses = _uses(model)
    return [
        module
        for module in found
        if id(module) not in inside and all(uses[key] == count for key, count in _uses(module).items())
    ]


def _largest_list(model: nn.Module) -> list[nn.Module]:
    """The modules of one kind in the list that holds most weights, and at least half of the model's; none
    where there is no such list."""

    def size(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    alike = [children for children in lists if len({type(child) for child in children}) == 1]
    largest = max(alike, key=lambda children: sum(map(size, children)), default=[])
    return largest if 2 * sum(map(size, largest)) >= size(model) else []


def layers_of(model: Any) -> int:
    """How many units a cut model has besides what is no layer; 0: it is gathered whole at a time."""
    from torch.distributed.fsdp import FSDPModule

    roots = {id(root) for root in model.keel_roots}
    return sum(isinstance(module, FSDPModule) and id(module) not in roots for module in model.modules())


def _uses(module: nn.Module) -> Counter[int]:
    """In how many places inside a module each weight is used: one that is tied to another part of the model
    stays in the unit of both."""
    return Counter(id(p) for part in module.modules() for p in part._parameters.values() if p is not None)


# ---------------------------------------------------------------- whole again


def _skeleton(model: nn.Module) -> Any:
    """A copy of the modules with nothing in place of weights, in a tuple, which is no child of a module.
    Buffers and configs are the model's own, so that what is written into a config later is in both."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer
    for module in model.modules():
        for name in ("config", "generation_config"):
            if (config := vars(module).get(name)) is not None:
                memo[id(config)] = config
    return (copy.deepcopy(model, memo),)


def whole(model: M) -> M:
    """The plain model with all of its weights, on the CPU of the first rank; elsewhere one without any
    numbers. A model that is not sharded as it is. Every rank has to ask."""
    skeleton: tuple[Any] | None = getattr(model, "keel_whole", None)
    if skeleton is None:
        return model
    plain = skeleton[0]
    places = _places(plain)
    empties = list(plain.named_parameters())  # before any is filled: a tied one would come again
    pairs = zip(model.named_parameters(), empties, strict=True)  # pyright: ignore
    for (name, own), (empty_name, empty) in pairs:
        assert name == empty_name, (name, empty_name)
        full = _full(own.detach())
        if group.is_first():
            filled = nn.Parameter(full.cpu(), requires_grad=empty.requires_grad)
            for parameters, attribute in places[id(empty)]:
                parameters[attribute] = filled
    return plain


def _full(tensor: Tensor) -> Tensor:
    full = getattr(tensor, "full_tensor", None)  # of a DTensor
    if full is None:
        return tensor
    with group.talking():
        return full()


class Placing:
    """What a rank keeps of a checkpoint's tensors: its parts, where the weights are cut; else all of them."""

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        known_as: Callable[[group.Path], group.Path] = lambda path: path,
    ) -> None:
        """Weights stand under the names of `models` by their own, under those of `optimizers` by their
        number. known_as: where else a tensor stands → where the like of it does."""
        self.known_as = known_as
        if not group.is_sharded():
            models, optimizers = {}, {}
        self._named: dict[str, Mapping[str, Any]] = {n: model.state_dict() for n, model in models.items()}
        self._numbered = {
            name: [p for one in optimizer.param_groups for p in one["params"]]
            for name, optimizer in optimizers.items()
        }

    def like(self, path: group.Path) -> Any:
        """The tensor of this rank that is cut as the one that stands there; None: that one is not cut."""
        match self.known_as(path):
            case (name, weight) if name in self._named:
                return self._named[name].get(weight)
            case (name, "state", int(number), _) if name in self._numbered:
                return self._numbered[name][number]
            case _:
                return None

    def __call__(self, path: group.Path, tensor: Tensor) -> Tensor:
        like = self.like(path) if tensor.dim() else None  # AdamW's count of steps has no dimension
        return tensor if like is None else _part(tensor, like)


def _part(tensor: Tensor, like: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    if not isinstance(like, DTensor):
        return tensor
    (placement,) = like.placements
    dim = cast("Any", placement).dim
    parts = tensor.chunk(group.size(), dim)
    part = parts[group.rank()] if group.rank() < len(parts) else tensor.narrow(dim, 0, 0)
    # no view, which would keep the whole
    return _as_part(part.to(like.device, copy=True).contiguous(), like)


def number(value: Tensor) -> Tensor:
    """A result over sharded tensors, such as a norm, as every rank can read it."""
    return _full(value)
