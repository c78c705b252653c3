"""keel.run and keel.plan_run."""

from __future__ import annotations

import asyncio
import io
import json
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

import keel
from keel.api.progress import TextProgress
from keel.api.running import read_config

pytestmark = pytest.mark.usefixtures("no_report")
SMALL = ("threads=1", "device=cpu")


def test_every_form_of_config_means_the_same(text_run: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", "stages": text_run}), encoding="utf-8")
    whole = {"name": "mine", "stages": text_run}
    assert (
        read_config(path) == read_config(str(path)) == read_config(whole) == read_config(text_run, (), "mine")
    )


def test_bare_stages_are_called_run(text_run: dict[str, Any]) -> None:
    assert read_config(text_run).name == "run"


def test_a_recipe_is_found_by_name() -> None:
    assert list(read_config("helpdesk").stages) == ["base", "sft", "reward", "ppo", "judge"]


def test_paths_and_tuples_are_taken_in_a_mapping(text_run: dict[str, Any], data: Any) -> None:
    stages = {"base": {**text_run["base"], "data": data.text}}
    assert read_config(stages) == read_config(text_run)
    betas = {"base": {**text_run["base"], "data": ({"source": data.text},)}}
    assert read_config(betas) == read_config(text_run)


def test_overrides_leave_the_callers_mapping_alone(text_run: dict[str, Any]) -> None:
    before = json.dumps(text_run)
    config = read_config(text_run, ("base.max_steps=1", "seed=7"))
    assert config.seed == 7
    assert config.stages["base"].model_dump()["max_steps"] == 1
    assert json.dumps(text_run) == before


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        ("helpdesks", (), "did you mean 'helpdesk'"),
        ("missing.yaml", (), "no config at missing.yaml"),
        ({}, (), "name"),
        ({"base": {"kind": "pretrian", "data": "x"}}, (), "pretrain"),
        ("helpdesk", ("sfft.lr=1",), "did you mean 'sft'"),
    ],
)
def test_a_bad_config_is_a_usage_error(config: Any, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(keel.UsageError, match=message):
        keel.run(config, *overrides, progress=False)


def test_a_run_again_does_nothing_and_a_change_runs_again(text_run: dict[str, Any], runs: Path) -> None:
    seen: list[tuple[str, int, int]] = []

    def count(stage: str, step: int, steps: int, metrics: Mapping[str, float]) -> None:
        assert metrics["loss"] > 0
        seen.append((stage, step, steps))

    keel.run(text_run, *SMALL, runs=runs, progress=count)
    assert seen[-1] == ("base", seen[-1][2], seen[-1][2])
    first = len(seen)
    keel.run(text_run, *SMALL, runs=runs, progress=count)
    assert len(seen) == first
    keel.run(text_run, *SMALL, "base.lr=0.002", runs=runs, progress=count)
    assert len(seen) == 2 * first
    keel.run(text_run, *SMALL, "base.lr=0.002", runs=runs, progress=count, fresh=True)
    assert len(seen) == 3 * first


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    text_run: dict[str, Any], tmp_path: Path, differences: Callable[[Path, Path], list[str]]
) -> None:
    whole = keel.run(text_run, *SMALL, runs=tmp_path / "whole", progress=False)

    def interrupt(stage: str, step: int, steps: int, metrics: Mapping[str, float]) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        keel.run(text_run, *SMALL, runs=tmp_path / "cut", progress=interrupt)
    cut = keel.load_run(tmp_path / "cut" / "run")
    assert cut.stages["base"].status == "unfinished"
    with pytest.raises(keel.UsageError, match="no model: it is unfinished"):
        cut.model_path("base")

    steps: list[int] = []
    keel.run(text_run, *SMALL, runs=tmp_path / "cut", progress=lambda *done: steps.append(done[1]))
    assert steps[0] == 3, "it went on after the checkpoint of step 2"
    assert differences(whole.path, cut.path) == []


def test_it_works_in_a_running_event_loop_and_twice_in_one_process(
    text_run: dict[str, Any], runs: Path
) -> None:
    async def cell() -> keel.Run:
        return keel.run(text_run, *SMALL, runs=runs, progress=False)

    one = asyncio.run(cell())
    other = keel.run(text_run, *SMALL, runs=runs, name="other", progress=False)
    assert one.metrics("base").equals(other.metrics("base"))


def test_the_process_is_left_as_it_was(text_run: dict[str, Any], runs: Path) -> None:
    def state() -> tuple[object, ...]:
        handlers = tuple(signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM))
        return *handlers, torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()

    before, random_state = state(), torch.get_rng_state()
    keel.run(text_run, *SMALL, runs=runs, progress=False)
    assert state() == before
    assert torch.equal(torch.get_rng_state(), random_state)


def test_progress_is_silent_or_plain(
    text_run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keel.run(text_run, *SMALL, runs=tmp_path / "a", progress=False)
    assert capsys.readouterr() == ("", "")
    keel.run(text_run, *SMALL, runs=tmp_path / "b")
    out, err = capsys.readouterr()
    assert out == ""
    assert "base 5/5  loss" in err
    assert "\r" not in err


def test_a_line_is_drawn_again_on_a_terminal() -> None:
    stream = io.StringIO()
    progress = TextProgress(stream, redraw=True)
    progress("ppo", 1, 2, {"loss": 0.5, "objective/kl": 1.25, "unshown": 1.0})
    progress.say("ppo: a note")
    progress("ppo", 2, 2, {"loss": 0.25})
    assert stream.getvalue() == "\rppo 1/2  loss 0.5  kl 1.25\nppo: a note\n\rppo 2/2  loss 0.25\n"


def test_a_notebook_gets_it_in_its_cell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = type("ZMQInteractiveShell", (), {})()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    TextProgress()("ppo", 1, 2, {})
    assert capsys.readouterr() == ("\rppo 1/2", "")


def test_a_plan_says_what_would_be_done_and_writes_nothing(stages: dict[str, Any], runs: Path) -> None:
    plan = keel.plan_run(stages, *SMALL, runs=runs)
    assert list(plan.table().index) == list(stages)
    assert plan.table().loc["ppo", "steps"] == 4
    assert "ppo (ppo) ← sft, reward" in str(plan)
    assert not runs.exists()
