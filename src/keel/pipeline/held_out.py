"""What a stage evaluates on, beside what it and the stages before it train on: counted by prompt."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from keel.config import RunConfig
from keel.config.parts import FROM_STAGE
from keel.config.stage import DataSetting
from keel.data.batches import derive_seed
from keel.data.holdout import Split, hold_out
from keel.data.identity import shared
from keel.data.load import Dataset
from keel.errors import KeelError
from keel.types import DataSource, RecordType

Load = Callable[[Sequence[DataSource], Sequence[RecordType]], Dataset]


def split_of(config: RunConfig, name: str, dataset: Dataset) -> Split | None:
    """The rows that stage `name` holds out of its data; None for a stage that holds out none of them.
    DataError where all rows have one prompt."""
    stage: Any = config.stages[name]
    share = getattr(stage, "holdout", 0.0)
    of_replies = "prompt" in stage.record_types  # what it holds out are replies, which it has yet to draw
    if not share or of_replies or getattr(stage, "eval_data", None):
        return None
    seed = derive_seed(config.seed, name)
    return hold_out(dataset.records, dataset.keys, share, seed, stage.group, f"{name}: ")


def line(config: RunConfig, name: str, load: Load) -> str:
    """In a few words how many rows are held out, or how many of those evaluated on have a prompt that is
    trained on; "" for nothing to say. Data that another stage makes are left out."""
    stage, held_out = config.stages[name], config.stages[name].held_out_data()
    if held_out is not None:
        return _overlap("eval_data", load, [held_out], {name: stage.main_data()})
    if getattr(stage, "holdout", 0.0):
        there = [setting for setting in stage.main_data() if not _made(setting)]
        split = split_of(config, name, load(*there[0])) if there else None
        if split is None or not split.held_out:
            return ""
        return f"{len(split.held_out):,} held out, {_plural(split.groups, 'prompt')} of their own"
    if stage.leaves == "nothing":
        trained = {other: config.stages[other].main_data() for other in _trained_before(config, name)}
        return _overlap("its data", load, stage.all_data(), trained)
    return ""


def _overlap(
    what: str, load: Load, evaluated: Sequence[DataSetting], trained: Mapping[str, Sequence[DataSetting]]
) -> str:
    """How many rows evaluated on have a prompt that is trained on, and by which stages; "" for none."""
    keys, seen, stages = array("Q"), array("Q"), []
    for dataset in _loaded(load, evaluated):
        keys.extend(dataset.keys.prompts)
    for name, settings in trained.items():
        prompts = array("Q")
        for dataset in _loaded(load, settings):
            prompts.extend(dataset.keys.prompts)
        if shared(keys, prompts):
            seen.extend(prompts)
            stages.append(name)
    count = shared(keys, seen)
    by = f" by {', '.join(stages)}" if what != "eval_data" else ""
    return f"{count:,} of {len(keys):,} rows of {what} have a prompt that is trained on{by}" if count else ""


def _loaded(load: Load, settings: Sequence[DataSetting]) -> Iterator[Dataset]:
    """The data sets that are there to be read: a stage that is done does not need its data any more."""
    for sources, accept in settings:
        if not _made((sources, accept)):
            try:
                yield load(sources, accept)
            except KeelError:
                continue


def _trained_before(config: RunConfig, name: str) -> list[str]:
    """The stages that train what stage `name` works on, in the order of the config."""
    before: set[str] = set()
    waiting = [name]
    while waiting:
        for other in config.stages[waiting.pop()].inputs():
            if other in config.stages and other not in before:
                before.add(other)
                waiting.append(other)
    return [other for other in config.stages if other in before and config.stages[other].starts_from]


def _made(setting: DataSetting) -> bool:
    """Whether a stage of the run makes some of the data."""
    return any(source.source.startswith(FROM_STAGE) for source in setting[0])


def _plural(count: int, word: str) -> str:
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"
