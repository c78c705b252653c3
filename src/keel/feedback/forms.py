"""From what a page or a program sends, which names shown positions, to an `Answer` in the item's own order;
and back, to fill a form with what was said before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from keel.errors import KeelError
from keel.votes.answers import LONGEST_COMMENT, LONGEST_TEXT, check, scales_of
from keel.votes.kinds import Answer, Project

SIDES = ("a", "b")


class FormError(KeelError):
    """What was sent is no answer. `key` names the sentence that says so in the person's language."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def letter(position: int) -> str:
    """A, B, … for shown positions 0, 1, …"""
    return chr(65 + position)


def answer_of(project: Project, shown: Sequence[int], fields: Mapping[str, str]) -> Answer:
    """The answer that a form's fields give. FormError where a field is missing or holds no such value."""
    comment = fields.get("comment", "").strip().replace("\r\n", "\n") if project.comment else ""
    if len(comment) > LONGEST_COMMENT:
        raise FormError("problem.comment_long")
    if project.task in ("pairwise", "thumbs"):
        choice, strength = _choice(project, shown, fields.get("choice", ""))
        answer = Answer(choice=choice, strength=strength, comment=comment)
    elif project.task == "rating":
        ratings = {
            scale.name: _whole(fields.get(f"rating-{number}"), "problem.rating", scale.low, scale.high)
            for number, scale in enumerate(scales_of(project))
        }
        answer = Answer(ratings=ratings, comment=comment)
    elif project.task == "ranking":
        answer = Answer(ranking=_ranking(shown, fields), comment=comment)
    else:
        text = fields.get("text", "").replace("\r\n", "\n")
        if not text.strip():
            raise FormError("problem.text")
        if len(text) > LONGEST_TEXT:
            raise FormError("problem.text_long")
        answer = Answer(text=text, comment=comment)
    check(project, len(shown), answer)
    return answer


def _choice(project: Project, shown: Sequence[int], value: str) -> tuple[str, int | None]:
    side, _, strength = value.partition(":")
    if project.task == "thumbs" or side not in SIDES:
        if strength or side not in ("up", "down", *project.allow):
            raise FormError("problem.choice")
        return side, None
    if bool(strength) != project.strength:
        raise FormError("problem.strength")
    return SIDES[shown[SIDES.index(side)]], _whole(strength, "problem.strength", 1, 3) if strength else None


def _ranking(shown: Sequence[int], fields: Mapping[str, str]) -> list[list[int]]:
    """Groups of replies by the places that were given; a place may be shared, and one may be left out."""
    groups: dict[int, list[int]] = {}
    for position, reply in enumerate(shown):
        place = _whole(fields.get(f"place-{position}"), "problem.place", 1, len(shown))
        groups.setdefault(place, []).append(reply)
    return [sorted(groups[place]) for place in sorted(groups)]


def _whole(value: str | None, problem: str, low: int, high: int) -> int:
    if (
        value is None
        or not value.isascii()
        or not value.isdigit()
        or len(value) > 9
        or not low <= int(value) <= high
    ):
        raise FormError(problem)
    return int(value)


def fields_of(project: Project, answer: Answer | None, shown: Sequence[int]) -> dict[str, str]:
    """The fields with which `answer_of` gives this answer."""
    if answer is None:
        return {}
    fields = {"comment": answer.comment} if answer.comment else {}
    if answer.choice in SIDES:
        side = SIDES[list(shown).index(SIDES.index(answer.choice))]
        fields["choice"] = side if answer.strength is None else f"{side}:{answer.strength}"
    elif answer.choice is not None:
        fields["choice"] = answer.choice
    if answer.ratings is not None:
        for number, scale in enumerate(scales_of(project)):
            if scale.name in answer.ratings:
                fields[f"rating-{number}"] = str(answer.ratings[scale.name])
    places = {reply: place for place, group in enumerate(answer.ranking or (), 1) for reply in group}
    fields |= {f"place-{p}": str(places[reply]) for p, reply in enumerate(shown) if reply in places}
    if answer.text is not None:
        fields["text"] = answer.text
    return fields
