"""Stop strings in long responses: found at the same token as in the whole text, from the end of it alone."""

from __future__ import annotations

import random

import pytest

from keel.data import stops
from keel.data.stops import stop_texts
from tests.data.tokenizers_for_tests import make_tokenizer

STOPS = ["ab", "a b", "\n\na", "b]", " n", "é"]


@pytest.mark.parametrize("kind", ["bytes", "merged_bytes", "legacy_spaces", "metaspace", "words"])
def test_the_end_of_a_response_tells_what_all_of_it_tells(kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    texts = stop_texts(tokenizer, STOPS)
    assert texts is not None
    draw, ended = random.Random(kind), 0
    seeds = [
        i for text in ("ab] n\n", "a b", "é") for i in tokenizer(text, add_special_tokens=False)["input_ids"]
    ]
    for _ in range(6):
        ids: list[int] = []
        while len(ids) < 90:
            common = draw.random() < 0.3
            ids.append(draw.choice(seeds) if common else draw.randrange(len(tokenizer)))
            whole = texts.within(ids)
            assert texts.closed_by(ids) == whole, ids
            if whole:
                ended += 1
                ids.pop()  # and on with a response that has not ended
    assert ended > 2


def test_what_is_read_for_a_token_does_not_grow_with_the_response(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = stop_texts(make_tokenizer("bytes"), ["#!"])
    assert texts is not None
    read: list[int] = []
    plainly = stops.reply_text
    monkeypatch.setattr(
        stops, "reply_text", lambda tokenizer, ids: read.append(len(ids)) or plainly(tokenizer, ids)
    )
    ids = make_tokenizer("bytes")("some text! " * 200, add_special_tokens=False)["input_ids"]
    assert texts.closed_by(ids[:200]) == ""
    short = sum(read)
    read.clear()
    assert texts.closed_by(ids) == ""
    assert sum(read) <= short < 100
