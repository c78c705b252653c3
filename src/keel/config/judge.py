"""Settings of a language model as judge: of a reward (`kind: judge`), and of an annotator of `collect`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from keel.config.addresses import plain_address
from keel.config.rubric import RUBRIC, CriterionConfig, check_rubric
from keel.config.settings import LONGEST_PATH, Settings


class BudgetConfig(Settings):
    """What a judge may cost in one stage, over all attempts at the run."""

    calls: int | None = Field(None, ge=1, description="Requests, those that brought nothing included.")
    tokens: int | None = Field(
        None,
        ge=1,
        description=(
            "Tokens of questions and answers, as the server counts them (else a quarter of the characters). "
            "The requests under way when it is spent are still paid for."
        ),
    )


class JudgeSettings(Settings):
    """A language model, where it is, and what it judges by."""

    # where a model answers, and how patiently it is asked, is no part of what it says
    idle: ClassVar[frozenset[str]] = frozenset(
        {"address", "api_key_env", "concurrency", "timeout", "tries", "budget"}
    )

    model: str = Field(
        min_length=1,
        max_length=LONGEST_PATH,
        description="Its name at `address`; without one, a stage, a path or a hub id, run by keel's engine.",
    )
    address: str | None = Field(
        None,
        description=(
            "Where it answers OpenAI's chat completions, up to /v1: http://localhost:8000/v1 (vLLM, Ollama, "
            "llama.cpp and most providers). null: the model runs in keel's own process."
        ),
    )
    api_key_env: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="The environment variable that holds the key. The key itself is written nowhere.",
    )
    rubric: str | list[CriterionConfig] = Field(
        RUBRIC, min_length=1, description="What it judges by: a text, or criteria with weights."
    )
    reasons: bool = Field(
        True, description="It says why in a sentence or two before its verdict: better, and more tokens."
    )
    both_orders: bool = Field(
        True,
        description=(
            "Pairs and rankings are asked in both orders: twice the requests, no gain by position, and what "
            "the order alone decides is measured. false: one order, which the texts decide."
        ),
    )
    temperature: float | None = Field(
        0.0, ge=0, le=2, description="Of the answer; null: the server's own, for models that take no other."
    )
    max_new_tokens: int = Field(1024, ge=8, description="Tokens of an answer, its thoughts included.")
    on_failure: Literal["error", "none"] = Field(
        "error",
        description=(
            "Where no usable answer comes: an error that names the sample, or none (what the judge gave "
            "others, their mean, counts for the sample; the annotator did not vote)."
        ),
    )
    tries: int = Field(
        6,
        ge=1,
        description=(
            "Requests for one answer, with pauses that double from 1 s to 60 s between them; a server's "
            "Retry-After is honoured."
        ),
    )
    timeout: float = Field(
        120.0, gt=0, allow_inf_nan=False, description="Seconds that one request may take, to its end."
    )
    concurrency: int = Field(
        8, ge=1, le=1024, description="Requests at the same time, on several ranks of all together."
    )
    budget: BudgetConfig = Field(
        default_factory=lambda: BudgetConfig.model_validate({}),
        description=(
            "What it may cost; null in both: any number. A run whose budget is spent ends with a checkpoint, "
            "and goes on with a larger one."
        ),
    )

    @field_validator("address", mode="after")
    @classmethod
    def _plain_address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        return plain_address(value, "http://localhost:8000/v1", "/chat/completions")

    @model_validator(mode="after")
    def _sound_judge(self) -> JudgeSettings:
        check_rubric(self.rubric)
        if self.address is None:
            remote = sorted(type(self).idle - {"address"})
            if idle := next((name for name in remote if self.changes(name)), None):
                raise ValueError(
                    f"`{idle}` has no effect without `address`: the model runs in keel's process"
                )
        return self

    @property
    def in_process(self) -> bool:
        """Whether the model runs in keel's own process."""
        return self.address is None


class AnnotatorJudge(JudgeSettings):
    """A language model that compares replies beside people."""

    name: str | None = Field(
        None, min_length=1, description="Its name among the annotators; null: from the model."
    )

    @property
    def log_name(self) -> str:
        """Its name among the annotators."""
        return self.name or self.model.rstrip("/").rpartition("/")[2]


class JudgeEntry(Settings):
    """One entry of `annotators`."""

    judge: AnnotatorJudge = Field(description="A language model.")
