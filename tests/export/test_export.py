"""`keel export` and `keel push`: a run's model for other programs, with nothing lost on the way."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import peft
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from keel.cli import export as exporting
from keel.cli import main
from keel.data import chat
from keel.errors import KeelError, UsageError
from keel.export import card, gguf_file, hub, models, ollama
from keel.models import lora
from keel.models.load import load_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))
from fake_run import write_run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, data: Any, run: Any) -> Path:
    """A run of sft and a reward model on a base whose card names a licence."""
    folder = tmp_path_factory.mktemp("export")
    (tiny_model / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n", encoding="utf-8")
    common = {"max_steps": 2, "batch_size": 4, "lr": 1e-3}
    stages = {
        "sft": {"kind": "sft", "model": str(tiny_model), "data": str(data.demonstrations), **common},
        "reward": {
            "kind": "reward", "model": "sft", "data": str(data.pairs), "normalize": 0, **common,
        },
    }  # fmt: skip
    run({"name": "tiny", "stages": stages}, folder / "run")
    return folder / "run"


# ---------------------------------------------------------------- which model


def test_a_run_alone_means_its_last_language_model_and_a_stage_is_named_in_three_ways(finished: Path) -> None:
    assert models.find(str(finished)).name == "tiny-sft"
    reward = finished / "stages" / "reward"
    for place in (finished / "reward", reward, reward / "model"):
        found = models.find(str(place))
        assert (found.folder, found.name, found.scores) == (reward / "model", "tiny-reward", True)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nowhere", "no run, stage or model at"),
        ("run/nothing", "has no stage 'nothing'; it has sft, reward"),
    ],
)
def test_what_is_not_there_is_said(finished: Path, place: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        models.find(str(finished.parent / place))


def test_a_stage_that_is_not_finished_is_not_exported(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "half")
    (tmp_path / "half" / "stages" / "sft" / "stage.json").unlink()
    with pytest.raises(UsageError, match="'sft' is unfinished: run it to its end first"):
        models.find(str(tmp_path / "half" / "sft"))
    with pytest.raises(UsageError, match=r"no finished language model; name a stage"):
        models.find(str(tmp_path / "half"))


# ---------------------------------------------------------------- gguf


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(path)
    return (
        {name: field.contents() for name, field in reader.fields.items()},
        {tensor.name: tensor.data for tensor in reader.tensors},
    )


def test_a_gguf_has_every_weight_and_token_of_the_model(finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    folder = finished / "stages" / "sft" / "model"
    gguf_file.write(folder, tmp_path / "tiny.gguf", name="tiny")
    fields, tensors = _read(tmp_path / "tiny.gguf")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), load_tokenizer(str(folder))
    state = model.state_dict()
    assert len(tensors) == len(state)
    assert np.array_equal(tensors["token_embd.weight"], state["model.embed_tokens.weight"].numpy())
    down = state["model.layers.1.mlp.down_proj.weight"].numpy()
    assert np.array_equal(tensors["blk.1.ffn_down.weight"], down)
    # llama.cpp turns neighbouring pairs: row 2i of a head is row i of the first half, 2i + 1 of the second
    query, width = state["model.layers.0.self_attn.q_proj.weight"].numpy(), 32 // 4
    for row in range(width):
        expected = query[row // 2 + (row % 2) * width // 2]
        assert np.array_equal(tensors["blk.0.attn_q.weight"][row], expected)
    assert fields["general.architecture"] == "llama"
    assert fields["llama.context_length"] == 48
    assert fields["tokenizer.ggml.pre"] == "smollm"  # digits one by one, then bytes: how keel's own cuts
    assert [fields["tokenizer.ggml.tokens"][i] for i in (0, 1)] == ["<|pad|>", "<|end|>"]
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 1e-3), ("bfloat16", 4e-3)])
def test_a_smaller_precision_rounds_matrices_and_leaves_vectors(
    finished: Path, tmp_path: Path, dtype: str, bound: float
) -> None:
    gguf = pytest.importorskip("gguf")
    folder = finished / "stages" / "sft" / "model"
    gguf_file.write(folder, tmp_path / "tiny.gguf", dtype)
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    norm = tensors["output_norm.weight"]
    assert np.array_equal(norm.data, state["model.norm.weight"].numpy())
    down = tensors["blk.1.ffn_down.weight"]
    values = gguf.quants.dequantize(down.data, down.tensor_type)
    expected = state["model.layers.1.mlp.down_proj.weight"].numpy()
    gap = np.abs(values - expected).max() / np.abs(expected).max()
    assert 0 < gap < bound


def test_a_type_that_nobody_here_can_write_is_refused_and_leaves_nothing(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"not of bert; put llama.cpp's convert_hf_to_gguf.py on the PATH"):
        gguf_file.write(tiny_bert, tmp_path / "out" / "bert.gguf")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("works", [True, False])
def test_llama_cpps_own_converter_is_used_for_other_types(
    works: bool, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in that writes its arguments, or fails."""
    script = tmp_path / "convert_hf_to_gguf.py"
    body = 'echo "$@" > "$3"' if works else "echo 'Traceback'; echo 'no such model' >&2; exit 1"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    out = tmp_path / "bert.gguf"
    if works:
        gguf_file.write(tiny_bert, out, "bfloat16")
        assert out.read_text().split()[-2:] == ["--outtype", "bf16"]
        return
    with pytest.raises(KeelError, match=r"cannot convert .*: no such model"):
        gguf_file.write(tiny_bert, out)
    assert not out.exists()


def test_how_text_is_cut_must_be_known_to_llama_cpp() -> None:
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    assert gguf_file.pre_tokenizer({"pre_tokenizer": bytes_}) == "gpt-2"
    both = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, bytes_]}}
    assert gguf_file.pre_tokenizer(both) == "smollm"
    for pattern, name in gguf_file.PATTERNS.items():
        split = {"type": "Split", "pattern": {"Regex": pattern}}
        parts = {"type": "Sequence", "pretokenizers": [split, {**bytes_, "use_regex": False}]}
        assert gguf_file.pre_tokenizer({"pre_tokenizer": parts}) == name
    for other in (
        {"type": "Whitespace"},
        {**bytes_, "use_regex": False},
        {**bytes_, "add_prefix_space": True},
    ):
        with pytest.raises(UsageError, match="knows no tokenizer that cuts text as this one"):
            gguf_file.pre_tokenizer({"pre_tokenizer": other})


def test_merges_become_scores_by_rank() -> None:
    assert gguf_file.scores(["a", "ab", "abc", "x"], ["a b", "ab c"]) == [-2.0, 0.0, -1.0, -2.0]


# ---------------------------------------------------------------- ollama


def test_a_modelfile_has_the_template_as_turns_and_every_stop(tokenizer: Any) -> None:
    text = ollama.modelfile(tokenizer, 48)
    end = tokenizer.eos_token
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """{{ range .Messages }}{{ if eq .Role "system" }}')
    assert f'PARAMETER stop "{end}"' in text
    assert text.endswith("PARAMETER num_ctx 48\n")
    turns = ollama.Turns.of(tokenizer)
    messages = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello."), ("user", "Bye")]
    expected = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert turns.text(messages) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index }}{{ m.role }}: {{ m.content }}\n{% endfor %}",  # counts turns
        "{% for m in messages[-1:] %}{{ m.content }}{% endfor %}",  # forgets
        "{{ messages[0].content | upper }}",
    ],
)
def test_a_template_that_is_no_row_of_turns_is_refused(template: str, tokenizer: Any) -> None:
    own = copy.deepcopy(tokenizer)
    own.chat_template = template
    with pytest.raises(UsageError, match="ollama: the chat template is no row of turns"):
        ollama.Turns.of(own)


def test_an_ollama_folder_holds_both_files(finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    out = exporting.export(str(finished), "ollama", tmp_path / "out", "float32")
    assert sorted(path.name for path in out.iterdir()) == ["Modelfile", "model.gguf"]


# ---------------------------------------------------------------- hub


def test_a_hub_folder_is_the_model_with_a_full_card(finished: Path, tmp_path: Path) -> None:
    hub.write(models.find(str(finished)), tmp_path / "out")
    saved = finished / "stages" / "sft" / "model"
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()
    text = (tmp_path / "out" / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["license"] == "apache-2.0"
    assert head["pipeline_tag"] == "text-generation"
    assert "base_model" not in head  # a folder on this machine means nothing elsewhere
    result = json.loads((finished / "stages" / "sft" / "result.json").read_text())["eval_loss"]
    assert f"| eval_loss | {result['mean']:.4g} ({result['low']:.4g} to {result['high']:.4g}" in text
    assert "max_steps: 2" in text
    assert "warmup" not in text  # a default
    assert "apache-2.0" in text.split("## Licence")[1]


def test_a_card_tells_measures_with_intervals_diagnosis_data_and_every_stage(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    folder = tmp_path / "run" / "stages" / "ppo" / "model"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    text = card.card(models.find(str(tmp_path / "run" / "ppo")))
    assert "| judge: gold | 0.784 (0.76 to 0.808, n = 256) |" in text
    for name in ("base", "sft", "ppo"):
        assert f"`{name}`" in text
    assert "rewards: reward" in text
    assert "new weights" in text
    assert "## Diagnosis\n\n- `ppo`" in text


def test_push_uploads_the_folder_to_a_repository_that_it_makes(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    class Api:
        def create_repo(self, repo: str, **settings: Any) -> str:
            calls.append(("create", {"repo": repo, **settings}))
            return f"https://hub/{repo}"

        def create_branch(self, repo: str, **settings: Any) -> None:
            calls.append(("branch", settings))

        def upload_folder(self, **settings: Any) -> None:
            calls.append(("upload", settings))
            assert (Path(settings["folder_path"]) / "README.md").read_text().startswith("---\nlibrary_name")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    found = models.find(str(finished))
    assert hub.push(found, "me/tiny", private=True, revision="v1") == "https://hub/me/tiny"
    assert [name for name, _ in calls] == ["create", "branch", "upload"]
    assert calls[0][1] == {"repo": "me/tiny", "repo_type": "model", "private": True, "exist_ok": True}
    assert calls[2][1]["revision"] == "v1"


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [(401, UsageError, "log in with `hf auth login`"), (500, KeelError, "the same command tries again")],
)
def test_a_refused_push_says_what_to_do(
    status: int, kind: type[KeelError], message: str, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Api:
        def create_repo(self, repo: str, **settings: Any) -> str:
            answer: Any = SimpleNamespace(status_code=status, headers={}, request=None)
            raise huggingface_hub.errors.HfHubHTTPError("no", response=answer)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(kind, match=message):
        hub.push(models.find(str(finished)), "me/tiny")


# ---------------------------------------------------------------- the command


def test_the_command_exports_and_overwrites_nothing(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def keel(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["keel", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main.main()
        return int(ended.value.code or 0), *capsys.readouterr()

    capsys.readouterr()
    out = tmp_path / "card"
    code, said, _ = keel("export", finished / "reward", "--to", "hub", "--out", out)
    assert (code, said.strip()) == (0, str(out))
    code, _, error = keel("export", finished / "reward", "--to", "hub", "--out", out)
    assert (code, "is there already; it was not overwritten" in error) == (2, True)
    for arguments, message in (
        (("--to", "onnx"), "--to 'onnx' is not one of gguf, hub, ollama"),
        (("--to", "gguf"), "a reward model has no form in gguf; use --to hub"),
        (("--to", "hub", "--dtype", "float16"), "--dtype has no effect with --to hub"),
    ):
        code, _, error = keel("export", finished / "reward", *arguments)
        assert (code, message in error) == (2, True), error


def test_stop_texts_of_a_modelfile_are_the_tokens_that_end_a_rollout(tokenizer: Any) -> None:
    stops = [tokenizer.convert_ids_to_tokens(i) for i in chat.stop_ids(tokenizer, ())]
    found = [line for line in ollama.modelfile(tokenizer, None).splitlines() if "stop" in line]
    assert found == [f'PARAMETER stop "{stop}"' for stop in stops]


def test_rotary_frequencies_of_llama_3_are_transformers_own() -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 512,
    }  # fmt: skip
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters=rope)
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 5e5 ** -(torch.arange(0, 64, 2).double() / 64)
    found = torch.from_numpy(gguf_file._rope_factors(config)).double()
    torch.testing.assert_close(plain / found, stretched.double(), rtol=1e-5, atol=1e-12)


def test_a_run_with_an_adapter_can_be_moved(tiny_model: Path, data: Any, run: Any, tmp_path: Path) -> None:
    """peft finds the base where the run lies now; nothing is trained again, and a hub is given no path."""
    common = {"kind": "sft", "data": str(data.demonstrations), "max_steps": 1, "batch_size": 4, "lr": 1e-2}
    stages = {
        "sft": {"model": str(tiny_model), **common},
        "tuned": {"model": "sft", "lora": {"r": 4}, **common},
        "again": {"model": str(tiny_model), "lora": {"r": 4}, **common},
    }
    run({"stages": stages}, tmp_path / "here")
    outside = tmp_path / "here" / "stages" / "again" / "model" / "adapter" / "base.json"
    assert "path" not in json.loads(outside.read_text())  # it is no part of the run, and stays where it is
    there = tmp_path / "elsewhere" / "there"
    there.parent.mkdir()
    (tmp_path / "here").rename(there)
    times = {path: path.stat().st_mtime_ns for path in there.glob("stages/*/model/*.safetensors")}
    run({"stages": stages}, there)
    assert times == {path: path.stat().st_mtime_ns for path in there.glob("stages/*/model/*.safetensors")}
    folder = there / "stages" / "tuned" / "model"
    ids = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        put_on = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "adapter").eval()(ids).logits
    torch.testing.assert_close(put_on, whole, rtol=1e-4, atol=1e-5)
    hub.write(models.find(str(there / "tuned")), tmp_path / "hub")
    assert not (tmp_path / "hub" / "adapter").exists()
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "somebody/model"
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    hub.write(models.find(str(there / "tuned")), tmp_path / "with")
    assert (tmp_path / "with" / "adapter" / "adapter_model.safetensors").exists()


def test_an_adapter_whose_base_is_another_now_is_left_alone(tmp_path: Path, tiny_model: Path) -> None:
    base = tmp_path / "stages" / "sft" / "model"
    shutil.copytree(tiny_model, base)
    adapter = tmp_path / "stages" / "tuned" / "model" / "adapter"
    files = lora.AdapterFiles({"base_model_name_or_path": "/gone"}, {}, "sha256:other", base)
    files.write(adapter)
    before = (adapter / "adapter_config.json").read_bytes()
    lora.follow_base(adapter)
    assert (adapter / "adapter_config.json").read_bytes() == before
