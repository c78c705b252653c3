"""How much of a PPO policy's gold reward a student reaches on the help desk, with a tenth of PPO's samples.

    keel run helpdesk
    python benchmarks/distill.py runs/helpdesk

The teacher is the run's `ppo`, which saw 35 × 128 samples and a reward model. The students have 14 × 32
samples and neither: `same` begins as PPO began, as the run's `sft`; `small` is half as wide and half as deep,
pretrained and fine-tuned like the base but on its teacher's tokenizer. The learning rate is the one of
`RATES` whose student is nearest to the teacher on 64 prompts of the training split; the gold reward is not
looked at until then. `ppo_tenth` is PPO itself with as many samples. Prints the gold reward on 256 test
prompts with 95 % intervals, and the share of the teacher's.
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


def student(start: str, teacher: str, rate: float) -> dict[str, Any]:
    """A distill stage."""
    return {
        "kind": "distill", "model": start, "teacher": teacher, "data": PROMPTS, "lr": rate,
        "updates": UPDATES,
        "batch_size": BATCH, "sampling": SAMPLING, "eval_every": UPDATES,
        "eval_data": {"source": "world:helpdesk/prompts", "rows": 64},
    }  # fmt: skip


def stages(run: Path, small: bool) -> dict[str, Any]:
    """Everything but the judge, by name."""
    of_run = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["stages"]
    place = {name: str(run / "stages" / name / "model") for name in ("base", "sft", "reward", "ppo")}
    found = {f"same-{i}": student(place["sft"], place["ppo"], rate) for i, rate in enumerate(RATES)}
    ppo = {key: value for key, value in of_run["ppo"].items() if key != "model"}
    found["ppo_tenth"] = {
        **ppo, "model": place["sft"], "reward": place["reward"], "updates": UPDATES, "batch_size": BATCH,
        "mini_batch": 16, "micro_batch": 16,
    }  # fmt: skip
    if small:
        init = {**of_run["base"]["model"]["init"], "hidden_size": 64, "intermediate_size": 192}
        model = {"init": {**init, "num_hidden_layers": 2}, "tokenizer": place["base"]}
        found["small-base"] = {**of_run["base"], "model": model}
        found["small"] = {**of_run["sft"], "model": "small-base"}
        found |= {f"small-{i}": student("small", place["ppo"], rate) for i, rate in enumerate(RATES)}
    return found


def nearest(run: Path, prefix: str) -> str:
    """The student whose held-out KL from the teacher is the lowest."""
    kls: dict[str, float] = {}
    for i in range(len(RATES)):
        lines = (run / "stages" / f"{prefix}-{i}" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        kls[f"{prefix}-{i}"] = json.loads(lines[-1])["eval/objective/kl"]
    print({name: round(value, 2) for name, value in kls.items()})
    return min(kls, key=lambda name: kls[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="directory of a finished run of the recipe helpdesk")
    parser.add_argument(
        "--small", action="store_true", help="also a smaller student, which is pretrained first"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/distill-bench"))
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    run = asked.run.resolve()
    trained = stages(run, asked.small)
    head = {"name": "distill-bench", "seed": asked.seed, "threads": 1, "device": "cpu", "dtype": "float32"}
    Pipeline(parse({**head, "stages": trained}), asked.out, print).run()
    chosen = [nearest(asked.out, name) for name in ("same", *(["small"] if asked.small else []))]
    models = [str(run / "stages" / name / "model") for name in ("sft", "ppo")]
    models += ["ppo_tenth", *(["small"] if asked.small else []), *chosen]
    judge = {
        "kind": "evaluate", "models": models, "gold": "world:helpdesk", "sampling": SAMPLING,
        "data": {"source": "world:helpdesk/test_prompts", "rows": 256},
    }  # fmt: skip
    Pipeline(parse({**head, "stages": {**trained, "judge": judge}}), asked.out, print).run()
    result = json.loads((asked.out / "stages" / "judge" / "result.json").read_text(encoding="utf-8"))[
        "models"
    ]
    teacher = result[models[1]]["gold"]["mean"]
    for name, found in result.items():
        gold = found["gold"]
        shown = Path(name).parent.name if "/" in name else name
        interval = f"{gold['mean']:.3f} ({gold['low']:.3f} to {gold['high']:.3f})"
        print(f"{shown:>10}  gold {interval}  {gold['mean'] / teacher:.0%} of the teacher's")


if __name__ == "__main__":
    main()
