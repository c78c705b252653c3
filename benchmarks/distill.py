"""How much of a PPO policy's gold reward a student reaches on the help desk, with a tenth of PPO's samples.

    keel run helpdesk
    python benchmarks/distill.py runs/helpdesk [--small] [--passes N …] [--rates LR …] [--students NAME …]

The teacher is the run's `ppo`, which saw 35 × 128 samples and a reward model. The students have 14 × 32
samples and neither: `same` begins as PPO began, as the run's `sft`; `small` is half as wide and half as deep,
pretrained and fine-tuned like the base but on its teacher's tokenizer. The learning rate and the passes over
each batch are those whose student is nearest to the teacher on 64 prompts of the training split; the gold
reward is not looked at until then. `ppo_tenth` is PPO itself with as many samples. Prints the gold reward on
256 test prompts with 95 % intervals, and the share of the teacher's.

--start MODEL: a small model that is there already, so that only what is sampled differs between seeds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from keel.config import parse
from keel.pipeline.pipeline import Pipeline

RATES = (4e-4, 1e-3, 2e-3)
UPDATES, BATCH = 14, 32
PROMPTS = {"source": "world:helpdesk/prompts", "rows": 4000}
SAMPLING = {"max_new_tokens": 72}


def student(start: str, teacher: str, rate: float, passes: int) -> dict[str, Any]:
    """A distill stage."""
    return {
        "kind": "distill", "model": start, "teacher": teacher, "data": PROMPTS, "lr": rate, "epochs": passes,
        "updates": UPDATES, "batch_size": BATCH, "sampling": SAMPLING, "eval_every": UPDATES,
        "eval_data": {"source": "world:helpdesk/prompts", "rows": 64},
    }  # fmt: skip


def stages(run: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Everything but the judge, by name."""
    of_run = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["stages"]
    place = {name: str(run / "stages" / name / "model") for name in ("base", "sft", "reward", "ppo")}
    tried = [(rate, passes) for passes in asked.passes for rate in asked.rates]
    starts, found = {"same": place["sft"], "small": asked.start or "small"}, dict[str, Any]()
    if "ppo_tenth" in asked.students:
        ppo = {key: value for key, value in of_run["ppo"].items() if key != "model"}
        found["ppo_tenth"] = {
            **ppo, "model": place["sft"], "reward": place["reward"], "updates": UPDATES, "batch_size": BATCH,
            "mini_batch": 16, "micro_batch": 16,
        }  # fmt: skip
    if "small" in asked.students and not asked.start:
        init = {**of_run["base"]["model"]["init"], "hidden_size": 64, "intermediate_size": 192}
        model = {"init": {**init, "num_hidden_layers": 2}, "tokenizer": place["base"]}
        found["small-base"] = {**of_run["base"], "model": model}
        found["small"] = {**of_run["sft"], "model": "small-base"}
    for name in ("same", "small"):
        for rate, passes in tried if name in asked.students else ():
            found[f"{name}-{round(rate * 1e5)}e-5-{passes}"] = student(
                starts[name], place["ppo"], rate, passes
            )
    return found


def nearest(run: Path, trained: dict[str, Any], prefix: str) -> str:
    """The student whose held-out KL from the teacher is the lowest."""
    kls: dict[str, float] = {}
    for name in (name for name in trained if name.startswith(f"{prefix}-") and name != "small-base"):
        lines = (run / "stages" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        kls[name] = json.loads(lines[-1])["eval/objective/kl"]
    print("KL from the teacher, by learning rate and passes:", {n: round(v, 2) for n, v in kls.items()})
    return min(kls, key=lambda name: kls[name])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="directory of a finished run of the recipe helpdesk")
    parser.add_argument(
        "--small", action="store_true", help="also a smaller student, which is pretrained first"
    )
    parser.add_argument("--students", nargs="+", choices=["same", "small", "ppo_tenth"], help="these alone")
    parser.add_argument("--passes", type=int, nargs="+", default=[1], help="over each batch of replies")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--start", help="a small model that is there already")
    parser.add_argument("--out", type=Path, default=Path("runs/distill-bench"))
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    asked.students = asked.students or ["ppo_tenth", "same", *(["small"] if asked.small else [])]
    run, trained = asked.run.resolve(), stages(asked.run.resolve(), asked)
    head = {"name": "distill-bench", "seed": asked.seed, "threads": 1, "device": "cpu", "dtype": "float32"}
    Pipeline(parse({**head, "stages": trained}), asked.out, print).run()
    students = [name for name in ("same", "small") if name in asked.students]
    chosen = [nearest(asked.out, trained, name) for name in students]
    models = [str(run / "stages" / name / "model") for name in ("sft", "ppo")]
    models += [*(["ppo_tenth"] if "ppo_tenth" in trained else []), *(["small"] if "small" in trained else [])]
    judge = {
        "kind": "evaluate", "models": [*models, *chosen], "gold": "world:helpdesk", "sampling": SAMPLING,
        "data": {"source": "world:helpdesk/test_prompts", "rows": 256},
    }  # fmt: skip
    Pipeline(parse({**head, "stages": {**trained, "judge": judge}}), asked.out, print).run()
    path = asked.out / "stages" / "judge" / "result.json"
    result = json.loads(path.read_text(encoding="utf-8"))["models"]
    teacher = result[models[1]]["gold"]["mean"]
    for name, found in result.items():
        gold = found["gold"]
        shown = Path(name).parent.name if "/" in name else name
        interval = f"{gold['mean']:.3f} ({gold['low']:.3f} to {gold['high']:.3f})"
        print(f"{shown:>14}  gold {interval}  {gold['mean'] / teacher:.0%} of the teacher's")


if __name__ == "__main__":
    main()
