"""Checks of what the updates do: KL, entropy, clipping, the critic, numbers that are none."""

from __future__ import annotations

from statistics import fmean, median, stdev

from keel.diagnosis.findings import SHORT, WINDOW, Alarm, Check, History, Levels, shown

KL_FLOOR = 10.0  # nats a response
KL_PER_TOKEN = 0.1  # nats a token, for long responses without a target
SETTLING = 20  # updates that a fresh critic is given to learn something


def not_finite(history: History) -> Alarm | None:
    """act: any metric is NaN, infinite or beyond 1e150, at once. No NaN is healthy: nothing is waited for."""
    if not history.broken:
        return None
    listed = ", ".join(f"{name} is {value}" for name, value in sorted(history.broken.items())[:3])
    more = len(history.broken) - 3
    return "act", listed + (f" and {more} more" if more > 0 else "")


def kl_limit(history: History) -> float:
    """Nats a response above which the policy has left the reference: the classic 10, or 2.5 times the target
    where that is more. Without a target 10 too, or 0.1 nats a token where responses are so long that this is
    more: 10 nats are a lot for a sentence and nothing for a page."""
    target = history.conditions.kl_target
    if target is not None:
        return max(KL_FLOOR, 2.5 * target)
    length = history.start("rollout/response_length") or 0.0
    return max(KL_FLOOR, KL_PER_TOKEN * length)


def kl_too_high(history: History) -> Alarm | None:
    """act: above max(10, 2.5 × target) for a window; or above 4 times that for 3 updates, since a policy that
    runs away does so within a few; or above 10 times that in one update, which nothing healthy comes near. An
    adaptive β lets the KL swing to nearly twice its target while it settles, in healthy runs to 1.9 times:
    hence 2.5, and a warning from 2. Without a target nobody said how far is too far: a warning above the
    limit, act above 2.5 times it. With β = 0 and rewards that cannot be fooled distance is wanted or at least
    allowed: act at 10 times it only; what a model rewards is worth less with distance whatever β is
    (2210.10760)."""
    name = history.first_of("objective/kl_exact", "objective/kl")
    limit, target = kl_limit(history), history.conditions.kl_target
    free = not history.conditions.constrained and not history.conditions.learned
    act = limit if target is not None else limit * (10.0 if free else 2.5)
    warn = 2 * target if target is not None else limit * (2.5 if free else 1.0)
    goal = f"target {shown(target)}, limit {shown(act)}" if target is not None else f"limit {shown(act)}"
    last = history.recent(name, SHORT)
    if last and min(last) > 4 * act:
        return "act", f"KL above {shown(min(last))} nats for {SHORT} updates ({goal})"
    if (newest := history.recent(name, 1)) and newest[0] > 10 * act:
        return "act", f"KL {shown(newest[0])} nats in one update ({goal})"
    limits: Levels = (("act", act), ("warn", warn))
    for severity, bound in limits:
        if history.sustained(name, bound):
            window = median(history.recent(name))
            return severity, f"median KL of the last {WINDOW} updates {shown(window)} nats ({goal})"
    return None


def kl_negative(history: History) -> Alarm | None:
    """The mean over samples of log π − log π_ref estimates a KL, which is never negative; in one batch it may
    be, so the mean of a window must be 3 standard errors below 0. warn: and below −0.1 nats, so that rounding
    is none. act: below −1: the samples do not come from the policy that is scored (top-p, a mask, a
    temperature, other weights)."""
    window = history.recent("objective/kl")
    if not window:
        return None
    mean, error = fmean(window), stdev(window) / WINDOW**0.5
    if mean > -0.1 or mean > -3 * error:
        return None
    said = (
        f"sampled KL {shown(mean)} ± {shown(error)} nats over the last {WINDOW} updates; a KL is never "
        "negative"
    )
    return ("act" if mean < -1 else "warn"), said


def entropy_collapse(history: History) -> Alarm | None:
    """warn: below a tenth of the run's own start for a window; healthy runs lose half, and where there is one
    right answer down to a fifth. act: and the reward is no higher than at the start, so that certainty was
    bought with nothing. A policy that became certain because it is right is left alone, and a student whose
    teacher is as certain, to a half."""
    name = "policy/entropy_avg"
    start = history.start(name)
    if start is None or start <= 0 or not history.sustained(name, 0.1 * start, below=True):
        return None
    teacher = history.now("policy/teacher_entropy")
    if teacher is not None and (history.now(name) or 0.0) >= 0.5 * teacher:
        return None
    said = f"entropy {shown(history.now(name) or 0.0)} nats a token, at the start {shown(start)}"
    before, after = history.start("objective/scores"), history.now("objective/scores")
    if before is not None and after is not None and after <= before:
        return "act", f"{said}, while the reward went from {shown(before)} to {shown(after)}"
    return "warn", said


def teacher_farther(history: History) -> Alarm | None:
    """A student's divergence from its teacher falls, quickly at first; it is measured on its own replies of
    the moment, so single updates differ by a tenth or two. warn: above the run's start (the median of its
    first updates) for a window: nothing that was wanted has been learned. act: above twice the start, where
    what was learned is worse than nothing."""
    name = "loss/policy_avg"
    start = history.start(name)
    if not history.conditions.imitates or start is None or start <= 0:
        return None
    limits: Levels = (("act", 2.0), ("warn", 1.0))
    for severity, times in limits:
        if history.sustained(name, times * start):
            now = shown(history.now(name) or 0.0)
            return severity, f"divergence from the teacher {now} nats a token, at the start {shown(start)}"
    return None


def clip_fraction(history: History) -> Alarm | None:
    """warn: the clip holds back more than 0.3 of the tokens for a window; healthy runs stay under 0.1. act:
    above 0.5, most of the gradient is thrown away and the rest is one-sided. With one ratio a response (GSPO,
    2507.18071) the range is a thousandth and high fractions are reported as healthy: a note only."""
    name = "policy/clipfrac_avg"
    limits: Levels = (("act", 0.5), ("warn", 0.3))
    for severity, limit in limits:
        if history.sustained(name, limit):
            said = (
                f"the clip held back {shown(history.now(name) or 0.0)} of the tokens over the last {WINDOW} "
                "updates"
            )
            return ("note" if history.conditions.sequence_ratios else severity), said
    return None


def rate_held_back(history: History) -> Alarm | None:
    """warn: `desired_kl` leaves less than half of the learning rate for a window; a cut at a first update is
    made up for by then. What holds it back works, and a lower rate would not need it; a sampler that is far
    from the trainer shows the same."""
    if not history.sustained("policy/lr_factor", 0.5, below=True):
        return None
    return "warn", f"desired_kl leaves {shown(history.now('policy/lr_factor') or 0.0)} of the learning rate"


def critic_unexplaining(history: History) -> Alarm | None:
    """note: explained variance below 0 for a window: the critic is worse than its own mean. A fresh critic
    begins there and small ones stay there in runs that learn, so 20 updates after warm-up are left out. warn:
    below −0.5. act: below −3, its error has four times the variance of the returns: it diverges, and the
    advantages are its noise."""
    name = "val/explained_variance"
    if history.step <= history.conditions.warmup + SETTLING:
        return None
    limits: Levels = (("act", -3.0), ("warn", -0.5), ("note", 0.0))
    for severity, limit in limits:
        if history.sustained(name, limit, below=True):
            return (
                severity,
                f"explained variance {shown(history.now(name) or 0.0)} over the last {WINDOW} updates",
            )
    return None


def sampler_disagrees(history: History) -> Alarm | None:
    """Sampler and trainer hold the same weights, so their log-probabilities differ by rounding: 1e−6 nats in
    float32, a few thousandths in bfloat16, 0.01 to 0.05 between two engines. warn: above 0.05 a token for a
    window. act: above 0.2: ratios are off by a fifth before anything is learned. Where both are keel's in
    float32 a hundredth is no rounding but another distribution than the one that is trained: warn above
    0.001, act above 0.01. With a vLLM server in float32 (1e−6 on a CPU, more where a card's kernels round to
    TF32), and with `dtype: auto`, whose products round to bfloat16 where that is fast (0.001 to 0.002 in
    demos on a CPU with AMX, but 0.01 to 0.02 of a model of 260 thousand parameters, with AVX-512 alone, too):
    warn above 0.02, act above 0.1."""
    name = "rollout/sampler_drift"
    limits: Levels = (("act", 0.2), ("warn", 0.05))
    if history.conditions.same_numbers:
        limits = (("act", 0.01), ("warn", 0.001))
    elif history.conditions.near_numbers:
        limits = (("act", 0.1), ("warn", 0.02))
    for severity, limit in limits:
        if history.sustained(name, limit):
            return severity, f"|log π of trainer − of sampler| {shown(history.now(name) or 0.0)} nats a token"
    return None


def stale_samples(history: History) -> Alarm | None:
    """Where older weights sample (`rollout.ahead`, `rollout.partial`), each token is weighed by min(π /
    π_sampler, `importance_cap`). What is κ nats a token from the sampler has log-weights that scatter by
    about √(2κ). warn: κ above 0.1, a scatter of 0.45, over twice the usual clip range of 0.2, so that most
    tokens are outside of it before anything is learned; or the cap cuts more than 0.1 of the tokens, and
    what it cuts is bias. act: above 0.5, a scatter of 1: few tokens carry the update; or more than 0.3 cut.
    An update of PPO that goes well moves the policy by a hundredth of a nat a token."""
    levels: Levels = (("act", 0.5), ("warn", 0.1))
    for severity, far in levels:
        if history.sustained("rollout/staleness_kl", far):
            now = shown(history.now("rollout/staleness_kl") or 0.0)
            return severity, f"the policy is {now} nats a token from the weights that sampled"
        capped = 0.3 if severity == "act" else 0.1
        if history.sustained("rollout/importance_capped", capped):
            now = shown(history.now("rollout/importance_capped") or 0.0)
            return severity, f"importance_cap cuts the weights of {now} of the tokens"
    return None


CHECKS = (
    Check(
        "not_finite",
        not_finite,
        "a gradient that exploded, or a reward that is none",
        "lower the learning rate, set max_grad_norm, look at the rewards of this update",
        frozenset({"cut_lr"}),
    ),
    Check(
        "kl_too_high",
        kl_too_high,
        "the policy leaves the reference faster than β holds it",
        "raise kl.coef (× 1.5) or set kl.target, or halve the learning rate",
        frozenset({"raise_kl", "cut_lr"}),
    ),
    Check(
        "kl_negative",
        kl_negative,
        "the responses were not drawn from the distribution that is scored",
        "sample without top-p and top-k, at the same temperature, with the same weights and masks",
    ),
    Check(
        "entropy_collapse",
        entropy_collapse,
        "the policy repeats what once earned a reward and explores nothing else",
        "raise the temperature, kl.coef or entropy_coef, lower the learning rate, or draw more samples per "
        "prompt",
        frozenset({"raise_kl", "cut_lr"}),
        imitating="lower the learning rate, or set divergence: jsd or forward_kl, which cover the teacher's "
        "distribution",
    ),
    Check(
        "teacher_farther",
        teacher_farther,
        "steps so large that the student is ruined, or a teacher that is at a loss on such prompts",
        "lower the learning rate, add demonstrations, or take a teacher that was trained on such prompts",
        frozenset({"cut_lr"}),
    ),
    Check(
        "clip_fraction",
        clip_fraction,
        "steps too large, or too many of them on one batch",
        "halve the learning rate, or take fewer epochs or larger mini-batches",
        frozenset({"cut_lr"}),
    ),
    Check(
        "rate_held_back",
        rate_held_back,
        "the learning rate is higher than what the policy can follow, or the sampler is not the policy that "
        "is trained",
        "lower the learning rate by this factor, or take fewer epochs; where rollout/sampler_drift is as "
        "large, one precision for both",
    ),
    Check(
        "critic_unexplaining",
        critic_unexplaining,
        "the critic has not learned to predict the reward, or its targets move too fast",
        "set critic_warmup, change value_lr or raise batch_size; or use a stage without a critic (grpo)",
        frozenset({"cut_lr"}),
    ),
    Check(
        "sampler_disagrees",
        sampler_disagrees,
        "sampler and trainer differ in precision, kernels or weights",
        "use one precision for both, or set importance_cap",
    ),
    Check(
        "stale_samples",
        stale_samples,
        "updates move the policy so far that what older weights have sampled no longer speaks for it",
        "halve the learning rate, take fewer epochs, or sample by newer weights (rollout.ahead: 0; a larger "
        "rollout.partial, or none); where only the cap cuts, raise importance_cap",
        frozenset({"cut_lr"}),
    ),
)
