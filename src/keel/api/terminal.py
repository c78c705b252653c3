# pyright: strict
"""What keel writes for people and programs: what models, data and file names hold reaches a terminal as text,
never as commands to it."""

from __future__ import annotations

import json
import re
import sys
from typing import Any, TextIO

# Control characters but tab and newline, DEL and those of Latin-1, one of which begins a sequence as ESC [;
# and what turns the direction of text around (Trojan Source, 2111.00169).
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def inert(text: str) -> str:
    r"""The text with what a terminal would obey written out, as JSON writes it.

    >>> inert("a\x1b[2Jb")
    'a\\u001b[2Jb'
    """
    return _COMMANDS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def show(text: object, file: TextIO | None = None, end: str = "\n") -> None:
    """Print a text; a character that the stream has none for is written out as JSON does."""
    stream = file or sys.stdout
    print(_writable(inert(str(text)), getattr(stream, "encoding", None)), file=stream, end=end, flush=True)


def show_json(value: Any, indent: int | None = 2) -> None:
    """Print a value as JSON."""
    show(json.dumps(value, ensure_ascii=False, indent=indent))


def _writable(text: str, encoding: str | None) -> str:
    try:
        text.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        return "".join(c if _fits(c, encoding) else json.dumps(c)[1:-1] for c in text)
    except LookupError:
        pass
    return text


def _fits(character: str, encoding: str | None) -> bool:
    try:
        character.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True
