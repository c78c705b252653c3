"""A kind of stage is one entry: nothing outside the table asks which kind a stage is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import keel
from keel.config import KINDS
from keel.pipeline.stage_kinds import OWN_KINDS, Curve, KeyNumber, StageKind
from keel.report.page import key_result
from keel.report.reading import StageRun

SOURCE = Path(keel.__file__).parent
ASKERS = ("plan", "pipeline", "report", "cli", "rundir", "config/run.py", "config/reading.py")
CONFIGS = {config.__name__ for config in KINDS.values()} | {"OnPolicy", "Supervised", "Watched"}
# names of kinds that mean nothing else in a report; "reward" is a setting too, "best_of_n" also a law
NAMES = {"pretrain", "sft", "classifier", "ppo", "grpo", "dpo", "collect", "evaluate"}


def _nodes(*folders: str) -> Iterator[tuple[str, ast.AST]]:
    for folder in folders:
        place = SOURCE / folder
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                yield f"{path.relative_to(SOURCE)}:{getattr(node, 'lineno', 0)}", node


def test_there_is_an_entry_for_each_kind_that_a_config_may_name():
    assert {name: kind.config for name, kind in OWN_KINDS.items()} == KINDS


def test_nobody_tests_for_the_config_class_of_a_kind():
    found = [
        place
        for place, node in _nodes(*ASKERS)
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") in ("isinstance", "issubclass")
        and CONFIGS & {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
    ]
    assert found == []


def test_no_kind_is_spelled_out_in_the_report():
    found = [
        place
        for place, node in _nodes("report", "cli/diagnose.py", "cli/sweep.py")
        if isinstance(node, ast.Constant) and node.value in NAMES
    ]
    assert found == []
    for page in (SOURCE / "report").glob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not [name for name in NAMES if f'"{name}"' in text or f"'{name}'" in text], page.name


# ---------------------------------------------------------------- what a stage came to, in a few words


def _stage(kind: str, result: dict, **metrics: list) -> StageRun:
    return StageRun("s", kind, "done", Path(), {}, (), {}, result, metrics)


def _measure(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "n": 9}


@pytest.mark.parametrize(
    ("kind", "result", "words"),
    [
        ("pretrain", {"eval_loss": 1.84}, "held-out loss 1.84"),
        ("sft", {}, ""),
        ("reward", {"accuracy": _measure(0.8)}, "accuracy 0.80 (0.70 to 0.90)"),
        (
            "dpo",
            {"accuracy": _measure(0.8), "margin": _measure(0.5)},
            "held-out accuracy 0.80 (0.70 to 0.90), margin 0.50 (0.40 to 0.60)",
        ),
        ("best_of_n", {"reward_best": _measure(0.52), "reward_mean": _measure(0.31)}, "reward 0.31 → 0.52"),
        ("collect", {"comparisons": 1200}, "1,200 comparisons"),
        ("ppo", {"scores": 0.5, "kl": 5.21}, "score 0.50, KL 5.2 nats"),
        ("evaluate", {"models": {"sft": {"gold": 0.4}, "ppo": {"gold": 0.6}}}, "gold 0.40 → 0.60"),
        ("evaluate", {"models": {n: {"proxy": 0.5} for n in "abc"}}, "proxy: a 0.50, b 0.50, c 0.50"),
        (
            "no longer here",
            {"distance": 0.25, "models": ["a"], "steps_done": 3, "more": 1},
            "distance 0.25, steps done 3.00",
        ),
    ],
)
def test_what_came_of_a_stage(kind, result, words):
    assert key_result(_stage(kind, result)) == words


def test_late_metrics_stand_in_until_there_is_a_result():
    metrics = {"objective/scores": [(i, float(i)) for i in range(9)], "objective/kl": [(1, None)]}
    assert key_result(_stage("grpo", {}, **metrics)) == "score 6.00"


def test_an_entry_needs_little():
    kind = StageKind("mine", KINDS["sft"], run=print, curves=(Curve("Loss", "nats", "loss"),))
    assert (kind.x_word, kind.key_numbers, kind.on_policy) == ("step", (), False)
    assert KeyNumber("loss", "loss").places == 2
