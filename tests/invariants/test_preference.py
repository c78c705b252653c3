"""Micro-batches, accumulation and padding leave the gradient of preference optimisation as it is, in float64.

The expected loss is written out here from the papers, row by row and without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from keel.accel import batch_layout
from keel.config import DPOConfig
from keel.stages import preference, preference_rows
from keel.stages.loop_utils import micro_batches
from keel.stages.preference_rows import Example, Pair, Response

LOSSES = ("sigmoid", "robust", "ipo", "kto", "orpo", "simpo")
MOST = ("sigmoid", "kto")  # what the others are most like
EXACT = {"rtol": 0, "atol": 1e-10}


def responses_of(row: Pair | Example) -> tuple[Response, ...]:
    return (row.response,) if isinstance(row, Example) else (row.chosen, row.rejected)


def by_hand(model: Any, response: Response) -> Tensor:
    """Σ log π(token | before) over the response's tokens, from one unpadded forward."""
    ids = torch.tensor([[*response.prompt, *response.ids]])
    logp = model(input_ids=ids).logits[0].log_softmax(-1)
    start = len(response.prompt)
    return torch.stack([logp[t - 1, ids[0, t]] for t in range(start, ids.shape[1])]).sum()


def made_up(count: int) -> list[Response]:
    """Prompts and responses of very different lengths."""
    g = torch.Generator().manual_seed(6)

    def ids(most: int) -> tuple[int, ...]:
        number = int(torch.randint(1, most, (), generator=g))
        return tuple(torch.randint(2, 290, (number,), generator=g).tolist())

    return [Response(ids(9), (*ids(14), 1)) for _ in range(count)]


def log_sigmoid(x: Tensor) -> Tensor:
    return -torch.log1p(torch.exp(-x))


def expected(loss: str, model: Any, reference: Any, rows: Sequence[Any], votes: str) -> Tensor:
    """The step's loss from the papers, one row at a time."""
    beta, eps = {"simpo": 2.0}.get(loss, 0.1), 0.1
    losses, z0 = [], 0.0
    if loss == "kto":
        gaps = []
        for i, row in enumerate(rows):
            other = Response(row.response.prompt, rows[(i + 1) % len(rows)].response.ids)
            gaps.append((by_hand(model, other) - by_hand(reference, other)).item())
        z0 = max(0.0, sum(gaps) / len(gaps))
        assert z0 > 0.1  # else the test would not see it
    for row in rows:
        logps = [by_hand(model, r) for r in responses_of(row)]
        refs = [by_hand(reference, r).detach() for r in responses_of(row)]
        n = [len(r.ids) for r in responses_of(row)]
        if loss == "kto":
            r = logps[0] - refs[0]
            sign, weight = (1, 1.5) if row.label else (-1, 0.5)
            losses.append(weight * (1 - torch.sigmoid(sign * beta * (r - z0))))
            continue
        better, worse = logps
        h = beta * ((better - refs[0]) - (worse - refs[1]))
        if loss == "sigmoid":
            p = row.p_chosen if votes == "soft" else 1.0
            losses.append(-p * log_sigmoid(h) - (1 - p) * log_sigmoid(-h))
        elif loss == "robust":
            losses.append((-(1 - eps) * log_sigmoid(h) + eps * log_sigmoid(-h)) / (1 - 2 * eps))
        elif loss == "ipo":
            losses.append(((better - refs[0]) / n[0] - (worse - refs[1]) / n[1] - 1 / (2 * beta)) ** 2)
        elif loss == "orpo":
            a, b = better / n[0], worse / n[1]
            odds = (a - torch.log(1 - a.exp())) - (b - torch.log(1 - b.exp()))
            losses.append(-a - beta * log_sigmoid(odds))
        else:
            losses.append(-log_sigmoid(beta * (better / n[0] - worse / n[1]) - 1.0))
    return torch.stack(losses).sum() / len(rows)


def gradients(model: Any) -> list[Tensor]:
    found = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize(
    ("size", "loss", "votes"),
    [
        *((3, loss, "hard") for loss in LOSSES),
        *((1, loss, "hard") for loss in MOST),
        (None, "sigmoid", "hard"),
        (1, "sigmoid", "soft"),
        *(pytest.param(1, loss, "hard", marks=pytest.mark.slow) for loss in LOSSES if loss not in MOST),
        *(pytest.param(None, loss, "hard", marks=pytest.mark.slow) for loss in LOSSES if loss != "sigmoid"),
        *(pytest.param(size, "sigmoid", "soft", marks=pytest.mark.slow) for size in (None, 3)),
    ],
)
@pytest.mark.usefixtures("read_apart")
def test_split_accumulation_and_padding_leave_the_gradient(
    loss: str, votes: str, size: int | None, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, with another reference than the policy; forwards of at most 4 rows, so that they are split,
    too."""
    monkeypatch.setattr(batch_layout, "MANY", 4)
    model, reference = (AutoModelForCausalLM.from_pretrained(tiny_model).double() for _ in range(2))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    sides = made_up(14)
    labels = [1.0, 0.75, 0.5, 0.6, 1.0, 0.9, 1.0]
    pairs = [
        Pair(w, Response(w.prompt, r.ids), p) for w, r, p in zip(sides[:7], sides[7:], labels, strict=True)
    ]
    batch: list[Any] = (
        [Example(r, i % 3 > 0) for i, r in enumerate(sides[:7])] if loss == "kto" else list(pairs)
    )
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5} if loss == "kto" else {}
    settings = {"loss": loss, "votes": votes, "batch_size": 7, "micro_batch": size, **weights}
    config = DPOConfig.model_validate({"kind": "dpo", "model": "m", "data": "d", **settings})
    asked = [r for row in batch for r in responses_of(row)]
    if loss == "kto":
        asked += preference_rows.mismatched(batch, None)
    known = dict(zip(asked, preference_rows.scores(reference, asked, 0, torch.device("cpu"), 5), strict=True))
    wanted = expected(loss, model, reference, batch, votes)
    wanted.backward()
    right = gradients(model)
    assert max(float(x.abs().max()) for x in right) > 1e-3

    objective = preference._objective(
        preference.PreferenceSetup(config, model, 0, torch.device("cpu"), known, None)
    )
    denominator, total = sum(objective.weight(row) for row in batch), 0.0
    if objective.begin is not None:
        objective.begin(batch)
    for part in micro_batches(batch, size):
        value, _ = objective.loss(part, denominator)
        value.backward()
        total += value.item()
    assert total == pytest.approx(wanted.item(), abs=1e-10)
    for one, other in zip(gradients(model), right, strict=True):
        torch.testing.assert_close(one, other, **EXACT)
