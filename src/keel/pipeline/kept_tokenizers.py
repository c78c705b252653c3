"""The tokenizers that the checks before a run read: each file once.

One of 150,000 words takes a second to load, and the checks of a single stage ask for it five times. A stage
loads its own when it runs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from keel.models.load import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class KeptTokenizers:
    """Tokenizers by place, kept inside `kept` alone: there no stage runs that would write another one."""

    _loaded: dict[tuple[str, bool, str | None], PreTrainedTokenizerBase] | None = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Load no tokenizer twice inside, and let go of all of them at the end."""
        if self._loaded is not None:
            yield
            return
        self._loaded = {}
        try:
            yield
        finally:
            self._loaded = None

    def load(
        self, place: str, *, trust_remote_code: bool = False, revision: str | None = None
    ) -> PreTrainedTokenizerBase:
        """The tokenizer of a model directory or hub id, to read with: a chat template or a special token that
        is set on it is the caller's alone, words that are added to it are everybody's. UsageError if there is
        none."""
        key = (place, trust_remote_code, revision)
        found = (self._loaded or {}).get(key)
        if found is None:
            found = load_tokenizer(place, trust_remote_code=trust_remote_code, revision=revision)
            if self._loaded is not None:
                self._loaded[key] = found
        other = copy.copy(found)
        vars(other).update({name: value.copy() for name, value in vars(found).items() if type(value) is dict})
        return other
