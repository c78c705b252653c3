"""Rewards in a config: any number of terms, each with a weight and a name under which it is logged.

`reward: NAME` is short for one learned reward model, `reward: python:module.function` for a function of
yours; a list is a mixture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from keel.config.judge import JudgeSettings
from keel.config.parts import DataConfig, Quantize, as_list
from keel.config.rubric import CriterionConfig, check_rubric, check_scale
from keel.config.settings import Settings
from keel.config.tasks import CodeRunSettings, GymSettings


class RewardSettings(Settings):
    """What every reward has: a name, a weight, and the rows that it is for."""

    renamed: ClassVar[Mapping[str, str]] = {"only": "source_filter"}

    name: str | None = Field(
        None, description="Name in metrics and samples; null: from the kind or the model."
    )
    weight: float = Field(1.0, allow_inf_nan=False, description="Factor in the sum; 0: only logged.")
    source_filter: str | None = Field(
        None,
        description=(
            "Applies to rows of this `source` of the data only, so that in a mixture each task has rewards "
            "of its own."
        ),
    )

    @property
    def log_name(self) -> str:
        """The name under which it is logged: `name`, else its kind."""
        return self.name or self.kind  # pyright: ignore[reportAttributeAccessIssue]


class LearnedTerm(RewardSettings):
    """A reward model, or an ensemble of them."""

    renamed: ClassVar[Mapping[str, str]] = {**RewardSettings.renamed, "caution": "std_penalty"}

    kind: Literal["learned"] = Field(description="A reward model.")
    model: str = Field(description="A reward stage, a path or a hub id.")
    combine: Literal["mean", "min", "mean_minus_std"] | None = Field(
        None,
        description=(
            "What an ensemble says, each member on its own scale: their mean, the worst case, or mean − "
            "std_penalty·std (2310.02743); null: mean."
        ),
    )
    std_penalty: float | None = Field(
        None, ge=0, description="λ of `mean_minus_std`: how much disagreement costs; null: 1."
    )

    quantize: Quantize = Field(
        None,
        description=(
            "Hold it in 8 or 4 bit, as in `model.quantize`. Not for one that is an adapter on a shared base."
        ),
    )

    @property
    def log_name(self) -> str:
        """The name under which it is logged: `name`, else the last part of the model's path."""
        *folders, last = self.model.rstrip("/").split("/")
        return self.name or (folders[-1] if last == "model" and folders else last)  # …/stages/NAME/model

    @model_validator(mode="after")
    def _sound(self) -> LearnedTerm:
        if self.std_penalty is not None and self.combine != "mean_minus_std":
            raise ValueError("`std_penalty` has no effect without `combine: mean_minus_std`")
        return self


class AnswerTerm(RewardSettings):
    """1 for the right final answer, else 0 (GSM8K's form)."""

    kind: Literal["answer"] = Field(description="The final answer, compared exactly.")
    column: str = Field("answer", description="Column of the data that holds the reference answer.")
    where: Literal["marker", "last_number"] = Field(
        "marker",
        description=(
            "The answer stands after the last ####, in \\boxed{} or <answer>; or is the last number of the "
            "text."
        ),
    )


class VerdictTerm(RewardSettings):
    """1 for a reply that ends in the right verdict, else 0; for a score, less by how far it is off."""

    kind: Literal["verdict"] = Field(description="The verdict of a generative reward model.")
    mode: Literal["pairwise", "pointwise"] = Field(
        "pairwise",
        description=(
            "As of `verdicts`. pairwise: 1 for the right one of A, B and tie; pointwise: 1 − |score − right| "
            "/ (high − low of `scale`). 0 for an answer that cannot be read."
        ),
    )
    column: str = Field(
        "better",
        description=(
            "Column of the data that holds the right one (`verdicts`): A, B or tie; with `mode: pointwise` a "
            "number on `scale`, in `score` where this is not given."
        ),
    )
    scale: tuple[int, int] = Field((1, 10), description="Ends of the scale of a score (pointwise).")
    rubric: list[CriterionConfig] | None = Field(
        None,
        min_length=1,
        description=(
            "The criteria that get a score each, of which the weighted mean counts (pointwise); null: one "
            "score, as where the rubric of `verdicts` is a text."
        ),
    )

    @model_validator(mode="before")
    @classmethod
    def _column_of_the_mode(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("mode") == "pointwise":
            return {"column": "score", **values}
        return values

    @model_validator(mode="after")
    def _sound_verdict(self) -> VerdictTerm:
        check_scale(self.scale)
        check_rubric(self.rubric or [])
        if self.mode != "pointwise":
            for name in ("scale", "rubric"):
                if self.changes(name):
                    raise ValueError(f"`{name}` has no effect with `mode: {self.mode}`")
        return self


class FormatTerm(RewardSettings):
    """1 for a response made of the given tags in order, else 0."""

    kind: Literal["format"] = Field(description="Tags in order: <think>…</think><answer>…</answer>.")
    tags: list[str] = Field(["think", "answer"], min_length=1, description="Names of the tags, in order.")
    partial: bool = Field(False, description="Give the share of marks that are in place.")


class RegexTerm(RewardSettings):
    """1 where a regular expression is found, else 0."""

    kind: Literal["regex"] = Field(description="A regular expression.")
    pattern: str = Field(description="Python's syntax; `.` matches newlines.")
    full: bool = Field(False, description="The whole response must match.")
    timeout: float = Field(
        10.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds that the pattern may take on a response; one that backtracks without end is "
        "stopped, and the run with it.",
    )


class LengthTerm(RewardSettings):
    """1 within a band of lengths, falling to 0 over `slack`."""

    kind: Literal["length"] = Field(description="A band of lengths.")
    low: int = Field(0, ge=0, description="Shortest length that earns 1.")
    high: int = Field(ge=1, description="Longest length that earns 1.")
    unit: Literal["tokens", "words", "characters"] = Field("tokens", description="What is counted.")
    slack: int = Field(0, ge=0, description="Outside the band the reward falls to 0 over this distance.")


class RepetitionTerm(RewardSettings):
    """Minus the share of repeated n-grams of words: 0 is best, −1 worst."""

    kind: Literal["repetition"] = Field(description="Minus the share of repeated n-grams of words.")
    n: int = Field(3, ge=1, description="Words of an n-gram.")


class KeywordsTerm(RewardSettings):
    """Words that should, or should not, be there."""

    kind: Literal["keywords"] = Field(description="Words that should be there, or not.")
    words: list[str] = Field(min_length=1, description="Words or phrases, found at word boundaries.")
    mode: Literal["any", "all", "share", "none"] = Field(
        "any", description="1 if any, all or none of them occurs; or the share that occurs."
    )
    ignore_case: bool = Field(True, description="Upper and lower case are the same.")


class OverlongTerm(RewardSettings):
    """DAPO's soft overlong punishment (2503.14476, eq. 13): 0, falling to −1 over the last `buffer`
    tokens."""

    kind: Literal["overlong"] = Field(description="DAPO's soft overlong punishment.")
    max_length: int = Field(ge=1, description="Tokens from which on the reward is −1.")
    buffer: int = Field(ge=1, description="Tokens before that over which it falls.")


class SimilarityTerm(RewardSettings):
    """Cosine similarity of sentence embeddings of the response and a reference text."""

    kind: Literal["similarity"] = Field(description="Similarity to a reference text.")
    model: str = Field(
        "sentence-transformers/all-MiniLM-L6-v2",
        description="A sentence-transformers model: a path or hub id.",
    )
    to: str = Field("answer", description="Column of the data that holds the reference text.")


class ClassifierTerm(RewardSettings):
    """What a text classifier says: genre, style, sentiment."""

    kind: Literal["classifier"] = Field(description="A text classifier of transformers.")
    model: str = Field(description="A classifier stage, a path or a hub id.")
    label: str | int | None = Field(
        None, description="The label that is wanted, by name or index; null for a model with one output."
    )
    output: Literal["probability", "log_probability", "logit", "decision"] = Field(
        "probability",
        description=(
            "What of the label is the reward; `decision`: 1 where the classifier decides on it, else 0."
        ),
    )
    reads: Literal["completion", "prompt+completion"] = Field("completion", description="What it judges.")


class EnvironmentTerm(RewardSettings):
    """What the stage's environment says of an episode: its `get_reward()`."""

    kind: Literal["environment"] = Field(description="What the stage's `environment` says.")
    at: Literal["end", "turn"] = Field(
        "end",
        description=(
            "When it is paid. end: at the last token of the episode; turn: the environment is asked after "
            "each turn, and what changed since the last one is paid at the turn's last token. The sum is the "
            "same."
        ),
    )


class JudgeTerm(JudgeSettings, RewardSettings):
    """A language model that judges by a rubric: 0 for the worst, 1 for the best."""

    kind: Literal["judge"] = Field(description="A language model that judges by a rubric.")
    mode: Literal["pointwise", "pairwise", "ranking"] = Field(
        "pointwise",
        description=(
            "pointwise: each reply by itself, on `scale`; pairwise: every two replies to a prompt, or each "
            "with the one in `against`; ranking: all replies to a prompt at once. The last two give the "
            "share of the others that a reply is better than."
        ),
    )
    scale: tuple[int, int] = Field(
        (1, 10), description="Ends of the pointwise scale, of which the worst becomes 0 and the best 1."
    )
    against: str | None = Field(
        None, min_length=1, description="Column with a reply that each reply is compared with (pairwise)."
    )
    reference: str | None = Field(
        None,
        min_length=1,
        description="Column with a right answer that the judge is shown, where a row has one.",
    )

    @property
    def compares(self) -> bool:
        """Whether it compares the replies to a prompt with each other, and says nothing of a single one."""
        return self.mode != "pointwise" and self.against is None

    @model_validator(mode="after")
    def _sound_mode(self) -> JudgeTerm:
        check_scale(self.scale)
        if self.mode != "pointwise" and self.changes("scale"):
            raise ValueError(f"`scale` has no effect with `mode: {self.mode}`")
        if self.mode == "pointwise" and self.changes("both_orders"):
            raise ValueError("`both_orders` has no effect with `mode: pointwise`, which shows one reply")
        if self.mode != "pairwise" and self.against is not None:
            raise ValueError(f"`against` has no effect with `mode: {self.mode}`: set `mode: pairwise`")
        return self


class GymTerm(GymSettings, RewardSettings):
    """A task's own score, for rows of gym:NAME."""

    kind: Literal["gym"] = Field(description="What the task of a row of gym:NAME says.")


class CodeTerm(CodeRunSettings, RewardSettings):
    """Programs, run against their tests in a sandbox."""

    kind: Literal["code"] = Field(description="Python that the reply holds, run against a row's tests.")


class CodeSettings(RewardSettings):
    """How a reward that is code of somebody's is run."""

    isolate: bool = Field(
        True,
        description=(
            "Run it in a process of its own, so that an exit, a crash or a hang in it is an error that names "
            "it. false: within keel's process, where nothing can stop it."
        ),
    )
    timeout: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Seconds that a call, or its import, may take; null: 600 with `isolate`, else no limit.",
    )
    try_rows: bool = Field(
        True,
        description=(
            "Ask it about each distinct row of the data, with an empty reply, before anything is trained ("
            "for 20 s): a row that it fails on is found then. false: for one whose calls cost something."
        ),
    )

    @model_validator(mode="after")
    def _stoppable(self) -> CodeSettings:
        if self.timeout is not None and not self.isolate:
            raise ValueError("`timeout` has no effect with `isolate: false`: nothing can stop the function")
        return self


class FunctionTerm(CodeSettings):
    """A function of yours, in TRL's signature: f(prompts, completions, **columns) → list[float | None]."""

    kind: Literal["python"] = Field(description="A Python function of yours.")
    function: str = Field(description="module.function, or path/to/file.py:function.")

    @property
    def log_name(self) -> str:
        """The name under which it is logged: `name`, else the function's."""
        return self.name or self.function.replace(":", ".").rpartition(".")[2]


class PluginTerm(CodeSettings):
    """A reward that another package adds, in the signature of `python`. `plugin:NAME` is short for it."""

    kind: Literal["plugin"] = Field(description="A reward of an installed package.")
    function: str = Field(description="Its name in the entry points of the group keel.rewards.")

    @property
    def log_name(self) -> str:
        """The name under which it is logged: `name`, else the entry point's."""
        return self.name or self.function


RewardTerm = Annotated[
    LearnedTerm
    | AnswerTerm
    | VerdictTerm
    | FormatTerm
    | RegexTerm
    | LengthTerm
    | RepetitionTerm
    | KeywordsTerm
    | OverlongTerm
    | SimilarityTerm
    | ClassifierTerm
    | EnvironmentTerm
    | JudgeTerm
    | GymTerm
    | CodeTerm
    | FunctionTerm
    | PluginTerm,
    Field(discriminator="kind"),
]
BY_RULE = (  # no model in them, and nobody's code
    "answer", "code", "format", "gym", "keywords", "length", "overlong", "regex", "repetition", "verdict",
)  # fmt: skip
RULES = (*BY_RULE, "similarity", "classifier", "environment", "judge")  # all kinds that keel has itself


AsTerms = str | RewardTerm | list[str | RewardTerm]  # how rewards may be written


def as_terms(value: object) -> list[object]:
    """Short forms written out: a name is a learned model, `python:…` a function, one term a list of one."""

    def written_out(item: object) -> object:
        if not isinstance(item, str):
            return item
        if item.startswith("python:"):
            return {"kind": "python", "function": item.removeprefix("python:")}
        if item.startswith("plugin:"):
            return {"kind": "plugin", "function": item.removeprefix("plugin:")}
        return {"kind": "learned", "model": item}

    return [written_out(item) for item in as_list(value)]


def check_log_names(terms: list[RewardTerm]) -> list[RewardTerm]:
    """The terms. ValueError if two have one name, since their metrics would be one, or if every weight is
    0."""
    names = [term.log_name for term in terms]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ValueError(f"two rewards are called {twice!r}; give each a `name`")
    if terms and all(term.weight == 0 for term in terms):
        raise ValueError("every reward has `weight` 0: nothing would count; give one of them another weight")
    return terms


def check_source_filters(
    terms: Sequence[RewardTerm], data: Sequence[DataConfig], setting: str = "data"
) -> None:
    """ValueError for a `source_filter` that names none of the sources, and for a source without a reward."""
    sources = [source.source for source in data]
    lost = next(
        (term for term in terms if term.source_filter is not None and term.source_filter not in sources), None
    )
    if lost is not None:
        raise ValueError(
            f"reward {lost.log_name!r}: `source_filter` names {lost.source_filter!r}, which is no source of "
            f"{setting}; there are {', '.join(sources)}"
        )
    bare = next(
        (s for s in sources if terms and not any(term.source_filter in (None, s) for term in terms)), None
    )
    if bare is not None:
        raise ValueError(
            f"no reward is for the rows of {bare!r}: every one names another source in `source_filter`"
        )


def check_several(terms: Sequence[RewardTerm], where: str) -> None:
    """ValueError for a judge that compares replies with each other, in a place where a prompt has one reply.
    where: that place."""
    for term in terms:
        if isinstance(term, JudgeTerm) and term.compares:
            raise ValueError(
                f"reward {term.log_name!r}: `mode: {term.mode}` compares the replies to one prompt, and "
                f"{where} has one reply a prompt: set `mode: pointwise`, or pairwise with `against`"
            )


def models_of(terms: Sequence[RewardTerm]) -> list[tuple[str, str]]:
    """(setting, model) of the terms that read a model, as `Stage.references` has them."""
    settings = {"learned": "reward", "classifier": "classifier", "similarity": "similarity", "judge": "judge"}
    reading = [t for t in terms if isinstance(t, LearnedTerm | ClassifierTerm | SimilarityTerm | JudgeTerm)]
    here = [t for t in reading if not isinstance(t, JudgeTerm) or t.in_process]
    return [(settings[term.kind], term.model) for term in here]
