"""A chat template rendered: on the run's date, within limits, and what it raises in one line with its place.

A template is code from whoever made the model. jinja's sandbox keeps it from the machine, but not from
looping for an hour or filling the memory: it is stopped after `SECONDS`, and where it takes `MEBIBYTES` more
than there was. It may also write today's date, which would make two runs of one config differ: the date is
the run's (`on_date`).
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import datetime
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from keel.errors import UsageError

SECONDS = 20.0  # that a template may take over one conversation
MEBIBYTES = 1024  # of memory that it may take
_LONGEST = 300  # characters of what it raises
_ASKS, _TAKES = "strftime_now", "date_string"  # names in a template
_PAGE = resource.getpagesize()


# ---------------------------------------------------------------- the date


@dataclass(frozen=True, slots=True)
class _Today:
    """What day it is for templates."""

    date: datetime.date | None = None  # None: the clock's
    given: bool = False  # a person said so: templates that take a `date_string` are given it too


_today = _Today()


@contextmanager
def on_date(date: datetime.date | None, *, given: bool = False) -> Iterator[None]:
    """Every template rendered in this process writes this date; None: today's.

    given: a person named the date, so templates that only take a `date_string`, with a constant of their own
    where nobody gives one, write it too.
    """
    global _today
    before, _today = _today, _Today(date, given)
    try:
        yield
    finally:
        _today = before


def today() -> object:
    """What templates are told of the date now; equal to itself as long as that is the same."""
    return _today


def asks_for_date(template: str, *, given: bool = False) -> bool:
    """Whether what a template writes depends on the date. given: as in `on_date`."""
    return _ASKS in template or (given and _TAKES in template)


def _strftime_now(format: str) -> str:
    """What templates call: the run's date at midnight, else now."""
    date = _today.date
    now = datetime.datetime.now() if date is None else datetime.datetime(date.year, date.month, date.day)
    return now.strftime(format)


@contextmanager
def _dated(template: str) -> Iterator[None]:
    """The template's own clock shows the run's date for as long as it lasts."""
    if _today.date is None or _ASKS not in template:
        yield
        return
    compiled: Any = chat_template_utils._compile_jinja_template(template)  # kept by transformers, one a text
    names = compiled.environment.globals
    before = names["strftime_now"]
    names["strftime_now"] = _strftime_now
    try:
        yield
    finally:
        names["strftime_now"] = before


# ---------------------------------------------------------------- rendering


def apply(
    tokenizer: PreTrainedTokenizerBase, messages: Any, generation: bool, more: Mapping[str, Any]
) -> str:
    """What the tokenizer's template makes of messages. UsageError where it refuses them, with its line."""

    def rendered(template: str) -> str:
        dates = {} if "date_string" in more else _date_string(template)
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation, **dates, **more
        )
        return str(text)

    return _within_limits(tokenizer, messages, more, rendered)


def apply_marked(
    tokenizer: PreTrainedTokenizerBase, messages: Any, more: Mapping[str, Any]
) -> list[tuple[int, int]]:
    """Spans of the rendered messages that the template marks by {% generation %}. UsageError as in
    `apply`."""

    def rendered(template: str) -> list[tuple[int, int]]:
        names = {**tokenizer.special_tokens_map, **_date_string(template), **more}
        found: Any = chat_template_utils.render_jinja_template(
            [messages], chat_template=template, return_assistant_tokens_mask=True, **names
        )
        return [(start, end) for start, end in found[1][0]]

    return _within_limits(tokenizer, messages, more, rendered)


def _date_string(template: str) -> dict[str, str]:
    if not (_today.given and _today.date and _TAKES in template):
        return {}
    return {"date_string": _today.date.strftime("%d %b %Y")}


_slow: dict[str, str] = {}  # templates that took too long, with the line: they are not waited for again


def _within_limits(
    tokenizer: PreTrainedTokenizerBase,
    messages: Any,
    more: Mapping[str, Any],
    rendered: Callable[[str], Any],
) -> Any:
    template = ""
    roles = ", ".join(str(turn.get("role")) for turn in messages)
    refuses = f"the chat template refuses the roles {roles}"
    try:
        with _limits():
            template = str(tokenizer.get_chat_template(tools=more.get("tools")))
            if template in _slow:
                raise _TooLong
            with _dated(template):
                return rendered(template)
    except _TooLong as error:
        line = _slow.setdefault(template, _line(error))
        raise UsageError(
            f"the chat template takes more than {SECONDS:g} s over one conversation{line}"
        ) from None
    except MemoryError as error:
        line = _line(error)
        raise UsageError(
            f"the chat template takes more than {MEBIBYTES} MiB of memory over one conversation{line}"
        ) from None
    except Exception as error:  # a template may raise anything
        raise UsageError(f"{refuses}: {_said(error)}{_line(error)}") from None


def _said(error: Exception) -> str:
    """What a template raised, in one line; its own words alone where it refuses by itself."""
    words = " ".join(str(error).split()) or type(error).__name__
    words = words if len(words) <= _LONGEST else words[: _LONGEST - 1] + "…"
    own = type(error) is jinja2.TemplateError or isinstance(error, jinja2.UndefinedError)
    return words if own else f"{type(error).__name__}: {words}"


def _line(error: BaseException) -> str:
    """ " (line 12 of the template)" for the line that raised; "" where none did."""
    number = error.lineno if isinstance(error, jinja2.TemplateSyntaxError) else None
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_globals.get("__jinja_template__")
        if code is not None:  # compiled by jinja: its own line numbers
            number = code.get_corresponding_lineno(trace.tb_lineno)
        elif trace.tb_frame.f_code.co_filename in ("<template>", "<unknown>"):  # rewritten by jinja
            number = trace.tb_lineno
        trace = trace.tb_next
    return f" (line {number} of the template)" if number else ""


# ---------------------------------------------------------------- limits


class _TooLong(BaseException):
    """The time is up. No Exception, which jinja would take for one of the template's."""


class _Watch:
    """A thread that raises _TooLong in threads whose time is up: that works in any thread, and takes no
    signal from whoever uses one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._deadlines: dict[int, float] = {}
        self._fired: set[int] = set()
        self._runs = False

    @contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        ident = threading.get_ident()
        if ident in self._deadlines:  # within another: its limit holds
            yield
            return
        with self._lock:
            self._deadlines[ident] = time.monotonic() + seconds
            if not self._runs:  # Thread.start waits for ever where the thread finds no memory to begin with
                _thread.start_new_thread(self._run, ())
        try:
            yield
        finally:
            with self._lock:
                self._deadlines.pop(ident, None)
                if ident in self._fired:  # it may not have been raised yet
                    self._fired.discard(ident)
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), None)

    def _run(self) -> None:
        with self._lock:
            if self._runs:
                return
            self._runs = True
        idle = 0
        while idle < 20:
            time.sleep(0.25)
            with self._lock:
                idle = 0 if self._deadlines else idle + 1
                for ident, deadline in list(self._deadlines.items()):
                    if time.monotonic() > deadline:
                        del self._deadlines[ident]
                        self._fired.add(ident)
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(
                            ctypes.c_ulong(ident), ctypes.py_object(_TooLong)
                        )
                if idle == 20:
                    self._runs = False


_watch = _Watch()


_statm: int | None = None  # /proc/self/statm, kept open: to open it takes longer than many a template


def _after_fork() -> None:
    """Threads do not outlive a fork, the lock may be taken, and the open file is the parent's."""
    global _watch, _statm
    _watch, _statm = _Watch(), None


os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def _limits() -> Iterator[None]:
    with _watch.limit(SECONDS), _memory(MEBIBYTES):
        yield


@contextmanager
def _memory(mebibytes: int) -> Iterator[None]:
    """At most this much more address space than now, where the system says how much that is (Linux)."""
    global _statm
    try:
        if _statm is None:
            _statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        now = int(os.pread(_statm, 64, 0).split()[0]) * _PAGE
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    except (OSError, ValueError, IndexError):
        yield
        return
    limit = now + (mebibytes << 20)
    if soft != resource.RLIM_INFINITY and soft <= limit:
        yield
        return
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
