"""Settings and methods by the names that TRL, OpenRLHF and verl give them, and keel's word for each.

A message about an unknown key looks here before it guesses by spelling, and docs/coming-from.md shows the
whole table.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Word:
    """A setting of another tool."""

    theirs: tuple[str, ...]  # every name that it has, the last part of a dotted one
    ours: str  # keel's setting, dotted; "" where there is none
    note: str = ""  # what differs, as the end of a sentence
    kinds: tuple[str, ...] = ()  # stages that it is for; (): all that have it


ON_POLICY = ("ppo", "grpo")
WORDS: tuple[Word, ...] = (
    # what is trained, on what
    Word(("model_name_or_path", "model_name", "pretrain", "sft_model_path", "base_model"), "model"),
    Word(("model_revision",), "model.revision"),
    Word(("ref_model", "ref_model_path", "reference_model"), "reference"),
    Word(("tokenizer_name_or_path", "tokenizer_name"), "model.tokenizer", "a trained model brings its own"),
    Word(("attn_implementation", "flash_attn"), "", "keel tries its kernels on the model; see `keel doctor`"),
    Word(("dataset_name", "dataset", "train_dataset", "prompt_data", "train_files"), "data"),
    Word(("dataset_config", "dataset_config_name"), "data.options", "{name: …}, of a hub data set"),
    Word(("dataset_train_split", "train_split"), "data.split"),
    Word(("eval_dataset", "val_files", "eval_files", "dataset_test_split"), "eval_data"),
    Word(("test_split_size", "val_size", "eval_ratio"), "holdout"),
    Word(("dataset_text_field", "input_key", "output_key", "prompt_key", "response_key"), "data.columns",
         "keel's name → the file's: {prompt: question}"),
    Word(("chat_template_path", "custom_chat_template"), "model.chat_template", "the template itself"),
    Word(("apply_chat_template",), "", "conversations go through the model's template by themselves"),
    Word(("max_seq_length", "max_seq_len", "max_len", "cutoff_len", "block_size"), "max_length"),
    Word(("max_prompt_length", "prompt_max_len", "max_input_length"), "max_length",
         "prompt and response together"),
    Word(("truncation_mode", "truncation", "filter_overlong_prompts"), "too_long"),
    Word(("completion_only_loss", "assistant_only_loss", "train_on_prompt"), "loss_on", "completion or all"),
    Word(("sample_packing", "packing_samples", "padding_free", "use_remove_padding"), "packing",
         "for sft; keel reads rows without padding by itself where the model can"),
    # steps
    Word(("learning_rate", "actor_learning_rate", "learning_rates"), "lr"),
    Word(("critic_learning_rate", "critic_lr", "value_learning_rate"), "value_lr", kinds=("ppo",)),
    Word(("lr_scheduler_type", "lr_scheduler", "lr_decay_style"), "schedule"),
    Word(("warmup_ratio", "lr_warmup_ratio", "lr_warmup_steps_ratio"), "warmup"),
    Word(("warmup_steps", "lr_warmup_steps", "num_warmup_steps"), "warmup", "a share of all steps"),
    Word(("min_lr", "min_lr_ratio", "lr_min"), "lr_floor", "a share of `lr`"),
    Word(("adam_beta1", "adam_beta2", "adam_betas"), "betas", "both, as a list"),
    Word(("max_norm", "grad_clip", "clip_grad", "gradient_clipping"), "max_grad_norm"),
    Word(("per_device_train_batch_size", "micro_train_batch_size", "micro_batch_size_per_gpu",
          "ppo_micro_batch_size_per_gpu", "local_rollout_forward_batch_size"), "micro_batch",
         "one forward; `batch_size` is all of an optimiser step"),
    Word(("gradient_accumulation_steps", "accumulate_grad_batches"), "batch_size",
         "the whole step: per-device size × accumulation × devices; `micro_batch` is one forward"),
    Word(("train_batch_size", "global_batch_size", "rollout_batch_size", "generation_batch_size"),
         "batch_size", "in examples; for ppo and grpo in episodes: prompts × samples_per_prompt"),
    Word(("ppo_mini_batch_size", "mini_batch_size", "num_mini_batches"), "mini_batch",
         "episodes in one gradient step", ON_POLICY),
    Word(("ppo_max_token_len_per_gpu", "max_tokens_per_gpu", "train_max_tokens_per_gpu"), "micro_tokens"),
    Word(("num_iterations", "num_ppo_epochs", "ppo_epochs", "max_epochs"), "epochs", kinds=ON_POLICY),
    Word(("num_train_epochs", "num_epochs", "total_epochs", "num_episodes", "total_episodes"), "updates",
         "each samples `batch_size` episodes", ON_POLICY),
    Word(("num_train_epochs", "num_epochs", "total_epochs", "max_epochs"), "epochs"),
    Word(("total_training_steps", "train_steps", "max_iters", "num_training_steps"), "max_steps"),
    Word(("eval_steps", "eval_strategy", "test_freq", "eval_interval"), "eval_every", "in steps"),
    Word(("save_steps", "save_freq", "save_interval", "save_strategy"), "save_every", "in steps"),
    Word(("logging_steps", "log_interval", "log_freq"), "", "every step is logged"),
    Word(("early_stopping_patience", "early_stopping"), "patience"),
    Word(("resume_from_checkpoint", "resume_mode", "load_checkpoint"), "",
         "the same command goes on from the last checkpoint"),
    # how
    Word(("bf16", "fp16", "mixed_precision", "torch_dtype", "param_dtype"), "model.dtype"),
    Word(("load_in_4bit", "load_in_8bit", "quantization"), "model.quantize", "4bit or 8bit"),
    Word(("use_peft", "peft_config", "use_lora", "adapter"), "lora", "{} for the defaults"),
    Word(("lora_r", "lora_rank", "rank"), "lora.r"),
    Word(("lora_alpha",), "lora.alpha"),
    Word(("lora_dropout",), "lora.dropout"),
    Word(("lora_target_modules", "lora_target", "target"), "lora.target_modules"),
    Word(("enable_gradient_checkpointing", "activation_checkpointing"), "gradient_checkpointing"),
    Word(("zero_stage", "deepspeed", "fsdp", "fsdp_config"), "",
         "`distributed: {strategy: fsdp}` beside `stages`, and `--nproc`, cut models over processes"),
    Word(("adam_offload", "optimizer_offload"), "",
         "`keel plan` says what fits; adapters on one base (`sharing: adapters`) and `offload` save memory"),
    Word(("ref_offload", "colocate_all_models", "enable_sleep"), "offload", kinds=ON_POLICY),
    Word(("disable_dropout",), "", "dropout is off wherever ratios are taken"),
    Word(("use_vllm", "vllm_mode", "rollout_engine"), "rollout.engine", "vllm", ON_POLICY),
    # sampling
    Word(("max_completion_length", "response_length", "max_response_length", "generate_max_len",
          "max_new_tokens"), "sampling.max_new_tokens"),
    Word(("temperature",), "sampling.temperature"),
    Word(("top_p", "top_k", "min_p"), "", "a cut distribution biases the ratio", ON_POLICY),
    Word(("top_p",), "sampling.top_p"),
    Word(("top_k",), "sampling.top_k"),
    Word(("min_p",), "sampling.min_p"),
    Word(("stop_token", "stop_sequences", "stop_strings"), "sampling.stop"),
    Word(("environment_factory",), "environment", "the class itself", ON_POLICY),
    Word(("max_tool_calling_iterations", "max_assistant_turns"), "max_turns",
         "turns of the model: one more than TRL's rounds of calls", ON_POLICY),
    Word(("num_generations", "n_samples_per_prompt", "group_size", "num_samples"), "samples_per_prompt"),
    # rewards and the KL
    Word(("reward_model", "reward_model_path", "reward_pretrain", "reward_funcs", "remote_rm_url",
          "custom_reward_function", "reward_fn"), "reward", "a stage, python:module.function, or terms"),
    Word(("reward_weights",), "reward", "each term has a `weight`"),
    Word(("beta", "kl_coef", "init_kl_coef", "kl_loss_coef", "kl_penalty_coef"), "kl.coef", "", ON_POLICY),
    Word(("kl_target", "target_kl_coef", "target"), "kl.target", "nats a response", ON_POLICY),
    Word(("target_kl",), "max_approx_kl", "ends an update's epochs; `kl.target` adapts β", ON_POLICY),
    Word(("kl_horizon",), "kl.horizon", "", ON_POLICY),
    Word(("kl_estimator", "kl_loss_type", "kl_penalty"), "kl.estimator", "", ON_POLICY),
    Word(("use_kl_loss", "use_kl_in_reward"), "kl.where", "loss or reward", ON_POLICY),
    Word(("whiten_rewards", "normalize_reward", "reward_normalization"), "shaping.normalize", "", ON_POLICY),
    Word(("reward_clip_range", "cliprange_reward"), "shaping.clip", "", ON_POLICY),
    Word(("missing_eos_penalty", "penalty_reward_value"), "shaping.missing_stop_penalty",
         "subtracted, 1 unless set", ON_POLICY),
    Word(("overlong_buffer", "soft_punish_cache"), "reward", "{kind: overlong}", ON_POLICY),
    # losses
    Word(("cliprange", "clip_range", "eps_clip", "clip_ratio", "epsilon"), "clip", kinds=("ppo",)),
    Word(("cliprange", "clip_range", "eps_clip", "clip_ratio", "epsilon", "clip_ratio_low", "eps_clip_low"),
         "clip_low", "and `clip_high`", ("grpo",)),
    Word(("epsilon_high", "clip_ratio_high", "eps_clip_high"), "clip_high", kinds=("grpo",)),
    Word(("delta", "clip_ratio_c"), "dual_clip", "", ON_POLICY),
    Word(("cliprange_value", "value_clip_range"), "value_clip", kinds=("ppo",)),
    Word(("vf_coef", "value_loss_coef"), "value_coef", kinds=("ppo",)),
    Word(("lambd", "gae_lambda"), "lam", kinds=("ppo",)),
    Word(("freezing_actor_steps", "critic_warmup_steps"), "critic_warmup", "in updates", ("ppo",)),
    Word(("entropy_coeff", "ent_coef", "entropy_loss_coef"), "entropy_coef", "", ON_POLICY),
    Word(("ptx_coef", "pretrain_data"), "ptx", "{data: …, coef: …}", ON_POLICY),
    Word(("teacher_model_name_or_path", "teacher_model"), "teacher", "", ("distill",)),
    Word(("teacher_model_init_kwargs",), "teacher_dtype", "or `teacher_quantize`", ("distill",)),
    Word(("lmbda",), "demonstrations.share", "1 − λ, of `demonstrations: {data: …}`", ("distill",)),
    Word(("loss_type",), "loss", "", ("online_dpo",)),
    Word(("scale_rewards", "norm_adv_by_std_in_grpo", "normalize_advantages"), "scale", "", ("grpo",)),
    Word(("importance_sampling_level",), "level", "", ("grpo",)),
    Word(("loss_agg_mode", "loss_type"), "reduce", "or `preset` for a paper's settings", ("grpo",)),
    Word(("advantage_estimator", "adv_estimator"), "advantage", "or `preset` of grpo", ON_POLICY),
    Word(("mask_truncated_completions",), "mask_truncated", "", ("grpo",)),
    Word(("dynamic_sampling", "filter_groups"), "resample", "", ("grpo",)),
    Word(("loss_type",), "loss", "", ("dpo",)),
    Word(("kl_beta", "dpo_beta", "pref_beta"), "beta", "", ("dpo",)),
    Word(("simpo_gamma", "gamma_beta_ratio"), "gamma", "", ("dpo",)),
    Word(("nll_loss_coef", "rpo_alpha"), "", "orpo is the loss with a likelihood term", ("dpo",)),
    Word(("center_rewards_coefficient",), "center", "", ("reward",)),
    Word(("num_labels",), "", "a reward model has one output", ("reward",)),
    # the run
    Word(("output_dir", "save_path", "default_local_dir"), "", "`keel run --runs DIR`"),
    Word(("run_name", "experiment_name"), "name", "of the whole run, beside `stages`"),
    Word(("report_to", "use_wandb", "logger"), "", "a run's metrics.jsonl and report.html hold every number"),
)  # fmt: skip

# methods that are a setting of one of keel's kinds: name → what to write
METHODS: dict[str, str] = {
    **{name: f"kind: dpo, loss: {name}" for name in ("kto", "orpo", "ipo", "simpo")},
    "cdpo": "kind: dpo, label_smoothing: 0.1",
    "rdpo": "kind: dpo, loss: robust",
    **{name: f"kind: grpo, preset: {name}" for name in ("dr_grpo", "dapo", "rloo", "gspo", "cispo")},
    **dict.fromkeys(("gkd", "distillation", "minillm", "on_policy_distillation"), "kind: distill"),
    **dict.fromkeys(("onlinedpo", "oaif"), "kind: online_dpo"),
    "reinforce": "kind: grpo, preset: reinforce++",
    "reinforce++": "kind: grpo, preset: reinforce++",
    **dict.fromkeys(("rm", "reward_model", "reward_modeling", "bradley_terry"), "kind: reward"),
    **dict.fromkeys(("pt", "lm", "clm", "pretraining", "train_lm"), "kind: pretrain"),
    **dict.fromkeys(("finetune", "supervised", "instruction_tuning"), "kind: sft"),
    **dict.fromkeys(("raft", "rejection_sampling", "bon", "rft"), "kind: best_of_n"),
    **dict.fromkeys(("eval", "evaluation", "generate"), "kind: evaluate"),
    **dict.fromkeys(("annotate", "label", "preferences"), "kind: collect"),
}


def word_for(key: str, kind: str | None, settings: Collection[str]) -> Word | None:
    """What another tool's setting is in keel, in a stage of this kind with these dotted settings; the last
    part of a dotted name counts."""
    last = key.rsplit(".", 1)[-1]
    fitting = (word for word in WORDS if last in word.theirs and (not word.kinds or kind in word.kinds))
    return next((word for word in fitting if word.ours in ("", "name", *settings)), None)


def hint(key: str, kind: str | None, settings: Collection[str]) -> str | None:
    """The end of a message about an unknown key; None for a key that nobody has, or that means nothing
    there."""
    word = word_for(key, kind, settings)
    if word is None:
        return None
    if not word.ours:
        return f"; keel has no such setting: {word.note}"
    return f"; in keel that is `{word.ours}`" + (f" ({word.note})" if word.note else "")


def method_hint(kind: str) -> str | None:
    """The end of a message about an unknown kind of stage; None for one that nobody has."""
    written = METHODS.get(kind.lower().replace("-", "_"))
    return None if written is None else f"; in keel that is {{{written}}}"


def rows() -> Iterator[tuple[str, str, str, str]]:
    """(their names, keel's, which stages, note) for the docs."""
    for word in WORDS:
        names = ", ".join(f"`{name}`" for name in word.theirs)
        yield names, f"`{word.ours}`" if word.ours else "none", ", ".join(word.kinds) or "all", word.note
