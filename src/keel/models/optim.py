"""AdamW with decay on matrices only, a schedule, and clipping. State is all there is to save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from keel.accel.cpu_linear import grads_in_place
from keel.distributed import gradients, sharded
from keel.errors import NotFiniteError


def adamw(
    groups: Sequence[tuple[Sequence[nn.Module], float]], *, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """One optimiser over (modules, peak learning rate) groups; a parameter shared by two groups is taken
    once."""
    parameters: list[dict[str, Any]] = []
    seen: set[int] = set()
    for modules, lr in groups:
        own = [p for module in modules for p in module.parameters() if p.requires_grad and id(p) not in seen]
        own = list({id(p): p for p in own}.values())
        seen.update(id(p) for p in own)
        for decay, members in (
            (weight_decay, [p for p in own if p.dim() > 1]),
            (0.0, [p for p in own if p.dim() <= 1]),
        ):
            if members:
                parameters.append({"params": members, "lr": lr, "peak_lr": lr, "weight_decay": decay})
    return torch.optim.AdamW(parameters, betas=betas, fused=True)


def backward(loss: Tensor) -> None:
    """Add the gradients of a scalar loss to those of all weights, as a training loop wants them: what is made
    of linear layers on the CPU is added where it is kept (`keel.accel.cpu_linear.grads_in_place`)."""
    with grads_in_place(among_processes=gradients.all_reduced()):
        loss.backward()


def step(
    optimizer: torch.optim.Optimizer, scale: float, max_grad_norm: float | None, where: str
) -> Mapping[str, float]:
    """Sum the gradients over ranks, clip, set the learning rates to peak × scale, step, and clear the
    gradients.

    Returns the gradient's norm before clipping. NotFiniteError if it is none, on every rank: the weights stay
    as they were.
    """
    whole = [p for group in optimizer.param_groups for p in group["params"]]
    gradients.sum_gradients(whole)
    parameters = [p for p in whole if p.grad is not None]
    norm = sharded.number(
        torch.nn.utils.clip_grad_norm_(
            parameters, max_grad_norm if max_grad_norm is not None else float("inf")
        )
    )
    if not torch.isfinite(norm):
        raise NotFiniteError(
            f"{where}: the gradient is not finite (norm {norm.item()}); lower the learning rate, or look at "
            "the data of this step"
        )
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * scale
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"grad_norm": norm.item(), "lr": optimizer.param_groups[0]["lr"]}
