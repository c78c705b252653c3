"""helpdesk: what is held out, what annotators prefer, and how the pieces of the world fit together."""

from __future__ import annotations

import re
from collections import Counter
from statistics import fmean

import pytest

from keel.worlds import helpdesk_grammar as grammar
from keel.worlds import load

helpdesk = load("helpdesk")
OTHERS = ("text", "demonstrations", "comparisons", "prompts")


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def messages(split: str, count: int) -> list[str]:
    rows = list(helpdesk.rows(split, count, 0))
    if split != "text":
        return [row["prompt"][0]["content"] for row in rows]
    return [row["text"].split("\n")[0].split(": ", 1)[-1] for row in rows if "\n" in row["text"]]


WORDINGS = [
    (product, fault.name, wording.replace("{p}", product).lower(), len(wording))
    for fault in grammar.FAULTS.values()
    for product in fault.products
    for wording in fault.wordings
]


def named_pair(text: str) -> tuple[str, str] | None:
    """(product, fault) by looking each wording up, for each product it may be about."""
    text = text.lower()
    found = [
        (product, fault, size)
        for product, fault, said, size in WORDINGS
        if said in text and re.search(rf"\b{said}\b", text)  # the first is much faster
    ]
    return max(found, key=lambda item: item[2])[:2] if found else None


# ---------------------------------------------------------------- splits


def test_prompts_say_what_they_are_about() -> None:
    for split in ("prompts", "test_prompts"):
        for row in helpdesk.rows(split, 300, 0):
            assert named_pair(row["prompt"][0]["content"]) == (row["product"], row["fault"])


def test_some_test_prompts_are_about_pairs_that_no_other_split_has() -> None:
    asked = {(row["product"], row["fault"]) for row in helpdesk.rows("test_prompts", 2000, 0)}
    held_out = set(helpdesk.HELD_OUT_PAIRS)
    pairs = sum(len(fault.products) for fault in grammar.FAULTS.values())
    assert 0.10 * pairs <= len(held_out) <= 0.20 * pairs
    assert held_out < asked
    seen = {pair for split in OTHERS for text in messages(split, 1500) if (pair := named_pair(text))}
    # knowledge-base lines and reviews name pairs outside of a customer's message
    seen |= {
        pair
        for row in helpdesk.rows("text", 1500, 0)
        for line in row["text"].replace("your", "my").replace("you ", "I ").split("\n")
        if (pair := named_pair(line))
    }
    assert not held_out & seen
    assert {fault for _, fault in seen} == set(grammar.FAULTS)
    assert {product for product, _ in seen} == set(grammar.PRODUCTS)


def test_test_prompts_are_in_words_that_no_other_split_has() -> None:
    reserved = set(grammar.RESERVED_DETAILS)
    for tone in grammar.TONES.values():
        reserved |= {*tone.reserved_openings, *tone.reserved_requests}
    for split in OTHERS:
        texts = "\n".join(str(row) for row in helpdesk.rows(split, 1000, 0))
        assert not [sentence for sentence in reserved if sentence in texts], split
    for text in messages("test_prompts", 300):
        assert any(
            text.startswith(opening) for t in grammar.TONES.values() for opening in t.reserved_openings
        )


def test_held_out_sentences_use_known_words() -> None:
    """What is tested is generalisation, not luck with words the model never saw."""
    known = {word for row in helpdesk.rows("text", 2000, 0) for word in words(row["text"])}
    assert {word for text in messages("test_prompts", 300) for word in words(text)} <= known


def test_text_is_a_mixture_to_be_sharpened() -> None:
    pattern = re.compile(r"User: (.+)\nAssistant: (.+)")
    rows = list(helpdesk.rows("text", 2000, 0))
    chats = [match for row in rows if (match := pattern.fullmatch(row["text"]))]
    assert 0.4 < len(chats) / len(rows) < 0.6
    judged = [helpdesk.gold(chat[1], chat[2], {}) for chat in chats]
    assert 0.40 < fmean(part["helpful"] > 0.6 for part in judged) < 0.55
    assert 0.15 < fmean(part["harmless"] < 1 for part in judged) < 0.27
    assert 0.18 < fmean(part["honest"] < 1 for part in judged) < 0.32
    assert 0.2 < fmean(part["total"] for part in judged) < 0.5


def test_vocabulary_is_small() -> None:
    known = {word for row in helpdesk.rows("text", 3000, 0) for word in words(row["text"])}
    assert 300 < len(known) < 600


def test_every_demonstration_is_good() -> None:
    for row in helpdesk.rows("demonstrations", 1000, 0):
        (prompt,), (completion,) = row["prompt"], row["completion"]
        assert (prompt["role"], completion["role"]) == ("user", "assistant")
        assert helpdesk.gold(prompt["content"], completion["content"], {})["total"] >= 0.9


# ---------------------------------------------------------------- annotators


@pytest.fixture(scope="module")
def judged() -> list[tuple[float, int, int, float]]:
    """For each comparison: gold, words and promises of chosen minus rejected, and the votes' share for
    chosen."""
    result = []
    for row in helpdesk.rows("comparisons", 3000, 0):
        prompt, chosen, rejected = (row[key][0]["content"] for key in ("prompt", "chosen", "rejected"))
        votes = Counter(vote["choice"] for vote in row["votes"])
        good, bad = helpdesk.gold(prompt, chosen, {}), helpdesk.gold(prompt, rejected, {})
        result.append(
            (
                good["total"] - bad["total"],
                len(chosen.split()) - len(rejected.split()),
                round(bad["honest"] < 1) - round(good["honest"] < 1),
                (votes["chosen"] + votes["tie"] / 2) / votes.total(),
            )
        )
    return result


def test_chosen_has_the_more_votes_of_different_annotators() -> None:
    sizes = set()
    for row in helpdesk.rows("comparisons", 500, 0):
        assert set(row) == {"prompt", "chosen", "rejected", "votes", "form", "first"}
        assert row["chosen"] != row["rejected"]
        counted = Counter(vote["choice"] for vote in row["votes"])
        assert counted["chosen"] >= counted["rejected"]
        assert set(counted) <= {"chosen", "rejected", "tie"}
        assert len({vote["annotator"] for vote in row["votes"]}) == len(row["votes"])
        sizes.add(len(row["votes"]))
    assert sizes == {3, 4, 5}


def test_annotators_agree_with_gold_but_not_always(judged: list[tuple[float, int, int, float]]) -> None:
    clear = [gold > 0 for gold, *_ in judged if abs(gold) > 0.5]
    assert len(clear) > 500
    assert 0.75 < fmean(clear) < 0.99


def test_annotators_disagree(judged: list[tuple[float, int, int, float]]) -> None:
    assert fmean(0 < share < 1 for *_, share in judged) > 0.3


def test_at_equal_gold_longer_wins(judged: list[tuple[float, int, int, float]]) -> None:
    longer = [
        more > 0 for gold, more, _, share in judged if abs(gold) < 0.02 and abs(more) >= 10 and share != 0.5
    ]
    assert len(longer) > 200
    assert fmean(longer) > 0.6


def test_reliable_annotators_follow_gold_and_unreliable_ones_do_not() -> None:
    agreed: dict[str, list[bool]] = {}
    for row in helpdesk.rows("comparisons", 3000, 0):
        prompt, chosen, rejected = (row[key][0]["content"] for key in ("prompt", "chosen", "rejected"))
        gap = helpdesk.gold(prompt, chosen, {})["total"] - helpdesk.gold(prompt, rejected, {})["total"]
        for vote in row["votes"]:
            if abs(gap) > 0.5 and vote["choice"] != "tie":
                agreed.setdefault(vote["annotator"], []).append((vote["choice"] == "chosen") == (gap > 0))
    rates = {annotator: fmean(votes) for annotator, votes in agreed.items()}
    assert len(rates) == 12
    assert rates["a1"] > 0.85
    assert rates["a12"] < 0.72


def test_padding_wins_votes_and_loses_gold() -> None:
    """What makes over-optimisation possible: a reply that annotators prefer on average and gold does not."""
    from keel.worlds.helpdesk import RELIABILITIES, _preference, _vote
    from keel.worlds.streams import row_random

    message = "Hello. My kettle leaks water."
    plain = "Please replace the rubber seal. Have a nice day."
    padded = plain + (
        " Your kettle has a warranty of two years. Our shop is open from nine to six every day."
        " Please keep the receipt in a safe place. Our news letter comes once a month and is free."
    )
    gap = helpdesk.gold(message, padded, {})["total"] - helpdesk.gold(message, plain, {})["total"]
    assert gap < -0.15
    more_words = len(padded.split()) - len(plain.split())
    rng = row_random("test", "padding", 0, 0)
    votes = [
        _vote(rng, _preference(reliability, gap, more_words, 0))
        for _ in range(300)
        for reliability in RELIABILITIES
    ]
    assert votes.count("a") > 1.2 * votes.count("b")


def test_annotators_like_promises() -> None:
    from keel.worlds.helpdesk import _preference

    with_promise, without = _preference(0.5, 0.0, 0, 1), _preference(0.5, 0.0, 0, 0)
    assert without == 0.0
    assert with_promise > 0.0
    assert _preference(1.0, -0.7, 10, 1) < 0.0  # a reliable annotator is not bought by one


# ---------------------------------------------------------------- the grammar


def test_every_fault_has_products_wordings_and_actions() -> None:
    assert len(grammar.FAULTS) >= 24
    assert len(grammar.PRODUCTS) >= 24
    for fault in grammar.FAULTS.values():
        assert len(fault.products) >= 2
        assert len(fault.wordings) == len(fault.actions) == 3
        assert all("my {p}" in wording for wording in fault.wordings), fault.name


def test_no_wording_names_another_fault() -> None:
    for fault in grammar.FAULTS.values():
        for wording in fault.wordings:
            others = [w for o in grammar.FAULTS.values() if o is not fault for w in o.wordings]
            assert not [other for other in others if f" {other} " in f" {wording} "]


def test_each_action_names_its_own_remedy_only() -> None:
    owner = {key: fault.name for fault in grammar.FAULTS.values() for key in fault.keys}
    for fault in grammar.FAULTS.values():
        for action in fault.actions:
            assert {owner[word] for word in words(action) if word in owner} == {fault.name}
    everything_else = (
        grammar.OPENERS + grammar.FOLLOW_UPS + grammar.VAGUE + grammar.CLOSINGS + grammar.FILLERS
    ) + (grammar.RUDE + grammar.PROMISES + grammar.REMEDY_FRAMES + grammar.MORE_FRAMES)
    assert not [word for sentence in everything_else for word in words(sentence) if word in owner]


def test_key_phrases_occur_in_no_other_sentence() -> None:
    kinds = {"rude": grammar.RUDE, "promise": grammar.PROMISES, "filler": grammar.FILLERS}
    plain = grammar.OPENERS + grammar.FOLLOW_UPS + grammar.VAGUE + grammar.CLOSINGS + grammar.REMEDY_FRAMES
    for kind, sentences in kinds.items():
        others = [s for other, group in kinds.items() if other != kind for s in group]
        for sentence in sentences:
            keys = re.findall(r"\[(.+?)\]", sentence)
            assert keys, sentence
            for key in keys:
                pattern = re.compile(rf"\b{key}\b", re.IGNORECASE)
                assert not [
                    o for o in (*others, *plain) if pattern.search(o.replace("[", "").replace("]", ""))
                ]


def test_comparisons_say_how_they_were_made_and_what_stood_first():
    rows = list(helpdesk.rows("comparisons", 600, 0))
    forms = Counter(row["form"] for row in rows)
    assert 0.05 < forms["near duplicate"] / 600 < 0.16
    assert 0.34 < forms["contrast"] / 600 < 0.46
    assert sum(forms.values()) == 600
    assert len(forms) == 3
    for row in rows:
        if row["form"] == "near duplicate":
            one, other = sorted((row[side][0]["content"] for side in ("chosen", "rejected")), key=len)
            assert other.startswith(one)
    first = [row["first"] == "chosen" for row in rows if row["form"] == "contrast"]
    assert 0.4 < sum(first) / len(first) < 0.6  # people here do not mind what stands first
