"""Label Studio's own server takes what keel writes, and keel reads what it exports: `python
benchmarks/label_studio.py --label-studio VENV/bin/label-studio`.

Needs the package `label-studio` in an environment of its own (it pins older versions of much that keel uses).
Starts its server on a free port with its data in a temporary folder, and for each task: makes a project with
keel's labelling config, imports keel's tasks with their annotations, adds an annotation as its pages would,
exports, and compares what keel reads with what it wrote.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from keel.feedback import formats
from keel.feedback.formats import Labels, label_studio
from keel.feedback.formats.base import item_json, vote_json
from keel.votes.kinds import TASKS, Answer, NewItem, PastJudgement, Project, Reply, Task

TOKEN = "0123456789abcdef0123456789abcdef01234567"
CHAT = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "héllo\n\n你好 <b>"}]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--label-studio", type=Path, required=True)
    parser.add_argument("--exports", type=Path, help="a folder to keep what the server exported")
    settings = parser.parse_args()
    ask = "from importlib.metadata import version; print(version('label-studio'))"
    python = settings.label_studio.parent / "python"
    version = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
    print(f"label-studio {version.stdout.strip()}", flush=True)
    with tempfile.TemporaryDirectory() as folder, served(settings.label_studio, Path(folder)) as url:
        for task in TASKS:
            print(f"{task:<9} {tried(url, task, settings.exports or Path(folder))}", flush=True)


@contextmanager
def served(program: Path, folder: Path) -> Iterator[str]:
    """The address of a server, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        program, "start", "--no-browser", "--port", str(port), "--internal-host", "127.0.0.1",
        "--data-dir", folder, "--username", "keel@example.org", "--password", "a-long-password",
        "--user-token", TOKEN, "--enable-legacy-api-token",
    ]  # fmt: skip
    environment = {
        **{k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        "COLLECT_ANALYTICS": "0", "LATEST_VERSION_CHECK": "0", "SENTRY_DSN": "", "FRONTEND_SENTRY_DSN": "",
    }  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
        try:
            for _ in range(600):
                if server.poll() is not None:
                    raise SystemExit((folder / "server.log").read_text()[-3000:])
                try:
                    call(url, "GET", "/api/projects/")
                    break
                except (urllib.error.URLError, ConnectionError):
                    time.sleep(1)
            yield url
        finally:
            server.terminate()
            server.wait(30)


def call(url: str, method: str, path: str, content: Any = None) -> Any:
    request = urllib.request.Request(
        url + path,
        None if content is None else json.dumps(content).encode(),
        {"Authorization": f"Token {TOKEN}", "Content-Type": "application/json"},
        method=method,
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.loads(answer.read() or b"null")
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{method} {path}: {error.code} {error.read()[:2000]!r}") from None


def tried(url: str, task: Task, folder: Path) -> str:
    """One task there and back."""
    labels = of_task(task)
    config = label_studio.labelling_config(Project("p", task=task, strength=True))
    project = call(url, "POST", "/api/projects/", {"title": f"keel {task}", "label_config": config})["id"]
    tasks = list(formats.rows_of(labels, "label_studio"))
    counts = call(url, "POST", f"/api/projects/{project}/import", tasks)
    pages = call(url, "GET", f"/api/tasks/?project={project}&page_size=100&fields=all")["tasks"]
    first = next(row for row in pages if row["data"]["keel"]["key"] == labels.items[0].key)
    own = next(iter(label_studio.write(labels.items[:1], {labels.items[0].key: [labels.votes[0]]}, task)))
    result = [{k: v for k, v in r.items() if k != "meta"} for r in own["annotations"][0]["result"]]
    result = [r for r in result if task != "ranking" or r["type"] != "ranker"] or [without_ties()]
    call(url, "POST", f"/api/tasks/{first['id']}/annotations/", {"result": result, "lead_time": 3.5})
    exported = call(url, "GET", f"/api/projects/{project}/export?exportType=JSON&download_all_tasks=true")
    path = folder / f"{task}.json"
    path.write_text(json.dumps(exported))
    found = formats.read(path)
    theirs = [vote for vote in found.votes if vote.person == "keel@example.org"]
    ours = [vote for vote in found.votes if vote.person != "keel@example.org"]
    same = plainly(Labels(found.task, found.items, ours)) == plainly(labels)
    read = "LOST"
    if len(theirs) == 1 and theirs[0].key == labels.items[0].key:
        read = json.dumps({k: v for k, v in vote_json(theirs[0]).items() if k not in ("person", "at")})
    return (
        f"imported {counts['task_count']} tasks with {counts['annotation_count']} annotations, exported "
        f"{len(exported)}; read back {'equal' if same else 'DIFFERENT'}; one made there is read as {read}"
    )


def without_ties() -> dict[str, Any]:
    ranked = {"ranker": {"rank": ["3", "1", "2"]}}
    return {"id": "r", "from_name": "ranking", "to_name": "answers", "type": "ranker", "value": ranked}


def plainly(labels: Labels) -> tuple[Any, ...]:
    votes = sorted(json.dumps({"key": v.key, **vote_json(v)}, sort_keys=True) for v in labels.votes)
    return labels.task, sorted(json.dumps(item_json(item), sort_keys=True) for item in labels.items), votes


def of_task(task: Task) -> Labels:
    """Two items with two votes each."""
    count = {"pairwise": 2, "ranking": 3}.get(task, 1)
    texts = ['one "reply"\nwith lines', "another <i>reply</i> ", "a third"][:count]
    items = [
        NewItem("one", "What is it?", [Reply(t, "ppo") for t in texts], {"topic": "things"}),
        NewItem("two", CHAT, [Reply([{"role": "assistant", "content": t}]) for t in texts]),
    ]
    answers: dict[Task, list[Answer]] = {
        "pairwise": [Answer(choice="b", strength=2, comment="so"), Answer(choice="both_bad"),
                     Answer(choice="tie")],
        "thumbs": [Answer(choice="up"), Answer(choice="down", comment="no"), Answer(choice="cannot_judge")],
        "rating": [Answer(ratings={"helpful": n, "harmless": 3, "honest": 5}) for n in (1, 2, 3)],
        "ranking": [Answer(ranking=[[2], [0, 1]]), Answer(ranking=[[0], [1], [2]]),
                    Answer(ranking=[[1], [0], [2]])],
        "edit": [Answer(text="better\nstill"), Answer(text="best"), Answer(text="mine", comment="long")],
    }  # fmt: skip
    where = (("one", "kim@example.org"), ("one", "lee@example.org"), ("two", "kim@example.org"))
    votes = [
        PastJudgement(key, who, answer, 1_700_000_000.5, 4.25, tuple(range(count)))
        for (key, who), answer in zip(where, answers[task], strict=True)
    ]
    return Labels(task, items, votes)


if __name__ == "__main__":
    main()
