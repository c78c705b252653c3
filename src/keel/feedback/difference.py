"""What two replies have and have not in common, word by word."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

from markupsafe import Markup

MOST = 4_000_000  # pairs of words that are compared; larger texts are compared line by line
_SPACED = r"[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u0e00-\u0e7f]+"  # words of scripts that part them
_WORD = re.compile(rf"{_SPACED}\s*|\s+|.", re.DOTALL)

Segment = tuple[str, bool]  # text, whether the other side has it too


def segments(one: str, other: str) -> tuple[list[Segment], list[Segment]]:
    """Both texts cut where they begin or cease to be alike. Joined again, each is the text it came from."""
    parts, others = _WORD.findall(one), _WORD.findall(other)
    if len(parts) * len(others) > MOST:
        parts, others = one.splitlines(keepends=True), other.splitlines(keepends=True)
    if len(parts) * len(others) > MOST:
        return [(one, one == other)], [(other, one == other)]
    left: list[Segment] = []
    right: list[Segment] = []
    for kind, a, b, c, d in SequenceMatcher(None, parts, others, autojunk=False).get_opcodes():
        for side, text in ((left, "".join(parts[a:b])), (right, "".join(others[c:d]))):
            if text:
                side.append((text, kind == "equal"))
    return left, right


def marked(one: str, other: str) -> tuple[Markup, Markup]:
    """Both texts as HTML, what the other side lacks in `<mark>`."""
    left, right = segments(one, other)
    return _html(left), _html(right)


def _html(side: Sequence[Segment]) -> Markup:
    escape: Callable[[str], Markup] = Markup.escape
    parts = [escape(text) if same else Markup("<mark>{}</mark>").format(text) for text, same in side]
    return Markup('<pre class="raw" dir="auto">') + Markup("").join(parts) + Markup("</pre>")
