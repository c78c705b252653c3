"""arithmetic: word problems with worked solutions that end in `#### N`, the form of GSM8K (2110.14168).

Someone has some things and a few events change their number. `difficulty` (1 to 5) sets how many events, how
large the numbers, and which operations. Answers are checked exactly, as decimals and not as floats.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import Any

from keel.errors import DataError, UsageError
from keel.worlds import streams

__all__ = ["final_answer", "gold", "name", "rows", "splits"]

name = "arithmetic"
splits: Mapping[str, str] = {
    "text": "worked problems, those of a chat mostly badly, and bare sums, for pretraining",
    "demonstrations": "problems with right, well-formed solutions (prompt, completion, answer)",
    "comparisons": (
        "problems with a right solution and a wrong or badly formed one (prompt, chosen, rejected)"
    ),
    "prompts": "problems with their answer",
    "test_prompts": "problems that no other split has, with their answer (text has their bare sums)",
}
DEFAULT_ROWS = {
    "text": 12000,
    "demonstrations": 2000,
    "comparisons": 4000,
    "prompts": 4000,
    "test_prompts": 256,
}
DEFAULT_DIFFICULTY = 2
SUMS_OF_A_ROW = 8  # problems whose sums make a row of bare sums, in text
TEST_SHARE = 0.15  # of all possible problems are in test_prompts only

_NUMBER = r"[-−+]?\s*\$?\s*(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_MARKED = re.compile(rf"####\s*({_NUMBER})")
_FINAL_LINE = re.compile(rf"(?:^|\n)####[ ]*{_NUMBER}\.?\s*\Z")


@dataclass(frozen=True, slots=True)
class Level:
    """What a difficulty means."""

    steps: int
    largest: int  # of the numbers named in the problem
    operations: str


LEVELS: dict[int, Level] = {
    1: Level(1, 20, "+-"),
    2: Level(2, 30, "+-"),
    3: Level(3, 50, "+-*"),
    4: Level(4, 100, "+-*/"),
    5: Level(5, 500, "+-*/"),
}

_PEOPLE = (
    ("Anna", "she"),
    ("Ben", "he"),
    ("Clara", "she"),
    ("David", "he"),
    ("Emma", "she"),
    ("Felix", "he"),
    ("Maria", "she"),
    ("Tom", "he"),
)
_THINGS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps")
_EVENTS = {
    "+": (
        "{Who} buys {n} more {things}.",
        "{Who} finds {n} more {things}.",
        "{Who} gets {n} {things} from a friend.",
    ),
    "-": ("{Who} gives away {n} {things}.", "{Who} loses {n} {things}.", "{Who} sells {n} {things}."),
    "*": ("Then {who} has {n} times as many {things}.", "A lucky week makes it {n} times as many {things}."),
    "/": ("{Who} puts the {things} into {n} equal boxes and keeps one box.",),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem and the numbers on its way: `values[0]` is the start, `values[-1]` the answer."""

    person: str
    pronoun: str
    things: str
    events: tuple[str, ...]  # one sentence for each step
    steps: tuple[tuple[str, int], ...]  # (operation, operand)
    values: tuple[int, ...]

    @property
    def question(self) -> str:
        """The problem as it is asked: the start, what happens, and the question."""
        told = " ".join([f"{self.person} has {self.values[0]} {self.things}.", *self.events])
        return f"{told} How many {self.things} does {self.person} have now?"


def rows(split: str, rows: int | None, seed: int, **options: Any) -> Iterator[dict[str, Any]]:
    """Rows of `split`, see `keel.worlds.World.rows`. Option: `difficulty`, 1 to 5."""
    streams.check_request(name, split, splits, rows, options, ("difficulty",))
    difficulty = options.get("difficulty", DEFAULT_DIFFICULTY)
    if type(difficulty) is not int or difficulty not in LEVELS:
        raise UsageError(f"world:{name}/{split}: difficulty must be 1, 2, 3, 4 or 5, not {difficulty!r}")
    make = {
        "text": partial(_text_row, LEVELS[difficulty]),
        "demonstrations": _demonstration_row,
        "comparisons": _comparison_row,
        "prompts": _prompt_row,
        "test_prompts": _prompt_row,
    }[split]
    level, is_test = LEVELS[difficulty], split == "test_prompts"
    count = DEFAULT_ROWS[split] if rows is None else rows
    streams_of_rows = (
        streams.row_random(f"{name}-{difficulty}", split, seed, index) for index in range(count)
    )
    return (make(rng, _problem(rng, level, is_test)) for rng in streams_of_rows)


def gold(prompt: str, completion: str, columns: Mapping[str, Any]) -> dict[str, float]:
    """correct: the last `#### N` is the answer. format: the completion ends with its only `#### N`. total =
    correct.

    `columns["answer"]` is the answer, alone or as a GSM8K solution that ends in `#### N`; DataError without
    it.
    """
    given = str(columns.get("answer", ""))
    marked = final_answer(given)
    answer = _normal(given) if marked is None else marked
    if answer is None:
        raise DataError(f"world:{name}: column 'answer' holds no number ({given!r}) for prompt {prompt!r}")
    correct = float(final_answer(completion) == answer)
    well_formed = completion.count("####") == 1 and _FINAL_LINE.search(completion) is not None
    return {"correct": correct, "format": float(well_formed), "total": correct}


def final_answer(text: str) -> str | None:
    """The number after the last `####` in plain form (`$1,200.50` → `1200.5`), or None when there is none."""
    if "####" not in text:
        return None
    match = _MARKED.match(text[text.rindex("####") :])
    return _normal(match[1]) if match else None


def _normal(number: str) -> str | None:
    """One way to write each number: no sign +, no commas, no currency, no trailing zeros, no −0."""
    if not re.fullmatch(_NUMBER, number.strip()):
        return None
    plain = format(Decimal(re.sub(r"[,$\s+]", "", number).replace("−", "-")), "f")
    if "." in plain:
        plain = plain.rstrip("0").rstrip(".")
    return "0" if plain in ("-0", "") else plain


# ---------------------------------------------------------------- problems


def _problem(rng: random.Random, level: Level, is_test: bool) -> Problem:
    """A random problem of the level from one side of the division into test problems and all others.

    The side is decided by the numbers and operations alone, so that no test problem is another one with other
    names.
    """
    while True:
        start = rng.randint(2, level.largest)
        values, steps = [start], list[tuple[str, int]]()
        for _ in range(level.steps):
            operation, operand, value = _step(rng, level, values[-1])
            steps.append((operation, operand))
            values.append(value)
        if (streams.fraction(f"arithmetic/{start}/{steps}") < TEST_SHARE) == is_test:
            break
    person, pronoun = rng.choice(_PEOPLE)
    things = rng.choice(_THINGS)
    events = tuple(
        rng.choice(_EVENTS[operation]).format(Who=pronoun.title(), who=pronoun, n=operand, things=things)
        for operation, operand in steps
    )
    return Problem(person, pronoun, things, events, tuple(steps), tuple(values))


def _step(rng: random.Random, level: Level, value: int) -> tuple[str, int, int]:
    """(operation, operand, result) that makes sense at `value`: whole, never negative, never without end."""
    divisors = [n for n in range(2, 10) if value % n == 0 and value > n]
    possible = [
        operation
        for operation in level.operations
        if operation == "+"
        or (operation == "-" and value > 2)
        or (operation == "*" and value <= 10 * level.largest)
        or (operation == "/" and divisors)
    ]
    match rng.choice(possible):
        case "+":
            operand = rng.randint(2, level.largest)
            return "+", operand, value + operand
        case "-":
            operand = rng.randint(2, min(value, level.largest))
            return "-", operand, value - operand
        case "*":
            operand = rng.randint(2, 5)
            return "*", operand, value * operand
        case _:
            operand = rng.choice(divisors)
            return "/", operand, value // operand


def _work(problem: Problem, values: tuple[int, ...]) -> list[str]:
    """A line for each step, with the results `values` says."""
    return [
        f"{problem.pronoun.title()} has {values[i]} {operation} {operand} = {values[i + 1]} {problem.things}."
        for i, (operation, operand) in enumerate(problem.steps)
    ]


def _solution(problem: Problem) -> str:
    return "\n".join([*_work(problem, problem.values), f"#### {problem.values[-1]}"])


def _bad_solution(rng: random.Random, problem: Problem) -> str:
    """A wrong solution, or a right one that does not end with its only `#### N`."""
    answer = problem.values[-1]
    work = _work(problem, problem.values)
    wrong = answer + rng.choice([d for d in (-10, -3, -2, -1, 1, 2, 3, 10) if answer + d >= 0])
    match rng.choice(("slip", "slip", "unlike", "unmarked", "twice", "buried")):
        case "slip":
            return "\n".join([*_work(problem, (*problem.values[:-1], wrong)), f"#### {wrong}"])
        case "unlike":
            return "\n".join([*work, f"#### {wrong}"])
        case "unmarked":
            return "\n".join([*work, f"The answer is {answer}."])
        case "twice":
            return "\n".join([*work, f"#### {wrong}", f"#### {answer}"])
        case _:
            return "\n".join([f"#### {answer}", *work])


# ---------------------------------------------------------------- rows


def _user(problem: Problem) -> list[dict[str, str]]:
    return [{"role": "user", "content": problem.question}]


def _assistant(content: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": content}]


def _prompt_row(rng: random.Random, problem: Problem) -> dict[str, Any]:
    return {"prompt": _user(problem), "answer": str(problem.values[-1])}


def _demonstration_row(rng: random.Random, problem: Problem) -> dict[str, Any]:
    return {
        "prompt": _user(problem),
        "completion": _assistant(_solution(problem)),
        "answer": str(problem.values[-1]),
    }


def _comparison_row(rng: random.Random, problem: Problem) -> dict[str, Any]:
    return {
        "prompt": _user(problem),
        "chosen": _assistant(_solution(problem)),
        "rejected": _assistant(_bad_solution(rng, problem)),
        "answer": str(problem.values[-1]),
    }


def _text_row(level: Level, rng: random.Random, problem: Problem) -> dict[str, Any]:
    """A problem with a solution, in the form of a chat mostly a bad one; or bare sums, of test problems
    too."""
    form = rng.random()
    if form < 0.05:
        return {"text": f"User: {problem.question}\nAssistant: {_solution(problem)}"}
    if form < 0.4:
        return {"text": f"User: {problem.question}\nAssistant: {_bad_solution(rng, problem)}"}
    if form < 0.6:
        return {"text": f"{problem.question}\n{_solution(problem)}"}
    others = (_problem(rng, level, rng.random() < TEST_SHARE) for _ in range(SUMS_OF_A_ROW - 1))
    sums = [
        f"{a} {operation} {operand} = {b}"
        for one in (problem, *others)
        for (operation, operand), a, b in zip(one.steps, one.values, one.values[1:])
    ]
    return {"text": "\n".join(sums)}
