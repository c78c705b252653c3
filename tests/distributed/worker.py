"""One rank of a test, or a process alone.

`python worker.py float64 OUT CONFIG STRATEGY …` runs CONFIG in float64 with each strategy, into OUT/STRATEGY,
and keeps the gradient of every optimiser step. `python worker.py episodes …` does so where turns call tools
by what their tokens add up to, since a model that has learnt nothing calls none. `python worker.py nan …`
does so where the third gradient is none on the last rank. `python worker.py fault
FAULT RANK STEP ARGS …` is `keel ARGS`, where RANK meets FAULT in its optimiser step number STEP: raise, kill,
stop, spin, nan. `python worker.py bytes OUT ARGS …` is `keel ARGS`, and the first rank keeps what it had sent
over the network at each optimiser step. `python worker.py late OUT` deals out work that takes the last rank
longer than the timeout. `half-bytes`: as `bytes`, on a processor that is fast in bfloat16.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any

import torch


def in_float64() -> None:
    """All weights, a value head's too, and the one place where a Llama computes in float32 all the same."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from keel.models import load, roles, shared_base

    def norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    load.weights = shared_base.weights = lambda dtype: torch.float64
    head = roles._value_head
    roles._value_head = lambda *given: head(*given).double()
    LlamaRMSNorm.forward = norm


def keep_gradients(kept: list[list[torch.Tensor]]) -> None:
    """The gradients that every step clips: summed over micro-batches and ranks, whole."""
    from keel.distributed import sharded

    clip = torch.nn.utils.clip_grad_norm_

    def keeping(parameters: list[Any], *more: Any, **options: Any) -> torch.Tensor:
        full = [sharded.number(p.grad.detach()).clone() for p in parameters]
        if all(bool(gradient.isfinite().all()) for gradient in full):
            kept.append(full)
        return clip(parameters, *more, **options)

    torch.nn.utils.clip_grad_norm_ = keeping  # pyright: ignore


def float64(out: Path, config: Path, *strategies: str) -> None:
    from keel.config import read
    from keel.distributed import records
    from keel.pipeline.pipeline import Pipeline

    in_float64()
    kept: list[list[torch.Tensor]] = []
    keep_gradients(kept)
    for strategy in strategies:
        kept.clear()
        how = ["fsdp", "distributed.offload=true"] if strategy == "offload" else [strategy]
        settings = read(config, ["distributed.strategy=" + how[0], *how[1:], "distributed.timeout=50"])
        pipeline = Pipeline(settings, out / strategy, lambda line: print(line, file=sys.stderr))
        pipeline._report = lambda: None
        pipeline.run()
        if records.rank() == 0:
            torch.save(list(kept), out / strategy / "gradients.pt")


def call_by_tokens() -> None:
    """Two turns in three call the environment's `add`."""
    from keel.data import chat
    from keel.data.chat.tool_calls import Call, Said

    def said(self: Any, prompt_ids: Any, ids: Any) -> Said:
        total = sum(ids)
        return Said("enough") if total % 3 == 0 else Said("", (Call("add", {"amount": total % 7}),))

    chat.ToolTemplate.said = said


def third_gradient_is_none() -> None:
    """On the last rank, where it has any part of it."""
    from keel.distributed import group
    from keel.models import optim

    before, steps = optim.step, 0

    def stepping(optimizer: Any, *given: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3 and group.rank() == group.size() - 1:
            for parameter in optimizer.param_groups[0]["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(float("nan"))
        return before(optimizer, *given)

    optim.step = stepping


def fault(what: str, rank: str, step: str, *arguments: str) -> None:
    from keel.cli.main import main
    from keel.models import optim

    own, steps = os.environ.get("RANK", "0"), 0
    before = optim.step

    def stepping(*given: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == int(step) and own == rank:
            Path(os.environ["KEEL_TEST_FAULT_MET"]).write_text(str(time.time()))
            if what == "raise":
                raise ValueError("a reward of mine is broken")
            if what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            while what == "spin":
                pass
            if what == "nan":
                for group in given[0].param_groups:
                    for parameter in group["params"]:
                        if parameter.grad is not None:
                            parameter.grad.fill_(float("nan"))
        return before(*given)

    optim.step = stepping
    sys.argv = ["keel", *arguments]
    main()


def sent() -> int:
    """Bytes that this process has sent by TCP, as its kernel counts them (tcp_info's tcpi_bytes_sent)."""
    total = 0
    for number in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{number}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(number))) as one:
                info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:
            continue
        total += struct.unpack_from("<Q", info, 200)[0]
    return total


def multiply_in_bfloat16() -> None:
    """As on a processor that is fast in it."""
    from keel.models import precision

    precision.fast_in_bfloat16 = lambda device: True


def count_bytes(out: str, *arguments: str) -> None:
    from keel.cli.main import main
    from keel.models import optim

    before, found = optim.step, list[int]()

    def stepping(*given: Any) -> Any:
        done = before(*given)
        found.append(sent())
        if os.environ["RANK"] == "0":
            Path(out).write_text(json.dumps(found))
        return done

    optim.step = stepping
    sys.argv = ["keel", *arguments]
    main()


def late(out: str) -> None:
    from keel.distributed import group

    def work(item: int) -> int:
        time.sleep(8.0 if group.rank() else 0.0)
        return item + 1

    with group.joined("cpu", "ddp", timeout=5.0):
        found = [group.mapped([1, 2], work), group.gathered_or_error(lambda: work(2 * group.rank()))]
        if group.is_first():
            Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "episodes":
        call_by_tokens()
    if sys.argv[1] == "nan":
        third_gradient_is_none()
    if sys.argv[1] in ("float64", "episodes", "nan"):
        float64(Path(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
    elif sys.argv[1] == "late":
        late(sys.argv[2])
    elif sys.argv[1] in ("bytes", "half-bytes"):
        if sys.argv[1] == "half-bytes":
            multiply_in_bfloat16()
        count_bytes(*sys.argv[2:])
    else:
        fault(*sys.argv[2:])
