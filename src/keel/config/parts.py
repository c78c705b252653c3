"""Parts that several stages share."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from keel import types
from keel.config.rubric import VerdictsConfig
from keel.config.settings import LONGEST_PATH, Settings
from keel.data.formats import FORMATS, PLAIN, known_format

Quantize = Literal["8bit", "4bit"] | None
FormatName = Annotated[
    str,
    Field(json_schema_extra={"enum": [*FORMATS, PLAIN]}),
    AfterValidator(known_format),
]
FROM_STAGE = "stage:"  # what begins a source that another stage makes


class PairsConfig(Settings):
    """Two replies and a label in columns of any name. Which value prefers which side is said here, and a
    value that is not listed is a bad row."""

    first: str = Field(description="Column of one reply.")
    second: str = Field(description="Column of the other reply.")
    label: str = Field(description="Column that says which of them is better.")
    first_wins: list[str | int | float] = Field(min_length=1, description="Its values that prefer `first`.")
    second_wins: list[str | int | float] = Field(min_length=1, description="Its values that prefer `second`.")
    ties: list[str | int | float] = Field([], description="Its values that prefer neither.")

    @model_validator(mode="after")
    def _told_apart(self) -> PairsConfig:
        values = [str(value) for value in (*self.first_wins, *self.second_wins, *self.ties)]
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise ValueError(f"the value {twice!r} of `label` is listed twice: it must mean one thing")
        if self.first == self.second:
            raise ValueError(f"`first` and `second` are the same column {self.first!r}")
        return self


class DataConfig(Settings):
    """One source of rows.

    A special token such as <|endoftext|> that is written in a prompt, a completion or a turn is read as plain
    characters. In `text` it is the special token: there it separates documents.
    """

    source: str = Field(
        max_length=LONGEST_PATH,
        description=(
            "A path (.jsonl .json .parquet .csv .txt, each also .gz), a hub id, world:NAME/SPLIT, "
            "gym:NAME for a task of reasoning-gym, stage:NAME for the comparisons of a collect stage, or "
            "label:PROJECT for what people said in a project of keel label."
        ),
    )
    rows: int | None = Field(
        None, ge=1, description="At most this many rows; for a world or task, how many to make."
    )
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
    strict: bool = Field(
        False,
        description=(
            "Refuse a row with a column that is not read, or a turn with a key that keel does not know; a "
            "column named in `columns` ({answer: answer}) is read. Else they are counted and said."
        ),
    )
    format: FormatName | None = Field(
        None,
        description=(
            "A well-known data set whose rows are mapped to keel's (docs/data.md). null: found by the "
            "columns; keel: rows as they are."
        ),
    )
    pairs: PairsConfig | None = Field(
        None, description="How two replies and a column that judges them become a pair, for any data set."
    )
    verdicts: VerdictsConfig | None = Field(
        None,
        description=(
            "Read comparisons as questions which of two replies is better, in both orders, with the verdict "
            "as the reply, or in a column `better` for `reward: {kind: verdict}`: what a generative reward "
            "model learns. {} for the default rubric; {mode: pointwise}: rated replies as questions how good "
            "they are, with the score as the reply, or in a column `score`."
        ),
    )
    ties: Literal["skip", "keep"] = Field(
        "skip",
        description=(
            "Pairs without a better side, of a `format` or of `pairs`: leave them out, or keep them with "
            "half the votes each (`p_chosen` one half)."
        ),
    )
    options: dict[str, Any] = Field(
        {},
        description=(
            "A world's or task's own settings; of a hub data set `name`, `revision` or `data_dir`; of "
            "label:PROJECT "
            "`db` (the database's address), `models` and `surplus` (take these votes, too) and "
            "`adjudicated` (label: "
            "a reviewer's word is the label; beside: the votes are)."
        ),
    )
    where: dict[str, str] = Field(
        {},
        description=(
            "Only the rows with this value in this column (the file's name of it), compared as text: "
            "{sentiment: positive}. A row without a value there is a bad row."
        ),
    )

    @model_validator(mode="after")
    def _one_mapping(self) -> DataConfig:
        if self.format is not None and self.pairs is not None:
            raise ValueError("`format` and `pairs` both say how rows are judged: give one of them")
        if self.pairs is not None and self.verdicts is not None and self.verdicts.mode == "pointwise":
            raise ValueError("`pairs` makes comparisons, and `verdicts` with `mode: pointwise` reads single "
                             "replies: leave one of them out")  # fmt: skip
        if self.format == PLAIN and self.ties == "keep":
            raise ValueError("`ties` has no effect with `format: keel`: those rows are taken as they are")
        return self

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

    path: str | None = Field(
        None, max_length=LONGEST_PATH, description="Another stage's name, a local path or a hub id."
    )
    init: InitConfig | None = Field(
        None, description="Build a new model from this transformers configuration."
    )
    tokenizer: str | None = Field(
        None, description="Tokenizer of a new model: a path or hub id; one is trained when not given."
    )
    vocab_size: int | None = Field(
        None, ge=260, description="Vocabulary of the tokenizer that is trained when none is given."
    )
    resize: bool = Field(
        False,
        description=(
            "Give the embeddings (and the head) new rows where the tokenizer has tokens without one: the "
            "mean of the others with a little noise. Without it such a tokenizer is refused."
        ),
    )
    router_aux_loss_coef: float | None = Field(
        None,
        ge=0,
        description=(
            "Weight of the balancing loss of a mixture of experts in every loss that trains this model; 0 "
            "leaves it out. Null: the weight in the model's config, where that asks for the loss "
            "(`output_router_logits: true`)."
        ),
    )
    chat_template: str | None = Field(
        None, min_length=1, description="Jinja chat template; replaces the tokenizer's own."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description=(
            "Precision. auto: weights in float32, matrix products in bfloat16 where the hardware is fast in "
            "it (CUDA from Ampere on, CPUs with AMX or AVX-512 BF16). Else that of the weights in memory, "
            "and of all that is computed."
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
        if self.resize and self.init is not None:
            raise ValueError("`resize` has no effect with `init`: a new model has a row for each token")
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
        "all-linear",
        description=(
            "Modules that get an adapter: names, or every linear layer but the head and those that an "
            "adapter cannot be on."
        ),
    )
    target_parameters: list[str] | Literal["experts"] | None = Field(
        None,
        description=(
            "Weights of experts, which are no linear layers, that get an adapter each: experts for all of "
            "them, or the ends of their names. Null: as `target_modules` says, by which peft reaches the "
            "experts of some types; a line says what stays frozen."
        ),
    )

    @model_validator(mode="after")
    def _no_dropout_on_parameters(self) -> LoraConfig:
        if self.target_parameters is not None and self.dropout > 0:
            raise ValueError(
                "`target_parameters` needs `dropout: 0`: adapters on weights have no input to drop"
            )
        return self


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


AsModel = str | ModelConfig  # how a model may be written
AsSource = str | DataConfig | list[str | DataConfig]  # how data may be written


def as_list(value: object) -> list[Any]:
    """The value if it is a list, else a list of it alone."""
    return value if isinstance(value, list) else [value]


def as_source(value: object) -> list[Any]:
    """Sources with short forms written out: a string is `{source: …}`, one source a list of one."""
    return [{"source": item} if isinstance(item, str) else item for item in as_list(value)]


def as_model(value: object) -> object:
    """A model with its short form written out: a string is `{path: …}`."""
    return {"path": value} if isinstance(value, str) else value
