"""Settings of an `online_dpo` stage."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from keel.config.on_policy import KLConfig
from keel.config.own_loss import OwnLoss

PairLoss = Literal["sigmoid", "ipo"]


class OnlineDPOConfig(OwnLoss):
    """Direct preference optimisation on the policy's own pairs (2402.04792): of its replies to a prompt, a
    reward says which is better."""

    kind: Literal["online_dpo"] = Field(description="Preference optimisation on the policy's own pairs.")
    samples_per_prompt: int = Field(
        2, ge=2, description="Replies sampled to each prompt; the best and the worst are a pair."
    )
    loss: PairLoss = Field("sigmoid", description="The loss of a pair, as in `dpo`.")
    beta: float = Field(0.1, gt=0, description="β: how strongly the policy is held to the reference.")

    weighs_samples = False
    # Each batch is learned from in one gradient step, while it is the policy's own.
    epochs: ClassVar[int] = 1  # pyright: ignore[reportIncompatibleVariableOverride]
    mini_batch: ClassVar[int | None] = None  # pyright: ignore[reportIncompatibleVariableOverride]
    desired_kl: ClassVar[float | None] = None  # pyright: ignore[reportIncompatibleVariableOverride]
    max_approx_kl: ClassVar[float | None] = None  # pyright: ignore[reportIncompatibleVariableOverride]
    kl: ClassVar[Any] = property(lambda self: KLConfig.model_validate({"coef": self.beta}))

    @model_validator(mode="after")
    def _sound(self) -> OnlineDPOConfig:
        if self.shaping.center != "none":
            raise ValueError(
                "`shaping.center` has no effect here: replies to one prompt are compared with each other"
            )
        if any(term.kind == "environment" and term.at == "turn" for term in self.reward):
            raise ValueError("`at: turn` has no effect where whole episodes are compared")
        return self
