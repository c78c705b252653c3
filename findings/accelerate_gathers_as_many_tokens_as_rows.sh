#!/usr/bin/env bash
# Accelerator.gather_for_metrics of accelerate cuts what it is given for the last batch to the rows that the batch has, on one
# process too, where nothing was doubled. What has one entry a token, or a class, loses the rest without a word: of 60 tokens
# in ten rows 50 are left, and an accuracy of 0.7 becomes 0.82; of counts of four classes two are left.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check accelerate==1.15.0 torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W error - <<'PYTHON'
import accelerate
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

assert accelerate.__version__ == "1.15.0", accelerate.__version__
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 1
# Ten rows of six tokens, each right or not: 42 of 60 are right. The last batch of four has two rows.
rows = torch.ones(10, 6, dtype=torch.long)
rows[:6, 0], rows[8:, 1:] = 0, 0
rows[0, 1], rows[1, 1] = 0, 0
batches = accelerator.prepare(DataLoader(rows, batch_size=4))
plain, tokens, by_row, counts = [], [], [], []
for batch in batches:
    classes = torch.bincount(batch.sum(dim=1) % 4, minlength=4)
    plain.append(batch.flatten())
    tokens.append(accelerator.gather_for_metrics(batch.flatten()))
    by_row.append(accelerator.gather_for_metrics(batch))
    counts.append(accelerator.gather_for_metrics(classes))
every, kept, rowwise = torch.cat(plain).float(), torch.cat(tokens).float(), torch.cat(by_row).float()
print(f"tokens: {len(every)} of which {every.mean():.3f} are right; gathered {len(kept)}, {kept.mean():.3f} right")
print(f"gathered as rows: {rowwise.numel()}, {rowwise.mean():.3f} right; counts of four classes: {[len(c) for c in counts]}")
assert len(every) == rowwise.numel() == 60 and len(kept) == 50
assert abs(every.mean() - 0.7) < 1e-6 and rowwise.mean() == every.mean()
assert kept.mean() > 0.8
assert [len(c) for c in counts] == [4, 4, 2]
PYTHON
