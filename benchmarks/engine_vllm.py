"""keel's rollout engine against vLLM's, in pairs in one run: useful tokens (up to and with the end of
sequence) a second, with the log-probability of each, which a trainer needs.

    python benchmarks/engine_vllm.py --vllm PYTHON [--size small|half] [--pairs N] [--threads N] [--prompts N]

PYTHON is an interpreter that has vLLM (on the CPU: its CPU package; `keel engine install vllm` makes one).
The untrained Llama of `peers.py` (7.3 M parameters, or Qwen2.5-0.5B's shape) whose responses end after 24
tokens on average and 64 at most, 256 distinct prompts of 32 tokens, 64 slots on both sides, the same
precision, temperature 1. vLLM's `LLM.generate` in its own process with its defaults: compiled steps and
prompts read in parts. Each measurement is a process of its own, which samples all prompts once to warm up,
then three times, of which the median counts; the sides take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT, NEW, SLOTS, FIRST, EOS, TIMES = 32, 64, 64, 4, 2, 3


def prompts(count: int, vocabulary: int) -> list[list[int]]:
    import torch

    drawn = torch.Generator().manual_seed(1)
    return torch.randint(FIRST, vocabulary, (count, PROMPT), generator=drawn).tolist()


def of_vllm(folder: str, dtype: str, asked: list[list[int]]) -> Callable[[int], int]:
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    engine = LLM(
        folder, dtype=dtype, max_num_seqs=SLOTS, max_model_len=512, enable_prefix_caching=False, seed=0
    )
    rows: list[Any] = [{"prompt_token_ids": ids} for ids in asked]

    def sample(seed: int) -> int:
        how = SamplingParams(temperature=1.0, max_tokens=NEW, logprobs=0, seed=None, detokenize=False)
        return sum(len(one.outputs[0].token_ids) for one in engine.generate(rows, how, use_tqdm=False))

    return sample


def of_keel(folder: str, dtype: str, asked: list[list[int]]) -> Callable[[int], int]:
    import torch
    from transformers import AutoModelForCausalLM

    from keel.models.freed_memory import keep_freed_memory
    from keel.models.precision import prepare_model
    from keel.rollout.engine import generate
    from keel.types import Sampling

    keep_freed_memory()  # as in every run
    policy: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if dtype != "float32":
        policy = prepare_model(policy, dtype)

    def sample(seed: int) -> int:
        done = generate(policy, asked, Sampling(NEW), stop_ids=[EOS], pad_id=0, seed=seed, batch_size=SLOTS)
        return sum(len(completion.ids) for completion in done)

    return sample


def measure(side: str, folder: str, dtype: str, count: int, threads: int) -> None:
    """In a process of its own: print tokens a second, the median of three."""
    import torch

    if side == "keel":
        torch.set_num_threads(threads)
    vocabulary = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]
    sample = {"vllm": of_vllm, "keel": of_keel}[side](folder, dtype, prompts(count, vocabulary))
    speeds: list[float] = []
    for number in range(TIMES + 1):
        start = time.perf_counter()
        tokens = sample(number)
        speeds.append(tokens / (time.perf_counter() - start))
    print(json.dumps({"speed": statistics.median(speeds[1:]), "first": speeds[0], "tokens": tokens}))


def measured(python: str, side: str, folder: Path, asked: argparse.Namespace) -> float:
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[: asked.threads]))
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(asked.threads), "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_LOGGING_LEVEL": "ERROR",
    }  # fmt: skip
    environment |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    more = ["--side", side, "--folder", str(folder), "--dtype", asked.dtype, "--prompts", str(asked.prompts)]
    command = [python, __file__, *more, "--threads", str(asked.threads)]
    ended = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(ended.stderr[-4000:])
    one = json.loads(ended.stdout.strip().splitlines()[-1])
    said = f"{side:5} {one['speed']:8,.0f} tokens a second"
    print(f"{said} (warming up: {one['first']:,.0f}; {one['tokens']} tokens)", flush=True)
    return one["speed"]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--vllm", default=sys.executable, help="an interpreter with vLLM")
    parser.add_argument("--size", default="small", choices=["small", "half"])
    parser.add_argument("--dtype", default="float32", help="of both sides; keel takes `auto` too")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--side", choices=["keel", "vllm"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side:
        measure(asked.side, str(asked.folder), asked.dtype, asked.prompts, asked.threads)
        return
    import peers

    with tempfile.TemporaryDirectory() as name:
        peers.prepare(Path(name), asked.size)
        sides = [("vllm", asked.vllm), ("keel", sys.executable)]
        pairs = [[measured(python, side, Path(name) / "ending", asked) for side, python in sides]
                 for _ in range(asked.pairs)]  # fmt: skip
    ratios = [ours / theirs for theirs, ours in pairs]
    theirs, ours = (statistics.median(side) for side in zip(*pairs, strict=True))
    print(
        f"{asked.size}, {asked.dtype}, {SLOTS} slots, {asked.threads} threads: vLLM {theirs:,.0f}, keel "
        f"{ours:,.0f} tokens a second; in a pair keel has {statistics.median(ratios):.2f} times vLLM's "
        f"({min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
