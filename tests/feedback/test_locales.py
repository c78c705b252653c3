"""Every language has every text, and every text that a page asks for is there."""

from __future__ import annotations

import json
import re

import pytest

from keel.feedback import locales

ENGLISH = json.loads((locales.FOLDER / "en.json").read_text(encoding="utf-8"))
SOURCES = [
    path
    for path in locales.FOLDER.parent.rglob("*")
    if path.suffix in (".html", ".py") and "formats" not in path.parts
]


@pytest.mark.parametrize("language", sorted(set(locales.LANGUAGES) - {"en"}))
def test_a_language_has_every_text_with_the_same_values(language):
    own = json.loads((locales.FOLDER / f"{language}.json").read_text(encoding="utf-8"))
    assert own.keys() == ENGLISH.keys()
    values = {key: set(re.findall(r"\{\w*\}", text)) for key, text in own.items()}
    assert values == {key: set(re.findall(r"\{\w*\}", text)) for key, text in ENGLISH.items()}
    words = {key: re.sub(r"\{\w*\}|\W", "", text) for key, text in own.items()}
    same = [key for key, text in own.items() if text == ENGLISH[key] and len(words[key]) > 12]
    assert same == []


def test_every_text_that_a_page_names_is_there():
    asked = {
        key
        for path in SOURCES
        for key in re.findall(
            r"\b(?:_|words|translator\(request\))\(\s*[\"']([\w.-]+)[\"']\s*[,)]", path.read_text("utf-8")
        )
        if "." in key
    }
    assert len(asked) > 120
    assert asked - ENGLISH.keys() == set()


def test_every_text_is_asked_for_somewhere():
    text = "".join(path.read_text("utf-8") for path in SOURCES)
    groups = set(re.findall(r"[\"']([\w-]+\.(?:title\.)?)[\"'] ?~", text)) | {
        "settings.",
        "choice.",
        "error.",
    }
    groups |= set(re.findall(r"f[\"']([\w-]+\.(?:strength_)?)\{", text)) | {"paused.", "form.", "problem."}
    unused = [k for k in ENGLISH if k not in text and not any(k.startswith(group) for group in groups)]
    assert unused == []


@pytest.mark.parametrize(
    ("accept", "wished", "language"),
    [
        ("tr-TR,tr;q=0.9,en;q=0.8", None, "tr"),
        ("fr, ko;q=0.4, zh-Hans-CN;q=0.7", None, "zh"),
        ("fr", None, "en"),
        ("", None, "en"),
        ("en", "ko", "ko"),
        ("tr", "xx", "tr"),
        ("tr;q=0, ko;q=oops", None, "en"),
    ],
)
def test_the_language_is_the_one_wished_or_accepted(accept, wished, language):
    assert locales.best(accept, wished) == language
