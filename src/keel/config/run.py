"""Settings of `evaluate`, and the run as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from keel.config.best_of_n import BestOfNConfig
from keel.config.classifier import ClassifierConfig
from keel.config.collect import CollectConfig, RoundsConfig, expanded
from keel.config.grpo import GRPOConfig
from keel.config.parts import DataConfig, FilteredSamplingConfig, Settings, Stage, as_source
from keel.config.ppo import PPOConfig
from keel.config.preference import DPOConfig
from keel.config.rewards import RewardTerm, as_terms, check_labels, check_only, models_of
from keel.config.supervised import PretrainConfig, RewardConfig, SFTConfig


class EvaluateConfig(Stage):
    """Compare models on the same prompts."""

    kind: Literal["evaluate"] = Field(description="Models side by side on the same prompts.")
    models: list[str] = Field(min_length=1, description="Models to compare: stages, paths or hub ids.")
    reference: str | None = Field(
        None, description="The model that KL and win rate are measured against; null: the first of `models`."
    )
    reward: list[RewardTerm] | None = Field(
        None,
        description="A reward stage, or a list of weighted terms: measures `proxy`, each term by its name, and, with `comparisons`, the accuracy of the reward model.",
    )
    best_of: list[int] = Field(
        [],
        description="For each n here, also the best by `reward` of n samples of the reference: what any training must beat.",
    )
    gold: str | None = Field(
        None, description="A world (world:NAME) whose gold reward judges the completions."
    )
    data: list[DataConfig] = Field(min_length=1, description="Prompts.")
    comparisons: list[DataConfig] | None = Field(
        None, description="Pairs to judge the reward model on: accuracy, calibration, what it is drawn to."
    )
    subset: str | None = Field(
        None,
        description="A column of `comparisons` with a kind of pair: accuracy is given for each kind too.",
    )
    position: str | None = Field(
        None,
        description="A column of `comparisons` that says which side stood first when people voted, chosen or rejected: measures what position does to votes and reward.",
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
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Precision of all models, as in `model.dtype` of other stages."
    )

    trust_remote_code: bool = Field(
        False,
        description="Run Python that comes with the models and the rewards' models. Off unless you trust its authors.",
    )

    _reward = field_validator("reward", mode="before")(
        lambda value: None if value is None else as_terms(value)
    )
    _labels = field_validator("reward", mode="after")(
        lambda terms: None if terms is None else check_labels(terms)
    )
    _data = field_validator("data", mode="before")(as_source)
    _comparisons = field_validator("comparisons", mode="before")(
        lambda value: None if value is None else as_source(value)
    )

    @model_validator(mode="after")
    def _sound(self) -> EvaluateConfig:
        check_only(self.reward or [], self.data, "`data`")
        learned = [term for term in self.reward or [] if term.kind == "learned"]
        if self.comparisons is not None and len(learned) != 1:
            raise ValueError("`comparisons` has no effect without one reward model in `reward`")
        for name in ("subset", "position"):
            if self.changes(name) and self.comparisons is None:
                raise ValueError(f"`{name}` names a column of `comparisons`, and there are none")
        if self.best_of and not self.reward:
            raise ValueError("`best_of` needs a `reward` to choose the best by")
        if self.best_of and self.sampling.temperature == 0:
            raise ValueError("`best_of` with `sampling.temperature` 0 (greedy) draws the same reply n times")
        if any(n < 2 for n in self.best_of) or len(set(self.best_of)) < len(self.best_of):
            raise ValueError(f"`best_of` {self.best_of}: different numbers of 2 or more")
        if self.reference is not None and self.reference not in self.models:
            raise ValueError(f"`reference` {self.reference!r} is not one of `models`")
        twice = [name for name in self.models if self.models.count(name) > 1]
        if twice:
            raise ValueError(f"`models` names {twice[0]!r} twice")
        return self

    def references(self) -> list[tuple[str, str]]:
        return [*(("models", name) for name in self.models), *models_of(self.reward or [])]


AnyStage = (
    PretrainConfig
    | SFTConfig
    | RewardConfig
    | ClassifierConfig
    | PPOConfig
    | GRPOConfig
    | DPOConfig
    | BestOfNConfig
    | CollectConfig
    | EvaluateConfig
)
StageConfig = Annotated[AnyStage, Field(discriminator="kind")]
KINDS: dict[str, type[Stage]] = {
    get_args(c.model_fields["kind"].annotation)[0]: c for c in get_args(AnyStage)
}


# kinds of stages that leave a causal language model
ON_POLICY = ("ppo", "grpo")
LANGUAGE_MODELS = ("pretrain", "sft", "ppo", "grpo", "dpo", "best_of_n")


def _as_switch(value: object) -> object:
    """YAML reads a bare on or off as a boolean."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class RunConfig(Settings):
    """A whole run."""

    _accel = field_validator("accel", mode="before")(_as_switch)

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run and of its directory."
    )
    description: str = Field("", description="What the run is for, in a line.")
    seed: int = Field(0, ge=0, description="Everything random is derived from this.")
    threads: int | None = Field(
        None, ge=1, description="CPU threads; null: all cores. Results are reproducible for one value."
    )
    device: str = Field("auto", description="auto (cuda where there is one, else cpu), cpu, cuda, cuda:1.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = Field(
        None,
        description="Precision of every model, as in `model.dtype`, where a stage does not say another; null: what stages say themselves (auto).",
    )
    accel: Literal["on", "off"] = Field(
        "on",
        description="off: transformers' own code throughout, none of keel's faster paths. Slower; results agree to rounding.",
    )
    rounds: RoundsConfig | None = Field(
        None,
        description="Refresh a reward model on what the policy has become, round by round; the run's config shows the stages.",
    )
    stages: dict[str, StageConfig] = Field(
        min_length=1, description="Stage name → settings; each `kind` has its own."
    )

    @model_validator(mode="before")
    @classmethod
    def _expanded(cls, values: Any) -> Any:
        return _in_precision(expanded(values)) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _sound_rounds(self) -> RunConfig:
        if self.rounds is None:
            return self
        for setting, name, kinds in (("reward", self.rounds.reward, ("reward",)), ("policy", self.rounds.policy, ON_POLICY)):  # fmt: skip
            stage = self.stages.get(name)
            if stage is None or stage.kind not in kinds:
                raise ValueError(f"`rounds.{setting}` {name!r} is no stage of kind {' or '.join(kinds)}")
        if self.rounds.reward not in self.stages[self.rounds.policy].inputs():
            raise ValueError(
                f"`rounds` has no effect: {self.rounds.policy!r} is not trained on the reward {self.rounds.reward!r}"
            )
        return self

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
                    wanted = " or ".join(_fitting(stage.kind, setting)) or "none (a path or a hub id)"
                    raise ValueError(
                        f"stage {name!r}: `{setting}` needs a stage of kind {wanted}, but {source!r} is of kind {kind}"
                    )
            for setting, source in stage.data_stages():
                _check_collected(name, stage, setting, source, self.stages, seen)
            for term in getattr(stage, "reward", None) or []:
                _check_made_here(name, term, self.stages)
            _check_start(name, stage, self.stages)
            seen.add(name)
        return self


def _in_precision(values: dict[str, Any]) -> dict[str, Any]:
    """The values with the run's `dtype` in every stage that does not say another."""
    dtype, stages = values.get("dtype"), values.get("stages")
    if dtype is None or not isinstance(stages, Mapping):
        return values
    return {**values, "stages": {name: _stage_in(dtype, stage) for name, stage in stages.items()}}


def _stage_in(dtype: Any, stage: Any) -> Any:
    if not isinstance(stage, Mapping):
        return stage
    if stage.get("kind") in ("evaluate", "collect"):
        return {"dtype": dtype, **stage}
    model = {"path": stage["model"]} if isinstance(stage.get("model"), str) else stage.get("model")
    if not isinstance(model, Mapping) or model.get("quantize") is not None:
        return stage  # what is not quantised has a precision of its own
    return {**stage, "model": {"dtype": dtype, **model}}


def _check_collected(
    name: str, stage: AnyStage, setting: str, source: str, stages: Mapping[str, AnyStage], seen: set[str]
) -> None:
    """ValueError for data from a stage that is not there, comes later, or leaves no comparisons that this one
    reads."""
    where = f"stage {name!r}: `{setting}` takes stage:{source}"
    if source not in stages or stages[source].kind != "collect":
        raise ValueError(f"{where}, but {source!r} is no stage of kind collect")
    if source not in seen:
        raise ValueError(f"{where}, which comes after it")
    if stage.kind not in ("reward", "dpo") or setting != "data":
        raise ValueError(f"{where}: comparisons of a stage are for `data` of reward and dpo stages")


def _check_made_here(name: str, term: Any, stages: Mapping[str, AnyStage]) -> None:
    """ValueError for a reward whose settings do not fit the stage that its model comes from."""
    made = stages.get(getattr(term, "model", ""))
    where = f"stage {name!r}: reward {term.called!r}"
    if term.kind == "learned" and isinstance(made, RewardConfig) and term.combine and made.members == 1:
        raise ValueError(
            f"{where}: `combine` has no effect: {term.model!r} trains a single reward model (`members` 1)"
        )
    if term.kind == "classifier" and isinstance(made, ClassifierConfig):
        known = ", ".join(f"{label!r} ({index})" for index, label in enumerate(made.labels))
        if term.label is None:
            raise ValueError(f"{where} needs a `label`; those of {term.model!r} are {known}")
        if term.label not in made.labels and term.label not in range(len(made.labels)):
            raise ValueError(f"{where}: {term.model!r} has no `label` {term.label!r}; its labels are {known}")


def _check_start(name: str, stage: AnyStage, stages: Mapping[str, AnyStage]) -> None:
    """ValueError for a reward model that would go on from an ensemble: from one member of it, that is."""
    start = stages.get(stage.model.path or "") if isinstance(stage, RewardConfig) else None
    if isinstance(start, RewardConfig) and start.members > 1:
        raise ValueError(
            f"stage {name!r}: `model` is an ensemble of {start.members}, of which training would go on from the first member only; start from a language model, or from a reward stage with `members` 1"
        )


def _fitting(kind: str, setting: str) -> tuple[str, ...]:
    """Kinds of stages whose model a stage of `kind` can take as its `setting`."""
    if setting == "similarity":
        return ()
    if setting in ("reward", "classifier"):
        return (setting,)
    return (*LANGUAGE_MODELS, kind) if kind in ("reward", "classifier") else LANGUAGE_MODELS
