#!/usr/bin/env bash
# tokenizers: the words that a BPE tokenizer has read (its cache, up to ten thousand) stay in the thread's memory when
# the tokenizer is gone, and `_clear_cache` does not free them. A process that opens the same tokenizer again and
# again grows by megabytes each time. Tokenizers that share one model object share the words and stay flat.
# Needs Python 3.11 or newer and glibc. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3
TOKENIZERS_PARALLELISM=false "$folder/venv/bin/python" - <<'PYTHON'
import ctypes
import gc

import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

assert tokenizers.__version__ == "0.23.3", tokenizers.__version__


class InUse(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "a o s h mapped u f used free keep".split()]


libc = ctypes.CDLL("libc.so.6")
libc.mallinfo2.restype = InUse
TIMES = 8
words = [f"w{number * 7919 % 99991:x}q" for number in range(20_000)]
text = " ".join(words)
first = Tokenizer(models.BPE())
first.pre_tokenizer = pre_tokenizers.Whitespace()
first.train_from_iterator(words, trainers.BpeTrainer(vocab_size=300, show_progress=False))
saved = first.to_str()


def grows(read):
    """Kibibytes of C memory in use that each tokenizer adds which is opened, read with and let go of."""
    read()
    gc.collect()
    before = libc.mallinfo2()
    for _ in range(TIMES):
        read()
    gc.collect()
    after = libc.mallinfo2()
    return (after.used + after.mapped - before.used - before.mapped) // TIMES // 1024


def opened():
    Tokenizer.from_str(saved).encode(text)


def cleared():
    tokenizer = Tokenizer.from_str(saved)
    tokenizer.encode(text)
    tokenizer.model._clear_cache()


shared_model = Tokenizer.from_str(saved).model


def shared():
    tokenizer = Tokenizer.from_str(saved)
    tokenizer.model = shared_model
    tokenizer.encode(text)


opens, clears, shares = grows(opened), grows(cleared), grows(shared)
print(f"each tokenizer that was opened leaves {opens:,} KiB; with its cache cleared {clears:,}; with one model {shares:,}")
assert opens > 2_000 and clears > 2_000 and shares < 50
PYTHON
