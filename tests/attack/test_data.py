"""Data files of every format, broken in every way: read rightly, or refused by file and row.

Each hand-made file says what becomes of it. The drawn ones are checked against what was written, or where
they are broken, against what holds of any file: an error that names the file, or records that are sound.
"""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keel.data import load
from keel.errors import DataError, KeelError
from keel.types import DataSource

pytestmark = pytest.mark.attack

DRAWN = 1000  # files of each of the two kinds below
LONGEST = 30.0  # seconds that any file may take
KINDS: Any = ("preference", "unpaired", "demonstration", "text", "prompt")
GOOD = {"prompt": "a b?", "completion": " c."}
ANSWER = {"prompt": "a", "completion": "b"}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
LINE = json.dumps(GOOD).encode() + b"\n"


def read(path: Path, *, skip: bool = False, **more: Any) -> Any:
    began = time.monotonic()
    source = DataSource(str(path), on_bad="skip" if skip else "error", **more)
    try:
        return load.load([source], KINDS, 0)
    finally:
        assert time.monotonic() - began < LONGEST


def jsonl(*rows: Any) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def parquet(table: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(
        table if isinstance(table, pyarrow.Table) else pyarrow.table(table), buffer, **options
    )
    return buffer.getvalue()


def broken(content: bytes, at: int, by: bytes = b"\xff" * 8) -> bytes:
    return content[:at] + by + content[at + len(by) :]


def nested(depth: int) -> bytes:
    return b'{"prompt": "a", "completion": "b", "more": ' + b"[" * depth + b"]" * depth + b"}\n"


def nested_objects(depth: int) -> bytes:
    return b'{"prompt": "a", "completion": "b", "more": ' + b'{"a":' * depth + b"1" + b"}" * depth + b"}\n"


TABLE = {"prompt": ["a?", "b?"], "completion": ["c", "d"]}
PARQUET = parquet(TABLE)
PACKED = gzip.compress(LINE * 200)
FAR = pyarrow.array([2**62, 0], pyarrow.timestamp("us"))
ODD_TYPES = {
    "binary": pyarrow.array([b"\xff\xfe", b"x"]),
    "decimal": pyarrow.array([__import__("decimal").Decimal("1.5"), None], pyarrow.decimal128(5, 2)),
    "duration": pyarrow.array([10**15, 1], pyarrow.duration("s")),
    "time": pyarrow.array([datetime.time(1, 2), None]),
    "date": pyarrow.array([datetime.date(2020, 1, 1), None]),
    "map": pyarrow.array([[("a", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
    "null": pyarrow.nulls(2),
    "nan": pyarrow.array([float("nan"), 1.0]),
    "dictionary": pyarrow.array(["x", "y"]).dictionary_encode(),
    "list": pyarrow.array([[1, 2], None]),
    "struct": pyarrow.array([{"a": {"b": [1]}}, None]),
    "uint64": pyarrow.array([2**64 - 1, 0], pyarrow.uint64()),
    "half": pyarrow.array([1.5, 2.5], pyarrow.float16()),
    "large": pyarrow.array(["x", "y"], pyarrow.large_string()),
    "view": pyarrow.array(["x", "y"], pyarrow.string_view()),
}
# name of the file → its content, and what becomes of it: the number of rows, or words of the refusal
FILES: dict[str, tuple[bytes, int | str]] = {
    # ---- compressed
    "cut.jsonl.gz": (PACKED[:-20], "cannot be read"),
    "cut-early.jsonl.gz": (PACKED[:12], "cannot be read"),
    "header-only.jsonl.gz": (PACKED[:5], "cannot be read"),
    "empty.jsonl.gz": (b"", "holds no rows"),
    "flipped.jsonl.gz": (broken(PACKED, len(PACKED) // 2), "cannot be read"),
    "sum.jsonl.gz": (broken(PACKED, len(PACKED) - 8), "cannot be read"),
    "tail.jsonl.gz": (PACKED + b"garbage", "cannot be read"),
    "zeros.jsonl.gz": (PACKED + b"\0" * 64, 200),
    "two.jsonl.gz": (gzip.compress(LINE) + gzip.compress(LINE), 2),
    "plain.jsonl.gz": (LINE, "cannot be read"),
    "twice.jsonl.gz": (gzip.compress(gzip.compress(LINE)), "twice.jsonl.gz:1"),
    "packed.jsonl": (gzip.compress(LINE), "packed.jsonl:1"),
    "cut.parquet.gz": (gzip.compress(PARQUET)[:-9], "cannot be read"),
    "whole.parquet.gz": (gzip.compress(PARQUET), 2),
    "whole.csv.gz": (gzip.compress(b"prompt,completion\na,b\n"), 1),
    # ---- encodings
    "bom.jsonl": (b"\xef\xbb\xbf" + LINE, 1),
    "bom-twice.jsonl": (b"\xef\xbb\xbf\xef\xbb\xbf" + LINE, "bom-twice.jsonl:1"),
    "bom-inside.jsonl": (LINE + b"\xef\xbb\xbf" + LINE, "bom-inside.jsonl:2"),
    "utf16.jsonl": (LINE.decode().encode("utf-16"), "utf16.jsonl:1"),
    "utf16le.jsonl": (LINE.decode().encode("utf-16-le"), "utf16le.jsonl:1"),
    "utf32.jsonl": (LINE.decode().encode("utf-32"), "utf32.jsonl:1"),
    "latin.jsonl": ('{"prompt": "é", "completion": "b"}\n'.encode("latin-1"), "latin.jsonl:1: not UTF-8"),
    "latin.csv": ("prompt,completion\né,b\n".encode("latin-1"), "latin.csv:2: not UTF-8"),
    "latin.txt": ("é\n".encode("latin-1"), "latin.txt:1: not UTF-8"),
    "latin.json": ('[{"prompt": "é", "completion": "b"}]'.encode("latin-1"), "latin.json:1: not UTF-8"),
    "overlong.jsonl": (b'{"prompt": "\xc0\x80", "completion": "b"}\n', "overlong.jsonl:1: not UTF-8"),
    "surrogate.jsonl": (b'{"prompt": "\\ud800", "completion": "b"}\n', "surrogate.jsonl:1"),
    "surrogate-key.jsonl": (b'{"prompt": "a", "completion": "b", "\\udfff": 1}\n', 1),
    "surrogate-column.jsonl": (b'{"prompt": "a", "completion": "b", "c": "\\udfff"}\n', 1),
    "pair.jsonl": (b'{"prompt": "\\ud83d\\ude00", "completion": "b"}\n', 1),
    "surrogate-turn.jsonl": (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\\ud800"}]}\n',
        "surrogate-turn.jsonl:1",
    ),
    "surrogate-utf8.jsonl": (b'{"prompt": "\xed\xa0\x80", "completion": "b"}\n', "surrogate-utf8.jsonl:1"),
    "nul.jsonl": (b'{"prompt": "a\0", "completion": "b"}\n', "nul.jsonl:1"),
    "nul-escaped.jsonl": (b'{"prompt": "a\\u0000", "completion": "b"}\n', 1),
    "nuls.jsonl": (b"\0" * 1000, "nuls.jsonl:1"),
    "nul-tail.jsonl": (LINE + b"\0" * 100, "nul-tail.jsonl:2"),
    "nul.csv": (b"prompt,completion\na\0,b\n", 1),
    "nul.txt": (b"a\0b\n", 1),
    "control.jsonl": (b'{"prompt": "a\x1b[31m", "completion": "b"}\n', "control.jsonl:1"),
    "escape.jsonl": (b'{"prompt": "\\u001b[31ma", "completion": "b"}\n', 1),
    # ---- JSON lines
    "empty.jsonl": (b"", "empty.jsonl holds no rows"),
    "blank.jsonl": (b"\n \n\t\n", "blank.jsonl holds no rows"),
    "crlf.jsonl": (LINE.replace(b"\n", b"\r\n") * 2, 2),
    "cr.jsonl": (LINE.replace(b"\n", b"\r") * 2, "cr.jsonl:1"),
    "no-end.jsonl": (LINE + LINE.rstrip(), 2),
    "cut.jsonl": (LINE + LINE[:-9], "cut.jsonl:2"),
    "two-on-a-line.jsonl": (LINE.rstrip() * 2 + b"\n", "two-on-a-line.jsonl:1"),
    "comma.jsonl": (LINE.rstrip() + b",\n", "comma.jsonl:1"),
    "single-quotes.jsonl": (b"{'prompt': 'a', 'completion': 'b'}\n", "single-quotes.jsonl:1"),
    "array.jsonl": (b'["a", "b"]\n', "array.jsonl:1: a row must be an object"),
    "number.jsonl": (b"12\n", "number.jsonl:1"),
    "null.jsonl": (b"null\n", "null.jsonl:1"),
    "string.jsonl": (b'"prompt"\n', "string.jsonl:1"),
    "nan.jsonl": (b'{"prompt": "a", "completion": "b", "x": NaN}\n', 'nan.jsonl:1: "x" is NaN'),
    "infinite.jsonl": (b'{"prompt": "a", "completion": "b", "x": [1, -Infinity]}\n', "infinite.jsonl:1"),
    "1e999.jsonl": (b'{"prompt": "a", "completion": "b", "x": 1e999}\n', "1e999.jsonl:1"),
    "digits.jsonl": (b'{"prompt": "a", "completion": "b", "x": ' + b"9" * 5000 + b"}\n", "digits.jsonl:1"),
    "many-digits.jsonl": (b'{"prompt": "a", "completion": "b", "x": ' + b"9" * 4000 + b"}\n", 1),
    "nested-100.jsonl": (nested(100), 1),
    "nested-600.jsonl": (nested(600), "nested-600.jsonl:1"),
    "nested-990.jsonl": (nested(990), "nested-990.jsonl:1"),
    "nested-100000.jsonl": (nested(100_000), "nested-100000.jsonl:1"),
    "objects-600.jsonl": (nested_objects(600), "objects-600.jsonl:1"),
    "objects-990.jsonl": (nested_objects(990), "objects-990.jsonl:1"),
    "objects-100000.jsonl": (nested_objects(100_000), "objects-100000.jsonl:1"),
    "twice-named.jsonl": (b'{"prompt": "a", "prompt": "b", "completion": "c"}\n', "twice-named.jsonl:1"),
    "long.jsonl": (jsonl({"prompt": "a " * 10**6, "completion": "b"}), 1),
    "long-key.jsonl": (jsonl({"prompt": "a", "completion": "b", "k" * 10**6: 1}), 1),
    "many-columns.jsonl": (jsonl({**GOOD, **{f"c{i}": i for i in range(20_000)}}), 1),
    "no-columns.jsonl": (b"{}\n", "no-columns.jsonl:1"),
    "null-prompt.jsonl": (jsonl({"prompt": None, "completion": "b"}), "null-prompt.jsonl:1"),
    "number-prompt.jsonl": (jsonl({"prompt": 3, "completion": "b"}), "number-prompt.jsonl:1"),
    "true-prompt.jsonl": (jsonl({"prompt": True, "completion": "b"}), "true-prompt.jsonl:1"),
    "object-prompt.jsonl": (jsonl({"prompt": {"a": 1}, "completion": "b"}), "object-prompt.jsonl:1"),
    "list-prompt.jsonl": (jsonl({"prompt": [1, 2], "completion": "b"}), "list-prompt.jsonl:1"),
    "empty-list.jsonl": (jsonl({"prompt": [], "completion": "b"}), "empty-list.jsonl:1"),
    "empty-text.jsonl": (jsonl({"text": ""}), "empty-text.jsonl:1"),
    "spaces.jsonl": (jsonl({"text": " \u2003\u200b "[:2]}), "spaces.jsonl:1"),
    "mixed.jsonl": (jsonl(GOOD, {"text": "a"}), "mixed.jsonl:2"),
    "mixed-turns.jsonl": (jsonl(GOOD, {"prompt": [{"role": "user", "content": "a"}], "completion": "b"}), 2),
    "same-sides.jsonl": (jsonl({"prompt": "a", "chosen": "b", "rejected": "b"}), "same-sides.jsonl:1"),
    "label-two.jsonl": (jsonl({**ANSWER, "label": 2}), "label-two.jsonl:1"),
    "label-text.jsonl": (jsonl({**ANSWER, "label": "yes"}), "label-text.jsonl:1"),
    "p-chosen.jsonl": (jsonl({**PAIR, "p_chosen": 2}), "p-chosen.jsonl:1"),
    "p-text.jsonl": (jsonl({**PAIR, "p_chosen": "1"}), "p-text.jsonl:1"),
    "margin.jsonl": (jsonl({**PAIR, "margin": []}), "margin.jsonl:1"),
    "huge-margin.jsonl": (
        jsonl({**PAIR, "margin": 10**400}),
        "huge-margin.jsonl:1",
    ),
    "votes.jsonl": (jsonl({**PAIR, "votes": [1]}), "votes.jsonl:1"),
    "votes-text.jsonl": (jsonl({**PAIR, "votes": "x"}), "votes-text.jsonl:1"),
    "votes-huge.jsonl": (
        jsonl({**PAIR, "votes": {"chosen": 10**12}}),
        "votes-huge.jsonl:1",
    ),
    "votes-below.jsonl": (
        jsonl({**PAIR, "votes": {"chosen": -1}}),
        "votes-below.jsonl:1",
    ),
    "turns-role.jsonl": (jsonl({"messages": [{"role": 3, "content": "a"}]}), "turns-role.jsonl:1"),
    "turns-content.jsonl": (jsonl({"messages": [{"role": "user", "content": 3}]}), "turns-content.jsonl:1"),
    "turns-text.jsonl": (jsonl({"messages": ["a"]}), "turns-text.jsonl:1"),
    "turns-null.jsonl": (jsonl({"messages": [None]}), "turns-null.jsonl:1"),
    "turns-object.jsonl": (jsonl({"messages": {"role": "user", "content": "a"}}), "turns-object.jsonl:1"),
    "turns-calls.jsonl": (
        jsonl({"messages": [TURNS[0], {**TURNS[1], "tool_calls": 3}]}),
        "turns-calls.jsonl:1",
    ),
    "turns-tools.jsonl": (
        jsonl({"messages": TURNS, "tools": "x"}),
        "turns-tools.jsonl:1",
    ),
    "turns-weight.jsonl": (
        jsonl({"messages": [TURNS[0], {**TURNS[1], "weight": "x"}]}),
        "turns-weight.jsonl:1",
    ),
    # ---- JSON
    "empty.json": (b"", "empty.json holds no rows"),
    "array.json": (b"[]", "array.json holds no rows"),
    "number.json": (b"3", "number.json holds one number"),
    "null.json": (b"null", "null.json holds one null"),
    "cut.json": (b'[{"prompt": "a", "completion": "b"}', "cut.json"),
    "inner.json": (b'[{"prompt": "a", "completion": "b"}, 3]', "inner.json:row 2"),
    "object.json": (b'{"prompt": "a", "completion": "b"}', 1),
    "lines.json": (LINE * 3, 3),
    "wrapped.json": (b'{"data": [\n{"prompt": "a", "completion": "b"}\n]}', 1),
    "brackets.json": (b"[" * 100_000, "brackets.json"),
    "deep.json": (b"[" + nested_objects(990).rstrip() + b"]", "deep.json"),
    # ---- parquet
    "cut.parquet": (PARQUET[:-10], "cut.parquet"),
    "half.parquet": (PARQUET[: len(PARQUET) // 2], "half.parquet"),
    "magic.parquet": (b"PAR1", "magic.parquet"),
    "empty.parquet": (b"", "empty.parquet"),
    "text.parquet": (LINE, "text.parquet"),
    "footer.parquet": (broken(PARQUET, len(PARQUET) - 8), "footer.parquet"),
    "no-rows.parquet": (parquet({"prompt": pyarrow.array([], pyarrow.string())}), "no-rows.parquet"),
    "no-columns.parquet": (parquet(pyarrow.table({})), "no-columns.parquet"),
    "wrong.parquet": (parquet({"x": [1, 2]}), "wrong.parquet:row 1"),
    "numbers.parquet": (parquet({"prompt": [1, 2], "completion": [3, 4]}), "numbers.parquet:row 1"),
    "dates.parquet": (parquet({**TABLE, "when": FAR}), "dates.parquet:row 1"),
    "not-utf8.parquet": (
        parquet({"prompt": pyarrow.array([b"\xff"]).view(pyarrow.string()), "completion": ["b"]}),
        "not-utf8.parquet:row 1",
    ),
    "groups.parquet": (parquet(TABLE, row_group_size=1), 2),
    **{f"odd-{name}.parquet": (parquet({**TABLE, "more": value}), 2) for name, value in ODD_TYPES.items()},
    "odd-duration.parquet": (parquet({**TABLE, "more": ODD_TYPES["duration"]}), "odd-duration.parquet:row 1"),
    # ---- CSV
    "empty.csv": (b"", "empty.csv holds no rows"),
    "header.csv": (b"prompt,completion\n", "header.csv holds no rows"),
    "open-quote.csv": (b'prompt,completion\n"a,b\nc,d\n', "open-quote.csv"),
    "stray-quote.csv": (b'prompt,completion\n"a"x,b\n', "stray-quote.csv:2"),
    "quotes.csv": (b'prompt,completion\n"a ""b"" c","d\ne"\n', 1),
    "few.csv": (b"prompt,completion\na\n", "few.csv:2: 1 cells"),
    "many.csv": (b"prompt,completion\na,b,c\n", "many.csv:2: 3 cells"),
    "twice.csv": (b"prompt,prompt\na,b\n", "twice.csv:1"),
    "semicolons.csv": (b"prompt;completion\na;b\n", 1),
    "tabs.csv": (b"prompt\tcompletion\na\tb\n", 1),
    "bom.csv": (b"\xef\xbb\xbfprompt,completion\na,b\n", 1),
    "crlf.csv": (b"prompt,completion\r\na,b\r\n", 1),
    "cr.csv": (b"prompt,completion\ra,b\r", "cr.csv"),
    "spaces.csv": (b"prompt, completion\na,b\n", 1),
    "empty-cell.csv": (b"prompt,completion\n,b\n", "empty-cell.csv:2"),
    "long.csv": (b"prompt,completion\n" + b"a" * 2**20 + b",b\n", 1),
    "label.csv": (b"prompt,completion,label\na,b,TRUE\nc,d,0\n", 2),
    "bad-label.csv": (b"prompt,completion,label\na,b,maybe\n", "bad-label.csv:2"),
    "margin.csv": (b"prompt,chosen,rejected,margin\na,b,c,nan\n", "margin.csv:2"),
    "infinite.csv": (b"prompt,chosen,rejected,margin\na,b,c,1e999\n", "infinite.csv:2"),
    "votes.csv": (b"prompt,chosen,rejected,votes\na,b,c," + b"[" * 3000 + b"\n", "votes.csv:2"),
    # ---- text
    "empty.txt": (b"", "empty.txt holds no rows"),
    "blank.txt": (b"\n\n \n", "blank.txt holds no rows"),
    "long.txt": (b"a " * 2**20, 1),
    "paragraphs.txt": (b"a\nb\n\n\nc\r\n\r\nd", 3),
    # ---- not data
    "data.xlsx": (b"PK\x03\x04", "the kind of file is unknown"),
    "data": (LINE, "the kind of file is unknown"),
    "data.arrow": (b"ARROW1", "the kind of file is unknown"),
    "data.bz2": (b"BZh9", "the kind of file is unknown"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_hand_made_file_is_read_rightly_or_refused_by_name(name: str, tmp_path: Path) -> None:
    content, expected = FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    if isinstance(expected, int):
        assert len(read(path).records) == expected
        return
    with pytest.raises(KeelError) as refused:
        read(path)
    assert expected in str(refused.value)
    assert name in str(refused.value)
    assert len(str(refused.value)) < 1000


ROWS_ONLY = [name for name, (_, said) in FILES.items() if isinstance(said, str) and ".jsonl:1" in said]


@pytest.mark.parametrize("name", ROWS_ONLY)
def test_a_bad_row_among_good_ones_is_skipped_alone(name: str, tmp_path: Path) -> None:
    content = FILES[name][0]
    if name.startswith(("utf", "bom", "nuls", "packed", "cr.", "twice.")):
        content = content.replace(b"\n", b" ")  # a single line
    path = tmp_path / f"{name}.jsonl"
    before, after = jsonl(GOOD), jsonl({**GOOD, "prompt": "last?"})
    if b'"chosen"' in content or b'"label"' in content:
        more = {"label": True} if b'"label"' in content else {"chosen": "c", "rejected": "d"}
        before, after = jsonl({**GOOD, **more}), jsonl({**GOOD, **more, "prompt": "last?"})
    path.write_bytes(before + content.rstrip(b"\n") + b"\n" + after)
    kept = read(path, skip=True)
    assert kept.skipped == 1
    assert [record.prompt for record in kept.records] == ["a b?", "last?"]
    assert f"{path}:2" in kept.skipped_reasons[0]


# ---------------------------------------------------------------- drawn

texts = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30).filter(
    lambda t: bool(t.strip())
)
extra = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
row_shapes: dict[str, Any] = {
    "text": st.fixed_dictionaries({"text": texts}),
    "prompt": st.fixed_dictionaries({"prompt": texts}),
    "demonstration": st.fixed_dictionaries({"prompt": texts, "completion": texts}),
    "preference": st.fixed_dictionaries({"prompt": texts, "chosen": texts, "rejected": texts}).filter(
        lambda row: row["chosen"] != row["rejected"]
    ),
    "unpaired": st.fixed_dictionaries({"prompt": texts, "completion": texts, "label": st.booleans()}),
}


@st.composite
def good_files(draw: Any) -> tuple[str, bytes, str, list[dict[str, Any]]]:
    """A format, a file of it by another writer than keel's, the type and the rows that are in it."""
    kind = draw(st.sampled_from(sorted(row_shapes)))
    rows = draw(st.lists(row_shapes[kind], min_size=1, max_size=5))
    suffix = draw(st.sampled_from([".jsonl", ".json", ".parquet", ".csv"]))
    more = draw(st.dictionaries(texts.filter(lambda t: t not in load.records.COLUMNS), extra, max_size=2))
    if suffix in (".jsonl", ".json") and not set(more) & _KNOWN:
        rows = [{**row, **more} for row in rows]
    end, ascii_only = draw(st.sampled_from(["\n", "\r\n"])), draw(st.booleans())
    dumped = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    if suffix == ".jsonl":
        content = "".join(line + end for line in dumped).encode()
    elif suffix == ".json":
        content = ("[" + ",".join(dumped) + "]").encode()
    elif suffix == ".parquet":
        content = parquet(pyarrow.Table.from_pylist(rows))
    else:
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(
            buffer,
            list(rows[0]),
            lineterminator=end,
            quoting=draw(st.sampled_from([csv.QUOTE_NONNUMERIC, csv.QUOTE_ALL])),
        )
        writer.writeheader()
        writer.writerows(rows)
        content = buffer.getvalue().encode()
    if draw(st.booleans()):
        return suffix + ".gz", gzip.compress(content, 1), kind, rows
    return suffix, content, kind, rows


_KNOWN = {
    *(
        "text",
        "messages",
        "prompt",
        "completion",
        "label",
        "chosen",
        "rejected",
        "votes",
        "p_chosen",
        "margin",
    ),
    *("tools", "chat_template_kwargs", "source"),
}
TOKENS = [
    *(b"null", b"NaN", b"1e999", b"[", b"{", b'"', b"\\ud800", b"\\u", b"\0", b"\r", b"\xff", b"-", b"true"),
    *(b",", b"\xe2\x80\xa8"),
]
QUICK = settings(
    max_examples=DRAWN,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def written(record: Any, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(record, name) for name in names}


@QUICK
@given(good_files())
def test_what_another_writer_wrote_is_read_as_it_was(tmp_path_factory: Any, file: Any) -> None:
    suffix, content, kind, rows = file
    path = tmp_path_factory.getbasetemp() / f"drawn{suffix}"
    path.write_bytes(content)
    names = [
        name for name in rows[0] if name in ("text", "prompt", "completion", "chosen", "rejected", "label")
    ]
    found = load.load([DataSource(str(path), format="keel")], [kind], 0)
    assert [written(record, names) for record in found.records] == [
        {n: row[n] for n in names} for row in rows
    ]


@st.composite
def bad_files(draw: Any) -> tuple[str, bytes]:
    """A good file with bytes changed, cut, put in or doubled."""
    suffix, content, _, _ = draw(good_files())
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        how = draw(st.sampled_from(["flip", "cut", "put", "double", "remove", "token"]))
        if how == "flip" and content:
            content = content[:at] + bytes([content[at] ^ draw(st.integers(1, 255))]) + content[at + 1 :]
        elif how == "cut":
            content = content[:at]
        elif how == "put":
            content = content[:at] + draw(st.binary(min_size=1, max_size=6)) + content[at:]
        elif how == "double":
            content = content[:at] + content[at : at + 40] * 2 + content[at + 40 :]
        elif how == "remove":
            content = content[:at] + content[at + draw(st.integers(1, 20)) :]
        else:
            content = content[:at] + draw(st.sampled_from(TOKENS)) + content[at:]
    return suffix, content


def sound(record: Any) -> bool:
    """Texts that can be encoded and say something."""
    values = [getattr(record, name, None) for name in ("text", "prompt", "completion", "chosen", "rejected")]
    return all(value.encode() and value.strip() for value in values if isinstance(value, str))


@QUICK
@given(bad_files(), st.booleans())
def test_a_file_broken_anywhere_is_refused_by_name_or_gives_sound_rows(
    tmp_path_factory: Any, file: Any, skip: bool
) -> None:
    suffix, content = file
    path = tmp_path_factory.getbasetemp() / f"broken{suffix}"
    path.write_bytes(content)
    try:
        found = read(path, skip=skip)
    except DataError as error:
        refused = str(error)
        assert path.name in refused
        assert len(refused) < 2000
    else:
        assert all(map(sound, found.records))
        assert len(found.records) or found.skipped
