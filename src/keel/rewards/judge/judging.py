"""What a judge's verdicts become: scores of replies, and how far the judge disagrees with itself.

Replies to one prompt that are the same text are one reply: they are asked about once. A relative judge
(pairwise, ranking) is asked in both orders, and a reply's score is the share of the others that it is better
than, ½ for one that is as good: 1 for the best, 0 for the worst. What the order alone decides is measured.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, Protocol

from keel.data import questions
from keel.data.chat import completion_text
from keel.data.questions import Question, Rubric, Verdict
from keel.errors import RewardError, UsageError
from keel.rewards import functions
from keel.rewards.judge.client import Unanswered
from keel.rewards.mixture import SILENCE, Batch
from keel.types import Conversation, Prompt

Mode = Literal["pointwise", "pairwise", "ranking"]
Reply = str | Conversation


class Asked(Protocol):
    """Whoever answers questions: an address, or a model in this process."""

    def ask(self, questions: Sequence[Question]) -> list[Verdict | Unanswered]:
        """A verdict, or why there is none, on each question."""
        ...


@dataclass(frozen=True, slots=True)
class Compared:
    """One pair, as the judge sees it."""

    # how far the first reply of the pair is better, 1, ½ or 0: asked with it in front, with it behind; None
    # where that was not asked, or not answered
    in_front: float | None
    behind: float | None
    why: str = ""  # why one of them was not answered
    given_up: bool = False  # it was not asked, since another question was not answered

    @property
    def better(self) -> float | None:
        """Their mean; None where the judge was not heard in every order that it was asked in."""
        said = [value for value in (self.in_front, self.behind) if value is not None]
        return sum(said) / len(said) if said and not self.why else None


@dataclass(frozen=True, slots=True)
class OrderBias:
    """How far a judge's answers hang on the order in which replies stand, over pairs asked in both orders."""

    pairs: int
    disagreement: float  # share of the pairs on which its two answers differ
    position_bias: float  # share won by the one in front less the share won by the one behind, in [−1, 1]

    @staticmethod
    def of(compared: Sequence[Compared]) -> OrderBias | None:
        """None where no pair was answered in both orders."""
        both = [(c.in_front, c.behind) for c in compared if c.in_front is not None and c.behind is not None]
        if not both:
            return None
        differ = sum(a != b for a, b in both)
        return OrderBias(len(both), differ / len(both), math.fsum(a - b for a, b in both) / len(both))


@dataclass(frozen=True, slots=True)
class Judged:
    """What a judge said of several groups of replies."""

    scores: list[list[float | None]]  # a value a reply, in [0, 1]; None: unanswered
    reasons: list[list[str]]  # of a pointwise judge
    bias: OrderBias | None
    why: list[list[Unanswered | None]]  # why a reply has no score


class Judge:
    """A language model that judges by a rubric.

    against: a column with a reply that each reply is compared with. reference: a column with an answer that
    the judge is shown.
    """

    def __init__(
        self,
        name: str,
        asked: Asked,
        rubric: Rubric,
        *,
        mode: Mode = "pointwise",
        both_orders: bool = True,
        on_failure: Literal["error", "none"] = "error",
        against: str | None = None,
        reference: str | None = None,
    ) -> None:
        self.name, self.asked, self.rubric, self.mode = name, asked, rubric, mode
        self.both_orders, self.on_failure = both_orders, on_failure
        self.against, self.reference = against, reference

    # ------------------------------------------------------------ a reward

    def __call__(self, batch: Batch) -> list[float | None]:
        """The rewards of B samples, as a mixture asks for them. RewardError, with the sample, where one has
        no verdict and `on_failure` is error. What is measured goes into `batch.logged`."""
        groups = list(self._groups(batch))
        references = [self._cell(batch, self.reference, rows[0]) for rows in groups]
        replies = [[batch.completions[i] for i in rows] for rows in groups]
        prompts = [batch.prompts[rows[0]] for rows in groups]
        if self.against is not None:
            judged = self._against(batch, groups)
        else:
            judged = self.judge(prompts, replies, references)
        scores: list[float | None] = [None] * len(batch.prompts)
        reasons = [""] * len(scores)
        why: list[Unanswered | None] = [None] * len(scores)
        for rows, values, said, missing in zip(
            groups, judged.scores, judged.reasons, judged.why, strict=True
        ):
            for row, value, reason, gone in zip(rows, values, said, missing, strict=True):
                scores[row], reasons[row], why[row] = value, reason, gone
        self._check(batch.prompts, why)
        self._log(batch, judged, reasons, why)
        return scores

    def _groups(self, batch: Batch) -> Iterator[list[int]]:
        """The rows of one prompt (and one reference) each, in the order of their first."""
        if self.mode == "pointwise" or self.against is not None:
            yield from ([i] for i in range(len(batch.prompts)))
            return
        rows: dict[str, list[int]] = {}
        for i, prompt in enumerate(batch.prompts):
            key = json.dumps([prompt, self._cell(batch, self.reference, i)], sort_keys=True)
            rows.setdefault(key, []).append(i)
        yield from rows.values()

    def _cell(self, batch: Batch, column: str | None, row: int) -> str | None:
        if column is None:
            return None
        if column not in batch.columns:
            raise UsageError(f"reward {self.name!r}: the data have no column {column!r}")
        value: Any = batch.columns[column][row]
        if value is None:
            return None
        if isinstance(value, list | tuple):
            return completion_text(tuple(value))
        return str(value)

    def _against(self, batch: Batch, groups: Sequence[Sequence[int]]) -> Judged:
        """Each reply compared with the one in the column; None for a row without."""
        others = [self._cell(batch, self.against, rows[0]) for rows in groups]
        asked = [i for i, other in enumerate(others) if other is not None]
        pairs = [(batch.prompts[i], batch.completions[i], str(others[i])) for i in asked]
        references = [self._cell(batch, self.reference, i) for i in asked]
        compared = dict(zip(asked, self.compare(pairs, references), strict=True))
        scores = [[compared[i].better if i in compared else None] for i in range(len(groups))]
        why = [[_missing(compared[i]) if i in compared else None] for i in range(len(groups))]
        return Judged(scores, [[""] for _ in groups], OrderBias.of([*compared.values()]), why)

    def _check(self, prompts: Sequence[Prompt], why: Sequence[Unanswered | None]) -> None:
        missing = [(row, gone) for row, gone in enumerate(why) if gone is not None]
        if missing and self.on_failure == "error":
            row, gone = next(((row, gone) for row, gone in missing if gone.asked), missing[0])
            raise RewardError(
                f"reward {self.name!r} has no verdict on {functions.sample(prompts, row)}: {gone.reason}; "
                "what is done is kept, and the same command goes on (on_failure: none leaves such samples "
                "out)"
            )

    def _log(
        self, batch: Batch, judged: Judged, reasons: Sequence[str], why: Sequence[Unanswered | None]
    ) -> None:
        if judged.bias is not None:
            pairs = judged.bias.pairs
            batch.logged.log_metric(f"{self.name}/position_bias", judged.bias.position_bias, pairs)
            batch.logged.log_metric(f"{self.name}/disagreement", judged.bias.disagreement, pairs)
        if self.on_failure == "none":
            unanswered = sum(w is not None for w in why) / len(why)
            batch.logged.log_metric(f"{self.name}/unanswered", unanswered, len(why))
            reason_of = [None if gone is None else gone.reason for gone in why]
            batch.logged.log_extra(f"{self.name}/{SILENCE}", reason_of)
        if self.mode == "pointwise" and self.rubric.reasons:
            batch.logged.log_extra(f"{self.name}/reason", reasons)

    # ------------------------------------------------------------ groups and pairs

    def judge(
        self,
        prompts: Sequence[Prompt],
        groups: Sequence[Sequence[Reply]],
        references: Sequence[str | None] | None = None,
    ) -> Judged:
        """Scores of the replies to each prompt. A relative judge gives ½ to a reply that stands alone."""
        references = references or [None] * len(prompts)
        unique = [list({_text(reply): reply for reply in group}.values()) for group in groups]
        places = [{_text(reply): i for i, reply in enumerate(group)} for group in unique]
        if self.mode == "pointwise":
            found = self._pointwise(prompts, unique, references)
        elif self.mode == "pairwise":
            found = self._pairwise(prompts, unique, groups, references)
        else:
            found = self._ranking(prompts, unique, groups, references)

        def spread(values: list[list[Any]]) -> list[list[Any]]:
            return [
                [own[place[_text(reply)]] for reply in group]
                for own, place, group in zip(values, places, groups, strict=True)
            ]

        return Judged(spread(found.scores), spread(found.reasons), found.bias, spread(found.why))

    def compare(
        self, pairs: Sequence[tuple[Prompt, Reply, Reply]], references: Sequence[str | None] | None = None
    ) -> list[Compared]:
        """Each pair in both orders; with `both_orders` False in one, which its texts decide. Equal replies
        are equally good."""
        references = references or [None] * len(pairs)
        asked: list[Question] = []
        wanted: list[tuple[int, bool]] = []  # which pair, and whether its first reply stands in front
        for number, ((prompt, one, other), reference) in enumerate(zip(pairs, references, strict=True)):
            if _text(one) == _text(other):
                continue
            for front in (True, False) if self.both_orders else (_heads(prompt, one, other),):
                first, second = (one, other) if front else (other, one)
                asked.append(questions.pairwise(self.rubric, prompt, first, second, reference))
                wanted.append((number, front))
        said: dict[tuple[int, bool], Verdict | Unanswered] = dict(
            zip(wanted, self.asked.ask(asked) if asked else [], strict=True)
        )
        found: list[Compared] = []
        for number, (_, one, other) in enumerate(pairs):
            if _text(one) == _text(other):
                found.append(Compared(0.5, 0.5))
                continue
            sides = [said.get((number, front)) for front in (True, False)]
            front, behind = (None if not isinstance(s, Verdict) else float(s.value) for s in sides)  # pyright: ignore[reportArgumentType]
            gone = [s for s in sides if isinstance(s, Unanswered)]
            why = next((s for s in gone if s.asked), gone[0] if gone else None)
            found.append(Compared(
                front, None if behind is None else 1 - behind,
                why.reason if why else "", given_up=bool(why and not why.asked),
            ))  # fmt: skip
        return found

    def _pointwise(
        self, prompts: Sequence[Prompt], unique: Sequence[Sequence[Reply]], references: Sequence[str | None]
    ) -> Judged:
        asked = [
            questions.pointwise(self.rubric, prompt, reply, reference)
            for prompt, group, reference in zip(prompts, unique, references, strict=True)
            for reply in group
        ]
        said = iter(self.asked.ask(asked) if asked else [])
        scores: list[list[float | None]] = []
        reasons: list[list[str]] = []
        why: list[list[Unanswered | None]] = []
        for group in unique:
            own = [next(said) for _ in group]
            scores.append([float(v.value) if isinstance(v, Verdict) else None for v in own])  # pyright: ignore[reportArgumentType]
            reasons.append([v.reason if isinstance(v, Verdict) else "" for v in own])
            why.append([v if isinstance(v, Unanswered) else None for v in own])
        return Judged(scores, reasons, None, why)

    def _pairwise(
        self,
        prompts: Sequence[Prompt],
        unique: Sequence[Sequence[Reply]],
        groups: Sequence[Sequence[Reply]],
        references: Sequence[str | None],
    ) -> Judged:
        wanted = [(g, a, b) for g, group in enumerate(unique) for a, b in combinations(range(len(group)), 2)]
        pairs = [(prompts[g], unique[g][a], unique[g][b]) for g, a, b in wanted]
        compared = self.compare(pairs, [references[g] for g, _, _ in wanted])
        return _from_pairs(unique, groups, wanted, compared)

    def _ranking(
        self,
        prompts: Sequence[Prompt],
        unique: Sequence[Sequence[Reply]],
        groups: Sequence[Sequence[Reply]],
        references: Sequence[str | None],
    ) -> Judged:
        asked: list[Question] = []
        orders: list[tuple[int, list[int]]] = []  # which group, and the replies in the order that was asked
        for g, group in enumerate(unique):
            if len(group) < 2:
                continue
            order = list(range(len(group)))
            for shown in (order, order[::-1]) if self.both_orders else (order,):
                asked.append(
                    questions.ranking(self.rubric, prompts[g], [group[i] for i in shown], references[g])
                )
                orders.append((g, shown))
        said = self.asked.ask(asked) if asked else []
        pairs: dict[tuple[int, int, int], list[Any]] = {}  # → [in front, behind, why]
        for (g, shown), verdict in zip(orders, said, strict=True):
            place = {reply: spot for spot, reply in enumerate(shown)}
            for a, b in combinations(range(len(unique[g])), 2):
                entry = pairs.setdefault((g, a, b), [None, None, None])
                if isinstance(verdict, Unanswered):
                    entry[2] = entry[2] or verdict
                    continue
                places: Any = verdict.value
                mine, theirs = places[place[a]], places[place[b]]
                entry[0 if place[a] < place[b] else 1] = 0.5 if mine == theirs else float(mine < theirs)
        compared = [
            Compared(front, behind, why.reason if why else "", given_up=bool(why and not why.asked))
            for front, behind, why in pairs.values()
        ]
        return _from_pairs(unique, groups, list(pairs), compared)


def _from_pairs(
    unique: Sequence[Sequence[Reply]],
    groups: Sequence[Sequence[Reply]],
    wanted: Sequence[tuple[int, int, int]],
    compared: Sequence[Compared],
) -> Judged:
    """A reply's score is the mean over all other replies of its group, equal ones included, of how far it is
    better; None where one of these was not answered."""
    better = dict(zip(wanted, compared, strict=True))
    scores: list[list[float | None]] = []
    why: list[list[Unanswered | None]] = []
    for g, group in enumerate(unique):
        counts = [0] * len(group)
        place = {_text(reply): i for i, reply in enumerate(group)}
        for reply in groups[g]:
            counts[place[_text(reply)]] += 1
        own: list[float | None] = []
        gone: list[Unanswered | None] = []
        for i in range(len(group)):
            points, missing = [0.5 * (counts[i] - 1)], None
            for j in (j for j in range(len(group)) if j != i):
                pair = better[g, min(i, j), max(i, j)]
                value = pair.better
                if value is None:
                    missing = missing or _missing(pair)
                else:
                    points.append(counts[j] * (value if i < j else 1 - value))
            others = sum(counts) - 1
            mean = math.fsum(points) / others if others else 0.5
            own.append(mean if missing is None else None)
            gone.append(missing)
        scores.append(own)
        why.append(gone)
    return Judged(scores, [[""] * len(group) for group in unique], OrderBias.of(compared), why)


def _missing(pair: Compared) -> Unanswered | None:
    return Unanswered(pair.why, not pair.given_up) if pair.why else None


def _text(reply: Any) -> str:
    return reply if isinstance(reply, str) else questions.same_to_a_judge(reply)


def _heads(prompt: Prompt, one: Reply, other: Reply) -> bool:
    """A coin that the texts toss, the same whichever of them is named first."""
    digest = hashlib.sha256(json.dumps([prompt, *sorted((_text(one), _text(other)))]).encode()).digest()
    return (digest[0] % 2 == 0) == (_text(one) <= _text(other))
