"""An answer in words, in somebody's language."""

from __future__ import annotations

from collections.abc import Sequence

from keel.feedback.forms import SIDES, letter
from keel.feedback.locales import Translator
from keel.feedback.render import excerpt
from keel.votes.kinds import Answer, Project


def said(project: Project, answer: Answer, shown: Sequence[int] | None, words: Translator) -> str:
    """What an answer says. shown: position → reply, for the letters that its writer saw; None: the item's own
    order."""
    places = {reply: position for position, reply in enumerate(shown or range(100))}
    if answer.choice in SIDES:
        side = letter(places.get(SIDES.index(answer.choice), SIDES.index(answer.choice)))
        if answer.strength is not None:
            return words(f"choice.strength_{answer.strength}", side=side)
        return words(f"choice.{side.lower()}")
    if answer.choice is not None:
        return words.known(f"choice.{answer.choice}", answer.choice)
    if answer.ratings is not None:
        return ", ".join(
            f"{words.known(f'scale.{name}', name)} {value}" for name, value in answer.ratings.items()
        )
    if answer.ranking is not None:
        groups = [" = ".join(sorted(letter(places.get(i, i)) for i in group)) for group in answer.ranking]
        return " > ".join(groups)
    return excerpt(answer.text or "", 160)
