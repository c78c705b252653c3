"""A reward for programs: those that a model wrote, run against their tests in a sandbox."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from keel.data.chat import own_text
from keel.rewards import code_tests, sandbox
from keel.rewards.code_tests import CodeTest
from keel.rewards.rules import Reward, check_column
from keel.rewards.sandbox import Limits, Sandbox


@dataclass(frozen=True, slots=True)
class CodeColumns:
    """Names of the columns that say how a program is tested."""

    tests: str
    setup: str = "setup"
    entry_point: str = "entry_point"


def code_reward(
    columns: CodeColumns,
    find: Callable[[], Sandbox],
    limits: Limits,
    *,
    score: Literal["share", "all"] = "share",
    unfenced: Literal["run", "fail"] = "run",
    at_once: int = 1,
) -> Reward:
    """The share of its tests that a reply's program passes (`all`: 1 where it passes every one, else 0); None
    for a row without tests. Range [0, 1].

    The program is found by `code_tests.program_of`, the tests are read by `code_tests.parse_tests`, of which
    the first 100 count. A program that raises, hangs, is killed or writes without end fails the test that it
    does it in, and after one that takes too long no other is run. find: gives the sandbox, at the first call.
    at_once: sandboxes that run at a time. Logged are code_timeouts, the share of programs with a test that
    took too long, and code_missing, that of replies without a program.
    """
    opened: list[Sandbox] = []

    def reward(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        log_metric: Callable[[str, float, int], None] | None = None,
        **data: Any,
    ) -> list[float | None]:
        check_column(data, columns.tests)
        if not opened:
            opened.append(find())
        rows = [
            _job(columns, data, index, own_text(reply), unfenced) for index, reply in enumerate(completions)
        ]
        different = {job.key: job for job in rows if job is not None and job.program.strip()}
        ended = dict(
            zip(different, _run_all(opened[0], list(different.values()), limits, at_once), strict=True)
        )
        if log_metric is not None and (asked := [job for job in rows if job is not None]):
            late = sum(job.key in ended and ended[job.key].late for job in asked)
            missing = sum(job.key not in ended for job in asked)
            log_metric("code_timeouts", late / len(asked), len(asked))
            log_metric("code_missing", missing / len(asked), len(asked))
        return [None if job is None else _score(job, ended.get(job.key), score) for job in rows]

    return reward


@dataclass(frozen=True, slots=True)
class _Job:
    program: str
    tests: Sequence[CodeTest]
    key: str  # the same for the same program and tests


@dataclass(frozen=True, slots=True)
class _Ended:
    passed: int
    late: bool  # a test took too long


def _job(
    columns: CodeColumns, data: Mapping[str, Sequence[Any]], row: int, reply: str, unfenced: str
) -> _Job | None:
    tests = data[columns.tests][row]
    if tests is None:
        return None
    setup, entry_point = (
        data[name][row] if name in data else None for name in (columns.setup, columns.entry_point)
    )
    program = code_tests.program_of(reply, unfenced)
    found = code_tests.parse_tests(tests, entry_point, code_tests.setup_of(setup))
    return _Job(program, found, repr((program, tests, setup, entry_point)))


def _run_all(box: Sandbox, jobs: Sequence[_Job], limits: Limits, at_once: int) -> list[_Ended]:
    with ThreadPoolExecutor(max_workers=at_once) as pool:
        try:
            return list(pool.map(lambda job: _run(box, job, limits), jobs))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            sandbox.stop_all()
            raise


def _run(box: Sandbox, job: _Job, limits: Limits) -> _Ended:
    tokens = [secrets.token_hex(16) for _ in job.tests]
    asked = [{**test.job, "token": token} for test, token in zip(job.tests, tokens, strict=True)]
    ended = sandbox.run(box, job.program, asked, limits)
    passed = sum(test.passed(answer, token) for test, answer, token in zip(job.tests, ended, tokens))
    late = len(ended) < len(asked) or any(answer.get("ended") == "time" for answer in ended)
    return _Ended(passed, late)


def _score(job: _Job, ended: _Ended | None, score: str) -> float:
    if ended is None:
        return 0.0
    return ended.passed / len(job.tests) if score == "share" else float(ended.passed == len(job.tests))
