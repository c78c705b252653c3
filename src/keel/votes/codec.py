# pyright: strict
"""Values as the database keeps them: canonical JSON, and digests of it."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, cast

from keel.errors import UsageError
from keel.votes.kinds import Answer, Project, Reply, Scale

_ANSWER_FIELDS = ("choice", "strength", "ratings", "ranking", "text")  # a comment is kept apart


def dumps(value: object) -> str:
    """A value as JSON, the same for equal values. ValueError or TypeError for what JSON has no word for."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate: no database takes it as it is
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text


def loads(text: str) -> Any:
    return json.loads(text)


def digest(value: object) -> str:
    """SHA-256 of a value's canonical JSON, in hexadecimal."""
    return hashlib.sha256(dumps(value).encode("utf-8")).hexdigest()


def hashed(secret: str) -> str:
    """What is kept of a code or token: its SHA-256. They have 32 random bytes, so no salt is needed."""
    return hashlib.sha256(secret.encode("utf-8")).hexdigest()


def new_salt() -> str:
    return secrets.token_hex(16)


def salted(salt: str, text: str) -> str:
    """Digest of a private text. Without the salt, which is removed with the text, it says nothing of it."""
    return digest([salt, text])


def clean(text: str) -> str:
    """Text that every database takes: NUL and lone surrogates become U+FFFD."""
    return text.replace("\x00", "\ufffd").encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def answer_json(answer: Answer) -> str:
    """An answer without its comment."""
    values = {name: getattr(answer, name) for name in _ANSWER_FIELDS}
    if answer.ratings is not None:
        values["ratings"] = dict(answer.ratings)
    if answer.ranking is not None:
        values["ranking"] = [list(group) for group in answer.ranking]
    return dumps({name: value for name, value in values.items() if value is not None})


def answer_of(text: str, comment: str = "") -> Answer:
    return Answer(**loads(text), comment=comment)


def replies_json(replies: Sequence[Reply]) -> str:
    return dumps([[reply.content, reply.source] for reply in replies])


def replies_of(text: str) -> tuple[Reply, ...]:
    return tuple(Reply(content, source) for content, source in loads(text))


def project_json(project: Project) -> str:
    """A project's settings. Its name is a column of its own."""
    values: dict[str, Any] = {}
    for name in Project.__dataclass_fields__:
        if name != "name":
            values[name] = getattr(project, name)
    values["scales"] = [
        {field: getattr(scale, field) for field in Scale.__dataclass_fields__} for scale in project.scales
    ]
    return dumps(values)


def project_of(name: str, text: str) -> Project:
    values = cast(dict[str, Any], loads(text))
    values["scales"] = tuple(Scale(**scale) for scale in values["scales"])
    values["allow"] = tuple(values["allow"])
    return Project(name=name, **values)


def checked_json(where: str, value: object) -> str:
    """A value as JSON. UsageError, which names `where`, for what JSON has no word for."""
    try:
        return dumps(value)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where} cannot be kept as JSON: {error}") from None


def plain(value: Any) -> Any:
    """A conversation's turns as plain dicts and lists."""
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in cast(Mapping[str, Any], value).items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(part) for part in cast(Sequence[Any], value)]
    return value
