"""Settings of the stage that learns from comparisons without a reward model: DPO and its kin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from keel.config.stage import Supervised
from keel.types import RecordType

# Where a loss's paper differs from the defaults below. They are filled in, so that the run's config shows
# them.
OF_THE_LOSS: Mapping[str, Mapping[str, float]] = {"simpo": {"beta": 2.0}, "robust": {"label_smoothing": 0.1}}
REFERENCE_FREE = ("orpo", "simpo")
ONLY_FOR: Mapping[str, tuple[str, ...]] = {  # settings that the other losses have no use for
    "label_smoothing": ("sigmoid", "robust"),
    "votes": ("sigmoid",),
    "gamma": ("simpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "reference": ("sigmoid", "robust", "ipo", "kto"),
}


class DPOConfig(Supervised):
    """Preference optimisation: a policy straight from comparisons, by DPO (2305.18290) or one of its kin."""

    kind: Literal["dpo"] = Field(description="Preference optimisation.")
    lr: float = Field(
        1e-6,
        gt=0,
        description=(
            "Peak learning rate (AdamW), as in TRL; adapters and small models want ten times as much or more."
        ),
    )
    loss: Literal["sigmoid", "ipo", "orpo", "kto", "simpo", "robust"] = Field(
        "sigmoid",
        description=(
            "sigmoid: DPO, or cDPO with `label_smoothing`; robust: for labels flipped at random "
            "(2403.00409); ipo (2310.12036); kto (2402.01306), which also reads completions with a label; "
            "orpo (2403.07691) and simpo (2405.14734), without a reference."
        ),
    )
    beta: float = Field(
        0.1,
        gt=0,
        description=(
            "β: how strongly the policy is held to the reference; λ for orpo. 2.0 for simpo unless given."
        ),
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description=(
            "ε: share of labels believed to be the wrong way round, for sigmoid and robust. 0.1 for robust "
            "unless given."
        ),
    )
    gamma: float = Field(1.0, ge=0, description="γ: target margin in units of reward, for simpo.")
    desirable_weight: float = Field(
        1.0, gt=0, description="λ_D: weight of completions with a thumb up, for kto."
    )
    undesirable_weight: float = Field(
        1.0, gt=0, description="λ_U: weight of completions with a thumb down, for kto."
    )
    votes: Literal["hard", "soft"] = Field(
        "hard",
        description=(
            "Labels from several votes: the majority's side, undecided pairs left out; or, for sigmoid, "
            "their share."
        ),
    )
    reference: str | None = Field(
        None, description="The reference policy: a stage, a path or a hub id; null: the model it starts from."
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_loss(cls, values: object) -> object:
        """What is not given, or null, is filled in with the number of the loss's paper."""
        if not isinstance(values, dict):
            return values
        of_paper = OF_THE_LOSS.get(str(values.get("loss")), {})
        given = {
            key: value
            for key, value in values.items()
            if value is not None or key not in ("beta", "label_smoothing")
        }
        return {**of_paper, **given}

    @model_validator(mode="after")
    def _sound(self) -> DPOConfig:
        for name, losses in ONLY_FOR.items():
            if self.changes(name) and self.loss not in losses:
                why = ", which has none" if name == "reference" else f": it is for {' and '.join(losses)}"
                raise ValueError(f"`{name}` has no effect with `loss: {self.loss}`{why}")
        if self.loss == "robust" and self.label_smoothing == 0:
            raise ValueError("`loss: robust` with `label_smoothing` 0 is `loss: sigmoid`: write that")
        if self.lora is not None and self.lora.dropout > 0:
            raise ValueError(
                "`lora.dropout` must be 0 in dpo: log-probabilities are compared, so dropout is off"
            )
        if self.model.init is not None:
            raise ValueError("dpo starts from a trained model: give `model` as a stage, a path or a hub id")
        if self.loss == "kto" and self.batch_size < 2:
            raise ValueError(
                "`loss: kto` needs `batch_size` of 2 or more: its KL estimate pairs each prompt with another "
                "row's completion"
            )
        return self

    @property
    def record_types(self) -> tuple[RecordType, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What the loss can learn from, preferred first."""
        return ("preference", "unpaired") if self.loss == "kto" else ("preference",)

    @property
    def asks_reference(self) -> bool:
        """Whether its loss compares the policy with a reference."""
        return self.loss not in REFERENCE_FREE

    def references(self) -> list[tuple[str, str]]:
        """As of `Stage`: the model to train, and the reference where one is named."""
        reference = [("reference", self.reference)] if self.reference else []
        return [*super().references(), *reference]
