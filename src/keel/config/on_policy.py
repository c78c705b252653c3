"""Settings of the stages that learn from their own samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from keel.config import methods
from keel.config.episodes import ToolUse
from keel.config.parts import AsSource, DataConfig, Quantize, SamplingConfig, as_source
from keel.config.rewards import LearnedTerm, check_several, check_source_filters, models_of
from keel.config.rollout import RolloutConfig, check_older_weights, check_sampler
from keel.config.settings import Settings
from keel.config.stage import DataSetting
from keel.config.tasks import CurriculumConfig
from keel.errors import UsageError
from keel.plugins import Group

if TYPE_CHECKING:
    from keel.algorithms.masked import Reduction


class KLConfig(Settings):
    """The constraint that keeps the policy near the reference."""

    coef: float = Field(
        0.05, ge=0, description="β, the weight of the KL term (the initial one, with a target)."
    )
    target: float | None = Field(
        None,
        gt=0,
        description=(
            "Adapt β to keep the KL per response (a sum over its tokens, in nats) near this (1909.08593)."
        ),
    )
    horizon: float = Field(1000, gt=0, description="Episodes over which the adaptive β reacts.")
    estimator: Literal["k1", "k2", "k3"] = Field(
        "k1",
        description=(
            "Per-token estimator of the KL (joschu.net/blog/kl-approx.html). In the loss prefer k2: the "
            "gradient of k3 is that of the forward KL."
        ),
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
                "`kl.where: loss` needs estimator k2 or k3: the expected gradient of k1 is 0, so it would "
                "constrain nothing"
            )
        return self


class ShapingConfig(Settings):
    """From a score to a reward."""

    normalize: Literal["none", "model", "running"] = Field(
        "model",
        description=(
            "Scale of the scores: as they come; by the reward model's own statistics on SFT samples; or by "
            "a running standard deviation."
        ),
    )
    center: Literal["none", "prompt"] = Field(
        "none",
        description=(
            "`prompt`: subtract the mean score of the prompt's other samples, which removes each prompt's "
            "arbitrary offset."
        ),
    )
    clip: float | None = Field(
        5.0,
        gt=0,
        description=(
            "Clip learned rewards, normalised, to ± this times their weight, before the KL penalty; with "
            "`normalize: running` the whole sum. Rules are not clipped. With `normalize: none` only if set."
        ),
    )
    missing_stop_penalty: float = Field(
        1.0, ge=0, description="Subtracted from the score of a response that was cut off by max_new_tokens."
    )


class PtxConfig(Settings):
    """Pretraining mix (PPO-ptx, 2203.02155): language modelling on these rows in every update."""

    data: list[DataConfig] = Field(min_length=1, description="Rows of text.")
    coef: float = Field(1.0, gt=0, description="Weight of the language-modelling loss.")
    batch_size: int = Field(16, ge=1, description="Rows in each gradient step.")
    _data = field_validator("data", mode="before", json_schema_input_type=AsSource)(as_source)


class OnPolicy(ToolUse):
    """What the stages have in common that learn from their own samples."""

    on_policy = True
    imitates: ClassVar[bool] = False  # whether the reference is a teacher, and no reward is optimised
    weighs_samples: ClassVar[bool] = True  # whether the loss corrects for what other weights have sampled
    record_types = ("prompt",)

    reference: str | None = Field(
        None, description="The reference policy; null: the model training starts from."
    )
    sharing: Literal["separate", "adapters"] = Field(
        "separate",
        description=(
            "adapters: one frozen base; policy and reward models (those that a reward stage trained with "
            "`lora` on the same `model`) are adapters on it, and the reference is the base itself. "
            "`lora` is on then."
        ),
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
        description=(
            "Keep the reference and the reward models on the CPU between uses: less GPU memory, more time. "
            "For those with weights of their own."
        ),
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
    curriculum: CurriculumConfig | None = Field(
        None, description="Which prompts are sampled: those that are passed sometimes. null: all in turn."
    )
    sampling: SamplingConfig = Field(
        default_factory=lambda: SamplingConfig.model_validate({}),
        description="How responses are drawn. No top-p or top-k: cutting the distribution biases the ratio.",
    )
    rollout: RolloutConfig = Field(
        default_factory=lambda: RolloutConfig.model_validate({}),
        description="What samples responses, keel's own engine or a vLLM server, and when.",
    )
    kl: KLConfig = Field(
        default_factory=lambda: KLConfig.model_validate({}), description="The KL constraint."
    )
    shaping: ShapingConfig = Field(
        default_factory=lambda: ShapingConfig.model_validate({}), description="From a score to a reward."
    )
    policy_loss: str = Field(
        "clipped",
        min_length=1,
        description=(
            "clipped: PPO's clipped surrogate; cispo: a clipped weight on log π (2506.13585); or the name "
            "of a policy loss that an installed package adds."
        ),
    )
    policy_loss_args: dict[str, Any] = Field(
        {}, description="Further arguments of the policy loss, by name, for one of another package."
    )
    advantage: str | None = Field(
        None,
        min_length=1,
        description=(
            "gae, group_relative, leave_one_out, or the name of an advantage estimator that an installed "
            "package adds; null: the algorithm's own."
        ),
    )
    advantage_args: dict[str, Any] = Field(
        {}, description="Further arguments of the advantage estimator, by name; needs `advantage`."
    )
    engine: str = Field(
        "keel",
        min_length=1,
        description=(
            "Which engine in keel's process samples responses. keel: its own; reference: one forward over "
            "the whole text for each token, slow and plain, to compare with; or the name of a rollout engine "
            "that an installed package adds."
        ),
    )
    engine_args: dict[str, Any] = Field(
        {}, description="Arguments of an engine of another package, by name, besides the model."
    )
    dual_clip: float | None = Field(
        None, gt=1, description="c: lower bound of the objective for negative advantages (1912.09729)."
    )
    importance_cap: float | None = Field(
        None,
        gt=0,
        description=(
            "Truncated importance sampling: weigh each token by min(π_trainer/π_sampler, this), for a "
            "sampler whose numbers or weights differ from the trainer's."
        ),
    )
    importance_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = Field(
        "token_truncate",
        description=(
            "What `importance_cap` caps: the ratio of each token, or of a whole response (the product of its "
            "tokens'); and how: truncate lowers a ratio to the cap, mask takes what is above it out of the "
            "loss."
        ),
    )
    old_logp: Literal["sampler", "trainer"] = Field(
        "sampler",
        description=(
            "Where log π_old comes from: the very logits each token was drawn from, with no further forward "
            "of the policy; or a forward of the trainer's own, for a sampler whose numbers differ, and with "
            "`importance_cap`, which compares them."
        ),
    )
    entropy_coef: float = Field(0.0, ge=0, description="Weight of the entropy bonus.")
    desired_kl: float | None = Field(
        0.1,
        gt=0,
        description=(
            "How far an update should go from its own start at most, in nats a token. Where a mini-batch "
            "measures more (mean of ½ (log ρ)²), the policy's learning rate is cut to what would have "
            "stayed within, to a half at most, for the rest of the update and those that follow; it "
            "recovers by a tenth with every update that stays within, up to `lr`. The gradient steps of the "
            "first update, of which nothing is known yet, take rising rates up to it. null: none of this."
        ),
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
    def reduction(self) -> Reduction:
        """How the loss of an optimiser step is normalised; see `keel.algorithms.masked.reduced`."""
        return "token"

    def loss_settings(self) -> dict[str, Any]:
        """The stage's settings that a policy loss may take, by the names of its arguments."""
        raise NotImplementedError

    def advantage_settings(self) -> dict[str, Any]:
        """The stage's settings that an advantage estimator may take, by the names of its arguments."""
        raise NotImplementedError

    def plugins(self) -> list[tuple[Group, str]]:
        """The group and name of everything of other packages that the stage uses."""
        named: list[tuple[Group, str | None]] = [
            ("keel.policy_losses", self.policy_loss),
            ("keel.advantages", self.advantage),
            ("keel.engines", self.engine),
        ]
        return [(group, name) for group, name in named if name and methods.is_plugin(group, name)]

    def uncut(self) -> str | None:
        wrong = {
            "`offload`": self.offload,
            "`reference_quantize`": self.reference_quantize is not None,
            f"`engine: {self.engine}`": self.engine not in ("keel", "reference"),
        }
        return next((setting for setting, is_so in wrong.items() if is_so), super().uncut())

    @property
    def engine_name(self) -> str:
        """What samples, for messages."""
        return "vllm" if self.rollout.vllm else self.engine

    @property
    def trusts_sampler(self) -> bool:
        """Whether log π_old is the sampler's."""
        return self.old_logp == "sampler" and self.importance_cap is None

    @model_validator(mode="before")
    @classmethod
    def _adapters(cls, values: object) -> Any:
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
                f"`batch_size` {self.batch_size} is not a multiple of `samples_per_prompt` "
                f"{self.samples_per_prompt}"
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
        self._check_frozen_models()
        if self.importance_cap is not None and self.changes("old_logp") and self.old_logp == "sampler":
            raise ValueError(
                "`old_logp: sampler` has no effect with `importance_cap`: it compares the trainer's with "
                "the sampler's"
            )
        check_source_filters(self.reward, [*self.data, *(self.eval_data or [])], "`data` or `eval_data`")
        self._check_curriculum()
        if self.samples_per_prompt < 2:
            check_several(self.reward, "training with `samples_per_prompt: 1`")
        if self.importance_cap is None and self.changes("importance_mode"):
            raise ValueError("`importance_mode` has no effect without `importance_cap`")
        check_sampler(self)
        self._check_methods()
        check_older_weights(self)
        limits = ("max_approx_kl", "desired_kl", "dual_clip")
        idle = [key for key in limits if self.changes(key) and getattr(self, key) is not None]
        if idle and self.one_step:
            raise ValueError(
                f"`{idle[0]}` has no effect with one gradient step an update (`epochs` 1, no `mini_batch`): "
                "its ratio is 1"
            )
        return self

    def _check_frozen_models(self) -> None:
        """ValueError for settings of the reference and the reward models that contradict each other."""
        own_reference = self.lora is None or self.reference is not None
        idle = [key for key in ("reference_dtype", "reference_quantize") if self.changes(key)]
        if idle and not own_reference:
            raise ValueError(
                f"`{idle[0]}` has no effect with `lora` and no `reference`: the reference is the policy with "
                "its adapters off"
            )
        learned = [term for term in self.reward if isinstance(term, LearnedTerm)]
        if self.reference_quantize is not None and self.reference_dtype in ("auto", "float32"):
            raise ValueError(
                "`reference_quantize` needs a `reference_dtype` of 16 bit for what is not quantised, not "
                f"{self.reference_dtype}"
            )
        if self.offload and not (own_reference or learned):
            raise ValueError(
                "`offload` has no effect: there is no reward model, and the reference is the policy with its "
                "adapters off"
            )
        if self.offload and (self.reference_quantize or any(term.quantize for term in learned)):
            raise ValueError("`offload` is for models in full precision: leave it out, or `quantize`")

    def _check_curriculum(self) -> None:
        """ValueError for a curriculum by a reward that there is not."""
        named = self.curriculum and self.curriculum.reward
        names = [term.log_name for term in self.reward]
        if self.curriculum is not None and not names:
            raise ValueError("`curriculum` has no effect without `reward`, which says what passes")
        if named is not None and named not in names:
            raise ValueError(
                f"`curriculum.reward` is {named!r}, which no reward is called: {', '.join(names)}"
            )

    def _check_methods(self) -> None:
        """ValueError where the policy loss, the advantage estimator or the engine cannot be what is named."""
        try:
            loss = methods.policy_loss(self.policy_loss, self.loss_settings(), self.policy_loss_args)
            if self.advantage is not None:
                methods.estimator(self.advantage, self.advantage_settings(), self.advantage_args)
            methods.engine(self.engine, self.engine_args)
        except UsageError as error:
            raise ValueError(str(error)) from None
        if self.advantage is None and self.advantage_args:
            raise ValueError("`advantage_args` has no effect without `advantage`")
        if self.importance_cap is not None and not methods.takes(loss.func, "weights"):
            raise ValueError(
                f"`importance_cap` has no effect with `policy_loss: {self.policy_loss}`, which takes "
                "no `weights`"
            )
        groups = ("group_relative", "leave_one_out")
        if self.advantage in groups and self.samples_per_prompt < 2:
            raise ValueError(f"`advantage: {self.advantage}` needs `samples_per_prompt` of 2 or more")
        if self.policy_loss == "cispo" and self.one_step:
            raise ValueError(
                "`policy_loss` has no effect with one gradient step an update, whose ratios are all 1: give "
                "`mini_batch` or `epochs`"
            )

    def _refuse_idle(self, settings: dict[str, str], method: str, taken: set[str]) -> None:
        """ValueError for a setting that was changed and whose argument the method does not take; settings:
        setting → argument; taken: the arguments that it takes."""
        for key, argument in settings.items():
            if argument not in taken and self.changes(key):
                raise ValueError(f"`{key}` has no effect with `{method}`, which takes no `{argument}`")

    def references(self) -> list[tuple[str, str]]:
        reference = [("reference", self.reference)] if self.reference else []
        judges = models_of(self.judge.reward or []) if self.judge else []
        return [*super().references(), *models_of(self.reward), *reference, *judges]

    @property
    def replies(self) -> SamplingConfig | None:
        return self.sampling

    def held_out_data(self) -> DataSetting | None:
        return self._plain("eval_data", self.record_types) if self.eval_data else None

    def mixed_data(self) -> list[DataSetting]:
        return self.other_data()

    def other_data(self) -> list[DataSetting]:
        return [([source.plain() for source in self.ptx.data], ("text",))] if self.ptx else []

    def reward_terms(self) -> list[Any]:
        return [*self.reward, *((self.judge and self.judge.reward) or [])]

    def gold_judges(self) -> list[tuple[str, DataSetting]]:
        gold = self.judge and self.judge.gold
        return [(gold, self.held_out_data() or self.main_data()[0])] if gold else []

    def planned_steps(self, examples: int) -> dict[str, int]:
        steps = self.batch_size // (self.mini_batch or self.batch_size)
        return {
            "steps": self.updates,
            "episodes": self.updates * self.batch_size,
            "gradient_steps": self.updates * self.epochs * steps,
        }
