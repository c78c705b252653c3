"""Tools and environments: Python functions that a model may call, and how they are called.

An environment is a class as TRL 1.16's `environment_factory` has it: `reset(**columns)` begins an episode and
returns None or text for the prompt; every other public method is a tool; `get_reward()`, where there is one,
says what the episode was worth. Both tools and methods have type hints and docstrings, of which transformers
makes the schemas that a model is shown.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from transformers.utils.chat_template_utils import get_json_schema

from keel.errors import RewardError, UsageError

NOT_TOOLS = ("reset", "get_reward")  # public methods of an environment that no model calls
STUCK = 16  # calls that never came back, after which a run ends
Tool = Callable[..., Any]


def schema_of(tool: Tool) -> dict[str, Any]:
    """The JSON schema of a tool, by transformers. UsageError for one without type hints or docstring."""
    try:
        return get_json_schema(tool)
    except Exception as error:  # DocstringParsingException, TypeHintParsingException, and what a hint raises
        reason = " ".join(str(error).split())
        raise UsageError(
            f"tool {name_of(tool)!r} needs type hints, and a docstring with a line for each argument: "
            f"{reason}"
        ) from None


def name_of(tool: Tool) -> str:
    """What a model calls it by."""
    return getattr(tool, "__name__", type(tool).__name__)


def methods_of(environment: Any) -> list[Tool]:
    """The tools of an environment, bound to it, by name: its public methods besides `reset` and
    `get_reward`. As in TRL 1.16 a class method is one too, and a bound method that an attribute holds; a
    static method, which is bound to nothing, is none. No property is evaluated."""
    return [
        getattr(environment, name)
        for name in sorted(dir(environment))
        if name not in NOT_TOOLS and not name.startswith("_") and _is_method(environment, name)
    ]


def _is_method(environment: Any, name: str) -> bool:
    if isinstance(inspect.getattr_static(environment, name, None), property | cached_property):
        return False
    return inspect.ismethod(getattr(environment, name, None))


def by_name(tools: Sequence[Tool]) -> dict[str, Tool]:
    """Tools by name. UsageError where two have one."""
    found: dict[str, Tool] = {}
    for tool in tools:
        if name_of(tool) in found:
            raise UsageError(f"two tools are called {name_of(tool)!r}: a model could not tell them apart")
        found[name_of(tool)] = tool
    return found


def accepted(
    function: Callable[..., Any], given: Mapping[str, Any], named: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments that a function takes: of `given` all that it names, or everything where it has
    **kwargs; of `named` only what it names."""
    parameters = inspect.signature(function).parameters.values()
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    more = {key: value for key, value in named.items() if key in names}
    return {**more, **{key: value for key, value in given.items() if everything or key in names}}


# ---------------------------------------------------------------- calling


class Outcome(NamedTuple):
    """What came of a call."""

    value: Any = None
    error: str = ""  # what it raised, or that it took too long; "" where it returned
    raised: BaseException | None = None


@dataclass
class _Worker:
    """A thread that runs one call after the other, with an event loop of its own for coroutines."""

    requests: queue.SimpleQueue[Any] = field(default_factory=queue.SimpleQueue)
    answers: queue.SimpleQueue[Any] = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        threading.Thread(target=self._run, name="keel-tools", daemon=True).start()

    def _run(self) -> None:
        loop = asyncio.new_event_loop()
        while (request := self.requests.get()) is not None:
            function, arguments = request
            try:
                value = function(**arguments)
                if inspect.isawaitable(value):
                    value = loop.run_until_complete(value)
                outcome = Outcome(value)
            except BaseException as error:  # an exit of a tool's is no exit of the run
                outcome = Outcome(error=str(error), raised=error)
            self.answers.put(outcome)
        loop.close()


class Caller:
    """Runs calls one after the other, each for `timeout` seconds at most.

    A call that is not back by then is left to itself: nothing can stop a thread. Its outcome is an error,
    and the next calls run in another thread. RewardError where `STUCK` calls are stuck.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._worker: _Worker | None = None
        self._stuck = 0

    def call(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Outcome:
        """What a function makes of the arguments; a coroutine is run to its end."""
        worker = self._worker = self._worker or _Worker()
        worker.requests.put((function, dict(arguments)))
        try:
            return worker.answers.get(timeout=self.timeout)
        except queue.Empty:
            self._worker, self._stuck = None, self._stuck + 1
            worker.requests.put(None)  # it ends once the call comes back
            if self._stuck >= STUCK:
                raise RewardError(
                    f"{self._stuck} calls of tools took more than {self.timeout:g} s and are still running, "
                    f"the last of {name_of(function)!r}: raise `tool_timeout`, or mend the tool"
                ) from None
            late = TimeoutError(f"{name_of(function)} took more than {self.timeout:g} s")
            return Outcome(error=str(late), raised=late)
        except BaseException:  # an interrupt: the answer that is still to come is no other call's
            self._worker = None
            worker.requests.put(None)
            raise

    def close(self) -> None:
        """End the thread."""
        if self._worker is not None:
            self._worker.requests.put(None)
            self._worker = None


def text_of_result(value: Any) -> str:
    """What a tool returned as the text that the model is shown: as TRL has it, str() of it; of a list of text
    parts their text."""
    if isinstance(value, list) and value:
        parts = [part for part in value if isinstance(part, Mapping) and part.get("type") == "text"]
        if len(parts) == len(value):
            return _clean("".join(str(part.get("text", "")) for part in parts))
    return _clean(str(value))


def text_of_error(error: str) -> str:
    """What the model is shown of a failed call: as TRL writes it."""
    return _clean(str({"error": error}))


def _clean(text: str) -> str:
    """The text with question marks in the place of half characters, which UTF-8 has not."""
    return text.encode("utf-8", "replace").decode("utf-8")


def reward_of(outcome: Outcome, environment: Any, where: str) -> float:
    """What `get_reward` returned. RewardError, with the environment's name and `where`, for one that raises,
    and for what is no finite number."""
    name = f"{type(environment).__name__}.get_reward"
    if outcome.raised is not None:
        raise RewardError(f"{name} raised {type(outcome.raised).__name__}: {outcome.error} ({where})")
    try:
        number = math.nan if isinstance(outcome.value, str | bytes) else float(outcome.value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RewardError(f"{name} returned {outcome.value!r}, which is no finite number ({where})")
    return number
