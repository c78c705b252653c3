#!/usr/bin/env bash
# transformers: what the folders of its models hold is looked up when it is imported, and once more at the first model:
# every file of some 550 folders is read and parsed twice. The answers are kept, but only 128 of them, and under a
# path that is written in two ways, so that no answer is ever used: 0 hits. A second or so each time.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import time

begun = time.perf_counter()
import transformers
from transformers.utils.import_utils import create_import_structure_from_path as look

assert transformers.__version__ == "5.23.0", transformers.__version__
first, imported = look.cache_info(), time.perf_counter() - begun
begun = time.perf_counter()
from transformers import LlamaConfig  # noqa: F401

second, named = look.cache_info(), time.perf_counter() - begun
print(f"after the import: {first} ({imported:.1f} s); after the first model's name: {second} ({named:.1f} s)")
assert first.misses > first.maxsize == 128
assert second.misses >= 2 * first.misses and second.hits == 0
PYTHON
