"""The docs site: every metric leads to the line that writes it, every link and page is there, offline."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site() -> Iterator[Any]:
    """The module docs/site/build_site.py."""
    sys.path.insert(0, str(ROOT / "docs" / "site"))
    try:
        yield importlib.import_module("build_site")
    finally:
        sys.path.remove(str(ROOT / "docs" / "site"))


@pytest.fixture(scope="module")
def texts(site: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return site.stage(tmp_path_factory.mktemp("site") / "pages")


@pytest.fixture(scope="module")
def candidates(site: Any) -> Any:
    """Every string of the package that may be a name."""
    return site.metric_places.places(site.PACKAGE)


def test_every_metric_leads_to_a_line_that_writes_it(site):
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    places = site.metric_places.find_all(page, site.PACKAGE)
    assert len(places) > 200
    assert [row.name for row, place in places.items() if place is None] == []
    for place in set(places.values()):
        line = (ROOT / "src" / place.path).read_text(encoding="utf-8").splitlines()[place.line - 1]
        spelled = [part for part in place.template.split(site.metric_places.HOLE) if part]
        assert all(part in line for part in spelled), f"{place}: {line}"


@pytest.mark.parametrize(
    ("section", "file", "name", "path"),
    [
        ("ppo and grpo", "metrics.jsonl", "objective/kl", "keel/rl/rollout.py"),
        ("ppo and grpo", "metrics.jsonl", "rewards/NAME/mean", "keel/rl/rollout.py"),
        ("ppo and grpo", "events.jsonl", "remedy", "keel/diagnosis/findings.py"),
        ("dpo", "metrics.jsonl", "rewards/margins", "keel/algorithms/preference.py"),
        ("reward", "metrics.jsonl", "eval_accuracy", "keel/stages/reward.py"),
        ("evaluate", "result.json", "gold_lift", "keel/evaluation/policies.py"),
        ("times.jsonl", "", "train/mfu", "keel/rundir/stage_run.py"),
    ],
)
def test_the_place_is_where_a_reader_would_look(site, candidates, section, file, name, path):
    assert site.metric_places.find(name, section, file, candidates).path == path


def test_a_metric_that_nothing_writes_ends_the_build(site, tmp_path):
    package = tmp_path / "pack"
    package.mkdir()
    (package / "one.py").write_text("def run():\n    return {'loss': 2.0}\n")
    page = "## dpo\n\n### metrics.jsonl\n\n| `rewards/of_nobody` | a share | share | keel |\n"
    with pytest.raises(site.SiteError, match=r"nothing writes `rewards/of_nobody` \(dpo, metrics.jsonl\)"):
        site.with_places(page, package)
    assert "one.py" in site.with_places(page.replace("rewards/of_nobody", "loss"), package)


def test_a_name_in_a_docstring_is_not_written(site, tmp_path):
    package = tmp_path / "pack"
    package.mkdir()
    (package / "one.py").write_text('"""It logs "gain"."""\n\ndef run():\n    """gain"""\n    print(gain)\n')
    (package / "two.py").write_text('def run(n):\n    return {f"gain/{n}": 1.0, "loss": 2.0}\n')
    candidates = site.metric_places.places(package)
    assert site.metric_places.find("gain", "dpo", "metrics.jsonl", candidates) is None
    assert site.metric_places.find("gain/NAME", "dpo", "metrics.jsonl", candidates).line == 2
    assert site.metric_places.find("eval_loss", "dpo", "metrics.jsonl", candidates).path == "pack/two.py"


def test_every_page_is_in_the_menu_once(site, texts):
    def leaves(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        for inner in entry if isinstance(entry, list) else entry.values() if isinstance(entry, dict) else ():
            yield from leaves(inner)

    menu = list(leaves(site.navigation(texts)))
    assert len(menu) == len(set(menu))
    assert {page for page in texts if not page.startswith("source/")} | {"source/index.md"} == set(menu)
    assert {"index.md", "docs/metrics.md", "docs/papers.md", "api/keel.algorithms.policy.md"} <= set(menu)


def test_every_page_of_the_repository_is_on_the_site(site, texts):
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} <= texts.keys()
    modules = [p.relative_to(ROOT).as_posix() for p in (ROOT / "src").rglob("*.py")]
    assert {f"source/{module}.md" for module in modules} <= texts.keys()


def test_links_hold_on_the_site_as_in_the_repository(site, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "src").mkdir()
    (tmp_path / "README.md").write_text("# it\n")
    (tmp_path / "src" / "loss.py").write_text("x = 1\n")
    page = tmp_path / "docs" / "page.md"
    page.write_text(
        "[a](../README.md#use) [b](../src/loss.py#L3-L9) [c](page.md#here) [d](https://x.org)\n"
        "```\n[e](nothing.md)\n```\n"
    )
    text, shown = site.relink(page.read_text(), page, "docs/page.md", tmp_path)
    assert text.splitlines()[0] == (
        "[a](../index.md#use) [b](../source/src/loss.py.md#__codelineno-0-3) [c](page.md#here) [d](https://x.org)"
    )
    assert "[e](nothing.md)" in text
    assert shown == {tmp_path / "src" / "loss.py"}
    with pytest.raises(site.SiteError, match=r"docs/page.md: the link gone.md leads to no file"):
        site.relink("[f](gone.md)", page, "docs/page.md", tmp_path)


def test_a_source_page_shows_code_that_holds_fences(site, tmp_path):
    path = tmp_path / "it.py"
    path.write_text('"""\n````\nshown\n````\n"""\n')
    assert "\n````` {.python" in site.source_page(path, tmp_path)


def test_equations_of_a_docstring_become_blocks():
    pytest.importorskip("griffe")
    sys.path.insert(0, str(ROOT / "docs" / "site"))
    try:
        docstrings = importlib.import_module("docstrings")
    finally:
        sys.path.remove(str(ROOT / "docs" / "site"))
    text = "The loss:\n    L = − log σ(x)\nwith x:\n- one\n    more of it\n"
    assert docstrings.as_markdown(text) == (
        "The loss:\n\n    L = − log σ(x)\n\nwith x:\n- one\n    more of it"
    )


def test_the_search_needs_no_network(site, tmp_path):
    (tmp_path / "assets").mkdir()
    (tmp_path / "api").mkdir()
    script = '<script src="https://unpkg.com/iframe-worker/shim"></script>'
    for page in ("index.html", "api/one.html"):
        (tmp_path / page).write_text(script)
    site.local_search(tmp_path)
    assert (tmp_path / "index.html").read_text() == '<script src="assets/iframe-worker.js"></script>'
    assert (tmp_path / "api/one.html").read_text() == '<script src="../assets/iframe-worker.js"></script>'
    assert "IFrameWorker" in (tmp_path / "assets" / "iframe-worker.js").read_text()


def test_nothing_of_the_site_comes_from_elsewhere():
    import yaml

    settings = yaml.safe_load((ROOT / "docs" / "site" / "mkdocs.yml").read_text(encoding="utf-8"))
    assert settings["theme"]["font"] is False
    assert "offline" in settings["plugins"]
    assert "http" not in (ROOT / "docs" / "site" / "mkdocs.yml").read_text(encoding="utf-8").lower()
