"""The page of made-up runs: whole, unfinished, hostile."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import sys
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import pytest
import yaml

from keel import report
from keel.errors import DataError, UsageError
from keel.report import reward_models
from keel.report.page import key_result, measures
from keel.report.reading import StageRun, read
from keel.report.wording import decimals, duration, large, number

sys.path.insert(0, str(Path(__file__).parent))
from fake_run import CONFIG, KINDS, PROMPTS, measure, result, reward_model, write_run

EMPTY = ("meta", "link", "br", "img", "input", "hr", "line", "circle")


class Page(HTMLParser):
    """What a browser would see: tags with attributes, text outside scripts, scripts."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.open: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> tuple[str, Page]:
    run = write_run(tmp_path_factory.mktemp("runs") / "helpdesk")
    source = report.write(run).read_text(encoding="utf-8")
    return source, Page(source)


def test_the_verdict_comes_first_and_large(page):
    _, seen = page
    assert next(tag for tag, _ in seen.tags if tag in ("h1", "h2")) == "h1"
    words = (
        "Better: gold reward rose from 0.46 to 0.78 (+0.32, 95 % interval 0.28 to 0.36) at KL 5.2 nats "
        "(target 6.0), no finding in training."
    )
    assert words in seen.text
    assert seen.text.index("Better:") < seen.text.index("Pipeline")


def test_the_page_asks_the_network_for_nothing(page):
    source, seen = page
    for tag, attributes in seen.tags:
        assert tag not in ("link", "iframe", "img", "object", "embed")
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
    style = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(a["content"] for t, a in seen.tags if t == "meta" and "http-equiv" in a) or ""
    assert "default-src 'none'" in policy
    assert "connect-src" not in policy  # falls back to none
    running = seen.scripts[1:]  # the first one is data
    assert len(running) == 2
    for script in running:  # what the policy lets run is what is there
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy


def test_every_place_for_a_picture_has_its_figure(page):
    _, seen = page
    figures = json.loads(seen.scripts[0])
    assert "<" not in seen.scripts[0]  # nothing in the data can end its element
    places = [attributes["data-figure"] for _, attributes in seen.tags if "data-figure" in attributes]
    assert sorted(places) == sorted(figures)
    assert len(places) == len(set(places)) > 20
    assert seen.scripts[1].count("newPlot") > 0  # plotly is inside, once
    assert sum("plotly.js v" in script for script in seen.scripts) == 1


def test_the_sections_tell_the_run(page):
    _, seen = page
    for words in (
        "1 min 21 s",
        "16,000 rows",
        "held-out loss 1.41",
        "accuracy 0.73 (0.69 to 0.77)",
        "from sft, reward",
    ):
        assert words in seen.text
    inputs = {a["data-stage"]: json.loads(a["data-inputs"] or "") for _, a in seen.tags if "data-stage" in a}
    assert inputs == {
        "base": [],
        "sft": ["base"],
        "reward": ["sft"],
        "ppo": ["sft", "reward"],
        "judge": ["sft", "ppo", "reward"],
    }
    assert "kind: evaluate" in seen.text  # settings
    assert "2.13.0+cpu" in seen.text  # environment


@pytest.mark.parametrize(
    ("kind", "found", "said"),
    [
        (
            "dpo",
            {"accuracy": measure(0.8, 0.1), "margin": measure(1.5, 0.5)},
            "held-out accuracy 0.80 (0.70 to 0.90), margin 1.50 (1.00 to 2.00)",
        ),
        ("dpo", {}, ""),
        (
            "best_of_n",
            {"reward_best": measure(0.9, 0.1), "reward_mean": measure(0.4, 0.1)},
            "reward 0.40 → 0.90",
        ),
    ],
)
def test_what_came_out_of_a_stage_in_a_few_words(kind, found, said):
    one = StageRun("s", kind, "done", Path("nowhere"), {"kind": kind}, (), {}, found, {})
    assert key_result(one) == said


def test_a_stage_takes_the_models_of_its_reward_terms(tmp_path):
    """As the resolved config writes them: a list of terms."""
    config = {**CONFIG, "stages": {name: dict(stage) for name, stage in CONFIG["stages"].items()}}
    config["stages"]["ppo"]["reward"] = [
        {"kind": "learned", "model": "reward"},
        {"kind": "length", "high": 3},
    ]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert {stage.name: stage.inputs for stage in read(tmp_path).stages}["ppo"] == ("sft", "reward")


def test_the_reward_model_has_a_table_and_a_reliability_diagram(page):
    _, shown = page
    assert "The reward model on held-out comparisons" in shown.text
    for words in (
        "of unanimous votes 0.84 (0.79 to 0.89)",
        "of “near duplicate” 0.52",
        "Calibration error 0.08",
        "Length: within pairs +0.42",
        "Length: people +0.21",
        "First one preferred by people 0.51",
        "Disagreement 0.66",
        "Offset of prompts 0.69",
    ):
        assert words in shown.text, words
    assert "Reliability of the reward model" in shown.text


def test_what_was_not_measured_of_a_reward_model_is_not_shown():
    assert reward_models.lines({}) == []
    assert reward_models.in_short({}) == ""
    assert reward_models.reliability_diagram("judge", {}) is None
    only = {"accuracy": measure(0.7, 0.1), "length": {"pairs": {"spearman": None, "pearson": None}}}
    assert [line.label for line in reward_models.lines(only)] == ["Accuracy"]
    assert reward_models.in_short(only) == "accuracy 0.70 (0.60 to 0.80)"


def test_the_reliability_diagram_shows_every_bin_with_its_interval():
    found = reward_model()
    picture = reward_models.reliability_diagram("judge", found)
    (trace,) = picture.figure["data"]
    bins = found["calibration"]["bins"]
    assert trace["x"] == [one["confidence"] for one in bins]
    assert trace["y"] == [one["share"]["mean"] for one in bins]
    assert trace["error_y"]["array"] == pytest.approx(
        [one["share"]["high"] - one["share"]["mean"] for one in bins]
    )
    low, high = picture.figure["layout"]["yaxis"]["range"]
    assert low < min(one["share"]["low"] for one in bins)
    assert high > 1


def test_samples_are_the_first_prompts_not_picked_ones(page):
    _, seen = page
    judged = seen.text[
        seen.text.index("Replies before and after") : seen.text.index("Replies while ppo trained")
    ]
    for prompt in PROMPTS[:6]:
        assert prompt in judged
    for prompt in PROMPTS[6:]:
        assert prompt not in judged
    assert "None was picked" in judged


def test_before_stands_left_of_after(tmp_path):
    run = write_run(tmp_path / "run")
    found = json.loads((run / "stages/judge/result.json").read_text())
    found["reference"] = "ppo"
    (run / "stages/judge/result.json").write_text(json.dumps(found))
    from keel.report.replies import side_by_side

    (judge,) = (stage for stage in read(run).stages if stage.kind == "evaluate")
    assert {tuple(reply.model for reply in sample.replies) for sample in side_by_side(judge)} == {
        ("ppo", "sft")
    }


def test_a_run_gives_the_same_bytes_twice(tmp_path):
    run = write_run(tmp_path / "run")
    first = report.write(run).read_bytes()
    assert report.write(run).read_bytes() == first


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", done=("base",))
    report.write(run)
    before = (run / "report.html").read_bytes()
    seen = sorted(path.name for path in run.iterdir())
    assert seen == ["config.yaml", "manifest.json", "report.html", "stages"]
    (run / "stages/base/result.json").unlink()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        report.write(run)
    assert (run / "report.html").read_bytes() == before
    assert sorted(path.name for path in run.iterdir()) == seen


@pytest.mark.parametrize("sizes", [(0, 1, 4, 5), pytest.param((2, 3), marks=pytest.mark.slow)], ids=str)
def test_every_subset_of_stages_gives_a_page(sizes, tmp_path, monkeypatch):
    monkeypatch.setattr("keel.report.page.get_plotlyjs", lambda: "var Plotly;")
    subsets = [part for size in sizes for part in combinations(KINDS, size)]
    for number_, done in enumerate(subsets):
        run = write_run(tmp_path / str(number_), done=done)
        seen = Page(report.write(run).read_text(encoding="utf-8"))
        assert ("Better:" in seen.text) == ("judge" in done)
        assert seen.text.count("not run yet") >= 5 - len(done)
        assert report.summary(run)


@pytest.mark.parametrize("name", ["reward", "ppo", "judge"])
def test_an_unfinished_stage_is_shown_as_such(tmp_path, name):
    run = write_run(tmp_path / "run", done=("base", "sft"), unfinished=(name,))
    status = {stage.name: stage.status for stage in read(run).stages}
    assert status["base"] == "done"
    assert status[name] == ("not run yet" if name == "judge" else "unfinished")
    assert (
        "Not judged yet: the evaluate stage judge has not finished."
        in Page(report.write(run).read_text()).text
    )


def test_a_line_that_is_still_being_written_is_left_out(tmp_path):
    run = write_run(tmp_path / "run", done=("base",))
    with (run / "stages/base/metrics.jsonl").open("a") as file:
        file.write('{"step": 401, "loss": 1.')
    base = read(run).stages[0]
    assert base.metrics["loss"][-1][0] == 400
    report.write(run)


def test_a_broken_line_is_named(tmp_path):
    run = write_run(tmp_path / "run", done=("base",))
    lines = (run / "stages/base/metrics.jsonl").read_text().splitlines(keepends=True)
    lines[2] = "oops\n"
    (run / "stages/base/metrics.jsonl").write_text("".join(lines))
    with pytest.raises(DataError, match=r"metrics\.jsonl:3 is not JSON"):
        read(run)
    assert "metrics.jsonl:3 is not JSON" in report.write(run).read_text()


def test_results_of_other_settings_are_not_shown(tmp_path):
    run = write_run(tmp_path / "run")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["stages"]["judge"]["fingerprint"] = "another"
    (run / "manifest.json").write_text(json.dumps(manifest))
    seen = Page(report.write(run).read_text())
    assert "Not judged yet" in seen.text
    assert "Better:" not in seen.text
    assert "out of date" in seen.text


def test_no_run_directory_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no run directory"):
        report.write(tmp_path / "nothing")
    with pytest.raises(UsageError, match="no run directory"):
        report.summary(tmp_path / "nothing")


def test_an_empty_directory_gives_a_page(tmp_path):
    seen = Page(report.write(tmp_path).read_text())
    assert "Not judged yet: run an evaluate stage." in seen.text


def test_text_of_models_cannot_become_markup(tmp_path):
    run = write_run(tmp_path / "run")
    evil = "</script><script>alert('x')</script><img src=x onerror=alert(1)>"
    config = {**CONFIG, "description": evil, "stages": {**CONFIG["stages"]}}
    (run / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    row = {
        "model": evil,
        "index": 0,
        "prompt": evil,
        "completion": evil,
        "gold": {evil: 0.5},
        "stop_reason": evil,
    }
    (run / "stages/judge/samples.jsonl").write_text(json.dumps(row) + "\n")
    (run / "stages/judge/result.json").write_text(
        json.dumps(
            {
                "reference": "sft",
                "models": {
                    "sft": result()["models"]["sft"],
                    evil: {**result()["models"]["ppo"], evil: measure(0.5, 0.1)},
                },
            }
        )
    )
    (run / "stages/base/metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0, evil: 1.0}) + "\n")
    seen = Page(report.write(run).read_text(encoding="utf-8"))
    assert len(seen.scripts) == 3
    assert not any(tag == "img" for tag, _ in seen.tags)
    assert seen.text.count("alert('x')") >= 5  # it is there, as text


def test_numbers_that_are_not_finite_are_said(tmp_path):
    run = write_run(tmp_path / "run", done=("base",))
    (run / "stages/base/metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n')
    assert (
        "loss was not a finite number at 1 steps, first at step 2" in Page(report.write(run).read_text()).text
    )


def test_lines_of_the_same_step_are_one_step(tmp_path):
    run = write_run(tmp_path / "run", done=("base",))
    (run / "stages/base/metrics.jsonl").write_text(
        '{"step": 2, "loss": 1.0}\n{"step": 1, "loss": 9.0}\n'
        '{"step": 2, "eval_loss": 3.0}\n{"step": 1, "loss": 2.0}\n'
    )
    assert read(run).stages[0].metrics == {"loss": [(1, 2.0), (2, 1.0)], "eval_loss": [(2, 3.0)]}


def test_conversations_are_shown_turn_by_turn(tmp_path):
    run = write_run(tmp_path / "run")
    turns = [
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "Yes.", "reasoning_content": "A greeting."},
    ]
    rows = [
        {"model": model, "index": 0, "prompt": turns, "completion": turns[1:]} for model in ("sft", "ppo")
    ]
    (run / "stages/judge/samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = Page(report.write(run).read_text()).text
    assert "user Hello?" in text
    assert "A greeting." in text  # what an episode's model thought
    assert "{'role'" not in text


def test_summary_is_plain_text_with_verdict_and_table(tmp_path):
    lines = report.summary(write_run(tmp_path / "run")).splitlines()
    assert lines[0].startswith("ppo against sft: Better: gold reward rose from 0.46 to 0.78")
    head = next(line.split() for line in lines if line.startswith("judge"))
    assert head == ["judge", "sft", "ppo"]
    gold = next(line for line in lines if line.startswith("Gold reward"))
    assert gold.split("  ")[-1].strip() == "0.78 (0.76 to 0.81)"
    assert lines[-1].startswith(
        "reward model on comparisons: accuracy 0.73 (0.69 to 0.77), unanimous 0.84, split 0.64, "
    )
    assert lines[-1].endswith(
        "length within pairs +0.42, AUROC of disagreement 0.66, variance between prompts 0.69"
    )
    assert not any(line != line.rstrip() or "[" in line for line in lines)


def test_measures_come_in_reading_order_with_parts_under_their_whole():
    rows = measures(
        {"models": {"a": {"length": measure(9, 1), "gold/honest": measure(1, 0), "gold": measure(0.5, 0.1)}}}
    )
    assert [(row.label, row.part) for row in rows] == [
        ("Gold reward", False),
        ("honest", True),
        ("Length", False),
    ]
    (gold, *_) = (row.cells[0] for row in rows)
    assert (gold.position, gold.low, gold.high) == (50.0, 40.0, 60.0)


def test_strips_hold_zero_and_every_interval():
    models = {"a": {"proxy": measure(-0.8, 0.05)}, "b": {"proxy": measure(-0.3, 0.05)}}
    (row,) = measures({"models": models})
    assert row.scale == ("-1", "0")
    assert [cell.position for cell in row.cells] == [20.0, 70.0]
    (flat,) = measures({"models": {"a": {"kl": measure(0, 0)}}})
    assert flat.scale == ("0", "1")


def test_numbers_in_words():
    assert [number(v) for v in (None, 0.0, 0.4567, 12.34, 3e-5, 1234567)] == [
        "–", "0.00", "0.46", "12.3", "3.0e-05", "1,234,567"
    ]  # fmt: skip
    assert number(-0.001, 2) == "0.00"  # no minus before zero
    assert [duration(v) for v in (None, 1.84, 9.97, 59.7, 250.0, 3661)] == [
        "–", "1.8 s", "10 s", "1 min 00 s", "4 min 10 s", "1 h 01 min"
    ]  # fmt: skip
    assert [large(v) for v in (940, 984_192, 1_183_232, 7_000_000_000)] == ["940", "984 k", "1.2 M", "7.0 G"]
    assert [decimals([v]) for v in (250.0, 25.0, 2.5, 0.25, 0.025)] == [0, 1, 2, 2, 3]


def test_what_a_killed_process_left_half_written_is_cleared_away(tmp_path):
    """A process that still lives is left to finish its own."""
    run = write_run(tmp_path / "run", done=("base",))
    dead, alive = (
        run / f".report.html.{2**22 + 1}",
        run / f".report.html.{os.getppid()}",
    )  # above any process number
    dead.write_text("half")
    alive.write_text("half")
    report.write(run)
    assert not dead.exists()
    assert alive.exists()
    alive.unlink()


def test_a_model_given_by_its_path_has_a_short_name_everywhere(tmp_path: Path) -> None:
    """Beside its verdict, under it and in the pipeline."""
    start = "/home/one/runs/first/stages/sft/model"
    run = write_run(tmp_path)
    place = run / "stages" / "judge" / "result.json"
    found = json.loads(place.read_text().replace('"sft"', json.dumps(start)))
    found["models"]["other"] = found["models"][start]
    place.write_text(json.dumps(found))
    page = Page(report.write(run).read_text(encoding="utf-8"))
    words = "".join(page.words)
    assert "against first/sft" in words
    shown = words[: words.index("Settings")] if "Settings" in words else words
    assert start not in shown
