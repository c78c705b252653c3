"""Stop strings in what is being sampled, however a tokenizer cuts them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from keel.data.chat import added_vocab, reply_text

SPARE = 8  # characters behind which the text of some tokens is what it is behind all tokens before them

_closing: WeakKeyDictionary[PreTrainedTokenizerBase, dict[frozenset[str], Tensor]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class StopTexts:
    """Strings that end a response as soon as they stand in its text.

    A token may hold the end of a stop string and more text behind it. Such a token stays in the response's
    ids; its text is cut where the stop string begins.
    """

    tokenizer: PreTrainedTokenizerBase
    texts: tuple[str, ...]
    # (V,) True at the tokens in whose text a stop string may end. Only after these must a text be searched.
    closing: Tensor

    def may_end(self, tokens: Tensor) -> Tensor:
        """(n,) tokens → (n,) bool: `closing`; False for ids that are none of the tokenizer's, which some
        models have."""
        closing = self.closing.to(tokens.device)
        return (tokens < len(closing)) & closing[tokens.clamp(max=len(closing) - 1)]

    def text(self, ids: Sequence[int]) -> str:
        """What stop strings are looked for in."""
        return reply_text(self.tokenizer, ids)

    def within(self, ids: Sequence[int]) -> str:
        """The first stop string in the text of a response; "" where there is none."""
        text = self.text(ids)
        return (
            min((text.find(stop), stop) for stop in self.texts if stop in text)[1]
            if self.any_in(text)
            else ""
        )

    def closed_by(self, ids: Sequence[int]) -> str:
        """As `within`, where no stop string stands in the text without the last token. Of a long response
        only the end is made text, unless a stop string stands there: what a token costs does not grow with
        the tokens before it."""
        longest = max(map(len, self.texts))
        newest = len(self.text(ids[-1:]))
        count = longest + newest + SPARE
        while count < len(ids):
            end = self.text(ids[-count:])
            if self.any_in(end):
                break
            if len(end) >= longest + newest + SPARE:
                return ""
            count *= 2  # tokens without text, or parts of characters
        return self.within(ids)

    def any_in(self, text: str) -> bool:
        """Whether a stop string stands in the text."""
        return any(stop in text for stop in self.texts)


def stop_texts(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> StopTexts | None:
    """Those of the stop strings that are looked for as text: all but special tokens, which are ids
    (`chat.stop_ids`)."""
    texts = tuple(text for text in stop if text not in added_vocab(tokenizer))
    if not texts:
        return None
    known = _closing.setdefault(tokenizer, {})
    ends = frozenset(text[-1] for text in texts)
    if ends not in known:
        known[ends] = torch.tensor([_may_close(tokenizer, i, ends) for i in range(len(tokenizer))])
    return StopTexts(tokenizer, texts, known[ends])


def _may_close(tokenizer: PreTrainedTokenizerBase, token: int, ends: frozenset[str]) -> bool:
    """Whether a stop string may end in this token.

    The text of a token can depend on its neighbours: where it is part of a character, empty by itself, or
    loses a leading space. Then the answer is yes, to be safe.
    """
    text = tokenizer.decode([token], skip_special_tokens=False)
    return not text or "\ufffd" in text or " " in ends or any(end in text for end in ends)
