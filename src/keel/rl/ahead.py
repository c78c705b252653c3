"""`rollout.ahead`: the responses of the next update are sampled before this one trains, by weights one
update old (one-step-off-policy sampling, 2410.18252).

The order is fixed, so that the same config gives the same bytes: an update is collected; the next one's
responses are begun; the update trains; what was begun is finished, before anything is evaluated or kept. An
engine that reads the trainer's own weights samples at once, and the loop gains nothing but the knowledge of
what old samples cost. One that holds weights of its own (`HoldsWeights`) samples in a thread while the
update trains. Either way responses are scored and rated when their turn comes, by the weights of then, and
`importance_cap` weighs each token by what has changed since it was drawn.

A checkpoint holds what is in flight, of all ranks. Where weights are put back, what they had been going to
learn from is dropped, and sampled again by the weights that are there.

Of a server that several ranks share (`SharedEngine`) the ranks gather their prompts before they train, and
take their responses behind it. In between they train together, and the first rank's thread alone speaks with
the server: what ranks say to each other has one order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from keel.config import OnPolicy
from keel.distributed import group
from keel.errors import EngineError
from keel.rl import rollout
from keel.rl.rollout import Drawn, PromptExample, Setup
from keel.rl.sampled import Dealt
from keel.rollout.protocol import HoldsWeights, TokenCount
from keel.rollout.vllm.engine import add_tokens
from keel.rollout.vllm.shared import SharedEngine
from keel.types import Completion


@dataclass
class Ahead:
    """What is sampled for an update to come."""

    setup: Setup[OnPolicy]
    prompts_of: Callable[[int], Sequence[PromptExample]]  # of an update
    update: int = 0  # that it is for; 0: there is nothing
    drawn: Drawn | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)  # as `Partial` has them; none
    working: _Work | None = None  # that will be `drawn`
    failed: EngineError | None = None  # why there is nothing

    def of(self, update: int) -> Drawn | None:
        """What was sampled for an update; None: nothing was. What failed in its place is raised here."""
        if self.failed is not None and update == self.update:
            raise self.failed
        if self.drawn is None or update != self.update:
            return None
        return replace(self.drawn, staleness=1)

    def begin(self, update: int) -> None:
        """Sample the responses to the prompts of an update by the weights as they are now."""
        setup, prompts = self.setup, self.prompts_of(update)
        rollout.take_weights(setup)
        self.update, self.drawn, self.failed = update, None, None
        seed = rollout.seed_of(setup, update)
        dealt = rollout.deal_out(setup, prompts)

        def draw() -> Drawn:
            return rollout.draw(setup, prompts, dealt, seed)

        if isinstance(setup.engine, SharedEngine):
            self.working = _shared_work(setup, setup.engine, dealt.repeated(prompts), dealt, seed)
        elif isinstance(setup.engine, HoldsWeights):
            self.working = _Work(draw)
        else:
            self.drawn = draw()

    def finish(self) -> None:
        """Wait for what was begun. An engine that failed is kept for the turn of its update: the one that
        trained meanwhile ends, and is kept, first. Any other fault is raised here."""
        if self.working is not None:
            working, self.working = self.working, None
            try:
                self.drawn = working.result()
            except EngineError as error:
                self.failed = error

    def drop(self) -> None:
        """Forget what was sampled, once the engine has come to its end."""
        if self.working is not None:
            self.working.join()
            group.all_here()  # the first rank may have waited for a server, for longer than others wait
        self.update, self.drawn, self.working, self.failed = 0, None, None, None

    # ------------------------------------------------------------ for a checkpoint

    def state(self, done: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """The responses of all ranks to the prompts of updates behind the last that was done, as tensors and
        as plain values; both empty where there are none. Every rank has to ask."""
        if self.drawn is None or self.update <= done:
            return {}, {}
        dealt = rollout.deal_out(self.setup, self.prompts_of(self.update))
        parts = group.gathered_late((dealt.rows, list(self.drawn.completions)))
        rows = dict(pair for numbers, found in parts for pair in zip(numbers, found, strict=True))
        found = [rows[number] for number in sorted(rows)]
        tensors = {
            "ids": torch.tensor([token for c in found for token in c.ids]),
            "logp": torch.tensor([value for c in found for value in c.logp], dtype=torch.float64),
            "lengths": torch.tensor([len(c.ids) for c in found]),
        }
        values = {
            "update": self.update,
            "stop_reasons": [c.stop_reason for c in found],
            "stops": [c.stop for c in found],
        }
        return {"ahead": tensors}, {"ahead": values}

    def restored(self, held: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """This rank's part of what `state` gave, of a checkpoint's tensors and values."""
        if "ahead" not in about:
            return
        tensors, values = held["ahead"], about["ahead"]
        prompts = self.prompts_of(values["update"])
        lengths = tensors["lengths"].tolist()
        ids, logp = (tensors[name].split(lengths) for name in ("ids", "logp"))
        dealt = rollout.deal_out(self.setup, prompts)
        asked = dealt.repeated(prompts)
        completions = [
            Completion(
                prompt.ids, tuple(ids[row].tolist()), values["stop_reasons"][row],
                tuple(logp[row].tolist()), values["stops"][row],
            )
            for prompt, row in zip(asked, dealt.rows, strict=True)
        ]  # fmt: skip
        self.update, self.drawn = values["update"], Drawn(asked, completions)


class _Work(threading.Thread):
    """Something that is done in a thread. It does not outlive the process.

    take: what is made of it behind the training, in the thread that trains: it is given what returns or
    raises what came of the work."""

    def __init__(
        self, work: Callable[[], Any], take: Callable[[Callable[[], Any]], Drawn] = lambda found: found()
    ) -> None:
        super().__init__(name="keel-ahead", daemon=True)
        self.work, self.take = work, take
        self.found: Any = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.found = self.work()
        except BaseException as error:
            self.error = error

    def result(self) -> Drawn:
        """What came of it, once it is done."""
        return self.take(self._came)

    def _came(self) -> Any:
        self.join()
        if self.error is not None:
            raise self.error
        return self.found


def _shared_work(
    setup: Setup[OnPolicy], engine: SharedEngine, prompts: Sequence[PromptExample], dealt: Dealt, seed: int
) -> _Work:
    """Responses to this rank's prompts by a server that all ranks share. Every rank calls, and takes the
    result. prompts: of each response."""
    request = rollout.request_of(setup, prompts, seed, rollout.rows_of(dealt)) if prompts else None
    pending = engine.ask(request)

    def answered() -> list[Completion]:
        with setup.run.timed("rollout"):
            return pending.answered()

    def take(came: Callable[[], list[Completion]]) -> Drawn:
        completions, count = pending.taken(came), TokenCount()
        if request is None:
            return Drawn((), ())
        add_tokens(count, completions)
        setup.run.count("rollout", count.useful, count.computed)
        return Drawn(prompts, rollout.checked(setup, request, completions))

    return _Work(answered, take)
