"""Settings of `classifier`: texts by class, and how long ones are cut."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from keel.config.labelled import LabelledSource, by_label, is_labelled, what_is_wanted
from keel.config.parts import AsSource, DataConfig, as_list, as_source
from keel.config.stage import DataSetting, Supervised

Sources = Annotated[list[DataConfig], Field(min_length=1)]


ByLabel = LabelledSource | list[LabelledSource] | dict[str, AsSource]  # how texts may be written


def _by_label(value: object) -> dict[str, list[Any]]:
    """Sources by label, in alphabetical order. A label's index in the saved model is its position in this
    order, so that it does not depend on the order in which the config lists them. A file whose rows have the
    label in a column becomes a source for each label that it has."""
    whole = as_list(value)
    if whole and all(is_labelled(one) for one in whole):
        value = by_label(whole)
    if not isinstance(value, dict):
        raise ValueError(what_is_wanted(whole[0] if len(whole) == 1 else None))
    return {str(label): as_source(value[label]) for label in sorted(value, key=str)}


class ClassifierConfig(Supervised):
    """A text classifier, trained on texts that are sorted by label: for use as a reward of genre or style.

    Every label counts the same, however many texts it has: a row's loss is weighted by the inverse of its
    label's share.
    """

    leaves = "classifier"
    record_types = ("text",)

    kind: Literal["classifier"] = Field(description="A text classifier from labelled texts.")
    data: dict[str, Sources] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        description=(
            "Label → texts of that class: one source or several. Or files whose rows have the label in a "
            "column, {source: reviews.csv, label: sentiment, text: review}: the labels are found. At least "
            "two labels."
        ),
    )
    eval_data: dict[str, Sources] | None = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        None,
        description=(
            "Label → texts to evaluate on (whole books that are not in `data`, say), instead of a held-out "
            "share."
        ),
    )
    passages: bool = Field(
        False,
        description=(
            "Cut every text into passages of nearly equal length, at most `max_length` tokens. The "
            "paragraphs of a .txt file are one text; of other files and worlds each row is. Without it, each "
            "row is one example."
        ),
    )
    holdout: float = Field(
        0.05,
        ge=0,
        lt=1,
        description=(
            "Share of each label's texts kept from training to evaluate on, at least one (whole texts, "
            "before they are cut into passages). Equal texts, and those of one `group`, stay together."
        ),
    )
    lr: float = Field(5e-5, gt=0, description="Peak learning rate (AdamW).")
    weight_decay: float = Field(0.01, ge=0, description="AdamW weight decay, on matrices only.")

    # in the place of the validators of the same names, which are for lists
    _data = field_validator("data", mode="before", json_schema_input_type=ByLabel)(_by_label)
    _eval_data = field_validator("eval_data", mode="before", json_schema_input_type=ByLabel | None)(
        lambda value: None if value is None else _by_label(value)
    )

    @model_validator(mode="after")
    def _sound(self) -> ClassifierConfig:
        if len(self.data) < 2:
            raise ValueError(f"`data` has {len(self.data)} label; a classifier tells at least two apart")
        if "" in self.data:
            raise ValueError("`data` has a label without a name")
        if self.eval_data is not None and set(self.eval_data) != set(self.data):
            odd = sorted(set(self.eval_data) ^ set(self.data))[0]
            raise ValueError(
                f"`eval_data` and `data` must have the same labels; {odd!r} is in one of them only"
            )
        for sources in [*self.data.values(), *(self.eval_data or {}).values()]:
            if any(source.weight is not None for source in sources):
                raise ValueError(
                    "`weight` has no effect in a classifier: every label counts the same, every row of it too"
                )
        if self.passages and self.changes("too_long"):
            raise ValueError("`too_long` has no effect with `passages`: long texts are cut, nothing is lost")
        return self

    @property
    def labels(self) -> list[str]:
        """In the order of the model's outputs."""
        return list(self.data)

    @property
    def outputs(self) -> int:
        return len(self.data)

    @property
    def cuts_texts(self) -> bool:
        return self.passages

    def main_data(self) -> list[DataSetting]:
        """One entry for each source of each label."""
        return self._by_source(self.data)

    def held_out_data(self) -> DataSetting | None:
        """None: rows of both settings are texts, so that there is nothing to compare."""
        return None

    def other_data(self) -> list[DataSetting]:
        return self._by_source(self.eval_data or {})

    def _by_source(self, labelled: dict[str, Any]) -> list[DataSetting]:
        return [([source.plain()], self.record_types) for sources in labelled.values() for source in sources]

    def check_reward(self, term: Any) -> None:
        if term.kind != "classifier":
            return
        known = ", ".join(f"{label!r} ({index})" for index, label in enumerate(self.labels))
        if term.label is None:
            raise ValueError(f"it needs a `label`; those of {term.model!r} are {known}")
        if term.label not in self.labels and term.label not in range(len(self.labels)):
            raise ValueError(f"{term.model!r} has no `label` {term.label!r}; its labels are {known}")
