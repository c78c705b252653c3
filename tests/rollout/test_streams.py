"""Several streams at once: the tokens are those of one, whichever thread is faster."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from keel.accel import patches
from keel.accel.packed_layers import PackedLayers
from keel.rollout import streams
from keel.rollout.engine import TokenCount, generate
from keel.rollout.stream import Stream
from keel.rollout.streams import shared_out
from keel.types import Completion, Sampling

pytestmark = pytest.mark.usefixtures("accel_on")
EOS, PAD = 1, 0
PROMPTS = [[5, 6, 7], [9], [5, 6, 7], [8, 8, 3, 4], [10, 3], [11, 2, 2]] * 2


@pytest.fixture(autouse=True)
def small_streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two streams. What runs before them, and beside other tests, has one thread."""
    monkeypatch.setattr(streams, "LEAST", 2)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def llama() -> Any:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=48, bos_token_id=EOS, eos_token_id=EOS, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def sampled(model: Any, threads: int = 2, **more: Any) -> list[Completion]:
    """threads: the first time with a model one, as two that share an operation wait for each other."""
    torch.set_num_threads(threads)
    options: dict[str, Any] = {"stop_ids": [EOS, 20, 21], "pad_id": PAD, "seed": 3, "batch_size": 5, **more}
    return generate(model, PROMPTS, Sampling(12), **options)


def test_two_streams_sample_what_one_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    model, whose = llama(), set[int]()
    with patches.disabled("decode_streams"):
        alone = TokenCount()
        expected = sampled(model, 1, hidden=True, work=alone, limits=[12, 3] * 6)
    plainly = PackedLayers.step

    def step(self: PackedLayers, *given: Any) -> Any:
        whose.add(threading.get_ident())
        return plainly(self, *given)

    monkeypatch.setattr(PackedLayers, "step", step)
    work = TokenCount()
    done = sampled(model, hidden=True, work=work, limits=[12, 3] * 6)
    assert len(whose) == 2
    assert [(c.prompt_ids, c.ids, c.stop_reason) for c in done] == [
        (c.prompt_ids, c.ids, c.stop_reason) for c in expected
    ]
    assert {"stop", "length"} <= {c.stop_reason for c in done}
    for ours, theirs in zip(done, expected, strict=True):
        assert ours.logp == pytest.approx(theirs.logp, abs=1e-4)
        assert ours.hidden is not None
        assert theirs.hidden is not None
        torch.testing.assert_close(ours.hidden, theirs.hidden, rtol=1e-4, atol=1e-4)
    assert work.useful == alone.useful
    assert work.computed >= work.useful
    assert sampled(model) == sampled(model)  # to the bit
    assert torch.get_num_threads() == 2


def test_streams_compute_in_the_mode_of_their_caller() -> None:
    model = llama()
    sampled(model, 1)  # which tries its paths
    with torch.inference_mode():
        done = sampled(model)
    assert done == sampled(model)


@pytest.mark.parametrize("name", ["AT_MOST", "MOST"])
def test_large_matrices_are_read_by_one_stream(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, name, 1)
    monkeypatch.setattr(streams, "shared_out", None)  # which would be called
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert len(sampled(llama(), 1)) == len(PROMPTS)


def test_an_error_in_one_stream_ends_all_and_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    model, main = llama(), threading.get_ident()
    sampled(model, 1)  # which tries its paths
    plainly = PackedLayers.step

    def step(self: PackedLayers, *given: Any) -> Any:
        if threading.get_ident() != main:
            raise RuntimeError("out of memory")
        return plainly(self, *given)

    monkeypatch.setattr(PackedLayers, "step", step)
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="out of memory"):
        sampled(model)
    assert threading.active_count() == before
    assert torch.get_num_threads() == 2


def test_ctrl_c_while_a_stream_is_waited_for_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, main, stopped = llama(), threading.get_ident(), threading.Event()
    sampled(model, 1)
    step, stop, join = PackedLayers.step, Stream.stop, threading.Thread.join
    waited = list[threading.Thread]()

    def slow_step(self: PackedLayers, *given: Any) -> Any:
        if threading.get_ident() != main:
            stopped.wait(20)
        return step(self, *given)

    def stop_all(self: Stream) -> None:
        stop(self)
        stopped.set()

    def interrupted(self: threading.Thread, timeout: float | None = None) -> None:
        waited.append(self)
        if len(waited) == 1:
            raise KeyboardInterrupt
        join(self, timeout)

    monkeypatch.setattr(PackedLayers, "step", slow_step)
    monkeypatch.setattr(Stream, "stop", stop_all)
    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sampled(model)
    alive = waited[0].is_alive()
    stopped.set()
    join(waited[0])
    assert not alive
    assert torch.get_num_threads() == 2


def test_a_thread_that_the_machine_refuses_is_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    sampled(model, 1)

    def refused(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        sampled(model)


def test_rows_are_shared_out_by_prompts() -> None:
    prompts = [[1, 2]] * 3 + [[3]] * 3 + [[4, 4]] * 2 + [[5]]
    parts = shared_out(prompts, 2)
    assert sorted(row for part in parts for row in part) == list(range(9))
    assert {len(part) for part in parts} <= {4, 5}
    for group in ({0, 1, 2}, {3, 4, 5}, {6, 7}):
        assert any(group <= set(part) for part in parts)
    assert sorted(map(len, shared_out([[7]] * 8, 3))) == [2, 3, 3]  # one prompt, and rows for all
