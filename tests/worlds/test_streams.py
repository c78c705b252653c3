"""What holds for every world: same seed, same rows; row i whatever the count; clear errors."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice

import pytest

from keel.errors import UsageError
from keel.worlds import load
from keel.worlds.streams import row_random

WORLDS = ("helpdesk", "arithmetic")
CASES = [(name, split) for name in WORLDS for split in load(name).splits]


@pytest.mark.parametrize(("world", "split"), CASES)
def test_row_does_not_depend_on_how_many_are_asked_for(world: str, split: str) -> None:
    few, many = list(load(world).rows(split, 7, 3)), list(load(world).rows(split, 40, 3))
    default = list(islice(load(world).rows(split, None, 3), 40))
    assert len(few) == 7
    assert len(many) == 40
    assert few == many[:7]
    assert many == default


@pytest.mark.parametrize(("world", "split"), CASES)
def test_seed_changes_rows(world: str, split: str) -> None:
    assert list(load(world).rows(split, 10, 0)) != list(load(world).rows(split, 10, 1))


@pytest.mark.parametrize(("world", "split"), CASES)
def test_rows_are_what_a_jsonl_file_holds(world: str, split: str) -> None:
    made = list(load(world).rows(split, 20, 0))
    assert [json.loads(json.dumps(row)) for row in made] == made


def test_rows_are_the_same_in_another_process_with_another_hash_seed() -> None:
    code = (
        "import json; from keel.worlds import load\n"
        "print(json.dumps([list(load(w).rows(s, 8, 5))"
        " for w in ('helpdesk', 'arithmetic') for s in load(w).splits]))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    here = [list(load(w).rows(s, 8, 5)) for w in WORLDS for s in load(w).splits]
    assert json.loads(outputs.pop()) == here


def test_random_stream_is_pinned() -> None:
    # SHA-256("helpdesk/text/0/0"), first 16 bytes, into Mersenne Twister: published data must never move
    import hashlib
    import random

    expected = random.Random(int(hashlib.sha256(b"helpdesk/text/0/0").hexdigest()[:32], 16)).random()
    assert row_random("helpdesk", "text", 0, 0).random() == expected


@pytest.mark.parametrize("world", WORLDS)
def test_unknown_split_is_refused_at_the_call(world: str) -> None:
    with pytest.raises(UsageError, match=r"did you mean 'test_prompts'.*known: .*comparisons"):
        load(world).rows("test_promts", 1, 0)


@pytest.mark.parametrize("world", WORLDS)
def test_unknown_option_is_refused_at_the_call(world: str) -> None:
    with pytest.raises(UsageError, match="option 'colour' is unknown"):
        load(world).rows("text", 1, 0, colour="red")


@pytest.mark.parametrize("count", [-1, 2.5, True])
def test_bad_count_is_refused(count: object) -> None:
    with pytest.raises(UsageError, match="rows must be a count"):
        load("helpdesk").rows("text", count, 0)  # type: ignore[arg-type]


def test_no_rows_is_no_rows() -> None:
    assert list(load("helpdesk").rows("text", 0, 0)) == []


def test_unknown_world_names_the_nearest_and_all() -> None:
    with pytest.raises(
        UsageError, match=r"'helpdesc' is unknown; did you mean 'helpdesk'.*helpdesk, arithmetic"
    ):
        load("helpdesc")
