"""On-policy distillation (GKD, 2306.13649): the student samples, and at each position of its replies its
distribution is drawn to the teacher's. The loop is `keel.rl.loop`; here is the loss.

What this leaves out or does differently, knowingly:
- no gradient flows through the sampling, as in the paper;
- the paper tosses a coin for each batch whether it is sampled or taken from the data; here every update has
  the same share of both, so that its size and its meaning are the same throughout;
- the teacher reads a reply once, in the loss. Nothing is asked of it while samples are scored, so metrics of
  the samples before the update have no KL; held-out prompts have the exact one;
- both distributions are those over the ids that the student's tokenizer has, at the sampling temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from keel.algorithms import distillation, policy
from keel.algorithms.distillation import Compared
from keel.algorithms.masked import count, masked_mean, reduced
from keel.config import DistillConfig
from keel.data import chat
from keel.data.batches import derive_seed, length_mask, pad, rows_of_step
from keel.data.stored.tokens import Tokens
from keel.models import experts
from keel.models.logprobs import HeadInputs, head_inputs, scatter_to_mask
from keel.rl import loop, rollout
from keel.rl.algorithm import (
    Collected,
    CriticLoss,
    LogprobMismatch,
    LossOutput,
    MicroBatch,
    collected,
    policy_forward,
)  # fmt: skip
from keel.rl.rollout import Drawn, Experience, LoopState, PromptExample, Setup
from keel.rl.setup import make_optimizers, open_stage
from keel.rollout.score_responses import Scored
from keel.rundir.stage_run import StageRun
from keel.stages import lazy_rows, prepare
from keel.types import Episodes, Record


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A reply that stands in the data."""

    prompt: list[int]
    reply: list[int]  # with the token that ends it


def run(config: DistillConfig, stage: StageRun) -> dict[str, Any]:
    """1. data, prompts and models  2. updates: sample, compare with the teacher, learn  3. save the
    student."""
    demonstrations = read_demonstrations(config, stage)
    prompts, held_out, setup = open_stage(config, stage, sharing="none")
    # nobody else holds the optimisers: they, and the weights by them, would be kept while models are saved
    result = loop.OnPolicyLoop(
        Distillation(setup, demonstrations), prompts, held_out, make_optimizers(config, setup.roles)
    ).train()
    prepare.save_model(
        stage, setup.roles.policy, setup.tokenizer, config, f"A student of {config.teacher} (distillation)"
    )
    return result


def read_demonstrations(config: DistillConfig, stage: StageRun) -> Sequence[Demonstration]:
    """The replies of the data, as tokens; no weights are read. DataError for a bad row."""
    if config.demonstrations is None:
        return ()
    dataset = prepare.read(stage, config.demonstrations.data, ("demonstration",))
    tokenizer = prepare.open_tokenizer(
        config.model, stage, conversational=dataset.conversational, reads=dataset.records
    )
    limit = prepare.limit_of(config, stage, prepare.source_of(config.model, stage))
    too_long = prepare.TooLong(stage, config.too_long, limit)

    def fits(record: Record, tokens: Tokens) -> bool:
        prompt, reply = tokens
        return too_long.fits(
            record, len(prompt) + len(reply), truncatable=limit is None or len(reply) < limit
        )

    def build(number: int, tokens: Tokens) -> Demonstration:
        prompt, reply = tokens
        excess = 0 if limit is None else max(0, len(prompt) + len(reply) - limit)
        return Demonstration(list(prompt[excess:]), list(reply))

    rows = lazy_rows.encode(dataset.records, tokenizer, too_long, fits, build)
    too_long.report()
    return rows


class Distillation:
    """An `Algorithm`: no rewards, no critic, and a divergence from a teacher as its loss."""

    warmup = 0

    def __init__(self, setup: Setup[DistillConfig], demonstrations: Sequence[Demonstration] = ()) -> None:
        self.setup, self.config, self.demonstrations = setup, setup.config, demonstrations
        self.of_data: list[Demonstration] = []  # those of the update at work

    def collect(
        self, prompts: Sequence[PromptExample], state: LoopState, update: int, drawn: Drawn | None = None
    ) -> Collected:
        """The student's replies to the prompts; and which demonstrations the update has."""
        setup, count = self.setup, self.config.demonstrated
        if count:
            order = derive_seed(setup.run.seed, "demonstrations")
            rows = rows_of_step(len(self.demonstrations), count, update - 1, order)
            self.of_data = [self.demonstrations[i] for i in rows]
        return collected(setup, prompts, state, update, drawn)

    def advantages(self, experience: Experience, kl_coef: float) -> tuple[Episodes, dict[str, float]]:
        """The replies to learn from: the student's, whose `advantages` are 1, and those of the data, 0 there:
        of these nobody knows the log-probabilities that they were drawn with."""
        scored = experience.scored
        if self.setup.teacher_tokenizer is not None:
            return self._asked(experience), {}
        own = scored.mask.to(scored.logp)
        if self.of_data:
            scored, own = with_demonstrations(
                scored, own, self.of_data, chat.ensure_pad(self.setup.tokenizer)
            )
        zeros = torch.zeros_like(scored.logp)
        episodes = Episodes(
            scored.ids, scored.prompt_lengths, scored.mask, scored.logp, scored.ref_logp, zeros, zeros, own,
            zeros, logp_from_sampler=experience.logp_from_sampler,
        )  # fmt: skip
        return episodes, {}

    def _asked(self, experience: Experience) -> Episodes:
        """As a teacher sees replies that it is asked about through text: `advantages` are its gaps less their
        mean, `returns` each token's share of the sampled KL."""
        scored = experience.scored
        with self.setup.run.timed("forward"):
            found = rollout.asked(self.setup, experience.prompts, experience.completions, scored)
        mask, zeros = scored.mask & found.mask, torch.zeros_like(scored.logp)
        centred = torch.where(mask, found.gap - masked_mean(found.gap, mask), 0.0)
        return Episodes(
            scored.ids, scored.prompt_lengths, mask, scored.logp, scored.ref_logp, zeros, zeros, centred,
            found.share, logp_from_sampler=experience.logp_from_sampler,
        )  # fmt: skip

    def critic_loss(self, batch: MicroBatch) -> CriticLoss | None:
        """None: there is no critic."""
        return None

    def loss(self, batch: MicroBatch) -> LossOutput:
        """The divergence, a mean over the tokens of the gradient step."""
        if self.setup.teacher_tokenizer is not None:
            return self._sampled_loss(batch)
        roles, mask, denominator = self.setup.roles, batch.mask, batch.denominator
        with torch.no_grad():
            theirs = head_inputs(roles.reference, batch.ids, batch.index)
        with experts.collecting(roles.policy) as routed:
            ours = head_inputs(roles.policy, batch.ids, batch.index, lengths=batch.lengths)
        found = self._compared(ours, theirs, batch.tokens)

        def mean(values: Tensor) -> Tensor:
            return reduced(scatter_to_mask(values, mask), mask, "token", denominator)

        loss = mean(found.loss)
        sampled, old_logp = mask & (batch.advantages > 0), batch.old_logp
        logp, mismatch = scatter_to_mask(found.logp, mask), LogprobMismatch()
        if batch.on_policy:  # π_old is π, whatever rounding is between the two
            mismatch, old_logp = LogprobMismatch.between(logp, old_logp, sampled), logp
        old_logp = torch.where(sampled, old_logp, logp)  # of a reply of the data nobody knows it
        far = policy.divergence(logp, old_logp, mask, "token", denominator)
        whole, of_experts = routed.added_to(loss, count(mask) / denominator)
        measured = {
            "teacher_kl": mean(found.reverse_kl),
            "teacher_entropy": mean(found.teacher_entropy),
            "teacher_agreement": mean(found.agree.to(found.logp)),
        }
        return LossOutput(
            whole, loss.detach(), far["approxkl"], far["approxkl_k3"], mean(found.entropy), far["ratio"],
            far["ratio_var"], mismatch=mismatch, extra=measured | of_experts,
        )  # fmt: skip

    def _sampled_loss(self, batch: MicroBatch) -> LossOutput:
        """Of a teacher that was asked through text: the policy gradient of the sampled KL, in gradient steps
        after the first with PPO's clipped ratio. What is logged as the loss is the KL."""
        now, mask, denominator = policy_forward(self.setup, batch), batch.mask, batch.denominator
        old_logp, mismatch = batch.old_logp, LogprobMismatch()
        if batch.on_policy:
            mismatch, old_logp = LogprobMismatch.between(now.logp, old_logp, mask), now.logp.detach()
        loss, far = policy.clipped(now.logp, old_logp, batch.advantages, mask, denominator=denominator)
        loss, of_experts = now.routed.added_to(loss, count(mask) / denominator)
        sampled_kl = reduced(batch.returns, mask, "token", denominator)
        entropy = reduced(now.entropy.detach(), mask, "token", denominator)
        return LossOutput(
            loss, sampled_kl, far["approxkl"], far["approxkl_k3"], entropy, far["ratio"], far["ratio_var"],
            mismatch=mismatch, extra={"teacher_kl": sampled_kl, **of_experts},
        )  # fmt: skip

    def _compared(self, ours: HeadInputs, theirs: HeadInputs, tokens: Tensor) -> Compared:
        """Student and teacher at (N,) positions, a part of the logits at a time; those of one part are made
        again in the backward pass where there are several."""
        config, vocab = self.config, self.setup.vocab

        def of(values: Tensor, of_teacher: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad():
                teacher_logits = theirs.logits(of_teacher)[:, :vocab]
            return distillation.compare(
                ours.logits(values)[:, :vocab], teacher_logits, tokens, config.interpolation,
                config.sampling.temperature, config.top_k,
            )  # fmt: skip

        rows = min(ours.rows_at_once, theirs.rows_at_once)
        if len(tokens) <= rows:
            return Compared(*of(ours.values, theirs.values, tokens))
        parts = zip(ours.values.split(rows), theirs.values.split(rows), tokens.split(rows), strict=True)
        found = [checkpoint(of, *part, use_reentrant=False) for part in parts]
        return Compared(*(torch.cat(column) for column in zip(*found, strict=True)))


def with_demonstrations(
    scored: Scored, own: Tensor, rows: Sequence[Demonstration], pad_id: int
) -> tuple[Scored, Tensor]:
    """The samples, and behind them replies of the data. own: (B, T), 1 at the samples' tokens."""
    ids, _ = pad([[*row.prompt, *row.reply] for row in rows], pad_id)
    mask = length_mask(torch.tensor([len(row.reply) for row in rows]), max(len(row.reply) for row in rows))
    zeros = torch.zeros(mask.shape)

    def joined(above: Tensor, below: Tensor, value: float = 0.0) -> Tensor:
        width = max(above.shape[1], below.shape[1])
        parts = [torch.nn.functional.pad(x, (0, width - x.shape[1]), value=value) for x in (above, below)]
        return torch.cat([parts[0], parts[1].to(parts[0])])

    lengths = torch.cat([scored.prompt_lengths, torch.tensor([len(row.prompt) for row in rows])])
    more = Scored(
        joined(scored.ids, ids, pad_id), lengths, joined(scored.mask, mask), joined(scored.logp, zeros),
        joined(scored.ref_logp, zeros), joined(scored.exact_kl, zeros), joined(scored.values, zeros),
    )  # fmt: skip
    return more, joined(own, zeros)
