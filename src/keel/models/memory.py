"""How many bytes a model takes: weights, gradients, optimiser, activations, key–value cache, logits.

Pure arithmetic on shapes and settings. Activations are the tensors that autograd saves for the backward pass, counted
one by one as the modules of transformers save them; the logits are counted by the copies that keel's losses make.
docs/memory.md says how, and how near to measured peaks it comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from keel.models.forward import LOGITS_AT_ONCE
from keel.models.shapes import Head, Shape, targeted

# Bytes of a weight. 8 and 4 bits as in bitsandbytes: a scale in float32 for each row (2208.07339; too few to count), for each
# 64 weights (NF4 of 2305.14314, without double quantisation).
WEIGHT: dict[str, float] = {
    "auto": 4,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int8": 1,
    "int4": 0.5 + 4 / 64,
}
TRAINED = 4  # bytes of a trained weight and of its gradient: float32, adapters too
MOMENTS = 8  # AdamW's two moments in float32
FLOAT32, FLOAT64 = 4, 8


@dataclass(frozen=True, slots=True)
class Lora:
    """Low-rank adapters (2106.09685)."""

    r: int = 16
    targets: str | tuple[str, ...] = "all-linear"
    dropout: bool = False


@dataclass(frozen=True, slots=True)
class Model:
    """A model as a stage holds it."""

    shape: Shape
    dtype: str = "float32"
    trained: bool = False
    lora: Lora | None = None  # trained: only these and a scorer's head
    checkpointing: bool = False
    dropout: bool = False  # whether the shape's dropout is on
    head: Head = "lm"
    labels: int = 1
    device: Literal["cpu", "cuda"] = "cuda"
    base: bool = True  # False: the weights are another role's, only adapters and head are its own
    counted: int | None = None  # parameters, where they were counted on the model itself

    @property
    def bytes(self) -> int:
        """Of an activation. The blocks of a quantised model compute in 16 bit; with `auto` the residual stream stays in
        float32, and so do norms and attention on a CPU: counted as float32, which is what it takes at most."""
        return 4 if self.dtype in ("auto", "float32") else 2

    @property
    def parameters(self) -> int:
        """Without adapters."""
        return self.counted if self.counted is not None else self.shape.parameters(self.head, self.labels)

    @property
    def own_head(self) -> int:
        """Parameters of a scorer's head."""
        return (
            0
            if self.head != "score"
            else self.shape.parameters("score", self.labels) - self.shape.parameters("none")
        )

    @property
    def adapters(self) -> int:
        return self.shape.adapter_parameters(self.lora.r, self.lora.targets) if self.lora else 0

    @property
    def trained_parameters(self) -> int:
        if not self.trained:
            return 0
        return self.adapters + self.own_head if self.lora else self.parameters


def weights(model: Model) -> float:
    """Of what is its own: the base (embeddings, norms and head of a quantised one in 16 bit), adapters and trained head."""
    own = model.adapters * TRAINED
    if model.lora and model.head == "score":
        own += model.own_head * TRAINED  # peft trains a copy and keeps the original
    if not model.base:
        return own
    if model.dtype in ("int8", "int4"):
        matrices = model.shape.layers * sum(x.inputs * x.outputs for x in model.shape.linears())
        return own + matrices * WEIGHT[model.dtype] + (model.parameters - matrices) * 2
    return own + model.parameters * WEIGHT[model.dtype]


def gradients(model: Model) -> float:
    return model.trained_parameters * TRAINED


def optimizer(model: Model) -> float:
    return model.trained_parameters * MOMENTS


def kv_cache(model: Model, rows: int, length: int) -> float:
    """rows × length × layers × key heads × head dimension × 2 × bytes."""
    return rows * length * model.shape.layers * model.shape.keys * 2 * model.bytes


# ---------------------------------------------------------------- activations


def attention_matrix(model: Model) -> bool:
    """Whether (S, S) matrices are kept for every head: sdpa then takes its plain kernel, or attention is written out.

    Gemma 2 caps its scores, which no fused kernel does. On a CPU the fused kernel has no dropout. On CUDA it has, but in float32
    none that knows grouped key heads (torch's choice of kernels; not measured here).
    """
    shape = model.shape
    if shape.kind == "gemma2":
        return True
    if model.device == "cpu":
        return model.dropout and shape.attention_dropout
    return model.bytes == 4 and shape.kv_heads < shape.heads


def _attention(model: Model, length: int) -> float:
    """Bytes a token of what attention saves besides the input of its output matrix."""
    shape, b = model.shape, model.bytes
    q, k = shape.queries, shape.keys
    square = shape.heads * length
    if (
        shape.kind == "gemma2"
    ):  # capped scores and their softmax; keys and values repeated for every query head
        return (3 * q + 2 * square) * b + (square * FLOAT32 if b < 4 else 0)
    if attention_matrix(model):
        dropped = model.dropout and shape.attention_dropout
        return 3 * q * b + square * b * (
            3 if dropped else 1
        )  # softmax; and the dropout's mask, and what is left
    stored = {
        "gpt2": 3 * q, "gpt_neox": (q + 2 * k) + q + k, "phi3": (q + 2 * k) + q + k,  # v is a view of the fused projection
    }.get(shape.kind, q + 2 * k)  # fmt: skip
    return (stored + q) * b + shape.heads * FLOAT32  # its output, and a log-sum-exp a head


def fused(model: Model) -> bool:
    """Whether norms and rotations are those of `keel.models.fused`."""
    return model.device == "cpu" and model.bytes == FLOAT32


def _norms_again(model: Model) -> bool:
    """Whether what a norm's weight multiplies is made again."""
    return fused(model) and not model.shape.kind.startswith("gemma")


def _norms(model: Model) -> float:
    """Bytes a token. LayerNorm keeps its input and two statistics; RMSNorm in float32 its input, and what its own weight
    multiplies where that learns and `keel.models.fused` does not make it again."""
    shape, b, h = model.shape, model.bytes, model.shape.hidden
    full = model.trained and model.lora is None and not _norms_again(model)
    if shape.layer_norm:
        inputs = 1 if shape.kind == "gpt_neox" else 2  # its two norms read the same
        return (inputs * h + 4) * b
    total = shape.norms * (h * FLOAT32 + FLOAT32 + full * h * b)
    if shape.qk_norm:
        q, k = shape.queries, shape.keys
        total += (q + k) * (FLOAT32 + full * b) + (shape.heads + shape.kv_heads) * FLOAT32
    return total


def _linears(model: Model, length: int) -> float:
    """Bytes a token of the inputs of the matrices that learn: each once, or in half precision once for every adapter,
    which casts what it reads to float32."""
    shape, b, lora = model.shape, model.bytes, model.lora
    # the fused kernel keeps its output, which is the output matrix's input, unless that is a copy
    copied = ("gpt_neox",) if fused(model) else ("gpt_neox", "phi3")
    kept = {"attended"} if not attention_matrix(model) and shape.kind not in copied else set()
    if lora is None:
        return sum({x.reads: x.inputs * b for x in shape.linears() if x.reads not in kept}.values())
    total, seen = 0.0, set()
    for x in targeted(shape, lora.targets):
        total += lora.r * FLOAT32
        if lora.dropout:
            total += x.inputs * (
                FLOAT32 + (FLOAT32 if model.device == "cpu" else 1)
            )  # what is left, and the mask
        elif b < 4:
            total += x.inputs * FLOAT32
        elif x.reads not in kept and x.reads not in seen:
            total += x.inputs * b
            seen.add(x.reads)
    return total


def _nonlinearity(model: Model) -> float:
    shape = model.shape
    return shape.intermediate * model.bytes * (4 if shape.gelu_by_parts else 3 if shape.gated else 1)


def block(model: Model, length: int) -> float:
    """Bytes a token that one block saves for its backward pass."""
    total = _norms(model) + _attention(model, length) + _linears(model, length) + _nonlinearity(model)
    if (
        model.dropout and model.shape.dropout
    ):  # a mask for each residual branch; DistilBERT has none after attention
        branches = 1 if model.shape.kind == "distilbert" else 2
        total += branches * model.shape.hidden * (model.bytes if model.device == "cpu" else 1)
    return total


def saved(model: Model, rows: int, length: int) -> float:
    """Activations of a forward that a backward will follow, without logits. With checkpointing: the input of every block
    and what one block saves."""
    shape, b = model.shape, model.bytes
    per_token = shape.hidden * (
        b if shape.layer_norm else FLOAT32 if _norms_again(model) else FLOAT32 + b
    )  # the last norm
    if model.dropout and shape.dropout:
        per_token += shape.hidden * (b if model.device == "cpu" else 1)
    if model.checkpointing:
        per_token += shape.layers * shape.hidden * b + block(model, length)
    else:
        per_token += shape.layers * block(model, length)
    return rows * length * per_token


def working(model: Model, rows: int, length: int, *, new: int | None = None) -> float:
    """What a forward without gradient holds at most besides logits and cache: the residual stream and the widest moment
    of one block. new: tokens a row that are read now, the others being in the cache."""
    shape, b = model.shape, model.bytes
    h, i, q, k = shape.hidden, shape.intermediate, shape.queries, shape.keys
    norm = 2 * h * (0 if shape.layer_norm else FLOAT32)
    attention = (2 * q + 2 * (q + 2 * k)) * b  # before and after rotation, and the output
    if attention_matrix(model):
        attention += 2 * shape.heads * length * b
    mlp = i * b * (4 if shape.gelu_by_parts else 3 if shape.gated else 2)
    total = 2 * h * b + max(norm, attention, mlp)
    return rows * (length if new is None else new) * total


def backward_working(model: Model, rows: int, length: int) -> float:
    """Gradients of activations that one block holds at a time: of the residual stream and of the MLP's inside, of which
    as much as one of three has been freed by then."""
    return rows * length * (2 * model.shape.hidden + 2 * model.shape.intermediate) * model.bytes


# ---------------------------------------------------------------- logits, by the copies that the losses make


def _at_once(model: Model, tokens: int) -> int:
    """Tokens whose logits `models.forward` makes at a time."""
    return min(tokens, max(1, LOGITS_AT_ONCE // (model.shape.vocab * FLOAT32)))


def _kept_states(model: Model, tokens: int) -> float:
    """The hidden states at those tokens, a copy."""
    return tokens * model.shape.hidden * model.bytes


def loss_logits(model: Model, tokens: int, *, entropy: bool = False, entropy_learns: bool = False) -> float:
    """`models.forward.said` of so many tokens, the most of its forward and backward: a part of the logits and their log-softmax,
    and for the entropy one copy more; then that and its gradient, and the gradient of the head, which is there twice when
    there are several parts."""
    b, v, n = model.bytes, model.shape.vocab, _at_once(model, tokens)
    part, log = n * v * b, n * v * FLOAT32
    head = model.shape.hidden * v * TRAINED if model.trained and not model.lora else 0
    forward = part + log + (log if b < 4 else 0) + (log if entropy else 0)
    backward = 2 * log + (log if entropy_learns else 0) + (part if b < 4 else 0)
    before = head if n < tokens else 0  # of the parts before this one
    return _kept_states(model, tokens) + before + max(forward, backward, part + head)


def score_logits(model: Model, tokens: int) -> float:
    """`rollout.score.compared` of so many tokens: log-softmaxes of policy and reference, a part at a time, and the four
    copies and the mask of the exact KL."""
    v, n = model.shape.vocab, _at_once(model, tokens)
    return 2 * _kept_states(model, tokens) + n * v * (6 * FLOAT32 + 1)


def sampling_logits(model: Model, rows: int, prompt: int) -> float:
    """`rollout.engine`: of every token of the prompts, and three columns in float64 to draw from."""
    return rows * model.shape.vocab * (prompt * model.bytes + 3 * FLOAT64)


# ---------------------------------------------------------------- phases


@dataclass(frozen=True, slots=True)
class Phase:
    """What lies in memory at the fullest moment of a part of a stage: role → kind → bytes. Kinds: weights, gradients,
    optimizer, activations, kv_cache, logits, copy."""

    name: str
    parts: dict[str, dict[str, float]]

    @property
    def total(self) -> float:
        return sum(sum(kinds.values()) for kinds in self.parts.values())


def resident(models: dict[str, Model], *, trained: bool = True) -> dict[str, dict[str, float]]:
    """Weights of all roles, and the optimiser's state of those that learn."""
    parts = {role: {"weights": weights(model)} for role, model in models.items()}
    for role, model in models.items():
        if trained and model.trained:
            parts[role]["optimizer"] = optimizer(model)
    return parts


def with_parts(parts: dict[str, dict[str, float]], role: str, **kinds: float) -> dict[str, dict[str, float]]:
    """The parts with more of these kinds in a role."""
    own = dict(parts.get(role, {}))
    for kind, value in kinds.items():
        own[kind] = own.get(kind, 0) + value
    return {**parts, role: own}


def fullest(name: str, moments: Sequence[dict[str, dict[str, float]]]) -> Phase:
    return max((Phase(name, parts) for parts in moments), key=lambda phase: phase.total)


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward and backward of a role: rows of `length` tokens, and bytes of its logits."""

    role: str
    rows: int
    length: int
    logits: float = 0.0


def training(
    models: dict[str, Model], passes: Sequence[Pass], *, accumulates: bool, name: str = "train"
) -> Phase:
    """A gradient step: the loss with all activations, the first block's backward, the end of the backward, the step.

    accumulates: gradients of earlier micro-batches are there already.
    """
    base = resident(models)
    for p in passes:
        model = models[p.role]
        base = with_parts(base, p.role, gradients=gradients(model) if accumulates else 0)
    loss, last, end = base, base, base
    for p in passes:
        model = models[p.role]
        kept = saved(model, p.rows, p.length)
        inside = backward_working(model, p.rows, p.length)
        loss = with_parts(loss, p.role, activations=kept, logits=p.logits)
        last = with_parts(last, p.role, activations=kept + inside)
        # all gradients, the embedding's a second time: its last part is made before it is added
        whole = 0 if accumulates else gradients(model)
        embedding = (
            model.shape.vocab * model.shape.hidden * TRAINED if model.trained and not model.lora else 0
        )
        again = embedding if accumulates or model.shape.tied else 0
        one = saved(model, p.rows, p.length) / model.shape.layers if not model.checkpointing else 0
        end = with_parts(end, p.role, gradients=whole + again, activations=one + inside)
    return fullest(name, [loss, last, end])
