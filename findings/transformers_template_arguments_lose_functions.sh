#!/usr/bin/env bash
# What apply_chat_template hands to a template besides the messages is turned into plain data first: a function arrives as
# the text "<function>". A date of one's own (strftime_now, as Llama 3 templates call it) cannot be given in this way.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 jinja2==3.1.6
"$folder/venv/bin/python" - <<'PYTHON'
import transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

assert transformers.__version__ == "5.23.0", transformers.__version__
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
tokenizer.chat_template = "{{ day }} {{ day is callable }}"
shown = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False, day=lambda form: "2001")
print(shown)
assert shown == "<function> False", shown
PYTHON
