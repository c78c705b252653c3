"""Where in the code each name of docs/metrics.md is written: found in the syntax tree, not listed by hand.

A name is written as a key of a dict, as a subscript that is assigned to, as a keyword or as a field. An
f-string counts with its holes open: `f"rewards/{name}/mean"` writes `rewards/NAME/mean`. Many modules write a
`step` or a `loss`. The section of the page says in which folders to look first.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HOLE = "\0"  # what an f-string fills in, and a capital word of the page
ROW = re.compile(r"\| `([^`]+)` \| ")
READERS = ("cli", "plan", "report")  # rooms that read metrics and write none
LANGUAGE = ("stages/supervised_loop.py", "stages/language.py", "algorithms/lm.py")
REWARD = ("stages/reward.py", "algorithms/reward_model.py", "stages/supervised_loop.py", "evaluation")
CLASSES = ("stages/classifier.py", "algorithms/classification.py", "stages/supervised_loop.py")
PAIRS = ("algorithms/preference.py", "stages/preference.py", "stages/supervised_loop.py")
# section of the page → files and folders of src/keel, the likeliest to write its names first
LOOK_IN: dict[str, tuple[str, ...]] = {
    "pretrain and sft": (*LANGUAGE, "stages"),
    "reward": REWARD,
    "classifier": CLASSES,
    "dpo": PAIRS,
    "ppo and grpo": ("rl", "algorithms", "rollout", "rewards", "diagnosis"),
    "best_of_n": ("stages/best_of_n.py", *LANGUAGE, "types.py"),
    "collect": ("stages/collect.py",),
    "evaluate": ("evaluation", "stages/evaluate.py", "worlds", "types.py"),
    "times.jsonl": ("rl", "stages", "rundir", "rollout"),
    "stage.json": ("pipeline", "stages", "rundir", "rl"),
}
# file, or (file, name) → where to look before all else
LOOK_FIRST: dict[str | tuple[str, str], str] = {
    "events.jsonl": "diagnosis",
    ("metrics.jsonl", "step"): "rundir/stage_run.py",  # the run writes it beside what a stage measured
    ("", "step"): "rundir/stage_run.py",
}


@dataclass(frozen=True)
class Place:
    """A line of the package that writes a name."""

    path: str  # below src/, with slashes
    line: int  # from 1
    scope: str  # the function or class around it, "" at a module's top
    template: str  # the name as it stands in the code, HOLE for what is filled in
    kind: int  # 0 timed phase, 1 key or subscript, 2 keyword or field, 3 any other string

    def writes(self, name: str) -> bool:
        """Whether the template gives the name. A hole stands for one or more characters without a slash."""
        if HOLE not in self.template:
            return self.template == name
        pattern = _pattern(self.template)
        return pattern is not None and pattern.fullmatch(name) is not None


@cache
def _pattern(template: str) -> re.Pattern[str] | None:
    """What a template with holes can give; None for one that is nothing else."""
    if template.strip(HOLE + "/_") == "":
        return None
    return re.compile("[^/]+".join(re.escape(part) for part in template.split(HOLE)))


def _text(node: ast.AST | None) -> str | None:
    """The string of a constant or an f-string, with HOLE where something is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values)
    return None


def _candidates(node: ast.AST) -> list[tuple[str | None, int, int]]:
    """(template, line, kind) of the strings of one node that could be names."""
    if isinstance(node, ast.Dict):
        keys = [(_text(key), key.lineno, 1) for key in node.keys if key is not None]
        return keys + [(_text(value), value.lineno, 3) for value in node.values]
    if isinstance(node, ast.DictComp):
        return [(_text(node.key), node.key.lineno, 1)]
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
        return [(_text(node.slice), node.lineno, 1)]
    if isinstance(node, ast.keyword):
        return [(node.arg, node.lineno, 2)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [(node.target.id, node.lineno, 2)]
    if isinstance(node, ast.Call):  # `run.timed("rollout")` names a phase of times.jsonl
        phase = isinstance(node.func, ast.Attribute) and node.func.attr == "timed"
        return [(_text(argument), argument.lineno, 0 if phase else 3) for argument in node.args]
    if isinstance(node, (ast.Tuple, ast.List)):
        return [(_text(item), item.lineno, 3) for item in node.elts]
    return []


def _names(node: ast.AST, scope: str = "") -> Iterator[tuple[str, int, int, str]]:
    """(template, line, kind, scope) of every string below a node that could be a name."""
    for template, line, kind in _candidates(node):
        if template:
            yield template, line, kind, scope
    inner = scope
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        inner = f"{scope}.{node.name}" if scope else node.name
    for child in ast.iter_child_nodes(node):
        yield from _names(child, inner)


@cache
def places(package: Path) -> list[Place]:
    """Every place of the package (`src/keel`) where a string that could be a metric's name is written."""
    return [
        Place(path.relative_to(package.parent).as_posix(), line, scope, template, kind)
        for path in sorted(package.rglob("*.py"))
        if path.relative_to(package).parts[0] not in READERS
        for template, line, kind, scope in _names(ast.parse(path.read_text(encoding="utf-8")))
    ]


class Candidates:
    """Places, by the name that they write and by the function that they stand in: 400 names are asked for, of
    tens of thousands of strings."""

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = places
        self._spelled = defaultdict[str, list[int]](list)
        self._open: list[int] = []  # what an f-string leaves open; no name has a space in it
        self._scopes = defaultdict[tuple[str, str], list[Place]](list)
        for number, place in enumerate(places):
            self._scopes[place.path, place.scope].append(place)
            if HOLE not in place.template:
                self._spelled[place.template].append(number)
            elif " " not in place.template:
                self._open.append(number)

    def writing(self, name: str) -> list[Place]:
        """Those that write a name, in the order of the code."""
        made = [number for number in self._open if self._places[number].writes(name)]
        return [self._places[number] for number in sorted([*self._spelled.get(name, ()), *made])]

    def written_in(self, path: str, scope: str, names: Set[str]) -> int:
        """How many of the names a function writes."""
        inside = self._scopes[path, scope]
        return sum(any(place.writes(_filled(name)) for place in inside) for name in names)


def _filled(name: str) -> str:
    """The name with its capital words filled in: `rewards/NAME/mean` as a run would write it."""
    return re.sub(r"\b(NAME|PART)\b", "x", name)


def find(
    name: str,
    section: str,
    file: str,
    candidates: Candidates | Sequence[Place],
    beside: Set[str] = frozenset(),
) -> Place | None:
    """The place that writes a name of a section and file of the page, or None.

    The folders of the section go first. In them a function that writes many of the names `beside` it comes
    first, then keys before keywords and fields, then what fills in least. A name `eval_NAME` that no line
    spells out is made of NAME, so it leads there.
    """
    if not isinstance(candidates, Candidates):
        candidates = Candidates(candidates)
    folders = (LOOK_FIRST.get((file, name)) or LOOK_FIRST.get(file), *LOOK_IN.get(section, ()))
    asked = _filled(name)
    writing = candidates.writing(asked)
    spelled = [place for place in writing if HOLE not in place.template or asked != name]
    base = name.removeprefix("eval_")
    if not spelled and base != name and (place := find(base, section, file, candidates, beside)):
        return place
    scopes = {(place.path, place.scope) for place in writing if place.scope}  # a module's top only lists them
    written_in = {scope: candidates.written_in(*scope, beside) for scope in scopes}

    def rank(place: Place) -> tuple[bool, bool, bool, int, int, int, int, int]:
        inside = place.path.partition("/")[2]
        order = (i for i, folder in enumerate(folders) if folder and f"{inside}/".startswith(f"{folder}/"))
        nearest = next(order, len(folders))
        written = written_in.get((place.path, place.scope), 0)
        holes = place.template.count(HOLE)
        outside, phase, listed = nearest == len(folders), place.kind == 0, place.kind == 3
        return (outside, not phase, listed, nearest, -written, place.kind, holes, place.line)

    return min(spelled or writing, key=rank, default=None)


@dataclass(frozen=True)
class Row:
    """A line of docs/metrics.md that defines a name."""

    number: int  # of the line, from 0
    section: str
    file: str
    name: str


def rows(page: str) -> list[Row]:
    """The rows of docs/metrics.md that define a name, in order."""
    defined: list[Row] = []
    section = file = ""
    for number, line in enumerate(page.splitlines()):
        if line.startswith("## "):
            section, file = line[3:], ""
        elif line.startswith("### "):
            file = line[4:]
        elif row := ROW.match(line):
            defined.append(Row(number, section, file, row[1]))
    return defined


def find_all(page: str, package: Path) -> dict[Row, Place | None]:
    """The place of every name of the page, None where no line of the package writes it."""
    candidates, defined = Candidates(places(package)), rows(page)
    return {
        row: find(
            row.name,
            row.section,
            row.file,
            candidates,
            frozenset(one.name for one in defined if (one.section, one.file) == (row.section, row.file)),
        )
        for row in defined
    }
