"""Settings of a run on several processes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from keel.config.settings import Settings


class DistributedConfig(Settings):
    """How a run on several ranks (`keel run --nproc`, torchrun) is computed. On one process it says nothing,
    and no result depends on it but for rounding."""

    strategy: Literal["auto", "ddp", "fsdp"] = Field(
        "auto",
        description=(
            "ddp: every rank has the weights whole, gradients are summed; fsdp: weights, gradients and "
            "optimiser states are cut over the ranks (FSDP2); auto: ddp."
        ),
    )
    offload: bool = Field(
        False,
        description=(
            "fsdp: weights, gradients and optimiser states that are cut lie in host memory, where the "
            "optimiser steps; a card has a layer at a time, while it computes. On the CPU they lie there "
            "anyway."
        ),
    )
    mixed_precision: bool = Field(
        True,
        description=(
            "fsdp: where a model with float32 weights multiplies in bfloat16 (`dtype: auto`), ranks gather "
            "its matrices in bfloat16, and sum gradients in float32; the numbers are the same. false: they "
            "gather them in float32."
        ),
    )
    timeout: float = Field(
        60.0,
        ge=5,
        le=86_400,
        description=(
            "Seconds that a rank may keep the others waiting before the run ends. A rank that does not "
            "answer at all is given up after half of it."
        ),
    )

    @model_validator(mode="after")
    def _of_cut_weights(self) -> DistributedConfig:
        if self.offload and self.strategy != "fsdp":
            raise ValueError(
                "`offload` is of weights that are cut over ranks: set `strategy: fsdp` with it, or leave it "
                "out"
            )
        if not self.mixed_precision and self.strategy != "fsdp":
            raise ValueError(
                "`mixed_precision` is of weights that are cut over ranks: set `strategy: fsdp` with it, or "
                "leave it out"
            )
        return self
