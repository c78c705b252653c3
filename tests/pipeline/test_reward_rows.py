"""A row that will make a reward fail is found before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from keel.config import parse
from keel.errors import DataError, RewardError, UsageError
from keel.pipeline import preflight, reward_rows
from keel.pipeline.preflight import Sources
from keel.rewards import answers
from keel.types import PromptRecord

ANSWER = {"kind": "answer"}
LENGTH = {"kind": "length", "high": 9}
FUNCTIONS = """
import os, sys, time

def floats(completions, answer): return [float(a) for a in answer]
def needs_text(completions, **_): return [float(c[0] == "x") for c in completions]
def crashes(completions, answer):
    if "boom" in answer: os._exit(7)
    return [1.0] * len(answer)
def leaves(completions, answer):
    if "boom" in answer: sys.exit()
    return [1.0] * len(answer)
def nan(completions, answer): return [float("nan") if a == "boom" else 1.0 for a in answer]
def slow(completions, answer):
    time.sleep(0.05 * len(answer))
    return [1.0] * len(answer)
def counted(completions, prompts):
    with open(os.environ["COUNT"], "a") as handle:
        handle.write("x" * len(completions))
    return [1.0] * len(completions)
"""


@pytest.fixture
def check(tmp_path: Path, tiny_model: Path) -> Any:
    """Check a grpo stage on rows with these rewards; returns the rows that it is given and what was said."""
    (tmp_path / "mine.py").write_text(FUNCTIONS)

    def checked(
        rows: list[dict[str, Any]], reward: Any, on_bad: str = "error", beside: str | None = None, **more: Any
    ) -> Any:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps({"prompt": f"q{i}", **row}) + "\n" for i, row in enumerate(rows)))
        if isinstance(reward, str):
            reward = [{"kind": "python", "function": f"{tmp_path}/mine.py:{reward}", **more}]
        data: Any = {"source": str(path), "on_bad": on_bad}
        if beside is not None:
            (tmp_path / "beside.jsonl").write_text(beside)
            data = [data, str(tmp_path / "beside.jsonl")]
        stage = {
            "kind": "grpo",
            "model": str(tiny_model),
            "data": data,
            "reward": reward,
            "updates": 1,
            "sampling": {"max_new_tokens": 4},
        }
        config = parse({"name": "tiny", "device": "cpu", "stages": {"s": stage}})
        said: list[str] = []
        sources = Sources(config, tmp_path / "run", said.append)
        sources.check(["s"])
        given = sources.load_data(*config.stages["s"].main_data()[0], stage="s")
        return [record.columns for record in given.records], said

    return checked


def answer_rows(*values: Any) -> list[dict[str, Any]]:
    return [{} if value is ... else {"answer": value} for value in values]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (" ", "is blank"),
        ("So it is\n####", "holds no answer"),
        ("\\frac{1}{2", "cannot be parsed"),
        ("1/0", "divides by zero"),
        ("word " * 99, "no final answer is marked"),
        ("nan", "has no answer"),
        ({"is": 1}, "is neither text, a number nor a conversation"),
        ([1, 2], "is neither text, a number nor a conversation"),
        ([{"role": "assistant"}], "is neither text, a number nor a conversation"),
        (None, "no reward applies to it: it has no 'answer'"),
        (..., "no reward applies to it: it has no 'answer'"),
    ],
)
def test_a_reference_that_holds_no_answer_is_found_and_on_bad_decides(
    check: Any, value: Any, message: str
) -> None:
    rows = answer_rows("1", "2", value)
    with pytest.raises(DataError, match=rf"s: .*rows\.jsonl:3: .*{message}.*on_bad: skip"):
        check(rows, [ANSWER])
    columns, said = check(rows, [ANSWER], on_bad="skip")
    assert [row["answer"] for row in columns] == ["1", "2"]
    assert [line for line in said if "1 rows are left out" in line and "rows.jsonl:3" in line]


def test_a_row_without_a_reference_is_no_fault_where_another_reward_applies(check: Any) -> None:
    columns, said = check(answer_rows("1", None, ...), [ANSWER, LENGTH])
    assert [row["answer"] for row in columns] == ["1", None, None]  # the column is there in any batch
    assert any("'answer' does not apply to 2 rows" in line for line in said)
    with pytest.raises(DataError, match="is blank"):
        check(answer_rows("1", ""), [ANSWER, LENGTH])


def test_rows_of_other_sources_are_not_asked(check: Any, tmp_path: Path) -> None:
    """A blank reference is bad only where the reward applies."""
    of_rows = {**ANSWER, "source_filter": str(tmp_path / "rows.jsonl")}
    blank = json.dumps({"prompt": "q", "answer": " "})
    columns, _ = check(answer_rows("1", "2"), [of_rows, LENGTH], beside=blank)
    assert len(columns) == 3
    with pytest.raises(DataError, match=r"beside\.jsonl:1.*is blank"):
        check(answer_rows("1", "2"), [ANSWER, LENGTH], beside=blank)


def test_where_every_row_is_bad_nothing_is_left(check: Any) -> None:
    with pytest.raises(DataError, match=r"a reward fails on every row; the first: .*rows\.jsonl:1"):
        check(answer_rows("", "####"), [ANSWER], on_bad="skip")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("floats", "raised ValueError: could not convert string to float: 'boom'"),
        ("crashes", "left its process with exit code 7"),
        ("leaves", "raised SystemExit"),
        ("nan", "returned nan, which is no finite number"),
    ],
)
def test_a_row_on_which_a_function_fails_is_found_among_many(check: Any, function: str, message: str) -> None:
    rows = answer_rows(*[str(i) for i in range(150)], "boom", "7")
    with pytest.raises(DataError, match=rf"rows\.jsonl:151: reward '{function}' {message}"):
        check(rows, function)
    columns, said = check(rows, function, on_bad="skip")
    assert len(columns) == 151
    assert "boom" not in [row["answer"] for row in columns]
    assert any("1 rows are left out" in line for line in said)


def test_a_function_that_fails_on_an_empty_reply_is_at_fault_itself(check: Any) -> None:
    for on_bad in ("error", "skip"):
        with pytest.raises(RewardError, match=r"'needs_text' raised IndexError.*asked with an empty reply"):
            check(answer_rows("1", "2"), "needs_text", on_bad)


def test_a_column_that_a_function_insists_on_and_nobody_has(check: Any) -> None:
    with pytest.raises(UsageError, match="'floats' asks for 'answer', and the data have no such column"):
        check([{}, {"solution": "1"}], "floats")


def test_a_function_is_asked_once_about_each_distinct_row_that_it_reads(
    check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COUNT", str(tmp_path / "count"))
    check(answer_rows("1", "2", "3"), "counted")  # it reads no column of the data
    assert (tmp_path / "count").read_text() == "x"
    check(answer_rows("1", "2", "3"), "counted", try_rows=False)
    assert (tmp_path / "count").read_text() == "x"


def test_a_slow_function_is_asked_for_a_while_and_that_is_said(
    check: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_rows, "BUDGET", 0.2)
    monkeypatch.setattr(reward_rows, "AT_ONCE", 4)
    _, said = check(answer_rows(*map(str, range(40))), "slow")
    assert any(
        "was asked about 8 of 40 distinct rows" in line or "of 40 distinct rows" in line for line in said
    )


def test_that_math_verify_is_missing_is_said_once(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "math_verify_is_here", lambda: False)
    _, said = check(answer_rows("1"), [ANSWER, {**ANSWER, "name": "again"}])
    assert len([line for line in said if "math-verify is not installed" in line]) == 1
    assert preflight.answers is answers
    monkeypatch.setattr(answers, "math_verify_is_here", lambda: True)
    assert not [line for line in check(answer_rows("1"), [ANSWER])[1] if "math-verify" in line]


def test_without_leave_no_code_is_run_and_what_is_missing_is_found_all_the_same(
    tmp_path: Path, tiny_model: Path
) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("raise AssertionError('imported')")
    (tmp_path / "mine.py").write_text("raise AssertionError('imported')\ndef f(): pass\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "answer": "1"}\n')

    def look(function: str) -> None:
        stage = {
            "kind": "grpo",
            "model": str(tiny_model),
            "data": str(tmp_path / "rows.jsonl"),
            "updates": 1,
            "sampling": {"max_new_tokens": 4},
        }
        config = parse({"name": "tiny", "stages": {"s": {**stage, "reward": f"python:{function}"}}})
        Sources(config, tmp_path / "run", code=False).check(["s"])

    look(f"{tmp_path}/mine.py:f")
    for name, message in (("g", "has no function 'g'; did you mean"), ("", "must be module.function")):
        with pytest.raises(UsageError, match=message if name == "" else "has no function 'g'"):
            look(f"{tmp_path}/mine.py:{name}")
    with pytest.raises(UsageError, match="cannot be imported: FileNotFoundError"):
        look(f"{tmp_path}/theirs.py:f")
    with pytest.raises(UsageError, match="cannot be imported: ModuleNotFoundError"):
        look("nowhere_at_all.f")


def test_the_passes_over_the_rows_tell_how_far_they_are(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    reward = [ANSWER, {"kind": "python", "function": f"{tmp_path}/mine.py:floats"}]
    stage = {"kind": "grpo", "model": "gpt2", "data": "d.jsonl", "reward": reward}
    terms = parse({"name": "tiny", "stages": {"s": stage}}).stages["s"].reward_terms()
    rows = [PromptRecord("q", {"answer": str(i)}) for i in range(130)]
    told: list[tuple[str, int, int]] = []
    with reward_rows.functions_of(terms, "s") as code:
        assert not list(reward_rows.faults("s", terms, rows, str, code, lambda *one: told.append(one)))
    first, second = "s: rewards' references", f"s: asking {terms[1].log_name}"
    assert told == [(what, done, 130) for what in (first, second) for done in (0, 64, 128)]
