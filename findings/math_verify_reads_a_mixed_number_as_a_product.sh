#!/usr/bin/env bash
# math-verify reads a mixed number in plain text, "2 1/2", as the product 2 * 1/2. As an answer it is wrong where 2.5 is
# wanted and right where 1 is wanted. The same number in LaTeX is read as two and a half; "1½" loses its half.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check math-verify==0.9.0 antlr4-python3-runtime==4.13.2 latex2sympy2_extended==1.11.0 sympy==1.14.0 mpmath==1.3.0
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

from math_verify import parse, verify

assert version("math-verify") == "0.9.0"
cases = [("2.5", "2 1/2"), ("1", "2 1/2"), ("2.5", "$2\\frac{1}{2}$"), ("1.5", "1½"), ("1", "1½")]
seen = [verify(parse(gold), parse(answer)) for gold, answer in cases]
for (gold, answer), equal in zip(cases, seen):
    print(f"gold {gold!r}, answer {answer!r}: {'right' if equal else 'wrong'}")
assert seen == [False, True, True, False, True], seen
PYTHON
