"""What a start costs, in the processor's seconds and the clock's: `keel run` to the first line of its log,
and commands that train nothing. Each in a new process, one thread; with `--against SRC`, the `src` folder of
another keel, in turns. Where other work goes on, the clock says more than a start takes.

    python benchmarks/startup.py --repeats 3 --against ../keel-0.1/src
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

OWN = Path(__file__).resolve().parents[1] / "src"
INIT = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8,
        "num_attention_heads": 4, "max_position_embeddings": 256, "tie_word_embeddings": True}  # fmt: skip
BASE = {"kind": "pretrain", "data": {"source": "world:helpdesk/text", "rows": 400}, "max_length": 96,
        "max_steps": 1, "model": {"vocab_size": 1024, "init": INIT}}  # fmt: skip
DPO = {"kind": "dpo", "data": {"source": "world:helpdesk/comparisons", "rows": 64}, "batch_size": 16,
       "max_steps": 1}  # fmt: skip
# ends where the first step is logged, with what the process has used by then on its last line
TO_FIRST_STEP = """
import os, sys
import keel.cli.main as command
shown = command.progress
def progress():
    from keel.rundir.stage_run import StageRun
    log = StageRun.log
    def logged(*arguments, **named):
        log(*arguments, **named)
        used = os.times()
        print(used.user + used.system, flush=True)
        os._exit(0)
    StageRun.log = logged
    return shown()
command.progress = progress
command.main()
"""


Seconds = tuple[float, float]  # the processor's and the clock's


def _keel(source: Path, place: Path, *arguments: str, code: str | None = None) -> tuple[Seconds, str]:
    """Seconds of a command in a new process, and its last line on stdout."""
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, *(["-c", code] if code else ["-m", "keel"]), *arguments]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    clock, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 2):  # 2: a command that is meant to be refused
        raise SystemExit(f"{' '.join(arguments)}: {done.stderr}")
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return (seconds, clock), (done.stdout.splitlines() or [""])[-1]


def measured(source: Path, place: Path) -> dict[str, Seconds]:
    """Seconds by what is started."""
    shutil.rmtree(place / "runs" / "first", ignore_errors=True)
    (_, clock), used = _keel(source, place, "run", "first.yaml", code=TO_FIRST_STEP)
    return {
        "run, to its first step": (float(used), clock),
        "run, refused for a setting": _keel(source, place, "run", "first.yaml", "dpo.lrr=1")[0],
        "plan": _keel(source, place, "plan", "first.yaml")[0],
        "--help": _keel(source, place, "--help")[0],
        "import keel": _keel(source, place, code="import keel")[0],
        "import torch and transformers' Llama": _keel(
            source, place, code="import torch, transformers.models.llama.modeling_llama"
        )[0],
    }


def _prepare(place: Path) -> None:
    """A base model, and the config of the stage that is started on it."""
    (place / "base.yaml").write_text(yaml.safe_dump({"name": "base", "stages": {"base": BASE}}))
    _keel(OWN, place, "run", "base.yaml")
    model = str(place / "runs" / "base" / "stages" / "base" / "model")
    first = {"name": "first", "stages": {"dpo": {**DPO, "model": model}}}
    (place / "first.yaml").write_text(yaml.safe_dump(first))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--against", type=Path, help="the src folder of another keel")
    options = parser.parse_args()
    sources = {"keel": OWN, **({"other": options.against.resolve()} if options.against else {})}
    found: dict[str, list[dict[str, Seconds]]] = {name: [] for name in sources}
    with tempfile.TemporaryDirectory() as folder:
        _prepare(Path(folder))
        for _ in range(options.repeats):
            for name, source in sources.items():
                found[name].append(measured(source, Path(folder)))
    print("seconds of the processor (each), and by the clock")
    for what in found["keel"][0]:
        cells = [cell(name, [row[what] for row in rows]) for name, rows in found.items()]
        print(f"{what:<38} {'   '.join(cells)}")


def cell(name: str, seconds: list[Seconds]) -> str:
    """Medians of one side, with each of the processor's."""
    processor, clock = (statistics.median(times) for times in zip(*seconds, strict=True))
    each = ", ".join(f"{used:.2f}" for used, _ in seconds)
    return f"{name} {processor:.2f} ({each}), clock {clock:.2f}"


if __name__ == "__main__":
    main()
