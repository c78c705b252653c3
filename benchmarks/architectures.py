"""Every type of causal language model that transformers knows, tiny, through keel: what holds, what not.

    python benchmarks/architectures.py [--types llama,qwen3 …] [--cache FILE] [--write docs/models.md]

For each type a model of some 50,000 random weights is made (`tests/architectures/zoo.py`). It is read,
packed, sampled from, adapted and saved, each compared with transformers' own
(`tests/architectures/checks.py`), and goes through `sft`, `dpo`, `grpo` and `evaluate`, two steps each, by
the real pipeline. --skip-stages leaves that out. --cache keeps what was found, so that a run that was cut off
goes on. With --write the table of docs/models.md is written anew, between its two marks. Exit code 3 if
anything differs or crashes. An hour on one core for all of them.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import shutil
import sys
import tempfile
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import transformers

from keel.config import parse
from keel.errors import KeelError, UsageError
from keel.pipeline.pipeline import Pipeline

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "architectures"))
import checks
import zoo

BEGIN, END = "<!-- architectures -->", "<!-- end of architectures -->"
COLUMNS = ("padded", "prefixes", "packed", "sampled", "adapted", "scored", "stages")
WORDS = ("red", "blue", "green", "grey")
SHARED = {"max_steps": 2, "batch_size": 4, "lr": 1e-3}


def data(folder: Path) -> dict[str, str]:
    """Files of demonstrations, pairs and prompts; each prompt and reply some ten tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = [f"{size} {animal}?" for size in ("a", "the big") for animal in ("cat", "cow", "ant", "owl")]
    rows: dict[str, list[dict[str, str]]] = {
        "demonstrations": [{"prompt": p, "completion": f" it is {w}."} for p in prompts for w in WORDS],
        "pairs": [
            {"prompt": p, "chosen": " it is red.", "rejected": f" {w}!"} for p in prompts for w in WORDS
        ],
        "prompts": [{"prompt": p} for p in prompts],
    }
    for name, lines in rows.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return {name: str(folder / f"{name}.jsonl") for name in rows}


def stages(model: Path, files: dict[str, str]) -> dict[str, Any]:
    """Two steps of each."""
    sampling = {"max_new_tokens": 6}
    return {
        "sft": {"kind": "sft", "model": str(model), "data": files["demonstrations"], **SHARED},
        "dpo": {"kind": "dpo", "model": "sft", "data": files["pairs"], **SHARED},
        "grpo": {
            "kind": "grpo", "model": "sft", "data": files["prompts"], "updates": 2, "samples_per_prompt": 2,
            "batch_size": 4, "lr": 1e-3, "sampling": sampling,
            "reward": {"kind": "keywords", "words": ["e", "a"], "mode": "share"},
        },
        "judge": {
            "kind": "evaluate", "models": ["sft", "dpo", "grpo"], "data": files["prompts"],
            "reward": {"kind": "length", "high": 4}, "sampling": sampling, "batch_size": 8,
        },
    }  # fmt: skip


def through_stages(kind: str, folder: Path) -> checks.Outcome:
    """The type's model through the pipeline: every number that it logs is finite."""
    place, runs = checks.saved(kind, folder), folder / "runs"
    shutil.rmtree(runs / kind, ignore_errors=True)
    config = {
        "name": kind, "seed": 0, "threads": 1, "device": "cpu",
        "stages": stages(place, data(folder / "data")),
    }  # fmt: skip
    try:
        pipeline = Pipeline(parse(config), runs / kind, lambda line: None)
        pipeline._report = lambda: None  # takes longer than the stages here
        gc.freeze()  # each stage collects garbage: what the process has by now need not be looked through
        pipeline.run()
        wrong = _not_finite(runs / kind)
    except UsageError as error:
        return checks.Outcome("refused", str(error))
    except KeelError as error:
        return checks.Outcome("differs", f"{type(error).__name__}: {error}")
    except Exception as error:
        return checks.Outcome("crashes", checks.where(error))
    finally:
        shutil.rmtree(runs / kind, ignore_errors=True)
    return checks.Outcome("differs", wrong) if wrong else checks.Outcome("holds", "yes")


def _not_finite(run: Path) -> str:
    """The first number in the logs that is none; "" where all are, and each stage took its two steps."""
    for stage in ("sft", "dpo", "grpo"):
        lines = (run / "stages" / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [json.loads(line) for line in lines]
        norms = [step for step in steps if "grad_norm" in step]
        if len(norms) < 2:
            return f"{stage}: {len(norms)} steps with a gradient"
        for step in steps:
            for name, value in step.items():
                if isinstance(value, float) and not math.isfinite(value):
                    return f"{stage}, step {step['step']}: {name} is {value}"
    return ""


# ---------------------------------------------------------------- the table


def table(found: dict[str, dict[str, checks.Outcome]]) -> str:
    """The table of docs/models.md: types that are alike share a line."""
    alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for kind, outcomes in found.items():
        alike[tuple(_cell(outcomes.get(column), kind) for column in COLUMNS)].append(kind)
    sound = sum(all(o.sound for o in outcomes.values()) for outcomes in found.values())
    staged = sum(o.state == "holds" for outcomes in found.values() if (o := outcomes.get("stages")))
    lines = [
        f"transformers {transformers.__version__}: {len(found)} types tried, {sound} right or refused in "
        f"every column, {staged} through all stages; {len(zoo.LEFT_OUT)} left out.",
        "",
        "| types | batches | common starts | packed | sampled | LoRA on | reward model | stages |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cells, kinds in sorted(alike.items(), key=lambda item: (-len(item[1]), item[1])):
        lines.append(f"| {', '.join(kinds)} | {' | '.join(cells)} |")
    lines += ["", "Left out:", ""]
    reasons: dict[str, list[str]] = defaultdict(list)
    for kind, reason in zoo.LEFT_OUT.items():
        reasons[reason].append(kind)
    lines += [f"- {', '.join(kinds)}: {reason}." for reason, kinds in reasons.items()]
    return "\n".join(lines)


def _cell(outcome: checks.Outcome | None, kind: str) -> str:
    if outcome is None:
        return ""
    if outcome.state == "holds":
        return outcome.said
    if outcome.state == "refused":
        return "refused"
    return f"**{outcome.state}**"


def write(text: str, path: Path) -> None:
    """Put the table between the marks of a page."""
    page = path.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


# ---------------------------------------------------------------- the run


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--types", help="names, with commas between them; default: all")
    parser.add_argument("--skip-stages", action="store_true")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--write", type=Path)
    asked = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    kinds = asked.types.split(",") if asked.types else zoo.kinds()
    cache = json.loads(asked.cache.read_text()) if asked.cache and asked.cache.is_file() else {}
    columns = [column for column in COLUMNS if not (asked.skip_stages and column == "stages")]
    found: dict[str, dict[str, checks.Outcome]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            found[kind] = {}
            for column in columns:
                key = f"{kind}/{column}"
                if key not in cache:
                    cache[key] = _tried(kind, column, Path(folder))
                found[kind][column] = outcome = checks.Outcome(**cache[key])
                if not outcome.sound:
                    print(f"{key}: {outcome.state}: {outcome.said}", flush=True)
            if asked.cache:
                asked.cache.write_text(json.dumps(cache, indent=0))
            shutil.rmtree(Path(folder) / kind, ignore_errors=True)
    text = table(found)
    print(text)
    if asked.write:
        write(text, asked.write)
    return 3 if any(not o.sound for outcomes in found.values() for o in outcomes.values()) else 0


def _tried(kind: str, column: str, folder: Path) -> dict[str, str]:
    outcome = through_stages(kind, folder) if column == "stages" else checks.outcome(column, kind, folder)
    return {"state": outcome.state, "said": outcome.said}


if __name__ == "__main__":
    sys.exit(main())
