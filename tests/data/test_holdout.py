from __future__ import annotations

import random

import numpy as np
import pytest

from keel.data.batches import derive_seed, permutation
from keel.data.holdout import hold_out, split_holdout, together
from keel.data.identity import RowKeys, distinct, prompt_key, shared
from keel.data.records import parse
from keel.errors import DataError


def pairs(*prompts, **columns):
    return [
        parse({"prompt": p, "chosen": f"c{n}", "rejected": f"r{n}", **columns}, "preference", f"f:{n}")
        for n, p in enumerate(prompts)
    ]


def split(records, share, seed=0, **settings):
    return hold_out(records, RowKeys.of(records), share, seed, **settings)


# ---------------------------------------------------------------- the split


@pytest.mark.parametrize("seed", range(8))
def test_no_prompt_is_on_both_sides_and_the_share_is_near(seed):
    draw = random.Random(seed)
    prompts = [f"p{n}" for n in range(draw.randint(2, 200)) for _ in range(draw.choice([1, 1, 2, 9]))]
    draw.shuffle(prompts)
    share = draw.choice([0.05, 0.1, 0.3])
    found = split(pairs(*prompts), share, seed)
    train, held_out = ([prompts[i] for i in side] for side in (found.train, found.held_out))
    assert not {*train} & {*held_out}
    assert sorted(train + held_out) == sorted(prompts)
    assert train
    assert held_out
    assert found.groups == len({*held_out})
    assert abs(len(held_out) - share * len(prompts)) <= 5  # half the size of the largest group, rounded up


def test_rows_with_prompts_of_their_own_are_drawn_as_a_permutation():
    order = permutation(40, derive_seed("holdout", 3), 0)
    found = split_holdout(range(40), 0.25, 3)
    assert found.held_out == sorted(order[:10])
    assert found.train == sorted(order[10:])
    assert split_holdout(range(40), 0.25, 3) == found != split_holdout(range(40), 0.25, 4)


def test_the_ends_of_the_scale():
    assert split_holdout([1, 1, 1], 0.0, 0).held_out == []
    assert split_holdout([1], 0.5, 0).held_out == []  # one row is trained on
    assert len(split_holdout([1, 2], 0.99, 0).held_out) == 1  # never all of them
    assert split_holdout([1] * 98 + [2] * 2, 0.01, 0).held_out == [
        98,
        99,
    ]  # the smallest, where all are larger
    assert len(split_holdout(range(30_000), 0.5, 0).held_out) == 1000
    large = [n // 700 for n in range(70_000)]
    assert len(split_holdout(large, 0.5, 0).held_out) == 700  # two prompts would be more than 1000 rows


def test_a_huge_prompt_is_not_what_is_held_out():
    keys = [0] * 900 + list(range(1, 101))
    for seed in range(20):
        assert len(split_holdout(keys, 0.05, seed).held_out) == 50


def test_one_prompt_cannot_be_split():
    with pytest.raises(DataError, match=r"reward: all 3 rows have one prompt.*`eval_data`.*`holdout: 0`"):
        split(pairs("a", "a ", "a"), 0.1, where="reward: ")
    assert split(pairs("a", "a"), 0.0).train == [0, 1]


def test_a_group_joins_prompts_and_a_prompt_joins_groups():
    rows = [("a", 1), ("b", 1), ("b", 2), ("c", 2), ("d", 3), ("e", 3), ("f", None), ("g", None)]
    records = [r for p, g in rows for r in pairs(p, **({} if g is None else {"group": g}))]
    for seed in range(10):
        held_out = {*split(records, 0.3, seed).held_out}
        assert held_out & {0, 1, 2, 3} in (set(), {0, 1, 2, 3})
        assert held_out & {4, 5} in (set(), {4, 5})
    assert {tuple(split(records, 0.1, seed).held_out) for seed in range(10)} == {(6,), (7,)}
    alone = {len({*split(records, 0.3, seed, group=None).held_out} & {4, 5}) for seed in range(10)}
    assert 1 in alone  # prompts alone


def test_a_named_group_must_be_there():
    records = [*pairs("a", user=1), *pairs("b", user=1), *pairs("c", user=2)]
    assert split(records, 0.3, group="user").held_out == [2]
    with pytest.raises(DataError, match=r"f:0 has no column 'user', which `group` names"):
        split([*records, *pairs("d")], 0.3, group="user")
    with pytest.raises(DataError, match="one prompt or `user`"):
        split(records[:2], 0.3, group="user")


def test_links_of_links():
    assert together([1, 1, 2, 3, 4], [5, 6, 6, 7, 7]).tolist() == [0, 0, 0, 3, 3]
    chain = together([n // 2 for n in range(100)], [(n + 1) // 2 for n in range(100)])
    assert {*chain.tolist()} == {0}


# ---------------------------------------------------------------- what is the same


def record(kind, **row):
    return parse(row, kind, "f:1")


USER, GOOD = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}


def test_the_same_prompt_in_every_form():
    same = [
        record("prompt", prompt="ask"),
        record("prompt", prompt=" ask\n"),
        record("prompt", prompt=[USER]),
        record("demonstration", prompt="ask", completion="x"),
        record("preference", prompt=[USER], chosen="x", rejected="y"),
        record("unpaired", prompt="ask", completion="x", label=True),
        record("text", messages=[USER, GOOD]),
        record("text", messages=[USER, GOOD, {**USER, "content": "more"}, GOOD]),
    ]
    assert len({prompt_key(one) for one in same}) == 1
    others = [
        record("prompt", prompt=[{"role": "system", "content": "be brief"}, USER]),
        record("prompt", prompt=[USER, GOOD, USER]),
        record("prompt", prompt="Ask"),
        record("text", text="ask more"),
    ]
    assert len({prompt_key(one) for one in [same[0], *others]}) == 5


def repeats(kind, *rows):
    found = RowKeys.of([parse(row, kind, f"f:{n}") for n, row in enumerate(rows)]).repeats()
    return found.prompts, found.duplicates, found.contradictions


def test_duplicates_and_contradictions_of_pairs():
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    back = {"prompt": "p", "chosen": "b", "rejected": "a"}
    assert repeats("preference", pair, pair, pair) == (1, 2, 0)
    assert repeats("preference", pair, back, back) == (1, 1, 1)
    assert repeats("preference", pair, {**back, "p_chosen": 0.2}) == (1, 0, 0)  # both prefer a
    assert repeats("preference", pair, {**pair, "p_chosen": 0.2}) == (1, 0, 1)
    assert repeats("preference", pair, {**back, "p_chosen": 0.5}) == (1, 0, 0)  # undecided
    assert repeats("preference", pair, {**back, "prompt": "q"}) == (2, 0, 0)
    two_people = [{**pair, "votes": [{"annotator": who, "choice": "chosen"}]} for who in (1, 2)]
    assert repeats("preference", *two_people) == (1, 0, 0)


def test_duplicates_and_contradictions_of_other_rows():
    thumb = {"prompt": "p", "completion": "a", "label": True}
    assert repeats("unpaired", thumb, thumb, {**thumb, "label": False}) == (1, 1, 1)
    assert repeats("unpaired", thumb, {**thumb, "completion": "b", "label": False}) == (1, 0, 0)
    assert repeats("text", {"text": "a"}, {"text": "a"}, {"text": "b"}) == (2, 1, 0)
    answer = {"prompt": "p", "completion": "a"}
    assert repeats("demonstration", answer, answer, {**answer, "completion": "b"}) == (1, 1, 0)
    turns = {"messages": [USER, GOOD]}
    assert repeats("text", turns, {"messages": [USER, {**GOOD, "thinking": "hm"}]}) == (1, 0, 0)


def test_what_two_data_sets_share():
    ours, theirs = RowKeys.of(pairs("a", "b", "b", "c")), RowKeys.of(pairs("b", "d"))
    assert shared(ours.prompts, theirs.prompts) == 2
    assert shared(theirs.prompts, ours.prompts) == 1
    assert shared(ours.prompts, RowKeys().prompts) == 0


@pytest.mark.parametrize("keys", [[], [0], [0, 0], [1, 0, 0, 1], [2**64 - 1, 0, 2**63, 5, 5], [7] * 3 + [2]])
def test_distinct_keys_are_those_of_numpy(keys):
    given = np.array(keys, dtype=np.uint64)
    np.testing.assert_array_equal(distinct(given), np.unique(given))
