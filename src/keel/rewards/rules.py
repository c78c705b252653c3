"""Rewards that need no model: answers, formats, patterns, lengths, repetition.

Each function here takes settings and returns a reward of TRL's signature, `reward(prompts, completions,
**columns) -> list[float | None]`, with one value a completion; None: it does not apply to that row. A
completion is text or a conversation with one assistant turn; lengths in tokens come from `completion_ids`,
which count the stop token. Settings that make no sense raise UsageError when the reward is built.
"""

from __future__ import annotations

import difflib
import re
import threading
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal

from keel.data.chat import completion_text
from keel.errors import UsageError

Reward = Callable[..., list[float | None]]


# ---------------------------------------------------------------- answers


def final_answer(column: str = "answer", from_: Literal["marker", "last_number"] = "marker") -> Reward:
    """1 if the completion's final answer equals the reference's, 0 if not or if it gives none. Range {0, 1}.

    Source: GSM8K (2110.14168), whose references end in `#### 72`. The reference is what follows its last
    `####`, or all of it; None for a row without one. The completion's answer is what its last marker holds:
    the rest of the line after `####`, `\\boxed{}` or <answer></answer>. Without a marker there is none
    (`from_="marker"`), or it is the last number in the text (`from_="last_number"`). See `same_answer` for
    what counts as equal.

    UsageError at the first call if the data have no such column at all.
    """
    _one_of("from_", from_, ("marker", "last_number"))

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        return [
            None if reference is None else _is_right(reference, completion_text(completion), from_)
            for reference, completion in zip(column_of(columns, column), completions, strict=True)
        ]

    return reward


def column_of(columns: Mapping[str, Any], name: str) -> list[str | None]:
    """A column of references as text, one a row; None where the row has none (missing, or blank).

    UsageError if there is no such column, since a name mistyped would otherwise switch the reward off in
    silence.
    """
    if name not in columns:
        nearest = difflib.get_close_matches(name, list(columns), n=1)
        hint = (
            f"did you mean {nearest[0]!r}?"
            if nearest
            else f"there are {', '.join(sorted(columns)) or 'none'}"
        )
        raise UsageError(f"the data have no column {name!r}; {hint}")
    texts = [
        None if v is None else v if isinstance(v, (str, int, float)) else completion_text(v)
        for v in columns[name]
    ]
    return [None if text is None or not str(text).strip() else str(text) for text in texts]


def same_answer(reference: str, answer: str) -> bool:
    """Whether two final answers are equal.

    As exact numbers where both are one (signs, thousands' commas and spaces, $ € £, trailing zeros,
    fractions, `\\frac`, ½, mixed numbers, 5e-3; a percentage equals both its number and its hundredth), else
    as text without case and spacing. What differs that way is left to math-verify if it is installed (pip
    install math-verify), which knows algebra. It is not asked about two numbers, nor about numbers side by
    side, which it would multiply ("1 0" is 0), nor about words ("Paris" and "pairs" have the same letters).
    """
    reference, answer = _plain(reference), _plain(answer)
    if not answer or not reference:
        return False
    values, others = _numbers(reference), _numbers(answer)
    if reference.casefold() == answer.casefold() or values & others:
        return True
    if values and others:
        return False  # two numbers that differ
    if max(len(reference), len(answer)) > LONGEST_FORMULA or WORD.search(reference):
        return False
    if SIDE_BY_SIDE.search(reference) or SIDE_BY_SIDE.search(answer):
        return False
    return _math_verify(reference, answer)


LONGEST_FORMULA = 300  # characters; a longer text is no final answer, and parsing it could take minutes
LONGEST_NUMBER = 100
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")  # of prose, not a LaTeX command
DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
DECIMAL = rf"(?:{DIGITS}(?:\.\d*)?|\.\d+)"
NUMBER = re.compile(rf"([-+]?)\s*({DECIMAL})(?:[eE]([-+]?\d{{1,3}}))?(?:\s*/\s*({DECIMAL}))?(%?)")
MIXED = re.compile(r"([-+]?)\s*(\d+)\s+(\d+)\s*/\s*(\d+)(%?)")
LAST_NUMBER = re.compile(
    rf"(?:(?<![\w)])[-+−]\s?)?[$€£]?(?:(?<=[$€£])[-+−])?(?<!\w){DECIMAL}(?:/{DECIMAL})?(?:\s?\\?%)?"
)
SPACED = re.compile(r"[-+]?\d{1,3}(?: \d{3})+(?:\.\d+)?%?")  # thousands' spaces
POWER_OF_TEN = re.compile(
    r"(?<=\d)\s*(?:\\times|\\cdot|×|·|\*)\s*10\s*\^\s*(?:\{([-+]?\d{1,3})\}|([-+]?\d{1,3})(?!\d))"
)
SIDE_BY_SIDE = re.compile(r"\d\s+\d")
MARKER = re.compile(r"####|\\f?box(?:ed)?\s*\{|\\boxed\s+(?=[^\s{])|<answer>")


def _is_right(reference: str, completion: str, from_: str) -> float:
    gold = reference.rpartition("####")[2]
    answer = _marked(completion)
    if answer is None and from_ == "last_number":
        answer = next((match[0] for match in reversed(list(LAST_NUMBER.finditer(completion)))), None)
    return float(answer is not None and same_answer(gold, answer))


def _marked(text: str) -> str | None:
    """What the last marker of a final answer holds. Of two that are nested the inner one starts last. A
    `####` with more text below its line is a heading of Markdown, and counts where there is no other
    marker."""
    heading: str | None = None
    for marker in reversed(list(MARKER.finditer(text))):
        rest = text[marker.end() :]
        if marker[0] == "####":
            line, _, below = rest.lstrip(" \t").partition("\n")
            line = line.partition("</answer>")[0]
            if not below.strip() or "</answer>" in rest:
                return line
            heading = heading or line
            continue
        if not marker[0].endswith(("{", ">")):  # \boxed 5
            return rest.split()[0].rstrip("$.")
        content = rest.partition("</answer>") if marker[0] == "<answer>" else _up_to_brace(rest)
        if content[1]:  # one that is never closed holds nothing
            return content[0]
    return heading


def _up_to_brace(text: str) -> tuple[str, str]:
    """The text before the brace that closes one opened just before it, and that brace ("" if there is
    none)."""
    depth = 1
    for index, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:index], "}"
    return text, ""


def _plain(text: str) -> str:
    """The answer without LaTeX spacing and delimiters, currency signs, final dots and repeated spaces."""
    text = re.sub(
        r"\\(?:[,;:!]|left(?![a-z])|right(?![a-z]))", "", text.replace("−", "-").replace("{,}", ",")
    )
    text = re.sub(r"\\[dt]frac", r"\\frac", text).replace(r"\%", "%")
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\?\$|[€£]|\\[()\[\]]|\*\*", "", text)
    text = re.sub(r"[¼-¾⅐-⅞]", _written_out, text)
    return " ".join(text.split()).rstrip(". ")


def _written_out(fraction: re.Match[str]) -> str:
    """½ as 1/2, with a space before it behind a number: 1½ is 1 1/2."""
    behind_number = fraction.start() > 0 and fraction.string[fraction.start() - 1].isdigit()
    return " " * behind_number + unicodedata.normalize("NFKC", fraction[0]).replace("\u2044", "/")


def _numbers(text: str) -> set[Fraction]:
    """The exact values a plain text may stand for: one for a number, two for a percentage, none for other
    text."""
    if len(text) > LONGEST_NUMBER:
        return set()
    text = re.sub(r"(?<=\d)\\frac", r" \\frac", text)  # a mixed number
    text = re.sub(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", text)
    text = POWER_OF_TEN.sub(lambda match: f"e{match[1] or match[2]}", text)
    text = text.replace(" ", "") if SPACED.fullmatch(text) else text
    if mixed := MIXED.fullmatch(text):
        (sign, whole, over, under, percent), exponent = mixed.groups(), None
    elif number := NUMBER.fullmatch(re.sub(r"\s+%$", "%", text)):
        (sign, over, exponent, under, percent), whole = number.groups(), "0"
    else:
        return set()
    over, below = Fraction(over.replace(",", "")), Fraction((under or "1").replace(",", ""))
    if below == 0:
        return set()
    value = (int(whole) + over * Fraction(10) ** int(exponent or 0) / below) * (-1 if sign == "-" else 1)
    return {value, value / 100} if percent else {value}


def _math_verify(reference: str, answer: str) -> bool:
    try:
        from math_verify import parse, verify  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    # its time limits are alarms, which only the main thread may set
    limit: Any = 5 if threading.current_thread() is threading.main_thread() else None
    gold, parsed = (
        parse(f"${text.replace('%', chr(92) + '%')}$", parsing_timeout=limit) for text in (reference, answer)
    )
    return bool(gold and parsed and verify(gold, parsed, timeout_seconds=limit))


# ---------------------------------------------------------------- formats and patterns


def format_tags(tags: Sequence[str] = ("think", "answer"), partial: bool = False) -> Reward:
    """1 if the completion is <think>…</think><answer>…</answer> and nothing else, 0 if not. Range {0, 1}.

    Source: DeepSeek-R1 (2501.12948), format reward. Spaces and newlines may stand around the blocks; a block
    may be empty; none of the tags may appear a second time. `partial`: the share of the 2·len(tags) opening
    and closing tags that appear exactly once and in order, whatever text stands around them. Range [0, 1].
    A tag that the prompt has opened already (its template ends in `<think>`) counts as the completion's own.
    """
    _some_words("tags", tags)
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    any_mark = "|".join(map(re.escape, marks))
    blocks = (rf"{re.escape(f'<{tag}>')}(?:(?!{any_mark}).)*{re.escape(f'</{tag}>')}\s*" for tag in tags)
    whole = re.compile(r"\s*" + "".join(blocks), re.DOTALL)

    def score(text: str) -> float:
        return _in_order(marks, text) / len(marks) if partial else float(bool(whole.fullmatch(text)))

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        known = columns.get("opened_thought") or [""] * len(prompts)
        opened = [mark or _opened_by(prompt, tags) for prompt, mark in zip(prompts, known, strict=True)]
        texts = [completion_text(completion) for completion in completions]
        return [
            score((mark if mark in marks else "") + text) for mark, text in zip(opened, texts, strict=True)
        ]

    return reward


def _opened_by(prompt: Any, tags: Sequence[str]) -> str:
    """The opening tag that a prompt of plain text ends in; "" for none."""
    text = prompt.rstrip() if isinstance(prompt, str) else ""
    return next((f"<{tag}>" for tag in tags if text.endswith(f"<{tag}>")), "")


def _in_order(marks: Sequence[str], text: str) -> int:
    """How many of the marks appear once and can be read in order: the longest rising run of their places."""
    ends: list[int] = []  # ends[k]: the least place at which a rising run of k + 1 marks can end
    for position in (text.index(mark) for mark in marks if text.count(mark) == 1):
        at = bisect_left(ends, position)
        ends[at : at + 1] = [position]
    return len(ends)


def regex(pattern: str, full: bool = False) -> Reward:
    """1 if the pattern is found in the completion (`full`: is all of it), 0 if not. Range {0, 1}.

    Python's `re`; a dot matches newlines, since replies have lines ((?-s:.) is one that does not), and (?i)
    at the start ignores case.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise UsageError(f"regex: {pattern!r} is no regular expression: {error}") from None
    find = compiled.fullmatch if full else compiled.search
    return _of_text(lambda text: float(find(text) is not None))


def keywords(
    words: Sequence[str], mode: Literal["any", "all", "share", "none"] = "any", ignore_case: bool = True
) -> Reward:
    """Whether the completion has the words or phrases, as whole words. Range {0, 1}; [0, 1] for "share".

    "any": 1 if at least one is there. "all": 1 if each is. "share": the share that is. "none": 1 if not one
    is.
    """
    _some_words("words", words)
    _one_of("mode", mode, ("any", "all", "share", "none"))
    flags = re.IGNORECASE if ignore_case else 0
    patterns = [
        re.compile(r"(?<!\w)" + r"\s+".join(map(re.escape, word.split())) + r"(?!\w)", flags)
        for word in words
    ]

    def score(text: str) -> float:
        count = sum(pattern.search(text) is not None for pattern in patterns)
        results = {
            "any": float(count > 0),
            "all": float(count == len(patterns)),
            "share": count / len(patterns),
            "none": float(count == 0),
        }
        return results[mode]

    return _of_text(score)


# ---------------------------------------------------------------- length and repetition


def length_band(
    low: float, high: float, unit: Literal["tokens", "words", "characters"] = "tokens", slack: float = 0
) -> Reward:
    """1 while low ≤ |y| ≤ high, else max(0, 1 − d/slack) at a distance d from the band; 0 with no slack.
    Range [0, 1].

    |y| counts tokens (the stop token too), words between white space, or characters.
    """
    _one_of("unit", unit, ("tokens", "words", "characters"))
    if not 0 <= low <= high:
        raise UsageError(f"length_band: low {low} and high {high} must be 0 ≤ low ≤ high")
    if slack < 0:
        raise UsageError(f"length_band: slack {slack} must not be negative")

    def score(length: int) -> float:
        distance = max(low - length, length - high, 0)
        return 1.0 if distance == 0 else max(0.0, 1 - distance / slack) if slack > 0 else 0.0

    if unit == "tokens":
        return _of_token_count(score)
    return _of_text(lambda text: score(len(text.split()) if unit == "words" else len(text)))


def repetition(n: int = 3) -> Reward:
    """Minus the share of n-grams that are repeats: distinct/all − 1. Range (−1, 0]; 0 is best.

    Source: 2502.03373, appendix C.2 (with weight −1); over words without case here, over tokens there. A
    completion of fewer than n words has no n-gram and gets 0.
    """
    if n < 1:
        raise UsageError(f"repetition: n {n} must be at least 1")

    def score(text: str) -> float:
        words = text.casefold().split()
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        return len(set(grams)) / len(grams) - 1 if grams else 0.0

    return _of_text(score)


def overlong(max_length: int, buffer: int) -> Reward:
    """DAPO's soft overlong punishment (2503.14476, eq. 13), |y| in tokens. Range [−1, 0].

    0 for |y| ≤ L_max − L_buffer; (L_max − L_buffer − |y|)/L_buffer up to L_max; −1 beyond it. The paper calls
    the buffer L_cache.
    """
    if not 0 <= buffer <= max_length or max_length < 1:
        raise UsageError(
            f"overlong: buffer {buffer} and max_length {max_length} must be 0 ≤ buffer ≤ max_length, "
            "max_length ≥ 1"
        )
    soft = max_length - buffer

    def score(length: int) -> float:
        return 0.0 if length <= soft else (soft - length) / buffer if length <= max_length else -1.0

    return _of_token_count(score)


# ---------------------------------------------------------------- inside


def _of_text(score: Callable[[str], float]) -> Reward:
    def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        return [score(completion_text(completion)) for completion in completions]

    return reward


def _of_token_count(score: Callable[[int], float]) -> Reward:
    def reward(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> list[float | None]:
        return [score(len(ids)) for ids in completion_ids]

    return reward


def _one_of(setting: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UsageError(f"{setting}: {value!r} is not one of {', '.join(known)}")


def _some_words(setting: str, words: Sequence[str]) -> None:
    if isinstance(words, str) or not words or not all(isinstance(w, str) and w.strip() for w in words):
        raise UsageError(f"{setting}: {words!r} must be a list of at least one word")
