"""How many bytes a model takes: weights, gradients, optimiser, key–value cache, logits. `activations` has the
rest.

Pure arithmetic on shapes and settings; the logits are counted by the copies that keel's losses make.
docs/memory.md says how, and how near to measured peaks it comes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from keel.accel import cpu_linear, last_layer
from keel.accel.processor import cache_dtype
from keel.models import precision
from keel.models.logprobs import logits_at_once
from keel.plan.model_shapes import Head, Shape

# Bytes of a weight. 8 and 4 bits as in bitsandbytes: a scale in float32 for each row (2208.07339; too few to
# count), for each 64 weights (NF4 of 2305.14314, without double quantisation).
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
        """Of an activation. The blocks of a quantised model compute in 16 bit; with `auto` the residual
        stream stays in float32, and so do norms and attention on a CPU: counted as float32, which is what it
        takes at most."""
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

    @property
    def draws(self) -> bool:
        """Whether its forward draws anything at random."""
        adapters = self.trained and self.lora is not None and self.lora.dropout
        return adapters or (self.dropout and self.shape.draws)

    @property
    def repeats_keys(self) -> bool:
        """Whether keys and values are repeated for every query head where rows bring a mask, which
        transformers does then."""
        return self.shape.kv_heads < self.shape.heads


@dataclass(frozen=True, slots=True)
class Forward:
    """What a model reads at once: rows of `length` tokens, padding included."""

    rows: int
    length: int
    masked: bool = False  # whether the rows bring a mask of their own: `models.prefixes`, packed rows
    looked: int | None = None  # positions that the last layer is computed at (`models.last_layer`); None: all
    most: int = 0  # of these, in one row
    unpadded: int | None = None  # tokens, where only attention reads padding (`models.attention`)
    # pairs of tokens whose probabilities a head keeps (`accel.branch_attention`); 0: another attention
    scores: int = 0

    @property
    def cells(self) -> int:
        """Tokens that attention reads."""
        return self.rows * self.length

    @property
    def tokens(self) -> int:
        """That all else reads."""
        return self.cells if self.unpadded is None else self.unpadded


def weights(model: Model) -> float:
    """Of what is its own: the base (embeddings, norms and head of a quantised one in 16 bit), adapters and
    trained head."""
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


def fused(model: Model) -> bool:
    """Whether norms and rotations are those of `keel.models.fused`."""
    return model.device == "cpu" and model.bytes == FLOAT32


def adds_in_place(model: Model, weights: int) -> bool:
    """Whether the gradient of a linear layer of so many weights is added where it is kept:
    `keel.models.products`."""
    return fused(model) and model.trained and model.lora is None and weights >= cpu_linear.WORTH


def block_gradients(model: Model) -> float:
    """Of the matrices of one block, or of their adapters."""
    if not model.trained:
        return 0
    matrices = sum(x.parameters for x in model.shape.linears())
    return TRAINED * (model.adapters / model.shape.layers if model.lora else matrices)


def embedding_gradient(model: Model) -> float:
    """Of the embedding, or of a head of its size."""
    return model.shape.vocab * model.shape.hidden * TRAINED if model.trained and not model.lora else 0


def casts(model: Model) -> float:
    """The matrices of a model at work, with its head, in bfloat16 beside the weights: with `auto` they are
    cast once for all forwards of a step, or are kept for its backward. On CUDA, which a plan may be for
    without one here, they are taken to be."""
    if model.dtype != "auto" or (
        model.device == "cpu" and not precision.fast_in_bfloat16(torch.device("cpu"))
    ):
        return 0
    head = model.shape.vocab * model.shape.hidden if model.head == "lm" else 0
    return WEIGHT["bfloat16"] * (
        model.shape.layers * sum(x.inputs * x.outputs for x in model.shape.linears()) + head
    )


def halved(model: Model) -> tuple[float, float]:
    """Weights of what is no layer, and of a layer, that ranks gather in bfloat16 in place of float32
    (`distributed.half_gather`): matrices that are cast, but for a head that is the embedding."""
    if not casts(model) or model.shape.kind == "gpt2":  # whose matrices are no nn.Linear
        return 0.0, 0.0
    head = model.shape.vocab * model.shape.hidden if model.head == "lm" and not model.shape.tied else 0
    return head, sum(x.inputs * x.outputs for x in model.shape.linears())


def laid_out(model: Model, steps: int) -> float:
    """The matrices of a model that samples up to so many tokens a response on the CPU in float32, laid out
    for products with few rows, where there is memory for them: all of a Llama's kind
    (`accel.packed_layers`); of other kinds and under adapters those of linear layers (`cpu_linear.lay_out`).
    """
    if model.device != "cpu" or model.dtype not in ("float32", "auto") or casts(model):
        return 0
    shape, most = model.shape, cpu_linear.packed_at_most(steps)
    head = shape.vocab * shape.hidden if model.head == "lm" else 0
    matrices = [x.inputs * x.outputs for x in shape.linears()]
    if shape.kind in last_layer.KINDS and shape.window is None and model.lora is None:
        size = FLOAT32 * shape.layers * sum(matrices)
        return next((all_of_it for all_of_it in (size + FLOAT32 * head, size) if all_of_it <= most), 0)
    least = cpu_linear.lays_out_from()
    matrices = [] if shape.kind == "gpt2" else [size for size in matrices if size >= least]  # no nn.Linear
    size = FLOAT32 * (shape.layers * sum(matrices) + (head if head >= least else 0))
    return size if size <= most else 0


def kv_cache(model: Model, rows: int, length: int) -> float:
    """rows × length × layers × key heads × head dimension × 2 × bytes, which are 2 where products are taken
    in bfloat16, except on a CPU whose attention is faster in float32."""
    kept = cache_dtype(torch.device(model.device)) if casts(model) else None
    size = model.bytes if kept is None else kept.itemsize
    return rows * length * model.shape.layers * model.shape.keys * 2 * size


# ---------------------------------------------------------------- logits, by the copies that the losses make


def _at_once(model: Model, tokens: int) -> int:
    """Tokens whose logits `models.forward` makes at a time."""
    most = logits_at_once(model.shape.vocab, model.shape.hidden, model.device)
    return min(tokens, max(1, most // (model.shape.vocab * FLOAT32)))


def kept_states(model: Model, tokens: int) -> float:
    """The hidden states at those tokens, a copy."""
    return tokens * model.shape.hidden * model.bytes


def loss_logits(model: Model, tokens: int, *, entropy: bool = False, entropy_learns: bool = False) -> float:
    """`models.forward.said` of so many tokens, the most of its forward and backward: a part of the logits and
    their log-softmax, and for the entropy one copy more; then that and its gradient, and the gradient of the
    head, which is there twice when there are several parts."""
    b, v, n = model.bytes, model.shape.vocab, _at_once(model, tokens)
    part, log = n * v * b, n * v * FLOAT32
    head = embedding_gradient(model)
    forward = part + log + (log if b < 4 else 0) + (log if entropy else 0)
    backward = 2 * log + (log if entropy_learns else 0) + (part if b < 4 else 0)
    before = head if n < tokens else 0  # of the parts before this one
    head = 0 if before and adds_in_place(model, model.shape.hidden * v) else head
    return kept_states(model, tokens) + before + max(forward, backward, part + head)


def score_logits(model: Model, tokens: int) -> float:
    """`rollout.score.compared` of so many tokens: log-softmaxes of policy and reference, a part at a time,
    and the four copies and the mask of the exact KL."""
    v, n = model.shape.vocab, _at_once(model, tokens)
    return 2 * kept_states(model, tokens) + n * v * (6 * FLOAT32 + 1)


def divergence_logits(model: Model, teacher: Model, tokens: int) -> float:
    """`algorithms.distillation.compare` of so many tokens, a part at a time: the logits of both, their
    log-softmaxes, the student's probabilities, what they are weighed with, two copies on the way to the
    gradient, and the gradient; then that, and the gradient of the head."""
    v, n = model.shape.vocab, min(_at_once(model, tokens), _at_once(teacher, tokens))
    given = n * v * (model.bytes + teacher.bytes)
    states = kept_states(model, tokens) + kept_states(teacher, tokens)
    return states + max(
        given + n * v * (7 * FLOAT32 + 1), loss_logits(model, tokens) - kept_states(model, tokens)
    )


def sampling_logits(model: Model, rows: int, prompt: int) -> float:
    """`rollout.engine`: of every token of the prompts, and three columns in float64 to draw from."""
    return rows * model.shape.vocab * (prompt * model.bytes + 3 * FLOAT64)
