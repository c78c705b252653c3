"""Sources into one data set: files, folders, hub data sets, worlds, people's votes, and weighted mixtures of
them."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from keel import worlds
from keel.data import files, labels, records
from keel.data.advice import name_of, or_skip, turned_round, unusable
from keel.data.batches import derive_seed, permutation
from keel.data.formats import Conversion
from keel.data.identity import RowKeys
from keel.data.rewriting import Rewriter, chosen, renamed, with_system
from keel.data.stored import cache as caches
from keel.data.stored.records import (
    IN_MEMORY,
    RecordSink,
    Rows,
    StoredRows,
    facts_of,
    joined,
    keys_of_rows,
    picked,
)
from keel.data.stored.tokens import Preparation
from keel.data.unread import UnreadKeys
from keel.data.verdicts import SCORE, is_pointwise, questions_of
from keel.errors import DataError, UsageError
from keel.types import DataSource, Record, RecordType
from keel.worlds import gym

_WORLD = "world:"
_MADE = (_WORLD, gym.PREFIX)  # what begins sources whose rows are made, and lie in no file
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_OPTIONS = ("name", "revision", "data_dir")
_REASONS_KEPT = 5
_LARGE = 1 << 24  # bytes of files from which their rows are looked for in the cache


@dataclass(frozen=True, slots=True)
class Dataset:
    """Validated records, all of one type."""

    records: Sequence[Record]  # a tuple, or from `stored.records.IN_MEMORY` rows on those of a file
    kind: RecordType
    conversational: bool  # any record is a conversation: a chat template is needed
    skipped: int  # bad rows that were left out
    skipped_reasons: tuple[str, ...]  # of the first few
    sources: tuple[str, ...]  # each source in a few words
    keys: RowKeys  # which of the records are the same
    forms: frozenset[str] = frozenset()  # "standard", "conversational": those that its records have


@dataclass(frozen=True, slots=True)
class _Part:
    """What one source gave."""

    source: DataSource
    natural: RecordType  # the type its rows have by themselves
    records: Sequence[Record]
    reasons: tuple[str, ...]  # of the first few skipped rows
    skipped: int
    notes: tuple[str, ...]  # what else is worth a word: a format, columns and keys that are not read


@dataclass(frozen=True, slots=True)
class _StartedSource:
    """A source read as far as its first usable row."""

    source: DataSource
    natural: RecordType
    kinds: tuple[RecordType, ...]  # the accepted types its rows can be read as
    rows: Iterator[files.RawRow]
    rewriter: Rewriter  # that the rows go through
    conversion: Conversion  # that they go through before


def load(
    sources: Sequence[DataSource],
    accept: Sequence[RecordType],
    seed: int,
    preparation: Preparation | None = None,
) -> Dataset:
    """All records of `sources`, as the first type in `accept` that every source can be read as.

    Rows with more than a type needs are narrowed to it (`records.readable_as`); `Dataset.sources` says where.
    In a mixture with weights no row is repeated: the numbers of rows stand in the ratio of the weights, as
    many as the scarcest source allows, drawn and interleaved by `seed`. Without weights all rows are taken,
    source after source. Each record's columns say under "source" which source it came from, in place of a
    column of that name. preparation: where the rows of large sources are kept once they are read.

    Raises UsageError for a source that is not there or settings without effect, DataError for unusable rows.
    """
    if not sources:
        raise UsageError("no data source is given")
    if not accept:
        raise ValueError("accept names no record type")
    _check_settings(sources)
    preparation = preparation or Preparation()
    started = [_start(source, accept, seed, preparation) for source in sources]
    kind = _common_kind(started, accept)
    parts = [_parse_all(one, kind, seed, preparation) for one in started]
    drawn = _mix(parts, seed)
    everything = joined(drawn)
    if sources[0].weight is not None:
        order = permutation(len(everything), derive_seed("interleave", seed), 0)
        mixed = picked(everything, order)
        everything = mixed if isinstance(mixed, Rows) else tuple(mixed)
    reasons = [reason for part in parts for reason in part.reasons]
    forms_of_all = frozenset(facts_of(everything)["forms"])
    return Dataset(
        records=everything,
        kind=kind,
        conversational="conversational" in forms_of_all,
        skipped=sum(part.skipped for part in parts),
        skipped_reasons=tuple(reasons[:_REASONS_KEPT]),
        sources=tuple(_line(part, kind, len(taken), len(parts) > 1) for part, taken in zip(parts, drawn)),
        keys=keys_of_rows(everything),
        forms=forms_of_all,
    )


def summary(dataset: Dataset) -> str:
    """One line: "3,487 rows · preference, standard · hh/helpful.jsonl · 2 skipped"."""
    parts = [f"{len(dataset.records):,} rows", described(dataset), " + ".join(dataset.sources)]
    parts += dataset.keys.repeats().describe(dataset.kind)
    return " · ".join([*parts, f"{dataset.skipped:,} skipped"] if dataset.skipped else parts)


def described(dataset: Dataset) -> str:
    """The records' type and form: "preference, standard", "prompt-only, standard and conversational"."""
    both = len(forms(dataset)) == 2
    return records.describe(dataset.kind, dataset.conversational and not both) + " and conversational" * both


def forms(dataset: Dataset) -> frozenset[str]:
    """The forms that the records have; a mixture may have both, and then each row is read in its own."""
    return dataset.forms


def fingerprint(sources: Sequence[DataSource], cache: caches.Cache | None = None) -> str:
    """sha256 of what `sources` hold: the files' bytes, a world's settings, the rows that votes make, a hub
    data set's own fingerprint, and of tasks of reasoning-gym its version.

    The settings that choose rows (rows, weight, columns, rewrite, …) count; where a file lies does not. A
    world's code is not part of it. cache: knows the digests of files that have not changed, and what votes
    there were when they were first read.
    """
    digest = hashlib.sha256()

    def add(*parts: object) -> None:
        for part in parts:
            content = part if isinstance(part, bytes) else repr(part).encode()
            digest.update(len(content).to_bytes(8, "big") + content)

    for source in sources:
        add(source.rows, source.weight, sorted(source.columns.items()), source.on_bad)
        add(source.format, source.pairs, source.ties, source.strict, sorted(source.where.items()))
        add(*([source.verdicts] if source.verdicts else []))
        add(sorted((key, repr(value)) for key, value in source.options.items() if key != "db"))
        add(
            source.system,
            sorted((column, [*patterns.items()]) for column, patterns in source.rewrite.items()),
        )
        if source.source.startswith(_WORLD):
            add("world", *_world_and_split(source.source))
        elif source.source.startswith(gym.PREFIX):
            add("gym", *gym.name_and_split(source.source), gym.package_version())
        elif labels.is_label(source.source):
            add("label", labels.read(source, cache).digest)
        elif (paths := files.locate(source.source)) is not None:
            add(
                "files",
                len(paths),
                *itertools.chain.from_iterable(
                    (files.suffix_of(p), caches.digest_of(p, cache)) for p in paths
                ),
            )
        else:
            add("hub", source.source, source.split, getattr(_hub(source), "_fingerprint", ""))
    return digest.hexdigest()


def digests(sources: Sequence[DataSource], cache: caches.Cache | None = None) -> dict[str, str]:
    """Path → SHA-256 of each file that sources name; nothing of worlds and of the hub. cache: as of
    `fingerprint`."""
    found: dict[str, str] = {}
    for source in sources:
        if not source.source.startswith(_MADE):
            for path in files.locate(source.source) or ():
                found[str(path)] = caches.digest_of(path, cache).hex()
    return found


# ---------------------------------------------------------------- raw rows


def _check_settings(sources: Sequence[DataSource]) -> None:
    weighted = [source for source in sources if source.weight is not None]
    if weighted and len(sources) == 1:
        raise UsageError(f"{sources[0].source}: `weight` has no effect with a single source")
    if weighted and len(weighted) < len(sources):
        bare = next(source.source for source in sources if source.weight is None)
        raise UsageError(
            f"{bare} has no `weight`, but {weighted[0].source} has: give all sources one, or none"
        )
    for source in weighted:
        if source.weight is not None and not 0 < source.weight < float("inf"):
            raise UsageError(f"{source.source}: `weight` {source.weight} must be a positive number")


def _rows(source: DataSource, seed: int, preparation: Preparation) -> Iterator[files.RawRow]:
    """The source's rows as they are written."""
    name = source.source
    on_hub = False
    if name.startswith(_WORLD):
        rows = _world_rows(source, seed)
    elif name.startswith(gym.PREFIX):
        made = gym.rows(name, source.rows, seed, source.options)
        rows = ((f"{name}:{number}", row) for number, row in enumerate(made, 1))
    elif labels.is_label(name):
        held = labels.read(source, preparation.cache)
        rows = ((f"{labels.shown(name)}:{number}", dict(row)) for number, row in enumerate(held.rows, 1))
    elif (paths := files.locate(name)) is not None:
        folder = Path(name).expanduser().is_dir()
        names = [str(Path(name) / path.name) if folder else name for path in paths]
        rows = itertools.chain.from_iterable(
            files.read(
                path, label, source.columns, partial(preparation.progress, f"reading {path.name} (MB)")
            )
            for path, label in zip(paths, names)
        )
    else:
        on_hub = True
        rows = (
            (f"{name}[{source.split}]:row {number}", files.without_nulls(row))
            for number, row in enumerate(_hub(source), 1)
        )
    if source.split != "train" and not on_hub:
        raise UsageError(f"{name}: `split` has no effect here; it belongs to data sets of the hub")
    if source.options and not on_hub and not name.startswith((*_MADE, labels.PREFIX)):
        raise UsageError(f"{name}: `options` have no effect on a file")
    return rows


def _world_and_split(source: str) -> tuple[str, str]:
    name, slash, split = source.removeprefix(_WORLD).partition("/")
    if not name or not slash or not split:
        splits = f"; {name} has {', '.join(worlds.load(name).splits)}" if name else ""
        raise UsageError(f"{source}: write world:NAME/SPLIT{splits}")
    return name, split


def _world_rows(source: DataSource, seed: int) -> Iterator[files.RawRow]:
    name, split = _world_and_split(source.source)
    made = worlds.load(name).rows(split, source.rows, seed, **source.options)
    return ((f"{source.source}:{number}", dict(row)) for number, row in enumerate(made, 1))


def _hub(source: DataSource) -> Iterable[Any]:
    """A hub data set's split, through the datasets library (cached, and offline if it is in the cache)."""
    if not _HUB_ID.fullmatch(source.source):
        raise UsageError(f"{source.source}: no such file, and not a hub id (OWNER/NAME) either")
    unknown = [key for key in source.options if key not in _HUB_OPTIONS]
    if unknown:
        raise UsageError(f"{source.source}: unknown option {unknown[0]!r}; known: {', '.join(_HUB_OPTIONS)}")
    import datasets  # takes a second to import, and few runs need it

    try:
        return datasets.load_dataset(source.source, split=source.split, **source.options)
    except Exception as error:  # whatever goes wrong in there, the user's question is "where is my data?"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"{source.source}: there is no such file or folder, and the hub data set (split "
            f"{source.split!r}) could not be loaded: {reason}. Without a network, only data sets in the "
            "local cache can be used"
        ) from None


# ---------------------------------------------------------------- records


def _check_verdicts(source: DataSource, accept: Sequence[RecordType]) -> None:
    """UsageError for questions about judged rows where something else is learned from, and for votes whose
    score is on another scale."""
    if source.verdicts is None:
        return
    name, rows = labels.shown(source.source), "comparisons"
    if is_pointwise(source.verdicts):
        rows = "rated replies"
        shares = labels.is_label(source.source) and isinstance(source.verdicts["rubric"], str)
        if shares and SCORE not in source.columns and tuple(source.verdicts["scale"]) != (0, 1):
            raise UsageError(
                f"{name}: the `score` of people's ratings goes from 0 to 1: set `verdicts.scale` to [0, 1], "
                "or name the project's scales as criteria in `verdicts.rubric`"
            )
    if not {"demonstration", "prompt"} & set(accept):
        raise UsageError(f"{name}: `verdicts` makes questions of {rows}: here leave it out")
    if source.verdicts["reasons"] and "prompt" not in accept:
        raise UsageError(
            f"{name}: `verdicts.reasons` makes prompts, since {rows} hold no reasons to learn from: leave it "
            "out here, and train by grpo with it"
        )


def _start(
    source: DataSource, accept: Sequence[RecordType], seed: int, preparation: Preparation
) -> _StartedSource:
    """Read as far as the first row with the columns of an accepted type."""
    _check_verdicts(source, accept)
    wanted: Sequence[RecordType] = accept
    if source.verdicts is not None:
        wanted = ("demonstration",) if is_pointwise(source.verdicts) else ("preference",)
    rewriter, conversion = Rewriter(source), Conversion(source, wanted)
    read = chosen(source, _rows(source, seed, preparation))
    named = (renamed(origin, row, source.columns) for origin, row in read)
    rewritten = (rewriter(origin, row) for origin, row in conversion(named))
    rows = questions_of(source.verdicts, rewritten)
    passed: list[files.RawRow] = []
    first_reason = ""
    for origin, row in rows:
        if not isinstance(row, DataError):
            possible = records.readable_as(row)
            kinds: tuple[RecordType, ...] = tuple(kind for kind in accept if kind in possible)
            if kinds:
                rest = itertools.chain(passed, [(origin, row)], rows)
                return _StartedSource(source, possible[0], kinds, rest, rewriter, conversion)
            row = turned_round(origin, source.columns, row) or unusable(origin, row, accept)
            if source.on_bad == "error":
                raise row
        if source.on_bad == "error":
            raise or_skip(row)
        first_reason = first_reason or str(row)
        passed.append((origin, row))
    if not passed:
        line = conversion.line()
        raise DataError(
            f"{source.source}: no row is left ({line})" if line else f"{source.source} holds no rows"
        )
    raise DataError(f"{source.source}: all {len(passed):,} rows are bad; the first: {first_reason}")


def _common_kind(started: Sequence[_StartedSource], accept: Sequence[RecordType]) -> RecordType:
    for kind in accept:
        if all(kind in one.kinds for one in started):
            return kind
    kinds_of_sources = "; ".join(f"{one.source.source} is {' or '.join(one.kinds)}" for one in started)
    raise DataError(f"the sources of a mixture must have one record type in common: {kinds_of_sources}")


def _parse_all(started: _StartedSource, kind: RecordType, seed: int, preparation: Preparation) -> _Part:
    """The source's first `rows` good records, from the cache if they have been read before."""
    source, cache = started.source, preparation.cache
    name = _name(started, kind, seed, cache)
    if name and (folder := cache.find(name)) is not None:
        rows = StoredRows(folder, cache)
        facts = rows.facts
        known, notes = tuple(facts["reasons"]), tuple(facts["notes"])
        return _Part(source, started.natural, rows, known, facts["skipped"], notes)
    reasons: list[str] = []
    skipped, unread = 0, UnreadKeys(source, kind)
    with RecordSink(cache, lambda: name or _name(started, kind, seed, cache, many=True)) as good:
        for origin, row in started.rows:
            try:
                if isinstance(row, DataError):
                    raise row
                record = with_system(records.parse(row, kind, origin), source.system)
                unread.count(record, origin)
                good.add(_with_source(record, {"source": labels.shown(source.source)}))
            except DataError as error:
                if source.on_bad == "error":
                    raise or_skip(error) from None
                skipped += 1
                reasons += [str(error)] if skipped <= _REASONS_KEPT else []
            if good.count == source.rows:
                break
        if not good.count:
            raise DataError(f"{source.source}: all {skipped:,} rows are bad; the first: {reasons[0]}")
        started.rewriter.check()
        if name and _name(started, kind, seed, cache) != name:
            raise DataError(f"{source.source}: it was changed while it was being read; start again")
        notes = list(filter(None, [started.conversion.line(), *unread.notes()]))
        rows = good.done({"reasons": reasons, "skipped": skipped, "notes": notes})
    return _Part(source, started.natural, rows, tuple(reasons), skipped, tuple(notes))


def _name(
    started: _StartedSource, kind: RecordType, seed: int, cache: caches.Cache, *, many: bool = False
) -> str:
    """What the source's records are called in the cache; "" where they are few enough not to be there. many:
    they are not."""
    source = started.source
    if not many:
        if labels.is_label(source.source):
            return ""
        made = source.source.startswith(_MADE)
        paths = None if made else files.locate(source.source)
        if not cache.keeps or (paths is not None and sum(path.stat().st_size for path in paths) < _LARGE):
            return ""
        if made and (source.rows or 0) <= IN_MEMORY:
            return ""
    content = fingerprint([source], cache)
    return caches.name_of("rows", content, source.source, source.split, kind, started.natural, seed)


def _mix(parts: Sequence[_Part], seed: int) -> list[Sequence[Record]]:
    """The records to take from each part: all, or in the ratio of the weights as many as the scarcest
    allows."""
    weights = [part.source.weight for part in parts if part.source.weight is not None]
    if not weights:
        return [part.records for part in parts]
    scale = min(len(part.records) / weight for part, weight in zip(parts, weights))
    drawn: list[Sequence[Record]] = []
    for index, (part, weight) in enumerate(zip(parts, weights)):
        count = int(weight * scale + 1e-9)  # the scarcest source is used up in spite of rounding
        if count == 0:
            raise DataError(
                f"{part.source.source}: its `weight` {weight:g} leaves it no row beside the others, the "
                f"scarcest of which has {min(len(part.records) for part in parts):,}; raise it, or add rows "
                "to the scarcest"
            )
        order = permutation(len(part.records), derive_seed("mixture", seed, index), 0)
        drawn.append(picked(part.records, order[:count]))
    return drawn


def _with_source(record: Record, source: Mapping[str, Any]) -> Record:
    return replace(record, columns={**record.columns, **source} if record.columns else source)


def _line(part: _Part, kind: RecordType, taken: int, mixed: bool) -> str:
    """The source in a few words, with what is not evident: its share of a mixture, a narrowed type."""
    notes: list[str] = []
    if mixed:
        total = len(part.records)
        notes.append(f"{taken:,} rows" if taken == total else f"{taken:,} of {total:,} rows")
    if part.natural != kind:
        used = "chosen side" if part.natural == "preference" and kind == "demonstration" else kind
        notes.append(f"{used} of {name_of(part.natural)} rows")
    notes += part.notes
    name = _short(part.source.source)
    return f"{name} ({', '.join(notes)})" if notes else name


def _short(source: str) -> str:
    """A long path by its last two parts; votes without the address of their database."""
    path = Path(source)
    return str(Path(*path.parts[-2:])) if path.is_absolute() else labels.shown(source)
