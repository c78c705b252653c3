"""What the docs site makes of a docstring: its indented blocks as code, and a link to the lines it describes.

Equations and examples stand indented under a line of text. Markdown takes them for a part of the sentence
unless an empty line goes before them, which docstrings here do without.
"""

from __future__ import annotations

from typing import Any

import griffe


def as_markdown(text: str) -> str:
    """The docstring with an empty line around each block that is indented by four spaces or more."""
    lines: list[str] = []
    for line in text.splitlines():
        if line.strip() and lines and lines[-1].strip():
            indented, before = line.startswith("    "), lines[-1].startswith("    ")
            if indented != before and not lines[-1].lstrip().startswith(("- ", "* ")):
                lines.append("")
        lines.append(line)
    return "\n".join(lines)


class Docstrings(griffe.Extension):
    """Rewrites every docstring of the package as it is read."""

    def on_instance(self, *, obj: griffe.Object | griffe.Alias, **_: Any) -> None:
        """Called by griffe for each module, class, function and attribute."""
        if obj.docstring is None or obj.is_alias:
            return
        text = as_markdown(obj.docstring.value)
        if obj.is_module or obj.lineno is None or not (obj.is_function or obj.is_class):
            obj.docstring.value = text
            return
        path = obj.module.path.replace(".", "/") + ("/__init__" if obj.module.is_init_module else "")
        anchor = f"../source/src/{path}.py.html#__codelineno-0-{obj.lineno}"
        obj.docstring.value = f'{text}\n\n<small>[source]({anchor}){{title="{obj.path}"}}</small>'
