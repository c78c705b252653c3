"""Parts that several stages share, and what every stage that trains has."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from keel import types
from keel.config.settings import Settings

Rate = Annotated[float, Field(ge=0, lt=1)]
Quantize = Literal["8bit", "4bit"] | None
FROM_STAGE = "stage:"  # what begins a source that another stage makes
Leaves = Literal["language model", "reward model", "classifier", "comparisons", "nothing"]
DataSetting = tuple[list[types.DataSource], tuple[types.RecordType, ...]]  # sources, record types they may be


class DataConfig(Settings):
    """One source of rows.

    A special token such as <|endoftext|> that is written in a prompt, a completion or a turn is read as plain
    characters. In `text` it is the special token: there it separates documents.
    """

    source: str = Field(
        description=(
            "A path (.jsonl .json .parquet .csv .txt, each also .gz), a hub id, world:NAME/SPLIT, or "
            "stage:NAME for the comparisons of a collect stage."
        )
    )
    rows: int | None = Field(None, ge=1, description="At most this many rows; for a world, how many to make.")
    weight: float | None = Field(None, gt=0, description="Share of this source in a mixture.")
    split: str = Field("train", description="Split of a hub data set.")
    columns: dict[str, str] = Field({}, description="Rename columns: keel's name → the file's.")
    rewrite: dict[str, dict[str, str]] = Field(
        {},
        description=(
            "Column (after renaming) → regular expression → its replacement, in Python's syntax, one after "
            "the other: {prompt: {'\\A': 'Question: '}} writes something before every prompt."
        ),
    )
    system: str | None = Field(
        None,
        min_length=1,
        description=(
            "A system message before every prompt or conversation; prompts and replies of plain text become "
            "conversations by it."
        ),
    )
    on_bad: Literal["error", "skip"] = Field(
        "error", description="A bad row is an error, or is skipped and counted."
    )
    options: dict[str, Any] = Field(
        {}, description="A world's own settings; of a hub data set `name`, `revision` or `data_dir`."
    )

    @field_validator("rewrite")
    @classmethod
    def _sound_patterns(cls, columns: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
        for column, patterns in columns.items():
            if not patterns:
                raise ValueError(f"`{column}` has no pattern: give {{PATTERN: REPLACEMENT}}")
            for pattern, replacement in patterns.items():
                try:  # the alternative "" matches, so that the replacement is read too
                    re.sub(f"{pattern}|", replacement, "")
                except (re.error, IndexError) as error:
                    raise ValueError(f"{pattern!r} → {replacement!r} is no substitution: {error}") from None
        return columns

    @property
    def stage(self) -> str | None:
        """The collect stage that `source` names; None for any other source."""
        return self.source.removeprefix(FROM_STAGE) if self.source.startswith(FROM_STAGE) else None

    def plain(self) -> types.DataSource:
        """The same values as the data loader takes them."""
        return types.DataSource(**self.model_dump())


class InitConfig(BaseModel):
    """A new model from a transformers configuration: `model_type` and any field of that type's config."""

    model_config = ConfigDict(extra="allow", frozen=True)
    model_type: str = Field(description="A model type of transformers: llama, gpt2, bert …")


class ModelConfig(Settings):
    """Which model, and how it is loaded."""

    path: str | None = Field(None, description="Another stage's name, a local path or a hub id.")
    init: InitConfig | None = Field(
        None, description="Build a new model from this transformers configuration."
    )
    tokenizer: str | None = Field(
        None, description="Tokenizer of a new model: a path or hub id; one is trained when not given."
    )
    vocab_size: int | None = Field(
        None, ge=260, description="Vocabulary of the tokenizer that is trained when none is given."
    )
    chat_template: str | None = Field(None, description="Jinja chat template; replaces the tokenizer's own.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description=(
            "Precision. auto: weights in float32, matrix products in bfloat16 where the hardware is fast in "
            "it (CUDA from Ampere on, CPUs with AMX). Else that of the weights in memory, and of all that is "
            "computed."
        ),
    )
    quantize: Quantize = Field(
        None,
        description=(
            "Keep the frozen weights under adapters in 8 bit (LLM.int8) or 4 bit (NF4), by bitsandbytes; all "
            "else stays in `dtype`, which is then bfloat16 unless given. Needs `lora`."
        ),
    )
    trust_remote_code: bool = Field(
        False, description="Run Python that comes with the model. Off unless you trust its author."
    )
    revision: str | None = Field(None, description="Revision of a hub model.")

    @model_validator(mode="before")
    @classmethod
    def _in_16_bit(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("quantize") is not None:
            return {"dtype": "bfloat16", **values}
        return values

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if (self.path is None) == (self.init is None):
            raise ValueError("give either `path` or `init`, one of them")
        if self.path is not None and (self.tokenizer or self.vocab_size):
            raise ValueError(
                "`tokenizer` and `vocab_size` have no effect with `path`: a model brings its tokenizer"
            )
        if self.tokenizer and self.vocab_size:
            raise ValueError("`vocab_size` has no effect with `tokenizer`: no tokenizer is trained")
        if self.init is not None and self.revision and not self.tokenizer:
            raise ValueError("`revision` has no effect with `init`: nothing is taken from the hub")
        if self.quantize is not None and self.init is not None:
            raise ValueError(
                "`quantize` is for weights that stay frozen; those of a new model are all trained"
            )
        if self.quantize is not None and self.dtype in ("auto", "float32"):
            raise ValueError(
                f"`quantize` needs `dtype: bfloat16` or float16 for what is not quantised, not {self.dtype}"
            )
        return self


class LoraConfig(Settings):
    """Low-rank adapters (2106.09685), by peft. The saved model has them merged in, and in adapter/ by
    themselves."""

    r: int = Field(16, ge=1, description="Rank.")
    alpha: int = Field(32, ge=1, description="Scale: updates are multiplied by alpha / r.")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout on the adapters' input. Must be 0 where ratios are taken."
    )
    target_modules: list[str] | Literal["all-linear"] = Field(
        "all-linear", description="Modules that get an adapter."
    )


class SamplingConfig(Settings):
    """How completions are drawn."""

    max_new_tokens: int = Field(64, ge=1, description="Longest response, in tokens.")
    temperature: float = Field(1.0, ge=0, description="Softmax temperature; 0 is greedy.")
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        [],
        description=(
            "Strings that end a response besides EOS, as soon as they stand in its text; they are no part of "
            "the text that rewards and readers see (a reward model with the policy's tokenizer reads the "
            "ids, and with them the string)."
        ),
    )

    def plain(self) -> types.Sampling:
        """The same values as the generation engine takes them."""
        values = self.model_dump()
        return types.Sampling(**{**values, "stop": tuple(values["stop"])})


class FilteredSamplingConfig(SamplingConfig):
    """Sampling where no ratio is taken, so that the distribution may be cut."""

    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus: keep the likeliest tokens up to this mass.")
    top_k: int = Field(0, ge=0, description="Keep the k likeliest tokens; 0 keeps all.")
    min_p: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Keep tokens at least this share as likely as the likeliest one; 0 keeps all.",
    )

    @model_validator(mode="after")
    def _no_idle_filter(self) -> FilteredSamplingConfig:
        idle = [name for name in ("top_p", "top_k", "min_p") if self.changes(name)]
        if self.temperature == 0 and idle:
            raise ValueError(
                f"`{idle[0]}` has no effect with `temperature` 0: greedy takes the likeliest token"
            )
        return self


StageT = TypeVar("StageT", bound="Training")


def with_tokenizer(stage: StageT) -> StageT:
    """The stage itself. ValueError if its new model has no tokenizer: only a pretrain stage trains one."""
    if stage.model.init is not None and stage.model.tokenizer is None:
        raise ValueError("a new model needs `model.tokenizer` here: only a pretrain stage trains one")
    return stage


def as_list(value: object) -> list[Any]:
    """The value if it is a list, else a list of it alone."""
    return value if isinstance(value, list) else [value]


def as_source(value: object) -> list[Any]:
    """Sources with short forms written out: a string is `{source: …}`, one source a list of one."""
    return [{"source": item} if isinstance(item, str) else item for item in as_list(value)]


def as_model(value: object) -> object:
    """A model with its short form written out: a string is `{path: …}`."""
    return {"path": value} if isinstance(value, str) else value


class Stage(Settings):
    """What every stage has, and what the pipeline asks of any stage whatever its kind."""

    leaves: ClassVar[Leaves] = "nothing"  # what other stages can take from it
    on_policy: ClassVar[bool] = False  # it learns from its own samples, update by update
    critic: ClassVar[bool] = False  # it trains a value model beside the policy
    record_types: ClassVar[tuple[types.RecordType, ...]] = ()  # that its `data` may be, preferred first

    kind: str  # each stage narrows this to its own name

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

    def held_out_data(self) -> DataSetting | None:
        """Rows that it evaluates on, where a setting gives them. They must be like those of `data`."""
        return None

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

    _model = field_validator("model", mode="before")(as_model)
    _data = field_validator("data", mode="before")(as_source)

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
        description="Share of the rows kept from training to evaluate on (at most 1000 rows).",
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

    _eval_data = field_validator("eval_data", mode="before")(
        lambda value: None if value is None else as_source(value)
    )

    @model_validator(mode="after")
    def _no_idle_setting(self) -> Supervised:
        if self.eval_data is not None and self.changes("holdout") and self.holdout > 0:
            raise ValueError("`holdout` has no effect with `eval_data`: give one of them")
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
