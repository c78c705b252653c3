"""A user's function: found, called with what it accepts, and its result checked."""

from __future__ import annotations

import asyncio
import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from keel.errors import RewardError, UsageError
from keel.rewards import functions, loading

PROMPTS = ["What is 1 + 1?", "What is 2 + 2?", "Name " + "a very " * 20 + "big city"]
COMPLETIONS = [" 2", " four", " Rome"]
IDS = [(5, 1), (6, 7, 1), (8,)]


def call(function: Any, **columns: Any) -> list[float | None]:
    return functions.call(function, "mine", PROMPTS, COMPLETIONS, IDS, columns)


# ---------------------------------------------------------------- finding


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with a package, and a folder elsewhere with a file of rewards and its neighbour."""
    (tmp_path / "own_rewards_here").mkdir()
    (tmp_path / "own_rewards_here" / "short.py").write_text(
        "def brief(completions, **_):\n    return [1.0]\nlimit = 3\n"
    )
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "neighbour_of_mine.py").write_text("VALUE = 7.0\n")
    (tmp_path / "elsewhere" / "my-rewards.py").write_text(
        "from dataclasses import dataclass\nimport neighbour_of_mine\n\n\n"
        "@dataclass\nclass Fixed:\n    value: 'float'\n\n"
        "    def __call__(self, completions, **_):\n        return [self.value] * len(completions)\n\n\n"
        "seven = Fixed(neighbour_of_mine.VALUE)\n"
    )
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "quits.py").write_text("raise SystemExit('done')\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_function_of_a_module_in_the_current_directory(project: Path) -> None:
    before = list(sys.path)
    for name in ("own_rewards_here.short.brief", "own_rewards_here.short:brief"):
        assert loading.load(name, "rewards.a")(completions=["x"]) == [1.0]
    assert sys.path == before


def test_a_callable_of_a_file_which_imports_its_neighbour(project: Path) -> None:
    before = list(sys.path)
    for name in ("elsewhere/my-rewards.py:seven", f"{project}/elsewhere/my-rewards.py:seven"):
        assert loading.load(name, "rewards.a")(completions=["x", "y"]) == [7.0, 7.0]
    assert sys.path == before


def test_a_function_of_an_installed_library() -> None:
    assert loading.load("math.fsum", "rewards.a")([1, 2]) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "no_such_module_here.f",
            "rewards.a: no_such_module_here cannot be imported: ModuleNotFoundError: No module named",
        ),
        ("own_rewards_here.short.brif", "has no function 'brif'; did you mean 'brief'"),
        ("own_rewards_here.short.limit", "own_rewards_here.short.limit is a int, not a function"),
        ("elsewhere/my-rewards.py:Fixed", "is a class, not a function"),
        (
            "elsewhere/none.py:f",
            "elsewhere/none.py cannot be imported: FileNotFoundError: there is no such file",
        ),
        ("broken.py:f", "broken.py cannot be imported: SyntaxError"),
        ("quits.py:f", "quits.py cannot be imported: SystemExit: done"),
        ("brief", "'brief' must be module.function or path/to/file.py:function"),
        ("my-rewards.py", "'my-rewards.py' is a file: write which function of it, my-rewards.py:FUNCTION"),
        ("elsewhere/my-rewards.py:", "must be module.function"),
    ],
)  # fmt: skip
def test_what_cannot_be_found_is_said_with_the_reason(project: Path, name: str, message: str) -> None:
    before = list(sys.path)
    with pytest.raises(UsageError, match=message.replace(".", r"\.")):
        loading.load(name, "rewards.a")
    assert sys.path == before


# ---------------------------------------------------------------- calling


def test_a_function_with_kwargs_gets_everything_by_name() -> None:
    got: dict[str, Any] = {}

    def mine(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        got.update(columns, prompts=prompts, completions=completions)
        return [1, True, 0.5]

    assert call(mine, answer=("2", "4", "Rome"), prompts=["a column", "of that", "name"]) == [1.0, 1.0, 0.5]
    assert got == {
        "prompts": PROMPTS,
        "completions": COMPLETIONS,
        "completion_ids": [[5, 1], [6, 7, 1], [8]],
        "answer": ["2", "4", "Rome"],
    }


def test_a_function_without_kwargs_gets_what_it_names() -> None:
    assert call(lambda completion_ids: [float(len(ids)) for ids in completion_ids], answer=[1, 2, 3]) == [
        2,
        3,
        1,
    ]
    assert call(lambda answer, level=None: [a / 2 for a in answer], answer=[1, 2, 3], task=[0, 0, 0]) == [
        0.5,
        1,
        1.5,
    ]


def test_conversations_are_lists_of_messages_as_in_trl() -> None:
    turns = ({"role": "user", "content": "hi"},)
    reply = ({"role": "assistant", "content": "ho"},)
    got: list[Any] = []

    def mine(prompts: Any, completions: Any) -> list[float]:
        got.append(copy.deepcopy((prompts, completions)))
        prompts[0][0]["content"] = completions[0][0]["content"] = "changed"
        return [0.0, 1.0]

    assert functions.call(mine, "mine", [turns, turns], [reply, "ho"], [[1], [1]], {}) == [0, 1]
    assert got[0][1][0] == [{"role": "assistant", "content": "ho"}]
    assert got[0][0][1] == [{"role": "user", "content": "hi"}]
    assert isinstance(got[0][1][1], list)  # text that answers a conversation is a message too
    assert (turns[0]["content"], reply[0]["content"]) == ("hi", "ho")


def test_an_async_function_is_run_to_its_end() -> None:
    async def mine(completions: list[str], **_: Any) -> list[float]:
        await asyncio.sleep(0)
        return [float(len(c)) for c in completions]

    assert call(mine) == [2, 5, 5]


def test_an_argument_that_nobody_has_is_named_before_the_call() -> None:
    def mine(completions: Any, solution: Any) -> list[float]:
        raise AssertionError

    with pytest.raises(
        UsageError, match=r"'mine' asks for 'solution', and the data have no such column .*answer"
    ):
        call(mine, answer=[1, 2, 3])

    def by_place(completions: Any, /) -> list[float]:
        raise AssertionError

    with pytest.raises(UsageError, match="by place only"):
        call(by_place)


# ---------------------------------------------------------------- results


@pytest.mark.parametrize(
    "values",
    [
        (0.5, 1, None),
        [np.float32(0.5), np.int64(1), None],
        [torch.tensor(0.5), True, None],
    ],
)
def test_numbers_of_any_kind_become_floats(values: Any) -> None:
    found = call(lambda **_: values)
    assert found == [0.5, 1.0, None]
    assert [type(v) for v in found] == [float, float, type(None)]


def test_an_array_or_a_tensor_is_a_list() -> None:
    assert call(lambda **_: np.array([1, 2, 3])) == [1, 2, 3]
    assert call(lambda **_: torch.tensor([1.0, 2.0, 3.0])) == [1, 2, 3]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, 2.0], "reward 'mine' returned 2 values for 3 samples"),
        (1.0, "reward 'mine' returned a float, not a list"),
        (None, "returned a NoneType, not a list"),
        (np.float64(1.0), "returned a float, not a list"),
        ({"a": 1}, "returned a dict, not a list"),
        ("abc", "returned a str, not a list"),
        (
            [0, float("nan"), 0],
            r"returned nan, which is no finite number \(sample 1, prompt 'What is 2 \+ 2\?'\)",
        ),
        ([float("-inf"), 0, 0], r"returned -inf, .*\(sample 0, prompt 'What is 1 \+ 1\?'\)"),
        ([0, 0, "1"], r"returned '1', .*\(sample 2, prompt 'Name a very .{47}…'\)"),
        ([0, [1.0], 0], r"returned \[1.0\], .*sample 1"),
        ([10**400, 0, 0], "sample 0"),
        ([torch.zeros(2), 0, 0], "sample 0"),
    ],
)
def test_a_wrong_result_names_the_reward_and_the_sample(values: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        call(lambda **_: values)


def test_a_reward_that_raises_names_the_sample_to_blame() -> None:
    def mine(answer: list[str], **_: Any) -> list[float]:
        return [float(int(a)) for a in answer]

    with pytest.raises(
        RewardError, match=r"'mine' raised ValueError: invalid literal .*'four' \(sample 1, prompt 'What is 2"
    ) as caught:
        call(mine, answer=["2", "four", "5"])
    assert isinstance(caught.value.__cause__, ValueError)
    assert caught.value.exit_code == 1


def test_a_reward_that_fails_only_on_the_whole_says_so() -> None:
    def mine(completions: list[str], **_: Any) -> list[float]:
        if len(completions) > 1:
            raise MemoryError("too many")
        return [0.0]

    with pytest.raises(RewardError, match=r"raised MemoryError: too many \(on 3 samples\)"):
        call(mine)


def test_keels_own_rewards_keep_their_message() -> None:
    def mine(**_: Any) -> list[float]:
        raise UsageError("the data have no column 'x'")

    with pytest.raises(UsageError, match=r"^reward 'mine': the data have no column 'x'$"):
        call(mine)


@pytest.mark.parametrize("isolate", [False, True])
def test_a_column_of_the_data_may_be_called_environments(isolate: bool, tmp_path: Path) -> None:
    """Where there are no episodes it is a column as any other, in a process of its own, too."""
    path = tmp_path / "mine.py"
    path.write_text(
        "def score(completions, environments, **columns):\n    return [len(name) for name in environments]\n"
    )
    name = f"{path}:score"
    function: Any = (
        functions.IsolatedFunction(name, "reward", "score") if isolate else loading.load(name, "reward")
    )
    values = functions.call(
        function, "score", ["p", "p"], ["a", "b"], [[7], [7]], {"environments": ["sea", "desert"]}
    )
    assert values == [3, 6]
