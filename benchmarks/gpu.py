"""keel on one CUDA device, and on two where there are two: is it right, how fast does it sample, what does it
take beside TRL, and does the plan of memory hold?

    make bench-gpu                                    (makes the peers' environment, then runs everything)
    python benchmarks/gpu.py [--peer PYTHON] [--ppo-peer FOLDER] [--vllm FOLDER] [--parts PART …]
                             [--pairs N] [--minutes M]

The parts, in this order; one that would begin after M minutes (6) is left out, and said so:

correctness  On small models: greedy responses of the engine against transformers' `generate`,
             log-probabilities and states of recorded steps (CUDA graphs) against a forward over the whole
             sequence, in float32 and in bfloat16, and a PPO update on the CPU against the same on the card.
ranks        Where there are two cards: SFT, GRPO and PPO on both of them by `ddp`, by `fsdp` and by `fsdp`
             with `offload` against one, in float32 on a tiny model.
vllm         Two updates of GRPO with a vLLM server on the same card, which sleeps while keel trains: its
             log-probabilities against the trainer's; needs --vllm, an environment that has vLLM
             (`keel engine install vllm`).
engine       Tokens a second on a model of 0.5 B parameters in bfloat16 (Qwen2.5-0.5B's config): `generate`,
             keel without and with recorded steps, and what the card's memory allows: each step must read all
             weights, and the keys and values so far.
memory       What `keel plan` predicts for SFT, PPO and DPO of that model against the peak of what torch had
             allocated.
peers        The pairs of `peers.py` with that model; needs --peer (and --ppo-peer for PPO), as described
             there.

Exit code 2 without a CUDA device, 1 if something is not right.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import engine
import gpu_several
import peers
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from keel.accel import decode_graphs
from keel.algorithms.masked import token_logp
from keel.config import parse
from keel.models.precision import computing, prepare_model
from keel.pipeline.pipeline import Pipeline
from keel.plan import planner
from keel.rollout.engine import generate
from keel.types import Completion, Sampling

PARTS = ("correctness", "ranks", "vllm", "engine", "memory", "peers")
KINDS = ("sft", "reward", "dpo", "grpo", "ppo", "ppo-auto")  # of peers.py; all of them in bfloat16 on CUDA
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
STEADY = (
    "loss/policy_avg",
    "loss/value_avg",
    "objective/kl",
    "objective/scores",
    "grad_norm",
)  # of a PPO update


def _never(device: torch.device) -> None:
    """In the place of `decode_graphs.recorder`."""


UNRECORDED = mock.patch.object(decode_graphs, "recorder", _never)


# ---------------------------------------------------------------- is it right?


def correctness(device: torch.device) -> bool:
    """A line a check; whether all hold."""
    checks = [_check("PPO update, CPU and here", _update_differs(device), 1e-3)]
    for family in FAMILIES:
        model = _sharp(family).to(device)
        checks.append(_check(f"{family}: greedy responses that differ", _greedy_differs(model), 0))
        for dtype in ("float32", "auto"):
            done, graphs = _sampled(prepare_model(model, dtype)), len(decode_graphs._kept[model].replays)
            with UNRECORDED:
                plain = _sampled(model)
            differs, usual = (max(_forward_differs(model, c) for c in sampled) for sampled in (done, plain))
            limit = 1e-3 if dtype == "float32" else 2 * usual  # bfloat16 rounds as the model has it
            checks.append(_check(f"{family}, {dtype}: from a forward ({graphs} graphs)", differs, limit))
            alike = sum(a.ids == b.ids for a, b in zip(done, plain)) / len(done)
            print(f"{'':<48}{alike:>10.0%} of responses as without graphs", flush=True)
    return all(checks)


def _check(name: str, difference: float, limit: float) -> bool:
    print(
        f"{name:<48}{difference:>10.2g}   {'holds' if difference <= limit else f'IS ABOVE {limit:g}'}",
        flush=True,
    )
    return difference <= limit


def _sharp(family: str) -> Any:
    """A small model whose likeliest tokens are likelier than the others by far."""
    torch.manual_seed(1)
    sizes: dict[str, Any] = {**peers.SIZES["tiny"], "model_type": family, "initializer_range": 0.3}
    more: dict[str, Any] = {"sliding_window": None} if family == "mistral" else {}
    config = AutoConfig.for_model(**sizes, **more, bos_token_id=1, eos_token_id=1, pad_token_id=0)
    return AutoModelForCausalLM.from_config(config).eval()


def _prompts(count: int, vocabulary: int, lengths: Sequence[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    width = max(lengths)
    drawn = torch.randint(4, vocabulary, (count, width), generator=generator).tolist()
    return [row[: lengths[i % len(lengths)]] for i, row in enumerate(drawn)]


def _greedy_differs(model: Any) -> int:
    prompts = _prompts(24, model.config.vocab_size, (3, 7, 12, 31))
    done = generate(model, prompts, Sampling(48, temperature=0), stop_ids=[1], pad_id=0, seed=0, batch_size=8)
    differ = 0
    for prompt, ours in zip(prompts, done):
        ids = torch.tensor([prompt], device=model.device)
        asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 48, "do_sample": False}
        whole = model.generate(ids, pad_token_id=0, **asked)
        differ += whole[0, len(prompt) :].tolist() != list(ours.ids)
    return differ


def _sampled(model: Any) -> list[Completion]:
    """Rows that leave and enter, prompts of different lengths, each twice; with the hidden states."""
    prompts = [p for p in _prompts(24, model.config.vocab_size, (3, 7, 40, 31)) for _ in range(2)]
    options: Any = {"stop_ids": [1, *range(20, 28)], "pad_id": 0, "seed": 3, "batch_size": 16}
    return generate(model, prompts, Sampling(160), hidden=True, **options)


def _forward_differs(model: Any, done: Completion) -> float:
    """Of the log-probabilities, and of the hidden states in units of their size."""
    ids, first = torch.tensor([[*done.prompt_ids, *done.ids]], device=model.device), len(done.prompt_ids)
    with torch.no_grad(), computing(model, model.device):
        out = model(input_ids=ids, output_hidden_states=True)
    logp = token_logp(out.logits[:, first - 1 : -1], ids[:, first:])[0]
    states, kept = out.hidden_states[-1][0, first - 1 : -1].float(), done.hidden
    assert kept is not None
    of_states = (kept.float() - states).abs().max() / states.abs().max()
    return max((logp.cpu() - torch.tensor(done.logp)).abs().max().item(), of_states.item())


def _update_differs(device: torch.device) -> float:
    """The largest difference of two PPO updates' losses, relative where they are above 1."""
    runs: list[list[dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        peers.prepare(folder, "tiny")
        for kind in ("cpu", device.type):
            config = {**peers.keel_config("ppo", folder, "cpu"), "device": kind}
            config["stages"]["stage"]["updates"] = 2
            run = folder / f"run-{len(runs)}"
            Pipeline(parse(config), run, say=lambda line: None).run()
            lines = (run / "stages" / "stage" / "metrics.jsonl").read_text().splitlines()
            runs.append([json.loads(line) for line in lines])
    pairs = [(a[name], b[name]) for a, b in zip(*runs) for name in STEADY]
    return max(abs(a - b) / max(1.0, abs(a)) for a, b in pairs)


# ---------------------------------------------------------------- how fast does it sample?


def speed(device: torch.device, size: str, new: int, repeats: int) -> None:
    """Tokens a second in three cases, and the bound where all rows are equally long."""
    bandwidth = _copied(device, 2**30 if device.type == "cuda" else 2**26)
    print(f"a copy moves {bandwidth / 1e9:,.0f} GB/s")
    plain, ending = (_qwen2(size, mean).to(device, torch.bfloat16) for mean in (None, peers.MEAN))
    cases = {
        "64 of equal length": (plain, 64, engine.NEVER),
        "256 through 64 slots": (ending, 256, engine.EOS),
        "one": (plain, 1, engine.NEVER),
    }
    for name, (policy, count, stop) in cases.items():
        prompts = _prompts(count, policy.config.vocab_size, (engine.PROMPT,))
        ours = partial(engine.of_keel, policy, prompts, stop, new)
        sides = {
            "generate": partial(engine.of_transformers, policy, prompts, new),
            "keel, launched": UNRECORDED(ours),
            "keel, recorded": ours,
        }
        speeds = engine.compare(name, sides, repeats)
        if stop == engine.NEVER:
            bound = _bound(policy, count, new, bandwidth)
            shares = ", ".join(f"{side} {speed / bound:.2f}" for side, speed in speeds.items())
            print(f"{'':28}of {bound:,.0f} that reading weights and cache allows: {shares}", flush=True)


def _qwen2(size: str, mean: int | None) -> Any:
    """With responses that are `mean` tokens long on average; None: without end."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        **{**peers.SIZES[size], "model_type": "qwen2"}, pad_token_id=0, eos_token_id=2
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    if mean is None:
        model.generation_config.eos_token_id = None
    else:
        peers.end_after(model, mean)
    return model


def _copied(device: torch.device, size: int) -> float:
    """Bytes a second that a large copy on the device reads and writes; the best of ten."""
    given = torch.ones(size, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(given), float("inf")
    for _ in range(10):
        start = peers.now(device.type)
        target.copy_(given)
        best = min(best, peers.now(device.type) - start)
    return 2 * size / best


def _bound(policy: Any, rows: int, new: int, bandwidth: float) -> float:
    """Tokens a second if nothing took time but reading, once a step, the weights and each row's keys and
    values."""
    config = policy.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    weights = sum(parameter.nbytes for parameter in policy.parameters())
    a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head * policy.dtype.itemsize
    read = sum(weights + rows * (engine.PROMPT + step) * a_token for step in range(new))
    return rows * new * bandwidth / read


# ---------------------------------------------------------------- memory


def memory(device: torch.device, size: str, threads: int) -> None:
    """Predicted against measured, each stage in a process of its own."""
    print(f"{'':<10}{'plan, MiB':>10}{'measured':>10}{'ratio':>8}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        peers.prepare(folder, size)
        for kind in ("sft", "ppo", "dpo"):
            config = parse(peers.keel_config(kind, folder, device.type))
            (entry,) = planner.plan(Pipeline(config, folder / "runs" / kind))
            predicted = entry["memory"]["peak"] / 2**20
            peak = peers.measured(sys.executable, kind, "keel", folder, threads, None, device.type)["memory"]
            print(f"{kind:<10}{predicted:>10,.0f}{peak:>10,.0f}{predicted / peak:>8.2f}", flush=True)


# ---------------------------------------------------------------- all of it


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--peer", help="an interpreter with TRL 1.16")
    parser.add_argument("--ppo-peer", help="a folder with TRL 1.12")
    parser.add_argument("--vllm", help="the folder of an environment that has vLLM")
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=6.0, help="after which no part begins")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    # to see on a CPU that everything here runs: --device cpu --tiny
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    settings = parser.parse_args()
    device = torch.device(settings.device)
    if device.type != "cpu" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here (torch.cuda.is_available() says no)")
    torch.set_num_threads(settings.threads)
    size, new, repeats = ("tiny", 24, 1) if settings.tiny else ("half", 256, 3)
    if device.type == "cpu":
        decode_graphs.recorder = lambda device: lambda function: function
    # it would be said once and pass unseen
    warnings.filterwarnings("error", message="the decode step could not be recorded")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}", flush=True)
    right, begun = True, time.perf_counter()
    for part in (part for part in PARTS if part in settings.parts):
        start = time.perf_counter()
        print(f"\n{part}", flush=True)
        if start - begun > 60 * settings.minutes:
            print(f"left out: {settings.minutes:g} minutes are over")
            continue
        if part == "correctness":
            right &= correctness(device)
        elif part == "ranks":
            right &= gpu_several.ranks(device, "tiny")
        elif part == "vllm":
            right &= gpu_several.server(device, size, settings.vllm)
        elif part == "engine":
            speed(device, size, new, repeats)
        elif part == "memory":
            memory(device, size, settings.threads)
        elif settings.peer is None:
            print("left out: no --peer")
        else:
            kinds = [kind for kind in KINDS if settings.ppo_peer or not kind.startswith("ppo")]
            usual = vars(peers.options().parse_args([]))
            peers.compare(argparse.Namespace(**{**usual, **vars(settings), "size": size}), kinds)
        print(f"({time.perf_counter() - start:.0f} s)", flush=True)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
