# pyright: strict
"""Whether an answer fits its item, agrees with another, and how far several are apart. No database."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import cast

from keel.errors import UsageError
from keel.votes.kinds import CHOICES, DEFAULT_SCALES, Answer, Project, Scale

LONGEST_COMMENT = 10_000  # characters
LONGEST_TEXT = 1_000_000  # characters of an edited reply
STRENGTHS = (1, 2, 3)  # slightly, clearly, much better


def scales_of(project: Project) -> tuple[Scale, ...]:
    """The scales of a rating project; the default ones where it names none."""
    return project.scales or DEFAULT_SCALES


def check(project: Project, replies: int, answer: Answer) -> None:
    """UsageError for an answer that the project's task, or an item with so many replies, has no room for."""
    wanted = {
        "pairwise": ("choice", "strength"), "thumbs": ("choice",), "rating": ("ratings",),
        "ranking": ("ranking",), "edit": ("text",),
    }[project.task]  # fmt: skip
    for name in ("choice", "strength", "ratings", "ranking", "text"):
        if name not in wanted and getattr(answer, name) is not None:
            raise UsageError(f"an answer of a {project.task} project has no `{name}`")
    for name in ("comment", "text"):
        if not isinstance(getattr(answer, name), str | None):
            raise UsageError(f"the {name} of an answer is {getattr(answer, name)!r}, not a text")
    if len(answer.comment) > LONGEST_COMMENT:
        raise UsageError(f"the comment is longer than {LONGEST_COMMENT:,} characters")
    if answer.comment and not project.comment:
        raise UsageError("this project takes no comments")
    if project.task in CHOICES:
        _check_choice(project, answer)
    elif project.task == "rating":
        _check_ratings(scales_of(project), answer)
    elif project.task == "ranking":
        _check_ranking(replies, answer)
    elif not answer.text or not answer.text.strip():
        raise UsageError("the edited reply is empty")
    elif len(answer.text) > LONGEST_TEXT:
        raise UsageError(f"the edited reply is longer than {LONGEST_TEXT:,} characters")


def _check_choice(project: Project, answer: Answer) -> None:
    sides = ("a", "b") if project.task == "pairwise" else ("up", "down")
    allowed = [c for c in CHOICES[project.task] if c in sides or c in project.allow]
    if answer.choice not in allowed:
        raise UsageError(f"the choice is {answer.choice!r}, not one of {', '.join(allowed)}")
    if answer.strength is None:
        return
    if not project.strength:
        raise UsageError("this project does not ask how much better a reply is")
    if answer.choice not in sides:
        raise UsageError(f"a strength goes with {' or '.join(sides)}, not with {answer.choice!r}")
    strength: object = answer.strength
    if isinstance(strength, bool) or strength not in STRENGTHS:
        raise UsageError(f"the strength is {answer.strength!r}, not 1, 2 or 3")


def _check_mapping(ratings: object) -> None:
    if not isinstance(ratings, Mapping | None):
        raise UsageError(f"ratings are numbers by scale, not {ratings!r}")


def _check_ratings(scales: Sequence[Scale], answer: Answer) -> None:
    _check_mapping(answer.ratings)
    ratings = answer.ratings or {}
    names = [scale.name for scale in scales]
    if set(ratings) != set(names):
        raise UsageError(f"each of these is rated, and nothing else: {', '.join(names)}")
    for scale in scales:
        if not _is_on(scale, value := ratings[scale.name]):
            raise UsageError(
                f"{scale.name} is rated {value!r}, not a whole number from {scale.low} to {scale.high}"
            )


def _is_on(scale: Scale, value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and scale.low <= value <= scale.high


def _check_ranking(replies: int, answer: Answer) -> None:
    groups = answer.ranking or ()
    flat: list[object] = [index for group in groups for index in _group(group)]
    numbers = [index for index in flat if isinstance(index, int) and not isinstance(index, bool)]
    if len(numbers) != len(flat) or sorted(numbers) != list(range(replies)):
        raise UsageError(f"a ranking names each of the {replies} replies once, ties in one group")
    if not all(groups):
        raise UsageError("a ranking has an empty group")


def _group(group: object) -> Sequence[object]:
    """A group of a ranking. UsageError for what is none."""
    if not isinstance(group, list | tuple):
        raise UsageError(f"a ranking is a list of groups, [[1], [0, 2]]; {group!r} is no group")
    return cast("Sequence[object]", group)


def agrees(project: Project, gold: Answer, answer: Answer) -> bool:
    """Whether an answer is right, by the known one.

    A choice must be the same; each rating at most one step off; no two replies ranked the other way round.
    """
    if project.task in CHOICES:
        return answer.choice == gold.choice
    if project.task == "rating":
        given, known = answer.ratings or {}, gold.ratings or {}
        return all(abs(given.get(name, -10) - value) <= 1 for name, value in known.items())
    return _distance(gold.ranking or (), answer.ranking or ()) == 0


def dispute(project: Project, answers: Sequence[Answer]) -> float:
    """How far apart people are, in [0, 1]; 0 where they agree, and for fewer than two answers.

    Choices: 1 where no two agree, else in proportion to those outside the largest camp. Ratings: the widest
    range of a scale, as a share of it. Rankings: the share of pairs of replies ranked the other way round,
    of the two people who are furthest apart. Edits are never disputed: no two are alike.
    """
    if project.task in CHOICES:
        choices = [answer.choice for answer in answers if answer.choice != "cannot_judge"]
        if len(choices) < 2:
            return 0.0
        largest = max(Counter(choices).values())
        return (len(choices) - largest) / (len(choices) - 1)
    if len(answers) < 2:
        return 0.0
    if project.task == "rating":
        widths: list[float] = []
        for scale in scales_of(project):
            values = [(answer.ratings or {}).get(scale.name, scale.low) for answer in answers]
            widths.append((max(values) - min(values)) / max(scale.high - scale.low, 1))
        return max(widths)
    if project.task == "ranking":
        rankings = [answer.ranking or () for answer in answers]
        return max(_distance(one, other) for one, other in combinations(rankings, 2))
    return 0.0


def _distance(one: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> float:
    """Share of the pairs of replies that two rankings order the other way round."""
    places = [{index: place for place, group in enumerate(r) for index in group} for r in (one, other)]
    pairs = list(combinations(sorted(set(places[0]) & set(places[1])), 2))
    reversed_ = sum((places[0][i] - places[0][j]) * (places[1][i] - places[1][j]) < 0 for i, j in pairs)
    return reversed_ / len(pairs) if pairs else 0.0
