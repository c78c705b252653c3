"""Made-up runs to look at and to test with: of keel, of TRL, of TensorBoard, and of somebody who means ill.

`python tests/dashboard/made_runs.py DIR` writes some, and goes on with one of them until it is ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import random
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from keel.rundir import worker

PROMPTS = ("My kettle leaks.", "My phone is hot.\nWhat now?", "我的打印机坏了。", "هاتفي لا يعمل")


def ppo_row(step: int, steps: int, draw: random.Random) -> dict[str, float]:
    """A step of PPO with the metrics that keel writes."""
    t = step / steps
    noise = draw.gauss
    score, kl = 1.2 * t - 0.4 + noise(0, 0.15), 7 * (1 - math.exp(-5 * t)) + noise(0, 0.4)
    entropy = 0.5 - 0.25 * t + noise(0, 0.01)
    return {
        "step": step, "objective/kl": kl, "objective/kl_exact": abs(kl), "objective/kl_coef": 0.1 - 0.05 * t,
        "objective/entropy": 12 * entropy, "objective/non_score_reward": -0.1 * kl,
        "objective/rlhf_reward": score - 0.1 * kl, "objective/scores": score,
        "objective/scores_std": 1.0 + noise(0, 0.05), "val/num_eos_tokens": 128.0, "rollout/episodes": 128.0,
        "rollout/response_length": 32 + 8 * t + noise(0, 1.5), "rollout/truncated": abs(noise(0, 0.01)),
        "rollout/sampler_drift": 1e-7, "rollout/repetition": 0.01, "rollout/length_correlation": 0.2,
        "rewards/reward/applies": 1.0, "rewards/reward/mean": score, "rewards/reward/std": 1.0,
        "val/explained_variance": 0.5 * t + noise(0, 0.05), "loss/value_avg": 0.2, "val/clipfrac_avg": 0.0,
        "policy/clipfrac_avg": abs(0.03 * (1 - t) + noise(0, 0.004)), "policy/approxkl_avg": 1e-4,
        "policy/approxkl_k3": 1e-4, "policy/entropy_avg": entropy, "loss/policy_avg": noise(0, 0.004),
        "val/ratio": 1.0, "val/ratio_var": 1e-4, "grad_norm": 0.4 + abs(noise(0, 0.1)), "lr": 1e-4 * (1 - t),
        "policy/epochs": 2.0, "policy/logp_mismatch": 3e-6, "val/ratio_first": 1.0,
        "policy/approxkl_max": 0.05 + abs(noise(0, 0.01)), "policy/lr_factor": 1.0, "episode": 128.0 * step,
    }  # fmt: skip


def times_row(step: int, draw: random.Random) -> dict[str, float]:
    """The times of a step of PPO."""
    phases = {"rollout": 0.8, "forward": 0.25, "score": 0.15, "train": 1.2}
    spent = {name: round(seconds * draw.uniform(0.9, 1.2), 4) for name, seconds in phases.items()}
    rates = {f"{name}/tokens_per_second": 7000 / spent[name] for name in ("rollout", "forward", "train")}
    useful = {f"{name}/useful": draw.uniform(0.85, 0.99) for name in ("rollout", "forward", "train")}
    return {"step": step, **spent, **rates, **useful}


def sample_row(step: int, number: int) -> dict[str, Any]:
    """A reply that was kept."""
    return {
        "step": step, "prompt": PROMPTS[number % len(PROMPTS)],
        "completion": f" Reply {number} of step {step}.", "rewards": {"reward": number / 4 + step / 1000},
        "kl": 1.5, "length": 9, "stop_reason": "eos",
    }  # fmt: skip


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows at the end of a file, as a stage does."""
    with path.open("a", encoding="utf-8") as handle:
        handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def keel_run(
    run: Path,
    steps: int,
    *,
    done: int | None = None,
    seed: int = 0,
    coef: float = 0.1,
    status: str = "done",
    samples: int = 10,
) -> Path:
    """A run of keel with a reward stage and PPO of `steps` updates, of which `done` are done. status: of PPO,
    "done" or anything else for one that is not."""
    done = steps if done is None else done
    draw = random.Random(seed)
    reward: dict[str, Any] = {"kind": "reward", "model": {"path": "x"}, "data": "world:helpdesk/comparisons"}
    ppo = {"kind": "ppo", "model": {"path": "x"}, "reward": "reward", "kl": {"coef": coef, "target": 6.0}}
    config = {"name": run.name, "seed": seed, "stages": {"reward": reward, "ppo": ppo}}
    for name, kind in (("reward", "reward"), ("ppo", "ppo")):
        (run / "stages" / name).mkdir(parents=True)
        (run / "stages" / name / "fingerprint").write_text(f"{name} of {run.name}")
        finished = name == "reward" or status == "done"
        if finished:
            mark = {"kind": kind, "fingerprint": f"{name} of {run.name}", "seconds": 61.5, "rows": 4000}
            facts = {"steps": steps if kind == "ppo" else 50, "peak_memory_mib": 741.2}
            write_json(run / "stages" / name / "stage.json", {**mark, "parameters": 984192, "facts": facts})
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    stages = {
        "reward": {"kind": "reward", "fingerprint": f"reward of {run.name}", "status": "done"},
        "ppo": {"kind": "ppo", "fingerprint": f"ppo of {run.name}", "status": status},
    }
    write_json(
        run / "manifest.json",
        {"name": run.name, "seed": seed, "created": "2026-11-29T02:26:28+00:00", "stages": stages},
    )
    pairs = ({"step": s, "loss": 0.69 - 0.2 * s / 50, "accuracy": 0.5 + 0.3 * s / 50} for s in range(1, 51))
    append(run / "stages" / "reward" / "metrics.jsonl", pairs)
    write_json(run / "stages" / "reward" / "result.json", {"accuracy": interval(0.81)})
    folder = run / "stages" / "ppo"
    write_json(folder / "progress.json", {"steps": steps})
    append(folder / "metrics.jsonl", (ppo_row(step, steps, draw) for step in range(1, done + 1)))
    append(folder / "times.jsonl", (times_row(step, draw) for step in range(1, done + 1)))
    kept = [1, *(step for step in range(1, done + 1) if step % max(steps // samples, 1) == 0)]
    append(folder / "samples.jsonl", (sample_row(step, n) for step in sorted(set(kept)) for n in range(4)))
    if status == "done":
        write_json(folder / "result.json", {"scores": interval(0.82), "kl": interval(6.6)})
    return run


def interval(value: float) -> dict[str, float]:
    """A measure."""
    return {"mean": value, "low": value - 0.03, "high": value + 0.03, "n": 256}


def write_json(path: Path, value: object) -> None:
    """Write JSON."""
    path.write_text(json.dumps(value), encoding="utf-8")


def trl_run(run: Path, steps: int, *, at_end: bool = False) -> Path:
    """A run of TRL's GRPO: checkpoints, the last one with the whole history, and replies in Parquet."""
    import pyarrow as pa
    from pyarrow import parquet

    draw = random.Random(steps)
    history: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        values = {"reward": step / steps + draw.gauss(0, 0.1), "reward_std": 0.5, "kl": 0.01 * step / steps}
        lengths = {"completions/mean_length": 60.0, "completions/clipped_ratio": 0.0}
        at = {"step": step, "epoch": step / steps}
        history.append({**at, "loss": 0.1, "grad_norm": 0.3, **values, **lengths})
        if step % 10 == 0:
            history.append({**at, "eval_reward": step / steps})
    for last in (steps // 2, steps):
        place = run / f"checkpoint-{last}"
        place.mkdir(parents=True)
        rows = [row for row in history if row["step"] <= last]
        write_json(place / "trainer_state.json", {"max_steps": steps, "log_history": rows})
    if at_end:
        write_json(run / "trainer_state.json", {"max_steps": steps, "log_history": history})
    (run / "completions").mkdir()
    for step in (1, steps):
        table = {
            "step": [step] * 2, "prompt": list(PROMPTS[:2]), "completion": [f"a{step}", f"b{step}"],
            "accuracy_reward": [0.0, 1.0], "advantage": [-1.0, 1.0],
        }  # fmt: skip
        parquet.write_table(pa.table(table), run / "completions" / f"completions_{step:05d}.parquet")
    return run


def events_run(run: Path, steps: int) -> Path:
    """Event files of TensorBoard, written by its own package."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run))
    for step in range(1, steps + 1):
        writer.add_scalar("train/loss", 2.0 / step, step)
        writer.add_scalar("reward", step / steps, step)
    writer.add_text("note", "<script>alert(1)</script>", 1)
    writer.close()
    return run


def foul_run(run: Path) -> Path:
    """A run whose every text is markup, with broken lines, and a stage whose name leads elsewhere."""
    bad = '<img src=x onerror="window.hurt=1"><script>window.hurt=1</script>'
    keel_run(run, 20)
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    config |= {"name": bad, "description": f"{bad}%{{x}}"}
    config["stages"]["../../elsewhere"] = {"kind": "sft"}
    config["stages"]["odd"] = {"kind": bad, "model": bad}
    (run / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    folder = run / "stages" / "ppo"
    append(folder / "metrics.jsonl", [{"step": 21, bad: 1.0, "nested": {"a": 1}, "text": bad, "flag": True}])
    with (folder / "metrics.jsonl").open("ab") as handle:
        handle.write(b'{"step": 22, "objective/scores": \n\xff\xfe not json\n[1, 2]\n')
        handle.write(b"[" * 100000 + b"\n")
        handle.write(b'{"step": 23, "objective/scores": NaN, "objective/kl": 1e999}\n{"step": 24, "half')
    texts = {"evidence": bad, "cause": bad, "remedy": bad, "check": bad, "severity": bad}
    append(folder / "events.jsonl", [{"step": 3, "event": "finding", **texts}, {"step": 4, "event": bad}])
    reply = {"step": 30, "prompt": [{"role": bad, "content": bad}], "completion": bad, "rewards": {bad: 1.0}}
    append(folder / "samples.jsonl", [{**reply, "stop_reason": bad}])
    write_json(folder / "result.json", {"scores": bad, "models": 7})
    odd = {"accuracy": [1], "reward_model": {"calibration": 3}}
    write_json(run / "stages" / "reward" / "result.json", odd)
    return run


@contextlib.contextmanager
def at_work(run: Path) -> Iterator[None]:
    """A run whose process is this one, in its stage ppo."""
    with (run / worker.LOCK).open("a+", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        worker.sign(lock)
        (run / "stages" / "ppo" / "fingerprint").touch()
        yield


def go_on(run: Path, steps: int, seconds: float) -> None:
    """Work in a run as its process does: a step each `seconds`."""
    draw, folder = random.Random(7), run / "stages" / "ppo"
    done = sum(1 for _ in (folder / "metrics.jsonl").open(encoding="utf-8"))
    with at_work(run):
        for step in range(done + 1, steps + 1):
            append(folder / "metrics.jsonl", [ppo_row(step, steps, draw)])
            append(folder / "times.jsonl", [times_row(step, draw)])
            if step % 10 == 0:
                append(folder / "samples.jsonl", [sample_row(step, n) for n in range(4)])
            time.sleep(seconds)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for group in ("ppo-low-kl", "ppo-high-kl"):
        for seed in range(3):
            steps, coef = (300, 0.1) if group == "ppo-low-kl" else (240, 0.02)
            keel_run(folder / f"{group}-seed{seed}", steps, seed=seed, coef=coef)
    trl_run(folder / "trl-grpo", 200)
    events_run(folder / "tensorboard-sft", 150)
    foul_run(folder / "odd")
    keel_run(folder / "cut-off", 300, done=120, status="running")
    live = keel_run(folder / "live", 400, done=150, status="running")
    event = {"step": 60, "event": "finding", "check": "kl_too_high", "severity": "act"}
    said = {"evidence": "median KL of the last 10 updates 17.1 nats (target 6, limit 15)"}
    why = {"cause": "the policy moves faster than β holds it", "remedy": "raise kl.coef, or lower lr"}
    append(live / "stages" / "ppo" / "events.jsonl", [{**event, **said, **why}])
    went = {"step": 61, "event": "rollback", "checks": ["kl_too_high"], "to": 50}
    append(live / "stages" / "ppo" / "events.jsonl", [{**went, "kl_coef": 0.15, "lr_factor": 0.5}])
    go_on(live, 400, float(sys.argv[2]) if len(sys.argv) > 2 else 1.0)
