"""The pages and answers: what they hold, who gets them, and the one thing that changes anything."""

from __future__ import annotations

import http.client
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from made_runs import append, foul_run, keel_run, ppo_row
from serving import serving
from starlette.testclient import TestClient

from keel.dashboard.app import application
from keel.dashboard.security import HEADERS, Security, is_loopback
from keel.pipeline.pipeline import locked
from keel.rundir import worker

ADDRESS = "http://127.0.0.1:8012"
GETS = (
    "/", "/run?run=a", "/compare", "/static/page.css", "/static/run.js", "/api/runs", "/api/names",
    "/api/series?run=a&stage=ppo&name=objective/kl", "/api/compare?run=a", "/api/stages?run=a",
    "/api/samples?run=a&stage=ppo&of=step%201", "/api/pictures?run=a",
)  # fmt: skip


def client(folder: Path, host: str = "127.0.0.1", **settings) -> TestClient:
    security = Security.of(host, 8012)
    app = application(folder, security, warm_up=False, **settings)
    found = TestClient(app, base_url=ADDRESS, raise_server_exceptions=False)
    found.security = security  # type: ignore[attr-defined]
    return found


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    keel_run(tmp_path / "a", 30)
    keel_run(tmp_path / "b", 30, seed=1)
    return tmp_path


@pytest.mark.parametrize("path", GETS)
def test_every_answer_has_the_security_headers(runs, path):
    answer = client(runs).get(path)
    assert answer.status_code == 200
    assert {name: answer.headers[name] for name in HEADERS} == HEADERS
    assert "unsafe" not in HEADERS["Content-Security-Policy"].split("script-src")[1].split(";")[0]


def test_pages_load_nothing_from_elsewhere(runs):
    site = client(runs)
    for path in ("/", "/run?run=a", "/compare"):
        text = site.get(path).text
        found = re.findall(r'(?:src|href|action)="([^"#]+)"', text)
        assert all(one.startswith(("/", "data:,")) and not one.startswith("//") for one in found)
        for one in (one for one in found if one.startswith("/static/")):
            answer = site.get(one)
            assert answer.status_code == 200
            if "plotly" not in one:
                assert not re.search(r"https?://", re.sub(r"http://www\.w3\.org\S*", "", answer.text))
        assert "<script>" not in text  # scripts stand in files alone
        assert " on" not in re.sub(r">[^<]*<", "><", text).replace(" on ", "")


@pytest.mark.parametrize("path", [
    "/run?run=nobody", "/api/series?run=nobody", "/api/series?run=a&stage=nobody", "/static/app.py",
    "/static/..%2fapp.py", "/api/samples?run=a&stage=..%2f..", "/events/run?run=..%2f..", "/nothing",
    "/api/samples?run=a&stage=ppo&beside=x&beside_run=nobody",
])  # fmt: skip
def test_what_is_not_there_is_said(runs, path):
    answer = client(runs).get(path)
    assert answer.status_code == 404
    if path.startswith(("/api", "/events")):
        assert answer.json()["error"]


def test_bad_parameters_are_no_failure(runs):
    site = client(runs)
    for path in (
        "/api/series?run=a&stage=ppo&name=x&low=nan&high=1e999", "/api/compare?q=%00&low=x",
        "/api/names?run=%ff",
        "/api/samples?run=a&stage=ppo&of=zz&first=-7", "/api/samples?run=a&stage=ppo&first=1e14",
        "/api/compare?seeds=bands&low=5&high=2",
    ):  # fmt: skip
        assert site.get(path).status_code == 200, path


def test_other_sites_get_nothing(runs):
    site = client(runs)
    assert site.get("/api/runs", headers={"host": "evil.example"}).status_code == 421  # DNS rebinding
    assert site.get("/", headers={"host": "127.0.0.1.evil.example:8012"}).status_code == 421
    assert site.get("/api/runs", headers={"sec-fetch-site": "cross-site"}).status_code == 403
    for host in (
        "[",
        "[::1",
        "a@localhost",
        "localhost#a",
        "localhost:8012:1",
        "",
        "localhost, evil.example",
    ):
        assert site.get("/api/runs", headers={"host": host}).status_code == 421, host
    for host in ("LOCALHOST", "localhost:8012", "[::1]:8012", "127.0.0.1:9"):
        assert site.get("/api/runs", headers={"host": host}).status_code == 200


def test_bound_elsewhere_a_token_is_asked_for(runs):
    assert all(map(is_loopback, ("127.0.0.1", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "10.0.0.7", "box")))
    site = client(runs, host="0.0.0.0")
    token = site.security.token  # type: ignore[attr-defined]
    assert len(token) >= 32
    for path in (*GETS, "/events/list", "/nothing"):
        answer = site.get(path)
        assert answer.status_code == 401
        assert token not in answer.text
    assert site.get("/api/runs?token=wrong").status_code == 401
    answer = site.get(f"/run?run=a&token={token}", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/run?run=a")
    assert {"httponly", "samesite=lax"} <= set(
        answer.headers["set-cookie"].lower().replace(" ", "").split(";")
    )
    assert site.get("/api/runs").json() == {"runs": ["a", "b"]}  # by the cookie


def test_curves_come_in_few_points_and_closer_in_more(runs):
    metrics = runs / "a" / "stages" / "ppo" / "metrics.jsonl"
    metrics.write_text(
        "".join(f'{{"step": {n}, "x": {9 if n == 4321 else n % 5 / 5}}}\n' for n in range(20_000))
    )
    site = client(runs)
    asked = {"run": "a", "stage": "ppo", "name": "x"}
    steps, values, *_ = site.get("/api/series", params=asked).json()["series"]["x"]
    assert len(steps) <= 1200
    assert values[steps.index(4321)] == 9
    steps, values = site.get("/api/series", params={**asked, "low": 4300, "high": 4400}).json()["series"]["x"]
    assert steps == list(range(4299, 4402))


def test_replies_by_step_beside_another_runs(runs):
    site = client(runs)
    asked = {
        "run": "a",
        "stage": "ppo",
        "of": "step 30",
        "beside": "step 1",
        "beside_run": "b",
        "beside_stage": "ppo",
    }
    found = site.get("/api/samples", params=asked).json()
    assert found["rows"][0]["a"]["completion"][0]["text"] == " Reply 0 of step 30."
    assert found["rows"][0]["b"]["completion"][0]["text"] == " Reply 0 of step 1."
    assert site.get("/api/stages?run=b").json()["stages"][0]["name"] == "ppo"


def test_a_foul_run_is_shown_as_text(tmp_path):
    foul_run(tmp_path / "a<script>alert(1)</script>")
    site = client(tmp_path)
    name = site.get("/api/runs").json()["runs"][0]
    page = site.get("/run", params={"run": name}).text
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    for path in ("/api/pictures", "/api/stages"):
        assert site.get(path, params={"run": name}).status_code == 200
    found = site.get("/api/samples", params={"run": name, "stage": "ppo", "of": "step 30"})
    assert found.headers["content-type"] == "application/json"


def test_one_run_alone_and_one_that_is_not_there_yet(tmp_path):
    site = client(tmp_path / "later", alone=True)
    assert "has not begun" in site.get("/").text
    keel_run(tmp_path / "later", 3)
    time.sleep(2.1)  # the folder is looked at every two seconds
    assert 'data-run="later"' in site.get("/").text


# ---------------------------------------------------------------- stopping a run


def test_a_run_is_stopped_by_its_own_page_alone(runs, monkeypatch):
    sent: list[int] = []
    monkeypatch.setattr(worker.os, "kill", lambda pid, number: sent.append(number))
    site = client(runs)
    csrf = site.security.csrf  # type: ignore[attr-defined]
    assert f'name="csrf" content="{csrf}"' in site.get("/run?run=a").text
    right = {"origin": ADDRESS, "x-keel-csrf": csrf}
    wrong = [
        {}, {"x-keel-csrf": csrf}, {"origin": ADDRESS}, {**right, "x-keel-csrf": "x"},
        {**right, "origin": "http://evil.example"}, {**right, "origin": "null"},
        {**right, "sec-fetch-site": "same-site"}, {**right, "origin": "http://127.0.0.1:8013"},
    ]  # fmt: skip
    with locked(runs / "a"):
        for headers in wrong:
            assert site.post("/api/stop", json={"run": "a"}, headers=headers).status_code == 403
        assert site.get("/api/stop").status_code == 405
        assert not sent
        for body, status in (({"run": "b"}, 409), ({"run": "nobody"}, 404), ([], 400), ({"run": ["a"]}, 404)):
            assert site.post("/api/stop", json=body, headers=right).status_code == status
        assert site.post("/api/stop", content=b"{", headers=right).status_code == 400
        assert not sent
        assert site.post("/api/stop", json={"run": "a"}, headers=right).json() == {"stopped": "a"}
    assert sent == [worker.signal.SIGINT]


def test_what_is_read_ahead_has_ended_when_the_server_has(tmp_path, monkeypatch):
    """A thread inside Arrow when Python ends takes the process down with a core dump."""
    ended: list[bool] = []

    def read_ahead(self, asked) -> None:
        while not asked():
            time.sleep(0.01)
        time.sleep(0.3)
        ended.append(True)

    monkeypatch.setattr("keel.dashboard.runs.Runs.warm_up", read_ahead)
    with TestClient(application(tmp_path, Security.of("127.0.0.1", 8012))):
        assert not ended
    assert ended


def test_the_dashboard_needs_no_torch():
    code = "import sys; import keel.dashboard.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---------------------------------------------------------------- events, from a server


class Reader:
    """Reads events as a browser does, and counts their bytes."""

    def __init__(self, address: str, path: str, headers: dict[str, str] | None = None) -> None:
        self.connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=20)
        self.connection.request("GET", path, headers=headers or {})
        self.answer = self.connection.getresponse()
        self.bytes = 0

    def event(self) -> tuple[str, str, dict]:
        """Name, id and data of the next event."""
        found: dict[str, str] = {}
        while True:
            line = self.answer.readline()
            assert line, "the server ended"
            self.bytes += len(line)
            text = line.decode().rstrip("\n")
            if not text and "data" in found:
                return found["event"], found["id"], json.loads(found["data"])
            name, _, value = text.partition(": ")
            found[name] = value


def test_a_new_metric_is_there_within_two_seconds_and_an_idle_page_costs_nothing(tmp_path):
    metrics = keel_run(tmp_path / "run", 200, done=100) / "stages" / "ppo" / "metrics.jsonl"
    with serving(tmp_path) as address:
        reader = Reader(address, "/events/run?run=run")
        assert reader.answer.headers["content-type"].startswith("text/event-stream")
        names = [reader.event()[0] for _ in range(3)]
        assert names == ["state", "points", "points"]
        before = reader.bytes
        written = time.monotonic()
        append(metrics, [{"step": 101, "never/seen": 0.5}])
        while True:
            name, position, data = reader.event()
            if name == "points":
                break
        assert data["series"]["never/seen"] == [[101], [0.5]]
        assert time.monotonic() - written < 2.0
        assert reader.bytes - before < 5000  # a step of it; an idle one sends nothing at all
        reader.connection.close()
        append(metrics, [ppo_row(102, 200, random.Random(1))])
        back = Reader(address, "/events/run?run=run", {"Last-Event-ID": position})
        while (news := back.event())[0] != "points":  # what another page has just read may come first
            pass
        assert news[2]["series"]["objective/kl"][0] == [102]
        back.connection.close()


def test_so_many_pages_are_open_at_a_time_and_no_more(tmp_path):
    keel_run(tmp_path / "run", 5)
    with serving(tmp_path, most_pages=2) as address:
        first, second = (Reader(address, path) for path in ("/events/run?run=run", "/events/list"))
        assert (first.event()[0], second.event()[0]) == ("state", "runs")
        refused = Reader(address, "/events/compare")
        assert refused.answer.status == 503
        assert int(refused.answer.headers["Retry-After"]) > 0
        told = json.loads(refused.answer.read())["error"]
        assert "2 pages are open already" in told
        assert "\n" not in told
        for path in ("/", "/run?run=run", "/api/runs"):  # all else is answered
            asked = Reader(address, path)
            assert asked.answer.status == 200
            asked.connection.close()
        first.connection.close()
        until = time.monotonic() + 10
        while (again := Reader(address, "/events/list")).answer.status == 503 and time.monotonic() < until:
            again.connection.close()
            time.sleep(0.1)
        assert again.event()[0] == "runs"
        for reader in (second, again):
            reader.connection.close()
