"""Scales of a rating as text, one a line: what a page and the command line take."""

from __future__ import annotations

from keel.errors import UsageError
from keel.votes.kinds import Scale


def scales_of_text(text: str) -> tuple[Scale, ...]:
    """Scales, one a line: `name`, or `name low high`, or `name low high low label | high label`."""
    scales: list[Scale] = []
    for line in text.splitlines():
        words = line.split(None, 3)
        if not words:
            continue
        try:
            low, high = (int(words[1]), int(words[2])) if len(words) > 1 else (1, 5)
        except (ValueError, IndexError):
            raise UsageError(
                f"the scale {line!r} is not written as: helpful 1 5 not at all | fully"
            ) from None
        left, _, right = (words[3] if len(words) > 3 else "").partition("|")
        scales.append(Scale(words[0], low, high, left.strip(), right.strip()))
    return tuple(scales)


def line_of(scale: Scale) -> str:
    """The line that `scales_of_text` reads as this scale."""
    labels = f" {scale.low_label}".rstrip() + (f" | {scale.high_label}" if scale.high_label else "")
    return f"{scale.name} {scale.low} {scale.high}{labels}"
