"""`keel sweep`: what is a point, what points share, what comes of a point that fails, and what is said of
them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from keel.cli import sweep
from keel.config import parse
from keel.errors import KeelError, UsageError
from keel.evaluation.measures import across_runs
from keel.pipeline.pipeline import Pipeline
from keel.report import sweeps
from keel.report.sweeps import Ended


class Ran:
    """A point that has run in this process."""

    def __init__(self, code: int) -> None:
        self.code = code

    def poll(self) -> int:
        return self.code

    def wait(self) -> int:
        return self.code

    def terminate(self) -> None:
        pass


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Points run in this process, without their reports; their names in the order of their start."""
    names: list[str] = []

    def start(point: Any, config: Path, log: Path) -> Ran:
        names.append(point.name)
        log.parent.mkdir(exist_ok=True)
        try:
            Pipeline(point.pipeline.config, point.directory, str).run()
        except KeelError as error:
            log.write_text(f"something\nkeel: {error}\n")
            return Ran(1)
        log.write_text("")
        return Ran(0)

    monkeypatch.setattr(sweep, "start", start)
    monkeypatch.setattr(Pipeline, "_report", lambda self: None)
    monkeypatch.setattr(sweep, "POLL", 0)
    return names


@pytest.mark.parametrize(
    ("overrides", "fixed", "swept"),
    [
        (["ppo.lr=1e-3,2e-3"], [], {"ppo.lr": ["1e-3", "2e-3"]}),
        (["ppo.kl.coef=0,0.1", "threads=1"], ["threads=1"], {"ppo.kl.coef": [0, 0.1]}),
        (["sft.betas=[0.9, 0.95]"], ["sft.betas=[0.9, 0.95]"], {}),
        (["sft.betas=[0.9, 0.95],[0.8, 0.9]"], [], {"sft.betas": [[0.9, 0.95], [0.8, 0.9]]}),
        (["sft.data={source: a.jsonl, rows: 3}"], ["sft.data={source: a.jsonl, rows: 3}"], {}),
        (
            ["sft.data={source: a.jsonl, rows: 3},b.jsonl"],
            [],
            {"sft.data": [{"source": "a.jsonl", "rows": 3}, "b.jsonl"]},
        ),
        (["sft.max_steps=null,3"], [], {"sft.max_steps": [None, 3]}),
    ],
)
def test_values_between_commas_are_swept(overrides: Any, fixed: Any, swept: Any) -> None:
    assert sweep.grid(overrides) == (fixed, swept)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "nothing to sweep"),
        (["sft.lr=1e-3"], "nothing to sweep"),
        (["--seeds", "1"], "nothing to sweep"),
        (["sft.lr"], "is not a setting"),
        (["sft.lr=1e-3,1e-3"], "a value is given twice"),
        (["sft.lr=1e-3,2e-3", "sft.lr=3e-3,4e-3"], "the key is given twice"),
        (["seed=0,1"], "seeds are given by --seeds"),
        (["name=a,b"], "the name is given by --name"),
        (["sft.lr=[1,2"], "the values are not YAML"),
        (["--seeds", "0,0"], "different numbers of 0 or more"),
        (["--seeds", "0 1"], "write whole numbers between commas"),
        (["stf.lr=1,2"], "did you mean 'sft'"),
        (["sft.lr=1e-3,-1"], "sft.lr"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_runs(
    keel: Any, write: Any, sft: Any, arguments: Any, reason: str, started: Any
) -> None:
    path = write("tiny.yaml", {"sft": sft()})
    done = keel("sweep", path, *arguments)
    assert done.code == 2
    assert reason in done.err
    assert not Path("runs").exists()
    assert started == []


@pytest.mark.slow
def test_points_share_what_no_setting_changes(keel: Any, write: Any, chain: Any, started: list[str]) -> None:
    path = write("tiny.yaml", chain)
    done = keel("sweep", path, "ppo.kl.coef=0.01,0.1", "--seeds", "0,1", "--json")
    assert done.code == 0, done.err
    assert started == [f"ppo.kl.coef-{coef}_seed-{seed}" for seed in (0, 1) for coef in (0.01, 0.1)]
    assert "running, with sft, reward of another point" in done.err
    folder = Path("runs/tiny-sweep/points")
    for seed in (0, 1):
        one, other = (folder / f"ppo.kl.coef-{coef}_seed-{seed}" / "stages" for coef in (0.01, 0.1))
        # the very same bytes, times included: it was not trained again
        for name in ("times.jsonl", "stage.json", "model/model.safetensors"):
            assert (one / "reward" / name).read_bytes() == (other / "reward" / name).read_bytes()
        assert (one / "ppo" / "stage.json").read_bytes() != (other / "ppo" / "stage.json").read_bytes()
    # what was taken is what would have been trained
    alone = Pipeline(parse({**yaml.safe_load(path.read_text()), "seed": 1}), Path("alone"), str)
    alone.run()
    taken = folder / "ppo.kl.coef-0.1_seed-1" / "stages" / "reward"
    assert (taken / "metrics.jsonl").read_bytes() == (
        alone.stage_directory("reward") / "metrics.jsonl"
    ).read_bytes()
    # the table: means over seeds of what the runs hold
    rows = {(row["settings"].get("ppo.kl.coef"), row["subject"]): row for row in done.json["rows"]}
    assert rows.keys() == {(None, "sft"), (0.01, "ppo"), (0.1, "ppo")}
    results = [
        json.loads((folder / f"ppo.kl.coef-0.1_seed-{seed}" / "stages" / "judge" / "result.json").read_text())
        for seed in (0, 1)
    ]
    proxies = [result["models"]["ppo"]["proxy"]["mean"] for result in results]
    assert rows[0.1, "ppo"]["measures"]["proxy"] == across_runs(proxies)
    assert json.loads(Path("runs/tiny-sweep/sweep.json").read_text()) == done.json
    lines = list(csv.DictReader(Path("runs/tiny-sweep/sweep.csv").read_text().splitlines()))
    own = [
        line
        for line in lines
        if line["ppo.kl.coef"] == "0.1" and line["model"] == "ppo" and line["measure"] == "proxy"
    ]
    assert [float(line["mean"]) for line in own] == proxies
    page = Path("runs/tiny-sweep/report.html").read_text()
    assert "ppo.kl.coef=0.1" in page
    assert '"sweep-proxy"' in page
    # the same command again: nothing is run
    started.clear()
    again = keel("sweep", path, "ppo.kl.coef=0.01,0.1", "--seeds", "0,1")
    assert (again.code, started) == (0, [])
    assert "4 of 4 points done before" in again.err
    assert "proxy reward" in again.out


def test_a_point_that_fails_leaves_the_others_alone(
    keel: Any, write: Any, sft: Any, data: Any, started: list[str]
) -> None:
    path = write("tiny.yaml", {"sft": sft()})
    Path("some.jsonl").write_text('{"prompt": 3}\n')
    done = keel("sweep", path, f"sft.data=some.jsonl,{data.demonstrations}", "--json")
    assert done.code == 1
    first, second = done.json["points"]
    assert (first["status"], second["status"]) == ("failed", "done")
    assert "some.jsonl:1" in first["error"]
    assert "1 of 2 points failed" in done.json["verdict"]
    Path("some.jsonl").write_text(Path(data.demonstrations).read_text())
    started.clear()
    again = keel("sweep", path, f"sft.data=some.jsonl,{data.demonstrations}", "--json")
    assert again.code == 0
    assert len(started) == 1  # the one that failed
    assert [point["status"] for point in again.json["points"]] == ["done", "done"]


def test_no_two_points_make_the_same_stage_at_the_same_time(
    keel: Any, write: Any, sft: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two jobs: the second point of a seed waits for the stage that the first is making, that of another seed
    does not."""
    monkeypatch.setattr(sweep, "POLL", 0)
    monkeypatch.setattr(Pipeline, "_report", lambda self: None)
    events: list[str] = []

    class Slow:
        """Makes its first stage at the third look and the rest at the fifth."""

        def __init__(self, point: Any, log: Path) -> None:
            self.point, self.looks = point, 0
            log.parent.mkdir(exist_ok=True)
            log.write_text("")

        def poll(self) -> int | None:
            self.looks += 1
            if self.looks == 3:
                Pipeline(self.point.pipeline.config, self.point.directory, str).run(only="first")
                events.append(f"first of {self.point.name}")
            if self.looks == 5:
                Pipeline(self.point.pipeline.config, self.point.directory, str).run()
            return 0 if self.looks >= 5 else None

        wait = terminate = lambda self: 0

    def start(point: Any, config: Path, log: Path) -> Slow:
        events.append(f"start of {point.name}")
        return Slow(point, log)

    monkeypatch.setattr(sweep, "start", start)
    path = write("tiny.yaml", {"first": sft(), "second": sft(model="first")})
    done = keel("sweep", path, "second.lr=1e-3,2e-3", "--jobs", "2")
    assert done.code == 0, done.err
    one, two = "second.lr-1e-3_seed-0", "second.lr-2e-3_seed-0"
    assert events[:3] == [f"start of {one}", f"first of {one}", f"start of {two}"]
    events.clear()
    keel("sweep", path, "--seeds", "0,1", "--jobs", "2", "--name", "seeds")
    assert events[:2] == ["start of seed-0", "start of seed-1"]


def test_a_sweep_runs_its_points_as_processes(keel: Any, write: Any, sft: Any, tmp_path: Path) -> None:
    path = write("tiny.yaml", {"sft": sft()})
    done = keel("sweep", path, "--seeds", "3,4", "--jobs", "2", "--json")
    assert done.code == 0, done.err
    assert [row["seeds"] for row in done.json["rows"]] == [[3, 4]]
    assert "sft 2/2" in (tmp_path / "runs/tiny-sweep/logs/seed-3.log").read_text()
    assert (tmp_path / "runs/tiny-sweep/points/seed-4/report.html").exists()


def test_a_point_is_tied_to_the_sweep(
    write: Any, sft: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process holds on to a pipe of the sweep's, which closes however that ends: see `tests/attack`."""
    path = write("tiny.yaml", {"sft": sft()})
    directory, points = sweep.points(path, [], [0, 1], tmp_path / "runs", None, str)
    given: dict[str, Any] = {}
    monkeypatch.setattr(
        sweep.subprocess, "Popen", lambda command, **more: given.update(more, command=command)
    )
    sweep.start(points[0], path, directory / "logs" / "one.log")
    assert given["stdin"] is sweep.subprocess.PIPE
    assert "--while-stdin" in given["command"]


def test_two_sweeps_do_not_work_in_one_directory(write: Any, sft: Any, tmp_path: Path) -> None:
    path = write("tiny.yaml", {"sft": sft()})
    directory, points = sweep.points(path, [], [0, 1], tmp_path / "runs", None, str)
    directory.mkdir(parents=True)
    one = sweep.Sweep(path, directory, points, 1, str)
    with sweep.locked(directory), pytest.raises(KeelError, match="another process is working in"):
        one.run()


def test_a_run_is_not_taken_for_a_sweep(write: Any, sft: Any, tmp_path: Path) -> None:
    path = write("tiny.yaml", {"sft": sft()})
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.yaml").write_text("name: mine\n")
    with pytest.raises(UsageError, match="is a run, not a sweep"):
        sweep.points(path, [], [0, 1], tmp_path / "runs", "mine", str)


def test_names_of_points_are_names_of_directories() -> None:
    assert sweep._name({"ppo.lr": "1e-3"}, 2) == "ppo.lr-1e-3_seed-2"
    odd = [sweep._name({"sft.data": value}, 0) for value in ("a/b.jsonl", "a-b.jsonl", "x" * 200, "x" * 201)]
    assert len(set(odd)) == 4
    assert all(
        parse({"name": name, "stages": {"s": {"kind": "sft", "model": "m", "data": "d"}}}) for name in odd
    )


# ---------------------------------------------------------------- what is said


def made_up(folder: Path, gold: dict[tuple[Any, int], float], status: str = "done") -> list[Ended]:
    """Points of a sweep of ppo.kl.coef with one evaluate stage each: (coef, seed) → gold of ppo; that of sft
    is 0.4."""
    points = []
    for (coef, seed), value in gold.items():
        run = folder / f"{coef}-{seed}"
        (run / "stages" / "judge").mkdir(parents=True)
        config = {
            "name": "x",
            "seed": seed,
            "stages": {"judge": {"kind": "evaluate", "models": ["sft", "ppo"]}},
        }
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        models = {
            "sft": {"gold": {"mean": 0.4, "low": 0.3, "high": 0.5, "n": 9}},
            "ppo": {"gold": {"mean": value, "low": value - 0.1, "high": value + 0.1, "n": 9}},
        }
        result = {"reference": "sft", "models": models}
        (run / "stages" / "judge" / "result.json").write_text(json.dumps(result))
        points.append(Ended(run.name, run, {"ppo.kl.coef": coef}, seed, status, ""))
    return points


def test_the_best_setting_is_told_apart_by_seeds_in_pairs(tmp_path: Path) -> None:
    gold = {(0.1, 0): 0.50, (0.1, 1): 0.70, (0.1, 2): 0.60, (0.01, 0): 0.41, (0.01, 1): 0.60, (0.01, 2): 0.51}
    found = sweeps.gather("s", made_up(tmp_path, gold))
    text = sweeps.verdict(found)
    assert text.startswith("ppo with ppo.kl.coef=0.1 has the highest gold reward, 0.60 (0.35 to 0.85)")
    ahead = across_runs([0.09, 0.10, 0.09])
    assert (
        f"+0.093 ({ahead['low']:.3f} to {ahead['high']:.3f}, paired over 3 seeds) ahead of ppo with "
        "ppo.kl.coef=0.01" in text
    )
    levels = [row for row in found.rows if row.settings == sweeps.ALL]
    assert [row.subject for row in levels] == ["sft"]
    drawn = sweeps.against_setting(found, "gold")
    assert drawn is not None
    (line,) = drawn.figure["data"]
    assert line["x"] == [0.1, 0.01]
    assert line["y"] == pytest.approx([0.6, 0.5067], abs=1e-4)
    assert drawn.figure["layout"]["xaxis"]["type"] == "log"
    assert [shape["y0"] for shape in drawn.figure["layout"]["shapes"]] == pytest.approx([0.4])


def test_settings_that_cannot_be_told_apart_are_said_to_be_so(tmp_path: Path) -> None:
    gold = {(0.1, 0): 0.50, (0.1, 1): 0.70, (0.01, 0): 0.60, (0.01, 1): 0.50}
    assert "cannot be told apart" in sweeps.verdict(sweeps.gather("s", made_up(tmp_path, gold)))


def test_a_single_seed_keeps_its_intervals_and_says_what_it_is(tmp_path: Path) -> None:
    found = sweeps.gather("s", made_up(tmp_path, {(0.1, 0): 0.5, ("none", 0): 0.7}))
    assert "a single seed says nothing" in sweeps.verdict(found)
    assert found.rows[1].measures["gold"] == {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    drawn = sweeps.against_setting(found, "gold")
    assert drawn is not None
    assert drawn.figure["layout"]["xaxis"]["type"] == "category"


def test_a_sweep_without_anything_done_has_a_page(tmp_path: Path) -> None:
    points = [point._replace(status="failed", error="no") for point in made_up(tmp_path, {(0.1, 0): 0.5})]
    found = sweeps.gather("s", points)
    assert "0 of 1 points are done" in sweeps.verdict(found)
    sweeps.write(found, tmp_path / "page.html")
    assert "No point is done yet" in (tmp_path / "page.html").read_text()


def test_a_sweep_of_seeds_alone_compares_models(tmp_path: Path) -> None:
    points = [
        point._replace(settings={}) for point in made_up(tmp_path, {(1, 0): 0.50, (2, 1): 0.70, (3, 2): 0.60})
    ]
    found = sweeps.gather("s", points)
    assert sweeps.verdict(found).startswith(
        "ppo has the highest gold reward, 0.60 (0.35 to 0.85), +0.200 (-0.048 to 0.448,"
    )
    assert sweeps.cells(found)[0] == ["Model", "Gold reward"]
    assert sweeps.against_setting(found, "gold") is None
