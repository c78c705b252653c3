"""Any data set of two replies and a column that says which is better, as the config describes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from keel.data.formats.base import Format, Made, Row, pair, rest, value_of
from keel.data.values import shown

KEYS = ("first", "second", "label", "first_wins", "second_wins", "ties")


def labelled(settings: Mapping[str, Any]) -> Format:
    """settings: `first`, `second` and `label` name columns; `first_wins`, `second_wins` and `ties` list the
    label's values. A value in none of them is a bad row. ValueError for settings that are not these."""
    odd = next((key for key in settings if key not in KEYS), None)
    if odd is not None:
        raise ValueError(f"`pairs` has no key {odd!r}; it has {', '.join(KEYS)}")
    missing = next((key for key in KEYS[:-1] if not settings.get(key)), None)
    if missing is not None:
        raise ValueError(f"`pairs` needs `{missing}`")
    first, second, label = (settings[name] for name in ("first", "second", "label"))
    better = {
        _key(value): sign
        for name, sign in (("first_wins", 1.0), ("second_wins", -1.0), ("ties", 0.0))
        for value in settings.get(name) or ()
    }

    def rows(group: Any) -> Iterable[Made]:
        row: Row = group[0]
        value = value_of(row, label)
        if _key(value) not in better:
            raise ValueError(f'"{label}" is {shown(value)}, which is none of the values that `pairs` lists')
        columns = {name: value for name, value in rest(row, first, second).items() if name != label}
        replies = value_of(row, first), value_of(row, second)
        yield pair(value_of(row, "prompt"), *replies, better[_key(value)], columns=columns)

    return Format("pairs", f"pairs by {label}", "preference", (), rows)


def _key(value: Any) -> str:
    """How values are compared: as text, so that 1 of a config meets "1" of a CSV file; true is not 1."""
    return str(value).strip()
