"""Predicted against measured memory: `python benchmarks/memory.py` (five stages on a CPU, some three
minutes).

Each stage is planned as `keel plan` plans it, then run for a few steps in a process of its own. Measured is
the peak of that process's resident memory above what it was when everything was imported (VmHWM above VmRSS
in /proc/self/status; Linux only). glibc is told to give freed memory back at once (MALLOC_MMAP_THRESHOLD_ and
MALLOC_TRIM_THRESHOLD_, one arena), since by default it keeps blocks of up to 32 MiB, which then count as
used; keel's own wish to keep all of it is turned off.

`--tensors` measures torch's tensors instead, every one of them: what is left of a gap then is a tensor that
the plan does not know.

`--lengths 500,1000,2000` measures something else: torch's tensors at the peak of the gradient of one response
of so many tokens, as GRPO with `micro_batch: 1` takes it. What a token more costs must not grow.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

MIB = 2**20
ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "1048576",
    "MALLOC_TRIM_THRESHOLD_": "1048576",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
VOCABULARY = 8192  # of the models; their tokenizer has fewer tokens
GPT2 = {"model_type": "gpt2", "n_embd": 512, "n_layer": 8, "n_head": 8, "n_positions": 512}  # 30 M parameters
LLAMA = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
LARGER = {**LLAMA, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 10}
ROWS: dict[str, dict[str, int]] = {  # stage → tokens of each part of its rows
    "sft": {"prompt": 100, "completion": 300},
    "ppo": {"prompt": 224},
    "dpo": {"prompt": 128, "chosen": 128, "rejected": 127},
    "grpo": {"prompt": 224},
    "reward": {"prompt": 128, "chosen": 128, "rejected": 127},
}
MODULES = {"dpo": "stages.preference", "ppo": "rl.ppo", "grpo": "rl.grpo"}  # where they have another name


def stage_of(name: str, folder: Path, dtype: str) -> dict[str, Any]:
    """The stage that is measured; its models and rows lie in `folder`."""
    common = {"kind": name, "data": str(folder / f"{name}.jsonl"), "save_every": 1000}
    few: dict[str, Any] = {"max_steps": 2, "epochs": 2, "holdout": 0}
    policy, larger = ({"path": str(folder / model), "dtype": dtype} for model in ("policy", "larger"))
    sampled = {"model": policy, "reward": str(folder / "reward"), "updates": 2, "batch_size": 8, "epochs": 1}
    match name:
        case "sft":  # all weights of a GPT-2 of 30 M parameters, with its dropout
            model = {
                "init": {**GPT2, "vocab_size": VOCABULARY},
                "tokenizer": str(folder / "tokenizer"),
                "dtype": dtype,
            }
            return {**common, **few, "model": model, "batch_size": 6, "loss_on": "all"}
        case "ppo":  # four models, the critic one of its own
            return {
                **common,
                **sampled,
                "sharing": "separate",
                "mini_batch": 4,
                "sampling": {"max_new_tokens": 32},
            }
        case "dpo":  # frozen weights, adapters, both sides of a pair, gradients in two parts
            return {**common, **few, "model": larger, "lora": {"r": 8}, "batch_size": 8, "micro_batch": 4}
        case "grpo":  # four samples a prompt
            return {**common, **sampled, "samples_per_prompt": 4, "sampling": {"max_new_tokens": 64}}
        case _:  # a reward model: all weights, two forwards of four pairs each in one gradient
            return {**common, **few, "model": policy, "batch_size": 8, "normalize": 0}


def prepare(folder: Path, names: tuple[str, ...]) -> None:
    """A tokenizer, untrained models and rows of one length each."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from keel.data import chat
    from keel.models.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["the cat is red, so red it is. " * 8] * 4, 300, 512)
    chat.with_chat_template(tokenizer)
    tokenizer.save_pretrained(folder / "tokenizer")
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)

    def build(subfolder: str, sizes: dict[str, Any], family: Any, **more: Any) -> None:
        values = {**sizes, **special, **more, "bos_token_id": None, "vocab_size": VOCABULARY}
        model = family.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
        model.save_pretrained(folder / subfolder)
        tokenizer.save_pretrained(folder / subfolder)

    if {"ppo", "grpo", "reward"} & {*names}:
        build("policy", LLAMA, AutoModelForCausalLM)
        build(
            "reward",
            LLAMA,
            AutoModelForSequenceClassification,
            num_labels=1,
            keel_reward={"mean": 0.0, "std": 1.0},
        )
    if "dpo" in names:
        build("larger", LARGER, AutoModelForCausalLM)

    def text(tokens: int) -> str:
        """Letters that no merge joins, so that each is a token, and no two texts that begin alike."""
        return "".join(draws.choices("BGJKQVWXYZ#%&@", k=tokens))

    draws = random.Random(0)
    for name, parts in ROWS.items():
        rows = [{part: text(tokens) for part, tokens in parts.items()} for _ in range(8)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def config_of(name: str, folder: Path, dtype: str) -> dict[str, Any]:
    return {"name": name, "threads": 1, "device": "cpu", "stages": {name: stage_of(name, folder, dtype)}}


def predicted(name: str, folder: Path, dtype: str = "float32") -> dict[str, Any]:
    """What `keel plan` says of the stage's memory."""
    from keel.config import parse
    from keel.pipeline.pipeline import Pipeline
    from keel.plan import planner

    (entry,) = planner.plan(Pipeline(parse(config_of(name, folder, dtype)), folder / "runs" / name))
    return entry["memory"]


def measured(name: str, folder: Path, dtype: str = "float32", *, tensors: bool = False) -> dict[str, Any]:
    """Bytes at the peak of a process that runs the stage, above those when it began; `phases`: the peak of
    each. tensors: of torch's tensors alone."""
    command = [sys.executable, __file__, "--measure", name, "--folder", str(folder), "--dtype", dtype]
    command += ["--tensors"] if tensors else []
    done = subprocess.run(
        command, env={**os.environ, **ENVIRONMENT}, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, folder: Path, dtype: str, tensors: bool) -> None:
    """In the process that is measured: import, look, run, look."""
    from keel.config import parse
    from keel.pipeline import pipeline as pipelines
    from keel.pipeline.pipeline import Pipeline

    torch.set_num_threads(1)
    pipelines.keep_freed_memory = lambda: False  # what is kept for later is not what a stage needs
    for module in (
        "peft",
        "keel.report",
        "transformers.models.gpt2.modeling_gpt2",
        "transformers.models.llama.modeling_llama",
    ):
        importlib.import_module(module)
    for kind in ROWS:
        importlib.import_module(f"keel.{MODULES.get(kind, f'stages.{kind}')}")
    runs = folder / "runs" / f"{name}{'-tensors' if tensors else ''}"
    pipeline = Pipeline(parse(config_of(name, folder, dtype)), runs)
    phases = by_phase(pipeline.run, tensors=tensors)
    print(json.dumps({"peak": max(phases.values()), "phases": phases}))


def by_phase(run: Callable[[], object], *, tensors: bool = False) -> dict[str, int]:
    """Bytes at the peak of each phase of a stage that runs, above those when it began."""
    from keel.rundir.stage_run import StageRun

    phases: dict[str, int] = {}
    timed, within = StageRun.timed, ["other"]  # a phase may be a part of another one
    with Tensors() if tensors else Resident() as look:

        def taken() -> None:
            phases[within[-1]] = max(phases.get(within[-1], 0), look.taken())

        @contextmanager
        def seen(run: StageRun, phase: str) -> Iterator[None]:
            """Each phase from a peak of its own."""
            taken()
            within.append(phase)
            try:
                with timed(run, phase):
                    yield
            finally:
                taken()
                within.pop()

        StageRun.timed = seen  # pyright: ignore[reportAttributeAccessIssue]
        run()
        taken()
    StageRun.timed = timed
    return phases


class Resident:
    """The process's resident memory above what it is when this is entered."""

    def __enter__(self) -> Resident:
        self.before = _status("VmRSS")
        self.taken()
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def taken(self) -> int:
        """Bytes at the peak since the last call (proc(5), clear_refs)."""
        peak = _status("VmHWM") - self.before
        Path("/proc/self/clear_refs").write_text("5")
        return peak


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


class Tensors(TorchDispatchMode):
    """The storages of all tensors that operations see while it is entered, each until it is freed. (Matrices
    that oneDNN has laid out have none.)"""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in tree_flatten((args, kwargs, made))[0]:
            if isinstance(x, torch.Tensor) and x.layout == torch.strided:
                self.see(x)
        return made

    def see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or tensor.device.type != "cpu":
            return

        def gone(_: Any) -> None:
            del self.known[key]
            self.now -= size

        self.known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def taken(self) -> int:
        """Bytes at the peak since the last call."""
        peak, self.peak = self.peak, self.now
        return peak


def by_length(lengths: list[int], dtype: str) -> None:
    """The gradient of the log-probabilities of one response to a prompt of 224 tokens, by the model of GRPO's
    stage: bytes at the peak, and what a token more takes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from keel.models import optim
    from keel.models.logprobs import head_inputs, response_index, token_logprobs
    from keel.models.precision import prepare_model

    torch.manual_seed(0)
    prompt = ROWS["grpo"]["prompt"]
    sizes = {**LLAMA, "vocab_size": VOCABULARY, "max_position_embeddings": prompt + max(lengths)}
    del sizes["model_type"]
    model = prepare_model(LlamaForCausalLM(LlamaConfig(**sizes)).train(), dtype)

    def gradient(length: int) -> None:
        ids = torch.randint(VOCABULARY, (1, prompt + length))
        mask = torch.ones(1, length, dtype=torch.bool)
        index = response_index(mask, torch.tensor([prompt]), prompt + length)
        said = token_logprobs(head_inputs(model, ids, index), ids.flatten()[index + 1], entropy=True)
        optim.backward(said.logp.mean())

    gradient(16)  # which tries its paths, and makes the weights' gradients
    before: tuple[int, int] | None = None
    for length in lengths:
        with Tensors() as tensors:
            gradient(length)
        peak = tensors.peak
        more = f", {(peak - before[1]) / (length - before[0]) / 1024:.0f} KiB a token more" if before else ""
        print(f"{length:5} tokens: {peak / MIB:6.0f} MiB{more}", flush=True)
        before = length, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*ROWS, []], default=[])
    parser.add_argument("--dtype", default="float32", help="model.dtype of all")
    parser.add_argument("--tensors", action="store_true", help="torch's tensors, not the process")
    parser.add_argument("--lengths", help="tokens of a response: the gradient of one")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.measure:
        measure(settings.measure, settings.folder, settings.dtype, settings.tensors)
        return
    if settings.lengths:
        by_length([int(length) for length in settings.lengths.split(",")], settings.dtype)
        return
    names = tuple(settings.names) or tuple(ROWS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, names)
        print(
            f"{'stage':<6} {'predicted':>10} {'measured':>10} {'ratio':>6}"
            "   MiB, by phase: predicted / measured"
        )
        for name in names:
            plan = predicted(name, folder, settings.dtype)
            measurement = measured(name, folder, settings.dtype, tensors=settings.tensors)
            sums = {
                p: sum(sum(kinds.values()) for kinds in roles.values()) for p, roles in plan["phases"].items()
            }
            sums = {"train": sums.pop("train"), **sums}
            asked = {
                phase: [f"{sums[phase] / MIB:.0f}" if phase in sums else "–"]
                for phase in {**sums, **measurement["phases"]}
            }
            for phase, column in asked.items():
                column.append(
                    f"{measurement['phases'][phase] / MIB:.0f}" if phase in measurement["phases"] else "–"
                )
            shown = ", ".join(f"{phase} {' / '.join(column)}" for phase, column in asked.items())
            ratio = plan["peak"] / measurement["peak"]
            print(
                f"{name:<6} {plan['peak'] / MIB:>10.0f} {measurement['peak'] / MIB:>10.0f} {ratio:>6.3f}"
                f"   {shown}",
                flush=True,
            )


if __name__ == "__main__":
    main()
