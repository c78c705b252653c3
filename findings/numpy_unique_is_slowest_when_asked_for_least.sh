#!/usr/bin/env bash
# numpy's `unique(keys)` counts 64-bit integers in a hash table, and takes many times as long as `unique(keys,
# return_counts=True)`, which sorts them and tells more. A million distinct keys: about 0.9 s and 0.05 s of a processor. It is
# as slow with `sorted=False`. Whoever counts distinct rows of a large data set by
# `len(np.unique(keys))` waits for it; `np.sort` and a comparison of neighbours give the same.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import statistics
import time

import numpy as np

assert np.__version__ == "2.4.6"


def seconds(work):
    """Processor's seconds, the median of five."""
    taken = []
    for _ in range(5):
        before = time.process_time()
        work()
        taken.append(time.process_time() - before)
    return statistics.median(taken)


for kind in (np.uint64, np.int64):
    keys = np.random.default_rng(0).integers(0, 2**63 - 1, 1_000_000).astype(kind)
    asked = {
        "unique": lambda: np.unique(keys),
        "unique, sorted=False": lambda: np.unique(keys, sorted=False),
        "unique with counts": lambda: np.unique(keys, return_counts=True),
        "sort": lambda: np.sort(keys),
    }
    found = {name: seconds(work) for name, work in asked.items()}
    print(kind.__name__, {name: f"{value * 1000:.0f} ms" for name, value in found.items()})
    assert np.array_equal(np.unique(keys), np.unique(keys, return_counts=True)[0])
    assert found["unique"] > 4 * found["unique with counts"], found
    assert found["unique, sorted=False"] > 4 * found["unique with counts"], found
PYTHON
