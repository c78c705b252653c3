"""The published rules of RewardBench 1 and 2 and LLMBar, each worked by hand, and their files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from keel.errors import DataError, UsageError
from keel.evaluation import reward_bench as bench
from keel.evaluation import reward_bench_files as published
from keel.evaluation.reward_bench import Question, Scored


def question(subset: str, *replies: str, right: int = 1, id: str = "", prompt: str = "p") -> Question:
    return Question(id or subset, prompt, replies or ("good", "bad"), right, subset, f"{subset}:1")


def scored(*rows: tuple[float, ...]) -> list[Scored]:
    return [Scored(tuple(row)) for row in rows]


def mean(measure: dict[str, float]) -> float:
    return measure["mean"]


# ---------------------------------------------------------------- RewardBench


def test_rewardbench_weighs_subsets_by_their_prompts_and_sections_alike() -> None:
    """Chat: alpacaeval-easy ½ (100 prompts), mt-bench-med 1 (40): (50 + 40)/140. Chat Hard: 0. Reasoning:
    math-prm 1 (984), hep-go 0 (164): 984/1148. Safety has none. The score is the mean of three."""
    questions = [question(s) for s in ("alpacaeval-easy", "alpacaeval-easy", "mt-bench-med", "llmbar-natural",
                                       "math-prm", "hep-go")]  # fmt: skip
    given = scored((2, 1), (1, 2), (5, -5), (0, 3), (1, 0), (0, 1))
    found = bench.result("rewardbench", questions, given, draws=2)
    assert {name: mean(m) for name, m in found["sections"].items()} == pytest.approx(
        {"Chat": 90 / 140, "Chat Hard": 0.0, "Reasoning": 984 / 1148}
    )
    assert mean(found["score"]) == pytest.approx((90 / 140 + 0 + 984 / 1148) / 3)
    assert mean(found["subsets"]["alpacaeval-easy"]) == 0.5
    assert "donotanswer" in found["missing_subsets"]
    assert found["sections"]["Chat"]["n"] == 3


def test_an_equal_score_is_lost_by_a_model_and_a_draw_for_a_judge() -> None:
    questions = [question("alpacaeval-easy")] * 2
    given = scored((1, 1), (2, 1))
    assert mean(bench.result("rewardbench", questions, given, draws=1)["score"]) == 0.5
    assert mean(bench.result("rewardbench", questions, given, judge=True, draws=1)["score"]) == 0.75


def test_an_unanswered_question_is_a_guess_and_counted() -> None:
    questions = [question("alpacaeval-easy")] * 2
    found = bench.result("rewardbench", questions, [Scored((None, None)), Scored((2.0, 1.0))], draws=1)
    assert (mean(found["score"]), found["unanswered"]) == (0.75, 1)


def test_the_weights_are_those_of_the_published_code() -> None:
    """math-prm weighs as much as the six subsets of code; all sections have what the paper's table says."""
    assert bench.PROMPTS["math-prm"] == sum(bench.PROMPTS[s] for s in bench.SECTIONS["Reasoning"][1:])
    assert {section: sum(bench.PROMPTS[s] for s in names) for section, names in bench.SECTIONS.items()} == {
        "Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1968,
    }  # fmt: skip


# ---------------------------------------------------------------- RewardBench 2


@pytest.mark.parametrize(
    ("scores", "points"),
    [
        ((3, 1, 2, 0), 1.0),
        ((3, 3, 2, 0), 0.5),
        ((3, 3, 3, 3), 0.25),
        ((3, 4, 2, 0), 0.0),
        ((3, 4, 4, 3), 0.0),
    ],
)
def test_best_of_four_shares_the_point_with_its_equals(scores: tuple[float, ...], points: float) -> None:
    assert bench.best_points(Scored(scores)) == points


def test_rewardbench2_is_the_mean_of_its_subsets_whatever_their_size() -> None:
    """Math: 1, ½, 0 → ½. Focus: one question, 1. Mean ¾."""
    four = ("good", "a", "b", "c")
    questions = [question("Math", *four)] * 3 + [question("Focus", *four)]
    given = scored((3, 1, 2, 0), (3, 3, 2, 0), (1, 2, 0, 0), (9, 0, 0, 0))
    found = bench.result("rewardbench2", questions, given, draws=2)
    assert mean(found["score"]) == 0.75
    assert found["missing_subsets"] == ["Factuality", "Precise IF", "Safety", "Ties"]


def test_ties_by_hand() -> None:
    """Number 1: tied scores 5, 4 | 1, 0: gap 3, spread 1; its reference 5 | 3: gap 2. Number 2: tied 6, 2 |
    1: gap 1, spread 4; its reference 1 | 2: gap −1. Accurate: tied 2/2, ref 1/2. Gap > spread: 1/2; with the
    smaller gap (2 > 1, −1 > 4): 1/2. tanh(2/1 − 1), tanh(−1/4 − 1)."""
    given = {
        "tied:1": ([5.0, 4.0, 1.0, 0.0], 2), "ref:1": ([5.0, 3.0], 1),
        "tied:2": ([6.0, 2.0, 1.0], 2), "ref:2": ([1.0, 2.0], 1),
    }  # fmt: skip
    expected = 0.3 * 1 + 0.3 * 0.5 + 0.2 * 0.5 + 0.2 * 0.5 + 0.01 * (math.tanh(1) + math.tanh(-1.25)) / 2
    assert bench.ties(given) == pytest.approx(expected)


def test_ties_without_a_spread_and_without_a_partner() -> None:
    """Equal right scores: x/0 is tanh(±∞), 0/0 counts 0. A tied question without a reference counts in its
    accuracy alone."""
    perfect = {"tied:1": ([2.0, 2.0, 1.0], 2), "ref:1": ([2.0, 1.0], 1)}
    assert bench.ties(perfect) == pytest.approx(1.01)
    nothing = {"tied:1": ([2.0, 2.0, 2.0], 2), "ref:1": ([2.0, 2.0], 1)}
    assert bench.ties(nothing) == 0.0
    assert bench.ties({**perfect, "tied:7": ([0.0, 0.0, 1.0], 2)}) == pytest.approx(1.01 - 0.15)


def test_ties_in_a_whole_benchmark_are_drawn_with_their_references() -> None:
    rows = {
        "tied:1": ((5, 4, 1, 0), 2),
        "ref:1": ((5, 3, 1, 0), 1),
        "tied:2": ((6, 2, 1, 0), 2),
        "ref:2": ((1, 2, 0, 0), 1),
    }
    questions = [question("Ties", "a", "b", "c", "d", right=r, id=i) for i, (_, r) in rows.items()]
    found = bench.result("rewardbench2", questions, scored(*(s for s, _ in rows.values())), draws=20)
    by_hand = 0.3 + 0.15 + 0.1 + 0.1 + 0.01 * (math.tanh(1) + math.tanh(-1.25)) / 2
    assert mean(found["subsets"]["Ties"]) == mean(found["score"]) == pytest.approx(by_hand)
    unanswered = [Scored((None,) * 4), *scored(*(s for s, _ in list(rows.values())[1:]))]
    worse = bench.result("rewardbench2", questions, unanswered, draws=1)
    by_hand = 0.15 + 0.15 + 0 + 0 + 0.01 * (-1 + math.tanh(-1.25)) / 2
    assert mean(worse["score"]) == pytest.approx(by_hand)


# ---------------------------------------------------------------- LLMBar


def test_llmbar_is_the_mean_over_both_orders() -> None:
    """Natural: right in both, right in its own order alone: (2 + 1)/4 = ¾. Adversarial: Neighbor 0 and
    GPTInst 1: ½. Score (¾ + ½)/2. Both orders agree on three of four."""
    questions = [question(s) for s in ("Natural", "Natural", "Neighbor", "GPTInst")]
    given = [
        Scored((1, 0), 1.0, 1.0),
        Scored((0.5, 0.5), 1.0, 0.0),
        Scored((0, 1), 0.0, 0.0),
        Scored((1, 0), 1.0, 1.0),
    ]
    found = bench.result("llmbar", questions, given, judge=True, draws=2)
    assert mean(found["sections"]["Natural"]) == 0.75
    assert mean(found["sections"]["Adversarial"]) == 0.5
    assert mean(found["score"]) == 0.625
    assert {name: mean(m) for name, m in found["position"].items()} == {
        "own order": 0.75, "exchanged": 0.5, "agreement": 0.75, "right in both": 0.5,
    }  # fmt: skip


def test_ratings_on_llmbar_win_an_equal_pair_in_one_order() -> None:
    assert bench.order_points(Scored((2.0, 1.0))) == (1.0, 1.0, 1.0)
    assert bench.order_points(Scored((1.0, 2.0))) == (0.0, 0.0, 1.0)
    assert bench.order_points(Scored((1.0, 1.0))) == (0.0, 1.0, 0.0)
    assert bench.order_points(Scored((None, 1.0))) == (0.0, 0.0, 0.0)
    assert bench.order_points(Scored((0.5, 0.5), 0.5, 0.5)) == (0.0, 0.0, 1.0)  # a judge that says tie twice


# ---------------------------------------------------------------- intervals and length


def test_intervals_are_those_of_questions_drawn_within_their_subset() -> None:
    """200 questions, 0.7 of them won: the interval is that of a binomial share; below ten there is none."""
    questions = [question("all")] * 200
    given = scored(*([(1, 0)] * 140 + [(0, 1)] * 60))
    score = bench.result("pairs", questions, given)["score"]
    half = 1.96 * math.sqrt(0.7 * 0.3 / 200)
    assert (score["low"], score["high"]) == pytest.approx((0.7 - half, 0.7 + half), abs=0.012)
    few = bench.result("pairs", questions[:9], given[:9])["score"]
    assert (few["low"], few["high"], few["n"]) == (None, None, 9)
    one, again = (bench.result("pairs", questions, given, draws=50) for _ in range(2))
    assert one == again


def test_a_model_that_reads_length_alone_is_a_coin_at_equal_length() -> None:
    """The right reply is longer in 80 of 100 pairs. Who always takes the longer one wins all of those and
    none of the others: 0.8, and ½ with length controlled. Who is right in 60 of the 80 and in 5 of the 20:
    0.65, and (¾ + ¼)/2."""
    long, short = "x" * 80, "y" * 20
    questions = [question("all", *((long, short) if i < 80 else (short, long))) for i in range(100)]
    by_length = scored(*[(1.0, 0.0)] * 80 + [(0.0, 1.0)] * 20)
    found = bench.length(questions, by_length, draws=20)
    assert {name: mean(m) for name, m in found.items()} == pytest.approx({
        "accuracy": 0.8, "right longer": 1.0, "right shorter": 0.0, "controlled": 0.5, "longer right": 0.8,
    })  # fmt: skip
    by_half = scored(*[(1, 0)] * 60 + [(0, 1)] * 20 + [(1, 0)] * 5 + [(0, 1)] * 15)
    found = bench.length(questions, by_half, draws=200)
    assert (mean(found["accuracy"]), mean(found["controlled"])) == pytest.approx((0.65, 0.5))
    assert found["controlled"]["low"] < 0.5 < found["controlled"]["high"]


def test_equal_lengths_count_half_in_either_part() -> None:
    """Lengths equal and won; right longer and lost; right shorter and won: 0.5/1.5 and 1.5/1.5."""
    questions = [question("a", "good", "evil"), question("a", "longer", "x"), question("a", "x", "longer")]
    found = bench.length(questions, scored((1, 0), (0, 1), (1, 0)), draws=2)
    assert mean(found["right longer"]) == pytest.approx(1 / 3)
    assert mean(found["controlled"]) == pytest.approx(2 / 3)
    assert "controlled" not in bench.length(questions[1:2], scored((0, 1)), draws=2)


def test_each_question_weighs_the_same_however_many_replies_it_has() -> None:
    questions = [question("a", "g", "xx", "yyy", "zzzz"), question("a", "good", "b")]
    found = bench.length(questions, scored((0, 1, 1, 1), (1, 0)), draws=2)
    assert mean(found["accuracy"]) == 0.5
    assert bench.length([question("a", "good", "evil")], [Scored((None, None))]) == {}


def test_the_surest_errors_come_first_and_subsets_take_turns() -> None:
    questions = [
        question("a", id="a1"),
        question("a", id="a2"),
        question("b", id="b1"),
        question("b", id="b2"),
    ]
    found = bench.errors(questions, scored((0, 1), (0, 5), (1, 1), (3, 0)))
    assert [(row["id"], row["margin"]) for row in found] == [("a2", 5), ("b1", 0), ("a1", 1)]
    assert (found[0]["right"], found[0]["wrong"], found[0]["wrong_score"]) == ("good", "bad", 5)
    assert len(bench.errors(questions, scored(*[(0, 1)] * 4), most=3)) == 3


# ---------------------------------------------------------------- files


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ONE = {"id": 30, "prompt": "p", "chosen": "c", "chosen_model": "m", "rejected": "r", "rejected_model": "n",
       "subset": "donotanswer"}  # fmt: skip
TWO = {"id": "7", "prompt": "p", "chosen": ["c"], "rejected": ["x", "y", "z"],
       "num_correct": 1, "num_incorrect": 3, "total_completions": 4, "models": ["a", "b"], "subset": "Focus",
       "additional_metadata": None}  # fmt: skip


def test_rewardbench_is_read_from_parquet_and_json_lines(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist([ONE, {**ONE, "subset": "hep-go"}])
    pyarrow.parquet.write_table(table, tmp_path / "filtered-00000-of-00001.parquet")
    kind, found = published.read(str(tmp_path))
    assert kind == "rewardbench"
    assert [(q.replies, q.right, q.subset, q.id) for q in found] == [
        (("c", "r"), 1, "donotanswer", "30"), (("c", "r"), 1, "hep-go", "30"),
    ]  # fmt: skip
    assert published.read(str(jsonl(tmp_path / "x" / "a.jsonl", [ONE])))[0] == "rewardbench"


def test_rewardbench2_is_read_with_its_lists(tmp_path: Path) -> None:
    tied = {
        **TWO,
        "id": "tied:3",
        "chosen": ["c", "d"],
        "num_correct": 2,
        "total_completions": 5,
        "subset": "Ties",
    }
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([TWO, tied]), tmp_path / "test-00000.parquet")
    kind, found = published.read(str(tmp_path))
    assert kind == "rewardbench2"
    assert [(q.replies, q.right, q.subset, q.id) for q in found] == [
        (("c", "x", "y", "z"), 1, "Focus", "7"), (("c", "d", "x", "y", "z"), 2, "Ties", "tied:3"),
    ]  # fmt: skip
    bench.check(kind, found)
    wrong = jsonl(tmp_path / "wrong.jsonl", [{**TWO, "num_correct": 2}])
    with pytest.raises(DataError, match=r"wrong\.jsonl:1: num_correct is 2, and there are 1"):
        published.read(str(wrong))


def test_llmbar_is_read_by_its_folders(tmp_path: Path) -> None:
    rows = [{"input": "i", "output_1": "one", "output_2": "two", "label": label} for label in (1, 2)]
    for folder in ("Natural", "Adversarial/GPTOut"):
        (tmp_path / folder / "evaluators").mkdir(parents=True)
        (tmp_path / folder / "dataset.json").write_text(json.dumps(rows))
        (tmp_path / folder / "evaluators" / "result.json").write_text(json.dumps([{"winner": 1}]))
    kind, found = published.read(str(tmp_path))
    assert kind == "llmbar"
    assert [(q.subset, q.replies) for q in found] == [
        ("GPTOut", ("one", "two")), ("GPTOut", ("two", "one")),
        ("Natural", ("one", "two")), ("Natural", ("two", "one")),
    ]  # fmt: skip
    assert [q.right_shown_second for q in found] == [False, True, False, True]
    (tmp_path / "Natural" / "dataset.json").write_text(json.dumps([{**rows[0], "label": 3}]))
    with pytest.raises(DataError, match="label is 3, neither 1 nor 2"):
        published.read(str(tmp_path))
    other = tmp_path / "elsewhere" / "dataset.json"
    other.parent.mkdir()
    other.write_text(json.dumps(rows))
    with pytest.raises(DataError, match="its folder is none of LLMBar's"):
        published.read(str(other))


def test_pairs_of_ones_own_are_any_preference_data(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "chosen": "c", "rejected": "r", "subset": "code"},
        {"prompt": "p", "chosen": "c", "rejected": "r", "p_chosen": 0.2},
        {"prompt": "p", "chosen": "c", "rejected": "r", "p_chosen": 0.5},
    ]
    kind, found = published.read(str(jsonl(tmp_path / "mine.jsonl", rows)))
    assert kind == "pairs"
    assert [(q.subset, q.replies) for q in found] == [("code", ("c", "r")), ("all", ("r", "c"))]
    with pytest.raises(UsageError, match="no file"):
        published.read(str(tmp_path / "nowhere.jsonl"))


@pytest.mark.parametrize(
    ("kind", "asked", "reason"),
    [
        ("rewardbench", question("unknown"), "'unknown' is no subset of rewardbench"),
        ("rewardbench", question("hep-go", "a", "b", "c"), "it has 3 replies; the rule is for two"),
        ("rewardbench2", question("Math", "a", "b", right=2), "it has 2 right replies of 2"),
        ("rewardbench2", question("Math", "a", "b", "c", right=2), "2 right replies; the rule is for one"),
        ("rewardbench2", question("Ties", "a", "b", id="3"), "is ref:NUMBER or tied:NUMBER"),
    ],
)
def test_what_a_rule_has_no_use_for_is_named(kind: Any, asked: Question, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        bench.check(kind, [asked])


def test_position_is_of_the_pairs_that_a_judge_answered_in_both_orders() -> None:
    """RewardBench: one right in front alone, one in both, one that was not answered."""
    questions = [question("alpacaeval-easy")] * 3
    given = [Scored((0.5, 0.5), 1.0, 0.0), Scored((1.0, 0.0), 1.0, 1.0), Scored((None, None))]
    for benchmark in ("rewardbench", "pairs"):
        found = bench.result(benchmark, questions, given, judge=True, draws=2)
        assert {name: (mean(m), m["n"]) for name, m in found["position"].items()} == {
            "right in front": (1.0, 2), "right behind": (0.5, 2), "agreement": (0.5, 2),
        }  # fmt: skip
        alone = bench.result(benchmark, questions, scored((1, 0), (1, 0), (0, 1)), draws=2)
        assert "position" not in alone


def test_llmbars_own_order_is_the_published_one() -> None:
    """Who always takes the first has every question whose label is 1 in its own order, and of label 2 in the
    exchanged one. Its code, of equal ratings: winner 2 as published, 1 exchanged."""
    questions = [question("Natural"), replace(question("Natural"), right_shown_second=True)]
    first = [Scored((0.5, 0.5), 1.0, 0.0)] * 2
    found = bench.result("llmbar", questions, first, judge=True, draws=2)
    assert {name: mean(m) for name, m in found["position"].items()} == {
        "own order": 0.5, "exchanged": 0.5, "agreement": 0.0, "right in both": 0.0,
    }  # fmt: skip
    assert bench.order_points(Scored((1.0, 1.0)), True) == (1.0, 0.0, 0.0)
    assert bench.order_points(Scored((0.5, 0.5), 1.0, 0.0), True) == (0.0, 1.0, 0.0)
