"""Addresses of servers in a config: where one is, and nothing that has to stay secret."""

from __future__ import annotations

from urllib.parse import urlsplit


def plain_address(value: str, example: str, added: str) -> str:
    """The address itself. ValueError for what is none, for one that holds a key, and for one that ends with
    what keel adds to it. example: how one is written."""
    try:
        parts = urlsplit(value)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        raise ValueError(f"{value!r} is no address; write {example}") from None
    if not sound:
        raise ValueError(f"{value!r} is no address; write {example}")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(
            "an address holds no key: a run writes its settings down. Name a variable in `api_key_env`"
        )
    if parts.path.rstrip("/").endswith(added):
        raise ValueError(f"leave {added} out of {value!r}: it is added")
    return value
