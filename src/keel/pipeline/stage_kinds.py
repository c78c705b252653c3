"""The kinds of stages: one entry for each, with all that the other parts of keel ask of a kind.

A new kind is one entry here and one file with its run function (and its config class, in `keel.config` or
beside it). Another package adds one by an entry point of the group `keel.stages`: see docs/extending.md.

What a kind's *settings* say (its data, its rewards, what it leaves for other stages) its config class
answers; see `keel.config.stage.Stage`. What is written here is the rest. Run functions and memory models
stand as "module:function" and are imported when they are first used: the report reads this table and must not
load torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from keel import plugins
from keel.config import (
    BestOfNConfig,
    ClassifierConfig,
    CollectConfig,
    DistillConfig,
    DPOConfig,
    EvaluateConfig,
    GRPOConfig,
    OnlineDPOConfig,
    PPOConfig,
    PretrainConfig,
    RewardConfig,
    SFTConfig,
    Stage,
)
from keel.config.run import plugin_kinds
from keel.errors import UsageError

Target = str | Callable[..., Any]  # a function, or where it stands: "module:function"


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


class KeyNumber(NamedTuple):
    """A number that says what came of a stage, as the report writes it: "held-out loss 1.84"."""

    label: str
    measure: str  # of result.json
    places: int = 2
    unit: str = ""
    interval: bool = False  # with its 95 % interval
    before: str = ""  # a measure that it is compared with: "reward 0.31 → 0.52"
    late: str = ""  # a metric whose last values stand in until there is a result


@dataclass(frozen=True, slots=True)
class StageKind:
    """A kind of stage."""

    name: str  # what a config writes as `kind`
    config: type[Stage]  # its settings, and what they say of data, rewards, models
    run: Target  # f(config, StageRun) → what becomes result.json
    memory: Target | None = (
        None  # f(config, StageModels, Lengths, device) → list[Phase]; None: unknown to a plan
    )
    examples: Target | None = None  # f(config, records) → examples they come to; None: each is one
    savings: tuple[
        tuple[str, Mapping[str, Any]], ...
    ] = ()  # settings of its own that save memory: see card_fit
    curves: tuple[Curve, ...] = ()  # in reading order; without any, each metric is a plain curve
    x_word: str = "step"  # what a curve's x axis counts
    key_numbers: tuple[KeyNumber, ...] = ()  # without any, the first measures of result.json
    has_steps: bool = True  # whether it logs metrics over steps
    compares: bool = False  # whether its result holds models side by side, as `evaluate` writes them
    ranks: tuple[
        str, ...
    ] = ()  # strategies by which several processes work on it: "ddp", "fsdp"; none: the first does, alone

    @property
    def on_policy(self) -> bool:
        """Whether it learns from its own samples, and logs what `keel diagnose` reads."""
        return self.config.on_policy


# ---------------------------------------------------------------- curves that several kinds share

_GRADIENT = Curve("Gradient norm", "before clipping", "grad_norm")
_OPTIMISER = (_GRADIENT, Curve("Learning rate", "", "learning_rate", smooth=False))
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
_HELD_OUT_LOSS = (KeyNumber("held-out loss", "eval_loss"),)
_ACCURACY = (KeyNumber("accuracy", "accuracy", interval=True),)
_SCORE_AND_KL = (
    KeyNumber("score", "scores", late="objective/scores"),
    KeyNumber("KL", "kl", places=1, unit="nats", late="objective/kl"),
)
_REFERENCE_IN_16_BIT = ("last", {"reference_dtype": "bfloat16"})

# ---------------------------------------------------------------- the kinds
# What a stage has not logged is not drawn: a loss of dpo without a reference has no KL.

_OWN_KINDS = (
    StageKind(
        "pretrain",
        PretrainConfig,
        run="keel.stages.pretrain:run",
        ranks=("ddp", "fsdp"),
        memory="keel.plan.stage_memory:language",
        curves=_LANGUAGE,
        key_numbers=_HELD_OUT_LOSS,
    ),
    StageKind(
        "sft",
        SFTConfig,
        run="keel.stages.sft:run",
        ranks=("ddp", "fsdp"),
        memory="keel.plan.stage_memory:language",
        curves=_LANGUAGE,
        key_numbers=_HELD_OUT_LOSS,
    ),
    StageKind(
        "reward",
        RewardConfig,
        run="keel.stages.reward:run",
        ranks=("ddp", "fsdp"),
        memory="keel.plan.stage_memory:reward_model",
        key_numbers=_ACCURACY,
        curves=(
            Curve("Loss", "nats per pair", "loss", "eval_loss", level=0.6931, level_label="guessing"),
            Curve(
                "Accuracy", "share of pairs", "accuracy", "eval_accuracy", level=0.5, level_label="guessing"
            ),
            Curve("Margin", "reward units", "margin", "eval_margin"),
            _GRADIENT,
        ),
    ),
    StageKind(
        "classifier",
        ClassifierConfig,
        run="keel.stages.classifier:run",
        ranks=("ddp", "fsdp"),
        memory="keel.plan.stage_memory:classifier",
        key_numbers=_ACCURACY,
        curves=(
            Curve("Loss", "nats per row", "loss", "eval_loss"),
            Curve("Accuracy", "share of rows", "accuracy", "eval_accuracy"),
            *_OPTIMISER,
        ),
    ),
    StageKind(
        "ppo",
        PPOConfig,
        run="keel.rl.ppo:run",
        ranks=("ddp", "fsdp"),
        memory="keel.plan.stage_memory:on_policy",
        x_word="update",
        savings=(("first", {"sharing": "trunk"}), _REFERENCE_IN_16_BIT, ("last", {"sharing": "adapters"})),
        key_numbers=_SCORE_AND_KL,
        curves=(*_SAMPLED, Curve("Explained variance", "of returns", "val/explained_variance"), _GRADIENT),
    ),
    StageKind(
        "grpo",
        GRPOConfig,
        run="keel.rl.grpo:run",
        ranks=("ddp", "fsdp"),
        memory="keel.plan.stage_memory:on_policy",
        x_word="update",
        savings=(_REFERENCE_IN_16_BIT,),
        key_numbers=_SCORE_AND_KL,
        curves=(
            *_SAMPLED,
            Curve("Groups of equal rewards", "share, which teaches nothing", "frac_reward_zero_std"),
            Curve("Groups replaced", "by new prompts", "rollout/groups_replaced", setting="resample"),
            Curve(
                "Score as first sampled",
                "before any group was replaced",
                "objective/scores_sampled",
                setting="resample",
            ),
            _GRADIENT,
        ),
    ),
    StageKind(
        "online_dpo",
        OnlineDPOConfig,
        run="keel.rl.online_dpo:run",
        ranks=("ddp", "fsdp"),
        memory="keel.plan.stage_memory:on_policy",
        x_word="update",
        savings=(_REFERENCE_IN_16_BIT,),
        key_numbers=_SCORE_AND_KL,
        curves=(
            *_SAMPLED,
            Curve("Margin", "implicit reward", "rewards/margins"),
            Curve("Prompts without a pair", "all rewards equal, share", "frac_reward_zero_std"),
            _GRADIENT,
        ),
    ),
    StageKind(
        "distill",
        DistillConfig,
        run="keel.rl.distill:run",
        ranks=("ddp", "fsdp"),
        memory="keel.plan.stage_memory:distillation",
        x_word="update",
        savings=(("first", {"teacher_dtype": "bfloat16"}), ("first", {"teacher_quantize": "4bit"})),
        key_numbers=(
            KeyNumber("KL from the teacher", "kl", places=1, unit="nats", late="eval/objective/kl"),
        ),
        curves=(
            Curve("Divergence", "from the teacher, nats per token", "loss/policy_avg", wide=True),
            Curve("Reverse KL", "from the teacher, nats per token", "policy/teacher_kl"),
            Curve("Held-out KL", "from the teacher, nats per reply", "eval/objective/kl"),
            Curve("Agreement", "on the likeliest token, share", "policy/teacher_agreement"),
            Curve("Score", "of the rewards, which nothing is trained on", "objective/scores"),
            Curve("Entropy", "nats per token", "policy/entropy_avg"),
            Curve("Entropy of the teacher", "nats per token", "policy/teacher_entropy"),
            Curve("Reply length", "tokens", "rollout/response_length"),
            Curve("Cut-off replies", "share", "rollout/truncated"),
            _GRADIENT,
        ),
    ),
    StageKind(
        "dpo",
        DPOConfig,
        run="keel.stages.preference:run",
        ranks=("ddp", "fsdp"),
        memory="keel.plan.stage_memory:preferences",
        examples="keel.stages.preference_rows:count",
        key_numbers=(
            KeyNumber("held-out accuracy", "accuracy", interval=True),
            KeyNumber("margin", "margin", interval=True),
        ),
        curves=(
            Curve("Margin", "implicit reward", "rewards/margins", "eval_rewards/margins", wide=True),
            Curve(
                "Accuracy",
                "by implicit reward",
                "rewards/accuracies",
                "eval_rewards/accuracies",
                wide=True,
                level=0.5,
                level_label="guessing",
            ),
            Curve("Loss", "per pair or row", "loss", "eval_loss"),
            Curve("Reward of the chosen", "implicit", "rewards/chosen", "eval_rewards/chosen"),
            Curve("Reward of the rejected", "implicit", "rewards/rejected", "eval_rewards/rejected"),
            Curve("Log-probability of the chosen", "nats per reply", "logps/chosen", "eval_logps/chosen"),
            Curve(
                "Log-probability of the rejected", "nats per reply", "logps/rejected", "eval_logps/rejected"
            ),
            Curve("KL from the reference", "KTO's z₀, nats per reply", "kl", "eval_kl"),
            Curve("Loss of the chosen", "ORPO's first term, nats per token", "nll_loss", "eval_nll_loss"),
            Curve("Log odds", "of ORPO, nats", "log_odds_ratio", "eval_log_odds_ratio"),
            *_OPTIMISER,
        ),
    ),
    StageKind(
        "best_of_n",
        BestOfNConfig,
        run="keel.stages.best_of_n:run",
        ranks=("ddp", "fsdp"),
        memory="keel.plan.stage_memory:best_of_n",
        curves=_LANGUAGE,
        key_numbers=(KeyNumber("reward", "reward_best", before="reward_mean"),),
    ),
    StageKind(
        "collect",
        CollectConfig,
        run="keel.stages.collect:run",
        memory="keel.plan.stage_memory:collect",
        key_numbers=(KeyNumber("", "comparisons", places=0, unit="comparisons"),),
        has_steps=False,
    ),
    StageKind(
        "evaluate",
        EvaluateConfig,
        run="keel.stages.evaluate:run",
        ranks=("ddp", "fsdp"),
        memory="keel.plan.stage_memory:evaluate",
        has_steps=False,
        compares=True,
    ),
)
OWN_KINDS: Mapping[str, StageKind] = {kind.name: kind for kind in _OWN_KINDS}
UNKNOWN = StageKind("unknown", Stage, run="")  # how a run is shown whose kind nobody here knows


def kind_of(name: str) -> StageKind:
    """The entry of a kind. UsageError for one that nobody adds, that is keel's own name taken again, or whose
    package is broken."""
    if name not in plugin_kinds() and name in OWN_KINDS:
        return OWN_KINDS[name]
    added = plugins.load("keel.stages", name)
    if not isinstance(added, StageKind):
        raise UsageError(
            f"the kind of stage {name!r} of another package is a {type(added).__name__}, no StageKind"
        )
    if added.name != name:
        raise UsageError(
            f"the kind of stage {name!r} of another package calls itself {added.name!r}: name it alike"
        )
    return added


def shown_as(name: str) -> StageKind:
    """The entry of a kind, for a report; UNKNOWN for a kind whose package is no longer here, or is broken."""
    if name in OWN_KINDS:
        return OWN_KINDS[name]
    try:
        return kind_of(name)
    except UsageError:
        return UNKNOWN


def resolve(target: Target) -> Callable[..., Any]:
    """The function behind an entry's field."""
    if not isinstance(target, str):
        return target
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)
