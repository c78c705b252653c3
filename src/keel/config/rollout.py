"""Settings of how the responses of an update are sampled."""

from __future__ import annotations

from typing import TYPE_CHECKING

from keel.config.sampler import SamplerConfig

if TYPE_CHECKING:
    from keel.config.on_policy import OnPolicy


class RolloutConfig(SamplerConfig):
    """How the responses of an update are sampled."""


def check_sampler(config: OnPolicy) -> None:
    """ValueError where `rollout.engine` does not go with a stage's other settings."""
    if not config.rollout.vllm:
        return
    if config.changes("engine"):
        raise ValueError(
            f"`engine: {config.engine}` and `rollout.engine: vllm` both say what samples: give one of them"
        )
    if config.model.quantize is not None:
        raise ValueError(
            "`rollout.engine: vllm` holds weights of 16 or 32 bit, and `model.quantize` trains on others: "
            "leave one of them out"
        )
    if config.lora is not None and config.lora.target_parameters is not None:
        raise ValueError(
            "`rollout.engine: vllm` takes no adapters on experts (`lora.target_parameters`): leave them out, "
            "or sample with keel's engine"
        )
