"""Comparisons as questions which is better, rated replies as questions how good: the judge's own words, both
orders, a reward for being right."""

from __future__ import annotations

import dataclasses
import json
import re
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


# ---------------------------------------------------------------- scores

RATED = [
    {"prompt": "which?", "completion": "red", "score": 10, "label": True},
    {"prompt": [{"role": "user", "content": "and now?"}], "completion": "blue", "score": 2.5},
    {"prompt": "which?", "completion": "pink", "ratings": {"quality": 11 / 3}},
]


def columns(dataset: Any, name: str) -> list[Any]:
    return [row.columns[name] for row in dataset.records]


def test_a_rated_reply_is_one_question_in_a_judges_words(source: Callable[..., Any]) -> None:
    given = source(RATED, mode="pointwise", rubric="red?")
    dataset = load([given], ("demonstration",), 0)
    rows = [row for row in dataset.records if isinstance(row, DemonstrationRecord)]
    told = [row.completion[0]["content"] for row in rows]  # pyright: ignore[reportArgumentType, reportIndexIssue]
    assert told == [
        '{"scores": {"score": 10}}',
        '{"scores": {"score": 2.5}}',
        '{"scores": {"score": 3.67}}',  # a mean is not learned to its last digit
    ]
    assert columns(dataset, "score") == [10, 2.5, round(11 / 3, 12)]
    asked = questions.pointwise(questions.Rubric("red?", reasons=False), "which?", "red")
    assert rows[0].prompt == ({"role": "user", "content": asked.text},)
    assert [asked.read(one).value for one in told[:2]] == [1.0, pytest.approx(1.5 / 9)]
    group = columns(dataset, "group")
    assert group[0] == group[2] != group[1]
    assert not any("does not read" in line for line in dataset.sources)
    (first, *_) = load([source(RATED, mode="pointwise", reasons=True)], ("prompt",), 0).records
    assert isinstance(first, PromptRecord)
    assert first.columns["score"] == 10
    with pytest.raises(UsageError, match=r"`verdicts\.reasons` makes prompts, since rated replies"):
        load([source(RATED, mode="pointwise", reasons=True)], ("demonstration",), 0)


def test_each_criterion_has_its_score_and_the_column_their_weighted_mean(
    source: Callable[..., Any],
) -> None:
    rubric = [{"name": "helpful", "weight": 3.0}, {"name": "brief"}]
    rows = [
        {"prompt": "which?", "completion": "red", "ratings": {"helpful": 4, "brief": 2, "kind": 1}},
        {"prompt": "which?", "completion": "blue", "helpful": 1, "brief": 5},
        {"prompt": "which?", "completion": "pink", "ratings": '{"helpful": 2, "brief": 2.5}'},  # of a table
    ]
    dataset = load([source(rows, mode="pointwise", rubric=rubric, scale=[1, 5])], ("demonstration",), 0)
    assert columns(dataset, "score") == [3.5, 2, 2.125]  # (3 × 4 + 2) / 4, (3 + 5) / 4, (6 + 2.5) / 4
    (first, *_) = dataset.records
    assert isinstance(first, DemonstrationRecord)
    told = first.completion[0]["content"]  # pyright: ignore[reportArgumentType, reportIndexIssue]
    assert told == '{"scores": {"helpful": 4, "brief": 2}}'


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, 'it has no "score"'),
        ({"score": None}, 'it has no "score"'),
        ({"score": 11}, r'"score" is 11, not from 1 to 10 \(`verdicts.scale`\)'),
        ({"score": 0.5}, '"score" is 0.5, not from 1'),
        ({"score": "good"}, "\"score\" is 'good', not a finite number"),
        ({"score": "nan"}, "not a finite number"),
        ({"score": True}, "not a finite number"),
        ({"ratings": {"a": 1, "b": 2}}, r"holds several \(a, b\)"),
        ({"ratings": [1, 2]}, '"ratings" is .*, not a number for each'),
        ({"ratings": "1;2"}, "no JSON"),
        ({"score": 3, "completion": " "}, "completion"),
        ({"score": 3, "chosen": "a", "rejected": "b"}, "it is a comparison"),
    ],
)
def test_what_is_not_rated_on_the_scale_is_a_bad_row(
    row: dict[str, Any], said: str, source: Callable[..., Any]
) -> None:
    good = {"prompt": "which?", "completion": "red", "score": 3}
    bad = {"prompt": "which?", "completion": "red", **row}
    with pytest.raises(DataError, match=f"pairs.jsonl:2: .*{said}"):
        load([source([good, bad], mode="pointwise")], ("prompt",), 0)


def test_the_reward_is_how_near_the_score_is() -> None:
    rubric = questions.Rubric("", (), 1, 5)
    said = [
        '{"scores": {"score": 4}}',
        'Well.\n{"reason": "it is red", "scores": {"score": 4}}',
        '{"scores": {"score": 1}}',
        '{"scores": {"score": 4.5}}',
        '{"scores": {"score": 6}}',  # off the scale
        '{"scores": {"score": "4"}}',
        '{"scores": {"quality": 4}}',
        '{"score": 4}',
        '{"better": "A"}',
        "4",
        '<think>{"scores": {"score": 4}}</think>{"scores": {"score": 2}}',
        '{"scores": {"score": 4}}',
    ]
    right = [4, 4, 5, 4, 4, 4, 4, 4, 4, 4, "4", None]
    paid = rules.score_verdict(rubric)([""] * 12, said, score=right)
    assert paid == [1.0, 1.0, 0.0, 0.875, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5, None]
    criteria = (questions.Criterion("red", 3.0), questions.Criterion("brief"))
    reward = rules.score_verdict(questions.Rubric("", criteria, 0, 4), "right")
    assert reward([""], ['{"scores": {"red": 4, "brief": 0}}'], right=[2.0]) == [0.75]  # mean 3, of 4
    with pytest.raises(UsageError, match="no column 'score'"):
        rules.score_verdict(rubric)([""], said[:1], better=["A"])
    for wrong in ("A", 6, float("nan")):
        with pytest.raises(UsageError, match=r"column 'score' is .*, no number from 1 to 5"):
            rules.score_verdict(rubric)([""], said[:1], score=[wrong])


def test_a_table_of_texts_is_read_too(tmp_path: Path, source: Callable[..., Any]) -> None:
    table = tmp_path / "rated.csv"
    table.write_text("prompt,completion,score\nwhich?,red,7\nwhich?,blue,2.5\n")
    given = dataclasses.replace(source(mode="pointwise"), source=str(table), strict=True)
    assert columns(load([given], ("demonstration",), 0), "score") == [7, 2.5]


def test_rated_replies_where_comparisons_are_read_are_told_the_mode(source: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match=r"pairs.jsonl:1: it is a rated reply: set `mode: pointwise`"):
        load([source(RATED)], ("prompt",), 0)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('"score": 11', r"rows.jsonl:2: reward 'verdict'.*'score', is '11', no number from 1 to 10"),
        ('"better": "A"', r"rows.jsonl:2: no reward applies to it: it has no 'score'"),
    ],
)
def test_a_row_without_a_score_on_the_scale_is_found_before_anything_is_trained(
    row: str, said: str, run: Any, tiny_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "the cat?", "score": 3}\n{"prompt": "the dog?", ' + row + "}\n")
    reward = {"kind": "verdict", "mode": "pointwise"}
    stage = {"kind": "grpo", "model": str(tiny_model), "reward": reward, "data": str(path)}
    stage["sampling"] = {"max_new_tokens": 8}
    with pytest.raises(DataError, match=said):
        run({"stages": {"grpo": stage}}, tmp_path / "run")


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ({"scale": [1, 5]}, "`scale` has no effect with `mode: pairwise`"),
        ({"rubric": RUBRIC}, "`rubric` has no effect with `mode: pairwise`"),
        ({"mode": "pointwise", "scale": [5, 1]}, "the second end must be above the first"),
        ({"mode": "pointwise", "rubric": [{"name": "a"}, {"name": "a"}]}, "two criteria 'a'"),
    ],
)
def test_settings_of_the_reward_without_effect_are_refused(reward: dict[str, Any], said: str) -> None:
    stage = {"kind": "grpo", "model": "m", "data": "d", "reward": {"kind": "verdict", **reward}}
    with pytest.raises(UsageError, match=said):
        parse({"name": "x", "stages": {"s": stage}})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"verdicts": {"scale": [1, 5]}}, "`scale` has no effect with `mode: pairwise`"),
        ({"verdicts": {"mode": "pointwise", "scale": [2, 2]}}, "the second end must be above the first"),
        (
            {
                "verdicts": {"mode": "pointwise"},
                "pairs": {"first": "a", "second": "b", "label": "l", "first_wins": [1], "second_wins": [2]},
            },
            "`pairs` makes comparisons",
        ),
    ],
)  # fmt: skip
def test_settings_of_the_source_without_effect_are_refused(data: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse({"name": "x", "stages": {"s": {"kind": "sft", "model": "m", "data": {"source": "d", **data}}}})


def test_the_score_of_peoples_ratings_is_a_share(source: Callable[..., Any]) -> None:
    """Not a number on the scale that they saw: 1.0, the best, would be read as 1 of 10, the worst."""
    people = dataclasses.replace(source(mode="pointwise"), source="label:replies@sqlite:///secret.db")
    with pytest.raises(UsageError, match=r"label:replies: the `score` .* `verdicts.scale` to \[0, 1\]"):
        load([people], ("demonstration",), 0)


def reader(tokenizer: Any, folder: Path) -> Path:
    """A small model with room for a question."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=1024, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_from_comparisons_to_a_judge_that_the_bench_and_a_policy_ask(
    run: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """SFT on bare verdicts teaches the form; then each answer can be read, by `keel bench reward` and as a
    reward."""
    start = reader(tokenizer, tmp_path / "start")
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


@pytest.mark.slow
def test_from_ratings_to_a_judge_that_a_policy_asks(run: Any, tokenizer: Any, tmp_path: Path) -> None:
    """SFT on bare scores, GRPO by how near they are; then the critic judges replies one by one, and gives red
    ones and blue ones the scores that they were rated with."""
    start = reader(tokenizer, tmp_path / "start")
    rows = [
        {"prompt": f"{a}?", "completion": reply, "score": score}
        for a in ("cat", "dog", "fox", "hen") for reply, score in (("red", 9), ("blue", 2))
    ]  # fmt: skip
    rated = tmp_path / "rated.jsonl"
    rated.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"source": str(rated), "verdicts": {"mode": "pointwise", "rubric": "red"}}
    judge = {"kind": "judge", "model": "critic", "rubric": "red", "reasons": False, "max_new_tokens": 30}
    learn = {"kind": "sft", "model": str(start), "holdout": 0, "lr": 3e-3, "batch_size": 8}
    play = {"kind": "grpo", "lr": 1e-5, "updates": 1}
    stages = {
        "scores": {**learn, "data": source, "epochs": 120},
        "critic": {
            **play, "model": "scores", "data": source, "batch_size": 8, "samples_per_prompt": 4,
            "reward": {"kind": "verdict", "mode": "pointwise"},
            "sampling": {"max_new_tokens": 30, "temperature": 1.5},
        },
        "talker": {**learn, "data": str(rated), "epochs": 60},
        "policy": {
            **play, "model": "talker", "data": str(rated), "batch_size": 4, "samples_per_prompt": 4,
            "reward": [{**judge, "on_failure": "none"}, {"kind": "repetition"}],
            "sampling": {"max_new_tokens": 4},
        },
    }  # fmt: skip
    pipeline = run({"stages": stages}, tmp_path / "run")

    def samples(name: str) -> list[dict[str, Any]]:
        file = pipeline.stage_directory(name) / "samples.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()]

    for one in samples("critic"):
        right = 9 if "reply\nred\n" in one["prompt"][0]["content"] else 2
        said = re.search(r'{"scores": {"score": ([\d.]+)}}$', one["completion"])
        given = float(said[1]) if said and 1 <= float(said[1]) <= 10 else None
        assert one["rewards"]["verdict"] == (
            0 if given is None else pytest.approx(1 - abs(given - right) / 9)
        )
    judged = {one["completion"]: one["rewards"]["judge"] for one in samples("policy")}
    assert judged == {"red": pytest.approx(8 / 9), "blue": pytest.approx(1 / 9)}
