"""What the stages of a config start from: models and data, found, read and checked before anything is
trained."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)

from keel import worlds
from keel.accel.layer_kinds import carries_state
from keel.config import ModelConfig, RunConfig, Stage
from keel.config.parts import FROM_STAGE
from keel.config.rewards import RULES
from keel.data import chat, load, stream
from keel.data.stored.tokens import Preparation
from keel.errors import DataError, UsageError
from keel.models import lora, quantize
from keel.models.hub import go_offline_if_unreachable, may_be_on_hub
from keel.models.load import ModelSource, context_length, model_config
from keel.models.tokenizer import rows_needed
from keel.pipeline import held_out, reward_rows
from keel.pipeline.device import device_of
from keel.pipeline.kept_tokenizers import KeptTokenizers
from keel.rewards import answers, learned
from keel.rl.curriculum import PROMPT
from keel.stages import build_rewards, judges, people, samplers, tool_use
from keel.stages.collect import COMPARISONS
from keel.stages.gold import world_of
from keel.types import DataSource, PromptRecord, RecordType


@dataclass(frozen=True, slots=True)
class Judged:
    """What a stage's rewards said of the rows of one data set."""

    sources: list[DataSource]
    accept: tuple[RecordType, ...]
    faults: list[reward_rows.RowFault]  # rows on which one fails
    columns: Any  # that the rewards need: see `reward_rows.without`


@dataclass
class Sources:
    """Where a config's models lie and what its data hold; rows are read once a run."""

    config: RunConfig
    directory: Path  # of the run
    say: Callable[[str], None] = lambda line: None
    code: bool = True  # what the config brings may be run: functions of rewards, code of models
    preparation: Preparation = field(default_factory=Preparation)
    tokenizers: KeptTokenizers = field(default_factory=KeptTokenizers)
    _data: dict[str, load.Dataset] = field(default_factory=dict)
    _judged: dict[tuple[str | None, str], load.Dataset] = field(
        default_factory=dict  # (stage, data) → without the rows on which its rewards fail
    )
    _asked: dict[str, list[Judged]] = field(default_factory=dict)  # by stage, what `_judged` was made of
    _read_files: dict[str, str] = field(default_factory=dict)  # file → SHA-256 of what was read of it
    _said: bool = False  # that math-verify is missing

    # ------------------------------------------------------------ what the stages are given

    def stage_directory(self, name: str) -> Path:
        return self.directory / "stages" / name

    def resolve(self, name: str) -> str:
        """Where a model named in the config lies. UsageError for a path that is not there."""
        if name in self.config.stages:
            return str(self.stage_directory(name) / "model")
        path = Path(name).expanduser()
        if path.exists():
            return str(path)
        near = self._nearest_stage(name, 0.85)
        # gpt2 beside a stage gpt is more likely the hub's model than a slip of the finger
        slip = near is not None and "/" not in name and _without_number(near) != _without_number(name)
        looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
        bare = not looks_local and (slip or not may_be_on_hub(name))
        if looks_local or bare:
            near = near or self._nearest_stage(name, 0.5)
            hint = f"; did you mean the stage {near!r}?" if near else "." if bare else ""
            way_out = f" For a folder write ./{name}, for a hub model owner/{name}" if bare else ""
            raise UsageError(f"no stage, folder or hub model {name!r}{hint}{way_out}")
        return name

    def _nearest_stage(self, name: str, cutoff: float) -> str | None:
        return next(iter(get_close_matches(name, list(self.config.stages), n=1, cutoff=cutoff)), None)

    def load_data(
        self, sources: Sequence[DataSource], accept: Sequence[RecordType], stage: str | None = None
    ) -> load.Dataset:
        """The validated rows; read once a run. What a stage makes lies in its directory. stage: without those
        on which a reward of this stage fails."""
        key = self._key(sources, accept)
        if key not in self._data:
            located = [self._located(source) for source in sources]
            before = load.digests(from_outside(sources), self.preparation.cache)
            self._data[key] = load.load(located, accept, self.config.seed, self.preparation)
            self._note_read(before, load.digests(from_outside(sources), self.preparation.cache))
        return self._judged.get((stage, key), self._data[key])

    def _note_read(self, before: Mapping[str, str], after: Mapping[str, str]) -> None:
        """Remember what was read. DataError for a file that was edited meanwhile, or since it was read for
        another stage."""
        for path, digest in after.items():
            if before.get(path) != digest:
                raise DataError(f"{path}: it was changed while it was being read; start again")
            if self._read_files.setdefault(path, digest) != digest:
                raise DataError(f"{path}: it was changed since it was read for another stage; start again")

    def check_unedited(self, name: str) -> None:
        """DataError where a file is no longer what was read of it for a stage: its fingerprint would be that
        of other rows."""
        stage = self.config.stages[name]
        for sources, _ in stage.all_data():
            for path, digest in load.digests(from_outside(sources), self.preparation.cache).items():
                if self._read_files.get(path, digest) != digest:
                    raise DataError(
                        f"{name}: {path} was changed since it was read; what is done is kept, and the same "
                        "command goes on with what is there now"
                    )

    def _key(self, sources: Sequence[DataSource], accept: Sequence[RecordType]) -> str:
        return json.dumps([[repr(self._located(source)) for source in sources], list(accept)])

    def _located(self, source: DataSource) -> DataSource:
        if not source.source.startswith(FROM_STAGE):
            return source
        name = source.source.removeprefix(FROM_STAGE)
        return replace(source, source=str(self.stage_directory(name) / COMPARISONS))

    # ------------------------------------------------------------ checks

    def check(self, names: Sequence[str], *, hub: bool = False) -> dict[str, str]:
        """Read and validate all data, find all models and ask the rewards about their rows before anything is
        trained. Returns a summary line a stage.

        hub: also ask the hub for the configs of models that are not on this machine.
        """
        device_of(self.config)
        if hub:
            self._reach_hub(names)
        for name in names:
            self._check_models(name, hub)
            tool_use.check(self.config.stages[name], name)
        lines: dict[str, str] = {}
        for name in names:
            stage = self.config.stages[name]
            for sources, accept in stage.all_data():
                if there := from_outside(sources):
                    self._read(name, there, accept)
            self._check_rewards(name)
            self._check_curriculum(name)
            lines[name] = self.summary(name, ahead=True)
            self._check_held_out(name)
            if stage.asks_people:
                people.check(stage.votes_in)
            for gold, data in stage.gold_judges():
                if stage.leaves == "comparisons":
                    worlds.annotators(world_of(gold))
                self._check_gold(gold, data)
        return lines

    def _reach_hub(self, names: Sequence[str]) -> None:
        """Find out in seconds whether the hub answers, where a stage names a model that is not here."""
        named = [source for name in names for _, source in self.config.stages[name].references()]
        away = [
            one for one in named if one not in self.config.stages and not Path(self.resolve(one)).exists()
        ]
        if away and go_offline_if_unreachable():
            self.say(
                f"the hub cannot be reached, which {away[0]!r} is asked of: only its local cache is used"
            )

    def _read(self, name: str, sources: Sequence[DataSource], accept: Sequence[RecordType]) -> None:
        """Validate a stage's rows. The error of a bad one names the stage."""
        try:
            self.load_data(sources, accept)
        except DataError as error:
            raise DataError(f"{name}: {error}") from None

    def summary(self, name: str, *, ahead: bool = False) -> str:
        """What a stage works on, in a line; data by label label by label. ahead: without reading what other
        stages have yet to make."""
        stage = self.config.stages[name]
        labelled = getattr(stage, "data", None)
        if isinstance(labelled, Mapping):
            return "; ".join(f"{label}: {self._labelled(stage, label)}" for label in labelled)
        if stage.streams:
            return " + ".join(stream.described(sources) for sources, _ in stage.streamed_data())
        if not stage.main_data():
            return "no data"
        sources, accept = stage.main_data()[0]
        there = from_outside(sources) if ahead else sources
        made = [f"what {one} collects" for _, one in stage.data_stages()] if ahead else []
        read = [load.summary(self.load_data(there, accept, name))] if there else []
        whole, apart = " + ".join([*read, *made]), held_out.line(self.config, name, self.load_data)
        return f"{whole} · {apart}" if apart else whole

    def _labelled(self, stage: Stage, label: str) -> str:
        """The texts of one label."""
        sources = stage.data[label]  # pyright: ignore[reportAttributeAccessIssue]
        datasets = [self.load_data([source.plain()], stage.record_types) for source in sources]
        rows = sum(len(dataset.records) for dataset in datasets)
        return load.summary(datasets[0]) if len(datasets) == 1 else f"{rows:,} rows · {len(datasets)} sources"

    def _check_models(self, name: str, hub: bool) -> None:
        """Every model that no stage makes is there and of the right sort, and sequences fit the one that is
        used."""
        stage = self.config.stages[name]
        for setting, source in stage.references():
            self._check_reference(name, setting, source, hub)
        if stage.starts_from is not None and stage.starts_from.init:
            _check_family(stage, model_config(self.source(stage, "model", None)), "model.init")
        self._check_tokenizer(name, hub)
        if hub:  # only a run needs them: a plan is also for another machine
            self._check_machine(name)
        self._check_lengths(name, hub)
        self._check_judges(name, hub)
        self._check_packing(name, hub)

    def _check_reference(self, name: str, setting: str, source: str, hub: bool) -> None:
        """One model that a setting names."""
        ours = source in self.config.stages or Path(source).exists()
        if setting == "reward" and source in RULES and not ours:
            raise UsageError(
                f"{name}: `reward: {source}` would be a model of that name; for the built-in reward write "
                f"reward: {{kind: {source}}} with its settings"
            )
        stage, place = self.config.stages[name], self.resolve(source)
        if setting == "reward" and lora.is_bare(place):
            _check_adapter(stage, name, place)
        elif source not in self.config.stages and (hub or Path(place).exists()):
            config = self._config_of(stage, setting, source)
            if setting == "reward":
                learned.check_config(config, place)
                if Path(place).exists():
                    learned.other_members(config, place)
            elif setting == "judge":
                _check_writes(config, place)
            elif setting not in ("classifier", "similarity"):  # these write nothing
                _check_family(stage, config, place)

    def _check_judges(self, name: str, hub: bool) -> None:
        """A judge that runs in keel's process has room for a question beside its answer."""
        stage = self.config.stages[name]
        asking: list[Any] = [term for term in stage.reward_terms() if term.kind == "judge"]
        for judge in [*asking, *getattr(stage, "judges", [])]:
            if not judge.in_process:
                continue
            context: int | None = None
            if judge.model in self.config.stages:
                context = self.context(judge.model, hub)
            elif hub or Path(self.resolve(judge.model)).exists():
                context = context_length(self._config_of(stage, "judge", judge.model))
            judges.check_room(judge, context, f"{name}: judge {judge.log_name!r}")

    def _check_lengths(self, name: str, hub: bool) -> None:
        """What the stage reads and writes fits the model's context."""
        stage, context = self.config.stages[name], self.context(name, hub)
        longest = getattr(stage, "max_length", None)
        if longest is not None and context is not None and longest > context:
            raise UsageError(f"{name}: max_length {longest} exceeds the model's context of {context}")
        room = longest or context
        if room is not None and stage.replies is not None and stage.replies.max_new_tokens >= room:
            raise UsageError(
                f"{name}: sampling.max_new_tokens {stage.replies.max_new_tokens} leaves no room for a prompt "
                f"within {room} tokens"
            )

    def _check_packing(self, name: str, hub: bool) -> None:
        """Rows are not packed for a model whose layers hand a state from one example to the next. (Others are
        tried when they are there.)"""
        stage = self.config.stages[name]
        if not stage.fills_rows or stage.cuts_texts:  # pieces of one text stand alone in their rows
            return
        config = self.root_config(name, hub)
        if config is not None and carries_state(config):
            raise UsageError(
                f"{name}: {config.get_text_config().model_type} cannot read several examples in a row: its "
                "layers hand a state from token to token, also from one example to the next; set packing: "
                "false"
            )

    def _check_rewards(self, name: str) -> None:
        """Rules and functions can be made, the columns that they compare with are there, and no row makes one
        fail: `on_bad` decides about those that do."""
        stage = self.config.stages[name]
        terms = stage.reward_terms()
        if not terms:
            return
        build_rewards.check(terms, name)
        self._say_what_compares(name)
        held_out = stage.held_out_data()
        with reward_rows.functions_of(terms if self.code else (), name) as functions:
            for sources, accept in [*stage.main_data()[:1], *([held_out] if held_out else [])]:
                if sources := from_outside(sources):
                    self._check_reward_rows(name, sources, accept, functions)

    def _check_reward_rows(
        self,
        name: str,
        sources: Sequence[DataSource],
        accept: Sequence[RecordType],
        functions: Mapping[str, Any],
    ) -> None:
        """Ask the rewards about each row of a data set; what is left of it is what the stage is given."""
        terms = self.config.stages[name].reward_terms()
        dataset = self.load_data(sources, accept)
        if not isinstance(dataset.records[0], PromptRecord):
            return
        reward_rows.check_columns(name, terms, dataset.records)
        policy = {source.source: source.on_bad for source in sources}
        found: list[reward_rows.RowFault] = []
        progress = self.preparation.progress
        for fault in reward_rows.faults(name, terms, dataset.records, self.say, functions, progress):
            if policy.get(dataset.records[fault.index].columns["source"]) != "skip":
                raise DataError(f"{name}: {fault.reason}; mend the row, or leave such rows out: on_bad: skip")
            found.append(fault)
        if len(found) == len(dataset.records):
            raise DataError(f"{name}: a reward fails on every row; the first: {found[0].reason}")
        if found:
            lost = f"{len(found):,} rows are left out, since a reward fails on them"
            self.say(f"{name}: {lost}; the first: {found[0].reason}")
        names = reward_rows.required_columns(terms, functions)
        self.take_judged(name, [Judged(list(sources), tuple(accept), found, names)])

    def judged(self, name: str) -> list[Judged]:
        """What came of asking a stage's rewards about its rows, for other processes."""
        return self._asked.get(name, [])

    def take_judged(self, name: str, judged: Sequence[Judged]) -> None:
        """Leave out the rows of a stage on which its rewards fail."""
        for one in judged:
            dataset = self.load_data(one.sources, one.accept)
            left = reward_rows.without(dataset, one.faults, one.columns)
            self._judged[name, self._key(one.sources, one.accept)] = left
        self._asked.setdefault(name, []).extend(judged)

    def _check_curriculum(self, name: str) -> None:
        """The column that pass rates are kept by has a value in every row."""
        curriculum = getattr(self.config.stages[name], "curriculum", None)
        if curriculum is None or curriculum.by == PROMPT:
            return
        for sources, accept in self.config.stages[name].main_data()[:1]:
            there = from_outside(sources)
            for record in self.load_data(there, accept).records if there else ():
                if record.columns.get(curriculum.by) is None:
                    raise DataError(
                        f"{name}: {record.origin}: it has no value in the column {curriculum.by!r}, which "
                        "`curriculum.by` names"
                    )

    def _say_what_compares(self, name: str) -> None:
        """Once a run: formulas are compared without math-verify where that is not installed."""
        compares = any(term.kind == "answer" for term in self.config.stages[name].reward_terms())
        if compares and not self._said and not answers.math_verify_is_here():
            self._said = True
            self.say(
                f"{name}: math-verify is not installed, so answers that are formulas are compared as text "
                "(numbers, fractions, roots, sets and intervals by value): pip install 'keel-rlhf[math]'"
            )

    def _config_of(self, stage: Stage, setting: str, source: str) -> Any:
        """The config of a model from outside. A UsageError names the stage that was perhaps meant."""
        try:
            return model_config(self.source(stage, setting, self.resolve(source)))
        except UsageError as error:
            near = self._nearest_stage(source, 0.6)
            raise UsageError(f"{error}; did you mean the stage {near!r}?" if near else str(error)) from None

    def _check_tokenizer(self, name: str, hub: bool) -> None:
        """A new model's `tokenizer`, which is a folder or a hub id, can be loaded, and another model has a
        row for each token of its own."""
        stage = self.config.stages[name]
        model = stage.starts_from
        if model is not None and model.path is not None and model.path not in self.config.stages:
            self._check_rows(stage, model, hub)
        place = model and model.tokenizer
        if model is None or place is None:
            return
        if place in self.config.stages and not Path(place).exists():
            folder = self.stage_directory(place) / "model"
            raise UsageError(f"{name}: model.tokenizer takes a folder or hub id, not a stage; write {folder}")
        if hub or Path(place).exists() or place.startswith((".", "/", "~")):
            try:
                self.tokenizers.load(place, trust_remote_code=self.trusts(stage), revision=model.revision)
            except Exception as error:  # the tokenizers library raises bare ones for a broken file
                raise UsageError(f"{name}: model.tokenizer: {error}") from None

    def _check_rows(self, stage: Stage, model: ModelConfig, hub: bool) -> None:
        place, remote = self.resolve(str(model.path)), self.trusts(stage)
        if stage.trusts_remote_code and not remote:  # a plan, which runs no code of a model's
            return
        if hub or Path(place).exists():
            tokenizer = self.tokenizers.load(place, trust_remote_code=remote, revision=model.revision)
            rows_needed(self.source(stage, "model", place), tokenizer, resize=model.resize)

    def _check_machine(self, name: str) -> None:
        """What the stage's settings need of this machine is here."""
        stage = self.config.stages[name]
        asked = [getattr(term, "quantize", None) for term in stage.reward_terms()]
        asked.append(stage.starts_from and stage.starts_from.quantize)
        asked.append(getattr(stage, "reference_quantize", None))
        try:
            if any(asked):
                quantize.check()
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from None
        for term in stage.reward_terms():
            if term.kind == "code":
                build_rewards.sandbox_of(term, f"{name}: reward {term.log_name!r}")
        asking = [term for term in stage.reward_terms() if term.kind == "judge"]
        for judge in [*asking, *getattr(stage, "judges", [])]:
            judges.check_machine(judge, f"{name}: judge {judge.log_name!r}")
        if (sampler := getattr(stage, "rollout", None)) is not None:
            samplers.check_machine(sampler, name)
        if getattr(stage, "offload", False) and device_of(self.config).type == "cpu":
            raise UsageError(
                f"{name}: `offload` has no effect on a CPU, where all models lie anyway; leave it out"
            )

    def _check_held_out(self, name: str) -> None:
        """The rows evaluated on are like the rows trained on: of one type, and conversations only if those
        are."""
        stage = self.config.stages[name]
        setting = stage.held_out_data()
        if setting is None or stage.streams:
            return
        dataset = self.load_data(*stage.main_data()[0])
        try:
            evaluated = self.load_data(setting[0], (dataset.kind,))
        except DataError as error:
            raise DataError(f"{name}: eval_data must be rows of the same type as data: {error}") from None
        if not load.forms(evaluated) <= load.forms(dataset):
            raise DataError(
                f"{name}: eval_data is {load.described(evaluated)}, but data is {load.described(dataset)}: "
                "the "
                "model would be evaluated on a form that it is not trained on; give both as text, or both as "
                "conversations"
            )

    def context(self, name: str, hub: bool = False) -> int | None:
        """The context of the model that stage `name` works on; None where unknown."""
        config = self.root_config(name, hub)
        return None if config is None else context_length(config)

    def root_config(self, name: str, hub: bool) -> Any | None:
        """The config of the model that stage `name` works on, found at the root of its chain; None where
        unknown."""
        stage = self.config.stages[name]
        model = stage.starts_from
        if model is None and not stage.inputs():
            return None  # a kind by another package that reads no model
        path = model.path if model else stage.inputs()[0]
        if path in self.config.stages:
            return self.root_config(path, hub)
        if path is not None and not (hub or Path(self.resolve(path)).exists()):
            return None
        return model_config(self.source(stage, "model", path and self.resolve(path)))

    def source(self, stage: Stage, setting: str, place: str | None) -> ModelSource:
        """The model that a stage's `setting` names, which lies at `place`; a new one for `model: {init:
        …}`."""
        model: ModelConfig | None = stage.starts_from
        init = model.init.model_dump() if model and model.init and setting == "model" else None
        revision = model.revision if model and setting == "model" else None
        return ModelSource(place, init, trust_remote_code=self.trusts(stage), revision=revision)

    def trusts(self, stage: Stage) -> bool:
        """Whether Python that comes with the stage's models may be run."""
        return self.code and stage.trusts_remote_code

    def is_bare(self, name: str) -> bool:
        """Whether a model that no stage makes is an adapter without a model."""
        return name not in self.config.stages and lora.is_bare(self.resolve(name))

    def _check_gold(self, gold: str, data: tuple[list[DataSource], tuple[RecordType, ...]]) -> None:
        """The world can judge replies to these prompts. DataError at the first that it cannot."""
        world = worlds.load(world_of(gold))
        for record in self.load_data(*data).records:
            if isinstance(record, PromptRecord):
                try:
                    world.gold(chat.user_text(record.prompt), "", record.columns)
                except DataError as error:
                    raise DataError(f"{record.origin}: {gold} cannot judge replies to it: {error}") from None


def from_outside(sources: Sequence[DataSource]) -> list[DataSource]:
    """The sources that no stage of the run makes: what can be read before anything has run."""
    return [source for source in sources if not source.source.startswith(FROM_STAGE)]


def functions_of(stage: Stage) -> list[str]:
    """The Python code of a person's that a stage names: functions of rewards, tools, an environment."""
    named = [term.function for term in stage.reward_terms() if term.kind == "python"]
    return [*named, *stage.tool_code()]


def _check_family(stage: Stage, config: PreTrainedConfig, place: str) -> None:
    """UsageError for a model that transformers cannot give the head it needs. One with code of its own is not
    judged."""
    scores = stage.leaves in ("reward model", "classifier")
    family: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    remote = stage.trusts_remote_code and hasattr(config, "auto_map")
    if type(config) not in family._model_mapping and not remote:
        lack = "can have no score head" if scores else "is no language model that can write"
        raise UsageError(f"{place!r} {lack}: its type is {config.model_type}")
    if not scores:
        _check_direction(config, place)


def _check_writes(config: PreTrainedConfig, place: str) -> None:
    """UsageError for a judge's model that is no language model."""
    if type(config) not in AutoModelForCausalLM._model_mapping and not hasattr(config, "auto_map"):
        raise UsageError(f"{place!r} is no language model that can write: its type is {config.model_type}")
    _check_direction(config, place)


def _check_direction(config: PreTrainedConfig, place: str) -> None:
    if reads_both_ways(config):
        raise UsageError(
            f"{place!r} is no language model that can write: it is an encoder (its type is "
            f"{config.model_type}, "
            "without `is_decoder`), which sees the tokens that it would have to predict"
        )


def reads_both_ways(config: PreTrainedConfig) -> bool:
    """Whether a model of this config attends to later tokens too, as BERT does. transformers gives such a
    type a language model's head all the same, and masks what comes later only with `is_decoder` (XLM:
    `causal`)."""
    masks = ("is_decoder", "is_encoder_decoder", "causal")
    encoder: Any = AutoModelForMaskedLM
    return type(config) in encoder._model_mapping and not any(getattr(config, name, False) for name in masks)


def _check_adapter(stage: Stage, name: str, place: str) -> None:
    """UsageError for a reward model that is an adapter and no model, where there is no base for it."""
    if getattr(stage, "sharing", None) != "adapters":
        raise UsageError(
            f"{name}: {place!r} holds an adapter and no model: it is used with `sharing: adapters`, by a "
            "stage "
            "whose `model` is its base"
        )
    lora.settings_of(Path(place))


def _without_number(name: str) -> str:
    return re.sub(r"[-_.]?\d+$", "", name)
