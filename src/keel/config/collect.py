"""Settings of `collect`: comparisons of a policy's own replies; and `rounds`, which writes such stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from keel.config.judge import AnnotatorJudge, JudgeEntry
from keel.config.parts import AsSource, DataConfig, FilteredSamplingConfig, SamplingConfig, as_list, as_source
from keel.config.sampler import SamplerConfig
from keel.config.settings import Settings
from keel.config.stage import DataSetting, Stage

MOST_ROUNDS = 100  # three stages each
ANNOTATORS = r"^(world:[A-Za-z0-9_-]+|people)$"
_WHO = (
    "Who compares: world:NAME, whose annotators vote at once; or people, for whose votes the run stops and "
    "waits. In a list also language models, {judge: {model: …, address: …}}: how reliable one is, is "
    "estimated against the others' votes before its own count."
)
Voters = Annotated[str, Field(pattern=ANNOTATORS)]
Annotators = Voters | list[Voters | JudgeEntry]


def _judges_of(annotators: str | list[str | JudgeEntry]) -> list[AnnotatorJudge]:
    """The language models among the annotators."""
    found: list[AnnotatorJudge] = []
    for entry in [] if isinstance(annotators, str) else annotators:
        if isinstance(entry, JudgeEntry):
            found.append(entry.judge)
    return found


def _voters_of(annotators: str | list[str | JudgeEntry]) -> str:
    """`people`, or world:NAME. ValueError where there are none, or both."""
    named = (
        [annotators] if isinstance(annotators, str) else [one for one in annotators if isinstance(one, str)]
    )
    if len(named) == 1:
        return named[0]
    if named:
        raise ValueError(f"`annotators` names {' and '.join(named)}: give one of them beside the judges")
    raise ValueError(
        "`annotators` names language models alone: nobody is there whom their reliability could be measured "
        "against. Name people or world:NAME, too; a reward by a model alone is reward: {kind: judge}"
    )


class LabelConfig(Settings):
    """Pairs in the pages of `keel label`, for people to compare."""

    db: str | None = Field(
        None,
        min_length=1,
        description=(
            "Address of the database: a file, sqlite:///FILE or postgresql://USER@HOST/NAME. null: what the "
            "environment variable KEEL_LABEL_DB says, else keel-label.db in the working directory. Passwords "
            "belong into that variable: a run writes its settings down."
        ),
    )
    votes: int = Field(1, ge=1, description="Votes on a pair, by different people, before the run goes on.")
    instructions: str = Field("", description="What people are told beside the work, in Markdown.")


class CollectConfig(Stage):
    """Two replies of a model to each prompt, compared by annotators. Other stages name the result in their
    `data` as `stage:NAME`."""

    leaves = "comparisons"
    record_types = ("prompt",)

    kind: Literal["collect"] = Field(description="Comparisons of a model's own replies.")
    model: str = Field(description="The model that answers: a stage, a path or a hub id.")
    data: list[DataConfig] = Field(min_length=1, description="Prompts to draw from.")
    pairs: int = Field(
        ge=1, description="Prompts to draw, each once and by the seed: as many pairs are compared at most."
    )
    annotators: Annotators = Field(description=_WHO)
    voted_pairs: int | None = Field(
        None,
        ge=1,
        description=(
            "With a judge: as many of the pairs, the first, are given to people (or the world's annotators); "
            "of the others the judges' word counts alone, as far as they are reliable. null: all."
        ),
    )
    label: LabelConfig | None = Field(
        None,
        description=(
            "With people: have them compare in the pages of keel label. null: only where the environment "
            "variable KEEL_LABEL_DB names a database, else in a file."
        ),
    )
    sampling: FilteredSamplingConfig = Field(
        default_factory=lambda: FilteredSamplingConfig.model_validate({}),
        description="How replies are drawn.",
    )
    rollout: SamplerConfig = Field(
        default_factory=lambda: SamplerConfig.model_validate({}),
        description="What samples: keel's own engine, or a vLLM server.",
    )
    too_long: Literal["error", "skip", "truncate"] = Field(
        "error",
        description=(
            "What to do with a prompt that leaves no room for max_new_tokens. Truncation cuts its start; "
            "both are counted."
        ),
    )
    batch_size: int = Field(64, ge=2, description="Replies sampled at once.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Precision of the model, as in `model.dtype` of other stages."
    )
    trust_remote_code: bool = Field(
        False, description="Run Python that comes with the model. Off unless you trust its author."
    )

    _data = field_validator("data", mode="before", json_schema_input_type=AsSource)(as_source)

    @model_validator(mode="before")
    @classmethod
    def _no_episodes(cls, values: object) -> object:
        named = [key for key in ("tools", "environment") if isinstance(values, Mapping) and values.get(key)]
        if named:
            raise ValueError(
                f"`{named[0]}`: collect plays no episodes, since a comparison has one reply on each side, "
                "and who trains on it would learn what tools have said; evaluate and best_of_n play them"
            )
        return values

    @model_validator(mode="after")
    def _sound(self) -> CollectConfig:
        if self.sampling.temperature == 0:
            raise ValueError("`sampling.temperature` 0 (greedy) draws the same reply twice")
        _voters_of(self.annotators)
        names = [judge.log_name for judge in self.judges]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two judges are called {twice!r}; give each a `name`")
        if self.voted_pairs is not None and not self.judges:
            raise ValueError("`voted_pairs` has no effect without a judge among `annotators`")
        if self.voted_pairs is not None and self.voted_pairs > self.pairs:
            raise ValueError(f"`voted_pairs` {self.voted_pairs} is more than the {self.pairs} `pairs`")
        if self.label is not None and not self.asks_people:
            voters = _voters_of(self.annotators)
            raise ValueError(f"`label` has no effect with `annotators: {voters}`, who vote at once")
        return self

    def references(self) -> list[tuple[str, str]]:
        """As of `Stage`: the model that answers, and judges that run in keel's process."""
        judges = [("judge", judge.model) for judge in self.judges if judge.in_process]
        return [("model", self.model), *judges]

    @property
    def judges(self) -> list[AnnotatorJudge]:
        """The language models among the annotators."""
        return _judges_of(self.annotators)

    @property
    def world(self) -> str | None:
        """The world whose annotators vote; None for people."""
        voters = _voters_of(self.annotators)
        return None if voters == "people" else voters.removeprefix("world:")

    @property
    def replies(self) -> SamplingConfig | None:
        return self.sampling

    @property
    def asks_people(self) -> bool:
        return self.world is None

    @property
    def votes_in(self) -> LabelConfig | None:
        return self.label

    def gold_judges(self) -> list[tuple[str, DataSetting]]:
        return [] if self.asks_people else [(_voters_of(self.annotators), self.main_data()[0])]


class RoundsConfig(Settings):
    """Rounds of refreshing a reward model on what the policy has become. Round 1 is the two stages as they
    are written; round k is written out as three more: collect-k, REWARD-k on all comparisons so far, POLICY-k
    from the policy before."""

    n: int = Field(ge=1, le=MOST_ROUNDS, description="Rounds in all; with 1 nothing is collected.")
    reward: str = Field(description="The reward stage that is trained again in each round.")
    policy: str = Field(description="The stage, ppo or grpo, that goes on in each round.")
    annotators: Annotators = Field(description=_WHO)
    pairs: int = Field(ge=1, description="Pairs that each round after the first collects at most.")
    label: LabelConfig | None = Field(None, description="As of a collect stage: where people compare.")


def round_name(stage: str, number: int) -> str:
    """The name of a stage in round `number`: its own in round 1, STAGE-2 in round 2, and so on."""
    return stage if number == 1 else f"{stage}-{number}"


def expanded(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config's raw mapping with the stages of its `rounds` written out, right after the policy's stage.

    An evaluate stage that judges the first policy gets the policies of all rounds among its `models`. Where
    the config itself has settings for a stage of a round, these win: a resolved config, which has all of
    them, is read back unchanged. A mapping of the wrong form is returned as it is; the validators refuse it.
    """
    rounds, stages = values.get("rounds"), values.get("stages")
    if not (isinstance(rounds, Mapping) and isinstance(stages, Mapping)):
        return dict(values)
    n, reward, policy = rounds.get("n"), rounds.get("reward"), rounds.get("policy")
    first = stages.get(policy) if isinstance(policy, str) else None
    rewarded = stages.get(reward) if isinstance(reward, str) else None
    if not (
        isinstance(n, int)
        and n <= MOST_ROUNDS
        and isinstance(first, Mapping)
        and isinstance(rewarded, Mapping)
    ):
        return dict(values)
    made: dict[str, Any] = {}
    for number in range(2, n + 1):
        made |= _round(number, str(reward), rewarded, str(policy), first, rounds)
    given = {name: stage if isinstance(stage, Mapping) else {} for name, stage in stages.items()}
    after: dict[str, Any] = {}
    for name, stage in stages.items():
        if name not in made:
            after[name] = stage
        if name == policy:
            after |= {new: _merged(made[new], given.get(new, {})) for new in made}
    names = [round_name(str(policy), number) for number in range(2, n + 1)]
    return {**values, "stages": {name: _judging(stage, str(policy), names) for name, stage in after.items()}}


def _merged(made: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`made` with what is given in its place, key by key, and so in each mapping inside."""
    both = {
        key: _merged(made[key], value)
        if isinstance(value, Mapping) and isinstance(made.get(key), Mapping)
        else value
        for key, value in given.items()
    }
    return {**made, **both}


def _round(
    number: int,
    reward: str,
    rewarded: Mapping[str, Any],
    policy: str,
    first: Mapping[str, Any],
    rounds: Mapping[str, Any],
) -> dict[str, Any]:
    """The three stages of round `number`, from the stages of the first."""
    before, model = round_name(policy, number - 1), first.get("model")
    fresh = [{"source": f"stage:collect-{k}"} for k in range(2, number + 1)]
    collect = {
        "kind": "collect", "model": before, "data": first.get("data"), "pairs": rounds.get("pairs"),
        "annotators": rounds.get("annotators"),
        **{key: first[key] for key in ("sampling", "too_long") if key in first},
        **({"label": rounds["label"]} if rounds.get("label") is not None else {}),
    }  # fmt: skip
    if isinstance(model, Mapping):
        collect |= {key: model[key] for key in ("dtype", "trust_remote_code") if key in model}
    path = model.get("path") if isinstance(model, Mapping) else model
    start = {**model, "path": before, "revision": None} if isinstance(model, Mapping) else before
    return {
        f"collect-{number}": collect,
        round_name(reward, number): {**rewarded, "data": [*as_list(rewarded.get("data")), *fresh]},
        round_name(policy, number): {
            **first, "model": start, "reference": first.get("reference") or path,
            "reward": _renamed(first.get("reward"), reward, round_name(reward, number)),
        },
    }  # fmt: skip


def _renamed(terms: object, old: str, new: str) -> Any:
    """Reward terms, short or written out, with another model in the place of `old`."""
    if isinstance(terms, list):
        return [_renamed(term, old, new) for term in terms]
    if isinstance(terms, Mapping):
        elsewhere = terms.get("address") is not None  # a judge's model is no stage
        return {**terms, "model": new} if terms.get("model") == old and not elsewhere else terms
    return new if terms == old else terms


def _judging(stage: Any, policy: str, names: list[str]) -> Any:
    """An evaluate stage with the policies of all rounds, if it judges the first; any other stage as it is."""
    models = stage.get("models") if isinstance(stage, Mapping) and stage.get("kind") == "evaluate" else None
    if not isinstance(models, list) or policy not in models:
        return stage
    after = models.index(policy) + 1
    return {**stage, "models": [*models[:after], *(n for n in names if n not in models), *models[after:]]}
