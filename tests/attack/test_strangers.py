"""What strangers bring: reward functions, chat templates and model folders of every bad sort. Each is refused
in one line that names it, or does what it should; none hangs, crashes the command or changes its process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.attack

HEAD = "import asyncio, ctypes, math, os, re, signal, sys, threading, time\n"
# body of `def score(prompts, completions, **columns)` → mean of the scores, or what is said
REWARDS: dict[str, tuple[str, float | str]] = {
    "ones": ("return ONES", 1.0),
    "integers": ("return [1] * len(completions)", 1.0),
    "truths": ("return [True] * len(completions)", 1.0),
    "numpy scalars": ("return [numpy.float32(1)] * len(completions)", 1.0),
    "numpy array": ("return numpy.ones(len(completions))", 1.0),
    "torch scalars": ("return [torch.tensor(1.0)] * len(completions)", 1.0),
    "torch tensor": ("return torch.ones(len(completions))", 1.0),
    "on a gradient": ("return torch.ones(len(completions), requires_grad=True)", 1.0),
    "tuple": ("return tuple(1.0 for _ in completions)", 1.0),
    "prints": ("print('x' * 10**6); return ONES", 1.0),
    "writes to its stderr": ("os.write(2, b'said by the reward\\n'); return ONES", 1.0),
    "writes to its stdout": ("os.write(1, b'said by the reward\\n'); return ONES", 1.0),
    "changes its folder": ("os.chdir('/'); return ONES", 1.0),
    "clears what it is given": ("n = len(completions); completions.clear(); return [1.0] * n", 1.0),
    "clears its columns": ("columns.clear(); return ONES", 1.0),
    "a thread": ("threading.Thread(target=time.sleep, args=(90,)).start(); return ONES", 1.0),
    "a fork": ("os.fork(); return ONES", 1.0),
    "a signal handler": ("signal.signal(2, signal.SIG_IGN); return ONES", 1.0),
    "the environment": ("os.environ.clear(); return ONES", 1.0),
    "torch's threads": ("torch.set_num_threads(3); torch.manual_seed(5); return ONES", 1.0),
    "half precision": ("torch.set_default_dtype(torch.float64); return ONES", 1.0),
    "none of it": ("return [None] * len(completions)", "each of mine returned None"),
    "raises": ("raise ValueError('mine')", "raised ValueError: mine"),
    "raises nothing said": ("raise ValueError", "raised ValueError"),
    "raises an odd text": ("raise ValueError('a\\nb\\x1b[31m\\0')", "raised ValueError"),
    "raises a huge text": ("raise ValueError('x' * 10**7)", "raised ValueError"),
    "raises for one": ("return [1 / (len(c) - len(completions[-1])) for c in completions]", "ZeroDiv"),
    "too few": ("return [1.0]", "'mine'"),
    "too many": ("return [1.0] * (len(completions) + 1)", "'mine'"),
    "nothing": ("pass", "'mine'"),
    "NaN": ("return [math.nan] * len(completions)", "no finite number"),
    "infinite": ("return [math.inf] * len(completions)", "no finite number"),
    "huge": ("return [10**400] * len(completions)", "no finite number"),
    "text": ("return ['1.0'] * len(completions)", "no finite number"),
    "complex": ("return [1j] * len(completions)", "no finite number"),
    "lists": ("return [[1.0]] * len(completions)", "no finite number"),
    "a matrix": ("return numpy.ones((len(completions), 2))", "'mine'"),
    "a dictionary": ("return {'a': 1}", "'mine'"),
    "a generator": ("return (1.0 for _ in completions)", "'mine'"),
    "a number": ("return 1.0", "'mine'"),
    "exits": ("sys.exit(0)", "raised SystemExit"),
    "leaves": ("os._exit(0)", "left its process"),
    "aborts": ("os.abort()", "SIGABRT"),
    "crashes": ("ctypes.string_at(0)", "SIGSEGV"),
    "kills its parent's group": ("os.killpg(0, signal.SIGKILL)", "SIGKILL"),
    "interrupts": ("raise KeyboardInterrupt", "raised KeyboardInterrupt"),
    "recurses": ("return score(prompts, completions)", "RecursionError"),
    "hangs": ("time.sleep(90)", "took more than 2 s"),
    "hangs in C": ("re.match('(a+)+$', 'a' * 60 + 'b')", "took more than 2 s"),
    "hangs and holds on": (
        "signal.signal(15, signal.SIG_IGN)\n    while True: time.sleep(1)",
        "took more than 2 s",
    ),
    "closes its files": ("os.closerange(3, 99); return ONES", "left its process"),
    "takes all memory": ("x = bytearray(10**15); return [1.0]", "MemoryError"),
}  # fmt: skip


@pytest.mark.parametrize("name", REWARDS)
def test_a_reward_function_is_contained(
    name: str, forked: Any, every_kind: Any, write_config: Any, tmp_path: Path
) -> None:
    body, expected = REWARDS[name]
    body = body.replace("ONES", "[1.0] * len(completions)")
    heavy = [name for name in ("numpy", "torch") if f"{name}." in body]
    head = HEAD + "".join(f"import {name}\n" for name in heavy)
    (tmp_path / "mine.py").write_text(f"{head}def score(prompts, completions, **columns):\n    {body}\n")
    term = {
        "kind": "python",
        "function": f"{tmp_path}/mine.py:score",
        "name": "mine",
        "timeout": 25 if heavy else 2,
    }
    stage = {**every_kind["judge"], "models": [every_kind["sft"]["model"]], "reward": [term]}
    write_config(tmp_path, {"judge": stage})
    ended = forked("run", "config.yaml", cwd=tmp_path, timeout=30)
    if isinstance(expected, str):
        ended.assert_refused(expected)
        assert "mine" in ended.err.splitlines()[-1], ended.err[-2000:]
        assert len(ended.err.splitlines()[-1]) < 4000
        assert not (tmp_path / "runs" / "r" / "stages" / "judge" / "stage.json").exists()
        return
    ended.assert_clean()
    assert ended.code == 0, ended.err[-3000:]
    assert "said by the reward" not in ended.out
    result = json.loads((tmp_path / "runs" / "r" / "stages" / "judge" / "result.json").read_text())
    assert next(iter(result["models"].values()))["proxy"]["mean"] == expected


MODULES: dict[str, tuple[str, str]] = {
    "no such file": ("", "no.py"),
    "a syntax error": ("def score(:", "mine.py"),
    "no such function": ("x = 1", "score"),
    "an import that fails": ("import no_such_module\ndef score(completions): pass", "no_such_module"),
    "an exit on import": ("import sys; sys.exit(4)\ndef score(completions): pass", "SystemExit"),
    "a hang on import": ("import time; time.sleep(90)\ndef score(completions): pass", "took more than 2 s"),
    "a crash on import": ("import ctypes; ctypes.string_at(0)\ndef score(completions): pass", "SIGSEGV"),
    "not a function": ("score = 3", "score"),
    "a class": ("class score:\n    def __init__(self, a, b, c): pass", "score"),
    "no text": ("\xff\0", "mine.py"),
    "arguments that are not there": ("def score(prompts, completions, answer): return [1.0]", "answer"),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_of_rewards_that_cannot_be_used_is_named(
    name: str, forked: Any, every_kind: Any, write_config: Any, tmp_path: Path
) -> None:
    source, said = MODULES[name]
    (tmp_path / "mine.py").write_bytes(source.encode("latin-1"))
    file = "no.py" if name == "no such file" else "mine.py"
    term = {"kind": "python", "function": f"{tmp_path}/{file}:score", "name": "mine", "timeout": 2}
    stage = {**every_kind["judge"], "models": [every_kind["sft"]["model"]], "reward": [term]}
    write_config(tmp_path, {"judge": stage})
    forked("run", "config.yaml", cwd=tmp_path, timeout=30).assert_refused(said)


# ---------------------------------------------------------------- templates

TURN = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
TEMPLATES: dict[str, tuple[str, str | None]] = {
    "plain": (TURN + "{% if add_generation_prompt %}assistant: {% endif %}", None),
    "refuses": ("{{ raise_exception('not today') }}", "not today"),
    "divides by nothing": (TURN + "{{ 1 / 0 }}", "ZeroDivisionError"),
    "wrong types": (TURN + "{{ messages + 1 }}", "TypeError"),
    "no such filter": (TURN + "{{ 'a' | nothing }}", "nothing"),
    "no such test": (TURN + "{% if 1 is nothing %}{% endif %}", "nothing"),
    "syntax": ("{% for %}", "TemplateSyntaxError"),
    "never closed": ("{% for m in messages %}", "TemplateSyntaxError"),
    "includes": (TURN + "{% include 'x' %}", "template"),
    "imports": (TURN + "{% import 'x' as x %}", "template"),
    "extends": ("{% extends 'x' %}", "template"),
    "recurses": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "a huge range": (TURN + "{% for i in range(10**12) %}a{% endfor %}", "template"),
    "fills the memory": (TURN + "{{ 'a' * (2 * 10**9) }}", "template"),
    "doubles": (
        "{% set n = namespace(x='a') %}{% for i in range(31) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "template",
    ),
    "escapes the sandbox": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "formats its way out": ("{{ '{0.__class__}'.format(1) }}", "template"),
    "changes the messages": ("{{ messages.append(1) }}", "template"),
    "nothing at all": ("", "template"),
    "says nothing of the messages": ("hello", "template"),
    "only spaces": ("   \n", "template"),
    "drops the reply": ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "template"),
    "another order": ("{% for m in messages | reverse %}{{ m.content }}<|end|>{% endfor %}", "template"),
    "undefined": (TURN + "{{ nowhere.at.all }}", "template"),
    "no reply without a system turn": ("{{ messages[0]['content'].x.y }}", "template"),
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_is_contained(
    name: str, forked: Any, every_kind: Any, data: Any, write_config: Any, tmp_path: Path
) -> None:
    template, said = TEMPLATES[name]
    model = {"path": every_kind["sft"]["model"], "chat_template": template}
    stage = {**every_kind["sft"], "model": model, "data": {"source": str(data.chats), "rows": 4}}
    write_config(tmp_path, {"sft": {**stage, "eval_every": None, "holdout": 0}})
    ended = forked("run", "config.yaml", cwd=tmp_path, timeout=60)
    if said is not None:
        ended.assert_refused(said)
        assert "\x1b" not in ended.err
        return
    ended.assert_clean()
    assert ended.code == 0, ended.err


# ---------------------------------------------------------------- model folders

Breaks = Callable[[Path], None]


def config(**changes: Any) -> Breaks:
    def go(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        values = {name: value for name, value in {**values, **changes}.items() if value != "gone"}
        (folder / "config.json").write_text(json.dumps(values))

    return go


def written(name: str, content: bytes) -> Breaks:
    return lambda folder: void((folder / name).write_bytes(content))


def removed(*names: str) -> Breaks:
    return lambda folder: void([(folder / name).unlink() for name in names])


def void(value: object) -> None:
    return None


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Breaks:
    def go(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file(change({k: v.clone() for k, v in load_file(path).items()}), path, metadata={"format": "pt"})

    return go


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def sharded(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-1-of-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


OWN_CODE = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.M"}
FIRST = "model.layers.0.mlp.up_proj.weight"
FOLDERS: dict[str, tuple[Breaks, str | None]] = {
    "whole": (lambda folder: None, None),
    "empty folder": (emptied, "config.json"),
    "no config": (removed("config.json"), "model"),
    "no weights": (removed("model.safetensors"), "model"),
    "no tokenizer": (removed("tokenizer.json", "tokenizer_config.json"), "token"),
    "a pickle": (pickled, "safetensors"),
    "a shard that is not there": (sharded, "model-1-of-2.safetensors"),
    "an index of rubbish": (written("model.safetensors.index.json", b"[1"), None),
    "cut weights": (written("model.safetensors", b"\x10\0\0\0\0\0\0\0{}"), "model.safetensors"),
    "weights of text": (written("model.safetensors", b"hello"), "model.safetensors"),
    "a pointer": (written("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), "git-lfs"),
    "config of a list": (written("config.json", b"[]"), "config.json"),
    "config of null": (written("config.json", b"null"), "config.json"),
    "config without end": (written("config.json", b'{"model_type": "llama"'), "config.json"),
    "config in another code": (written("config.json", '{"a": "é"}'.encode("latin-1")), "config.json"),
    "deep config": (written("config.json", b"[" * 99_999), "config.json"),
    "no model type": (config(model_type="gone", architectures="gone"), "model"),
    "unknown type": (config(model_type="nonsense"), "nonsense"),
    "another type": (config(model_type="gpt2"), "model"),
    "type of a list": (config(model_type=["llama"]), "model"),
    "more layers": (config(num_hidden_layers=9), "model"),
    "fewer layers": (config(num_hidden_layers=1), "model"),
    "too many layers": (config(num_hidden_layers=10_001), "model"),
    "no layers": (config(num_hidden_layers=-1), "model"),
    "another width": (config(hidden_size=48), "model"),
    "width of text": (config(hidden_size="wide"), "model"),
    "width of nothing": (config(hidden_size=0), "model"),
    "heads that do not divide": (config(num_attention_heads=5), "model"),
    "no heads": (config(num_attention_heads=0), "model"),
    "more words": (config(vocab_size=10**6), "model"),
    "a huge vocabulary": (config(vocab_size=10**13), "model"),
    "fewer words": (config(vocab_size=9), "model"),
    "no such activation": (config(hidden_act="nonsense"), "model"),
    "an odd rope": (config(rope_parameters={"rope_type": "nonsense"}), "model"),
    "no context": (config(max_position_embeddings=0), None),
    "a context of text": (config(max_position_embeddings="long"), "model"),
    "code of its own": (config(auto_map=OWN_CODE, model_type="x"), "trust_remote_code"),
    "an odd dtype": (config(dtype="float7", torch_dtype="float7"), None),
    "a missing tensor": (tensors(lambda t: {k: v for k, v in t.items() if k != FIRST}), "up_proj"),
    "a tensor too many": (tensors(lambda t: {**t, "model.layers.7.x.weight": torch.ones(2)}), "layers.7"),
    "a tensor of another shape": (tensors(lambda t: {**t, FIRST: torch.ones(3, 3)}), "model"),
    "whole numbers": (tensors(lambda t: {k: v.to(torch.int8) for k, v in t.items()}), "model"),
    "NaN": (tensors(lambda t: {k: v * float("nan") for k, v in t.items()}), "finite"),
    "infinite": (tensors(lambda t: {**t, FIRST: t[FIRST] / 0}), "finite"),
    "a tokenizer of rubbish": (written("tokenizer.json", b"\0\xff"), "tokenizer.json"),
    "a tokenizer of nothing": (written("tokenizer.json", b"{}"), "token"),
    "a tokenizer of a list": (written("tokenizer.json", b"[]"), "tokenizer.json"),
    "settings of a list": (written("tokenizer_config.json", b"[]"), "tokenizer_config.json"),
    "a template of rubbish": (written("chat_template.jinja", b"\xff\xfe"), "chat_template"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_a_model_folder_is_read_rightly_or_refused_by_name(
    name: str, forked: Any, every_kind: Any, write_config: Any, tmp_path: Path
) -> None:
    change, said = FOLDERS[name]
    model = tmp_path / "their-model"
    shutil.copytree(every_kind["sft"]["model"], model)
    change(model)
    write_config(tmp_path, {"sft": {**every_kind["sft"], "model": str(model), "eval_every": None}})
    for command in ("plan", "run"):
        ended = forked(command, "config.yaml", cwd=tmp_path, timeout=60)
        ended.assert_clean()
        if ended.code not in (0, 3):
            ended.assert_refused()
            assert len(ended.err.splitlines()[-1]) < 2000
    if said is not None:
        ended.assert_refused(said)
        assert not (tmp_path / "runs" / "r" / "stages" / "sft" / "model").exists()
    for command in (["doctor", str(model)], ["chat", str(model), "--prompt", "hi", "--max-new-tokens", "2"]):
        ended = forked(*command, cwd=tmp_path, timeout=60)
        ended.assert_clean()
