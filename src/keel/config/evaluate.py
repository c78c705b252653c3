"""Settings of `evaluate`: models side by side on the same prompts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from keel.config.parts import AsSource, DataConfig, FilteredSamplingConfig, SamplingConfig, as_source
from keel.config.rewards import (
    AsTerms,
    RewardTerm,
    as_terms,
    check_log_names,
    check_several,
    check_source_filters,
    models_of,
)
from keel.config.sampler import SamplerConfig
from keel.config.stage import DataSetting
from keel.config.tools import WithTools


class EvaluateConfig(WithTools):
    """Compare models on the same prompts."""

    record_types = ("prompt",)

    kind: Literal["evaluate"] = Field(description="Models side by side on the same prompts.")
    models: list[str] = Field(min_length=1, description="Models to compare: stages, paths or hub ids.")
    reference: str | None = Field(
        None, description="The model that KL and win rate are measured against; null: the first of `models`."
    )
    reward: list[RewardTerm] | None = Field(
        None,
        description="A reward stage, or a list of weighted terms: measures `proxy`, each term by its name, "
        "and, with `comparisons`, the accuracy of the reward model.",
    )
    best_of: list[int] = Field(
        [],
        description="For each n here, also the best by `reward` of n samples of the reference: what any "
        "training must beat.",
    )
    gold: str | None = Field(
        None, description="A world (world:NAME) whose gold reward judges the completions."
    )
    data: list[DataConfig] = Field(min_length=1, description="Prompts.")
    comparisons: list[DataConfig] | None = Field(
        None, description="Pairs to judge the reward model on: accuracy, calibration, what it is drawn to."
    )
    subset: str | None = Field(
        None,
        description="A column of `comparisons` with a kind of pair: accuracy is given for each kind too.",
    )
    position: str | None = Field(
        None,
        description="A column of `comparisons` that says which side stood first when people voted, chosen "
        "or rejected: measures what position does to votes and reward.",
    )
    sampling: FilteredSamplingConfig = Field(
        default_factory=lambda: FilteredSamplingConfig.model_validate({}),
        description="How completions are drawn.",
    )
    rollout: SamplerConfig = Field(
        default_factory=lambda: SamplerConfig.model_validate({}),
        description="What samples: keel's own engine, or a vLLM server.",
    )
    too_long: Literal["error", "skip", "truncate"] = Field(
        "error",
        description="What to do with a prompt that leaves no room for max_new_tokens in a model's context. "
        "Truncation cuts its start; both are counted.",
    )
    batch_size: int = Field(64, ge=1, description="Sequences in one forward. Changes memory, not results.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Precision of all models, as in `model.dtype` of other stages."
    )

    trust_remote_code: bool = Field(
        False,
        description="Run Python that comes with the models and the rewards' models. Off unless you trust "
        "its authors.",
    )

    _reward = field_validator("reward", mode="before", json_schema_input_type=AsTerms | None)(
        lambda value: None if value is None else as_terms(value)
    )
    _labels = field_validator("reward", mode="after")(
        lambda terms: None if terms is None else check_log_names(terms)
    )
    _data = field_validator("data", mode="before", json_schema_input_type=AsSource)(as_source)
    _comparisons = field_validator("comparisons", mode="before", json_schema_input_type=AsSource | None)(
        lambda value: None if value is None else as_source(value)
    )

    @model_validator(mode="after")
    def _sound(self) -> EvaluateConfig:
        check_source_filters(self.reward or [], self.data, "`data`")
        check_several(self.reward or [], "an evaluation")
        learned = [term for term in self.reward or [] if term.kind == "learned"]
        if self.comparisons is not None and len(learned) != 1:
            raise ValueError("`comparisons` has no effect without one reward model in `reward`")
        for name in ("subset", "position"):
            if self.changes(name) and self.comparisons is None:
                raise ValueError(f"`{name}` names a column of `comparisons`, and there are none")
        if self.best_of and not self.reward:
            raise ValueError("`best_of` needs a `reward` to choose the best by")
        if self.best_of and self.sampling.temperature == 0:
            raise ValueError("`best_of` with `sampling.temperature` 0 (greedy) draws the same reply n times")
        if any(n < 2 for n in self.best_of) or len(set(self.best_of)) < len(self.best_of):
            raise ValueError(f"`best_of` {self.best_of}: different numbers of 2 or more")
        if self.reference is not None and self.reference not in self.models:
            raise ValueError(f"`reference` {self.reference!r} is not one of `models`")
        twice = [name for name in self.models if self.models.count(name) > 1]
        if twice:
            raise ValueError(f"`models` names {twice[0]!r} twice")
        return self

    def references(self) -> list[tuple[str, str]]:
        return [*(("models", name) for name in self.models), *models_of(self.reward or [])]

    @property
    def replies(self) -> SamplingConfig | None:
        return self.sampling

    def other_data(self) -> list[DataSetting]:
        return [self._plain("comparisons", ("preference",))] if self.comparisons else []

    def gold_judges(self) -> list[tuple[str, DataSetting]]:
        return [(self.gold, self.main_data()[0])] if self.gold else []
