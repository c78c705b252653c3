"""Settings of episodes that a stage learns from, update by update."""

from __future__ import annotations

from pydantic import model_validator

from keel.config.rewards import EnvironmentTerm
from keel.config.tools import WithTools
from keel.config.watching import Watched


class ToolUse(WithTools, Watched):
    """As `WithTools`, of a stage that learns from its own samples, update by update."""

    pays_turns = True

    @model_validator(mode="after")
    def _sound_turns(self) -> ToolUse:
        by_turn = any(isinstance(term, EnvironmentTerm) and term.at == "turn" for term in self.reward)
        shaping = getattr(self, "shaping", None)
        if by_turn and shaping is not None and shaping.normalize == "running":
            raise ValueError(
                "`at: turn` of the environment's reward does not go with `shaping.normalize: running`, which "
                "rescales whole episodes"
            )
        return self
