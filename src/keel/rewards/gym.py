"""The reward of tasks that check themselves: reasoning-gym's own score of what a reply answers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from keel.data.chat import own_text
from keel.rewards.rules import Reward, column_of
from keel.worlds import gym

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def gym_score(
    reads: Literal["auto", "tag", "whole"] = "auto", partial: bool = True, timeout: float = 10.0
) -> Reward:
    """The task's own score of a reply's answer, in [0, 1]; None for a row of other data. `partial` False: 1
    for a right answer, else 0.

    The answer is what stands in the last <answer>…</answer> (`tag`), all of the reply behind its thought
    (`whole`), or the first where there is one and else the second (`auto`). An answer that a task cannot
    read, or that takes longer than `timeout` seconds, has 0; how often that was is logged as gym_timeouts.

    UsageError at the first call if no row is of reasoning-gym, or its package is not installed.
    """

    def reward(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        log_metric: Callable[[str, float, int], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        scores: list[float | None] = []
        stopped = 0
        for kept, completion in zip(column_of(columns, gym.COLUMN), completions, strict=True):
            answer = answer_of(own_text(completion), reads)
            if kept is None or answer is None:
                scores.append(None if kept is None else 0.0)
                continue
            score = gym.process().score(json.loads(kept), answer, timeout)
            stopped += score is None
            scores.append(_counted(score or 0.0, partial))
        if log_metric is not None and scores:
            log_metric("gym_timeouts", stopped / len(scores), len(scores))
        return scores

    return reward


def answer_of(text: str, reads: str) -> str | None:
    """The part of a reply that is its answer; None where it has none."""
    # what stands behind the last end is no answer: looked at, a reply of many starts would take long
    ended = text[: text.rfind("</answer>") + len("</answer>")] if "</answer>" in text else ""
    tagged = _TAGGED.findall(ended) if reads != "whole" else []
    if tagged:
        return tagged[-1].strip()
    return None if reads == "tag" else text.rpartition("</think>")[2].strip()


def _counted(score: float, partial: bool) -> float:
    score = min(max(score, 0.0), 1.0)
    return score if partial else float(score >= 1.0 - 1e-9)
