"""Checks of what is sampled and what it earns: rewards, lengths, repetition, groups, a held-out judge."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import hypot, inf, isinf
from statistics import fmean, median

from keel.diagnosis.findings import SHORT, WINDOW, Alarm, Check, History, Levels, shown

SCORES, SPREAD, JUDGE = "objective/scores", "objective/scores_std", "eval/judge"
LOGGED = "rewards/logged/"


def reward_implausible(history: History) -> Alarm | None:
    """act: the mean reward is above `control.reward_bound` for 3 updates where the user set one. Else
    measured on the run's own scale, the largest standard deviation that a batch of it had: a policy at KL d
    from its reference can raise a normally distributed reward by √(2d) standard deviations at most (the √KL
    of 2204.05862), 4.5 at 10 nats and 8 at 32. warn: more than 5 for a window, act: more than 8. The largest
    deviation, since that of a reward of 0 or 1 is small at both ends of a perfectly healthy rise."""
    bound, last = history.conditions.reward_bound, history.recent(SCORES, SHORT)
    if bound is not None:
        if last and min(last) > bound:
            return (
                "act",
                f"mean reward above {shown(min(last))} for {SHORT} updates, above the bound {shown(bound)}",
            )
        return None
    start, spread = history.start(SCORES), history.peaks.get(SPREAD, 0.0)
    if start is None or spread <= 0:
        return None
    limits: Levels = (("act", 8.0), ("warn", 5.0))
    for severity, times in limits:
        if history.sustained(SCORES, start + times * spread):
            now = history.now(SCORES) or 0.0
            said = (
                f"mean reward from {shown(start)} to {shown(now)}, {shown((now - start) / spread)} standard "
                "deviations of a batch"
            )
            return severity, said
    return None


def reward_falls(history: History) -> Alarm | None:
    """act: for a window the mean reward is more than a standard deviation of the first batch below that
    batch's mean, which was drawn before any step: what has been learned is worse than nothing by the measure
    that it was learned for. The first batch and not the first few, since a policy can be ruined by the first
    update. Of 16 responses a mean is off by a quarter of a deviation."""
    first, spread = (history.columns.get(name, [])[:1] for name in (SCORES, SPREAD))
    if not first or not spread or not history.sustained(SCORES, first[0][1] - spread[0][1], below=True):
        return None
    now = history.now(SCORES) or 0.0
    return (
        "act",
        f"mean reward from {shown(first[0][1])} to {shown(now)}, by more than a standard deviation of a "
        f"batch ({shown(spread[0][1])})",
    )


def reward_without_spread(history: History) -> Alarm | None:
    """The classic limit is 0.1: with less there is little to learn from. warn: under 0.1, or under a tenth of
    the run's own start, for a window, after it was at least twice as much. note: under 0.1 from the start on,
    where the reward may simply have a small scale. Never act: a solved task ends here, too."""
    start, now = history.start(SPREAD), history.now(SPREAD)
    if start is None or now is None:
        return None
    said = (
        f"standard deviation of the rewards {shown(now)} over the last {WINDOW} updates, at the start "
        f"{shown(start)}"
    )
    if history.sustained(SPREAD, max(0.1 * start, min(0.1, 0.5 * start)), below=True):
        return "warn", said
    return ("note", said) if history.sustained(SPREAD, 0.1, below=True) else None


def nothing_rewarded(history: History) -> Alarm | None:
    """Every reward gave every response of the run the same value, to the last digit: nothing that is wanted
    has been learned, and whatever changes the policy is a penalty (for not ending, for the KL). warn: after a
    window from the run's start; act: after three, when luck no longer explains it. A single update in which
    one response earns something else ends it."""
    columns = {name: values for name, values in history.columns.items() if name.startswith("rewards/")}
    spreads = {name.removesuffix("/std"): v for name, v in columns.items() if name.endswith("/std")}
    means = {name: columns.get(f"{name}/mean", []) for name in spreads}
    if not spreads or any(value > 0 for values in spreads.values() for _, value in values):
        return None
    updates = min(map(len, spreads.values()))
    if updates < WINDOW or any(len({value for _, value in values}) > 1 for values in means.values()):
        return None
    earned = ", ".join(f"{name.split('/')[1]} {shown(v[-1][1])}" for name, v in means.items() if v)
    said = f"in all {updates} updates every response earned the same: {earned}"
    return "act" if updates >= 3 * WINDOW else "warn", said


def length_drift(history: History) -> Alarm | None:
    """note: responses twice or half as long as at the run's start for a window; warn: three times or a third.
    Never act: reasoning grows healthily, and so does politeness; whether it paid is for a judge to say."""
    name = "rollout/response_length"
    start = history.start(name)
    if not start:
        return None
    limits: Levels = (("warn", 3.0), ("note", 2.0))
    for severity, factor in limits:
        if history.sustained(name, factor * start) or history.sustained(name, start / factor, below=True):
            return (
                severity,
                f"responses of {shown(history.now(name) or 0.0)} tokens, at the start {shown(start)}",
            )
    return None


def truncated_rising(history: History) -> Alarm | None:
    """warn: 0.2 more of the responses are cut off than at the run's start, for a window: far beyond the noise
    of a batch of 64 (0.06 at most). act: 0.9 of them where less than half were: the policy has forgotten how
    to end."""
    return _rises(history, "rollout/truncated", 0.5, 0.9, "share of truncated responses")


def repetition(history: History) -> Alarm | None:
    """Share of a response's runs of three tokens that it had before. warn: 0.2 above the run's own start for
    a window; what people write has under 0.1. act: above 0.5 where it was under half of that: most of a
    response is an echo."""
    return _rises(history, "rollout/repetition", 0.25, 0.5, "share of a response that repeats itself")


def _rises(history: History, name: str, healthy: float, act: float, words: str) -> Alarm | None:
    """A share that was low at the start: act above `act` if it began under `healthy`, warn 0.2 above the
    start."""
    start = history.start(name)
    if start is None:
        return None
    said = f"{words} {shown(history.now(name) or 0.0)}, at the start {shown(start)}"
    if start < healthy and history.sustained(name, act):
        return "act", said
    return ("warn", said) if history.sustained(name, start + 0.2) else None


def groups_all_equal(history: History) -> Alarm | None:
    """warn: more than 0.8 of the groups for a window: five times the sampling for one group that teaches.
    Never act: nothing breaks, and a task that is solved ends here."""
    name = "frac_reward_zero_std"
    if not history.sustained(name, 0.8):
        return None
    return "warn", f"all rewards are equal in {shown(history.now(name) or 0.0)} of the groups"


def curriculum_spent(history: History) -> Alarm | None:
    """note: more than 0.9 of the prompts that were seen are passed always or never, for a window: what is
    left is too little to sample by. warn: more than 0.9 are never passed, which no curriculum mends. Never
    act: a stage that has solved its data ends here, and that is no illness."""
    seen = history.now("curriculum/seen") or 0.0
    if seen < 0.5:  # most are still unknown
        return None
    hopeless, solved = (history.recent(f"curriculum/{name}") for name in ("hopeless", "solved"))
    never = [value / seen for value in hopeless]
    spent = [(a + b) / seen for a, b in zip(hopeless, solved, strict=False)]
    if never and min(never) > 0.9:
        return "warn", f"{shown(never[-1])} of the prompts seen are never passed"
    if spent and min(spent) > 0.9:
        return "note", f"{shown(spent[-1])} of the prompts seen are passed always or never"
    return None


def judge_silent(history: History) -> Alarm | None:
    """note: a judge with `on_failure: none` says nothing of more than 0.05 of the samples, for a window.
    warn: of more than 0.3, from which on the mean that stands for it hides whom it would have told apart; all
    of them where its server is gone. Never act: the weights are not ill, and no control brings it back."""
    limits: Levels = (("warn", 0.3), ("note", 0.05))
    for severity, limit in limits:
        for name in history.columns:
            if name.startswith(LOGGED) and name.endswith("/unanswered") and history.sustained(name, limit):
                judge = name.removeprefix(LOGGED).removesuffix("/unanswered")
                return (
                    severity,
                    f"judge {judge!r} says nothing of {shown(history.now(name) or 0.0)} of the samples",
                )
    return None


def judge_falls(history: History) -> Alarm | None:
    """The held-out judge is below its best while the reward trained on is above what it was then. Two
    successive evaluations count as one, that of the start (step 0) by itself, in units of the error of a
    difference: from the logged standard errors, or, where there are none, from what successive evaluations
    differ by. The best of many equal evaluations is a lucky one, so 2.5 errors would be found in every third
    run of pure noise; warn: 3 (one run in ten of 20 evaluations), act: 4 (one in 300), and only with logged
    errors, since a few evaluations tell their own too roughly."""
    judge = history.columns.get(JUDGE, [])
    last = judge[-2:]
    earlier = [judge[:1]] if judge and judge[0][0] == 0 and len(judge) > 2 else []
    earlier += map(list, list(pairwise(judge))[:-2])
    if not earlier or judge[-1][0] != history.step or last[0][0] <= history.since:
        return None
    proxy = dict(history.columns.get("eval/objective/scores") or history.columns.get(SCORES, []))

    def errors(points: Sequence[tuple[int, float]]) -> float:
        """By how many errors the judge has fallen since."""
        fall, error = _mean(points) - _mean(last), _error(history, points, last, judge)
        return fall / error if error else inf if fall > 0 else 0.0

    best = max(earlier, key=errors)
    before, after = ([proxy[step] for step, _ in points if step in proxy] for points in (best, last))
    if not before or not after or fmean(after) <= fmean(before) or errors(best) <= 3:
        return None
    said = f"the judge fell from {shown(_mean(best))} at step {best[-1][0]} to {shown(_mean(last))}"
    many = "many" if isinf(errors(best)) else shown(errors(best))
    said += f" ({many} errors), while the proxy rose from {shown(fmean(before))} to {shown(fmean(after))}"
    sure = "eval/judge_error" in history.columns
    return ("act" if sure and errors(best) > 4 else "warn"), said


def _mean(points: Sequence[tuple[int, float]]) -> float:
    return fmean(value for _, value in points)


def _error(
    history: History,
    before: Sequence[tuple[int, float]],
    after: Sequence[tuple[int, float]],
    judge: Sequence[tuple[int, float]],
) -> float:
    """Standard error of the difference of two means of evaluations."""
    logged = dict(history.columns.get("eval/judge_error", []))
    if all(step in logged for step, _ in (*before, *after)):
        return hypot(*(logged[step] / len(points) for points in (before, after) for step, _ in points))
    steps = [
        abs(b[1] - a[1]) for a, b in pairwise(judge)
    ]  # their median is 0.67 errors of a single difference
    return median(steps) / 0.67 * ((1 / len(before) + 1 / len(after)) / 2) ** 0.5 if len(steps) >= 5 else inf


def reward_is_length(history: History) -> Alarm | None:
    """Correlation of reward and length within a batch. warn: beyond ±0.7 for a window (half of the reward's
    variance is length), grown by 0.2 since the start; note: it was so from the start. Never act: bad answers
    may be long for good reasons. Silent where the user rewards length."""
    name = "rollout/length_correlation"
    start = history.start(name)
    up, down = history.sustained(name, 0.7), history.sustained(name, -0.7, below=True)
    if history.conditions.length_rewarded or start is None or not (up or down):
        return None
    now = history.now(name) or 0.0
    grown = abs(now - start) > 0.2
    return (
        "warn" if grown else "note"
    ), f"correlation of reward and length {shown(now)}, at the start {shown(start)}"


CHECKS = (
    Check(
        "reward_implausible",
        reward_implausible,
        "the policy has found what the reward model overrates",
        "raise kl.coef (× 1.5), use an ensemble of reward models, train the reward model on such samples",
        frozenset({"raise_kl"}),
        of_reward=True,
    ),
    Check(
        "reward_falls",
        reward_falls,
        "steps so large that the policy was ruined, or a penalty (KL, length) that outweighs the reward",
        "lower the learning rate, leave desired_kl on, look at samples; lower kl.coef if the KL is small",
        frozenset({"cut_lr"}),
        of_reward=True,
    ),
    Check(
        "reward_without_spread",
        reward_without_spread,
        "all samples are about equally good to the reward: too little exploration, or the task is solved",
        "explore more: raise sampling.temperature, take harder prompts or another reward",
        of_reward=True,
    ),
    Check(
        "nothing_rewarded",
        nothing_rewarded,
        "no response ever meets what the reward asks for (its form, its tags, its answer), or all do",
        "score a few of the run's samples by hand; show the form in the prompt, train it by sft first, or "
        "give points for parts of it; only shaping.missing_stop_penalty and the KL have taught anything",
        of_reward=True,
    ),
    Check(
        "length_drift",
        length_drift,
        "the reward prefers another length",
        "look at samples; add a length term, or train the reward model on pairs of equal length",
        imitating="look at samples of student and teacher: a teacher may be longer by nature",
    ),
    Check(
        "truncated_rising",
        truncated_rising,
        "the policy no longer ends its responses",
        "raise shaping.missing_stop_penalty, kl.coef or sampling.max_new_tokens",
        frozenset({"raise_kl", "cut_lr"}),
        imitating="raise sampling.max_new_tokens, or add demonstrations, which end; lower the learning rate",
    ),
    Check(
        "repetition",
        repetition,
        "the policy has fallen into a loop that the reward does not mind",
        "raise kl.coef, add a repetition term to the reward",
        frozenset({"raise_kl", "cut_lr"}),
        imitating="lower the learning rate, add demonstrations, or set divergence: jsd",
    ),
    Check(
        "groups_all_equal",
        groups_all_equal,
        "the prompts are too easy or too hard for the policy",
        "take prompts of medium difficulty, more samples per prompt, or set resample",
        of_reward=True,
    ),
    Check(
        "curriculum_spent",
        curriculum_spent,
        "the data have no prompts left that this policy passes sometimes",
        "add easier rows where few are passed, harder ones where most are, or end the stage here",
    ),
    Check(
        "judge_silent",
        judge_silent,
        "the judge's server is gone or slow, or its answers are cut off or of another form",
        "look at extra (no_verdict) in samples.jsonl; mend its server, raise its max_new_tokens, tries "
        "or timeout, or set on_failure: error, which ends the run at the first",
    ),
    Check(
        "judge_falls",
        judge_falls,
        "the reward model is over-optimised (2210.10760)",
        "keep the weights from before the fall; raise kl.coef, lower kl.target, use an ensemble of reward "
        "models",
        frozenset({"raise_kl", "cut_lr"}),
    ),
    Check(
        "reward_is_length",
        reward_is_length,
        "the reward model has learned length in place of quality",
        "train the reward model on pairs of equal length, or add a length term against it",
        of_reward=True,
    ),
)
