"""Which rank of a run this process is, and what all its ranks agree on.

A run on n ranks is n processes of one command. Each knows its number from the environment, by torchrun's
names: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. A process without them is alone, and nothing
here costs it anything.

Every rank calls these functions in the same order. They wait in two ways. A collective (`summed`, `gathered`)
is over within the timeout, or the run ends. What the first rank does alone (`from_first`, `only_first`: it
reads, samples, writes), and what each does by itself and one may need much longer for (`mapped`,
`gathered_late`: responses, tools, judges), may take as long as it takes: the others look for its word in the
store, and end when its process does (`watch`).
"""

from __future__ import annotations

import math
import os
import pickle
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from keel.distributed import watch
from keel.errors import KeelError, LostRankError, UsageError

S = TypeVar("S")
T = TypeVar("T")
Path = tuple[Any, ...]  # the keys that lead to a tensor in nested mappings and lists
Place = Callable[[Path, Tensor], Tensor]  # a whole tensor → what a rank keeps of it
Strategy = Literal["ddp", "fsdp"]

GOES_ON = "what is done is kept, and the same command goes on from the last checkpoint"
_LONGEST_PAUSE = 0.05  # seconds between two looks for the first rank's word
# how gloo, NCCL and torch's store say that another process is gone or late
_LOST = re.compile(
    r"gloo/transport|Connection (closed|reset|refused)|Broken pipe|Timed out waiting|Socket Timeout"
    r"|NCCL (error|communicator)|failed to recv|wait timeout|Connection was likely closed",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Group:
    """The ranks of a run, seen from one of them."""

    rank: int = 0
    size: int = 1
    strategy: Strategy = "ddp"
    store: Any = None  # torch's, which all ranks reach
    device_type: str = "cpu"  # on which they compute
    offload: bool = False  # whether what is cut lies in host memory


class Launched(NamedTuple):
    """What the environment says of this process."""

    rank: int
    size: int
    local_rank: int  # on this machine


_group = Group()
_words = 0  # of the first rank, counted alike by all
_joins = 0  # of this process, likewise: a script may run several configs


def rank() -> int:
    """The number of this process, from 0."""
    return _group.rank


def size() -> int:
    """How many ranks there are; 1 for a process alone."""
    return _group.size


def is_first() -> bool:
    """Whether this is rank 0, which alone writes and speaks; so is a process alone."""
    return _group.rank == 0


def is_sharded() -> bool:
    """Whether no rank has the weights whole (FSDP2)."""
    return _group.size > 1 and _group.strategy == "fsdp"


def is_offloaded() -> bool:
    """Whether weights that are cut lie in host memory, with their gradients and optimiser states."""
    return is_sharded() and _group.offload


def launched() -> Launched | None:
    """What the environment says; None for a process alone. UsageError for what says nothing."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    try:
        number, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local = int(os.environ.get("LOCAL_RANK", "0"))
    except ValueError:
        raise UsageError("RANK, WORLD_SIZE and LOCAL_RANK in the environment are no numbers") from None
    return Launched(number, count, local) if count > 1 else None


def device_type() -> str:
    """What the ranks compute on: cpu or cuda."""
    return _group.device_type


@contextmanager
def joined(device_type: str, strategy: Strategy, timeout: float, *, offload: bool = False) -> Iterator[None]:
    """Within it this process is a rank of the run that its environment names; nothing for a process alone.

    timeout: seconds that a collective may take. offload: what is cut lies in host memory. UsageError where
    there is no card for this rank.
    """
    global _group, _words, _joins
    here = launched()
    if here is None or _group.size > 1:
        yield
        return
    if device_type == "cuda":
        _take_card(here)
    _joins += 1
    store, beat = _stores(here, timeout, f"keel/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_joins}")
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    with talking():
        torch.distributed.init_process_group(
            backend, store=store, rank=here.rank, world_size=here.size, timeout=timedelta(seconds=timeout)
        )
    _group, _words = Group(here.rank, here.size, strategy, store, device_type, offload), 0
    watching = watch.begin(beat, here.rank, here.size, timeout / 2)
    try:
        yield
        if is_first():  # it may host the store
            for other in range(1, here.size):
                _awaited(f"left/{other}")
        else:
            store.set(f"left/{here.rank}", b"1")
        watching.end()
        torch.distributed.destroy_process_group()
    finally:
        watching.end()
        _group = Group()


def _take_card(here: Launched) -> None:
    cards = torch.cuda.device_count()
    if here.local_rank >= cards:
        raise UsageError(
            f"rank {here.rank} has no card of its own: {socket.gethostname()} has {cards}; start at most one "
            "rank a card"
        )
    torch.cuda.set_device(here.local_rank)


def _stores(here: Launched, timeout: float, prefix: str) -> tuple[Any, Any]:
    """The store that all ranks reach, and a second connection to it: one that waits blocks its others.

    Whoever started the ranks may hold it (keel's launcher and torchrun do), else the first rank does.
    """
    host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "29500"))
    held = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    until = timedelta(seconds=timeout)
    with talking():
        stores = [
            torch.distributed.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
                host, port, None, here.rank == 0 and not held and number == 0, until, wait_for_workers=False
            )
            for number in range(2)
        ]
    prefixed: Any = torch.distributed.PrefixStore  # pyright: ignore[reportPrivateImportUsage]
    first, second = (prefixed(prefix, store) for store in stores)
    return first, second


@contextmanager
def alone() -> Iterator[None]:
    """Within it this rank, the first, is a process alone: what knows nothing of ranks may run. The others
    wait for its word."""
    global _group
    before, _group = _group, Group()
    try:
        yield
    finally:
        _group = before


# ---------------------------------------------------------------- what the first rank does alone


def from_first(work: Callable[[], T], place: Place | None = None) -> T:
    """What `work` returns on the first rank, which alone does it, on all of them.

    Plain values, mappings, lists and tuples; tensors in them are sent one at a time. place: what a rank keeps
    of a tensor, given where it stands; by default all of it, on the CPU.
    """
    global _words
    if _group.size == 1:
        return work()
    key, tensors = f"word/{_words}", list[Tensor]()
    _words += 1
    if is_first():
        value = work()
        plan = _without_tensors(value, tensors)
        with talking():
            _group.store.set(key, pickle.dumps(plan))
    else:
        plan = pickle.loads(_awaited(key))
    waiting = iter(tensors)
    return cast("T", _with_tensors(plan, (), waiting, place or (lambda path, tensor: tensor)))


def from_first_or_error(work: Callable[[], T]) -> T:
    """As `from_first`, and a KeelError of the first rank is raised on all of them, `met_by_all`."""
    met: list[KeelError] = []

    def tried() -> tuple[Any, Any]:
        try:
            return None, work()
        except KeelError as error:
            met.append(error)
            return (type(error), str(error)), None

    if _group.size == 1:
        return work()
    failed, value = from_first(tried)
    if failed is None:
        return value
    kind, words = failed
    error = met[0] if met else kind(words)
    setattr(error, "met_by_all", True)  # noqa: B010  errors have no such field
    raise error


@contextmanager
def alike() -> Iterator[None]:
    """Within it every rank does the same with the same values: a KeelError is `met_by_all`."""
    try:
        yield
    except KeelError as error:
        setattr(error, "met_by_all", True)  # noqa: B010  errors have no such field
        raise


def met_by_all(error: BaseException) -> bool:
    """Whether all ranks meet an error at the same place, so that they may do something together before they
    end; as a process alone does."""
    return _group.size == 1 or getattr(error, "met_by_all", False)


def only_first(work: Callable[[], object]) -> None:
    """Done by the first rank alone; the others go on when it is done."""
    from_first(lambda: (work(), None)[1])


def first_then_all(work: Callable[[], T]) -> T:
    """Done by the first rank, then by all others, who find what it has left."""
    if _group.size == 1:
        return work()
    if is_first():
        value = work()
        only_first(lambda: None)
        return value
    only_first(lambda: None)
    return work()


def all_here() -> None:
    """Wait until every rank has come here, however long each takes."""
    global _words
    if _group.size == 1:
        return
    key = f"here/{_words}"
    _words += 1
    with talking():
        _group.store.set(f"{key}/{_group.rank}", b"1")
    for other in range(_group.size):
        _awaited(f"{key}/{other}")


def _awaited(key: str) -> bytes:
    """What somebody says in the store, however long it takes."""
    pause = 0.001
    with talking():
        while not _group.store.check([key]):
            time.sleep(pause)
            pause = min(1.2 * pause, _LONGEST_PAUSE)
        return _group.store.get(key)


@dataclass(frozen=True, slots=True)
class _Sent:
    """Stands for a tensor that follows."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _without_tensors(value: Any, found: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        found.append(value.detach())
        return _Sent(tuple(value.shape), value.dtype)
    if isinstance(value, Mapping):
        return {key: _without_tensors(item, found) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_without_tensors(item, found) for item in value])
    return value


def _with_tensors(plan: Any, path: Path, waiting: Iterator[Tensor], place: Place) -> Any:
    if isinstance(plan, _Sent):
        tensor = next(waiting) if is_first() else torch.empty(plan.shape, dtype=plan.dtype)
        tensor = tensor.cpu().contiguous()
        send(tensor)
        return place(path, tensor)
    if isinstance(plan, dict):
        return {key: _with_tensors(item, (*path, key), waiting, place) for key, item in plan.items()}
    if isinstance(plan, (list, tuple)):
        parts = [_with_tensors(item, (*path, i), waiting, place) for i, item in enumerate(plan)]
        return type(plan)(parts)
    return plan


def send(tensor: Tensor) -> None:
    """Fill a contiguous tensor on every rank with the first one's, byte by byte, whatever its dtype."""
    if tensor.numel():
        with talking():
            torch.distributed.broadcast(tensor.detach().view(-1).view(torch.uint8), 0)


# ---------------------------------------------------------------- what all do together


def gathered(value: T) -> list[T]:
    """Every rank's value, in their order."""
    if _group.size == 1:
        return [value]
    found: list[Any] = [None] * _group.size
    with talking():
        torch.distributed.all_gather_object(found, value)
    return found


def gathered_late(value: T) -> list[T]:
    """As `gathered`, where ranks may come at very different times: after responses, tools or judges."""
    all_here()
    return gathered(value)


def gathered_or_error(work: Callable[[], T]) -> list[T]:
    """What `work` returns on every rank, in their order. Where it raises a KeelError the first of these is
    raised on all ranks, `met_by_all`. `work` does its part alone: no other rank waits within it."""
    if _group.size == 1:
        return [work()]
    met: KeelError | None = None
    value: Any = None
    try:
        value = work()
    except KeelError as error:
        met = error
    found = gathered_late((None if met is None else (type(met), str(met)), value))
    failed = [(number, told) for number, (told, _) in enumerate(found) if told is not None]
    if not failed:
        return [value for _, value in found]
    number, (kind, words) = failed[0]
    error = met if met is not None and number == _group.rank else kind(words)
    setattr(error, "met_by_all", True)  # noqa: B010  errors have no such field
    raise error


def mapped(items: Sequence[S], work: Callable[[S], T], idle: Callable[[], object] | None = None) -> list[T]:
    """`[work(item) for item in items]`, the items dealt out to the ranks in turn, all results on every rank.

    idle: what a rank with an item less than others does in its place. By default nothing, and where weights
    are sharded it works on one of the others': a forward takes all ranks.
    """
    if _group.size == 1:
        return [work(item) for item in items]
    found = [work(item) for item in items[_group.rank :: _group.size]]
    for _ in range(math.ceil(len(items) / _group.size) - len(found)):
        if idle is not None:
            idle()
        elif is_sharded():
            work(items[0])
    columns = gathered_late(found)
    return [columns[i % _group.size][i // _group.size] for i in range(len(items))]


def summed(values: Mapping[str, float]) -> dict[str, float]:
    """The sums over ranks, name by name; a rank need not have every name."""
    if _group.size == 1:
        return dict(values)
    total: dict[str, float] = {}
    for part in gathered(dict(values)):
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def agree(what: str, value: object) -> None:
    """LostRankError where a rank has another value: it computes something else, so that nothing that follows
    would be right."""
    if _group.size == 1:
        return
    found = gathered(value)
    other = next((number for number, its in enumerate(found) if its != found[0]), None)
    if other is not None:
        raise LostRankError(
            f"ranks 0 and {other} differ in {what} ({found[0]} and {found[other]}): they read other data, or "
            "run on machines that compute otherwise"
        )


# ---------------------------------------------------------------- rows


def deal(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """The rows of a step, by rank, each rank's in order: the longest first, each to the rank with the fewest
    tokens yet. A function of the sizes alone. sizes: tokens of each row. With few rows a rank may have
    none."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        least = min(range(ranks), key=lambda r: (tokens[r], len(shares[r]), r))
        shares[least].append(index)
        tokens[least] += sizes[index]
    return [sorted(share) for share in shares]


# ---------------------------------------------------------------- others that are gone


@contextmanager
def talking() -> Iterator[None]:
    """What a collective raises is a LostRankError: the others are gone, or hang."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise LostRankError(lost_words(error)) from error


def says_lost(error: BaseException) -> bool:
    """Whether an error that torch raised, in a backward say, is of a rank that is gone or late."""
    return isinstance(error, RuntimeError) and bool(_LOST.search(str(error)))


def lost_words(error: BaseException) -> str:
    """What is said of it."""
    if isinstance(error, LostRankError):
        return str(error)
    reason = " ".join(str(error).split())
    found = re.search(r"(Connection \w+ by \w+|Timed out waiting \d+ms|Connection \w+)", reason)
    return f"the other ranks do not answer ({found[0] if found else reason[:120]}); {GOES_ON}"
