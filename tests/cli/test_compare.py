"""`keel compare`: which models are one, how they are ranked, what is said of them, and the page."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import yaml

from keel.evaluation.measures import across_runs, mean_interval, t_point
from keel.report import compare, comparison
from keel.report.comparison import HEIGHT, LETTER, LINE, WIDTH, Model

STAGES: dict[str, Any] = {
    "sft": {"kind": "sft", "model": {"path": "gpt2"}, "lr": 0.1},
    "reward": {"kind": "reward", "model": {"path": "sft"}},
    "ppo": {"kind": "ppo", "model": {"path": "sft"}, "reward": "reward", "kl": {"coef": 0.05}},
    "dpo": {"kind": "dpo", "model": {"path": "sft"}},
}
Scores = dict[str, Sequence[float]]  # model → gold, prompt by prompt
WriteRun = Callable[..., Path]


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """A run directory with one evaluate stage that judged the models of `gold` (or only by proxy)."""

    def go(
        name: str,
        gold: Scores,
        kl: dict[str, float] | None = None,
        *,
        seed: int = 0,
        by: str = "gold",
        stages: Any = None,
        judge: str = "judge",
        samples: bool = True,
        prompts: str = "prompt",
    ) -> Path:
        path = tmp_path / "runs" / name
        settings = {**STAGES, **(stages or {})}
        settings[judge] = {"kind": "evaluate", "models": list(gold), "reward": "reward", "data": ["p.jsonl"]}
        (path / "stages" / judge).mkdir(parents=True)
        config = {"name": name, "seed": seed, "stages": settings}
        (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        reference, models, rows = next(iter(gold)), {}, []
        for model, scores in gold.items():
            far = (kl or {}).get(model, 0.0)
            models[model] = {
                by: mean_interval(scores),
                "kl": mean_interval([far - 0.1, far + 0.1] if far else [0.0] * 2),
            }
            models[model]["length"] = mean_interval([10.0, 12.0])
            if model != reference:
                models[model][f"{by}_lift"] = mean_interval([a - b for a, b in zip(scores, gold[reference])])
            for index, score in enumerate(scores):
                row = {"model": model, "index": index, "prompt": f"{prompts} {index}", "completion": "x"}
                rows.append({**row, **({"gold": {"total": score}} if by == "gold" else {"proxy": score})})
            made = path / "stages" / model
            made.mkdir(exist_ok=True)
            seconds = {"seconds": 60.0 + seed, "facts": {"peak_memory_mib": 1000.0 + seed}}
            (made / "stage.json").write_text(json.dumps({"kind": "ppo", **seconds}))
        where = path / "stages" / judge
        (where / "stage.json").write_text(json.dumps({"kind": "evaluate"}))
        (where / "result.json").write_text(json.dumps({"reference": reference, "models": models}))
        if samples:
            (where / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return go


def by_name(found: compare.Comparison) -> dict[str, compare.Entry]:
    return {entry.name: entry for entry in found.entries}


# ---------------------------------------------------------------- one run


GOLD = {"sft": [0.1, 0.5, 0.3, 0.4], "ppo": [0.6, 0.9, 0.8, 0.8], "dpo": [0.5, 0.9, 0.6, 0.7]}
KL = {"ppo": 5.0, "dpo": 5.05}


def test_models_are_ranked_by_gold_and_the_pairs_decide(write_run: WriteRun) -> None:
    found = compare.compare([write_run("one", GOLD, KL)])
    assert found.by == "gold"
    assert [entry.name for entry in found.entries] == ["ppo", "dpo", "sft"]
    expected = mean_interval([0.1, 0.0, 0.2, 0.1])
    apart = found.differences["dpo"]
    assert (apart.mean, apart.low, apart.high) == pytest.approx(
        [expected[k] for k in ("mean", "low", "high")]
    )
    assert apart.how == "paired over 4 prompts"
    # their own intervals overlap: unpaired, they could not be told apart
    own = by_name(found)
    assert own["dpo"].measures["gold"]["high"] > own["ppo"].measures["gold"]["low"]
    level, word, sentence = compare.verdict(found)
    assert (level, word) == ("better", "Best")
    assert sentence == (
        "ppo is best, with gold reward 0.78 (95 % interval 0.65 to 0.90) at KL 5.0 nats, ahead of dpo at KL "
        "5.0 nats by +0.10 "
        "(95 % interval 0.02 to 0.18, paired over 4 prompts)."
    )
    (equal,) = compare.at_equal_kl(found)
    assert equal.startswith(
        "At equal KL (intervals overlap) ppo (5.0 nats) is ahead of dpo (5.0 nats) by +0.10"
    )


def test_an_interval_that_includes_0_is_no_victory(write_run: WriteRun) -> None:
    gold = {**GOLD, "dpo": [0.9, 0.6, 0.9, 0.6]}
    found = compare.compare([write_run("one", gold, {"ppo": 5.0, "dpo": 9.0})])
    level, word, sentence = compare.verdict(found)
    assert (level, word) == ("unclear", "No clear best")
    assert "ppo has the highest gold reward" in sentence
    assert (
        "it and dpo at KL 9.0 nats cannot be told apart: the difference is +0.03 (95 % interval" in sentence
    )
    assert "includes 0" in sentence
    (equal,) = compare.at_equal_kl(found)
    assert equal.startswith("No other model's KL interval overlaps that of ppo (5.0 nats)")


def test_without_a_samples_file_means_are_taken_as_independent(write_run: WriteRun) -> None:
    found = compare.compare([write_run("one", GOLD, KL, samples=False)])
    apart, own = found.differences["dpo"], by_name(found)
    half = math.hypot(
        own["ppo"].measures["gold"]["mean"] - own["ppo"].measures["gold"]["low"],
        own["dpo"].measures["gold"]["high"] - own["dpo"].measures["gold"]["mean"],
    )
    assert apart.low == pytest.approx(apart.mean - half)
    assert apart.how == "of independent means"
    assert not apart.distinguishable


def test_by_proxy_where_there_is_no_gold_and_it_is_said(write_run: WriteRun) -> None:
    found = compare.compare([write_run("one", GOLD, KL, by="proxy")])
    assert found.by == "proxy"
    assert [entry.name for entry in found.entries] == ["ppo", "dpo", "sft"]
    assert found.differences["dpo"].how == "paired over 4 prompts"
    assert any("Ranked by the proxy alone" in note for note in found.notes)
    assert "by proxy" in compare.as_text(found)


# ---------------------------------------------------------------- several runs


def test_seeds_are_pooled_with_students_interval(write_run: WriteRun) -> None:
    shifts = (0.0, 0.02, 0.1)
    paths = [
        write_run(
            f"s{seed}", {m: [x + shift * (m == "ppo") for x in own] for m, own in GOLD.items()}, KL, seed=seed
        )
        for seed, shift in enumerate(shifts)
    ]
    found = compare.compare(paths)
    ppo = by_name(found)["ppo"]
    means = [sum(GOLD["ppo"]) / 4 + shift for shift in shifts]
    low, high = scipy.stats.t.interval(0.95, 2, sum(means) / 3, scipy.stats.sem(means))
    assert ppo.measures["gold"] == pytest.approx({"mean": sum(means) / 3, "low": low, "high": high, "n": 3})
    assert ppo.model.runs == 3
    assert ppo.model.seconds == pytest.approx(61)
    assert ppo.model.peak_memory_mib == 1002.0
    apart = found.differences["dpo"]
    assert apart.how == "paired over 3 seeds"
    assert apart.mean == pytest.approx(0.1 + sum(shifts) / 3)
    low, _ = scipy.stats.t.interval(0.95, 2, apart.mean, scipy.stats.sem(shifts))
    assert apart.low == pytest.approx(low)
    assert "ppo (3 runs)" in compare.as_text(found)


def test_one_name_with_other_settings_stands_apart_and_what_is_the_same_is_pooled(
    write_run: WriteRun,
) -> None:
    other = {"ppo": {**STAGES["ppo"], "kl": {"coef": 0.5}}}
    paths = [write_run(f"weak-{seed}", GOLD, KL, seed=seed) for seed in (0, 1)]
    paths += [write_run(f"strong-{seed}", GOLD, KL, seed=seed, stages=other) for seed in (0, 2)]
    found = compare.compare(paths)
    assert set(by_name(found)) == {"weak-0/ppo", "strong-0/ppo", "dpo", "sft"}
    assert [judged.seed for judged in by_name(found)["sft"].judged] == [0, 1, 2]  # seed 0 once
    (note,) = [note for note in found.notes if note.startswith("sft")]
    assert "weak-0" in note
    assert "strong-0" in note
    assert "counted once" in note
    assert not any("evaluations differ" in note for note in found.notes)


def test_settings_of_what_a_model_comes_from_tell_it_apart(write_run: WriteRun) -> None:
    other = {"sft": {**STAGES["sft"], "lr": 0.2}}
    found = compare.compare([write_run("a", GOLD, KL), write_run("b", GOLD, KL, seed=1, stages=other)])
    assert len(found.entries) == 6
    assert any("evaluations differ" in note for note in found.notes)  # their reward models do


def test_two_evaluations_of_one_model_in_one_run(write_run: WriteRun) -> None:
    path = write_run("one", GOLD, KL)
    config = yaml.safe_load((path / "config.yaml").read_text())
    config["stages"]["again"] = {**config["stages"]["judge"], "data": ["other.jsonl"]}
    (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (path / "stages" / "judge").rename(path / "stages" / "again")
    write_again = path / "stages" / "judge"
    write_again.mkdir()
    for name in ("stage.json", "result.json", "samples.jsonl"):
        (write_again / name).write_bytes((path / "stages" / "again" / name).read_bytes())
    names = set(by_name(compare.compare([path])))
    assert names == {f"{stage}:{model}" for stage in ("judge", "again") for model in GOLD}


def test_single_runs_are_paired_only_on_the_same_prompts(write_run: WriteRun) -> None:
    other = {"ppo": {**STAGES["ppo"], "kl": {"coef": 0.5}}}
    better = {**GOLD, "ppo": [x + 0.05 for x in GOLD["ppo"]]}
    one = write_run("a", GOLD, KL)
    same = compare.compare([one, write_run("b", better, KL, stages=other)])
    assert same.entries[0].name == "b/ppo"
    assert same.differences["a/ppo"].how == "paired over 4 prompts"
    different = compare.compare([one, write_run("c", better, KL, stages=other, prompts="else")])
    assert different.differences["a/ppo"].how == "of independent means"


# ---------------------------------------------------------------- the command


def test_the_command_prints_a_table_and_writes_a_page(keel: Any, write_run: WriteRun, tmp_path: Path) -> None:
    path = write_run("one", GOLD, KL)
    done = keel("compare", path)
    assert done.code == 0, done.err
    assert done.out.startswith("Best: ppo is best, with gold reward 0.78")
    lines = [re.split(r"  +", line) for line in done.out.splitlines()]
    head = next(line for line in lines if line[0] == "by gold")
    assert head == ["by gold", "model", "gold reward", "gold lift", "kl", "length", "time", "peak memory"]
    row = dict(zip(head, next(line for line in lines if line[:2] == ["1", "ppo"])))
    assert row["gold lift"] == "0.45 (0.39 to 0.51)"
    assert row["time"] == "1 min 00 s"
    assert row["peak memory"] == "1,000 MiB"
    page = (tmp_path / "runs" / "compare.html").read_text()
    assert "ahead of dpo" in page
    assert 'data-figure="compare-gold-kl"' in page
    assert "compare-proxy-kl" not in page  # nobody has a proxy
    assert "src=" not in re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert keel("compare", path, "--out", "mine.html").code == 0
    assert Path("mine.html").read_text() == page


def test_json_holds_the_numbers(keel: Any, write_run: WriteRun) -> None:
    path = write_run("one", GOLD, KL)
    facts = keel("compare", path, "--json").json
    assert facts["ranked_by"] == "gold"
    best = facts["models"][0]
    assert (best["name"], best["runs"], best["seconds"], best["peak_memory_mib"]) == (
        "ppo",
        [str(path)],
        60.0,
        1000.0,
    )
    assert best["measures"]["gold"] == pytest.approx(mean_interval(GOLD["ppo"]))
    assert facts["best_ahead_of"]["dpo"]["distinguishable"] is True
    assert [model["reference"] for model in facts["models"]] == [False, False, True]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: (path / "config.yaml").unlink(), "no run at"),
        (lambda path: (path / "stages/judge/result.json").unlink(), "'judge' has no current result"),
        (
            lambda path: (path / "config.yaml").write_text("name: x\nstages: {sft: {kind: sft}}\n"),
            "its config has no evaluate stage",
        ),
    ],
)
def test_what_cannot_be_compared_is_said(keel: Any, write_run: WriteRun, spoil: Any, message: str) -> None:
    good, bad = write_run("good", GOLD, KL), write_run("bad", GOLD, KL)
    spoil(bad)
    refused = keel("compare", good, bad)
    assert refused.code == 2
    assert refused.out == ""
    assert refused.err.startswith("keel: ")
    assert message in refused.err
    assert str(bad) in refused.err
    assert not (good.parent / "compare.html").exists()


def test_a_page_that_has_no_place_is_refused(keel: Any, write_run: WriteRun) -> None:
    refused = keel("compare", write_run("one", GOLD, KL), "--out", "nowhere/x.html")
    assert refused.code == 2
    assert "there is no folder nowhere" in refused.err


@pytest.mark.usefixtures("no_report")
def test_a_real_run_with_its_time_and_memory(keel: Any, write: Any, chain: Any) -> None:
    done = keel("run", write("tiny.yaml", chain))
    assert done.code == 0, done.err
    facts = keel("compare", "runs/tiny", "--json").json
    assert facts["ranked_by"] == "proxy"
    ppo = next(model for model in facts["models"] if model["name"] == "ppo")
    assert ppo["seconds"] > 0
    assert 100 < ppo["peak_memory_mib"] < 100_000  # of this very process: in MiB, not KiB
    assert ppo["measures"].keys() >= {"proxy", "kl", "win_rate", "length"}
    assert "peak_memory_mib" not in Path("runs/tiny/stages/ppo/metrics.jsonl").read_text()


# ---------------------------------------------------------------- parts


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 30, 99])
def test_students_point_is_scipys(degrees: int) -> None:
    assert t_point(degrees) == pytest.approx(scipy.stats.t.ppf(0.975, degrees), rel=1e-12)


def test_one_run_has_no_spread() -> None:
    with pytest.raises(ValueError, match="no spread"):
        across_runs([0.5])


def many(names: Sequence[str], spread: float) -> list[Model]:
    return [
        Model(
            name,
            1,
            index == 0,
            {
                "gold": {
                    "mean": 0.5 + spread * index,
                    "low": 0.45 + spread * index,
                    "high": 0.55 + spread * index,
                    "n": 9,
                },
                "kl": {
                    "mean": 5 + spread * index,
                    "low": 4.5 + spread * index,
                    "high": 5.5 + spread * index,
                    "n": 9,
                },
            },
            None,
            None,
        )
        for index, name in enumerate(names)
    ]


@pytest.mark.parametrize("spread", [0.0, 0.02, 0.5])
def test_labels_do_not_cover_each_other_on_a_phone(spread: float) -> None:
    (picture,) = comparison.against_kl(many(["sft", "ppo", "grpo", "dpo"], spread))
    boxes = []
    for trace in picture.figure["data"]:
        (x0, x1), (y0, y1) = (picture.figure["layout"][axis]["range"] for axis in ("xaxis", "yaxis"))
        x, y = (trace["x"][0] - x0) / (x1 - x0) * WIDTH, (1 - (trace["y"][0] - y0) / (y1 - y0)) * HEIGHT
        edge, side = trace["textposition"].split()
        width = LETTER * len(trace["text"][0])
        left = {"right": x, "left": x - width, "center": x - width / 2}[side]
        top = y - LINE if edge == "top" else y
        boxes.append((left, top, left + width, top + LINE))
    for i, a in enumerate(boxes):
        assert a[0] > -10
        assert a[2] < WIDTH + 10
        for b in boxes[:i]:
            assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1])


def test_long_names_give_way_to_their_place_in_the_table() -> None:
    names = ["sft", "a-run-with-a-long-name/ppo"]
    (picture,) = comparison.against_kl(many(names, 0.5))
    assert [trace["text"] for trace in picture.figure["data"]] == [["1"], ["2"]]
