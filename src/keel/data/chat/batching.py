"""Many plain texts tokenised at once, for the functions of this package that ask for them one by one.

Within `batched`, what those functions are about to ask for is tokenised in one call and remembered, so they
find it instead of calling the tokenizer. What they return is the same: a text that was not foreseen is
tokenised as ever.

Both sides of a pair begin with the same prompt. Where it is certain that a text can be cut without changing a
token, the part that they share is tokenised once. That holds at a space between two letters
- for byte-level BPE behind the regular expressions of `_SPLITS`: none of them lets a piece run over a
  letter's end into a space, and BPE knows nothing outside of its piece;
- for BPE that writes ▁ for spaces and one more at the start (Llama 2), where no token of the vocabulary has a
  ▁ behind another character: no merge crosses the cut, and the ▁ at the start stands for the space.
Left out: tokenizers with any other normaliser or splitting, and texts in which an added token stands.
"""

from __future__ import annotations

import json
import re
import string
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from keel.data.chat.special import added_vocab, pattern_of, special_pattern, without_final_eos
from keel.types import DemonstrationRecord, PreferenceRecord, Record, TextRecord, UnpairedRecord

_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_SPLITS = (_CL100K % r"\p{N}{1,3}", _CL100K % r"\p{N}")  # Llama 3's and Qwen's; GPT-2's is ByteLevel's own
_SPACES = {  # Llama 2's normaliser
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}
_CUT = re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])")
_NEAR = 400  # characters of a prompt's end in which a place to cut is looked for
_PROBES = ("one", "2 x")

_known: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[str, bool], list[int]]] = WeakKeyDictionary()
_ways: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, _Way]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class _Way:
    """What may be made use of in tokenising many texts with one tokenizer."""

    around: (
        tuple[list[int], list[int]] | None
    )  # what it adds before and behind every text; None: not constant
    cuts: bool  # whether texts can be cut at `_CUT`
    starts_with_space: bool  # whether it reads a text as if a space stood before it
    composes: bool  # whether texts are brought into NFC first
    added: re.Pattern[str]  # every added token, special or not


def known_ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int] | None:
    """The tokens of a text that `batched` has foreseen; None for another."""
    memo = _known.get(tokenizer)
    ids = None if memo is None else memo.get((text, special))
    return None if ids is None else list(ids)


@contextmanager
def batched(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Record]) -> Iterator[None]:
    """While it lasts, the plain texts of these rows are found tokenised. Conversations are not foreseen."""
    if not tokenizer.is_fast or len(rows) < 2:
        yield
        return
    _known[tokenizer] = _foreseen(tokenizer, rows)
    try:
        yield
    finally:
        del _known[tokenizer]


def _foreseen(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Record]
) -> dict[tuple[str, bool], list[int]]:
    way = _way_of(tokenizer)
    content = special_pattern(tokenizer)  # in prompts and replies special tokens are characters: not foreseen
    whole: dict[str, list[int]] = {}  # text → its tokens
    joined: dict[str, tuple[str, str]] = {}  # text → two parts whose tokens are its tokens
    framed: set[str] = set()  # texts that are asked for with what the tokenizer adds, too

    def foresee(text: str, at: int) -> None:
        if at > 0 and way.cuts:
            joined[text] = parts = (text[:at], text[at + way.starts_with_space :])
            whole[parts[0]] = whole[parts[1]] = []
        else:
            whole[text] = []

    for row in rows:
        if isinstance(row, TextRecord):
            if isinstance(row.text, str):
                text = without_final_eos(tokenizer, row.text)
                framed.add(text)
                whole[text] = []
            continue
        if not isinstance(row.prompt, str) or content.search(row.prompt):
            continue
        at = _cut_of(way, row.prompt)
        framed.add(row.prompt)
        foresee(row.prompt, at)
        for side in _sides(row):
            if isinstance(side, str) and not content.search(
                text := row.prompt + without_final_eos(tokenizer, side)
            ):
                foresee(text, at if _plain(way, text) else 0)
    texts = list(whole)
    for text, ids in zip(texts, _ids(tokenizer, texts, special=False), strict=True):
        whole[text] = ids
    for text, (first, second) in joined.items():
        whole[text] = whole[first] + whole[second]
    memo = {(text, False): ids for text, ids in whole.items()}
    if way.around is not None:
        before, behind = way.around
        return memo | {(text, True): [*before, *whole[text], *behind] for text in framed}
    asked = list(framed)
    return memo | {(t, True): ids for t, ids in zip(asked, _ids(tokenizer, asked, special=True), strict=True)}


def _sides(row: Record) -> tuple[Any, ...]:
    match row:
        case PreferenceRecord():
            return (row.chosen, row.rejected)
        case DemonstrationRecord() | UnpairedRecord():
            return (row.completion,)
    return ()


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool) -> list[list[int]]:
    if not texts:
        return []
    tokens = tokenizer(
        list(texts),
        add_special_tokens=special,
        verbose=False,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    return cast(Any, tokens["input_ids"])


def _cut_of(way: _Way, prompt: str) -> int:
    """Where a prompt can be cut, near its end; 0 where it cannot."""
    if not way.cuts or not _plain(way, prompt):
        return 0
    start = max(0, len(prompt) - _NEAR)
    return max((match.start() for match in _CUT.finditer(prompt, start)), default=0)


def _plain(way: _Way, text: str) -> bool:
    """Whether a text reaches the splitting as it is."""
    if way.added.search(text):
        return False
    return not way.composes or unicodedata.is_normalized("NFC", text)


def _way_of(tokenizer: PreTrainedTokenizerBase) -> _Way:
    known = _ways.get(tokenizer)
    if known is None or known[0] != len(tokenizer):
        known = _ways[tokenizer] = (len(tokenizer), _found(tokenizer))
    return known[1]


def _found(tokenizer: PreTrainedTokenizerBase) -> _Way:
    parts = json.loads(cast(Any, tokenizer).backend_tokenizer.to_str())
    normalizer, model, splitter = (parts.get(key) or {} for key in ("normalizer", "model", "pre_tokenizer"))
    usual = type(tokenizer).__call__ is PreTrainedTokenizerBase.__call__ and model.get("type") == "BPE"
    odd = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    by_bytes = normalizer in ({}, {"type": "NFC"}) and _splits_at_spaces(splitter)
    by_words = normalizer == _SPACES and not splitter and _keeps_words_apart(model.get("vocab", {}))
    added = pattern_of(text for text in added_vocab(tokenizer) if text)
    return _Way(
        around=_around(tokenizer, parts.get("post_processor")),
        cuts=usual and not odd and (by_bytes or by_words),
        starts_with_space=by_words,
        composes=bool(normalizer),
        added=added,
    )


def _keeps_words_apart(vocabulary: Mapping[str, int]) -> bool:
    """Whether no token has a ▁ behind another character; all letters that a cut stands between are known."""
    known = all(letter in vocabulary for letter in f"{string.ascii_letters}▁")
    return known and not any("▁" in token.lstrip("▁") for token in vocabulary)


def _splits_at_spaces(part: dict[str, Any]) -> bool:
    if part.get("type") == "ByteLevel":
        return part.get("use_regex", True) and not part.get("add_prefix_space")
    if part.get("type") != "Sequence" or len(part.get("pretokenizers", ())) != 2:
        return False
    split, level = part["pretokenizers"]
    return (
        split.get("type") == "Split"
        and split.get("pattern", {}).get("Regex") in _SPLITS
        and split.get("behavior") == "Isolated"
        and not split.get("invert")
        and level.get("type") == "ByteLevel"
        and not level.get("use_regex", True)
        and not level.get("add_prefix_space")
    )


def _around(tokenizer: PreTrainedTokenizerBase, processor: Any) -> tuple[list[int], list[int]] | None:
    """What the tokenizer adds before and behind any text, seen on two of them."""
    kinds = [one.get("type") for one in (processor or {}).get("processors", [processor or {"type": None}])]
    if any(kind not in (None, "ByteLevel", "TemplateProcessing") for kind in kinds):
        return None
    seen: list[tuple[list[int], list[int]]] = []
    for bare, full in zip(_ids(tokenizer, _PROBES, special=False), _ids(tokenizer, _PROBES, special=True)):
        starts = [i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare]
        if len(starts) != 1:
            return None
        seen.append((full[: starts[0]], full[starts[0] + len(bare) :]))
    return seen[0] if seen[0] == seen[1] else None
