"""keel's stages against TRL's trainers, in pairs in one run: seconds a step and peak memory, on the same
untrained Llama of 7.3 M parameters, the same rows and the same settings.

    make bench                                        (makes the peers' environment, then runs everything)
    python benchmarks/peers.py --peer PYTHON --ppo-peer FOLDER [KIND …] [--pairs N] [--threads N]

PYTHON is an interpreter that has TRL 1.16; FOLDER holds TRL 1.12, the last release that has PPO, and goes in
front of the path. Every measurement is a process of its own, and the two sides take turns; medians of N
pairs. Prompts have 32 tokens, responses 64; in grpo and ppo the chance of the end of sequence makes responses
24 tokens long on average, 64 at most. Where keel's reference model reads the rows of all steps before the
first (dpo), each step is charged its share of that. A step is 64 rows, pairs or episodes, 16 at a time (ppo:
an update with 4 epochs, a critic of its own). `auto` kinds are keel's defaults for a machine with fast
bfloat16 (`model.dtype: auto`, for ppo `sharing: trunk` too) against the same peer in float32; in `grpo-lora`
both sides train adapters, and the base without them is the reference. Memory is the peak of the process above
what is resident after everything is imported. The floor is what keel's step needs at least on this machine
(docs/speed.md): no build of keel can be faster with the same precision and the same work.
`--new` and `--mean` are the most tokens and the mean of a response in grpo and ppo, `--steps` the steps of a
measurement; with one, which is for models whose steps take minutes, nothing is left out as a warm-up (not of
ppo, whose TRL says nowhere when a step begins, nor of dpo, where the reference's reading could not be told
from the warm-up). `--peer-bf16` gives TRL on the CPU its own default, `bf16`; without, it computes in
float32. Which of the two is faster depends on the processor: quote keel's `auto` kinds against the faster
one, so run them twice.
`--processor` takes processor's seconds instead of the clock's: with `--threads 1`, other work that goes on
beside disturbs them little (the floor stays by the clock).

On CUDA (`--device cuda`, with `--size half` for 0.5 B parameters; `gpu.py` does both) the two sides multiply
in bfloat16, keel by `dtype: auto` and TRL by its `bf16`, and memory is the peak of what torch had allocated
on the card.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KINDS = (
    *("sft", "reward", "dpo", "grpo", "ppo"),
    *("ppo-auto", "grpo-auto", "sft-auto", "reward-auto", "dpo-auto"),
    "grpo-lora",
)
STEPS = {"sft": 6, "reward": 6, "dpo": 6, "grpo": 6, "ppo": 4}
ROWS, BATCH, PROMPT, ANSWER = 512, 64, 32, 64  # ANSWER: tokens of the responses in the rows
RESPONSE, MEAN = 64, 24  # tokens of a response that is sampled, at most and on average
MICRO = 16  # rows, pairs or episodes in one forward and backward, on both sides (--rows and --peer-rows)
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
SIZES: dict[str, dict[str, Any]] = {
    "small": {  # 7.3 M parameters
        "model_type": "llama",
        "vocab_size": 2048,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
    },
    # 0.5 B parameters, as Qwen2.5-0.5B has them. Not of Qwen2's class: beside one, `AutoTokenizer` makes
    # Qwen2's tokenizer of any
    "half": {
        "model_type": "llama",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "attention_bias": True,
    },
    "tiny": {  # to see that everything runs
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "attention_bias": True,
    },
}
LR = 1e-5
UNSTARTED = ("ppo", "dpo")  # of which one step alone cannot be measured
LORA = {"r": 16, "alpha": 32}  # on all linear layers but the head, without dropout, in grpo-lora
PROCESSOR = "BENCH_PROCESSOR_SECONDS"  # in a process that is measured: its time is what it computed


# ---------------------------------------------------------------- models and rows, the same for both sides


def prepare(folder: Path, size: str = "small") -> None:
    """Models, a tokenizer with a token a word, and rows, in `folder`."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    vocabulary = [*SPECIAL, *(f"w{i}" for i in range(SIZES[size]["vocab_size"] - len(SPECIAL)))]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )
    for name, seed, ends in (
        ("plain", 0, False),
        ("ending", 0, True),
        ("scorer", 1, False),
        ("critic", 2, False),
    ):
        torch.manual_seed(seed)
        scores = name in ("scorer", "critic")
        positions = max(512, PROMPT + RESPONSE)
        more = {"max_position_embeddings": positions, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        config = AutoConfig.for_model(**SIZES[size], **more, **({"num_labels": 1} if scores else {}))
        family = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
        model: Any = family.from_config(config)
        if ends:
            end_after(model, MEAN)
        if scores:
            model.config.keel_reward = {"mean": 0.0, "std": 1.0}
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    texts = [_texts(vocabulary, width, seed) for seed, width in ((1, PROMPT), (2, ANSWER), (3, ANSWER))]
    rows = [dict(zip(("prompt", "chosen", "rejected"), row)) for row in zip(*texts)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def end_after(model: Any, mean: int) -> None:
    """Give the end of sequence a chance of about 1 / mean at every position: its head reads a direction that
    every hidden state carries."""
    import torch

    with torch.no_grad():
        embeddings, size = model.model.embed_tokens.weight, model.config.vocab_size
        direction = torch.randn(embeddings.shape[1])
        common = 3 * embeddings.norm(dim=1).mean() * direction / direction.norm()
        embeddings += common
        hidden = model.model(torch.randint(4, size, (16, 64))).last_hidden_state.flatten(0, 1).mean(0)
        row = torch.log(torch.tensor(size / mean)) * hidden / hidden.dot(hidden)
        model.lm_head.weight[2] = row + (common if model.config.tie_word_embeddings else 0)


def _texts(vocabulary: list[str], width: int, seed: int) -> list[str]:
    import torch

    drawn = torch.randint(
        4, len(vocabulary), (ROWS, width), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    return [" ".join(vocabulary[i] for i in row) for row in drawn]


def varied(completions: list[str], **columns: Any) -> list[float]:
    """The share of different words, in the form in which both sides take a reward."""
    return [len(set(text.split())) / RESPONSE for text in completions]


# ---------------------------------------------------------------- keel's side


def keel_config(kind: str, folder: Path, device: str, at_once: int = MICRO) -> dict[str, Any]:
    import torch

    stages = {"stage": keel_stage(kind, folder, device) | {"micro_batch": at_once}}
    return {"name": "bench", "threads": torch.get_num_threads(), "device": device, "stages": stages}


def keel_stage(kind: str, folder: Path, device: str) -> dict[str, Any]:
    """The stage of `kind` as the peers have it."""
    kind, _, way = kind.partition("-")
    auto = way == "auto"
    rows, dtype = str(folder / "rows.jsonl"), "auto" if auto or device != "cpu" else "float32"

    def model(name: str) -> dict[str, Any]:
        return {"path": str(folder / name), "dtype": dtype}

    fixed = {
        "lr": LR,
        "batch_size": BATCH,
        "micro_batch": MICRO,
        "max_steps": STEPS.get(kind),
        "holdout": 0,
        "save_every": 1000,
    }
    if kind == "sft":
        columns = {"prompt": "prompt", "completion": "chosen"}
        data = {"source": rows, "columns": columns}
        return {"kind": "sft", "model": model("plain"), "data": data, "max_length": 128, **fixed}
    if kind == "reward":
        return {"kind": "reward", "model": model("critic"), "data": rows, "max_length": 128, **fixed}
    if kind == "dpo":
        return {"kind": "dpo", "model": model("plain"), "data": rows, "max_length": 128, **fixed}
    shared = {
        "model": model("ending"),
        "data": {"source": rows, "columns": {"prompt": "prompt"}},
        "lr": LR,
        "batch_size": BATCH,
        "micro_batch": MICRO,
        "updates": STEPS[kind],
        "sampling": {"max_new_tokens": RESPONSE},
        "save_every": 1000,
    }
    if kind == "grpo":
        reward = {"kind": "python", "function": f"{__file__}:varied"}
        more = {"lora": LORA, "sharing": "adapters"} if way == "lora" else {}
        return {
            "kind": "grpo",
            "reward": reward,
            "samples_per_prompt": 8,
            "kl": {"coef": 0.04},
            **shared,
            **more,
        }
    return {
        "kind": "ppo",
        "reward": str(folder / "scorer"),
        "sharing": "trunk" if auto else "separate",
        "epochs": 4,
        "kl": {"coef": 0.05},
        **shared,
    }


def of_keel(kind: str, folder: Path, device: str, at_once: int) -> None:
    """In a process of its own: run the stage, `at_once` rows at a time, print what it took."""
    import keel.rl.grpo
    import keel.stages.preference
    import keel.stages.reward  # noqa: F401
    from keel.config import parse
    from keel.pipeline.pipeline import Pipeline

    before, ends, begun = resident("VmRSS"), list[float](), _mark_phases(device)
    marks: list[float] = []  # when the reference of dpo began to read, which is before the first step

    def say(line: str) -> None:
        marks.extend([now(device)] if "the reference reads" in line else [])

    with tempfile.TemporaryDirectory() as temporary:
        progress = lambda *step: ends.append(now(device))  # noqa: E731
        config = parse(keel_config(kind, folder, device, at_once))
        pipeline = Pipeline(config, Path(temporary), say=say, progress=progress)
        pipeline.run()
        times = pipeline.stage_directory(next(iter(config.stages))) / "times.jsonl"
        least = floor(times)
    if len(ends) == 1:
        report([begun[0], *ends], before, device, 0.0, least)
        return
    # up to the end of the first step, without as much as a step takes; of the rows of these steps alone
    steps = [after - earlier for earlier, after in itertools.pairwise(ends)]
    reading = sum(max(0.0, ends[0] - mark - statistics.median(steps)) for mark in marks[:1])
    report(ends, before, device, reading / len(ends), least)


def floor(times: Path) -> float:
    """Seconds that a step needs at least on this machine: of all phases arithmetic at the speed of large
    matrix products, or bytes at the speed of memory, whichever is longer (docs/speed.md). The median of the
    steps, and each one's share of what the reference reads before the first."""
    rows = [json.loads(line) for line in times.read_text(encoding="utf-8").splitlines()]
    phases = [name.partition("/")[0] for name in rows[-1] if name.endswith("/roofline")]
    counted = rows[1:] or rows
    before = rows[0].get("reference", 0.0) * rows[0].get("reference/roofline", 0.0)
    step = statistics.median(
        sum(row[p] * row[f"{p}/roofline"] for p in phases if p != "reference") for row in counted
    )
    return step + before / len(rows)


def _mark_phases(device: str) -> list[float]:
    """When each phase of a stage begins, by the clock of its ends: the first is the first step's."""
    from keel.rundir.stage_run import StageRun

    timed, begun = StageRun.timed, list[float]()

    def marked(run: StageRun, phase: str) -> Any:
        begun.append(now(device))
        return timed(run, phase)

    StageRun.timed = marked  # pyright: ignore[reportAttributeAccessIssue]
    return begun


# ---------------------------------------------------------------- the peers' side


def of_trl(kind: str, folder: Path, device: str, at_once: int, *, bf16: bool) -> None:
    """In a process of its own: train as TRL does, `at_once` rows at a time, print what it took. bf16: on the
    CPU, too, as TRL does by default."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    kind, _, way = kind.partition("-")
    if kind == "ppo":
        import trl.experimental.ppo  # pyright: ignore[reportMissingImports]
    else:
        importlib.import_module("trl")
        importlib.import_module(f"trl.trainer.{kind}_trainer")
    before, ends = resident("VmRSS"), list[float]()
    tokenizer, steps = AutoTokenizer.from_pretrained(folder / "plain"), STEPS[kind]
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    common: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "learning_rate": LR,
        "report_to": "none",
        "use_cpu": device == "cpu",
        "bf16": bf16 or device != "cpu",
        "fp16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 10**6,
        "disable_tqdm": True,
        "seed": 0,
        "dataloader_pin_memory": False,
    }
    parts = {"per_device_train_batch_size": at_once, "gradient_accumulation_steps": BATCH // at_once}
    fixed = {**common, **parts, "max_steps": steps}

    def table(**columns: str) -> Any:
        return datasets.Dataset.from_list([{ours: row[key] for ours, key in columns.items()} for row in rows])

    def lm(name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder / name)

    def scorer(name: str) -> Any:
        return AutoModelForSequenceClassification.from_pretrained(folder / name)

    more: dict[str, Any] = {"processing_class": tokenizer}
    pairs = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    if kind == "ppo":
        from trl.experimental.ppo import PPOConfig, PPOTrainer  # pyright: ignore[reportMissingImports]

        prompts = [{"input_ids": tokenizer(row["prompt"])["input_ids"]} for row in rows]
        data = datasets.Dataset.from_list(prompts)
        settings: Any = PPOConfig(
            num_mini_batches=1,
            num_ppo_epochs=4,
            **parts,
            total_episodes=BATCH * steps,
            response_length=RESPONSE,
            stop_token="eos",
            missing_eos_penalty=1.0,
            temperature=1.0,
            kl_coef=0.05,
            local_rollout_forward_batch_size=BATCH,
            num_sample_generations=0,
            **common,
        )
        make = PPOTrainer
        more |= {
            "ref_model": lm("ending"),
            "reward_model": scorer("scorer"),
            "value_model": scorer("critic"),
            "train_dataset": data,
            "eval_dataset": data.select(range(8)),
            "model": lm("ending"),
        }
    else:
        import trl  # pyright: ignore[reportMissingImports]

        if kind == "sft":
            make, settings = trl.SFTTrainer, trl.SFTConfig(max_length=128, **fixed)
            more |= {"model": lm("plain"), "train_dataset": table(prompt="prompt", completion="chosen")}
        elif kind == "reward":
            make, settings = trl.RewardTrainer, trl.RewardConfig(max_length=128, **fixed)
            more |= {"model": scorer("critic"), "train_dataset": table(**pairs)}
        elif kind == "dpo":
            make, settings = trl.DPOTrainer, trl.DPOConfig(max_length=128, **fixed)
            more |= {"model": lm("plain"), "ref_model": lm("plain"), "train_dataset": table(**pairs)}
        else:
            make = trl.GRPOTrainer
            settings = trl.GRPOConfig(num_generations=8, max_completion_length=RESPONSE, beta=0.04, **fixed)
            more |= {
                "model": str(folder / "ending"),
                "reward_funcs": [varied],
                "train_dataset": table(prompt="prompt"),
            }
            if way == "lora":
                import peft

                linear = peft.LoraConfig(
                    r=LORA["r"],
                    lora_alpha=LORA["alpha"],
                    target_modules="all-linear",
                    task_type="CAUSAL_LM",
                )
                more["peft_config"] = linear
    make(args=settings, callbacks=[_clock(ends, device, alone=steps == 1)], **more).train()
    report(ends, before, device)


def _clock(ends: list[float], device: str, *, alone: bool) -> Any:
    """alone: of one step, whose beginning counts."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, *given: Any, **named: Any) -> None:
            ends.extend([now(device)] if alone else [])

        def on_step_end(self, *given: Any, **named: Any) -> None:
            ends.append(now(device))

    return Clock()


# ---------------------------------------------------------------- measuring


def resident(name: str) -> float:
    """VmRSS (now) or VmHWM (the peak) of this process in MiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def now(device: str) -> float:
    """Seconds, when all that was launched on the device is done; the processor's own with `PROCESSOR`."""
    import torch

    if os.environ.get(PROCESSOR):
        return time.process_time()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def report(ends: list[float], before: float, device: str, more: float = 0.0, least: float = 0.0) -> None:
    """One line of JSON. The first step is the warm-up: its time is not counted. more: what each step owes to
    work that was done before the first (with what the warm-up takes beyond a step's time in it, so that it is
    too much rather than too little)."""
    import torch

    seconds = (ends[-1] - ends[0]) / (len(ends) - 1) + more
    on_cpu = device == "cpu"
    memory = resident("VmHWM") - before if on_cpu else torch.cuda.max_memory_allocated() / 2**20
    print(json.dumps({"seconds": seconds, "memory": memory, "floor": least, "steps": len(ends)}))


def measured(
    python: str,
    kind: str,
    side: str,
    folder: Path,
    threads: int,
    path: str | None = None,
    device: str = "cpu",
    peer_rows: int = MICRO,
    rows: int = MICRO,
    *,
    bf16: bool = False,
) -> dict[str, float]:
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1",
        "TOKENIZERS_PARALLELISM": "false", **({"PYTHONPATH": path} if path else {}),
    }  # fmt: skip
    command = [
        python,
        __file__,
        kind,
        "--side",
        side,
        "--folder",
        str(folder),
        "--threads",
        str(threads),
        "--device",
        device,
        "--peer-rows",
        str(peer_rows),
        "--rows",
        str(rows),
        "--new",
        str(RESPONSE),
        "--steps",
        str(STEPS[kind.partition("-")[0]]),
        *(["--peer-bf16"] if bf16 else []),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side} {kind} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(settings: argparse.Namespace, kinds: Sequence[str]) -> None:
    """A line a kind: both sides, in turn, and their ratios."""
    titles = f"{'':<10}{'TRL, s':>9}{'keel, s':>9}{'ratio':>8}{'floor, s':>10}"
    print(f"{titles}   {'TRL, MiB':>9}{'keel, MiB':>10}{'ratio':>8}")
    with tempfile.TemporaryDirectory() as temporary:
        prepare(Path(temporary), settings.size)
        for kind in kinds:
            path = settings.ppo_peer if kind.startswith("ppo") else None
            shared = Path(temporary), settings.threads
            more: dict[str, Any] = {
                "device": settings.device, "peer_rows": settings.peer_rows, "rows": settings.rows,
                "bf16": settings.peer_bf16,
            }  # fmt: skip
            pairs = [
                (
                    measured(settings.peer, kind, "trl", *shared, path, **more),
                    measured(sys.executable, kind, "keel", *shared, **more),
                )
                for _ in range(settings.pairs)
            ]
            least = statistics.median(ours["floor"] for _, ours in pairs)
            seconds = f"{_row(pairs, 'seconds', 2)}{least:>10.2f}"
            each = ", ".join(f"{theirs['seconds'] / ours['seconds']:.2f}" for theirs, ours in pairs)
            print(f"{kind:<10}{seconds}   {_row(pairs, 'memory', 0)}   pairs: {each}", flush=True)


def options() -> argparse.ArgumentParser:
    """What can be asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(KINDS)}; default: all")
    parser.add_argument("--peer", default=sys.executable, help="an interpreter with TRL 1.16")
    parser.add_argument("--ppo-peer", help="a folder with TRL 1.12")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--peer-rows", type=int, default=MICRO, help="that TRL takes at once")
    parser.add_argument("--rows", type=int, default=MICRO, help="that keel takes at once")
    parser.add_argument("--size", choices=SIZES, default="small", help="of the models")
    parser.add_argument("--new", type=int, default=RESPONSE, help="tokens of a response at most")
    parser.add_argument("--mean", type=int, default=MEAN, help="tokens of a response, in grpo and ppo")
    parser.add_argument(
        "--steps",
        type=int,
        choices=range(1, 100),
        metavar="N",
        help="of each measurement; the first of several is the warm-up",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--side", choices=["keel", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument(
        "--processor", action="store_true", help="the processor's seconds, for a machine that does other work"
    )
    parser.add_argument(
        "--peer-bf16", action="store_true", help="TRL multiplies in bfloat16 on the CPU, its default"
    )
    return parser


def main() -> None:
    parser = options()
    settings = parser.parse_args()
    take(settings)
    if odd := [kind for kind in settings.kinds if kind not in KINDS]:
        parser.error(f"{odd[0]!r} is none of {', '.join(KINDS)}")
    asked = settings.kinds or KINDS
    if settings.steps == 1 and any(kind.partition("-")[0] in UNSTARTED for kind in asked):
        left = [kind for kind in KINDS if kind.partition("-")[0] not in UNSTARTED]
        parser.error(f"--steps 1 measures no {' nor '.join(UNSTARTED)}; name kinds of {', '.join(left)}")
    if settings.side:
        import torch

        torch.set_num_threads(settings.threads)
        given = settings.kinds[0], settings.folder, settings.device
        if settings.side == "keel":
            of_keel(*given, settings.rows)
        else:
            of_trl(*given, settings.peer_rows, bf16=settings.peer_bf16)
        return
    compare(settings, asked)


def take(settings: argparse.Namespace) -> None:
    """What is asked for in place of the usual sizes, here and in the processes that are measured."""
    global RESPONSE, MEAN
    if settings.processor:
        os.environ[PROCESSOR] = "1"
    RESPONSE, MEAN = settings.new, settings.mean
    if settings.steps is not None:
        STEPS.update(dict.fromkeys(STEPS, settings.steps))


def _row(pairs: list[tuple[dict[str, float], dict[str, float]]], what: str, places: int) -> str:
    """Medians of both sides, and the median of the pairs' ratios (peer over keel for seconds, keel over peer
    for memory)."""
    theirs, ours = ([pair[side][what] for pair in pairs] for side in (0, 1))
    ratios = [a / b if what == "seconds" else b / a for a, b in zip(theirs, ours)]
    a, b, ratio = (statistics.median(values) for values in (theirs, ours, ratios))
    return f"{a:>9.{places}f}{b:>9.{places}f}{ratio:>8.2f}"


if __name__ == "__main__":
    main()
