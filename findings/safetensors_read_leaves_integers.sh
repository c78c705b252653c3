#!/usr/bin/env bash
# safetensors: every tensor that is read leaves Python integers behind (two, its place in the file; one for a file's first
# tensor) that nothing refers to and nothing frees. It is 28 bytes each: a process that loads models of 300 tensors
# thousands of times grows by 17 kB a time, which whoever looks for a leak of his own will find first.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 safetensors==0.8.0
"$folder/venv/bin/python" - "$folder/one.safetensors" <<'PYTHON'
import gc
import sys
import tracemalloc

import safetensors
import torch
from safetensors.torch import save_file

assert safetensors.__version__ == "0.8.0", safetensors.__version__
TIMES = 5_000
path = sys.argv[1]
save_file({"u": torch.zeros(300, 400), "w": torch.zeros(300, 400)}, path)


def left_after(read):
    """Objects and bytes that are there after `TIMES` reads and were not before."""
    with safetensors.safe_open(path, "pt") as file:
        read(file)
        gc.collect()
        tracemalloc.start()
        for _ in range(TIMES):
            read(file)
        gc.collect()
        found = [trace for trace in tracemalloc.take_snapshot().statistics("lineno") if trace.count >= TIMES]
        tracemalloc.stop()
    return sum(one.count for one in found), sum(one.size for one in found)


for name, read in (
    ("get_tensor", lambda file: file.get_tensor("w")),
    ("get_slice()[...]", lambda file: file.get_slice("w")[...]),
):
    count, size = left_after(read)
    print(f"{name}: {TIMES:,} reads of one tensor, each let go of: {count:,} objects stay, {size:,} bytes")
    assert count >= 2 * TIMES
count, _ = left_after(lambda file: file.get_slice("w").get_shape())
print(f"get_shape alone: {count} objects stay")
assert count == 0
PYTHON
