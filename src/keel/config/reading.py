"""A config from YAML with dotted overrides; every error names the key, and an unknown key its nearest
match."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import yaml
from pydantic import BaseModel, ValidationError

from keel import errors
from keel.config import elsewhere
from keel.config.collect import expanded
from keel.config.plain import plain_copy, read_yaml
from keel.config.run import KINDS, RunConfig, config_of_kind, plugin_kinds
from keel.config.settings import other_names
from keel.data.values import shown


class _Loader(yaml.SafeLoader):
    """YAML without the silent loss of a key that is written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice!r} appears twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def read(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The validated config at `path` with `dotted.key=value` overrides applied (values are YAML).

    Raises UsageError that names the key, what is wrong with it and, for an unknown key, the nearest one.
    """
    return parse(read_mapping(path), str(path), overrides)


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML file that is a mapping. UsageError for any other, and for one that is not there."""
    try:
        tree = plain_copy(read_yaml(path.read_text(encoding="utf-8"), _Loader))
    except FileNotFoundError:
        raise errors.UsageError(f"no config at {path}") from None
    except errors.UsageError as error:
        raise errors.UsageError(f"{path}: {error}") from None
    except (OSError, ValueError) as error:  # UnicodeDecodeError is one
        if path.suffix.lower() not in (".yaml", ".yml", ".json", ""):
            raise errors.UsageError(
                f"{path} is no config: a config is a YAML file with `name` and `stages`"
            ) from None
        raise errors.UsageError(f"{path} cannot be read as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise errors.UsageError(f"{path} is not a mapping: a config has `name` and `stages`")
    return tree


def parse(tree: Mapping[str, Any], origin: str = "config", overrides: Sequence[str] = ()) -> RunConfig:
    """The validated config of an already read mapping, which is left as it is; errors as in `read`."""
    changed: dict[str, Any] = plain_copy(dict(tree))
    if "kind" in changed and "stages" not in changed:
        raise errors.UsageError(
            f"{origin} is one stage alone: put its settings below a name in `stages`, and give the run a "
            f"`name`: {{name: mine, stages: {{{changed['kind']}: {{kind: {changed['kind']}, …}}}}}}"
        )
    for override in overrides:
        _override(changed, override)
    changed = plain_copy(changed)  # what overrides brought, too
    try:
        return RunConfig.model_validate(changed)
    except ValidationError as error:
        lines = [_explain(item, changed) for item in error.errors()]
        raise errors.UsageError(f"{origin}:\n  " + "\n  ".join(dict.fromkeys(lines))) from None


def _override(tree: dict[str, Any], override: str) -> None:
    """Set one `dotted.key=value`; a leading stage name may leave out `stages.`, a number is a place in a
    list."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise errors.UsageError(f"{override!r} is not an override: write dotted.key=value")
    parts, stages = key.split("."), expanded(tree).get("stages")
    stages = stages if isinstance(stages, dict) else {}
    if parts[0] in stages:
        parts = ["stages", *parts]
    elif parts[0] not in RunConfig.model_fields:
        known = {*stages, *RunConfig.model_fields}
        raise errors.UsageError(f"{override!r}: no stage or setting {parts[0]!r}{_nearest(parts[0], known)}")
    if len(parts) > 1 and parts[0] == "stages" and parts[1] not in stages:
        raise errors.UsageError(f"{override!r}: no stage {parts[1]!r}{_nearest(parts[1], stages)}")
    node: Any = tree
    for part in parts[:-1]:
        node = _inside(node, part, override)
    last = _place(node, parts[-1], override)
    for name in other_names(node, last):
        node.pop(name, None)  # an override takes the place of the setting, whichever name the file uses
    try:
        node[last] = read_yaml(value, _Loader)
    except ValueError as error:
        raise errors.UsageError(f"{override[:200]!r}: the value is not YAML: {error}") from None


def _inside(node: dict[str, Any] | list[Any], part: str, override: str) -> Any:
    """The mapping or list at `part` of `node`, made where there is none; short forms are written out
    first."""
    place = _place(node, part, override)
    value = node[place] if isinstance(node, list) else node.get(place)
    if isinstance(value, str) and part in ("model", "data", "eval_data", "comparisons"):
        value = {"path" if part == "model" else "source": value}
    if not isinstance(value, dict | list):
        value = {}
    node[place] = value
    return value


def _place(node: dict[str, Any] | list[Any], part: str, override: str) -> Any:
    """`part` as a key of a mapping or an index of a list."""
    if isinstance(node, dict):
        return part
    if not part.isdigit() or int(part) >= len(node):
        raise errors.UsageError(
            f"{override!r}: there is a list of {len(node)}; {part!r} must be a place in it, from 0"
        )
    return int(part)


def _nearest(word: str, known: Sequence[str] | Mapping[str, Any] | set[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.65)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"


def _explain(item: Mapping[str, Any], tree: Mapping[str, Any]) -> str:
    """One error of pydantic in a line: where in the config, and what is wrong there."""
    place = _written(item["loc"], tree)
    dotted, message = ".".join(place), item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        kind = item["loc"][2] if place[0] == "stages" and len(item["loc"]) > 3 else None
        theirs = elsewhere.hint(place[-1], kind, dotted_settings(KINDS[kind])) if kind in KINDS else None
        return f"{dotted}: unknown key{theirs or _nearest(place[-1], _known_keys(item['loc'], tree))}"
    if item["type"] == "union_tag_invalid":
        kind = str(item["ctx"]["tag"])[:100]
        if len(place) > 2:  # of a reward, not of a stage
            known = {tag.strip().strip("'") for tag in str(item["ctx"]["expected_tags"]).split(",")}
            return f"{dotted}: unknown kind {kind!r}{_nearest(kind, known)}"
        return f"{dotted}: unknown kind {kind!r}{elsewhere.method_hint(kind) or _nearest(kind, KINDS)}"
    if item["type"] == "union_tag_not_found":
        if len(place) > 2:
            return f"{dotted}: `kind` is missing"
        return f"{dotted}: `kind` is missing; known: {', '.join([*KINDS, *plugin_kinds()])}"
    if item["type"] == "missing":
        return f"{dotted}: missing{_MEANT.get(place[-1], '')}"
    if message.startswith("Input should be "):
        given = item["input"]
        given = _number_shown(given) if type(given) in (int, float) else shown(given)
        message = f"{_plain(message)}, not {given}{_FORMS.get(place[-1], '')}"
    return f"{dotted}: {message}" if dotted else message


_CHOICES = re.compile(  # what pydantic calls the choices of a union, within the place of an error
    r"(?:[a-z-]+\[.*|(?:function|constrained|lax-or-strict|json-or-python)-.*|str|int|float|bool|none|[A-Z]\w+)\Z",
    re.DOTALL,
)


def _written(location: Sequence[Any], tree: Any) -> list[str]:
    """The place of an error as it is written in the config's `tree`, without pydantic's names of choices and
    the kinds that it puts in."""
    place: list[str] = []
    node = tree
    for part in location:
        if isinstance(node, list):
            known = isinstance(part, int) and part < len(cast("list[object]", node))
        else:
            known = isinstance(node, Mapping) and part in node
        tag = isinstance(node, Mapping) and part == node.get("kind")
        if known or not isinstance(part, str) or not (tag or _CHOICES.match(part)):
            place.append(str(part))
        node = node[part] if known else node  # pyright: ignore[reportArgumentType, reportCallIssue]
    return place


def _number_shown(given: float) -> str:
    text = str(given)
    return text if len(text) <= 40 else f"{text[:20]}… ({len(text):,} digits)"


_MEANT = {  # what a setting that is missing is
    "name": "; what the run is called",
    "stages": "; a mapping from the names of stages to their settings",
    "model": "; a stage, a folder or a hub id",
    "data": "; a file, a folder, a hub id, world:NAME/SPLIT or gym:NAME",
    "models": "; a list of stages, folders or hub ids",
    "reward": "; a reward stage, python:FILE.py:FUNCTION or a list of terms",
}
_FORMS = {  # how a setting is written that was written otherwise
    "lora": "; write {} for the defaults, or {r: 8}",
    "stages": "; it maps the names of stages to their settings",
    "models": "; write [sft, ppo]",
}
_WORDS = (  # pydantic's → what a person calls it
    (r"Input should be ", "must be "),
    (r", unable to .*", ""),
    (r"a valid dictionary or instance of \w+", "a mapping of settings"),
    (r"a valid dictionary", "a mapping"),
    (r"a valid list", "a list"),
    (r"a valid number", "a number"),
    (r"a valid integer(, got a number with a fractional part)?", "a whole number"),
    (r"a valid string", "text"),
    (r"a valid boolean", "true or false"),
    (r"greater than or equal to", "at least"),
    (r"less than or equal to", "at most"),
)


def _plain(message: str) -> str:
    """What pydantic says of a value, in the words of a config."""
    for theirs, ours in _WORDS:
        message = re.sub(theirs, ours, message)
    return message


def _known_keys(location: Sequence[Any], tree: Mapping[str, Any]) -> set[str]:
    """Names of the settings that the group at `location` of a config's `tree` knows."""
    group: type[BaseModel] = RunConfig
    choices: list[type[BaseModel]] = []  # the groups that may stand where the last setting does
    for depth, part in enumerate(location[:-1]):
        if depth == 2 and part in KINDS:
            group = KINDS[part]
        elif depth == 1 and location[0] == "stages" and (kind := _added_kind(tree, part)):
            group = config_of_kind(kind)
        elif chosen := next((choice for choice in choices if part in _kinds_of(choice)), None):
            group = chosen  # pydantic's tag of the one whose `kind` is written
        elif isinstance(part, str) and part in group.model_fields:
            choices = list(_groups_of(group.model_fields[part].annotation))
            group = choices[0] if choices else group
    return set(group.model_fields)


def _added_kind(tree: Mapping[str, Any], stage: object) -> str | None:
    """The kind of a stage, where another package adds it."""
    settings = (tree.get("stages") or {}).get(stage)
    kind = settings.get("kind") if isinstance(settings, Mapping) else None
    return kind if kind in plugin_kinds() else None


def _groups_of(annotation: object) -> Iterator[type[BaseModel]]:
    """The groups of settings that an annotation allows, whole stages aside."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if annotation not in KINDS.values():
            yield annotation
        return
    for part in get_args(annotation):
        yield from _groups_of(part)


def dotted_settings(group: type[BaseModel], prefix: str = "") -> set[str]:
    """Every setting of a group, and of the groups in it, as it is written in an override."""
    names: set[str] = set()
    for name, field in group.model_fields.items():
        names.add(prefix + name)
        for inner in _groups_of(field.annotation):
            names |= {f"{prefix}{name}.{key}" for key in inner.model_fields}
    return names


def _kinds_of(group: type[BaseModel]) -> tuple[Any, ...]:
    """What may be written as the `kind` of a group; () where it has none."""
    kind = group.model_fields.get("kind")
    return () if kind is None else get_args(kind.annotation)
