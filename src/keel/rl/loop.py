"""One update, from top to bottom: rollout, score, advantages, epochs (loss, backward, step), KL, monitor,
log.

PPO and GRPO differ in how they collect, in their advantages and in their loss; an `Algorithm` is these three.
All else is here.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from keel.accel import batch_layout
from keel.accel.cpu_linear import cast_cache
from keel.algorithms.control import adaptive_kl, kl_adaptive_lr
from keel.algorithms.masked import count, extent
from keel.config import OnPolicy
from keel.data.batches import derive_seed, permutation, rows_of_step, useful_pairs, useful_tokens
from keel.distributed import gradients, group
from keel.errors import BudgetError, EngineError, NotFiniteError, RewardError, UsageError
from keel.models import optim
from keel.rewards.shaping import RunningScale
from keel.rl import heldout_judge, rollout
from keel.rl.ahead import Ahead
from keel.rl.algorithm import Algorithm, LogprobMismatch, MicroBatch
from keel.rl.curriculum import PROMPT, Curriculum
from keel.rl.measures import Means, StepMeasures
from keel.rl.monitor import Monitor
from keel.rl.partial import Partial
from keel.rl.rollout import Drawn, Experience, LoopState, PromptExample, Setup
from keel.rl.setup import placing, restore_training, training_state
from keel.stages import language
from keel.stages.loop_utils import (
    EarlyStop,
    copy_state,
    due,
    lr_scale,
    put_back,
    share_of,
)
from keel.types import Episodes

# what others than this process may fail with: it is gone on with once they are there
FAILURES = (BudgetError, EngineError, RewardError, UsageError)


class OnPolicyLoop:
    """One stage on its way; what of it changes between updates is in each checkpoint."""

    def __init__(
        self,
        algorithm: Algorithm,
        prompts: Sequence[PromptExample],
        held_out: Sequence[PromptExample],
        optimizers: Sequence[torch.optim.Optimizer],
    ):
        self.algorithm, self.setup = algorithm, algorithm.setup
        self.config, self.run = self.setup.config, self.setup.run
        self.prompts, self.held_out, self.optimizers = prompts, held_out, optimizers
        self.judged = held_out or (prompts[: heldout_judge.JUDGED] if self.setup.judge else [])
        self.state = LoopState(self.config.kl.coef, RunningScale())
        self.stopping = EarlyStop(self.config.patience)
        self.monitor = Monitor.open(self.setup, optimizers)
        self.curriculum = _curriculum(self.config, prompts, self.run.seed)
        self.best: dict[str, Any] | None = None  # the policy at its best evaluation, for `patience`
        way = Partial if self.config.rollout.partial else Ahead
        own = weakref.proxy(self)  # so that all of it goes at once, when training ends
        self.ahead = way(self.setup, lambda update: [prompts[i] for i in own._rows_of(update)])

    def train(self) -> dict[str, Any]:
        """Updates until there are enough, or a reason to stop. Where there is a judge, or weights may be put
        back, what the stage starts from is evaluated as update 0.

        Returns the stage's result; the policy ends with the weights to keep.
        """
        last = self._begin()
        while last < self.config.updates and not self._over:
            last += 1
            self.update(last)
        return self._end(last)

    def update(self, update: int) -> None:
        """One update; what is not finite ends it, and nothing of it counts."""
        config, run, state = self.config, self.run, self.state
        try:
            # 1. rollout: a response to each prompt, scored by every model   2. advantages
            rows = self._rows_of(update)
            batch = self._collected(update, rows)
            self._sample_ahead(update + 1)
            # 3. epochs of mini-batches: loss, backward, step
            with run.timed("train"):
                learned = learn(self.algorithm, self.optimizers, batch.episodes, update, state)
            self.ahead.finish()
            metrics = batch.metrics | learned.metrics
            run.check_finite(update, metrics)
        except NotFiniteError as error:
            self.ahead.drop()
            self.state = self.monitor.failed(update, error, state)
            run.log(update, config.updates, {"episode": state.episodes})
            return
        if self.curriculum is not None:
            metrics |= self.curriculum.see(
                rows, config.samples_per_prompt, _compared(config, batch.experience)
            )
        # 4. β follows the KL of these samples, the learning rate that of this update
        kl_coef, lr_factor = state.kl_coef, state.lr_factor
        if config.kl.target is not None and update > self.algorithm.warmup:
            kl_coef = adaptive_kl(
                kl_coef, batch.experience.kl, config.kl.target, config.batch_size, config.kl.horizon
            )
        if config.desired_kl is not None:
            lr_factor = kl_adaptive_lr(lr_factor, learned.largest_kl, config.desired_kl)
        state = LoopState(kl_coef, batch.reward_scaler, state.episodes + batch.sampled, lr_factor)
        metrics["episode"] = state.episodes
        if update == 1 or due(update, config.updates, max(1, config.updates // 10)):
            run.samples(rollout.sample_rows(self.setup, update, batch.experience))
        self._conclude(update, metrics, state)

    def _conclude(self, update: int, metrics: dict[str, float], state: LoopState) -> None:
        """What follows the learning of an update: all that needs to be known of it is in the arguments."""
        config, run = self.config, self.run
        # 5. held-out prompts
        if self.judged and due(update, config.updates, config.eval_every):
            metrics |= self._evaluated(update, metrics, state)
            self.stopping = self.stopping.see(metrics["eval/objective/rlhf_reward"])
            if config.patience is not None and self.stopping.waited == 0:
                self.best = copy_state(self.setup.roles.policy)
        # 6. what happened, and where to go on from
        run.log(update, config.updates, metrics)
        rollbacks = self.monitor.rollbacks
        self.state = self.monitor.see(update, metrics, state)
        if self.monitor.rollbacks > rollbacks:  # sampled by weights that are no more
            self.ahead.drop()
        if due(update, config.updates, config.save_every) or self._over:
            self._save(update)

    def _evaluated(self, update: int, metrics: dict[str, float], state: LoopState) -> dict[str, float]:
        """`_evaluate` after an update. Where a reward, a judge or an engine fails there, what the update has
        learned is kept first, and whoever goes on evaluates it again."""
        try:
            return self._evaluate()
        except FAILURES as error:
            if group.met_by_all(error):  # as in `_collected`
                self.state = state
                self._save(update, {"unevaluated": metrics})
            raise

    def _collected(self, update: int, rows: Sequence[int]) -> Batch:
        """What an update learns from. Where a reward or a response cannot be had, the updates before it are
        kept first."""
        try:
            prompts, drawn = [self.prompts[i] for i in rows], self.ahead.of(update)
            batch = collect(self.algorithm, prompts, self.state, update, drawn)
            return replace(batch, metrics={**batch.metrics, **self.ahead.metrics})
        except FAILURES as error:
            # a checkpoint takes all ranks, and of another error the others know nothing
            if group.met_by_all(error) and (done := update - 1):
                place = self.run.directory / "checkpoints" / f"step-{done:06d}"
                if not group.from_first(place.exists):
                    self._save(done)
            raise

    def _sample_ahead(self, update: int) -> None:
        """Begin what an update will learn from, where it is sampled before its turn (`rollout.ahead`)."""
        if self.config.rollout.ahead and update <= self.config.updates:
            self.ahead.begin(update)
        elif not self.config.rollout.partial:
            self.ahead.drop()

    @property
    def _over(self) -> bool:
        return self.stopping.stop or self.monitor.stopped

    def _rows_of(self, update: int) -> list[int]:
        """The prompts of an update, by number."""
        prompts = self.config.batch_size // self.config.samples_per_prompt
        if self.curriculum is not None:
            return self.curriculum.draw(update, prompts)
        return rows_of_step(len(self.prompts), prompts, update - 1, self.run.seed)

    def _begin(self) -> int:
        """From the checkpoint, if there is one; the last update that was done."""
        group.agree("the prompts of a stage", (len(self.prompts), len(self.held_out)))
        if not group.is_sharded():  # else they were alike when they were cut
            for module in (self.setup.roles.policy, *self.setup.roles.value_modules):
                gradients.same_weights(module)
        if checkpoint := self.run.restore(placing(self.setup, self.optimizers)):
            restore_training(self.setup, self.optimizers, checkpoint.tensors)
            values, self.best = checkpoint.values, checkpoint.tensors["best"]
            self.state = LoopState.restored(values)
            self.stopping = self.stopping.restored(values["stopping"])
            self.monitor.restored(values["monitor"], checkpoint.tensors["snapshots"])
            if self.curriculum is not None:
                self.curriculum.restore(checkpoint.tensors["curriculum"])
            self.ahead.restored(checkpoint.tensors, values)
            if (metrics := values.get("unevaluated")) is not None:
                self._conclude(checkpoint.step, metrics, self.state)
            return checkpoint.step
        if self.judged and (self.setup.judge or self.config.control.goes_back):
            before = self._evaluate()
            self.run.log(0, self.config.updates, before)
            self.monitor.begin(before)
        return 0

    def _end(self, last: int) -> dict[str, Any]:
        """The result, measured on the weights to keep. last: the last update."""
        self.monitor.finish(last)
        if self.best is not None and not self.monitor.chooses:
            put_back(self.setup.roles.policy, self.best)
        return rollout.final_measures(self.setup, self.held_out or self.prompts) | {
            "kl_coef": self.state.kl_coef,
            "kl_target": self.config.kl.target,
            "episodes": self.state.episodes,
        }

    def _evaluate(self) -> dict[str, float]:
        with self.run.timed("evaluate"):
            return rollout.evaluate(self.setup, self.judged)

    def _save(self, update: int, more: Mapping[str, Any] | None = None) -> None:
        """A checkpoint after an update. more: values beside its own."""
        tensors = training_state(self.setup, self.optimizers)
        in_flight, about_it = self.ahead.state(update)
        tensors |= {"best": self.best, "snapshots": self.monitor.snapshots, **in_flight}
        if self.curriculum is not None:
            tensors |= {"curriculum": self.curriculum.state()}
        if not group.is_sharded():
            modules = (self.setup.roles.policy, *self.setup.roles.value_modules)
            trained = [gradients.checksum(module, trained=True) for module in modules]
            group.agree(f"the weights after update {update}", trained)
        values = {"stopping": self.stopping.values(), "monitor": self.monitor.values(), **about_it}
        self.run.save(update, tensors, {**self.state.values(), **values, **(more or {})})


def _curriculum(config: OnPolicy, prompts: Sequence[PromptExample], seed: int) -> Curriculum | None:
    if config.curriculum is None:
        return None
    by_prompt = config.curriculum.by == PROMPT
    return Curriculum(
        config.curriculum, [{}] * len(prompts) if by_prompt else [p.columns for p in prompts], seed
    )


def _compared(config: OnPolicy, experience: Experience) -> Sequence[float | None]:
    """The reward of each response by which the curriculum says that it passes."""
    named = config.curriculum and config.curriculum.reward
    return experience.rated.raw.tolist() if named is None else experience.rated.by_name[named]


# ---------------------------------------------------------------- 1, 2: rollout, score, advantages


@dataclass(frozen=True, slots=True)
class Batch:
    """What an update learns from."""

    experience: Experience
    episodes: Episodes
    reward_scaler: RunningScale  # which has seen the rewards
    sampled: int  # responses that were sampled for it
    metrics: dict[str, float]


def collect(
    algorithm: Algorithm,
    prompts: Sequence[PromptExample],
    state: LoopState,
    update: int,
    drawn: Drawn | None = None,
) -> Batch:
    """Responses to the prompts of an update, scored, with their advantages. drawn: the responses, where they
    were sampled already."""
    collected = algorithm.collect(prompts, state, update, drawn)
    episodes, of_advantages = algorithm.advantages(collected.experience, state.kl_coef)
    metrics = rollout.measured(collected.experience, state.kl_coef)
    metrics |= rollout.of_staleness(algorithm.setup, collected.experience)
    metrics |= {**collected.metrics, "rollout/episodes": float(collected.episodes), **of_advantages}
    return Batch(collected.experience, episodes, collected.reward_scaler, collected.episodes, metrics)


# ---------------------------------------------------------------- 3: epochs of mini-batches


@dataclass(frozen=True, slots=True)
class Learned:
    """What the gradient steps of an update did."""

    metrics: dict[str, float]  # means over the steps
    largest_kl: float  # the largest `approx_kl` of a mini-batch, in nats a token


def learn(
    algorithm: Algorithm,
    optimizers: Sequence[torch.optim.Optimizer],
    episodes: Episodes,
    update: int,
    state: LoopState,
) -> Learned:
    """Epochs of mini-batches over one batch of episodes; the policy's optimiser is the first.

    A step's rate is `state.lr_factor` of the scheduled one, less where this update has already gone further
    than `desired_kl`. A critic's optimiser keeps the scheduled rate. The first update in which the policy
    learns takes rising rates: Adam's first steps are as long as the rate allows, whatever the gradient, and
    nothing is known yet of how far they lead. Raises NotFiniteError for a loss or a gradient that is not
    finite.
    """
    setup, config, run = algorithm.setup, algorithm.setup.config, algorithm.setup.run
    policy_learns = update > algorithm.warmup
    rising = update == algorithm.warmup + 1 and config.desired_kl is not None
    scheduled = lr_scale(config, update - 1, config.updates)
    sizes = Sizes.of(episodes)
    steps = list(_mini_batches(config, run.seed, len(episodes.ids), update))
    means, epochs, first_ratio, largest_kl, mismatch = Means(), 0, 1.0, 0.0, LogprobMismatch()
    for step, (epoch, rows) in enumerate(steps):
        # loss and backward, micro-batch by micro-batch
        measured = backward(
            algorithm, episodes, rows, state.kl_coef, sizes, first=step == 0, policy_learns=policy_learns
        )
        mismatch += measured.mismatch
        metrics = measured.metrics()
        if policy_learns:
            largest_kl = max(largest_kl, measured.approx_kl)
        if step == 0 and measured.ratio_var > 0:  # else it is 1, and only its sum over parts is rounded
            first_ratio = measured.ratio
        if setup.ptx and policy_learns:
            metrics["loss/ptx"] = _ptx_gradient(setup, update, step)
        # step
        factor = _lr_factor(state.lr_factor, largest_kl, config.desired_kl)
        if rising:
            factor *= min(1.0, (step + 1) / len(steps))
        where = f"{run.name}, update {update}"
        with run.stepping():
            of_policy, *_ = [
                optim.step(optimizer, rate * scheduled, config.max_grad_norm, where)
                for optimizer, rate in zip(optimizers, (factor, 1.0))
            ]
        means.add(metrics | {"grad_norm": of_policy["grad_norm"], "lr": of_policy["lr"]})
        epochs = epoch + 1
        if (
            config.max_approx_kl is not None
            and policy_learns
            and measured.approx_kl_k3 > config.max_approx_kl
        ):
            break
    whole = {
        "policy/epochs": epochs, "policy/logp_mismatch": mismatch.largest, "val/ratio_first": first_ratio,
        "policy/approxkl_max": largest_kl, "policy/lr_factor": state.lr_factor,
    }  # fmt: skip
    if episodes.logp_from_sampler:  # the first step is the trainer's first look at them
        whole["rollout/sampler_drift"] = mismatch.mean
    return Learned(means.means() | whole, largest_kl)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What decides which rows share a micro-batch."""

    prompts: list[tuple[int, ...]]  # of each row
    tokens: list[int]  # of each row's prompt and its response up to the last that counts

    @staticmethod
    def of(episodes: Episodes) -> Sizes:
        rows = zip(episodes.ids.tolist(), episodes.prompt_lengths.tolist(), strict=True)
        tokens = (episodes.prompt_lengths + extent(episodes.mask)).tolist()
        return Sizes([tuple(ids[:length]) for ids, length in rows], tokens)


def backward(
    algorithm: Algorithm,
    episodes: Episodes,
    rows: Sequence[int],
    kl_coef: float,
    sizes: Sizes,
    *,
    first: bool,
    policy_learns: bool,
) -> StepMeasures:
    """The gradients of a mini-batch, added up over its micro-batches (of several ranks each has those of its
    share, which the optimiser's step adds up), and the measures of all of it. first: no step was taken
    yet."""
    setup, total = algorithm.setup, StepMeasures()
    denominator = float(count(episodes.mask[list(rows)], setup.config.reduction))
    # rows of one prompt, and of similar length, share a micro-batch: less is read, the same sum
    share = share_of(setup.config, sorted(rows), sizes.tokens.__getitem__, sizes.prompts.__getitem__)
    with batch_layout.counting() as read, cast_cache():
        for part in share.parts:
            batch = MicroBatch.of(
                episodes, part, setup.run.device, denominator=denominator, kl_coef=kl_coef, on_policy=first,
                policy_learns=policy_learns,
            )  # fmt: skip
            # a critic of its own first: what it keeps for its backward is gone before the policy's is there
            if (critic := algorithm.critic_loss(batch)) is not None:
                optim.backward(critic.loss)
                total.add_critic(critic)
            output = algorithm.loss(batch)
            if output.loss.requires_grad:
                optim.backward(output.loss)
            total.add(output)
        for part in share.borrowed:
            _for_nothing(algorithm, episodes, part, denominator, policy_learns=policy_learns)
    mine = [i for part in share.parts for i in part]
    lengths = [(sizes.prompts[i], sizes.tokens[i]) for i in mine]
    setup.run.count("train", useful_tokens(lengths), read(), passes=read.passes, pairs=useful_pairs(lengths))
    return total.over_ranks()


def _for_nothing(
    algorithm: Algorithm, episodes: Episodes, rows: list[int], denominator: float, *, policy_learns: bool
) -> None:
    """The forwards and backwards of a micro-batch that changes nothing: where weights are cut over ranks all
    of them make as many."""
    batch = MicroBatch.of(
        episodes, rows, algorithm.setup.run.device, denominator=denominator, kl_coef=0.0, on_policy=False,
        policy_learns=policy_learns,
    )  # fmt: skip
    if (critic := algorithm.critic_loss(batch)) is not None:
        optim.backward(0.0 * critic.loss)
    loss = algorithm.loss(batch).loss
    if loss.requires_grad:
        optim.backward(0.0 * loss)


def _lr_factor(lr_factor: float, largest_kl: float, desired_kl: float | None) -> float:
    """The share of the scheduled rate for the next step, where the update has gone `largest_kl` so far."""
    limit = math.inf if desired_kl is None else desired_kl
    return kl_adaptive_lr(lr_factor, largest_kl, limit) if largest_kl > limit else lr_factor


def _mini_batches(config: OnPolicy, seed: int, rows: int, update: int) -> Iterator[tuple[int, list[int]]]:
    """(epoch, rows) in the order of an update, one a gradient step."""
    size = config.mini_batch or rows
    for epoch in range(config.epochs):
        order = permutation(rows, derive_seed(seed, "mini-batches", update), epoch)
        for start in range(0, rows, size):
            yield epoch, list(order[start : start + size])


@cast_cache()
def _ptx_gradient(setup: Setup[Any], update: int, step: int) -> float:
    """Add the gradient of coef × language-modelling loss on a few rows (PPO-ptx, 2203.02155); returns the
    loss."""
    ptx = setup.config.ptx
    assert ptx is not None
    seed = derive_seed(setup.run.seed, "ptx", update)
    rows = [setup.ptx[i] for i in rows_of_step(len(setup.ptx), ptx.batch_size, step, seed)]
    tokens, total = sum(row.counted for row in rows), 0.0
    share = share_of(setup.config, rows, lambda row: len(row.ids))
    for part in share.parts:
        value, _ = language.loss(setup.roles.policy, part, setup.pad_id, tokens)
        optim.backward(ptx.coef * value)
        total += float(value.detach())
    for part in share.borrowed:
        optim.backward(0.0 * language.loss(setup.roles.policy, part, setup.pad_id, tokens)[0])
    return group.summed({"loss": total})["loss"]
