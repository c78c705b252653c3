"""Tokenizers of every kind that models have, and small chat templates in the shape of each family."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIALS = (
    "<unk>",
    "<bos>",
    "<eos>",
    "<pad>",
    "<|start|>",
    "<|stop|>",
    "<|return|>",
    "<|message|>",
    "<|channel|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|header|>",
    "<|/header|>",
    "<turn>",
    "</turn>",
    "[ASK]",
    "[/ASK]",
    "[go]",
    "[ANSWER]",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
)
TEMPLATES = {
    path.stem: path.read_text("utf-8") for path in (Path(__file__).parent / "templates").glob("*.jinja")
}
KINDS = ("bytes", "merged_bytes", "legacy_spaces", "metaspace", "words")
LETTERS = (
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 \n:.,!?()[]{}<>|/\"'_-=\ufdd0\ufdd1é日"
)


def make_tokenizer(kind: str, template: str | None = None, eos: str = "<eos>") -> PreTrainedTokenizerFast:
    """bytes: one token a byte. merged_bytes: with merges across what templates write around turns.
    legacy_spaces: SentencePiece as Llama 2 has it, a space before each stretch of text. metaspace: a space
    before the first one alone. words: WordPiece, which knows no spaces."""
    inner = _MAKERS[kind]()
    inner.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=eos, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer


def _bytes(merges: tuple[tuple[str, str], ...] = ()) -> Tokenizer:
    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return inner


def _merged() -> Tokenizer:
    return _bytes(
        (("Ċ", "Ċ"), (":", "Ġ"), ("Ċ", "a"), ("Ġ", "a"), (">", "a"), ("a", "b"), ("n", "e"), ("]", "a"))
    )


def _spaced(legacy: bool) -> Tokenizer:
    pieces = dict.fromkeys(
        ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *sorted(set(LETTERS) - {" "})]
    )
    pieces |= dict.fromkeys(["▁a", "ab", "▁ab", "\n\n"])
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b"), ("\n", "\n")]
    inner = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(pieces)}, merges=merges, unk_token="<unk>",
            byte_fallback=True, fuse_unk=True,
        )
    )  # fmt: skip
    if legacy:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return inner


def _words() -> Tokenizer:
    letters = sorted(set(LETTERS) - {" ", "\n"})
    tokens = dict.fromkeys(["<unk>", *letters, *(f"##{letter}" for letter in letters), "ab", "##ab"])
    inner = Tokenizer(models.WordPiece(vocab={t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    return inner


_MAKERS = {
    "bytes": _bytes,
    "merged_bytes": _merged,
    "legacy_spaces": lambda: _spaced(legacy=True),
    "metaspace": lambda: _spaced(legacy=False),
    "words": _words,
}
