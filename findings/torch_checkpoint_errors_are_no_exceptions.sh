#!/usr/bin/env bash
# torch.distributed.checkpoint says what is wrong with a checkpoint by CheckpointException, which is a BaseException and no
# Exception, though its name says so: `except Exception` round a load whose checkpoint lacks a tensor (or round a save that
# finds no room) does not catch it, and neither does a retry or a logger that is written so. Only KeyboardInterrupt,
# SystemExit and the like are meant to pass there. Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import tempfile

import torch
import torch.distributed.checkpoint as checkpoint

assert torch.__version__.split("+")[0] == "2.13.0", torch.__version__
with tempfile.TemporaryDirectory() as place:
    checkpoint.save({"weight": torch.ones(3)}, checkpoint_id=place)
    caught = None
    try:
        try:
            checkpoint.load({"weight": torch.zeros(3), "bias": torch.zeros(1)}, checkpoint_id=place)
        except Exception as error:
            caught = f"except Exception: {type(error).__name__}"
    except BaseException as error:
        caught = f"except BaseException alone: {type(error).__name__}"
print(caught)
assert caught == "except BaseException alone: CheckpointException", caught
PYTHON
