"""Everything that computes in a model's place or changes how one computes, and the switch that turns it off.
Knows torch and transformers, and nothing else of keel. `patches` has the table."""

from keel.accel.patches import PATCHES, AccelWarning, Patch, disabled, enabled, refusals, state, table
from keel.accel.preparation import prepare, restore

__all__ = [
    "PATCHES",
    "AccelWarning",
    "Patch",
    "disabled",
    "enabled",
    "prepare",
    "refusals",
    "restore",
    "state",
    "table",
]
