"""The ways of over-optimisation that a run holds, and what is drawn and said of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from keel import report
from keel.report import overoptimization
from keel.report.reading import read

PPO = {
    "kind": "ppo",
    "model": {"path": "sft"},
    "reward": [{"kind": "learned", "model": "reward"}],
    "judge": {"gold": "world:helpdesk"},
}
JUDGE = {
    "kind": "evaluate",
    "models": ["sft"],
    "reward": [{"kind": "learned", "model": "reward"}],
    "gold": "world:helpdesk",
    "best_of": [2, 4, 8],
}


def interval(mean: float, half: float = 0.0, n: int = 100) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def kl(n: int) -> float:
    return math.log(n) - (n - 1) / n


@pytest.fixture
def made(tmp_path: Path) -> Any:
    """A run whose best of n and whose PPO lie on the two laws, around a gold of 0.4 and a proxy of 1 ± 2 of
    the SFT model."""

    def go(name: str = "run", ppo: Any = None, judge: Any = None, bend: float = 0.2) -> Path:
        run = tmp_path / name
        stages = {"sft": {"kind": "sft"}, "ppo": {**PPO, **(ppo or {})}, "judge": {**JUDGE, **(judge or {})}}
        for stage in ("ppo", "judge"):
            (run / "stages" / stage).mkdir(parents=True)
        (run / "config.yaml").write_text(yaml.safe_dump({"name": name, "stages": stages}, sort_keys=False))
        models = {"sft": {"gold": interval(0.4, 0.1), "proxy": interval(1.0, 1.959963984540054 * 2 / 10)}}
        for n in (2, 4, 8):
            d = math.sqrt(kl(n))
            models[f"sft best of {n}"] = {
                "kl": interval(kl(n)),
                "gold_lift": interval(d * (0.5 - 0.1 * d)),
                "proxy_lift": interval(3.0 * d),
            }
        (run / "stages" / "judge" / "result.json").write_text(
            json.dumps({"reference": "sft", "models": models})
        )
        rows = []
        for step in range(1, 13):
            row: dict[str, float] = {"step": step, "objective/kl": step}
            if step % 2 == 0:
                d = math.sqrt(step)
                row |= {
                    "eval/judge": 0.4 + d * (0.3 - bend * math.log(d)),
                    "eval/objective/kl": step,
                    "eval/objective/scores": 1 + step,
                }
            rows.append(row)
        (run / "stages" / "ppo" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return run

    return go


def test_points_are_relative_to_the_start_and_lie_on_the_laws(made: Any) -> None:
    best, ppo = overoptimization.paths(read(made()))
    assert (best.name, best.law, best.at) == ("best of n by reward", "best_of_n", (2, 4, 8))
    assert best.d == pytest.approx([math.sqrt(kl(n)) for n in (2, 4, 8)])
    assert best.proxy == pytest.approx([1.5 * d for d in best.d])  # in the start's deviations, which are 2
    assert (ppo.name, ppo.law, ppo.at) == ("ppo", "rl", (2, 4, 6, 8, 10, 12))
    assert ppo.gold == pytest.approx([d * (0.3 - 0.2 * math.log(d)) for d in ppo.d])
    assert ppo.proxy == pytest.approx([step / 2 for step in ppo.at])
    one, other = overoptimization.fitted([best]), overoptimization.fitted([ppo])
    assert one is not None
    assert other is not None
    assert (one.alpha, one.beta, one.r2) == pytest.approx((0.5, 0.1, 1.0))
    assert (other.alpha, other.beta, other.r2) == pytest.approx((0.3, 0.2, 1.0))


def test_without_a_gold_reward_of_the_start_there_is_no_way(made: Any) -> None:
    names = [path.name for path in overoptimization.paths(read(made("a", ppo={"reference": "base"})))]
    assert names == ["best of n by reward"]
    assert [
        p.name for p in overoptimization.paths(read(made("b", ppo={"judge": {"reward": "other"}})))
    ] == names
    # another reward's proxy of the start says nothing of this one's
    _, ppo = overoptimization.paths(
        read(made("c", ppo={"reward": [{"kind": "learned", "model": "rewards"}]}))
    )
    assert ppo.proxy == ()


def test_a_row_says_how_far_gold_fell(made: Any) -> None:
    runs = [read(made(f"run{i}", bend=bend)) for i, bend in enumerate((0.25, 0.3))]
    groups = overoptimization.by_name(runs)
    assert {name: len(own) for name, own in groups.items()} == {"best of n by reward": 2, "ppo": 2}
    line = overoptimization.lines(groups)[1]
    assert line.fall is not None
    assert line.fall["n"] == 2
    assert line.peak - line.end == pytest.approx(line.fall["mean"])
    assert line.end < 0 < line.peak
    assert line.proxy_rise is not None
    assert line.proxy_rise > 0
    assert len(line.cells) == len(overoptimization.HEAD)


def test_the_page_draws_dots_and_laws(made: Any) -> None:
    run = made()
    gold, proxy = overoptimization.drawn(overoptimization.by_name([read(run)]))
    assert [trace["mode"] for trace in gold.figure["data"]] == ["markers", "lines", "markers", "lines"]
    assert [trace["mode"] for trace in proxy.figure["data"]] == ["markers", "markers"]
    json.dumps([gold.figure, proxy.figure], allow_nan=False)
    page = report.write(run).read_text()
    assert '"overoptimization-gold"' in page
    assert "d·(α − β·log d)" in page
