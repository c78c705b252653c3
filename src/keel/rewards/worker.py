"""The other end of `isolated`: a process that runs one reward, and nothing else.

It imports the function, says which arguments it takes, and then answers one request after another until its
parent closes the pipe. Requests are pickled; answers are JSON, so that nothing a reward returns is ever
unpickled by its parent. What the function prints goes to standard error. Light: keel itself is not loaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import inspect
import json
import os
import pickle
import re
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from keel.errors import UsageError
from keel.rewards.loading import ANYTHING, Signature, kind, load, of_package
from keel.rewards.trainer import Logged, extras

_KEEL = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep  # keel's own code
EXTRA = "\0extras"  # in a request: which arguments that are no columns are wanted, and the state for them
LONGEST = 2000  # characters of a message that is passed on


def main(descriptor: int, lifeline: int) -> None:
    """Serve the parent at the other end of a socket. lifeline: a pipe that closes when the parent dies."""
    _end_with(lifeline)
    parent, own = Connection(descriptor), os.getpid()
    first = pickle.loads(parent.recv_bytes())
    serve = {"regex": _regex, "math": _math}.get(first["what"], _function)
    try:
        answer, handle = serve(first, parent)
    except UsageError as error:
        _say(parent, {"refused": str(error)})
        return
    except BaseException as error:
        where, name = first.get("where", "reward"), first.get("function", "")
        reason = f"{type(error).__name__}: {_text(error)}"
        _say(parent, {"refused": f"{where}: {name} cannot be imported: {reason}"})
        return
    _say(parent, answer)
    while True:
        try:
            request = parent.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)  # not by Python's end, which would complain of what the function has closed
        handle(request)
        if os.getpid() != own:  # a fork of the function's, which came back from it
            os._exit(0)


def run(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """What a function returns; a coroutine is run to its end."""
    result = function(**arguments)
    return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result


def blamed(call: Callable[[int], Any], samples: int) -> int | None:
    """The sample to blame, found by calling again with one at a time; None if each alone is fine."""
    for index in range(samples):
        try:
            call(index)
        except BaseException:
            return index
    return None


def place_of(error: BaseException, function: Callable[..., Any]) -> str:
    """Where an error comes from, as "file.py:12": the innermost line of the function's own file, else the
    innermost one outside of keel; "" where there is none, as for code in C."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    outside = [(file, line) for file, line in frames if not file.startswith((_KEEL, "<"))]
    own = getattr(getattr(inspect.unwrap(function), "__code__", None), "co_filename", None)
    file, line = next(reversed([one for one in outside if one[0] == own] or outside), ("", 0))
    return f"{_short(file)}:{line}" if file else ""


def _short(file: str) -> str:
    """A path from the current folder, where it is in there."""
    with contextlib.suppress(ValueError, OSError):
        return os.path.relpath(file) if file.startswith(os.getcwd() + os.sep) else file
    return file


async def _awaited(result: Awaitable[Any]) -> Any:
    return await result


def _function(first: Mapping[str, Any], parent: Connection) -> Any:
    find = of_package if first["what"] == "plugin" else load
    function = find(first["function"], first["where"])
    own = os.getpid()

    def handle(request: bytes) -> None:
        logged = Logged()
        try:
            values = run(function, _filled(pickle.loads(request), logged))
        except BaseException as error:  # of whatever kind: nothing else is done in this process
            if os.getpid() != own:
                os._exit(1)
            arguments = pickle.loads(request)
            samples = next((len(values) for key, values in arguments.items() if key != EXTRA), 0)
            at = blamed(lambda i: run(function, _filled(_one(pickle.loads(request), i), Logged())), samples)
            usage = str(error)[:LONGEST] if isinstance(error, UsageError) else None
            raised = {"type": type(error).__name__, "message": _text(error), "sample": at, "usage": usage}
            _say(parent, {"raised": {**raised, "place": place_of(error, function)}})
            return
        if os.getpid() == own:
            _say(parent, {**_plain(values), "logged": logged.dump()})

    signature = Signature.of(function)
    return {name: getattr(signature, name) for name in Signature.__slots__}, handle


def _one(arguments: Mapping[str, Any], index: int) -> dict[str, Any]:
    return {k: values if k == EXTRA else values[index : index + 1] for k, values in arguments.items()}


def _filled(arguments: dict[str, Any], logged: Logged) -> dict[str, Any]:
    """The arguments of a request with those that are no columns."""
    wanted, state = arguments.pop(EXTRA, ((), {}))
    return {**arguments, **{key: value for key, value in extras(state, logged).items() if key in wanted}}


def _regex(first: Mapping[str, Any], parent: Connection) -> Any:
    compiled = re.compile(first["pattern"], first["flags"])
    find = compiled.fullmatch if first["full"] else compiled.search

    def handle(request: bytes) -> None:
        for text in pickle.loads(request):  # an answer each: the parent's limit is for one text
            _say(parent, {"found": find(text) is not None})

    return {}, handle


def _math(first: Mapping[str, Any], parent: Connection) -> Any:
    try:
        from math_verify import parse, verify  # pyright: ignore[reportMissingImports]
    except (ImportError, Exception) as error:  # it is optional; a broken one may raise anything
        raise UsageError(f"math-verify cannot be imported: {type(error).__name__}: {error}") from None

    def handle(request: bytes) -> None:
        texts = [text.replace("%", "\\%") for text in pickle.loads(request)]
        try:
            gold, found = (parse(f"${text}$", parsing_timeout=5) for text in texts)
            same = bool(gold and found and verify(gold, found, timeout_seconds=5))
        except ANYTHING:
            same = False
        _say(parent, {"same": same})

    return {}, handle


def _plain(values: Any) -> dict[str, Any]:
    """A result as JSON: numbers as floats, what is no number as its repr."""
    if hasattr(values, "tolist"):  # an array or a tensor
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        return {"kind": kind(values)}
    return {"values": [_number(value) for value in values]}


def _number(value: Any) -> Any:
    if value is None:
        return None
    try:
        if not isinstance(value, (str, bytes)):
            return float(value)
    except ANYTHING:
        pass
    return {"repr": _text(value, repr)}


def _text(value: Any, show: Callable[[Any], str] = str) -> str:
    try:
        return show(value)[:LONGEST]
    except ANYTHING:
        return f"a {type(value).__name__}"


def _say(parent: Connection, answer: Mapping[str, Any]) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more, or the function has closed the pipe
        parent.send_bytes(json.dumps(answer).encode())


def _end_with(lifeline: int) -> None:
    """Have the kernel end this process and its children when the parent is gone, even in the middle of C."""
    with contextlib.suppress(OSError, AttributeError):
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
        flags = fcntl.fcntl(lifeline, fcntl.F_GETFL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, flags | os.O_ASYNC)  # SIGIO, whose default is to end


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
