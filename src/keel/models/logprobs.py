"""Forward passes at the positions a loss needs. Sequences are right-padded, so causal attention needs no
mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from keel.accel import batch_layout
from keel.accel.last_layer import last_layer_at
from keel.algorithms.masked import at_least_float32, token_logp_and_entropy
from keel.models import experts
from keel.models.head import Head, capture_head_input, head_of
from keel.models.precision import computing
from keel.models.row_trial import check_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS_AT_ONCE = 2**26  # bytes of float32 logits that are made at a time
LARGE_HEAD = 2**28  # bytes of a head's float32 weights


@dataclass(frozen=True, slots=True)
class HeadInputs:
    """What a language model makes of N positions, short of its logits."""

    model: Any
    head: Head | None
    values: Tensor  # (N, d) what its head is given; (N, V) its logits where keel does not know its head
    hidden: Tensor | None  # (N, d) the last hidden states; None where nobody asked

    @property
    def rows_at_once(self) -> int:
        vocab = self.values.shape[-1] if self.head is None else self.head.vocab
        width = 0 if self.head is None else self.values.shape[-1]
        return max(1, logits_at_once(vocab, width, self.values.device.type) // (4 * vocab))

    def logits(self, values: Tensor) -> Tensor:
        """(n, V) of some of `values`."""
        if self.head is None:
            return values
        with computing(self.model, values.device):
            return self.head(values)


def logits_at_once(vocab: int, width: int, device: str) -> int:
    """Bytes of float32 logits (n, vocab) that are made at a time of (n, width) hidden states:
    `LOGITS_AT_ONCE`; on a CPU, where a head is large, half as much as its weights. With fewer rows all these
    would be read again and again, and logits that do not fit are made twice."""
    weights = 4 * vocab * width
    return max(LOGITS_AT_ONCE, weights // 2) if device == "cpu" and weights >= LARGE_HEAD else LOGITS_AT_ONCE


class TokenLogprobs(NamedTuple):
    """What a model says of tokens."""

    logp: Tensor  # (N,) log π(token)
    entropy: Tensor  # (N,) of its distribution, in nats; 0 where not asked for
    hits: Tensor  # (N,) bool: whether the token was the likeliest; False where not asked for


def head_inputs(
    model: Any,
    ids: Tensor,
    index: Tensor,
    *,
    hidden: bool = False,
    inputs: Mapping[str, Any] | None = None,
    lengths: Tensor | None = None,
) -> HeadInputs:
    """The model's states at N positions of (B, S) ids, in one forward. index: (N,) into the flattened ids.

    hidden: the last hidden states are wanted whatever model it is. inputs: more for the model's forward;
    without any, rows that begin alike are read as one. lengths: (B,) tokens of each row; with them the
    balancing loss of experts is made, where `experts.collecting` wants it, of a forward over the rows as they
    are. UsageError for a model that does not read rows beside each other as it reads each alone.
    """
    head = head_of(model)
    if lengths is not None and experts.wanted():
        return _with_router_loss(model, head, ids, index, lengths, hidden=hidden, inputs=inputs or {})
    with computing(model, ids.device):
        check_rows(model)
        if head is not None:

            def given_to_head(**more: Tensor) -> Tensor:
                with capture_head_input(head, skip_logits=True) as seen:
                    model(use_cache=False, **more)
                return seen[-1]

            if inputs:
                batch_layout.count(model, ids.numel())
                with last_layer_at(model, index, ids.shape):
                    values = given_to_head(input_ids=ids, **inputs).flatten(0, 1).index_select(0, index)
            else:
                values = batch_layout.read(head.linear, model, given_to_head, ids, index)
            return HeadInputs(model, head, values, values)
        batch_layout.count(model, ids.numel())
        output = model(input_ids=ids, use_cache=False, output_hidden_states=hidden, **inputs or {})
    last = output.hidden_states[-1].flatten(0, 1).index_select(0, index) if hidden else None
    return HeadInputs(model, None, output.logits.flatten(0, 1).index_select(0, index), last)


def _with_router_loss(
    model: Any,
    head: Head | None,
    ids: Tensor,
    index: Tensor,
    lengths: Tensor,
    *,
    hidden: bool,
    inputs: Mapping[str, Tensor],
) -> HeadInputs:
    """As `head_inputs`, all tokens through all layers: the routers' choices are what is wanted."""
    batch_layout.count(model, ids.numel())
    looking = nullcontext() if head is None else capture_head_input(head, skip_logits=True)
    with computing(model, ids.device), looking as seen:
        asked = {"use_cache": False, "output_hidden_states": hidden and head is None, **inputs}
        output = experts.forward(model, lengths, model, input_ids=ids, **asked)
    values = (output.logits if seen is None else seen[-1]).flatten(0, 1).index_select(0, index)
    if head is not None:
        return HeadInputs(model, head, values, values)
    last = output.hidden_states[-1].flatten(0, 1).index_select(0, index) if hidden else None
    return HeadInputs(model, None, values, last)


def joined(parts: Sequence[HeadInputs]) -> HeadInputs:
    """The states of several forwards of one model, one after the other."""
    first = parts[0]
    values = torch.cat([part.values for part in parts])
    if first.head is not None:
        return HeadInputs(first.model, first.head, values, values)
    hidden = [part.hidden for part in parts if part.hidden is not None]
    return HeadInputs(first.model, None, values, torch.cat(hidden) if hidden else None)


def token_logprobs(
    inputs: HeadInputs,
    tokens: Tensor,
    temperature: float = 1.0,
    *,
    entropy: bool = False,
    hits: bool = False,
    vocab: int | None = None,
) -> TokenLogprobs:
    """What the model says of (N,) tokens, `logits_at_once` at a time. Where that takes several times, the
    logits are made again in the backward pass, so that never more than a part of them is there.

    vocab: of the distribution over these first ids alone, which a sampler draws from; None: over all rows.
    """

    def of(values: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = inputs.logits(values)[:, :vocab]
        logp, h = token_logp_and_entropy(logits, tokens, temperature, with_entropy=entropy)
        best = _likeliest(logits.detach(), tokens) if hits else torch.zeros_like(tokens, dtype=torch.bool)
        return logp, h, best

    rows = inputs.rows_at_once
    if len(tokens) <= rows:
        return TokenLogprobs(*of(inputs.values, tokens))
    parts = zip(inputs.values.split(rows), tokens.split(rows), strict=True)
    if torch.is_grad_enabled():
        found = [checkpoint(of, *part, use_reentrant=False) for part in parts]
    else:
        found = [of(*part) for part in parts]
    return TokenLogprobs(*(torch.cat(column) for column in zip(*found, strict=True)))


def _likeliest(logits: Tensor, tokens: Tensor) -> Tensor:
    """(N,) whether each token is the argmax of its row of (N, V) logits. The largest logit is found twenty
    times faster than its place; the place is looked for where the token's is as large."""
    found = logits.gather(-1, tokens[:, None]).squeeze(-1) == logits.amax(dim=-1)
    as_large = found.nonzero().squeeze(1)
    found[as_large] = logits.index_select(0, as_large).argmax(dim=-1) == tokens.index_select(0, as_large)
    return found


def response_index(mask: Tensor, prompt_lengths: Tensor, reach: int) -> Tensor:
    """(N,) indices into the flattened (B, reach) ids: of the positions that predict the tokens of a (B, T)
    mask, row by row."""
    rows, columns = mask.nonzero(as_tuple=True)
    return rows * reach + prompt_lengths[rows] - 1 + columns


def scatter_to_mask(values: Tensor, mask: Tensor) -> Tensor:
    """(N,) values → (B, T): where the mask is True, row by row, and 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def scores_at(scorer: PreTrainedModel, ids: Tensor, index: Tensor) -> Tensor:
    """(N,) what the score head of a decoder makes of the states at N positions of (B, S) ids; rows that begin
    alike are read as one. index: (N,) into the flattened ids."""
    trunk = backbone(scorer)

    def last_states(**inputs: Tensor) -> Tensor:
        return trunk(use_cache=False, **inputs).last_hidden_state

    with computing(scorer, ids.device):
        hidden = batch_layout.read(trunk, scorer, last_states, ids, index)
    head = cast("nn.Module", scorer.score)
    return at_least_float32(head(hidden.to(head_dtype(head))).squeeze(-1))


def head_dtype(head: nn.Module) -> torch.dtype:
    return next(head.parameters()).dtype


def backbone(model: Any) -> Any:
    """The transformer without its head; LoRA adapters, which sit inside it, stay in effect."""
    plain = model.get_base_model() if hasattr(model, "peft_config") else model
    return plain.base_model
