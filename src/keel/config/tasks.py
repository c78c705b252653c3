"""Settings of rewards for tasks that check themselves, and of what is sampled of such tasks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from keel.config.settings import Settings


class GymSettings(Settings):
    """How a reply to a task of reasoning-gym is scored."""

    reads: Literal["auto", "tag", "whole"] = Field(
        "auto",
        description=(
            "Where the answer stands: in the last <answer>…</answer> (tag); all of the reply behind its "
            "thought (whole); the first where there is one, else the second (auto)."
        ),
    )
    partial: bool = Field(
        True, description="Take the task's score as it is, parts of 1 included; false: 1 for 1, else 0."
    )
    timeout: float = Field(
        10.0, gt=0, allow_inf_nan=False, description="Seconds to score an answer in, after which it has 0."
    )


class CodeRunSettings(Settings):
    """How programs of replies are found, run and scored."""

    tests: str = Field(
        "tests",
        min_length=1,
        description=(
            "Column of the tests: Python (a list of asserts, functions test_…, check(candidate)), or inputs "
            "and outputs ([{input, output}], {inputs, outputs, fn_name}); also as JSON text."
        ),
    )
    setup: str = Field(
        "setup", min_length=1, description="Column of Python to run before tests that are Python, if any."
    )
    entry_point: str = Field(
        "entry_point",
        min_length=1,
        description="Column of the name of what check(candidate) is given, if any.",
    )
    score: Literal["share", "all"] = Field(
        "share", description="The share of the tests that pass, or 1 where all do and else 0."
    )
    unfenced: Literal["run", "fail"] = Field(
        "run",
        description=(
            "The program is the last fenced block (python, py or unnamed). A reply without any fence is a "
            "program as a whole (run), or fails."
        ),
    )
    sandbox: Literal["auto", "bubblewrap", "podman", "docker", "none"] = Field(
        "auto",
        description=(
            "What contains the programs. auto: the first that works here; where none does nothing is run. "
            "none: they run as you, with limits but without walls."
        ),
    )
    image: str = Field(
        "docker.io/library/python:3.12-slim",
        min_length=1,
        description="Image of a container, which must be on this machine, with a python3 in it.",
    )
    packages: bool = Field(
        False,
        description=(
            "Programs may import what is installed beside keel (numpy …), too, not the standard library "
            "alone."
        ),
    )
    timeout: float = Field(
        5.0,
        gt=0,
        le=3600,
        description="Seconds of the processor that a test may take; by the clock three times as many.",
    )
    memory: int = Field(512, ge=64, le=1 << 20, description="MiB that each process of a test may take.")
    processes: int = Field(
        8, ge=1, le=4096, description="Processes and threads that the tests of a reply may have at once."
    )
    at_once: int | None = Field(
        None, ge=1, le=1024, description="Sandboxes that run at a time; null: one a core, 8 at most."
    )

    @model_validator(mode="after")
    def _sound_sandbox(self) -> CodeRunSettings:
        contained = self.sandbox in ("auto", "podman", "docker")
        if self.changes("image") and not contained:
            raise ValueError(f"`image` has no effect with `sandbox: {self.sandbox}`: it is a container's")
        if self.packages and self.sandbox in ("podman", "docker"):
            raise ValueError(
                f"`packages` has no effect with `sandbox: {self.sandbox}`, which has those of its `image`"
            )
        return self


class CurriculumConfig(Settings):
    """Sample prompts that are passed sometimes: where every reply passes or none does, nothing is learned."""

    by: str = Field(
        "prompt",
        min_length=1,
        description=(
            "What has a pass rate of its own: each prompt; or all rows with one value in this column (task, "
            "level, source), for data whose prompts hardly come again."
        ),
    )
    threshold: float = Field(
        0.5, allow_inf_nan=False, description="A reply passes whose reward is at least this."
    )
    reward: str | None = Field(
        None,
        min_length=1,
        description="Name of the reward that is compared with it; null: the weighted sum of all.",
    )
    explore: float = Field(
        0.25,
        ge=0,
        lt=1,
        description=(
            "Share of an update's prompts that are drawn as without a curriculum, pass after pass, so that "
            "what was too hard or too easy is looked at again."
        ),
    )
    memory: int = Field(
        64, ge=1, description="Replies that a pass rate looks back on; older ones fade as new ones come."
    )
