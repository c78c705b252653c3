"""What is computed does not depend on how many ranks compute it: gradients, metrics, results and weights of
every kind of stage in float64, on 1, 2 and 3 processes, with whole weights (ddp) and with cut ones (fsdp)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

GRADIENT, NUMBER, WEIGHT = 1e-10, 1e-9, 1e-8  # relative to the largest of a tensor; of a number; of a weight


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    assert one.shape == other.shape
    return float((one - other).abs().max() / one.abs().max().clamp(min=1e-12))


def numbers(value: Any, path: str = "") -> dict[str, float]:
    """Every number in JSON, by where it stands."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in numbers(item, f"{path}/{key}").items()}
    if isinstance(value, list):
        return {k: v for i, item in enumerate(value) for k, v in numbers(item, f"{path}/{i}").items()}
    return {path: float(value)} if isinstance(value, (int, float)) else {}


def logged(run: Path, stage: str) -> dict[str, float]:
    folder = run / "stages" / stage
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return numbers([*lines, json.loads((folder / "result.json").read_text())])


@pytest.fixture(
    params=[
        (2, "ddp"),
        (2, "fsdp"),
        pytest.param((3, "ddp"), marks=pytest.mark.ranks),
        pytest.param((3, "fsdp"), marks=pytest.mark.ranks),
    ],
    ids=lambda pair: f"{pair[1]}-{pair[0]}",
)
def runs(request: Any, in_float64: Callable[..., Path]) -> tuple[Path, Path]:
    """A run on one process, and one on several."""
    ranks, strategy = request.param
    return in_float64(1, "ddp") / "ddp", in_float64(ranks, "ddp", "fsdp") / strategy


def test_gradients_metrics_results_and_weights_are_those_of_one_process(runs, all_kinds) -> None:
    alone, together = runs
    expected, found = (torch.load(run / "gradients.pt") for run in (alone, together))
    assert len(expected) == len(found) == 2 * len(all_kinds)
    for step, (one, other) in enumerate(zip(expected, found, strict=True)):
        assert one[0].dtype == torch.float64
        assert len(one) == len(other), step
        worst = max(apart(a, b) for a, b in zip(one, other, strict=True) if float(a.abs().max()) > 1e-9)
        assert worst < GRADIENT, f"step {step} of all stages: {worst:.1e}"
    for stage in all_kinds:
        before, after = logged(alone, stage), logged(together, stage)
        assert before.keys() == after.keys(), stage
        for name, value in before.items():
            close = math.isclose(value, after[name], rel_tol=NUMBER, abs_tol=NUMBER)
            assert close, f"{stage}{name}: {value} and {after[name]}"
        for path in sorted((alone / "stages" / stage / "model").rglob("*.safetensors")):
            weights = load_file(path)
            others = load_file(together / path.relative_to(alone))
            assert weights.keys() == others.keys()
            for name, tensor in weights.items():
                gap = float((tensor - others[name]).abs().max())
                assert gap < WEIGHT, f"{stage}, {name}: {gap:.1e}"


def test_files_are_those_that_one_process_leaves(runs, all_kinds) -> None:
    alone, together = runs
    for stage in all_kinds:
        left, other = (
            {
                str(p.relative_to(run))
                for p in (run / "stages" / stage).rglob("*")
                if p.is_file() and p.name != "times.jsonl"
            }
            for run in (alone, together)
        )
        assert left == other
