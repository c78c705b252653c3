"""Run a config in child processes, each killed (SIGKILL) just before one chosen change to the disk.

    python killed.py CONFIG FOLDER every STRIDE    one directory a kill: before change 1, 1 + STRIDE, …; each
    then run to its end
    python killed.py CONFIG FOLDER each STRIDE FIRST    the same for each stage alone, in FOLDER/STAGE, from
    change FIRST on, one later with each stage; for stages that need none of the others
    python killed.py CONFIG FOLDER chain KILLS SEED    one directory, killed again and again before some
    change; then run to its end

Python announces every change (audit events), so nothing in keel needs to be patched, and with fork the
imports are paid for once: what the first run imports while it works, the process imports before it forks the
next. FOLDER/undisturbed is a run that nobody disturbed. Prints how many kills there
were.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import random
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


def is_change(event: str, args: tuple[Any, ...]) -> bool:
    """A file is made, opened to be written, renamed or removed."""
    if event == "open":
        return (
            isinstance(args[0], str)
            and bool(args[2] & (os.O_WRONLY | os.O_RDWR))
            and not args[0].startswith("/dev")
        )
    return event in CHANGES


def run(config: Any, directory: Path, kill_before: int | None = None) -> bool:
    """True if the run came to its end; False if it was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        with os.fdopen(reading) as names:  # ends with the child
            imported = names.read().split()
        status = os.waitpid(child, 0)[1]
        import_too(imported)
        if status == 0:
            return True
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return False
        sys.exit(f"the run in {directory} failed")
    try:
        from keel.pipeline.pipeline import Pipeline

        before = set(sys.modules)
        pipeline, changes = Pipeline(config, directory, lambda line: None), 0
        pipeline._report = lambda: None

        def hook(event: str, args: tuple[Any, ...]) -> None:
            nonlocal changes
            if is_change(event, args):
                changes += 1
                if changes == kill_before:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        pipeline.run()
        os.write(writing, " ".join(sys.modules.keys() - before).encode())
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def import_too(names: list[str]) -> None:
    """Modules that a run has imported while it worked."""
    for name in names:
        with contextlib.suppress(Exception):  # no file of that name: made by another module
            importlib.import_module(name)
    gc.freeze()


def import_everything() -> None:
    """What libraries import at first use, so that no child has to. Without a backward pass: autograd does not
    survive a fork."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        LlamaConfig,
        LlamaForCausalLM,
    )

    from keel.models import machine_speed

    torch.set_num_threads(1)
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 8,
    }
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
        model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model(torch.tensor([[1, 2]]))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.zero_grad()
    machine_speed.speed(torch.device("cpu"), torch.float32)  # which each child would measure, too
    gc.collect()
    gc.freeze()  # what is here by now is no child's to search


def main() -> None:
    sys.dont_write_bytecode = True
    from keel.config import read

    import_everything()
    config, folder = read(Path(sys.argv[1])), Path(sys.argv[2])
    plan, numbers = sys.argv[3], [int(a) for a in sys.argv[4:]]
    if plan == "each":
        kills, (stride, start) = 0, numbers
        for first, (name, stage) in enumerate(config.stages.items(), start=start):
            (folder / name).mkdir()
            alone = config.model_copy(update={"stages": {name: stage}})
            kills += every(alone, folder / name, first, stride)
    elif plan == "every":
        kills = every(config, folder, 1, *numbers)
    else:
        kills = chain(config, folder, *numbers)
    print(kills)


def every(config: Any, folder: Path, first: int, stride: int) -> int:
    """Kills before change `first`, `first` + `stride`, …, each of a run of its own. How many there were."""
    assert run(config, folder / "undisturbed")
    before = first
    while not run(config, folder / f"killed-{before}", before):
        assert run(config, folder / f"killed-{before}")
        before += stride
    return (before - first) // stride


def chain(config: Any, folder: Path, most: int, seed: int) -> int:
    """Kills of one run, again and again, before changes drawn at random. How many there were."""
    assert run(config, folder / "undisturbed")
    random.seed(seed)
    kills = 0
    while kills < most and not run(config, folder / "killed", random.randint(1, 60)):
        kills += 1
    assert run(config, folder / "killed")
    return kills


main()
