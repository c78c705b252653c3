"""The run's configuration: one pydantic model per stage, read from YAML with dotted overrides.

An unknown key names its nearest match; a setting that would have no effect is refused. What is derived
(micro-batches per step, number of steps) is computed where it is used and never stored.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from keel import types


class Settings(BaseModel):
    """A group of settings: immutable, and no key it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    def changes(self, name: str) -> bool:
        """Whether a setting is not at its default. One that is written out at its default harms nobody, so that a
        run's resolved config can be read again."""
        return getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True)


# ---------------------------------------------------------------- parts that several stages share


class DataConfig(Settings):
    """One source of rows."""

    source: str = Field(
        description="A path (.jsonl .json .parquet .csv .txt, each also .gz), a hub id, or world:NAME/SPLIT."
    )
    rows: int | None = Field(None, ge=1, description="At most this many rows; for a world, how many to make.")
    weight: float | None = Field(None, gt=0, description="Share of this source in a mixture.")
    split: str = Field("train", description="Split of a hub data set.")
    columns: dict[str, str] = Field({}, description="Rename columns: keel's name → the file's.")
    on_bad: Literal["error", "skip"] = Field(
        "error", description="A bad row is an error, or is skipped and counted."
    )
    options: dict[str, Any] = Field({}, description="A world's own settings.")

    def plain(self) -> types.DataSource:
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
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Precision of the weights in memory."
    )
    trust_remote_code: bool = Field(
        False, description="Run Python that comes with the model. Off unless you trust its author."
    )
    revision: str | None = Field(None, description="Revision of a hub model.")

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
        return self


class LoraConfig(Settings):
    """Low-rank adapters (2106.09685), by peft. The saved model has them merged in."""

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
    stop: list[str] = Field([], description="Stop strings besides EOS; each must be one token.")

    def plain(self) -> types.Sampling:
        values = self.model_dump()
        return types.Sampling(**{**values, "stop": tuple(values["stop"])})


class FilteredSamplingConfig(SamplingConfig):
    """Sampling where no ratio is taken, so that the distribution may be cut."""

    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus: keep the likeliest tokens up to this mass.")
    top_k: int = Field(0, ge=0, description="Keep the k likeliest tokens; 0 keeps all.")

    @model_validator(mode="after")
    def _no_idle_filter(self) -> FilteredSamplingConfig:
        idle = [name for name in ("top_p", "top_k") if self.changes(name)]
        if self.temperature == 0 and idle:
            raise ValueError(
                f"`{idle[0]}` has no effect with `temperature` 0: greedy takes the likeliest token"
            )
        return self


def _with_tokenizer(stage: Any) -> Any:
    """The stage; ValueError if its new model has no tokenizer (only a pretrain stage trains one)."""
    if stage.model.init is not None and stage.model.tokenizer is None:
        raise ValueError("a new model needs `model.tokenizer` here: only a pretrain stage trains one")
    return stage


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _as_source(value: Any) -> Any:
    return [{"source": item} if isinstance(item, str) else item for item in _as_list(value)]


def _as_model(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class Stage(Settings):
    """What every stage has."""

    kind: str  # each stage narrows this to its own name

    def references(self) -> list[tuple[str, str]]:
        """(setting, what it names) for each setting that may name another stage, in the order of the config."""
        return []

    def inputs(self) -> list[str]:
        """What `references` name."""
        return [source for _, source in self.references()]


class Training(Stage):
    """What every stage that takes gradient steps has."""

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
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's moment decay rates.")
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="Clip the gradient to this global norm; null: never."
    )
    batch_size: int = Field(
        32, ge=1, description="Examples in an optimiser step (pairs, packed rows or episodes)."
    )
    micro_batch: int | None = Field(
        None,
        ge=1,
        description="Examples in one forward and backward; null: all. Changes memory, not results.",
    )
    max_steps: int | None = Field(
        None, ge=1, description="Stop after this many optimiser steps (updates, for PPO)."
    )
    max_length: int | None = Field(
        None, ge=8, description="Longest sequence in tokens; null: the model's context."
    )
    too_long: Literal["error", "skip", "truncate"] = Field(
        "error",
        description="What to do with a row longer than max_length. Truncation cuts the prompt's start or the text's end, and is counted.",
    )
    save_every: int = Field(50, ge=1, description="Steps between checkpoints; the last one is kept.")

    _model = field_validator("model", mode="before")(_as_model)
    _data = field_validator("data", mode="before")(_as_source)

    @model_validator(mode="after")
    def _no_idle_floor(self) -> Training:
        if self.schedule == "constant" and self.changes("lr_floor"):
            raise ValueError("`lr_floor` has no effect with `schedule: constant`: nothing decays")
        return self

    def references(self) -> list[tuple[str, str]]:
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
        description="Stop when this many evaluations in a row bring no improvement, and keep the best weights.",
    )

    _eval_data = field_validator("eval_data", mode="before")(
        lambda value: None if value is None else _as_source(value)
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


# ---------------------------------------------------------------- stages


class PretrainConfig(Supervised):
    """Language modelling on packed text."""

    kind: Literal["pretrain"] = Field(description="Language modelling on packed text.")
    lr: float = Field(1e-3, gt=0, description="Peak learning rate (AdamW).")
    weight_decay: float = Field(0.1, ge=0, description="AdamW weight decay, on matrices only.")

    @model_validator(mode="after")
    def _nothing_is_too_long(self) -> PretrainConfig:
        if self.changes("too_long"):
            raise ValueError(
                "`too_long` has no effect in pretrain: texts are joined and cut into rows of `max_length`"
            )
        return self


class SFTConfig(Supervised):
    """Supervised fine-tuning on demonstrations or conversations."""

    kind: Literal["sft"] = Field(description="Supervised fine-tuning.")
    lr: float = Field(2e-5, gt=0, description="Peak learning rate (AdamW).")
    loss_on: Literal["completion", "all"] = Field(
        "completion", description="Tokens that count: the completion's (assistant turns), or all."
    )
    packing: bool = Field(
        False,
        description="Join examples into rows of max_length; attention never crosses from one to the next.",
    )

    @model_validator(mode="after")
    def _has_a_tokenizer(self) -> SFTConfig:
        return _with_tokenizer(self)


class RewardConfig(Supervised):
    """A reward model from human comparisons (Bradley–Terry)."""

    kind: Literal["reward"] = Field(description="A reward model from comparisons.")
    lr: float = Field(1e-5, gt=0, description="Peak learning rate (AdamW).")
    votes: Literal["soft", "majority"] = Field(
        "soft", description="Labels from several votes: their share, or the majority's side."
    )
    center: float = Field(
        0.0,
        ge=0,
        description="Weight of (r_chosen + r_rejected)², which keeps the scores around 0 (2312.09244).",
    )
    normalize: int = Field(
        256,
        ge=0,
        description="Fix the scale on this many fresh samples of the starting model; 0: on the chosen and rejected completions.",
    )
    sampling: FilteredSamplingConfig = Field(
        default_factory=lambda: FilteredSamplingConfig.model_validate({}),
        description="How the samples for `normalize` are drawn.",
    )

    @model_validator(mode="after")
    def _sound(self) -> RewardConfig:
        if self.normalize == 0 and self.changes("sampling"):
            raise ValueError("`sampling` has no effect with `normalize` 0: nothing is sampled")
        return _with_tokenizer(self)


class KLConfig(Settings):
    """The constraint that keeps the policy near the reference."""

    coef: float = Field(
        0.05, ge=0, description="β, the weight of the KL term (the initial one, with a target)."
    )
    target: float | None = Field(
        None,
        gt=0,
        description="Adapt β to keep the KL per response (a sum over its tokens, in nats) near this (1909.08593).",
    )
    horizon: float = Field(1000, gt=0, description="Episodes over which the adaptive β reacts.")
    estimator: Literal["k1", "k2", "k3"] = Field(
        "k1",
        description="Per-token estimator of the KL (joschu.net/blog/kl-approx.html). In the loss prefer k2: the gradient of k3 is that of the forward KL.",
    )
    where: Literal["reward", "loss"] = Field(
        "reward", description="Subtract β·KL from the reward, or add it to the loss. Never both."
    )

    @model_validator(mode="after")
    def _sound(self) -> KLConfig:
        if self.target is None and self.changes("horizon"):
            raise ValueError("`kl.horizon` has no effect without `kl.target`")
        if self.target is not None and self.coef == 0:
            raise ValueError("`kl.coef` 0 can never adapt to `kl.target`: start from a positive value")
        if self.where == "loss" and self.estimator == "k1":
            raise ValueError(
                "`kl.where: loss` needs estimator k2 or k3: the expected gradient of k1 is 0, so it would constrain nothing"
            )
        return self


class ShapingConfig(Settings):
    """From a score to a reward."""

    normalize: Literal["none", "model", "running"] = Field(
        "model",
        description="Scale of the scores: as they come; by the reward model's own statistics on SFT samples; or by a running standard deviation.",
    )
    center: Literal["none", "prompt"] = Field(
        "none",
        description="`prompt`: subtract the mean score of the prompt's other samples, which removes each prompt's arbitrary offset.",
    )
    clip: float | None = Field(
        5.0,
        gt=0,
        description="Clip the normalised score to ± this, before the KL penalty and before centring.",
    )
    missing_stop_penalty: float = Field(
        1.0, ge=0, description="Subtracted from the score of a response that was cut off by max_new_tokens."
    )


class PtxConfig(Settings):
    """Pretraining mix (PPO-ptx, 2203.02155): language modelling on these rows in every update."""

    data: list[DataConfig] = Field(min_length=1, description="Rows of text.")
    coef: float = Field(1.0, gt=0, description="Weight of the language-modelling loss.")
    batch_size: int = Field(16, ge=1, description="Rows in each gradient step.")
    _data = field_validator("data", mode="before")(_as_source)


class PPOConfig(Training):
    """Proximal policy optimisation (1707.06347) against a reward model under a KL constraint."""

    kind: Literal["ppo"] = Field(description="Proximal policy optimisation.")
    reward: str = Field(description="The reward model: a stage, a path or a hub id.")
    reference: str | None = Field(None, description="The reference policy; null: the model PPO starts from.")
    lr: float = Field(1e-5, gt=0, description="Peak learning rate of the policy (AdamW).")
    value_lr: float | None = Field(
        None, gt=0, description="Learning rate of the value head (and the critic); null: `lr`."
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "linear", description="Decay of the learning rate after warm-up."
    )
    batch_size: int = Field(64, ge=1, description="Episodes sampled for one update.")
    mini_batch: int | None = Field(
        None, ge=1, description="Episodes in one gradient step; null: all of the batch."
    )
    samples_per_prompt: int = Field(1, ge=1, description="Responses sampled for each prompt.")
    epochs: int = Field(4, ge=1, description="Passes over each batch of episodes.")
    updates: int = Field(100, ge=1, description="Batches of episodes to sample and learn from.")
    sharing: Literal["separate", "trunk"] = Field(
        "separate",
        description="The critic: a model of its own (a copy of the starting model), or a value head on the policy's hidden states.",
    )
    sampling: SamplingConfig = Field(
        default_factory=lambda: SamplingConfig.model_validate({}),
        description="How responses are drawn. No top-p or top-k: cutting the distribution biases the ratio.",
    )
    kl: KLConfig = Field(
        default_factory=lambda: KLConfig.model_validate({}), description="The KL constraint."
    )
    shaping: ShapingConfig = Field(
        default_factory=lambda: ShapingConfig.model_validate({}), description="From a score to a reward."
    )
    gamma: float = Field(1.0, ge=0, le=1, description="Discount γ.")
    lam: float = Field(0.95, ge=0, le=1, description="λ of generalised advantage estimation (1506.02438).")
    whiten_advantages: bool = Field(
        True, description="Advantages to mean 0 and standard deviation 1 over the batch's response tokens."
    )
    clip: float = Field(0.2, gt=0, description="ε: the ratio counts between 1−ε and 1+ε.")
    dual_clip: float | None = Field(
        None, gt=1, description="c: lower bound of the objective for negative advantages (1912.09729)."
    )
    value_clip: float = Field(0.2, gt=0, description="The value may move this far from its old one.")
    value_coef: float = Field(0.1, ge=0, description="Weight of the value loss.")
    entropy_coef: float = Field(0.0, ge=0, description="Weight of the entropy bonus.")
    max_approx_kl: float | None = Field(
        None, gt=0, description="End an update's epochs when the mean of (ρ−1−log ρ) per token passes this."
    )
    critic_warmup: int = Field(0, ge=0, description="Updates at the start that train the critic only.")
    ptx: PtxConfig | None = Field(None, description="Pretraining mix.")
    eval_every: int | None = Field(None, ge=1, description="Updates between evaluations on held-out prompts.")
    eval_data: list[DataConfig] | None = Field(None, description="Held-out prompts for `eval_every`.")
    patience: int | None = Field(
        None,
        ge=1,
        description="Stop when this many evaluations in a row bring no better reward minus β·KL, and keep the best weights.",
    )
    save_every: int = Field(10, ge=1, description="Updates between checkpoints; the last one is kept.")

    _eval_data = field_validator("eval_data", mode="before")(
        lambda value: None if value is None else _as_source(value)
    )

    @model_validator(mode="after")
    def _sound(self) -> PPOConfig:
        if self.sampling.temperature == 0:
            raise ValueError("`sampling.temperature` 0 (greedy) leaves PPO nothing to explore")
        if self.lora is not None and self.lora.dropout > 0:
            raise ValueError(
                "`lora.dropout` must be 0 in PPO: with dropout the ratio of the first update is not 1"
            )
        if self.batch_size % self.samples_per_prompt:
            raise ValueError(
                f"`batch_size` {self.batch_size} is not a multiple of `samples_per_prompt` {self.samples_per_prompt}"
            )
        if self.mini_batch is not None and self.batch_size % self.mini_batch:
            raise ValueError(
                f"`batch_size` {self.batch_size} is not a multiple of `mini_batch` {self.mini_batch}"
            )
        if self.shaping.center == "prompt" and self.samples_per_prompt < 2:
            raise ValueError(
                "`shaping.center: prompt` needs `samples_per_prompt` of 2 or more: a lone sample has no peers"
            )
        if self.max_steps is not None:
            raise ValueError("PPO counts `updates`; `max_steps` would have no effect")
        if self.model.init is not None:
            raise ValueError("PPO starts from a trained model: give `model` as a stage, a path or a hub id")
        idle = [name for name in ("max_approx_kl", "dual_clip") if getattr(self, name) is not None]
        if idle and self.epochs == 1 and self.mini_batch in (None, self.batch_size):
            raise ValueError(
                f"`{idle[0]}` has no effect with one gradient step an update (`epochs` 1, no `mini_batch`): its ratio is 1"
            )
        if (self.eval_every is None) != (self.eval_data is None):
            raise ValueError("`eval_every` and `eval_data` work together: give both or neither")
        if self.patience is not None and self.eval_every is None:
            raise ValueError("`patience` has no effect without `eval_every` and `eval_data`")
        if self.critic_warmup >= self.updates:
            raise ValueError(
                f"`critic_warmup` {self.critic_warmup} leaves none of {self.updates} updates to the policy"
            )
        return self

    def references(self) -> list[tuple[str, str]]:
        reference = [("reference", self.reference)] if self.reference else []
        return [*super().references(), ("reward", self.reward), *reference]


class EvaluateConfig(Stage):
    """Compare models on the same prompts."""

    kind: Literal["evaluate"] = Field(description="Models side by side on the same prompts.")
    models: list[str] = Field(min_length=1, description="Models to compare: stages, paths or hub ids.")
    reference: str | None = Field(
        None, description="The model that KL and win rate are measured against; null: the first of `models`."
    )
    reward: str | None = Field(
        None, description="A reward model: measures `proxy` and, with `comparisons`, its accuracy."
    )
    gold: str | None = Field(
        None, description="A world (world:NAME) whose gold reward judges the completions."
    )
    data: list[DataConfig] = Field(min_length=1, description="Prompts.")
    comparisons: list[DataConfig] | None = Field(
        None, description="Pairs to measure the reward model's accuracy on."
    )
    sampling: FilteredSamplingConfig = Field(
        default_factory=lambda: FilteredSamplingConfig.model_validate({}),
        description="How completions are drawn.",
    )
    too_long: Literal["error", "skip", "truncate"] = Field(
        "error",
        description="What to do with a prompt that leaves no room for max_new_tokens in a model's context. Truncation cuts its start; both are counted.",
    )
    batch_size: int = Field(64, ge=1, description="Sequences in one forward. Changes memory, not results.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Precision of all models' weights in memory."
    )

    _data = field_validator("data", mode="before")(_as_source)
    _comparisons = field_validator("comparisons", mode="before")(
        lambda value: None if value is None else _as_source(value)
    )

    @model_validator(mode="after")
    def _sound(self) -> EvaluateConfig:
        if self.comparisons is not None and self.reward is None:
            raise ValueError("`comparisons` has no effect without `reward`")
        if self.reference is not None and self.reference not in self.models:
            raise ValueError(f"`reference` {self.reference!r} is not one of `models`")
        twice = [name for name in self.models if self.models.count(name) > 1]
        if twice:
            raise ValueError(f"`models` names {twice[0]!r} twice")
        return self

    def references(self) -> list[tuple[str, str]]:
        reward = [("reward", self.reward)] if self.reward else []
        return [*(("models", name) for name in self.models), *reward]


AnyStage = PretrainConfig | SFTConfig | RewardConfig | PPOConfig | EvaluateConfig
StageConfig = Annotated[AnyStage, Field(discriminator="kind")]
KINDS: dict[str, type[Stage]] = {
    get_args(c.model_fields["kind"].annotation)[0]: c for c in get_args(AnyStage)
}


LANGUAGE_MODELS = ("pretrain", "sft", "ppo")  # kinds of stages that leave a causal language model


class RunConfig(Settings):
    """A whole run."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run and of its directory."
    )
    description: str = Field("", description="What the run is for, in a line.")
    seed: int = Field(0, ge=0, description="Everything random is derived from this.")
    threads: int | None = Field(
        None, ge=1, description="CPU threads; null: all cores. Results are reproducible for one value."
    )
    device: str = Field("auto", description="auto (cuda where there is one, else cpu), cpu, cuda, cuda:1.")
    stages: dict[str, StageConfig] = Field(
        min_length=1, description="Stage name → settings; each `kind` has its own."
    )

    @model_validator(mode="after")
    def _inputs_come_first(self) -> RunConfig:
        seen: set[str] = set()
        for name, stage in self.stages.items():
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"stage name {name!r}: letters, digits, - and _ only")
            for setting, source in stage.references():
                if source not in self.stages:
                    continue
                if source not in seen:
                    order = "is that stage itself" if source == name else "comes after it"
                    raise ValueError(f"stage {name!r} uses {source!r}, which {order}")
                kind = self.stages[source].kind
                if kind not in _fitting(stage.kind, setting):
                    wanted = " or ".join(_fitting(stage.kind, setting))
                    raise ValueError(
                        f"stage {name!r}: `{setting}` needs a stage of kind {wanted}, but {source!r} is of kind {kind}"
                    )
            seen.add(name)
        return self


def _fitting(kind: str, setting: str) -> tuple[str, ...]:
    """Kinds of stages whose model a stage of `kind` can take as its `setting`."""
    if setting == "reward":
        return ("reward",)
    return (*LANGUAGE_MODELS, "reward") if kind == "reward" else LANGUAGE_MODELS


# ---------------------------------------------------------------- reading


class _Loader(yaml.SafeLoader):
    """YAML without the silent loss of a key that is written twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice!r} appears twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def read(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The validated config at `path` with `dotted.key=value` overrides applied (values are YAML).

    Raises UsageError that names the key, what is wrong with it and, for an unknown key, the nearest one.
    """
    try:
        tree = _unshared(yaml.load(path.read_text(encoding="utf-8"), _Loader))
    except FileNotFoundError:
        raise types.UsageError(f"no config at {path}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise types.UsageError(f"{path} cannot be read as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise types.UsageError(f"{path} is not a mapping: a config has `name` and `stages`")
    for override in overrides:
        _override(tree, override)
    return parse(tree, str(path))


def parse(tree: Mapping[str, Any], origin: str = "config") -> RunConfig:
    """The validated config of an already read mapping."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        raise types.UsageError(f"{origin}:\n  " + "\n  ".join(dict.fromkeys(lines))) from None


def _unshared(value: Any) -> Any:
    """A copy in which what YAML aliases made one is separate, so that an override changes one place only."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def _override(tree: dict[str, Any], override: str) -> None:
    """Set one `dotted.key=value`; a leading stage name may leave out `stages.`, a number is a place in a list."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise types.UsageError(f"{override!r} is not an override: write dotted.key=value")
    parts, stages = key.split("."), tree.get("stages")
    stages = stages if isinstance(stages, dict) else {}
    if parts[0] in stages:
        parts = ["stages", *parts]
    elif parts[0] not in RunConfig.model_fields:
        known = {*stages, *RunConfig.model_fields}
        raise types.UsageError(f"{override!r}: no stage or setting {parts[0]!r}{_nearest(parts[0], known)}")
    if len(parts) > 1 and parts[0] == "stages" and parts[1] not in stages:
        raise types.UsageError(f"{override!r}: no stage {parts[1]!r}{_nearest(parts[1], stages)}")
    node: Any = tree
    for part in parts[:-1]:
        node = _inside(node, part, override)
    try:
        node[_place(node, parts[-1], override)] = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise types.UsageError(f"{override!r}: the value is not YAML: {error}") from None


def _inside(node: Any, part: str, override: str) -> Any:
    """The mapping or list at `part` of `node`, made where there is none; short forms are written out first."""
    place = _place(node, part, override)
    value = node[place] if isinstance(node, list) else node.get(place)
    if isinstance(value, str) and part in ("model", "data", "eval_data", "comparisons"):
        value = {"path" if part == "model" else "source": value}
    if not isinstance(value, dict | list):
        value = {}
    node[place] = value
    return value


def _place(node: Any, part: str, override: str) -> Any:
    """`part` as a key of a mapping or an index of a list."""
    if isinstance(node, dict):
        return part
    if not part.isdigit() or int(part) >= len(node):
        raise types.UsageError(
            f"{override!r}: there is a list of {len(node)}; {part!r} must be a place in it, from 0"
        )
    return int(part)


def _nearest(word: str, known: Sequence[str] | Mapping[str, Any] | set[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"


def _explain(item: Any) -> str:
    place = [str(part) for part in item["loc"]]
    if len(place) > 2 and place[0] == "stages" and place[2] in KINDS:
        del place[2]  # pydantic inserts the union's tag
    dotted, message = ".".join(place), item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        return f"{dotted}: unknown key{_nearest(place[-1], _known_keys(item['loc']))}"
    if item["type"] == "union_tag_invalid":
        return f"{dotted}: unknown kind {item['ctx']['tag']!r}{_nearest(item['ctx']['tag'], KINDS)}"
    if item["type"] == "union_tag_not_found":
        return f"{dotted}: `kind` is missing; known: {', '.join(KINDS)}"
    return f"{dotted}: {message}" if dotted else message


def _known_keys(location: Sequence[Any]) -> set[str]:
    """Names of the settings that the group at `location` knows."""
    group: type[BaseModel] = RunConfig
    for part in location[:-1]:
        if part in KINDS:
            group = KINDS[part]
        elif isinstance(part, str) and part in group.model_fields:
            inner = _group_of(group.model_fields[part].annotation)
            group = inner or group
    return set(group.model_fields)


def _group_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(
        (found for found in map(_group_of, get_args(annotation)) if found and found not in KINDS.values()),
        None,
    )
