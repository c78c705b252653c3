"""Tokenizers that read alike share one vocabulary.

tokenizers 0.23 keeps the words that a BPE model has read in the memory of each thread, by a number of the
model, and leaves them there when the model goes: up to ten thousand words, some 3 MB, for every tokenizer. A
process that opens the same one again and again (a notebook, a sweep) therefore gives each the model that an
equal one had.
"""

from __future__ import annotations

import copy
import hashlib
import threading
from collections import OrderedDict
from typing import Any

from tokenizers import models
from transformers import PreTrainedTokenizerBase

KEPT = 4  # vocabularies, the last used: each holds the memory of one tokenizer
_kept: OrderedDict[bytes, Any] = OrderedDict()
_changing = threading.Lock()


def share_vocabulary(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer the BPE model of an equal one that was opened before. Its added tokens, normaliser and
    template stay its own. A tokenizer without a BPE model, or with one that drops merges, stays as it is."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    model = getattr(backend, "model", None)
    if not isinstance(model, models.BPE) or model.dropout:
        return
    key = hashlib.blake2b(model.__getstate__(), digest_size=32).digest()
    with _changing:
        kept = _kept.get(key)
        if kept is None or kept.dropout:  # whoever had it has set it to drop merges: it reads alike no more
            kept = _kept[key] = model
        backend.model = kept
        _kept.move_to_end(key)
        while len(_kept) > KEPT:
            _kept.popitem(last=False)


def copied(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer that can be given tokens and a template of its own; it shares the vocabulary."""
    other = copy.deepcopy(tokenizer)
    share_vocabulary(other)
    return other
