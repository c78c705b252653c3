"""What the papers of critic-free policy optimisation set, for `preset` of GRPO."""

from __future__ import annotations

from typing import Any

# What the papers set. `reduce: max_new_tokens` stands for that number; `steps` is the gradient steps that a
# batch is cut into, where a method is about ratios and these would all be 1 in a single step. Where a paper
# leaves a setting open, it is left.
AS_IT_COMES = {
    "clip": None,
    "missing_stop_penalty": 0.0,
}  # none of them clips or punishes a reward by itself
PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {  # 2402.03300
        "baseline": "group",
        "scale": "group",
        "reduce": "sequence",
        "kl": {"coef": 0.04, "estimator": "k3", "where": "loss"},
    },
    "dr_grpo": {  # 2503.20783: no division by the group's deviation or by a response's own length; no KL
        "baseline": "group",
        "scale": "none",
        "reduce": "max_new_tokens",
        "kl": {"coef": 0.0},
    },
    # 2503.14476: clip-higher, token-level loss, dynamic sampling, overlong shaping; no KL; 16 steps a batch
    "dapo": {
        "baseline": "group",
        "scale": "group",
        "reduce": "token",
        "clip_low": 0.2,
        "clip_high": 0.28,
        "resample": 10,
        "kl": {"coef": 0.0},
        "overlong": True,
        "steps": 16,
    },
    "rloo": {  # 2402.14740: the whole response is one action, the KL is part of its reward
        "baseline": "leave_one_out",
        "scale": "none",
        "reduce": "max_new_tokens",
        "epochs": 1,
        "kl": {"coef": 0.05, "estimator": "k1", "where": "reward"},
    },
    # 2501.03262: no group; the KL in each token's reward; advantages whitened over the whole batch
    "reinforce++": {
        "baseline": "none",
        "scale": "batch",
        "reduce": "token",
        "samples_per_prompt": 1,
        "kl": {"coef": 0.01, "estimator": "k1", "where": "reward"},
    },
    "gspo": {  # 2507.18071: one ratio a response; 4 steps a batch
        "baseline": "group",
        "scale": "group",
        "level": "sequence",
        "reduce": "sequence",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "kl": {"coef": 0.0},
        "steps": 4,
    },
    "cispo": {  # 2506.13585: the weight is clipped, never the gradient; no lower bound; 16 steps a batch
        "baseline": "group",
        "scale": "group",
        "policy_loss": "cispo",
        "reduce": "token",
        "clip_low": 1.0,
        "clip_high": 4.0,
        "kl": {"coef": 0.0},
        "steps": 16,
    },
}


def whole_kl(given: dict[str, Any] | None, form: dict[str, Any]) -> dict[str, Any]:
    """A KL term of which a part is given: the rest is that of `form`, so that a new coefficient is not
    another method."""
    if given is None:
        return form
    if given.get("coef") == 0 and given.get("target") is None:
        return given
    rest = (
        {"estimator": "k3", "where": "loss"} | form
        if form.get("coef")
        else {"estimator": "k3", "where": "loss"}
    )
    if given.get("where", rest["where"]) != rest["where"]:
        del rest["estimator"]  # which estimator is right depends on where it is used
    return rest | given
