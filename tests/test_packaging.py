"""What is released works: wheel and sdist are built, the wheel is installed, and keel runs from it
elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import keel

ROOT = Path(__file__).parents[1]


def _run(*command: str, cwd: Path, path: Path | None = None) -> str:
    """What a command prints. It sees no package index, and no keel but the one in `path`."""
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PYTHONPATH": str(path or "")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of this repository."""
    pytest.importorskip("hatchling", reason="needs hatchling (pip install -e '.[test]')")
    out = tmp_path_factory.mktemp("sdist")
    _run(sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", str(out), cwd=ROOT)
    return next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the unpacked sdist and from nothing else."""
    folder, out = tmp_path_factory.mktemp("unpacked"), tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    source = next(folder.iterdir())
    _run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(out), cwd=source)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content, as pip lays it out."""
    folder = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps")
    _run(*pip, "--target", str(folder), str(wheel), cwd=folder)
    return folder


def test_the_distribution_is_keel_rlhf_and_the_package_keel(sdist, wheel):
    assert sdist.name == f"keel_rlhf-{keel.__version__}.tar.gz"
    assert wheel.name == f"keel_rlhf-{keel.__version__}-py3-none-any.whl"


def test_the_wheel_holds_every_file_of_the_package_and_the_recipes(wheel):
    package = ROOT / "src" / "keel"
    files = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {".html", ".css", ".js"} <= {path.suffix for path in files}
    expected = {f"keel/{path.relative_to(package).as_posix()}" for path in files}
    expected |= {f"keel/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert "keel/py.typed" in names
    metadata = {name for name in names if ".dist-info/" in name}
    assert expected == names - metadata


def test_the_sdist_holds_what_its_tests_and_pages_need(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "Makefile", "constraints.txt", "docs/metrics.md"} <= names
    assert {"tests/conftest.py", "tests/test_packaging.py", "docs/site/build_site.py"} <= names
    assert not [name for name in names if name.startswith((".venv", "runs/", "build/", "dist/"))]


def test_keel_runs_from_the_installed_wheel_outside_the_repository(installed, tmp_path):
    python = (sys.executable, "-c")
    where = _run(*python, "import keel; print(keel.__file__)", cwd=tmp_path, path=installed).strip()
    assert Path(where).is_relative_to(installed)
    code = "from importlib.metadata import version; print(version('keel-rlhf'))"
    assert _run(*python, code, cwd=tmp_path, path=installed).strip() == keel.__version__
    command = (sys.executable, "-m", "keel")
    listed = json.loads(_run(*command, "recipes", "--json", cwd=tmp_path, path=installed))
    assert {path.stem for path in (ROOT / "recipes").glob("*.yaml")} <= set(map(str, listed))
    shown = _run(*command, "recipes", "show", "helpdesk", cwd=tmp_path, path=installed)
    assert shown.strip() == (ROOT / "recipes" / "helpdesk.yaml").read_text(encoding="utf-8").strip()


def test_the_command_is_keel(installed):
    entry_points = next(installed.glob("keel_rlhf-*.dist-info")) / "entry_points.txt"
    assert "keel = keel.__main__:main" in entry_points.read_text(encoding="utf-8")
    metadata = (entry_points.parent / "METADATA").read_text(encoding="utf-8")
    assert "Provides-Extra: quantize" in metadata
    assert "Requires-Dist: bitsandbytes>=0.48; extra == 'quantize'" in metadata
