"""In which order items come, and on which side a reply stands.

Under "random" all items come by `rank`, a hash of (seed, key): the same order for everybody, so that items
are finished one after the other and what is finished is a random sample.

Under "uncertain" a share of the items, drawn by another hash when they are added, is set apart. It comes by
rank, never by priority, so that it stays a random sample of all items whatever the priorities are, and what
is estimated on it is unbiased. The others come by priority, the highest first. Which kind a person is given
next is drawn with the same share; where one kind is used up, the other comes. Each assignment says which it
was.

A cursor by person remembers up to where they have judged everything, so that finding the next item does not
get slower with their work. It is only a shortcut: the search begins anew where it finds nothing, and when the
order has changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from sqlalchemy import Connection, bindparam, literal_column, select, tuple_, update

from keel.votes import schema
from keel.votes.kinds import Project

_FIRST, _MOST = 32, 4096  # rows of the order that are looked at together
NO_PRIORITY = 1e300  # comes last


def unit(*what: object) -> float:
    """A number in [0, 1) that is a function of what is given."""
    return (_hash(*what) >> 11) / 2**53


def _hash(*what: object) -> int:
    content = "\x1f".join(str(part) for part in what)
    return int.from_bytes(
        hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big"
    )


def rank(seed: int, key: str) -> int:
    """An item's place in the random order: 63 bits."""
    return _hash("rank", seed, key) >> 1


def at_random(project: Project, key: str) -> bool:
    """Whether an item belongs to the share that comes at random under "uncertain"."""
    return unit("share", project.seed, key) < project.random_share


def urgency(priority: float | None) -> float:
    return NO_PRIORITY if priority is None else -priority


def shown(project: Project, key: str, replies: int, number: int) -> tuple[int, ...]:
    """Shown position → reply, for the `number`-th person on an item.

    The first order is drawn by a hash. Each further person's is that of the one before, turned by one: of two
    replies the sides are exchanged, and of k each stands once in every place among k people.
    """
    first = sorted(range(replies), key=lambda index: _hash("side", project.seed, key, index))
    turn = number % replies if replies else 0
    return tuple(first[turn:] + first[:turn])


def deal(connection: Connection, project_id: int, project: Project) -> None:
    """Draw again which items come at random, for other settings of the order."""
    items = schema.items
    rows = connection.execute(select(items.c.id, items.c.key).where(items.c.project_id == project_id))
    values = [{"row": row.id, "drawn": at_random(project, row.key)} for row in rows]
    if values:
        connection.execute(
            update(items).where(items.c.id == bindparam("row")).values(at_random=bindparam("drawn")), values
        )


# ---------------------------------------------------------------- going along the order


@dataclass(frozen=True, slots=True)
class Stream:
    """One of the orders in which a project's items come."""

    how: Literal["random", "uncertain"]  # random, uncertain
    apart: bool | None  # only items that are, or are not, of the random share; None: all
    open_only: bool = True  # only items with a free slot; a model judges the others too

    def start(self, seat: Any, order_version: int) -> tuple[Any, ...] | None:
        """Where this person goes on; None: at the start."""
        if seat.order_version != order_version:
            return None
        if self.how == "uncertain":
            found = (seat.urgency_cursor, seat.urgency_rank_cursor)
        else:
            found = (seat.rank_cursor,)
        return None if None in found else found

    def cursor(self, place: tuple[Any, ...]) -> dict[str, Any]:
        """Columns of the seat that remember a place."""
        names = ("urgency_cursor", "urgency_rank_cursor") if self.how == "uncertain" else ("rank_cursor",)
        return dict(zip(names, place, strict=True))

    def batches(
        self, connection: Connection, project_id: int, after: tuple[Any, ...] | None
    ) -> Iterator[Sequence[tuple[int, tuple[Any, ...]]]]:
        """The open items in this order from a place on: (item, place), more at a time the longer it takes."""
        size = _FIRST
        while True:
            places = {f"place_{number}": value for number, value in enumerate(after or ())}
            query = self._part(after is None)
            values = {"project": project_id, "apart": self.apart, "size": size, **places}
            rows = [(row[0], tuple(row[1:])) for row in connection.execute(query, values)]
            if rows:
                yield rows
            if len(rows) < size:
                return
            after, size = rows[-1][1], min(4 * size, _MOST)

    @cache  # noqa: B019 - there are six of them
    def _part(self, from_start: bool) -> Any:
        """The query for a part of the order."""
        items = schema.items
        keys = [items.c.urgency, items.c.rank] if self.how == "uncertain" else [items.c.rank]
        # written out, so that PostgreSQL sees that the index of open items will do
        usual = literal_column("open_slots > 0") if self.open_only else items.c.gold.is_(None)
        where: list[Any] = [items.c.project_id == bindparam("project"), usual]
        if self.apart is not None:
            where.append(items.c.at_random == bindparam("apart"))
        if not from_start:
            places = [bindparam(f"place_{number}") for number in range(len(keys))]
            where.append(tuple_(*keys) > tuple_(*places) if len(keys) > 1 else keys[0] > places[0])
        return select(items.c.id, *keys).where(*where).order_by(*keys).limit(bindparam("size"))


def streams(project: Project, person_id: int, served: int, *, open_only: bool) -> list[Stream]:
    """The orders to look through for a person's next item, the drawn one first."""
    if project.order == "random":
        return [Stream("random", None, open_only)]
    both = [Stream("random", True, open_only), Stream("uncertain", False, open_only)]
    drawn = unit("turn", project.seed, person_id, served) < project.random_share
    return both if drawn else both[::-1]
