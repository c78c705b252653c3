"""Replies that a run kept, by step or model, a page at a time: only where each one stands is held."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from keel.dashboard.table import parse_object
from keel.dashboard.tail import Tail, open_plain

PAGE = 8  # replies of a page
LONGEST_TEXT = 20_000  # characters of one that are sent
MOST_GROUPS = 20_000  # steps or models of a stage that can be chosen
LONGEST_ROW = 8 * 2**20  # bytes
ROWS = 64  # of a Parquet file that are read together
_STEP = re.compile(r"completions_(\d+)\.parquet$")


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a reply stands, and what it is found by."""

    group: str  # "step 10", or a model's name
    key: int  # equal for replies to one prompt
    offset: int  # in the file
    length: int  # bytes, or the row of a Parquet file
    file: Path | None = None


class Group(NamedTuple):
    """Replies of one step, or of one model."""

    name: str
    count: int


class Samples(Protocol):
    """The replies of a stage."""

    def refresh(self) -> None: ...

    @property
    def spots(self) -> list[Spot]: ...

    @property
    def counts(self) -> Mapping[str, int]: ...

    @property
    def epoch(self) -> int: ...  # another one where what was found before is void

    def read(self, spots: list[Spot]) -> list[dict[str, Any]]: ...


class LineSamples:
    """The replies in a samples.jsonl that may still be written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tail = Tail(path)
        self._spots: list[Spot] = []
        self._counts: Counter[str] = Counter()
        self.epoch = 0

    @property
    def spots(self) -> list[Spot]:
        return self._spots

    @property
    def counts(self) -> Mapping[str, int]:
        """Step or model → how many replies, in the order in which they come."""
        return self._counts

    def refresh(self) -> None:
        """Find what is new."""
        for piece in self._tail.read():
            if piece.reset:
                self._spots, self._counts, self.epoch = [], Counter(), self.epoch + 1
            at = piece.offset
            for line in piece.data.splitlines(keepends=True):
                row = parse_object(line) if len(line) <= LONGEST_ROW else None
                if row is not None:
                    spot = Spot(group_of(row), key_of(row), at, len(line))
                    self._spots.append(spot)
                    self._counts[spot.group] += 1
                at += len(line)

    def read(self, spots: list[Spot]) -> list[dict[str, Any]]:
        """The rows at these spots; {} where a row is no longer there."""
        handle = open_plain(self._path)
        if handle is None:
            return [{} for _ in spots]
        with handle:
            rows = []
            for spot in spots:
                handle.seek(spot.offset)
                rows.append(parse_object(handle.read(spot.length)) or {})
            return rows


class ParquetSamples:
    """The replies that TRL's GRPO keeps with `log_completions`: a Parquet file a step in `completions`, or a
    folder below it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._spots: dict[Path, list[Spot]] = {}

    @property
    def epoch(self) -> int:
        return len(self._spots)  # a new file may come before those that were there

    @property
    def spots(self) -> list[Spot]:
        return [spot for path in sorted(self._spots) for spot in self._spots[path]]

    @property
    def counts(self) -> Mapping[str, int]:
        """Step → how many replies."""
        return Counter(spot.group for spot in self.spots)

    def refresh(self) -> None:
        """Find files that are new. One that is half written is tried again at the next look."""
        for path in [
            *self._folder.glob("completions_*.parquet"),
            *self._folder.glob("*/completions_*.parquet"),
        ]:
            match = _STEP.search(path.name)
            if path in self._spots or match is None:
                continue
            keys = _keys(path)
            if keys is None:
                continue
            mode = "" if path.parent == self._folder else f" ({path.parent.name})"
            self._spots[path] = [
                Spot(f"step {int(match[1])}{mode}", key, row, 1, path) for row, key in enumerate(keys)
            ]

    def read(self, spots: list[Spot]) -> list[dict[str, Any]]:
        """The rows at these spots; what is no prompt, reply or step is a reward."""
        wanted: dict[Path, set[int]] = {}
        for spot in spots:
            if spot.file is not None:
                wanted.setdefault(spot.file, set()).add(spot.offset)
        held = {path: _rows(path, numbers) for path, numbers in wanted.items()}
        rows: list[dict[str, Any]] = []
        for spot in spots:
            if spot.file is None:
                continue
            row = dict(held[spot.file].get(spot.offset, {}))
            known = {name: row.pop(name) for name in ("step", "prompt", "completion") if name in row}
            rewards = {k: v for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)}
            rows.append({**known, "rewards": rewards})
        return rows


def _parquet(handle: Any) -> Any:
    """A Parquet file of which texts that are written once are held once, however many rows have them: a file
    of a few kilobytes may stand for as many gigabytes."""
    import pyarrow as pa
    from pyarrow import parquet

    fields = parquet.ParquetFile(handle).schema_arrow
    texts = [one.name for one in fields if pa.types.is_string(one.type) or pa.types.is_large_string(one.type)]
    return parquet.ParquetFile(handle, read_dictionary=texts)


def _keys(path: Path) -> list[int] | None:
    """The key of each row's prompt, a few rows in memory at a time; None for a file that cannot be read."""
    import pyarrow as pa

    handle = open_plain(path, follow=True)
    if handle is None:
        return None
    keys: list[int] = []
    try:
        with handle:
            for batch in _parquet(handle).iter_batches(ROWS, columns=["prompt"]):
                column = batch.column("prompt")
                if isinstance(column, pa.DictionaryArray):
                    places = column.indices.to_pylist()
                    texts = {p: _hash(p if p is None else column.dictionary[p].as_py()) for p in set(places)}
                    keys += [texts[place] for place in places]
                else:
                    keys += [_hash(value.as_py()) for value in column]
    except (pa.ArrowException, OSError, ValueError, KeyError):
        return None
    return keys


def _rows(path: Path, wanted: set[int]) -> dict[int, dict[str, Any]]:
    """Number of a row → the row, of those that are wanted; only they are taken apart."""
    import pyarrow as pa

    found: dict[int, dict[str, Any]] = {}
    handle = open_plain(path, follow=True)
    if handle is None:
        return found
    try:
        with handle:
            file, first = _parquet(handle), 0
            for group in range(file.num_row_groups):
                end = first + file.metadata.row_group(group).num_rows
                own = {row for row in wanted if first <= row < end}
                at = first
                for batch in file.iter_batches(ROWS, row_groups=[group]) if own else ():
                    for row in own:
                        if at <= row < at + batch.num_rows:
                            found[row] = batch.slice(row - at, 1).to_pylist()[0]
                    at += batch.num_rows
                    if at > max(own):
                        break
                first = end
    except (pa.ArrowException, OSError, ValueError):
        pass  # what was read is shown
    return found


def group_of(row: Mapping[str, Any]) -> str:
    """The model of a reply in an evaluation, else its step."""
    if isinstance(row.get("model"), str):
        return str(row["model"])[:300]
    step = row.get("step")
    return f"step {step}" if isinstance(step, int) else "all"


def key_of(row: Mapping[str, Any]) -> int:
    """Equal for replies to one prompt."""
    index = row.get("index")
    return index if isinstance(index, int) else _hash(row.get("prompt"))


def _hash(prompt: object) -> int:
    try:
        text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=str)
    except RecursionError:  # nested as deeply as can just be read
        return 0
    return zlib.crc32(text.encode("utf-8", "replace"))


def groups(samples: Samples) -> list[Group]:
    """Steps or models in the order in which they come, the last ones where there are very many."""
    first = max(len(samples.counts) - MOST_GROUPS, 0)
    return [Group(name, count) for name, count in itertools.islice(samples.counts.items(), first, None)]


def page(left: Samples, right: Samples | None, of: str, beside: str | None, first: int) -> dict[str, Any]:
    """A page of replies of one step or model, each beside one of another to the same prompt; where the two
    have no prompt in common, beside the one in the same place. `right`: the samples that `beside` is of.
    {"total", "same_prompts", "rows": [{"a": row, "b": row or None}]}."""
    ours = [spot for spot in left.spots if spot.group == of]
    theirs = [spot for spot in right.spots if spot.group == beside] if right is not None and beside else []
    by_key: dict[int, list[Spot]] = {}
    for spot in theirs:
        by_key.setdefault(spot.key, []).append(spot)
    same = any(spot.key in by_key for spot in ours)
    partners: list[Spot | None] = []
    used: dict[int, int] = {}
    for place, spot in enumerate(ours):
        if same:
            others, number = by_key.get(spot.key, []), used.get(spot.key, 0)
            used[spot.key] = number + 1
            partners.append(others[number] if number < len(others) else None)
        else:
            partners.append(theirs[place] if place < len(theirs) else None)
    chosen = slice(first, first + PAGE)
    mine = left.read(ours[chosen])
    there = [spot for spot in partners[chosen] if spot is not None]
    read = iter(right.read(there)) if right is not None else iter(())
    rows = [
        {"a": shown(a), "b": shown(next(read)) if partner is not None else None}
        for a, partner in zip(mine, partners[chosen], strict=True)
    ]
    return {"total": len(ours), "same_prompts": same, "rows": rows}


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a page shows of a reply: its texts, cut where they are very long, and every number."""
    found: dict[str, Any] = {"prompt": _turns(row.get("prompt")), "completion": _turns(row.get("completion"))}
    values: dict[str, float | None] = {}
    for name, value in row.items():
        if name in ("rewards", "gold", "extra") and isinstance(value, Mapping):
            prefix = {"rewards": "", "gold": "gold/", "extra": "extra/"}[name]
            for inner, one in list(value.items())[:60]:
                if one is None or _is_number(one):
                    values[f"{prefix}{str(inner)[:100]}"] = one
        elif _is_number(value) and name not in ("step", "index"):
            values[name[:100]] = value
    found["values"] = values
    found["stop_reason"] = str(row.get("stop_reason") or "")[:40]
    found["step"] = row.get("step") if isinstance(row.get("step"), int) else None
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _turns(value: object) -> list[dict[str, str]]:
    """A text, or the turns of a conversation, as [{"role", "text"}]."""
    if isinstance(value, list):
        turns = [turn for turn in value[:200] if isinstance(turn, Mapping)]
        return [{"role": str(turn.get("role") or "")[:40], "text": _content(turn)} for turn in turns]
    return [{"role": "", "text": _cut("" if value is None else str(value))}]


def _content(turn: Mapping[str, Any]) -> str:
    content = turn.get("content")
    if isinstance(content, list):
        content = "\n".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    parts = [str(turn.get("reasoning_content") or ""), str(content or "")]
    if turn.get("tool_calls"):
        with contextlib.suppress(RecursionError):
            parts.append(json.dumps(turn["tool_calls"], ensure_ascii=False, default=str))
    return _cut("\n\n".join(part for part in parts if part))


def _cut(text: str) -> str:
    left_out = len(text) - LONGEST_TEXT
    return text if left_out <= 0 else f"{text[:LONGEST_TEXT]} […{left_out} characters]"
