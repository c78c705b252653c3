"""What each phase of a step takes at least on n ranks (of an update, in RL): arithmetic at the speed that a
card reaches, or bytes at the speed of its memory, whichever is longer, and what is sent.

It is the floor that a run's `times.jsonl` is held against (`models.phase_cost`), reckoned from shapes: rows
as long as the longest, every response to its limit, nothing done at the same time. Left out, as there:
launching, norms, activations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

from keel.config import Training
from keel.data.batches import pairs_of
from keel.models.machine_speed import Speed
from keel.models.phase_cost import ADAMW, GRADIENT, PhaseCost
from keel.plan import stage_memory
from keel.plan.model_memory import TRAINED, WEIGHT, Model
from keel.plan.stage_memory import Lengths, StageModels

AUTO = 2.0  # bytes of a number as `dtype: auto` multiplies it on CUDA


@dataclass(frozen=True, slots=True)
class Work:
    """Of a phase of one step, on one rank."""

    cost: PhaseCost
    tokens: float = 0.0
    pairs: float = 0.0
    passes: float = 0.0

    def seconds(self, card: Speed) -> float:
        flops = self.tokens * self.cost.token + self.pairs * self.cost.pair
        moved = self.passes * self.cost.passed + self.pairs * self.cost.pair_bytes
        return card.seconds(flops, moved, self.cost.passed)


@dataclass(frozen=True, slots=True)
class Split:
    """Cards of a vLLM server's own, and cards that train."""

    engine: int
    training: int
    ahead: float  # seconds of an update where the next is sampled meanwhile (`rollout.ahead`)
    in_turn: float  # one after the other


def phases(stage: Training, refs: StageModels, lengths: Lengths, ranks: int, card: Speed) -> dict[str, float]:
    """Seconds by phase. stage: as one rank has it (`rank_memory.share`). ranks: among which the optimiser's
    states are cut; 1: they are not."""
    return {name: work.seconds(card) for name, work in works(stage, refs, lengths, ranks).items()}


def works(stage: Training, refs: StageModels, lengths: Lengths, ranks: int = 1) -> dict[str, Work]:
    """What a rank computes in a step, by phase. Arguments as of `phases`."""
    learners = stage_memory.learners(stage, refs, "cuda")
    trained = sum(model.trained_parameters for model in learners.values())
    tokens, pairs = _read(stage, lengths)
    rows = getattr(stage, "mini_batch", None) or stage.batch_size
    parts = math.ceil(rows / stage_memory.rows_at_once(stage, rows, lengths.total))
    parts *= math.ceil(stage.batch_size / rows)
    epochs = getattr(stage, "epochs", 1) if stage.on_policy else 1
    train = reduce(add, map(_training, learners.values()))
    steps = epochs * math.ceil(stage.batch_size / rows)
    found = {
        "train": Work(train, epochs * tokens, epochs * pairs, epochs * parts),
        "optimizer": Work(PhaseCost(passed=ADAMW * TRAINED * trained / ranks), passes=steps),
    }
    if stage.on_policy:
        return _sampling(stage, refs, lengths, tokens, pairs) | found
    if getattr(stage, "asks_reference", False):
        found = {"reference": Work(reading(learners["policy"]), tokens, pairs, parts)} | found
    return found


def _sampling(
    stage: Any, refs: StageModels, lengths: Lengths, tokens: float, pairs: float
) -> dict[str, Work]:
    """The phases of an update in front of training."""
    roles = stage_memory.roles(stage, refs, "cuda")
    policy, rewards = roles["policy"], [model for name, model in roles.items() if name in refs.rewards]
    sampler = stage.rollout
    rounds = math.ceil(stage.batch_size / sampler.rows_at_once)
    distinct = stage.batch_size / stage.samples_per_prompt
    cached = stage.batch_size * (pairs_of(lengths.total) - pairs_of(lengths.prompt))
    cached += distinct * pairs_of(lengths.prompt)
    reads = [roles.get("reference", policy)]
    reads += [roles["critic"]] if "critic" in roles else []
    reads += [policy] if not stage.trusts_sampler or sampler.vllm else []
    works = {
        "rollout": Work(decoding(policy), tokens, cached, rounds * lengths.answer),
        "forward": Work(reduce(add, map(reading, reads)), tokens, pairs, 1),
    }
    if rewards:
        works["score"] = Work(reduce(add, map(reading, rewards)), tokens, pairs, 1)
    return works


def _read(stage: Any, lengths: Lengths) -> tuple[float, float]:
    """Tokens that are read once over in a step, and pairs of those that attend to each other: the samples of
    one prompt, and both sides of a pair, read it once."""
    prompt, whole = lengths.prompt, lengths.total
    if stage.on_policy:  # nothing follows the last token of a response
        prompts, answers = stage.batch_size / stage.samples_per_prompt, [lengths.answer - 1]
        rows = stage.batch_size
    else:
        prompts = rows = stage.batch_size
        answers = [lengths.answer]
        if stage.record_types == ("preference",):  # None: the other side is as long
            answers.append(lengths.answer if lengths.other is None else lengths.other)
    tokens = prompts * prompt + rows * sum(answers)
    pairs = prompts * pairs_of(prompt)
    pairs += rows * sum(pairs_of(whole - lengths.answer + n) - pairs_of(prompt) for n in answers)
    return tokens, pairs


# ---------------------------------------------------------------- of one model


def multiplied(model: Model) -> float:
    """Weights that a token is multiplied with: matrices of the blocks and the head."""
    shape = model.shape
    blocks = shape.layers * sum(one.inputs * one.outputs for one in shape.linears())
    head = {"lm": shape.vocab, "score": model.labels}.get(model.head, 0)
    return float(blocks + head * shape.hidden)


def reading(model: Model) -> PhaseCost:
    """Of a forward, as `models.phase_cost.forward_cost`."""
    shape, weights = model.shape, multiplied(model)
    width = AUTO if model.dtype == "auto" else WEIGHT[model.dtype]
    return PhaseCost(2 * weights, 4.0 * shape.layers * shape.queries, width * weights)


def decoding(model: Model) -> PhaseCost:
    """Of sampling with a cache, as `models.phase_cost.decode_cost`."""
    once, shape = reading(model), model.shape
    kept = 4.0 if model.dtype == "float32" else AUTO
    return PhaseCost(once.token, once.pair, once.passed, 2.0 * shape.layers * shape.keys * kept)


def _training(model: Model) -> PhaseCost:
    """Of forward and backward, as `models.phase_cost.train_cost`."""
    once, passes = reading(model), 2 if model.lora else 3
    own = min(float(model.trained_parameters), multiplied(model))
    return PhaseCost(passes * once.token, 3 * once.pair, 2 * once.passed + GRADIENT * TRAINED * own)


# ---------------------------------------------------------------- engine and trainer


def best_split(rollout: Mapping[int, float], rest: Mapping[int, float], cards: int) -> Split | None:
    """How many cards a server should have of its own, so that an update that is sampled while the one before
    trains takes least. rollout, rest: seconds of an update by the number of cards; None for one card."""
    found = [
        Split(n, cards - n, max(rollout[n], rest[cards - n]), rollout[n] + rest[cards - n])
        for n in range(1, cards)
    ]
    return min(found, key=lambda split: split.ahead, default=None)
