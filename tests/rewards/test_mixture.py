"""Mixtures: the weighted sum by hand, what does not apply, and what goes wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keel.errors import RewardError, UsageError
from keel.rewards import rules
from keel.rewards.mixture import Answers, Batch, Mixture, WeightedReward, from_function, precomputed


def batch_of(*completions: str, **columns: Sequence[Any]) -> Batch:
    size = len(completions)
    return Batch(
        [f"question {i}" for i in range(size)],
        completions,
        [[7] * (i + 1) for i in range(size)],
        ["eos"] * size,
        [[3]] * size,
        columns,
    )


def test_the_total_is_the_weighted_sum_of_what_applies() -> None:
    """Row 0: 2·1 − 0.5·4; row 1: −0.5·3, the other weight is not handed on; row 2: 2·0.25."""
    mixture = Mixture(
        [
            WeightedReward("a", 2.0, precomputed([1.0, None, 0.25])),
            WeightedReward("b", -0.5, precomputed([4.0, 3.0, None])),
            WeightedReward("watched", 0.0, precomputed([9.0, 9.0, 9.0])),
        ]
    )
    rated = mixture.score(batch_of("x", "y", "z"))
    assert rated.total.dtype == torch.float32
    assert rated.total.tolist() == [0.0, -1.5, 0.5]
    assert rated.by_name == {"a": [1.0, None, 0.25], "b": [4.0, 3.0, None], "watched": [9.0, 9.0, 9.0]}


VALUES = st.one_of(st.none(), st.floats(-100, 100))


@given(
    st.lists(st.tuples(VALUES, VALUES, st.floats(-9, 9)), min_size=1, max_size=6),
    st.floats(-9, 9),
    st.floats(-9, 9),
)
def test_the_total_is_torchs_nansum_as_in_trl(rows: Any, first: float, second: float) -> None:
    columns = [list(column) for column in zip(*rows, strict=True)]
    weights = [first, second, 1.0]
    terms = [
        WeightedReward(str(i), w, precomputed(c))
        for i, (w, c) in enumerate(zip(weights, columns, strict=True))
    ]
    total = Mixture(terms).score(batch_of(*["x"] * len(rows))).total
    table = torch.tensor([[math.nan if v is None else v for v in row] for row in rows], dtype=torch.float64)
    torch.testing.assert_close(
        total.double(), (table * torch.tensor(weights)).nansum(dim=1), rtol=1e-6, atol=1e-4
    )


def test_functions_of_trls_signature_and_terms_that_read_ids_stand_side_by_side() -> None:
    def by_ids(batch: Batch) -> list[float | None]:
        return [
            float(len(p) + len(c) + (r == "eos"))
            for p, c, r in zip(batch.prompt_ids, batch.completion_ids, batch.stop_reasons, strict=True)
        ]

    mixture = Mixture(
        [
            WeightedReward("right", 1.0, from_function("right", rules.final_answer())),
            WeightedReward("long", 1.0, from_function("long", rules.length_band(2, 9))),
            WeightedReward("ids", 0.1, by_ids),
            WeightedReward("model", 1.0, precomputed(torch.tensor([0.5, -0.5]))),
        ]
    )
    rated = mixture.score(batch_of("#### 2", "#### 2", answer=["2", "3"]))
    assert rated.by_name == {"right": [1, 0], "long": [0, 1], "ids": [3, 4], "model": [0.5, -0.5]}
    torch.testing.assert_close(rated.total, torch.tensor([1.8, 0.9]))


def test_an_empty_batch_has_no_rewards() -> None:
    rated = Mixture([WeightedReward("a", 1.0, from_function("a", rules.regex("x")))]).score(batch_of())
    assert rated.total.shape == (0,)
    assert rated.by_name == {"a": []}


def test_a_sample_to_which_nothing_applies_is_named() -> None:
    mixture = Mixture([WeightedReward(n, 1.0, precomputed([1.0, None])) for n in ("a", "b")])
    with pytest.raises(
        RewardError, match="no reward applies to sample 1, prompt 'question 1': each of a, b returned None"
    ):
        mixture.score(batch_of("x", "y"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "reward 'bad' returned 1 values for 2 samples"),
        ([1.0, math.nan], "reward 'bad' returned nan, .*sample 1, prompt 'question 1'"),
        ([1e300, 1.0], "rewards of sample 0, prompt 'question 0' do not add up: good 0.0, bad 1e\\+300"),
    ],
)
def test_a_bad_term_is_named(values: list[float], message: str) -> None:
    mixture = Mixture(
        [
            WeightedReward("good", 1.0, precomputed([0.0, 0.0])),
            WeightedReward("bad", 1.0, precomputed(values)),
        ]
    )
    with pytest.raises(RewardError, match=message):
        mixture.score(batch_of("x", "y"))


def test_a_term_that_raises_is_named() -> None:
    def fails(batch: Batch) -> list[float | None]:
        raise ZeroDivisionError("by zero")

    with pytest.raises(RewardError, match="reward 'bad' raised ZeroDivisionError: by zero"):
        Mixture([WeightedReward("bad", 1.0, fails)]).score(batch_of("x"))
    user = from_function("mine", lambda completions: [1 / len(c) for c in completions])
    with pytest.raises(
        RewardError, match=r"reward 'mine' raised ZeroDivisionError: .*\(sample 1, prompt 'question 1'\)"
    ):
        Mixture([WeightedReward("mine", 1.0, user)]).score(batch_of("x", ""))


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ([], "at least one"),
        ([("a", 1.0), ("b", 1.0), ("a", 2.0)], "two rewards are called 'a'"),
        ([("a", math.inf)], "reward 'a': weight inf"),
    ],
)
def test_terms_without_sense_are_refused(terms: list[tuple[str, float]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Mixture([WeightedReward(name, weight, precomputed([])) for name, weight in terms])


def test_a_batch_of_uneven_lists_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2 prompts has columns\['answer'\] 1"):
        batch_of("x", "y", answer=["1"])
    with pytest.raises(ValueError, match="1 prompts has stop_reasons 2"):
        Batch(["p"], ["x"], [[1]], ["eos", "eos"], [[1]], {})


def test_parts_that_are_asked_apart_are_summed_as_one() -> None:
    """In the order of their numbers. What a function logged of one part alone has no value elsewhere, and a
    column of another length is left out."""
    terms = [
        WeightedReward("twice", 2.0, lambda b: [float(c) for c in b.completions]),
        WeightedReward("even", 1.0, lambda b: [1.0 if int(c) % 2 == 0 else None for c in b.completions]),
    ]
    mixture, whole = Mixture(terms), [str(number) for number in range(5)]
    rows = [[3, 0], [1, 4, 2]]
    parts = [batch_of(*(whole[row] for row in part), source=[f"s{row}" for row in part]) for part in rows]
    parts[1].logged.log_extra("noted", ["one", "four", "two"])
    for part in parts:
        part.logged.log_extra("short", ["x"])
    answers = Answers.joined([mixture.ask(part) for part in parts], [row for part in rows for row in part])
    assert answers.logged.extra == {"noted": [None, "one", "two", None, "four"]}
    assert answers.sources == ["s0", "s1", "s2", "s3", "s4"]
    found, expected = mixture.sum(answers), mixture.score(batch_of(*whole))
    assert found.total.equal(expected.total)
    assert found.by_name == expected.by_name


def test_a_silent_judge_neither_gains_nor_loses() -> None:
    """Prompt 3 has 1, None and ½: None counts as ¾. Of prompt 4 nothing is known, so the mean of all counts.
    What was said stays as it was said."""
    batch = Batch(list("pppqq"), list("abcde"), [[7]] * 5, ["eos"] * 5, [[3]] * 3 + [[4]] * 2, {})
    batch.logged.log_extra("judge/no_verdict", [None, "late", None, "late", "late"])
    said = [1.0, None, 0.5, None, None]
    other = WeightedReward("other", 1.0, precomputed([0.25] * 5))
    judge = WeightedReward("judge", 2.0, precomputed(said), neutral=True)
    rated = Mixture([judge, other]).score(batch)
    assert rated.total.tolist() == rated.raw.tolist() == [2.25, 1.75, 1.25, 1.75, 1.75]
    assert rated.by_name["judge"] == said
    assert rated.silent == (False, True, False, True, True)
    alone = Batch(["q"], ["d"], [[7]], ["eos"], [[4]], {})
    alone.logged.log_extra("judge/no_verdict", ["status 500"])
    mute = WeightedReward("judge", 2.0, precomputed([None]), neutral=True)
    with pytest.raises(RewardError, match=r"no reward applies to sample 0, .* None \(judge: status 500\)"):
        Mixture([mute]).score(alone)
    loud = WeightedReward("other", 1.0, precomputed([0.25]))
    assert Mixture([mute, loud]).score(alone).silent == (True,)
    sources = Batch(list("ppp"), list("abc"), [[7]] * 3, ["eos"] * 3, [[3]] * 3, {"source": ["x", "y", "x"]})
    sources.logged.log_extra("judge/no_verdict", [None, "late", None])
    three = [WeightedReward(t.name, t.weight, precomputed(v[:3]), neutral=t.neutral) for t, v in
             ((judge, said), (other, [0.25] * 5))]  # fmt: skip
    assert Mixture(three).score(sources).total.tolist() == [2.25, 0.25, 1.25]  # of another source
