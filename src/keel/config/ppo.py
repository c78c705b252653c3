"""Settings of a `ppo` stage."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from keel.config import methods
from keel.config.on_policy import OnPolicy


class PPOConfig(OnPolicy):
    """Proximal policy optimisation (1707.06347) against a reward under a KL constraint."""

    critic = True

    kind: Literal["ppo"] = Field(description="Proximal policy optimisation.")
    value_lr: float | None = Field(
        None, gt=0, description="Learning rate of the value head (and the critic); null: `lr`."
    )
    sharing: Literal["separate", "trunk", "adapters"] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        "separate",
        description=(
            "The critic: a model of its own (a copy of the starting model), or trunk: a value head on the "
            "policy's hidden states. adapters: one frozen base; policy, critic and reward models (those "
            "that a reward stage trained with `lora` on the same `model`) are adapters with heads on it, "
            "and the reference is the base itself. `lora` is on then."
        ),
    )
    gamma: float = Field(1.0, ge=0, le=1, description="Discount γ.")
    lam: float = Field(0.95, ge=0, le=1, description="λ of generalised advantage estimation (1506.02438).")
    whiten_advantages: bool = Field(
        True, description="Advantages to mean 0 and standard deviation 1 over the batch's response tokens."
    )
    clip: float = Field(0.2, gt=0, description="ε: the ratio counts between 1−ε and 1+ε.")
    value_clip: float = Field(0.2, gt=0, description="The value may move this far from its old one.")
    value_coef: float = Field(0.1, ge=0, description="Weight of the value loss.")
    critic_warmup: int = Field(0, ge=0, description="Updates at the start that train the critic only.")

    def loss_settings(self) -> dict[str, Any]:
        return {"clip_low": self.clip, "clip_high": self.clip, "dual_clip": self.dual_clip, "reduce": "token"}

    def advantage_settings(self) -> dict[str, Any]:
        return {"group_size": self.samples_per_prompt, "gamma": self.gamma, "lam": self.lam}

    @model_validator(mode="after")
    def _sound(self) -> PPOConfig:
        idle = [name for name in ("clip", "value_clip") if self.changes(name)]
        if idle and self.one_step:
            raise ValueError(
                f"`{idle[0]}` has no effect with one gradient step an update (`epochs` 1, no `mini_batch`): "
                "its ratio is 1, its values are the old ones"
            )
        loss = methods.policy_loss(self.policy_loss, self.loss_settings(), self.policy_loss_args)
        clips = {"clip": "clip_high", "dual_clip": "dual_clip"}
        self._refuse_idle(clips, f"policy_loss: {self.policy_loss}", set(loss.keywords))
        if self.advantage is not None:
            estimator = methods.estimator(self.advantage, self.advantage_settings(), self.advantage_args)
            self._refuse_idle(
                {"gamma": "gamma", "lam": "lam"}, f"advantage: {self.advantage}", set(estimator.keywords)
            )
        if self.critic_warmup and self.value_coef == 0:
            raise ValueError("`critic_warmup` has no effect with `value_coef` 0: the critic learns nothing")
        if self.critic_warmup >= self.updates:
            raise ValueError(
                f"`critic_warmup` {self.critic_warmup} leaves none of {self.updates} updates to the policy"
            )
        return self
