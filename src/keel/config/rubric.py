"""What replies are judged by, and comparisons and rated replies as questions about it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from keel.config.settings import Settings

RUBRIC = (
    "Is the reply right, does it do what was asked for, and is it honest about what it does not know? A "
    "reply that is longer than it needs to be is worse."
)


class CriterionConfig(Settings):
    """One thing that a judge judges by."""

    name: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,39}$", description="Its name in the answer.")
    weight: float = Field(1.0, gt=0, allow_inf_nan=False, description="Its part in the score.")
    description: str = Field("", description="What it means, in the words that the judge reads.")


def check_rubric(rubric: str | list[CriterionConfig]) -> None:
    """ValueError for one that says nothing, and for two criteria of one name."""
    if isinstance(rubric, str):
        if not rubric.strip():
            raise ValueError("`rubric` is blank: say what to judge by")
        return
    names = [one.name for one in rubric]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"`rubric` has two criteria {twice!r}")


def check_scale(scale: tuple[int, int]) -> None:
    """ValueError for one whose ends are not in order."""
    if scale[0] >= scale[1]:
        raise ValueError(f"`scale` {list(scale)}: the second end must be above the first")


class VerdictsConfig(Settings):
    """Comparisons, or rated replies, as questions in the words of a judge: which of two replies is better, or
    how good one is."""

    mode: Literal["pairwise", "pointwise"] = Field(
        "pairwise",
        description=(
            "As of the judge that the model will be. pairwise: comparisons become questions which reply is "
            "better; pointwise: rated replies become questions how good the reply is, on `scale`."
        ),
    )
    rubric: str | list[CriterionConfig] = Field(
        RUBRIC, min_length=1, description="What to judge by, as of the judge that the model will be."
    )
    reasons: bool = Field(
        False,
        description=(
            "The question asks for a sentence of reasons before the verdict, as of the judge that the model "
            "will be. Such questions are prompts: the data hold no reasons to learn from."
        ),
    )
    scale: tuple[int, int] = Field(
        (1, 10), description="Ends of the scale that the rows are rated on (pointwise)."
    )

    @model_validator(mode="after")
    def _sound_verdicts(self) -> VerdictsConfig:
        check_rubric(self.rubric)
        check_scale(self.scale)
        if self.mode != "pointwise" and self.changes("scale"):
            raise ValueError(f"`scale` has no effect with `mode: {self.mode}`")
        return self
