"""Losses that learn from comparisons without a reward model: DPO and its kin.

Inputs are log-probabilities of whole completions, (B,): summed over their counted tokens
(`masked_sum(token_logp(…), mask, dim=1)`) or averaged (`masked_mean`), as each function says. Every function
returns its losses one by one, (B,), and metrics one by one, (B,) and detached: the caller divides both by the
pairs of the whole optimiser step, so that micro-batches cannot matter. Reference log-probabilities are
constants.

Metrics: `rewards/chosen` and `rewards/rejected`, the implicit rewards; `rewards/margins`, their difference;
`rewards/accuracies`, 1 where the chosen one's is higher, ½ in a tie (as at the first step, where policy and
reference are one).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """DPO (2305.18290, eq. 7), with the label smoothing of its follow-up cDPO (ericmitchell.ai/cdpo.pdf).

        h = β [(log π(y_w) − log π_ref(y_w)) − (log π(y_l) − log π_ref(y_l))]
        L = −(1 − ε) log σ(h) − ε log σ(−h)

    Log-probabilities are *sums*, (B,). label_smoothing ε: the share of labels believed to be the wrong way
    round.
    """
    chosen, rejected = chosen_logp - ref_chosen_logp.detach(), rejected_logp - ref_rejected_logp.detach()
    h = beta * (chosen - rejected)
    losses = -(1 - label_smoothing) * logsigmoid(h) - label_smoothing * logsigmoid(-h)
    return losses, _metrics(beta * chosen, beta * rejected)


def robust_dpo(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Robust DPO (2403.00409): unbiased when a share ε of the labels is flipped at random.

        L = [−(1 − ε) log σ(h) + ε log σ(−h)] / (1 − 2ε)        h as in `dpo`

    Log-probabilities are *sums*, (B,). Raises ValueError unless 0 ≤ ε < ½.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing must be in [0, 0.5), not {label_smoothing}: at ½ labels say nothing"
        )
    chosen, rejected = chosen_logp - ref_chosen_logp.detach(), rejected_logp - ref_rejected_logp.detach()
    h = beta * (chosen - rejected)
    flipped = -(1 - label_smoothing) * logsigmoid(h) + label_smoothing * logsigmoid(-h)
    return flipped / (1 - 2 * label_smoothing), _metrics(beta * chosen, beta * rejected)


def ipo(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float = 0.1,
) -> tuple[Tensor, dict[str, Tensor]]:
    """IPO (2310.12036, eq. 17), whose τ is β here.

        L = [(log π(y_w) − log π_ref(y_w)) − (log π(y_l) − log π_ref(y_l)) − 1/(2β)]²

    Log-probabilities are *averages* over the completion's tokens, (B,): with sums the fixed target 1/(2β)
    would mean less and less the longer the completions (huggingface/trl#1265).
    """
    chosen, rejected = chosen_logp - ref_chosen_logp.detach(), rejected_logp - ref_rejected_logp.detach()
    return (chosen - rejected - 1 / (2 * beta)).square(), _metrics(beta * chosen, beta * rejected)


def kto(
    logp: Tensor,
    ref_logp: Tensor,
    label: Tensor,
    kl: Tensor | float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """KTO (2402.01306): completions with a thumb up or down, not pairs.

        r = log π(y) − log π_ref(y)        z₀ = max(0, KL)
        L = λ_D [1 − σ(β(r − z₀))] where desirable,  λ_U [1 − σ(β(z₀ − r))] where not

    Log-probabilities are *sums*, (B,). label: (B,) bool, True for desirable. kl: one number in nats, the
    estimate of KL(π ‖ π_ref) that serves as the reference point: the mean of log π − log π_ref over
    completions paired with *other* prompts (never with their own), over the whole optimiser step. It is a
    constant; a negative estimate counts as 0.

    The only metric is `rewards`, β r, (B,).
    """
    r = logp - ref_logp.detach()
    reference = torch.as_tensor(kl, dtype=r.dtype, device=r.device).detach().clamp(min=0)
    desirable = desirable_weight * torch.sigmoid(-beta * (r - reference))  # 1 − σ(x) = σ(−x)
    undesirable = undesirable_weight * torch.sigmoid(-beta * (reference - r))
    return torch.where(label, desirable, undesirable), {"rewards": (beta * r).detach()}


def orpo(chosen_logp: Tensor, rejected_logp: Tensor, beta: float = 0.1) -> tuple[Tensor, dict[str, Tensor]]:
    """ORPO (2403.07691, eqs. 6 and 7), whose λ is β here; without a reference.

        L = −log P(y_w) − β log σ(log odds(y_w) − log odds(y_l))        odds = P / (1 − P)

    Log-probabilities are *averages* over the completion's tokens, (B,); P is their exponential. The first
    term is supervised fine-tuning on the chosen completion. Further metrics: `nll`, the first term;
    `log_odds_ratio`.
    """
    ratio = _log_odds(chosen_logp) - _log_odds(rejected_logp)
    losses = -chosen_logp - beta * logsigmoid(ratio)
    metrics = _metrics(beta * chosen_logp, beta * rejected_logp)
    return losses, {**metrics, "nll": -chosen_logp.detach(), "log_odds_ratio": ratio.detach()}


def simpo(
    chosen_logp: Tensor, rejected_logp: Tensor, beta: float = 2.0, gamma: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """SimPO (2405.14734, eq. 6): without a reference, and with a target margin γ in units of reward.

        L = −log σ(β log P(y_w) − β log P(y_l) − γ)

    Log-probabilities are *averages* over the completion's tokens, (B,).
    """
    losses = -logsigmoid(beta * (chosen_logp - rejected_logp) - gamma)
    return losses, _metrics(beta * chosen_logp, beta * rejected_logp)


def _metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    chosen, rejected = chosen.detach(), rejected.detach()
    margins = chosen - rejected
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": margins,
        "rewards/accuracies": (torch.sign(margins) + 1) / 2,
    }


def _log_odds(logp: Tensor) -> Tensor:
    """log(P / (1 − P)) from log P, accurate at both ends; P = 1 counts as the largest float below it."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    near_one = logp > -math.log(2)
    above, below = torch.where(near_one, logp, -1.0), torch.where(near_one, -1.0, logp)
    return logp - torch.where(near_one, torch.log(-torch.expm1(above)), torch.log1p(-torch.exp(below)))
