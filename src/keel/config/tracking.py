"""Settings of `track`: which experiment trackers a run sends its metrics, samples and findings to.

What is set here changes no result, so it is no part of a stage's fingerprint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SerializeAsAny, WrapValidator

from keel import plugins
from keel.config.settings import Settings
from keel.errors import UsageError


def _without_password(address: str) -> str:
    """The address, which goes into the run's config.yaml for everybody to read."""
    try:
        parts = urlsplit(address)
    except ValueError as error:
        raise ValueError(f"{address!r} is no address: {error}") from None
    if parts.password or "token=" in parts.query:
        raise ValueError(
            "an address with a password or token in it would be written into the run's config.yaml: put the "
            "secret into the environment variable that the tracker reads (docs/trackers.md)"
        )
    return address


Address = Annotated[str, Field(min_length=1), AfterValidator(_without_password)]
ProjectName = Annotated[str, Field(min_length=1, max_length=100)]


class TrackioConfig(Settings):
    """Trackio: a database on this machine, or a Hugging Face Space."""

    kind: Literal["trackio"] = Field(description="Which tracker.")
    project: ProjectName = Field("keel", description="Trackio's project.")
    space: str | None = Field(None, description="A Space (OWNER/NAME) to send to; null: this machine.")


class WandbConfig(Settings):
    """Weights & Biases."""

    kind: Literal["wandb"] = Field(description="Which tracker.")
    project: ProjectName = Field("keel", description="The project.")
    entity: str | None = Field(None, description="User or team; null: the default of who is logged in.")
    mode: Literal["online", "offline"] | None = Field(
        None, description="offline: into a folder, for `wandb sync`; null: as WANDB_MODE says, else online."
    )


class TensorboardConfig(Settings):
    """TensorBoard's event files."""

    kind: Literal["tensorboard"] = Field(description="Which tracker.")
    folder: str | None = Field(
        None, min_length=1, description="Where they are written; null: `tensorboard` in the run's directory."
    )


class MlflowConfig(Settings):
    """MLflow."""

    kind: Literal["mlflow"] = Field(description="Which tracker.")
    uri: Address | None = Field(None, description="Tracking server; null: as MLFLOW_TRACKING_URI says.")
    experiment: ProjectName = Field("keel", description="The experiment, made where it is not there.")


class PluginTrackerConfig(Settings):
    """A tracker that another package adds."""

    kind: str = Field(description="The name that the package adds.")
    args: dict[str, Any] = Field({}, description="What the package's tracker is called with, by name.")


AnyTracker = TrackioConfig | WandbConfig | TensorboardConfig | MlflowConfig
TRACKERS: tuple[str, ...] = ("trackio", "wandb", "tensorboard", "mlflow")


def _of_any_kind(value: object, of_own_kind: Callable[[Any], Settings]) -> Settings:
    """One of keel's own kinds, else one of another package."""
    kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
    if kind is None or kind in TRACKERS:
        return of_own_kind(value)
    added = plugins.names("keel.trackers")
    if kind not in added:
        near = get_close_matches(str(kind), [*TRACKERS, *added], 1, 0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join([*TRACKERS, *added])}"
        raise ValueError(f"unknown tracker {kind!r}; {hint}")
    try:
        plugins.point_of("keel.trackers", str(kind))
    except UsageError as error:
        raise ValueError(str(error)) from None
    return PluginTrackerConfig.model_validate(value)


if TYPE_CHECKING:
    TrackerConfig = TrackioConfig | WandbConfig | TensorboardConfig | MlflowConfig | PluginTrackerConfig
else:
    TrackerConfig = Annotated[
        SerializeAsAny[Annotated[AnyTracker, Field(discriminator="kind")]], WrapValidator(_of_any_kind)
    ]
AsTrackers = (  # how they may be written
    str | AnyTracker | PluginTrackerConfig | list[str | AnyTracker | PluginTrackerConfig] | None
)


def as_trackers(value: object) -> object:
    """Trackers with short forms written out: a name is `{kind: NAME}`, one is a list of one."""
    if value is None:
        return []
    items: list[Any] = value if isinstance(value, list) else [value]
    return [{"kind": item} if isinstance(item, str) else item for item in items]


def each_once(trackers: list[Settings]) -> list[Settings]:
    """ValueError for a kind that stands there twice."""
    kinds = [getattr(tracker, "kind", "") for tracker in trackers]
    if twice := next((kind for kind in kinds if kinds.count(kind) > 1), None):
        raise ValueError(f"`track` names {twice!r} twice: give each tracker once")
    return trackers
