"""Files that come in by the pages and the command line, and files that are taken away."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from keel.data import files
from keel.errors import UsageError
from keel.feedback import formats
from keel.votes.kinds import Added, Task
from keel.votes.store import Store

_FORMS: dict[Task, tuple[str, ...]] = {
    "pairwise": ("preference", "unpaired"), "thumbs": ("unpaired",), "rating": ("ratings", "unpaired"),
    "ranking": ("ranked",), "edit": ("demonstration",),
}  # fmt: skip
_OTHERS = ("keel", "label_studio", "argilla")


def forms_of(task: Task) -> tuple[str, ...]:
    """The formats in which a project of this task can be taken away."""
    return (*_FORMS[task], *_OTHERS)


@contextmanager
def kept(content: IO[bytes], name: str) -> Iterator[Path]:
    """A file that was sent, in a folder that is gone afterwards. UsageError for a kind that keel does not
    read."""
    plain = Path(name.replace("\\", "/")).name
    suffixes = tuple(end + zipped for end in files.SUFFIXES for zipped in ("", ".gz"))
    suffix = next((end for end in suffixes if plain.lower().endswith(end)), None)
    if suffix is None:
        raise UsageError(f"{plain} is no file that keel reads: {' '.join(files.SUFFIXES)}, each also .gz")
    with tempfile.TemporaryDirectory(prefix="keel-label-") as folder:
        path = Path(folder) / f"items{suffix}"
        with path.open("wb") as out:
            shutil.copyfileobj(content, out)
        try:
            yield path
        except UsageError as error:  # its place on this machine says nothing to who sent it
            raise UsageError(str(error).replace(str(path), plain)) from None


def add(
    store: Store,
    project: str,
    path: Path,
    *,
    format: str | None = None,
    by: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Added:
    """Add the items of a file, with the votes it brings, to a project. say: is told what was left out."""
    labels = formats.read(path, task=store.project(project).task, format=format)
    for note in labels.notes:
        say(note)
    return formats.into_project(store, project, labels, by)


def lines(store: Store, project: str, form: str) -> Iterator[str]:
    """A project's items and votes in a format, a line of JSON a row; what is wrong is raised at once."""
    rows = formats.rows_of(formats.of_project(store, project), form)
    return map(formats.line_of, rows)
