"""JSON over HTTP to one server, many requests at a time.

No client library: a vLLM server is one plain host that answers one request at a time on a connection. Proxies
of the environment are not used and redirects not followed, so that a key goes to `address` and nowhere else.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

SHOWN = 300  # characters of what a server says that an error shows
LARGEST = 256 * 2**20  # bytes of an answer
AGAIN = (408, 425, 429)  # statuses below 500 that pass


class DownError(Exception):
    """Nobody is there, or what was there is gone: a request brought nothing, and another one may."""


class FailedError(DownError):
    """The server answered that it failed: a status of 500 or more, or one that passes."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"status {status}: {reason}")
        self.status, self.reason = status, reason


class RefusedError(Exception):
    """The server is there and says no."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"status {status}: {reason}")
        self.status, self.reason = status, reason


@dataclass
class Wire:
    """Requests to a server. timeout: seconds for one, to the end of its answer."""

    address: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 600.0
    _open: set[http.client.HTTPConnection] = field(default_factory=set, init=False, repr=False)
    _ended: set[http.client.HTTPConnection] = field(default_factory=set, init=False, repr=False)
    _closed: bool = field(default=False, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def get(self, path: str, timeout: float | None = None) -> Any:
        """What the server answers. DownError, RefusedError."""
        return self._once("GET", path, None, timeout)

    def post(self, path: str, body: Any = None, timeout: float | None = None) -> Any:
        """What the server answers. DownError, RefusedError."""
        return self._once("POST", path, {} if body is None else body, timeout)

    def many(
        self, path: str, bodies: Sequence[Any], concurrency: int, took: Callable[[int, Any], None]
    ) -> DownError | None:
        """Post each of the bodies, some at a time. took: is given the number of a body and its answer, or the
        RefusedError it met, one at a time and in no order.

        Ends early, and returns why, once the server is gone: bodies whose answer nobody took were not
        answered. An interrupt ends all requests.
        """
        numbers, gone, lock = iter(range(len(bodies))), threading.Event(), threading.Lock()

        def work() -> None:
            connection = self._connect(None)
            try:
                while not gone.is_set():
                    with lock:
                        number = next(numbers, None)
                    if number is None:
                        return
                    try:
                        answer = self._exchange(connection, "POST", path, bodies[number])
                    except RefusedError as refused:
                        answer = refused
                    with lock:
                        took(number, answer)
            except BaseException:
                gone.set()
                raise
            finally:
                self._close(connection)

        with self._workers(min(concurrency, len(bodies))) as pool:
            futures = [pool.submit(work) for _ in range(min(concurrency, len(bodies)))]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
                _first_fault(futures)
                return None
            except DownError as down:
                gone.set()
                self.hang_up()
                return down
            except BaseException:
                gone.set()
                self.hang_up()
                raise

    @contextlib.contextmanager
    def _workers(self, count: int) -> Any:
        pool = ThreadPoolExecutor(max(1, count), thread_name_prefix="keel-vllm")
        try:
            yield pool
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def close(self) -> None:
        """End every request, those of other threads too, and let no other one begin."""
        self._closed = True
        self.hang_up()

    def hang_up(self) -> None:
        """End every request that waits for its answer, or is about to be sent."""
        with self._lock:
            waiting = list(self._open)
            self._ended |= self._open
        for connection in waiting:
            with contextlib.suppress(OSError):
                if connection.sock is not None:
                    connection.sock.shutdown(socket.SHUT_RDWR)

    def _once(self, method: str, path: str, body: Any, timeout: float | None) -> Any:
        connection = self._connect(timeout)
        try:
            return self._exchange(connection, method, path, body)
        finally:
            self._close(connection)

    def _connect(self, timeout: float | None) -> http.client.HTTPConnection:
        parts = urlsplit(self.address)
        secure = parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=timeout or self.timeout)
        with self._lock:
            self._open.add(connection)
        return connection

    def _close(self, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            self._open.discard(connection)
            self._ended.discard(connection)
        connection.close()

    def _exchange(self, connection: http.client.HTTPConnection, method: str, path: str, body: Any) -> Any:
        """One request on a connection; a server that closed it since the last one is asked on a new one."""
        reused = connection.sock is not None
        try:
            return self._answer(connection, method, path, body)
        except (http.client.BadStatusLine, ConnectionError, BrokenPipeError) as error:
            connection.close()
            if not reused:
                raise DownError(_of_system(error)) from None
        except (http.client.HTTPException, OSError) as error:
            connection.close()
            if isinstance(error, TimeoutError):
                raise DownError(f"no answer within {connection.timeout:g} s") from None
            raise DownError(_of_system(error)) from None
        return self._exchange(connection, method, path, body)

    def _answer(self, connection: http.client.HTTPConnection, method: str, path: str, body: Any) -> Any:
        headers = {"Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        sent = None if body is None else json.dumps(body).encode()
        if sent is not None:
            headers["Content-Type"] = "application/json"
        if connection.sock is None:
            connection.connect()
        with self._lock:  # who hangs up from here on finds a socket
            if self._closed or connection in self._ended:
                raise ConnectionAbortedError("the request was ended")
        connection.request(method, urlsplit(self.address).path.rstrip("/") + path, sent, headers)
        response = connection.getresponse()
        raw = self._read(connection, response)
        if response.status in AGAIN or response.status >= 500:
            raise FailedError(response.status, self._said(raw))
        if response.status >= 300:
            raise RefusedError(response.status, self._said(raw))
        if not raw:
            return None
        try:
            return json.loads(raw)
        except ValueError:
            return raw.decode("utf-8", "replace")  # a word, as some routes answer

    def _read(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> bytes:
        """The whole answer. RefusedError for one that has no end, TimeoutError for one that takes too
        long."""
        patience = connection.timeout or self.timeout
        parts, size, until = list[bytes](), 0, time.monotonic() + patience
        while part := response.read1(2**16):
            parts.append(part)
            size += len(part)
            if size > LARGEST:
                connection.close()
                raise RefusedError(response.status, f"an answer of more than {LARGEST // 2**20} MiB")
            if time.monotonic() > until:
                raise TimeoutError
        if response.length:  # it ends before it said
            raise http.client.IncompleteRead(b"".join(parts), response.length)
        response.close()  # which `read1` leaves open at its end: the connection takes the next request then
        return b"".join(parts)

    def _said(self, raw: bytes) -> str:
        """What a server says of an error, in a line and without the key."""
        text = raw.decode("utf-8", "replace")
        with contextlib.suppress(ValueError, AttributeError, TypeError):
            told = json.loads(text)
            inner = told.get("error", told.get("detail", told))
            text = str(inner.get("message", inner) if isinstance(inner, dict) else inner)
        if self.key:
            text = text.replace(self.key, "…")
        line = " ".join(text.split()) or "no reason given"
        return line if len(line) <= SHOWN else line[: SHOWN - 1] + "…"


def _first_fault(futures: Sequence[Future[None]]) -> None:
    """Raise what one of them met; what is no DownError first, which is keel's own fault."""
    faults = [future.exception() for future in futures if future.done() and not future.cancelled()]
    for fault in sorted((f for f in faults if f is not None), key=lambda f: isinstance(f, DownError)):
        raise fault


def _of_system(error: BaseException) -> str:
    """What the system says of a connection."""
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return " ".join(str(error).split())[:SHOWN] or "the connection was closed"
