"""vLLM itself, its CPU package, driven by keel: `make test-vllm`, which installs it into an environment of
its own (KEEL_TEST_VLLM)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from keel.models.lora import Adapters, add_adapters
from keel.rollout import GenerationRequest
from keel.rollout.protocol import Rows
from keel.rollout.score_responses import score
from keel.rollout.vllm import ServerSettings, VllmEngine
from keel.rollout.vllm.server import Server
from keel.types import Sampling

ENVIRONMENT = os.environ.get("KEEL_TEST_VLLM", "")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not ENVIRONMENT, reason="KEEL_TEST_VLLM names no environment: run `make test-vllm`"),
]
PROMPTS = [[5, 6, 7], [9, 4], list(range(40, 60)), [9, 4], [100, 3, 7, 8]]
SHORT = f"python:{Path(__file__).parents[1] / 'stages' / 'rewards_for_tests.py'}:short_tokens"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Llama-shaped, with heads as wide as vLLM's kernels want them, tied embeddings and grouped queries."""
    folder = tmp_path_factory.mktemp("llama") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def opened(tmp_path: Path, tokenizer: Any) -> Iterator[Callable[..., VllmEngine]]:
    started: list[VllmEngine] = []

    def go(model: Any, **settings: Any) -> VllmEngine:
        where = ServerSettings(environment=ENVIRONMENT, **settings)
        started.append(VllmEngine(model, where, tmp_path / "engine", tokenizer, 128, print))
        return started[-1]

    yield go
    for one in started:
        one.close()


def asked(seed: int, **more: Any) -> GenerationRequest:
    return GenerationRequest(PROMPTS * 4, Sampling(**({"max_new_tokens": 24} | more)), [1], 0, seed)


def gaps(model: Any, completions: Any, temperature: float = 1.0) -> torch.Tensor:
    """(N,) |log π of transformers − of vLLM| of each token."""
    scored = score(
        completions, model, model, temperature=temperature, pad_id=0, device=torch.device("cpu")
    )  # fmt: skip
    sampled = torch.tensor([x for c in completions for x in c.logp])
    return (scored.logp[scored.mask] - sampled).abs()


def moved(model: Any, by: float = 0.02) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn_like(parameter))


@pytest.mark.parametrize("way", ["all", "adapters", "adapters folded in"])
def test_weights_after_a_push_give_the_log_probabilities_of_transformers(
    way: str, opened: Any, model_folder: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    if way != "all":
        model = add_adapters(model, Adapters(r=4), 0)
    sampler = opened(model, whole=way == "adapters folded in")
    for push in range(3):
        for temperature in (1.0, 0.7):
            done = sampler.generate(asked(push, temperature=temperature))
            found = gaps(model, done, temperature)
            print(f"{way}, push {push}, t {temperature}: mean {found.mean():.2e}, max {found.max():.2e}")
            assert found.max() < 1e-4
        moved(model)
        assert gaps(model, done, 0.7).mean() > 1e-2  # the weights did change
    assert sampler.server.pushes == 3
    assert sampler.asked_again == 0


def test_what_a_row_draws_and_where_it_ends(opened: Any, model_folder: Path, tokenizer: Any) -> None:
    """The same seed gives the same ids, alone or among others; greedy is the trainer's argmax; limits, stop
    ids and stop strings are keel's; ids that stand for nothing are not drawn."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    sampler = opened(model)
    whole = sampler.generate(asked(5))
    assert [c.ids for c in sampler.generate(asked(5))] == [c.ids for c in whole]
    part = GenerationRequest(PROMPTS[1:3], Sampling(24), [1], 0, 5, rows=Rows([1, 2], 20))
    assert [c.ids for c in sampler.generate(part)] == [c.ids for c in whole[1:3]]
    assert len({c.ids for c in whole}) > 15
    for completion in sampler.generate(asked(0, temperature=0.0, max_new_tokens=8)):
        with torch.no_grad():
            ids = [*completion.prompt_ids, *completion.ids]
            expected = model(torch.tensor([ids])).logits[0].argmax(-1)
        assert expected[len(completion.prompt_ids) - 1 : -1].tolist() == list(completion.ids)
    for completion in sampler.generate(asked(1, vocab=200, temperature=2.0)):
        assert max(completion.ids) < 200
    limited = GenerationRequest(PROMPTS, Sampling(9), list(range(1, 60)), 0, 3, limits=[1, 3, 5, 7, 9])
    for completion, limit in zip(sampler.generate(limited), limited.limits or (), strict=True):
        stops = [i in limited.stop_ids for i in completion.ids]
        assert len(completion.ids) <= limit
        assert not any(stops[:-1])
        assert stops[-1] == completion.ended or len(completion.ids) == limit
    words = [tokenizer.decode([token]) for completion in whole for token in completion.ids[2:]]
    stop = next(word for word in words if word.isascii() and len(word.strip()) > 1)
    request = GenerationRequest.of(tokenizer, PROMPTS * 4, Sampling(24, stop=(stop,)), 5)
    done = sampler.generate(request)
    assert any(c.stop == stop for c in done)
    for completion in done:
        if completion.stop:
            assert stop not in tokenizer.decode(completion.ids[:-1], skip_special_tokens=False)
    for more in ({"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.2}):
        for completion in sampler.generate(asked(2, max_new_tokens=4, **more)):
            with torch.no_grad():
                ids = torch.tensor([[*completion.prompt_ids, *completion.ids]])
                logits = model(ids).logits[0, len(completion.prompt_ids) - 1 : -1]
            p = logits.softmax(-1).gather(-1, ids[0, len(completion.prompt_ids) :, None]).squeeze(-1)
            ranks = (logits.softmax(-1) > p[:, None] + 1e-6).sum(-1)
            above = torch.where(logits.softmax(-1) > p[:, None] + 1e-6, logits.softmax(-1), 0).sum(-1)
            assert not ("top_k" in more and (ranks >= 5).any())
            assert not ("top_p" in more and (above >= 0.5 + 1e-4).any())
            assert not ("min_p" in more and (p < 0.2 * logits.softmax(-1).amax(-1) - 1e-5).any())


def test_grpo_by_a_server_that_is_killed(run: Any, model_folder: Path, data: Any, tmp_path: Path) -> None:
    """Three updates; the server is killed in the middle, is started again, and no update is lost."""
    stage = {
        "kind": "grpo", "model": {"path": str(model_folder), "dtype": "float32"}, "reward": SHORT,
        "data": str(data.prompts), "batch_size": 16, "samples_per_prompt": 4, "updates": 3, "lr": 1e-3,
        "sampling": {"max_new_tokens": 12}, "importance_cap": 2.0,
        "rollout": {"engine": "vllm", "environment": ENVIRONMENT},
    }  # fmt: skip
    killed, started = list[int](), set[int]()
    original = VllmEngine.generate

    def generate(self: VllmEngine, request: Any, count: Any = None) -> Any:
        if self.server.pushes == 2 and not killed:
            killed.append(_server_of(self))
            os.kill(killed[0], signal.SIGKILL)
        done = original(self, request, count)
        started.add(_server_of(self))
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VllmEngine, "generate", generate)
        pipeline = run({"stages": {"grpo": stage}}, tmp_path)
    place = pipeline.stage_directory("grpo")
    rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    facts = json.loads((place / "stage.json").read_text())["facts"]["engines"][0]
    print("drift", [row["rollout/sampler_drift"] for row in rows], facts)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["rollout/sampler_drift"] < 1e-3 for row in rows)
    assert facts["restarts"] == 1
    for group in [*killed, *started]:  # nothing is left of it
        with pytest.raises(ProcessLookupError):
            os.killpg(group, 0)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_grpo_on_two_ranks_by_a_server_that_is_killed(
    strategy: str, model_folder: Path, data: Any, tmp_path: Path
) -> None:
    """Rows, their seeds and what is learned are those of one process, up to rounding: the server rounds by
    what it computes together."""
    stage = {
        "kind": "grpo", "model": {"path": str(model_folder), "dtype": "float32"}, "reward": SHORT,
        "data": str(data.prompts), "batch_size": 16, "samples_per_prompt": 4, "updates": 3, "lr": 1e-3,
        "sampling": {"max_new_tokens": 12}, "old_logp": "trainer",
        "rollout": {"engine": "vllm", "environment": ENVIRONMENT},
    }  # fmt: skip
    config = {"name": "v", "device": "cpu", "threads": 1, "dtype": "float32", "stages": {"grpo": stage}}
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config))
    rows, facts = {}, {}
    for ranks in (1, 2):
        run = tmp_path / f"on-{ranks}"
        place = run / "stages" / "grpo"
        more = ["--nproc", "2", f"distributed.strategy={strategy}"] if ranks == 2 else []
        words = ["run", path, "--runs", tmp_path, "--name", run.name, *more]
        said, killed = tmp_path / f"said-{ranks}", ranks == 1
        with open(said, "w", encoding="utf-8") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "keel", *map(str, words)], stdout=file, stderr=file
            )
            while process.poll() is None:
                if not killed and (place / "metrics.jsonl").exists():
                    killed = _kill_servers_on(place / "engine" / "start")
                time.sleep(0.05)
        assert process.returncode == 0, said.read_text()[-3000:]
        rows[ranks] = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        facts[ranks] = json.loads((place / "stage.json").read_text())["facts"]["engines"][0]
        assert not _kill_servers_on(place / "engine" / "start")  # none is left
    print(strategy, facts, [[row["rollout/sampler_drift"] for row in rows[ranks]] for ranks in (1, 2)])
    assert (facts[1]["restarts"], facts[2]["restarts"]) == (0, 1)
    assert [row["step"] for row in rows[2]] == [1, 2, 3]
    for one, other in zip(rows[1], rows[2], strict=True):
        assert other["rollout/sampler_drift"] < 1e-3
        for name in (
            "objective/scores", "objective/kl", "objective/entropy", "rollout/response_length",
            "val/num_eos_tokens",
        ):  # fmt: skip
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4), name


def _kill_servers_on(folder: Path) -> bool:
    """End whoever serves the model of a folder; whether there was anybody."""
    found = False
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:
            continue
        if str(folder).encode() in words and b"--port" in words and b"-I" not in words:
            with contextlib.suppress(ProcessLookupError):  # of a process that leads no group
                os.killpg(int(entry.name), signal.SIGKILL)
                found = True
    return found


def _server_of(engine: VllmEngine) -> int:
    """The process that serves, and the group of all that it started."""
    own = engine.server._server
    assert isinstance(own, Server)
    assert own._guard is not None
    one = own._guard.pid
    for _ in range(2):  # a guard is two processes
        one = int(Path(f"/proc/{one}/task/{one}/children").read_text().split()[0])
    return one
