"""The loop in a browser: `keel run human-loop --wait` in one process, simulated people who click in another,
and the new policy's pairs on their page at the end. Minutes; `make test-browser`."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("playwright")

from keel.feedback.app import create_app
from keel.votes import open_store

pytestmark = pytest.mark.browser
SMALL = [
    "threads=1", "device=cpu", "base.data.rows=1500", "ppo.updates=2", "ppo.batch_size=16",
    "ppo.mini_batch=16", "ppo.micro_batch=16", "judge.data.rows=8", "reward.normalize=16",
]  # fmt: skip


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The run, which waits for votes wherever it asks people."""
    command = [sys.executable, "-m", "keel", "run", "human-loop", *SMALL, "--wait", "--runs", str(tmp_path)]
    with (tmp_path / "log").open("w") as log:
        environment = {**os.environ, "KEEL_LABEL_DB": f"sqlite:///{tmp_path / 'label.db'}"}
        run = subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True)
        yield run
        run.kill()
        run.wait()


def until(what: Any, run: subprocess.Popen[str], tmp_path: Path) -> Any:
    """What `what` returns, once it is something; the run must not have ended."""
    for _ in range(1200):
        if found := what():
            return found
        assert run.poll() is None, (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.5)
    raise AssertionError((tmp_path / "log").read_text()[-3000:])


def project_there(tmp_path: Path, name: str) -> bool:
    if not (tmp_path / "label.db").exists():
        return False
    with open_store(f"sqlite:///{tmp_path / 'label.db'}") as store:
        return any(p.name == name and store.counts(name)["items"] for p in store.projects())


@pytest.fixture
def browser(chromium: Any) -> Any:
    return chromium


class Serving:
    """The app on the run's database, on a port of its own."""

    def __init__(self, store: Any) -> None:
        import uvicorn

        self.store = store
        listener = socket.create_server(("127.0.0.1", 0))
        app = create_app(store, rate=1e6, burst=1e6)
        self.server = uvicorn.Server(uvicorn.Config(app, log_config=None))
        self.thread = threading.Thread(target=self.server.run, args=([listener],), daemon=True)
        self.thread.start()
        self.address = f"http://127.0.0.1:{listener.getsockname()[1]}"

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)


def somebody(browser: Any, serving: Serving, name: str) -> Any:
    """The page of a person who came in by an invitation."""
    page = browser.new_context(base_url=serving.address, locale="en-US").new_page()
    page.goto(f"/join/{serving.store.invite('annotator', None, by=None)}")
    page.fill("#name", name)
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile(r"^(?!.*/join/)"))
    return page


def click_through(page: Any, project: str, rng: random.Random, most: int = 1000) -> int:
    """Vote by clicking on the side that is mostly the better one, until nothing is left. How often."""
    page.goto(f"/projects/{project}/work")
    for votes in range(most):
        if not page.query_selector("#answer"):
            return votes
        replies = [reply.inner_text() for reply in page.query_selector_all("article.reply")]
        side = "ab"[longer_is_not_better(replies, rng)]
        before = page.get_attribute("#answer", "action")
        page.click(f"#answer button[name=choice][value={side}]")
        page.wait_for_function(
            "before => { const form = document.querySelector('#answer');"
            " return !form || form.getAttribute('action') !== before }",
            arg=before,
        )
    return most


def longer_is_not_better(replies: list[str], rng: random.Random) -> int:
    """A taste that a reward model can learn: fewer words, one vote in ten the other way."""
    first, second = (len(reply.split()) for reply in replies)
    return int(first > second) ^ int(rng.random() < 0.1)


def test_people_click_and_the_loop_closes(waiting: Any, browser: Any, tmp_path: Path) -> None:
    until(lambda: project_there(tmp_path, "human-loop-asked"), waiting, tmp_path)
    with open_store(f"sqlite:///{tmp_path / 'label.db'}") as store:
        serving = Serving(store)
        try:
            people = [somebody(browser, serving, name) for name in ("Ada", "Bo", "Cem")]
            rng = random.Random(0)
            wanted = store.counts("human-loop-asked")["wanted"]
            assert 50 < wanted <= 64
            shares = [click_through(page, "human-loop-asked", rng, wanted // 3) for page in people[:2]]
            assert shares == [wanted // 3] * 2
            assert "sft" not in people[2].content()
            for page in reversed(people):  # the first two still hold an item each
                click_through(page, "human-loop-asked", rng)
            assert store.counts("human-loop-asked")["counted"] == wanted
            until(lambda: project_there(tmp_path, "human-loop-asked-again"), waiting, tmp_path)
            stages = tmp_path / "human-loop" / "stages"
            assert json.loads((stages / "reward/stage.json").read_text())["rows"] > 0.7 * wanted
            assert (stages / "ppo/model/model.safetensors").exists()
            assert len((stages / "asked/comparisons.jsonl").read_text().splitlines()) == wanted
            # the new policy's pairs are on their page
            people[0].goto("/projects/human-loop-asked-again/work")
            assert people[0].query_selector("#answer")
            items = list(store.items("human-loop-asked-again"))
            assert {reply.source for item in items for reply in item.replies} == {"ppo"}
            for page in people:
                click_through(page, "human-loop-asked-again", rng)
        finally:
            serving.stop()
    assert waiting.wait(300) == 0, (tmp_path / "log").read_text()[-3000:]
    log = (tmp_path / "log").read_text()
    assert "the run waits, and goes on by itself" in log
