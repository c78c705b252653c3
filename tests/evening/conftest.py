"""The command as a new user meets it, and two base models."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from keel.cli import main
from keel.models.tokenizer import train_tokenizer

TOOLS = (  # a template that writes tools, calls and results
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function | tojson + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = [f"the {a} is {c}, so {c} it is." for a in ("cat", "dog", "fox", "owl") for c in ("red", "blue")]


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str


@pytest.fixture
def keel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Callable[..., Outcome]]:
    """Call the command in this process, in an empty folder, through its real entry point."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["keel", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main.main()
        out, err = capsys.readouterr()
        code = ended.value.code
        return Outcome(code if isinstance(code, int) else 0 if code is None else 1, out, err)

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base model as it comes from pretraining, without a chat template; and one that knows tools."""
    found: dict[str, Path] = {}
    for name in ("plain", "tools"):
        tokenizer = train_tokenizer(TEXTS * 2, 300, 320)
        if name == "tools":
            tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
            tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
            tokenizer.chat_template = TOOLS
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, initializer_range=0.1,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=None, hidden_size=32, intermediate_size=64,
            num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=320,
        )  # fmt: skip
        found[name] = tmp_path_factory.mktemp("bases") / name
        LlamaForCausalLM(config).save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found
