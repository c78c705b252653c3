"""Comparisons at the size that people have: how fast they are made ready, in how much memory, and how fast a
second start is.

    python benchmarks/data_size.py --seed hh.jsonl --rows 100000 --model MODEL [--against OTHER_CHECKOUT/src]
        [--peer FOLDER_WITH_TRL]
    python benchmarks/data_size.py --seed hh.jsonl --model MODEL --text-gb 3

The rows are those of the seed file over and over, each prompt with a number of its own, so that no two are
the same. A reward stage takes three steps on them, in a process of its own: `ready` are the seconds from the
start of the stage's run to its first step, imports left out, and `cpu` the processor's seconds in that time,
workers included, which say more where a machine is shared; `again` the same for a second start, after the
first one was killed at its first step; memory is the largest sum of the proportional set sizes (PSS) of the
process and its workers, in MiB, sampled twice a second. The largest resident size of the main process, as
the kernel counts it, stands beside it.
With --against another version of keel starts once on the same rows, before; with --peer TRL's RewardTrainer
does, after, with two processes for its maps: rows that are too long are dropped there, too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CHILD = """
import json, os, resource, sys, time
began = time.time()
from pathlib import Path
from keel.config import RunConfig
from keel.pipeline.pipeline import Pipeline
model, data, directory, steps, stop = sys.argv[1:6]
stage = {"kind": "reward", "model": model, "data": {"source": data, "on_bad": "skip"},
         "max_steps": int(steps), "batch_size": 1, "normalize": 0, "too_long": "skip", "holdout": 0.001}
config = RunConfig.model_validate({"name": "size", "threads": 1, "stages": {"rm": stage}})
imported = time.time()
def processor():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)
before = processor()
def progress(stage, step, steps, metrics):
    if step == 1 and metrics:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        found = {"ready": time.time() - imported, "cpu": processor() - before, "imports": imported - began}
        print(json.dumps({**found, "rss": peak}), flush=True)
        if stop == "kill":
            os.kill(os.getpid(), 9)
Pipeline(config, Path(directory), lambda line: print(line, file=sys.stderr), progress).run()
print(json.dumps({"rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}), flush=True)
"""

# Its cache is in a folder of its own, so that every start is a first one.
PEER = """
import json, resource, sys, time
began = time.time()
from datasets import load_dataset
from transformers import AutoConfig, TrainerCallback
from trl import RewardConfig, RewardTrainer
model, data, directory, steps, stop = sys.argv[1:6]
imported = time.time()
def processor():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)
before = processor()
class First(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            found = {"ready": time.time() - imported, "cpu": processor() - before}
            print(json.dumps({**found, "imports": imported - began}), flush=True)
settings = RewardConfig(output_dir=directory, max_steps=int(steps), per_device_train_batch_size=1,
    use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no",
    disable_tqdm=True, dataset_num_proc=2, dataloader_pin_memory=False,
    max_length=AutoConfig.from_pretrained(model).max_position_embeddings)
rows = load_dataset("json", data_files=data, split="train", cache_dir=directory + "/cache")
rows = rows.select_columns(["prompt", "chosen", "rejected"])
RewardTrainer(model=model, args=settings, train_dataset=rows, callbacks=[First()]).train()
print(json.dumps({"rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}), flush=True)
"""

TEXT = """
import json, resource, sys, time
began = time.time()
from pathlib import Path
from keel.config import RunConfig
from keel.pipeline.pipeline import Pipeline
model, data, directory, steps, stop = sys.argv[1:6]
size = {"max_steps": 50, "batch_size": 4, "max_length": 128}
stage = {"kind": "pretrain", "model": model, "data": data, **size}
config = RunConfig.model_validate({"name": "size", "threads": 1, "stages": {"base": stage}})
imported = time.time()
def progress(stage, step, steps, metrics):
    if step == 1 and metrics:
        print(json.dumps({"ready": time.time() - imported, "imports": imported - began}), flush=True)
Pipeline(config, Path(directory), lambda line: print(line, file=sys.stderr), progress).run()
print(json.dumps({"rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}), flush=True)
"""


def text_folder(seed: Path, size: float, folder: Path) -> None:
    """`size` GB of the seed file's conversations, each with a number of its own."""
    folder.mkdir()
    given = [json.loads(line) for line in seed.read_text(encoding="utf-8").splitlines()]
    number = 0
    for file in range(round(size * 10)):
        with (folder / f"{file:03}.jsonl").open("w", encoding="utf-8") as handle:
            while handle.tell() < 10**8:
                for row in given:
                    number += 1
                    handle.write(
                        json.dumps({"text": f"case {number}: {row['prompt']}{row['chosen']}"}) + "\n"
                    )


def rows_file(seed: Path, rows: int, path: Path) -> None:
    """The rows of the seed file over and over, each with a number in its prompt."""
    given = [json.loads(line) for line in seed.read_text(encoding="utf-8").splitlines()]
    with path.open("w", encoding="utf-8") as handle:
        for number in range(rows):
            row = given[number % len(given)]
            prompt = row["prompt"].replace("\n\nAssistant:", f" (case {number})\n\nAssistant:", 1)
            handle.write(json.dumps({**row, "prompt": prompt}) + "\n")


def proportional(pid: int) -> float:
    """MiB of a process, what it shares with others divided among them; 0 for one that is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def family(pid: int) -> list[int]:
    """A process and all that it has started."""
    try:
        started = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for task in Path(f"/proc/{pid}/task").iterdir():
            started += (task / "children").read_text().split()
    except OSError:
        started = []
    return [pid, *(one for child in set(started) for one in family(int(child)))]


def run(
    source: str, model: str, data: Path, directory: Path, stop: str, child: str = CHILD
) -> dict[str, Any]:
    """One run in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": source}
    command = [sys.executable, "-c", child, model, str(data), str(directory), "3", stop]
    with tempfile.TemporaryFile("w+") as out:
        began = time.time()
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.DEVNULL)
        memory = 0.0
        while process.poll() is None:
            memory = max(memory, sum(map(proportional, family(process.pid))))
            time.sleep(0.5)
        out.seek(0)
        found: dict[str, Any] = {"seconds": time.time() - began, "memory": memory}
        for line in out.read().splitlines():
            found |= json.loads(line) if line.startswith('{"') else {}  # a peer says more
    return {name: round(value, 1) for name, value in found.items()}


def main() -> None:
    """Measure and print a line of JSON a version."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=Path, required=True, help="comparisons with prompt, chosen, rejected")
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--against", help="src folder of another version of keel")
    parser.add_argument("--peer", help="a folder with TRL 1.16, or nothing where the interpreter has it")
    parser.add_argument("--text-gb", type=float, help="pretrain on so much text instead")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.scratch) as scratch:
        if asked.text_gb:
            folder = Path(scratch) / "texts"
            text_folder(asked.seed, asked.text_gb, folder)
            source, directory = str(Path(__file__).parents[1] / "src"), Path(scratch) / "run"
            print(json.dumps(run(source, asked.model, folder, directory, "go on", TEXT)))
            return
        data = Path(scratch) / "rows.jsonl"
        rows_file(asked.seed, asked.rows, data)
        here = str(Path(__file__).parents[1] / "src")
        for source in filter(None, (asked.against, here)):
            directory = Path(scratch) / ("there" if source == asked.against else "here")
            first = run(source, asked.model, data, directory, "kill")
            line = {"source": source, "rows": asked.rows, "first": first}
            if source == here:
                line["again"] = run(source, asked.model, data, directory, "go on")
            print(json.dumps({**line, "rows_per_second": round(asked.rows / first["ready"])}), flush=True)
        if asked.peer:
            first = run(asked.peer, asked.model, data, Path(scratch) / "peer", "go on", PEER)
            line = {"source": "trl", "rows": asked.rows, "first": first}
            print(json.dumps({**line, "rows_per_second": round(asked.rows / first["ready"])}), flush=True)


if __name__ == "__main__":
    main()
