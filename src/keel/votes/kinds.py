# pyright: strict
"""What travels between the database of votes and whoever uses it: plain values, no database.

An `Answer` is always in an item's own order of replies, never in the order in which somebody saw them.
Times are seconds since 1970 in UTC.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from keel.errors import UsageError

Task = Literal["pairwise", "rating", "ranking", "edit", "thumbs"]
Order = Literal["random", "uncertain"]
Role = Literal["admin", "annotator", "viewer"]
How = Literal["random", "uncertain", "gold", "edit"]
Status = Literal["counted", "surplus", "repeated"]
InvitationState = Literal["open", "used", "withdrawn", "expired"]
Turn = Mapping[str, Any]
Text = str | Sequence[Turn]  # plain text, or the turns of a conversation

TASKS: tuple[Task, ...] = ("pairwise", "rating", "ranking", "edit", "thumbs")
ROLES: tuple[Role, ...] = ("admin", "annotator", "viewer")
ORDERS: tuple[Order, ...] = ("random", "uncertain")
CHOICES: dict[str, tuple[str, ...]] = {
    "pairwise": ("a", "b", "tie", "both_bad", "cannot_judge"),
    "thumbs": ("up", "down", "cannot_judge"),
}


class NotFoundError(UsageError):
    """There is no such project, person or item, or it is none of this person's."""


class PausedError(UsageError):
    """This person, or the project, is paused."""


class TakenError(UsageError):
    """Somebody else has this name."""


class UsedError(UsageError):
    """A client's id was used for something else."""


class GoneError(UsageError):
    """This invitation was used or withdrawn, or has expired."""


@dataclass(frozen=True, slots=True)
class Scale:
    """A scale on which a reply is rated, with whole numbers from `low` to `high`."""

    name: str
    low: int = 1
    high: int = 5
    low_label: str = ""
    high_label: str = ""


DEFAULT_SCALES = (Scale("helpful"), Scale("harmless"), Scale("honest"))


@dataclass(frozen=True, slots=True)
class Project:
    """What people are asked, and how their work is shared out."""

    name: str  # [a-z0-9][a-z0-9_-]*
    task: Task = "pairwise"
    title: str = ""
    instructions: str = ""  # Markdown, beside the work
    examples: str = ""  # Markdown
    votes_per_item: int = 1
    scales: tuple[Scale, ...] = ()  # of a rating; none: helpful, harmless, honest, each 1 to 5
    strength: bool = False  # pairwise: slightly, clearly, much better
    allow: tuple[str, ...] = ("tie", "both_bad", "cannot_judge")  # choices besides a side
    comment: bool = True
    order: Order = "random"
    random_share: float = 0.2  # with order "uncertain": share of items that come at random
    gold_share: float = 0.1  # share of what a person is given that is hidden gold
    gold_floor: float = 0.7  # a person with a smaller share of right gold answers is paused
    gold_min: int = 5  # but not before so many gold answers
    lease_minutes: float = 20  # how long an item is a person's own
    seed: int = 0
    paused: str = ""  # why nobody is given anything now; empty: people are


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply to judge. `source` (a model, a file) is kept and never given to an annotator."""

    content: Text
    source: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A judgement, in the item's own order of replies. Which fields it has depends on the project's task."""

    choice: str | None = None  # pairwise: a, b, tie, both_bad, cannot_judge; thumbs: up, down, cannot_judge
    strength: int | None = None  # 1 to 3, with a or b
    ratings: Mapping[str, int] | None = None  # scale → number, of the first reply
    ranking: Sequence[Sequence[int]] | None = None  # indices of replies, best first; ties share a group
    text: str | None = None  # the edited reply
    comment: str = ""


@dataclass(frozen=True, slots=True)
class NewItem:
    """Something to judge. `key` names it within its project; the same key again is the same item."""

    key: str
    prompt: Text
    replies: Sequence[Reply]
    columns: Mapping[str, Any] = field(default_factory=dict[str, Any])
    gold: Answer | None = None  # the known answer of an item that checks attention
    priority: float | None = None  # with order "uncertain": the highest comes first


@dataclass(frozen=True, slots=True)
class Added:
    """What became of items that were given: new ones, and ones that were there."""

    added: int
    known: int


@dataclass(frozen=True, slots=True)
class Assignment:
    """An item that is one person's to judge.

    `replies` stand in the order in which they are shown, without their sources: position p shows the item's
    reply `shown[p]`. `key` and `how` are not for the person's eyes.
    """

    item: int
    slot: int  # 0 … votes_per_item − 1
    key: str
    task: Task
    prompt: Text
    replies: tuple[Reply, ...]
    shown: tuple[int, ...]
    leased_until: float
    previous: Answer | None  # what this person said before, in the item's own order
    how: How


@dataclass(frozen=True, slots=True)
class CastResult:
    """What became of a vote. "surplus": kept, beside as many as were wanted. "repeated": it was known."""

    status: Status
    vote: int
    paused: bool  # whether the person is paused now


@dataclass(frozen=True, slots=True)
class VoteRow:
    """One person's standing judgement of one item."""

    item: int
    key: str
    person: str
    is_model: bool
    answer: Answer
    shown: tuple[int, ...]
    seconds: float | None  # that it took, as the page measured
    at: float
    counted: bool  # it is one of the item's `votes_per_item`; never for gold, nor for a model's
    how: How
    version: int  # 1, and one more for each change
    prompt: Text
    replies: tuple[Reply, ...]
    columns: Mapping[str, Any]
    gold: Answer | None


@dataclass(frozen=True, slots=True)
class ItemRow:
    """An item with what has become of it."""

    item: int
    key: str
    prompt: Text
    replies: tuple[Reply, ...]
    columns: Mapping[str, Any]
    gold: Answer | None
    priority: float | None
    missing: int  # votes that are still wanted


@dataclass(frozen=True, slots=True)
class Person:
    """Somebody who votes, or looks. `paused` says why, for one project or for all."""

    id: int
    name: str
    role: Role
    is_model: bool = False
    paused: str | None = None


@dataclass(frozen=True, slots=True)
class Invitation:
    """A link that lets one person in, once. Its code is kept by nobody: `id` names it."""

    id: int
    role: Role
    project: str | None  # the only one that it lets into; None: all
    name: str  # that was suggested, of who is signed in again, or of who took it; may be empty
    again: bool  # it signs in somebody who was there before
    by: str | None  # who made it; None: at the machine itself
    created: float
    expires: float
    state: InvitationState


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a person, and the project, have come."""

    done: int  # this person's standing votes
    left_for_me: int
    total: int  # items, gold ones aside
    wanted: int  # votes
    counted: int  # votes
    today: int  # this person's votes since midnight UTC
    pace_per_hour: float  # this person's, over the last hour
    paused: str | None = None


@dataclass(frozen=True, slots=True)
class PastVote:
    """One of a person's own votes."""

    item: int
    key: str  # not for the person's eyes
    prompt: Text
    answer: Answer
    shown: tuple[int, ...]
    at: float
    version: int


@dataclass(frozen=True, slots=True)
class Adjudication:
    """A reviewer's word on an item. It stands beside the votes; of several the last one holds."""

    item: int
    key: str
    person: str
    answer: Answer
    note: str
    at: float


@dataclass(frozen=True, slots=True)
class Flag:
    """A person's remark that something is wrong with an item."""

    item: int
    key: str
    person: str
    reason: str
    at: float


@dataclass(frozen=True, slots=True)
class Disputed:
    """An item whose voters do not agree. `dispute` is in (0, 1]: 1 is as far apart as can be."""

    item: int
    key: str
    dispute: float
    votes: tuple[VoteRow, ...]
    flags: tuple[Flag, ...] = ()


@dataclass(frozen=True, slots=True)
class PastJudgement:
    """A vote that was cast elsewhere, to be brought in: by whom, on which item, when."""

    key: str
    person: str
    answer: Answer
    at: float | None = None
    seconds: float | None = None
    shown: tuple[int, ...] | None = None
    is_model: bool = False


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What `verify` found. `rows` of the log were read; `broken` is the number of the first that is wrong."""

    rows: int
    broken: int | None
    reason: str = ""
    head: str = ""  # hash of the last row: kept elsewhere, it shows later whether rows were taken away


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What was taken away with a person, and under which name the votes stay."""

    name: str
    votes: int
    comments: int
    credentials: int
