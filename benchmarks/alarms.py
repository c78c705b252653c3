"""Alarms and control on small runs: `python benchmarks/alarms.py [--control warn|rollback] [--only
healthy|sick] [--list]`.

Twenty healthy runs of PPO on the help desk (seeds, learning rates, KL targets) and twenty sick ones: learning
rate × 30, no KL, a reward model of people who only count words, length paid and no penalty for a missing
stop, a sampler at another temperature than the trainer's, reward × 100 without a scale. `desired_kl`, which
would hold most of these back, is off in the sick ones (`--limit` leaves it on). All start from one base, SFT
and reward model. A gold reward judges each while it runs.

Prints, for each, the first finding of severity "act", the update of the gold peak, the gold reward at the
end, at its best and of the SFT model, all on the same prompts; then false alarms, sick runs found, and how
far control kept the end from the best. What is done already is not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from keel.config import parse, read
from keel.diagnosis import logs
from keel.errors import KeelError
from keel.pipeline.pipeline import Pipeline, resolved
from keel.rollout import GenerationRequest, KeelEngine
from keel.worlds import helpdesk

RECIPE = Path(__file__).parents[1] / "recipes" / "helpdesk.yaml"
PROMPTS = {"source": "world:helpdesk/test_prompts", "rows": 64}
BIASED_PAIRS = 3000
NEAR = 0.03  # of the best gold reward: as good as kept
ROUNDING = 1e-3  # the same weights and draws twice
OTHER_TEMPERATURE = 0.6


class Case(NamedTuple):
    name: str
    sick: bool
    seed: int
    changes: Mapping[str, Any]  # of the ppo stage
    temperature: float | None = None  # the sampler's, where it is not the trainer's


class Outcome(NamedTuple):
    case: Case
    alarm: tuple[int, str] | None  # update and check of the first finding of severity act
    peak: int  # update of the highest gold reward; 0: what it started from
    best: float
    start: float  # of what it started from, on the same prompts with the same draws
    end: float | None  # None: the run ended with an error


def cases(limit: bool = False) -> list[Case]:
    """limit: `desired_kl` is left on in the sick ones."""
    lr, kl = 4.0e-4, {"coef": 0.1, "target": 6.0, "horizon": 100}
    healthy = [
        Case(
            f"healthy-{rate:g}-{target:g}-{seed}",
            False,
            seed,
            {"lr": rate * lr, "kl": {**kl, "target": target}},
        )
        for seed in range(5)
        for rate, target in ((1.0, 6.0), (0.5, 6.0), (1.0, 3.0), (0.5, 10.0))
    ]
    free = {"coef": 0.0}
    long = {"kind": "length", "low": 72, "high": 72, "slack": 72, "weight": 10.0}
    learned = {"kind": "learned", "model": "reward"}
    sick: list[tuple[str, int, Mapping[str, Any], float | None]] = [
        ("lr-x30", 4, {"lr": 30 * lr}, None),
        ("no-kl", 4, {"lr": 2 * lr, "kl": free}, None),
        ("biased", 3, {"reward": "biased", "lr": 2 * lr, "kl": free}, None),
        (
            "broken-stop",
            3,
            {
                "reward": [learned, long],
                "shaping": {"center": "prompt", "missing_stop_penalty": 0.0},
                "kl": free,
            },
            None,
        ),
        ("temperature", 3, {}, OTHER_TEMPERATURE),
        (
            "reward-x100",
            3,
            {
                "reward": [{**learned, "weight": 100.0}],
                "shaping": {"normalize": "none"},
                "whiten_advantages": False,
            },
            None,
        ),
    ]
    return healthy + [
        Case(f"{name}-{seed}", True, seed, changes if limit else {**changes, "desired_kl": None}, temperature)
        for name, count, changes, temperature in sick
        for seed in range(count)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--control", default="warn", choices=["warn", "adjust", "rollback", "stop"])
    parser.add_argument("--runs", type=Path, default=Path("runs/alarms"))
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--only", choices=["healthy", "sick"], help="half of the cases")
    parser.add_argument("--list", action="store_true", help="name the cases and end")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the recipe, dotted.key=value")
    parser.add_argument("--limit", action="store_true", help="leave desired_kl on in the sick runs")
    settings = parser.parse_args()
    chosen = [
        case for case in cases(settings.limit) if settings.only in (None, "sick" if case.sick else "healthy")
    ]
    if settings.list:
        print("\n".join(case.name for case in chosen))
        return
    shared = prepare(settings)
    print(
        f"{'run':<20} {'first alarm':<28} {'gold peak':>9} {'SFT':>6} {'best':>6} {'end':>6}",
        flush=True,
    )
    found = []
    for case in chosen:
        found.append(outcome := run(case, settings, shared))
        alarm = f"{outcome.alarm[0]} {outcome.alarm[1]}" if outcome.alarm else "–"
        end = "error" if outcome.end is None else f"{outcome.end:.3f}"
        print(
            f"{case.name:<20} {alarm:<28} {outcome.peak:>9} {outcome.start:>6.3f} {outcome.best:>6.3f}"
            f" {end:>6}",
            flush=True,
        )
    print("\n".join(summary(found)))


def prepare(settings: argparse.Namespace) -> Path:
    """Base, SFT and reward models that all cases share; the stages' folder."""
    settings.runs.mkdir(parents=True, exist_ok=True)
    pairs = settings.runs / "biased.jsonl"
    if not pairs.exists():
        pairs.write_text(
            "".join(json.dumps(row) + "\n" for row in biased_pairs(BIASED_PAIRS)), encoding="utf-8"
        )
    recipe = read(RECIPE, settings.set)
    stages = resolved(recipe)["stages"]
    kept = {name: stages[name] for name in ("base", "sft", "reward")}
    kept["biased"] = {**stages["reward"], "data": str(pairs)}
    tree = {"name": "shared", "threads": settings.threads, "dtype": recipe.dtype, "stages": kept}
    Pipeline(parse(tree), settings.runs / "shared", print).run()
    return settings.runs / "shared" / "stages"


def biased_pairs(count: int) -> Iterator[dict[str, Any]]:
    """Comparisons by somebody who prefers the longer reply nine times of ten, whatever it says."""
    for index, row in enumerate(helpdesk.rows("comparisons", count, 1)):
        sides = sorted((row["chosen"], row["rejected"]), key=lambda side: len(side[0]["content"].split()))
        longer = random.Random(index).random() < 0.9
        yield {"prompt": row["prompt"], "chosen": sides[longer], "rejected": sides[not longer]}


def run(case: Case, settings: argparse.Namespace, shared: Path) -> Outcome:
    """One case, with what it came to."""
    tree = tree_of(case, settings, shared)
    directory = settings.runs / (settings.control + "-limit" * (settings.limit and case.sick)) / case.name
    pipeline = Pipeline(parse(tree), directory, lambda line: None)
    failed = False
    with sampled_at(case.temperature):
        try:
            pipeline.run()
        except KeelError:
            failed = True  # numbers that are none: an alarm of its own
    folder = directory / "stages" / "ppo"
    alarms = [
        f
        for f in logs.stage(folder, resolved(pipeline.config)["stages"]["ppo"]).findings
        if f.severity == "act"
    ]
    rows = logs.lines(folder / "metrics.jsonl")
    judged = {row["step"]: row["eval/judge"] for row in rows if "eval/judge" in row}
    peak = max(judged, key=lambda step: judged[step])
    end = None if failed else json.loads((folder / "result.json").read_text())["judge"]["mean"]
    first = min(alarms, key=lambda finding: finding.step, default=None)
    return Outcome(case, (first.step, first.check) if first else None, peak, judged[peak], judged[0], end)


def tree_of(case: Case, settings: argparse.Namespace, shared: Path) -> dict[str, Any]:
    """The config of a case: the recipe's PPO, smaller, judged as it runs, and changed."""
    whole = read(RECIPE, settings.set)
    recipe = resolved(whole)["stages"]["ppo"]
    stage = recipe | {
        "model": str(shared / "sft" / "model"),
        "updates": settings.updates,
        "batch_size": 64,
        "mini_batch": 16,
        "samples_per_prompt": 4,
        "eval_every": 3,
        "eval_data": PROMPTS,
        "judge": "world:helpdesk",
        "control": settings.control,
    }
    changes = dict(case.changes)
    shaping = changes.pop("shaping", {})
    stage |= {
        **changes,
        "shaping": {**recipe["shaping"], **shaping, **({"clip": None} if "normalize" in shaping else {})},
    }
    stage["reward"] = [_located(term, shared) for term in _listed(stage["reward"])]
    common = {"seed": case.seed, "threads": settings.threads, "dtype": whole.dtype}
    return {"name": case.name, **common, "stages": {"ppo": stage}}


@contextlib.contextmanager
def sampled_at(temperature: float | None) -> Iterator[None]:
    """A sampler at another temperature than the trainer's; None: as it is."""
    generate = KeelEngine.generate

    def other(engine: KeelEngine, request: GenerationRequest, count: Any = None) -> Any:
        sampling = replace(request.sampling, temperature=temperature)
        return generate(engine, replace(request, sampling=sampling), count)

    with mock.patch.object(KeelEngine, "generate", generate if temperature is None else other):
        yield


def _listed(terms: Any) -> list[Any]:
    return terms if isinstance(terms, list) else [{"kind": "learned", "model": terms}]


def _located(term: Mapping[str, Any], shared: Path) -> dict[str, Any]:
    """A reward model of the shared run by its place."""
    model = term.get("model")
    return (
        {**term, "name": term.get("name") or model, "model": str(shared / model / "model")}
        if model
        else dict(term)
    )


def summary(found: list[Outcome]) -> list[str]:
    """The counts that the table comes to."""
    healthy, sick = ([o for o in found if o.case.sick is ill] for ill in (False, True))
    seen = [o for o in sick if o.alarm]
    delays = sorted(o.alarm[0] - o.peak for o in seen if o.alarm)
    early = sum(delay <= 0 for delay in delays)
    kept = [o for o in sick if o.end is not None and o.end >= o.best - NEAR]
    below = [o for o in sick if o.end is None or o.end < o.start - ROUNDING]
    return [
        "",
        f"false alarms: {sum(o.alarm is not None for o in healthy)} of {len(healthy)} healthy runs",
        f"found: {len(seen)} of {len(sick)} sick runs; {early} at the gold peak or before,"
        f" {len(seen) - early} after, {len(sick) - len(seen)} never; updates from the peak to the alarm:"
        f" {', '.join(map(str, delays))}",
        f"gold at the end within {NEAR} of the best evaluation: {len(kept)} of {len(sick)};"
        f" below the SFT model's: {len(below)} ({', '.join(o.case.name for o in below) or 'none'})",
    ]


if __name__ == "__main__":
    main()
