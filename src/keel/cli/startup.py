"""The start of a command that works with models: all that it imports, at once.

Importing torch and transformers makes half a million objects that stay to the end. Python's garbage
collector looks through them again and again while they are made, a fifth of the time until the first step,
and through all of them whenever garbage is collected later, as a pipeline asks after each stage. Here it is
off meanwhile, and what was imported is left out of what it looks at (`gc.freeze`).

Two things that transformers does while it is imported are done when they are needed, or once (`model_scan`).
Both are seen from outside only in the time they take.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from keel.cli import model_scan


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Collect no garbage inside, and never look again at what was made there. Does nothing where torch is
    there already: then this process is not the command's own (it is a notebook's, a test's), and what it
    keeps is not ours to say."""
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
    gc.freeze()


def load() -> None:
    """Import what runs a pipeline."""
    load_transformers()
    import_module("keel.pipeline.pipeline")
    import_module("keel.plan.planner")


def load_transformers() -> None:
    """Import transformers up to the base of its models."""
    if "transformers" in sys.modules:
        return
    with model_scan.kept(), _later("scipy.optimize", "linear_sum_assignment"):
        import_module("transformers.models")
        import_module("transformers.modeling_utils")


@contextlib.contextmanager
def _later(module: str, name: str) -> Iterator[None]:
    """`from module import name`, inside, gives a function that imports the module when it is called. Whoever
    asks for another name of the module, or for a module below it, has what is there.

    transformers' losses of object detection import scipy's optimisers, and every model imports the losses.
    """
    top, *below = module.split(".")
    package = None if module in sys.modules else find_spec(top)
    if package is None:
        yield
        return

    def itself() -> ModuleType:
        if sys.modules.get(module) is stand_in:
            del sys.modules[module]
        return import_module(module)

    def called(*args: object, **kwargs: object) -> object:
        return getattr(itself(), name)(*args, **kwargs)

    def other(asked: str) -> object:
        if asked.startswith("__"):  # which the import system asks of every module
            raise AttributeError(asked)
        return getattr(itself(), asked)

    stand_in = ModuleType(module)
    stand_in.__path__ = [os.path.join(place, *below) for place in package.submodule_search_locations or ()]
    setattr(stand_in, name, called)
    setattr(stand_in, "__getattr__", other)  # noqa: B010
    sys.modules[module] = stand_in
    try:
        yield
    finally:
        if sys.modules.get(module) is stand_in:
            del sys.modules[module]
