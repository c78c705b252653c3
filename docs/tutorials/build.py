"""Tutorials: scripts with `# %%` cells into pages and notebooks, both with what the code printed and drew.

    python docs/tutorials/build.py [NAME …]      writes NAME.md, NAME-1.svg … and NAME.ipynb beside the
    scripts

A script is the one source: it runs as it is, opens as a notebook in most editors, and is what the tests
execute. A cell that begins `# %% [markdown]` is text, written as comments. As in a notebook, the value of a
cell's last line is shown. Each script runs in a folder of its own, which is thrown away.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TUTORIALS = ("rlhf_in_ten_minutes", "your_own_data_and_reward", "is_the_improvement_real")


@dataclass(frozen=True)
class Cell:
    """Text as Markdown, or code."""

    kind: str  # "markdown" | "code"
    source: str


@dataclass(frozen=True)
class Output:
    """What a cell printed or drew."""

    kind: str  # "text" | "svg"
    content: str
    title: str = ""  # of a drawing


def cells(script: str) -> list[Cell]:
    """The cells of a script; what stands before the first mark is a code cell."""
    marks = [*re.finditer(r"^# %%(.*)\n", script, re.MULTILINE)]
    heads = [("", 0, marks[0].start() if marks else len(script))] if not marks or marks[0].start() else []
    ends = [mark.start() for mark in marks[1:]] + [len(script)]
    found: list[Cell] = []
    for head, start, end in [*heads, *((m[1], m.end(), end) for m, end in zip(marks, ends, strict=True))]:
        body = script[start:end].strip("\n")
        if "[markdown]" in head:
            found.append(Cell("markdown", "\n".join(re.sub(r"^# ?", "", line) for line in body.split("\n"))))
        elif body:
            found.append(Cell("code", body))
    return found


def execute(script: Path) -> list[tuple[Cell, list[Output]]]:
    """Each cell with what it gave, executed in order in a fresh folder."""
    names: dict[str, Any] = {"__name__": "__main__"}
    done: list[tuple[Cell, list[Output]]] = []
    with _workplace(script):
        for cell in cells(script.read_text(encoding="utf-8")):
            done.append((cell, _run(cell.source, names, script.name) if cell.kind == "code" else []))
    return done


def _run(source: str, names: dict[str, Any], origin: str) -> list[Output]:
    """Execute a code cell; the value of its last line is shown."""
    tree, value, printed = ast.parse(source, origin), None, io.StringIO()
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, origin, "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), origin, "eval"), names)
    outputs = [Output("text", printed.getvalue().rstrip())] if printed.getvalue().strip() else []
    if hasattr(value, "_repr_svg_"):
        outputs.append(Output("svg", value._repr_svg_(), value.title))
    elif value is not None:
        outputs.append(Output("text", value.to_string() if hasattr(value, "to_string") else str(value)))
    return outputs


def page(name: str, done: Sequence[tuple[Cell, list[Output]]]) -> tuple[str, dict[str, str]]:
    """The tutorial as Markdown, and its figures by file name."""
    parts = [f"<!-- Made from {name}.py by build.py. -->"]
    figures: dict[str, str] = {}
    for cell, outputs in done:
        parts.append(cell.source if cell.kind == "markdown" else f"```python\n{cell.source}\n```")
        for output in outputs:
            if output.kind == "svg":
                file = f"{name}-{len(figures) + 1}.svg"
                figures[file] = output.content
                parts.append(f"![{output.title}]({file})")
            else:
                parts.append(f"```text\n{output.content}\n```")
    return "\n\n".join(parts) + "\n", figures


def notebook(done: Sequence[tuple[Cell, list[Output]]]) -> str:
    """The tutorial as a Jupyter notebook (nbformat 4.5), outputs included."""
    written: list[dict[str, Any]] = []
    count = 0
    for number, (cell, outputs) in enumerate(done):
        entry: dict[str, Any] = {"cell_type": cell.kind, "id": f"cell-{number}", "metadata": {}}
        entry["source"] = cell.source.splitlines(keepends=True)
        if cell.kind == "code":
            count += 1
            shown = [
                {
                    "output_type": "display_data",
                    "metadata": {},
                    "data": {
                        "image/svg+xml" if one.kind == "svg" else "text/plain": one.content.splitlines(
                            keepends=True
                        )
                    },
                }
                for one in outputs
            ]
            entry |= {"execution_count": count, "outputs": shown}
        written.append(entry)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    book = {"cells": written, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(book, ensure_ascii=False, indent=1) + "\n"


def build(name: str, to: Path = HERE) -> None:
    """Execute one tutorial and write its page, its figures and its notebook into `to`."""
    done = execute(HERE / f"{name}.py")
    text, figures = page(name, done)
    for stale in to.glob(f"{name}-*.svg"):
        stale.unlink()
    (to / f"{name}.md").write_text(text, encoding="utf-8")
    for file, svg in figures.items():
        (to / file).write_text(svg, encoding="utf-8")
    (to / f"{name}.ipynb").write_text(notebook(done), encoding="utf-8")


@contextlib.contextmanager
def _workplace(script: Path) -> Iterator[None]:
    """A fresh folder as the current one, with the tutorials' own modules in reach."""
    before = os.getcwd()
    reach = [str(script.parent), ""]
    sys.path[:0] = reach
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            yield
            os.chdir(before)
    finally:
        os.chdir(before)
        for entry in reach:
            sys.path.remove(entry)


if __name__ == "__main__":
    for chosen in sys.argv[1:] or TUTORIALS:
        build(chosen)
        print(HERE / f"{chosen}.md")
