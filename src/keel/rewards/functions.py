"""A user's own reward function: found by name, called as TRL calls it, its result checked.

The signature is TRL's (https://huggingface.co/docs/trl/grpo_trainer, "Using a custom reward function"):
`f(prompts, completions, completion_ids, **columns) -> list[float | None]`, all by keyword, sync or async. TRL
hands over its own trainer's objects too (`trainer_state`, `log_extra`, …); keel has none, so a function that
insists on one is refused.
"""

from __future__ import annotations

import asyncio
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from keel import plugins
from keel.data.batches import derive_seed
from keel.data.chat import user_text
from keel.errors import RewardError, UsageError
from keel.types import Conversation, Prompt


def load(name: str, where: str) -> Callable[..., Any]:
    """The function that `name` stands for: "module.function", "module:function" or
    "path/to/file.py:function".

    where: the setting that names it, for messages. While it is imported the current directory (and a file's
    own folder) is on sys.path. UsageError if the module cannot be imported, or has no such name, or that is
    no function.
    """
    module_name, separator, attribute = name.rpartition(":")
    if not separator:
        module_name, _, attribute = name.rpartition(".")
    if not module_name or not attribute:
        raise UsageError(f"{where}: {name!r} must be module.function or path/to/file.py:function")
    try:
        module = _from_file(Path(module_name)) if module_name.endswith(".py") else _from_path(module_name)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise UsageError(
            f"{where}: {module_name} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, attribute, None)
    if function is None:
        nearest = difflib.get_close_matches(
            attribute, [n for n in vars(module) if not n.startswith("_")], n=1
        )
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise UsageError(f"{where}: {module_name} has no function {attribute!r}{hint}")
    if not callable(function) or isinstance(function, type):
        raise UsageError(f"{where}: {name} is a {_kind(function)}, not a function")
    return function


def of_package(name: str, where: str) -> Callable[..., Any]:
    """The function that an installed package adds as a reward of this name, by an entry point of
    `keel.rewards`.

    where: the setting that names it, for messages. UsageError for a name that nobody adds or several packages
    add, a package that cannot be imported, and for what is no function.
    """
    try:
        added = plugins.load("keel.rewards", name)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    if not callable(added) or isinstance(added, type):
        raise UsageError(f"{where}: {name!r} of another package is a {_kind(added)}, not a function")
    return added


def source_print(name: str) -> str:
    """A hash of the file that `name`'s function is written in ("" where there is none): another text, another
    reward."""
    module, separator, _ = name.rpartition(":")
    module = module if separator else name.rpartition(".")[0]
    if module.endswith(".py"):
        path = Path(module)
    else:
        with _on_path(Path.cwd()):
            spec = importlib.util.find_spec(module)
        path = Path(spec.origin) if spec and spec.origin else None
    return hashlib.sha256(path.read_bytes()).hexdigest() if path and path.is_file() else ""


def call(
    function: Callable[..., Any],
    name: str,
    prompts: Sequence[Prompt],
    completions: Sequence[str | Conversation],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
) -> list[float | None]:
    """The rewards of B samples by a function of TRL's signature; None where it does not apply.

    Text stays text; a conversation becomes a list of messages, and the reply to one a list with one assistant
    message. Of these, `completion_ids` and the data's columns the function gets what it accepts, as copies; a
    column that has the name of one of the first three gives way. Coroutines are run to their end.

    UsageError if the function insists on an argument that there is not. RewardError, with the reward's name
    and the sample's index and prompt, for one that raises and for a result that is not B finite numbers or
    Nones.
    """
    arguments: dict[str, list[Any]] = {
        **{key: list(values) for key, values in columns.items()},
        "prompts": [p if isinstance(p, str) else [dict(turn) for turn in p] for p in prompts],
        "completions": [_reply(*pair) for pair in zip(prompts, completions, strict=True)],
        "completion_ids": [list(ids) for ids in completion_ids],
    }
    accepted = _accepted(function, name, arguments)
    try:
        values = _run(function, accepted)
    except UsageError as error:
        raise UsageError(f"reward {name!r}: {error}") from error
    except Exception as error:
        at = _first_that_raises(function, accepted, len(prompts))
        where = f"on {len(prompts)} samples" if at is None else sample(prompts, at)
        raise RewardError(f"reward {name!r} raised {type(error).__name__}: {error} ({where})") from error
    return checked(values, name, prompts)


def checked(values: Any, name: str, prompts: Sequence[Prompt]) -> list[float | None]:
    """Whatever a reward returned, as one finite float or None a sample. RewardError for anything else."""
    if hasattr(values, "tolist"):  # an array or a tensor
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        raise RewardError(
            f"reward {name!r} returned a {_kind(values)}, not a list with a number for each sample"
        )
    if len(values) != len(prompts):
        raise RewardError(f"reward {name!r} returned {len(values)} values for {len(prompts)} samples")
    return [_number(value, name, prompts, index) for index, value in enumerate(values)]


def _number(value: Any, name: str, prompts: Sequence[Prompt], index: int) -> float | None:
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise RewardError(
            f"reward {name!r} returned {value!r}, which is no finite number ({sample(prompts, index)})"
        )
    return number


def sample(prompts: Sequence[Prompt], index: int) -> str:
    """A sample's index and as much of its prompt as fits a line: sample 3, prompt 'What is …'."""
    text = " ".join(user_text(prompts[index]).split())
    return f"sample {index}, prompt {text if len(text) <= 60 else text[:59] + '…'!r}"


def _reply(prompt: Prompt, completion: str | Conversation) -> Any:
    if isinstance(completion, str):
        return completion if isinstance(prompt, str) else [{"role": "assistant", "content": completion}]
    return [dict(turn) for turn in completion]


def _accepted(function: Callable[..., Any], name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that the function takes by name, or all of them if it has **kwargs."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C, without a signature
        return dict(arguments)
    by_name = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    required = [p.name for p in by_name.values() if p.default is p.empty]
    if missing := [key for key in required if key not in arguments]:
        raise UsageError(
            f"reward {name!r} asks for {missing[0]!r}, and the data have no such column (a function is given "
            f"{', '.join(sorted(arguments))})"
        )
    if any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in parameters):
        raise UsageError(f"reward {name!r} takes arguments by place only; they are given by name")
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(arguments)
    return {key: value for key, value in arguments.items() if key in by_name}


def _run(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    result = function(**arguments)
    return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result


async def _awaited(result: Awaitable[Any]) -> Any:
    return await result


def _first_that_raises(
    function: Callable[..., Any], arguments: Mapping[str, Any], samples: int
) -> int | None:
    """The sample to blame, found by calling again with one at a time; None if each alone is fine."""
    for index in range(samples):
        try:
            _run(function, {key: values[index : index + 1] for key, values in arguments.items()})
        except Exception:
            return index
    return None


def _from_path(module: str) -> ModuleType:
    with _on_path(Path.cwd()):
        return importlib.import_module(module)


def _from_file(path: Path) -> ModuleType:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise FileNotFoundError("there is no such file")
    # a name of its own, so that two files called rewards.py do not take each other's place
    module_name = f"keel_reward_{path.stem}_{derive_seed(path):x}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None  # a path that ends in .py always has one
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look a class's module up here
    try:
        with _on_path(path.parent), _on_path(Path.cwd()):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


@contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def _kind(value: object) -> str:
    return (
        "class"
        if isinstance(value, type)
        else "module"
        if isinstance(value, ModuleType)
        else type(value).__name__
    )
