"""The self-test of whatever takes a decode step: a few steps of three rows of several lengths, one of which
leaves, against the model's own forward over the whole sequences, without a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from keel.accel.kv_slots import Slots
from keel.accel.modules import logits_of_last, plain_of, undisturbed, with_cache
from keel.accel.patches import difference, disabled
from keel.accel.trial_inputs import trial_ids

Step = Callable[[Tensor, Slots], Tensor]  # (n,) newest tokens → (n, V) logits
SEQUENCES = ((1, 2, 3, 4, 5, 2, 4, 3), (5, 3, 1, 4, 2, 1), (2, 4, 1, 5))  # three tokens behind each prompt
STEPS, COLUMNS = 3, 16


def decoded_otherwise(
    model: nn.Module, make_step: Callable[[Slots, int], Step], longer: int = 0
) -> str | None:
    """What differs between steps and the model's own forward; None if nothing does. make_step: called with
    empty slots and the number of columns, before prompts are read into them. longer: tokens by which the
    prompts are longer than those of `SEQUENCES`, so that they reach beyond a window."""
    device, config = next(model.parameters()).device, plain_of(model).config
    sequences = [(*trial_ids(config, longer, seed), *row) for seed, row in enumerate(SEQUENCES)]
    prompts = [row[:-STEPS] for row in sequences]
    with undisturbed(model), torch.no_grad():
        columns = COLUMNS + longer
        half = (
            torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.bfloat16
        )
        with disabled():
            theirs = own_logits(model, sequences, device)
        slots = Slots(len(sequences), columns, device, torch.bfloat16 if half else None)
        step = make_step(slots, columns)
        with disabled():
            cache = prompts_read(model, prompts, device)
        if not slots.admit(cache, [*map(len, prompts)], range(len(prompts))):
            return "it keeps no keys and values for each position"
        rows = [*range(len(sequences))]
        for number in range(STEPS):
            newest = torch.tensor([sequences[row][len(prompts[row]) + number] for row in rows], device=device)
            logits = step(newest, slots)
            slots.step()
            expected = torch.stack([theirs[row][number] for row in rows])
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


def own_logits(
    model: nn.Module, sequences: Sequence[Sequence[int]], device: torch.device, steps: int = STEPS
) -> list[Tensor]:
    """Of each sequence, (steps, V) behind its last tokens. They are padded on the right: causal attention
    needs no mask."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in sequences], device=device)
    behind = [longest - len(row) + steps for row in sequences]  # from a row's first of them to the end
    logits = model(input_ids=ids, use_cache=False, **logits_of_last(model, max(behind))).logits
    ends = [logits.shape[1] - count for count in behind]
    return [row[end : end + steps] for row, end in zip(logits, ends, strict=True)]


def prompts_read(model: nn.Module, prompts: Sequence[tuple[int, ...]], device: torch.device) -> DynamicCache:
    """Keys and values of the prompts, padded on the left, as transformers keeps them."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[*[0] * (longest - len(row)), *row] for row in prompts], device=device)
    real = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts], device=device)
    cache, positions = DynamicCache(), (real.cumsum(1) - 1).clamp(min=0)
    model(input_ids=ids, attention_mask=real, position_ids=positions, **with_cache(model, cache))
    return cache
