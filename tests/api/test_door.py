"""`import keel`: what it names, what it costs, and that it needs nothing that a system may lack."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import keel
from keel import errors

PUBLIC = [
    "BudgetError", "Comparison", "DataError", "EngineError", "KeelError", "LostRankError", "MachineError",
    "NotFiniteError",
    "RewardError", "RewardModel", "Run", "UsageError", "WaitingError", "__version__", "compare", "diagnose",
    "generate", "load_data", "load_run", "losses", "plan_run", "run",
]  # fmt: skip


def _python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_public_names_are_these() -> None:
    # a name that comes or goes belongs into the changelog
    assert keel.__all__ == PUBLIC


def test_every_public_name_is_there_and_documented() -> None:
    for name in keel.__all__:
        value = getattr(keel, name)
        assert name in dir(keel)
        assert name == "__version__" or (value.__doc__ or "").strip(), f"{name} has no docstring"


def test_star_import_gives_the_public_names() -> None:
    names: dict[str, object] = {}
    exec("from keel import *", names)
    assert {name for name in names if name != "__builtins__"} == set(keel.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = keel.nonsense  # pyright: ignore[reportAttributeAccessIssue]


def test_the_whole_tree_of_errors_is_public() -> None:
    raised = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.KeelError)
    }
    assert raised <= set(keel.__all__)


def test_importing_keel_loads_no_heavy_library() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'pandas', 'numpy', 'pydantic', 'plotly'}"
    assert _python(f"import sys, keel; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_no_public_function_shares_its_name_with_a_module() -> None:
    # importing keel.NAME would put the module in the function's place
    package = Path(keel.__file__).parent
    modules = {path.stem for path in package.glob("*.py")} | {
        p.parent.name for p in package.glob("*/__init__.py")
    }
    assert not modules & set(keel.__all__)


def test_without_file_locks_all_but_training_works(tmp_path: Path) -> None:
    """Windows has no fcntl."""
    code = """
import sys
sys.modules["fcntl"] = None
import keel
for name in keel.__all__:
    getattr(keel, name)
try:
    few = [f"{stage}.data.rows=20" for stage in ("base", "sft", "reward", "ppo")]
    keel.run("helpdesk", *few, progress=False)
except keel.UsageError as error:
    print(error)
"""
    assert "fcntl" in _python(code)


def test_py_typed_is_in_the_package() -> None:
    assert (Path(keel.__file__).parent / "py.typed").exists()
