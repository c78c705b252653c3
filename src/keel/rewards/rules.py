"""Rewards that need no model: answers, formats, patterns, lengths, repetition.

Each function here takes settings and returns a reward of TRL's signature, `reward(prompts, completions,
**columns) -> list[float | None]`, with one value a completion; None: it does not apply to that row. A
completion is text or a conversation, of which the assistant's turns are judged; lengths in tokens come from
`completion_ids`, which count the stop token. Settings that make no sense raise UsageError when the reward is
built.
"""

from __future__ import annotations

import difflib
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from keel.data.chat import completion_text, own_text
from keel.data.questions import VERDICTS, Rubric, choice, on_scale, score
from keel.errors import UsageError
from keel.rewards import answers
from keel.rewards.answers import same_answer
from keel.rewards.isolated import Process

Reward = Callable[..., list[float | None]]
OWN_LENGTHS = "own_lengths"  # column of episodes with tools: how many tokens are the model's own


# ---------------------------------------------------------------- answers


def final_answer(column: str = "answer", from_: Literal["marker", "last_number"] = "marker") -> Reward:
    """1 if the completion's final answer equals the reference's, 0 if not or if it gives none. Range {0, 1}.

    Source: GSM8K (2110.14168), whose references end in `#### 72`. The reference is what follows its last
    `####`, or what its last \\boxed{} or <answer> holds, or all of it; None for a row without one. The
    completion's answer is what its last marker holds: the rest of the line after `####`, `\\boxed{}` or
    <answer></answer>. Without a marker there is none (`from_="marker"`), or it is the last number in the text
    (`from_="last_number"`). See `answers.same_answer` for what counts as equal.

    UsageError at the first call if the data have no such column at all.
    """
    _one_of("from_", from_, ("marker", "last_number"))

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        return [
            None if reference is None else _is_right(reference, own_text(completion), from_)
            for reference, completion in zip(column_of(columns, column), completions, strict=True)
        ]

    return reward


def verdict(column: str = "better") -> Reward:
    """1 if the completion ends in the verdict that the row holds (A, B or tie), 0 if in another or in none.
    Range {0, 1}.

    A verdict is read as a judge's is (`keel.data.questions.choice`): what learns to earn this can be one.
    None for a row without a verdict. UsageError at the first call if the data have no such column at all, or
    one with something else in it.
    """

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        right = column_of(columns, column)
        for value in right:
            if value is not None and value not in VERDICTS:
                raise UsageError(f"column {column!r} holds {value!r}, and a verdict is A, B or tie")
        return [
            None if wanted is None else float(choice(own_text(completion)) == wanted)
            for wanted, completion in zip(right, completions, strict=True)
        ]

    return reward


def score_verdict(rubric: Rubric, column: str = "score") -> Reward:
    """1 − |given − right| / (high − low of the scale): how near the score that a completion ends in is to the
    row's; 0 for a completion that ends in none. Range [0, 1].

    A score is read as a pointwise judge's is (`keel.data.questions.score`): of several criteria the weighted
    mean. None for a row without a score. UsageError at the first call if the data have no such column at all,
    or one with something else in it.
    """

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        paid: list[float | None] = []
        for text, completion in zip(column_of(columns, column), completions, strict=True):
            try:
                right = None if text is None else on_scale(text, rubric)
            except ValueError as error:
                raise UsageError(f"column {column!r} {error}") from None
            given = score(own_text(completion), rubric)
            paid.append(None if right is None else 0.0 if given is None else 1 - abs(given - right))
        return paid

    return reward


def column_of(columns: Mapping[str, Any], name: str) -> list[str | None]:
    """A column of references as text, one a row; None where the row has none (missing, or blank).

    UsageError if there is no such column, since a name mistyped would otherwise switch the reward off in
    silence.
    """
    check_column(columns, name)
    texts = [
        None if v is None else v if isinstance(v, (str, int, float)) else completion_text(v)
        for v in columns[name]
    ]
    return [None if text is None or not str(text).strip() else str(text) for text in texts]


def check_column(columns: Mapping[str, Any], name: str) -> None:
    """UsageError, with the nearest name, if there is no such column."""
    if name not in columns:
        nearest = difflib.get_close_matches(name, list(columns), n=1)
        hint = (
            f"did you mean {nearest[0]!r}?"
            if nearest
            else f"there are {', '.join(sorted(columns)) or 'none'}"
        )
        raise UsageError(f"the data have no column {name!r}; {hint}")


_DECIMAL = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+)"
_LAST_NUMBER = re.compile(
    rf"(?:(?<![\w)])[-+−]\s?)?[$€£]?(?:(?<=[$€£])[-+−])?(?<!\w)"
    rf"(?:\d+ \d+/\d+(?![\d.])|{_DECIMAL}(?:/{_DECIMAL})?)(?:\s?\\?%)?"
)


def _is_right(reference: str, completion: str, from_: str) -> float:
    answer = answers.marked(completion)
    if answer is None and from_ == "last_number":
        answer = next((match[0] for match in reversed(list(_LAST_NUMBER.finditer(completion)))), None)
    return float(answer is not None and same_answer(answers.reference_of(reference), answer))


# ---------------------------------------------------------------- formats and patterns


def format_tags(tags: Sequence[str] = ("think", "answer"), partial: bool = False) -> Reward:
    """1 if the completion is <think>…</think><answer>…</answer> and nothing else, 0 if not. Range {0, 1}.

    Source: DeepSeek-R1 (2501.12948), format reward. Spaces and newlines may stand around the blocks; a block
    may be empty; none of the tags may appear a second time. `partial`: the share of the 2·len(tags) opening
    and closing tags that appear exactly once and in order, whatever text stands around them. Range [0, 1].
    Tags that the prompt ends in already, as its template wrote them, count as the completion's own: one that
    it has opened (`<think>`), and a block that it has opened and closed with nothing in it.
    """
    _some_words("tags", tags)
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    any_mark = "|".join(map(re.escape, marks))
    blocks = (rf"{re.escape(f'<{tag}>')}(?:(?!{any_mark}).)*{re.escape(f'</{tag}>')}\s*" for tag in tags)
    whole = re.compile(r"\s*" + "".join(blocks), re.DOTALL)

    def score(text: str) -> float:
        return _in_order(marks, text) / len(marks) if partial else float(bool(whole.fullmatch(text)))

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        ends = columns.get("prompt_tags") or ["" for _ in prompts]
        begun = [
            _begun(end or (prompt if isinstance(prompt, str) else ""), marks)
            for prompt, end in zip(prompts, ends, strict=True)
        ]
        texts = [own_text(completion) for completion in completions]
        of_turns = [_thinks(completion) for completion in completions]  # which have the opening tag already
        return [
            score(start + text.removeprefix(start if thinks else ""))
            for start, text, thinks in zip(begun, texts, of_turns, strict=True)
        ]

    return reward


def _thinks(completion: Any) -> bool:
    """Whether a thought stands beside the first turn of an episode, and not in its text."""
    return not isinstance(completion, str) and bool(completion and completion[0].get("reasoning_content"))


def _begun(prompt: str, marks: Sequence[str]) -> str:
    """The marks that a prompt ends in, with nothing but space between and behind them, as far as they begin a
    completion: empty blocks, then an opening tag at most."""
    begun: list[str] = []
    rest = prompt.rstrip()
    while mark := next((mark for mark in marks if rest.endswith(mark)), ""):
        begun.insert(0, mark)
        rest = rest[: -len(mark)].rstrip()
    *pairs, last = begun or [""]
    if last.startswith("</"):
        pairs, last = begun, ""
    whole = [(a, b) for a, b in zip(pairs[::2], pairs[1::2]) if b == a.replace("<", "</", 1)]
    return "".join(begun) if 2 * len(whole) == len(pairs) else last


def _in_order(marks: Sequence[str], text: str) -> int:
    """How many of the marks appear once and can be read in order: the longest rising run of their places."""
    ends: list[int] = []  # ends[k]: the least place at which a rising run of k + 1 marks can end
    for position in (text.index(mark) for mark in marks if text.count(mark) == 1):
        at = bisect_left(ends, position)
        ends[at : at + 1] = [position]
    return len(ends)


def regex(pattern: str, full: bool = False, timeout: float = 10.0, name: str = "regex") -> Reward:
    """1 if the pattern is found in the completion (`full`: is all of it), 0 if not. Range {0, 1}.

    Python's `re`; a dot matches newlines, since replies have lines ((?-s:.) is one that does not), and (?i)
    at the start ignores case. A pattern can backtrack without end, and nothing within its process stops it:
    it is searched for in a process of its own, and RewardError names it and the sample after `timeout`
    seconds on one completion. name: of the reward, for that message.
    """
    try:
        re.compile(pattern, re.DOTALL)
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"regex: {pattern!r} is no regular expression: {error}") from None
    first = {"what": "regex", "pattern": pattern, "flags": int(re.DOTALL), "full": full}
    process = Process(name, first, timeout)

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        def late(index: int) -> str:
            return (
                f"took more than {timeout:g} s over one reply (sample {index}) and was stopped: its pattern "
                f"{pattern!r} backtracks without end; write it with less choice, as [^<]* for .*"
            )

        texts = [own_text(completion) for completion in completions]
        return [float(answer["found"]) for answer in process.stream(texts, late)]

    return reward


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

    |y| counts tokens (the stop token too), words between white space, or characters; of an episode with tools
    the model's own.
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
        return _of_token_count(score, own=True)
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
    """DAPO's soft overlong punishment (2503.14476, eq. 13), |y| in tokens, which `max_new_tokens` bounds (of
    an episode with tools the context's too). Range [−1, 0].

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
        return [score(own_text(completion)) for completion in completions]

    return reward


def _of_token_count(score: Callable[[int], float], *, own: bool = False) -> Reward:
    """own: of an episode with tools, the model's own tokens alone."""

    def reward(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> list[float | None]:
        lengths = columns.get(OWN_LENGTHS) if own else None
        return [score(n) for n in lengths or map(len, completion_ids)]

    return reward


def _one_of(setting: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UsageError(f"{setting}: {value!r} is not one of {', '.join(known)}")


def _some_words(setting: str, words: Sequence[str]) -> None:
    if isinstance(words, str) or not words or not all(isinstance(w, str) and w.strip() for w in words):
        raise UsageError(f"{setting}: {words!r} must be a list of at least one word")
