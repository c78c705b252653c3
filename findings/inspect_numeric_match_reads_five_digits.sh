#!/usr/bin/env bash
# Inspect's scorer match(numeric=True) writes the target and the last number of a reply with five significant digits and
# compares what it wrote. Its documentation speaks of numeric equality, and so do its comments; of whole numbers below 100,000 it is.
# Of sums and products it counts wrong ones as right: 123456 for 123457, 1,000,003 for 1000000, and with location="exact" too.
# Of four products that are wrong by 1 to 9 all are right.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check inspect-ai==0.3.285
"$folder/venv/bin/python" -W error - <<'PYTHON'
import asyncio
from importlib.metadata import version

from inspect_ai.model import ModelOutput
from inspect_ai.scorer import CORRECT, Target, match
from inspect_ai.solver import TaskState

assert version("inspect-ai") == "0.3.285", version("inspect-ai")


def right(reply: str, target: str, location: str = "end") -> bool:
    """Whether Inspect counts the reply as right."""
    said = ModelOutput.from_content("model", reply)
    state = TaskState(model="model", sample_id=1, epoch=1, input="?", messages=[], output=said)
    score = asyncio.run(match(location, numeric=True)(state, Target([target])))
    return score.value == CORRECT


for a, b, error in ((487, 2913, 1), (7519, 68, -2), (9342, 5571, 9), (123, 4567, 3)):
    reply, target = f"{a} times {b} is {a * b + error}.", str(a * b)
    print(f"{reply!r} for {target}: {'right' if right(reply, target) else 'wrong'}")
    assert int(reply.split()[-1].rstrip(".")) != int(target)
    assert right(reply, target) and right(reply, target, "any") and right(str(a * b + error), target, "exact")
assert right("1,000,003", "1000000") and right("123456", "123457") and right("3.14159", "3.1416")
assert right("8765", "8765") and not right("99998", "99999") and not right("124457", "123457")
PYTHON
