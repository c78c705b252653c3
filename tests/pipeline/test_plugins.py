"""What other packages add to keel; the examples of docs/extending.md are installed and run here."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from keel import report
from keel.cli import main
from keel.config import RunConfig, parse
from keel.errors import UsageError
from keel.pipeline.fingerprint import plugin_prints
from keel.pipeline.pipeline import Pipeline
from keel.pipeline.stage_kinds import OWN_KINDS, UNKNOWN, kind_of, resolve, shown_as
from keel.plan import planner, text

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings it
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

pytestmark = pytest.mark.usefixtures("no_report")
EXTENDING = Path(__file__).parents[2] / "docs" / "extending.md"
Install = Callable[[Mapping[str, str]], Path]


def example(heading: str) -> dict[str, str]:
    """Title → text of each titled block of code under a heading of docs/extending.md."""
    section = EXTENDING.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return dict(re.findall(r'```\w+ title="([^"]+)"\n(.*?)```', section, re.DOTALL))


def put(folder: Path, files: Mapping[str, str]) -> None:
    """Install a package: its modules, and the metadata that its pyproject.toml declares."""
    project = tomllib.loads(files["pyproject.toml"])["project"]
    metadata = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    groups = project["entry-points"].items()
    lines = [
        line
        for group, points in groups
        for line in (f"[{group}]", *(f"{k} = {v}" for k, v in points.items()))
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    for name, source in files.items():
        if name.endswith(".py"):
            (folder / name).write_text(source)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a package for the length of a test; returns the folder that it lies in."""
    site = tmp_path / "site-packages"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    before = set(sys.modules)

    def installed(files: Mapping[str, str]) -> Path:
        put(site, files)
        importlib.invalidate_caches()
        return site

    yield installed
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(site)):
            del sys.modules[name]


def package(
    group: str, name: str, target: str, *, dist: str = "theirs", version: str = "1.0"
) -> dict[str, str]:
    """The pyproject.toml of a package with one entry point."""
    project = f'[project]\nname = "{dist}"\nversion = "{version}"\n'
    return {"pyproject.toml": project + f'[project.entry-points."{group}"]\n{name} = "{target}"\n'}


def _soup(tiny_model: Path) -> dict[str, Any]:
    """A run with the example of the docs."""
    stages = yaml.safe_load(example("A kind of stage")["stages"])
    stages["mixed"]["models"] = [str(tiny_model), str(tiny_model)]
    return {"name": "tiny", "threads": 1, "device": "cpu", "stages": stages}


def _judged(tiny_model: Path, data: Any, reward: Any, **settings: Any) -> dict[str, Any]:
    judge = {
        "kind": "evaluate", "models": [str(tiny_model)], "data": str(data.prompts), "reward": reward,
        "sampling": {"max_new_tokens": 4}, **settings,
    }  # fmt: skip
    return {"name": "tiny", "threads": 1, "device": "cpu", "stages": {"judge": judge}}


def _refusal(tree: Mapping[str, Any], folder: Path) -> str:
    with pytest.raises(UsageError) as caught:
        Pipeline(parse(tree), folder / "run", str).run()
    return str(caught.value)


# ---------------------------------------------------------------- a reward


def test_the_reward_of_the_docs_counts_and_is_logged_by_its_name(install, tiny_model, data, tmp_path):
    install(example("A reward"))
    terms = yaml.safe_load(example("A reward")["reward"])
    pipeline = Pipeline(parse(_judged(tiny_model, data, terms)), tmp_path / "run", str)
    pipeline.run()
    folder = pipeline.stage_directory("judge")
    (measures,) = json.loads((folder / "result.json").read_text())["models"].values()
    assert 0 < measures["reward/brevity"]["mean"] < 1
    prints = json.loads((folder / "fingerprint.json").read_text())["plugins"]
    assert list(prints) == ["keel.rewards brevity"]


def test_a_word_is_short_for_a_reward_of_a_package(tiny_model, data):
    (term,) = parse(_judged(tiny_model, data, "plugin:brevity")).stages["judge"].reward_terms()
    assert (term.kind, term.function, term.log_name) == ("plugin", "brevity", "brevity")


@pytest.mark.parametrize("change", ["source", "version"])
def test_another_version_of_a_reward_is_another_fingerprint(install, tiny_model, data, change):
    files = example("A reward")
    site = install(files)
    stage = parse(_judged(tiny_model, data, "plugin:brevity")).stages["judge"]
    before = plugin_prints(stage)
    assert plugin_prints(stage) == before
    if change == "source":
        (site / "keel_brevity.py").write_text(files["keel_brevity.py"].replace("80", "90"))
    else:
        (site / "keel_brevity-1.0.dist-info/METADATA").write_text(
            "Metadata-Version: 2.1\nName: keel-brevity\nVersion: 2\n"
        )
    importlib.invalidate_caches()
    assert plugin_prints(stage) != before


BROKEN = {"theirs.py": "import a_module_that_is_not_here"}


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "no installed package adds a reward 'breviti'; did you mean 'brevity'?"),
        (
            {**package("keel.rewards", "breviti", "theirs:f"), **BROKEN},
            "cannot be loaded: ModuleNotFoundError",
        ),
        (
            {**package("keel.rewards", "breviti", "theirs:f"), "theirs.py": "f = 3"},
            "is a int, not a function",
        ),
    ],
)
def test_a_reward_that_cannot_be_used_is_said_before_anything_runs(
    install, tiny_model, data, tmp_path, files, said
):
    install(example("A reward"))
    if files:
        install(files)
    assert said in _refusal(_judged(tiny_model, data, "plugin:breviti"), tmp_path)
    assert not (tmp_path / "run").exists()


def test_two_packages_of_one_name_are_refused(install, tiny_model, data, tmp_path):
    install(example("A reward"))
    install({**package("keel.rewards", "brevity", "theirs:f"), "theirs.py": "def f(**_): return []"})
    said = _refusal(_judged(tiny_model, data, "plugin:brevity"), tmp_path)
    assert "is added by several packages: keel-brevity 1.0, theirs 1.0" in said


# ---------------------------------------------------------------- a kind of stage


def test_the_kind_of_the_docs_is_planned_run_resumed_and_shown(install, tiny_model, data, tmp_path):
    install(example("A kind of stage"))
    tree = _soup(tiny_model)
    tree["stages"]["judge"] = _judged(tiny_model, data, {"kind": "length", "high": 9})["stages"]["judge"] | {
        "models": ["mixed"]
    }
    said: list[str] = []
    pipeline = Pipeline(parse(tree), tmp_path / "run", said.append)
    planned = text.as_text(planner.plan(pipeline))
    assert "memory unknown: the package that adds 'soup' has no memory model of it" in planned
    pipeline.run()
    folder = pipeline.stage_directory("mixed")
    logged = (folder / "metrics.jsonl").read_bytes()
    assert json.loads((folder / "result.json").read_text()) == {"distance": 0.0}  # twice the same model
    # a kill before the end: the logs begin again, and the rest is done anew
    (folder / "stage.json").unlink()
    again = Pipeline(parse(tree), tmp_path / "run", said.append)
    again.run()
    assert (folder / "metrics.jsonl").read_bytes() == logged
    assert said[-1] == "judge: done before, unchanged"
    page = report.write(tmp_path / "run").read_text()
    assert "Distance" in page
    assert "first model from the mean" in page
    assert "distance 0.000" in page


def test_a_run_is_shown_without_the_package_that_made_its_kind(install, tiny_model, tmp_path, monkeypatch):
    site = install(example("A kind of stage"))
    Pipeline(parse(_soup(tiny_model)), tmp_path / "run", str).run()
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(site)])
    importlib.invalidate_caches()
    assert shown_as("soup") is UNKNOWN
    page = report.write(tmp_path / "run").read_text()
    assert "soup/distance" in page
    assert "distance 0.00" in page
    assert "no installed package adds a kind of stage" not in report.summary(tmp_path / "run")
    with pytest.raises(UsageError, match="unknown kind 'soup'"):
        parse(_soup(tiny_model))


def test_keel_run_finds_an_installed_kind(tiny_model, tmp_path):
    put(tmp_path / "site", example("A kind of stage"))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(_soup(tiny_model)))
    paths = os.pathsep.join([str(tmp_path / "site"), str(Path(main.__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-m", "keel", "run", "run.yaml", "--json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["stages"]["mixed"]["result"] == {"distance": 0.0}


def test_another_version_of_a_kind_runs_its_stage_again(install, tiny_model, tmp_path):
    site = install(example("A kind of stage"))
    said: list[str] = []
    Pipeline(parse(_soup(tiny_model)), tmp_path / "run", str).run()
    with (site / "keel_soup.py").open("a") as file:
        file.write("# other\n")
    Pipeline(parse(_soup(tiny_model)), tmp_path / "run", said.append).run()
    assert said[2] == "mixed: run again, since what other packages add to it changed (keel.stages soup)"


def test_settings_of_an_added_kind_are_checked_like_keels_own(install, tiny_model):
    install(example("A kind of stage"))
    tree = _soup(tiny_model)
    tree["stages"]["mixed"] = {"kind": "soup", "modles": ["a", "b"]}
    with pytest.raises(UsageError) as caught:
        parse(tree)
    assert "stages.mixed.modles: unknown key; did you mean 'models'?" in str(caught.value)
    assert "stages.mixed.models: missing; a list of stages" in str(caught.value)
    schema = RunConfig.model_json_schema()
    stage = schema["properties"]["stages"]["additionalProperties"]
    assert stage["discriminator"]["mapping"]["soup"] in [ref["$ref"] for ref in stage["oneOf"]]
    assert "models" in schema["$defs"]["SoupConfig"]["properties"]
    written = parse(_soup(tiny_model)).model_dump(mode="json")
    assert written["stages"]["mixed"]["models"] == [str(tiny_model)] * 2


OWN = 'from keel.pipeline.stage_kinds import OWN_KINDS\nSTAGE = OWN_KINDS["sft"]\n'


def _adds(name: str, code: str) -> dict[str, str]:
    """A package that adds a kind of stage by this module."""
    return {**package("keel.stages", name, "theirs:STAGE"), "theirs.py": code}


@pytest.mark.parametrize(
    ("kind", "files", "said"),
    [
        ("sope", {}, "unknown kind 'sope'; did you mean 'soup'?"),
        ("theirs", _adds("theirs", BROKEN["theirs.py"]), "cannot be loaded: ModuleNotFoundError"),
        ("theirs", _adds("theirs", "STAGE = 3"), "has no `config` that derives"),
        ("soup", _adds("sft", OWN), "a kind of stage 'sft', which is keel's own"),
        ("soup", _adds("soup", OWN), "is added by several packages"),
    ],
)
def test_a_kind_that_cannot_be_used_is_refused(install, tiny_model, kind, files, said):
    install(example("A kind of stage"))
    if files:
        install(files)
    tree = _soup(tiny_model)
    tree["stages"]["mixed"]["kind"] = kind
    with pytest.raises(UsageError) as caught:
        parse(tree)
    assert said in str(caught.value)
    assert "stages.mixed" in str(caught.value)


def test_a_kind_has_the_name_that_its_package_declares(install):
    install({**package("keel.stages", "theirs", "theirs:STAGE"), "theirs.py": OWN})
    with pytest.raises(UsageError, match="calls itself 'sft'"):
        kind_of("theirs")


# ---------------------------------------------------------------- what is there


def test_the_doctor_lists_what_packages_add(install):
    install(example("A reward"))
    install(example("A kind of stage"))
    facts = json.loads(CliRunner().invoke(main.app, ["doctor", "--json"]).stdout)
    assert facts["keel.rewards"] == ["brevity"]
    assert facts["keel.stages"] == ["soup"]
    assert facts["keel.engines"] == []


def test_a_config_may_name_objects_of_other_packages(install, tiny_model, data, monkeypatch):
    """What `config.plugins()` names is part of the fingerprint."""
    install({**package("keel.policy_losses", "theirs", "theirs:loss"), "theirs.py": "def loss(): pass"})
    stage = parse(_judged(tiny_model, data, {"kind": "length", "high": 9})).stages["judge"]
    assert plugin_prints(stage) == {}
    monkeypatch.setattr(
        type(stage), "plugins", lambda self: [("keel.policy_losses", "theirs")], raising=False
    )
    assert list(plugin_prints(stage)) == ["keel.policy_losses theirs"]


@pytest.mark.parametrize("kind", OWN_KINDS.values(), ids=OWN_KINDS)
def test_what_an_entry_names_is_there(kind):
    assert kind_of(kind.name) is kind
    assert callable(resolve(kind.run))
    assert kind.memory is not None
    assert callable(resolve(kind.memory))
    if kind.examples is not None:
        assert callable(resolve(kind.examples))
    assert kind.config.model_fields["kind"].annotation.__args__ == (kind.name,)
    assert kind.config.record_types


def test_a_report_loads_neither_torch_nor_the_stages():
    heavy = ("torch", "transformers", "keel.stages.sft", "keel.rl.ppo")
    code = f"import sys, keel.report; print([m for m in {heavy} if m in sys.modules])"
    paths = str(Path(main.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
