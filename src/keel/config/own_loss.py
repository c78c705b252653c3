"""On-policy stages with a loss of their own, in the place of a policy loss with advantages.

The loop and the rollouts are those of PPO and GRPO. The settings of a policy loss and of its advantages are
no settings here: each is a constant of the class, which takes its field away, so that giving one is an
unknown key and a page of settings does not show it.
"""

from __future__ import annotations

from typing import Any, ClassVar

from keel.config import methods
from keel.config.on_policy import OnPolicy
from keel.errors import UsageError


class OwnLoss(OnPolicy):
    """What they have in common."""

    policy_loss: ClassVar[str] = "clipped"  # pyright: ignore[reportIncompatibleVariableOverride]
    policy_loss_args: ClassVar[dict[str, Any]] = {}  # pyright: ignore[reportIncompatibleVariableOverride]
    advantage: ClassVar[str | None] = None  # pyright: ignore[reportIncompatibleVariableOverride]
    advantage_args: ClassVar[dict[str, Any]] = {}  # pyright: ignore[reportIncompatibleVariableOverride]
    dual_clip: ClassVar[float | None] = None  # pyright: ignore[reportIncompatibleVariableOverride]
    importance_cap: ClassVar[float | None] = None  # pyright: ignore[reportIncompatibleVariableOverride]
    importance_mode: ClassVar[str] = "token_truncate"  # pyright: ignore[reportIncompatibleVariableOverride]
    entropy_coef: ClassVar[float] = 0.0  # pyright: ignore[reportIncompatibleVariableOverride]

    def _check_methods(self) -> None:
        """ValueError where the engine cannot be what is named."""
        try:
            methods.engine(self.engine, self.engine_args)
        except UsageError as error:
            raise ValueError(str(error)) from None
