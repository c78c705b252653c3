"""Why a stage is run again: what differs between what it was made of and what it would be made of now."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

SHOWN = 3  # differences that are named one by one
ABSENT = "nothing"  # how a setting is shown that one side does not have


def reason(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What changed, in words: "settings changed (kl.coef 0.05 → 0.1) and the code of keel changed".

    Both are the parts of a fingerprint (`Pipeline.parts`). Parts that only one side has count as changed.
    """
    changed = [key for key in {**now, **before} if before.get(key) != now.get(key)]
    found: list[str] = []
    if "settings" in changed:
        found.append(f"settings changed ({_listed(before.get('settings'), now.get('settings'))})")
    for key in ("seed", "threads", "device", "accel", "date"):
        if key in changed:
            found.append(f"{key} changed ({_shown(before.get(key))} → {_shown(now.get(key))})")
    if "inputs" in changed:
        names = [name for name, *_ in _differences(before.get("inputs"), now.get("inputs"))]
        found.append(f"{', '.join(map(repr, names))} changed, which it starts from")
    if "data" in changed:
        found.append("its data changed")
    if "rewards" in changed:
        found.append("the code of its reward functions changed")
    if "plugins" in changed:
        names = [name for name, *_ in _differences(before.get("plugins") or {}, now.get("plugins") or {})]
        if names:  # a run by an older keel has no such part
            found.append(f"what other packages add to it changed ({', '.join(names)})")
    if "code" in changed:
        found.append(f"keel's code changed{_files(before.get('code'), now.get('code'))}")
    if "versions" in changed:
        found.append(f"versions changed ({_listed(before.get('versions'), now.get('versions'))})")
    return " and ".join(found) or "what it is made of changed"


def _files(before: object, now: object) -> str:
    """ " (rl/loop.py, rl/ppo.py and 2 more)": the files that differ. "" for a run by an older keel, which
    kept one hash of all its code."""
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        return ""
    files = sorted(file for file in {**before, **now} if before.get(file) != now.get(file))
    more = f" and {len(files) - SHOWN} more" if len(files) > SHOWN else ""
    return f" ({', '.join(files[:SHOWN])}{more})"


def _listed(before: object, now: object) -> str:
    """ "kl.coef 0.05 → 0.1, lr 1e-05 → 2e-05 and 2 more"."""
    found = list(_differences(before, now))
    lines = [f"{place} {_shown(old)} → {_shown(new)}" for place, old, new in found[:SHOWN]]
    return ", ".join(lines) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")


def _differences(before: object, now: object, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted place, old, new) of each leaf that differs; a list counts as a mapping from positions."""
    if isinstance(before, list) and isinstance(now, list):
        before, now = dict(enumerate(before)), dict(enumerate(now))
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in {**before, **now}:
            inner = f"{place}.{key}" if place else str(key)
            yield from _differences(before.get(key, ABSENT), now.get(key, ABSENT), inner)
    elif before != now:
        yield place, before, now


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:39]}…"
