"""A model that ends its turns as its family does, behind the family's real chat template: no rollout is cut
off, and it gets the reward that it deserves."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import keel

pytestmark = pytest.mark.real
ROOT = Path(__file__).parents[2]


def _script(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


templates = _script("chat_templates", ROOT / "benchmarks" / "chat_templates.py")
zoo = _script("zoo", ROOT / "tests" / "architectures" / "zoo.py")

# part of a template's file name → the shape of the family's models, and what they emit behind a reply
FAMILIES = (
    (r"gemma-?4", "gemma4_text", "<turn|>"),
    (r"^gemma3|gemma-3", "gemma3_text", "<end_of_turn>"),
    (r"^gemma|gemma-2", "gemma2", "<end_of_turn>"),
    (r"llama-?4", "llama4_text", "<|eot|>"),
    (r"^llama3|llama-3\.", "llama", "<|eot_id|>"),
    (r"qwen3_[568]|qwen3\.5", "qwen3_5_text", "<|im_end|>"),
    (r"qwen3", "qwen3", "<|im_end|>"),
    (r"qwen2[._]5", "qwen2", "<|im_end|>"),
    (r"gpt-?oss", "gpt_oss", "<|return|>"),
    (r"^glm", "glm4_moe", "<|user|>"),
    (r"phi-?3", "phi3", "<|end|>"),
)
OTHERS = r"distill|deepseek|hermes|functionary|firefunction|diffusion|coder"  # other families' templates
SHARP = 30.0  # of the logit of what comes next, above all others at 0


def _cases() -> list[Any]:
    real = [Path(os.environ["KEEL_REAL_DATA"]) / "templates"] if "KEEL_REAL_DATA" in os.environ else []
    folders = [*real, *map(Path, filter(None, os.environ.get("KEEL_TEMPLATES", "").split(os.pathsep)))]
    cases = []
    for path in sorted(path for folder in folders for path in folder.glob("*.jinja")):
        name = path.stem.lower()
        found = next((case for case in FAMILIES if re.search(case[0], name)), None)
        if found is not None and not re.search(OTHERS, name):
            cases.append(pytest.param(path, *found[1:], id=path.stem))
    return cases or [pytest.param(None, "", "", id="none")]


def chain(kind: str, tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> Any:
    """A Markov chain in the shape of a type: behind each of `tokens` comes the next. Embeddings are unit
    vectors, layers add nothing, and the head holds the transitions."""
    size = len(tokenizer)
    width = -(-size // 16) * 16
    config = zoo.config(
        kind, hidden_size=width, vocab_size=size, tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=2048,
        **({"vocab_size_per_layer_input": size} if kind == "gemma4_text" else {}),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        model.get_input_embeddings().weight[:, :size] = torch.eye(size)
        head = model.get_output_embeddings().weight
        for one, following in pairwise(tokens):
            head[following, one] = SHARP / width**0.5
    return model


def test_rollouts_of_llama_4_end_as_it_ends(tmp_path: Path) -> None:
    """Its template comes with transformers, as the default of its processor."""
    from transformers.models.llama4.processing_llama4 import chat_template

    path = tmp_path / "llama-4.jinja"
    path.write_text(chat_template, encoding="utf-8")
    test_rollouts_end_as_the_family_ends(path, "llama4_text", "<|eot|>", tmp_path)


@pytest.mark.parametrize(("path", "kind", "end"), _cases())
def test_rollouts_end_as_the_family_ends(path: Path | None, kind: str, end: str, tmp_path: Path) -> None:
    if path is None:
        pytest.skip("KEEL_REAL_DATA and KEEL_TEMPLATES name no folder of templates")
    tokenizer = templates.opened(path)
    questions = [[{"role": "user", "content": text}] for text in ("Who?", "Where?")]
    prompt = tokenizer.apply_chat_template(questions[0], add_generation_prompt=True, tokenize=False)
    thinks = prompt.rstrip().endswith("<think>")
    text = (
        f"uvw</think>{end}" if thinks else f"xyz{end}"
    )  # a thought and nothing else is what `format` asks for
    reply = tokenizer(text, add_special_tokens=False)["input_ids"]
    last = tokenizer(prompt, add_special_tokens=False)["input_ids"][-1]
    assert len({last, *reply}) == len(reply) + 1, "else no chain of first order says it"
    assert reply[-1] == tokenizer.convert_tokens_to_ids(end)

    model = tmp_path / "model"
    chain(kind, tokenizer, [last, *reply]).save_pretrained(model)
    tokenizer.save_pretrained(model)
    ends = [
        tokenizer.eos_token,
        *next((m for p, _, m in templates.FAMILIES if re.search(p, path.stem.lower())), ()),
    ]
    names = {"eos_token_id": [tokenizer.convert_tokens_to_ids(one) for one in ends]}
    (model / "generation_config.json").write_text(json.dumps(names), encoding="utf-8")
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": q}) + "\n" for q in questions), encoding="utf-8")
    reward = {"kind": "format", "tags": ["think"]} if thinks else {"kind": "regex", "pattern": "xyz"}
    stage = {
        "kind": "grpo", "model": str(model), "data": str(data), "reward": {**reward, "name": "form"},
        "updates": 1, "batch_size": 2, "samples_per_prompt": 2, "lr": 1e-6,
        "sampling": {"max_new_tokens": len(reply) + 8},
    }  # fmt: skip
    keel.run({"name": "ends", "stages": {"grpo": stage}}, runs=tmp_path, progress=False)
    folder = tmp_path / "ends" / "stages" / "grpo"
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(samples) >= 2
    assert all(sample["stop_reason"] in ("eos", "stop") for sample in samples), samples
    assert metrics[0]["rollout/truncated"] == 0
    assert all(sample["rewards"]["form"] == 1 for sample in samples), samples
