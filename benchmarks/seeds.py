"""One config over several seeds: `python benchmarks/seeds.py helpdesk --seeds 0 1 2`.

Runs `keel run CONFIG seed=S --name NAME-S` for each seed (what is done already is not run again) and prints, for every
model of the evaluate stage, each seed's measures, and their mean with a 95 % interval over seeds (Student's t).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    settings = parser.parse_args()
    judged, seconds = [], []
    for seed in settings.seeds:
        name = f"{Path(settings.config).stem}-{seed}"
        command = [
            sys.executable,
            "-m",
            "keel.cli",
            "run",
            settings.config,
            *settings.overrides,
            f"seed={seed}",
        ]
        subprocess.run(
            [*command, "--runs", str(settings.runs), "--name", name], check=True, stdout=subprocess.DEVNULL
        )
        manifest = json.loads((settings.runs / name / "manifest.json").read_text())
        seconds.append(sum(stage["seconds"] for stage in manifest["stages"].values()))
        stage = next(s for s, facts in manifest["stages"].items() if facts["kind"] == "evaluate")
        judged.append(json.loads((settings.runs / name / "stages" / stage / "result.json").read_text()))
    print("stages took", ", ".join(f"{s:.0f} s" for s in seconds))
    for model in judged[0]["models"]:
        print(model)
        for measure in judged[0]["models"][model]:
            values = [result["models"][model][measure]["mean"] for result in judged]
            print(f"  {measure:<14} {_interval(values)}   seeds: {', '.join(f'{v:.3f}' for v in values)}")
    if "reward_model" in judged[0]:
        print(f"reward model accuracy {_interval([r['reward_model']['accuracy']['mean'] for r in judged])}")


def _interval(values: list[float]) -> str:
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    half = T_975[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.3f} ({mean - half:.3f} to {mean + half:.3f})"


if __name__ == "__main__":
    main()
