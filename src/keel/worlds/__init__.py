"""Synthetic tasks whose true reward is known: the embedded default, and a place to measure over-optimisation.

A world makes rows as a `.jsonl` file would hold them and judges completions by a gold reward that no stage
trains on. Each world is a module with the attributes of `World`. Same split and seed, same rows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from keel.errors import UsageError
from keel.types import Conversation
from keel.worlds import arithmetic, helpdesk, shop
from keel.worlds.streams import unknown


class World(Protocol):
    """What a world offers."""

    name: str
    splits: Mapping[str, str]  # split → what it holds, in a line

    def rows(self, split: str, rows: int | None, seed: int, **options: Any) -> Iterator[dict[str, Any]]:
        """`rows` rows of `split` (the split's own default when None). Row i does not depend on `rows`.

        Raises UsageError, at the call, for an unknown split or option and for a negative count.
        """
        ...

    def gold(self, prompt: str, completion: str, columns: Mapping[str, Any]) -> dict[str, float]:
        """The true reward of `completion` for the user's message `prompt`: parts and "total", each in [0, 1].

        `columns` are the other columns of the prompt's row. Raises DataError when neither they nor the
        prompt say what would have been right.
        """
        ...


class Annotators(Protocol):
    """What a world offers besides that has people to ask."""

    def votes(
        self, prompt: str, a: str, b: str, columns: Mapping[str, Any], rng: random.Random
    ) -> list[tuple[str, str]]:
        """(annotator, "a" | "b" | "tie") of some annotators of two replies to the user's message `prompt`.

        Raises DataError where `gold` would.
        """
        ...


_WORLDS: dict[str, World] = {"helpdesk": helpdesk, "arithmetic": arithmetic, "shop": shop}


class Dialogues(Protocol):
    """What a world offers besides that has an environment with tools."""

    def gold_of_turns(self, turns: Conversation, columns: Mapping[str, Any]) -> dict[str, float]:
        """As `gold`, of a whole episode: the model's turns with their calls, and the tools' answers."""
        ...


def load(name: str) -> World:
    """The world called `name`; UsageError with the nearest name and all known ones when there is none."""
    if name not in _WORLDS:
        raise unknown("world", name, _WORLDS)
    return _WORLDS[name]


def annotators(name: str) -> Annotators:
    """The annotators of the world called `name`; UsageError where there is no such world, or it has none."""
    world: Any = load(name)
    if not hasattr(world, "votes"):
        able = ", ".join(f"world:{other}" for other, one in _WORLDS.items() if hasattr(one, "votes"))
        raise UsageError(f"world:{name} has no annotators; these have some: {able}")
    return world


def environment(name: str) -> Callable[[], Any]:
    """What makes the environment of the world called `name`; UsageError where there is no such world, or it
    has none."""
    world: Any = load(name)
    if not hasattr(world, "Environment"):
        able = ", ".join(f"world:{other}" for other, one in _WORLDS.items() if hasattr(one, "Environment"))
        raise UsageError(f"world:{name} has no environment; these have one: {able}")
    return world.Environment
