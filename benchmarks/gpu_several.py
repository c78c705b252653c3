"""What `gpu.py` looks at beyond one process: several ranks, and a vLLM server. Each is `keel run` as a person
types it, compared with one process of the same device."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import peers
import torch
import yaml

WAYS = ("ddp", "fsdp", "fsdp, offload")
KINDS = ("sft", "grpo", "ppo")
STEPS = 3
AGREED = 1e-3  # relative, where above 1: the sums of other orders, in float32
DRIFT = {"float32": 1e-3, "auto": 5e-2}  # nats a token between a server and the trainer
COMPARED = ("loss", "loss/policy_avg", "loss/value_avg", "objective/kl", "grad_norm")
PHASES = ("rollout", "forward", "score", "train")


def ranks(device: torch.device, size: str) -> bool:
    """The first steps of stages on two ranks against those of one process, in float32; whether all agree. A
    line a stage and strategy: the largest difference of its metrics, and seconds of a step."""
    cards = torch.cuda.device_count() if device.type == "cuda" else os.cpu_count() or 1
    if cards < 2:
        print("left out: there is one card")
        return True
    right = True
    print(f"{'':<24}{'differs':>10}{'s a step':>10}{'one':>8}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        peers.prepare(folder, size)
        for kind in KINDS:
            exact = {"model": {**peers.keel_stage(kind, folder, device.type)["model"], "dtype": "float32"}}
            alone, one = _run(folder, kind, device, f"{kind}-alone", 1, {}, exact)
            for way in WAYS:
                strategy, _, offload = way.partition(", ")
                if offload and device.type == "cpu":
                    continue  # changes nothing there
                settings: dict[str, Any] = {"strategy": strategy, **({"offload": True} if offload else {})}
                name = f"{kind}-{strategy}{'-offload' if offload else ''}"
                found, two = _run(folder, kind, device, name, 2, settings, exact)
                differs = _differs(alone, found)
                right &= differs <= AGREED
                holds = "" if differs <= AGREED else f"   IS ABOVE {AGREED:g}"
                print(f"{kind + ', ' + way:<24}{differs:>10.2g}{two:>10.2f}{one:>8.2f}{holds}", flush=True)
    return right


def server(device: torch.device, size: str, environment: str | None) -> bool:
    """Two updates of GRPO with a vLLM server on the same card, which sleeps while keel trains; whether its
    log-probabilities stay the trainer's. environment: the folder of an environment that has vLLM."""
    if environment is None:
        print("left out: no --vllm")
        return True
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        peers.prepare(folder, size)
        on_cpu = device.type == "cpu"
        rollout: dict[str, Any] = {"engine": "vllm", "environment": environment, "sleep": not on_cpu}
        if not on_cpu:
            rollout["args"] = ["--gpu-memory-utilization", "0.4"]
        lines, seconds = _run(folder, "grpo", device, "served", 1, {}, {"rollout": rollout})
    drift = max(line["rollout/sampler_drift"] for line in lines)
    limit = DRIFT["float32" if on_cpu else "auto"]
    holds = "holds" if drift <= limit else f"IS ABOVE {limit:g}"
    print(f"drift {drift:.2g} nats a token   {holds}; {seconds:.2f} s a step", flush=True)
    return drift <= limit


def _run(
    folder: Path,
    kind: str,
    device: torch.device,
    name: str,
    count: int,
    distributed: dict[str, Any],
    more: dict[str, Any] | None = None,
) -> tuple[list[dict[str, float]], float]:
    """The metrics of each step, and the median seconds of one. SystemExit with what the run says if it
    fails."""
    config = peers.keel_config(kind, folder, device.type)
    config["stages"]["stage"] |= {
        "updates" if kind in ("ppo", "grpo") else "max_steps": STEPS,
        **(more or {}),
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**config, "distributed": distributed}))
    command = [sys.executable, "-m", "keel", "run", str(path), "--runs", str(folder / "runs"), "--name", name]
    command += ["--nproc", str(count)] if count > 1 else []
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    stage = folder / "runs" / name / "stages" / "stage"
    times = [json.loads(line) for line in (stage / "times.jsonl").read_text().splitlines()]
    seconds = [sum(line.get(phase, 0.0) for phase in PHASES) for line in times[1:] or times]
    metrics = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return metrics, statistics.median(seconds)


def _differs(one: list[dict[str, float]], other: list[dict[str, float]]) -> float:
    """The largest difference of what is compared, relative where it is above 1; infinite where a step is
    missing."""
    if len(one) != len(other):
        return float("inf")
    pairs = [(a[n], b[n]) for a, b in zip(one, other, strict=True) for n in COMPARED if n in a]
    return max(abs(a - b) / max(1.0, abs(a)) for a, b in pairs)
