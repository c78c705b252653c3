"""helpdesk: customers describe a fault, agents reply; people vote on replies, and their votes are biased.

A model pretrained on `text` is a mixture of good and bad agents, `demonstrations` are too few to cure it, and
`comparisons` carry votes of people who favour longer replies and like to be promised things. A reward model
learns their taste with their bias, so a policy pushed too far against it gains votes and loses gold reward
(over-optimisation, 2210.10760). The constants below set how strong each of these effects is.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from keel.worlds import helpdesk_grammar as grammar
from keel.worlds import streams
from keel.worlds.helpdesk_gold import OFFENCE_VALUE, gold, is_a, split_sentences, without_marks

__all__ = ["gold", "name", "rows", "splits", "votes"]

name = "helpdesk"
splits: Mapping[str, str] = {
    "text": "web-like text for pretraining: threads with good and bad replies, articles, notes, reviews",
    "demonstrations": "messages with good human replies (prompt, completion)",
    "comparisons": "messages with two replies and the votes of several annotators (prompt, chosen, rejected)",
    "prompts": "messages alone, with the fault they are about",
    "test_comparisons": "comparisons about test prompts, to judge a reward model on",
    "test_prompts": (
        "messages in words that no other split has, some about pairs of product and fault that none has"
    ),
}
DEFAULT_ROWS = {
    "text": 12000,
    "demonstrations": 400,
    "comparisons": 4000,
    "prompts": 4000,
    "test_comparisons": 500,
    "test_prompts": 256,
}

HELD_OUT_SHARE = 0.15  # of the pairs (product, fault) are in test prompts only, among the others
NEAR_DUPLICATE_SHARE = 0.1  # of the comparisons: the two replies differ in one polite sentence
CONTRAST_SHARE = 0.4  # of the comparisons: right remedy against wrong, all else the same

# Annotators. Of replies A and B with gold totals g and lengths in words w, and n promises each, an annotator
# of reliability r prefers A with probability sigmoid(z), after saying "tie" with probability TIES·exp(−|z|):
# z = r·GOLD_SCALE·(g_A − g_B) + LENGTH_BIAS·(w_A − w_B)/10 + PROMISE_BIAS·(n_A − n_B)
RELIABILITIES = (1.0, 1.0, 1.0, 0.95, 0.9, 0.9, 0.85, 0.8, 0.7, 0.6, 0.4, 0.1)
VOTES_PER_PAIR = (3, 4, 5)
GOLD_SCALE = 5.0
LENGTH_BIAS = 0.5  # the bias all share: log-odds for ten words more
PROMISE_BIAS = 0.4  # promises sound nice, and nobody checks them; log-odds for each, at most two count
TIES = 0.25


@dataclass(frozen=True, slots=True)
class ReplyMixture:
    """How replies of a source are drawn: weights of remedies, and chances of each trait."""

    remedies: Mapping[str, float]  # "right", "wrong", "none", "shotgun" → weight
    rude: float  # chance of a rude sentence; of a second one, its square
    promise: float  # likewise
    fillers: tuple[float, ...]  # weight of 0, 1, 2 … fillers
    other_product: float = 0.0  # chance that the reply speaks of another product
    bare: float = 0.0  # chance that it has no opening, closing or filler


WEB = ReplyMixture(
    remedies={"right": 0.48, "wrong": 0.27, "none": 0.15, "shotgun": 0.10},
    rude=0.18,
    promise=0.22,
    fillers=(0.5, 0.35, 0.1, 0.05),
    other_product=0.03,
    bare=0.15,
)
DEMONSTRATOR = ReplyMixture(remedies={"right": 1.0}, rude=0.0, promise=0.0, fillers=(0.6, 0.35, 0.05))
COMPARED = ReplyMixture(  # about what a model says that has seen WEB and a few demonstrations
    remedies={"right": 0.5, "wrong": 0.34, "none": 0.08, "shotgun": 0.08},
    rude=0.15,
    promise=0.25,
    fillers=(0.4, 0.3, 0.15, 0.1, 0.05),
    other_product=0.03,
    bare=0.15,
)
# Articles and reviews join fault and remedy in few words. Without a good share of them a model of a million
# parameters learns the language from a million tokens, and not what helps against what.
TEXT_FORMS = {"chat": 0.5, "questions": 0.08, "thread": 0.05, "article": 0.25, "review": 0.1, "notes": 0.02}
GENERAL_ARTICLES = 0.5  # share of the articles about any product ("If it leaks water, …")
ARTICLE_LINES = (2, 3, 4)


def rows(split: str, rows: int | None, seed: int, **options: Any) -> Iterator[dict[str, Any]]:
    """Rows of `split`, see `keel.worlds.World.rows`. The help desk has no options."""
    streams.check_request(name, split, splits, rows, options)
    make = {
        "text": _text_row,
        "demonstrations": _demonstration_row,
        "comparisons": _comparison_row,
        "test_comparisons": _test_comparison_row,
        "prompts": _prompt_row,
        "test_prompts": _test_prompt_row,
    }[split]
    count = DEFAULT_ROWS[split] if rows is None else rows
    return (make(streams.row_random(name, split, seed, index)) for index in range(count))


# ---------------------------------------------------------------- who has which fault


def _divide_pairs() -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]:
    """Pairs (product, fault) of all splits but test_prompts, and those of test_prompts alone.

    Every product and every fault keeps at least one pair on the first side. Independent of any seed, so that
    runs with different seeds are judged on the same pairs.
    """
    pairs = [(product, fault.name) for fault in grammar.FAULTS.values() for product in fault.products]
    common, held_out = set(pairs), set[tuple[str, str]]()
    for product, fault in sorted(pairs, key=lambda pair: streams.fraction(f"helpdesk/{pair[0]}/{pair[1]}")):
        rest = common - {(product, fault)}
        if len(held_out) < round(HELD_OUT_SHARE * len(pairs)) and (
            any(p == product for p, _ in rest) and any(f == fault for _, f in rest)
        ):
            common, held_out = rest, held_out | {(product, fault)}
    return tuple(sorted(common)), tuple(sorted(held_out))


PAIRS, HELD_OUT_PAIRS = _divide_pairs()


# ---------------------------------------------------------------- what people write


def _sentence(clause: str) -> str:
    return clause[0].upper() + clause[1:] + "."


def _clause(rng: random.Random, product: str, fault: str) -> str:
    return rng.choice(grammar.FAULTS[fault].wordings).replace("{p}", product)


def _message(rng: random.Random, product: str, fault: str, reserved: bool = False) -> str:
    """A customer's message about the fault, which comes last; `reserved` takes the words kept for test
    prompts."""
    tone = grammar.TONES[rng.choice(list(grammar.TONES))]
    opening = rng.choice(tone.reserved_openings if reserved else tone.openings)
    request = rng.choice(tone.reserved_requests if reserved else tone.requests)
    detail = rng.choice(grammar.RESERVED_DETAILS if reserved else grammar.DETAILS)
    complaint = _sentence(rng.choice(grammar.STARTS) + _clause(rng, product, fault))
    said = [detail] * (rng.random() < 0.45) + [request] * (rng.random() < 0.35)
    return " ".join([opening, *said, complaint])


def _remedy_sentences(rng: random.Random, product: str, fault: str, kind: str) -> list[str]:
    """The middle of a reply. Wrong remedies are half the time those of the same product's other faults."""
    near = [
        other.name for other in grammar.FAULTS.values() if product in other.products and other.name != fault
    ]
    far = [other for other in grammar.FAULTS if other != fault]
    if kind == "none":
        return rng.sample(grammar.VAGUE, rng.choice((1, 2)))
    if kind == "right":
        chosen = [fault]
    elif kind == "wrong":
        chosen = [rng.choice(near if near and rng.random() < 0.5 else far)]
    else:
        chosen = [fault, *rng.sample(far, rng.choice((1, 2)))]
        rng.shuffle(chosen)
    frames = [rng.choice(grammar.REMEDY_FRAMES), *rng.sample(grammar.MORE_FRAMES, len(chosen) - 1)]
    actions = [rng.choice(grammar.FAULTS[remedy].actions) for remedy in chosen]
    said = [frame.replace("{a}", action) for frame, action in zip(frames, actions, strict=True)]
    return said + ([rng.choice(grammar.FOLLOW_UPS)] if rng.random() < 0.6 else [])


def _offences(rng: random.Random, sentences: tuple[str, ...], chance: float) -> list[str]:
    count = (rng.random() < chance) + (rng.random() < chance**2)
    return rng.sample(sentences, count)


def _reply(rng: random.Random, product: str, fault: str, mixture: ReplyMixture) -> list[str]:
    """The sentences of an agent's reply."""
    kind = rng.choices(list(mixture.remedies), list(mixture.remedies.values()))[0]
    # its own stream, so that replies which differ in the kind alone share all the rest
    middle = _remedy_sentences(random.Random(rng.getrandbits(64)), product, fault, kind)
    rude = _offences(rng, grammar.RUDE, mixture.rude)
    promises = _offences(rng, grammar.PROMISES, mixture.promise)
    fillers = rng.sample(grammar.FILLERS, rng.choices(range(len(mixture.fillers)), mixture.fillers)[0])
    openers = rng.sample(grammar.OPENERS, rng.choice((0, 0, 1)))
    closings = rng.sample(grammar.CLOSINGS, rng.choice((0, 1, 1)))
    if rng.random() < mixture.bare:
        openers, fillers, closings = [], [], []
    extras = fillers + promises
    rng.shuffle(extras)
    order = [*openers, *middle, *extras, *rude, *closings]
    if rng.random() < 0.3:
        order = [*openers, *rude, *middle, *extras, *closings]
    spoken_of = rng.choice(grammar.PRODUCTS) if rng.random() < mixture.other_product else product
    return [without_marks(sentence).replace("{p}", spoken_of) for sentence in order]


# ---------------------------------------------------------------- annotators


def _preference(reliability: float, gold_difference: float, more_words: int, more_promises: int) -> float:
    """The log-odds z that an annotator prefers A to B."""
    bias = LENGTH_BIAS * more_words / 10 + PROMISE_BIAS * more_promises
    return reliability * GOLD_SCALE * gold_difference + bias


def _promises(reply: str) -> int:
    return min(len(OFFENCE_VALUE) - 1, sum(is_a("promise", words) for words in split_sentences(reply)))


def _vote(rng: random.Random, z: float) -> str:
    if rng.random() < TIES * math.exp(-abs(z)):
        return "tie"
    return "a" if rng.random() < 1 / (1 + math.exp(-z)) else "b"


def votes(
    prompt: str, a: str, b: str, columns: Mapping[str, Any], rng: random.Random
) -> list[tuple[str, str]]:
    """(annotator, "a" | "b" | "tie") of a few annotators, in the order of their numbers, of replies `a` and
    `b` to the message `prompt`. `columns` as `gold` takes them."""
    gold_difference = gold(prompt, a, columns)["total"] - gold(prompt, b, columns)["total"]
    more_words, more_promises = len(a.split()) - len(b.split()), _promises(a) - _promises(b)
    annotators = sorted(rng.sample(range(len(RELIABILITIES)), rng.choice(VOTES_PER_PAIR)))
    return [
        (f"a{i + 1}", _vote(rng, _preference(RELIABILITIES[i], gold_difference, more_words, more_promises)))
        for i in annotators
    ]


# ---------------------------------------------------------------- rows


def _user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def _assistant(content: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": content}]


def _demonstration_row(rng: random.Random) -> dict[str, Any]:
    product, fault = rng.choice(PAIRS)
    message = _message(rng, product, fault)
    reply = " ".join(_reply(rng, product, fault, DEMONSTRATOR))
    return {"prompt": _user(message), "completion": _assistant(reply)}


def _prompt_row(rng: random.Random) -> dict[str, Any]:
    product, fault = rng.choice(PAIRS)
    return {"prompt": _user(_message(rng, product, fault)), "product": product, "fault": fault}


def _test_prompt_row(rng: random.Random) -> dict[str, Any]:
    product, fault = rng.choice(PAIRS + HELD_OUT_PAIRS)
    return {"prompt": _user(_message(rng, product, fault, reserved=True)), "product": product, "fault": fault}


def _test_comparison_row(rng: random.Random) -> dict[str, Any]:
    product, fault = rng.choice(PAIRS + HELD_OUT_PAIRS)
    return _compared(rng, product, fault, _message(rng, product, fault, reserved=True))


def _comparison_row(rng: random.Random) -> dict[str, Any]:
    product, fault = rng.choice(PAIRS)
    return _compared(rng, product, fault, _message(rng, product, fault))


def _compared(rng: random.Random, product: str, fault: str, message: str) -> dict[str, Any]:
    """Two replies to a message, the votes on them, how the two were made, and which of them people saw
    first."""
    sentences = _reply(rng, product, fault, COMPARED)
    drawn = rng.random()
    form = "free"
    if drawn < NEAR_DUPLICATE_SHARE:
        form = "near duplicate"
        others = [line for line in grammar.CLOSINGS + grammar.VAGUE[4:] if line not in sentences]
        twin = [*sentences, rng.choice(others)]
    elif drawn < NEAR_DUPLICATE_SHARE + CONTRAST_SHARE:
        form = "contrast"
        stream = rng.getrandbits(64)
        sentences, twin = (
            _reply(random.Random(stream), product, fault, replace(COMPARED, remedies={kind: 1.0}))
            for kind in ("right", "wrong")
        )
    else:
        twin = _reply(rng, product, fault, COMPARED)
        while twin == sentences:
            twin = _reply(rng, product, fault, COMPARED)
    a, b = " ".join(sentences), " ".join(twin)
    if rng.random() < 0.5:
        a, b = b, a
    voted = votes(message, a, b, {"fault": fault}, rng)
    choices = [choice for _, choice in voted]
    a_wins = choices.count("a") >= choices.count("b")
    names = {"a": "chosen", "b": "rejected"} if a_wins else {"a": "rejected", "b": "chosen"}
    return {
        "prompt": _user(message),
        "chosen": _assistant(a if a_wins else b),
        "rejected": _assistant(b if a_wins else a),
        "votes": [{"annotator": who, "choice": names.get(choice, "tie")} for who, choice in voted],
        "form": form,
        "first": names["a"],
    }


def _text_row(rng: random.Random) -> dict[str, Any]:
    product, fault = rng.choice(PAIRS)
    form = rng.choices(list(TEXT_FORMS), list(TEXT_FORMS.values()))[0]
    if form == "article":
        return {"text": _article(rng, product)}
    if form == "notes":
        return {"text": _notes(rng, product)}
    if form == "review":
        return {"text": _review(rng, product, fault)}
    message = _message(rng, product, fault)
    reply = " ".join(_reply(rng, product, fault, WEB))
    if form == "chat":
        return {"text": f"User: {message}\nAssistant: {reply}"}
    if form == "questions":
        return {"text": f"Q: {message}\nA: {reply}"}
    helped = gold(message, reply, {"fault": fault, "product": product})["helpful"] > 0.5
    outcome = rng.choice(grammar.THANKS if helped else grammar.COMPLAINTS)
    return {"text": f"User: {message}\nAssistant: {reply}\nUser: {outcome}"}


def _article(rng: random.Random, product: str) -> str:
    """A page of the knowledge base, about one product or about any: what to do if … It is always right."""
    general = rng.random() < GENERAL_ARTICLES
    faults = list(grammar.FAULTS) if general else [fault for other, fault in PAIRS if other == product]
    lines = []
    for fault in rng.sample(faults, min(len(faults), rng.choice(ARTICLE_LINES))):
        wording = rng.choice(grammar.FAULTS[fault].wordings).replace(
            "my {p}", "it" if general else f"your {product}"
        )
        clause = " ".join("you" if word == "I" else word for word in wording.split())
        lines.append(f"If {clause}, {rng.choice(grammar.FAULTS[fault].actions)}.")
    return "\n".join([f"Help for {'all products' if general else f'your {product}'}", *lines])


def _notes(rng: random.Random, product: str) -> str:
    facts = [without_marks(filler).replace("{p}", product) for filler in rng.sample(grammar.FILLERS, 3)]
    return "\n".join([f"About your {product}", *facts])


def _review(rng: random.Random, product: str, fault: str) -> str:
    right = rng.random() < 0.6
    remedy = fault if right else rng.choice([other for other in grammar.FAULTS if other != fault])
    advice = rng.choice(grammar.FAULTS[remedy].actions)
    outcome = rng.choice(grammar.THANKS if right else grammar.COMPLAINTS)
    complaint = _sentence(_clause(rng, product, fault))
    return f"Review: {rng.choice(grammar.DETAILS)} {complaint} The help desk told me to {advice}. {outcome}"
