"""Settings of what samples responses: keel's own engine, or a vLLM server."""

from __future__ import annotations

import math
import re
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from keel.config.addresses import plain_address
from keel.config.settings import LONGEST_PATH, Settings

EXAMPLE = "http://localhost:8000"
AT_ONCE = {"vllm": 256, "keel": 64}  # rows that an engine samples at the same time, where nobody says
# arguments that a started server is given by keel, and the setting that says each
GIVEN = {
    "--host": "", "--port": "", "--uds": "", "--api-key": "", "--model": "", "--logprobs-mode": "",
    "--generation-config": "", "--max-logprobs": "", "--max-model-len": "`max_length` of the stage",
    "--dtype": "`rollout.dtype`", "--enable-sleep-mode": "`rollout.sleep`", "--enable-lora": "`lora`",
    "--max-lora-rank": "`lora.r`", "--trust-remote-code": "`model.trust_remote_code`",
}  # fmt: skip
# arguments of `vllm serve` whose product is the number of cards
PARALLEL = {
    "--tensor-parallel-size": "tensor", "-tp": "tensor", "--pipeline-parallel-size": "pipeline",
    "-pp": "pipeline", "--data-parallel-size": "data", "-dp": "data",
}  # fmt: skip


class SamplerConfig(Settings):
    """What samples responses."""

    # where a server is, and how patiently it is asked, is no part of what it draws
    idle: ClassVar[frozenset[str]] = frozenset(
        {
            "address", "api_key_env", "environment", "devices", "folder", "concurrency", "timeout",
            "patience", "restarts", "sleep",
        }
    )  # fmt: skip
    of_keel: ClassVar[tuple[str, ...]] = ("engine",)  # what keel's own engine is told, too
    started_only: ClassVar[tuple[str, ...]] = ("environment", "devices", "dtype", "args", "restarts")

    engine: Literal["keel", "vllm"] = Field(
        "keel",
        description=(
            "keel: its own engine, in its own process. vllm: a vLLM server, which is given the weights "
            "whenever they have changed."
        ),
    )
    address: str | None = Field(
        None,
        description=(
            "vllm: where a server answers, without /v1: http://localhost:8000. `keel engine serve` starts "
            "one that fits. null: keel starts one for the stage, and ends it with the stage."
        ),
    )
    api_key_env: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="vllm: the environment variable that holds the server's key, which is written nowhere.",
    )
    environment: str | None = Field(
        None,
        max_length=LONGEST_PATH,
        description=(
            "vllm: the virtual environment that vLLM is installed in; null: the one that `keel engine "
            "install vllm` makes."
        ),
    )
    devices: str | None = Field(
        None,
        pattern=r"^\d+(,\d+)*$",
        description=(
            "vllm: the cards of a started server, by number, as 1 or 2,3; with several set "
            "--tensor-parallel-size in `args`. null: those that keel sees."
        ),
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="vllm: precision of a started server; null: what the trainer multiplies in."
    )
    args: list[str] = Field(
        [],
        description=(
            "vllm: further arguments of `vllm serve` for a started server, as "
            '["--gpu-memory-utilization", "0.4"].'
        ),
    )
    push: Literal["auto", "whole"] = Field(
        "auto",
        description=(
            "vllm: what the server is given after an update. auto: the adapters alone where `lora` is "
            "trained, else all weights. whole: all weights, adapters folded in."
        ),
    )
    folder: str | None = Field(
        None,
        max_length=LONGEST_PATH,
        description=(
            "vllm: a folder that keel and the server both see, through which weights go; null: the stage's "
            "own. On one machine one in memory (/dev/shm) is fastest."
        ),
    )
    concurrency: int | None = Field(
        None, ge=1, le=4096, description="vllm: requests at the same time; null: 256."
    )
    timeout: float = Field(600.0, gt=0, description="vllm: seconds that one request may take, to its end.")
    patience: float = Field(
        900.0,
        gt=0,
        description=(
            "vllm: seconds that a server may take to start, or to come back at `address` when it is gone."
        ),
    )
    restarts: int = Field(
        3, ge=0, description="vllm: how often a started server that has died is started again in a stage."
    )
    sleep: bool = Field(
        False,
        description=(
            "vllm: let the server sleep while keel trains: its weights wait in host memory and its cache is "
            "given back, so that both fit one card. For servers on CUDA."
        ),
    )

    @field_validator("address", mode="after")
    @classmethod
    def _plain_address(cls, value: str | None) -> str | None:
        return None if value is None else plain_address(value, EXAMPLE, "/v1")

    @model_validator(mode="after")
    def _sound_sampler(self) -> SamplerConfig:
        self._check_args()
        own = [name for name in SamplerConfig.model_fields if name not in self.of_keel]
        if self.engine == "keel" and (idle := next((name for name in own if self.changes(name)), None)):
            raise ValueError(f"`rollout.{idle}` has no effect with `rollout.engine: keel`; set engine: vllm")
        if self.address is not None:
            if idle := next((name for name in self.started_only if self.changes(name)), None):
                raise ValueError(
                    f"`rollout.{idle}` has no effect with `rollout.address`: that server is started elsewhere"
                )
        elif self.api_key_env is not None:
            raise ValueError("`rollout.api_key_env` has no effect without `rollout.address`")
        return self

    def _check_args(self) -> None:
        """ValueError for an argument that says again, or otherwise, what keel itself tells the server."""
        for argument in self.args:
            flag = argument.partition("=")[0].replace("_", "-")
            if flag in GIVEN:
                instead = GIVEN[flag]
                raise ValueError(
                    f"`rollout.args` holds {flag}, which keel gives the server itself: "
                    + (f"set {instead}" if instead else "leave it out")
                )

    @property
    def vllm(self) -> bool:
        """Whether a vLLM server samples."""
        return self.engine == "vllm"

    @property
    def rows_at_once(self) -> int:
        """Rows that are sampled at the same time."""
        return self.concurrency or AT_ONCE[self.engine]

    @property
    def placeable(self) -> bool:
        """Whether a vLLM server is started that may stand anywhere: it is not told which cards of a machine
        to take, nor does it share one with the trainer."""
        return self.vllm and self.address is None and self.devices is None and not self.sleep

    def cards(self) -> int:
        """Cards that a started server computes on, as `args` say. ValueError for what is no number."""
        found, words = dict.fromkeys(PARALLEL.values(), 1), iter(self.args)
        for word in words:
            flag, equals, value = word.partition("=")
            name = PARALLEL.get(flag.replace("_", "-"))
            if name is None:
                continue
            value = value if equals else next(words, "")
            if not re.fullmatch(r"[1-9]\d{0,4}", value):
                raise ValueError(f"`rollout.args`: {flag} {value}: write a number of cards")
            found[name] = int(value)
        return math.prod(found.values())
