#!/usr/bin/env bash
# latex2mathml writes the alignment marks of `aligned`, which most derivations in replies use, as bare ampersands: what comes
# out is no XML, and a browser's HTML shows an ampersand in each line. `align*` of the same lines becomes a table with cells.
# A \frac with one argument is an mfrac with one child, which MathML does not allow: no error says so.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check latex2mathml==3.81.1
"$folder/venv/bin/python" - <<'PYTHON'
import xml.etree.ElementTree as ET
from importlib.metadata import version

from latex2mathml.converter import convert

assert version("latex2mathml") == "3.81.1"
SPACE = "{http://www.w3.org/1998/Math/MathML}"
LINES = r"a &= b + c \\ &= d"


def readable(text: str) -> bool:
    try:
        ET.fromstring(text)
    except ET.ParseError as error:
        print("  no XML:", error)
        return False
    return True


aligned = convert(r"\begin{aligned}" + LINES + r"\end{aligned}")
starred = convert(r"\begin{align*}" + LINES + r"\end{align*}")
print("aligned:", aligned)
assert not readable(aligned)
assert aligned.count("<mi>&</mi>") == 2, aligned
print("align*: ", starred)
assert readable(starred)
assert starred.count("<mtd") >= 4, starred
half = ET.fromstring(convert(r"\frac{1}"))
fractions = [len(list(one)) for one in half.iter(SPACE + "mfrac")]
print("children of the mfrac of \\frac{1}:", fractions)
assert fractions == [1], fractions
PYTHON
