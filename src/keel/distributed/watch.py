"""Whether the other ranks are still alive: each one's beat in the store, from a thread of its own.

A process that is stopped (SIGSTOP, a machine that hangs) keeps its connections, so that a collective would
wait for its whole timeout, and what waits for the first rank's word for ever. A thread beats every few
seconds; the first rank looks at all others, they look at it. What stands still for too long ends this
process, with a record of who it was. A rank whose main thread hangs goes on beating: that is for the timeout
of collectives.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from typing import Any

from keel.distributed import records

LOST = "has not answered for {seconds:.0f} s; what is done is kept, and the same command goes on"


class Watch(threading.Thread):
    """Beats, and looks at others."""

    def __init__(self, store: Any, rank: int, size: int, limit: float) -> None:
        """limit: seconds without a beat after which a rank is given up."""
        super().__init__(name="keel-watch", daemon=True)
        self.store, self.rank, self.size, self.limit = store, rank, size, limit
        self.every = min(2.0, limit / 5)
        self._over = threading.Event()

    def end(self) -> None:
        """No more looking."""
        self._over.set()

    def run(self) -> None:
        others = range(1, self.size) if self.rank == 0 else range(1)
        seen: dict[int, tuple[bytes, float]] = {}
        beats, looked = 0, time.monotonic()
        while not self._over.wait(self.every):
            now = time.monotonic()
            if now - looked > 2 * self.every + 1:  # this process itself stood still: nobody else is to blame
                seen.clear()
            looked, beats = now, beats + 1
            try:
                self.store.set(f"beat/{self.rank}", str(beats))
                for other in others:
                    beat = self._beat_of(other)
                    if other not in seen or seen[other][0] != beat:
                        seen[other] = beat, now
                    elif now - seen[other][1] > self.limit and not self._over.is_set():
                        self._give_up(other)
            except RuntimeError:
                if not self._over.is_set():
                    self._leave("lost", "whoever holds the ranks together is gone", self.rank, None)
                return

    def _beat_of(self, other: int) -> bytes:
        key = f"beat/{other}"
        return self.store.get(key) if self.store.check([key]) else b""

    def _give_up(self, other: int) -> None:
        host = f"host/{other}"
        named = self.store.get(host).decode() if self.store.check([host]) else "an unknown host"
        self._leave("hung", LOST.format(seconds=self.limit), other, named)

    def _leave(self, kind: records.Kind, line: str, rank: int, host: str | None) -> None:
        records.leave(kind, line, 1, rank=rank, host=host)
        if not records.is_watched():
            on = f" on {host}" if host else ""
            print(f"keel: rank {rank} of {self.size}{on}: {line}", file=sys.stderr, flush=True)
        os._exit(1)  # the main thread waits inside a collective, where no exception reaches it


def begin(store: Any, rank: int, size: int, limit: float) -> Watch:
    """Start to beat and to look. store: a connection of its own. limit: see `Watch`."""
    store.set(f"host/{rank}", socket.gethostname())
    watch = Watch(store, rank, size, limit)
    watch.start()
    return watch
