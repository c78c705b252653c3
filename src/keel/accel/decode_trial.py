"""The self-test of whatever takes a decode step: a few steps of three rows of several lengths, one of which
leaves, against the model's own forward over the whole sequences, without a cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from keel.accel.kv_slots import Slots
from keel.accel.modules import undisturbed
from keel.accel.patches import difference, disabled

Step = Callable[[Tensor, Slots], Tensor]  # (n,) newest tokens → (n, V) logits
SEQUENCES = ((1, 2, 3, 4, 5, 2, 4, 3), (5, 3, 1, 4, 2, 1), (2, 4, 1, 5))  # three tokens behind each prompt
STEPS, COLUMNS = 3, 16


def decoded_otherwise(model: nn.Module, make_step: Callable[[Slots, int], Step]) -> str | None:
    """What differs between steps and the model's own forward; None if nothing does. make_step: called with
    empty slots and the number of columns, before prompts are read into them."""
    device = next(model.parameters()).device
    prompts = [row[:-STEPS] for row in SEQUENCES]
    with undisturbed(model), torch.no_grad():
        half = (
            torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.bfloat16
        )
        with disabled():
            theirs = _own_logits(model, device)
        slots = Slots(len(SEQUENCES), COLUMNS, device, torch.bfloat16 if half else None)
        step = make_step(slots, COLUMNS)
        with disabled():
            cache = _prompts_read(model, prompts, device)
        if not slots.admit(cache, [*map(len, prompts)], range(len(prompts))):
            return "it keeps no keys and values for each position"
        rows = [*range(len(SEQUENCES))]
        for number in range(STEPS):
            newest = torch.tensor([SEQUENCES[row][len(prompts[row]) + number] for row in rows], device=device)
            logits = step(newest, slots)
            slots.step()
            expected = torch.stack([theirs[row, len(prompts[row]) + number] for row in rows])
            if (why := difference(f"logits of decode step {number + 1}", logits, expected)) is not None:
                return why
            if number == 0:  # the middle row leaves
                order = slots.keep(torch.tensor([True, False, True], device=device))
                rows = [rows[i] for i in order.tolist()]
    return None


def precision_of(model: nn.Module) -> tuple[object, ...]:
    """What the numbers of a step depend on, besides weights."""
    weight = next(p for p in model.parameters() if p.is_floating_point())
    kind = weight.device.type
    return weight.dtype, weight.device, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


def _own_logits(model: nn.Module, device: torch.device) -> Tensor:
    """(rows, positions, V) of the sequences, padded on the right: causal attention needs no mask."""
    longest = max(map(len, SEQUENCES))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in SEQUENCES], device=device)
    return model(input_ids=ids, use_cache=False).logits


def _prompts_read(model: nn.Module, prompts: list[tuple[int, ...]], device: torch.device) -> DynamicCache:
    """Keys and values of the prompts, padded on the left, as transformers keeps them."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[*[0] * (longest - len(row)), *row] for row in prompts], device=device)
    real = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts], device=device)
    cache, positions = DynamicCache(), (real.cumsum(1) - 1).clamp(min=0)
    model(input_ids=ids, attention_mask=real, position_ids=positions, past_key_values=cache, use_cache=True)
    return cache
