"""keel's rollout engine against transformers' `generate`, in pairs in one run: useful tokens (up to and with
the end of sequence) a second, on a Llama of 7.3 M parameters with prompts of 32 tokens and at most 64 new
ones.

    python benchmarks/engine.py [--threads N] [--repeats N] [--processor]
    python benchmarks/engine.py --long [--slots N] [--rows N] [--new N] [--curve N,N,...]

Four cases: 64 distinct prompts that all end at the limit; 64 prompts whose responses end after 24 tokens on
average; 8 prompts with 8 samples each; 256 prompts, which `generate` takes in batches of 64 and keel streams
through 64 slots. The last one also with `dtype: auto`. Both sides sample at temperature 1 from the whole
distribution.

`--long`: responses of up to 2,000 tokens, 1,000 on average, of more prompts than there are slots; and what a
token costs keel in responses that all have 250, 500, 1,000 and 2,000 tokens, with attention's share of it,
which is all that may grow. `--processor` counts the processor's seconds of the process, which other work on
the machine disturbs less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from keel.accel.row_attention import Look
from keel.models.precision import prepare_model
from keel.rollout.engine import generate
from keel.types import Sampling

Clock = Callable[[], float]
VOCABULARY, PROMPT, NEW, BATCH, EOS, NEVER = 2048, 32, 64, 64, 2, -1


def model(mean_length: int | None, positions: int = 512) -> Any:
    """A random Llama; with `mean_length` the chance of EOS is about 1 / mean_length at every position."""
    torch.manual_seed(0)
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=4,
            max_position_embeddings=positions,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=EOS,
        )
    ).eval()
    if mean_length is None:
        made.generation_config.eos_token_id = None
        return made
    with torch.no_grad():
        # a direction that every hidden state carries, and a head for EOS that reads it
        embeddings = made.model.embed_tokens.weight
        direction = torch.randn(embeddings.shape[1])
        embeddings += 3 * embeddings.norm(dim=1).mean() * direction / direction.norm()
        hidden = made.model(torch.randint(4, VOCABULARY, (16, 64))).last_hidden_state.flatten(0, 1).mean(0)
        made.lm_head.weight[EOS] = (
            torch.log(torch.tensor(VOCABULARY / mean_length)) * hidden / hidden.dot(hidden)
        )
    return made


def of_transformers(policy: Any, prompts: Sequence[Sequence[int]], new: int = NEW, batch: int = BATCH) -> int:
    useful = 0
    for start in range(0, len(prompts), batch):
        ids = torch.tensor(prompts[start : start + batch], device=policy.device)
        with torch.no_grad():
            done = policy.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                do_sample=True,
                top_k=0,
                pad_token_id=0,
            )
        useful += int((done[:, PROMPT:] != 0).sum())
    return useful


def of_keel(
    policy: Any, prompts: Sequence[Sequence[int]], stop: int, new: int = NEW, batch: int = BATCH
) -> int:
    done = generate(policy, prompts, Sampling(new), stop_ids=[stop], pad_id=0, seed=0, batch_size=batch)
    return sum(len(completion.ids) for completion in done)


def compare(
    name: str,
    sides: dict[str, Callable[[], int]],
    repeats: int,
    clock: Clock = time.perf_counter,
    warm: int = 1,
) -> dict[str, float]:
    """Medians of tokens a second after a warm-up, and their ratio to the first side's."""
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(repeats + warm):
        for side, sample in sides.items():
            start = clock()
            tokens = sample()
            if number >= warm:
                speeds[side].append(tokens / (clock() - start))
    medians = {side: statistics.median(values) for side, values in speeds.items()}
    base = next(iter(medians.values()))
    print(
        f"{name:28}" + "  ".join(f"{s} {v:7,.0f} ({v / base:.2f}×)" for s, v in medians.items()), flush=True
    )
    return medians


def long_responses(slots: int, rows: int, new: int, repeats: int, clock: Clock) -> None:
    """Responses of about 1,000 tokens each and `new` at most, of `rows` prompts; `generate` takes `slots` at
    a time."""
    policy = model(1000, PROMPT + new)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(4, VOCABULARY, (rows, PROMPT), generator=generator).tolist()
    of_keel(policy, prompts[:2], EOS, 4, slots)  # which tries its paths
    sides = {
        "generate": partial(of_transformers, policy, prompts, new, slots),
        "keel": partial(of_keel, policy, prompts, EOS, new, slots),
    }
    compare(f"{rows} through {slots}, {new:,} at most", sides, repeats, clock, warm=0)


def cost_of_length(slots: int, lengths: Sequence[int], clock: Clock) -> None:
    """Microseconds a token where all responses have one length, and how many of them are attention's."""
    policy = model(None, PROMPT + max(lengths, default=0))
    prompts = torch.randint(
        4, VOCABULARY, (slots, PROMPT), generator=torch.Generator().manual_seed(1)
    ).tolist()
    of_keel(policy, prompts, NEVER, 4, slots)
    plainly, spent = Look.attend, 0.0

    def watched(*given: Any, **more: Any) -> torch.Tensor:
        nonlocal spent
        start = clock()
        attended = plainly(*given, **more)
        spent += clock() - start
        return attended

    Look.attend = watched
    try:
        for length in lengths:
            spent, start = 0.0, clock()
            tokens = of_keel(policy, prompts, NEVER, length, slots)
            each, attention = (1e6 * seconds / tokens for seconds in (clock() - start, spent))
            print(
                f"{length:5,} tokens a response: {each:5.0f} µs a token, attention {attention:5.0f},"
                f" all else {each - attention:5.0f}",
                flush=True,
            )
    finally:
        Look.attend = plainly


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--processor", action="store_true")
    options.add_argument("--long", action="store_true")
    options.add_argument("--slots", type=int, default=16)
    options.add_argument("--rows", type=int, default=64)
    options.add_argument("--new", type=int, default=2000)
    options.add_argument("--curve", default="250,500,1000,2000")
    asked = options.parse_args()
    torch.set_num_threads(asked.threads)
    clock = time.process_time if asked.processor else time.perf_counter
    if asked.long:
        long_responses(asked.slots, asked.rows, asked.new, asked.repeats, clock)
        cost_of_length(asked.slots, [int(length) for length in asked.curve.split(",") if length], clock)
        return
    generator = torch.Generator().manual_seed(1)

    def prompts(count: int) -> list[list[int]]:
        return torch.randint(4, VOCABULARY, (count, PROMPT), generator=generator).tolist()

    even, mixed = model(None), model(24)
    cases = {
        "64 of equal length": (even, prompts(64), NEVER),
        "64 of mixed length": (mixed, prompts(64), EOS),
        "8 prompts × 8 samples": (mixed, [p for p in prompts(8) for _ in range(8)], EOS),
        "256 through 64 slots": (mixed, prompts(256), EOS),
    }
    for name, (policy, asked_for, stop) in cases.items():
        sides = {
            "generate": partial(of_transformers, policy, asked_for),
            "keel": partial(of_keel, policy, asked_for, stop),
        }
        compare(name, sides, asked.repeats, clock)
    policy, asked_for, stop = cases["256 through 64 slots"]
    auto = prepare_model(model(24), "auto")
    sides = {
        "generate": partial(of_transformers, policy, asked_for),
        "keel": partial(of_keel, auto, asked_for, stop),
    }
    compare("256, keel in dtype auto", sides, asked.repeats, clock)


if __name__ == "__main__":
    main()
