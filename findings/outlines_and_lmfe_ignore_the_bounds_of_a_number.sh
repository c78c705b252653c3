#!/usr/bin/env bash
# A JSON schema {"type": "integer", "minimum": 1, "maximum": 5}, as a judge's grade has one, binds nothing but the kind of
# token in outlines_core and lm-format-enforcer: both let a model write 9000 or -2, without a warning. The same for bounds of
# a number between 0 and 1, exclusiveMinimum and multipleOf, while maxLength, maxItems and enum are held. llguidance and
# jsonschema hold all of them. A mean of such grades is of any scale.
# Needs Python 3.11 or newer. Fails if this no longer happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check outlines_core==0.2.14 lm-format-enforcer==0.11.3 llguidance==1.9.1 jsonschema==4.26.0
"$folder/venv/bin/python" -W error::UserWarning - <<'PYTHON'
import json
import re
from importlib.metadata import version

import jsonschema
import llguidance
from lmformatenforcer import JsonSchemaParser
from outlines_core.json_schema import build_regex_from_schema

assert version("outlines_core") == "0.2.14" and version("lm-format-enforcer") == "0.11.3"
tokenizer = llguidance.LLTokenizer("byte")


def valid(schema: dict, text: str) -> bool:
    """Whether the text is what the schema says."""
    return not list(jsonschema.Draft202012Validator(schema).iter_errors(json.loads(text)))


def outlines(schema: dict, text: str) -> bool:
    return re.fullmatch(build_regex_from_schema(json.dumps(schema)), text) is not None


def enforcer(schema: dict, text: str) -> bool:
    """Whether lm-format-enforcer allows each character, and the end."""
    parser = JsonSchemaParser(schema)
    for character in text:
        if character not in parser.get_allowed_characters():
            return False
        parser = parser.add_character(character)
    return parser.can_end()


def guidance(schema: dict, text: str) -> bool:
    matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_json_schema(schema))
    return matcher.try_consume_tokens(list(text.encode())) == len(text) and matcher.is_accepting()


bounded = [
    ({"type": "integer", "minimum": 1, "maximum": 5}, "4", ["9000", "-2", "0"]),
    ({"type": "number", "minimum": 0, "maximum": 1}, "0.5", ["7.5", "-1"]),
    ({"type": "integer", "exclusiveMinimum": 0}, "1", ["0"]),
    ({"type": "integer", "multipleOf": 5}, "10", ["7"]),
    (
        {"type": "object", "properties": {"score": {"type": "integer", "minimum": 1, "maximum": 5}}, "required": ["score"]},
        '{"score": 4}',
        ['{"score": 88}'],
    ),
]
held = [
    ({"type": "string", "maxLength": 3}, '"abc"', ['"abcd"']),
    ({"type": "array", "items": {"type": "integer"}, "maxItems": 2}, "[1, 2]", ["[1, 2, 3]"]),
    ({"enum": [1, 2, 3]}, "2", ["4"]),
]
for schema, right, wrong in [*bounded, *held]:
    assert all(check(schema, right) for check in (valid, outlines, enforcer, guidance)), schema
    for text in wrong:
        found = {check.__name__: check(schema, text) for check in (outlines, enforcer, guidance)}
        print(json.dumps(schema), text, found)
        assert not valid(schema, text) and not found["guidance"], (schema, text)
        ignored = any(schema is one for one, _, _ in bounded)
        assert found["outlines"] is found["enforcer"] is ignored, (schema, text, found)
PYTHON
