"""A byte-level BPE tokenizer for models that start from nothing; what a tokenizer has ids for, and a pad of
its own."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from keel.data import chat
from keel.errors import UsageError
from keel.models.load import ModelSource, model_config, reads_last_token

EOS, PAD = "<|end|>", "<|pad|>"
PADS = (re.compile(r"pad", re.I), re.compile(r"reserved|unused|extra_id|placeholder", re.I))
UNKNOWN = 0.25  # share of tokens that may be unknown
NO_TEXT = re.compile(r"image|img|audio|video|vision|speech", re.I)  # tokens that stand for no text
_known: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, int]] = WeakKeyDictionary()


def train_tokenizer(texts: Iterable[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE (1909.03341) of at most `vocab_size` tokens; any text can be encoded. PAD and EOS
    differ."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(
        individual_digits=True
    )  # as Llama (2302.13971): numbers are read digit by digit
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, EOS], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, bos_token=EOS, padding_side="right",
        model_max_length=context, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def check_reads(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], name: str) -> None:
    """UsageError for a tokenizer that turns texts into nothing, or more than a quarter of them into unknown
    tokens: it is another model's, or lacks files. name: of the tokenizer."""
    words = tokens = unknown = 0
    for text in texts:
        ids: Any = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        words += len(text.split())
        tokens += len(ids)
        unknown += sum(token == tokenizer.unk_token_id for token in ids)
    if not words or (tokens and unknown <= UNKNOWN * tokens):
        return
    what = f"{unknown:,} of {tokens:,} tokens are {tokenizer.unk_token}" if tokens else "there is no token"
    raise UsageError(
        f"tokenizer {name!r} cannot read the data: {what}; bring the tokenizer's files that belong to the "
        "model, or name another tokenizer"
    )


def known_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id that a tokenizer has a token for: a model needs as many rows."""
    found = _known.get(tokenizer)
    if found is None or found[0] != len(tokenizer):
        found = (len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
        _known[tokenizer] = found
    return found[1]


def beyond(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[str]:
    """The tokens that embeddings of `rows` have no row for, by id; those that stand for images or sound,
    which no text holds, are left out (Gemma 3 1B has one)."""
    if known_ids(tokenizer) <= rows:
        return []
    without = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= rows)
    return [token for _, token in without if not NO_TEXT.search(token)]


def rows_needed(source: ModelSource, tokenizer: PreTrainedTokenizerBase, *, resize: bool) -> int | None:
    """The rows that a model's embeddings must get for a tokenizer; None where they have enough. No weights
    are read. UsageError for a tokenizer that is longer, unless the embeddings may be resized."""
    rows = model_config(source).get_text_config().vocab_size
    without = beyond(tokenizer, rows)
    if not without:
        return None
    if not resize:
        shown = ", ".join(without[:3]) + (", …" if len(without) > 3 else "")
        raise UsageError(
            f"model {source.path!r}: its tokenizer has {known_ids(tokenizer)} tokens, its embeddings {rows} "
            f"rows: there is none for {shown}; set `model.resize: true` to add rows, or use the model's own "
            "tokenizer"
        )
    return known_ids(tokenizer)


def give_own_pad(tokenizer: PreTrainedTokenizerBase, rows: int) -> int:
    """A pad token that ends no reply, for a model that is read at the last token that is no pad, as
    transformers' classifiers are: the tokenizer's own, else one of its special tokens that stand for nothing,
    else a new one. rows: of the model's embeddings.

    Returns the rows that the embeddings need for it. With EOS as pad, transformers would read every reply one
    token too early.
    """
    ends = _ends(tokenizer)
    pad = tokenizer.pad_token_id
    if isinstance(pad, int) and pad not in ends and pad < rows:
        return rows
    special = {i: token for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    spare = {i: token.content for i, token in special.items() if i not in ends and i < rows}
    names = (name for pattern in PADS for name in spare.values() if pattern.search(name))
    unknown = tokenizer.unk_token_id
    if isinstance(unknown, int) and unknown in spare and unknown != tokenizer.bos_token_id:
        names = (*names, spare[unknown])
    chosen = next(iter(names), None)
    if chosen is None:
        chosen = PAD
        pad_token: Any = AddedToken(PAD, special=True, normalized=False)
        tokenizer.add_special_tokens({"pad_token": pad_token})
    tokenizer.pad_token = chosen
    return max(rows, known_ids(tokenizer))


def with_own_pad(
    source: ModelSource, tokenizer: PreTrainedTokenizerBase
) -> tuple[ModelSource, PreTrainedTokenizerBase]:
    """A classifier's source and its tokenizer, which gets a pad of its own by `give_own_pad`; an encoder,
    which pools by itself, and a tokenizer without EOS stay as they are."""
    if tokenizer.eos_token_id is None or not reads_last_token(source):
        return source, tokenizer
    if source.init is None:
        rows = source.rows or model_config(source).get_text_config().vocab_size
        needed = give_own_pad(tokenizer, rows)
        return (replace(source, rows=needed) if needed > rows else source), tokenizer
    rows = source.init.get("vocab_size", known_ids(tokenizer))
    needed = give_own_pad(tokenizer, rows)
    if needed > rows and "vocab_size" in source.init:
        source = replace(source, init={**source.init, "vocab_size": needed})
    return source, tokenizer


def _ends(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that may be the last of a reply."""
    try:
        return set(chat.stop_ids(tokenizer, ()))
    except UsageError:  # its template cannot be used
        return set(chat.eos_ids(tokenizer))


def knows_conversations(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a model has seen conversations in its chat template. keel writes it into the configs of what it
    trains (`keel_conversations`); of others' models those that bring a template are taken to know it."""
    said = getattr(config, "keel_conversations", None)
    return bool(tokenizer.chat_template) if said is None else bool(said)
