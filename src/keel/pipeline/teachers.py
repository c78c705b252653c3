"""Whether the teachers of a config can be asked what its stages ask, found before any stage trains."""

from __future__ import annotations

from keel.errors import UsageError
from keel.pipeline import lengths
from keel.pipeline.preflight import Sources
from keel.rl import teacher


def check(sources: Sources, name: str, *, hub: bool = False) -> None:
    """UsageError for a teacher whose tokens are not the student's, in a stage that needs its distributions.

    hub: tokenizers may be fetched. Nothing is checked where one is not there yet.
    """
    stage = sources.config.stages[name]
    named = next((source for setting, source in stage.references() if setting == "teacher"), None)
    if named is None:
        return
    student = lengths.tokenizer_of(sources, name, hub=hub)
    theirs = lengths.of_model(sources, named, hub)
    if student is None or theirs is None:
        return
    differs = teacher.difference(student, theirs)
    if differs is not None and (said := teacher.refusal(stage, differs)) is not None:
        raise UsageError(f"{name}: teacher {named} {said}")
