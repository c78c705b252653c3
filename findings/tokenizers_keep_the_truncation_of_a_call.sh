#!/usr/bin/env bash
# A call of a transformers tokenizer with truncation and padding sets both in the tokenizers object beneath, and there they
# stay. save_pretrained writes them into tokenizer.json. transformers does not apply them again; whatever reads the file by
# the tokenizers library itself (servers, other languages) cuts every text at the length of the last call before saving.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys
from importlib.metadata import version

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

assert (version("transformers"), version("tokenizers")) == ("5.23.0", "0.23.3")
words = ["<unk>", "<pad>", "the", "sky", "is", "blue", "today"]
inner = Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token="<unk>"))
inner.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>")
text = "the sky is blue today"


def saved(name: str) -> list[str]:
    """The text's tokens by the saved file: read by transformers, which must not change, and by tokenizers."""
    place = f"{sys.argv[1]}/{name}"
    tokenizer.save_pretrained(place)
    again = PreTrainedTokenizerFast.from_pretrained(place)
    assert again.convert_ids_to_tokens(again(text)["input_ids"]) == text.split()
    return Tokenizer.from_file(f"{place}/tokenizer.json").encode(text).tokens


before = saved("before")
tokenizer(["the sky"], truncation=True, max_length=3, padding="max_length")  # a batch of short prompts, say
after = saved("after")
print("tokenizer.json saved before the call:", before)
print("tokenizer.json saved after the call: ", after)
assert before == text.split(), before
assert after == ["the", "sky", "is"], after
PYTHON
