"""`keel` and `python -m keel`: the command. A signal while Python still imports leaves no traceback."""

from __future__ import annotations

import os
import signal
from types import FrameType


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"keel: interrupted\n")
    os._exit(130)


def main() -> None:
    """Import the command and call it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)
    from keel.cli.main import main as command

    command()


if __name__ == "__main__":
    main()
