#!/usr/bin/env bash
# DuckDB's read_json takes a column's type from the first 20,480 rows of a file. A text that comes later and does not fit ends
# the query with an error that names its line; a number is put into that type without a word. Where the first rewards of a file
# are 0 and 1, later ones of 0.4, 0.7 and 2.5 are 0, 1 and 2, in lists and within messages too; where the first answers are
# true or false, a score of 0.2 is true.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check duckdb==2.0.1
"$folder/venv/bin/python" -W error - "$folder/rows.jsonl" <<'PYTHON'
import json
import sys

import duckdb

assert duckdb.__version__ == "2.0.1", duckdb.__version__


def read(early: list, late: list) -> list:
    """The late values of a column whose first 20,480 rows have the early ones, as DuckDB reads them."""
    values = [early[row % len(early)] for row in range(20480)] + late
    with open(sys.argv[1], "w") as file:
        file.writelines(json.dumps({"row": row, "value": value}) + "\n" for row, value in enumerate(values))
    rows = duckdb.sql(f"SELECT value FROM read_json('{sys.argv[1]}') WHERE row >= 20480 ORDER BY row").fetchall()
    return [value for (value,) in rows]


print("rewards 0.4, 0.7, 2.5 after 0 and 1:", read([0, 1], [0.4, 0.7, 2.5]))
print("the same, with 0.5 among the first: ", read([0, 0.5], [0.4, 0.7, 2.5]))
print("0.2 after true and false:           ", read([True, False], [0.2]))
assert read([0, 1], [0.4, 0.7, 2.5]) == [0, 1, 2]
assert read([0, 0.5], [0.4, 0.7, 2.5]) == [0.4, 0.7, 2.5]
assert read([[0, 1]], [[0.7]]) == [[1]]
assert read([{"reward": 0}], [{"reward": 0.7}]) == [{"reward": 1}]
assert read([True, False], [0.2]) == [True]
try:
    read([0, 1], ["0.7"])
except duckdb.InvalidInputException as error:
    print("a text:", str(error).split(": ", 3)[-1].splitlines()[0])
else:
    raise AssertionError("a text was read")
PYTHON
