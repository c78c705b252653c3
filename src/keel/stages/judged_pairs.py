"""Pairs that language models compare beside people: what they say, how reliable they are, whose word counts
how far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keel.config import CollectConfig
from keel.errors import RewardError
from keel.evaluation.annotators import CHOICES
from keel.evaluation.judge_reliability import (
    FEWEST,
    JudgeReliability,
    against_people,
    people_posterior,
    weighed,
)
from keel.rewards import functions
from keel.rewards.judge.judging import Compared, OrderBias
from keel.rundir.stage_run import StageRun
from keel.stages import judges
from keel.stages.people import Voted
from keel.types import PreferenceRecord, Vote

_NUMBER = {"b": CHOICES.index("rejected"), "tie": CHOICES.index("tie"), "a": CHOICES.index("chosen")}
_WORD = {"a": 1.0, "tie": 0.5, "b": 0.0}


@dataclass(frozen=True, slots=True)
class JudgeVotes:
    """What one judge says of each pair, in their order."""

    name: str
    choices: tuple[str | None, ...]  # a, b or tie; None: it was not heard
    bias: OrderBias | None


def ask(config: CollectConfig, stage_run: StageRun, pairs: Sequence[Mapping[str, Any]]) -> list[JudgeVotes]:
    """Have each judge compare all pairs. RewardError, with the pair, where one has no verdict and its
    `on_failure` is error."""
    found: list[JudgeVotes] = []
    for settings in config.judges:
        judge = judges.of_annotator(
            settings, stage_run, dtype=config.dtype, trust_remote_code=config.trust_remote_code
        )
        stage_run.say(f"{stage_run.name}: {judge.name} compares {len(pairs)} pairs")
        prompts = [_prompt(pair["prompt"]) for pair in pairs]
        compared = judge.compare(
            [(prompt, pair["a"], pair["b"]) for prompt, pair in zip(prompts, pairs, strict=True)]
        )
        missing = [i for i, one in enumerate(compared) if one.better is None]
        if missing and settings.on_failure == "error":
            i = next((i for i in missing if not compared[i].given_up), missing[0])
            raise RewardError(
                f"annotator {judge.name!r} has no verdict on pair {pairs[i]['pair']} "
                f"({functions.sample(prompts, i)}): {compared[i].why}; what it said is kept, and the same "
                "command goes on (on_failure: none leaves such pairs to the others)"
            )
        found.append(JudgeVotes(judge.name, tuple(map(_choice, compared)), OrderBias.of(compared)))
    return found


def _prompt(prompt: Any) -> Any:
    return prompt if isinstance(prompt, str) else tuple(prompt)


def _choice(compared: Compared) -> str | None:
    better = compared.better
    return None if better is None else "tie" if better == 0.5 else "a" if better > 0.5 else "b"


def weigh(
    stage_run: StageRun,
    pairs: Sequence[Mapping[str, Any]],
    voted: Sequence[Voted],
    words: Mapping[int, str],
    judged: Sequence[JudgeVotes],
) -> tuple[dict[int, float], dict[str, Any]]:
    """(pair → P(a is better) by all whose word counts, judge → what is known of it). The first is empty where
    no judge counts.

    A judge that shares fewer than FEWEST pairs with people, or is not better than a coin with certainty, does
    not count; that is said.
    """
    by_pair: dict[int, list[Vote]] = {pair["pair"]: [] for pair in pairs}
    for vote in voted:
        if vote.choice in _NUMBER:
            by_pair[vote.pair].append(Vote(vote.annotator, CHOICES[_NUMBER[vote.choice]]))
    numbers = [pair["pair"] for pair in pairs]
    records = [PreferenceRecord("", "", "", votes=tuple(by_pair[number])) for number in numbers]
    of_words = {i: _WORD[words[number]] for i, number in enumerate(numbers) if number in words}
    known = [i for i, number in enumerate(numbers) if by_pair[number] or number in words]
    posterior = people_posterior(records, of_words)
    counting: list[tuple[JudgeReliability, list[int | None]]] = []
    measures: dict[str, Any] = {}
    for one in judged:
        said = [None if choice is None else _NUMBER[choice] for choice in one.choices]
        reliability = against_people(posterior[known], [said[i] for i in known])
        measures[one.name] = _measures(one, reliability)
        if reliability.counts:
            counting.append((reliability, said))
        _say(stage_run, one.name, reliability)
    if not counting:
        return {}, measures
    p = weighed(posterior, counting).tolist()
    told = {i for _, said in counting for i, choice in enumerate(said) if choice is not None}
    return {numbers[i]: round(p[i], 6) for i in sorted(told.union(known))}, measures


def _measures(one: JudgeVotes, reliability: JudgeReliability) -> dict[str, Any]:
    bias = one.bias
    return {
        "reliability": reliability.right_side,
        "counts": reliability.counts,
        "unanswered": sum(choice is None for choice in one.choices) / len(one.choices),
        "position_bias": None if bias is None else bias.position_bias,
        "disagreement": None if bias is None else bias.disagreement,
    }


def _say(stage_run: StageRun, name: str, reliability: JudgeReliability) -> None:
    right = reliability.right_side
    known = (
        f"names the better reply in {right['mean']:.0%} of the pairs ({right['low']:.0%} to "
        f"{right['high']:.0%}, against people's votes on {right['n']} pairs)"
    )
    if reliability.counts:
        said = f"{name} {known}; its word counts as far as that"
    elif right["n"] < FEWEST:
        shared = f"{name} and people both compared {right['n']} pairs"
        said = f"{shared}, and {FEWEST} are needed: its word does not count"
    else:
        said = f"{name} {known}: not better than a coin with certainty, so its word does not count"
    stage_run.say(f"{stage_run.name}: {said}")
