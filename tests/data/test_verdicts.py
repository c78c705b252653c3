"""Comparisons as questions which is better: the judge's own words, both orders, a reward for being right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from keel.cli.bench_reward import Bench
from keel.config import parse
from keel.data import questions
from keel.data.load import load
from keel.errors import DataError, UsageError
from keel.rewards import rules
from keel.types import DemonstrationRecord, PromptRecord, RecordType

ROWS = [
    {"prompt": "which?", "chosen": "red", "rejected": "blue", "subset": "a"},
    {"prompt": "which?", "chosen": "pink", "rejected": "green", "p_chosen": 0.5},
    {"prompt": "and now?", "chosen": "red", "rejected": "blue", "p_chosen": 0.2},
]
RUBRIC = [{"name": "red", "weight": 2.0, "description": "It is red."}]


@pytest.fixture
def source(tmp_path: Path) -> Callable[..., Any]:
    def go(rows: list[dict[str, Any]] | None = None, **verdicts: Any) -> Any:
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows or ROWS))
        data = {"source": str(path), "verdicts": verdicts, "on_bad": "error"}
        stage = parse({"name": "x", "stages": {"s": {"kind": "sft", "model": "m", "data": data}}}).stages["s"]
        return stage.data[0].plain()  # pyright: ignore[reportAttributeAccessIssue]

    return go


def test_a_pair_is_two_questions_in_a_judges_words(source: Callable[..., Any]) -> None:
    dataset = load([source(rubric=RUBRIC)], ("demonstration",), 0)
    rows = [row for row in dataset.records if isinstance(row, DemonstrationRecord)]
    assert [row.columns["better"] for row in rows] == ["A", "B", "tie", "tie", "B", "A"]
    rubric = questions.Rubric("", (questions.Criterion("red", 2.0, "It is red."),), reasons=False)
    asked = questions.pairwise(rubric, "which?", "blue", "red")
    assert rows[1].prompt == ({"role": "user", "content": asked.text},)
    told = rows[1].completion[0]["content"]  # pyright: ignore[reportArgumentType, reportIndexIssue]
    assert asked.read(told).value == 0.0  # as the judge that it becomes would be read
    assert rows[1].origin.endswith("pairs.jsonl:1 (2)")
    assert [row.columns.get("subset") for row in rows[:3]] == ["a", "a", None]


def test_rows_of_one_prompt_are_held_out_together(source: Callable[..., Any]) -> None:
    groups = [row.columns["group"] for row in load([source()], ("prompt",), 0).records]
    assert groups[0] == groups[1] == groups[2] == groups[3] != groups[4] == groups[5]


def test_with_reasons_they_are_prompts(source: Callable[..., Any]) -> None:
    (first, *_) = load([source(reasons=True)], ("prompt",), 0).records
    assert isinstance(first, PromptRecord)
    assert '"reason"' in first.prompt[0]["content"]  # pyright: ignore[reportArgumentType, reportIndexIssue]
    with pytest.raises(UsageError, match=r"`verdicts\.reasons` makes prompts"):
        load([source(reasons=True)], ("demonstration", "text"), 0)


@pytest.mark.parametrize("accept", [("preference",), ("text",)])
def test_they_are_for_stages_that_learn_to_answer(
    accept: tuple[RecordType, ...], source: Callable[..., Any]
) -> None:
    with pytest.raises(UsageError, match="`verdicts` makes questions"):
        load([source()], accept, 0)


def test_what_is_no_comparison_is_a_bad_row(source: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match=r"pairs.jsonl:1: .*rejected"):
        load([source([{"prompt": "p", "chosen": "c"}])], ("prompt",), 0)


def test_the_reward_is_1_for_the_right_verdict_alone() -> None:
    said = [
        '{"better": "A"}',
        'Well.\n{"reason": "it is red", "better": "A"}',
        '{"better": "B"}',
        "A",
        '{"better": "A", "better": "B"}',
        '{"better": "tie"}',
        '<think>{"better": "A"}</think>{"better": "tie"}',
        '{"better": "A"}',
    ]
    right = ["A", "A", "A", "A", "A", "tie", "A", None]
    assert rules.verdict()([""] * 8, said, better=right) == [1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, None]
    with pytest.raises(UsageError, match="no column 'better'"):
        rules.verdict()([""], said[:1], other=["A"])
    with pytest.raises(UsageError, match="a verdict is A, B or tie"):
        rules.verdict()([""], said[:1], better=["first"])


def test_a_row_whose_verdict_is_none_is_found_before_anything_is_trained(
    run: Any, tiny_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "the cat?", "better": "A"}\n{"prompt": "the dog?", "better": "first"}\n')
    stage = {"kind": "grpo", "model": str(tiny_model), "reward": {"kind": "verdict"}, "data": str(path)}
    stage["sampling"] = {"max_new_tokens": 8}
    with pytest.raises(DataError, match=r"rows.jsonl:2: reward 'verdict'.* is 'first', no verdict"):
        run({"stages": {"grpo": stage}}, tmp_path / "run")


@pytest.mark.parametrize(
    ("rubric", "said"), [(" ", "is blank"), ([{"name": "a"}, {"name": "a"}], "two criteria 'a'")]
)
def test_a_rubric_that_no_judge_takes_is_refused(rubric: Any, said: str) -> None:
    data = {"source": "d", "verdicts": {"rubric": rubric}}
    with pytest.raises(UsageError, match=said):
        parse({"name": "x", "stages": {"s": {"kind": "sft", "model": "m", "data": data}}})


@pytest.mark.slow
def test_from_comparisons_to_a_judge_that_the_bench_and_a_policy_ask(
    run: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """SFT on bare verdicts teaches the form; then each answer can be read, by `keel bench reward` and as a
    reward."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=1024, initializer_range=0.1,
    )  # fmt: skip
    start = tmp_path / "start"
    LlamaForCausalLM(config).save_pretrained(start)
    tokenizer.save_pretrained(start)
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{a}?", "chosen": "red", "rejected": "blue"} for a in ("cat", "dog", "fox", "hen")]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge = {"kind": "judge", "mode": "pairwise", "rubric": "red", "reasons": False, "max_new_tokens": 30}
    stages = {
        "critic": {
            "kind": "sft",
            "model": str(start),
            "data": {"source": str(pairs), "verdicts": {"rubric": "red"}},
            "holdout": 0,
            "lr": 3e-3,
            "epochs": 120,
            "batch_size": 8,
        },
        "policy": {
            "kind": "grpo",
            "model": str(start),
            "data": str(pairs),
            "reward": [{**judge, "model": "critic", "on_failure": "none"}, {"kind": "repetition"}],
            "samples_per_prompt": 2,
            "batch_size": 4,
            "updates": 1,
            "sampling": {"max_new_tokens": 4},
        },
    }
    pipeline = run({"stages": stages}, tmp_path / "run")
    spec = tmp_path / "judge.yaml"
    spec.write_text(json.dumps({**judge, "model": str(pipeline.stage_directory("critic") / "model")}))
    found = Bench(str(spec), str(pairs), "pairs", tmp_path / "bench", say=lambda line: None).run()
    assert found["unanswered"] == 0
    assert found["questions"] == len(rows)
