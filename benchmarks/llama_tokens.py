"""The demo's own tokenizer in llama.cpp: how many texts it cuts otherwise than transformers.

    python benchmarks/llama_tokens.py LIBRARY [FOLDER]

LIBRARY is llama.cpp as a shared library (`libllama.so` of a build, or what a Python package of it brings).
A tokenizer is trained as the demo trains its own, a GGUF is written with it, and llama.cpp's `llama_tokenize`
is asked about texts of the help desk, edge cases of spaces, digits and scripts, and random letters. The same
texts go through the rules that `tests/export/test_gguf_tokens.py` has written down. Needs `gguf`.
"""

from __future__ import annotations

import ctypes
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from keel import worlds
from keel.data import chat
from keel.export import gguf_file
from keel.models.tokenizer import train_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "export"))
from test_gguf_tokens import TEXTS, Fields, tokens_of

RANGES = ((32, 127), (160, 0x600), (0x900, 0x3000), (0x4E00, 0x9FFF), (0x1F300, 0x1F700), (9, 11))


class Settings(ctypes.Structure):
    """A struct of settings that is only handed back; larger than any of them, which does no harm by value."""

    _fields_ = (("content", ctypes.c_byte * 1024),)


class Llama:
    """The vocabulary of a GGUF."""

    def __init__(self, library: str, file: Path) -> None:
        self.library: Any = ctypes.CDLL(library)
        self.library.llama_model_default_params.restype = Settings
        load = self.library.llama_model_load_from_file
        load.restype, load.argtypes = ctypes.c_void_p, [ctypes.c_char_p, Settings]
        vocabulary = self.library.llama_model_get_vocab
        vocabulary.restype, vocabulary.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        ids = ctypes.POINTER(ctypes.c_int32)
        self.library.llama_tokenize.argtypes = [
            ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ids, ctypes.c_int32, ctypes.c_bool,
            ctypes.c_bool,
        ]  # fmt: skip
        self.library.llama_backend_init()
        model = load(str(file).encode(), self.library.llama_model_default_params())
        if not model:
            raise SystemExit(f"{library} cannot load {file}")
        self.vocabulary = vocabulary(model)

    def tokens(self, text: str) -> list[int]:
        """Of a text in which control tokens are text, without BOS."""
        content = text.encode()
        room = len(content) + 8
        ids = (ctypes.c_int32 * room)()
        count = self.library.llama_tokenize(self.vocabulary, content, len(content), ids, room, False, False)
        return list(ids[:count])


def texts() -> list[str]:
    """What people write to the help desk, what the demo is trained on, edge cases, and noise."""
    world, letters = worlds.load("helpdesk"), random.Random(0)
    found = [chat.user_text(row["prompt"]) for row in world.rows("test_prompts", 500, 0)]
    found += [row["text"] for row in world.rows("text", 1500, 1)]
    noise = ("".join(chr(letters.randrange(*letters.choice(RANGES))) for _ in range(40)) for _ in range(2000))
    return [*found, *TEXTS, *noise]


def main() -> int:
    if len(sys.argv) < 2:
        raise SystemExit("usage: python benchmarks/llama_tokens.py LIBRARY [FOLDER]")
    transformers.utils.logging.disable_progress_bar()
    folder = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(tempfile.mkdtemp())
    rows = worlds.load("helpdesk").rows("text", 3000, 0)
    tokenizer = chat.with_chat_template(train_tokenizer((row["text"] for row in rows), 1024, 192))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=192, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    gguf_file.write(folder / "model", folder / "model.gguf")
    llama, fields = Llama(sys.argv[1], folder / "model.gguf"), Fields()
    gguf_file.add_vocabulary(fields, tokenizer, len(tokenizer))
    wrong = by_rules = 0
    asked = texts()
    for text in asked:
        ours = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        wrong += llama.tokens(text) != ours
        by_rules += tokens_of(fields.told, text) != ours
    print(f"{len(asked):,} texts: llama.cpp cuts {wrong} otherwise, the rules of the test {by_rules}")
    return int(bool(wrong or by_rules))


if __name__ == "__main__":
    sys.exit(main())
