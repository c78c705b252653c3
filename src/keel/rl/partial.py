"""`rollout.partial`: a response is given so many tokens in an update; one that has not ended by then is
carried over and continued by the weights of the next update (partial rollouts, 2501.12599, 3.4).

Without it an update waits for its longest response, which at the end runs almost alone. With it the responses
of several updates are on their way together. In each round those of one more update are begun, and every
response that has not ended is given up to N tokens; an update learns once all of its own have ended. What is
otherwise than where an update learns from whatever has ended:

- **Short replies gain nothing.** Each update learns from the responses to its own prompts, all of them, in
  the order of the prompts, as it would without. Groups are whole. At the start there are as many rounds as
  the first update takes, all by the same weights; at the end nothing more is begun, and nothing is left over.
- **Every token keeps the log-probability that it was drawn with**, by the weights of its round, so that
  `importance_cap` weighs each token by what has changed since. None is older than the rounds that the longest
  response takes.

Each row draws its own random numbers by position: with weights that stand still the tokens are those of whole
responses, to rounding. What was begun is read again by the new weights, whose keys and values are others. A
checkpoint holds what is on its way. Where weights are put back it is dropped, and sampled again.

Several ranks share the rows of a round, the samples of a prompt to one of them, and tell each other what they
have sampled: each knows all that is on its way. An engine that draws its own numbers is told each row's
number among all of the round (`Rows`), so that it draws what it would draw for one process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from keel.config import OnPolicy
from keel.data.stops import StopTexts, stop_texts
from keel.distributed import group
from keel.rl import rollout
from keel.rl.rollout import Drawn, PromptExample, Setup
from keel.rl.sampled import deal
from keel.rollout.protocol import GenerationRequest, Rows, TokenCount
from keel.rollout.sampling import uniform_draws
from keel.rollout.vllm.shared import idle
from keel.types import Completion, Sampling, StopReason


@dataclass
class Row:
    """A response on its way."""

    prompt: PromptExample
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)  # that each token was drawn with
    rounds: list[tuple[int, int]] = field(default_factory=list)  # updates learned from before, and tokens
    stop_reason: StopReason | None = None  # None: it has not ended
    stop: str = ""

    def staleness(self, learned: int) -> int:
        """Updates that the weights have learned from since, summed over the tokens."""
        return sum((learned - then) * tokens for then, tokens in self.rounds)


Going = tuple[int, int, Row]  # a row that has not ended: its update, its place there


class Partial:
    """The responses that are on their way, by the update that learns from them. Stands in the place of
    `Ahead`."""

    def __init__(self, setup: Setup[OnPolicy], prompts_of: Callable[[int], Sequence[PromptExample]]) -> None:
        """prompts_of: an update."""
        self.setup, self.prompts_of = setup, prompts_of
        self.most = setup.config.sampling.max_new_tokens
        self.rows: dict[int, list[Row]] = {}
        self.metrics: dict[str, float] = {}  # of the update that was asked for last

    def of(self, update: int) -> Drawn:
        """This rank's responses to the prompts of an update, all ended, after as many rounds as that
        takes."""
        # those of this one stay until the next asks: where a reward fails, they are not sampled again
        self.rows = {number: rows for number, rows in self.rows.items() if number >= update}
        while update not in self.rows or any(row.stop_reason is None for row in self.rows[update]):
            self._round(update)
        rows, learned = self.rows[update], update - 1
        tokens = sum(len(row.ids) for row in rows)
        on_the_way = [row for others in self.rows.values() for row in others if row.stop_reason is None]
        self.metrics = {
            "rollout/carried": sum(len({then for then, _ in row.rounds}) > 1 for row in rows) / len(rows),
            "rollout/in_flight": float(len(on_the_way)),
        }
        stale = sum(row.staleness(learned) for row in rows) / tokens
        samples = self.setup.config.samples_per_prompt
        dealt = rollout.deal_out(self.setup, [row.prompt for row in rows[::samples]])
        own = [rows[number] for number in dealt.rows]
        return Drawn([row.prompt for row in own], [_completion(row) for row in own], stale)

    def begin(self, update: int) -> None:
        """Nothing: `of` begins what is due."""

    def finish(self) -> None:
        """Nothing is sampled beside the training."""

    def drop(self) -> None:
        """Forget what is on its way."""
        self.rows = {}

    # ------------------------------------------------------------ a round

    def _round(self, update: int) -> None:
        """Begin the responses of one more update, and give all that have not ended some tokens. update: the
        one that waits."""
        setup, config = self.setup, self.setup.config
        begun, fresh = dict(self.rows), max(self.rows, default=update - 1) + 1
        if fresh <= config.updates:
            samples = config.samples_per_prompt
            begun[fresh] = [Row(prompt) for prompt in self.prompts_of(fresh) for _ in range(samples)]
        going = [
            (number, place, row)
            for number, rows in begun.items()
            for place, row in enumerate(rows)
            if row.stop_reason is None
        ]
        rounds = sum(len(row.rounds) for rows in self.rows.values() for row in rows)
        completions = self._sampled(going, rollout.seed_of(setup, update, "partial", rounds))
        self.rows = begun  # not before: an engine that fails is asked for the same ones again
        stops = stop_texts(setup.tokenizer, config.sampling.plain().stop)
        for (*_, row), completion in zip(going, completions, strict=True):
            _go_on(row, completion, update - 1, self.most, stops)

    def _sampled(self, going: Sequence[Going], seed: int) -> list[Completion]:
        """More tokens of all rows. Each rank samples those of its own share."""
        setup, count = self.setup, TokenCount()
        samples = setup.config.samples_per_prompt
        # a prompt that several updates have is in each of them one of its own
        dealt = deal([(number, place // samples) for number, place, _ in going], 1)
        own = [going[number] for number in dealt.rows]
        completions: list[Completion] = []
        with setup.run.timed("rollout"):
            rollout.take_weights(setup)
            with rollout.sampling(setup):
                if own:
                    request = self._request(own, seed, rollout.rows_of(dealt))
                    completions = rollout.completed(setup, request, count)
                else:
                    idle(setup.engine)
        if count.computed:  # an engine need not count
            # what was begun is read once more, which nobody needs: once where several rows begin alike
            again = sum(map(len, {c.prompt_ids for (*_, row), c in zip(own, completions) if row.ids}))
            useful = count.useful - again
            setup.run.count("rollout", useful, count.computed, passes=count.passes, pairs=count.pairs)
        told = group.gathered_late((dealt.rows, [replace(c, prompt_ids=()) for c in completions]))
        by_number = {n: c for numbers, found in told for n, c in zip(numbers, found, strict=True)}
        return [by_number[number] for number in range(len(going))]

    def _request(self, going: Sequence[Going], seed: int, rows: Rows | None) -> GenerationRequest:
        """Up to N more tokens of rows, each drawn with the numbers of its position. seed, rows: for an engine
        that draws its own."""
        config = self.setup.config
        step = config.rollout.partial
        assert step is not None
        sampling: Sampling = replace(config.sampling.plain(), max_new_tokens=step)
        prompts = [row.prompt.ids + tuple(row.ids) for *_, row in going]
        limits = [min(step, self.most - len(row.ids)) for *_, row in going]
        request = GenerationRequest.of(
            self.setup.tokenizer, prompts, sampling, seed, limits=limits, rows=rows
        )
        return replace(request, draws=self._draws(going, step))

    def _draws(self, going: Sequence[Going], step: int) -> Tensor:
        """(N, step) of each row from its next position on, as a whole response would be given them."""
        whole: dict[int, Tensor] = {}
        found = torch.zeros(len(going), step, dtype=torch.float64)
        for i, (update, place, row) in enumerate(going):
            if update not in whole:
                sampling = self.setup.config.sampling.plain()
                seed = rollout.seed_of(self.setup, update)
                whole[update] = uniform_draws(self.setup.config.batch_size, sampling, seed)
            own = whole[update][place, len(row.ids) : len(row.ids) + step]
            found[i, : len(own)] = own
        return found

    # ------------------------------------------------------------ for a checkpoint

    def state(self, done: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """What is on its way to updates behind the last that was done, as tensors and as plain values; both
        empty where there is nothing."""
        held = {update: rows for update, rows in self.rows.items() if update > done}
        rows = [row for rows in held.values() for row in rows]
        if not rows:
            return {}, {}
        tensors = {
            "ids": torch.tensor([token for row in rows for token in row.ids], dtype=torch.long),
            "logp": torch.tensor([value for row in rows for value in row.logp], dtype=torch.float64),
            "lengths": torch.tensor([len(row.ids) for row in rows]),
        }
        values = {
            "updates": list(held),
            "rounds": [row.rounds for row in rows],
            "stop_reasons": [row.stop_reason for row in rows],
            "stops": [row.stop for row in rows],
        }
        return {"partial": tensors}, {"partial": values}

    def restored(self, tensors: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> None:
        """What `state` gave, of a checkpoint's tensors and values."""
        if "partial" not in values:
            return
        held, about = tensors["partial"], values["partial"]
        lengths = held["lengths"].tolist()
        ids, logp = (held[name].split(lengths) for name in ("ids", "logp"))
        number = 0
        for update in about["updates"]:
            self.rows[update] = rows = []
            for prompt in self.prompts_of(update):
                for _ in range(self.setup.config.samples_per_prompt):
                    rounds = [(then, tokens) for then, tokens in about["rounds"][number]]
                    reason, stop = about["stop_reasons"][number], about["stops"][number]
                    own = ids[number].tolist(), logp[number].tolist()
                    rows.append(Row(prompt, *own, rounds, reason, stop))
                    number += 1


def _completion(row: Row) -> Completion:
    assert row.stop_reason is not None
    return Completion(row.prompt.ids, tuple(row.ids), row.stop_reason, tuple(row.logp), row.stop)


def _go_on(row: Row, completion: Completion, learned: int, most: int, stops: StopTexts | None) -> None:
    """Put what was sampled behind what there is. learned: updates that the weights had learned from. most:
    tokens of a response."""
    count, stop, ended = len(completion.ids), completion.stop, completion.ended
    if (room := most - len(row.ids)) < count:  # of an engine that looks at no limits
        count, stop, ended = room, "", False
    if stops is not None and row.ids:
        if (cut := _straddling(stops, row.ids, completion.ids[:count])) is not None:
            (count, stop), ended = cut, True
        elif stop and stop not in stops.text([*row.ids, *completion.ids]):
            stop, ended = "", False  # it stood in the text of the new tokens alone, not in that of all
    row.ids += completion.ids[:count]
    row.logp += completion.logp[:count]
    row.rounds.append((learned, count))
    if ended:
        row.stop_reason, row.stop = ("stop" if stop else completion.stop_reason), stop
    elif len(row.ids) >= most:
        row.stop_reason = "length"


def _straddling(stops: StopTexts, before: Sequence[int], ids: Sequence[int]) -> tuple[int, str] | None:
    """How many of the new tokens end a stop string that had begun before them, and the string; None where
    there is none."""
    longest, closing = max(map(len, stops.texts)), stops.may_end(torch.tensor(list(ids))).tolist()
    for length in range(1, len(ids) + 1):
        if closing[length - 1] and (stop := stops.closed_by([*before, *ids[:length]])):
            return length, stop
        if len(stops.text(ids[:length])) > longest:
            return None
    return None
