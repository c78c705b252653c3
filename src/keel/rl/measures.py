"""What gradient steps measure: typed sums over micro-batches, and their means over steps by logged name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from keel.distributed import group
from keel.rl.algorithm import CriticLoss, LogprobMismatch, LossOutput
from keel.stages.loop_utils import add_metrics

_SUMS = ("policy_loss", "approx_kl", "approx_kl_k3", "entropy", "ratio", "ratio_var")
_MAYBE = ("clip_fraction", "value_loss", "value_clip_fraction")


@dataclass
class StepMeasures:
    """The measures of one gradient step: sums over its micro-batches, each of which has a share."""

    policy_loss: float = 0.0
    approx_kl: float = 0.0
    approx_kl_k3: float = 0.0
    entropy: float = 0.0
    ratio: float = 0.0
    ratio_var: float = 0.0
    clip_fraction: float | None = None
    value_loss: float | None = None
    value_clip_fraction: float | None = None
    mismatch: LogprobMismatch = field(default_factory=LogprobMismatch)
    extra: dict[str, float] = field(default_factory=dict)

    def add_critic(self, critic: CriticLoss) -> None:
        """One more micro-batch of a critic."""
        self.value_loss = (self.value_loss or 0.0) + float(critic.value_loss)
        self.value_clip_fraction = (self.value_clip_fraction or 0.0) + float(critic.clip_fraction)

    def add(self, output: LossOutput) -> None:
        """One more micro-batch of the policy."""
        if output.critic is not None:
            self.add_critic(output.critic)
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + float(getattr(output, name)))
        if output.clip_fraction is not None:
            self.clip_fraction = (self.clip_fraction or 0.0) + float(output.clip_fraction)
        self.mismatch += output.mismatch
        add_metrics(self.extra, output.extra)

    def over_ranks(self) -> StepMeasures:
        """Of the whole step, where each rank has measured its share of it."""
        parts = group.gathered(self)
        if len(parts) == 1:
            return self
        total = StepMeasures()
        for part in parts:
            for name in (*_SUMS, *_MAYBE):
                own, more = getattr(total, name), getattr(part, name)
                setattr(total, name, own if more is None else (own or 0.0) + more)
            total.mismatch += part.mismatch
            add_metrics(total.extra, part.extra)
        return total

    def metrics(self) -> dict[str, float]:
        """By the names that are logged (docs/metrics.md)."""
        maybe = {
            "loss/value_avg": self.value_loss,
            "val/clipfrac_avg": self.value_clip_fraction,
            "policy/clipfrac_avg": self.clip_fraction,
        }
        return {name: value for name, value in maybe.items() if value is not None} | {
            "policy/approxkl_avg": self.approx_kl,
            "policy/approxkl_k3": self.approx_kl_k3,
            "policy/entropy_avg": self.entropy,
            "loss/policy_avg": self.policy_loss,
            "val/ratio": self.ratio,
            "val/ratio_var": self.ratio_var,
            **{f"policy/{name}": value for name, value in self.extra.items()},
        }


class Means:
    """Of the metrics of several gradient steps, each of which counts alike."""

    def __init__(self) -> None:
        self.count = 0
        self.totals: dict[str, float] = {}

    def add(self, measured: Mapping[str, float]) -> None:
        """One more step."""
        add_metrics(self.totals, measured)
        self.count += 1

    def means(self) -> dict[str, float]:
        """Over the steps so far."""
        return {name: total / self.count for name, total in self.totals.items()}
