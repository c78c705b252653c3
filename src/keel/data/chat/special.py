"""Special tokens: which ids end a turn, which id pads, which strings are special."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import cast
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from keel.errors import UsageError

_ENDS = "keel_end_ids"  # attribute of a tokenizer: ids that its model's files name as EOS, besides its own
_ids: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, frozenset[int]]] = WeakKeyDictionary()
_patterns: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[object, re.Pattern[str]]] = WeakKeyDictionary()


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of EOS. UsageError if the tokenizer has none: no response could ever end."""
    if tokenizer.eos_token_id is None:
        raise UsageError(
            "the tokenizer has no EOS token, so responses could not end; set `eos_token` in its files"
        )
    return cast(int, tokenizer.eos_token_id)


def declare_ends(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> None:
    """Note on the tokenizer which ids the model's own files name as EOS (config, generation_config).

    They travel with it, through copies and pickles too: whoever has the tokenizer knows what ends a turn.
    """
    setattr(tokenizer, _ENDS, tuple(dict.fromkeys(ids)))


def eos_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokenizer's EOS first, then those that the model's files name. UsageError if it has no EOS."""
    return tuple(dict.fromkeys([eos_id(tokenizer), *getattr(tokenizer, _ENDS, ())]))


def ensure_pad(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with. A tokenizer without one gets EOS as its pad token.

    That is harmless here: padding is on the right and every mask comes from lengths, never from comparing ids
    with the pad token, so a real EOS still counts. `padding_side` is left alone [trl 6663].
    """
    pad: int | None = tokenizer.pad_token_id  # pyright: ignore[reportAssignmentType]
    if pad is None:
        pad = eos_id(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    return pad


def first_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What an empty prompt consists of: BOS, or EOS where there is none."""
    bos = tokenizer.bos_token_id
    return eos_id(tokenizer) if bos is None else cast(int, bos)


def without_final_eos(tokenizer: PreTrainedTokenizerBase, text: str, ends: Sequence[str] = ()) -> str:
    """The text without EOS strings at its end (data sets often bring one), so that EOS can be added once.

    ends: other strings that are taken off in the same way.
    """
    known = [string for string in (token_string(tokenizer.eos_token), *ends) if string]
    while last := next((string for string in known if text.rstrip().endswith(string)), None):
        text = text.rstrip().removesuffix(last)
    return text


def added_vocab(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The tokens that were added to the vocabulary, special or not, by their text."""
    return {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}


def special_strings(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Every string that the tokenizer reads as one special token."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return frozenset(filter(None, (*added, *map(str, tokenizer.all_special_tokens))))


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids of every special token. Found once a tokenizer and vocabulary."""
    known = _ids.get(tokenizer)
    if known is None or known[0] != len(tokenizer):
        added = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        known = _ids[tokenizer] = (len(tokenizer), frozenset([*added, *tokenizer.all_special_ids]))
    return known[1]


def special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """What matches each of `special_strings`, the longest first. Made once a tokenizer and vocabulary."""
    state = (len(tokenizer), tuple(map(str, tokenizer.all_special_tokens)))
    known = _patterns.get(tokenizer)
    if known is None or known[0] != state:
        known = _patterns[tokenizer] = (state, pattern_of(special_strings(tokenizer)))
    return known[1]


def pattern_of(strings: Iterable[str]) -> re.Pattern[str]:
    """What matches any of the strings, the longest first; for none, what matches nowhere."""
    longest_first = sorted(set(strings), key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def named_specials(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The special tokens with a role of their own (BOS, EOS, pad, unknown …): never a tag in a reply."""
    names = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
    ends = (string_of(tokenizer, i) for i in getattr(tokenizer, _ENDS, ()))
    values = (*(getattr(tokenizer, name, None) for name in names), *ends)
    return frozenset(token_string(value) for value in values) - {""}


def string_of(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """The text of one id, as the vocabulary has it; "" for an id that stands for nothing."""
    return token_string(tokenizer.convert_ids_to_tokens(token))


def id_of(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of one token of the vocabulary."""
    return cast(int, tokenizer.convert_tokens_to_ids(token))


def token_string(value: object) -> str:
    """A token as text; "" for none."""
    return value if isinstance(value, str) else ""
