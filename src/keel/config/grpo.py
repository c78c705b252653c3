"""Settings of a `grpo` stage."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from keel.config import methods
from keel.config.on_policy import KLConfig, OnPolicy
from keel.config.presets import AS_IT_COMES, PRESETS, whole_kl
from keel.config.rewards import as_terms

if TYPE_CHECKING:
    from keel.algorithms.masked import Reduction


class GRPOConfig(OnPolicy):
    """Critic-free policy optimisation: advantages from the samples of one prompt, in the published
    variants."""

    renamed: ClassVar[Mapping[str, str]] = {"objective": "policy_loss"}

    kind: Literal["grpo"] = Field(description="Group-relative policy optimisation and its kin.")
    preset: Literal["grpo", "dr_grpo", "dapo", "rloo", "reinforce++", "gspo", "cispo"] | None = Field(
        None,
        description="A paper's settings; those that you give yourself win. The run's config shows them all.",
    )
    samples_per_prompt: int = Field(8, ge=1, description="G: responses sampled for each prompt.")
    epochs: int = Field(1, ge=1, description="Passes over each batch of episodes.")
    baseline: Literal["group", "leave_one_out", "none"] = Field(
        "group",
        description=(
            "What is subtracted from a reward: the mean of its group, of the others of its group, nothing."
        ),
    )
    scale: Literal["group", "batch", "none"] = Field(
        "group", description="Divide by the standard deviation of the group, of the batch, or by nothing."
    )
    clip_low: float = Field(0.2, gt=0, le=1, description="The ratio counts from 1 − this.")
    clip_high: float = Field(0.2, gt=0, description="The ratio counts up to 1 + this.")
    level: Literal["token", "sequence"] = Field(
        "token", description="One ratio a token, or one a response (GSPO)."
    )
    reduce: Literal["token", "sequence"] | float = Field(
        "sequence",
        description=(
            "Normalise the loss by the tokens of the step, by each response's own length, or by a "
            "constant length."
        ),
    )
    resample: int = Field(
        0,
        ge=0,
        description=(
            "Dynamic sampling (2503.14476): replace groups whose rewards are all equal by new prompts, at "
            "most this many rounds an update."
        ),
    )
    mask_truncated: bool = Field(
        False,
        description="Leave responses that were cut off out of the loss (2503.14476, overlong filtering).",
    )
    kl: KLConfig = Field(
        default_factory=lambda: KLConfig.model_validate({"coef": 0.04, "estimator": "k3", "where": "loss"}),
        description="The KL constraint.",
    )

    @property
    def reduction(self) -> Reduction:
        return self.reduce

    def loss_settings(self) -> dict[str, Any]:
        return {
            "clip_low": self.clip_low,
            "clip_high": self.clip_high,
            "dual_clip": self.dual_clip,
            "level": self.level,
            "reduce": self.reduce,
        }

    def advantage_settings(self) -> dict[str, Any]:
        return {"group_size": self.samples_per_prompt, "gamma": 1.0, "lam": 1.0}

    @model_validator(mode="before")
    @classmethod
    def _expanded(cls, values: object) -> Any:
        """The preset's settings where none is given, and the rest of a KL term of which only a part is
        given."""
        if not isinstance(values, dict):
            return values
        values = cls.with_todays_keys(values)  # a preset must see what is given
        values, preset = dict(values), dict(PRESETS.get(str(values.get("preset")), {}))  # pyright: ignore[reportArgumentType]
        sampling, longest = values.get("sampling", {}), None
        if isinstance(sampling, dict):
            longest = _whole_number(sampling.get("max_new_tokens", 64))
        if longest is None or any(
            not isinstance(values.get(key, {}), dict) for key in ("kl", "sampling", "shaping")
        ):
            return values  # of the wrong type, which is said in its place
        if values.get("advantage") is not None:  # which takes their place
            preset = {key: value for key, value in preset.items() if key not in ("baseline", "scale")}
        form = preset.pop("kl", {"coef": 0.04, "estimator": "k3", "where": "loss"})
        values["kl"] = whole_kl(values.get("kl"), form)
        if preset:
            values["shaping"] = AS_IT_COMES | values.get("shaping", {})
        if preset.pop("overlong", False) and values.get("reward") is not None:
            terms = as_terms(values["reward"])
            if not any(_kind(term) == "overlong" for term in terms):
                overlong = {"kind": "overlong", "max_length": longest, "buffer": max(1, longest // 5)}
                values["reward"] = [*terms, overlong]
        steps, batch = preset.pop("steps", None), _whole_number(values.get("batch_size", 64))
        if steps and "epochs" not in values and batch is not None and batch > 1:
            most = next(n for n in range(min(steps, batch), 0, -1) if batch % n == 0)
            values.setdefault("mini_batch", batch // most)
        for key, value in preset.items():
            values.setdefault(key, float(longest) if value == "max_new_tokens" else value)
        return values

    @model_validator(mode="after")
    def _sound(self) -> GRPOConfig:
        if self.advantage is not None:
            idle = [key for key in ("baseline", "scale") if self.changes(key)]
            if idle:
                raise ValueError(f"`{idle[0]}` has no effect with `advantage: {self.advantage}`")
        if self.advantage is None and self.baseline != "none" and self.samples_per_prompt < 2:
            raise ValueError(
                f"`baseline: {self.baseline}` needs `samples_per_prompt` of 2 or more: a lone sample has "
                "no peers"
            )
        if self.shaping.center != "none":
            raise ValueError(
                "`shaping.center` has no place here: `baseline` already compares samples of one prompt"
            )
        if self.baseline == "none" and self.scale == "group":
            raise ValueError("`scale: group` needs a group: set `baseline: group`, or `scale: batch`")
        if self.baseline == "leave_one_out" and self.scale != "none":
            raise ValueError("`scale` has no effect with `baseline: leave_one_out`: set `scale: none`")
        if self.baseline == "none" and self.resample:
            raise ValueError("`resample` has no effect with `baseline: none`: no group is compared")
        if self.curriculum is not None and self.resample:
            raise ValueError(
                "`resample` replaces prompts that teach nothing, `curriculum` leaves them out: give one of "
                "them"
            )
        whole = self.advantage in (None, "group_relative", "leave_one_out") and self.baseline != "none"
        if whole and any(term.kind == "environment" and term.at == "turn" for term in self.reward):
            raise ValueError(
                "`at: turn` has no effect where whole episodes are compared: set `baseline: none` or "
                "`advantage: gae`"
            )
        if isinstance(self.reduce, float) and not 0 < self.reduce < math.inf:
            raise ValueError(f"`reduce` {self.reduce} must be a positive, finite length")
        self._of_one_length()
        loss = methods.policy_loss(self.policy_loss, self.loss_settings(), self.policy_loss_args)
        names = {name: name for name in ("clip_low", "clip_high", "dual_clip", "level")}
        self._refuse_idle(names, f"policy_loss: {self.policy_loss}", set(loss.keywords))
        idle = [key for key in ("clip_low", "clip_high", "level") if self.changes(key)]
        if idle and self.one_step:
            raise ValueError(
                f"`{idle[0]}` has no effect with one gradient step an update, whose ratios are all 1: give "
                "`mini_batch` or `epochs`"
            )
        if (
            self.kl.coef == 0
            and (self.kl.changes("where") or self.kl.changes("estimator"))
            and self.kl.target is None
        ):
            raise ValueError("`kl.where` and `kl.estimator` have no effect with `kl.coef` 0")
        return self

    def _of_one_length(self) -> None:
        """ValueError where a length that the preset takes from `sampling.max_new_tokens` is another one: what
        a run's own config says of it, in which the preset is written out, would survive a change of that
        setting."""
        longest = self.sampling.max_new_tokens
        both = f"but `sampling.max_new_tokens` is {longest}: change both, or leave `preset` out"
        constant = PRESETS.get(self.preset or "", {}).get("reduce") == "max_new_tokens"
        if constant and isinstance(self.reduce, float) and self.reduce != longest:
            raise ValueError(f"`reduce` is {self.reduce:g} in `preset: {self.preset}`, {both}")
        for place, term in enumerate(self.reward):
            if self.preset != "dapo" or term.kind != "overlong" or term.max_length == longest:
                continue
            if term.buffer == max(
                1, term.max_length // 5
            ):  # as the preset makes it; others are the user's own
                raise ValueError(
                    f"`reward.{place}.max_length` is {term.max_length} in `preset: dapo`, {both}"
                )


def _whole_number(value: object) -> int | None:
    """What pydantic will read as an integer, as one; None for what it will refuse."""
    try:
        return TypeAdapter(int).validate_python(value)
    except ValidationError:
        return None


def _kind(term: object) -> Any:
    return term.get("kind") if isinstance(term, dict) else getattr(term, "kind", None)
