"""The tutorials run, and their pages and notebooks are made from the scripts as they are now."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parents[1] / "docs" / "tutorials"


def _module(name: str) -> ModuleType:
    """A module of the tutorials' folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build, figures = _module("build"), _module("figures")


def test_every_script_is_a_tutorial() -> None:
    scripts = {path.stem for path in HERE.glob("*.py")} - {"build", "figures"}
    assert scripts == {*build.TUTORIALS}


LONG = ("rlhf_in_ten_minutes", "is_the_improvement_real")  # a minute of two cores each


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in build.TUTORIALS]
)
def test_a_tutorial_runs_and_shows_what_it_says(name: str, tmp_path: Path) -> None:
    build.build(name, tmp_path)
    page = (tmp_path / f"{name}.md").read_text(encoding="utf-8")
    drawn = re.findall(r"!\[(.+?)\]\((.+?)\)", page)
    assert len(drawn) >= 1
    for _, file in drawn:
        ET.fromstring((tmp_path / file).read_text(encoding="utf-8"))
    assert "Traceback" not in page
    # as many outputs as the page in the repository, whatever their numbers
    committed = (HERE / f"{name}.md").read_text(encoding="utf-8")
    assert [file for _, file in drawn] == [file for _, file in re.findall(r"!\[(.+?)\]\((.+?)\)", committed)]
    assert page.count("```text") == committed.count("```text")


@pytest.mark.parametrize("name", build.TUTORIALS)
def test_page_and_notebook_are_those_of_the_script(name: str) -> None:
    """Of the text and the code; outputs are those of the machine that made them. `make tutorials` writes
    both."""
    cells = build.cells((HERE / f"{name}.py").read_text(encoding="utf-8"))
    page = (HERE / f"{name}.md").read_text(encoding="utf-8")
    position = 0
    for cell in cells:
        block = cell.source if cell.kind == "markdown" else f"```python\n{cell.source}\n```"
        position = page.find(block, position)
        assert position >= 0, f"not in {name}.md, or not in its place:\n{block}"
    book = json.loads((HERE / f"{name}.ipynb").read_text(encoding="utf-8"))
    written = [(cell["cell_type"], "".join(cell["source"])) for cell in book["cells"]]
    assert written == [(cell.kind, cell.source) for cell in cells]
    for file in re.findall(r"!\[.+?\]\((.+?)\)", page):
        assert (HERE / file).exists()


def test_a_script_is_cut_into_cells() -> None:
    script = "import keel\n\n# %% [markdown]\n# # Title\n#\n# text\n\n# %%\nx = 1\nx\n# %%\n"
    assert build.cells(script) == [
        build.Cell("code", "import keel"),
        build.Cell("markdown", "# Title\n\ntext"),
        build.Cell("code", "x = 1\nx"),
    ]


def test_the_last_value_of_a_cell_is_shown_and_a_failure_is_one(tmp_path: Path) -> None:
    script = tmp_path / "one.py"
    script.write_text("# %%\nprint('said')\n2 + 3\n# %%\nNone\n", encoding="utf-8")
    assert [outputs for _, outputs in build.execute(script)] == [
        [build.Output("text", "said"), build.Output("text", "5")],
        [],
    ]
    script.write_text("# %%\n1 / 0\n", encoding="utf-8")
    with pytest.raises(ZeroDivisionError):
        build.execute(script)


def test_figures_draw_what_they_are_given() -> None:
    drawn = figures.curves("A & B", {"a": [(0, 1.0), (1, float("nan")), (2, 3.0)], "b": [(0, 0.0)]}, y="loss")
    lines = ET.fromstring(drawn.svg).findall("{http://www.w3.org/2000/svg}polyline")
    assert [len(line.attrib["points"].split()) for line in lines] == [2, 1]
    low, high = ([float(v) for v in point.split(",")] for point in lines[0].attrib["points"].split())
    assert low[0] < high[0]
    assert low[1] > high[1], "up is smaller in SVG"
    bars = figures.intervals("x", {"one": (1.0, 0.5, 1.5), "two": (2.0, 2.0, 2.0)})
    dots = ET.fromstring(bars.svg).findall("{http://www.w3.org/2000/svg}circle")
    assert len(dots) == 2
    assert float(dots[0].attrib["cx"]) < float(dots[1].attrib["cx"])


@pytest.mark.parametrize("span", [3e-4, 0.013, 0.9, 1.0, 7.0, 55.0, 4321.0])
def test_ticks_are_few_and_round(span: float) -> None:
    scale = figures._Scale([-0.3 * span, 0.7 * span], 0, 100)
    ticks = scale.ticks()
    assert 3 <= len(ticks) <= 9
    assert all(scale.low <= tick <= scale.high for tick in ticks)
    steps = {round((b - a) / span, 6) for a, b in itertools.pairwise(ticks)}
    assert len(steps) == 1
