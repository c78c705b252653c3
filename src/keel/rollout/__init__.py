"""Rollouts: sampling completions, and scoring them token by token."""

from keel.rollout.engine import KeelEngine
from keel.rollout.protocol import (
    Engine,
    GenerationRequest,
    HoldsWeights,
    NextTurn,
    TakesTurns,
    TokenCount,
)
from keel.rollout.reference_engine import ReferenceEngine
from keel.rollout.scripted_engine import ScriptedEngine
from keel.types import Completion

__all__ = [
    "Completion",
    "Engine",
    "GenerationRequest",
    "HoldsWeights",
    "KeelEngine",
    "NextTurn",
    "ReferenceEngine",
    "ScriptedEngine",
    "TakesTurns",
    "TokenCount",
]
