"""The tensors of a forward: those that autograd saves for the backward pass, counted one by one as the
modules of transformers and of keel save them, and those that are there for a moment."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from keel.plan.model_memory import FLOAT32, TRAINED, Forward, Model, adds_in_place, fused
from keel.plan.model_shapes import Linear, targeted


def attention_matrix(model: Model) -> bool:
    """Whether (S, S) matrices are kept for every head: sdpa then takes its plain kernel, or attention is
    written out.

    Gemma 2 caps its scores, which no fused kernel does. On a CPU the fused kernel has no dropout. On CUDA it
    has, but in float32 none that knows grouped key heads (torch's choice of kernels; not measured here).
    """
    shape = model.shape
    if shape.kind == "gemma2":
        return True
    if model.device == "cpu":
        return model.dropout and shape.attention_dropout
    return model.bytes == 4 and shape.kv_heads < shape.heads


def _attention(model: Model, read: Forward) -> float:
    """Bytes a token that attention reads, of what it saves besides the input of its output matrix."""
    shape, b = model.shape, model.bytes
    q, k = shape.queries, shape.keys
    square = shape.heads * read.length
    if (
        shape.kind == "gemma2"
    ):  # capped scores and their softmax; keys and values repeated for every query head
        return (3 * q + 2 * square) * b + (square * FLOAT32 if b < 4 else 0)
    if attention_matrix(model):
        dropped = model.dropout and shape.attention_dropout
        return 3 * q * b + square * b * (
            3 if dropped else 1
        )  # softmax; and the dropout's mask, and what is left
    separate = 3 * q if read.masked and model.repeats_keys else q + 2 * k
    views = {
        # v is a view of the fused projection
        "gpt2": 3 * q, "gpt_neox": (q + 2 * k) + q + k, "phi3": (q + 2 * k) + q + k,
    }  # fmt: skip
    if read.scores:  # queries, keys and values of each token once, and probabilities
        whole = read.tokens * views.get(shape.kind, separate) + shape.heads * read.scores
        return whole * b / read.cells
    stored = separate if read.unpadded is not None else views.get(shape.kind, separate)
    return (stored + q) * b + shape.heads * FLOAT32  # its output, and a log-sum-exp a head


def _norms_again(model: Model) -> bool:
    """Whether what a norm's weight multiplies is made again."""
    return fused(model) and not model.shape.kind.startswith("gemma")


def _norm(model: Model, width: int, heads: int = 1) -> float:
    """Bytes a token of an RMSNorm over `heads` parts of `width` numbers together. In float32 its input and a
    scale, and what its own weight multiplies where that learns and `keel.models.fused` does not make it
    again."""
    full = model.trained and model.lora is None and not _norms_again(model)
    return width * (FLOAT32 + full * model.bytes) + heads * FLOAT32


def _norms(model: Model) -> float:
    """Bytes a token. LayerNorm keeps its input and two statistics."""
    shape, b, h = model.shape, model.bytes, model.shape.hidden
    if shape.layer_norm:
        inputs = 1 if shape.kind == "gpt_neox" else 2  # its two norms read the same
        return (inputs * h + 4) * b
    total = shape.norms * _norm(model, h)
    if shape.qk_norm:
        total += _norm(model, shape.queries, shape.heads) + _norm(model, shape.keys, shape.kv_heads)
    return total


def _linears(model: Model, among: Sequence[Linear], kept: Collection[str] = ()) -> float:
    """Bytes a token of the inputs of those matrices that learn: each once, or in half precision once for
    every adapter, which casts what it reads to float32. kept: inputs that are kept in any case."""
    b, lora = model.bytes, model.lora
    if lora is None:
        return sum({x.reads: x.inputs * b for x in among if x.reads not in kept}.values())
    total, seen = 0.0, set(kept)
    for x in targeted(model.shape, lora.targets):
        if x not in among:
            continue
        total += lora.r * FLOAT32
        if lora.dropout:
            total += x.inputs * (
                FLOAT32 + (FLOAT32 if model.device == "cpu" else 1)
            )  # what is left, and the mask
        elif b < 4:
            total += x.inputs * FLOAT32
        elif x.reads not in seen:
            total += x.inputs * b
            seen.add(x.reads)
    return total


def _gated_once(model: Model) -> bool:
    """Whether the gated part is one step of autograd, of `keel.models.products`."""
    return model.shape.plain_silu and adds_in_place(model, model.shape.hidden * model.shape.intermediate)


def _nonlinearity(model: Model) -> float:
    shape = model.shape
    each = 4 if shape.gelu_by_parts else 2 if _gated_once(model) else 3 if shape.gated else 1
    return shape.intermediate * model.bytes * each


def feed_forward_gradients(model: Model) -> float:
    """Of a block's MLP, where they are there before its inside is freed."""
    return TRAINED * 3 * model.shape.hidden * model.shape.intermediate if _gated_once(model) else 0


def block(model: Model, read: Forward) -> float:
    """Bytes that one block saves for its backward pass."""
    # the fused kernel keeps its output, which is the output matrix's input, unless that is a copy
    copying = ("gpt_neox",) if fused(model) else ("gpt_neox", "phi3")
    copied = model.shape.kind in copying or read.unpadded is not None
    kept = {"attended"} if not attention_matrix(model) and not copied else set()
    kept |= {"middle"} if _gated_once(model) else set()  # made again
    total = _norms(model) + _nonlinearity(model) + _linears(model, model.shape.linears(), kept)
    if (
        model.dropout and model.shape.dropout
    ):  # a mask for each residual branch; DistilBERT has none after attention
        branches = 1 if model.shape.kind == "distilbert" else 2
        total += branches * model.shape.hidden * (model.bytes if model.device == "cpu" else 1)
    return read.tokens * total + read.cells * _attention(model, read)


def last_block(model: Model, read: Forward) -> float:
    """Bytes that the last block saves: `block` for every token, or what `models.last_layer` saves, keys and
    values of every token and all else at the positions that are looked at."""
    if read.looked is None:
        return block(model, read)
    shape, b = model.shape, model.bytes
    h, q, k = shape.hidden, shape.queries, shape.keys
    query, *keys, out, gate, up, down = shape.linears()
    everywhere, attended = _norm(model, h) + _linears(model, keys), 2 * (q if model.repeats_keys else k) * b
    kept = {"middle"} if _gated_once(model) else set()
    there = _norm(model, h) + _linears(model, [query, out, gate, up, down], kept) + _nonlinearity(model)
    if shape.qk_norm:
        everywhere += _norm(model, k, shape.kv_heads)
        there += _norm(model, q, shape.heads)
    # what is copied into rows of queries, and back among all positions; cosines and sines
    there += (q + h + 2 * shape.head_dim) * b
    laid_out = 2 * q * b + shape.heads * FLOAT32 + read.length * b  # queries, what they found, and their mask
    seen = read.tokens * everywhere + read.cells * attended
    return seen + read.looked * there + read.rows * read.most * laid_out


def _masks(model: Model, read: Forward) -> float:
    """Of a row's own. CUDA's kernel copies one whose rows are no multiple of 8, in every layer (torch's code,
    not measured)."""
    copies = 0 if model.device == "cpu" else 1 if model.checkpointing else model.shape.layers
    return read.masked * (1 + copies) * read.cells * read.length * model.bytes


def saved(model: Model, read: Forward) -> float:
    """Activations of a forward that a backward will follow, without logits. With checkpointing: the input of
    every block and what one block saves."""
    shape, b = model.shape, model.bytes
    per_token = shape.hidden * (
        b if shape.layer_norm else FLOAT32 if _norms_again(model) else FLOAT32 + b
    )  # the last norm
    if model.dropout and shape.dropout:
        per_token += shape.hidden * (b if model.device == "cpu" else 1)
    each = block(model, read)
    if model.checkpointing:
        blocks = read.tokens * shape.layers * shape.hidden * b + max(each, last_block(model, read))
    else:
        blocks = (shape.layers - 1) * each + last_block(model, read)
    return read.tokens * per_token + blocks + _masks(model, read)


def working(model: Model, read: Forward, *, new: int | None = None) -> float:
    """What a forward without gradient holds at most besides logits and cache: the embeddings and the block's
    input, which wait where the block is called, and the widest moment of the block. new: tokens a row that
    are read now, the others being in the cache."""
    shape, b, length = model.shape, model.bytes, read.length
    h, i, q, k = shape.hidden, shape.intermediate, shape.queries, shape.keys
    norm = 2 * h * (0 if shape.layer_norm else FLOAT32)
    turned = 1 if shape.positions else 2  # before and after rotation
    tokens, cells = (read.tokens, read.cells) if new is None else (read.rows * new, read.rows * new)
    attended = q * b
    if attention_matrix(model):  # scores and their softmax, which is taken in float32
        attended += shape.heads * length * (2 * b if b == FLOAT32 else b + 2 * FLOAT32)
    elif read.masked and model.repeats_keys:
        attended += 2 * q * b
    if read.unpadded is not None:
        attended += (q + 2 * k) * b
    # its input, and the output in two layouts
    attention = tokens * (h + turned * (q + 2 * k) + q) * b + cells * attended
    inside = 4 if shape.gelu_by_parts or shape.kind == "phi3" else 3 if shape.gated else 2
    mlp = (2 * h + inside * i) * b  # the residual stream, the MLP's input and its inside
    mask = read.masked * read.cells * length * b
    return tokens * 2 * h * b + max(tokens * norm, attention, tokens * mlp) + mask


def backward_working(model: Model, tokens: int) -> float:
    """Gradients of activations that one block holds at a time: of the residual stream and of the MLP's
    inside, of which as much as one of three has been freed by then; where the MLP is one step, all three, and
    what it saved. tokens: that the block is computed at."""
    inside = 3 if _gated_once(model) else 2
    return tokens * (2 * model.shape.hidden + inside * model.shape.intermediate) * model.bytes
