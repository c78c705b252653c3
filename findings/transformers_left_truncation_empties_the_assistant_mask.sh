#!/usr/bin/env bash
# With truncation_side="left" the end of a conversation is kept, and with it the last reply. The assistant mask that
# apply_chat_template returns for it (the tokens to train) is all zeros as soon as the beginning of an earlier reply is cut
# off: the last reply, which is there whole, is left out. Cut at the right, the mask is right. Nothing is said.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3 jinja2==3.1.6
"$folder/venv/bin/python" - <<'PYTHON'
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

assert transformers.__version__ == "5.23.0", transformers.__version__
words = ["<unk>", "user", "bot", "hello", "there", "one", "two", "three", "four", "five", "six"]
inner = Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token="<unk>"))
inner.pre_tokenizer = pre_tokenizers.Whitespace()
template = (
    "{% for m in messages %}{% if m.role == 'user' %}user {{ m.content }} {% else %}"
    "bot {% generation %}{{ m.content }}{% endgeneration %} {% endif %}{% endfor %}"
)
messages = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "one two three"},
    {"role": "user", "content": "there"},
    {"role": "assistant", "content": "four five six"},
]


def trained(side: str, limit: int) -> tuple[str, str]:
    """What is left of the conversation, and the part of it that the mask marks."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", truncation_side=side)
    tokenizer.chat_template = template
    out = tokenizer.apply_chat_template(
        messages, return_assistant_tokens_mask=True, return_dict=True, truncation=True, max_length=limit
    )
    kept = tokenizer.convert_ids_to_tokens(out["input_ids"])
    marked = [token for token, mark in zip(kept, out["assistant_masks"], strict=True) if mark]
    return " ".join(kept), " ".join(marked)


for side, limit in (("right", 8), ("left", 10), ("left", 8), ("left", 6)):
    kept, marked = trained(side, limit)
    print(f"{side:5} {limit:2}: kept [{kept}], trained [{marked}]")
assert trained("right", 8) == ("user hello bot one two three user there", "one two three")
assert trained("left", 10)[1] == "one two three four five six"
assert trained("left", 8) == ("two three user there bot four five six", "")
assert trained("left", 6) == ("user there bot four five six", "")
PYTHON
