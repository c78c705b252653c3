"""That each part of `benchmarks/gpu.py` runs, on the CPU and tiny."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch

from keel.accel import decode_graphs

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch, script):
    """The script, with sides that take a second a step, and keel's own where `really` is set."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = sys.modules.copy()
    module = script("gpu")
    measured = module.peers.measured

    def taken(python, kind, side, *given, **named):
        if side == "keel" and module.really:
            return measured(python, kind, side, *given, **named)
        module.asked.append((kind, side, named))
        return {"seconds": 1.0, "memory": 100.0, "floor": 0.5, "steps": 2}

    module.really, module.asked = False, []

    monkeypatch.setattr(module.peers, "measured", taken)
    monkeypatch.setattr(decode_graphs, "recorder", decode_graphs.recorder)
    module.peers.STEPS.update(dict.fromkeys(module.peers.STEPS, 2))
    with warnings.catch_warnings():
        yield module
    for name in ("peers", "engine", "gpu_several"):
        sys.modules.pop(name) if name not in before else None


def run(gpu, monkeypatch, *arguments: str) -> int:
    threads = str(torch.get_num_threads())
    asked = ["gpu.py", "--device", "cpu", "--tiny", "--pairs", "1", "--threads", threads, *arguments]
    monkeypatch.setattr(sys, "argv", asked)
    return gpu.main()


def test_the_pairs_are_those_of_peers_with_its_settings(gpu, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "KINDS", ("sft",))
    assert run(gpu, monkeypatch, "--parts", "peers", "--peer", "python-with-trl") == 0
    assert "pairs: 1.00" in capsys.readouterr().out
    usual = {"device": "cpu", "peer_rows": gpu.peers.MICRO, "rows": gpu.peers.MICRO, "bf16": False}
    assert gpu.asked == [("sft", "trl", usual), ("sft", "keel", usual)]


def test_what_would_begin_too_late_is_left_out_and_said(gpu, monkeypatch, capsys):
    assert run(gpu, monkeypatch, "--minutes", "0", "--peer", "python-with-trl") == 0
    assert capsys.readouterr().out.count("left out: 0 minutes are over") == len(gpu.PARTS)


def test_ranks_that_compute_something_else_are_not_right(gpu, monkeypatch, capsys):
    one = [{"loss": 1.0, "grad_norm": 2.0}, {"loss": 0.9, "grad_norm": 1.9}]
    other = [{"loss": 1.0, "grad_norm": 2.0}, {"loss": 0.9, "grad_norm": 1.8}]
    found = iter([(one, 1.0), (one, 0.6), (other, 0.6)])
    monkeypatch.setattr(gpu.gpu_several, "KINDS", ("sft",))
    monkeypatch.setattr(gpu.gpu_several, "_run", lambda *given: next(found))
    assert run(gpu, monkeypatch, "--parts", "ranks") == 1
    assert capsys.readouterr().out.count("IS ABOVE") == 1


def test_steps_that_are_missing_are_a_difference(gpu):
    assert gpu.gpu_several._differs([{"loss": 1.0}], []) == float("inf")


@pytest.mark.slow
def test_every_part_runs(gpu, monkeypatch, capsys):
    gpu.really = True
    assert run(gpu, monkeypatch, "--peer", "python-with-trl", "--ppo-peer", "folder-with-trl") == 0
    said = capsys.readouterr().out
    assert "IS ABOVE" not in said
    for kind in gpu.KINDS:
        assert f"\n{kind} " in said


def test_help_lists_the_parts(gpu):
    lines = gpu.__doc__.splitlines()
    assert [line.split()[0] for line in lines if line[:1].islower() and line[12:13] == " "] == list(gpu.PARTS)
