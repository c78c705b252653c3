"""Made-up runs by their module's name, and a browser for the tests that need one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def browse(chromium: Any) -> Iterator[Any]:
    """Opens a page: browse(address, width, scheme). At the end nothing may have been said on its console.

    What the browser says of the network once a server was told to end is no fault of a page: a stream that a
    busy machine did not end in time is cut off (net::ERR_INCOMPLETE_CHUNKED_ENCODING)."""
    from serving import ended

    said: list[str] = []
    before = len(ended)

    def note(text: str) -> None:
        if "net::ERR_" not in text or len(ended) == before:
            said.append(text)

    contexts: list[Any] = []

    def opened(address: str, width: int = 1280, scheme: str = "light") -> Any:
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda message: note(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(address)
        page.wait_for_selector("html[data-ready]")
        return page

    opened.said = said  # type: ignore[attr-defined]
    yield opened
    for context in contexts:
        context.close()
    assert said == []
