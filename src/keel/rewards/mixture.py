"""Several rewards as one: a weighted sum of those that apply to a sample, each kept under its name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from keel.errors import KeelError, RewardError, UsageError
from keel.rewards import functions
from keel.rewards.isolated import IsolatedFunction
from keel.rewards.trainer import Logged, TrainingState
from keel.types import Conversation, Prompt, StopReason

_NO_LISTS = ("columns", "state", "logged")
SILENCE = "no_verdict"  # NAME/no_verdict of what is logged: why a judge that may be silent said nothing


@dataclass(frozen=True, slots=True)
class Batch:
    """B sampled responses, as every reward sees them: words for those that read words, ids for those that
    read ids."""

    prompts: Sequence[Prompt]
    completions: Sequence[str | Conversation]
    completion_ids: Sequence[Sequence[int]]  # the stop token is the last one, unless the reason is "length"
    stop_reasons: Sequence[StopReason]
    prompt_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[Any]]  # every other column of the data; None where a row has no value
    state: TrainingState = field(default_factory=TrainingState)
    logged: Logged = field(default_factory=Logged)  # takes what functions log of these samples

    def __post_init__(self) -> None:
        sizes = {f.name: len(getattr(self, f.name)) for f in fields(self) if f.name not in _NO_LISTS}
        sizes |= {f"columns[{name!r}]": len(values) for name, values in self.columns.items()}
        if wrong := [f"{name} {size}" for name, size in sizes.items() if size != len(self.prompts)]:
            raise ValueError(f"a batch of {len(self.prompts)} prompts has {', '.join(wrong)}")

    def rows(self, kept: Sequence[int]) -> Batch:
        """These rows alone, in this order."""
        lists: dict[str, Any] = {
            f.name: [getattr(self, f.name)[i] for i in kept] for f in fields(self) if f.name not in _NO_LISTS
        }
        columns = {name: [values[i] for i in kept] for name, values in self.columns.items()}
        return Batch(**lists, columns=columns, state=self.state)


Rewarder = Callable[[Batch], Sequence[float | None]]  # one value a sample; None: does not apply


@dataclass(frozen=True, slots=True)
class WeightedReward:
    """One reward of a mixture. Weight 0: logged, not counted; negative: a penalty."""

    name: str
    weight: float
    function: Rewarder
    mean: float = 0.0  # its values are normalised, (r − mean) / std, before they are weighted …
    std: float = 1.0  # … which gives a learned reward, whose scale is arbitrary, one to be weighed on
    learned: bool = False  # a reward model's, which may be wrong without bound
    neutral: bool = False  # where it was silent, the mean of what it gave others counts: see `Mixture`
    compares: bool = False  # it compares the replies to one prompt, and needs all of them together


@dataclass(frozen=True, slots=True)
class Answers:
    """What every reward said of B samples, not summed yet, and what of the samples a sum looks at."""

    by_name: Mapping[str, Sequence[float | None]]  # raw r_k, B values a term, before the weight
    prompts: Sequence[Prompt]
    prompt_ids: Sequence[Sequence[int]]
    sources: Sequence[str]
    logged: Logged  # by functions, of these samples

    @staticmethod
    def joined(parts: Sequence[Answers], numbers: Sequence[int]) -> Answers:
        """Several parts as one, in the order of their samples' numbers. What a part logged nothing of has no
        value there."""
        if len(parts) == 1:
            return parts[0]
        order = sorted(range(len(numbers)), key=lambda i: numbers[i])

        def column(values: Iterable[Sequence[Any]]) -> list[Any]:
            whole = [value for part in values for value in part]
            return [whole[i] for i in order]

        logged = Logged()
        for part in parts:
            for name, values in part.logged.metrics.items():
                logged.metrics.setdefault(name, []).extend(values)
        for name in dict.fromkeys(name for part in parts for name in part.logged.extra):
            columns = [part.logged.extra.get(name) or [None] * len(part.prompts) for part in parts]
            if all(len(values) == len(part.prompts) for values, part in zip(columns, parts, strict=True)):
                logged.extra[name] = column(columns)
        return Answers(
            {name: column(part.by_name[name] for part in parts) for name in parts[0].by_name},
            column(part.prompts for part in parts),
            column(part.prompt_ids for part in parts),
            column(part.sources for part in parts),
            logged,
        )


@dataclass(frozen=True, slots=True)
class Rated:
    """What a mixture made of a batch."""

    total: Tensor  # (B,) Σ_k w_k · (r_k − mean_k) / std_k over the terms that apply, float32 on the CPU
    raw: Tensor  # (B,) Σ_k w_k · r_k
    learned: Tensor  # (B,) the part of `total` that is of learned rewards
    by_name: dict[str, list[float | None]]  # raw r_k, B values a term, before the weight
    logged: Logged = field(default_factory=Logged)  # by functions, of these samples
    silent: tuple[bool, ...] = ()  # (B,) a judge with a weight said nothing of it; (): there is no such judge

    def rows(self, kept: Sequence[int]) -> Rated:
        """Of these samples alone, in this order, without what was logged."""
        index = torch.tensor(list(kept), dtype=torch.long)
        return Rated(
            self.total[index],
            self.raw[index],
            self.learned[index],
            {name: [values[i] for i in kept] for name, values in self.by_name.items()},
            silent=tuple(self.silent[i] for i in kept) if self.silent else (),
        )


class Mixture:
    """R(x, y) = Σ_k w_k · (r_k(x, y) − mean_k) / std_k over the terms k that apply (r_k is not None).

    As in TRL, weights are not renormalised: a term that does not apply adds nothing, and the others keep
    their weight. Of a term that is `neutral` (a judge that may be silent) a sample that it said nothing of
    has the mean of its prompt's others, or where these have none that of all others of its source in the
    batch, since no value would count as a 0 beside theirs; one that it was not asked about has none.

    Rewards are asked first and summed then: several processes that share a batch ask each about their own
    samples, and sum what all were told, so that a mean is one of the whole batch.
    UsageError for no terms, a name twice, a weight that is not finite.
    """

    def __init__(self, terms: Sequence[WeightedReward]) -> None:
        if not terms:
            raise UsageError("a mixture of rewards needs at least one")
        names = [term.name for term in terms]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UsageError(f"two rewards are called {twice[0]!r}; give each a name of its own")
        for term in terms:
            if not math.isfinite(term.weight):
                raise UsageError(f"reward {term.name!r}: weight {term.weight} is no finite number")
            if not term.std > 0:
                raise UsageError(f"reward {term.name!r}: its standard deviation {term.std} is not above 0")
        self.terms = tuple(terms)

    @property
    def learned_weight(self) -> float:
        """Σ |w_k| over the learned rewards."""
        return math.fsum(abs(term.weight) for term in self.terms if term.learned)

    @property
    def compares(self) -> bool:
        """Whether the replies to one prompt have to be asked about together."""
        return any(term.compares for term in self.terms)

    def score(self, batch: Batch) -> Rated:
        """The weighted sum and the raw values: `ask` and `sum`, and their errors."""
        return self.sum(self.ask(batch))

    def ask(self, batch: Batch) -> Answers:
        """What each term says of each sample. RewardError, with the reward and the sample, for one that
        fails."""
        sources = [str(source) for source in batch.columns.get("source") or [None] * len(batch.prompts)]
        by_name = {term.name: _values(term, batch) for term in self.terms}
        return Answers(by_name, batch.prompts, batch.prompt_ids, sources, batch.logged)

    def sum(self, answers: Answers) -> Rated:
        """The weighted sum of what was said. RewardError for a sample to which no term applies, and for a sum
        that is too large for a float32."""
        by_name = {name: list(values) for name, values in answers.by_name.items()}
        counted = {
            t.name: _filled(by_name[t.name], _silences(t, answers), answers) if t.neutral else by_name[t.name]
            for t in self.terms
        }
        total, raw, learned = torch.zeros(3, len(answers.prompts), dtype=torch.float64)
        for term in self.terms:
            values = counted[term.name]
            applies = torch.tensor([value is not None for value in values], dtype=torch.bool)
            r = torch.tensor([value or 0.0 for value in values], dtype=torch.float64)
            raw += term.weight * r
            part = torch.where(applies, term.weight * (r - term.mean) / term.std, 0.0)
            total += part
            learned += part if term.learned else 0.0
        for index in range(len(answers.prompts)):
            if all(values[index] is None for values in counted.values()):
                raise RewardError(
                    f"no reward applies to {functions.sample(answers.prompts, index)}: each of "
                    f"{', '.join(by_name)} returned None{_why_silent(self.terms, answers, index)}"
                )
        rewards = total.float()
        if not rewards.isfinite().all():
            index = int((~rewards.isfinite()).nonzero()[0])
            parts = ", ".join(f"{name} {values[index]}" for name, values in by_name.items())
            raise RewardError(
                f"the rewards of {functions.sample(answers.prompts, index)} do not add up: {parts}"
            )
        silent = _silent(self.terms, answers)
        return Rated(rewards, raw.float(), learned.float(), by_name, answers.logged, silent)


def _filled(
    values: Sequence[float | None], silences: Sequence[str | None], answers: Answers
) -> list[float | None]:
    """The values, in the place of None the mean of those of the same prompt and source, or where there are
    none of the same source; None where that has none either, and where nobody was silent: silences has no
    reason there."""
    sources = answers.sources
    prompts = [(tuple(ids), source) for ids, source in zip(answers.prompt_ids, sources, strict=True)]
    of_prompt, of_source = _means(prompts, values), _means(sources, values)
    return [
        value if value is not None or why is None else of_prompt.get(prompt, of_source.get(source))
        for prompt, source, value, why in zip(prompts, sources, values, silences, strict=True)
    ]


def _means(keys: Sequence[Any], values: Sequence[float | None]) -> dict[Any, float]:
    """Key → the mean of its values, where it has some."""
    known: dict[Any, list[float]] = {}
    for key, value in zip(keys, values, strict=True):
        if value is not None:
            known.setdefault(key, []).append(value)
    return {key: math.fsum(some) / len(some) for key, some in known.items()}


def _silences(term: WeightedReward, answers: Answers) -> Sequence[str | None]:
    """(B,) why a neutral term said nothing of a sample; None where it spoke, or does not apply."""
    return answers.logged.extra.get(f"{term.name}/{SILENCE}") or [None] * len(answers.prompts)


def _silent(terms: Sequence[WeightedReward], answers: Answers) -> tuple[bool, ...]:
    counted = [_silences(term, answers) for term in terms if term.neutral and term.weight]
    return tuple(any(why is not None for why in row) for row in zip(*counted, strict=True))


def _why_silent(terms: Sequence[WeightedReward], answers: Answers, index: int) -> str:
    found = [
        f"{term.name}: {why}" for term in terms if term.neutral and (why := _silences(term, answers)[index])
    ]
    return f" ({'; '.join(found)})" if found else ""


def from_function(name: str, function: Callable[..., Any] | IsolatedFunction) -> Rewarder:
    """A reward of TRL's signature (keel's rules, a classifier, a user's own) as a mixture's."""

    def rewarder(batch: Batch) -> list[float | None]:
        samples = batch.prompts, batch.completions, batch.completion_ids, batch.columns
        return functions.call(function, name, *samples, batch.state, batch.logged)

    return rewarder


def precomputed(values: Sequence[float | None] | Tensor) -> Rewarder:
    """Values that were computed already, such as a reward model's (B,) scores, as a mixture's reward for that
    batch."""
    kept = values.tolist() if isinstance(values, Tensor) else list(values)
    return lambda batch: kept


def _values(term: WeightedReward, batch: Batch) -> list[float | None]:
    try:
        values = term.function(batch)
    except KeelError:
        raise
    except Exception as error:
        raise RewardError(f"reward {term.name!r} raised {type(error).__name__}: {error}") from error
    return functions.checked(values, term.name, batch.prompts)
