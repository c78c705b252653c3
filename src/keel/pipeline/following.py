"""A run on several ranks: the first one drives it, the others follow.

The first rank does all that is done once: it checks, reads, decides what runs, writes. Where a stage that
several ranks can work on begins, it tells the others which, with the settings that it has come to, and all of
them call the stage's run function together. What they share in it is in `keel.distributed.group`. A stage of
a kind that knows nothing of ranks it runs as a process alone, while the others wait.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any

import torch

from keel import accel
from keel.accel import batch_layout
from keel.config import RunConfig, Stage
from keel.data import chat
from keel.data.stored.cache import Cache
from keel.data.stored.tokens import Preparation
from keel.distributed import group, half_gather
from keel.errors import UsageError
from keel.models.freed_memory import keep_freed_memory
from keel.pipeline.device import cores, deterministic
from keel.pipeline.preflight import Judged, Sources
from keel.pipeline.stage_graph import accel_switched
from keel.pipeline.stage_kinds import OWN_KINDS, kind_of, resolve
from keel.rundir.stage_run import StageRun

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Call:
    """What the first rank has the others do."""

    name: str
    stage: Stage  # as it runs: `micro_batch: auto` has become a number
    day: date | None
    snapshots: dict[str, Any]  # what sources that change by themselves held when they were first read
    judged: list[Judged]  # which rows of its data the rewards have been asked about, and what came of it


@contextmanager
def joined(config: RunConfig) -> Generator[None]:
    """Within it this process is a rank, where it was started as one. UsageError where a rank has no card."""
    if group.launched() is None:
        yield
        return
    name, chosen = config.device, config.distributed
    if ":" in name:
        raise UsageError(f"device {name!r} is one card, and there are several ranks: write device: cuda")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    strategy: group.Strategy = "fsdp" if chosen.strategy == "fsdp" else "ddp"
    with (
        half_gather.wanted(chosen.mixed_precision),
        group.joined(name, strategy, chosen.timeout, offload=chosen.offload),
    ):
        yield


def check_kinds(config: RunConfig, names: Sequence[str]) -> None:
    """UsageError where several ranks cannot work on one of these stages, which are to run, though they can
    on others of its kind or by another strategy."""
    strategy = "fsdp" if config.distributed.strategy == "fsdp" else "ddp"
    able = ", ".join(kind.name for kind in OWN_KINDS.values() if strategy in kind.ranks)
    for name in names:
        kind = config.stages[name].kind
        ways = kind_of(kind).ranks
        if not ways:  # the first rank runs it alone
            continue
        if strategy in ways:
            if strategy == "fsdp" and (why := config.stages[name].uncut()) is not None:
                raise UsageError(
                    f"stage {name!r}: {why} does not go with distributed.strategy: fsdp; set ddp"
                )
            continue
        raise UsageError(
            f"stage {name!r} is of kind {kind}, which runs with distributed.strategy {' or '.join(ways)} "
            f"only (with {strategy}: {able})"
        )


def call(stage: Stage, run: StageRun, day: date | None, sources: Sources) -> dict[str, Any]:
    """Run a stage on this rank and, where there are others, have them run it too."""
    if not kind_of(stage.kind).ranks:
        with group.alone():
            return run_stage(stage, run)
    if group.size() > 1:
        snapshots, judged = sources.preparation.cache.snapshots, sources.judged(run.name)
        group.from_first(lambda: Call(run.name, stage, day, snapshots, judged))
    return run_stage(stage, run)


def dismiss() -> None:
    """Tell the others that the run is over."""
    if group.size() > 1:
        group.from_first(lambda: None)


def follow(sources: Sources, place: Path, stage_run: Callable[[str], StageRun]) -> None:
    """What every rank but the first does: run the stages that it is told to.

    place: where prepared rows lie. stage_run: makes a stage's run on this rank.
    """
    config = sources.config
    sources.preparation = Preparation(Cache(place), config.workers or cores())
    keep_freed_memory()
    with deterministic(config):
        while (told := group.from_first(_nothing)) is not None:
            sources.preparation.cache.snapshots.update(told.snapshots)
            with chat.on_date(told.day, given=config.date is not None), accel_switched(config):
                sources.take_judged(told.name, told.judged)
                run_stage(told.stage, stage_run(told.name))


def _nothing() -> Call | None:
    """Only the first rank has something to say."""
    raise AssertionError("the first rank follows nobody")


def run_stage(stage: Stage, run: StageRun) -> dict[str, Any]:
    """Run a stage of any kind on this rank; what it returns becomes its result.json.

    Weights that are cut over ranks are computed with by the models' own code: keel's faster paths reach for
    them whole."""
    function = resolve(kind_of(stage.kind).run)
    try:
        if not group.is_sharded():
            result = function(stage, run)
        else:
            off = "; keel's faster paths are off" + (_of_offload() if group.is_offloaded() else "")
            run.say(f"{run.name}: weights are cut over {group.size()} ranks{off}")
            with accel.disabled(), batch_layout.one_forward():
                result = function(stage, run)
        _share_facts(run)
        return result
    finally:
        run.end()


def _of_offload() -> str:
    if group.device_type() == "cpu":
        return "; `offload` changes nothing on the CPU, where they lie anyway"
    return "; they lie in host memory, and the optimiser steps there"


def _share_facts(run: StageRun) -> None:
    """Have the first rank, which writes the record, know what others met in their part of the rows."""
    found = group.gathered((run.facts.get("notes", []), run.facts.get("responses_cut_for_reward", 0)))
    if cut := sum(number for _, number in found):
        run.facts["responses_cut_for_reward"] = cut
    for notes, _ in found:
        for text in notes if group.is_first() else ():
            run.note(text)
