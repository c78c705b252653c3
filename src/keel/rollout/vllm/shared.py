"""One server that samples for several ranks.

The first rank has the server: it starts it, gives it the weights, checks them, and has it again when it is
gone. At each call the ranks' requests are gathered there, the server is asked for all of them at once, and
each rank gets its own completions back. A row draws by its number among all (`Rows`), so what the server is
asked does not depend on how many ranks there are.

A call takes all ranks. One without prompts takes part with `idle`.

A call has three parts: all ranks say what they ask, the first one asks the server, all take what came of it.
The middle one speaks with no other rank, so that it may be done in a thread while the ranks train together
(`ask`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast, get_args

import torch

from keel.data.stops import stop_texts
from keel.distributed import group, sharded
from keel.rollout.protocol import Answer, GenerationRequest, TokenCount
from keel.rollout.rounds import in_rounds
from keel.rollout.vllm import weights
from keel.rollout.vllm.engine import VllmEngine, add_tokens
from keel.types import Completion, StopReason

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REASONS: tuple[StopReason, ...] = get_args(StopReason)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a rank asks in one call."""

    # None: nothing; without `stop_texts`, which hold a tokenizer, and without `draws`, which no server takes
    request: GenerationRequest | None
    stops: tuple[str, ...] | None  # the strings of these
    goes_on: bool  # whether more calls follow, until nobody asks any more: the turns of conversations


class SharedEngine:
    """An `Engine` on every rank, of one server. Every rank calls the same methods in the same order, `idle`
    in the place of `generate` and `converse` where it has no prompts. What the first rank raises as a
    KeelError is raised on all.

    model: this rank's; it may be cut over them. engine: the first rank's; None on the others.
    """

    def __init__(
        self, model: PreTrainedModel, engine: VllmEngine | None, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.model, self.engine, self.tokenizer = model, engine, tokenizer
        self._taken: list[tuple[int, ...]] | None = None  # of weights that are cut: all ranks' parts

    def take_weights(self) -> None:
        """The first rank takes the model's weights as they are now. Weights that are cut are gathered there,
        in host memory, where they have changed."""
        now = None
        if sharded.is_cut(self.model):
            now = group.gathered(weights.print_of(self.model))
            if now == self._taken:
                return
            whole = cast("torch.nn.Module", sharded.whole(self.model))
            if group.is_first():
                whole.to("cpu")  # buffers, which lie where this rank computes
        group.from_first_or_error(lambda: self._first.take_weights())
        self._taken = now

    def generate(self, request: GenerationRequest, count: TokenCount | None = None) -> list[Completion]:
        """One completion for each of this rank's prompts, as of `VllmEngine`."""
        completions, _ = self._call(request, goes_on=False)
        if count is not None:
            add_tokens(count, completions)
        return completions

    def converse(self, request: GenerationRequest, answer: Answer, count: TokenCount | None = None) -> None:
        """As of `TakesTurns`. Each turn takes all ranks, until no row of any goes on."""
        in_rounds(_Turns(self), request, answer, count, name="vllm")
        self.idle()

    def idle(self) -> None:
        """This rank's part where others sample and it does not."""
        while self._call(None, goes_on=True)[1]:
            pass

    def ask(self, request: GenerationRequest | None) -> Pending:
        """One call whose completions are taken later. Every rank calls; None: this one has no prompts."""
        return self._begin(request, goes_on=False)

    # ------------------------------------------------------------ one call

    def _call(self, request: GenerationRequest | None, *, goes_on: bool) -> tuple[list[Completion], bool]:
        """This rank's completions, and whether another call follows."""
        pending = self._begin(request, goes_on=goes_on)
        return pending.taken(pending.answered), pending.goes_on

    def _begin(self, request: GenerationRequest | None, *, goes_on: bool) -> Pending:
        stops = request.stop_texts.texts if request is not None and request.stop_texts is not None else None
        bare = None if request is None else dataclasses.replace(request, stop_texts=None, draws=None)
        return Pending(self, request, group.gathered(Asked(bare, stops, goes_on)))

    def answered(self, asked: Sequence[Asked]) -> list[Completion]:
        """The completions of all ranks, one rank's after the other's."""
        requests: list[GenerationRequest] = []
        for one in asked:
            if one.request is not None:
                texts = None if one.stops is None else stop_texts(self.tokenizer, one.stops)
                requests.append(dataclasses.replace(one.request, stop_texts=texts))
        return [completion for found in self._first.generate_all(requests) for completion in found]

    @property
    def _first(self) -> VllmEngine:
        assert self.engine is not None, "only the first rank has the server"
        return self.engine


@dataclass(frozen=True, slots=True)
class Pending:
    """A call that all ranks have begun."""

    engine: SharedEngine
    request: GenerationRequest | None  # this rank's
    asked: Sequence[Asked]  # by all ranks

    @property
    def asking(self) -> list[Asked]:
        """Those that ask for anything."""
        return [one for one in self.asked if one.request is not None]

    @property
    def goes_on(self) -> bool:
        """Whether another call follows."""
        return bool(self.asking) and self.asking[0].goes_on

    def answered(self) -> list[Completion]:
        """The first rank asks the server, and has the completions of all; none on the others. It speaks with
        no other rank and reads nothing of the model: it may be done in a thread while the ranks train."""
        return self.engine.answered(self.asked) if self.asking and self.engine.engine is not None else []

    def taken(self, answered: Callable[[], list[Completion]]) -> list[Completion]:
        """This rank's completions. Every rank has to call. answered: gives those of all, on the first rank;
        a KeelError of it is raised on all."""
        if not self.asking:
            return []
        packed = group.from_first_or_error(lambda: _packed(answered()))
        if self.request is None:
            return []
        earlier = self.asked[: group.rank()]
        before = sum(len(one.request.prompts) for one in earlier if one.request is not None)
        return _unpacked(packed, self.request.prompts, before)


class _Turns:
    """The engine in a conversation: after each call there is another one."""

    def __init__(self, shared: SharedEngine) -> None:
        self.shared = shared

    def generate(self, request: GenerationRequest, count: TokenCount | None = None) -> list[Completion]:
        completions, _ = self.shared._call(request, goes_on=True)
        if count is not None:
            add_tokens(count, completions)
        return completions


def idle(engine: object) -> None:
    """What a rank without prompts does where others sample: its part, if the engine is one that all share."""
    if isinstance(engine, SharedEngine):
        engine.idle()


# ---------------------------------------------------------------- completions on their way

Packed = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, dict[int, str]]


def _packed(completions: Sequence[Completion]) -> Packed:
    """(T,) ids and (T,) log-probabilities of all rows, (N,) lengths and (N,) stop reasons, and the stop
    strings: tensors are sent without a copy in the store that all ranks reach."""
    return (
        torch.tensor([token for one in completions for token in one.ids], dtype=torch.long),
        torch.tensor([value for one in completions for value in one.logp], dtype=torch.float64),
        torch.tensor([len(one.ids) for one in completions], dtype=torch.long),
        torch.tensor([REASONS.index(one.stop_reason) for one in completions], dtype=torch.long),
        {number: one.stop for number, one in enumerate(completions) if one.stop},
    )


def _unpacked(packed: Packed, prompts: Sequence[Sequence[int]], start: int) -> list[Completion]:
    """The completions of some prompts, whose rows begin at `start`."""
    ids, logps, lengths, reasons, stops = packed
    sizes = lengths.tolist()
    begin, found = sum(sizes[:start]), list[Completion]()
    for row, prompt in enumerate(prompts, start):
        own = slice(begin, begin + sizes[row])
        begin = own.stop
        found.append(
            Completion(
                tuple(prompt), tuple(ids[own].tolist()), REASONS[int(reasons[row])],
                tuple(logps[own].tolist()), stops.get(row, ""),
            )
        )  # fmt: skip
    return found
