"""Programs against their tests: what is found in a reply, what passes, and what a program cannot do."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from keel.config import parse
from keel.config.tasks import CodeRunSettings
from keel.errors import DataError, RewardError, UsageError
from keel.pipeline import trust
from keel.rewards import code_tests, gym, sandbox, sandbox_driver
from keel.rewards.code_reward import CodeColumns, code_reward
from keel.rewards.sandbox import Limits, Sandbox

TESTS = ["assert f(1) == 2", "assert f(5) == 6"]
RIGHT = "def f(x): return x + 1"
SHORT = Limits(seconds=0.3, memory=256, processes=8)


@pytest.fixture(scope="module")
def walls() -> Sandbox:
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    return sandbox.find("bubblewrap", "", False, "reward")


@pytest.fixture(scope="module", params=sandbox.KINDS)
def any_walls(request: pytest.FixtureRequest) -> Sandbox:
    """Each sandbox that works here; of containers those that have the image KEEL_TEST_IMAGE."""
    image = os.environ.get("KEEL_TEST_IMAGE", CodeRunSettings.model_fields["image"].default)
    try:
        return sandbox.find(request.param, image, False, "reward")
    except UsageError as error:
        pytest.skip(str(error))


def fenced(program: str) -> str:
    return f"Here it is:\n```python\n{program}\n```\nDone."


def rewards(
    replies: list[str],
    tests: Any,
    box: Sandbox | None = None,
    logged: dict[str, float] | None = None,
    **more: Any,
) -> list[float | None]:
    columns = more.pop("columns", {})
    reward = code_reward(
        CodeColumns("tests"), lambda: box or Sandbox("none"), more.pop("limits", SHORT), **more
    )
    note = {} if logged is None else logged
    given = {name: [value] * len(replies) for name, value in columns.items()}

    def log(name: str, value: float, of: int) -> None:
        note[name] = value

    return reward([0] * len(replies), replies, log, tests=[tests] * len(replies), **given)


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize(
    ("reply", "program"),
    [
        (fenced("a = 1"), "a = 1\n"),
        ("```py\na\n```\nbetter:\n```\nb\n```\nas said: ```c```", "b\n"),
        ("```python\na\n```\n```bash\nrm\n```", "a\n"),
        ("````python\n```\na\n````", "```\na\n"),
        ("<think>```python\na\n```</think>\n```python\nb\n```", "b\n"),
        ("a = 1", "a = 1"),
        ("```python\na = 1", ""),  # it never ended
        ("```json\n1\n```", ""),
    ],
)
def test_the_program_is_the_last_fenced_block(reply, program):
    if "~" not in reply:
        assert code_tests.program_of(reply.replace("\n", "\r\n")) == program.replace("\n", "\r\n")
    assert code_tests.program_of(reply) == program
    if "```" not in reply:
        assert code_tests.program_of(reply, "fail") == ""


@pytest.mark.parametrize(
    ("tests", "kinds"),
    [
        (TESTS, ["python"] * 2),
        ("def test_a(): assert f(1) == 2\ndef test_b(): assert f(1) == 3\ndef other(): pass", ["python"] * 2),
        ("assert f(1) == 2\nassert f(2) == 3", ["python"]),
        ([{"input": "1", "output": 2}], ["stdin"]),
        ({"inputs": ["1", "2"], "outputs": ["2", "3"]}, ["stdin"] * 2),
        ({"fn_name": "f", "inputs": [[1]], "outputs": [2]}, ["call"]),
    ],
)
def test_tests_are_read_in_each_form_and_as_json(tests, kinds):
    for given in (tests, tests if isinstance(tests, str) else json.dumps(tests)):
        assert [test.job["kind"] for test in code_tests.parse_tests(given, None)] == kinds


@pytest.mark.parametrize(
    ("tests", "said"),
    [
        ("", "blank"),
        ([], "no tests"),
        (3, "no tests"),
        (["assert f("], "no Python"),
        ("def check(candidate): pass", "entry_point"),
        ({"inputs": ["1"], "outputs": []}, "two lists of one length"),
        ([{"input": "1"}], "`input` and `output`"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_what_is_no_test_is_said(tests, said):
    assert said in code_tests.problem(tests)


def test_a_reply_of_fences_that_none_ends_costs_no_more_than_another():
    """By a pattern that looked for the end of each it took seconds."""
    start = time.process_time()
    assert code_tests.program_of("```python x\n" * 50_000) == ""
    assert gym.answer_of("</answer>" + "<answer>" * 100_000, "tag") is None
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (("def check(candidate): pass", 5), "`entry_point` is no name: 5"),
        (("def check(candidate): pass", "f("), "`entry_point` is no name"),
        ((TESTS, None, {"code": "x = 1"}), "`setup` that is neither text nor a list of lines"),
        ((TESTS, None, ["import math", 3]), "neither text nor a list"),
        ((TESTS, None, "import ("), "`setup` that is no Python"),
    ],
)
def test_what_would_fail_every_reply_is_found_in_the_row(row, said):
    assert said in code_tests.problem(*row)
    assert code_tests.problem([{"input": "1", "output": "2"}], None, {"of": "something else"}) == ""


# ---------------------------------------------------------------- what passes


def test_the_score_is_the_share_that_passes_or_all():
    half = fenced("def f(x): return 2")
    assert rewards([fenced(RIGHT), half, "none", ""], TESTS) == [1.0, 0.5, 0.0, 0.0]
    assert rewards([fenced(RIGHT), half], TESTS, score="all") == [1.0, 0.0]
    assert rewards([RIGHT], TESTS, unfenced="fail") == [0.0]
    assert rewards([RIGHT], None) == [None]


def test_setup_and_entry_point_are_columns():
    check = "def check(candidate):\n    assert candidate(1) == two"
    columns = {"setup": ["two = 2"], "entry_point": "f"}
    assert rewards([RIGHT, "def f(x): return x"], check, columns=columns) == [1.0, 0.0]


def test_inputs_and_outputs():
    tests = [{"input": "1 2\n", "output": "3"}, {"input": "5 6", "output": "11\n\n"}]
    adds = "a, b = map(int, input().split())\nprint(a + b, ' ')\nexit()"
    assert rewards([adds, "print(3)", "print(3)\nraise ValueError"], tests) == [1.0, 0.5, 0.0]
    called = {"fn_name": "g", "inputs": [[1, [2]], [0.1, 0.2]], "outputs": [[[1], [2]], [[0.1], 0.2]]}
    method = "class Solution:\n    def g(self, a, b): return [a], b"
    assert rewards([method, "def g(a, b): return [[a], b]", "def g(a, b): return 1"], called) == [
        1.0,
        1.0,
        0.0,
    ]


def test_a_program_that_leaves_early_passes_nothing():
    leaving = ["import os; os._exit(0)", "import sys; sys.exit(0)", "raise ValueError", "def f(:"]
    assert rewards(leaving, TESTS) == [0.0] * 4
    assert rewards(["import os; os._exit(0)"], {"fn_name": "f", "inputs": [[1]], "outputs": [None]}) == [0.0]


def test_without_walls_nothing_is_left_behind(tmp_path, monkeypatch):
    """Neither files, nor a process that went its own way, nor a program that waits for ever when its driver
    is killed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    pid_file = tmp_path / "pid"
    away = (
        f"import os, time\nif not os.fork():\n    os.setsid()\n    if not os.fork():\n"
        f"        os.closerange(0, 10)\n"
        f"        open('pid', 'w').write(str(os.getpid()))\n        os.rename('pid', {str(pid_file)!r})\n"
        f"        time.sleep(600)\n"
        f"    os._exit(0)\nos.wait()\nwhile not os.path.exists({str(pid_file)!r}): pass\n"
        "def f(x): return x + 1\n"
    )
    assert rewards([away], TESTS[:1]) == [1.0]
    assert not Path(f"/proc/{pid_file.read_text()}").exists()
    pid_file.unlink()
    program = (
        f"import os, time\nopen('left', 'w').write('x')\nos.makedirs('a/b')\n"
        f"open({str(pid_file)!r}, 'w').write(str(os.getpid()))\ndef f(x): return x + 1\n"
    )
    assert rewards([program], TESTS) == [1.0]
    pid_file.unlink()
    waiting = threading.Thread(
        target=lambda: rewards([program + "time.sleep(600)"], TESTS, limits=Limits(seconds=60))
    )
    waiting.start()
    until = time.monotonic() + 20
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < until:
        time.sleep(0.01)
    sandbox.stop_all()
    waiting.join()
    pid = int(pid_file.read_text())
    while Path(f"/proc/{pid}").exists() and time.monotonic() < until:
        time.sleep(0.01)
    assert not Path(f"/proc/{pid}").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["pid"]


_AMONG_OTHERS = """
import os, sys, threading, time
sys.path.insert(0, sys.argv[1])
import sandbox_driver
if os.geteuid() == 0:
    os.setresuid(65534, 65534, 65534)
others = []
for _ in range(6):
    if not (other := os.fork()):
        time.sleep(60)
        os._exit(0)
    others.append(other)
program = "import threading\\nt = threading.Thread(target=int)\\nt.start()\\nt.join()"
limits = {"cpu": 5, "wall": 15, "memory": 1 << 30, "file": 1 << 20, "processes": 4}
test = {"kind": "python", "code": "", "token": "t"}
if not (driver := os.fork()):
    for among in ("user", "container", "sandbox"):
        print(sandbox_driver.run(program, test, limits | {"among": among})["ended"], flush=True)
    os._exit(0)
os.waitpid(driver, 0)
for other in others:
    os.kill(other, 9)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts as Linux does")
def test_a_users_own_processes_are_none_of_a_programs():
    """A limit on processes counts all that a user has, save in a sandbox of its own."""
    folder = str(Path(sandbox_driver.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-I", "-c", _AMONG_OTHERS, folder], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["ok", "ok", "error"], done.stderr
    assert [Sandbox(kind).among for kind in ("bubblewrap", "docker", "none")] == [
        "sandbox",
        "container",
        "user",
    ]


def test_a_program_that_takes_too_long_costs_only_itself():
    logged: dict[str, float] = {}
    replies = [
        "import time\ntime.sleep(60)",
        "while True: print('x' * 999)",
        RIGHT,
        "def f(x): return bytearray(10**10)",
    ]
    start = time.monotonic()
    assert rewards(replies, TESTS, logged=logged, at_once=4) == [0.0, 0.0, 1.0, 0.0]
    assert time.monotonic() - start < 20
    assert logged == {"code_timeouts": 0.25, "code_missing": 0.0}


def test_equal_programs_are_run_once(monkeypatch):
    started: list[str] = []
    run = sandbox.run
    monkeypatch.setattr(
        sandbox, "run", lambda box, program, *more: (started.append(program), run(box, program, *more))[1]
    )
    assert rewards([RIGHT] * 3, TESTS) == [1.0] * 3
    assert len(started) == 1


# ---------------------------------------------------------------- walls

CANNOT = {
    "read a home": f"open({str(Path.home() / '.bashrc')!r}).read()",
    "read this file": f"open({__file__!r}).read()",
    "read passwords": f"assert open('/etc/passwd').read() == {Path('/etc/passwd').read_text()!r}",
    "write to the system": "open('/usr/written', 'w')",
    "write to the root": "open('/written', 'w')",
    "write to devices": "open('/dev/shm/written', 'w')",
    "write a large file": "open('/tmp/large', 'wb').write(b'x' * (20 << 20))",
    "fill its folder": "for i in range(9): open(f'/tmp/{i}', 'wb').write(b'x' * (15 << 20))",
    "see other processes": f"import os; os.kill({os.getpid()}, 0)",
    "speak for the driver": "import os; os.write(os.open(f'/proc/{os.getppid()}/fd/3', os.O_WRONLY), b'x')",
    "be root": "import os; os.setuid(0)",
    "start many processes": "import os, time\nfor _ in range(40):\n    if not os.fork(): time.sleep(9)",
}


@pytest.mark.attack
@pytest.mark.parametrize("what", CANNOT)
def test_a_program_in_a_sandbox_cannot(what, any_walls):
    assert rewards([f"{CANNOT[what]}\n{RIGHT}", RIGHT], TESTS[:1], any_walls) == [0.0, 1.0]


@pytest.mark.attack
def test_a_program_in_a_sandbox_has_no_network_and_can_do_its_work(any_walls):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        calls = f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)\n{RIGHT}"
        works = f"import json, threading, os\nopen('mine', 'w').write('x')\n{RIGHT}"
        assert rewards([calls, works, "while True: pass"], TESTS, any_walls) == [0.0, 1.0, 0.0]


def test_a_program_in_bubblewrap_has_no_network(walls):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)\n{RIGHT}"
        assert rewards([program], TESTS[:1]) == [1.0]
        assert rewards([program], TESTS[:1], walls) == [0.0]


def test_a_program_in_bubblewrap_can_do_its_work(walls):
    program = f"import json, threading, os\nopen('mine', 'w').write('x')\n{RIGHT}"
    assert rewards([program, "import numpy\n" + RIGHT], TESTS, walls) == [1.0, 0.0]
    able = sandbox.find("bubblewrap", "", True, "reward")
    wide = Limits(seconds=60.0, memory=2048)
    assert rewards(["import numpy\n" + RIGHT], TESTS, able, limits=wide) == [1.0]


@pytest.mark.attack
def test_a_bomb_and_a_kill_leave_nothing_behind(any_walls):
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    kill = "import os; os.kill(os.getppid(), 9)"
    assert rewards([bomb, kill, RIGHT], TESTS, any_walls, at_once=2) == [0.0, 0.0, 1.0]
    assert not sandbox._running
    if any_walls.kind != "bubblewrap":
        listed = [any_walls.tool, "ps", "--all", "--quiet", "--filter", f"name=keel-{os.getpid()}-"]
        assert subprocess.run(listed, capture_output=True, text=True, check=True).stdout == ""


# ---------------------------------------------------------------- where there is none


def test_without_a_sandbox_nothing_is_run(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    with pytest.raises(UsageError) as caught:
        sandbox.find("auto", "python:3.12-slim", False, "grpo: reward 'code'")
    said = str(caught.value)
    assert "\n" not in said
    for part in (
        "grpo: reward 'code'",
        "bubblewrap: is not installed",
        "apt install bubblewrap",
        "sandbox: none",
    ):
        assert part in said


def test_a_sandbox_that_does_not_work_is_none(monkeypatch, tmp_path):
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UsageError, match="setting up uid map: Permission denied"):
        sandbox.find("bubblewrap", "", False, "reward")


def test_a_sandbox_that_fails_later_is_no_programs_fault(walls, tmp_path):
    gone = Sandbox("bubblewrap", str(tmp_path / "bwrap"))
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'no space left' >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    with pytest.raises(RewardError, match=r"the sandbox \(bubblewrap\) did not start: no space left"):
        rewards([RIGHT], TESTS, gone)


@pytest.mark.slow
def test_a_container_is_started_with_its_limits(monkeypatch, tmp_path):
    """A stand-in for podman, which notes what it is asked and runs the driver itself."""
    tool = tmp_path / "podman"
    tool.write_text(
        f'#!/bin/sh\n[ "$1" = image ] && exit 0\necho "$@" >> {tmp_path}/asked\n'
        'while [ "$1" != python3 ]; do shift; done\nexec "$@"\n'
    )
    tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    box = sandbox.find("podman", "mine:1", False, "reward")
    assert rewards([RIGHT, "while True: pass"], TESTS, box) == [1.0, 0.0]
    assert "rm -f" not in (tmp_path / "asked").read_text()
    waiting = threading.Thread(
        target=lambda: rewards(["import time\ntime.sleep(60)"], TESTS, box, limits=Limits(seconds=60))
    )
    waiting.start()
    time.sleep(1)
    sandbox.stop_all()  # ends the command, of which a container is no child
    waiting.join()
    assert "rm -f keel-" in (tmp_path / "asked").read_text()
    asked = (tmp_path / "asked").read_text()
    for part in (
        "--network none", "--read-only --read-only-tmpfs=false --ipc none", "--cap-drop ALL",
        "no-new-privileges", "--pids-limit 16",
        "--memory 536870912", "--pull never", "--user 65534:65534", "mine:1 python3 -I -S -c",
    ):  # fmt: skip
        assert part in asked


# ---------------------------------------------------------------- in a config


def stage(**term: Any) -> dict[str, Any]:
    return {
        "kind": "grpo", "model": "m", "data": "rows.jsonl", "batch_size": 4, "samples_per_prompt": 2,
        "reward": {"kind": "code", **term}, "sampling": {"max_new_tokens": 5},
    }  # fmt: skip


def test_to_run_programs_without_a_sandbox_asks_for_trust():
    def lines(**term: Any) -> list[str]:
        return trust.code_of(parse({"name": "x", "stages": {"grpo": stage(**term)}}))

    assert lines() == []
    assert lines(sandbox="none") == [
        "grpo: programs that the model writes, as you (reward code, sandbox: none)"
    ]


@pytest.mark.parametrize(
    "term",
    [{"sandbox": "none", "image": "x"}, {"sandbox": "podman", "packages": True}],
    ids=["image", "packages"],
)
def test_settings_without_effect_are_refused(term):
    with pytest.raises(UsageError, match="no effect with `sandbox"):
        parse({"name": "x", "stages": {"grpo": stage(**term)}})


@pytest.mark.parametrize("setting", ["setup", "entry_point"])
def test_a_column_that_a_config_names_and_no_row_has_is_found(run, tiny_model, tmp_path, setting):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a?", "tests": TESTS}) + "\n")
    config = stage(**{setting: "mine"}, sandbox="none") | {
        "model": str(tiny_model),
        "data": str(tmp_path / "rows.jsonl"),
    }
    with pytest.raises(DataError, match=rf"no column 'mine' \(`{setting}`\)"):
        run({"stages": {"grpo": config}}, tmp_path / "run")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "a?", "test": TESTS}], "no column 'tests'"),
        (
            [{"prompt": "a?", "tests": TESTS}, {"prompt": "b?", "tests": ["assert f("]}],
            "rows.jsonl:2: .*no Python",
        ),
    ],
)
def test_bad_tests_are_found_before_anything_runs(run, tiny_model, tmp_path, rows, said):
    """Also on a machine that has no sandbox."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = stage(sandbox="none") | {"model": str(tiny_model), "data": str(tmp_path / "rows.jsonl")}
    with pytest.raises(DataError, match=said):
        run({"stages": {"grpo": config}}, tmp_path / "run")


def test_a_run_is_refused_where_there_is_no_sandbox(run, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "the cat?", "tests": TESTS}) + "\n")
    config = stage() | {"model": str(tiny_model), "data": str(tmp_path / "rows.jsonl")}
    with pytest.raises(UsageError, match="grpo: reward 'code': there is no sandbox"):
        run({"stages": {"grpo": config}}, tmp_path / "run")
    assert not (tmp_path / "run" / "stages" / "grpo" / "metrics.jsonl").exists()
