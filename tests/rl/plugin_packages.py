"""Packages that add something to keel, made and installed for a test: a module, and a .dist-info beside
it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent


def install(folder: Path, name: str, source: str, adds: Mapping[str, Mapping[str, str]]) -> Path:
    """Write the package `name` into a folder that is to be on the path; adds: group → name → object in the
    module."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(dedent(source), encoding="utf-8")
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    points = [
        f"[{group}]\n" + "".join(f"{point} = {name}:{target}\n" for point, target in names.items())
        for group, names in adds.items()
    ]
    (info / "entry_points.txt").write_text("\n".join(points), encoding="utf-8")
    sys.modules.pop(name, None)  # of another test
    return folder
