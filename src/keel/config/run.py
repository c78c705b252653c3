"""The run as a whole: its stages, of keel's own kinds and of those that other packages add."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import Field, SerializeAsAny, WrapValidator, field_validator, model_validator

from keel import plugins
from keel.config.best_of_n import BestOfNConfig
from keel.config.classifier import ClassifierConfig
from keel.config.collect import CollectConfig, RoundsConfig, expanded
from keel.config.distill import DistillConfig
from keel.config.distributed import DistributedConfig
from keel.config.evaluate import EvaluateConfig
from keel.config.grpo import GRPOConfig
from keel.config.online_dpo import OnlineDPOConfig
from keel.config.ppo import PPOConfig
from keel.config.preference import DPOConfig
from keel.config.settings import Settings
from keel.config.stage import Stage
from keel.config.supervised import PretrainConfig, RewardConfig, SFTConfig
from keel.config.tracking import AsTrackers, TrackerConfig, as_trackers, each_once
from keel.errors import UsageError

LONGEST_NAME = 100  # of a run and of a stage: folders are named after them, with something added

AnyStage = (
    PretrainConfig
    | SFTConfig
    | RewardConfig
    | ClassifierConfig
    | PPOConfig
    | GRPOConfig
    | OnlineDPOConfig
    | DistillConfig
    | DPOConfig
    | BestOfNConfig
    | CollectConfig
    | EvaluateConfig
)
KINDS: dict[str, type[Stage]] = {
    get_args(c.model_fields["kind"].annotation)[0]: c for c in get_args(AnyStage)
}


def plugin_kinds() -> tuple[str, ...]:
    """Kinds of stages that installed packages add. UsageError for one that has the name of keel's own."""
    names = plugins.names("keel.stages")
    if shadowed := next((name for name in names if name in KINDS), None):
        raise UsageError(
            f"an installed package adds a kind of stage {shadowed!r}, which is keel's own: remove it"
        )
    return names


def config_of_kind(kind: str) -> type[Stage]:
    """The config class of a kind. UsageError for a kind that nobody adds, or whose package is broken."""
    if kind in KINDS:
        return KINDS[kind]
    config = getattr(plugins.load("keel.stages", kind), "config", None)
    if not (isinstance(config, type) and issubclass(config, Stage)):
        raise UsageError(
            f"the kind of stage {kind!r} of another package has no `config` that derives from Stage"
        )
    return config


def _of_any_kind(value: object, of_own_kind: Callable[[Any], Stage]) -> Stage:
    """A stage of a kind by another package, else one of keel's own kinds."""
    kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
    try:
        if not isinstance(kind, str) or kind not in (added := plugin_kinds()):
            if isinstance(kind, str) and kind not in KINDS and added:
                near = get_close_matches(kind, [*KINDS, *added], n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join([*KINDS, *added])}"
                raise UsageError(f"unknown kind {kind!r}; {hint}")
            return of_own_kind(value)
        return config_of_kind(kind).model_validate(value)
    except UsageError as error:  # pydantic adds where in the config it is
        raise ValueError(str(error)) from None


if TYPE_CHECKING:
    StageConfig = Stage
else:
    OwnStage = Annotated[AnyStage, Field(discriminator="kind")]
    StageConfig = Annotated[SerializeAsAny[OwnStage], WrapValidator(_of_any_kind)]


def _as_date(value: object) -> object:
    """A bare number would be read as seconds since 1970."""
    if isinstance(value, int | float):
        raise ValueError("write a day as 2026-11-28")
    return value


Switch = bool | Literal["on", "off"]


def _as_switch(value: object) -> object:
    """YAML reads a bare on or off as a boolean."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class RunConfig(Settings):
    """A whole run."""

    _accel = field_validator("accel", mode="before", json_schema_input_type=Switch)(_as_switch)
    _date = field_validator("date", mode="before")(_as_date)
    _track = field_validator("track", mode="before", json_schema_input_type=AsTrackers)(as_trackers)
    _tracked_once = field_validator("track", mode="after")(each_once)

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=LONGEST_NAME,
        description="Name of the run and of its directory.",
    )
    description: str = Field("", description="What the run is for, in a line.")
    seed: int = Field(0, ge=0, description="Everything random is derived from this.")
    threads: int | None = Field(
        None, ge=1, description="CPU threads; null: all cores. Results are reproducible for one value."
    )
    workers: int | None = Field(
        None,
        ge=1,
        description=(
            "Processes that tokenise data sets of more than 20,000 rows; null: one a core. Results do not "
            "depend on it."
        ),
    )
    device: str = Field("auto", description="auto (cuda where there is one, else cpu), cpu, cuda, cuda:1.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = Field(
        None,
        description="Precision of every model, as in `model.dtype`, where a stage does not say another; "
        "null: "
        "what stages say themselves (auto).",
    )
    accel: Literal["on", "off"] = Field(
        "on",
        description=(
            "off: transformers' own code throughout, none of keel's faster paths. Slower; results agree "
            "to rounding."
        ),
    )
    date: datetime.date | None = Field(
        None,
        description=(
            "What day it is for chat templates that write the date, as 2026-11-28; null: the day of the "
            "run's first start, which its config.yaml keeps, where a model's template asks for one."
        ),
    )
    track: list[TrackerConfig] = Field(
        [],
        description=(
            "Experiment trackers that metrics, samples and findings are sent to as well: trackio, wandb, "
            "tensorboard, mlflow, or one of another package; a name, a mapping with its `kind`, or a list."
        ),
    )
    distributed: DistributedConfig = Field(
        default_factory=lambda: DistributedConfig.model_validate({}),
        description="How a run on several processes is computed (docs/scale.md).",
    )
    rounds: RoundsConfig | None = Field(
        None,
        description="Refresh a reward model on what the policy has become, round by round; the run's config "
        "shows the stages.",
    )
    stages: dict[str, StageConfig] = Field(
        min_length=1, description="Stage name → settings; each `kind` has its own."
    )

    @classmethod
    def model_json_schema(cls, *args: Any, **options: Any) -> dict[str, Any]:
        """The schema of a run, with the kinds of stages that other packages add."""
        whole = super().model_json_schema(*args, **options)
        stage = whole["properties"]["stages"]["additionalProperties"]
        for kind in plugin_kinds():
            config = config_of_kind(kind)
            own = config.model_json_schema(*args, **options)
            reference = f"#/$defs/{config.__name__}"
            whole["$defs"] |= {**own.pop("$defs", {}), config.__name__: own}
            stage["oneOf"].append({"$ref": reference})
            stage["discriminator"]["mapping"][kind] = reference
        return whole

    @model_validator(mode="before")
    @classmethod
    def _expanded(cls, values: object) -> Any:
        return _in_precision(expanded(values)) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _sound_rounds(self) -> RunConfig:
        if self.rounds is None:
            return self
        for setting, name, fits in (
            ("reward", self.rounds.reward, _leaves_reward_model),
            ("policy", self.rounds.policy, _is_on_policy),
        ):
            stage = self.stages.get(name)
            if stage is None or not fits(type(stage)):
                raise ValueError(f"`rounds.{setting}` {name!r} is no stage of kind {_kinds(fits)}")
        if self.rounds.reward not in self.stages[self.rounds.policy].inputs():
            raise ValueError(
                f"`rounds` has no effect: {self.rounds.policy!r} is not trained on the reward "
                f"{self.rounds.reward!r}"
            )
        return self

    @model_validator(mode="after")
    def _inputs_come_first(self) -> RunConfig:
        seen: set[str] = set()
        for name, stage in self.stages.items():
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"stage name {name[:100]!r}: letters, digits, - and _ only")
            if len(name) > LONGEST_NAME:
                raise ValueError(f"stage name {name[:40]!r}…: at most {LONGEST_NAME} characters")
            for setting, source in stage.references():
                if source not in self.stages:
                    continue
                if source not in seen:
                    order = "is that stage itself" if source == name else "comes after it"
                    raise ValueError(f"stage {name!r} uses {source!r}, which {order}")
                _check_fits(name, stage, setting, source, self.stages[source])
            for setting, source in stage.data_stages():
                _check_collected(name, stage, setting, source, self.stages, seen)
            _check_made_here(name, stage, self.stages)
            seen.add(name)
        return self


def _leaves_reward_model(config: type[Stage]) -> bool:
    return config.leaves == "reward model"


def _is_on_policy(config: type[Stage]) -> bool:
    return config.on_policy


def _kinds(fits: Callable[[type[Stage]], bool]) -> str:
    """The names of keel's own kinds that fit."""
    return " or ".join(kind for kind, config in KINDS.items() if fits(config))


def _in_precision(values: dict[str, Any]) -> dict[str, Any]:
    """The values with the run's `dtype` in every stage that does not say another."""
    dtype, stages = values.get("dtype"), values.get("stages")
    if dtype is None or not isinstance(stages, Mapping):
        return values
    return {**values, "stages": {name: _stage_in(dtype, stage) for name, stage in stages.items()}}


def _stage_in(dtype: object, stage: object) -> Any:
    if not isinstance(stage, Mapping):
        return stage
    if _has_precision(stage.get("kind")):
        return {"dtype": dtype, **stage}
    model = {"path": stage["model"]} if isinstance(stage.get("model"), str) else stage.get("model")
    if not isinstance(model, Mapping) or model.get("quantize") is not None:
        return stage  # what is not quantised has a precision of its own
    return {**stage, "model": {"dtype": dtype, **model}}


def _has_precision(kind: Any) -> bool:
    """Whether stages of a kind have a `dtype` of their own: those that train no model with that setting."""
    known = isinstance(kind, str) and (kind in KINDS or kind in plugins.names("keel.stages"))
    return known and "dtype" in config_of_kind(kind).model_fields


def _check_fits(name: str, stage: Stage, setting: str, source: str, maker: Stage) -> None:
    """ValueError where a stage cannot take what another leaves as its `setting`."""
    wanted = {"reward": ("reward model",), "classifier": ("classifier",), "similarity": ()}.get(setting)
    if wanted is None:  # a model to start from, to compare with or to sample from
        scores = stage.leaves in ("reward model", "classifier")
        wanted = ("language model", stage.leaves) if scores else ("language model",)
    if maker.leaves not in wanted:
        known = _kinds(lambda config: config.leaves in wanted) or "none (a path or a hub id)"
        raise ValueError(
            f"stage {name!r}: `{setting}` needs a stage of kind {known}, but {source!r} is of kind "
            f"{maker.kind}"
        )


def _check_collected(
    name: str, stage: Stage, setting: str, source: str, stages: Mapping[str, Stage], seen: set[str]
) -> None:
    """ValueError for data from a stage that is not there, comes later, or leaves no comparisons that this one
    reads."""
    where = f"stage {name!r}: `{setting}` takes stage:{source}"
    if source not in stages or stages[source].leaves != "comparisons":
        raise ValueError(f"{where}, but {source!r} is no stage of kind collect")
    if source not in seen:
        raise ValueError(f"{where}, which comes after it")
    if "preference" not in stage.record_types or setting != "data":
        raise ValueError(f"{where}: comparisons of a stage are for `data` of reward and dpo stages")


def _check_made_here(name: str, stage: Stage, stages: Mapping[str, Stage]) -> None:
    """ValueError where settings of a stage do not fit a stage that its models come from."""
    start = stage.starts_from and stages.get(stage.starts_from.path or "")
    try:
        if start:
            stage.check_start(start)
    except ValueError as error:
        raise ValueError(f"stage {name!r}: {error}") from None
    for term in getattr(stage, "reward", None) or []:
        maker = stages.get(getattr(term, "model", None) or "")
        try:
            if maker:
                maker.check_reward(term)
        except ValueError as error:
            raise ValueError(f"stage {name!r}: reward {term.log_name!r}: {error}") from None
