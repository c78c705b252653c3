"""What every stage has, what every stage that trains has, and what those have that train on a fixed set of
rows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from keel import types
from keel.config.parts import (
    AsModel,
    AsSource,
    DataConfig,
    LoraConfig,
    ModelConfig,
    SamplingConfig,
    as_model,
    as_source,
)
from keel.config.settings import Settings

if TYPE_CHECKING:
    from keel.config.collect import LabelConfig

Rate = Annotated[float, Field(ge=0, lt=1)]
Leaves = Literal["language model", "reward model", "classifier", "comparisons", "nothing"]
DataSetting = tuple[list[types.DataSource], tuple[types.RecordType, ...]]  # sources, record types they may be
StageT = TypeVar("StageT", bound="Training")


def with_tokenizer(stage: StageT) -> StageT:
    """The stage itself. ValueError if its new model has no tokenizer: only a pretrain stage trains one."""
    if stage.model.init is not None and stage.model.tokenizer is None:
        raise ValueError("a new model needs `model.tokenizer` here: only a pretrain stage trains one")
    return stage


class Stage(Settings):
    """What every stage has, and what the pipeline asks of any stage whatever its kind."""

    leaves: ClassVar[Leaves] = "nothing"  # what other stages can take from it
    on_policy: ClassVar[bool] = False  # it learns from its own samples, update by update
    critic: ClassVar[bool] = False  # it trains a value model beside the policy
    record_types: ClassVar[tuple[types.RecordType, ...]] = ()  # that its `data` may be, preferred first

    kind: str  # each stage narrows this to its own name

    @model_validator(mode="after")
    def _environment_is_there(self) -> Stage:
        asked = any(term.kind == "environment" for term in self.reward_terms())
        if asked and getattr(self, "environment", None) is None:
            raise ValueError(
                "`reward: {kind: environment}` has no meaning without `environment`, which stages have that "
                "sample: ppo, grpo, online_dpo, best_of_n, evaluate"
            )
        return self

    @property
    def starts_from(self) -> ModelConfig | None:
        """The model whose weights it trains; None for a stage that trains nothing."""
        return None

    @property
    def trusts_remote_code(self) -> bool:
        """Whether Python that comes with its models may be run."""
        return bool(getattr(self, "trust_remote_code", False))

    @property
    def replies(self) -> SamplingConfig | None:
        """How it samples replies to the prompts of its `data`; None where it does not."""
        return None

    @property
    def asks_people(self) -> bool:
        """Whether the run stops here and waits for people's votes."""
        return False

    def uncut(self) -> str | None:
        """The setting with which its weights cannot be cut over ranks (fsdp); None: they can."""
        return None

    @property
    def votes_in(self) -> LabelConfig | None:
        """The project of `keel label` in which people vote; None where there is none."""
        return None

    @property
    def outputs(self) -> int:
        """Outputs of the model's score head, where it has one."""
        return 1

    @property
    def cuts_texts(self) -> bool:
        """Whether texts become rows of `max_length`, so that steps follow from tokens and not from rows."""
        return False

    @property
    def fills_rows(self) -> bool:
        """Whether every row that it trains on is `max_length` long."""
        return self.cuts_texts

    def main_data(self) -> list[DataSetting]:
        """What it learns from or works on."""
        return [self._plain("data", self.record_types)] if getattr(self, "data", None) else []

    @property
    def streams(self) -> bool:
        """Whether its data are read as they are trained on, not before."""
        return False

    def streamed_data(self) -> list[DataSetting]:
        """What it reads as a stream, in place of `main_data`."""
        return []

    def held_out_data(self) -> DataSetting | None:
        """Rows that it evaluates on, where a setting gives them. They must be like those of `data`."""
        return None

    def mixed_data(self) -> list[DataSetting]:
        """What a stage that samples learns from beside its own samples."""
        return []

    def other_data(self) -> list[DataSetting]:
        """Every data setting besides the main and the held-out ones."""
        return []

    def all_data(self) -> list[DataSetting]:
        """Every data setting, the main ones first."""
        held_out = self.held_out_data()
        return [*self.main_data(), *([held_out] if held_out else []), *self.other_data()]

    def _plain(self, setting: str, record_types: tuple[types.RecordType, ...]) -> DataSetting:
        return [source.plain() for source in getattr(self, setting)], record_types

    def reward_terms(self) -> list[Any]:
        """The terms of its rewards, a judge's included."""
        return list(getattr(self, "reward", None) or [])

    def tool_code(self) -> list[str]:
        """The functions and the class of a person's own that its model may call."""
        return []

    def gold_judges(self) -> list[tuple[str, DataSetting]]:
        """(world:NAME, prompts) for each world that will judge replies to these prompts."""
        return []

    def planned_steps(self, examples: int) -> dict[str, int]:
        """For a plan: `steps`, and what else counts its work, with so many examples to train on."""
        return {}

    def check_start(self, start: Stage) -> None:
        """ValueError where training cannot go on from the model that the stage `start` leaves."""

    def check_reward(self, term: Any) -> None:
        """ValueError for a reward term, settings of which do not fit the model that this stage leaves."""

    def references(self) -> list[tuple[str, str]]:
        """(setting, what it names) for each setting that may name another stage, in the order of the
        config."""
        return []

    def data_stages(self) -> list[tuple[str, str]]:
        """(setting, stage) for each source of data that another stage makes."""
        uses: list[tuple[str, str]] = []
        for setting in ("data", "eval_data", "comparisons"):
            given = getattr(self, setting, None) or []
            if isinstance(given, dict):  # a classifier's: label → sources
                sources = [source for of_label in given.values() for source in of_label]
            else:
                sources = given
            uses += [(setting, source.stage) for source in sources if source.stage is not None]
        return uses

    def inputs(self) -> list[str]:
        """All that this stage reads: the names that `references` and `data_stages` give."""
        return [source for _, source in [*self.references(), *self.data_stages()]]


class Training(Stage):
    """What every stage that takes gradient steps has."""

    leaves = "language model"

    model: ModelConfig = Field(
        description="The model to start from: a stage, a path, a hub id, or {init: {...}}."
    )
    data: list[DataConfig] = Field(
        min_length=1, description="Rows to train on: one source or a weighted mixture."
    )
    lora: LoraConfig | None = Field(None, description="Train low-rank adapters instead of all weights.")
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, more time."
    )
    lr: float = Field(3e-4, gt=0, description="Peak learning rate (AdamW).")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Decay of the learning rate after warm-up."
    )
    warmup: float = Field(
        0.03, ge=0, le=1, description="Share of the steps over which the learning rate rises."
    )
    lr_floor: float = Field(0.0, ge=0, le=1, description="The decay ends at this share of the peak.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay, on matrices only.")
    betas: tuple[Rate, Rate] = Field((0.9, 0.95), description="AdamW's moment decay rates, each in [0, 1).")
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="Clip the gradient to this global norm; null: never."
    )
    batch_size: int = Field(
        32, ge=1, description="Examples in an optimiser step (pairs, packed rows or episodes)."
    )
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        None,
        description=(
            "Examples in one forward and backward; null: all; auto: as many as fit, by what `keel plan` "
            "reckons. Changes memory, not results."
        ),
    )
    micro_tokens: int | None = Field(
        None,
        ge=8,
        description=(
            "Tokens in one forward and backward, padding included, instead of a number of examples: short "
            "ones share it, longer ones have it to themselves. Changes memory, not results."
        ),
    )
    max_steps: int | None = Field(
        None, ge=1, description="Stop after this many optimiser steps. Not for PPO, which counts `updates`."
    )
    max_length: int | None = Field(
        None, ge=8, description="Longest sequence in tokens; null: the model's context."
    )
    too_long: Literal["error", "skip", "truncate"] = Field(
        "error",
        description=(
            "What to do with a row longer than max_length. Truncation cuts the prompt's start or the text's "
            "end, and is counted."
        ),
    )
    save_every: int = Field(
        50,
        ge=1,
        description=(
            "Optimiser steps between checkpoints (updates, for PPO), of which only the newest is kept."
        ),
    )

    _model = field_validator("model", mode="before", json_schema_input_type=AsModel)(as_model)
    _data = field_validator("data", mode="before", json_schema_input_type=AsSource)(as_source)

    def uncut(self) -> str | None:
        return "`model.quantize`" if self.model.quantize is not None else super().uncut()

    @model_validator(mode="after")
    def _trainable(self) -> Training:
        if self.model.quantize is not None and self.lora is None:
            raise ValueError(
                f"weights in {self.model.quantize} cannot be trained themselves: set `lora: {{}}` to train "
                "adapters on them, or leave `model.quantize` out"
            )
        if self.model.dtype not in ("auto", "float32") and self.lora is None:
            raise ValueError(
                f"weights in {self.model.dtype} are too coarse to be trained themselves (a step of AdamW is "
                "mostly smaller than the gap between two such numbers): set `model.dtype: float32`, or "
                f"`lora: {{}}`"
            )
        return self

    @property
    def starts_from(self) -> ModelConfig | None:
        return self.model

    @property
    def trusts_remote_code(self) -> bool:
        return self.model.trust_remote_code

    @property
    def whole_batch(self) -> int:
        """Examples of one optimiser step: `mini_batch` where a stage has it, else `batch_size`."""
        return getattr(self, "mini_batch", None) or self.batch_size

    @property
    def rows_at_once(self) -> int | None:
        """`micro_batch` in a stage that runs, where `auto` has become a number."""
        assert self.micro_batch != "auto"
        return self.micro_batch

    @model_validator(mode="after")
    def _one_micro_batch(self) -> Training:
        if self.micro_batch is not None and self.micro_tokens is not None:
            raise ValueError(
                "`micro_batch` and `micro_tokens` both say what goes into one forward: give one of them"
            )
        return self

    @model_validator(mode="after")
    def _no_idle_floor(self) -> Training:
        if self.schedule == "constant" and self.changes("lr_floor"):
            raise ValueError("`lr_floor` has no effect with `schedule: constant`: nothing decays")
        return self

    def references(self) -> list[tuple[str, str]]:
        """As of `Stage`: the model to start from, unless it is a new one."""
        return [("model", self.model.path)] if self.model.path else []


class Supervised(Training):
    """Training on a fixed set of rows, with a held-out part."""

    epochs: float = Field(
        1.0, gt=0, description="Passes over the data; max_steps, when given, ends it earlier."
    )
    holdout: float = Field(
        0.05,
        ge=0,
        lt=1,
        description=(
            "Share of the rows kept from training to evaluate on (at most 1000 rows), chosen by prompt: no "
            "row of a prompt that is evaluated on is trained on. 0 holds out none."
        ),
    )
    group: str | None = Field(
        "group",
        description=(
            "Column whose rows of one value are trained on together or held out together, besides those of "
            "one prompt (a dialogue, a document, a user). null: prompts alone. By default a column `group`, "
            "where the rows have one."
        ),
    )
    eval_data: list[DataConfig] | None = Field(
        None, description="Rows to evaluate on, instead of a held-out share."
    )
    eval_every: int | None = Field(
        None, ge=1, description="Steps between evaluations; null: at the end only."
    )
    patience: int | None = Field(
        None,
        ge=1,
        description=(
            "Stop when this many evaluations in a row bring no improvement, and keep the best weights."
        ),
    )

    _eval_data = field_validator("eval_data", mode="before", json_schema_input_type=AsSource | None)(
        lambda value: None if value is None else as_source(value)
    )

    @model_validator(mode="after")
    def _no_idle_setting(self) -> Supervised:
        if self.eval_data is not None and self.changes("holdout") and self.holdout > 0:
            raise ValueError("`holdout` has no effect with `eval_data`: give one of them")
        if self.changes("group") and (self.eval_data is not None or self.holdout == 0):
            raise ValueError(
                "`group` has no effect without `holdout`: it says which rows are held out together"
            )
        held_out = self.eval_data is not None or self.holdout > 0
        if self.eval_every is not None and not held_out:
            raise ValueError("`eval_every` has no effect without held-out rows: set `holdout` or `eval_data`")
        if self.patience is not None and (self.eval_every is None or not held_out):
            raise ValueError("`patience` has no effect without `eval_every` and held-out rows")
        return self

    def held_out_data(self) -> DataSetting | None:
        return self._plain("eval_data", self.record_types) if self.eval_data else None

    def planned_steps(self, examples: int) -> dict[str, int]:
        steps = math.ceil(self.epochs * examples / self.batch_size)
        return {"steps": min(steps, self.max_steps) if self.max_steps else steps}
