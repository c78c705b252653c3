"""arithmetic: every solution checks out against an independent reading of it; answers compare exactly."""

from __future__ import annotations

import re

import pytest

from keel.errors import DataError, UsageError
from keel.worlds import load
from keel.worlds.arithmetic import final_answer

arithmetic = load("arithmetic")
STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


def recompute(question: str) -> int:
    """The answer, read from the question's sentences alone."""
    sentences = question.split(". ")
    value = int(re.findall(r"\d+", sentences[0])[0])
    for sentence in sentences[1:-1]:
        n = int(re.findall(r"\d+", sentence)[0])
        if "times as many" in sentence:
            value *= n
        elif "equal boxes" in sentence:
            value, rest = divmod(value, n)
            assert rest == 0
        elif re.search(r"gives away|loses|sells", sentence):
            value -= n
        else:
            assert re.search(r"buys|finds|gets", sentence)
            value += n
        assert value >= 0
    return value


@pytest.mark.parametrize("difficulty", [1, 2, 3, 4, 5])
def test_solutions_check_out(difficulty: int) -> None:
    for row in arithmetic.rows("demonstrations", 200, 0, difficulty=difficulty):
        question, solution = row["prompt"][0]["content"], row["completion"][0]["content"]
        assert int(row["answer"]) == recompute(question)
        assert solution.endswith(f"\n#### {row['answer']}")
        steps = STEP.findall(solution)
        assert len(steps) == difficulty
        carry = question.split(" ")[2]
        for left, operation, right, result in steps:
            assert left == carry
            expected = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}
            assert int(result) == (int(left) / int(right) if operation == "/" else expected[operation])
            carry = result
        assert arithmetic.gold(question, solution, row) == {"correct": 1.0, "format": 1.0, "total": 1.0}


def test_difficulty_grows_the_numbers_and_uses_every_operation() -> None:
    def used(difficulty: int) -> tuple[set[str], int]:
        rows = arithmetic.rows("demonstrations", 200, 0, difficulty=difficulty)
        steps = [step for row in rows for step in STEP.findall(row["completion"][0]["content"])]
        return {step[1] for step in steps}, max(int(step[0]) for step in steps)

    assert used(1)[0] == {"+", "-"}
    assert used(5)[0] == {"+", "-", "*", "/"}
    assert used(1)[1] <= 20 < used(5)[1]


@pytest.mark.parametrize("difficulty", [1, 2, 4])
def test_test_problems_occur_nowhere_else(difficulty: int) -> None:
    def numbers(split: str, key: str) -> set[tuple[str, ...]]:
        """A problem as its numbers and verbs, so that a change of names or things is no new problem."""
        verbs = r"\d+|buys|finds|gets|gives|loses|sells|times|boxes"
        kind = {"buys": "+", "finds": "+", "gets": "+", "gives": "-", "loses": "-", "sells": "-"}
        texts = [
            row[key] if key == "text" else row[key][0]["content"]
            for row in arithmetic.rows(split, 1500, 0, difficulty=difficulty)
        ]
        texts = [text for text in texts if "How many" in text]  # bare sums are no problems
        texts = [text.split("\nAssistant:")[0].split("\nShe")[0].split("\nHe")[0] for text in texts]
        return {tuple(kind.get(word, word) for word in re.findall(verbs, text)) for text in texts}

    held_out = numbers("test_prompts", "prompt")
    assert len(held_out) > 20
    for split in ("prompts", "demonstrations", "comparisons", "text"):
        assert not held_out & numbers(split, "text" if split == "text" else "prompt"), split


def test_text_has_the_bare_sums_of_test_problems_too() -> None:
    """What is held out is the problem: how to find its sum in it. The sums themselves are a table that can be
    learned."""

    def sums(text: str) -> set[str]:
        return set(re.findall(r"\d+ [+-] \d+ = \d+", text))

    text = [row["text"] for row in arithmetic.rows("text", 3000, 0, difficulty=1)]
    tables = set[str]().union(*(sums(row) for row in text if "How many" not in row))
    needed = set[str]()
    for row in arithmetic.rows("test_prompts", 100, 0, difficulty=1):
        start, operand = re.findall(r"\d+", row["prompt"][0]["content"])
        operation = "+" if int(row["answer"]) > int(start) else "-"
        needed.add(f"{start} {operation} {operand} = {row['answer']}")
    assert needed <= tables
    worked = set[str]().union(*(sums(row) for row in text if "How many" in row))
    assert not needed & worked


def test_bad_solutions_lose() -> None:
    kinds = set()
    for row in arithmetic.rows("comparisons", 300, 0):
        good = arithmetic.gold("", row["chosen"][0]["content"], row)
        bad = arithmetic.gold("", row["rejected"][0]["content"], row)
        assert good == {"correct": 1.0, "format": 1.0, "total": 1.0}
        assert bad["correct"] + bad["format"] < 2
        kinds.add((bad["correct"], bad["format"]))
    assert kinds == {(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)}  # wrong; right but badly formed; unmarked


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7\n#### 7", "7"),
        ("#### 1,234", "1234"),
        ("#### $1,200.50", "1200.5"),
        ("####42", "42"),
        ("#### -3", "-3"),
        ("#### −3", "-3"),
        ("#### -$3", "-3"),
        ("#### 18.00", "18"),
        ("#### 0.10.", "0.1"),
        ("#### .5", "0.5"),
        ("#### -0", "0"),
        ("#### 007", "7"),
        ("#### 12345678901234567890.10", "12345678901234567890.1"),
        ("#### 5\n#### 6", "6"),
        ("#### 5 apples", "5"),
        ("The answer is 7", None),
        ("#### seven", None),
        ("#### 6\nand then ####", None),
        ("", None),
    ],
)
def test_final_answer(text: str, number: str | None) -> None:
    assert final_answer(text) == number


@pytest.mark.parametrize(
    ("completion", "correct", "form"),
    [
        ("work\n#### 1,200", 1.0, 1.0),
        ("work\n#### 1200.0\n", 1.0, 1.0),
        ("#### 1200", 1.0, 1.0),
        ("work\n#### 1201", 0.0, 1.0),
        ("work #### 1200", 1.0, 0.0),  # not on a line of its own
        ("#### 1200\nand so on", 1.0, 0.0),
        ("#### 7\n#### 1200", 1.0, 0.0),
        ("#### 1200\n#### 7", 0.0, 0.0),
        ("the answer is 1200", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_gold(completion: str, correct: float, form: float) -> None:
    expected = {"correct": correct, "format": form, "total": correct}
    assert arithmetic.gold("", completion, {"answer": "1200"}) == expected


def test_gold_reads_answers_of_gsm8k() -> None:
    row = {"answer": "He has 2 * 9 = <<2*9=18>>18 eggs.\n#### 18"}
    assert arithmetic.gold("", "#### 18", row)["total"] == 1.0
    assert arithmetic.gold("", "#### 9", row)["total"] == 0.0


@pytest.mark.parametrize("columns", [{}, {"answer": ""}, {"answer": "many"}])
def test_gold_without_an_answer_is_an_error(columns: dict[str, str]) -> None:
    with pytest.raises(DataError, match="answer"):
        arithmetic.gold("How many?", "#### 1", columns)


@pytest.mark.parametrize("difficulty", [0, 6, 2.0, True, "2", [1]])
def test_bad_difficulty_is_refused(difficulty: object) -> None:
    with pytest.raises(UsageError, match="difficulty must be 1, 2, 3, 4 or 5"):
        arithmetic.rows("text", 1, 0, difficulty=difficulty)
