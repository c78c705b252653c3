"""Whether a saved folder holds the model that was trained: a few tokens are read by both, before it takes its
place. What merging, ties, conversions or a config lose on the way is found here and not by a user.

The trained model is asked before its adapters are merged, then its weights are freed and what training freed
goes back to the system, so that the check needs no more memory than training did: the saved weights are
mapped from their file, beside the heap. All is computed by transformers' own forward, in the precision of the
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from keel import accel
from keel.errors import KeelError
from keel.models.freed_memory import give_back_freed_memory
from keel.models.load import context_length, score_head
from keel.models.logprobs import backbone, head_dtype
from keel.models.lora import merged, with_own_weights
from keel.models.save import save
from keel.models.tokenizer import known_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from keel.models.lora import AdapterFiles

TOKENS = 16  # of the text that is read
FULL, HALF = 1e-3, 0.25  # shares of the largest logit that may be lost: float32, half precision
BEHIND = 3  # pads behind the text that a classifier is given


class NotSavedError(KeelError):
    """The saved model is not the trained one. The folder that was there before stays, checkpoints too."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A text and what the trained model makes of it."""

    ids: tuple[int, ...]
    expected: Tensor  # (S, V) logits; (1, labels) of a classifier
    dtype: torch.dtype
    device: torch.device
    coarse: bool  # in half precision, or with experts, one of which may be chosen by a rounding


def save_checked(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    card: str,
    members: Sequence[Path] = (),
    adapter: AdapterFiles | None = None,
    *,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Merge adapters, save, load again, compare; `directory` is replaced only if all agree. The model is used
    up: its weights are freed. NotSavedError otherwise."""
    give_back_freed_memory()  # merging takes as much as the weights beside what training left behind
    whole = with_own_weights(model)
    try:
        probe = ask(whole, tokenizer)
    except Exception as error:  # whatever the model's own code raises of so short a text
        say(f"{directory}: not checked against the trained model, which cannot read a short text ({error})")
        probe = None
    plain = merged(whole)

    def check(folder: Path) -> None:
        plain.to("meta")
        give_back_freed_memory()
        if probe is None:
            return
        if not bool(torch.isfinite(probe.expected).all()):
            say(f"{directory}: not checked against the trained model, whose logits are not finite")
            return
        compare(probe, plain, folder, trust_remote_code)

    save(plain, tokenizer, directory, card, members, adapter, check)


def ask(model: Any, tokenizer: PreTrainedTokenizerBase) -> Probe:
    """What a model, adapters included, makes of a text of all parts of the vocabulary, with an end of a
    reply."""
    plain = model.get_base_model() if hasattr(model, "peft_config") else model
    parameter = next(model.parameters())
    ids = text_for(tokenizer, plain.config)
    model.eval()
    with accel.disabled(), torch.no_grad():
        expected = _read(model, plain, torch.tensor([ids], device=parameter.device))
    half = plain.dtype in (torch.float16, torch.bfloat16)
    return Probe(
        ids, expected.float().cpu(), plain.dtype, parameter.device, half or _has_experts(plain.config)
    )


def text_for(tokenizer: PreTrainedTokenizerBase, config: Any) -> tuple[int, ...]:
    """Ids from everywhere in the vocabulary that ordinary text may hold, and the end of a reply."""
    pad: Any = tokenizer.pad_token_id
    rows = min(known_ids(tokenizer), config.get_text_config().vocab_size)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {pad}
    usable = [i for i in range(rows) if i not in special] or list(range(rows))
    count = min(TOKENS, (context_length(config) or TOKENS + BEHIND) - BEHIND, len(usable))
    ids = [usable[i * len(usable) // count] for i in range(max(count - 1, 1))]
    end = tokenizer.eos_token_id
    return (*ids, end) if isinstance(end, int) and end < rows and end != pad else tuple(ids)


def compare(probe: Probe, plain: PreTrainedModel, folder: Path, trust_remote_code: bool = False) -> None:
    """NotSavedError unless the model in a folder makes of the text what the trained one made of it. plain:
    the model that was saved there, for its class."""
    scores = "SequenceClassification" in type(plain).__name__
    auto: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    try:
        model, info = auto.from_pretrained(
            folder, dtype=probe.dtype, output_loading_info=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # whatever transformers raises: it cannot be used
        raise NotSavedError(f"the saved model cannot be loaded: {error}; {_kept(folder)}") from error
    if info["missing_keys"]:
        raise NotSavedError(f"the saved model has no {min(info['missing_keys'])}; {_kept(folder)}")
    model.to(probe.device).eval()
    ids = torch.tensor([probe.ids], device=probe.device)
    with accel.disabled(), torch.no_grad():
        found = {"alone": _read(model, model, ids)}
        if scores:
            found = _by_own_class(model, ids)
    for how, logits in found.items():
        lost = lost_share(probe.expected, logits.float().cpu(), coarse=probe.coarse)
        if not lost <= (HALF if probe.coarse else FULL):
            raise NotSavedError(
                f"the saved model is not the trained one: read {how}, {lost:.1%} of the largest logit is lost"
                f"; {_kept(folder)}"
            )


def lost_share(expected: Tensor, found: Tensor, *, coarse: bool) -> float:
    """The largest difference between (S, V) logits at a position, as a share of the largest logit; the worst
    position, or where single ones may be off (`coarse`) the median one."""
    if expected.shape != found.shape:
        return float("inf")
    gaps = (expected - found).abs().amax(dim=-1) / expected.abs().max().clamp(min=1e-12)
    return float(gaps.median() if coarse else gaps.max())


def _kept(folder: Path) -> str:
    return f"checkpoints are kept, and what was written is in {folder}"


def _read(model: Any, plain: Any, ids: Tensor) -> Tensor:
    """(S, V) logits of a language model at all positions; (1, labels) of a classifier, a decoder's read at
    the last token."""
    head = score_head(plain)
    if head is not None:
        last = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
        return head(last.to(head_dtype(head)))
    mask = torch.ones_like(ids)
    if "SequenceClassification" in type(plain).__name__:
        return model(input_ids=ids, attention_mask=mask).logits
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]


def _by_own_class(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """(1, labels) as transformers' own class finds them, alone and among longer texts, which pad it."""
    alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    pad = model.config.get_text_config().pad_token_id
    if pad is None:
        return {"alone": alone}
    padded = nn.functional.pad(ids, (0, BEHIND), value=pad)
    mask = nn.functional.pad(torch.ones_like(ids), (0, BEHIND))
    longer = torch.cat([ids, ids[:, :1].expand(1, BEHIND)], dim=1)
    both = model(
        input_ids=torch.cat([padded, longer]), attention_mask=torch.cat([mask, torch.ones_like(mask)])
    ).logits
    return {"alone": alone, "with pads behind": both[:1]}


def _has_experts(config: Any) -> bool:
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")
    return any(getattr(config.get_text_config(), name, None) for name in names)
