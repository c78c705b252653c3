"""A user's own reward function: found by name, called as TRL calls it, its result checked.

The signature is TRL's (https://huggingface.co/docs/trl/grpo_trainer, "Using a custom reward function"):
`f(prompts, completions, completion_ids, **columns) -> list[float | None]`, all by keyword, sync or async. TRL
hands over `trainer_state`, `log_extra` and `log_metric` too; a function that takes them gets what keel has
(`keel.rewards.trainer`).
"""

from __future__ import annotations

import copy
import math
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from keel.data.chat import user_text
from keel.errors import RewardError, UsageError
from keel.rewards import worker
from keel.rewards.isolated import IsolatedFunction
from keel.rewards.loading import Signature, kind
from keel.rewards.trainer import EXTRAS, Logged, TrainingState, extras
from keel.types import Conversation, Prompt

ENVIRONMENTS = "environments"  # as TRL names the objects of episodes with tools: for functions that name it
OF_EPISODES = "environments of episodes"  # the column that holds them, which no column of data is called
RESERVED = ("prompts", "completions", "completion_ids")  # arguments that a data's column gives way to


def call(
    function: Callable[..., Any] | IsolatedFunction,
    name: str,
    prompts: Sequence[Prompt],
    completions: Sequence[str | Conversation],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
    state: TrainingState | None = None,
    logged: Logged | None = None,
) -> list[float | None]:
    """The rewards of B samples by a function of TRL's signature; None where it does not apply.

    Text stays text; a conversation becomes a list of messages, and the reply to one a list with one assistant
    message. Of these, `completion_ids` and the data's columns the function gets what it accepts, as deep
    copies; a column that has the name of one of the first three gives way. Coroutines are run to their end.
    state: where training stands; logged: takes what the function logs.

    UsageError if the function insists on an argument that there is not. RewardError, with the reward's name
    and the sample's index and prompt, for one that raises (an exit or an interrupt of its own included) and
    for a result that is not B finite numbers or Nones.
    """
    arguments: dict[str, list[Any]] = {
        **{key: list(values) for key, values in columns.items() if key not in (*EXTRAS, OF_EPISODES)},
        "prompts": [p if isinstance(p, str) else [dict(turn) for turn in p] for p in prompts],
        "completions": [_reply(*pair) for pair in zip(prompts, completions, strict=True)],
        "completion_ids": [list(ids) for ids in completion_ids],
    }
    state, logged = state or TrainingState(), Logged() if logged is None else logged
    signature = signature_of(function)
    there = OF_EPISODES in columns and ENVIRONMENTS in signature.names
    environments = {ENVIRONMENTS: list(columns[OF_EPISODES])} if there else {}
    accepted = signature.accepted(name, {**arguments, **environments})
    if environments and isinstance(function, IsolatedFunction):
        raise UsageError(
            f"reward {name!r} asks for `environments`, which live in keel's own process: set `isolate: false`"
        )
    if isinstance(function, IsolatedFunction):
        answer = function.ask({**accepted, worker.EXTRA: (signature.extras(), state.plain())}, len(prompts))
        logged.add(answer.get("logged") or Logged().dump())
        return _answered(answer, name, prompts)
    more = {key: value for key, value in extras(state.plain(), logged).items() if key in signature.extras()}
    silent = {**more, **{k: v for k, v in extras(state.plain(), Logged()).items() if k in more}}
    try:
        copied = copy.deepcopy({key: v for key, v in accepted.items() if key not in environments})
        values = worker.run(function, {**copied, **environments, **more})
    except UsageError as error:
        raise UsageError(f"reward {name!r}: {error}") from error
    except BaseException as error:
        if _is_a_persons(error):
            raise
        at = worker.blamed(
            lambda i: worker.run(function, {**_one(accepted, i, environments), **silent}), len(prompts)
        )
        place = worker.place_of(error, function)
        raise _raised(name, type(error).__name__, str(error), at, prompts, place) from error
    return checked(values, name, prompts)


def signature_of(function: Callable[..., Any] | IsolatedFunction) -> Signature:
    """Which arguments a reward takes by name. UsageError for one that cannot be loaded."""
    return function.signature if isinstance(function, IsolatedFunction) else Signature.of(function)


def _answered(answer: Mapping[str, Any], name: str, prompts: Sequence[Prompt]) -> list[float | None]:
    """What the process of a reward said of B samples."""
    raised = answer.get("raised")
    if raised and raised["usage"] is not None:
        raise UsageError(f"reward {name!r}: {raised['usage']}")
    if raised:
        told = (raised["type"], raised["message"], raised["sample"], prompts, raised["place"])
        raise _raised(name, *told)
    if "kind" in answer:
        raise _no_list(name, answer["kind"])
    values = [_Strange(v["repr"]) if isinstance(v, dict) else v for v in answer["values"]]
    return checked(values, name, prompts)


class _Strange:
    """A value that is no number, as the function's own process shows it."""

    def __init__(self, shown: str) -> None:
        self.shown = shown

    def __repr__(self) -> str:
        return self.shown


def _is_a_persons(error: BaseException) -> bool:
    """Whether an interrupt may be a person's Ctrl-C: the command's own, or where Python turns that into
    one."""
    if not isinstance(error, Exception) and type(error).__module__.partition(".")[0] == "keel":
        return True
    python_s = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    main = threading.current_thread() is threading.main_thread()
    return isinstance(error, KeyboardInterrupt) and python_s and main


def _one(arguments: Mapping[str, Any], index: int, as_they_are: Mapping[str, Any]) -> dict[str, Any]:
    parts = {key: values[index : index + 1] for key, values in arguments.items()}
    return {key: part if key in as_they_are else copy.deepcopy(part) for key, part in parts.items()}


def _raised(
    name: str, what: str, message: str, at: int | None, prompts: Sequence[Prompt], place: str
) -> RewardError:
    """place: file and line, or ""."""
    where = f"on {len(prompts)} samples" if at is None else sample(prompts, at)
    return RewardError(f"reward {name!r} raised {what}: {message} ({where})" + f", in {place}" * bool(place))


def _no_list(name: str, what: str) -> RewardError:
    return RewardError(f"reward {name!r} returned a {what}, not a list with a number for each sample")


def checked(values: Any, name: str, prompts: Sequence[Prompt]) -> list[float | None]:
    """Whatever a reward returned, as one finite float or None a sample. RewardError for anything else."""
    if hasattr(values, "tolist"):  # an array or a tensor
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        raise _no_list(name, kind(values))
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
