"""The moments of a stage at which memory is fullest, by role: role → kind → bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from keel.plan import activation_memory, model_memory
from keel.plan.model_memory import Forward, Model

Parts = dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class Phase:
    """What lies in memory at the fullest moment of a part of a stage: role → kind → bytes. Kinds: weights,
    gradients, optimizer, activations, kv_cache, logits, copy, casts."""

    name: str
    parts: Parts

    @property
    def total(self) -> float:
        return sum(sum(kinds.values()) for kinds in self.parts.values())


def resident(models: Mapping[str, Model], *, trained: bool = True) -> Parts:
    """Weights of all roles, and the optimiser's state of those that learn."""
    parts = {role: {"weights": model_memory.weights(model)} for role, model in models.items()}
    for role, model in models.items():
        if trained and model.trained:
            parts[role]["optimizer"] = model_memory.optimizer(model)
    return parts


def with_parts(parts: Parts, role: str, **kinds: float) -> Parts:
    """The parts with more of these kinds in a role."""
    own = dict(parts.get(role, {}))
    for kind, value in kinds.items():
        own[kind] = own.get(kind, 0) + value
    return {**parts, role: own}


def fullest(name: str, moments: Sequence[Parts]) -> Phase:
    return max((Phase(name, parts) for parts in moments), key=lambda phase: phase.total)


@dataclass(frozen=True, slots=True)
class Pass:
    """A role's forwards and their backward. Bytes of its logits at most."""

    role: str
    forwards: Sequence[Forward]
    logits: float = 0.0


def training(
    models: Mapping[str, Model], passes: Sequence[Pass], *, accumulates: bool, name: str = "train"
) -> Phase:
    """A gradient step: one pass after the other, forwards and backward.

    accumulates: gradients of earlier micro-batches are there already.
    """
    done, moments = resident(models), list[Parts]()
    for p in passes:
        model = models[p.role]
        there = model_memory.gradients(model) if accumulates else 0
        done = with_parts(done, p.role, gradients=there, casts=model_memory.casts(model))
    for p in passes:
        moments += _backward(done, models[p.role], p, accumulates)
        if not accumulates:
            done = with_parts(done, p.role, gradients=model_memory.gradients(models[p.role]))
    return fullest(name, moments)


def _backward(held: Parts, model: Model, p: Pass, accumulates: bool) -> list[Parts]:
    """The loss with all activations; the backward of the last block and of the one before it, in the forward
    that is largest; the end of that. held: what is there besides."""
    *others, read = sorted(p.forwards, key=lambda read: activation_memory.saved(model, read))
    kept, of_others = (
        sum(activation_memory.saved(model, one) for one in part) for part in (p.forwards, others)
    )
    inside = activation_memory.backward_working(model, read.tokens)
    last = inside if read.looked is None else activation_memory.backward_working(model, read.looked)
    # a weight's gradient is one more tensor until the last of its forwards is there to be added
    shape, is_lm = model.shape, model.head == "lm"
    smallest = min(x.inputs * x.outputs for x in shape.linears())
    apart = not accumulates or (
        bool(others) and not (shape.linear and model_memory.adds_in_place(model, smallest))
    )
    tied = shape.tied and is_lm
    waits = tied and not model_memory.adds_in_place(model, shape.hidden * shape.vocab)
    head = model_memory.embedding_gradient(model) * (is_lm and (waits or not accumulates))
    embedding = model_memory.embedding_gradient(model) * bool(accumulates or tied or others)
    of_block = 0.0 if model.checkpointing else activation_memory.last_block(model, read)
    first = 0.0 if model.checkpointing else activation_memory.saved(model, read) / model.shape.layers
    mlp, block = (
        apart * made
        for made in (activation_memory.feed_forward_gradients(model), model_memory.block_gradients(model))
    )
    return [
        with_parts(held, p.role, activations=kept, logits=p.logits),
        with_parts(held, p.role, activations=kept + last, gradients=head + mlp),
        with_parts(held, p.role, activations=kept - of_block + inside, gradients=head + block + mlp),
        with_parts(
            held,
            p.role,
            activations=of_others + first + inside,
            gradients=apart * model_memory.gradients(model) + embedding,
        ),
    ]
