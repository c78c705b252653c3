"""A run's directory may be damaged, or come from anybody: the page is made of what is sound, says what is
missing, and reads nothing outside of the directory."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from keel import report
from keel.errors import DataError, UsageError
from keel.report import compare, notes, page, reading
from keel.report.notes import Notes

_spec = importlib.util.spec_from_file_location("fake_run", Path(__file__).with_name("fake_run.py"))
assert _spec is not None
assert _spec.loader is not None
fake_run: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake_run)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A whole run; pages are made without plotly's four megabytes, which have a test of their own."""
    monkeypatch.setattr(page, "get_plotlyjs", lambda: "")
    return fake_run.write_run(tmp_path / "run")


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a file of JSON or YAML."""
    yaml_ = path.suffix == ".yaml"
    value = change(yaml.safe_load(path.read_text()) if yaml_ else json.loads(path.read_text()))
    path.write_text(yaml.safe_dump(value) if yaml_ else json.dumps(value))


def stages(value: Any) -> Callable[[Any], Any]:
    return lambda whole: {**whole, "stages": value(whole["stages"]) if callable(value) else value}


class _Page(HTMLParser):
    """What a page has: its elements, attributes and the texts of its notes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.scripts: list[str] = []
        self.notes: list[str] = []
        self._inside: str | None = None
        self._section = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        facts = dict(attrs)
        self.tags.add(tag)
        self.attributes |= {f"{tag}.{name}" for name in facts}
        self._section = str(facts.get("id")) if tag == "section" and "id" in facts else self._section
        self._inside = tag
        if tag == "script":
            self.scripts.append(facts.get("type") or "")
        if tag == "p" and facts.get("class") == "note" and self._section == "unreadable":
            self.notes.append("")

    def handle_data(self, data: str) -> None:
        if self._inside == "p" and self._section == "unreadable" and self.notes:
            self.notes[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = None


def page_of(run: Path) -> _Page:
    return _Page(report.write(run).read_text())


# a result of the wrong form in one place costs that place
ODD = [
    ("config.yaml", stages(["sft"]), "`stages` is no mapping", ["judge"]),
    ("config.yaml", stages(lambda s: {**s, "../../outside": {"kind": "sft"}}), "is no stage's name", ["sft"]),
    ("config.yaml", stages(lambda s: {**s, "/etc": {"kind": "sft"}}), "is no stage's name", ["sft"]),
    ("config.yaml", stages(lambda s: {**s, 7: {"kind": "sft"}}), "is no stage's name", ["sft"]),
    ("config.yaml", stages(lambda s: {**s, "sft": "x"}), "is no mapping", ["sft", "judge"]),
    ("config.yaml", lambda whole: [whole], "is not a mapping", ["sft", "judge"]),
    ("manifest.json", stages(3), "`stages` is no mapping", ["sft", "judge"]),
    ("manifest.json", lambda whole: [whole], "does not hold a JSON object", ["sft"]),
    ("manifest.json", lambda whole: {**whole, "versions": [1], "hardware": 3, "created": {}}, None, ["sft"]),
    (
        "stages/sft/stage.json",
        lambda whole: {**whole, "rows": "many", "parameters": []},
        "`rows` is not",
        ["sft"],
    ),
    ("stages/sft/stage.json", lambda whole: [whole], "does not hold a JSON object", ["ppo"]),
    ("stages/sft/result.json", lambda whole: 3, "does not hold a JSON object", ["sft", "judge"]),
    ("stages/judge/result.json", lambda r: {**r, "models": "sft"}, "is no object of measures", ["sft"]),
    (
        "stages/judge/result.json",
        lambda r: {**r, "models": {**r["models"], "sft": [1]}},
        "is no object of measures",
        ["ppo"],
    ),
    ("stages/judge/result.json", lambda r: {**r, "reference": [1]}, "`reference` is not", ["ppo"]),
    ("stages/judge/result.json", lambda r: {**r, "reward_model": [1]}, "`reward_model` is not", ["ppo"]),
    (
        "stages/judge/result.json",
        lambda r: {**r, "reward_model": {"calibration": {"bins": [{"confidence": "x", "share": 3}]}}},
        "the pictures of judge",
        ["ppo"],
    ),
]


@pytest.mark.parametrize(("file", "change", "said", "shown"), ODD)
def test_what_is_of_another_form_is_said_and_the_rest_is_shown(
    run: Path, file: str, change: Any, said: str | None, shown: list[str]
) -> None:
    (run.parent / "outside").mkdir()
    (run.parent / "outside" / "stage.json").write_text('{"kind": "secret of somebody"}')
    edit(run / file, change)
    text = report.write(run).read_text()
    found = _Page(text).notes
    assert "secret of somebody" not in text
    assert all(f"<h3>{name}" in text for name in shown)
    assert "held-out loss" in text or file == "stages/sft/result.json"
    if said is None:
        assert found == []
    else:
        assert any(said in note for note in found), found
        if "pictures" not in said:
            assert f"not shown: {next(note for note in found if said in note)}" in report.summary(run)
            with pytest.raises(DataError, match=re.escape(said)) as error:
                reading.read(run)
            assert "\n" not in str(error.value)


def test_a_healthy_run_has_no_notes(run: Path) -> None:
    """At any moment of it, a stage that is at work too."""
    assert page_of(run).notes == []
    begun = fake_run.write_run(run.parent / "begun", done=("base", "sft"))
    assert page_of(begun).notes == []
    assert "not shown" not in report.summary(begun)
    (begun / "stages" / "sft" / "result.json").write_text("[")
    said = "not shown: stages/sft/result.json is not JSON"
    assert report.summary(begun).splitlines()[-1].startswith(said)


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_lines_that_are_none_are_left_out_alone(run: Path, name: str) -> None:
    path = run / "stages" / "ppo" / name
    lines = path.read_text().splitlines()
    rubbish = ["<script>", "[1]", '{"step": "<script>", "loss": 1}', "\0"]
    path.write_text("\n".join([lines[0], *rubbish, *lines[1:]]) + "\n")
    text = report.write(run).read_text()
    found = [note for note in _Page(text).notes if name in note]
    assert f"stages/ppo/{name}:2 is not JSON" in found[0]
    assert "more lines" in found[0]
    before = fake_run.write_run(run.parent / "before")
    read = (reading.read(path, Notes(strict=False)).stages[3] for path in (run, before))
    damaged, sound = read
    if name == "metrics.jsonl":
        assert damaged.metrics == sound.metrics
        assert any("what was found while ppo trained is not known" in note for note in _Page(text).notes)
        with pytest.raises(DataError, match=r"metrics\.jsonl:2 is not JSON"):
            reading.read(run)
    else:
        assert len(list(damaged.samples())) == len(list(sound.samples())) + 1  # the object is one
        with pytest.raises(DataError, match=r"samples\.jsonl:2 is not JSON"):
            list(reading.read(run).stages[3].samples())


def test_steps_that_are_none_are_named_by_their_line(run: Path) -> None:
    path = run / "stages" / "sft" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], '{"step": "<script>", "loss": 1}']) + "\n")
    assert page_of(run).notes == ["stages/sft/metrics.jsonl:2: `step` is no whole number"]


# ---------------------------------------------------------------- what is there in part


@pytest.mark.parametrize("gone", [("config.yaml",), ("manifest.json",), ("config.yaml", "manifest.json")])
def test_the_stages_of_a_run_are_found_without_its_config(run: Path, gone: tuple[str, ...]) -> None:
    for name in gone:
        (run / name).unlink()
    text = report.write(run).read_text()
    assert all(f"<h3>{name}" in text for name in ("base", "sft", "reward", "ppo", "judge"))
    assert "held-out loss" in text


@pytest.mark.parametrize(
    ("version", "said"), [("99.0.0", True), ("0.0.1", False), ("x", False), ([1], False)]
)
def test_a_run_of_a_newer_keel_says_so(run: Path, version: Any, said: bool) -> None:
    edit(run / "manifest.json", lambda m: {**m, "versions": {"keel": version}})
    found = page_of(run).notes
    assert found == (
        ["the run is of keel 99.0.0, newer than this one: what it added is not shown; update keel"]
        if said
        else []
    )


def test_a_folder_of_which_nothing_can_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe")
    (tmp_path / "manifest.json").write_text("[")
    for make in (report.write, report.summary):
        with pytest.raises(UsageError, match=r"nothing in .* can be read as a run: config.yaml"):
            make(tmp_path)
    assert not (tmp_path / "report.html").exists()


# ---------------------------------------------------------------- what somebody made on purpose


def test_values_are_inert(run: Path) -> None:
    """Whatever stands in a run's files is text in the page: no element, no attribute and no script more."""
    sound = page_of(run)
    evil = '<script>alert(1)</script><img src=x onerror=alert(1)>" onload="x\u202e\ud800%{x}{{7*7}}'
    for path in sorted(run.rglob("*.json*")):
        rows = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        changed = [json.dumps(_with(json.loads(row), evil)) for row in rows if row.strip()]
        path.write_text("\n".join(changed) + "\n")
    config = _with(yaml.safe_load((run / "config.yaml").read_text()), evil)
    (run / "config.yaml").write_text(json.dumps(config).replace("\\ud800", ""))
    text = report.write(run).read_text()
    found = _Page(text)
    assert found.scripts == sound.scripts
    assert not {"img", "iframe", "object", "link", "form", "base"} & found.tags - sound.tags
    assert not [
        name for name in found.attributes - sound.attributes if name.partition(".")[2].startswith("on")
    ]
    assert "<script>alert" not in text
    assert "{{7*7}}" in text
    assert "\x1b" not in report.summary(run)


def _with(value: Any, evil: str) -> Any:
    """The value with `evil` behind each text in it; names, kinds and fingerprints stay."""
    if isinstance(value, dict):
        kept = ("kind", "name", "status", "fingerprint", "model", "reward", "reference", "path")
        return {**{key: item if key in kept else _with(item, evil) for key, item in value.items()}, evil: 1}
    if isinstance(value, list):
        return [_with(item, evil) for item in value]
    return f"{value}{evil}" if isinstance(value, str) else value


def test_values_are_bounded(run: Path) -> None:
    """A page of a few megabytes comes of whatever is in there."""
    size = len(report.write(run).read_text())
    long = "x" * 300_000
    edit(
        run / "manifest.json", lambda m: {**m, "created": long, "versions": {str(i): long for i in range(5)}}
    )
    edit(run / "stages/sft/stage.json", lambda s: {**s, "data": long, "rows": 10**4000, "seconds": 1e300})
    many = {long: {"mean": 1e308, "low": -1e308, "high": 1e308}, "huge": {"mean": 10**400}}
    edit(run / "stages/judge/result.json", lambda r: {**r, "models": {**r["models"], "other": many}})
    samples = run / "stages/judge/samples.jsonl"
    row = {"model": "sft", "index": -1, "prompt": [{"role": long, "content": long}] * 20, "completion": long}
    row |= {
        "gold": {f"{i}{long[:9999]}": 1 for i in range(300)},
        "rewards": {str(i): 1e300 for i in range(99)},
    }
    samples.write_text(samples.read_text() + json.dumps(row) + "\n")
    metrics = run / "stages/sft/metrics.jsonl"
    metrics.write_text(
        metrics.read_text() + json.dumps({"step": 1, **{f"m{i}": 1 for i in range(3000)}}) + "\n"
    )
    events = run / "stages/ppo/events.jsonl"
    event = {"event": "finding", "check": "x", "severity": "act", "step": 1, "cause": "", "remedy": ""}
    events.write_text("".join(json.dumps({**event, "evidence": long[:9999]}) + "\n" for _ in range(700)))
    assert len(report.write(run).read_text()) < size + 2_000_000
    assert len(report.summary(run)) < 1_000_000


READ = (
    *("config.yaml", "manifest.json", "stages/sft/stage.json", "stages/ppo/metrics.jsonl"),
    *("stages/ppo/events.jsonl", "stages/judge/result.json", "stages/judge/samples.jsonl"),
)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((name, "pipe") for name in READ),
        *((name, how) for name in READ[3:5] for how in ("link out", "link to itself", "folder")),
    ],
)
def test_what_is_no_file_of_the_run_is_not_read(run: Path, name: str, how: str) -> None:
    """A pipe would be waited for, a link may lead to what the reader of the page must not see."""
    path, secret = run / name, run.parent / "secret"
    secret.write_text(path.read_text() if path.exists() else "")
    path.unlink(missing_ok=True)
    if how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    else:
        path.symlink_to(secret if how == "link out" else path)
    found = page_of(run).notes
    assert any(note.startswith(f"{name} cannot be read") for note in found), found


def test_a_config_that_multiplies_itself_is_not_written_out(run: Path) -> None:
    levels = "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 12))
    text = (
        run / "config.yaml"
    ).read_text() + f"l0: &l0 [a, b]\n{levels}rounds: {{n: 1000000000, policy: *l11}}\n"
    (run / "config.yaml").write_text(text)
    assert any("more than 100,000 values" in note for note in page_of(run).notes)
    edit_n = "rounds: {n: 1000000000, policy: ppo}\n"
    (run / "config.yaml").write_text(text.partition("l0:")[0] + edit_n)
    assert page_of(run).notes == []


def test_the_page_goes_through_no_link_that_waits_for_it(run: Path) -> None:
    """The page is written beside its place first: a link of that name is not followed."""
    victim = run.parent / "victim"
    victim.write_text("mine")
    (run / f".report.html.{os.getpid()}").symlink_to(victim)
    (run / "report.html").symlink_to(victim)
    report.write(run)
    assert victim.read_text() == "mine"
    assert not (run / "report.html").is_symlink()


def test_notes_are_few_and_short() -> None:
    found = Notes(strict=False)
    for number in range(notes.MOST + 7):
        found.add(f"{number} " + "x" * 1000)
        found.add(f"{number} " + "x" * 1000)
    assert len(found.lines) == notes.MOST + 1
    assert max(map(len, found.lines)) <= notes.LONGEST
    assert found.lines[-1] == "and 14 more"


# ---------------------------------------------------------------- compare


def test_compare_says_what_it_leaves_out(run: Path) -> None:
    edit(run / "stages/judge/result.json", lambda r: {**r, "models": {**r["models"], "odd": [1]}})
    other = fake_run.write_run(run.parent / "other")
    found = compare.compare([run, other])
    assert {entry.judged[0].model for entry in found.entries} == {"sft", "ppo"}
    assert any("is no object of measures" in note for note in found.notes)


def test_compare_does_not_pool_runs_whose_settings_it_cannot_read(run: Path) -> None:
    edit(run / "config.yaml", stages(lambda s: {**s, "ppo": "x"}))
    with pytest.raises(DataError, match=r"config\.yaml: what is said of the stage 'ppo' is no mapping"):
        compare.compare([run])
