"""The evening goes on: from demonstrations and comparisons to a judged policy, and out of the house."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from keel.data import chat
from keel.models.load import ModelSource, causal_lm, load_tokenizer
from keel.stages import preference_rows

sys.path.insert(0, str(Path(__file__).parent))
from shapes import blank_completions, label_studio

pytestmark = pytest.mark.evening
SHORT = {"max_new_tokens": 8}


@pytest.fixture
def chain(keel: Any, tmp_path: Path, bases: dict[str, Path]) -> Path:
    """sft, a reward model, GRPO against it with adapters, and a judge; returns the run's stages."""
    talks, votes = blank_completions(tmp_path), label_studio(tmp_path)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt, _, _ in votes.pairs))
    step = {"max_steps": 3, "batch_size": 4, "lr": 1e-2}
    stages = {
        "sft": {
            "kind": "sft", "model": str(bases["plain"]), **step, "max_steps": 60, "epochs": 30,
            "data": {"source": str(talks.path), "on_bad": "skip"},
        },
        "reward": {
            "kind": "reward", "model": "sft", "data": str(votes.path), "sampling": SHORT, "normalize": 8,
            **step,
        },
        "grpo": {
            "kind": "grpo", "model": "sft", "reward": "reward", "data": str(prompts), "updates": 2,
            "batch_size": 8, "samples_per_prompt": 4, "sampling": SHORT, "lr": 1e-2, "lora": {"r": 4},
        },
        "judge": {
            "kind": "evaluate", "models": ["sft", "grpo"], "reward": "reward", "data": str(prompts),
            "sampling": SHORT,
        },
    }  # fmt: skip
    config = tmp_path / "chain.yaml"
    head = {"name": "chain", "threads": 1, "device": "cpu"}
    config.write_text(yaml.safe_dump({**head, "stages": stages}, sort_keys=False), encoding="utf-8")
    for command in ("plan", "run", "report", "diagnose"):
        done = keel(command, config if command in ("plan", "run") else tmp_path / "runs" / "chain")
        assert done.code == 0, done.err
    return tmp_path / "runs" / "chain" / "stages"


def test_what_the_chain_leaves_is_the_same_elsewhere(chain: Path, keel: Any, tmp_path: Path) -> None:
    _samples_have_the_scores_of_transformers(chain)
    _peft_puts_the_adapter_on(chain)
    _a_gguf_has_the_weights_and_tokens(chain, keel, tmp_path)


def _samples_have_the_scores_of_transformers(chain: Path) -> None:
    """Computed from samples.jsonl, by a sequence classifier on prompt, reply and end."""
    model: Any = AutoModelForSequenceClassification.from_pretrained(chain / "reward" / "model").eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(chain / "reward" / "model")
    rows = [json.loads(line) for line in (chain / "judge" / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    readable = 0
    for row in rows:
        if "\ufffd" in row["completion"]:  # bytes of half a letter: the text has lost them
            continue
        prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt)["input_ids"] + tokenizer(row["completion"])["input_ids"]
        ids += [tokenizer.eos_token_id] * (row["stop_reason"] == "eos")
        with torch.no_grad():
            score = float(model(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits)
        assert row["proxy"] == pytest.approx(score, abs=1e-4)
        readable += 1
    assert readable > 12
    result = json.loads((chain / "judge" / "result.json").read_text())["models"]
    for name in ("sft", "grpo"):
        scores = [row["proxy"] for row in rows if row["model"] == name]
        assert result[name]["proxy"]["mean"] == pytest.approx(sum(scores) / len(scores), abs=1e-6)


def _peft_puts_the_adapter_on(chain: Path) -> None:
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(chain / "grpo" / "model")(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(chain / "sft" / "model")(ids).logits
        found = peft.AutoPeftModelForCausalLM.from_pretrained(chain / "grpo" / "model" / "adapter")
        adapted = found.eval()(ids).logits
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-4)
    assert (plain - merged).abs().max() > 1e-3


def _a_gguf_has_the_weights_and_tokens(chain: Path, keel: Any, tmp_path: Path) -> None:
    import gguf

    done = keel("export", chain.parent, "--to", "gguf", "--out", tmp_path / "mine.gguf")
    assert done.code == 0, done.err
    reader = gguf.GGUFReader(tmp_path / "mine.gguf")
    model = AutoModelForCausalLM.from_pretrained(chain / "grpo" / "model")
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    assert torch.equal(tensors["token_embd.weight"], model.get_input_embeddings().weight)
    assert torch.equal(tensors["output.weight"], model.get_output_embeddings().weight)
    tokenizer: Any = AutoTokenizer.from_pretrained(chain / "grpo" / "model")
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert tokens == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))


@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-eval is a peer, and no dependency: pip install lm-eval -c constraints.txt",
)
def test_lm_eval_finds_the_log_likelihoods_of_keel(chain: Path) -> None:
    """Of replies to texts and to conversations, by the policy with its adapter merged in; several at once, so
    that they are padded."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder = str(chain / "grpo" / "model")
    judge = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=3)
    talk: Any = ({"role": "user", "content": "the dog?"},)
    asked: list[tuple[Any, str]] = [
        (prompt, reply)
        for prompt in ("the cat is", "so the owl is blue, so", talk)
        for reply in (" red.", " so it is, so it is.")
    ]
    written = [
        p if isinstance(p, str) else judge.apply_chat_template([dict(turn) for turn in p]) for p, _ in asked
    ]
    requests = [
        Instance("loglikelihood", {}, (prompt, reply), number)
        for number, (prompt, (_, reply)) in enumerate(zip(written, asked, strict=True))
    ]
    theirs = [value for value, _ in judge.loglikelihood(requests, disable_tqdm=True)]

    tokenizer = load_tokenizer(folder)
    responses = [
        preference_rows.Response(
            tuple(chat.prompt_ids(tokenizer, prompt)),
            tuple(tokenizer(reply, add_special_tokens=False)["input_ids"]),
        )
        for prompt, reply in asked
    ]
    model = causal_lm(ModelSource(folder, dtype="float32"), 0).eval()
    ours = preference_rows.scores(model, responses, chat.ensure_pad(tokenizer), torch.device("cpu"))
    assert theirs == pytest.approx(ours, abs=1e-4)
    assert len({round(value, 3) for value in ours}) == len(asked)


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is a peer, and no dependency")
def test_trainers_of_trl_read_what_the_chain_leaves(chain: Path, tmp_path: Path) -> None:
    """The same logits, and a step."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    common = {
        "max_steps": 1, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "bf16": False,
        "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no", "max_length": 32,
    }  # fmt: skip
    rows = [
        {"prompt": "the dog?", "chosen": " it is red.", "rejected": f" it is {c}."} for c in ("blue", "pink")
    ]
    texts = Dataset.from_list([{"text": row["prompt"] + row["chosen"]} for row in rows])
    policy, reward = str(chain / "grpo" / "model"), str(chain / "reward" / "model")
    trainers = {
        policy: SFTTrainer(policy, SFTConfig(str(tmp_path / "a"), **common), train_dataset=texts),
        reward: RewardTrainer(
            reward, RewardConfig(str(tmp_path / "b"), **common), train_dataset=Dataset.from_list(rows)
        ),
    }
    ids = torch.arange(3, 40).unsqueeze(0)
    for place, trainer in trainers.items():
        auto: Any = AutoModelForCausalLM if place == policy else AutoModelForSequenceClassification
        with torch.no_grad():
            ours, theirs = auto.from_pretrained(place)(ids).logits, trainer.model.eval()(ids).logits
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
        trainer.train()
