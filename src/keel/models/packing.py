"""Several examples in one row: whether a model can read them so that each is what it is alone.

Attention is kept within an example by a mask of keel's own, or by transformers' own reading of the positions,
which begin anew with each example. Either way works for some models only: a mask of one's own takes the place
of a sliding window, and state that runs through a row (recurrent, convolutional, state-space layers) knows
nothing of masks. So both are tried on the very model, on rows as long as its windows make it necessary: the
states of an example behind a neighbour must be those of the example alone, and another neighbour must change
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_masks_for_generate

from keel.accel.modules import plain_of, undisturbed
from keel.accel.patches import difference, tried
from keel.accel.trial_inputs import trial_ids, trial_length
from keel.errors import UsageError
from keel.models.logprobs import head_inputs
from keel.models.precision import in_own_precision
from keel.models.row_trial import check_rows

# a mask of keel's own; transformers' own reading of the positions; the masks that transformers makes of the
# positions for each kind of layer, for models that do not hand their positions on
Way = Literal["mask", "positions", "masks"]
WAYS: tuple[Way, ...] = ("mask", "positions", "masks")
NEIGHBOUR = 8  # tokens of what stands before the trial's example
COMPARED = 32  # positions at either end of the example whose states are compared


@dataclass(frozen=True, slots=True)
class _Verdict:
    longest: int  # tokens of the longest example that it holds for
    way: Way | None
    why: str  # what differs where there is no way


_verdicts: WeakKeyDictionary[nn.Module, _Verdict] = WeakKeyDictionary()


def packed_inputs(model: Any, segments: Tensor) -> dict[str, Any]:
    """What a model's forward is given beside (B, S) ids of packed rows, by the way that was tried on it.

    segments: (B, S) the number of the example that each token belongs to; −1 at padding. UsageError where the
    model cannot read packed rows.
    """
    way = way_of(model, int(positions_in(segments).max()) + 1)
    return _inputs(model, way, segments)


def way_of(model: Any, longest: int) -> Way:
    """How a model reads packed rows whose longest example has so many tokens: tried once, and once more for
    longer ones. UsageError where it cannot."""
    check_rows(model)
    verdict = _verdicts.get(model)
    if verdict is None or verdict.longest < longest:
        verdict = _verdicts[model] = _try(model, longest)
    if verdict.way is None:
        kind = plain_of(model).config.get_text_config().model_type
        raise UsageError(
            f"{kind} cannot read several examples in a row as it reads each alone ({verdict.why}); set "
            "packing: false"
        )
    return verdict.way


def positions_in(segments: Tensor) -> Tensor:
    """(B, S) segments → (B, S) each token's place within its own example; 0 at padding."""
    place = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    start = torch.where(begins, place, 0).cummax(dim=1).values
    return torch.where(segments < 0, 0, place - start)


def packed_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask (B, 1, S, S) for packed rows: causal, and only within one's own segment.

    segments: (B, S), the number of the example each position belongs to. Additive, since some architectures
    add the mask to their scores whatever its type.
    """
    same = segments[:, :, None] == segments[:, None, :]
    allowed = same & torch.ones(same.shape[1:], dtype=torch.bool, device=segments.device).tril()
    return torch.zeros(allowed.shape, dtype=dtype, device=segments.device).masked_fill(
        ~allowed, torch.finfo(dtype).min
    )[:, None]


def _inputs(model: Any, way: Way, segments: Tensor) -> dict[str, Any]:
    weight, config = next(model.parameters()), plain_of(model).config.get_text_config()
    positions = positions_in(segments).to(weight.device)
    if way == "positions":
        return {"position_ids": positions}
    if way == "mask":
        mask: Any = packed_mask(segments.to(weight.device), weight.dtype)
    else:
        like = weight.new_empty(*positions.shape, 1)  # states, of which shape and type are looked at
        mask = create_masks_for_generate(config, like, None, None, position_ids=positions)
    return {"attention_mask": mask, "position_ids": positions}


# ---------------------------------------------------------------- the trial


def _try(model: Any, longest: int) -> _Verdict:
    """The first way in which nothing differs; otherwise what differs in the first that the model takes."""
    length = trial_length(plain_of(model).config, longest)
    gaps: list[str] = []
    with undisturbed(model), torch.no_grad(), in_own_precision(model):
        for way in WAYS:
            if (why := tried(lambda way=way: _differs(model, way, length))) is None:
                return _Verdict(longest, way, "")
            gaps.append(why)
    return _Verdict(longest, None, next((gap for gap in gaps if gap.startswith("states")), gaps[0]))


def _differs(model: Any, way: Way, length: int) -> str | None:
    """An example behind three neighbours, one of them shorter, and alone."""
    alone = _states(model, None, 0, length, 0)
    first, other, shorter = (
        _states(model, way, tokens, length, seed) for tokens, seed in ((NEIGHBOUR, 1), (NEIGHBOUR, 2), (3, 3))
    )
    half = alone.dtype in (torch.float16, torch.bfloat16)  # where tokens may change their experts by rounding
    why = difference("states behind one neighbour and another", other, first, rough=5e-2 if half else 1e-5)
    for packed in (first, shorter):
        why = why or difference("states in a row and alone", packed, alone)
    return why


def _states(model: Any, way: Way | None, before: int, length: int, seed: int) -> Tensor:
    """(n, d) what the head is given at the first and the last positions of an example of `length` tokens, the
    same one for every seed, which stands behind a neighbour of `before`."""
    config, weight = plain_of(model).config, next(model.parameters())
    ids = trial_ids(config, before, seed) + trial_ids(config, length)
    ends = sorted({*range(min(COMPARED, length)), *range(max(0, length - COMPARED), length)})
    row = torch.tensor([ids], device=weight.device)
    index = before + torch.tensor(ends, device=weight.device)
    segments = torch.tensor([[0] * before + [1] * length])
    more = None if way is None else _inputs(model, way, segments)
    return head_inputs(model, row, index, inputs=more).values
