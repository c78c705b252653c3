"""What the stages start from: models and data that cannot work are refused before anything is trained."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any, get_args

import pytest
from transformers import AutoTokenizer, CLIPConfig, DistilBertConfig

from keel.config import parse
from keel.config.rewards import RULES, RewardTerm
from keel.errors import DataError, UsageError
from keel.models import hub
from keel.pipeline.preflight import Sources

TURNS = [{"role": "user", "content": "the cat?"}]
REPLY = [{"role": "assistant", "content": "it is red."}]
STANDARD = {"prompt": "the cat?", "completion": " it is red."}
CONVERSATION = {"prompt": TURNS, "completion": REPLY}


def _check(stages: dict[str, Any], tmp_path: Path, hub: bool = False) -> dict[str, str]:
    config = parse({"name": "tiny", "device": "cpu", "stages": stages})
    return Sources(config, tmp_path / "run").check(list(stages), hub=hub)


@pytest.fixture
def rows(tmp_path: Path):
    """Write rows to a file and return its path."""

    def go(name: str, *content: dict[str, Any]) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        return str(path)

    return go


@pytest.fixture
def sft(tiny_model, data):
    def go(**settings: Any) -> dict[str, Any]:
        return {"kind": "sft", "model": str(tiny_model), "data": str(data.demonstrations), **settings}

    return go


@pytest.fixture
def tiny_distilbert(tmp_path: Path, tiny_bert: Path) -> Path:
    """The config of an encoder that transformers knows no way to write with, and a tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    config = {"vocab_size": len(tokenizer), "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16}
    DistilBertConfig(**config).save_pretrained(tmp_path / "distilbert")
    tokenizer.save_pretrained(tmp_path / "distilbert")
    return tmp_path / "distilbert"


# ---------------------------------------------------------------- names of models


def _resolve(stage: str, name: str, tmp_path: Path) -> str:
    config = parse(
        {"name": "tiny", "stages": {stage: {"kind": "sft", "model": "openai/any", "data": "d.jsonl"}}}
    )
    return Sources(config, tmp_path / "run").resolve(name)


@pytest.mark.parametrize(
    ("stage", "name"), [("gpt", "gpt2"), ("base", "bert-base"), ("t5", "t5-small"), ("sft", "owner/sft")]
)
def test_a_hub_model_that_resembles_a_stage_is_a_hub_model(stage, name, tmp_path):
    assert _resolve(stage, name, tmp_path) == name


@pytest.mark.parametrize(
    ("stage", "name"),
    [("base", "bas"), ("reward", "rewrd"), ("rm1", "rm2"), ("sft", "sfft"), ("ppo", "ppoo2")],
)
def test_a_slip_of_the_finger_names_the_stage_and_the_way_out(stage, name, tmp_path):
    with pytest.raises(UsageError) as caught:
        _resolve(stage, name, tmp_path)
    for part in (f"did you mean the stage '{stage}'", f"./{name}", f"owner/{name}"):
        assert part in str(caught.value)


def test_a_model_that_the_hub_does_not_have_names_the_nearest_stage(sft, tmp_path):
    with pytest.raises(UsageError, match=r"'t5-sft' cannot be loaded.*did you mean the stage 'sft'"):
        _check({"sft": sft(), "more": sft(model="t5-sft")}, tmp_path, hub=True)


@pytest.mark.parametrize("setting", ["model", "reference", "reward"])
def test_a_name_that_nothing_has_is_refused_by_a_plan_too(setting, sft, data, tmp_path):
    """No model of the hub is called so: those with no owner in their name are a few of its first days."""
    stage = {
        "kind": "grpo",
        "model": "sft",
        "reward": {"kind": "length", "high": 3},
        "data": str(data.prompts),
    }
    stages = {"sft": sft(), "grpo": stage | {setting: "policy"}}
    with pytest.raises(UsageError, match=r"no stage, folder or hub model 'policy'\. For a folder write"):
        _check(stages, tmp_path, hub=False)


def test_a_model_in_the_local_cache_needs_no_owner(tmp_path, monkeypatch):
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--mine").mkdir()
    assert _resolve("sft", "mine", tmp_path) == "mine"


def test_a_hub_that_does_not_answer_is_asked_once(sft, tmp_path, monkeypatch):
    """A second run of connections, each tried five times, would be half a minute a model."""
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.constants, "ENDPOINT", "https://127.0.0.1:9")
    monkeypatch.setattr(hub.urllib.request, "getproxies", dict)
    started, said = time.monotonic(), list[str]()
    stages = {"sft": sft(model="nobody/nothing"), "more": sft(model="nobody/else")}
    sources = Sources(parse({"name": "tiny", "stages": stages}), tmp_path / "run", said.append)
    with pytest.raises(UsageError, match="'nobody/nothing' cannot be loaded"):
        sources.check(list(stages), hub=True)
    assert [line for line in said if "cannot be reached" in line]
    assert time.monotonic() - started < 10


def test_an_encoder_cannot_be_tuned_to_write(sft, tiny_distilbert, data, tmp_path):
    with pytest.raises(UsageError, match="is no language model that can write: its type is distilbert"):
        _check({"sft": sft(model=str(tiny_distilbert))}, tmp_path)
    new = {"init": {"model_type": "distilbert"}}
    with pytest.raises(UsageError, match=r"'model\.init' is no language model that can write"):
        _check({"base": {"kind": "pretrain", "model": new, "data": str(data.text)}}, tmp_path)
    reward = {"kind": "reward", "model": str(tiny_distilbert), "data": str(data.pairs)}
    assert "preference" in _check({"reward": reward}, tmp_path)["reward"]


@pytest.mark.parametrize("kind", ["sft", "dpo", "pretrain", "evaluate", "best_of_n"])
def test_an_encoder_with_a_language_models_head_is_no_model_that_can_write(kind, tiny_bert, data, tmp_path):
    """transformers would load a BERT as a causal language model, which sees the tokens it has to predict."""
    rows = {"sft": data.demonstrations, "dpo": data.pairs, "pretrain": data.text}.get(kind, data.prompts)
    stage: dict[str, Any] = {"kind": kind, "model": str(tiny_bert), "data": str(rows)}
    if kind == "evaluate":
        stage = {
            "kind": kind,
            "models": [str(tiny_bert)],
            "data": str(rows),
            "sampling": {"max_new_tokens": 4},
        }
    if kind == "best_of_n":
        stage |= {"reward": {"kind": "length", "high": 3}, "sampling": {"max_new_tokens": 4}}
    with pytest.raises(
        UsageError, match=r"no language model that can write: it is an encoder \(its type is bert"
    ):
        _check({"s": stage}, tmp_path)
    config = json.loads((tiny_bert / "config.json").read_text())
    decoder = tmp_path / "decoder"
    shutil.copytree(tiny_bert, decoder)
    (decoder / "config.json").write_text(json.dumps({**config, "is_decoder": True}))
    stage |= {"models": [str(decoder)]} if kind == "evaluate" else {"model": str(decoder)}
    assert _check({"s": stage}, tmp_path)


def test_an_ensemble_that_is_not_whole_is_found_before_anything_is_trained(
    tiny_reward, tiny_model, data, tmp_path
):
    shutil.copytree(tiny_reward, tmp_path / "reward")
    path = tmp_path / "reward" / "config.json"
    scale = {"mean": 0.0, "std": 1.0, "members": 2}
    path.write_text(json.dumps({**json.loads(path.read_text()), "keel_reward": scale}))
    stage = {
        "kind": "ppo",
        "model": str(tiny_model),
        "reward": str(tmp_path / "reward"),
        "data": str(data.prompts),
        "sampling": {"max_new_tokens": 4},
    }
    with pytest.raises(UsageError, match=r"an ensemble of 2 reward models, but member 2 is not there"):
        _check({"ppo": stage}, tmp_path)


def test_a_model_that_can_have_no_score_head_is_no_reward_model_to_be(data, tmp_path):
    CLIPConfig().save_pretrained(tmp_path / "clip")
    with pytest.raises(UsageError, match="can have no score head: its type is clip"):
        _check(
            {"reward": {"kind": "reward", "model": str(tmp_path / "clip"), "data": str(data.pairs)}}, tmp_path
        )


# ---------------------------------------------------------------- tokenizers


def _new(tokenizer: str, data: Any) -> dict[str, Any]:
    init = {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
    }
    return {"kind": "pretrain", "data": str(data.text), "model": {"init": init, "tokenizer": tokenizer}}


def test_a_tokenizer_that_is_not_there_is_found_before_anything_is_trained(tiny_model, data, tmp_path):
    assert _check({"base": _new(str(tiny_model), data)}, tmp_path)
    (tmp_path / "empty").mkdir()
    for place, away in ((tmp_path / "empty", False), (tmp_path / "nowhere", False), ("nobody/none", True)):
        with pytest.raises(UsageError, match=r"base: model\.tokenizer: tokenizer .* cannot be loaded"):
            _check({"base": _new(str(place), data)}, tmp_path, away)


def test_a_broken_tokenizer_is_no_traceback(tiny_model, data, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "broken")
    path = tmp_path / "broken" / "tokenizer.json"
    path.write_text(path.read_text().replace("Ġgreen", "Ġgreyn"))
    with pytest.raises(UsageError, match=r"base: model\.tokenizer: .*: Token `Ġgreen` out of vocabulary"):
        _check({"base": _new(str(tmp_path / "broken"), data)}, tmp_path)


def test_a_stage_is_no_tokenizer(sft, data, tmp_path):
    with pytest.raises(UsageError, match=r"takes a folder or hub id, not a stage; write .*stages/sft/model"):
        _check({"sft": sft(), "base": _new("sft", data)}, tmp_path)


# ---------------------------------------------------------------- rows to evaluate on


@pytest.mark.parametrize("other", [{"text": "the cat is red."}, {"messages": [*TURNS, *REPLY]}])
def test_eval_data_of_another_type_are_refused(sft, rows, other, tmp_path):
    files = {"data": rows("train.jsonl", STANDARD), "eval_data": rows("held.jsonl", other)}
    with pytest.raises(
        DataError, match=r"sft: eval_data must be rows of the same type as data: .*held\.jsonl:1: "
    ):
        _check({"sft": sft(**files)}, tmp_path)


@pytest.mark.parametrize(
    ("train", "held", "reason"),
    [
        (
            [STANDARD],
            [CONVERSATION],
            "eval_data is prompt-completion, conversational, but data is prompt-completion, standard",
        ),
        (
            [CONVERSATION],
            [STANDARD],
            "eval_data is prompt-completion, standard, but data is prompt-completion, conversational",
        ),
        (
            [CONVERSATION],
            [CONVERSATION, STANDARD],
            "eval_data is prompt-completion, standard and conversational",
        ),
        ([CONVERSATION], [CONVERSATION], None),
        ([STANDARD, CONVERSATION], [STANDARD], None),
        ([STANDARD, CONVERSATION], [CONVERSATION], None),
    ],
)
def test_eval_data_have_the_form_of_data(sft, rows, train, held, reason, tmp_path):
    files = {"data": rows("train.jsonl", *train), "eval_data": rows("held.jsonl", *held)}
    if reason is None:
        assert _check({"sft": sft(**files)}, tmp_path)
        return
    with pytest.raises(DataError, match=f"sft: {reason}"):
        _check({"sft": sft(**files)}, tmp_path)


def test_held_out_prompts_of_ppo_have_the_form_of_its_prompts(rows, tiny_model, tiny_reward, tmp_path):
    stage = {
        "kind": "ppo",
        "model": str(tiny_model),
        "reward": str(tiny_reward),
        "data": rows("train.jsonl", {"prompt": "a?"}),
        "eval_data": rows("held.jsonl", {"prompt": TURNS}),
        "eval_every": 1,
        "sampling": {"max_new_tokens": 4},
    }
    with pytest.raises(DataError, match="ppo: eval_data is prompt-only, conversational, but data"):
        _check({"ppo": stage}, tmp_path)


def test_a_mixture_of_text_and_conversations_is_trained_on_with_a_template(
    sft, rows, run, tiny_model, tmp_path
):
    """Neither source's form hides the other's: the tokenizer gets the template that the conversations
    need."""
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare)
    (bare / "chat_template.jinja").unlink()
    mixture = [rows("a.jsonl", STANDARD, STANDARD), rows("b.jsonl", CONVERSATION, CONVERSATION)]
    said = _check({"sft": sft(model=str(bare), data=mixture, holdout=0)}, tmp_path)["sft"]
    assert "prompt-completion, standard and conversational" in said
    for number, order in enumerate((mixture, mixture[::-1])):
        stage = sft(model=str(bare), data=order, batch_size=1, holdout=0, max_steps=1)
        done = run({"stages": {"sft": stage}}, tmp_path / f"run{number}")
        assert (done.stage_directory("sft") / "model" / "chat_template.jinja").exists()


def test_a_built_in_reward_named_like_a_model_is_shown_how_to_be_written(tmp_path, tiny_model, data):
    kinds = {get_args(term.model_fields["kind"].annotation)[0] for term in get_args(get_args(RewardTerm)[0])}
    assert kinds == {*RULES, "learned", "python", "plugin"}
    stage = {"kind": "grpo", "model": str(tiny_model), "data": str(data.prompts), "reward": "length"}
    with pytest.raises(UsageError, match=r"s: `reward: length` would be .*write reward: \{kind: length\}"):
        _check({"s": stage}, tmp_path)
