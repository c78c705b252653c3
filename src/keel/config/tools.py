"""Settings of episodes with tools."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from keel.config.rewards import EnvironmentTerm
from keel.config.stage import Stage

WORLD = "world:"  # before the name of an environment of keel's own
_IDLE = ("max_turns", "tool_timeout", "on_tool_error")


class WithTools(Stage):
    """What a stage has whose model may call tools while it samples."""

    pays_turns: ClassVar[bool] = False  # a reward may be paid at the end of each turn

    tools: list[Annotated[str, Field(min_length=1)]] = Field(
        [],
        description=(
            "Functions that the model may call while it samples: module.function, or "
            "path/to/file.py:function. Type hints and docstring make the schema that its chat template shows."
        ),
    )
    environment: str | None = Field(
        None,
        min_length=1,
        description=(
            "A class (module.Class, path/to/file.py:Class) with `reset` and methods that the model may call, "
            "as TRL's `environment_factory` takes it; or world:NAME. One object an episode."
        ),
    )
    max_turns: int = Field(
        8,
        ge=1,
        description="Turns of the model in an episode; what the last one calls is not run.",
    )
    tool_timeout: float = Field(
        30.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds that a call of a tool, of `reset` or of `get_reward` may take.",
    )
    on_tool_error: Literal["show", "end"] = Field(
        "show",
        description=(
            "What a call does that raises, takes too long, names no tool or cannot be read: show its error "
            "to the model, which goes on; or end the episode."
        ),
    )

    def tool_code(self) -> list[str]:
        named = [*self.tools, self.environment or ""]
        return [name for name in named if name and not name.startswith(WORLD)]

    @property
    def uses_tools(self) -> bool:
        """Whether its model may call tools."""
        return bool(self.tools) or self.environment is not None

    @model_validator(mode="after")
    def _sound_tools(self) -> WithTools:
        if len(set(self.tools)) < len(self.tools):
            raise ValueError("`tools` names a function twice")
        idle = [name for name in _IDLE if self.changes(name)]
        if idle and not self.uses_tools:
            raise ValueError(f"`{idle[0]}` has no effect without `tools` or `environment`")
        terms = getattr(self, "reward", None) or []
        by_turn = any(isinstance(term, EnvironmentTerm) and term.at == "turn" for term in terms)
        if by_turn and not self.pays_turns:
            raise ValueError(
                f"`at: turn` of the environment's reward has no effect in {self.kind}, which judges whole "
                "episodes"
            )
        return self
