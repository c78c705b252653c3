"""Decoding with the cache that a model makes for itself, whatever it holds: keys and values, states of
recurrences, windows of convolutions.

What such a cache holds is not known here, so nothing is laid out or padded: all rows are equally far in their
sequences at any time. A row whose prompt is longer is given its prompt's tokens where others are given what
they drew, so that rows need not begin with as many tokens. Rows are picked out of a cache by transformers'
own way to reorder it. All of this is tried on the model against its own forward without a cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from keel.accel.decode_trial import precision_of
from keel.accel.modules import logits_of_last, plain_of, undisturbed
from keel.accel.patches import difference, disabled, trusted
from keel.accel.trial_inputs import trial_ids, trial_length

STEPS = 5  # of the trial
CACHES = ("cache", "past_key_values", "cache_params")  # names of arguments that take one


_makes_none: WeakSet[nn.Module] = WeakSet()  # models that take a cache and make none


class OwnCache:
    """n rows of equal length, read and continued by the model's own forward."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self._plain = model, plain_of(model)
        self._takes = inspect.signature(self._plain.forward).parameters
        self._device = next(self._plain.parameters()).device
        self._rows, self._length = 0, 0
        self._held: dict[str, Any] = {}

    def read(self, ids: Tensor) -> Tensor:
        """(n, L) tokens of new rows → (n, V) logits behind them. ValueError where the model keeps nothing."""
        self._rows, self._length, self._held = len(ids), 0, {}
        if self._plain not in _makes_none:
            logits = self._forward(ids)
            if self._held:
                return logits
            _makes_none.add(self._plain)
        if (name := next((name for name in CACHES if name in self._takes), None)) is None:
            raise ValueError("it keeps nothing between two tokens")
        self._length = 0
        self._held = {name: DynamicCache(config=self._plain.config.get_text_config(decoder=True))}
        return self._forward(ids)

    def step(self, newest: Tensor) -> Tensor:
        """(n,) the next token of each row → (n, V) logits behind it."""
        return self._forward(newest[:, None])

    def pick(self, rows: Tensor) -> None:
        """(m,) numbers of rows, also several times: those that go on, in this order."""
        self._held = {name: _picked(held, rows, self._rows) for name, held in self._held.items()}
        self._rows = len(rows)

    def _forward(self, ids: Tensor) -> Tensor:
        more: dict[str, Any] = dict(logits_of_last(self.model))
        if "position_ids" in self._takes and self._length:  # Bamba and MiniMax do not ask their caches for it
            places = torch.arange(self._length, self._length + ids.shape[1], device=self._device)
            more["position_ids"] = places.expand(len(ids), -1)
        output: Any = self.model(input_ids=ids, use_cache=True, **more, **self._held)
        self._length += ids.shape[1]
        kept = {name: value for name, value in output.items() if name in self._takes and value is not None}
        self._held |= {name: value for name, value in kept.items() if name != "labels"}
        return output.logits[:, -1]


def _picked(held: Any, rows: Tensor, count: int) -> Any:
    """Rows of a cache, or of states in lists and objects, whose first dimension is the row. ValueError for a
    state that is laid out otherwise."""
    if isinstance(held, Tensor):
        if not held.dim() or (held.numel() == 1 and not held.is_floating_point()):
            return held  # how far the rows are
        if len(held) != count:
            raise ValueError(f"a state of shape {tuple(held.shape)} of {count} rows")
        return held.index_select(0, rows.to(held.device))
    if isinstance(held, dict):
        return {name: _picked(part, rows, count) for name, part in held.items()}
    if isinstance(held, list | tuple):
        return type(held)(_picked(part, rows, count) for part in held)
    if hasattr(held, "__dict__"):
        if isinstance(held, Cache):
            held.reorder_cache(cast(Any, rows))  # what is in its layers
        parts = {name: part for name, part in vars(held).items() if isinstance(part, Tensor | dict | list)}
        for name, part in parts.items():
            if name != "layers":
                setattr(held, name, _picked(part, rows, count))
    return held


# ---------------------------------------------------------------- the trial


def rows_at_once(model: nn.Module, longest: int) -> bool | None:
    """Whether decoding with the model's own cache is what its forward computes, in sequences of up to
    `longest` tokens: True; False where it is for single rows alone; None where it is not. Tried once for each
    precision, and once more where longer sequences meet a window."""
    plain = plain_of(model)
    length = max(1, trial_length(plain.config, longest) - STEPS)
    for rows in (3, 1):  # RWKV mixes rows that take a step together

        def trial(rows: int = rows) -> str | None:
            return _differs(plain, length, rows)

        if trusted("own_cache", plain, trial, depends_on=(rows, length, *precision_of(plain)), say=False):
            return rows > 1
    return None


def _differs(model: nn.Module, length: int, count: int) -> str | None:
    """Rows read from their common length on; of three, one is taken twice and two leave at different
    times."""
    device, config = next(model.parameters()).device, plain_of(model).config
    tokens = [trial_ids(config, length + STEPS, seed) for seed in range(count)]
    picks = {0: [2, 0, 1, 2], 2: [0, 2, 3], 3: [2]} if count > 1 else {}
    with undisturbed(model), torch.no_grad(), disabled():
        theirs = [_own_logits(model, row, device) for row in tokens]
        cache, rows = OwnCache(model), [*range(count)]
        found = [cache.read(torch.tensor([row[:length] for row in tokens], device=device))]
        expected = [theirs[row][0] for row in rows]
        for number in range(STEPS):
            if number in picks:
                cache.pick(torch.tensor(picks[number], device=device))
                rows = [rows[i] for i in picks[number]]
            newest = torch.tensor([tokens[row][length + number] for row in rows], device=device)
            found.append(cache.step(newest))
            expected += [theirs[row][number + 1] for row in rows]
    return difference("logits of decode steps", torch.cat(found), torch.stack(expected))


def _own_logits(model: Any, row: Sequence[int], device: torch.device) -> Tensor:
    """(STEPS + 1, V) behind the last tokens of a row, from one forward."""
    more = logits_of_last(model, STEPS + 1)
    return model(input_ids=torch.tensor([row], device=device), use_cache=False, **more).logits[
        0, -STEPS - 1 :
    ]
