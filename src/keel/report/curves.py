"""Which metrics of each kind of stage are drawn over its steps, in reading order."""

from __future__ import annotations

from typing import NamedTuple


class Curve(NamedTuple):
    """One picture of a stage: a metric over steps, and the same on held-out rows where that is logged."""

    title: str
    unit: str
    metric: str
    held_out: str = ""
    wide: bool = False
    level: float | None = None  # a line to compare with
    level_label: str = ""
    smooth: bool = True  # False for what is set, not measured: a mean would only blur it
    setting: str = ""  # drawn only where this setting of the stage is on


_OPTIMISER = (
    Curve("Gradient norm", "before clipping", "grad_norm"),
    Curve("Learning rate", "", "learning_rate", smooth=False),
)
_LANGUAGE = (
    Curve("Loss", "nats per token", "loss", "eval_loss"),
    Curve("Token accuracy", "share of tokens", "mean_token_accuracy", "eval_mean_token_accuracy"),
    *_OPTIMISER,
)
_SAMPLED = (
    Curve("Score", "of the rewards", "objective/scores", "eval/objective/scores", wide=True),
    Curve("KL from the reference", "nats per reply", "objective/kl", "eval/objective/kl", wide=True),
    Curve("Entropy", "nats per token", "policy/entropy_avg"),
    Curve("Reply length", "tokens", "rollout/response_length"),
    Curve("Cut-off replies", "share", "rollout/truncated"),
    Curve("KL coefficient", "β", "objective/kl_coef", smooth=False),
    Curve("Clip fraction", "share of tokens", "policy/clipfrac_avg"),
    Curve("KL of one update", "nats per token, at most", "policy/approxkl_max"),
)
# What a stage has not logged is not drawn: a loss of dpo without a reference has no KL.
CURVES: dict[str, tuple[Curve, ...]] = {
    "pretrain": _LANGUAGE,
    "sft": _LANGUAGE,
    "best_of_n": _LANGUAGE,
    "reward": (
        Curve("Loss", "nats per pair", "loss", "eval_loss", level=0.6931, level_label="guessing"),
        Curve("Accuracy", "share of pairs", "accuracy", "eval_accuracy", level=0.5, level_label="guessing"),
        Curve("Margin", "reward units", "margin", "eval_margin"),
        Curve("Gradient norm", "before clipping", "grad_norm"),
    ),
    "classifier": (
        Curve("Loss", "nats per row", "loss", "eval_loss"),
        Curve("Accuracy", "share of rows", "accuracy", "eval_accuracy"),
        *_OPTIMISER,
    ),
    "dpo": (
        Curve("Margin", "implicit reward", "rewards/margins", "eval_rewards/margins", wide=True),
        Curve(
            "Accuracy", "by implicit reward", "rewards/accuracies", "eval_rewards/accuracies", wide=True, level=0.5,
            level_label="guessing",
        ),
        Curve("Loss", "per pair or row", "loss", "eval_loss"),
        Curve("Reward of the chosen", "implicit", "rewards/chosen", "eval_rewards/chosen"),
        Curve("Reward of the rejected", "implicit", "rewards/rejected", "eval_rewards/rejected"),
        Curve("Log-probability of the chosen", "nats per reply", "logps/chosen", "eval_logps/chosen"),
        Curve("Log-probability of the rejected", "nats per reply", "logps/rejected", "eval_logps/rejected"),
        Curve("KL from the reference", "KTO's z₀, nats per reply", "kl", "eval_kl"),
        Curve("Loss of the chosen", "ORPO's first term, nats per token", "nll_loss", "eval_nll_loss"),
        Curve("Log odds", "of ORPO, nats", "log_odds_ratio", "eval_log_odds_ratio"),
        *_OPTIMISER,
    ),
    "ppo": (
        *_SAMPLED,
        Curve("Explained variance", "of returns", "val/explained_variance"),
        Curve("Gradient norm", "before clipping", "grad_norm"),
    ),
    "grpo": (
        *_SAMPLED,
        Curve("Groups of equal rewards", "share, which teaches nothing", "frac_reward_zero_std"),
        Curve("Groups replaced", "by new prompts", "rollout/groups_replaced", setting="resample"),
        Curve("Score as first sampled", "before any group was replaced", "objective/scores_sampled", setting="resample"),
        Curve("Gradient norm", "before clipping", "grad_norm"),
    ),
}  # fmt: skip
