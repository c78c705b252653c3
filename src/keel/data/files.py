"""Files into raw rows. A row that cannot be read is a DataError in its place, so that the caller may skip it.

    .jsonl    an object a line; blank lines are passed over
    .json     an array of objects, or the content of a .jsonl
    .parquet  a row a record
    .csv      a header, then a record a row; `label`, `margin`, `p_chosen`, `votes` and `messages` are read
              as values
    .txt      a record a paragraph: paragraphs are separated by blank lines and become {"text": …}

Each also with .gz after it. A folder stands for the .parquet, .jsonl and .txt files directly in it, sorted by
name, save those that are about the others (README.txt, LICENSE.txt …).
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any

from keel.data.records import OPTIONAL_COLUMNS
from keel.data.values import json_value, nearest
from keel.errors import DataError, UsageError

if TYPE_CHECKING:  # imported where a parquet file is read: a config that names none needs none of it
    import pyarrow

RawRow = tuple[str, dict[str, Any] | DataError]  # where the row stands ("file.jsonl:12"), and the row

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".txt")
_IN_FOLDERS = (".jsonl", ".parquet", ".txt")
_ABOUT = ("readme", "license", "licence", "notice", "copying", "changelog", "citation")
_CSV_NUMBERS = ("margin", "p_chosen")
_WRAPPERS = ("data", "rows", "examples", "items", "instances", "records", "train")
_CSV_VALUES = ("label", "votes", "messages")
DEEPEST = 100  # lists and objects in one another that a row may hold


def locate(source: str) -> list[Path] | None:
    """The files that `source` names, or None if it does not look like a path (then it is a hub id).

    Raises UsageError for a path where nothing is (with the nearest name beside it), a folder without data
    files, a suffix that is not read.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if _is_data(file))
        if not files:
            raise UsageError(f"folder {source} holds no .parquet, .jsonl or .txt files")
        return files
    if path.exists():
        if suffix_of(path) not in SUFFIXES:
            raise UsageError(
                f"{source}: the kind of file is unknown; keel reads {' '.join(SUFFIXES)}, each also .gz"
            )
        return [path]
    if suffix_of(path) not in SUFFIXES and not source.startswith((".", "/", "~")):
        return None
    if not path.parent.is_dir():
        raise UsageError(f"no file {source}: there is no folder {path.parent}")
    close = nearest(path.name, [beside.name for beside in path.parent.iterdir()])
    raise UsageError(f"no file {source}" + (f"; did you mean {path.parent / close}?" if close else ""))


def _is_data(file: Path) -> bool:
    """Whether a file of a folder is one of those that the folder stands for."""
    about = suffix_of(file) == ".txt" and file.name.lower().startswith(_ABOUT)
    return suffix_of(file) in _IN_FOLDERS and not about and file.is_file()


def read(
    path: Path,
    name: str,
    columns: Mapping[str, str] = MappingProxyType({}),
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Iterator[RawRow]:
    """The rows of one file; `name` is what messages call it, `columns` (keel's name → the file's) types CSV
    cells; `progress` is told megabytes that are read, of all, every thousand rows.

    Raises DataError if the file itself is broken.
    """
    try:
        size = path.stat().st_size >> 20
        with path.open("rb") as raw:
            zipped = path.name.lower().endswith(".gz")
            handle: Any = gzip.GzipFile(fileobj=raw) if zipped else raw
            for number, row in enumerate(rows_in(suffix_of(path), handle, name, columns), 1):
                if number % 1000 == 0:
                    progress(raw.tell() >> 20, size)
                yield row
            progress(size, size)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name} cannot be read: {error}") from None


def rows_in(suffix: str, handle: IO[bytes], name: str, columns: Mapping[str, str]) -> Iterator[RawRow]:
    """The rows of an open file, by the suffix that says what is in it."""
    if suffix == ".jsonl":
        yield from _jsonl(handle, name)
    elif suffix == ".json":
        yield from _json(handle.read(), name)
    elif suffix == ".parquet":
        yield from _parquet(io.BytesIO(handle.read()) if isinstance(handle, gzip.GzipFile) else handle, name)
    elif suffix == ".csv":
        yield from _csv(handle, name, {theirs: ours for ours, theirs in columns.items()})
    else:
        yield from _paragraphs(handle, name)


def size_of(source: str) -> int:
    """Bytes of a file, or of the files of a folder, in plain text: compressed ones count threefold. 0 for
    what is no file."""
    path = Path(source).expanduser()
    paths = (
        [path]
        if path.is_file()
        else [file for file in path.iterdir() if _is_data(file)]
        if path.is_dir()
        else []
    )
    packed = (".gz", ".parquet")
    return sum(file.stat().st_size * (3 if file.name.lower().endswith(packed) else 1) for file in paths)


def without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row without optional columns that are null: in a table, null is the only way to leave one out."""
    return {key: value for key, value in row.items() if value is not None or key not in OPTIONAL_COLUMNS}


def suffix_of(path: Path) -> str:
    """The suffix that says how the file is read; .gz does not count."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


# ---------------------------------------------------------------- one reader per format


def _jsonl(lines: Iterable[bytes], name: str) -> Iterator[RawRow]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            origin = f"{name}:{number}"
            try:
                yield origin, _object(_loads(_decoded(line, origin, number == 1).rstrip(), origin), origin)
            except DataError as error:
                yield origin, error


def _json(content: bytes, name: str) -> Iterator[RawRow]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name}:{line}: not UTF-8 (byte 0x{content[error.start]:02x})") from None
    lines = [line for line in text.split("\n") if line.strip()]
    an_object = text.lstrip().startswith("{")
    a_line_each = an_object and len(lines) > 1 and _is_json(lines[0])
    wrapped = _wrapped(text) if an_object and not a_line_each else None
    if a_line_each or (an_object and len(lines) == 1 and wrapped is None):
        yield from _jsonl(io.BytesIO(content), name)
        return
    rows = wrapped if wrapped is not None else _loads(text, name) if lines else []
    if not isinstance(rows, list):
        raise DataError(f"{name} holds one {_kind(rows)}, not an array of rows (or a row a line)")
    for number, row in enumerate(rows, 1):
        origin = f"{name}:row {number}"
        try:
            yield origin, _object(row, origin)
        except DataError as error:
            yield origin, error


def _wrapped(text: str) -> list[Any] | None:
    """The rows of a file that holds one object with a list of them under a name such as "data"; None of any
    other."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return None
    lists = (
        [key for key, value in whole.items() if isinstance(value, list)] if isinstance(whole, dict) else []
    )
    if (
        len(lists) != 1
        or lists[0] not in _WRAPPERS
        or not all(isinstance(row, dict) for row in whole[lists[0]])
    ):
        return None
    return whole[lists[0]]


def _parquet(handle: IO[bytes], name: str) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(handle).iter_batches():
            for row in _rows_of(batch):
                number += 1
                origin = f"{name}:row {number}"
                if isinstance(row, DataError):
                    yield origin, DataError(f"{origin}: {row}")
                else:
                    yield origin, without_nulls(row)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{name} cannot be read as parquet after row {number}: {error}") from None


def _rows_of(batch: pyarrow.RecordBatch) -> Iterator[dict[str, Any] | DataError]:
    """The rows of a batch. Where Python cannot hold a value (a date after the year 9999, text that is not
    UTF-8), row by row: those with such a value are errors."""
    import pyarrow

    try:
        yield from batch.to_pylist()
        return
    except (pyarrow.ArrowException, ValueError, ArithmeticError):
        pass  # nothing was handed out yet: the whole batch is converted before its first row
    for index in range(batch.num_rows):
        row, column = dict[str, Any](), ""
        try:
            for column, values in zip(batch.schema.names, batch.columns):
                row[column] = values[index].as_py()
            yield row
        except (pyarrow.ArrowException, ValueError, ArithmeticError) as error:
            kind = batch.schema.field(column).type
            yield DataError(f'"{column}" holds a {kind} that is out of range or broken: {error}')


def _csv(lines: Iterable[bytes], name: str, renamed: Mapping[str, str]) -> Iterator[RawRow]:
    decoded = (_decoded(line, f"{name}:{number}", number == 1) for number, line in enumerate(lines, 1))
    first = next(decoded, "")
    reader = csv.reader(itertools.chain([first], decoded), delimiter=_delimiter(first), strict=True)
    try:
        header = next(_cells(reader), [])
        if len(set(header)) < len(header):
            raise DataError(f"{name}:1: a column name appears twice in the header")
        start = reader.line_num + 1
        for cells in _cells(reader):
            origin, start = f"{name}:{start}", reader.line_num + 1  # a quoted cell may span lines
            if not cells:
                continue
            if len(cells) != len(header):
                yield origin, DataError(f"{origin}: {len(cells)} cells, but the header has {len(header)}")
            else:
                yield (
                    origin,
                    without_nulls(
                        {key: _cell(renamed.get(key, key), cell) for key, cell in zip(header, cells)}
                    ),
                )
    except csv.Error as error:
        raise DataError(f"{name}:{reader.line_num}: not CSV: {error}") from None


def _cells(reader: Iterator[list[str]]) -> Iterator[list[str]]:
    """The rows of a CSV reader. A cell may hold a whole document: Python's limit of 128 KiB, which is one for
    the whole process, is raised while a row is read, and no longer: several files may be open at a time."""
    while True:
        before = csv.field_size_limit(1 << 30)
        try:
            row = next(reader, None)
        finally:
            csv.field_size_limit(before)
        if row is None:
            return
        yield row


def _delimiter(header: str) -> str:
    """What stands between the cells: a semicolon or a tab (as spreadsheets write them where the comma is the
    decimal sign) if the header has one and no comma."""
    return next((mark for mark in ";\t" if mark in header and "," not in header), ",")


def _cell(column: str, text: str) -> Any:
    """CSV knows only text; columns that cannot be text are read as JSON, and left as they are if they are
    not."""
    if column in OPTIONAL_COLUMNS and not text.strip():
        return None
    try:
        if column in _CSV_NUMBERS:
            return float(text)
        if column in _CSV_VALUES:
            return json_value(text.lower() if column == "label" else text)
    except ValueError:
        pass
    return text


def _paragraphs(lines: Iterable[bytes], name: str) -> Iterator[RawRow]:
    paragraph: list[str] = []
    start = number = 0
    for number, line in enumerate(lines, 1):
        text = _decoded(line, f"{name}:{number}", number == 1).rstrip("\r\n")
        if text.strip():
            start = start or number
            paragraph.append(text)
        elif paragraph:
            yield f"{name}:{start}", {"text": "\n".join(paragraph)}
            paragraph, start = [], 0
    if paragraph:
        yield f"{name}:{start}", {"text": "\n".join(paragraph)}


# ---------------------------------------------------------------- text and JSON


def _decoded(line: bytes, origin: str, first: bool) -> str:
    try:
        return line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        position = f"byte 0x{line[error.start]:02x} at position {error.start + 1}"
        raise DataError(f"{origin}: not UTF-8 ({position}); save the file as UTF-8") from None


def _loads(text: str, origin: str) -> Any:
    """What a text says as JSON; an object that has a key twice as `_Twice`."""
    try:
        return json.loads(text, object_pairs_hook=_each_key_once)
    except json.JSONDecodeError as error:
        where = f"{origin}:{error.lineno}" if error.lineno > 1 else origin
        raise DataError(f"{where}: not JSON at column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise DataError(f"{origin}: not readable as JSON: {error}") from None


def _is_json(text: str) -> bool:
    try:
        json_value(text)
    except ValueError:
        return False
    return True


def _object(value: object, origin: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{origin}: a row must be an object {{column: value}}, this one is: {_kind(value)}")
    if isinstance(value, _Twice):
        raise DataError(f'{origin}: the key "{value.key}" appears twice')
    for column, inner in value.items():
        if (problem := _unusable(inner)) is not None:
            raise DataError(f'{origin}: "{column}" {problem}')
    return value


class _Twice(dict[str, Any]):
    """An object of JSON in which a key is written twice: one of its values is lost."""

    key: str = ""


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys, found = [key for key, _ in pairs], _Twice(pairs)
        found.key = next(key for key in keys if keys.count(key) > 1)
    return found


def _kind(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "number")


def _unusable(value: object) -> str | None:
    """What is wrong with a JSON value: a NaN or an infinity and a key that is written twice, which Python's
    reader lets through, or more than `DEEPEST` lists and objects in one another."""
    level: list[object] = [value]
    for depth in range(DEEPEST + 1):
        below: list[object] = []
        for inner in level:
            if isinstance(inner, float) and not math.isfinite(inner):
                shown = "NaN" if math.isnan(inner) else "infinite"
                return f"is {shown}; JSON has no such number, leave the column out"
            if isinstance(inner, _Twice):
                return f'holds an object in which the key "{inner.key}" appears twice'
            if isinstance(inner, (dict, list)):
                if depth == DEEPEST:
                    return f"holds more than {DEEPEST} lists and objects in one another"
                below += inner.values() if isinstance(inner, dict) else inner
        level = below
    return None
