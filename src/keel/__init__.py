# pyright: strict
"""keel: the whole RLHF pipeline on one machine.

    run = keel.run("helpdesk")              every stage of a config, in order, resumable
    run.metrics("ppo"), run.result("judge") what it wrote, as data frames
    keel.RewardModel(path).score(prompts, completions)
    keel.generate(path, prompts)
    keel.losses.policy.clipped(...)         the losses as pure functions on tensors

What stands in `__all__` is the public interface; everything else may change with any release. A name is
loaded when it is first asked for, so that `import keel` itself takes milliseconds and needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from keel.api import losses as losses
    from keel.api.data import load_data as load_data
    from keel.api.inference import RewardModel as RewardModel
    from keel.api.inference import generate as generate
    from keel.api.results import Comparison as Comparison
    from keel.api.results import Run as Run
    from keel.api.results import compare as compare
    from keel.api.results import diagnose as diagnose
    from keel.api.results import load_run as load_run
    from keel.api.running import plan_run as plan_run
    from keel.api.running import run as run
    from keel.errors import BudgetError as BudgetError
    from keel.errors import DataError as DataError
    from keel.errors import EngineError as EngineError
    from keel.errors import KeelError as KeelError
    from keel.errors import LostRankError as LostRankError
    from keel.errors import MachineError as MachineError
    from keel.errors import NotFiniteError as NotFiniteError
    from keel.errors import RewardError as RewardError
    from keel.errors import UsageError as UsageError
    from keel.errors import WaitingError as WaitingError

__version__ = "0.2.0"

__all__ = [
    "BudgetError",
    "Comparison",
    "DataError",
    "EngineError",
    "KeelError",
    "LostRankError",
    "MachineError",
    "NotFiniteError",
    "RewardError",
    "RewardModel",
    "Run",
    "UsageError",
    "WaitingError",
    "__version__",
    "compare",
    "diagnose",
    "generate",
    "load_data",
    "load_run",
    "losses",
    "plan_run",
    "run",
]

# public name → the module that defines it
_HOMES = {
    "BudgetError": "keel.errors",
    "Comparison": "keel.api.results",
    "DataError": "keel.errors",
    "EngineError": "keel.errors",
    "KeelError": "keel.errors",
    "LostRankError": "keel.errors",
    "MachineError": "keel.errors",
    "NotFiniteError": "keel.errors",
    "RewardError": "keel.errors",
    "RewardModel": "keel.api.inference",
    "Run": "keel.api.results",
    "UsageError": "keel.errors",
    "WaitingError": "keel.errors",
    "compare": "keel.api.results",
    "diagnose": "keel.api.results",
    "generate": "keel.api.inference",
    "load_data": "keel.api.data",
    "load_run": "keel.api.results",
    "plan_run": "keel.api.running",
    "run": "keel.api.running",
}


def __getattr__(name: str) -> object:
    """A public name, loaded now and kept (PEP 562)."""
    if name == "losses":
        value: object = import_module("keel.api.losses")
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'keel' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
