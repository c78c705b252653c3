"""Plain text and conversations: what a model was trained on, what is said where it meets the other, and what
samples keep of it."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

import keel
from keel.config import parse
from keel.data import chat
from keel.models.load import load_tokenizer
from keel.pipeline.pipeline import Pipeline
from keel.report.page import write as write_report

ASKED = ("the cat?", "so the dog?", "the fox?", "the owl?")
TALKS = [  # each ends with the user's second turn
    [
        {"role": "user", "content": "so?"},
        {"role": "assistant", "content": "so."},
        {"role": "user", "content": asked},
    ]
    for asked in ASKED
]
LAW = '''"""A reward that reads all turns of a prompt."""


def turns(prompts, completions, **columns):
    return [
        sum(len(turn["content"]) for turn in prompt) + len(completion[0]["content"]) / 100
        for prompt, completion in zip(prompts, completions)
    ]
'''


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows_of(stage: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (stage / "samples.jsonl").read_text().splitlines()]


def notes_of(stage: Path) -> list[str]:
    return json.loads((stage / "stage.json").read_text())["facts"].get("notes", [])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, roomy_model: Path, tokenizer: Any) -> Path:
    """A model as it comes from pretraining elsewhere: no chat template."""
    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(roomy_model, folder)
    (folder / "chat_template.jinja").unlink()
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    plain.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, base: Path, data: Any) -> tuple[Path, list[str]]:
    """A policy trained on conversations and one on plain text, a reward model of conversations, and stages in
    which each meets prompts of several turns; the stages' folder and what was said."""
    folder = tmp_path_factory.mktemp("forms")
    (folder / "law.py").write_text(LAW)
    prompts = write(folder / "prompts.jsonl", [{"prompt": talk} for talk in TALKS])
    pairs = [
        {"prompt": talk, **{s: [{"role": "assistant", "content": c}] for s, c in sides.items()}}
        for talk in TALKS
        for sides in (
            {"chosen": "it is red.", "rejected": "it is blue."},
            {"chosen": "red.", "rejected": "."},
        )
    ]
    short, few = {"max_new_tokens": 6}, {"max_steps": 1, "batch_size": 4, "holdout": 0}
    law = {"kind": "python", "function": f"{folder / 'law.py'}:turns", "name": "law", "isolate": False}
    stages = {
        "plain": {"kind": "sft", "model": str(base), "data": str(data.demonstrations), **few},
        "talks": {"kind": "sft", "model": str(base), "data": str(data.chats), "max_steps": 60, "epochs": 60,
                  "batch_size": 8, "lr": 2e-2, "holdout": 0},
        "rm": {"kind": "reward", "model": "talks", "data": write(folder / "pairs.jsonl", pairs), **few,
               "normalize": 0},
        "grpo": {"kind": "grpo", "model": "talks", "reward": ["rm", law], "data": prompts, "updates": 1,
                 "batch_size": 4, "samples_per_prompt": 2, "sampling": short},
        "best": {"kind": "best_of_n", "model": "talks", "reward": law, "data": prompts, "sampling": short,
                 "samples_per_prompt": 2, **few},
        "judge": {"kind": "evaluate", "models": ["talks", "plain"], "reward": "rm", "data": prompts,
                  "sampling": {"max_new_tokens": 12}},
        "mixed": {"kind": "evaluate", "models": ["talks"], "reward": "rm", "data": str(data.prompts),
                  "sampling": short, "comparisons": str(data.pairs)},
    }  # fmt: skip
    said: list[str] = []
    config = parse({"name": "forms", "threads": 1, "device": "cpu", "stages": stages})
    pipeline = Pipeline(config, folder / "run", said.append)
    pipeline._report = lambda: None  # pyright: ignore[reportAttributeAccessIssue]
    pipeline.run()
    return folder / "run" / "stages", said


# ---------------------------------------------------------------- what a model was trained on


def test_a_model_says_whether_it_has_seen_conversations(done: Any, base: Path) -> None:
    stages, _ = done
    for name, seen in (("plain", False), ("talks", True), ("rm", True), ("grpo", True), ("best", True)):
        assert AutoConfig.from_pretrained(stages / name / "model").keel_conversations is seen, name
    assert AutoConfig.from_pretrained(stages / "rm" / "model").keel_reward["prompts"] == "conversations"
    assert not load_tokenizer(str(stages / "plain" / "model")).chat_template


def test_conversations_that_meet_a_model_of_plain_text_are_said_once(done: Any) -> None:
    stages, said = done
    (note,) = notes_of(stages / "judge")
    assert note.startswith("the model plain was trained on plain text; these rows are conversations")
    assert "a stage of kind sft" in note
    assert [line for line in said if note in line] == [f"judge: {note}"]
    for name in ("plain", "talks", "rm", "grpo", "best"):  # sft teaches the template, the others have it
        assert not notes_of(stages / name), name


def test_a_reward_model_that_meets_another_form_says_so(done: Any) -> None:
    stages, _ = done
    notes = notes_of(stages / "mixed")
    assert [note.partition(" was trained")[0] for note in notes] == [
        "the reward model rm",
        "comparisons: the reward model",
    ]
    assert all("on conversations, and these prompts are plain text" in note for note in notes)


def test_the_report_shows_what_was_said(done: Any) -> None:
    stages, _ = done
    page = write_report(stages.parent).read_text(encoding="utf-8")
    assert "judge: the model plain was trained on plain text" in page


def test_a_card_of_plain_text_asks_with_plain_text(base: Path, data: Any, run: Any, tmp_path: Path) -> None:
    """keel's pretraining gives every model a template, whether or not it has seen a conversation."""
    shape = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 2, "max_position_embeddings": 48}  # fmt: skip
    stage = {"kind": "pretrain", "model": {"init": shape, "vocab_size": 270}, "data": str(data.text)}
    run({"stages": {"base": {**stage, "max_steps": 1, "max_length": 24, "holdout": 0}}}, tmp_path)
    folder = tmp_path / "stages" / "base" / "model"
    assert load_tokenizer(str(folder)).chat_template == chat.DEFAULT_CHAT_TEMPLATE
    assert AutoConfig.from_pretrained(folder).keel_conversations is False
    card = (folder / "README.md").read_text()
    assert "It was trained on plain text alone" in card
    assert 'tokenizer("Hello"' in card
    assert "apply_chat_template" not in card


# ---------------------------------------------------------------- samples


def test_samples_hold_the_whole_prompt_and_scores_can_be_computed_from_them(done: Any) -> None:
    stages, _ = done
    space: dict[str, Any] = {}
    exec(LAW, space)
    for name, reward in (("grpo", lambda row: row["rewards"]["law"]), ("best", lambda row: row["reward"])):
        rows = rows_of(stages / name)
        assert len(rows) == 4
        for row in rows:
            assert row["prompt"] in TALKS
            reply = [{"role": "assistant", "content": row["completion"].strip()}]
            assert space["turns"]([row["prompt"]], [reply]) == [pytest.approx(reward(row), abs=1e-6)]
    rows = rows_of(stages / "judge")
    assert [row["prompt"] for row in rows] == [*TALKS, *TALKS]
    assert [row["prompt"] for row in rows_of(stages / "mixed")][:2] == ["the cat?", "the dog?"]


def test_a_text_scores_as_the_users_turn_that_evaluate_scored(
    done: Any, data: Any, run: Any, tmp_path: Path
) -> None:
    stages, _ = done
    prompts = write(
        tmp_path / "prompts.jsonl", [{"prompt": [{"role": "user", "content": asked}]} for asked in ASKED * 3]
    )
    judge = {"kind": "evaluate", "models": [str(stages / "talks" / "model")], "data": prompts}
    settings = {
        "reward": str(stages / "rm" / "model"),
        "sampling": {"max_new_tokens": 40},
    }
    run({"stages": {"judge": {**judge, **settings}}}, tmp_path / "run")
    reward = keel.RewardModel(stages / "rm")
    tokenizer = load_tokenizer(str(stages / "rm" / "model"))
    compared = 0
    for row in rows_of(tmp_path / "run" / "stages" / "judge"):
        (turn,) = row["prompt"]
        reply = ({"role": "assistant", "content": row["completion"].strip()},)
        ids = chat.completion_ids(tokenizer, (turn,), reply)
        if row["stop_reason"] != "eos" or len(ids) != row["length"]:  # not the tokens that its text has
            continue
        by_text, by_turn = reward.score([turn["content"], [turn]], [reply[0]["content"]] * 2)
        assert by_text == by_turn == pytest.approx(row["proxy"], abs=1e-4)
        compared += 1
    assert compared >= 2
