"""A curriculum by success rate: prompts are sampled that are passed sometimes.

A group of replies that all pass, or of which none does, has no advantage. The reward of replies that pass
with probability p has the variance p (1 − p), which says how much there is to learn from (2502.12272):
prompts are drawn in this ratio. p is estimated from the replies that training samples anyway: for each
prompt, or for all rows with one value in a column.

Different from the paper, knowingly: nothing is sampled to estimate p, old replies fade, and a share of the
prompts comes in turn, so that no estimate stands for ever. Every rank has all replies of an update, so all of
them draw the same prompts. A draw is a function of (seed, update) and the rates, which are in checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from keel.config.tasks import CurriculumConfig
from keel.data.batches import derive_seed, permutation, rows_of_step
from keel.errors import DataError

PROMPT = "prompt"  # what `by` says where each prompt has a rate of its own
PRIOR = 0.5  # passes, and failures, that every estimate begins with (Jeffreys): unknown counts as ½
SOLVED, HOPELESS = 0.95, 0.05  # estimates from which on, and up to which, there is little to learn
MOST_NAMED = 32  # values of a column whose rates are logged each by itself
_LEAST = 1e-9  # weight of a prompt that nothing can be learned from, so that enough of them can be drawn


class Curriculum:
    """The pass rates of a stage's prompts, and which of these are drawn by them."""

    def __init__(self, config: CurriculumConfig, columns: Sequence[Mapping[str, Any]], seed: int) -> None:
        """columns: of each prompt the other columns of its row. DataError where one has no value in the
        column that rates are kept by."""
        self.config, self.seed = config, seed
        self.names: list[str] = []
        if config.by == PROMPT:
            self.unit = torch.arange(len(columns))
        else:
            values = [_value(config.by, row) for row in columns]
            self.names = sorted(set(values))
            number = {name: index for index, name in enumerate(self.names)}
            self.unit = torch.tensor([number[value] for value in values])
        units = int(self.unit.max()) + 1
        self.passed = torch.zeros(units, dtype=torch.float64)  # (U,) replies that passed, the old ones faded
        self.seen = torch.zeros(units, dtype=torch.float64)  # (U,) replies, likewise

    @property
    def rates(self) -> Tensor:
        """(U,) estimated probabilities that a reply passes."""
        return (self.passed + PRIOR) / (self.seen + 2 * PRIOR)

    def draw(self, update: int, count: int) -> list[int]:
        """The prompts of an update (from 1): some in turn, the others without repetition by p (1 − p)."""
        rows = len(self.unit)
        if count >= rows:  # all of them are needed
            return rows_of_step(rows, count, update - 1, self.seed)
        turn = self._in_turn(update, count)
        rates = self.rates
        weights = (rates * (1 - rates)).clamp(min=_LEAST)[self.unit]
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "curriculum", update))
        # the largest log(u) / w are a draw without repetition in the ratio of w (Efraimidis, Spirakis 2006)
        keys = torch.rand(rows, generator=generator, dtype=torch.float64).log() / weights
        keys[turn] = -torch.inf
        return [*turn, *keys.topk(count - len(turn)).indices.tolist()]

    def _in_turn(self, update: int, count: int) -> list[int]:
        """The update's part of the prompts that come in turn: over all updates the share that is set."""
        start, end = (int(n * self.config.explore * count + 1e-9) for n in (update - 1, update))
        rows, seed = len(self.unit), derive_seed(self.seed, "curriculum", "turn")
        drawn = (permutation(rows, seed, place // rows)[place % rows] for place in range(start, end))
        return list(dict.fromkeys(drawn))

    def see(self, rows: Sequence[int], samples: int, values: Sequence[float | None]) -> dict[str, float]:
        """Take in the rewards of an update, `samples` replies to each of `rows` in order; None: the reward
        says nothing of this one. Returns the update's metrics."""
        units = self.unit[list(rows)].repeat_interleave(samples)
        known = torch.tensor([value is not None for value in values], dtype=torch.float64)
        passes = torch.tensor(
            [float((v or 0.0) >= self.config.threshold) for v in values], dtype=torch.float64
        )
        passes *= known
        new_seen = torch.zeros_like(self.seen).index_add_(0, units, known)
        new_passed = torch.zeros_like(self.passed).index_add_(0, units, passes)
        kept = (1 - new_seen / self.config.memory).clamp(min=0)
        self.passed = self.passed * kept + new_passed
        self.seen = self.seen * kept + new_seen
        return self._metrics(float(passes.sum() / known.sum()) if known.sum() else 0.0)

    def _metrics(self, of_update: float) -> dict[str, float]:
        rates, seen = self.rates[self.unit], (self.seen > 0)[self.unit]
        solved, hopeless = seen & (rates >= SOLVED), seen & (rates <= HOPELESS)
        metrics = {
            "curriculum/pass_rate": of_update,
            "curriculum/expected_pass_rate": float(rates.mean()),
            "curriculum/seen": float(seen.double().mean()),
            "curriculum/solved": float(solved.double().mean()),
            "curriculum/hopeless": float(hopeless.double().mean()),
        }
        named = self.names if len(self.names) <= MOST_NAMED else []
        return metrics | {f"curriculum/rate/{name}": float(rate) for name, rate in zip(named, self.rates)}

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {"passed": self.passed, "seen": self.seen}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """What `state` gave."""
        self.passed, self.seen = state["passed"].clone(), state["seen"].clone()


def _value(column: str, row: Mapping[str, Any]) -> str:
    value = row.get(column)
    if value is None:
        raise DataError(f"`curriculum.by`: a row has no value in the column {column!r}")
    return str(value)
