"""What every group of settings has in common: no unknown keys, no changes, and one rule for renamed keys."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, model_validator

from keel.errors import DeprecationNote

if TYPE_CHECKING:
    from pydantic import GetJsonSchemaHandler
    from pydantic.json_schema import JsonSchemaValue
    from pydantic_core import CoreSchema


LARGEST = 2**31 - 1  # whole numbers that a setting may have
SEED = 2**63 - 1
LARGEST_FLOAT = 1e15
LONGEST_PATH = 4096  # characters of a path or a hub id


class Settings(BaseModel):
    """A group of settings: immutable, and no key that it does not know.

    A key that was renamed stands in `renamed`. Its former name is read for one more version: a
    DeprecationNote names the new one, and only the new one is written into a run's resolved config.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)
    renamed: ClassVar[Mapping[str, str]] = {}  # former key → key
    idle: ClassVar[frozenset[str]] = frozenset()  # settings on which no result depends

    @model_validator(mode="before")
    @classmethod
    def _take_former_keys(cls, values: object) -> object:
        return cls.with_todays_keys(values) if isinstance(values, Mapping) else values

    @model_validator(mode="before")
    @classmethod
    def _no_truth_value_for_a_number(cls, values: object) -> object:
        """pydantic would read true as 1."""
        for name, value in values.items() if isinstance(values, Mapping) else ():
            if name in cls.model_fields and _only_numbers(cls, name):
                truth = _truth_value_in(value)
                if truth is not None:
                    raise ValueError(f"`{name}`: {str(truth).lower()} is no number")
        return values

    @classmethod
    def with_todays_keys(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values with former keys replaced by today's. ValueError where both are given."""
        given = dict(values)
        for former, key in cls.renamed.items():
            if former not in given:
                continue
            if key in given:
                raise ValueError(f"`{former}` is the former name of `{key}`: give `{key}` only")
            given[key] = given.pop(former)
            kind = given.get("kind")
            where = f" (kind: {kind})" if isinstance(kind, str) else ""
            warnings.warn(
                f"`{former}`{where} is now called `{key}`; write that", DeprecationNote, stacklevel=3
            )
        return given

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """The JSON Schema of the group, with its former keys as deprecated copies of today's."""
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).get("properties", {})
        for former, key in cls.renamed.items():
            note = {"deprecated": True, "description": f"Former name of `{key}`."}
            properties[former] = {**properties[key], **note}
        return schema

    @model_validator(mode="after")
    def _of_this_world(self) -> Settings:
        for name, value in self:
            if (found := _beyond(value, SEED if name == "seed" else LARGEST, name)) is not None:
                raise ValueError("`{}` {}".format(*found))
        return self

    def decisive(self) -> dict[str, Any]:
        """The settings that results depend on, as JSON has them: without those in `idle`, in groups inside,
        too."""
        return _decisive(self, self.model_dump(mode="json"))

    def changes(self, name: str) -> bool:
        """Whether a setting differs from its default. A value that is written out and equals the default is
        no change: a run's resolved config, which writes every value, can be read again. Nor is one that a
        subclass has made a constant."""
        field = type(self).model_fields.get(name)
        if field is None and hasattr(type(self), name):
            return False
        field = field or type(self).model_fields[name]
        return getattr(self, name) != field.get_default(call_default_factory=True)


def _decisive(value: Any, dumped: Any) -> Any:
    """What was dumped of a value, without settings on which no result depends."""
    if isinstance(value, Settings):
        return {
            name: _decisive(getattr(value, name), inside)
            for name, inside in dumped.items()
            if name not in type(value).idle
        }
    if isinstance(value, (list, tuple)):
        return [_decisive(*pair) for pair in zip(value, dumped, strict=True)]
    if isinstance(value, Mapping):
        items = zip(value.values(), dumped.items(), strict=True)
        return {key: _decisive(inside, shown) for inside, (key, shown) in items}
    return dumped


@cache
def _only_numbers(group: type[BaseModel], name: str) -> bool:
    """Whether a setting takes numbers, alone or in lists, and neither truth values nor groups of settings."""
    kinds = set(_kinds_in(group.model_fields[name].annotation))
    groups = any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in kinds)
    return bool(kinds & {int, float}) and not kinds & {bool, Any} and not groups


def _truth_value_in(value: object) -> bool | None:
    """The first truth value in a setting, in lists and mappings too."""
    if isinstance(value, bool):
        return value
    inner: Any = value.values() if isinstance(value, Mapping) else value
    if not isinstance(value, (list, tuple, Mapping)):
        return None
    return next((found for one in inner if (found := _truth_value_in(one)) is not None), None)


def _kinds_in(annotation: object) -> Iterator[Any]:
    parts = get_args(annotation)
    yield from (kind for part in parts for kind in _kinds_in(part)) if parts else (annotation,)


def other_names(group: object, key: object) -> set[str]:
    """The names of the same setting beside `key`, in a group as it is written (a mapping with a `kind`): the
    former name of a renamed key, or today's name of a former one."""
    if not isinstance(group, Mapping):
        return set()
    names: set[str] = set()
    waiting = [Settings]
    while waiting:
        settings = waiting.pop()
        waiting += settings.__subclasses__()
        kind = settings.model_fields.get("kind")
        if kind is not None and group.get("kind") in get_args(kind.annotation):
            names |= {
                other
                for pair in settings.renamed.items()
                for name, other in (pair, pair[::-1])
                if name == key
            }
    return names


def _beyond(value: object, largest: int, key: str) -> tuple[str, str] | None:
    """The key and what is wrong there with a number in a setting, in lists and mappings too: infinite, NaN,
    or larger than anything that it could mean. This is the one guard, for YAML and for Python."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int) and abs(value) > largest:
        return key, f"is too large: at most {largest:,}"
    if isinstance(value, float) and not abs(value) <= LARGEST_FLOAT:
        return key, f"is {value}: it must be a finite number, at most {LARGEST_FLOAT:g}"
    if isinstance(value, (list, tuple)):
        inner: Any = enumerate(value)
    elif isinstance(value, Mapping):
        inner = value.items()
    elif isinstance(value, BaseModel) and not isinstance(value, Settings):  # which looks after itself
        inner = dict(value).items()
    else:
        return None
    below = (_beyond(one, largest, f"{key}.{name}") for name, one in inner)
    return next((found for found in below if found is not None), None)
