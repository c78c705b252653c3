"""A run is of one day: a template that writes the date writes the day of the run's first start."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from keel.cli import chat as talking
from keel.cli import sweep
from keel.config import parse
from keel.data.chat import rendering
from keel.errors import UsageError
from keel.pipeline import dates, stage_graph
from keel.pipeline.pipeline import Pipeline

pytestmark = pytest.mark.usefixtures("no_report")
FIRST, NEXT = datetime.date(2026, 11, 28), datetime.date(2026, 11, 29)
TEMPLATE = (
    "{{ strftime_now('%d') }} {% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
    "{{ m.content + eos_token }}{% endif %}\n{% endfor %}"
)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set the day that it is."""

    def set_to(day: datetime.date) -> None:
        class Day(datetime.date):
            @classmethod
            def today(cls) -> datetime.date:
                return day

        class Now(datetime.datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Now:
                return cls(day.year, day.month, day.day, 12, tzinfo=tz)

        monkeypatch.setattr(stage_graph, "date", Day)
        monkeypatch.setattr(rendering.datetime, "datetime", Now)
        monkeypatch.setattr(rendering.chat_template_utils, "datetime", Now)

    return set_to


@pytest.fixture
def dated_model(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with a template that writes the date."""
    folder = tmp_path / "dated"
    folder.mkdir()
    for path in tiny_model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def config(model: Path, data: Any, **more: Any) -> Any:
    stage = {
        "kind": "sft", "model": str(model), "data": str(data.chats),
        "batch_size": 4, "max_steps": 4, "lr": 1e-2,
        "save_every": 1,
    }  # fmt: skip
    return parse({"name": "tiny", "threads": 1, "device": "cpu", "stages": {"s": stage}, **more})


def run(settings: Any, folder: Path, **more: Any) -> tuple[Pipeline, list[str]]:
    said: list[str] = []
    made = Pipeline(settings, folder, said.append)
    made.run(**more)
    return made, said


def test_a_run_that_goes_on_tomorrow_is_the_one_of_today(
    clock: Any, dated_model: Path, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(dated_model, data)
    clock(FIRST)
    _, said = run(settings, tmp_path / "whole")
    assert "the date is 2026-11-28: a chat template writes it, and the run keeps it (`date`)" in said
    assert yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())["date"] == "2026-11-28"

    class Stopped(Exception):
        pass

    def stop(stage: str, step: int, steps: int, metrics: Any) -> None:
        if step == 2:
            raise Stopped

    cut = Pipeline(settings, tmp_path / "cut", print, stop)
    with pytest.raises(Stopped):
        cut.run()
    clock(NEXT)
    run(settings, tmp_path / "cut")
    logs = [(tmp_path / name / "stages/s/metrics.jsonl").read_bytes() for name in ("whole", "cut")]
    assert logs[0] == logs[1]
    weights = [
        (tmp_path / name / "stages/s/model/model.safetensors").read_bytes() for name in ("whole", "cut")
    ]
    assert weights[0] == weights[1]
    again, said = run(settings, tmp_path / "whole")
    assert "s: done before, unchanged" in said
    assert again.day() == FIRST


def test_another_day_is_another_model_only_where_the_template_asks(
    clock: Any, dated_model: Path, tiny_model: Path, data: Any, tmp_path: Path
) -> None:
    clock(FIRST)
    first, _ = run(config(dated_model, data), tmp_path / "first")
    clock(NEXT)
    next_, _ = run(config(dated_model, data), tmp_path / "next")
    given, _ = run(config(dated_model, data, date="2026-11-28"), tmp_path / "given")
    prints = [made.fingerprint("s") for made in (first, next_, given)]
    assert prints[0] == prints[2] != prints[1]
    logs = [(made.directory / "stages/s/metrics.jsonl").read_bytes() for made in (first, next_, given)]
    assert logs[0] == logs[2] != logs[1]
    _, said = run(config(dated_model, data, date="2026-11-28"), tmp_path / "next")
    assert any("date changed (2026-11-29 → 2026-11-28)" in line for line in said)

    plain = Pipeline(config(tiny_model, data), tmp_path / "plain", print)
    assert "date" not in plain.parts("s")
    assert plain.day() is None
    run(config(tiny_model, data), tmp_path / "plain")
    assert yaml.safe_load((tmp_path / "plain" / "config.yaml").read_text())["date"] is None


def test_fresh_is_another_day(clock: Any, dated_model: Path, data: Any, tmp_path: Path) -> None:
    clock(FIRST)
    run(config(dated_model, data), tmp_path / "run")
    clock(NEXT)
    made, _ = run(config(dated_model, data), tmp_path / "run", fresh=True)
    assert made.day() == dates.kept(tmp_path / "run") == NEXT


def test_a_template_of_the_config_and_of_an_earlier_stage_asks_too(
    clock: Any, tiny_model: Path, data: Any, tmp_path: Path
) -> None:
    first = {
        "kind": "sft",
        "model": {"path": str(tiny_model), "chat_template": TEMPLATE},
        "data": str(data.chats),
    }
    second = {"kind": "sft", "model": "first", "data": str(data.chats)}
    plain = {"kind": "sft", "model": str(tiny_model), "data": str(data.chats)}
    stages = {"first": first, "second": second, "plain": plain}
    made = Pipeline(parse({"name": "tiny", "stages": stages}), tmp_path / "run", print)
    clock(FIRST)
    assert [name for name in stages if "date" in made.parts(name)] == ["first", "second"]


def test_points_of_a_sweep_are_of_one_day(clock: Any, dated_model: Path, data: Any, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config(dated_model, data).model_dump(mode="json", exclude_none=True)))
    clock(FIRST)
    _, points = sweep.points(path, ["s.lr=0.1,0.2"], [], tmp_path, None, print)
    assert {point.pipeline.config.date for point in points} == {FIRST}
    points[0].directory.mkdir(parents=True)
    (points[0].directory / "config.yaml").write_text("date: 2026-11-28\n")
    clock(NEXT)
    _, points = sweep.points(path, ["s.lr=0.1,0.2"], [], tmp_path, None, print)
    assert {point.pipeline.config.date for point in points} == {FIRST}
    assert all(any(o == "date=2026-11-28" for o in point.overrides) for point in points)


@pytest.mark.parametrize("value", ["tomorrow", 20261128, "2026-13-01", 1.5, True])
def test_what_is_no_day_is_refused(tiny_model: Path, data: Any, value: Any) -> None:
    with pytest.raises(UsageError, match="date"):
        config(tiny_model, data, date=value)


def test_a_chat_is_of_today_unless_a_day_is_given(clock: Any, dated_model: Path) -> None:
    clock(NEXT)
    talk = talking.Talk(str(dated_model), 0, 4, 0)
    talk.turns.append({"role": "user", "content": "hi"})
    assert talk.tokenizer.decode(talk._prompt()).startswith("29 hi")
    talk.date = talking._day("2026-11-28")
    assert talk.tokenizer.decode(talk._prompt()).startswith("28 hi")
    with pytest.raises(UsageError, match="is no day: write it as 2026-11-28"):
        talking._day("28.11.2026")
