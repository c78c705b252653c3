"""What the attacks share: a server of forked commands, and a config with every kind of stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

FORKED = Path(__file__).with_name("forked.py")
# What never stands on a terminal: words of Python's or of a library's, and faults of keel that the last
# boundary caught.
STRAY = (
    "Traceback",
    "Exception ignored",
    "unexpected ",
    'File "',
    "Warning:",
    "core dumped",
)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int | None
    signal: int | None
    changes: int
    hung: bool
    seconds: float
    left: list[int]
    out: str
    err: str

    def assert_clean(self) -> None:
        """One's own words only, no hang, no process and no temporary file that stayed."""
        assert not self.hung, f"hangs\n{self.err[-2000:]}"
        assert not any(word in self.out + self.err for word in STRAY), self.err[-4000:]
        assert self.left == [], f"processes outlived it: {self.left}"

    def assert_refused(self, *named: str) -> None:
        """Exit code 1 or 2, a line that names what is wrong."""
        self.assert_clean()
        assert self.code in (1, 2), (self.code, self.signal, self.out[-500:], self.err[-2000:])
        last = self.err.strip().splitlines()[-1] if self.err.strip() else ""
        for name in named:
            assert name in self.err, (name, self.err[-2000:])
        assert last, "nothing is said"


class Server:
    """A process that runs `keel` commands in forks of itself."""

    def __init__(self) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(FORKED)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._line() == {}

    def _line(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def __call__(self, *argv: object, cwd: Path, **more: Any) -> Ended:
        request = {"argv": [str(word) for word in argv], "cwd": str(cwd), **more}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        found = self._line()
        read = {name: (cwd / f".{name}").read_text(errors="replace") for name in ("out", "err")}
        return Ended(**found, **read)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="session")
def forked() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


SHORT = {"max_new_tokens": 4}
COMMON = {"batch_size": 2, "save_every": 1}
MINE = """
def score(prompts, completions, **columns):
    return [float(len(completion)) for completion in completions]
"""


@pytest.fixture(scope="session")
def every_kind(
    data: Any,
    tiny_model: Path,
    tiny_reward: Path,
    roomy_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """One stage of each kind, two steps each. None needs another, save `judge`, which reads two."""
    folder = tmp_path_factory.mktemp("every-kind")
    (folder / "mine.py").write_text(MINE)
    (folder / "sea.jsonl").write_text(
        "".join(json.dumps({"text": f"the {c} sea {i}"}) + "\n" for i, c in enumerate("abcdef"))
    )
    (folder / "home.jsonl").write_text(
        "".join(json.dumps({"text": f"tea {c} at home {i}"}) + "\n" for i, c in enumerate("abcdef"))
    )
    model = {"model": str(tiny_model), **COMMON}
    held = {"eval_data": {"source": str(data.prompts), "rows": 2}, "eval_every": 1}
    llama = {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 1, "max_position_embeddings": 32,
    }  # fmt: skip
    on_policy = {
        "data": {"source": str(data.prompts), "rows": 4},
        "updates": 2,
        "epochs": 1,
        "sampling": SHORT,
    }
    return {
        "base": {
            "kind": "pretrain", "data": str(data.text), "model": {"vocab_size": 280, "init": llama},
            "max_length": 16, "max_steps": 2, "eval_every": 1, **COMMON,
        },
        "sft": {"kind": "sft", "data": str(data.demonstrations), "max_steps": 2, "eval_every": 1, **model},
        "reward": {
            "kind": "reward", "data": str(data.pairs), "max_steps": 2, "members": 2, "normalize": 2,
            "sampling": SHORT, **model,
        },
        "classes": {
            "kind": "classifier", "data": {name: str(folder / f"{name}.jsonl") for name in ("sea", "home")},
            "max_steps": 2, **model,
        },
        "dpo": {"kind": "dpo", "data": str(data.pairs), "max_steps": 2, "eval_every": 1, **model},
        "ppo": {
            "kind": "ppo", "reward": str(tiny_reward), "kl": {"coef": 1.0, "target": 0.5, "horizon": 10},
            "shaping": {"normalize": "running"}, **on_policy, **held, **model,
        },
        "grpo": {
            "kind": "grpo", "samples_per_prompt": 2,
            "reward": [f"python:{folder}/mine.py:score", {"kind": "regex", "pattern": "red"}],
            **on_policy, **model,
        },
        "best": {
            "kind": "best_of_n", "data": {"source": str(data.prompts), "rows": 4}, "reward": str(tiny_reward),
            "samples_per_prompt": 2, "max_steps": 2, "sampling": SHORT, **model,
        },
        "pairs": {
            "kind": "collect", "model": str(roomy_model), "pairs": 2,
            "data": {"source": "world:helpdesk/prompts", "rows": 3},
            "annotators": "world:helpdesk", "sampling": {"max_new_tokens": 6},
        },
        "judge": {
            "kind": "evaluate", "models": ["sft", "grpo"], "reward": str(tiny_reward),
            "data": {"source": str(data.prompts), "rows": 3}, "sampling": SHORT,
        },
    }  # fmt: skip


WriteConfig = Callable[..., Path]


@pytest.fixture(scope="session")
def write_config() -> WriteConfig:
    def go(folder: Path, stages: Any, **head: Any) -> Path:
        path = folder / "config.yaml"
        common = {"name": "r", "threads": 1, "device": "cpu", "dtype": "float32", **head}
        path.write_text(yaml.safe_dump({**common, "stages": stages}, sort_keys=False))
        return path

    return go
