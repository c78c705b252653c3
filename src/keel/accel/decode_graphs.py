"""The decode step on CUDA: recorded once for each of a few shapes, then replayed (CUDA graphs).

A step of a small model is some twenty kernels a layer of a few microseconds each, and launching one takes
about as long. A graph launches all of a step's at once. It replays the same kernels on the same addresses, so
whatever a step reads or writes must stay where it is: weights are trained in place, the cache belongs to the
step and is lent to the engine's slots.

Recording takes as long as some four steps, so what was recorded is kept for the next call with the same
model, as long as the model lives and what it holds is a small part of the card. It is recorded anew where
weights lie elsewhere, other adapters are on, or the cache was too small. Which shapes a call uses depends on
that call alone, not on what was recorded before: a run that was killed and goes on computes what one that was
not computes.

Not run on a GPU yet: tests replay by calling the step again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from keel.accel import decode_step, last_layer
from keel.accel.decode_static import COLUMNS, Bf16Copies, Static, rows_of, width_of
from keel.accel.decode_trial import decoded_otherwise, precision_of
from keel.accel.kv_slots import Slots
from keel.accel.modules import is_foreign, plain_of
from keel.accel.patches import enabled, trusted

WARM_UPS = 2  # before a step is recorded: what libraries make at first use must not be recorded
MOST = 32  # recorded steps of one model; each takes some MiB of the card
PART = 16  # no more than one part in so many of the card's memory is held between calls
ADAPTER_STATE = ("_disable_adapters", "_active_adapter", "merged_adapters", "scaling")  # peft's names

Replay = Callable[[], None]
Record = Callable[[Replay], Replay]


class Graphs:
    """Records on CUDA. One pool of memory serves all graphs of a model: no two run at once, and none leaves
    anything behind that another one must not write over."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def __call__(self, function: Replay) -> Replay:
        graph, outside = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        self._stream.wait_stream(outside)
        try:
            with torch.cuda.stream(self._stream):  # and out of it even if a recording cannot be ended
                for _ in range(WARM_UPS):
                    function()
                # work of other threads on the card does not spoil the recording
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    function()
        finally:
            outside.wait_stream(self._stream)
        return graph.replay


def recorder(device: torch.device) -> Record | None:
    """How a step is recorded on a device; None: not at all."""
    return Graphs(device) if device.type == "cuda" else None


def records(device: torch.device) -> bool:
    """Whether steps are recorded on a device, and that is switched on."""
    return enabled("decode_graphs") and recorder(device) is not None


class Captured:
    """The recorded steps of one model."""

    def __init__(
        self, model: nn.Module, record: Record, device: torch.device, state: tuple[Any, ...]
    ) -> None:
        self.static, self.casts, self.state = Static(model), Bf16Copies(model, device), state
        self.replays: dict[tuple[int, int], Replay] = {}  # by rows and width
        self._record, self._device = record, device

    @property
    def bytes(self) -> int:
        """Held between calls, without what the recorded steps themselves take."""
        return sum(held.nbytes for held in (*self.static.tensors, *self.casts.tensors))

    def lend(self, slots: Slots) -> None:
        """Let slots have their keys and values where the recorded steps have them."""
        static = self.static
        slots.columns = -(-slots.columns // COLUMNS) * COLUMNS
        rows, columns = max(static.rows, slots.capacity), max(static.columns, slots.columns)
        if (rows, columns) != (static.rows, static.columns):
            if static.rows:  # so that neither of two calls in turn makes the other's anew
                grown = rows * columns / (static.rows * static.columns) * self.bytes
                if grown > _may_stay(self._device):
                    rows, columns = slots.capacity, slots.columns
            self.replays.clear()
            static.make(rows, columns)
        static.clear()
        slots.lent = static.cache

    def step(self, rows: int, width: int) -> Replay:
        """That of this shape, recorded when it is first needed. RuntimeError if it cannot be recorded."""
        if (rows, width) not in self.replays:
            if len(self.replays) >= MOST:
                self.replays.clear()
            self.replays[rows, width] = self._record(partial(self.static, rows, width))
        return self.replays[rows, width]


class Step:
    """The recorded step as the engine calls it, and `lean.Step` from where one could not be recorded."""

    def __init__(
        self, model: nn.Module, captured: Captured, slots: Slots, longest: int, seen: list[Tensor] | None
    ) -> None:
        """longest: positions of a row; seen: where what the head is given is put, as hooks do not run in a
        replay."""
        captured.lend(slots)
        self._model, self._captured, self._longest, self._seen = model, captured, longest, seen
        self._starts: Tensor | None = None  # those that were written last
        self._lean: decode_step.Step | None = None

    def __call__(self, ids: Tensor, slots: Slots) -> Tensor:
        """(n,) newest tokens → (n, V) logits, which the next step writes over; the keys and values go into
        the newest column."""
        if self._lean is None:
            logits = self._replayed(ids, slots)
            if logits is not None:
                return logits
            self._lean = decode_step.Step(self._model, self._longest)
        return self._lean(ids, slots)

    def _replayed(self, ids: Tensor, slots: Slots) -> Tensor | None:
        # all columns up to the newest are read, also those that nobody needs
        if slots.low > slots.column - slots.low:
            slots.close_up()
        n, captured = len(slots), self._captured
        captured.static.take(ids, slots, moved=slots.starts is not self._starts)
        self._starts = slots.starts
        try:
            replay = captured.step(rows_of(slots), width_of(slots))
        except RuntimeError as error:
            _refused.add(self._model)
            warnings.warn(
                f"the decode step could not be recorded as a CUDA graph and runs without: {error}",
                stacklevel=2,
            )
            return None
        replay()
        if self._seen is not None:
            self._seen.append(captured.static.hidden[:n].clone())
        return captured.static.logits[:n]


# ---------------------------------------------------------------- what is kept between calls

_kept: WeakKeyDictionary[nn.Module, Captured] = WeakKeyDictionary()
_refused: WeakSet[nn.Module] = WeakSet()  # models whose step could not be recorded


@contextmanager
def recorded_steps(
    model: nn.Module, device: torch.device, *, reading: bool = False
) -> Iterator[Captured | None]:
    """The recorded steps of a model, whose linear layers have weights for them within it; None where no step
    is recorded. reading: a hook on the head reads what it is given. To be called where the model computes, in
    its precision."""
    record = recorder(device) if enabled("decode_graphs") else None
    if record is None or not fits(model, reading=reading) or model in _refused:
        yield None
        return
    state = _state(model, device)
    captured = _kept.get(model)
    if captured is None or captured.state != state:
        _forget(model)  # before there is another
        captured = _kept[model] = Captured(model, record, device, state)
    try:
        last_layer.try_out(model)
        with captured.casts.in_place():
            yield captured
    finally:
        if model in _refused or captured.bytes > _may_stay(device):
            _forget(model)
        if sum(other.bytes for other in _kept.values()) > _may_stay(device):
            for other in list(_kept):
                _forget(other)


def fits(model: nn.Module, *, reading: bool = False) -> bool:
    """Whether a model's step can be recorded: one for `lean.Step`, on one device, with nothing in it that
    decides on the CPU. reading: the head has a hook that may be left out."""
    if not decode_step.fits(model) or len({parameter.device for parameter in model.parameters()}) > 1:
        return False
    plain = plain_of(model)
    head = plain.get_output_embeddings()
    if any(_decides(module, int(reading and module is head)) for module in plain.modules()):
        return False
    trial = lambda: decoded_otherwise(plain, partial(_unrecorded, plain))  # noqa: E731
    return trusted("decode_graphs", plain, trial, depends_on=precision_of(plain))


def _unrecorded(model: nn.Module, slots: Slots, columns: int) -> Callable[[Tensor, Slots], Tensor]:
    """The step that is recorded, as it is: what a trial calls."""
    static = Static(model)
    static.make(slots.capacity, columns)
    slots.lent = static.cache

    def step(ids: Tensor, slots: Slots) -> Tensor:
        static.take(ids, slots, moved=True)
        static(rows_of(slots), min(width_of(slots), columns))
        return static.logits[: len(ids)]

    return step


def _decides(module: nn.Module, ours: int) -> bool:
    """Whether Python runs in a module's forward that a replay would leave out; ours: hooks that may be left
    out."""
    hooks = chain(module._forward_hooks.values(), module._forward_pre_hooks.values())
    foreign = sum(map(is_foreign, hooks))
    quantised = type(module).__module__.startswith("bitsandbytes.")
    return quantised or hasattr(module, "_hf_hook") or foreign > ours


def _state(model: nn.Module, device: torch.device) -> tuple[Any, ...]:
    """What a recorded step depends on, besides numbers in weights: where they lie, which adapters are on, the
    precision."""
    weights = [
        (held.data_ptr(), held.dtype, held.shape, held.stride())
        for held in chain(model.parameters(), model.buffers())
    ]
    adapters = [
        repr([vars(module).get(name) for name in ADAPTER_STATE])
        for module in model.modules()
        if ADAPTER_STATE[0] in vars(module)
    ]
    autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    return weights, adapters, autocast, torch.get_float32_matmul_precision()


def _forget(model: nn.Module) -> None:
    captured = _kept.pop(model, None)
    if captured is not None:
        captured.replays.clear()  # without waiting for the collector, if a replay refers to what it replays


def _may_stay(device: torch.device) -> int:
    """Bytes that may be held between calls."""
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 2**34
    return total // PART
