"""Comparisons as preference optimisation reads them: tokens, and log-probabilities under both models."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from keel.accel import batch_layout
from keel.accel.cpu_linear import cast_cache
from keel.algorithms.masked import masked_sum
from keel.config import DPOConfig
from keel.config.preference import REFERENCE_FREE
from keel.data import chat
from keel.data.batches import by_length, length_mask, pad, rows_of_step
from keel.errors import DataError, KeelError, UsageError
from keel.models.load import ModelSource, causal_lm, context_length, model_config
from keel.models.logprobs import (
    HeadInputs,
    head_inputs,
    joined,
    response_index,
    scatter_to_mask,
    token_logprobs,
)
from keel.rundir.checkpoint import write_json
from keel.rundir.stage_run import StageRun
from keel.stages import language, prepare
from keel.stages.loop_utils import forward_rows, total_steps
from keel.types import PreferenceRecord, Record, UnpairedRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REFERENCE_FILE = "reference.json"  # log-probabilities, in a stage's directory while it is at work


@dataclass(frozen=True, slots=True)
class Response:
    """A prompt and one response to it, as tokens. Equal ones have one reference log-probability."""

    prompt: tuple[int, ...]
    ids: tuple[int, ...]  # EOS is the last one


@dataclass(frozen=True, slots=True)
class Pair:
    """A comparison; `chosen` is the side that most votes prefer."""

    chosen: Response
    rejected: Response
    p_chosen: float = 1.0  # share of the votes for it, in [½, 1]; 1 with hard votes


@dataclass(frozen=True, slots=True)
class Example:
    """What KTO learns from: one response with a thumb up or down."""

    response: Response
    label: bool


# ---------------------------------------------------------------- rows


def encode(
    config: DPOConfig,
    stage_run: StageRun,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
    *parts: Sequence[Record],
) -> list[list[Any]]:
    """The records to train on, and other parts, as pairs or for KTO as examples; counts the cut and the left
    out."""
    too_long, undecided = prepare.TooLong(stage_run, config.too_long, limit), 0
    equal = prepare.EqualPairs(stage_run)
    parts_encoded: list[list[Any]] = []
    for records in parts:
        decided = [record for record in records if config.votes == "soft" or not _undecided(record)]
        if not decided and not parts_encoded:  # held-out rows may all be undecided: then nothing is held out
            raise DataError(
                f"stage {stage_run.name!r}: the votes of all {len(records)} pairs are undecided; give other "
                "pairs, or set votes: soft (for loss: sigmoid)"
            )
        undecided += len(records) - len(decided)
        rows = prepare.encode_all(
            stage_run,
            decided,
            lambda record: _encode(config, tokenizer, record, too_long, equal),
            needed=not parts_encoded,
        )
        parts_encoded.append(examples(rows) if config.loss == "kto" else rows)
    too_long.report()
    equal.report()
    if undecided:
        stage_run.say(f"{stage_run.name}: {undecided} pairs left out, since their votes are undecided")
    stage_run.facts["undecided_pairs"] = undecided
    return parts_encoded


def _undecided(record: Record) -> bool:
    return isinstance(record, PreferenceRecord) and record.p_chosen == 0.5


def count(config: DPOConfig, records: Sequence[Record]) -> int:
    """Rows that `encode` makes of these records if none is too long: pairs, or for KTO examples, two of each
    pair."""
    decided = [record for record in records if config.votes == "soft" or not _undecided(record)]
    return sum(1 + (config.loss == "kto" and isinstance(r, PreferenceRecord)) for r in decided)


def _encode(
    config: DPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    record: Record,
    too_long: prepare.TooLong,
    equal: prepare.EqualPairs | None = None,
) -> Pair | Example | None:
    """The record as tokens; None if it is left out. Both sides keep the same prompt when it has to be cut."""
    assert isinstance(record, PreferenceRecord | UnpairedRecord)
    texts = (record.chosen, record.rejected) if isinstance(record, PreferenceRecord) else (record.completion,)
    prompt = tuple(chat.prompt_ids(tokenizer, record.prompt))
    sides = [tuple(chat.completion_ids(tokenizer, record.prompt, text)) for text in texts]
    longest = max(map(len, sides))
    truncatable = too_long.limit is None or longest < too_long.limit
    if not too_long.fits(record, len(prompt) + longest, truncatable):
        return None
    prompt = _cut(prompt, longest, too_long.limit)
    if isinstance(record, UnpairedRecord):
        return Example(Response(prompt, sides[0]), record.label)
    if equal is not None and not equal.differ(*sides):
        return None
    p = 1.0 if record.p_chosen is None else record.p_chosen
    if p < 0.5:
        sides, p = sides[::-1], 1 - p
    return Pair(Response(prompt, sides[0]), Response(prompt, sides[1]), p if config.votes == "soft" else 1.0)


def _cut(prompt: tuple[int, ...], response: int, limit: int | None) -> tuple[int, ...]:
    """The prompt without so much of its start that a response of `response` tokens fits."""
    return prompt if limit is None else prompt[max(0, len(prompt) + response - limit) :]


def examples(rows: Sequence[Any]) -> list[Example]:
    """Pairs as examples: all chosen ones, then all rejected ones, so that neighbours differ in their prompts
    and each completion is `mismatched` with one of them. Examples stay as they are."""
    pairs = [row for row in rows if isinstance(row, Pair)]
    unpaired = [row for row in rows if isinstance(row, Example)]
    return [
        *unpaired,
        *(Example(pair.chosen, True) for pair in pairs),
        *(Example(pair.rejected, False) for pair in pairs),
    ]


def mismatched(rows: Sequence[Example], limit: int | None) -> list[Response]:
    """Each row's prompt with the response of another row, for KTO's estimate of the KL.

    It is the next row's (cyclic), or that of the first row after it whose prompt and response both differ: a
    row must never be paired with itself [trl 1911], nor with an equal one. A row without such another is left
    out.
    """
    responses: list[Response] = []
    for i, row in enumerate(rows):
        response = row.response
        following = (rows[(i + k) % len(rows)].response for k in range(1, len(rows)))
        other = next((r for r in following if r.prompt != response.prompt and r.ids != response.ids), None)
        if other is not None:
            responses.append(Response(_cut(response.prompt, len(other.ids), limit), other.ids))
    return responses


# ---------------------------------------------------------------- the reference


def reference_source(
    config: DPOConfig, stage_run: StageRun, source: ModelSource, limit: int | None
) -> ModelSource | None:
    """The reference that the config names; None for the model that training starts from, and for losses
    without one.

    UsageError for a reference that cannot read what the policy reads.
    """
    if config.reference is None:
        return None
    path = stage_run.resolve(config.reference)
    reference = ModelSource(path, None, config.model.dtype, config.model.trust_remote_code, rows=source.rows)
    policy_config, reference_config = model_config(source), model_config(reference)
    ours, theirs = (c.get_text_config().vocab_size for c in (policy_config, reference_config))
    if ours != theirs:
        raise UsageError(
            f"{stage_run.name}: the policy {source.path!r} has a vocabulary of {ours}, the reference "
            f"{path!r} of {theirs}; they cannot be compared token by token"
        )
    room = context_length(reference_config)
    if room is not None and (limit is None or limit > room):
        raise UsageError(
            f"{stage_run.name}: the reference {path!r} reads {room} tokens; set max_length: {room}"
        )
    return reference


def to_score(
    config: DPOConfig, stage_run: StageRun, rows: Sequence[Any], held_out: Sequence[Any], limit: int | None
) -> list[Response]:
    """Every response whose reference log-probability training will ask for: the order of all steps is
    known."""
    if config.loss in REFERENCE_FREE:
        return []
    if config.loss != "kto":
        return _once([side for pair in (*rows, *held_out) for side in (pair.chosen, pair.rejected)])
    responses = [row.response for row in (*rows, *held_out)]
    for step in range(total_steps(config, len(rows))):
        batch = rows_of_step(len(rows), config.batch_size, step, stage_run.seed)
        responses += mismatched([rows[i] for i in batch], limit)
    return _once(responses + mismatched(held_out, limit))


def _once(responses: Sequence[Response]) -> list[Response]:
    return list(dict.fromkeys(responses))


@cast_cache()
def reference_logps(
    config: DPOConfig,
    stage_run: StageRun,
    policy: PreTrainedModel,
    other: ModelSource | None,
    asked: Sequence[Response],
    pad_id: int,
) -> dict[Response, float]:
    """log π_ref of each response, from the policy before any training or from the `other` model, which is
    then freed.

    A run that was cut off finds them in its directory, which belongs to these very settings and data.
    """
    path = stage_run.directory / REFERENCE_FILE
    if not asked:
        return {}
    if path.exists():
        return dict(zip(asked, json.loads(path.read_text(encoding="utf-8")), strict=True))
    stage_run.say(f"{stage_run.name}: the reference reads {len(asked):,} responses")
    model = policy if other is None else causal_lm(other, language.model_seed(stage_run))
    cast("torch.nn.Module", model).to(stage_run.device).eval()
    logps_found = scores(model, asked, pad_id, stage_run.device, **forward_rows(config))
    del model  # `policy` lives on; another one ends here
    gc.collect()
    if not all(map(math.isfinite, logps_found)):
        raise KeelError(
            f"{stage_run.name}: the reference's log-probability of a response is not finite; look at its "
            "weights and at model.dtype"
        )
    write_json(path, logps_found)
    return dict(zip(asked, logps_found, strict=True))


def forget_reference(stage_run: StageRun) -> None:
    """Remove what `reference_logps` left for a run that is cut off."""
    (stage_run.directory / REFERENCE_FILE).unlink(missing_ok=True)


# ---------------------------------------------------------------- log-probabilities


def scores(
    model: PreTrainedModel,
    responses: Sequence[Response],
    pad_id: int,
    device: torch.device,
    micro_batch: int | None = None,
    micro_tokens: int | None = None,
) -> list[float]:
    """log π of each response, without gradient; so many rows or tokens a forward."""
    logps_found = [0.0] * len(responses)
    with torch.no_grad():
        prompts = [response.prompt for response in responses]
        sizes = [size(response) for response in responses]
        for part in by_length(sizes, micro_batch, micro_tokens, together=prompts):
            logp = logps(model, [responses[i] for i in part], pad_id, device)
            for i, value in zip(part, logp.tolist(), strict=True):
                logps_found[i] = value
    return logps_found


def size(row: Response | Pair | Example) -> int:
    """Tokens of a row's forward; of both sides of a pair, with the padding."""
    match row:
        case Pair():
            return 2 * max(size(row.chosen), size(row.rejected))
        case Example():
            return size(row.response)
    return len(row.prompt) + len(row.ids)


def logps(model: PreTrainedModel, responses: Sequence[Response], pad_id: int, device: torch.device) -> Tensor:
    """(B,) log π(y|x), a sum over the response's tokens, with gradient; rows of similar length share a
    forward, those of one prompt before others, and all share the head."""
    prompts = [response.prompt for response in responses]
    sizes = [size(response) for response in responses]
    forwards = by_length(sizes, batch_layout.best_rows_of(model), together=prompts)
    order = [i for part in forwards for i in part]
    states, tokens = zip(*(_states(model, [responses[i] for i in part], pad_id, device) for part in forwards))
    counts = lengths([responses[i] for i in order], device)
    mask = length_mask(counts, int(counts.max()))
    logp = scatter_to_mask(token_logprobs(joined(states), torch.cat(tokens)).logp, mask)
    return masked_sum(logp, mask, dim=1)[torch.tensor(order).argsort().to(device)]


def _states(
    model: PreTrainedModel, responses: Sequence[Response], pad_id: int, device: torch.device
) -> tuple[HeadInputs, Tensor]:
    """The model's states before each token of the responses, and those tokens."""
    ids = pad([[*response.prompt, *response.ids] for response in responses], pad_id)[0].to(device)
    prompts = torch.tensor([len(response.prompt) for response in responses], device=device)
    counts = lengths(responses, device)
    index = response_index(length_mask(counts, int(counts.max())), prompts, ids.shape[1])
    return head_inputs(model, ids, index, lengths=prompts + counts), ids.flatten()[index + 1]


def lengths(responses: Sequence[Response], device: torch.device) -> Tensor:
    """(B,) tokens of each response."""
    return torch.tensor([len(response.ids) for response in responses], device=device)
