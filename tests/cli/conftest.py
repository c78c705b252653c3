"""The command as its user meets it: arguments in; exit code, stdout and stderr out."""

from __future__ import annotations

import gc
import json
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from keel.cli import main


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Keel = Callable[..., Outcome]


@pytest.fixture
def keel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Keel]:
    """Call the command in this process, in an empty folder, through its real entry point."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(tmp_path)
    gc.freeze()

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["keel", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main.main()
        out, err = capsys.readouterr()
        code = ended.value.code
        return Outcome(code if isinstance(code, int) else 0 if code is None else 1, out, err)

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file of rows, or a config of stages, and return its path."""

    def go(name: str, content: Any) -> Path:
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in content)
        elif not isinstance(content, str):
            head = {"name": path.stem, "threads": 1, "device": "cpu"}
            content = yaml.safe_dump({**head, "stages": content}, sort_keys=False)
        path.write_text(content, encoding="utf-8")
        return path

    return go


@pytest.fixture
def sft(tiny_model: Path, data: Any) -> Callable[..., dict[str, Any]]:
    """Settings of an SFT stage that takes two steps."""

    def go(**settings: Any) -> dict[str, Any]:
        return {
            "kind": "sft",
            "model": str(tiny_model),
            "data": str(data.demonstrations),
            "max_steps": 2,
            "batch_size": 2,
            **settings,
        }

    return go


@pytest.fixture
def chain(sft: Callable[..., dict[str, Any]], data: Any) -> dict[str, Any]:
    """sft → reward → ppo → judge, two steps each."""
    short = {"max_new_tokens": 6}
    return {
        "sft": sft(),
        "reward": {
            "kind": "reward",
            "model": "sft",
            "data": str(data.pairs),
            "max_steps": 2,
            "batch_size": 2,
            "normalize": 4,
            "sampling": short,
            "lr": 1e-3,
        },
        "ppo": {
            "kind": "ppo",
            "model": "sft",
            "reward": "reward",
            "data": str(data.prompts),
            "updates": 2,
            "batch_size": 2,
            "epochs": 1,
            "sampling": short,
        },
        "judge": {
            "kind": "evaluate",
            "models": ["sft", "ppo"],
            "reward": "reward",
            "data": {"source": str(data.prompts), "rows": 3},
            "sampling": short,
        },
    }
