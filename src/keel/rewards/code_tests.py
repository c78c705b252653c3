"""Tests of programs as data sets have them, and the program of a reply. Nothing is run here.

    ["assert f(1) == 2", …]                        MBPP's list: each one a test
    "def test_one(): …"                            Python: each function test_… is a test, else all is one
    "def check(candidate): …"                      HumanEval's, with the function's name in `entry_point`
    [{"input": "1 2", "output": "3"}, …]           what goes in and comes out
    {"inputs": ["1 2", …], "outputs": ["3", …]}    the same as APPS and TACO have it; with "fn_name" the
                                                   arguments and the value of a function
Each also as JSON text.
"""

from __future__ import annotations

import ast
import bisect
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MOST_TESTS = 100  # of one reply that are run
_OPENS = re.compile(r"[ \t]*(`{3,}|~{3,})[ \t]*([\w+.-]*)")
_CLOSES = re.compile(r"[ \t]*(`{3,}|~{3,})[ \t\r]*")
_PYTHON = ("", "python", "python3", "py", "py3")


@dataclass(frozen=True, slots=True)
class CodeTest:
    """One test: what a sandbox is told, and what is looked for outside of it."""

    job: Mapping[str, Any] = field(default_factory=dict[str, Any])
    expected: Any = None

    def passed(self, ended: Mapping[str, Any], token: str) -> bool:
        """Whether what a sandbox says of it is what was wanted."""
        if ended.get("ended") != "ok":
            return False
        match self.job["kind"]:
            case "stdin":
                return _lines(ended["output"]) == _lines(self.expected)
            case "call":
                try:
                    return _same(json.loads(ended["value"]), self.expected)
                except (ValueError, RecursionError):
                    return False
            case _:
                return ended["value"] == token


def program_of(reply: str, unfenced: str = "run") -> str:
    """The program of a reply: its last fenced block that says python, py or nothing; without any all of the
    reply behind its thought (`unfenced: run`), or "" (`fail`)."""
    text = reply.rpartition("</think>")[2]
    blocks = [inside for language, inside in _blocks(text) if language in _PYTHON]
    if blocks:
        return blocks[-1]
    return text if unfenced == "run" and "```" not in text else ""


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """(language, content) of each fenced block that ends, in time in proportion to the text: a reply of many
    fences that none ends must cost no more than another."""
    lines = text.split("\n")
    closes: dict[str, list[int]] = {}  # a fence → the lines that close it
    for number, line in enumerate(lines):
        if closed := _CLOSES.fullmatch(line):
            closes.setdefault(closed[1], []).append(number)
    at = 0
    while at < len(lines):
        opened = _OPENS.match(lines[at])
        ends = closes.get(opened[1], []) if opened else []
        place = bisect.bisect_right(ends, at)
        if opened and place < len(ends):
            yield opened[2].lower(), "".join(f"{line}\n" for line in lines[at + 1 : ends[place]])
            at = ends[place]
        at += 1


def parse_tests(value: Any, entry_point: Any = None, setup: str = "") -> list[CodeTest]:
    """The tests that a row's column holds. setup: Python that runs before each that is Python. ValueError,
    with the reason, for anything else."""
    if isinstance(value, str):
        value = _unpacked(value)
    if isinstance(value, str):
        tests = _of_text(value, entry_point, setup)
    elif isinstance(value, Mapping):
        tests = _of_lists(value)
    elif isinstance(value, Sequence) and value:
        tests = [_of_item(item, setup) for item in value]
    else:
        raise ValueError("holds no tests")
    return tests[:MOST_TESTS]


def setup_of(value: Any) -> str:
    """What a row says is to run before tests that are Python: text, or a list of lines; "" for anything
    else, which `problem` finds where there are such tests."""
    if isinstance(value, list | tuple):
        return "\n".join(map(str, value))
    return value if isinstance(value, str) else ""


def problem(value: Any, entry_point: Any = None, setup: Any = None) -> str:
    """Why a column holds no tests, or what is to run before them cannot; "" where all is well."""
    try:
        tests = parse_tests(value, entry_point)
    except ValueError as error:
        return str(error)
    if setup is None or all(test.job["kind"] != "python" for test in tests):
        return ""
    lines = setup if isinstance(setup, list | tuple) else [setup]
    if not all(isinstance(line, str) for line in lines):
        return "has a `setup` that is neither text nor a list of lines"
    try:
        _parsed(setup_of(setup))
    except ValueError as error:
        return f"has a `setup` that {error}"
    return ""


def _unpacked(text: str) -> Any:
    """What JSON text says, where it is a list or an object; else the text."""
    if text.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(text)
        except ValueError:
            return text
        except RecursionError:
            raise ValueError("is nested too deep") from None
    return text


def _of_text(text: str, entry_point: Any, setup: str) -> list[CodeTest]:
    if not text.strip():
        raise ValueError("is blank")
    names = [node.name for node in _parsed(text).body if isinstance(node, ast.FunctionDef)]
    code = f"{setup}\n{text}"
    if "check" in names and not any(name.startswith("test_") for name in names):
        if not entry_point:
            raise ValueError(
                "defines check(candidate), and the row does not say what to check (`entry_point`)"
            )
        if not isinstance(entry_point, str) or not entry_point.isidentifier():
            raise ValueError(f"defines check(candidate), and `entry_point` is no name: {entry_point!r:.60}")
        return [CodeTest({"kind": "python", "code": code, "call": "check", "given": [entry_point]})]
    found = [name for name in names if name.startswith("test_")]
    return [CodeTest({"kind": "python", "code": code, "call": name}) for name in found] or [_python(code)]


def _python(code: str) -> CodeTest:
    return CodeTest({"kind": "python", "code": code})


def _parsed(text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"is no Python: {error}") from None


def _of_lists(value: Mapping[str, Any]) -> list[CodeTest]:
    inputs, outputs = value.get("inputs"), value.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise ValueError("needs `inputs` and `outputs`, two lists of one length")
    if not inputs:
        raise ValueError("holds no tests")
    name = value.get("fn_name")
    if not name:
        return [_of_item({"input": i, "output": o}, "") for i, o in zip(inputs, outputs)]
    if not all(isinstance(arguments, list) for arguments in inputs):
        raise ValueError("has `fn_name`, so that each of `inputs` must be a list of arguments")
    return [
        CodeTest({"kind": "call", "name": str(name), "arguments": arguments}, output)
        for arguments, output in zip(inputs, outputs)
    ]


def _of_item(item: Any, setup: str) -> CodeTest:
    if isinstance(item, str) and item.strip():
        _parsed(item)
        return _python(f"{setup}\n{item}")
    if isinstance(item, Mapping) and "input" in item and "output" in item:
        texts = [_text(item[key]) for key in ("input", "output")]
        return CodeTest({"kind": "stdin", "input": texts[0]}, texts[1])
    raise ValueError("must hold Python, or objects with `input` and `output`")


def _text(value: Any) -> str:
    """What goes through standard input or output: text, a number, or lines of them."""
    if isinstance(value, list):
        return "\n".join(map(_text, value))
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    raise ValueError("has an `input` or `output` that is no text")


def _lines(text: str) -> list[str]:
    """Without space at the ends of lines, and without empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _same(a: Any, b: Any) -> bool:
    """Equal as JSON; numbers to nine digits."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, bool) or isinstance(b, bool) or not (_number(a) and _number(b)):
        return type(a) is type(b) and a == b
    whole = isinstance(a, int) and isinstance(b, int)
    return a == b if whole else math.isclose(_float(a), _float(b), rel_tol=1e-9, abs_tol=1e-12)


def _number(value: Any) -> bool:
    return isinstance(value, int | float)


def _float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf
