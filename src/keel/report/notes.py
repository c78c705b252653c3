"""What of a run cannot be read or shown. A run's directory may be damaged, or come from anybody: the page is
made of what is sound, and a line says what is missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeGuard, TypeVar

from keel.errors import DataError

MOST = 50  # lines that are kept
LONGEST = 300  # characters of one
# what handling values raises that are not as keel writes them
BROKEN = (
    *(TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError),
    StopIteration,
)
LARGEST_INT = 2**63  # beyond, a count is none
LARGEST_SECONDS = 1e12

T = TypeVar("T")


class Notes:
    """The lines, in the order in which they were found. strict: the first one is raised instead."""

    def __init__(self, *, strict: bool = True) -> None:
        self.strict = strict
        self._lines: dict[str, None] = {}
        self._more = 0

    @property
    def lines(self) -> tuple[str, ...]:
        """Each once; beyond `MOST`, how many more there are."""
        return (*self._lines, *([f"and {self._more:,} more"] if self._more else []))

    def add(self, line: str, cause: BaseException | None = None) -> None:
        """Note a line. DataError where notes are strict."""
        if self.strict:
            raise DataError(line) from cause
        line = " ".join(line.split())
        line = line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"
        if line not in self._lines and len(self._lines) >= MOST:
            self._more += 1
        else:
            self._lines[line] = None

    def remark(self, line: str) -> None:
        """Note a line that is no reason to stop."""
        if not self.strict:
            self.add(line)

    def of(self, what: str, work: Callable[[], T], otherwise: T) -> T:
        """What `work` returns; `otherwise`, with a note, where what it works on is broken. what: "the curves
        of ppo"."""
        try:
            return work()
        except DataError as error:
            if self.strict:
                raise
            self.add(f"{what}: {error}")
        except BROKEN as error:
            words = " ".join(f"{type(error).__name__}: {error}".split())[:150]
            self.add(f"{what}: here is what no run of keel writes ({words})", error)
        return otherwise


# ---------------------------------------------------------------- single values


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value of JSON is a number that can be reckoned with: finite, and no truth value."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < (LARGEST_INT if isinstance(value, int) else float("inf"))


def short(value: object, most: int) -> str:
    """A value as text of at most so many characters."""
    try:
        text = value if isinstance(value, str) else str(value)
    except (ValueError, RecursionError):  # a number of thousands of digits
        return "…"
    return text if len(text) <= most else f"{text[: most - 1]}…"


def mapping(value: object) -> Mapping[str, Any]:
    """The value where it is an object; {} for anything else."""
    return value if isinstance(value, Mapping) else {}
