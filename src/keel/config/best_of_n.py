"""Settings of best-of-n sampling."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from keel.config.parts import FilteredSamplingConfig, SamplingConfig
from keel.config.rewards import (
    AsTerms,
    RewardTerm,
    as_terms,
    check_log_names,
    check_source_filters,
    models_of,
)
from keel.config.sampler import SamplerConfig
from keel.config.stage import Supervised
from keel.config.tools import WithTools


class BestOfNConfig(WithTools, Supervised):
    """Sample, score, keep the best as demonstrations, and fine-tune on them (rejection sampling, 2112.09332,
    2307.09288)."""

    record_types = ("prompt",)

    kind: Literal["best_of_n"] = Field(description="Best-of-n sampling, then supervised fine-tuning.")
    reward: list[RewardTerm] = Field(
        min_length=1, description="What decides which is best: a reward stage, or a list of weighted terms."
    )
    samples_per_prompt: int = Field(8, ge=2, description="n: responses sampled for each prompt.")
    min_reward: float | None = Field(
        None,
        description="Keep the best of a prompt only if its reward is at least this (rejection sampling).",
    )
    sampling: FilteredSamplingConfig = Field(
        default_factory=lambda: FilteredSamplingConfig.model_validate({}),
        description="How responses are drawn.",
    )
    rollout: SamplerConfig = Field(
        default_factory=lambda: SamplerConfig.model_validate({}),
        description="What samples: keel's own engine, or a vLLM server.",
    )
    lr: float = Field(2e-5, gt=0, description="Peak learning rate (AdamW).")

    _reward = field_validator("reward", mode="before", json_schema_input_type=AsTerms)(as_terms)
    _labels = field_validator("reward", mode="after")(check_log_names)

    @model_validator(mode="after")
    def _sound(self) -> BestOfNConfig:
        if self.sampling.temperature == 0:
            raise ValueError("`sampling.temperature` 0 (greedy) draws the same response n times")
        if self.model.init is not None:
            raise ValueError(
                "best_of_n starts from a trained model: give `model` as a stage, a path or a hub id"
            )
        check_source_filters(self.reward, self.data, "`data`")
        if self.changes("group"):
            raise ValueError("`group` has no effect here: best responses are held out by their prompts")
        if self.eval_data is not None:
            raise ValueError(
                "`eval_data` has no effect here: `holdout` keeps some of the best responses out of training"
            )
        return self

    @property
    def replies(self) -> SamplingConfig | None:
        return self.sampling

    def references(self) -> list[tuple[str, str]]:
        """As of `Stage`: the model to train, and the rewards' models."""
        return [*super().references(), *models_of(self.reward)]
