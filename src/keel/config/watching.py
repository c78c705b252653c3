"""Settings of what watches over a run: a judge that nothing is trained on, and what to do about findings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from keel.config.parts import AsSource, DataConfig, as_source
from keel.config.rewards import (
    AsTerms,
    LearnedTerm,
    RewardTerm,
    as_terms,
    check_log_names,
    check_several,
)
from keel.config.settings import Settings
from keel.config.stage import Training


class JudgeConfig(Settings):
    """A reward that nothing is trained on: a world's gold reward, or rewards as in `reward`."""

    gold: str | None = Field(
        None, pattern=r"^world:", description="A world (world:NAME) whose gold reward judges."
    )
    reward: list[RewardTerm] | None = Field(
        None, min_length=1, description="A reward stage, a path, or a list of weighted terms that judge."
    )

    _reward = field_validator("reward", mode="before", json_schema_input_type=AsTerms | None)(
        lambda value: None if value is None else as_terms(value)
    )
    _labels = field_validator("reward", mode="after")(lambda terms: terms and check_log_names(terms))

    @model_validator(mode="after")
    def _one_judge(self) -> JudgeConfig:
        if (self.gold is None) == (self.reward is None):
            raise ValueError("`judge` takes either `gold` or `reward`, one of them")
        check_several(self.reward or [], "a held-out judge")
        return self


OnFinding = Literal["off", "warn", "adjust", "rollback", "stop"]


class ControlConfig(Settings):
    """What a run does about a finding of severity "act" in its own metrics (docs/diagnosis.md lists the
    checks)."""

    on_finding: OnFinding = Field(
        "warn",
        description=(
            "off: look at nothing; warn: say and record it; adjust: also β × 1.5 and learning rate × 0.5, as "
            "the finding asks; rollback: go back to the last healthy weights and go on with both changes; "
            "stop: end the stage with the best weights. With rollback or stop and a `judge`, the stage ends "
            "with the weights that it liked best."
        ),
    )
    attempts: int = Field(
        3,
        ge=1,
        description=(
            "Adjustments, or rollbacks, that a stage may take: after them adjust only warns, and rollback "
            "stops."
        ),
    )
    reward_bound: float | None = Field(
        None,
        allow_inf_nan=False,
        description=(
            "Mean raw reward above which nobody would believe it; null: 8 standard deviations above the "
            "start."
        ),
    )

    @model_validator(mode="after")
    def _sound(self) -> ControlConfig:
        if self.on_finding == "off" and self.reward_bound is not None:
            raise ValueError("`control.reward_bound` has no effect with `control.on_finding: off`")
        if self.on_finding not in ("adjust", "rollback") and self.changes("attempts"):
            raise ValueError(
                f"`control.attempts` has no effect with `control.on_finding: {self.on_finding}`: it counts "
                "adjustments or rollbacks"
            )
        return self

    @property
    def goes_back(self) -> bool:
        """Whether a finding may call for earlier weights, so that snapshots of them are needed."""
        return self.on_finding in ("rollback", "stop")

    @field_validator("on_finding", mode="before", json_schema_input_type=bool | OnFinding)
    @classmethod
    def _off(cls, value: object) -> object:
        return "off" if value is False else value  # what YAML makes of a plain `off`


AsControl = str | bool | ControlConfig  # how they may be written
AsJudge = JudgeConfig | AsTerms | None


def as_control(value: object) -> object:
    """Control with its short form written out: one word is `{on_finding: …}`."""
    return {"on_finding": value} if isinstance(value, str | bool) else value


def as_judge(value: object) -> object:
    """A judge with short forms written out: `world:NAME` is `{gold: …}`; a name, a list or one term is
    `{reward: …}`."""
    if isinstance(value, str) and value.startswith("world:"):
        return {"gold": value}
    plain = isinstance(value, str | list) or (isinstance(value, dict) and "kind" in value)
    return {"reward": value} if plain else value


class Watched(Training):
    """Training that is watched while it runs: evaluations, a judge, and what to do about findings."""

    reward: list[RewardTerm] = Field(
        min_length=1,
        description="What is optimised: a reward stage, python:module.function, or a list of weighted terms.",
    )
    eval_every: int | None = Field(None, ge=1, description="Updates between evaluations on held-out prompts.")
    eval_data: list[DataConfig] | None = Field(None, description="Held-out prompts for `eval_every`.")
    judge: JudgeConfig | None = Field(
        None,
        description=(
            "A reward that nothing is trained on, asked at every `eval_every`: {gold: world:NAME}, or a "
            "reward as in `reward`. On `eval_data`, else on the first 64 training prompts."
        ),
    )
    control: ControlConfig = Field(
        default_factory=lambda: ControlConfig.model_validate({}),
        description=(
            "What the run does about what it finds in its own metrics; one word is short for `on_finding`."
        ),
    )
    patience: int | None = Field(
        None,
        ge=1,
        description=(
            "Stop when this many evaluations in a row bring no better reward minus β·KL, and keep the best "
            "weights."
        ),
    )

    _reward = field_validator("reward", mode="before", json_schema_input_type=AsTerms)(as_terms)
    _labels = field_validator("reward", mode="after")(check_log_names)
    _eval_data = field_validator("eval_data", mode="before", json_schema_input_type=AsSource | None)(
        lambda value: None if value is None else as_source(value)
    )
    _judge = field_validator("judge", mode="before", json_schema_input_type=AsJudge)(as_judge)
    _control = field_validator("control", mode="before", json_schema_input_type=AsControl)(as_control)

    @model_validator(mode="after")
    def _sound_watch(self) -> Watched:
        if self.judge is not None and self.eval_every is None:
            raise ValueError("`judge` has no effect without `eval_every`, which says when it is asked")
        if (self.eval_every is None) != (self.eval_data is None) and self.judge is None:
            raise ValueError("`eval_every` and `eval_data` work together: give both or neither")
        if self.patience is not None and self.eval_data is None:
            raise ValueError("`patience` has no effect without `eval_every` and `eval_data`")
        if self.eval_data is not None:
            check_several(self.reward, "an evaluation on `eval_data`")
        trained = {term.model for term in self.reward if isinstance(term, LearnedTerm)}
        judges = [t.model for t in (self.judge and self.judge.reward) or [] if isinstance(t, LearnedTerm)]
        if same := next((model for model in judges if model in trained), None):
            raise ValueError(f"`judge` {same!r} is what is trained on: a judge must be another reward")
        return self
