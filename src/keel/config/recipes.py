"""The recipes that come with keel: complete configs, found by name."""

from __future__ import annotations

import difflib
from pathlib import Path

import keel
from keel.errors import UsageError


def folder() -> Path:
    """Where they lie: inside the package once it is installed, beside `src` in a checkout."""
    package = Path(keel.__file__).parent
    return next(place for place in (package / "recipes", package.parents[1] / "recipes") if place.exists())


def names() -> list[str]:
    """The names of all recipes, sorted."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def path_of(name: str) -> Path:
    """The file of the recipe `name`, with or without `.yaml`. UsageError names the nearest and all known
    ones."""
    path = folder() / f"{name.removesuffix('.yaml')}.yaml"
    if path.exists():
        return path
    close = difflib.get_close_matches(path.stem, names(), n=1, cutoff=0.6)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise UsageError(f"no config or recipe {name!r}{hint}; recipes: {', '.join(names())}")


def config_path(place: Path) -> Path:
    """The file of a config: `place` itself, or the recipe of that name where it is neither a file nor a
    file's name."""
    return place if place.is_file() or place.suffix else path_of(str(place))
