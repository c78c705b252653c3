# pyright: strict
"""What the machine refuses (space, memory, files), in one line with a remedy, whichever library met it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path

from keel.errors import KeelError, MachineError

GOES_ON = "nothing is half-written; the same command goes on"
_WRITTEN = re.compile(r"PytorchStreamWriter failed|inline_container\.cc.*unexpected pos", re.DOTALL)
# how libraries in Rust end the message of an error of the system, and how torch ends that of a file
_NUMBER = re.compile(
    r"\(os error (\d+)\)|unable to (?:open|mmap|stat|resize|write)\b.*: .* \((\d+)\)\s*\Z", re.DOTALL
)
_NO_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|not enough memory|out of memory|std::bad_alloc"
    r"|can't start new thread",
    re.IGNORECASE,
)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# what is to blame wherever in the chain of errors it stands; others may have been met and got over
_SURE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EIO,
)
_WORDS = {  # what is said of an error number; {place}: the file or folder
    errno.EFBIG: "{place}: the limit on the size of a file (ulimit -f) is reached: raise it",
    errno.EROFS: "{place} lies on a disk that is read-only: name another folder, such as --runs DIR",
    errno.EACCES: "{place} cannot be written or read with your rights: change them, or name another folder",
    errno.EPERM: "{place} cannot be written or read with your rights: change them, or name another folder",
    errno.EMFILE: "too many open files (ulimit -n): raise the limit",
    errno.ENFILE: "the system has too many open files: end other programs",
    errno.EIO: "{place}: the disk reports an error of its own: look into the system's log",
    errno.ENOTDIR: "{place} cannot be made: a part of its path is a file; name another folder",
    errno.ENAMETOOLONG: "the name of a file is too long for the disk: give shorter names",
    errno.ELOOP: "{place}: its links lead in a circle",
}


def explain(error: BaseException, place: Path | None = None) -> KeelError | None:
    """The error in keel's words, where it, or what it came of, says that the machine has refused something;
    None for any other. place: where it was worked, for errors that name no file."""
    for one in _chain(error):
        if type(one).__name__ == "OutOfMemoryError":
            return MachineError(
                "the GPU's memory is used up: set `micro_batch: auto` or a smaller one (`keel plan` says "
                f"what fits); {GOES_ON}"
            )
        if isinstance(one, MemoryError) or (isinstance(one, RuntimeError) and _NO_MEMORY.search(str(one))):
            return _of_number(errno.ENOMEM, place)
        number = _number_of(one)
        if number in _SURE or (number is not None and one is error):
            found = _of_number(number, _file_of(one) or place)
            if found is not None:
                return found
    if _WRITTEN.search(str(error)):
        return _of_number(errno.ENOSPC, place)
    return None


@contextlib.contextmanager
def explained(place: Path) -> Generator[None]:
    """What the machine refuses while it lasts is a MachineError. place: the folder that is worked in."""
    try:
        yield
    except KeelError:
        raise
    except Exception as error:
        told = explain(error, place)
        if told is None:
            raise
        raise told from error


def size_in_words(count: float) -> str:
    """Bytes in words: "3.4 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 10 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def free_bytes(place: Path) -> int | None:
    """What is free for this user on the disk of a folder, or of the nearest one above it that is there; None
    where nobody knows."""
    for folder in (place, *place.absolute().parents):
        try:
            return shutil.disk_usage(folder).free
        except FileNotFoundError:
            continue
        except OSError:
            return None
    return None


def _of_number(number: int, place: Path | None) -> KeelError | None:
    where = str(place) if place is not None else "a file"
    if number in _NO_SPACE:
        free = free_bytes(place) if place is not None else None
        left = f" ({size_in_words(free)} free)" if free is not None else ""
        words = (
            f"no space is left on the disk{f' of {place}' if place is not None else ''}{left}: free some "
            "(`keel clean RUN` lists kept stages)"
        )
    elif number == errno.ENOMEM:
        words = "the memory is used up: set a smaller `micro_batch` (`keel plan` says what a stage needs)"
    elif number in _WORDS:
        words = _WORDS[number].format(place=where)
    else:
        return None
    return MachineError(f"{words}; {GOES_ON}")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came of, each once."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            waiting += [one.__context__, one.__cause__]


def _number_of(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = _NUMBER.search(str(error))
    return int(found[1] or found[2]) if found else None


def _file_of(error: BaseException) -> Path | None:
    name = error.filename if isinstance(error, OSError) else None
    return Path(os.fsdecode(name)) if isinstance(name, str | bytes) else None
