"""Checkpoints of what is cut over ranks, by torch.distributed.checkpoint: each rank writes its own parts and
reads those that it needs. No rank ever holds the whole of it, neither for writing nor for reading.

In the folder lie one file a rank, and torch's index of them. Another number of ranks may read them, or a
process alone. A checkpoint is data: torch unpickles its index, so here this is done by an unpickler that
knows the index's own classes and runs nothing else.
"""

from __future__ import annotations

import pickle
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keel.distributed import group
from keel.errors import LostRankError

MARK = "keel_part"  # in the place of a tensor that lies in the parts
INDEX = ".metadata"  # torch's
_CLASSES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
}  # fmt: skip


def split(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """A state (mappings and lists, as `state_dict` gives them) with a mark in the place of each tensor that
    is cut over ranks, and these tensors by name."""
    cut: dict[str, Tensor] = {}

    def without(item: Any, path: group.Path) -> Any:
        if hasattr(item, "full_tensor"):  # a DTensor
            name = "/".join(map(str, path))
            cut[name] = item.detach()
            return {MARK: name, "shape": list(item.shape), "dtype": str(item.dtype).removeprefix("torch.")}
        if isinstance(item, Mapping):
            return {key: without(one, (*path, key)) for key, one in item.items()}
        if isinstance(item, (list, tuple)):
            return type(item)([without(one, (*path, number)) for number, one in enumerate(item)])
        return item

    return without(value, ()), cut


def write(folder: Path, cut: Mapping[str, Tensor]) -> dict[str, int]:
    """Write tensors that are cut over ranks; every rank has to ask. folder: is there, and empty.

    Returns the sums of all files, by name. What one rank meets (a full disk) is raised there, and as a
    LostRankError on the others, so that the run ends with a line that names its place.
    """
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.state_dict_saver import save

    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _errors_of_ranks():
        save(dict(cut), storage_writer=_writer(folder), planner=planner)
    mine = [path for path in folder.iterdir() if path.name.startswith(f"__{group.rank()}_")]
    if group.is_first():
        mine.append(folder / INDEX)
    sums: dict[str, int] = {}
    for part in group.gathered({path.name: sum_of(path) for path in mine}):
        sums |= part
    return dict(sorted(sums.items()))


def read(folder: Path, value: Any, like: Callable[[group.Path], Any]) -> Any:
    """What `split` gave, with its tensors. like: where it stands → the tensor of this rank that is cut as it
    should be; None: the rank gets it whole, on the CPU. Every rank has to ask."""
    into: dict[str, Tensor] = {}

    def place(item: Any, path: group.Path) -> None:
        if isinstance(item, Mapping):
            if MARK in item:
                into[item[MARK]] = _empty(item, like(path))
                return
            for key, one in item.items():
                place(one, (*path, key))
        elif isinstance(item, (list, tuple)):
            for number, one in enumerate(item):
                place(one, (*path, number))

    def filled(item: Any) -> Any:
        if isinstance(item, Mapping):
            return into[item[MARK]] if MARK in item else {key: filled(one) for key, one in item.items()}
        if isinstance(item, (list, tuple)):
            return type(item)([filled(one) for one in item])
        return item

    place(value, ())
    if not into:
        return value
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import load

    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _errors_of_ranks(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a process alone
        load(into, storage_reader=_reader(folder), planner=planner, no_dist=group.size() == 1)
    return filled(value)


def sum_of(path: Path) -> int:
    """What tells the bytes of a file from changed ones (CRC-32)."""
    total = 0
    with path.open("rb") as handle:
        while part := handle.read(1 << 24):
            total = zlib.crc32(part, total)
    return total


def _empty(mark: Mapping[str, Any], like: Any) -> Tensor:
    """Room for a tensor. ValueError where this run has another one in its place."""
    dtype, shape = getattr(torch, mark["dtype"]), tuple(mark["shape"])
    if not hasattr(like, "full_tensor"):
        return torch.empty(shape, dtype=dtype)
    if tuple(like.shape) != shape:
        raise ValueError(f"{mark[MARK]} has the shape {shape} in a checkpoint, and {tuple(like.shape)} here")
    return torch.empty_like(like, dtype=dtype, requires_grad=False)


@contextmanager
def _errors_of_ranks() -> Iterator[None]:
    """torch collects what ranks met in an exception that is no `Exception`: the first one's is raised in its
    place, on every rank; what its machine refuses, there alone."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        number, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
        if isinstance(cause, OSError) and number != group.rank():  # a disk is one machine's
            raise LostRankError(f"rank {number} of {group.size()}: {cause}; {group.GOES_ON}") from None
        raise cause from None


def _writer(folder: Path) -> Any:
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.metadata import StorageMeta

    class Writer(FileSystemWriter):
        """Says nothing of its place or time, so that the same run writes the same bytes anywhere."""

        def write_data(self, plan: Any, planner: Any) -> Any:
            try:
                return super().write_data(plan, planner)
            finally:
                group.all_here()  # a disk may be slower than another for longer than a collective may take

        def storage_meta(self) -> Any:
            return StorageMeta()

    return Writer(folder)


def _reader(folder: Path) -> Any:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    class Reader(FileSystemReader):
        def read_metadata(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            try:
                with (folder / INDEX).open("rb") as handle:
                    return _Index(handle).load()
            finally:
                group.all_here()  # as in `_writer`

        def read_data(self, plan: Any, planner: Any) -> Any:
            try:
                return super().read_data(plan, planner)
            finally:
                group.all_here()

    return Reader(folder)


class _Index(pickle.Unpickler):
    """Reads torch's index of parts. UnpicklingError for anything else in it."""

    def find_class(self, module: str, name: str) -> Any:
        known = name in _CLASSES.get(module, ())
        if known or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"an index of parts holds no {module}.{name}")
