"""The engine: a server that holds the trainer's weights (`holding`), asked for responses until all of them
are there.

A response is taken only if the server says that all of its tokens were drawn by the version that it was given
last. A server that is gone is started again (or waited for, where only its address is known), given the
weights anew, and asked for those rows that it did not answer: each by its own seed, and each once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keel.errors import EngineError
from keel.rollout.protocol import GenerationRequest, TokenCount
from keel.rollout.sampling import check_context
from keel.rollout.vllm import asking
from keel.rollout.vllm.asking import GarbageError, StaleError, Weights
from keel.rollout.vllm.holding import Holder, ServerSettings
from keel.rollout.vllm.wire import DownError, RefusedError
from keel.types import Completion

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROUNDS = 4  # in a row that bring no response, after which a server is given up
Row = tuple[GenerationRequest, int]  # a prompt of a request, by its place there


def add_tokens(count: TokenCount, completions: Sequence[Completion]) -> None:
    """Count what was sampled. What more the server computes it counts for itself."""
    tokens = sum(map(len, {tuple(one.prompt_ids) for one in completions}))
    tokens += sum(len(one.ids) - 1 for one in completions)
    count.useful, count.computed = count.useful + tokens, count.computed + tokens


class VllmEngine:
    """An `Engine`: samples from a vLLM server that is given the model's weights whenever they have changed.

    model: on any device; its forward is asked when weights are taken. folder: through which weights go, seen
    by the server too, and where a started server's log is. length: tokens of the longest prompt and its
    response, for which a started server makes room; None: the model's context. say: told what a user should
    know. `asked_again`: how often a row was asked for once more.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: ServerSettings,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        length: int | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.model, self.concurrency, self.asked_again = model, settings.concurrency, 0
        self.server = Holder(model, settings, folder, tokenizer, length, say)
        self._waits = False  # for `take_weights`, rather than look at the model at each call

    def take_weights(self) -> None:
        """Take the model's weights as they are now. From here on `generate` samples with what was taken last,
        and reads nothing of the model, which may be trained meanwhile."""
        self._waits = True
        self.server.take()

    # ------------------------------------------------------------ sampling

    def generate(self, request: GenerationRequest, count: TokenCount | None = None) -> list[Completion]:
        """One completion a prompt, in order, drawn by the model's weights as they are now.

        EngineError where the server cannot be had, does not take the weights, or does not answer; UsageError
        for what it would do otherwise than asked."""
        completions = self.generate_all([request])[0]
        if count is not None:
            add_tokens(count, completions)
        return completions

    def generate_all(self, requests: Sequence[GenerationRequest]) -> list[list[Completion]]:
        """The completions of each of some requests, as of `generate`. The server is asked for all of them at
        once, so that it does not matter how rows are dealt out to requests."""
        rows = [(request, row) for request in requests for row in range(len(request.prompts))]
        for request in requests:
            if request.prompts:
                check_context(self.model, request.prompts, request.sampling, request.limits)
                asking.check(request.sampling, self.server.vocab)
        found = iter(self._completions(rows) if rows else ())
        return [[next(found) for _ in request.prompts] for request in requests]

    def _completions(self, rows: Sequence[Row]) -> list[Completion]:
        """One completion a row, in order."""
        if not self._waits:
            self.server.take()
        done: dict[int, Completion] = {}
        unstopped: set[int] = set()  # rows whose stop strings the server does not look for
        idle, reason = 0, ""
        while len(done) < len(rows):
            missing = [number for number in range(len(rows)) if number not in done]
            before = len(done) + len(unstopped)
            try:
                held = self.server.hold()
                reason = self._ask(rows, missing, held, done, unstopped)
            except (DownError, StaleError, GarbageError) as error:
                self.server.drop()
                reason = str(error)
            if len(done) == len(rows):
                break
            self.asked_again += len(rows) - len(done)
            idle = idle + 1 if len(done) + len(unstopped) == before else 0
            if idle == ROUNDS:
                raise EngineError(f"{self.server.where()} gives no responses: {reason}")
            if reason:
                self.server.lost(reason)
        self.server.rest()
        return [done[number] for number in range(len(rows))]

    def _ask(
        self,
        rows: Sequence[Row],
        missing: Sequence[int],
        held: Weights,
        done: dict[int, Completion],
        unstopped: set[int],
    ) -> str:
        """Ask for missing rows and put what comes into `done`; why some are missing still, "" where none had
        to be.

        UsageError for a request that the server refuses, which no other try would change."""
        wire = self.server.wire
        assert wire is not None
        faults: list[str] = []
        bodies = [
            asking.body(*rows[number], held, self.server.vocab, stops=number not in unstopped)
            for number in missing
        ]

        def took(place: int, answer: Any) -> None:
            number = missing[place]
            if isinstance(answer, RefusedError):
                if (
                    answer.status != 404 or not self.server.adapters
                ):  # else an adapter that it no longer knows
                    raise answer
                self.server.drop()
                faults.append(str(answer))
                return
            try:
                found = asking.completion(*rows[number], answer, held, stops=number not in unstopped)
            except (GarbageError, StaleError) as error:
                if isinstance(error, StaleError):
                    self.server.drop()
                faults.append(str(error))
                return
            if found is None:
                unstopped.add(number)
            else:
                done[number] = found

        try:
            down = wire.many(asking.ROUTE, bodies, self.concurrency, took)
        except RefusedError as refused:
            raise EngineError(
                f"{self.server.where()} refuses to sample: {refused}{self.server.hint(refused)}"
            ) from None
        if down is not None:
            self.server.drop()
            return str(down)
        return faults[0] if faults else ""

    def facts(self) -> dict[str, Any]:
        """What a report says of the server."""
        server = self.server
        return {
            "engine": f"vllm {server.version}", "pushes": server.pushes, "restarts": server.restarts,
            "asked_again": self.asked_again,
        }  # fmt: skip

    def close(self) -> None:
        """End a server that was started here, and clear what was pushed to one that was not."""
        self.server.close()
