"""Builds the docs site from the Markdown of the repository: `python docs/site/build_site.py`, or `make docs`.

The pages are those that are read in the repository, laid out in `build/site-source` as they stand there. So
their links hold in both. What is added: a page for each module from its docstrings, a page for each source
file with numbered lines, the navigation, and on docs/metrics.md a link from each name to the line that writes
it. A link that leads nowhere, a page without a title and a metric that nothing writes end the build.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import metric_places
import yaml

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "keel"
PICTURES = {".png", ".svg", ".jpg", ".gif"}
TOP_PAGES = {"README.md": "index.md"} | {n: n for n in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")}
LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
FENCE = re.compile(r"(^```.*?^```[ ]*$)", re.DOTALL | re.MULTILINE)
# Navigation: a title → pages and folders, in order. What nothing names goes to the end of the guides.
NAVIGATION: dict[str, tuple[str, ...]] = {
    "Start": ("index.md", "docs/python.md", "docs/tutorials", "docs/recipes.md"),
    "Guides": (
        "docs/rewards.md",
        "docs/tools.md",
        "docs/tasks.md",
        "docs/judge.md",
        "docs/distill.md",
        "docs/reward-bench.md",
        "docs/data.md",
        "docs/diagnosis.md",
        "docs/dashboard.md",
        "docs/judging.md",
        "docs/votes.md",
        "docs/labelling.md",
        "docs/overoptimization.md",
        "docs/human-loop.md",
        "docs/memory.md",
        "docs/engines.md",
        "docs/speed.md",
        "docs/scale.md",
        "docs/saving.md",
        "docs/trackers.md",
    ),
    "Reference": ("docs/metrics.md", "docs/papers.md", "api"),
    "Results": ("docs/results.md", "docs/notes.md"),
    "Work on keel": (
        "docs/concepts.md",
        "CONTRIBUTING.md",
        "docs/extending.md",
        "CHANGELOG.md",
        "SECURITY.md",
        "source/index.md",
    ),
}
FIRST_IN_FOLDER = ("rlhf_in_ten_minutes", "your_own_data_and_reward")  # the other pages follow by name


class SiteError(Exception):
    """Something on a page that the site cannot be built from."""


def pages(root: Path = ROOT) -> dict[str, Path]:
    """Path on the site → the Markdown file of the repository that it is made of."""
    staged = {target: root / name for name, target in TOP_PAGES.items() if (root / name).exists()}
    for path in sorted((root / "docs").rglob("*.md")):
        if "site" not in path.relative_to(root / "docs").parts:
            staged[path.relative_to(root).as_posix()] = path
    return staged


def title(text: str) -> str:
    """The first heading of a page, without its marks."""
    heading = re.search(r"^# +(.+)$", FENCE.sub("", text), re.MULTILINE)
    if heading is None:
        raise SiteError("a page needs a title, a line that begins with '# '")
    return re.sub(r"[`*]", "", heading[1]).strip()


def relink(text: str, source: Path, target: str, root: Path = ROOT) -> tuple[str, set[Path]]:
    """The text with links between files of the repository turned into links between pages of the site.

    source: the file that the text comes from; target: its path on the site. Links to Markdown pages and
    pictures stay as they are, but for the README, which is the site's first page. A link to any other file
    leads to the page with its source, `#L12` to line 12 of it. Returns the text and the files that need such
    a page. SiteError for a link to a file that is not there.
    """
    shown: set[Path] = set()
    here = os.path.dirname(target) or "."

    def turn(match: re.Match[str]) -> str:
        link, _, anchor = match[1].partition("#")
        if not link or "://" in link or link.startswith("mailto:"):
            return match[1]
        path = (source.parent / link).resolve()
        if not path.is_file():
            raise SiteError(f"{source.relative_to(root)}: the link {match[1]} leads to no file")
        inside = path.relative_to(root).as_posix()
        if inside in TOP_PAGES:
            page = TOP_PAGES[inside]
        elif path.suffix == ".md" or path.suffix in PICTURES:
            page = inside
        else:
            shown.add(path)
            page = f"source/{inside}.md"
            anchor = re.sub(r"^L(\d+).*", r"__codelineno-0-\1", anchor)
        return os.path.relpath(page, here).replace(os.sep, "/") + (f"#{anchor}" if anchor else "")

    parts = FENCE.split(text)
    return "".join(part if i % 2 else LINK.sub(turn, part) for i, part in enumerate(parts)), shown


def with_places(page: str, package: Path = PACKAGE) -> str:
    """docs/metrics.md with a link from each name that it defines to the line that writes it.

    SiteError for a name that no line writes.
    """
    lines = page.splitlines(keepends=True)
    for row, place in metric_places.find_all(page, package).items():
        if place is None:
            raise SiteError(f"docs/metrics.md: nothing writes `{row.name}` ({row.section}, {row.file})")
        link = f"../source/src/{place.path}.md#__codelineno-0-{place.line}"
        lines[row.number] = lines[row.number].replace(f"`{row.name}`", f"[`{row.name}`]({link})", 1)
    return "".join(lines)


def source_page(path: Path, root: Path = ROOT) -> str:
    """A page with the numbered lines of a source file. It is not searched: the pages that explain it are."""
    text = path.read_text(encoding="utf-8")
    longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
    fence = "`" * max(4, longest + 1)
    language = {".py": "python", ".yaml": "yaml", ".toml": "toml"}.get(path.suffix, "text")
    name = path.relative_to(root).as_posix()
    head = f"---\nsearch:\n  exclude: true\nhide: [toc]\n---\n# {path.name}\n\n`{name}`\n\n"
    return f'{head}{fence} {{.{language} linenums="1"}}\n{text.rstrip()}\n{fence}\n'


def modules(package: Path = PACKAGE) -> Iterator[tuple[str, Path, str]]:
    """(dotted name, file, first sentence of the docstring) of each module that has something to show."""
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstring = " ".join((ast.get_docstring(tree) or "").partition("\n\n")[0].split())
        public = [n for n in tree.body if not getattr(n, "name", "_").startswith("_")]
        if (
            docstring
            and parts[-1].isidentifier()
            and parts[-1] != "__main__"
            and (public or parts[-1] == "__init__")
        ):
            name = ".".join(part for part in parts if part != "__init__")
            yield name, path, re.split(r"(?<=[.:])\s", docstring, maxsplit=1)[0].rstrip(":")


def api_pages(package: Path = PACKAGE) -> dict[str, str]:
    """Path on the site → text: a page for each module, and one that lists them by room."""
    texts: dict[str, str] = {}
    rooms: dict[str, list[str]] = {}
    for name, path, sentence in modules(package):
        source = f"../source/{path.relative_to(package.parents[1]).as_posix()}.md"
        texts[f"api/{name}.md"] = f"# {name}\n\n[source]({source})\n\n::: {name}\n"
        room = ".".join(name.split(".")[:2]) if path.parent != package else package.name
        row = f"| [`{name}`]({name}.md) | {sentence.replace('|', chr(92) + '|')} |"
        rooms.setdefault(room, []).append(row)
    intro = (
        "# API\n\nEvery module, from its docstrings. What `import keel` gives and the losses under"
        " `keel.algorithms` are the\npublic interface. Other modules may change between minor versions.\n"
    )
    tables = (
        "\n".join([f"\n## {room}\n\n| module | what it is |\n|---|---|", *rooms[room]])
        for room in sorted(rooms)
    )
    texts["api/index.md"] = intro + "\n".join(tables) + "\n"
    return texts


def navigation(texts: dict[str, str]) -> list[dict[str, Any]]:
    """The site's menu over the pages there are. What NAVIGATION does not name goes to the end of the
    guides."""
    left = {page: title(text) for page, text in texts.items() if not page.startswith("source/src/")}
    left = {page: name for page, name in left.items() if page.count("/") < 2 or page.startswith("docs/")}
    menu: dict[str, list[Any]] = {section: [] for section in NAVIGATION}
    for section, names in NAVIGATION.items():
        for name in names:
            inside = sorted((page for page in left if page.startswith(f"{name}/")), key=_reading_order)
            if name in left:
                menu[section].append({left.pop(name): name})
            elif name == "api":
                menu[section].append({"API": _api_menu({page: left.pop(page) for page in inside})})
            elif inside:
                folder = name.rpartition("/")[2].capitalize()
                menu[section].append({folder: [{left.pop(page): page} for page in inside]})
    menu["Guides"] += [{name: page} for page, name in left.items()]
    return [{section: entries} for section, entries in menu.items() if entries]


def _reading_order(page: str) -> tuple[int, str]:
    """Sorts the pages of a folder: FIRST_IN_FOLDER in its order, the others by name."""
    stem = Path(page).stem
    known = stem in FIRST_IN_FOLDER
    return (FIRST_IN_FOLDER.index(stem) if known else len(FIRST_IN_FOLDER), page)


def _api_menu(titles: dict[str, str]) -> list[Any]:
    """The list of all modules first, then the modules by room. titles: page → dotted name."""
    rooms: dict[str, list[dict[str, str]]] = {}
    packages = {name.rpartition(".")[0] for name in titles.values()}
    for page, name in sorted(titles.items(), key=lambda item: item[1]):  # a package before its modules
        if page == "api/index.md":
            continue
        parts = name.split(".")
        room = parts[1] if len(parts) > 2 or (len(parts) == 2 and name in packages) else parts[0]
        rooms.setdefault(room, []).append({"overview" if name in packages else parts[-1]: page})
    return ["api/index.md", *({room: entries} for room, entries in sorted(rooms.items()))]


def stage(target: Path, root: Path = ROOT) -> dict[str, str]:
    """Write all pages and pictures of the site below `target`. Path on the site → text."""
    package = root / "src" / "keel"
    texts: dict[str, str] = {}
    shown = set(package.rglob("*.py"))
    for page, path in pages(root).items():
        texts[page], linked = relink(path.read_text(encoding="utf-8"), path, page, root)
        shown |= linked
        try:
            title(texts[page])
        except SiteError as error:
            raise SiteError(f"{path.relative_to(root)}: {error}") from None
    texts["docs/metrics.md"] = with_places(texts["docs/metrics.md"], package)
    texts |= api_pages(package)
    for path in sorted(shown):
        texts[f"source/{path.relative_to(root).as_posix()}.md"] = source_page(path, root)
    listed = [page.removeprefix("source/") for page in texts if page.startswith("source/")]
    texts["source/index.md"] = (
        "# Source\n\n" + "\n".join(f"- [{page[:-3]}]({page})" for page in listed) + "\n"
    )
    shutil.rmtree(target, ignore_errors=True)
    for page, text in texts.items():
        file = target / page
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    for path in (root / "docs").rglob("*"):
        if path.suffix in PICTURES:
            (picture := target / path.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, picture)
    return texts


def local_search(site: Path) -> None:
    """Point every page at a copy of the script that lets the search run from a file, in place of a CDN's.

    SiteError for a page that takes a script, a style or a picture from elsewhere.
    """
    shutil.copyfile(Path(__file__).parent / "iframe-worker.js", site / "assets" / "iframe-worker.js")
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        up = "../" * len(page.relative_to(site).parents[1:])
        local = text.replace("https://unpkg.com/iframe-worker/shim", f"{up}assets/iframe-worker.js")
        if re.search(r'<(?:script|link|img)[^>]+(?:src|href)="https?://', local):
            raise SiteError(f"{page.relative_to(site)} takes something from elsewhere")
        page.write_text(local, encoding="utf-8")


def build(out: Path) -> None:
    """Stage the pages beside `out`, build the site there, move it to `out`. SiteError for what is wrong."""
    if importlib.util.find_spec("zensical") is None:
        raise SiteError("the site needs Zensical: Python 3.11 or newer, and pip install -e '.[docs]'")
    source, here = out.with_name(out.name + "-source"), Path(__file__).parent
    texts = stage(source / "pages")
    settings = yaml.safe_load((here / "mkdocs.yml").read_text(encoding="utf-8"))
    python = settings["plugins"][-1]["mkdocstrings"]["handlers"]["python"]
    python["paths"] = [str(ROOT / "src")]
    python["options"]["extensions"] = [str(here / "docstrings.py")]
    settings |= {"docs_dir": "pages", "site_dir": "site", "nav": navigation(texts)}
    config = source / "mkdocs.yml"
    config.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", str(config)]
    if subprocess.run(command, cwd=source).returncode:
        raise SiteError("Zensical found something wrong; see above")
    local_search(source / "site")
    shutil.rmtree(out, ignore_errors=True)
    (source / "site").rename(out)
    print(f"{len(texts)} pages: {out / 'index.html'}")


def main() -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(description="Builds the docs site.")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "site", help="where the site goes")
    try:
        build(parser.parse_args().out.resolve())
    except SiteError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
