from __future__ import annotations

import gzip
import json
import types
from collections import Counter
from itertools import pairwise
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from keel import worlds
from keel.data.load import fingerprint, load, summary
from keel.errors import DataError, UsageError
from keel.types import DataSource

PAIRS = [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(5)]
TEXTS = [{"text": f"t{i}"} for i in range(12)]


def jsonl(path: Path, rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def read(source, accept=("text",), seed=0, **settings):
    return load([DataSource(str(source), **settings)], accept, seed)


def refusal(source, accept=("text",), error=DataError, **settings):
    with pytest.raises(error) as caught:
        read(source, accept, **settings)
    return str(caught.value)


def texts(dataset):
    return [record.text for record in dataset.records]


# ---------------------------------------------------------------- formats


def test_jsonl_with_physical_line_numbers(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", ["\ufeff" + json.dumps({"text": "é"}), "", {"text": "b\u2028c"}])
    dataset = read(path)
    assert [(r.text, r.origin) for r in dataset.records] == [("é", f"{path}:1"), ("b\u2028c", f"{path}:3")]
    assert dataset.kind == "text"
    assert dataset.conversational is False


def test_json_array_and_json_lines_in_a_json_file(tmp_path):
    array, lines = tmp_path / "array.json", tmp_path / "lines.json"
    array.write_text(json.dumps(TEXTS, indent=2))
    jsonl(lines, TEXTS)
    assert texts(read(array)) == texts(read(lines)) == [f"t{i}" for i in range(12)]
    assert read(array).records[2].origin == f"{array}:row 3"
    assert read(lines).records[2].origin == f"{lines}:3"


def test_parquet_rows_and_null_optional_columns(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [{**PAIRS[0], "margin": 0.5}, {**PAIRS[1], "margin": None}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    dataset = read(path, ["preference"])
    assert [record.margin for record in dataset.records] == [0.5, None]
    assert dataset.records[1].origin == f"{path}:row 2"


def test_csv_cells_that_are_not_text_and_cells_that_span_lines(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,answer,thumb\n"two\nlines",12,true\n\nb,"say ""hi""",0\n')
    dataset = read(path, ["unpaired"], columns={"completion": "answer", "label": "thumb"})
    found = [(r.prompt, r.completion, r.label, r.origin) for r in dataset.records]
    assert found == [("two\nlines", "12", True, f"{path}:2"), ("b", 'say "hi"', False, f"{path}:5")]


def test_csv_numbers(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,chosen,rejected,p_chosen,margin\na,b,c,0.75,\na,b,c,nan,1\n")
    assert ':3: "p_chosen" is NaN' in refusal(path, ["preference"])
    record = read(path, ["preference"], rows=1).records[0]
    assert (record.p_chosen, record.margin) == (0.75, None)


@pytest.mark.parametrize("mark", [";", "\t"])
def test_cells_that_a_spreadsheet_has_parted_otherwise(mark, tmp_path):
    """Where the comma is the decimal sign, cells are parted by semicolons; commas in them are text."""
    path = tmp_path / "a.csv"
    path.write_text(f'prompt{mark}completion\none, two{mark}"a{mark}b, c"\n', encoding="utf-8")
    (record,) = load([DataSource(str(path))], ("demonstration",), 0).records
    assert (record.prompt, record.completion) == ("one, two", f"a{mark}b, c")


@pytest.mark.parametrize("indent", [None, 2])
def test_rows_in_an_object_around_them(indent, tmp_path):
    path = tmp_path / "a.json"
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    path.write_text(json.dumps({"version": "1.1", "data": rows}, indent=indent))
    dataset = load([DataSource(str(path))], ("demonstration",), 0)
    assert [(r.prompt, r.completion) for r in dataset.records] == [("a", "b"), ("c", "d")]
    assert dataset.records[1].origin.endswith("a.json:row 2")
    one = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path.write_text(json.dumps(one))  # a list in a row is no list of rows
    assert len(load([DataSource(str(path))], ("text",), 0).records) == 1
    path.write_text(json.dumps({"data": rows, "rows": rows}))
    with pytest.raises(DataError, match="a row of no known type"):
        load([DataSource(str(path))], ("demonstration",), 0)


def test_turns_that_a_table_keeps_as_json(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": json.dumps(turns)}) + "\n")
    (record,) = load([DataSource(str(path))], ("text",), 0).records
    assert [dict(turn) for turn in record.text] == turns
    path.write_text(json.dumps({"messages": "hello"}) + "\n")
    with pytest.raises(DataError, match=r'a\.jsonl:1: "messages" must be a list of turns'):
        load([DataSource(str(path))], ("text",), 0)


def test_csv_row_of_the_wrong_width(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,id\na,1\nb\n")
    way_on = "mend the row, or leave such rows out: on_bad: skip"
    assert refusal(path) == f"{path}:3: 1 cells, but the header has 2; {way_on}"


def test_txt_is_a_record_a_paragraph(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\r\none\r\ntwo\r\n\r\n \r\nthree")
    assert [(r.text, r.origin) for r in read(path).records] == [
        ("one\ntwo", f"{path}:2"),
        ("three", f"{path}:6"),
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt", ".parquet"])
def test_every_format_can_be_gzipped(tmp_path, suffix):
    plain = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(TEXTS[:2]), plain)
    else:
        content = {
            ".jsonl": '{"text": "t0"}\n{"text": "t1"}\n',
            ".json": '[{"text": "t0"}, {"text": "t1"}]',
            ".csv": "text\nt0\nt1\n",
            ".txt": "t0\n\nt1\n",
        }
        plain.write_text(content[suffix])
    packed = tmp_path / f"b{suffix}.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert texts(read(packed)) == texts(read(plain)) == ["t0", "t1"]


def test_folder_of_files_in_order_of_their_names(tmp_path):
    jsonl(tmp_path / "b.jsonl", TEXTS[2:3])
    pq.write_table(pa.Table.from_pylist(TEXTS[:2]), tmp_path / "a.parquet")
    (tmp_path / "dataset_info.json").write_text("{}")
    dataset = read(tmp_path)
    assert texts(dataset) == ["t0", "t1", "t2"]
    assert dataset.records[2].origin == f"{tmp_path}/b.jsonl:1"


# ---------------------------------------------------------------- broken files


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"text": "a"}\n{"text": "b"\n', ":2: not JSON at column 13"),
        (b'{"text": "a", "score": NaN}\n', ':1: "score" is NaN'),
        (b'{"text": "a", "scores": [1, -Infinity]}\n', ':1: "scores" is infinite'),
        (b'{"text": "a", "score": 1e999}\n', ':1: "score" is infinite'),
        (b'{"text": "a\xff"}\n', ":1: not UTF-8 (byte 0xff at position 12)"),
        (b'{"text": "\\ud800"}\n', ':1: "text" holds a lone surrogate'),
        (b'["a"]\n', ":1: a row must be an object {column: value}, this one is: array"),
        (b"[" * 100_000, ":1: not readable as JSON"),
        (b'{"text": ""}\n', ':1: "text" is empty'),
        (b"", " holds no rows"),
        (b"\n\n", " holds no rows"),
    ],
)
def test_bad_jsonl_is_named_by_file_and_line(tmp_path, content, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    assert refusal(path).startswith(f"{path}{reason}")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'[{"text": "a"},\n {"text": }]', ":2: not JSON at column 11"),
        (b'[{"text": "a"},\n {"text": "b", "x": NaN}]', ':row 2: "x" is NaN'),
        (b'[{"text": "a"}, 3]', ":row 2: a row must be an object"),
        (b'{"stories": [\n{"text": "a"}]}', " holds one object, not an array of rows"),
        (b'[{"text":\n "a\xff"}]', ":2: not UTF-8"),
        (b"[]", " holds no rows"),
        (b"", " holds no rows"),
    ],
)
def test_bad_json_is_named(tmp_path, content, reason):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    assert refusal(path).startswith(f"{path}{reason}")


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.parquet.gz", "a.csv"])
def test_files_that_are_not_what_their_name_says(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b'text\n"a"b\n')
    assert refusal(path).startswith(str(path))


def test_truncated_gzip(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    assert "cannot be read" in refusal(path)


# ---------------------------------------------------------------- skipping and limits


def test_bad_rows_are_skipped_and_counted_when_asked(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{}, "{", TEXTS[0], {"text": " "}, {"txt": "b"}, TEXTS[1]])
    dataset = read(path, on_bad="skip")
    assert texts(dataset) == ["t0", "t1"]
    assert dataset.skipped == 4
    assert [reason.split(": ")[0] for reason in dataset.skipped_reasons] == [
        f"{path}:{n}" for n in (1, 2, 4, 5)
    ]
    assert summary(dataset).endswith(" · 4 skipped")
    assert f"{path}:1: " in refusal(path)


def test_all_rows_bad_is_an_error_even_when_skipping(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": ""}] * 3)
    assert refusal(path, on_bad="skip") == f'{path}: all 3 rows are bad; the first: {path}:1: "text" is empty'
    path = jsonl(tmp_path / "b.jsonl", [{"question": "a"}] * 3)
    assert f"{path}: all 3 rows are bad" in refusal(path, on_bad="skip")


def test_rows_takes_the_first_good_ones_and_reads_no_further(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [TEXTS[0], {"text": ""}, TEXTS[1], "{"])
    dataset = read(path, rows=2, on_bad="skip")
    assert texts(dataset) == ["t0", "t1"]
    assert dataset.skipped == 1


# ---------------------------------------------------------------- types and columns


def test_narrowing_is_said(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", PAIRS)
    demonstrations = read(path, ["demonstration", "text"])
    assert demonstrations.kind == "demonstration"
    assert [record.completion for record in demonstrations.records] == [f"c{i}" for i in range(5)]
    assert "chosen side of preference rows" in demonstrations.sources[0]
    prompts = read(path, ["prompt"])
    assert prompts.records[1].columns == {"chosen": "c1", "rejected": "r1", "source": str(path)}
    assert "prompt of preference rows" in prompts.sources[0]


def test_acceptance_is_in_order_of_preference(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", PAIRS)
    assert read(path, ["preference", "prompt"]).kind == "preference"
    assert read(path, ["prompt", "preference"]).kind == "prompt"


def test_unknown_columns_suggest_a_rename_that_works(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"question": "2+2?", "answer": "4"}])
    message = refusal(path, ["demonstration", "text"])
    assert message.startswith(f"{path}:1: a row of no known type (columns: question, answer)")
    assert "missing: prompt, completion" in message
    assert "`columns: {prompt: question, completion: answer}`" in message
    record = read(path, ["demonstration"], columns={"prompt": "question", "completion": "answer"}).records[0]
    assert (record.prompt, record.completion, record.columns) == ("2+2?", "4", {"source": str(path)})


def test_type_that_a_stage_cannot_use_is_named(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}])
    message = refusal(path, ["preference"])
    assert "a prompt-completion row" in message
    assert "wanted: preference (prompt, chosen, rejected" in message
    assert "missing: chosen, rejected" in message
    assert "missing: text" in refusal(path, ["text"])  # never narrowed: it would train on the prompt


def test_unpaired_rows_are_not_demonstrations(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b", "label": False}])
    assert "must not be imitated" in refusal(path, ["demonstration", "text"])


def test_rename_of_an_absent_column_names_the_nearest(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"question": "a"}])
    message = refusal(path, ["prompt"], columns={"prompt": "questoin"})
    assert '"questoin"' in message
    assert 'did you mean "question"?' in message


def test_rename_may_swap(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}])
    record = read(path, ["demonstration"], columns={"prompt": "completion", "completion": "prompt"}).records[
        0
    ]
    assert (record.prompt, record.completion) == ("b", "a")


def test_summary(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hh").mkdir()
    jsonl(tmp_path / "hh/helpful.jsonl", PAIRS * 300)
    assert (
        summary(read("hh/helpful.jsonl", ["preference"]))
        == "1,500 rows · preference, standard · hh/helpful.jsonl · 5 prompts · 1,495 rows repeat earlier ones"
    )
    jsonl(tmp_path / "chat.jsonl", [{"prompt": [{"role": "user", "content": "a"}]}])
    assert summary(read("chat.jsonl", ["prompt"])) == "1 rows · prompt-only, conversational · chat.jsonl"


# ---------------------------------------------------------------- sources that are not there


def test_missing_file_names_the_nearest(tmp_path):
    jsonl(tmp_path / "helpful.jsonl", TEXTS)
    message = refusal(tmp_path / "helpfull.jsonl", error=UsageError)
    assert message == f"no file {tmp_path}/helpfull.jsonl; did you mean {tmp_path}/helpful.jsonl?"
    assert "there is no folder" in refusal(tmp_path / "nowhere/a.jsonl", error=UsageError)
    assert "no file ./nothing" in refusal("./nothing", error=UsageError)


def test_unknown_suffix_and_folder_without_data(tmp_path):
    (tmp_path / "a.xlsx").write_text("")
    assert "the kind of file is unknown" in refusal(tmp_path / "a.xlsx", error=UsageError)
    assert "holds no .parquet, .jsonl or .txt files" in refusal(tmp_path, error=UsageError)


def test_settings_without_effect_are_refused(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    assert "`split` has no effect" in refusal(path, error=UsageError, split="test")
    assert "`options` have no effect" in refusal(path, error=UsageError, options={"a": 1})
    assert "`weight` has no effect" in refusal(path, error=UsageError, weight=2.0)


# ---------------------------------------------------------------- hub and worlds


def test_hub_data_set(monkeypatch):
    asked = {}

    def fake(path, *, split, **options):
        asked.update(path=path, split=split, **options)
        return datasets.Dataset.from_list([{**PAIRS[0], "margin": None}])

    monkeypatch.setattr(datasets, "load_dataset", fake)
    dataset = read("owner/pairs", ["preference"], split="test", options={"name": "main"})
    assert asked == {"path": "owner/pairs", "split": "test", "name": "main"}
    assert dataset.records[0].origin == "owner/pairs[test]:row 1"
    assert dataset.records[0].margin is None
    assert "unknown option 'nmae'" in refusal("owner/pairs", error=UsageError, options={"nmae": "main"})


def test_hub_data_set_that_cannot_be_had(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("Couldn't reach 'owner/pairs' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    message = refusal("owner/pairs", error=UsageError)
    assert message.startswith("owner/pairs: there is no such file or folder")
    assert "Couldn't reach" in message
    assert "not a hub id" in refusal("a/b/c", error=UsageError)


@pytest.fixture
def toy_world(monkeypatch):
    def rows(split, rows, seed, **options):
        if split not in world.splits:
            raise UsageError(f"split {split!r} is unknown")
        return ({"text": f"{split} {seed} {number} {options}"} for number in range(rows or 3))

    world = types.SimpleNamespace(name="toy", splits={"good": "…", "bad": "…"}, rows=rows)
    monkeypatch.setattr(worlds, "load", {"toy": world}.__getitem__)


@pytest.mark.usefixtures("toy_world")
def test_world():
    dataset = read("world:toy/good", rows=2, seed=7, options={"level": 1})
    assert texts(dataset) == ["good 7 0 {'level': 1}", "good 7 1 {'level': 1}"]
    assert dataset.records[1].origin == "world:toy/good:2"
    assert len(read("world:toy/good").records) == 3
    assert "write world:NAME/SPLIT; toy has good, bad" in refusal("world:toy", error=UsageError)
    assert "split 'god' is unknown" in refusal("world:toy/god", error=UsageError)


# ---------------------------------------------------------------- mixtures


@pytest.fixture
def two(tmp_path):
    letters = [{"text": letter} for letter in "abcdefghijklmnop"]
    return jsonl(tmp_path / "digits.jsonl", TEXTS), jsonl(tmp_path / "letters.jsonl", letters)


def mixture(paths, weights=(None, None), seed=0):
    return load([DataSource(path, weight=weight) for path, weight in zip(paths, weights)], ["text"], seed)


def counts(dataset, paths):
    found = Counter(record.columns["source"] for record in dataset.records)
    return [found[path] for path in paths]


def test_mixture_without_weights_is_everything_in_order(two):
    dataset = mixture(two)
    assert texts(dataset) == [f"t{i}" for i in range(12)] + list("abcdefghijklmnop")
    assert counts(dataset, two) == [12, 16]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((1.0, 1.0), [12, 12]),  # the digits are the scarcest: 12 rows
        ((3.0, 1.0), [12, 4]),
        ((1.0, 4.0), [4, 16]),  # now the letters are
        ((0.35, 0.35), [12, 12]),  # 0.35 * (12 / 0.35) is below 12 in binary
        ((2.0, 3.0), [10, 16]),  # 16 · 2/3 = 10.67
    ],
)
def test_weights_set_the_ratio_and_no_row_is_repeated(two, weights, expected):
    dataset = mixture(two, weights)
    assert counts(dataset, two) == expected
    assert len(set(texts(dataset))) == sum(expected)


def test_weighted_mixture_is_shuffled_by_its_seed(two):
    first, again, other = (texts(mixture(two, (1.0, 1.0), seed)) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert set(first) != set(other)  # other letters are drawn, too
    kinds = [text.startswith("t") and len(text) > 1 for text in first]
    assert sum(a != b for a, b in pairwise(kinds)) > 5  # interleaved, not one after the other


def test_mixture_says_its_shares(two):
    assert "digits.jsonl (12 rows) + " in summary(mixture(two, (3.0, 1.0)))
    assert "letters.jsonl (4 of 16 rows)" in summary(mixture(two, (3.0, 1.0)))


def test_rows_of_a_single_source_say_where_they_came_from_too(two, tmp_path):
    assert read(two[0]).records[0].columns == {"source": str(two[0])}
    own = jsonl(tmp_path / "own.jsonl", [{"prompt": "a", "source": "theirs", "id": 1}])
    assert read(own, ["prompt"]).records[0].columns == {"source": str(own), "id": 1}


def test_mixture_errors(two, tmp_path):
    with pytest.raises(UsageError, match="give all sources one, or none"):
        mixture(two, (1.0, None))
    with pytest.raises(DataError, match="leaves it no row"):
        mixture(two, (1.0, 1000.0))
    pairs = jsonl(tmp_path / "pairs.jsonl", PAIRS)
    with pytest.raises(DataError, match=r"digits\.jsonl is text; .*pairs\.jsonl is preference"):
        load([DataSource(two[0]), DataSource(pairs)], ["text", "preference"], 0)


def test_mixture_takes_a_type_that_all_sources_have(tmp_path):
    pairs = jsonl(tmp_path / "pairs.jsonl", PAIRS)
    prompts = jsonl(tmp_path / "prompts.jsonl", [{"prompt": "q"}])
    dataset = load([DataSource(pairs), DataSource(prompts)], ["preference", "prompt"], 0)
    assert dataset.kind == "prompt"
    assert [record.prompt for record in dataset.records] == ["p0", "p1", "p2", "p3", "p4", "q"]


# ---------------------------------------------------------------- fingerprints


def test_fingerprint_follows_content_not_place(tmp_path):
    one, copy = jsonl(tmp_path / "a.jsonl", TEXTS), jsonl(tmp_path / "b.jsonl", TEXTS)
    other = jsonl(tmp_path / "c.jsonl", TEXTS[:-1])
    assert fingerprint([DataSource(one)]) == fingerprint([DataSource(copy)])
    assert len(fingerprint([DataSource(one)])) == 64
    different = [
        [DataSource(other)],
        [DataSource(one, rows=3)],
        [DataSource(one, columns={"text": "body"})],
        [DataSource(one), DataSource(copy)],
        [DataSource("world:toy/good")],
        [DataSource("world:toy/bad")],
        [DataSource("world:toy/good", rows=3)],
        [DataSource("world:toy/good", options={"level": 2})],
    ]
    assert len({fingerprint(sources) for sources in [[DataSource(one)], *different]}) == 1 + len(different)


def test_fingerprint_of_a_missing_file_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no file"):
        fingerprint([DataSource(str(tmp_path / "a.jsonl"))])


def test_fingerprint_of_a_hub_data_set_follows_its_content(monkeypatch):
    prints = []
    for rows in (PAIRS, PAIRS, PAIRS[1:]):
        made = datasets.Dataset.from_list(rows)
        made._fingerprint = str(len(rows))
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, made=made, **__: made)
        prints.append(fingerprint([DataSource("owner/pairs")]))
    assert prints[0] == prints[1] != prints[2]
