"""Settings of how the responses of an update are sampled, and when."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from keel.config.sampler import SamplerConfig

if TYPE_CHECKING:
    from keel.config.on_policy import OnPolicy


class RolloutConfig(SamplerConfig):
    """How the responses of an update are sampled, and when."""

    of_keel: ClassVar[tuple[str, ...]] = ("engine", "concurrency")
    concurrency: int | None = Field(
        None,
        ge=1,
        le=4096,
        description=(
            "Rows that are sampled at the same time: requests to a vLLM server (null: 256), or slots of "
            "keel's own engine (null: 64). More read the weights less often and take more memory for keys "
            "and values; results differ by rounding."
        ),
    )
    ahead: int = Field(
        0,
        ge=0,
        le=1,
        description=(
            "1: the responses of the next update are sampled before this one trains (with an engine that "
            "holds weights of its own, while it trains), by weights one update old; `importance_cap` "
            "corrects for them. 0: each update samples with the weights that it trains."
        ),
    )

    partial: int | None = Field(
        None,
        ge=1,
        description=(
            "the most tokens that a response is given in an update. One that has not ended by then is "
            "continued by the weights of the next update, while responses of later updates are begun; an "
            "update learns once all responses to its own prompts have ended. `importance_cap` corrects for "
            "older weights, token by token. null: each update samples whole responses."
        ),
    )


def check_older_weights(config: OnPolicy) -> None:
    """ValueError where `rollout.ahead` or `rollout.partial` cannot work with a stage's other settings."""
    rollout = config.rollout
    if rollout.ahead and rollout.partial:
        raise ValueError("`rollout.ahead` and `rollout.partial` both say what older weights sample: give one")
    if not (rollout.ahead or rollout.partial):
        return
    name = "`rollout.ahead`" if rollout.ahead else "`rollout.partial`"
    most = config.sampling.max_new_tokens
    if rollout.partial and rollout.partial >= most:
        raise ValueError(
            f"{name} of {rollout.partial} has no effect: no response has more than {most} tokens"
        )
    if rollout.ahead and rollout.sleep:
        raise ValueError(
            f"{name} has the server sample while keel trains, when `rollout.sleep` has it sleep: leave one "
            "of them out"
        )
    if not config.weighs_samples:
        raise ValueError(
            f"{name} does not go with {config.kind}, which does not correct for what older weights "
            "have sampled; ppo and grpo do"
        )
    if config.importance_cap is None:
        raise ValueError(
            f"{name} learns from responses of older weights, which importance weights correct for: "
            "set `importance_cap` (2 is usual)"
        )
    if config.uses_tools:
        raise ValueError(
            f"{name} does not go with `tools` or `environment`: an environment plays one episode at "
            "a time, which has to be rated before the next"
        )
    if getattr(config, "resample", 0):
        raise ValueError(
            f"{name} does not go with `resample`: which groups are replaced is known only once they are rated"
        )
    if config.curriculum is not None:
        raise ValueError(
            f"{name} does not go with `curriculum`: which prompts come next is known only once the "
            "responses of this update are rated"
        )
    if config.updates == 1:
        raise ValueError(f"{name} has no effect with one update: nothing comes after it")


def check_sampler(config: OnPolicy) -> None:
    """ValueError where `rollout` does not go with a stage's other settings."""
    if not config.rollout.vllm:
        if config.rollout.concurrency is not None and config.changes("engine"):
            raise ValueError(f"`rollout.concurrency` has no effect with `engine: {config.engine}`")
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
