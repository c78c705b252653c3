"""Matrices that are gathered in bfloat16, where a model multiplies in it.

A model with float32 weights that computes under autocast casts the weight of each linear layer before it
multiplies. A rank can cast its part before it sends it: half the bytes, and no copy beside the gathered
weight. So these weights are a second group of FSDP2's in each unit, with `MixedPrecisionPolicy(bfloat16,
reduce_dtype=float32)`. Their gradients are summed over ranks in float32; parts, summed gradients and the
optimiser's states stay in float32.

All else is gathered as it is: embeddings and norms, whose arithmetic autocast leaves in float32, biases,
adapters, a scorer's head, and weights that are used in two places. So the numbers are those of autocast on
gathered float32, to the bit: what is multiplied is the same cast of the same weight.

What it costs: a second collective for each unit. torch makes several groups in a unit only for several
meshes; so this one is put beside the first by hand (`FSDPParamGroup`, torch 2.13). A torch without it gathers
in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

ADAPTERS = "lora_"  # in the names of peft's modules
_wanted = True


@contextmanager
def wanted(value: bool) -> Iterator[None]:
    """Within it matrices are gathered in bfloat16 where a model multiplies in it, or never
    (`distributed.mixed_precision`)."""
    global _wanted
    before, _wanted = _wanted, value
    try:
        yield
    finally:
        _wanted = before


def is_wanted() -> bool:
    """Whether they are gathered in bfloat16 where a model multiplies in it."""
    return _wanted


def matrices(model: nn.Module, heads: Sequence[nn.Module]) -> set[nn.Parameter]:
    """The weights that autocast casts in each forward; none where they are to be gathered as they are. heads:
    modules that compute in their own precision."""
    if not _wanted or not _known():
        return set()
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    apart = {id(module) for head in heads for module in head.modules()}
    found: set[Any] = {
        module.weight
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and id(module) not in apart
        and ADAPTERS not in name
        and module.weight.dtype == torch.float32
        and uses[id(module.weight)] == 1
    }
    return found


def _known() -> bool:
    """Whether this torch has what a second group in a unit takes."""
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo
        from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
        from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
    except ImportError:
        return False
    return all((FSDPMeshInfo, FSDPParamGroup, hasattr(FSDPState(), "_fsdp_param_groups")))


def cut(unit: Any, weights: Sequence[nn.Parameter], mesh: Any, offload: Any, device: torch.device) -> None:
    """Cut weights of a unit that was cut without them (`ignored_params`). They are gathered with the others,
    in bfloat16, and their gradients are summed in float32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    state = unit._get_fsdp_state()
    for weight in weights:
        if not weight.is_meta:  # on the other ranks than the first
            weight.data = weight.data.to(device)
    groups = state._fsdp_param_groups
    place = groups[0].mesh_info if groups else FSDPMeshInfo(mesh, shard_mesh_dim=0)
    policy = MixedPrecisionPolicy(
        torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )  # autocast casts what a layer is given
    groups.append(FSDPParamGroup([*weights], state._modules, place, place, device, None, policy, offload))


def sum_by(unit: Any, comm: Any) -> None:
    """Have all groups of a unit sum their gradients by a way of one's own; torch's setter takes one group."""
    for group in unit._get_fsdp_state()._fsdp_param_groups:
        group._reduce_scatter_comm = comm
