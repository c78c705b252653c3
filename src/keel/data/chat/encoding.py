"""Texts into tokens, with special tokens where they are meant and nowhere else.

A prompt and its reply are one string. It is tokenised once, and split where the prompt's own tokens end;
where a token straddles that boundary, the prompt is tokenised as a rollout has it, and the reply as what
follows some other text. A string is never cut into pieces that are tokenised apart: SentencePiece would begin
each with a space that is in no rollout.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from keel.data.chat.batching import known_ids
from keel.data.chat.placeholders import Text
from keel.data.chat.special import special_pattern

_BEFORE = (
    "\n",
    ":",
    ".",
    "}",
    "a",
    ">",
    "0",
)  # texts that a continuation is tokenised behind, tried in order
_newest: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, Text, list[int]]] = WeakKeyDictionary()
_anchored: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, _Anchored]] = WeakKeyDictionary()


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> list[int]:
    """Tokens of a text in which special tokens are special. special: with what the tokenizer adds (BOS)."""
    if (known := known_ids(tokenizer, text, special)) is not None:
        return known
    # verbose: too long a sequence is the caller's to count and report, with the row's name
    return list(cast(Any, tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]))


def encode_content(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> list[int]:
    """As `encode`, with the special tokens in `text` read as the characters they are made of."""
    if special_pattern(tokenizer).search(text) is None:
        return encode(tokenizer, text, special=special)
    tokens = tokenizer(text, add_special_tokens=special, verbose=False, split_special_tokens=True)
    return list(cast(Any, tokens["input_ids"]))


def encode_plain(tokenizer: PreTrainedTokenizerBase, text: str, *, content: bool = False) -> list[int]:
    """Tokens with what the tokenizer adds in front (BOS), without what it adds behind (EOS)."""
    tokens_of = encode_content if content else encode
    ids = tokens_of(tokenizer, text, special=True)
    bare = len(tokens_of(tokenizer, text))
    while len(ids) > bare and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: Text) -> list[int]:
    """As `encode_text`. The newest prompt of a tokenizer is remembered: both sides of a pair follow the
    same."""
    known = _newest.get(tokenizer)
    if known is None or known[:2] != (len(tokenizer), text):
        known = _newest[tokenizer] = (len(tokenizer), text, encode_text(tokenizer, text))
    return list(known[2])


def encode_text(tokenizer: PreTrainedTokenizerBase, text: Text) -> list[int]:
    """Tokens of a text whose inert spans are characters, and whose other special tokens are special.

    With a fast tokenizer the string is tokenised as one, inert spans or not. A slow one knows no offsets: it
    reads the inert spans apart from what is around them.
    """
    if not text.inert:
        return encode(tokenizer, text.string)
    if not tokenizer.is_fast:
        return _in_pieces(tokenizer, text)
    known = _anchored.get(tokenizer)
    if known is None or known[0] != len(tokenizer):
        known = _anchored[tokenizer] = (len(tokenizer), _Anchored(tokenizer))
    return known[1].encode(tokenizer, text)


def continuation(tokenizer: PreTrainedTokenizerBase, text: Text) -> list[int]:
    """Tokens of a text as they follow other text: without the space that some tokenizers put first."""
    for before in _BEFORE:
        ids, first = encode_text(tokenizer, Text(before) + text), encode(tokenizer, before)
        if ids[: len(first)] == first:
            return ids[len(first) :]
    return encode_text(tokenizer, text)


def reply_after(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], prompt: Text, reply: Text
) -> list[int]:
    """Tokens of the reply behind a prompt whose tokens a rollout has: prompt and reply as one string where
    the prompt's tokens are its first, else as a `continuation`."""
    whole = encode_text(tokenizer, prompt + reply)
    if whole[: len(prompt_ids)] == list(prompt_ids):
        return whole[len(prompt_ids) :]
    return continuation(tokenizer, reply)


def plain_reply_after(tokenizer: PreTrainedTokenizerBase, prompt: str, reply: str) -> list[int]:
    """Tokens of a plain text behind a plain prompt, special tokens in both read as characters."""
    first = encode_content(tokenizer, prompt)
    whole = encode_content(tokenizer, prompt + reply)
    if whole[: len(first)] == first:
        return whole[len(first) :]
    for before in _BEFORE:
        first = encode_content(tokenizer, before)
        whole = encode_content(tokenizer, before + reply)
        if whole[: len(first)] == first:
            return whole[len(first) :]
    return encode_content(tokenizer, reply)


class _Anchored:
    """A copy of a fast tokenizer that knows each special token under a secret name as well.

    The copy reads special tokens as characters; where one is meant, its secret name stands in the string. So
    meant ones and written ones go through one tokenisation, in which nothing is cut that would not be.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = cast(Any, tokenizer).backend_tokenizer
        self.inner = Tokenizer.from_str(backend.to_str())
        self.inner.model = backend.model  # see keel.models.shared_vocabulary
        self.inner.no_padding()
        self.inner.no_truncation()
        special = {i: token for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        secret = secrets.token_hex(8)  # a text that holds one would be read as a special token
        self.names = {i: f"\ue000{secret}.{i}\ue001" for i in special}
        self.inner.add_tokens(
            [AddedToken(name, special=False, normalized=False) for name in self.names.values()]
        )
        self.meant = {self.inner.token_to_id(name): i for i, name in self.names.items()}
        self.inner.encode_special_tokens = True

    def encode(self, tokenizer: PreTrainedTokenizerBase, text: Text) -> list[int]:
        string, parts, done = text.string, [], 0
        plain = string
        for start, end in text.inert:  # letters in the place of what is inert: the rest is what is meant
            plain = plain[:start] + "x" * (end - start) + plain[end:]
        tokens = tokenizer(plain, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = cast(Any, tokens["offset_mapping"])
        for token, (start, end) in zip(cast(Any, tokens["input_ids"]), offsets, strict=True):
            if token in self.names and end > start:
                parts += [string[done:start], self.names[token]]
                done = end
        parts.append(string[done:])
        ids = self.inner.encode("".join(parts), add_special_tokens=False).ids
        return [self.meant.get(i, i) for i in ids]


def _in_pieces(tokenizer: PreTrainedTokenizerBase, text: Text) -> list[int]:
    ids: list[int] = []
    done = 0
    for start, end in text.inert:
        ids += encode(tokenizer, text.string[done:start]) if start > done else []
        ids += encode_content(tokenizer, text.string[start:end])
        done = end
    return ids + (encode(tokenizer, text.string[done:]) if done < len(text.string) else [])
