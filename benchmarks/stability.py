"""PPO over seeds and learning rates: `python benchmarks/stability.py [CONFIG] [--seeds 0,1,2,3,4] [key=value …]`.

Runs `keel sweep CONFIG STAGE.lr=…` with a quarter, one, four and eight times the config's own learning rate, and counts the points that
ended with an error (NaN among them), that diverged (KL above ten times its target), or that left gold below the SFT model's.
What is done already is not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from keel.config import read

FACTORS = (0.25, 1, 4, 8)
DIVERGED = 10  # times the target


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "config", nargs="?", type=Path, default=Path(__file__).parents[1] / "recipes" / "helpdesk.yaml"
    )
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--stage", default="ppo")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--jobs", default="1")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    settings = parser.parse_args()
    stage = read(settings.config, settings.overrides).stages[settings.stage]
    rates = ",".join(f"{factor * stage.lr:g}" for factor in FACTORS)  # pyright: ignore[reportAttributeAccessIssue]
    command = [
        sys.executable, "-m", "keel.cli", "sweep", str(settings.config), *settings.overrides, f"{settings.stage}.lr={rates}",
        "--seeds", settings.seeds, "--jobs", settings.jobs, "--runs", str(settings.runs), "--name", "stability", "--json",
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, 1):
        sys.exit(done.returncode)
    target = stage.kl.target  # pyright: ignore[reportAttributeAccessIssue]
    counts = {"sound": 0, "failed": 0, "diverged": 0, "below SFT": 0}
    for point in json.loads(done.stdout)["points"]:
        verdict, kl, gold = judge(point, settings.stage, target)
        counts[verdict] += 1
        print(f"{point['name']:<28} {verdict:<10} KL {kl:>8} gold {gold}")
    print(", ".join(f"{name}: {count}" for name, count in counts.items()))


def judge(point: dict[str, object], stage: str, target: float | None) -> tuple[str, str, str]:
    """(what became of it, its KL, its gold reward → from SFT's)."""
    if point["status"] != "done":
        return "failed", "–", str(point["error"])
    results = [json.loads(path.read_text()) for path in Path(str(point["run"])).glob("stages/*/result.json")]
    result = next(found for found in results if stage in found.get("models", {}))
    own, before = result["models"][stage], result["models"][result["reference"]]
    kl, gold, sft = own["kl"]["mean"], own["gold"]["mean"], before["gold"]["mean"]
    far = target is not None and kl > DIVERGED * target
    return (
        "diverged" if far else "below SFT" if gold < sft else "sound",
        f"{kl:.1f}",
        f"{sft:.3f} → {gold:.3f}",
    )


if __name__ == "__main__":
    main()
