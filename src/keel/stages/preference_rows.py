"""Comparisons as preference optimisation reads them: tokens, and log-probabilities under both models."""

from __future__ import annotations

import gc
import hashlib
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from keel.accel import batch_layout
from keel.accel.cpu_linear import cast_cache
from keel.algorithms.masked import masked_sum
from keel.config import DPOConfig
from keel.data.batches import by_length, length_mask, pad, rows_of_step, useful_pairs, useful_tokens
from keel.data.stored.records import Rows, numbers_of, picked
from keel.data.stored.tokens import Tokens
from keel.distributed import group, sharded
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
from keel.models.phase_cost import forward_cost
from keel.models.precision import compute_dtype
from keel.rundir.checkpoint import write_json
from keel.rundir.stage_files import read_own
from keel.rundir.stage_run import StageRun
from keel.stages import language, lazy_rows, prepare, supervised_loop
from keel.stages.lazy_rows import LazyRows
from keel.stages.loop_utils import forward_rows, total_steps
from keel.types import PreferenceRecord, Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_STEPS_AT_ONCE = 64  # whose responses a reference reads together, where rows are read from a file
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
) -> list[Sequence[Any]]:
    """The records to train on, and other parts, as pairs or for KTO as examples; counts the cut and the left
    out."""
    too_long, undecided = prepare.TooLong(stage_run, config.too_long, limit), 0
    equal = prepare.EqualPairs(stage_run)
    parts_encoded: list[Sequence[Any]] = []
    for records in parts:
        decided = _decided(config, records)
        if not decided and not parts_encoded:  # held-out rows may all be undecided: then nothing is held out
            raise DataError(
                f"stage {stage_run.name!r}: the votes of all {len(records)} pairs are undecided; give other "
                "pairs, or set votes: soft (for loss: sigmoid)"
            )
        undecided += len(records) - len(decided)
        needed = not parts_encoded
        rows = encode_decided(config, tokenizer, decided, too_long, equal, needed=needed) if decided else []
        parts_encoded.append(examples(rows) if config.loss == "kto" else rows)
    too_long.report()
    equal.report()
    if undecided:
        stage_run.say(f"{stage_run.name}: {undecided} pairs left out, since their votes are undecided")
    stage_run.facts["undecided_pairs"] = undecided
    return parts_encoded


def _decided(config: DPOConfig, records: Sequence[Record]) -> Sequence[Record]:
    """The records to learn from: with hard votes, not the pairs of which as many prefer either side."""
    if config.votes == "soft" or not isinstance(records, Rows):
        return [record for record in records if not _undecided(record)] if config.votes != "soft" else records
    undecided = numbers_of(records, "p_chosen") == 0.5
    return picked(records, np.flatnonzero(~undecided)) if undecided.any() else records


def _undecided(record: Record) -> bool:
    return isinstance(record, PreferenceRecord) and record.p_chosen == 0.5


def count(config: DPOConfig, records: Sequence[Record]) -> int:
    """Rows that `encode` makes of these records if none is too long: pairs, or for KTO examples, two of each
    pair."""
    decided = [record for record in records if config.votes == "soft" or not _undecided(record)]
    return sum(1 + (config.loss == "kto" and isinstance(r, PreferenceRecord)) for r in decided)


def encode_decided(
    config: DPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    too_long: prepare.TooLong,
    equal: prepare.EqualPairs,
    *,
    needed: bool = True,
) -> Sequence[Pair | Example]:
    """The records as tokens. Both sides of a pair keep the same prompt when it has to be cut."""
    limit, paired = too_long.limit, isinstance(records[0], PreferenceRecord)
    preferred = np.nan_to_num(numbers_of(records, "p_chosen"), nan=1.0)
    labels = numbers_of(records, "label")

    def fits(record: Record, tokens: Tokens) -> bool:
        longest = max(map(len, tokens[1:]))
        if not too_long.fits(record, len(tokens[0]) + longest, limit is None or longest < limit):
            return False
        return not paired or equal.differ(*tokens[1:])

    def build(number: int, tokens: Tokens) -> Pair | Example:
        longest = max(map(len, tokens[1:]))
        prompt, *sides = map(tuple, tokens)
        prompt = _cut(prompt, longest, limit)
        if not paired:
            return Example(Response(prompt, sides[0]), bool(labels[number]))
        p = float(preferred[number])
        if p < 0.5:
            sides, p = sides[::-1], 1 - p
        p = p if config.votes == "soft" else 1.0
        return Pair(Response(prompt, sides[0]), Response(prompt, sides[1]), p)

    return lazy_rows.encode(records, tokenizer, too_long, fits, build, needed=needed)


def _cut(prompt: tuple[int, ...], response: int, limit: int | None) -> tuple[int, ...]:
    """The prompt without so much of its start that a response of `response` tokens fits."""
    return prompt if limit is None else prompt[max(0, len(prompt) + response - limit) :]


def examples(rows: Sequence[Any]) -> Sequence[Example]:
    """Pairs as examples: all chosen ones, then all rejected ones, so that neighbours differ in their prompts
    and each completion is `mismatched` with one of them. Examples stay as they are."""
    if isinstance(rows, LazyRows):
        return rows if isinstance(rows[0], Example) else LazyRows(2 * len(rows), partial(_side_of, rows))
    pairs = [row for row in rows if isinstance(row, Pair)]
    unpaired = [row for row in rows if isinstance(row, Example)]
    return [
        *unpaired,
        *(Example(pair.chosen, True) for pair in pairs),
        *(Example(pair.rejected, False) for pair in pairs),
    ]


def _side_of(rows: Sequence[Pair], index: int) -> Example:
    """Number `index` of the pairs' `examples`."""
    pair, chosen = rows[index % len(rows)], index < len(rows)
    return Example(pair.chosen if chosen else pair.rejected, chosen)


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
) -> Iterator[list[Response]]:
    """Every response whose reference log-probability training will ask for, each once: the order of all steps
    is known. Some steps' at a time, of rows in memory as of rows in a file: which responses share a forward
    shows in the last digits.
    """
    if not config.asks_reference:
        return
    steps, seen = total_steps(config, len(rows)), set[int]()
    for start in range(0, steps, _STEPS_AT_ONCE):
        batches = [
            [rows[i] for i in rows_of_step(len(rows), config.batch_size, step, stage_run.seed)]
            for step in range(start, min(start + _STEPS_AT_ONCE, steps))
        ]
        last = start + _STEPS_AT_ONCE >= steps
        yield _new(_asked(config, [*batches, held_out] if last else batches, limit), seen)


def _asked(config: DPOConfig, batches: Sequence[Sequence[Any]], limit: int | None) -> Iterator[Response]:
    """What a loss asks about the rows of some batches, and for KTO about the batches that they come in."""
    for batch in batches:
        if config.loss == "kto":
            yield from (row.response for row in batch)
            yield from mismatched(batch, limit)
        else:
            yield from (side for pair in batch for side in (pair.chosen, pair.rejected))


def _new(responses: Iterable[Response], seen: set[int]) -> list[Response]:
    """Those that were not seen before, which now are."""
    found: list[Response] = []
    for response in responses:
        if (key := _key(response)) not in seen:
            seen.add(key)
            found.append(response)
    return found


class Reference(Mapping[Response, float]):
    """log π_ref of very many responses: a hash of the tokens in place of the tokens."""

    def __init__(self) -> None:
        self._values: dict[int, float] = {}

    def update(self, found: Iterable[tuple[Response, float]]) -> None:
        """More responses."""
        for response, value in found:
            self._values[_key(response)] = value

    def __getitem__(self, response: Response) -> float:
        return self._values[_key(response)]

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Response]:
        raise TypeError("the responses themselves are not kept")


def _key(response: Response) -> int:
    content = array("q", [len(response.prompt), *response.prompt, *response.ids]).tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


@cast_cache()
def reference_logps(
    config: DPOConfig,
    stage_run: StageRun,
    policy: PreTrainedModel,
    other: ModelSource | None,
    asked: Iterable[list[Response]],
    pad_id: int,
    *,
    compact: bool = False,
) -> Mapping[Response, float]:
    """log π_ref of each response, from the policy before any training or from the `other` model, which is
    then freed. Adapters that are on the policy already add nothing yet. compact: as a `Reference`, for very
    many.

    A run that was cut off finds them in its directory, which belongs to these very settings and data.
    """
    path, model, in_order = stage_run.directory / REFERENCE_FILE, None, array("d")
    reference: dict[Response, float] | Reference = Reference() if compact else {}
    known: list[float] | None = group.from_first(lambda: read_own(path) if path.exists() else None)
    for responses in filter(None, asked):
        if known is not None:
            found, known = known[: len(responses)], known[len(responses) :]
            reference.update(zip(responses, found, strict=True))
            continue
        if model is None:
            model = policy if other is None else _opened(config, stage_run, other)
            if not sharded.is_cut(model):
                cast("torch.nn.Module", model).to(stage_run.device)
            cast("torch.nn.Module", model).eval()
        stage_run.say(f"{stage_run.name}: the reference reads {len(responses):,} responses")
        with stage_run.timed("reference"), batch_layout.counting() as read:
            found = scores(model, responses, pad_id, stage_run.device, **forward_rows(config))
        _count_reference(stage_run, model, responses, read)
        if not all(map(math.isfinite, found)):
            raise KeelError(
                f"{stage_run.name}: the reference's log-probability of a response is not finite; look at its "
                "weights and at model.dtype"
            )
        reference.update(zip(responses, found, strict=True))
        in_order.extend(found)
    if model is not None:
        del model  # `policy` lives on; another one ends here
        gc.collect()
        group.only_first(lambda: write_json(path, in_order.tolist()))
    return reference


def _count_reference(
    stage_run: StageRun, model: PreTrainedModel, responses: Sequence[Response], read: batch_layout.Counted
) -> None:
    """What the reference's reading takes at least, and this rank's part of it: it stands beside the first
    step in times.jsonl."""
    rows = [one for response in responses for one in sequences(response)]
    useful, pairs = useful_tokens(rows) // group.size(), useful_pairs(rows) // group.size()
    stage_run.costs["reference"] = forward_cost(model, compute_dtype(model, stage_run.device))
    stage_run.count("reference", min(useful, read()), read(), passes=read.passes, pairs=pairs)


def _opened(config: DPOConfig, stage_run: StageRun, other: ModelSource) -> PreTrainedModel:
    """Another model as the reference, cut over ranks where the policy is."""
    model = prepare.opened(lambda: causal_lm(other, language.model_seed(stage_run)), other, config)
    model.requires_grad_(False)
    supervised_loop.among_ranks(model)
    return model


def forget_reference(stage_run: StageRun) -> None:
    """Remove what `reference_logps` left for a run that is cut off."""
    if group.is_first():
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
    prompts = [response.prompt for response in responses]
    parts = by_length([size(r) for r in responses], micro_batch, micro_tokens, together=prompts)

    def of(part: list[int]) -> list[float]:
        return logps(model, [responses[i] for i in part], pad_id, device).tolist()

    with torch.no_grad():
        for part, found in zip(parts, group.mapped(parts, of), strict=True):
            for i, value in zip(part, found, strict=True):
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


def sequences(row: Response | Pair | Example) -> list[tuple[tuple[int, ...], int]]:
    """Each response of a row: its prompt, and its length with it."""
    match row:
        case Pair():
            return [*sequences(row.chosen), *sequences(row.rejected)]
        case Example():
            return sequences(row.response)
    return [(row.prompt, size(row))]


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
