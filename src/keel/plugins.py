"""What other packages add to keel, by entry points: found by name, loaded when first asked for.

A package that declares `[project.entry-points."keel.rewards"] brief = "their_package:brief"` makes `brief` a
name that a config may use. Importing keel loads none of them.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal

from keel.errors import UsageError

Group = Literal[
    "keel.stages",
    "keel.rewards",
    "keel.policy_losses",
    "keel.advantages",
    "keel.engines",
    "keel.trackers",
]
GROUPS: dict[Group, str] = {
    "keel.stages": "a kind of stage",
    "keel.rewards": "a reward",
    "keel.policy_losses": "a policy loss",
    "keel.advantages": "an advantage estimator",
    "keel.engines": "a rollout engine",
    "keel.trackers": "an experiment tracker",
}
SETTLED = 2_000_000_000  # ns without a change, after which a folder of packages is taken to be whole


def names(group: Group) -> tuple[str, ...]:
    """The names that installed packages add to a group, sorted."""
    return tuple(sorted({point.name for point in _points(group)}))


def _points(group: Group) -> tuple[EntryPoint, ...]:
    """What installed packages add to a group."""
    where = tuple((place, _changed(place)) for place in map(os.path.abspath, sys.path))
    if time.time_ns() - max((changed for _, changed in where), default=0) < SETTLED:
        return tuple(entry_points(group=group))  # a package may be on its way in or out
    return _points_of(group, where, entry_points)


@lru_cache(maxsize=2 * len(GROUPS))
def _points_of(
    group: Group, where: tuple[tuple[str, int], ...], read: Callable[..., Iterable[EntryPoint]]
) -> tuple[EntryPoint, ...]:
    """The same, kept until a folder that Python imports from changes: whatever is installed or removed is
    an entry of such a folder. Reading it takes 7 ms, and a plan asks fifty times."""
    return tuple(read(group=group))


def _changed(place: str) -> int:
    """When an entry came to a folder or left it, in ns; 0 where there is none."""
    try:
        return os.stat(place).st_mtime_ns
    except OSError:
        return 0


def load(group: Group, name: str) -> Any:
    """What stands behind a name. UsageError for a name that nobody adds, one that two packages add, and one
    whose package cannot be imported."""
    point = point_of(group, name)
    try:
        return point.load()
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(f"{GROUPS[group]} {name!r} of {_owner(point)} cannot be loaded: {reason}") from error


def fingerprint(group: Group, name: str) -> str:
    """A hash of what stands behind a name: its distribution, its version, and the source of its whole
    package.

    UsageError as `load` raises it.
    """
    load(group, name)
    point = point_of(group, name)
    digest = hashlib.sha256(f"{_owner(point)}\0{point.value}\0".encode())
    top = Path(sys.modules[point.module.partition(".")[0]].__file__ or "")
    for path in sorted(top.parent.rglob("*.py")) if top.name == "__init__.py" else [top]:
        if path.is_file():
            digest.update(f"{path.relative_to(top.parent)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def point_of(group: Group, name: str) -> EntryPoint:
    """The entry point of a name, not imported. UsageError for a name that nobody adds or two packages add."""
    points = [point for point in _points(group) if point.name == name]
    if not points:
        near = get_close_matches(name, names(group), 1, 0.6)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"no installed package adds {GROUPS[group]} {name!r}{hint}")
    if len({point.value for point in points}) > 1:
        owners = ", ".join(sorted(map(_owner, points)))
        raise UsageError(f"{GROUPS[group]} {name!r} is added by several packages: {owners}; keep one of them")
    return points[0]


def _owner(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else point.value
