"""What a stage asks of an engine, and what an engine is. Token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from keel.data import chat
from keel.data.batches import derive_seed
from keel.data.stops import StopTexts, stop_texts
from keel.errors import UsageError
from keel.models.tokenizer import known_ids
from keel.types import Completion, Sampling


@dataclass(frozen=True, slots=True)
class Rows:
    """Which prompts of a larger request these are, where several processes share one: each row draws what it
    would draw there."""

    numbers: Sequence[int]  # of each prompt
    of: int  # prompts of the whole


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """Prompts to continue, and how. The same request gives the same tokens."""

    prompts: Sequence[Sequence[int]]  # token ids; equal prompts are sampled apart
    sampling: Sampling
    stop_ids: Sequence[int]  # tokens that end a response and are part of it; the EOS id first
    pad_id: int
    seed: int
    stop_texts: StopTexts | None = None  # strings that end a response, however a tokenizer cuts them
    keep_head_inputs: bool = False  # keep what the head was given, so that nobody has to compute it again
    # (N,) the most tokens of each response, max_new_tokens or less; None: max_new_tokens for all. An engine
    # that does not look at it returns what is cut afterwards
    limits: Sequence[int] | None = None
    rows: Rows | None = None  # None: all rows of the seed
    # (N, max_new_tokens) numbers in [0, 1) that the tokens are drawn with, in place of those of the seed; for
    # keel's own engines. Of a conversation the first turn
    draws: Tensor | None = None

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seed: int,
        *,
        keep_head_inputs: bool = False,
        limits: Sequence[int] | None = None,
        rows: Rows | None = None,
    ) -> GenerationRequest:
        """With the stop ids, the stop strings, the pad id and the vocabulary that a tokenizer and
        `sampling.stop` say."""
        return cls(
            prompts,
            replace(sampling, vocab=known_ids(tokenizer)),
            chat.stop_ids(tokenizer, sampling.stop),
            chat.ensure_pad(tokenizer),
            seed,
            stop_texts(tokenizer, sampling.stop),
            keep_head_inputs,
            limits,
            rows,
        )


@dataclass
class TokenCount:
    """Tokens that a model was given while sampling. Counts add up over calls."""

    useful: int = 0  # each different prompt's once, and each response's but the last
    computed: int = 0  # with padding, and what was read again
    passes: int = 0  # over the model: prompts read together, and steps of all rows
    pairs: int = 0  # of a token of a response, and one that it attends to


@runtime_checkable
class Engine(Protocol):
    """Anything that continues prompts with a model that it was opened with.

    An engine reads the model's weights as they are at each call: a stage changes them between calls.
    """

    def generate(self, request: GenerationRequest, count: TokenCount | None = None) -> list[Completion]:
        """One completion a prompt, in order.

        `Completion.logp` holds the log-probability that each token was drawn with, or is empty where the
        engine does not know. `Completion.hidden` may hold what the head was given, if the request wants it;
        without it the trainer computes log π_old itself. count: what the engine knows of its work is added.
        UsageError where a prompt and its response do not fit the model's context.
        """
        ...


@dataclass(frozen=True, slots=True)
class NextTurn:
    """How a row goes on after a response."""

    prompt: Sequence[int]  # all tokens so far: the prompt before, the response, and what was put behind it
    limit: int  # the most tokens of the next response; with the prompt no more than the row began with


# (which row of a request, its response) → how it goes on; None: it is over
Answer = Callable[[int, Completion], NextTurn | None]


def turn_seed(seed: int, turn: int) -> int:
    """The seed of what rows draw in their turn number `turn`, from 0. A row draws its own numbers in each,
    whatever else is sampled with it and when."""
    return derive_seed(seed, "turn", turn) if turn else seed


@runtime_checkable
class TakesTurns(Engine, Protocol):
    """An engine that goes on with a row where it stopped."""

    def converse(self, request: GenerationRequest, answer: Answer, count: TokenCount | None = None) -> None:
        """Responses to the prompts, each given to `answer` as soon as it has ended, and the responses to what
        it says; until it has said None of every row. As `rollout.rounds.in_rounds` says it, up to the order
        of different rows and rounding. `answer` computes as its caller does, whatever precision and gradient
        mode the model samples in.

        Raises what `answer` raises."""
        ...


@runtime_checkable
class HoldsWeights(Engine, Protocol):
    """An engine that samples with weights of its own, in another process or on other cards. With
    `rollout.ahead` it samples while the trainer trains."""

    def take_weights(self) -> None:
        """Take the model's weights as they are now. Until the next call `generate` samples with these, and
        reads nothing of the model: it may be called in another thread, while the model is trained."""
        ...


def check_completions(name: str, request: GenerationRequest, completions: Sequence[Completion]) -> None:
    """UsageError where an engine called `name` did not return what was asked of it."""
    if len(completions) != len(request.prompts):
        raise UsageError(
            f"engine {name!r} returned {len(completions)} completions for {len(request.prompts)} prompts"
        )
    for number, (prompt, completion) in enumerate(zip(request.prompts, completions, strict=True)):
        where = f"engine {name!r}, prompt {number}"
        if tuple(prompt) != tuple(completion.prompt_ids):
            raise UsageError(f"{where}: the completion is one of another prompt; keep their order")
        length = len(completion.ids)
        if not 0 < length <= request.sampling.max_new_tokens:
            raise UsageError(
                f"{where}: a response of {length} tokens;"
                f" there must be 1 to {request.sampling.max_new_tokens}"
            )
        if completion.logp and len(completion.logp) != length:
            raise UsageError(f"{where}: {len(completion.logp)} log-probabilities for {length} tokens")
