"""`keel dashboard` and `keel run --watch` as commands."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from keel.cli import dashboard
from keel.errors import KeelError, UsageError


def test_what_cannot_be_served_is_said_in_a_line(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"no folder at .*nowhere: give a folder of runs"):
        dashboard.serve(tmp_path / "nowhere", "127.0.0.1", 0, print)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UsageError, match=r"cannot serve on 127\.0\.0\.1:.*give another --port"):
            dashboard.serve(tmp_path, "127.0.0.1", taken.getsockname()[1], print)
    with pytest.raises(UsageError, match="cannot serve on no such host"):
        dashboard.serve(tmp_path, "no such host", 0, print)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'keel-rlhf\[dashboard\]'"):
        dashboard.serve(tmp_path, "127.0.0.1", 0, print)


def test_the_command_serves_until_it_is_interrupted(tmp_path):
    command = [sys.executable, "-m", "keel", "dashboard", str(tmp_path), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        link = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", link)
        with urllib.request.urlopen(link, timeout=20) as answer:
            assert b"<h1" in answer.read()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
        assert (process.returncode, errors) == (0, "")
    finally:
        process.kill()


def alive(link: str) -> bool:
    try:
        with urllib.request.urlopen(link, timeout=5):
            return True
    except OSError:
        return False


def test_a_dashboard_beside_a_run_ends_with_it(tmp_path):
    said: list[str] = []
    with dashboard.beside(tmp_path / "run", said.append):  # whose folder is not there yet
        link = said[0].removeprefix("dashboard: ")
        assert alive(link)
    assert not alive(link)


@pytest.mark.attack
def test_it_ends_even_where_the_run_is_killed(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from keel.cli import dashboard\n"
        "with dashboard.beside(Path(sys.argv[1]), lambda line: print(line, flush=True)): time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    link = process.stdout.readline().strip().removeprefix("dashboard: ")
    assert alive(link)
    process.kill()
    process.wait()
    until = time.monotonic() + 15
    while alive(link) and time.monotonic() < until:
        time.sleep(0.1)
    assert not alive(link)


def test_it_stays_where_that_is_asked_for(tmp_path):
    said: list[str] = []
    with dashboard.beside(tmp_path / "run", said.append, keep=True):
        pass
    found = re.fullmatch(r"dashboard: (\S+) \(stays open; end it with: kill (\d+)\)", said[0])
    assert found is not None
    try:
        assert alive(found[1])
    finally:
        os.kill(int(found[2]), signal.SIGTERM)


def test_a_dashboard_that_does_not_start_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(dashboard, "_first_line", lambda process: "")
    with pytest.raises(KeelError, match="the dashboard did not start"), dashboard.beside(Path("x"), print):
        pass
