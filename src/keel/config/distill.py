"""Settings of a `distill` stage."""

from __future__ import annotations

from operator import attrgetter
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from keel.config.on_policy import KLConfig, ShapingConfig
from keel.config.own_loss import OwnLoss
from keel.config.parts import AsSource, DataConfig, Quantize, as_source
from keel.config.rewards import RewardTerm
from keel.config.settings import Settings
from keel.config.stage import DataSetting


class DemonstrationsConfig(Settings):
    """Replies that stand in the data, learned from beside the student's own."""

    data: list[DataConfig] = Field(min_length=1, description="Rows of prompt and completion.")
    share: float = Field(
        0.5,
        gt=0,
        lt=1,
        description=(
            "Share of the replies of an update that come from here: 1 − λ of GKD (2306.13649). `batch_size` "
            "counts the student's own."
        ),
    )
    _data = field_validator("data", mode="before", json_schema_input_type=AsSource)(as_source)


class DistillConfig(OwnLoss):
    """On-policy distillation (GKD, 2306.13649): the student samples, and a teacher says of each position what
    it would have said there."""

    imitates, weighs_samples = True, False

    kind: Literal["distill"] = Field(description="On-policy distillation.")
    teacher: str = Field(description="The model to imitate: a stage, a path or a hub id.")
    teacher_dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = Field(
        None, description="Precision of the teacher, as in `model.dtype`; null: the student's."
    )
    teacher_quantize: Quantize = Field(
        None, description="Hold the teacher in 8 or 4 bit, as in `model.quantize`."
    )
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = Field(
        "reverse_kl",
        description=(
            "What is brought down at each position, of the student's distribution π and the teacher's p: "
            "KL(π ‖ p), which keeps the student to what the teacher would say; KL(p ‖ π), which has it cover "
            "all of that; or the generalised Jensen–Shannon divergence between them."
        ),
    )
    beta: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="β of `jsd`: β KL(p ‖ M) + (1 − β) KL(π ‖ M) with M = β p + (1 − β) π.",
    )
    top_k: int | None = Field(
        None,
        ge=1,
        description=(
            "Tell only the teacher's k likeliest tokens of each position apart, and take all others as one: "
            "a lower bound of the divergence. null: the whole vocabulary."
        ),
    )
    demonstrations: DemonstrationsConfig | None = Field(
        None, description="Replies of the data in every update, beside the student's own."
    )
    reward: list[RewardTerm] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        [],
        description="Rewards that are logged of the student's replies. Nothing is trained on them.",
    )
    epochs: int = Field(1, ge=1, description="Passes over each batch of replies.")

    # The teacher is in the reference's place. The KL from it is what held-out prompts are judged by.
    reference: ClassVar[Any] = property(attrgetter("teacher"))
    reference_dtype: ClassVar[Any] = property(attrgetter("teacher_dtype"))
    reference_quantize: ClassVar[Any] = property(attrgetter("teacher_quantize"))
    kl: ClassVar[KLConfig] = KLConfig.model_validate({"coef": 1.0})  # pyright: ignore[reportIncompatibleVariableOverride]
    shaping: ClassVar[ShapingConfig] = ShapingConfig.model_validate(  # pyright: ignore[reportIncompatibleVariableOverride]
        {"normalize": "none", "clip": None, "missing_stop_penalty": 0.0}
    )
    sharing: ClassVar[str] = "separate"  # pyright: ignore[reportIncompatibleVariableOverride]
    offload: ClassVar[bool] = False  # pyright: ignore[reportIncompatibleVariableOverride]
    old_logp: ClassVar[str] = "sampler"  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def interpolation(self) -> float:
        """β as `keel.algorithms.distillation` has it: 0 the forward, 1 the reverse KL."""
        return {"reverse_kl": 1.0, "forward_kl": 0.0, "jsd": self.beta}[self.divergence]

    @property
    def demonstrated(self) -> int:
        """Replies of the data in an update."""
        if self.demonstrations is None:
            return 0
        share = self.demonstrations.share
        return round(self.batch_size * share / (1 - share))

    @model_validator(mode="after")
    def _sound(self) -> DistillConfig:
        if self.divergence != "jsd" and self.changes("beta"):
            raise ValueError(f"`beta` has no effect with `divergence: {self.divergence}`")
        if self.demonstrations is not None and self.demonstrated < 1:
            raise ValueError(
                f"`demonstrations.share` {self.demonstrations.share:g} leaves no reply of the data beside "
                f"`batch_size` {self.batch_size}: raise one of them"
            )
        return self

    def _check_frozen_models(self) -> None:
        """ValueError for settings of the teacher that contradict each other."""
        if self.teacher_quantize is not None and self.teacher_dtype in ("auto", "float32"):
            raise ValueError(
                "`teacher_quantize` needs a `teacher_dtype` of 16 bit for what is not quantised, not "
                f"{self.teacher_dtype}"
            )

    def references(self) -> list[tuple[str, str]]:
        named = super().references()
        return [("teacher" if setting == "reference" else setting, source) for setting, source in named]

    def other_data(self) -> list[DataSetting]:
        taught = self.demonstrations
        if taught is None:
            return super().other_data()
        return [*super().other_data(), ([source.plain() for source in taught.data], ("demonstration",))]
