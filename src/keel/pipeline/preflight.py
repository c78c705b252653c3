"""What the stages of a config start from: models and data, found, read and checked before anything is
trained."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

from keel import worlds
from keel.config import (
    AnyStage,
    BestOfNConfig,
    ClassifierConfig,
    CollectConfig,
    DPOConfig,
    EvaluateConfig,
    OnPolicy,
    RewardConfig,
    RunConfig,
    Stage,
    Supervised,
    Training,
)
from keel.config.parts import FROM_STAGE
from keel.data import chat, load
from keel.errors import DataError, UsageError
from keel.models import lora, quantize
from keel.models.load import ModelSource, context_length, load_tokenizer, model_config
from keel.pipeline.fingerprint import device_of
from keel.plan.model_memory import Lora
from keel.rewards import learned
from keel.rl import heldout_judge
from keel.stages import build_rewards
from keel.stages.collect import COMPARISONS
from keel.types import DataSource, PromptRecord, RecordType

ACCEPTS: Mapping[str, tuple[RecordType, ...]] = {
    "pretrain": ("text",), "sft": ("demonstration", "text"), "reward": ("preference",), "classifier": ("text",), "ppo": ("prompt",), "grpo": ("prompt",), "best_of_n": ("prompt",), "collect": ("prompt",), "evaluate": ("prompt",),
}  # fmt: skip


@dataclass
class Sources:
    """Where a config's models lie and what its data hold; rows are read once a run."""

    config: RunConfig
    directory: Path  # of the run
    _data: dict[str, load.Dataset] = field(default_factory=dict)

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
        if looks_local or slip:
            hint = f"; did you mean the stage {near!r}?" if near else ""
            way_out = f" For a folder write ./{name}, for a hub model owner/{name}" if slip else ""
            raise UsageError(f"no stage, folder or hub model {name!r}{hint}{way_out}")
        return name

    def _nearest_stage(self, name: str, cutoff: float) -> str | None:
        return next(iter(get_close_matches(name, list(self.config.stages), n=1, cutoff=cutoff)), None)

    def load_data(self, sources: Sequence[DataSource], accept: Sequence[RecordType]) -> load.Dataset:
        """The validated rows; read once a run. What a stage makes lies in its directory."""
        sources = [self._located(source) for source in sources]
        key = json.dumps([[repr(source) for source in sources], list(accept)])
        if key not in self._data:
            self._data[key] = load.load(sources, accept, self.config.seed)
        return self._data[key]

    def _located(self, source: DataSource) -> DataSource:
        if not source.source.startswith(FROM_STAGE):
            return source
        name = source.source.removeprefix(FROM_STAGE)
        return replace(source, source=str(self.stage_directory(name) / COMPARISONS))

    # ------------------------------------------------------------ checks

    def check(self, names: Sequence[str], *, hub: bool = False) -> dict[str, str]:
        """Read and validate all data and find all models before anything is trained. Returns a summary line a
        stage.

        hub: also ask the hub for the configs of models that are not on this machine.
        """
        device_of(self.config)
        for name in names:
            self._check_models(name, hub)
        lines: dict[str, str] = {}
        for name in names:
            stage = self.config.stages[name]
            for sources, accept in data_of(stage):
                if there := from_outside(sources):
                    self.load_data(there, accept)
            lines[name] = self.summary(name, ahead=True)
            self._check_rewards(name)
            if getattr(stage, "eval_data", None) and not isinstance(stage, ClassifierConfig):
                self._check_eval_data(name)
            if isinstance(stage, EvaluateConfig) and stage.gold:
                self._check_gold(stage.gold, data_of(stage)[0])
            if isinstance(stage, CollectConfig) and stage.world:
                worlds.annotators(stage.world)
                self._check_gold(stage.annotators, data_of(stage)[0])
            if isinstance(stage, OnPolicy) and stage.judge and stage.judge.gold:
                self._check_gold(stage.judge.gold, data_of(stage)[1 if stage.eval_data else 0])
        return lines

    def summary(self, name: str, *, ahead: bool = False) -> str:
        """What a stage works on, in a line; a classifier's data label by label. ahead: without reading what
        other stages have yet to make."""
        stage = self.config.stages[name]
        if not isinstance(stage, ClassifierConfig):
            sources, accept = main_data_of(stage)[0]
            there = from_outside(sources) if ahead else sources
            made = [f"what {one} collects" for _, one in stage.data_stages()] if ahead else []
            return " + ".join([*([load.summary(self.load_data(there, accept))] if there else []), *made])
        lines: list[str] = []
        for label in stage.labels:
            found = [self.load_data([s.plain()], ACCEPTS["classifier"]) for s in stage.data[label]]
            rows = sum(len(dataset.records) for dataset in found)
            several = f"{rows:,} rows · {len(found)} sources"
            lines.append(f"{label}: {load.summary(found[0]) if len(found) == 1 else several}")
        return "; ".join(lines)

    def _check_models(self, name: str, hub: bool) -> None:
        """Every model that no stage makes is there and of the right sort, and sequences fit the one that is
        used."""
        stage = self.config.stages[name]
        for setting, source in stage.references():
            place = self.resolve(source)
            if setting == "reward" and lora.is_bare(place):
                _check_adapter(stage, name, place)
                continue
            if source not in self.config.stages and (hub or Path(place).exists()):
                found = self._config_of(stage, setting, source)
                if setting == "reward":
                    learned.check_config(found, place)
                    if Path(place).exists():
                        learned.other_members(found, place)
                elif setting not in ("classifier", "similarity"):  # these write nothing
                    _check_family(stage, found, place)
        if isinstance(stage, Training) and stage.model.init:
            _check_family(stage, model_config(self.source(stage, "model", None)), "model.init")
        self._check_tokenizer(name, hub)
        if hub:  # only a run needs them: a plan is also for another machine
            self._check_machine(name)
        context = self.context(name, hub)
        longest = getattr(stage, "max_length", None)
        if longest is not None and context is not None and longest > context:
            raise UsageError(f"{name}: max_length {longest} exceeds the model's context of {context}")
        room = longest or context
        if room is not None and isinstance(stage, OnPolicy | BestOfNConfig | CollectConfig | EvaluateConfig):
            wanted = stage.sampling.max_new_tokens
            if wanted >= room:
                raise UsageError(
                    f"{name}: sampling.max_new_tokens {wanted} leaves no room for a prompt within {room} tokens"
                )

    def _check_rewards(self, name: str) -> None:
        """Rules and functions can be made, and the columns that they compare with are there."""
        stage = self.config.stages[name]
        terms = _rewards_of(stage)
        if not terms:
            return
        build_rewards.check(terms, name)
        records = self.load_data(*data_of(stage)[0]).records
        for term in terms:
            column = {"answer": "column", "similarity": "to"}.get(term.kind)
            wanted = getattr(term, column) if column else None
            if wanted is not None and not any(wanted in record.columns for record in records):
                raise DataError(
                    f"{name}: reward {term.log_name!r}: the data have no column {wanted!r} (`{column}`)"
                )

    def _config_of(self, stage: AnyStage, setting: str, source: str) -> Any:
        """The config of a model from outside. A UsageError names the stage that was perhaps meant."""
        try:
            return model_config(self.source(stage, setting, self.resolve(source)))
        except UsageError as error:
            near = self._nearest_stage(source, 0.6)
            raise UsageError(f"{error}; did you mean the stage {near!r}?" if near else str(error)) from None

    def _check_tokenizer(self, name: str, hub: bool) -> None:
        """A new model's `tokenizer`, which is a folder or a hub id, can be loaded."""
        stage = self.config.stages[name]
        place = stage.model.tokenizer if isinstance(stage, Training) else None
        if place is None or not isinstance(stage, Training):
            return
        if place in self.config.stages and not Path(place).exists():
            folder = self.stage_directory(place) / "model"
            raise UsageError(f"{name}: model.tokenizer takes a folder or hub id, not a stage; write {folder}")
        if hub or Path(place).exists() or place.startswith((".", "/", "~")):
            try:
                load_tokenizer(
                    place, trust_remote_code=stage.model.trust_remote_code, revision=stage.model.revision
                )
            except Exception as error:  # the tokenizers library raises bare ones for a broken file
                raise UsageError(f"{name}: model.tokenizer: {error}") from None

    def _check_machine(self, name: str) -> None:
        """What the stage's settings need of this machine is here."""
        stage = self.config.stages[name]
        asked = [getattr(term, "quantize", None) for term in _rewards_of(stage)]
        asked.append(stage.model.quantize if isinstance(stage, Training) else None)
        asked.append(getattr(stage, "reference_quantize", None))
        try:
            if any(asked):
                quantize.check()
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from None
        if getattr(stage, "offload", False) and device_of(self.config).type == "cpu":
            raise UsageError(
                f"{name}: `offload` has no effect on a CPU, where all models lie anyway; leave it out"
            )

    def _check_eval_data(self, name: str) -> None:
        """The rows evaluated on are like the rows trained on: of one type, and conversations only if those
        are."""
        (sources, accept), (eval_sources, _), *_ = data_of(self.config.stages[name])
        dataset = self.load_data(sources, accept)
        try:
            held = self.load_data(eval_sources, (dataset.kind,))
        except DataError as error:
            raise DataError(f"{name}: eval_data must be rows of the same type as data: {error}") from None
        if not load.forms(held) <= load.forms(dataset):
            raise DataError(
                f"{name}: eval_data is {load.described(held)}, but data is {load.described(dataset)}: the model would be "
                "evaluated on a form that it is not trained on; give both as text, or both as conversations"
            )

    def context(self, name: str, hub: bool = False) -> int | None:
        """The context of the model that stage `name` works on, found at the root of its chain; None where
        unknown."""
        stage = self.config.stages[name]
        model = stage.model if isinstance(stage, Training) else None
        path = model.path if model else stage.inputs()[0]
        if path in self.config.stages:
            return self.context(path, hub)
        if path is not None and not (hub or Path(self.resolve(path)).exists()):
            return None
        return context_length(model_config(self.source(stage, "model", path and self.resolve(path))))

    def source(self, stage: AnyStage, setting: str, place: str | None) -> ModelSource:
        """The model that a stage's `setting` names, which lies at `place`; a new one for `model: {init:
        …}`."""
        model = stage.model if isinstance(stage, Training) else None
        init = model.init.model_dump() if model and model.init and setting == "model" else None
        revision = model.revision if model and setting == "model" else None
        return ModelSource(place, init, trust_remote_code=trusts(stage), revision=revision)

    def is_bare(self, name: str) -> bool:
        """Whether a model that no stage makes is an adapter without a model."""
        return name not in self.config.stages and lora.is_bare(self.resolve(name))

    def adapter(self, stage: AnyStage, name: str) -> Lora | None:
        """As which adapter a reward model was trained, or will be, on the model that `stage` starts from;
        None for one with weights of its own."""
        if not isinstance(stage, OnPolicy) or stage.model.path is None:
            return None
        made = self.config.stages.get(name)
        if isinstance(made, RewardConfig):
            return lora_of(made) if made.model.path == stage.model.path else None
        place, base = (Path(self.resolve(path)) for path in (name, stage.model.path))
        folder = lora.folder_of(str(place)) if place.exists() else None
        if folder is None or not base.exists() or not lora.belongs_to(folder, ModelSource(str(base))):
            return None
        settings = lora.settings_of(folder)
        targets = settings.target_modules
        return Lora(settings.r, targets if isinstance(targets, str) else tuple(targets))

    def _check_gold(self, gold: str, data: tuple[list[DataSource], tuple[RecordType, ...]]) -> None:
        """The world can judge replies to these prompts. DataError at the first that it cannot."""
        world = worlds.load(heldout_judge.world_of(gold))
        for record in self.load_data(*data).records:
            if isinstance(record, PromptRecord):
                try:
                    world.gold(chat.user_text(record.prompt), "", record.columns)
                except DataError as error:
                    raise DataError(f"{record.origin}: {gold} cannot judge replies to it: {error}") from None


def lora_of(stage: Training) -> Lora | None:
    """The adapters that a stage trains."""
    if stage.lora is None:
        return None
    targets = stage.lora.target_modules
    return Lora(stage.lora.r, targets if isinstance(targets, str) else tuple(targets), stage.lora.dropout > 0)


def main_data_of(stage: Stage) -> list[tuple[list[DataSource], tuple[RecordType, ...]]]:
    """What a stage learns from or works on, as `data_of` has it: one entry, for a classifier one for each
    source."""
    if isinstance(stage, ClassifierConfig):
        sources = [source for label in stage.labels for source in stage.data[label]]
        return [([source.plain()], ACCEPTS[stage.kind]) for source in sources]
    return data_of(stage)[:1]


def from_outside(sources: Sequence[DataSource]) -> list[DataSource]:
    """The sources that no stage of the run makes: what can be read before anything has run."""
    return [source for source in sources if not source.source.startswith(FROM_STAGE)]


def trusts(stage: AnyStage | None) -> bool:
    """Whether Python that comes with a stage's models may be run."""
    owner = stage.model if isinstance(stage, Training) else stage
    return bool(owner and owner.trust_remote_code)


def _rewards_of(stage: Stage) -> list[Any]:
    """The terms of a stage's rewards, its judge's included."""
    judge = stage.judge if isinstance(stage, OnPolicy) else None
    return [*(getattr(stage, "reward", None) or []), *((judge and judge.reward) or [])]


def functions_of(stage: Stage) -> list[str]:
    """The Python functions that a stage's rewards name."""
    terms = _rewards_of(stage)
    return [term.function for term in terms if term.kind == "python"]


def data_of(stage: Stage) -> list[tuple[list[DataSource], tuple[RecordType, ...]]]:
    """Every data setting of a stage, with the record types it can use; the main ones first."""
    assert isinstance(stage, Training | EvaluateConfig | CollectConfig)
    if isinstance(stage, ClassifierConfig):
        held = [source for sources in (stage.eval_data or {}).values() for source in sources]
        return [*main_data_of(stage), *(([source.plain()], ACCEPTS[stage.kind]) for source in held)]
    accept = stage.record_types if isinstance(stage, DPOConfig) else ACCEPTS[stage.kind]
    found = [(stage.data, accept)]
    if isinstance(stage, Supervised) and stage.eval_data:
        found.append((stage.eval_data, accept))
    if isinstance(stage, OnPolicy) and stage.eval_data:
        found.append((stage.eval_data, ("prompt",)))
    if isinstance(stage, OnPolicy) and stage.ptx:
        found.append((stage.ptx.data, ("text",)))
    if isinstance(stage, EvaluateConfig) and stage.comparisons:
        found.append((stage.comparisons, ("preference",)))
    return [([source.plain() for source in sources], accept) for sources, accept in found]


def _check_family(stage: AnyStage, config: Any, place: str) -> None:
    """UsageError for a model that transformers cannot give the head it needs. One with code of its own is not
    judged."""
    scores = stage.kind in ("reward", "classifier")
    family: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    remote = trusts(stage) and hasattr(config, "auto_map")
    if type(config) not in family._model_mapping and not remote:
        lack = "can have no score head" if scores else "is no language model that can write"
        raise UsageError(f"{place!r} {lack}: its type is {config.model_type}")
    if not scores and _reads_both_ways(config):
        raise UsageError(
            f"{place!r} is no language model that can write: it is an encoder (its type is {config.model_type}, without `is_decoder`), which sees the tokens that it would have to predict"
        )


def _reads_both_ways(config: Any) -> bool:
    """Whether a model of this config attends to later tokens too, as BERT does. transformers gives such a
    type a language model's head all the same, and masks what comes later only with `is_decoder` (XLM:
    `causal`)."""
    masks = ("is_decoder", "is_encoder_decoder", "causal")
    encoder: Any = AutoModelForMaskedLM
    return type(config) in encoder._model_mapping and not any(getattr(config, name, False) for name in masks)


def _check_adapter(stage: AnyStage, name: str, place: str) -> None:
    """UsageError for a reward model that is an adapter and no model, where there is no base for it."""
    if getattr(stage, "sharing", None) != "adapters":
        raise UsageError(
            f"{name}: {place!r} holds an adapter and no model: it is used with `sharing: adapters`, by a stage whose `model` is its base"
        )
    lora.settings_of(Path(place))


def _without_number(name: str) -> str:
    return re.sub(r"[-_.]?\d+$", "", name)
