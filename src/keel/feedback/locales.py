"""The pages' words in English, Chinese, Turkish and Korean. A language is one JSON file in `locale/`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).with_name("locale")
LANGUAGES: dict[str, str] = {"en": "English", "zh": "中文", "tr": "Türkçe", "ko": "한국어"}


@cache
def words(language: str) -> Mapping[str, str]:
    """Key → text of a language; English where a text is missing."""
    own: dict[str, str] = json.loads((FOLDER / f"{language}.json").read_text(encoding="utf-8"))
    return own if language == "en" else {**words("en"), **own}


class Translator:
    """`_("work.today", n=3)`: the text of a key with its values put in. KeyError for an unknown key."""

    def __init__(self, language: str) -> None:
        self.language = language
        self._words = words(language)

    def __call__(self, key: str, **values: object) -> str:
        text = self._words[key]
        return text.format(**values) if values else text

    def known(self, key: str, otherwise: str) -> str:
        """The text of a key that may be none, as a name that a project gave itself."""
        return self._words.get(key, otherwise)


def best(accept: str, wished: str | None = None) -> str:
    """The language to use: the one wished, else the first that the browser accepts (RFC 9110, 12.5.4)."""
    if wished in LANGUAGES:
        return str(wished)
    ranked: list[tuple[float, int, str]] = []
    for place, part in enumerate(accept.split(",")):
        tag, *parameters = (piece.strip() for piece in part.split(";"))
        weight = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                try:
                    weight = float(parameter[2:])
                except ValueError:
                    weight = 0.0
        ranked.append((-weight, place, tag.split("-")[0].lower()))
    return next((tag for weight, _, tag in sorted(ranked) if tag in LANGUAGES and weight < 0), "en")
