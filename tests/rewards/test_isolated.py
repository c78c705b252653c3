"""What a reward does to its own process: exits, crashes, hangs, forks, prints. Each is an error that names
it, or nothing at all."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from keel.errors import RewardError, UsageError
from keel.rewards import functions, loading, rules
from keel.rewards.isolated import IsolatedFunction
from keel.rewards.trainer import Logged, TrainingState

PROMPTS, COMPLETIONS, IDS = ["a", "b", "c"], ["x", "yy", "zzz"], [(1,)] * 3
SOURCE = """
import ctypes, os, re, sys, threading, time

print("imported")

def lengths(completions, answer):
    answer.clear()  # nobody else's
    print("x" * 100_000)
    return [len(c) for c in completions]

def leaves(completions, **_): sys.exit(3)
def leaves_at_once(completions, **_): os._exit(4)
def interrupts(completions, **_): raise KeyboardInterrupt
def generator_exit(completions, **_): raise GeneratorExit
class Own(BaseException): pass

def own(completions, **_): raise Own("mine")
def crashes(completions, **_): ctypes.string_at(0)
def aborts(completions, **_): os.abort()
def hangs(completions, **_): time.sleep(60)
def hangs_in_c(completions, **_): re.match("(a+)+$", "a" * 60 + "b")
def kills_itself(completions, **_): os.kill(os.getpid(), 9)
def recurses(completions, **_): return recurses(completions)
def closes_everything(completions, **_): os.closerange(3, 200); return [1.0] * len(completions)
def yields(completions, **_): yield 1.0
def bytes_(completions, **_): return [b"1", 0, 0]
def huge(completions, **_): return [10 ** 10000, 0, 0]

class Evil:
    def __float__(self): sys.exit(1)
    def __repr__(self): raise SystemExit

def evil(completions, **_): return [Evil(), 0, 0]

def forks(completions, **_):
    os.fork()
    return [1.0] * len(completions)

def starts_threads(completions, **_):
    threading.Thread(target=time.sleep, args=(60,)).start()
    return [1.0] * len(completions)

async def coroutine(completions, **_): return [1.0] * len(completions)

def changes_the_process(completions, **_):
    os.chdir("/"); os.environ["KEEL_CHANGED"] = "1"; sys.path.clear(); sys.setrecursionlimit(60)
    return [1.0] * len(completions)
"""


@pytest.fixture
def isolated(tmp_path: Path) -> Any:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    made: list[IsolatedFunction] = []

    def make(name: str, timeout: float = 20) -> IsolatedFunction:
        made.append(IsolatedFunction(f"{path}:{name}", "s: reward", name, timeout=timeout))
        return made[-1]

    yield make
    for one in made:
        one.process.close()


def call(function: IsolatedFunction, **columns: Any) -> list[float | None]:
    return functions.call(function, "mine", PROMPTS, COMPLETIONS, IDS, columns or {"answer": ["1", "2", "3"]})


def test_it_answers_and_can_change_nothing(isolated: Any, capfd: pytest.CaptureFixture[str]) -> None:
    columns = {"answer": [["1"], ["2"], ["3"]]}
    function = isolated("lengths")
    assert call(function, **columns) == call(function, **columns) == [1.0, 2.0, 3.0]
    assert columns == {"answer": [["1"], ["2"], ["3"]]}
    assert "imported" not in capfd.readouterr().out  # a command's result on stdout stays whole


@pytest.mark.parametrize("name", ["forks", "starts_threads", "coroutine", "changes_the_process"])
def test_what_it_does_to_its_process_it_does_to_no_other(isolated: Any, name: str) -> None:
    folder = Path.cwd()
    function = isolated(name)
    assert call(function) == call(function) == [1.0, 1.0, 1.0]
    assert Path.cwd() == folder
    assert "KEEL_CHANGED" not in os.environ


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("leaves", "raised SystemExit: 3 .*sample 0"),
        ("leaves_at_once", "left its process with exit code 4"),
        ("interrupts", "raised KeyboardInterrupt"),
        ("generator_exit", "raised GeneratorExit"),
        ("own", "raised Own: mine .*sample 0"),
        ("crashes", "crashed: its process was ended by SIGSEGV"),
        ("aborts", "ended by SIGABRT"),
        ("kills_itself", "ended by SIGKILL"),
        ("recurses", "raised RecursionError"),
        ("closes_everything", "left its process"),
        ("yields", "returned a generator, not a list"),
        ("bytes_", "returned b'1', which is no finite number"),
        ("huge", "no finite number"),
        ("evil", "returned a Evil, which is no finite number"),
    ],
)
def test_what_goes_wrong_names_the_reward_and_the_next_call_finds_a_new_process(
    isolated: Any, name: str, message: str
) -> None:
    function = isolated(name)
    for _ in range(2):
        with pytest.raises(RewardError, match=f"reward '(mine|{name})' .*{message}"):
            call(function)


@pytest.mark.parametrize("name", ["hangs", "hangs_in_c"])
def test_a_call_that_never_ends_is_stopped_also_inside_c(isolated: Any, name: str) -> None:
    function = isolated(name, timeout=1)
    start = time.monotonic()
    with pytest.raises(RewardError, match=f"'{name}' took more than 1 s on 3 samples and was stopped; raise"):
        call(function)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("source", "message", "error"),
    [
        ("import nowhere_at_all", "cannot be imported: ModuleNotFoundError", UsageError),
        ("raise BaseException('no')", "cannot be imported: BaseException: no", UsageError),
        ("raise SystemExit(1)", "cannot be imported: SystemExit: 1", UsageError),
        ("import os; os._exit(5)", "left its process with exit code 5", RewardError),
        ("import time; time.sleep(60)", "took more than 1 s to be imported", RewardError),
        ("g = 1", "has no function 'f'", UsageError),
    ],
)
def test_an_import_that_goes_wrong_is_said(tmp_path: Path, source: str, message: str, error: Any) -> None:
    (tmp_path / "bad.py").write_text(source)
    function = IsolatedFunction(f"{tmp_path}/bad.py:f", "s: reward", "mine", timeout=1)
    with pytest.raises(error, match=message):
        call(function)


def test_what_no_process_can_be_sent_says_the_way_out(isolated: Any) -> None:
    with pytest.raises(RewardError, match=r"cannot be sent to a process of its own .* `isolate: false`"):
        call(isolated("lengths"), answer=[lambda: 1] * 3)


def test_its_process_ends_with_keel_s_even_in_the_middle_of_c(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SOURCE)
    code = (
        "import sys; from keel.rewards.isolated import IsolatedFunction\n"
        f"f = IsolatedFunction({f'{tmp_path}/mine.py:hangs_in_c'!r}, 's', 'f'); f.signature\n"
        "print(f.process._child.pid, flush=True); f.ask({'completions': ['x']}, 1)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(0.3)
    parent.kill()
    parent.wait()
    until = time.monotonic() + 10
    while _alive(child) and time.monotonic() < until:
        time.sleep(0.02)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


class Own(BaseException):
    pass


@pytest.mark.parametrize("error", [SystemExit(2), GeneratorExit(), RecursionError("deep"), Own()])
def test_within_keel_s_process_an_exit_is_an_error_too(error: BaseException) -> None:
    def mine(completions: list[str]) -> list[float]:
        raise error

    with pytest.raises(RewardError, match=f"'mine' raised {type(error).__name__}"):
        functions.call(mine, "mine", PROMPTS, COMPLETIONS, IDS, {})


def test_within_keel_s_process_a_function_gets_deep_copies() -> None:
    columns = {"answer": [{"parts": [1]}, {"parts": [2]}, {"parts": [3]}]}

    def mine(answer: list[Any]) -> list[float]:
        for value in answer:
            value["parts"].append(9)
        return [1.0] * len(answer)

    functions.call(mine, "mine", PROMPTS, COMPLETIONS, IDS, columns)
    assert columns == {"answer": [{"parts": [1]}, {"parts": [2]}, {"parts": [3]}]}


# ---------------------------------------------------------------- patterns


def test_a_pattern_that_backtracks_without_end_is_stopped_and_named() -> None:
    reward = rules.regex("(a+)+$", timeout=0.5, name="tail")
    assert reward(["?"], ["aaa"]) == [1.0]
    with pytest.raises(
        RewardError, match=r"'tail' took more than 0.5 s over one reply \(sample 1\).*'\(a\+\)\+\$'"
    ):
        reward(["?"] * 2, ["aaa", "a" * 60 + "b"])
    assert reward(["?"] * 2, ["aaa", "b"]) == [1.0, 0.0]  # a new process


@pytest.mark.parametrize("isolate", [True, False])
def test_an_error_comes_with_file_and_line(isolate: bool, tmp_path: Path) -> None:
    """The line of the reward's own file, also where a library that it calls raises."""
    path = tmp_path / "mine.py"
    path.write_text(
        "import json\n\ndef score(completions, **_):\n    return [json.loads(c) for c in completions]\n"
    )
    name = f"{path}:score"
    function = IsolatedFunction(name, "reward", "mine") if isolate else loading.load(name, "reward")
    with pytest.raises(RewardError, match=r"raised JSONDecodeError: .*\(sample 0, .*\), in .*mine\.py:4$"):
        functions.call(function, "mine", PROMPTS, COMPLETIONS, IDS, {})


_LOGS = """
def score(completions, trainer_state, log_metric, log_extra):
    log_metric("lengths", trainer_state.global_step + len(completions[0]))
    log_metric("none", float("nan"))
    log_extra("seen", [c.upper() for c in completions])
    if "boom" in completions:
        raise ValueError(completions[0])
    return [trainer_state.epoch] * len(completions)
"""


@pytest.mark.parametrize("isolate", [True, False])
def test_what_trl_hands_over_is_there_and_what_is_logged_comes_back(isolate: bool, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(_LOGS)
    name = f"{path}:score"
    function = IsolatedFunction(name, "reward", "mine") if isolate else loading.load(name, "reward")
    state, logged = TrainingState(4, 9, 0.5), Logged()
    for texts in (["x", "yy"], ["yy", "z"]):
        values = functions.call(function, "mine", PROMPTS[:2], texts, IDS[:2], {}, state, logged)
        assert values == [0.5, 0.5]
    assert logged.metrics == {"lengths": [5.0, 6.0]}
    assert logged.extra == {"seen": ["YY", "Z"]}
    with pytest.raises(RewardError, match="sample 1"):
        functions.call(function, "mine", PROMPTS[:2], ["a", "boom"], IDS[:2], {}, state, logged)


def test_rows_of_one_source_log_in_their_places() -> None:
    logged = Logged()
    logged.add({"metrics": {"m": [1.0]}, "extra": {"e": ["a", "b"]}}, [0, 2], 3)
    assert logged.dump() == {"metrics": {"m": [1.0]}, "extra": {"e": ["a", None, "b"]}}
