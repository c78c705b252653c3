"""Everything keel raises for its user.

KeelError             1   one clear message; the command ends with `exit_code`
├─ UsageError         2   the command, the config or a model is not what it must be; nothing was trained
│  └─ DataError       2   a row or a file of data is unusable; names file, line and reason
├─ RewardError        1   a reward function failed; names it
├─ EngineError        1   a rollout engine outside of keel is not there, or is not what it must be
├─ BudgetError        1   what a judge may cost is spent: what was done is kept, a larger budget goes on
├─ NotFiniteError     1   a loss, a gradient or a metric is NaN or infinite
├─ MachineError       1   no space, no memory, no rights: what was done is kept, and gone on with
├─ LostRankError      1   another process of this run is gone, or does not answer
└─ WaitingError       3   the stage has done its part and waits for people

DeprecationNote is a warning, no error: something works for this version and has a new name.
"""

from __future__ import annotations


class KeelError(Exception):
    """Anything keel reports to its user as one clear message. `exit_code` is the command's exit code."""

    exit_code = 1


class UsageError(KeelError):
    """The command, the config or a model was not what it must be. Nothing was trained or overwritten."""

    exit_code = 2


class WaitingError(KeelError):
    """A stage has done its part and waits for people; the message says for what. Nothing failed."""

    exit_code = 3


class BudgetError(KeelError):
    """What a judge may cost is spent. What was done is kept; the same command goes on with a larger
    budget."""


class EngineError(KeelError):
    """A rollout engine outside of keel cannot be reached, does not take the weights, or answers what nobody
    asked. What was done is kept; the same command goes on once it is there."""


class MachineError(KeelError):
    """The machine refuses what is needed: space, memory, open files, rights. Nothing is half-written; the
    same command goes on once it is there."""


class LostRankError(KeelError):
    """Another process of a run on several ranks is gone, hangs, or computes something else. The same command
    goes on from the checkpoint."""


class NotFiniteError(KeelError):
    """A loss, a gradient or a metric is NaN or infinite: the step that made it is worth nothing."""


class DataError(UsageError):
    """A row or a file of data is unusable; the message names the file, the line and the reason."""


class RewardError(KeelError):
    """A reward could not be computed; the message names the reward and, where one is to blame, the sample."""


class DeprecationNote(FutureWarning):
    """A name that still works in this version and goes away in the next; the message says the new one."""
