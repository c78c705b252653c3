"""What a stage's user is told when it is run again."""

from __future__ import annotations

from typing import Any

import pytest

from keel.report.rerun_reason import reason

BEFORE: dict[str, Any] = {
    "settings": {
        "lr": 1e-5,
        "kl": {"coef": 0.05, "target": None},
        "data": [{"source": "a.jsonl", "rows": 9}],
        "lora": None,
    },
    "seed": 0,
    "threads": 1,
    "device": "cpu",
    "inputs": {"sft": "1", "reward": "2"},
    "data": ["3"],
    "code": "4",
    "versions": {"torch": "2.12", "peft": "0.18"},
}


def _changed(**parts: Any) -> str:
    return reason(BEFORE, {**BEFORE, **parts})


def _settings(**settings: Any) -> dict[str, Any]:
    return {**BEFORE["settings"], **settings}


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"settings": _settings(kl={"coef": 0.1, "target": None})}, "settings changed (kl.coef 0.05 → 0.1)"),
        ({"settings": _settings(kl={"coef": 0.05, "target": 6})}, "settings changed (kl.target null → 6)"),
        (
            {"settings": _settings(data=[{"source": "a.jsonl", "rows": 5}])},
            "settings changed (data.0.rows 9 → 5)",
        ),
        ({"settings": _settings(lora={"r": 4})}, 'settings changed (lora null → {"r": 4})'),
        ({"settings": _settings(clip=0.2)}, "settings changed (clip nothing → 0.2)"),
        ({"seed": 3}, "seed changed (0 → 3)"),
        ({"threads": None}, "threads changed (1 → null)"),
        ({"device": "cuda"}, "device changed (cpu → cuda)"),
        ({"accel": "off"}, "accel changed (null → off)"),
        ({"plugins": {}, "data": ["9"]}, "its data changed"),  # a keel that had no part for them
        ({"inputs": {"sft": "1", "reward": "9"}}, "'reward' changed, which it starts from"),
        ({"data": ["9"]}, "its data changed"),
        ({"code": "9"}, "keel's code changed"),  # a keel that kept one hash of all its code
        ({"code": {"rl/ppo.py": "9"}}, "keel's code changed"),
        ({"rewards": {"f": "9"}}, "the code of its reward functions changed"),
        (
            {"plugins": {"keel.rewards brief": "9"}},
            "what other packages add to it changed (keel.rewards brief)",
        ),
        ({"versions": {"torch": "2.13", "peft": "0.18"}}, "versions changed (torch 2.12 → 2.13)"),
        ({"code": "9", "data": ["9"]}, "its data changed and keel's code changed"),
    ],
)
def test_what_changed_is_named(parts, said):
    assert _changed(**parts) == said


def test_many_settings_are_counted_and_long_ones_cut():
    settings = {"settings": _settings(a=1, b=2, c="x" * 99, d=4, e=5)}
    assert (
        _changed(**settings)
        == f"settings changed (a nothing → 1, b nothing → 2, c nothing → {'x' * 39}… and 2 more)"
    )


def test_the_files_of_keel_that_changed_are_named():
    before = {**BEFORE, "code": {"rl/loop.py": "1", "rl/ppo.py": "2", "types.py": "3"}}
    after = {**BEFORE, "code": {"rl/loop.py": "9", "rl/ppo.py": "2", "rl/new.py": "4"}}
    assert reason(before, after) == "keel's code changed (rl/loop.py, rl/new.py, types.py)"
    many = {**BEFORE, "code": {f"rl/{name}.py": "1" for name in "abcde"}}
    assert (
        reason(many, {**BEFORE, "code": {}}) == "keel's code changed (rl/a.py, rl/b.py, rl/c.py and 2 more)"
    )
