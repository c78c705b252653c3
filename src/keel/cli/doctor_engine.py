"""`keel doctor --distributed --engine`: whether a vLLM server can sample for a run, or be started for one."""

from __future__ import annotations

import os
import time

from keel.cli.checks import Check
from keel.config.addresses import plain_address
from keel.errors import EngineError, UsageError
from keel.rollout.vllm import asking, served, server
from keel.rollout.vllm.wire import DownError, RefusedError, Wire

INSTALLED = "vllm"  # in place of an address: the environment that a run starts a server from
PATIENCE = 10.0  # seconds for an answer
ROWS, TOKENS = 16, 16  # that it is asked for
SERVE = "start it by `keel engine serve`"
ADDED = "/v1"  # what keel puts behind an address itself


def checked(engine: str, key_env: str | None) -> None:
    """UsageError for what is neither `vllm` nor an address, and for a key that is not there."""
    if engine == INSTALLED:
        if key_env is not None:
            raise UsageError("--api-key-env has no effect with --engine vllm: give the server's address")
        return
    try:
        plain_address(engine, "--engine http://gpu-box:8000, or --engine vllm", ADDED)
    except ValueError as error:
        raise UsageError(f"--engine: {error}") from None
    if key_env is not None and not os.environ.get(key_env, "").strip():
        raise UsageError(f"--api-key-env: the variable {key_env} is not set")


def examine(engine: str, key_env: str | None) -> Check:
    """Try a server, or look for the environment of one. To be called on the first machine, whose first rank
    asks the server for all."""
    if engine == INSTALLED:
        return _installed()
    key = None if key_env is None else os.environ.get(key_env, "").strip()
    wire = Wire(engine.rstrip("/"), key, PATIENCE)
    try:
        wire.get("/health")
        return _answering(wire, served.look(wire))
    except DownError as down:
        mend = f"{SERVE}, with a --host and a port that the first machine reaches"
        return Check("engine", False, f"{engine} does not answer: {down}", mend)
    except RefusedError as refused:
        named = "--api-key-env names the variable with its key" if refused.status == 401 else SERVE
        return Check("engine", False, f"{engine} refuses: {refused}", named)
    except (EngineError, asking.GarbageError) as error:
        return Check("engine", False, str(error), SERVE)


def _answering(wire: Wire, told: served.Served) -> Check:
    """A server that is there: whether it can be used, and how fast it answers."""
    about = f"vLLM {told.version} serves {told.base}"
    if told.logprobs != served.PROCESSED:
        mend = f"{SERVE}, or with --logprobs-mode {served.PROCESSED}"
        return Check("engine", False, f"{about} and gives {told.logprobs}", mend)
    once = _timed(wire, told.base, 1, 1)
    all_rows = _timed(wire, told.base, ROWS, TOKENS)
    room = "" if told.room is None else f", room for {told.room} tokens"
    adapters = "takes adapters" if told.takes_adapters else "takes no adapters (rollout.push: whole)"
    return Check(
        "engine", True,
        f"{about}{room}, {adapters}; a token in {once * 1e3:.0f} ms, {ROWS} × {TOKENS} tokens at "
        f"{ROWS * TOKENS / all_rows:,.0f} a second",
    )  # fmt: skip


def _timed(wire: Wire, base: str, rows: int, tokens: int) -> float:
    """Seconds for so many rows of so many tokens. GarbageError for answers that are none."""
    params = {"n": 1, "temperature": 1.0, "max_tokens": tokens, "ignore_eos": True, "logprobs": 0,
              "detokenize": False}  # fmt: skip
    answers: list[object] = []
    body = {"model": base, "token_ids": [1, 2, 3, 4], "sampling_params": params}

    def took(number: int, answer: object) -> None:
        answers.append(answer)

    began = time.perf_counter()
    down = wire.many(asking.ROUTE, [body] * rows, rows, took)
    spent = time.perf_counter() - began
    if down is not None:
        raise down
    for answer in answers:
        if isinstance(answer, RefusedError):
            raise answer
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not choices or len(choices[0].get("token_ids") or ()) != tokens:
            raise asking.GarbageError(f"{wire.address} does not sample the {tokens} tokens asked for")
    return spent


def _installed() -> Check:
    """The environment that `rollout: {engine: vllm}` starts a server from."""
    try:
        program = server.program_of(None)
    except UsageError as error:
        return Check("engine", False, str(error), "keel engine install vllm")
    place = program.parents[1]
    package = server.package_in(place)
    if package not in server.PINS.values():
        found = f"{place} holds {package or 'what keel did not install'}"
        return Check("engine", False, found, "keel engine install vllm makes it anew, as it is tested")
    return Check("engine", True, f"{package} in {place}")
