"""A store with a project of every task, the app on it, and a browser's worth of manners for its client."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from keel.feedback.app import create_app
from keel.votes import open_store
from keel.votes.kinds import NewItem, Project, Reply, Role, Scale
from keel.votes.store import Store

SECRET = "secret-model"  # begins every source: no page for annotators may hold it

CALL = {"type": "function", "function": {"name": "find_order", "arguments": '{"number": 17}'}}
TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "You are a shop's assistant."},
    {"role": "user", "content": "Where is order 17?"},
]
TOOLS: list[dict[str, Any]] = [
    {"role": "assistant", "content": "", "reasoning_content": "I look it up.", "tool_calls": [CALL]},
    {"role": "tool", "name": "find_order", "content": '{"place": "<b>Leipzig</b>"}'},
    {"role": "assistant", "content": "It is in **Leipzig**."},
]
HOSTILE = (
    "<script>fetch('http://outside.example/x')</script>"
    "<img src=http://outside.example/i.png onerror=alert(1)> "
    "![p](http://outside.example/p.png) [c](javascript:alert(1)) <svg onload=alert(1)> "
    '<form action="http://outside.example"><input name=csrf></form> <style>body{display:none}</style> '
    "<iframe src=http://outside.example></iframe> [ok](https://fine.example/)"
)
LONG = (
    "x" * 600
    + "\n\nhttps://fine.example/"
    + "path/" * 80
    + "\n\n| a | b |\n|---|---|\n| "
    + "w" * 300
    + " | 2 |"
)
WIDE = f"${'a_1 + ' * 60}b$, $5 and $10\n\n\\[ {'x^2 + ' * 60} y \\]\n\n"
CHINESE = "光合作用是植物利用阳光，把二氧化碳和水转化为葡萄糖和氧气的过程。"
ARABIC = "عاصمة المغرب هي **الرباط**، وهي مدينة على ساحل المحيط الأطلسي."


def pairs(count: int) -> list[NewItem]:
    """Pairs whose sources are telling."""
    return [
        NewItem(
            f"{SECRET}-pair-{i}",
            f"How do I change address number {i}?",
            [
                Reply(f"Open your account, page {i}.", f"{SECRET}-a"),
                Reply(f"Write to us: {i}.", f"{SECRET}-b"),
            ],
        )
        for i in range(count)
    ]


def odd_pairs() -> list[NewItem]:
    """Pairs of everything that a model may write."""
    sides: list[tuple[Any, Any, Any]] = [
        (TURNS, TOOLS, [{"role": "assistant", "content": "It is on its way."}]),
        ("hostile", HOSTILE, f"<think>{HOSTILE}</think>Fine."),
        ("long", LONG, "short"),
        ("请解释光合作用。", CHINESE, "植物吃阳光。"),
        ("ما هي عاصمة المغرب؟", ARABIC, "العاصمة هي الدار البيضاء."),
        (
            "sum?",
            WIDE + "It is $\\sum_i x_i < 3$ and\n\n```python\nprint('<b>')\n```",
            "\\[ y = 2 \\]\n\n> quoted",
        ),
    ]
    return [
        NewItem(f"{SECRET}-odd-{i}", prompt, [Reply(a, f"{SECRET}-a"), Reply(b, f"{SECRET}-b")])
        for i, (prompt, a, b) in enumerate(sides)
    ]


def fill(store: Store) -> None:
    """A project of every task, one with nothing in it, and one of everything that a model may write."""
    words = {"instructions": "Choose what you would *rather* read.", "examples": "An example."}
    store.create_project(Project("pairs", title="Pairs", gold_share=0, votes_per_item=2, **words), by=None)
    store.add_items("pairs", pairs(30), by=None)
    store.create_project(Project("odd", gold_share=0, strength=True, **words), by=None)
    store.add_items("odd", odd_pairs(), by=None)
    scales = (Scale("helpful"), Scale("polite", 1, 7, "rude", "courteous"))
    store.create_project(Project("ratings", task="rating", scales=scales), by=None)
    store.create_project(Project("ranks", task="ranking"), by=None)
    store.create_project(Project("edits", task="edit"), by=None)
    store.create_project(Project("thumbs", task="thumbs"), by=None)
    store.create_project(Project("empty"), by=None)
    for name, replies in (("ratings", 1), ("ranks", 3), ("edits", 1), ("thumbs", 1)):
        items = [
            NewItem(
                f"{i}", f"question {i}", [Reply(f"reply {i} {k}", f"{SECRET}-{k}") for k in range(replies)]
            )
            for i in range(8)
        ]
        store.add_items(name, items, by=None)


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The database that each test has a copy of."""
    path = tmp_path_factory.mktemp("labels") / "filled.db"
    with open_store(f"sqlite:///{path}") as opened:
        fill(opened)
        opened.backup(path.with_name("whole.db"))
    return path.with_name("whole.db")


@pytest.fixture
def store(tmp_path: Path, filled: Path) -> Iterator[Store]:
    shutil.copyfile(filled, tmp_path / "labels.db")
    with open_store(f"sqlite:///{tmp_path / 'labels.db'}") as opened:
        yield opened


class Visitor(TestClient):
    """A browser without scripts: keeps cookies, sends each form's own CSRF token."""

    text: str = ""

    def see(self, path: str, status: int = 200) -> str:
        """The page at a path."""
        response = self.get(path)
        assert response.status_code == status, (path, response.status_code, response.text[:500])
        self.text = response.text
        return self.text

    def field(self, name: str) -> str:
        """The value of a hidden field of the page that was seen last."""
        found = re.search(rf'name="{name}" value="([^"]*)"', self.text)
        assert found is not None, name
        return found[1]

    def submit(self, path: str, fields: dict[str, str] | None = None, status: int = 200, **more: Any) -> Any:
        """Send a form of the page that was seen last."""
        response = self.post(path, data={"csrf": self.field("csrf"), **(fields or {})}, **more)
        assert response.status_code == status, (path, response.status_code, response.text[:500])
        self.text = response.text if "csrf" in response.text else self.text
        return response

    def action(self) -> str:
        """Where the vote of the page that was seen last goes."""
        found = re.search(r'action="(/projects/[^"]+/vote)"', self.text)
        assert found is not None
        return found[1]

    def vote(self, project: str, fields: dict[str, str], status: int = 200, **more: Any) -> Any:
        """Judge the next item of a project as the page has it."""
        self.see(f"/projects/{project}/work")
        return self.submit(self.action(), {"client_id": self.field("client_id"), **fields}, status, **more)


@pytest.fixture
def app(store: Store) -> Any:
    return create_app(store, rate=1e6, burst=1e6)


Enter = Callable[..., Visitor]


@pytest.fixture
def enter(app: Any, store: Store) -> Enter:
    """A visitor who came in by an invitation; role None: one who did not."""

    def go(role: Role | None = "annotator", name: str = "Ada", project: str | None = None) -> Visitor:
        visitor = Visitor(app)
        if role is not None:
            path = f"/join/{store.invite(role, project, by=None)}"
            visitor.see(path)
            visitor.submit(path, {"name": name})
        return visitor

    return go


FILE_PAIRS = "".join(
    json.dumps({"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"}) + "\n" for i in range(4)
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a file of pairs and one of rules."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KEEL_LABEL_DB", raising=False)
    (tmp_path / "My Pairs.jsonl").write_text(FILE_PAIRS)
    (tmp_path / "rules.md").write_text("Be *fair*.")
    return tmp_path
