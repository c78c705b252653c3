"""Tasks of reasoning-gym as data and as a reward: the same rows everywhere, scores that no reply escapes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from keel.data.load import fingerprint, load
from keel.errors import DataError, KeelError, UsageError
from keel.rewards.gym import answer_of, gym_score
from keel.types import DataSource
from keel.worlds import gym, gym_process


def rows(source: str, count: int = 4, seed: int = 0, **options: Any) -> list[dict[str, Any]]:
    return list(gym.rows(source, count, seed, options))


def scored(row: dict[str, Any], *answers: str, **settings: Any) -> list[float | None]:
    return gym_score(**settings)([0] * len(answers), answers, gym=[row["gym"]] * len(answers))


def test_rows_follow_from_task_settings_split_and_seed():
    whole = rows("gym:leg_counting", 6)
    assert rows("gym:leg_counting/prompts", 3) == whole[:3]
    assert rows("gym:leg_counting", 6, seed=1) != whole
    few = rows("gym:leg_counting", 6, max_animals=3)
    assert {row["task"] for row in few} == {"leg_counting max_animals=3"}
    assert few != whole
    assert rows("gym:gcd", 2, seed=5) == [
        {**row} for row in gym.rows("gym:gcd", 2, 0, {"seed": 5})
    ]  # a seed of its own


def test_no_question_of_the_test_is_in_another_split():
    def questions(split: str, seed: int) -> set[str]:
        return {row["prompt"][0]["content"] for row in rows(f"gym:count_bits/{split}", 60, seed, max_n=30)}

    held_out = questions("test_prompts", 0)
    assert 2 < len(held_out) < 12  # of 31 numbers that there are: the rows repeat, and still are the test's
    for split in ("prompts", "demonstrations"):
        assert not held_out & questions(split, 1)


def test_a_task_with_one_question_has_it_on_one_side():
    lost = []
    for split in ("prompts", "test_prompts"):
        try:
            rows(f"gym:count_bits/{split}", 1, min_n=5, max_n=5)
        except DataError as error:
            lost.append(str(error))
    assert len(lost) == 1
    assert "too few different questions" in lost[0]


@pytest.mark.slow
def test_rows_are_the_same_whatever_seed_python_hashes_by():
    """ransom_note goes through sets of letters: its rows would differ from process to process."""
    code = "from keel.worlds import gym; print([r['prompt'] for r in gym.rows('gym:ransom_note', 3, 0, {})])"
    made = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(gym.__file__).parents[2])},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(made) == 1


def test_a_mixture_of_tasks_is_data_as_any_other():
    sources = [
        DataSource("gym:chain_sum/demonstrations", rows=6, weight=2.0, options={"max_terms": 2}),
        DataSource("gym:gcd/demonstrations", rows=6, weight=1.0),
    ]
    dataset = load(sources, ("demonstration",), 0)
    assert [record.columns["source"] for record in dataset.records].count("gym:gcd/demonstrations") == 3
    assert len(dataset.records) == 9
    assert load([DataSource("gym:gcd/text", rows=1)], ("text",), 0).records[0].text.startswith("User: ")
    assert fingerprint(sources) != fingerprint([sources[0], DataSource("gym:gcd", rows=6, weight=1.0)])


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        ("gym:leg_countin", {}, "did you mean gym:leg_counting"),
        ("gym:gcd/prompt", {}, "did you mean 'prompts'"),
        ("gym:", {}, "write gym:NAME"),
        ("gym:gcd", {"min_numer": 1}, "did you mean 'min_numbers'"),
        ("gym:gcd", {"size": 5}, "said by `rows`"),
        ("gym:gcd", {"seed": "x"}, "`seed` must be a whole number"),
        ("gym:gcd", {"min_numbers": 5, "max_numbers": 2}, "max_numbers must be >= min_numbers"),
        ("gym:graph_color/demonstrations", {}, "says no right answer"),
    ],
)
def test_what_is_not_there_is_said_in_a_line(source, options, said):
    with pytest.raises(UsageError, match=said) as caught:
        load([DataSource(source, rows=2, options=options)], ("prompt", "demonstration"), 0)
    assert "\n" not in str(caught.value)


def test_without_the_package_a_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    gym.process.cache_clear()
    with pytest.raises(UsageError, match=r"pip install 'keel-rlhf\[gym\]'"):
        rows("gym:gcd")


def test_scores_are_the_tasks_own():
    (row,) = rows("gym:countdown", 1)
    wrong = "1 + 1"
    assert scored(row, row["answer"], wrong, "", "no formula") == [1.0, *scored(row, wrong), 0.01, 0.01]
    assert scored(row, row["answer"], "no formula", partial=False) == [1.0, 0.0]
    tagged = f"<think>{wrong}</think> so <answer>\n{row['answer']} </answer>"
    assert scored(row, tagged, reads="tag") == [1.0]
    assert scored(row, row["answer"], reads="tag") == [0.0]
    assert scored(row, tagged) == [1.0]
    assert answer_of("<think>no</think> 5 ", "auto") == "5"
    assert gym_score()([0], ["5"], gym=[None]) == [None]


def test_metadata_come_back_as_they_were():
    """rearc compares tuples: as JSON's lists its own answer scores 0.05."""
    value = {"a": (1, [2, (3,)]), "b": {1: {"x"}}, "\0tuple": None, "c": {2.5: True}}
    assert gym_process.decode(json.loads(json.dumps(gym_process.encode(value)))) == value
    (row,) = rows("gym:rearc", 1)
    assert scored(row, row["answer"]) == [1.0]


def test_a_reply_that_is_code_does_nothing(tmp_path):
    """countdown reads an answer by sympy, which evaluates it: nothing but the process's bar keeps this from
    writing a file."""
    (row,) = rows("gym:countdown", 1)
    written = tmp_path / "written"
    for code in (f"open('{written}', 'w')", f"__import__('os').system('touch {written}')"):
        assert scored(row, code) == [0.01]
    assert not written.exists()


@pytest.mark.attack
def test_a_reply_that_never_ends_costs_only_itself():
    (row,) = rows("gym:countdown", 1)
    logged: dict[str, float] = {}
    answers = ["9**9**9**9", row["answer"]]
    values = gym_score(timeout=0.3)(
        [0, 0], answers, lambda name, value, of: logged.update({name: value}), gym=[row["gym"]] * 2
    )
    assert values == [0.0, 1.0]
    assert logged == {"gym_timeouts": 0.5}


def test_a_task_that_pays_every_reply_is_found():
    of_both = [
        row[gym.COLUMN]
        for name in ("gcd", "game_of_life_halting")
        for row in gym.rows(f"gym:{name}", 5, 0, {})
    ]
    assert gym.pays_nonsense([None, *of_both]) == "game_of_life_halting"
    assert gym.pays_nonsense(of_both[:5]) is None


def test_a_column_that_is_no_tasks_is_found():
    assert gym.problem(rows("gym:gcd", 1)[0]["gym"]) == ""
    assert gym.problem("{}")
    assert gym.problem(3)
    strange = {"gym": json.dumps({"task": "no_task", "settings": {}, "entry": {}})}
    with pytest.raises(KeelError, match="gym:no_task"):
        scored(strange, "5")


UNANSWERED = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}  # they score alone


@pytest.mark.slow
def test_every_task_gives_its_own_answer_all_there_is():
    known = gym.process().tasks()
    assert len(known) > 100
    wrong: dict[str, Any] = {}
    for name in known:
        (row,) = rows(f"gym:{name}", 1)
        assert ("answer" in row) == (name not in UNANSWERED), name
        if "answer" in row and scored(row, row["answer"], reads="whole", timeout=60.0) != [1.0]:
            wrong[name] = row["answer"]
    assert not wrong


@pytest.fixture(autouse=True, scope="module")
def _ended():
    yield
    gym.process().close()
