"""What of keel's own code the results of each kind of stage depend on, and what they do not.

`modules.txt` beside this file says it for every module. A new import that makes a kind depend on more shows
there. Write it again with `python tests/pipeline/test_fingerprint.py` and read the difference before you
commit it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

import keel
from keel.pipeline import code_graph, fingerprint
from keel.pipeline.code_graph import CodeGraph
from keel.pipeline.fingerprint import code_prints, modules_of, versions
from keel.pipeline.stage_kinds import OWN_KINDS

STATED = Path(__file__).with_name("modules.txt")
SHOWN_OR_PLANNED = ("cli/", "plan/", "report/")  # what no result depends on


def reruns() -> dict[str, tuple[str, ...]]:
    """Module file → the kinds of stages that an edit in it runs again."""
    graph = code_graph.of_keel()
    used = {kind: modules_of(entry) for kind, entry in OWN_KINDS.items()}
    return {graph.file_of(m): tuple(kind for kind in used if m in used[kind]) for m in graph.modules()}


def in_words(kinds: Iterable[str]) -> str:
    """ "all", "none", "all but collect", or their names."""
    named = list(kinds)
    missing = [kind for kind in OWN_KINDS if kind not in named]
    if not named or not missing:
        return "all" if named else "none"
    return f"all but {' '.join(missing)}" if len(missing) < 4 else " ".join(named)


def table() -> str:
    """A line for each module."""
    rows = {file: in_words(kinds) for file, kinds in sorted(reruns().items())}
    width = max(map(len, rows))
    return "".join(f"{file:<{width}}  {kinds}\n" for file, kinds in rows.items())


def test_every_module_is_stated_with_the_kinds_that_an_edit_in_it_runs_again():
    assert table() == STATED.read_text(encoding="utf-8"), "see the head of this file"


def test_an_edit_in_what_is_shown_or_planned_runs_nothing_again():
    for file, kinds in reruns().items():
        if file.startswith(SHOWN_OR_PLANNED):
            assert kinds == (), file


def test_an_edit_in_rl_leaves_everything_done_that_learns_from_fixed_rows():
    on_policy = {name for name, kind in OWN_KINDS.items() if kind.on_policy}
    for file, kinds in reruns().items():
        if file.startswith("rl/"):
            assert set(kinds) <= on_policy, file


def test_an_edit_in_what_computes_runs_again_what_uses_it():
    found = reruns()
    assert found["models/load.py"] == tuple(OWN_KINDS)
    assert found["data/load.py"] == tuple(OWN_KINDS)
    assert found["algorithms/preference.py"] == ("online_dpo", "dpo")
    assert found["config/ppo.py"] == ("ppo",)


def test_the_prints_of_a_kind_are_of_the_modules_it_uses():
    prints = code_prints("sft")
    assert {file for file, kinds in reruns().items() if "sft" in kinds} == set(prints)


# ---------------------------------------------------------------- the graph itself

FILES = {
    "__init__.py": "from keel.stages.a import run",
    "stages/__init__.py": '"""Stages."""',
    "stages/a.py": "from keel.parts import One\nfrom keel import tools\n\ndef run():\n    import keel.late\n",
    "stages/b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from keel.late import x\n",
    "stages/c.py": "from . import a\nfrom ..parts import Two as Second\nimport keel\n",
    "parts/__init__.py": "from keel.parts.one import One\nfrom keel.parts.two import Two\n",
    "parts/one.py": "class One: ...",
    "parts/two.py": "class Two: ...",
    "tools.py": "import keel.parts.two",
    "late.py": "x = 1",
}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "keel" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "keel"


@pytest.mark.parametrize(
    ("root", "used"),
    [
        ("stages.a", ["late", "parts.one", "parts.two", "stages.a", "tools"]),
        ("stages.b", ["stages.b"]),  # what the type checker alone imports does not count
        ("stages.c", ["late", "parts.one", "parts.two", "stages.a", "stages.c", "tools"]),
        ("parts", ["parts", "parts.one", "parts.two"]),
    ],
)
def test_modules_are_followed_through_every_form_of_import(package, root, used):
    assert sorted(CodeGraph(package).used_by([f"keel.{root}"])) == [f"keel.{name}" for name in used]


def test_a_name_that_a_package_passes_on_is_of_the_module_that_defines_it(package):
    (package / "stages/a.py").write_text("from keel.parts import One")
    assert sorted(CodeGraph(package).used_by(["keel.stages.a"])) == ["keel.parts.one", "keel.stages.a"]


def _print(package: Path, text: str) -> str:
    (package / "late.py").write_text(text)
    return CodeGraph(package).prints(["keel.late"])["late.py"]


BEFORE = 'def f(x: int) -> int:\n    return g(x, "a")\n'


@pytest.mark.parametrize(
    "text",
    [
        "# a comment\n" + BEFORE,
        '"""What it is."""\n' + BEFORE,
        'def f(x: int) -> int:\n    """What it does."""\n    return g(x, "a")\n',
        "def f(\n    x: int,\n) -> int:\n    return g(x, 'a')  # why\n",
    ],
)
def test_comments_docstrings_and_layout_run_nothing_again(package, text):
    assert _print(package, text) == _print(package, BEFORE)


@pytest.mark.parametrize(
    "text",
    [
        BEFORE.replace('"a"', '"b"'),
        BEFORE.replace("return", "yield"),
        BEFORE.replace('g(x, "a")', 'g("a", x)'),
        BEFORE.replace("f(x", "f(y"),
        BEFORE + '"a text that is no docstring"\n',
    ],
)
def test_other_code_is_another_print(package, text):
    assert _print(package, text) != _print(package, BEFORE)


def test_what_stays_the_same_in_a_process_is_found_once(package, monkeypatch):
    """Every stage of a run asks for it several times."""
    asked: list[str] = []
    monkeypatch.setattr(fingerprint, "version", lambda name: asked.append(name) or "1.0")
    fingerprint._imported.cache_clear()
    try:
        assert versions() == versions() == dict.fromkeys([*fingerprint.VERSIONS, "bitsandbytes"], "1.0")
    finally:
        fingerprint._imported.cache_clear()
    # what a process may not have imported yet is looked for each time
    assert asked == [*fingerprint.VERSIONS, "bitsandbytes", "bitsandbytes"]
    graph, found = code_graph.CodeGraph(Path(keel.__file__).parent), []
    monkeypatch.setattr(graph, "_found", lambda *asked, look=graph._found: found.append(1) or look(*asked))
    used = graph.used_by(["keel.pipeline.fingerprint"])
    used.clear()  # the caller's own
    assert "keel.pipeline.code_graph" in graph.used_by(["keel.pipeline.fingerprint"])
    assert found == [1]


if __name__ == "__main__":
    STATED.write_text(table(), encoding="utf-8")
