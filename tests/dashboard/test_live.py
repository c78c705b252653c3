"""What is new: only that is sent, to a reader who stays and to one who comes back."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import yaml
from made_runs import append, foul_run, keel_run, ppo_row, sample_row, trl_run

from keel.dashboard import live
from keel.dashboard import runs as runs_module
from keel.dashboard.findings import MOST_FOUND, TOO_MANY
from keel.dashboard.live import CompareFeed, ListFeed, Positions, RunFeed
from keel.dashboard.runs import QUANTITIES, Runs
from keel.dashboard.table import LogTable


def feed(folder: Path, position: str = "") -> RunFeed:
    return RunFeed(Runs(folder).all()[0], None, Positions(position))


def points(events: list) -> dict:
    """File → what came."""
    return {event.data["file"]: event.data for event in events if event.name == "points"}


def compared(events: list) -> list[dict]:
    """What came of each of several runs."""
    return [one for event in events if event.name == "points" for one in event.data["runs"]]


def row(step: int) -> dict:
    return ppo_row(step, 100, random.Random(step))


def test_a_reader_is_sent_what_is_new_and_nothing_else(tmp_path):
    metrics = keel_run(tmp_path / "run", 50) / "stages" / "ppo" / "metrics.jsonl"
    reader = feed(tmp_path)
    first = points(reader.poll())["metrics"]
    assert first["reset"]
    assert len(first["series"]["objective/kl"][0]) == 50
    assert reader.poll() == []
    append(metrics, [{"step": 51, "objective/kl": 3.5, "my/own": 1.25}])
    events = reader.poll()
    new = points(events)["metrics"]
    assert new["series"] == {"objective/kl": [[51], [3.5]], "my/own": [[51], [1.25]]}  # an unknown one too
    assert not new["reset"]
    state = next(event.data for event in events if event.name == "state")
    assert [one["name"] for one in state["stages"]] == ["ppo"]  # the one that changed
    assert reader.poll() == []


def test_a_reader_who_was_cut_off_goes_on(tmp_path):
    metrics = keel_run(tmp_path / "run", 50) / "stages" / "ppo" / "metrics.jsonl"
    runs = Runs(tmp_path)
    first = RunFeed(runs.all()[0], None, Positions())
    first.poll()
    append(metrics, [row(51)])
    back = RunFeed(runs.all()[0], None, Positions(str(first.positions)))
    new = points(back.poll())
    assert set(new) == {"metrics"}
    assert new["metrics"]["series"]["objective/kl"][0] == [51]
    other = str(first.positions).replace(live.BOOT, "ffffffff")  # of another server
    assert points(RunFeed(runs.all()[0], None, Positions(other)).poll())["metrics"]["reset"]


def test_positions_from_anybody():
    for text in (
        "",
        "~",
        f"{live.BOOT}~~a~b:~c:1~d:x.1~e:9999999999999.1~f:1.",
        f"{live.BOOT}~a:\u00b2.1~\n\na:1.1",
        "x" * 10**6,
    ):
        assert Positions(text)._known == {}
    assert str(Positions(f"{live.BOOT}~a:1.2")) == f"{live.BOOT}~a:1.2"


def test_a_run_that_goes_back_to_a_checkpoint_is_sent_again(tmp_path):
    metrics = keel_run(tmp_path / "run", 50) / "stages" / "ppo" / "metrics.jsonl"
    reader = feed(tmp_path)
    reader.poll()
    lines = metrics.read_bytes().splitlines(keepends=True)
    os.truncate(metrics, sum(map(len, lines[:30])))
    append(metrics, [row(31)])
    new = points(reader.poll())["metrics"]
    assert new["reset"]
    assert new["series"]["objective/kl"][0] == list(range(1, 32))


def test_a_spike_in_a_million_steps_reaches_the_page(tmp_path):
    run = keel_run(tmp_path / "run", 10)
    metrics = run / "stages" / "ppo" / "metrics.jsonl"
    with metrics.open("w") as handle:
        handle.writelines(
            f'{{"step": {n}, "objective/scores": {99.5 if n == 765_432 else n % 7 / 7}}}\n'
            for n in range(1, 1_000_001)
        )
    new = points(feed(tmp_path).poll())["metrics"]
    steps, values, _, means = new["series"]["objective/scores"]
    assert new["rows"] == 1_000_000
    assert len(steps) <= live.MOST
    assert values[steps.index(765_432)] == 99.5
    assert len(json.dumps(new)) < 40_000
    assert max(means) < 1


def test_an_idle_run_costs_nothing(tmp_path):
    keel_run(tmp_path / "run", 200, done=100, status="running")
    readers = [
        feed(tmp_path),
        ListFeed(Runs(tmp_path)),
        CompareFeed(Runs(tmp_path).all(), list(QUANTITIES), True, Positions()),
    ]
    for reader in readers:
        assert reader.poll()
        assert reader.poll() == []


def test_one_step_is_little(tmp_path):
    run = keel_run(tmp_path / "run", 200, done=100, status="running")
    reader = feed(tmp_path)
    reader.poll()
    append(run / "stages" / "ppo" / "metrics.jsonl", [row(101)])
    sent = sum(len(json.dumps(event.data)) for event in reader.poll())
    assert sent < 5000


def test_the_list_says_what_changed(tmp_path, monkeypatch):
    monkeypatch.setattr("keel.dashboard.runs.LOOK_AGAIN", 0.0)
    reader = ListFeed(Runs(tmp_path))
    assert reader.poll()[0].data == {"runs": [], "gone": []}  # said once: there is none
    assert reader.poll() == []
    for name in ("a", "b"):
        keel_run(tmp_path / name, 10)
    assert [run["name"] for run in reader.poll()[0].data["runs"]] == ["a", "b"]
    append(tmp_path / "b" / "stages" / "ppo" / "metrics.jsonl", [row(11)])
    assert [run["name"] for run in reader.poll()[0].data["runs"]] == ["b"]
    (tmp_path / "a").rename(tmp_path / ".a")
    assert reader.poll()[0].data["gone"] == ["a"]


# ---------------------------------------------------------------- several runs


def test_runs_are_compared_by_what_each_calls_it(tmp_path):
    keel_run(tmp_path / "keel", 30)
    trl_run(tmp_path / "trl", 20)
    reader = CompareFeed(Runs(tmp_path).all(), ["reward", "length"], False, Positions())
    events = reader.poll()
    assert {line["run"]: line["metrics"]["reward"] for line in events[0].data["lines"]} == {
        "keel": "objective/scores",
        "trl": "reward",
    }
    curves = {one["run"]: one["series"] for one in compared(events)}
    assert len(curves["trl"]["reward"][0]) == 20
    append(tmp_path / "keel" / "stages" / "ppo" / "metrics.jsonl", [row(31)])
    new = compared(reader.poll())
    assert [one["run"] for one in new] == ["keel"]
    assert new[0]["series"]["reward"][0] == [31]


def test_seeds_become_a_band_and_stay_up_to_date(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "BANDS_AGAIN", 0.0)
    for seed in range(3):
        keel_run(tmp_path / f"ppo-seed{seed}", 30, seed=seed)
    keel_run(tmp_path / "other", 30, coef=0.5)
    reader = CompareFeed(Runs(tmp_path).all(), ["reward", "kl"], True, Positions())
    events = reader.poll()
    assert events[0].data["groups"] == {"ppo": ["ppo-seed0", "ppo-seed1", "ppo-seed2"]}
    assert [one["run"] for one in compared(events)] == ["other"]
    band = next(event.data for event in events if event.name == "band")["series"]["reward"]
    assert band["steps"] == list(range(1, 31))
    assert band["runs"] == 3
    assert all(low <= mid <= high for low, mid, high in zip(band["low"], band["middle"], band["high"]))
    append(
        tmp_path / "ppo-seed1" / "stages" / "ppo" / "metrics.jsonl", [{"step": 31, "objective/scores": 50.0}]
    )
    band = next(event.data for event in reader.poll() if event.name == "band")["series"]["reward"]
    assert (band["steps"][-1], band["high"][-1]) == (31, 50.0)


def test_any_metric_can_be_compared(tmp_path):
    keel_run(tmp_path / "a", 5)
    reader = CompareFeed(Runs(tmp_path).all(), ["val/ratio", "nobody/has/it"], False, Positions())
    assert reader.poll()[0].data["lines"][0]["metrics"] == {"val/ratio": "val/ratio"}


def test_pictures_of_a_foul_run_are_left_out(tmp_path):
    foul_run(tmp_path / "odd")
    found = live.drawn(Runs(tmp_path).all()[0])
    assert found["reward_models"] == []
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    "odd",
    [
        {"kl": [1]}, {"kl": {"target": "x", "coef": "y"}}, {"model": 1.5}, {"control": "a"}, {"reward": 7},
        {"critic_warmup": "x"},
    ],
)  # fmt: skip
def test_settings_that_keel_does_not_write_cost_no_page(tmp_path, odd):
    run = keel_run(tmp_path / "run", 40)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["stages"]["ppo"] |= odd
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    events = feed(tmp_path).poll()
    assert len(points(events)["metrics"]["series"]["objective/kl"][0]) == 40
    json.dumps([event.data for event in events], allow_nan=False)


def test_numbers_beyond_all_sums_cost_no_page(tmp_path):
    run = keel_run(tmp_path / "run", 5)
    rows = [{**row(step), "objective/kl": -1e308, "objective/scores": 1e308} for step in range(6, 60)]
    append(run / "stages" / "ppo" / "metrics.jsonl", rows)
    events = feed(tmp_path).poll()
    json.dumps([event.data for event in events], allow_nan=False)
    assert points(events)["metrics"]["series"]["objective/kl"][0][-1] == 59
    state = next(event.data for event in events if event.name == "state")
    ppo = next(one for one in state["stages"] if one["name"] == "ppo")
    assert (ppo["findings"][-1]["name"], ppo["findings"][-1]["step"]) == ("not finite", 6)


def test_a_number_that_cannot_be_written_out_costs_no_list(tmp_path):
    keel_run(tmp_path / "good", 3)
    config = keel_run(tmp_path / "odd", 3) / "config.yaml"
    huge = "0x" + "f" * 9000
    with config.open("a") as handle:
        handle.write(f"\nseed: {huge}\ndescription: {huge}\n")
    runs = Runs(tmp_path)
    [event] = ListFeed(runs).poll()
    assert [one["name"] for one in event.data["runs"]] == ["good", "odd"]
    for run in runs.all():
        json.dumps([event.data for event in RunFeed(run, None, Positions()).poll()], allow_nan=False)


def test_findings_without_number_are_shown_up_to_one(tmp_path):
    events = keel_run(tmp_path / "run", 3) / "stages" / "ppo" / "events.jsonl"
    append(
        events, [{"step": n, "event": "finding", "check": "x", "evidence": "e" * 9999} for n in range(3000)]
    )
    append(events, [{"step": 1, "event": "lower_rate", "checks": ["y" * 10**6], "to": None, "kl_coef": 1.0}])
    ppo = next(one for one in Runs(tmp_path).all()[0].state()["stages"] if one["name"] == "ppo")
    assert (len(ppo["findings"]), ppo["note"]) == (MOST_FOUND, TOO_MANY)
    assert max(len(one["evidence"]) for one in ppo["findings"]) <= 2000


def replied(events: list) -> list[dict]:
    """What came of replies."""
    return [event.data for event in events if event.name == "replies"]


def test_a_step_costs_as_little_after_ten_thousand_with_replies(tmp_path):
    folder = keel_run(tmp_path / "run", 50) / "stages" / "ppo"
    append(folder / "samples.jsonl", (sample_row(step, n) for step in range(100, 10_100) for n in range(2)))
    reader = feed(tmp_path)
    [first] = replied(reader.poll())
    assert (first["stage"], first["reset"], first["groups"][-1]) == ("ppo", True, ["step 10099", 2])
    assert len(first["groups"]) >= 10_000
    assert reader.poll() == []
    append(folder / "metrics.jsonl", [row(51)])
    append(folder / "samples.jsonl", [sample_row(10_099, 2), sample_row(10_100, 0)])
    events = reader.poll()
    assert replied(events) == [
        {"stage": "ppo", "reset": False, "groups": [["step 10099", 3], ["step 10100", 1]]}
    ]
    assert len(json.dumps([event.data for event in events])) < 6000
    (folder / "samples.jsonl").write_text("")
    append(folder / "samples.jsonl", [sample_row(1, 0)])  # back to a checkpoint
    assert replied(reader.poll()) == [{"stage": "ppo", "reset": True, "groups": [["step 1", 1]]}]


def test_pages_share_what_one_of_them_has_read(tmp_path, monkeypatch):
    """Of twenty pages of a run one looks at its files, and each is sent everything."""
    metrics = keel_run(tmp_path / "run", 50) / "stages" / "ppo" / "metrics.jsonl"
    runs = Runs(tmp_path, fresh=60.0)
    looked: list[str] = []
    made, refreshed = runs_module.OpenRun._made_state, LogTable.refresh
    monkeypatch.setattr(runs_module.OpenRun, "_made_state", lambda self: looked.append("state") or made(self))
    monkeypatch.setattr(LogTable, "refresh", lambda self: looked.append("table") or refreshed(self))
    readers = [RunFeed(runs.all()[0], None, Positions()) for _ in range(20)]
    first = [[event.name for event in reader.poll()] for reader in readers]
    assert all(names == first[0] for names in first)
    assert "points" in first[0]
    before = list(looked)
    assert before.count("state") == 1
    append(metrics, [row(51)])
    assert [reader.poll() for reader in readers] == [[]] * 20  # what was read is still fresh
    assert looked == before
    runs.all()[0]._looked.clear()  # a moment later
    for reader in readers:
        assert points(reader.poll())["metrics"]["series"]["objective/kl"][0] == [51]
    assert looked.count("state") == 2
    tables = len(before) - 1
    assert looked.count("table") == 2 * tables
    lists = [ListFeed(runs) for _ in range(3)]
    assert all(one.poll()[0].data["runs"] for one in lists)
