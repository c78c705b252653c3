"""Settings of the stages that learn from fixed rows: pretrain, sft, reward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from keel.config.parts import FilteredSamplingConfig
from keel.config.stage import Stage, Supervised, with_tokenizer

STREAM_FROM = 1 << 28  # bytes of text


class PretrainConfig(Supervised):
    """Language modelling on packed text."""

    record_types = ("text",)

    kind: Literal["pretrain"] = Field(description="Language modelling on packed text.")
    lr: float = Field(1e-3, gt=0, description="Peak learning rate (AdamW).")
    weight_decay: float = Field(0.1, ge=0, description="AdamW weight decay, on matrices only.")

    stream: bool | None = Field(
        None,
        description=(
            "Read the texts as they are trained on, never all at once: files and folders of .txt, .jsonl and "
            ".parquet. Bad rows are found when they are read. null: from 256 MiB of files on."
        ),
    )
    shuffle_buffer: int = Field(
        10_000,
        ge=1,
        description=(
            "Texts of a stream that are shuffled together; the files of a pass come in a seeded order."
        ),
    )

    @model_validator(mode="after")
    def _sound_stream(self) -> PretrainConfig:
        idle = [name for name in ("rows", "weight") if any(getattr(one, name) for one in self.data)]
        if self.stream and idle:
            raise ValueError(f"`{idle[0]}` of a source has no effect with `stream`; leave one of them out")
        if self.stream is False and self.changes("shuffle_buffer"):
            raise ValueError("`shuffle_buffer` has no effect with `stream: false`")
        return self

    @property
    def streams(self) -> bool:
        if self.stream is not None:
            return self.stream
        if any(one.rows or one.weight or one.stage for one in self.data):
            return False
        from keel.data.files import size_of  # takes a moment to import, and few configs need it

        return sum(size_of(one.source) for one in self.data) >= STREAM_FROM

    def main_data(self) -> list[Any]:
        return [] if self.streams else super().main_data()

    def streamed_data(self) -> list[Any]:
        return [self._plain("data", self.record_types)] if self.streams else []

    @model_validator(mode="after")
    def _nothing_is_too_long(self) -> PretrainConfig:
        if self.changes("too_long"):
            raise ValueError(
                "`too_long` has no effect in pretrain: texts are joined and cut into rows of `max_length`"
            )
        return self

    @property
    def cuts_texts(self) -> bool:
        return True


class SFTConfig(Supervised):
    """Supervised fine-tuning on demonstrations or conversations."""

    record_types = ("demonstration", "text")

    kind: Literal["sft"] = Field(description="Supervised fine-tuning.")
    lr: float = Field(2e-5, gt=0, description="Peak learning rate (AdamW).")
    loss_on: Literal["completion", "all"] = Field(
        "completion", description="Tokens that count: the completion's (assistant turns), or all."
    )
    packing: bool = Field(
        False,
        description=(
            "Join examples into rows of max_length, each read as if it were alone. Tried on the model; one "
            "whose examples would see each other (state space, convolutions, linear attention) is refused."
        ),
    )

    @model_validator(mode="after")
    def _has_a_tokenizer(self) -> SFTConfig:
        return with_tokenizer(self)

    @property
    def fills_rows(self) -> bool:
        return self.packing


class RewardConfig(Supervised):
    """A reward model from human comparisons (Bradley–Terry)."""

    leaves = "reward model"
    record_types = ("preference",)
    renamed: ClassVar[Mapping[str, str]] = {"votes": "labels"}

    kind: Literal["reward"] = Field(description="A reward model from comparisons.")
    lr: float = Field(1e-5, gt=0, description="Peak learning rate (AdamW).")
    members: int = Field(
        1,
        ge=1,
        description=(
            "Reward models to train, each from a seed and in a data order of its own; more than one is an "
            "ensemble."
        ),
    )
    labels: Literal["soft", "majority", "reliability"] = Field(
        "soft",
        description=(
            "Labels from several votes: their share, the majority's side, or what is probable once the "
            "annotators' reliability has been estimated from all training pairs (Dawid–Skene); votes must "
            "name their annotators for that."
        ),
    )
    center: float = Field(
        0.0,
        ge=0,
        description="Weight of (r_chosen + r_rejected)², which keeps the scores around 0 (2312.09244).",
    )
    normalize: int = Field(
        256,
        ge=0,
        description=(
            "Fix the scale on this many fresh samples of the starting model, at least 2; 0: on the chosen "
            "and rejected completions."
        ),
    )
    sampling: FilteredSamplingConfig = Field(
        default_factory=lambda: FilteredSamplingConfig.model_validate({}),
        description="How the samples for `normalize` are drawn.",
    )

    @model_validator(mode="after")
    def _sound(self) -> RewardConfig:
        if self.normalize == 1:
            raise ValueError("`normalize` 1 gives no spread to scale by: use at least 2, or 0")
        if self.normalize == 0 and self.changes("sampling"):
            raise ValueError("`sampling` has no effect with `normalize` 0: nothing is sampled")
        return with_tokenizer(self)

    def check_start(self, start: Stage) -> None:
        if isinstance(start, RewardConfig) and start.members > 1:
            raise ValueError(
                f"`model` is an ensemble of {start.members}, of which training would go on from the first "
                "member only; start from a language model, or from a reward stage with `members` 1"
            )

    def check_reward(self, term: Any) -> None:
        if term.kind == "learned" and term.combine and self.members == 1:
            raise ValueError(
                f"`combine` has no effect: {term.model!r} trains a single reward model (`members` 1)"
            )
