"""keel.load_data: rows as a stage reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import keel


def test_a_file_is_what_its_columns_make_it(data: Any) -> None:
    kinds = {"text": "text", "demonstrations": "demonstration", "pairs": "preference", "prompts": "prompt"}
    for name, kind in kinds.items():
        assert keel.load_data(getattr(data, name)).kind == kind
    assert keel.load_data(data.chats).conversational
    assert keel.load_data(data.pairs, kind="prompt", rows=3).kind == "prompt"


def test_a_world_takes_its_own_settings_and_a_seed() -> None:
    first, again, other = (keel.load_data("world:helpdesk/prompts", rows=4, seed=seed) for seed in (0, 0, 1))
    assert len(first.records) == 4
    assert first.records == again.records != other.records


def test_a_bad_row_is_named_or_skipped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": 3}\n', encoding="utf-8"
    )
    with pytest.raises(keel.DataError, match=r"rows\.jsonl:2"):
        keel.load_data(path)
    assert keel.load_data(path, on_bad="skip").skipped == 1


def test_a_format_and_a_label_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "p", "a": "one", "b": "two", "best": "b"}\n', encoding="utf-8")
    pairs = {"first": "a", "second": "b", "label": "best", "first_wins": ["a"], "second_wins": ["b"]}
    assert keel.load_data(path, pairs=pairs).records[0].chosen == "two"
    with pytest.raises(keel.UsageError, match="`pairs` needs `second_wins`"):
        keel.load_data(path, pairs={**pairs, "second_wins": []})
    with pytest.raises(keel.UsageError, match="no key 'tie'"):
        keel.load_data(path, pairs={**pairs, "tie": ["c"]})
    with pytest.raises(keel.UsageError, match="there is no format 'alpacca'; did you mean alpaca"):
        keel.load_data(path, format="alpacca")
    with pytest.raises(keel.DataError, match='the row has the column "a"'):
        keel.load_data(path, columns={"text": "prompt"}, strict=True)


def test_bad_arguments_are_usage_errors(data: Any) -> None:
    wrong: Any = "pair"
    with pytest.raises(keel.UsageError, match="kind 'pair' is none of"):
        keel.load_data(data.pairs, kind=wrong)
    with pytest.raises(keel.UsageError, match="nowhere"):
        keel.load_data("nowhere.jsonl")
