"""Whether code that a config brings may be run, as a person says: once a folder, never by a plan."""

from __future__ import annotations

import sys
from pathlib import Path

from keel.api.terminal import show
from keel.cli.progress import say
from keel.config import RunConfig
from keel.distributed import group
from keel.errors import UsageError
from keel.pipeline import following, trust


def to_run(place: Path, config: RunConfig, given: bool) -> None:
    """Say which code a config brings, and ask about it on a terminal, once a folder. Without a terminal, in a
    script, to run the config is to agree. UsageError for a no. given: --trust."""
    code = _unknown(place, config, given)
    if not code:
        return
    say(f"{place} brings code of its own:\n" + "\n".join(f"  {line}" for line in code))
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return
    show(
        f"Run it, and what configs of {place.resolve().parent} bring from now on? [y/N] ",
        sys.stderr,
        end="",
    )
    if sys.stdin.readline().strip().casefold() not in ("y", "yes"):
        raise UsageError("nothing was run")
    trust.remember(place)


def of_first(place: Path, config: RunConfig, given: bool) -> None:
    """As `to_run`; of ranks that somebody else has started (torchrun) the first one asks, and all others wait
    for what it is told, however long that takes."""
    with following.joined(config):
        group.from_first_or_error(lambda: to_run(place, config, given))


def to_plan(place: Path, config: RunConfig, given: bool) -> bool:
    """Whether a plan may run the code that a config brings. given: --trust."""
    code = _unknown(place, config, given)
    if code:
        lines = "\n".join(f"  {line}" for line in code)
        say(f"{place} brings code of its own, which this plan has not run (--trust would):\n{lines}")
    return not code


def _unknown(place: Path, config: RunConfig, given: bool) -> list[str]:
    """The code that a config brings and nobody has allowed."""
    code = trust.code_of(config)
    if code and given:
        trust.remember(place)
    return [] if given or trust.is_trusted(place) else code
