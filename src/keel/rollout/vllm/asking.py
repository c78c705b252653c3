"""What a request to vLLM's route of tokens says, and a completion from what it answers.

`/inference/v1/generate` takes a prompt as token ids and gives the sampled ids back, each with its
log-probability and with the version of the weights that it was drawn by: nothing is decoded and tokenised
again.

Departures from keel's own engine: `min_p` is cut before `top_k` and `top_p`, not after; a row's numbers are
the server's own, from a seed of the row's, so what else is in the batch can change them by rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from keel.data.batches import derive_seed
from keel.data.stops import StopTexts
from keel.errors import UsageError
from keel.rollout.protocol import GenerationRequest
from keel.types import Completion, Sampling, StopReason

ROUTE = "/inference/v1/generate"
COLDEST = 0.01  # what vLLM makes of a lower temperature above 0
NEVER = -100.0  # added to the logit of an id that is never drawn: e^−100 is left of it
MOST_NEVER = 1024  # ids for which vLLM takes that
SEEDS = 2**62


class GarbageError(Exception):
    """An answer is not what was asked for."""


class StaleError(Exception):
    """Tokens were drawn by other weights than the trainer's."""


@dataclass(frozen=True, slots=True)
class Weights:
    """What tokens must have been drawn by."""

    model: str  # its name at the server: the adapter's, or the base's
    version: str | None  # that every token must bear; None: the model's name says it


def check(sampling: Sampling, vocab: int) -> None:
    """UsageError for what vLLM would do in another way. vocab: rows of the model's embeddings."""
    if 0 < sampling.temperature < COLDEST:
        raise UsageError(
            f"vllm samples no colder than temperature {COLDEST}: `sampling.temperature` "
            f"{sampling.temperature} would be raised; use 0 (greedy) or {COLDEST}"
        )
    if len(_never(sampling, vocab)) > MOST_NEVER:
        raise UsageError(
            f"{vocab - (sampling.vocab or 0)} rows of the model's embeddings stand for no token; vllm leaves "
            f"out {MOST_NEVER} at most: sample with keel's engine"
        )


def _never(sampling: Sampling, vocab: int) -> range:
    """Ids that stand for no token."""
    return range(vocab if sampling.vocab is None else sampling.vocab, vocab)


def body(
    request: GenerationRequest, row: int, weights: Weights, vocab: int, *, stops: bool = True
) -> dict[str, Any]:
    """The request for one row. stops: whether the server looks for stop strings, so that it ends early."""
    sampling, numbers = request.sampling, request.rows
    number = row if numbers is None else numbers.numbers[row]
    texts = request.stop_texts.texts if request.stop_texts is not None and stops else ()
    params: dict[str, Any] = {
        "n": 1,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "seed": derive_seed(request.seed, "vllm", number) % SEEDS,
        "max_tokens": limit_of(request, row),
        "ignore_eos": True,  # the stop ids hold every EOS that counts, and no other ends a response
        "stop_token_ids": list(request.stop_ids),
        "logprobs": 0,  # of the drawn tokens
        "detokenize": bool(texts),
    }
    if texts:
        params |= {"stop": list(texts), "include_stop_str_in_output": True, "skip_special_tokens": False}
    if never := _never(sampling, vocab):
        params["logit_bias"] = {str(token): NEVER for token in never}
    return {"model": weights.model, "token_ids": list(request.prompts[row]), "sampling_params": params}


def limit_of(request: GenerationRequest, row: int) -> int:
    """The most tokens of a row's response."""
    return request.sampling.max_new_tokens if request.limits is None else request.limits[row]


def completion(
    request: GenerationRequest, row: int, answer: object, weights: Weights, *, stops: bool = True
) -> Completion | None:
    """The completion of one row; None where the server found a stop string that does not stand in the text as
    keel reads it, so that the row has to be asked for without (`stops`).

    GarbageError for an answer that is none, StaleError for tokens of other weights."""
    try:
        return _read(request, row, answer, weights, stops)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise GarbageError(f"its answer is no completion ({type(error).__name__}: {error})") from None


def _read(
    request: GenerationRequest, row: int, answer: Any, weights: Weights, stops: bool
) -> Completion | None:
    choice = answer["choices"][0]
    ids = _ids(choice["token_ids"])
    limit, finish = limit_of(request, row), choice["finish_reason"]
    if finish not in ("stop", "length"):
        raise GarbageError(f"a response ended by {finish!r}")
    if not 0 < len(ids) <= limit:
        raise GarbageError(f"a response of {len(ids)} tokens, where 1 to {limit} were asked for")
    _check_weights(answer, choice, len(ids), weights)
    if beyond := [i for i in ids if request.sampling.vocab is not None and i >= request.sampling.vocab]:
        raise GarbageError(f"token {beyond[0]}, which stands for nothing: there are {request.sampling.vocab}")
    logps = _logps(choice["logprobs"], ids)
    if request.sampling.temperature == 0:
        logps = (0.0,) * len(ids)  # greedy leaves no choice
    length, reason, stop = _end(ids, request.stop_ids, request.stop_texts)
    if reason == "length" and finish == "stop":
        if stops and request.stop_texts is not None and isinstance(choice["stop_reason"], str):
            return None
        raise GarbageError("a response that ended where nothing ends it")
    if reason == "length" and len(ids) < limit:
        raise GarbageError(f"a response cut at {len(ids)} tokens, where {limit} were asked for")
    return Completion(tuple(request.prompts[row]), tuple(ids[:length]), reason, tuple(logps[:length]), stop)


def _ids(told: Sequence[Any]) -> list[int]:
    if wrong := [token for token in told if type(token) is not int or token < 0]:
        raise GarbageError(f"{wrong[0]!r} among the token ids")
    return list(told)


def _check_weights(
    answer: Mapping[str, Any], choice: Mapping[str, Any], length: int, weights: Weights
) -> None:
    """StaleError where a token was not drawn by the weights that the server should hold."""
    if answer["model"] != weights.model:
        raise StaleError(f"it sampled from {answer['model']!r}, not from {weights.model!r}")
    if weights.version is None:
        return
    spans = choice["weight_versions"] or ()
    other = next((span["version"] for span in spans if span["version"] != weights.version), None)
    covered = sum(span["end"] - span["start"] for span in spans)
    if other is not None or covered != length:
        said = "no version" if other is None else f"version {other!r}"
        raise StaleError(f"it sampled by weights of {said}, not of {weights.version!r}")


def _logps(told: Mapping[str, Any], ids: Sequence[int]) -> tuple[float, ...]:
    """(N,) log-probabilities of the tokens."""
    content = told["content"]
    if [one["token_id"] for one in content] != list(ids):
        raise GarbageError("its log-probabilities are of other tokens than it sampled")
    logps = [float(one["logprob"]) for one in content]
    if wrong := [x for x in logps if not math.isfinite(x) or x > 1e-3 or x <= -9999.0]:
        raise GarbageError(f"{wrong[0]} as the log-probability of a token that it sampled")
    return tuple(min(x, 0.0) for x in logps)


def _end(ids: Sequence[int], stop_ids: Sequence[int], texts: StopTexts | None) -> tuple[int, StopReason, str]:
    """Where a response ends by keel's own reading: its length, why, and the stop string."""
    ending = next((n for n, token in enumerate(ids, 1) if token in stop_ids), len(ids) + 1)
    if texts is not None:
        maybe = texts.may_end(torch.tensor(list(ids))).tolist()
        for length in (n for n, closes in enumerate(maybe, 1) if closes and n < ending):
            if stop := texts.within(ids[:length]):
                return length, "stop", stop
    if ending > len(ids):
        return len(ids), "length", ""
    return ending, "eos" if ids[ending - 1] == stop_ids[0] else "stop", ""


# ---------------------------------------------------------------- the probe


def probe(ids: Sequence[int], weights: Weights) -> dict[str, Any]:
    """A request for the log-probabilities of a text."""
    params = {
        "n": 1, "temperature": 0.0, "max_tokens": 1, "ignore_eos": True, "prompt_logprobs": 0,
        "detokenize": False,
    }  # fmt: skip
    return {"model": weights.model, "token_ids": list(ids), "sampling_params": params}


def probed(answer: Any, ids: Sequence[int]) -> list[float]:
    """(N − 1,) what the server gives each token of a text behind the first. GarbageError for something
    else."""
    try:
        told = answer["prompt_logprobs"][1:]
        found = [float(one[str(token)]["logprob"]) for one, token in zip(told, ids[1:], strict=True)]
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise GarbageError(
            f"its answer has no log-probabilities of a text ({type(error).__name__}: {error})"
        ) from None
    if not all(map(math.isfinite, found)):
        raise GarbageError("its log-probabilities of a text are not finite")
    return found
