"""What YAML has read, as plain values of a size that a config has: bounds that keep a slip, or a trick, from
filling the memory or the terminal before any setting is looked at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from keel.errors import UsageError

DEEPEST = 40  # groups within groups
MOST = 100_000  # values of a whole config
LONGEST = 4000  # characters, the longest path that a system takes; texts aside
_OF_TAGS = (TypeError, KeyError, IndexError, AttributeError, ArithmeticError)
TEXTS = ("chat_template", "description", "pattern", "system", "rewrite", "prompts", "options", "init")


def read_yaml(text: str, loader: type[yaml.SafeLoader]) -> Any:
    """What a text says as YAML. ValueError, in one line, where it is none."""
    try:
        return yaml.load(text, loader)
    except RecursionError:
        raise ValueError("groups within groups are nested too deep") from None
    except yaml.YAMLError as error:
        raise ValueError(_reason(error)) from None
    except ValueError as error:  # a day 31 of June, a number of five thousand digits
        raise ValueError(" ".join(str(error).split())) from None
    except _OF_TAGS as error:  # a tag on what it does not fit: !!int "", !!bool maybe, !!timestamp soon
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"a value is not what its tag (!!…) says ({' '.join(reason.split())[:100]})"
        ) from None


def plain_copy(value: object) -> Any:
    """A copy in which what YAML aliases made one is separate, so that an override changes one place only.

    UsageError, with the key, for texts as long as a book where a name belongs, and groups that hold
    themselves. Which numbers a setting may be is said by `settings.Settings`, for Python as for YAML.
    """
    return _Copy().of(value, ())


class _Copy:
    def __init__(self) -> None:
        self.values = 0

    def of(self, value: object, place: tuple[Any, ...]) -> Any:
        self.values += 1
        if self.values > MOST or len(place) > DEEPEST:
            many = f"more than {MOST:,} values" if self.values > MOST else f"more than {DEEPEST} groups deep"
            raise UsageError(f"{_name(place[:3])} is {many}; an alias (*name) perhaps stands within itself")
        if isinstance(value, Mapping):
            return {key: self.of(item, (*place, key)) for key, item in value.items()}
        if isinstance(value, list | tuple | set):  # a tuple is what !!pairs makes
            return [self.of(item, (*place, number)) for number, item in enumerate(value)]
        if isinstance(value, str) and len(value) > LONGEST and not any(part in TEXTS for part in place):
            raise UsageError(
                f"{_name(place)}: {len(value):,} characters, where at most {LONGEST:,} may stand"
            )
        return value


def _name(place: tuple[Any, ...]) -> str:
    return ".".join(str(part)[:40] for part in place) or "the config"


def _reason(error: yaml.YAMLError) -> str:
    """What is wrong, in one line, with its place, from 1."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem is None:
        return " ".join(str(error).split())
    mark = error.problem_mark
    return error.problem + (f" (line {mark.line + 1}, column {mark.column + 1})" if mark else "")
