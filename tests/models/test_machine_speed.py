"""What the machine reaches, what is kept of it, and what a phase costs at least."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from keel import user_cache
from keel.cli.doctor import bench_text
from keel.data.batches import pairs_of, useful_pairs
from keel.models import machine_speed
from keel.models.machine_speed import Speed, speed
from keel.models.phase_cost import PhaseCost, decode_cost, forward_cost, optimizer_cost, train_cost

CPU = torch.device("cpu")
fastest = machine_speed.fastest  # as it is without the fixture below


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache and a measuring that cost nothing."""
    monkeypatch.setenv("KEEL_CACHE", str(tmp_path))
    monkeypatch.setattr(machine_speed, "fastest", lambda device, dtype, tries=0: 7e9 + tries)
    monkeypatch.setattr(machine_speed, "reading", lambda device, size, tries=0: 1e9 + tries)
    return tmp_path


def test_a_run_takes_what_was_measured_with_care_for_its_threads_and_else_measures():
    assert speed(CPU, torch.float32) == Speed(7e9, dict.fromkeys(machine_speed.BLOCKS[1:3], 1e9))
    found = machine_speed.bench(CPU)
    assert found["kept_in"] == str(user_cache.folder() / machine_speed.KEPT)
    kept = speed(CPU, torch.bfloat16)
    assert (kept.kept, kept.flops) == (True, 7e9 + machine_speed._tries(CPU, "bfloat16"))
    assert next(iter(user_cache.read(machine_speed.KEPT).values()))["busy"] == found["busy"]
    assert set(kept.bytes_per_second) == set(machine_speed.BLOCKS)
    assert not speed(CPU, torch.float64).kept
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert not speed(CPU, torch.float32).kept
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("fast", [False, True])
def test_a_product_that_takes_seconds_is_made_once(fast, monkeypatch):
    monkeypatch.setattr(machine_speed, "has_half_products", lambda: fast)
    many = machine_speed.BENCH_TRIES
    flops = machine_speed.bench(CPU)["flops"]
    assert flops == {"float32": 7e9 + many, "bfloat16": 7e9 + (many if fast else 0)}
    made = []
    assert machine_speed._best(lambda: made.append(1), CPU, 0) > 0
    assert len(made) == 1


def test_a_busy_machine_is_said(monkeypatch):
    monkeypatch.setattr(machine_speed.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(machine_speed, "_load", lambda: 3.9)
    rates = {2**20: 50.0, 2**23: 60.0, 2**26: 20.0, 2**28: 21.0}
    monkeypatch.setattr(machine_speed, "reading", lambda device, size, tries=0: rates[size])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert machine_speed.bench(CPU)["busy"] == ["1 MiB were read slower than 8"]
        torch.set_num_threads(2)  # for whom 1 MiB is too little
        assert machine_speed.bench(CPU)["busy"] == []
        monkeypatch.setattr(machine_speed, "_load", lambda: 4.1)
        found = machine_speed.bench(CPU)
    finally:
        torch.set_num_threads(threads)
    assert found["busy"] == ["4.1 processes wanted one of 4 cores"]
    assert "look: 4.1 processes wanted one of 4 cores; measure again on an idle" in bench_text(found)


def test_a_speed_is_kept_for_the_library_that_multiplied(monkeypatch):
    """What an earlier keel measured, or one with `KEEL_ACCEL=-cpu_products`, is not the floor of this one."""
    library = {"faster": False}
    monkeypatch.setattr(machine_speed.cpu_products, "faster", lambda rows, weight: library["faster"])
    monkeypatch.setattr(machine_speed, "_best", lambda *given: 1.0 if library["faster"] else 2.0)
    monkeypatch.setattr(machine_speed, "fastest", fastest)
    machine_speed._fastest.cache_clear()
    try:
        machine_speed.bench(CPU)
        slow = speed(CPU, torch.float32)
        library["faster"] = True
        fast = speed(CPU, torch.float32)
    finally:
        machine_speed._fastest.cache_clear()
    assert (slow.kept, fast.kept) == (True, False)
    assert fast.flops == 2 * slow.flops


@pytest.mark.parametrize("faster", [False, True])
def test_a_speed_is_measured_once_for_each_number_of_threads(faster, monkeypatch):
    """faster: where keel multiplies by another library than torch does, both are tried."""
    measured = []
    monkeypatch.setattr(machine_speed.cpu_products, "faster", lambda rows, weight: faster)
    monkeypatch.setattr(machine_speed, "_best", lambda *given: measured.append(given) or 1.0)
    machine_speed._fastest.cache_clear()
    before = torch.get_num_threads()
    try:
        for threads in (1, 1, 2, 1, 2):
            torch.set_num_threads(threads)
            fastest(CPU, torch.float32)
    finally:
        torch.set_num_threads(before)
        machine_speed._fastest.cache_clear()
    assert len(measured) == (4 if faster else 2)


@pytest.mark.parametrize("spoilt", [{"flops": 1}, {}, {"flops": {"float32": "x"}, "bytes_per_second": {}}, 3])
def test_what_is_kept_and_says_nothing_is_measured_again(spoilt):
    key = next(iter(machine_speed.bench(CPU) and user_cache.read(machine_speed.KEPT)))
    user_cache.write(machine_speed.KEPT, {key: spoilt})
    assert not speed(CPU, torch.float32).kept


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf")])
def test_a_speed_that_is_none_is_measured_again(rate):
    machine_speed.bench(CPU)
    kept = user_cache.read(machine_speed.KEPT)
    next(iter(kept.values()))["flops"]["float32"] = rate
    user_cache.write(machine_speed.KEPT, kept)
    assert speed(CPU, torch.float32).flops == 7e9
    assert speed(CPU, torch.bfloat16).kept


def test_a_cache_that_cannot_be_written_is_said(monkeypatch, cache):
    (cache / "file").write_text("")
    monkeypatch.setenv("KEEL_CACHE", str(cache / "file"))
    assert machine_speed.bench(CPU)["kept_in"] is None


def test_the_floor_is_arithmetic_or_reading_whichever_takes_longer():
    machine = Speed(100.0, {10: 50.0, 1000: 5.0})
    assert machine.seconds(200, 0, 0) == 2
    assert machine.seconds(200, 50, 8) == 2  # a block that a cache holds: 1 s
    assert machine.seconds(200, 50, 11) == 10  # one that it does not
    assert machine.reading(10**9) == 5.0
    assert Speed(1.0).seconds(3, 10, 10) == 3  # where nobody knows how fast memory is


def test_costs_are_those_of_the_models_sizes():
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, num_key_value_heads=2, **sizes))
    weights = 2 * (8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 12) + 20 * 8  # read in a pass, and multiplied with
    once = forward_cost(model, torch.bfloat16)
    assert once == PhaseCost(2 * weights, 4 * 2 * 8, 2 * weights)
    whole = weights + 20 * 8  # with the embedding, which has a gradient too
    assert train_cost(model, torch.float32, adapters=False) == PhaseCost(
        6 * weights, 3 * 4 * 2 * 8, 2 * 4 * weights + 8 * whole
    )
    assert (
        decode_cost(model, torch.float32).pair_bytes == 2 * 2 * (2 * 2) * 4
    )  # k and v, layers, heads × width
    assert optimizer_cost([*model.parameters()]).passed == 32 * (whole + 5 * 8)
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    assert optimizer_cost([*half.parameters()]).passed == 16 * (whole + 5 * 8)
    gradients = train_cost(half, torch.bfloat16, adapters=False).passed - 2 * 2 * weights
    assert gradients == 4 * whole
    assert once + once == PhaseCost(4 * weights, 8 * 2 * 8, 4 * weights)
    assert forward_cost(nn.Linear(2, 3), torch.float32).pair == 0  # of what has no config nobody knows


def test_an_optimiser_steps_on_what_a_rank_has_of_cut_weights():
    cut = nn.Parameter(torch.ones(6))
    cut.to_local = lambda: torch.ones(2)
    assert optimizer_cost([cut, nn.Parameter(torch.ones(3))]).passed == 32 * (2 + 3)


def test_pairs_are_those_of_a_token_and_what_stands_before_it():
    assert pairs_of(3) == 6
    prompt = (1, 2, 3)
    # a prompt once: 6; the first response's tokens 4 and 5 attend to 4 and 5; the other's 4 to 4
    assert useful_pairs([(prompt, 6), (prompt, 5)]) == 6 + (4 + 5) + 4
