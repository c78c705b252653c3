"""Questions to an address that speaks OpenAI's chat completions, many at a time, through the `openai` client.

What a server does wrong is met here. A request that brings nothing (no connection, no answer in time, a
status that passes, an answer that cannot be read) is tried again after a pause that doubles; `Retry-After` is
honoured, by all questions alike. After `tries` requests a question ends as `Unanswered`. What every other
question would meet, too (a refused key, an unknown model or path), ends the whole.

The event loop has a thread of its own: an interrupt reaches the thread that waits for it and is never lost in
a callback, and keel can be called where another loop runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from keel.data.questions import Question, Verdict
from keel.errors import BudgetError, RewardError, UsageError
from keel.rewards.judge.ledger import Ledger, key_of

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before the second request, and between any two
LONGEST_WAIT = 900.0  # seconds of `Retry-After`; who asks for more is down
SHORTEST_KEY = 8  # characters of a key that is taken out of what a server says
SHOWN = 120  # characters of an answer or a status that an error shows
_AGAIN = (408, 409, 425, 429)
_REFUSED = (401, 403, 404, 405, 407)
_FORMATS = ("json_schema", "json_object", "")  # of the answer, the strictest first; "": by words alone
_PARAMETER = re.compile(r"max_completion_tokens")
_CHARACTERS = 4  # of a token, where a server does not count them
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Unanswered:
    """A question to which no usable answer came."""

    reason: str
    asked: bool = True  # False: it was given up with others


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a model answers, and how it is asked."""

    address: str  # ends before /chat/completions
    model: str
    key: str | None = field(default=None, repr=False)
    temperature: float | None = 0.0  # None: the server's own
    max_new_tokens: int = 1024
    tries: int = 6  # requests for one question
    timeout: float = 120.0  # seconds for one request, from its start to the end of the answer
    concurrency: int = 8  # requests at the same time

    def about(self, question: Question) -> dict[str, Any]:
        """What an answer depends on."""
        return {
            "model": self.model,
            "text": question.text,
            "temperature": self.temperature,
            "max_new_tokens": self.max_new_tokens,
        }


class _Passing(Exception):
    """A request brought nothing; another one may."""

    def __init__(
        self,
        reason: str,
        *,
        wait: float = 0.0,  # seconds that the server asks for
        tokens: int = 0,  # that it cost all the same
        down: bool = False,  # nobody is there
        unread: bool = False,  # there was an answer, of another form
        at_once: bool = False,  # the next request differs from this one
    ) -> None:
        super().__init__(reason)
        self.reason, self.wait, self.tokens = reason, wait, tokens
        self.down, self.unread, self.at_once = down, unread, at_once


class _Final(Exception):
    """This question will not be answered."""


def library() -> Any:
    """The `openai` client. UsageError where it is not installed."""
    try:
        import openai
    except ImportError:
        missing = "a judge at an address needs the openai client: pip install 'keel-rlhf[judge]'"
        raise UsageError(missing) from None
    return openai


class Remote:
    """Asks an endpoint; what it was told before, it takes from the ledger.

    stop_at_failure: whether one unanswered question is enough, so that no others are asked. spent: told the
    calls and tokens so far, after questions.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        ledger: Ledger,
        *,
        stop_at_failure: bool = True,
        spent: Callable[[int, int], None] = lambda calls, tokens: None,
    ) -> None:
        self.endpoint, self.ledger, self.stop_at_failure = endpoint, ledger, stop_at_failure
        self.spent = spent
        self._form = 0  # of _FORMATS, the first that the server takes
        self._form_works = False
        self._limit = "max_tokens"
        self._begin_again()

    def _begin_again(self) -> None:
        self._not_before = 0.0  # when the server wants to be asked again
        self._ended: Exception | None = None  # what every other question would meet, too
        self._given_up = ""  # why no more questions are asked
        self._over = asyncio.Event()  # one of the two

    def ask(self, questions: Sequence[Question]) -> list[Verdict | Unanswered]:
        """The verdict on each question, in order; equal ones are asked once. BudgetError where the budget is
        spent, RewardError where the server refuses to answer at all."""
        keys = [key_of(self.endpoint.about(question)) for question in questions]
        self.ledger.catch_up()
        found: dict[str, Verdict | Unanswered] = {}
        missing: dict[str, Question] = {}
        for key, question in zip(keys, questions, strict=True):
            if key in found or key in missing:
                continue
            told = self.ledger.answers.get(key)
            verdict = None if told is None else _read(question, told)
            if verdict is None:
                missing[key] = question
            else:
                found[key] = verdict
        if missing:
            library()
            found |= in_thread(lambda: self._ask_all(missing))
            if self._ended is not None:
                raise self._ended
        self.spent(self.ledger.calls, self.ledger.tokens)
        return [found[key] for key in keys]

    async def _ask_all(self, missing: Mapping[str, Question]) -> dict[str, Verdict | Unanswered]:
        openai, endpoint = library(), self.endpoint
        self._begin_again()
        client = openai.AsyncOpenAI(
            api_key=endpoint.key or "none",
            base_url=endpoint.address.rstrip("/"),
            organization="",  # else those of the environment, which are meant for another address
            project="",
            default_headers={"Authorization": f"Bearer {endpoint.key or 'none'}"},
            max_retries=0,
            timeout=endpoint.timeout,
            http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False),
        )
        free = asyncio.Semaphore(endpoint.concurrency)

        async def one(key: str, question: Question) -> Verdict | Unanswered:
            async with free:
                return await self._answer(client, key, question)

        async with client:
            tasks = [asyncio.ensure_future(one(key, question)) for key, question in missing.items()]
            answers = await asyncio.gather(*tasks, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return dict(zip(missing, answers, strict=True))  # pyright: ignore[reportReturnType]

    async def _answer(self, client: Any, key: str, question: Question) -> Verdict | Unanswered:
        """Ask until there is an answer that can be read."""
        reason, attempt, unread = "", 0, False
        while attempt < self.endpoint.tries:
            await self._rest(_pause(attempt))
            while (rest := self._not_before - time.monotonic()) > 0 and not self._over.is_set():
                await self._rest(rest)
            if self._over.is_set():
                return Unanswered(reason or self._given_up or "it was not asked", asked=bool(reason))
            try:
                return await self._counted(client, key, question, again=unread)
            except (BudgetError, RewardError) as error:
                self._ended = error
                self._over.set()
                return Unanswered(str(error))
            except _Final as error:
                reason = str(error)
                break
            except _Passing as passing:
                reason, unread = passing.reason, passing.unread
                attempt += not passing.at_once
                if passing.wait > LONGEST_WAIT:
                    reason += f", and it asks to be left alone for {passing.wait:.0f} s"
                    break
                self._not_before = max(self._not_before, time.monotonic() + passing.wait)
                if passing.down and attempt == self.endpoint.tries:
                    self._give_up(reason)
        if self.stop_at_failure:
            self._give_up(reason)
        return Unanswered(reason)

    def _give_up(self, reason: str) -> None:
        self._given_up = self._given_up or reason
        self._over.set()

    async def _rest(self, seconds: float) -> None:
        """Wait, unless it is over before."""
        if seconds > 0:
            with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
                await asyncio.wait_for(self._over.wait(), seconds)

    async def _counted(self, client: Any, key: str, question: Question, *, again: bool) -> Verdict:
        """One request, in the ledger whatever becomes of it."""
        self.ledger.begin(key)
        told, tokens = None, 0
        try:
            told, tokens = await self._request(client, question, again=again)
            verdict = _read(question, told)
            if verdict is None:
                shown, told = told, None
                raise _Passing(f"its answer cannot be read: {_short(shown)!r}", unread=True)
            return verdict
        except _Passing as passing:
            tokens = tokens or passing.tokens
            raise
        finally:
            self.ledger.end(key, told, tokens)

    async def _request(self, client: Any, question: Question, *, again: bool) -> tuple[str, int]:
        """The answer's text, and its tokens with those of the question. _Passing, _Final or RewardError
        where there is none."""
        openai, endpoint, sent = library(), self.endpoint, (self._form, self._limit)
        try:
            whole = await asyncio.wait_for(
                client.chat.completions.create(**self._body(question, again)), endpoint.timeout
            )
        except (openai.APITimeoutError, asyncio.TimeoutError, TimeoutError):
            raise _Passing(f"no answer within {endpoint.timeout:g} s") from None
        except openai.APIConnectionError as error:
            where = endpoint.address
            raise _Passing(f"{where} cannot be reached ({self._why(error)})", down=True) from None
        except openai.APIStatusError as error:
            raise self._of_status(error, *sent) from None
        except (openai.OpenAIError, ValueError, TypeError, AttributeError, LookupError) as error:
            raise _Passing(f"its answer is no chat completion ({self._why(error)})") from None
        return self._told(whole, question)

    def _told(self, whole: Any, question: Question) -> tuple[str, int]:
        try:
            choice = whole.choices[0]
            content, ended = choice.message.content, choice.finish_reason
        except (AttributeError, LookupError, TypeError):
            raise _Passing("its answer is no chat completion") from None
        usage = getattr(getattr(whole, "usage", None), "total_tokens", None)
        text = self._without_key(content) if isinstance(content, str) else ""
        tokens = usage if isinstance(usage, int) else (len(question.text) + len(text)) // _CHARACTERS
        self._form_works = True
        if ended == "length":
            limit = self.endpoint.max_new_tokens
            cut = f"its answer was cut off at `max_new_tokens` {limit}"
            raise _Passing(cut, tokens=tokens, unread=True)
        if not text:
            raise _Passing("its answer has no text", tokens=tokens, unread=True)
        return text, tokens

    def _body(self, question: Question, again: bool) -> dict[str, Any]:
        endpoint, form = self.endpoint, _FORMATS[self._form]
        more = "\n\nYour last answer could not be read: give the JSON object alone." if again else ""
        body: dict[str, Any] = {
            "model": endpoint.model,
            "messages": [{"role": "user", "content": question.text + more}],
            self._limit: endpoint.max_new_tokens,
        }
        if endpoint.temperature is not None:
            body["temperature"] = endpoint.temperature
        if form == "json_schema":
            schema = {"name": "verdict", "strict": True, "schema": dict(question.schema)}
            body["response_format"] = {"type": form, "json_schema": schema}
        elif form:
            body["response_format"] = {"type": form}
        return body

    def _of_status(self, error: Any, form: int, limit: str) -> Exception:
        """What a status means. form, limit: of the request."""
        status, said = int(error.status_code), self._said(error)
        reason = f"status {status}" + (f": {said}" if said else "")
        if status in _AGAIN or status >= 500:
            return _Passing(reason, wait=retry_after(error.response.headers))
        if status in (400, 422):
            if limit == "max_tokens" and _PARAMETER.search(said):
                self._limit = "max_completion_tokens"
                return _Passing(reason, at_once=True)
            if not self._form_works and form + 1 < len(_FORMATS):
                self._form = max(self._form, form + 1)
                return _Passing(reason, at_once=True)
        if status in _REFUSED or status < 400:
            hint = "; set `api_key_env` to the variable with its key" if status in (401, 403) else ""
            who = f"{self.endpoint.address} (model {self.endpoint.model})"
            return RewardError(f"{who} refuses to answer: {reason}{hint}")
        return _Final(reason)

    def _said(self, error: Any) -> str:
        """What a server says beside a status, without the key; "" where it says nothing, or sends a page."""
        body: Any = error.body
        told = (body.get("message") or body.get("detail")) if isinstance(body, Mapping) else body
        known = isinstance(told, str) and not told.lstrip().startswith("<")
        return self._in_short(told) if known else ""

    def _why(self, error: BaseException) -> str:
        """An error in a few words, without the key."""
        return self._in_short(_of_system(error) or error.__cause__ or str(error) or type(error).__name__)

    def _in_short(self, text: object) -> str:
        key = self.endpoint.key
        return _short(str(text).replace(key, "…") if key else text)

    def _without_key(self, told: str) -> str:
        """An answer without the key: a server may give back what it was sent. A key of a few letters, as is
        made up for servers that want none, may be part of any answer."""
        key = self.endpoint.key or ""
        return told.replace(key, "…") if len(key) >= SHORTEST_KEY else told


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a server asks to be left alone for (RFC 9110, 10.2.3): a number or a date; 0 for none."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        given = headers.get(name)
        if given is None:
            continue
        try:
            return max(0.0, float(given) * unit)
        except ValueError:
            pass
        try:
            return max(0.0, parsedate_to_datetime(given).timestamp() - time.time())
        except (ValueError, TypeError, OverflowError):
            continue
    return 0.0


def in_thread(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine to its end, in an event loop and a thread of their own. An interrupt of the waiting
    thread cancels it."""
    state: dict[str, Any] = {}

    async def whole() -> T:
        state["loop"], state["task"] = asyncio.get_running_loop(), asyncio.current_task()
        return await work()

    def body() -> None:
        try:
            state["value"] = asyncio.run(whole())
        except BaseException as error:  # goes on in the thread that waits
            state["error"] = error

    thread = threading.Thread(target=body, name="keel-judge", daemon=True)
    thread.start()
    try:
        thread.join()
    except BaseException:
        if "task" in state and thread.is_alive():
            state["loop"].call_soon_threadsafe(state["task"].cancel)
            thread.join(2.0)
        raise
    if "error" in state:
        raise state["error"]
    return state["value"]


def _pause(attempt: int) -> float:
    """Seconds before another request: doubled each time, and not the same for all who wait."""
    if not attempt:
        return 0.0
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (attempt - 1)) * (0.75 + random.random() / 2)


def _read(question: Question, told: str) -> Verdict | None:
    try:
        return question.read(told)
    except ValueError:
        return None


def _of_system(error: BaseException) -> str:
    """What the system says of a connection, in the errors that an error came of."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        if isinstance(one, OSError) and one.errno is not None:
            return os.strerror(one.errno) if one.errno > 0 else str(one.strerror)
        one = one.__cause__ or one.__context__
    return ""


def _short(text: object) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= SHOWN else line[: SHOWN - 1] + "…"


__all__ = ["Endpoint", "Remote", "Unanswered", "in_thread", "library", "retry_after"]
