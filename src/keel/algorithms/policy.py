"""The clipped policy loss of PPO, and its kin: dual clip, asymmetric clip, GSPO, and every normalisation.

`LOSSES` are what a config's `policy_loss` may name. To add one, write a function as `PolicyLoss` says and put
it there; or leave it in a package of your own (docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from keel.algorithms.masked import Reduction, keep, masked_mean, reduced

MAX_LOG_RATIO = 20.0  # e^20 ≈ 5e8; beyond it a float32 product overflows, and 0 · inf makes the gradient NaN

ImportanceMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

PolicyLoss = Callable[..., tuple[Tensor, Mapping[str, Tensor]]]
"""`f(logp, old_logp, advantages, mask, *, denominator, ref_logp=None, weights=None, **settings)`
`-> (loss, metrics)`.

logp, old_logp, advantages, mask, ref_logp: (B, T) of a micro-batch. Only logp has a gradient. weights: (B,
T), see `importance_weights`; None without `importance_cap`. denominator: the `keel.algorithms.masked.count`
of the whole optimiser step, by which the loss and the metrics of micro-batches add up. settings: keywords of
the function's own; those that a stage has settings for (clip_low, clip_high, dual_clip, level, reduce) come
from there. Returns a loss of shape () to minimise, and metrics of shape (), detached. A function takes those
keywords that it needs; `denominator` is not left out.
"""


def clipped(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    level: Literal["token", "sequence"] = "token",
    reduce: Reduction = "token",
    denominator: Tensor | float | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate (PPO, 1707.06347, eq. 7), as a loss to minimise.

        ρ = π(a|s) / π_old(a|s)        L = − min(ρ Â, clip(ρ, 1 − ε_low, 1 + ε_high) Â)

    clip_high > clip_low is DAPO's clip-higher (2503.14476). dual_clip c > 1: for Â < 0 the objective is
    bounded below, max(min(…), c Â) (1912.09729). level "sequence": one ratio for each sequence, the
    exponential of the mean over its counted tokens of log π − log π_old (GSPO, 2507.18071), and the gradient
    flows through that mean. reduce: see `keel.algorithms.masked.reduced`; denominator: its `count` over the
    whole optimiser step, with which the losses *and metrics* of micro-batches add up to those of the batch.

    logp, old_logp, mask: (B, T). advantages: (B, T), or (B,) for one a sequence. old_logp, advantages and
    weights are constants. weights: (B, T), see `importance_weights`; they multiply the objective of each
    token. Departure: log ρ is cut off at ± 20 (and has no gradient beyond) so that nothing overflows.

    Returns the loss and, detached and averaged over tokens (over sequences' own means unless reduce is
    "token"):
        clipfrac       share of positions where the clip lowers the objective
        dual_clipfrac  share of positions where the dual clip raises it
        approxkl       ½ (log π − log π_old)², the KL from old to new policy to second order
        approxkl_k3    ρ − 1 − log ρ of the tokens, an unbiased estimate of the same KL
        ratio          ρ
        ratio_var      (ρ − 1)², the variance of ρ about its expectation, which is 1
    Raises ValueError for an unknown level or reduce, or dual_clip ≤ 1.
    """
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be above 1, not {dual_clip}")
    if level not in ("token", "sequence"):
        raise ValueError(f'level must be "token" or "sequence", not {level!r}')
    if advantages.dim() == 1:
        advantages = advantages[:, None].expand(mask.shape)
    advantages = keep(advantages.detach(), mask)
    token_log_ratio = keep(logp, mask) - keep(old_logp.detach(), mask)
    log_ratio = token_log_ratio
    if level == "sequence":
        log_ratio = masked_mean(token_log_ratio, mask, dim=1)[:, None].expand(mask.shape)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()

    unclipped = ratio * advantages
    objective = torch.minimum(unclipped, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    bounded = objective
    if dual_clip is not None:
        bounded = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    weighted = bounded if weights is None else bounded * keep(weights.detach(), mask)
    loss = reduced(-weighted, mask, reduce, denominator)
    flags = {"clipfrac": objective < unclipped, "dual_clipfrac": bounded > objective}
    return loss, _metrics(token_log_ratio, ratio, flags, mask, reduce, denominator)


def cispo(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 1.0,
    clip_high: float = 4.0,
    reduce: Reduction = "token",
    denominator: Tensor | float | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """CISPO (MiniMax-M1, 2506.13585, eq. 4): the importance weight is clipped, and no token loses its
    gradient.

        ρ = π(a|s) / π_old(a|s)        L = − sg[clip(ρ, 1 − ε_low, 1 + ε_high)] Â log π(a|s)

    sg stops the gradient. The paper has no lower bound, which is clip_low 1; it does not say its ε_high.
    Arguments, returns and metrics as `clipped`, without `dual_clipfrac`; `clipfrac` is the share of positions
    whose weight is cut. With ρ inside the clip, the gradient is that of `clipped`.
    """
    if advantages.dim() == 1:
        advantages = advantages[:, None].expand(mask.shape)
    advantages, kept = keep(advantages.detach(), mask), keep(logp, mask)
    log_ratio = kept.detach() - keep(old_logp.detach(), mask)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    per_token = -weight * advantages * kept
    if weights is not None:
        per_token = per_token * keep(weights.detach(), mask)
    loss = reduced(per_token, mask, reduce, denominator)
    return loss, _metrics(log_ratio, ratio, {"clipfrac": weight != ratio}, mask, reduce, denominator)


def importance_weights(
    logp: Tensor, sampler_logp: Tensor, mask: Tensor, cap: float, mode: ImportanceMode = "token_truncate"
) -> Tensor:
    """Truncated importance sampling (Ionides 2008; for RL of language models, Yao et al. 2025, "Your
    efficient RL framework secretly brings you off-policy training"): min(π_trainer(a|s) / π_sampler(a|s),
    cap), (B, T).

    For a sampler whose arithmetic differs from the trainer's though the weights are the same. logp: the
    trainer's, before the first gradient step. mode: the ratio of each token, or of a whole sequence, the
    product over its counted tokens, at all of them; `truncate` lowers a ratio above the cap to it, `mask`
    makes it 0, so that what the trainer finds much likelier than the sampler did leaves the loss.
    Positions that do not count get 1. No gradient. Raises ValueError unless cap > 0, and for another mode.
    """
    if not cap > 0:
        raise ValueError(f"cap must be above 0, not {cap}")
    if mode not in get_args(ImportanceMode):
        raise ValueError(f"mode must be one of {', '.join(get_args(ImportanceMode))}, not {mode!r}")
    log_ratio = keep(logp.detach(), mask) - keep(sampler_logp.detach(), mask)
    if mode.startswith("sequence"):
        log_ratio = log_ratio.sum(dim=-1, keepdim=True).expand(mask.shape)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    capped = ratio.clamp(max=cap) if mode.endswith("truncate") else torch.where(ratio > cap, 0.0, ratio)
    return torch.where(mask, capped, 1.0)


def divergence(
    logp: Tensor, old_logp: Tensor, mask: Tensor, reduce: Reduction, denominator: Tensor | float | None
) -> dict[str, Tensor]:
    """How far π is from π_old: `approxkl`, `approxkl_k3`, `ratio` and `ratio_var` as `clipped` has them.

    logp, old_logp, mask: (B, T). reduce, denominator: as in `clipped`. No gradient. Each value has shape ().
    For losses that do not measure it themselves.
    """
    log_ratio = keep(logp.detach(), mask) - keep(old_logp.detach(), mask)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return _metrics(log_ratio, ratio, {}, mask, reduce, denominator)


def _metrics(
    log_ratio: Tensor,
    ratio: Tensor,
    flags: dict[str, Tensor],
    mask: Tensor,
    reduce: Reduction,
    denominator: Tensor | float | None,
) -> dict[str, Tensor]:
    with torch.no_grad():
        bounded = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        per_token = {
            **flags,
            "approxkl": 0.5 * log_ratio.square(),
            "approxkl_k3": torch.expm1(bounded) - bounded,
            "ratio": ratio,
            "ratio_var": (ratio - 1).square(),
        }
        own: Reduction = "token" if reduce == "token" else "sequence"
        return {name: reduced(x, mask, own, denominator) for name, x in per_token.items()}


LOSSES: Mapping[str, PolicyLoss] = {"clipped": clipped, "cispo": cispo}
