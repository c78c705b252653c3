"""Settings of the stages that learn from their own samples."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from keel.config.parts import DataConfig, Quantize, SamplingConfig, Settings, as_source
from keel.config.presets import AS_IT_COMES, PRESETS, whole_kl
from keel.config.rewards import LearnedTerm, as_terms, check_only, models_of
from keel.config.watching import Watched


class KLConfig(Settings):
    """The constraint that keeps the policy near the reference."""

    coef: float = Field(
        0.05, ge=0, description="β, the weight of the KL term (the initial one, with a target)."
    )
    target: float | None = Field(
        None,
        gt=0,
        description="Adapt β to keep the KL per response (a sum over its tokens, in nats) near this (1909.08593).",
    )
    horizon: float = Field(1000, gt=0, description="Episodes over which the adaptive β reacts.")
    estimator: Literal["k1", "k2", "k3"] = Field(
        "k1",
        description="Per-token estimator of the KL (joschu.net/blog/kl-approx.html). In the loss prefer k2: the gradient of k3 is that of the forward KL.",
    )
    where: Literal["reward", "loss"] = Field(
        "reward", description="Subtract β·KL from the reward, or add it to the loss. Never both."
    )

    @model_validator(mode="after")
    def _sound(self) -> KLConfig:
        if self.target is None and self.changes("horizon"):
            raise ValueError("`kl.horizon` has no effect without `kl.target`")
        if self.target is not None and self.coef == 0:
            raise ValueError("`kl.coef` 0 can never adapt to `kl.target`: start from a positive value")
        if self.where == "loss" and self.estimator == "k1":
            raise ValueError(
                "`kl.where: loss` needs estimator k2 or k3: the expected gradient of k1 is 0, so it would constrain nothing"
            )
        return self


class ShapingConfig(Settings):
    """From a score to a reward."""

    normalize: Literal["none", "model", "running"] = Field(
        "model",
        description="Scale of the scores: as they come; by the reward model's own statistics on SFT samples; or by a running standard deviation.",
    )
    center: Literal["none", "prompt"] = Field(
        "none",
        description="`prompt`: subtract the mean score of the prompt's other samples, which removes each prompt's arbitrary offset.",
    )
    clip: float | None = Field(
        5.0,
        gt=0,
        description="Clip learned rewards, normalised, to ± this times their weight, before the KL penalty; with `normalize: running` the whole sum. Rules are not clipped. With `normalize: none` only if set.",
    )
    missing_stop_penalty: float = Field(
        1.0, ge=0, description="Subtracted from the score of a response that was cut off by max_new_tokens."
    )


class PtxConfig(Settings):
    """Pretraining mix (PPO-ptx, 2203.02155): language modelling on these rows in every update."""

    data: list[DataConfig] = Field(min_length=1, description="Rows of text.")
    coef: float = Field(1.0, gt=0, description="Weight of the language-modelling loss.")
    batch_size: int = Field(16, ge=1, description="Rows in each gradient step.")
    _data = field_validator("data", mode="before")(as_source)


class OnPolicy(Watched):
    """What the stages have in common that learn from their own samples."""

    reference: str | None = Field(
        None, description="The reference policy; null: the model training starts from."
    )
    sharing: Literal["separate", "adapters"] = Field(
        "separate",
        description="adapters: one frozen base; policy and reward models (those that a reward stage trained with `lora` on the same `model`) are adapters on it, and the reference is the base itself. `lora` is on then.",
    )
    reference_dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = Field(
        None, description="Precision of the frozen reference, as in `model.dtype`; null: the model's."
    )
    reference_quantize: Quantize = Field(
        None,
        description="Hold a frozen reference with weights of its own in 8 or 4 bit, as in `model.quantize`.",
    )
    offload: bool = Field(
        False,
        description="Keep the reference and the reward models on the CPU between uses: less GPU memory, more time. For those with weights of their own.",
    )
    lr: float = Field(1e-5, gt=0, description="Peak learning rate of the policy (AdamW).")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "linear", description="Decay of the learning rate after warm-up."
    )
    batch_size: int = Field(64, ge=1, description="Episodes sampled for one update.")
    mini_batch: int | None = Field(
        None, ge=1, description="Episodes in one gradient step; null: all of the batch."
    )
    samples_per_prompt: int = Field(1, ge=1, description="Responses sampled for each prompt.")
    epochs: int = Field(4, ge=1, description="Passes over each batch of episodes.")
    updates: int = Field(100, ge=1, description="Batches of episodes to sample and learn from.")
    sampling: SamplingConfig = Field(
        default_factory=lambda: SamplingConfig.model_validate({}),
        description="How responses are drawn. No top-p or top-k: cutting the distribution biases the ratio.",
    )
    kl: KLConfig = Field(
        default_factory=lambda: KLConfig.model_validate({}), description="The KL constraint."
    )
    shaping: ShapingConfig = Field(
        default_factory=lambda: ShapingConfig.model_validate({}), description="From a score to a reward."
    )
    dual_clip: float | None = Field(
        None, gt=1, description="c: lower bound of the objective for negative advantages (1912.09729)."
    )
    importance_cap: float | None = Field(
        None,
        gt=0,
        description="Truncated importance sampling: weigh each token by min(π_trainer/π_sampler, this), for a sampler whose numbers differ from the trainer's.",
    )
    old_logp: Literal["sampler", "trainer"] = Field(
        "sampler",
        description="Where log π_old comes from: the very logits each token was drawn from, with no further forward of the policy; or a forward of the trainer's own, for a sampler whose numbers differ, and with `importance_cap`, which compares them.",
    )
    entropy_coef: float = Field(0.0, ge=0, description="Weight of the entropy bonus.")
    desired_kl: float | None = Field(
        0.1,
        gt=0,
        description="How far an update should go from its own start at most, in nats a token. Where a mini-batch measures more (mean of ½ (log ρ)²), the policy's learning rate is cut to what would have stayed within, to a half at most, for the rest of the update and those that follow; it recovers by a tenth with every update that stays within, up to `lr`. The gradient steps of the first update, of which nothing is known yet, take rising rates up to it. null: none of this.",
    )
    max_approx_kl: float | None = Field(
        None, gt=0, description="End an update's epochs when the mean of (ρ−1−log ρ) per token passes this."
    )
    ptx: PtxConfig | None = Field(None, description="Pretraining mix.")
    save_every: int = Field(10, ge=1, description="Updates between checkpoints; the last one is kept.")

    @property
    def one_step(self) -> bool:
        """Whether an update takes a single gradient step, so that every ratio is 1."""
        return self.epochs == 1 and self.mini_batch in (None, self.batch_size)

    @property
    def trusts_sampler(self) -> bool:
        """Whether log π_old is the sampler's."""
        return self.old_logp == "sampler" and self.importance_cap is None

    @model_validator(mode="before")
    @classmethod
    def _adapters(cls, values: Any) -> Any:
        """Adapters with their defaults where `sharing` asks for some and none are described."""
        if isinstance(values, dict) and values.get("sharing") == "adapters":
            return {"lora": {}, **values}
        return values

    @model_validator(mode="after")
    def _sound_on_policy(self) -> OnPolicy:
        if self.sharing == "adapters" and self.lora is None:
            raise ValueError(
                "`sharing: adapters` trains adapters, but `lora` is null: leave it out, or share otherwise"
            )
        name = self.kind.upper()
        if self.sampling.temperature == 0:
            raise ValueError(f"`sampling.temperature` 0 (greedy) leaves {name} nothing to explore")
        if self.lora is not None and self.lora.dropout > 0:
            raise ValueError(
                f"`lora.dropout` must be 0 in {name}: with dropout the ratio of the first update is not 1"
            )
        if self.batch_size % self.samples_per_prompt:
            raise ValueError(
                f"`batch_size` {self.batch_size} is not a multiple of `samples_per_prompt` {self.samples_per_prompt}"
            )
        if self.mini_batch is not None and self.batch_size % self.mini_batch:
            raise ValueError(
                f"`batch_size` {self.batch_size} is not a multiple of `mini_batch` {self.mini_batch}"
            )
        if self.shaping.center == "prompt" and self.samples_per_prompt < 2:
            raise ValueError(
                "`shaping.center: prompt` needs `samples_per_prompt` of 2 or more: a lone sample has no peers"
            )
        if self.max_steps is not None:
            raise ValueError(f"{name} counts `updates`; `max_steps` would have no effect")
        if self.model.init is not None:
            raise ValueError(
                f"{name} starts from a trained model: give `model` as a stage, a path or a hub id"
            )
        own_reference = self.lora is None or self.reference is not None
        idle = [key for key in ("reference_dtype", "reference_quantize") if self.changes(key)]
        if idle and not own_reference:
            raise ValueError(
                f"`{idle[0]}` has no effect with `lora` and no `reference`: the reference is the policy with its adapters off"
            )
        learned = [term for term in self.reward if isinstance(term, LearnedTerm)]
        if self.reference_quantize is not None and self.reference_dtype in ("auto", "float32"):
            raise ValueError(
                f"`reference_quantize` needs a `reference_dtype` of 16 bit for what is not quantised, not {self.reference_dtype}"
            )
        if self.offload and not (own_reference or learned):
            raise ValueError(
                "`offload` has no effect: there is no reward model, and the reference is the policy with its adapters off"
            )
        if self.offload and (self.reference_quantize or any(term.quantize for term in learned)):
            raise ValueError("`offload` is for models in full precision: leave it out, or `quantize`")
        if self.importance_cap is not None and self.changes("old_logp") and self.old_logp == "sampler":
            raise ValueError(
                "`old_logp: sampler` has no effect with `importance_cap`: it compares the trainer's with the sampler's"
            )
        check_only(self.reward, [*self.data, *(self.eval_data or [])], "`data` or `eval_data`")
        limits = ("max_approx_kl", "desired_kl", "dual_clip")
        idle = [key for key in limits if self.changes(key) and getattr(self, key) is not None]
        if idle and self.one_step:
            raise ValueError(
                f"`{idle[0]}` has no effect with one gradient step an update (`epochs` 1, no `mini_batch`): its ratio is 1"
            )
        return self

    def references(self) -> list[tuple[str, str]]:
        reference = [("reference", self.reference)] if self.reference else []
        judges = models_of(self.judge.reward or []) if self.judge else []
        return [*super().references(), *models_of(self.reward), *reference, *judges]


class PPOConfig(OnPolicy):
    """Proximal policy optimisation (1707.06347) against a reward under a KL constraint."""

    kind: Literal["ppo"] = Field(description="Proximal policy optimisation.")
    value_lr: float | None = Field(
        None, gt=0, description="Learning rate of the value head (and the critic); null: `lr`."
    )
    sharing: Literal["separate", "trunk", "adapters"] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        "separate",
        description="The critic: a model of its own (a copy of the starting model), or trunk: a value head on the policy's hidden states. adapters: one frozen base; policy, critic and reward models (those that a reward stage trained with `lora` on the same `model`) are adapters with heads on it, and the reference is the base itself. `lora` is on then.",
    )
    gamma: float = Field(1.0, ge=0, le=1, description="Discount γ.")
    lam: float = Field(0.95, ge=0, le=1, description="λ of generalised advantage estimation (1506.02438).")
    whiten_advantages: bool = Field(
        True, description="Advantages to mean 0 and standard deviation 1 over the batch's response tokens."
    )
    clip: float = Field(0.2, gt=0, description="ε: the ratio counts between 1−ε and 1+ε.")
    value_clip: float = Field(0.2, gt=0, description="The value may move this far from its old one.")
    value_coef: float = Field(0.1, ge=0, description="Weight of the value loss.")
    critic_warmup: int = Field(0, ge=0, description="Updates at the start that train the critic only.")

    @model_validator(mode="after")
    def _sound(self) -> PPOConfig:
        idle = [name for name in ("clip", "value_clip") if self.changes(name)]
        if idle and self.one_step:
            raise ValueError(
                f"`{idle[0]}` has no effect with one gradient step an update (`epochs` 1, no `mini_batch`): its ratio is 1, its values are the old ones"
            )
        if self.critic_warmup and self.value_coef == 0:
            raise ValueError("`critic_warmup` has no effect with `value_coef` 0: the critic learns nothing")
        if self.critic_warmup >= self.updates:
            raise ValueError(
                f"`critic_warmup` {self.critic_warmup} leaves none of {self.updates} updates to the policy"
            )
        return self


class GRPOConfig(OnPolicy):
    """Critic-free policy optimisation: advantages from the samples of one prompt, in the published variants."""

    kind: Literal["grpo"] = Field(description="Group-relative policy optimisation and its kin.")
    preset: Literal["grpo", "dr_grpo", "dapo", "rloo", "reinforce++", "gspo", "cispo"] | None = Field(
        None,
        description="A paper's settings; those that you give yourself win. The run's config shows them all.",
    )
    samples_per_prompt: int = Field(8, ge=1, description="G: responses sampled for each prompt.")
    epochs: int = Field(1, ge=1, description="Passes over each batch of episodes.")
    baseline: Literal["group", "leave_one_out", "none"] = Field(
        "group",
        description="What is subtracted from a reward: the mean of its group, of the others of its group, nothing.",
    )
    scale: Literal["group", "batch", "none"] = Field(
        "group", description="Divide by the standard deviation of the group, of the batch, or by nothing."
    )
    objective: Literal["clipped", "cispo"] = Field(
        "clipped", description="PPO's clipped surrogate, or a clipped weight on log π (CISPO)."
    )
    clip_low: float = Field(0.2, gt=0, le=1, description="The ratio counts from 1 − this.")
    clip_high: float = Field(0.2, gt=0, description="The ratio counts up to 1 + this.")
    level: Literal["token", "sequence"] = Field(
        "token", description="One ratio a token, or one a response (GSPO)."
    )
    reduce: Literal["token", "sequence"] | float = Field(
        "sequence",
        description="Normalise the loss by the tokens of the step, by each response's own length, or by a constant length.",
    )
    resample: int = Field(
        0,
        ge=0,
        description="Dynamic sampling (2503.14476): replace groups whose rewards are all equal by new prompts, at most this many rounds an update.",
    )
    mask_truncated: bool = Field(
        False,
        description="Leave responses that were cut off out of the loss (2503.14476, overlong filtering).",
    )
    kl: KLConfig = Field(
        default_factory=lambda: KLConfig.model_validate({"coef": 0.04, "estimator": "k3", "where": "loss"}),
        description="The KL constraint.",
    )

    @model_validator(mode="before")
    @classmethod
    def _expanded(cls, values: Any) -> Any:
        """The preset's settings where none is given, and the rest of a KL term of which only a part is given."""
        if not isinstance(values, dict):
            return values
        values, preset = dict(values), dict(PRESETS.get(str(values.get("preset")), {}))  # pyright: ignore[reportArgumentType]
        sampling, longest = values.get("sampling", {}), None
        if isinstance(sampling, dict):
            longest = _whole_number(sampling.get("max_new_tokens", 64))
        if longest is None or any(
            not isinstance(values.get(key, {}), dict) for key in ("kl", "sampling", "shaping")
        ):
            return values  # of the wrong type, which is said in its place
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
        if self.baseline != "none" and self.samples_per_prompt < 2:
            raise ValueError(
                f"`baseline: {self.baseline}` needs `samples_per_prompt` of 2 or more: a lone sample has no peers"
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
        if isinstance(self.reduce, float) and not 0 < self.reduce < math.inf:
            raise ValueError(f"`reduce` {self.reduce} must be a positive, finite length")
        self._of_one_length()
        idle = [key for key in ("clip_low", "clip_high", "level", "objective") if self.changes(key)]
        if idle and self.one_step:
            raise ValueError(
                f"`{idle[0]}` has no effect with one gradient step an update, whose ratios are all 1: give `mini_batch` or `epochs`"
            )
        if self.objective == "cispo" and (self.level == "sequence" or self.dual_clip is not None):
            raise ValueError(
                "`objective: cispo` has a weight a token and no dual clip: leave `level` and `dual_clip`"
            )
        if (
            self.kl.coef == 0
            and (self.kl.changes("where") or self.kl.changes("estimator"))
            and self.kl.target is None
        ):
            raise ValueError("`kl.where` and `kl.estimator` have no effect with `kl.coef` 0")
        return self

    def _of_one_length(self) -> None:
        """ValueError where a length that the preset takes from `sampling.max_new_tokens` is another one: what a run's own
        config says of it, in which the preset is written out, would survive a change of that setting."""
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


def _whole_number(value: Any) -> int | None:
    """What pydantic will read as an integer, as one; None for what it will refuse."""
    try:
        return TypeAdapter(int).validate_python(value)
    except ValidationError:
        return None


def _kind(term: Any) -> Any:
    return term.get("kind") if isinstance(term, dict) else getattr(term, "kind", None)
