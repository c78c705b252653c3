"""Configs: drawn over the schema, with values of every sort in every place. A value that the schema does not
allow is refused with the key's name, what is accepted can be written out and read again, and planned."""

from __future__ import annotations

import copy
import functools
import json
import math
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keel.config import RunConfig, parse, read
from keel.errors import KeelError, UsageError
from keel.pipeline.pipeline import Pipeline, resolved
from keel.plan import planner

pytestmark = pytest.mark.attack

DRAWN = 2000
PLANNED = 12  # every so many of the accepted ones is planned
LONGEST = 30.0
SCHEMA: Any = RunConfig.model_json_schema()
KINDS = SCHEMA["properties"]["stages"]["additionalProperties"]["discriminator"]["mapping"]
# A number may be written as text, since YAML reads 1e-5 as text; an integer as a whole float.
NUMERIC = ("number", "integer")
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**63, 2**64, 10**30, 10**400, -(2**63)),
    *(0.0, -0.0, 0.5, 1.0, 1.5, 1e-300, 1e300, math.inf, -math.inf, math.nan, "inf", "nan", "1", "1e-5"),
    *("", " ", "a", "auto", "null", "ppo", "sft", "\0", "\ud800", "../..", "/", "~", "-", "a" * 100_000),
    *("world:helpdesk/prompts", "world:", "world:x/y", "stage:pairs", "python:x.py:f", "python:", "(a+)+$"),
    *("[", "\x1b[31m", "a" * 300, "b/" * 2000, [], {}, [[]], [{}], [1], ["a"], {"a": 1}, {"kind": "length"}),
    *({"": ""}, [None], {"source": 3}, {"path": "a", "init": {}}),
]  # fmt: skip


def inner(schema: Any) -> Any:
    while "$ref" in schema:
        schema = SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]]
    return schema


def properties(schema: Any) -> dict[str, Any]:
    """The settings of a group, through references and alternatives."""
    if [*schema] == ["$ref"]:
        return _of_group(schema["$ref"])
    found = dict(schema.get("properties", {}))
    for part in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        found |= {**properties(part), **found}
    if "items" in schema:
        found |= {**properties(schema["items"]), **found}
    return found


@functools.cache
def _of_group(reference: str) -> dict[str, Any]:
    return properties(SCHEMA["$defs"][reference.rpartition("/")[2]])


@st.composite
def fitting(draw: Any, schema: Any) -> Any:
    """A value that the schema allows, more often than not at the edge of what it allows."""
    schema = inner(schema)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return draw(st.sampled_from(schema["enum"]))
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return draw(fitting(draw(st.sampled_from(schema[several]))))
    kind = schema.get("type")
    if kind in NUMERIC:
        low, high = schema.get("minimum", schema.get("exclusiveMinimum", 0)), schema.get("maximum", 1000)
        if kind == "integer":
            return draw(st.sampled_from([low, low + 1, 3, 17, high]))
        return draw(st.sampled_from([low, low + 1e-9, (low + high) / 2, high]) | st.floats(low, high))
    if kind == "boolean":
        return draw(st.booleans())
    if kind == "null":
        return None
    if kind == "array":
        return draw(st.lists(fitting(schema.get("items", {})), max_size=2))
    if kind == "object" and "properties" in schema:
        needed = schema.get("required", [])
        chosen = {*needed, *draw(st.lists(st.sampled_from(sorted(schema["properties"])), max_size=2))}
        return {name: draw(fitting(schema["properties"][name])) for name in sorted(chosen)}
    return draw(st.sampled_from(ODD))


@st.composite
def changes(draw: Any) -> tuple[list[str], Any]:
    """A place in the config, and a value for it."""
    stage = draw(st.sampled_from(STAGES))
    path, schema = ["stages", stage], {"$ref": KINDS[STAGE_KINDS[stage]]}
    if draw(st.integers(0, 9)) == 0:
        path, schema = [], SCHEMA
    for _ in range(3):
        known = properties(schema)
        if not known or (path and path[-1] != stage and draw(st.booleans())):
            break
        name = draw(st.sampled_from(sorted({*known, "no_such_key"} - {"kind"})))
        path, schema = [*path, name], known.get(name, {})
    value = draw(fitting(schema)) if draw(st.integers(0, 2)) else draw(st.sampled_from(ODD))
    return path, value


STAGES = ["base", "sft", "reward", "classes", "dpo", "ppo", "grpo", "best", "pairs", "judge"]
STAGE_KINDS = dict(
    zip(
        STAGES,
        ["pretrain", "sft", "reward", "classifier", "dpo", "ppo", "grpo", "best_of_n", "collect", "evaluate"],
    )
)


def put(tree: Any, path: list[str], value: Any) -> None:
    for part in path[:-1]:
        node = tree.get(part) if isinstance(tree, dict) else None
        if not isinstance(node, dict):
            node = {"path": node} if part == "model" and isinstance(node, str) else {}
            tree[part] = node
        tree = node
    tree[path[-1]] = value


def as_numbers(value: Any) -> Any:
    """What YAML reads as text, and a float that is whole, as the numbers that they stand for."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


QUICK = settings(
    max_examples=DRAWN,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def counts() -> dict[str, int]:
    return {"accepted": 0, "refused": 0, "planned": 0}


@QUICK
@given(st.lists(changes(), min_size=1, max_size=2))
def test_a_drawn_config_is_refused_by_key_or_can_be_planned(
    every_kind: dict[str, Any], counts: dict[str, int], tmp_path_factory: Any, drawn: Any
) -> None:
    tree = {
        "name": "r",
        "threads": 1,
        "device": "cpu",
        "dtype": "float32",
        "stages": copy.deepcopy(every_kind),
    }
    tree = copy.deepcopy(tree)
    for path, value in drawn:
        put(tree, path, copy.deepcopy(value))
    began = time.monotonic()
    try:
        config = parse(tree)
    except UsageError as error:
        counts["refused"] += 1
        said = str(error)
        assert len(said) < 5000 + 400 * len(said.splitlines()), said[:1000]
        assert "function-" not in said
        assert "Value error" not in said
        return
    finally:
        assert time.monotonic() - began < LONGEST
    counts["accepted"] += 1
    again = parse(json.loads(json.dumps(resolved(config), allow_nan=False)))
    assert resolved(again) == resolved(config)
    for path, value in drawn:
        check_allowed(tree, path, value)
    if counts["accepted"] % PLANNED:
        return
    counts["planned"] += 1
    try:
        pipeline = Pipeline(config, tmp_path_factory.getbasetemp() / "never", lambda line: None)
        pipeline.sources.code = False
        planner.as_json(planner.plan(pipeline))
    except KeelError as error:
        refused = str(error)
        assert refused
        assert len(refused) < 3000
    finally:
        assert time.monotonic() - began < LONGEST
        assert not (tmp_path_factory.getbasetemp() / "never").exists()


@functools.cache
def validator(stage: str, name: str) -> Any:
    known = properties({"$ref": KINDS[STAGE_KINDS[stage]]})
    return jsonschema.Draft202012Validator({"$defs": SCHEMA["$defs"], **known[name]})


def check_allowed(tree: Any, path: list[str], value: Any) -> None:
    """An accepted value is one that the schema allows in its place."""
    node = tree
    for part in path:
        node = node.get(part) if isinstance(node, dict) else None
    if len(path) < 3 or path[0] != "stages" or (node is not value and node != value):
        return
    known = properties({"$ref": KINDS[STAGE_KINDS[path[1]]]})
    assert path[2] in known, f"{path} is no setting, and was accepted"
    if len(path) > 3:
        return
    if any(validator(path[1], path[2]).is_valid(one) for one in (value, as_numbers(value))):
        return
    raise AssertionError(f"{path} = {str(value)[:100]!r} was accepted, and is not what the schema says")


FILES: dict[str, bytes] = {
    "empty": b"",
    "list": b"- a\n",
    "text": b"hello",
    "tabs": b"name: r\n\tstages: {}\n",
    "twice": b"name: r\nname: s\nstages: {}\n",
    "nul": b"name: r\0\nstages: {}\n",
    "latin": "name: r\ndescription: é\nstages: {}\n".encode("latin-1"),
    "utf16": "name: r\nstages: {}\n".encode("utf-16"),
    "tag": b"name: !!python/object/apply:os.system ['true']\nstages: {}\n",
    "alias": b"name: r\nstages: &a {x: *a}\n",
    "laughs": b"a: &a [x,x,x,x,x,x,x,x,x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 9)) for c in range(98, 108)),
    "brackets": b"[" * 5000,
    "braces": b"{a: " * 5000,
    "indented": b"".join(b" " * i + b"a:\n" for i in range(2000)),
    "key-list": b"? [a, b]\n: c\n",
    "key-null": b"? \n: c\nname: r\n",
    "key-number": b"1: 2\nname: r\nstages: {}\n",
    "merge": b"<<: 3\nname: r\n",
    "merge-list": b"<<: [1, 2]\nname: r\n",
    "date": b"name: 2026-01-01\nstages: {}\n",
    "bad-date": b"name: r\ndate: 2026-13-45\nstages: {}\n",
    "number": b"name: 0x_\nstages: 3\n",
    "sexagesimal": b"name: r\nseed: 190:20:30\nstages: {}\n",
    "digits": b"name: r\nseed: " + b"9" * 5000 + b"\nstages: {}\n",
    "two": b"name: r\n---\nname: s\n",
    "percent": b"%YAML 9.9\n---\nname: r\n",
    "directive": b"%TAG ! !\n---\nname: r\n",
    "null-stages": b"name: r\nstages:\n",
    "no-stages": b"name: r\nstages: {}\n",
    "null-stage": b"name: r\nstages: {a: }\n",
    "text-stage": b"name: r\nstages: {a: b}\n",
    "no-kind": b"name: r\nstages: {a: {model: b}}\n",
    "list-kind": b"name: r\nstages: {a: {kind: [sft]}}\n",
    "object-kind": b"name: r\nstages: {a: {kind: {a: 1}}}\n",
    "number-stage": b"name: r\nstages: {1: {kind: sft}}\n",
    "null-name-stage": b"name: r\nstages: {~: {kind: sft}}\n",
    "list-stages": b"name: r\nstages: [{kind: sft}]\n",
    "dots": b"name: ..\nstages: {}\n",
    "slash": b"name: a/b\nstages: {}\n",
    "long-name": b"name: " + b"a" * 5000 + b"\nstages: {a: {kind: sft, model: x, data: y}}\n",
    "long-stage": b"name: r\nstages: {" + b"a" * 5000 + b": {kind: sft, model: x, data: y}}\n",
    "rounds-text": b"name: r\nrounds: x\nstages: {a: {kind: sft}}\n",
    "rounds-huge": b"name: r\nrounds: {n: 1000000000, reward: a, policy: b}\n"
    b"stages: {a: {kind: reward}, b: {kind: ppo}}\n",
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_broken_config_file_is_refused_by_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.yaml"
    path.write_bytes(FILES[name])
    began = time.monotonic()
    with pytest.raises(UsageError) as refused:
        read(path)
    assert time.monotonic() - began < LONGEST
    assert path.name in str(refused.value)
    assert len(str(refused.value)) < 12_000


OVERRIDES = [
    *("", "=", "a", "=1", "sft.lr", "sft.lr=[", "sft..lr=1", ".lr=1", "sft.lr.x=1", "sft=1", "stages=1"),
    *(
        "sft.data.0=1",
        "name=..",
        "name=",
        "seed=-1",
        "seed=1e400",
        "sft.lr=.inf",
        "sft.lr=.nan",
        "sft.lr=inf",
    ),
    *("sft.batch_size=true", "sft.epochs=0", "grpo.reward.7=x", "grpo.reward.0=", "grpo.reward.-1=x"),
    *(
        "sft.lr=" + "[" * 3000,
        "sft.lr=!!python/name:os.system",
        "sft.lr=&a [*a]",
        "sft.model=" + "x" * 100_000,
    ),
    *("stages.sft.kind=ppo", "stages.x.kind=sft", "sft.lr=1\n2: 3", "\0=1", "ppo.kl.coef=a", "ppo.kl=[1]"),
    *("ppo.kl.kl.kl=1", "device=[cpu]", "threads=0", "threads=1e9", "date=2026", "dtype=int8"),
    *("sft.lr=9" + "0" * 5000, "date=2026-06-31", "sft.seed=1", "name=" + "n" * 200),
]


@pytest.mark.parametrize("override", OVERRIDES)
def test_a_broken_override_is_refused_by_its_name(override: str, every_kind: Any, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"name": "r", "stages": every_kind}))
    with pytest.raises(UsageError) as refused:
        read(path, [override])
    assert str(refused.value)
    assert len(str(refused.value)) < 3000
