"""Settings of the stages that learn from their own samples."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from keel.config.parts import DataConfig, SamplingConfig, Settings, Training, as_source


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
        description="Clip the normalised score to ± this, before the KL penalty and before centring.",
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


class PPOConfig(Training):
    """Proximal policy optimisation (1707.06347) against a reward model under a KL constraint."""

    kind: Literal["ppo"] = Field(description="Proximal policy optimisation.")
    reward: str = Field(description="The reward model: a stage, a path or a hub id.")
    reference: str | None = Field(None, description="The reference policy; null: the model PPO starts from.")
    lr: float = Field(1e-5, gt=0, description="Peak learning rate of the policy (AdamW).")
    value_lr: float | None = Field(
        None, gt=0, description="Learning rate of the value head (and the critic); null: `lr`."
    )
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
    sharing: Literal["separate", "trunk"] = Field(
        "separate",
        description="The critic: a model of its own (a copy of the starting model), or a value head on the policy's hidden states.",
    )
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
    gamma: float = Field(1.0, ge=0, le=1, description="Discount γ.")
    lam: float = Field(0.95, ge=0, le=1, description="λ of generalised advantage estimation (1506.02438).")
    whiten_advantages: bool = Field(
        True, description="Advantages to mean 0 and standard deviation 1 over the batch's response tokens."
    )
    clip: float = Field(0.2, gt=0, description="ε: the ratio counts between 1−ε and 1+ε.")
    dual_clip: float | None = Field(
        None, gt=1, description="c: lower bound of the objective for negative advantages (1912.09729)."
    )
    value_clip: float = Field(0.2, gt=0, description="The value may move this far from its old one.")
    value_coef: float = Field(0.1, ge=0, description="Weight of the value loss.")
    entropy_coef: float = Field(0.0, ge=0, description="Weight of the entropy bonus.")
    max_approx_kl: float | None = Field(
        None, gt=0, description="End an update's epochs when the mean of (ρ−1−log ρ) per token passes this."
    )
    critic_warmup: int = Field(0, ge=0, description="Updates at the start that train the critic only.")
    ptx: PtxConfig | None = Field(None, description="Pretraining mix.")
    eval_every: int | None = Field(None, ge=1, description="Updates between evaluations on held-out prompts.")
    eval_data: list[DataConfig] | None = Field(None, description="Held-out prompts for `eval_every`.")
    patience: int | None = Field(
        None,
        ge=1,
        description="Stop when this many evaluations in a row bring no better reward minus β·KL, and keep the best weights.",
    )
    save_every: int = Field(10, ge=1, description="Updates between checkpoints; the last one is kept.")

    _eval_data = field_validator("eval_data", mode="before")(
        lambda value: None if value is None else as_source(value)
    )

    @model_validator(mode="after")
    def _sound(self) -> PPOConfig:
        if self.sampling.temperature == 0:
            raise ValueError("`sampling.temperature` 0 (greedy) leaves PPO nothing to explore")
        if self.lora is not None and self.lora.dropout > 0:
            raise ValueError(
                "`lora.dropout` must be 0 in PPO: with dropout the ratio of the first update is not 1"
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
            raise ValueError("PPO counts `updates`; `max_steps` would have no effect")
        if self.model.init is not None:
            raise ValueError("PPO starts from a trained model: give `model` as a stage, a path or a hub id")
        idle = [name for name in ("max_approx_kl", "dual_clip", "clip", "value_clip") if self.changes(name)]
        if idle and self.epochs == 1 and self.mini_batch in (None, self.batch_size):
            raise ValueError(
                f"`{idle[0]}` has no effect with one gradient step an update (`epochs` 1, no `mini_batch`): its ratio is 1, its values are the old ones"
            )
        if (self.eval_every is None) != (self.eval_data is None):
            raise ValueError("`eval_every` and `eval_data` work together: give both or neither")
        if self.patience is not None and self.eval_every is None:
            raise ValueError("`patience` has no effect without `eval_every` and `eval_data`")
        if self.critic_warmup and self.value_coef == 0:
            raise ValueError("`critic_warmup` has no effect with `value_coef` 0: the critic learns nothing")
        if self.critic_warmup >= self.updates:
            raise ValueError(
                f"`critic_warmup` {self.critic_warmup} leaves none of {self.updates} updates to the policy"
            )
        return self

    def references(self) -> list[tuple[str, str]]:
        reference = [("reference", self.reference)] if self.reference else []
        return [*super().references(), ("reward", self.reward), *reference]
