"""A TRL config as a keel config: the same training, as far as both have the settings.

TRL's defaults differ from keel's, so that every default that matters is written out. What keel does by itself
or only writes to logs is left out; what it cannot do the same way is an error or a note, never silence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from keel.config.elsewhere import word_for
from keel.config.reading import dotted_settings
from keel.config.run import KINDS
from keel.errors import UsageError

METHODS = ("sft", "reward", "dpo", "kto", "grpo", "rloo")
# TRL 1.16 and transformers 5 where a config says nothing
DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "max_grad_norm": 1.0,
    "gradient_checkpointing": True,
    "seed": 42,
}
OF_METHOD: dict[str, dict[str, Any]] = {
    "sft": {"learning_rate": 2e-5, "max_length": 1024},
    "reward": {"learning_rate": 1e-4, "max_length": 1024},
    "dpo": {"learning_rate": 1e-6, "max_length": 1024, "beta": 0.1},
    "kto": {"learning_rate": 1e-6, "max_length": 1024, "beta": 0.1},
    "grpo": {
        "learning_rate": 1e-6,
        "num_generations": 8,
        "max_completion_length": 512,
        "beta": 0.0,
        "epsilon": 0.2,
        "loss_type": "dapo",
        "scale_rewards": "group",
        "importance_sampling_level": "token",
        "num_iterations": 1,
    },
    "rloo": {
        "learning_rate": 1e-6,
        "num_generations": 2,
        "max_completion_length": 512,
        "beta": 0.05,
        "epsilon": 0.2,
        "num_iterations": 1,
    },
}
# what changes no result, or what keel does in any case
IDLE = {
    "output_dir", "run_name", "logging_steps", "logging_dir", "report_to", "push_to_hub", "hub_model_id",
    "dataset_num_proc", "dataloader_num_workers", "use_liger_kernel", "padding_free", "pad_to_multiple_of",
    "activation_offloading", "torch_empty_cache_steps", "precompute_ref_log_probs",
    "precompute_ref_batch_size", "disable_dropout", "remove_unused_columns", "log_completions",
    "num_completions_to_print", "log_unique_prompts", "save_total_limit", "overwrite_output_dir", "do_train",
    "do_eval", "disable_tqdm", "logging_strategy", "save_strategy", "use_vllm", "vllm_mode",
    "attn_implementation", "vllm_gpu_memory_utilization", "vllm_tensor_parallel_size", "lora_task_type",
    "bf16", "fp16", "tf32",
    "eval_strategy", "save_only_model", "ddp_timeout", "dataset_test_split", "per_device_eval_batch_size",
    "test_split_size", "dataloader_pin_memory", "ddp_find_unused_parameters", "shuffle_dataset",
}  # fmt: skip
SCHEDULES = {name: name for name in ("linear", "cosine", "constant")} | {"constant_with_warmup": "constant"}
GRPO_FORMS: dict[str, dict[str, Any]] = {  # loss_type → keel's settings
    "grpo": {"reduce": "sequence"},
    "dapo": {"reduce": "token"},
    "bnpo": {"reduce": "token"},
    "dr_grpo": {},  # a constant: filled in
    "cispo": {"reduce": "token", "policy_loss": "cispo"},
}


@dataclass
class Imported:
    """A keel config, and what a reader should know of it."""

    config: dict[str, Any]
    notes: list[str] = field(default_factory=list)


class _Given:
    """The other tool's values, each taken once, so that what nobody took can be said."""

    def __init__(self, values: Mapping[str, Any], method: str) -> None:
        self.values, self.method = {**DEFAULTS, **OF_METHOD[method], **values}, method
        self.written, self.taken, self.notes = set(values), set[str](), list[str]()

    def take(self, name: str, default: Any = None) -> Any:
        self.taken.add(name)
        return self.values.get(name, default)

    def left(self) -> list[str]:
        return sorted(self.written - self.taken - IDLE)


def from_trl(values: Mapping[str, Any], method: str) -> Imported:
    """The keel config of a TRL config, the mapping that `trl METHOD --config FILE` reads.

    UsageError for a method or setting that keel cannot do the same way, naming it.
    """
    if method not in METHODS:
        raise UsageError(f"no TRL trainer {method!r} can be imported; there are {', '.join(METHODS)}")
    given = _Given(values, method)
    stage: dict[str, Any] = {"kind": {"kto": "dpo", "rloo": "grpo"}.get(method, method)}
    parts: tuple[Callable[[_Given, dict[str, Any]], None], ...] = (_model, _data, _steps, OWN[method])
    for part in parts:
        part(given, stage)
    if unknown := given.left():
        raise UsageError(f"{unknown[0]}: {_why_not(unknown[0], stage['kind'])}")
    config = {"name": f"from-trl-{method}", "seed": given.take("seed"), "stages": {method: stage}}
    return Imported(config, given.notes)


def _why_not(name: str, kind: str) -> str:
    word = word_for(name, kind, dotted_settings(KINDS[kind]))
    near = f"in keel that is near `{word.ours}`" if word and word.ours else None
    where = near or "keel has nothing that does the same"
    return f"cannot be imported: {where}; take it out of the file and set what you want in keel's config"


def _model(given: _Given, stage: dict[str, Any]) -> None:
    path = given.take("model_name_or_path")
    if not isinstance(path, str):
        raise UsageError("model_name_or_path is missing: keel starts from a model")
    model: dict[str, Any] = {"path": path}
    if revision := given.take("model_revision"):
        model["revision"] = revision
    if given.take("trust_remote_code"):
        model["trust_remote_code"] = True
    dtype = given.take("dtype")
    if isinstance(dtype, str) and dtype not in ("auto", "float32"):
        if given.values.get("use_peft"):
            model["dtype"] = dtype
        else:
            given.notes.append(f"weights that are trained stay in float32, not {dtype}; products may be half")
    for bits in ("4bit", "8bit"):
        if given.take(f"load_in_{bits}"):
            model["quantize"] = bits
    stage["model"] = path if len(model) == 1 else model
    lora = {ours: given.take(theirs) for theirs, ours in
            (("lora_r", "r"), ("lora_alpha", "alpha"), ("lora_dropout", "dropout"),
             ("lora_target_modules", "target_modules"))}  # fmt: skip
    if given.take("use_peft"):
        defaults = {"r": 16, "alpha": 32, "dropout": 0.05, "target_modules": "all-linear"}
        stage["lora"] = {key: defaults[key] if value is None else value for key, value in lora.items()}
        if stage["kind"] == "grpo" and stage["lora"]["dropout"]:
            given.notes.append("lora.dropout is 0 here: dropout would make noise of the ratios")
            stage["lora"]["dropout"] = 0.0


def _data(given: _Given, stage: dict[str, Any]) -> None:
    if given.take("datasets"):
        raise UsageError("datasets: a mixture is written as a list under `data` in keel, with `weight`")
    source = given.take("dataset_name")
    if not isinstance(source, str):
        raise UsageError("dataset_name is missing: keel takes the data from the config")
    split, name = given.take("dataset_train_split", "train"), given.take("dataset_config")
    column = given.take("dataset_text_field", "text")
    data: dict[str, Any] = {"source": source}
    data |= {"split": split} if split != "train" else {}
    data |= {"options": {"name": name}} if name else {}
    data |= {"columns": {"text": column}} if column != "text" else {}
    stage["data"] = source if len(data) == 1 else data


def _steps(given: _Given, stage: dict[str, Any]) -> None:
    """Batches, learning rate and length, which all trainers have."""
    one, accumulated = given.take("per_device_train_batch_size"), given.take("gradient_accumulation_steps")
    stage |= {"batch_size": one * accumulated, "micro_batch": one, "lr": given.take("learning_rate")}
    given.notes.append(f"batch_size {one * accumulated} is of one device; multiply it by the number of yours")
    schedule = str(given.take("lr_scheduler_type"))
    if schedule not in SCHEDULES:
        raise UsageError(f"lr_scheduler_type: keel has {', '.join(SCHEDULES)}, not {schedule}")
    stage["schedule"] = SCHEDULES[schedule]
    warmup, ratio, steps = given.take("warmup_steps"), given.take("warmup_ratio"), given.take("max_steps", -1)
    if steps and steps > 0:
        stage["max_steps"] = steps
    if ratio is None and warmup and warmup >= 1:
        if not stage.get("max_steps"):
            raise UsageError("warmup_steps: `warmup` of keel is a share of all steps; give warmup_ratio")
        ratio = warmup / stage["max_steps"]
    stage["warmup"] = ratio if ratio is not None else warmup
    stage |= {
        "weight_decay": given.take("weight_decay"),
        "betas": [given.take("adam_beta1"), given.take("adam_beta2")],
        "max_grad_norm": given.take("max_grad_norm") or None,
        "gradient_checkpointing": bool(given.take("gradient_checkpointing")),
    }
    if (length := given.take("max_length")) is not None:
        stage |= {"max_length": length, "too_long": "truncate"}
        cut = given.take("truncation_mode", "keep_start")
        given.notes.append(f"rows beyond max_length are cut: at the prompt's start in keel, by {cut} in TRL")
    if (every := given.take("save_steps")) is not None:
        stage["save_every"] = int(every)
    if (every := given.take("eval_steps")) is not None:
        stage["eval_every"] = int(every)


def _supervised(given: _Given, stage: dict[str, Any]) -> None:
    epochs = given.take("num_train_epochs")
    stage |= {"epochs": epochs} if "max_steps" not in stage else {"epochs": 10**6}
    if "eval_every" not in stage:
        stage["holdout"] = 0.0


def _sft(given: _Given, stage: dict[str, Any]) -> None:
    _supervised(given, stage)
    stage["packing"] = bool(given.take("packing"))
    for name in ("packing_strategy", "eval_packing"):  # what a row is filled with changes nothing
        given.take(name)
    if (loss := given.take("loss_type", "nll")) != "nll":
        raise UsageError(f"loss_type: keel's sft has the likelihood (nll) alone, not {loss}")
    only = given.take("completion_only_loss"), given.take("assistant_only_loss")
    if False in only and not only[1]:
        stage["loss_on"] = "all"
    else:
        given.notes.append("loss_on is completion: TRL trains on whole `messages` unless assistant_only_loss")


def _reward(given: _Given, stage: dict[str, Any]) -> None:
    _supervised(given, stage)
    if center := given.take("center_rewards_coefficient"):
        stage["center"] = center


def _dpo(given: _Given, stage: dict[str, Any]) -> None:
    _supervised(given, stage)
    losses = given.take("loss_type", "sigmoid")
    loss = losses[0] if isinstance(losses, list) and len(losses) == 1 else losses
    known = ("kto",) if given.method == "kto" else ("sigmoid", "ipo", "robust")
    if loss not in known:
        raise UsageError(f"loss_type: only {', '.join(known)} can be imported, not {losses}")
    stage |= {"loss": loss, "beta": given.take("beta")}
    if (divergence := given.take("f_divergence_type", "reverse_kl")) != "reverse_kl":
        raise UsageError(f"f_divergence_type: keel has the reverse KL, not {divergence}")
    if smoothing := given.take("label_smoothing"):
        stage["label_smoothing"] = smoothing


def _kto(given: _Given, stage: dict[str, Any]) -> None:
    given.values.setdefault("loss_type", "kto")
    _dpo(given, stage)
    for name in ("desirable_weight", "undesirable_weight"):
        if (weight := given.take(name)) is not None:
            stage[name] = weight


def _on_policy(given: _Given, stage: dict[str, Any]) -> None:
    """What GRPO and RLOO have in common."""
    samples, longest = given.take("num_generations"), given.take("max_completion_length")
    if stage["batch_size"] % samples:
        raise UsageError(f"a batch of {stage['batch_size']} is no multiple of num_generations {samples}")
    steps, accumulated = given.take("steps_per_generation"), given.values["gradient_accumulation_steps"]
    if steps is not None and steps != accumulated:
        stage["mini_batch"] = stage["batch_size"]
        stage["batch_size"] = stage["micro_batch"] * steps
    stage |= {"samples_per_prompt": samples, "epochs": given.take("num_iterations")}
    stage["sampling"] = {"max_new_tokens": longest, "temperature": given.take("temperature", 1.0)}
    for name, idle in (("top_p", 1.0), ("top_k", 0), ("min_p", None), ("repetition_penalty", 1.0)):
        if given.take(name, idle) not in (idle, None):
            raise UsageError(f"{name}: keel cuts no distribution where ratios are taken: it would bias them")
    stage["reward"] = _terms(given)
    updates, passes = stage.pop("max_steps", None), given.take("num_train_epochs")
    if updates is None:
        given.notes.append(
            f"updates is a guess: TRL makes {passes:g} passes over the prompts; an update of keel takes "
            f"{stage['batch_size'] // samples}"
        )
    stage |= {"updates": updates or 100, "shaping": {"missing_stop_penalty": 0.0, "normalize": "none"}}
    if given.take("mask_truncated_completions"):
        stage["mask_truncated"] = True
    low, high = given.take("epsilon"), given.take("epsilon_high")
    if stage["epochs"] > 1 or "mini_batch" in stage:  # else every ratio is 1
        stage |= {"clip_low": low, "clip_high": high or low}


def _terms(given: _Given) -> list[dict[str, Any]]:
    """The rewards: functions by their dotted path, models by theirs."""
    functions, model = given.take("reward_funcs"), given.take("reward_model_name_or_path")
    named = functions or model
    if not named:
        raise UsageError("reward_funcs is missing: keel takes the rewards from the config")
    named = named if isinstance(named, list) else [named]
    weights = given.take("reward_weights") or [1.0] * len(named)
    if len(weights) != len(named):
        raise UsageError(f"reward_weights: {len(weights)} weights for {len(named)} rewards")
    return [_term(name, weight) for name, weight in zip(named, weights, strict=True)]


def _term(name: Any, weight: float) -> dict[str, Any]:
    """A reward of TRL: a function by its dotted path, else a model."""
    module, dot, function = str(name).rpartition(".")
    if dot and "/" not in str(name) and module.replace(".", "").isidentifier() and function.isidentifier():
        return {"kind": "python", "function": f"{module}.{function}", "weight": weight}
    return {"kind": "learned", "model": str(name), "weight": weight}


def _grpo(given: _Given, stage: dict[str, Any]) -> None:
    _on_policy(given, stage)
    form, longest = given.take("loss_type"), stage["sampling"]["max_new_tokens"]
    if form not in GRPO_FORMS:
        raise UsageError(f"loss_type: keel has {', '.join(GRPO_FORMS)}, not {form}")
    stage |= {"reduce": float(longest)} if form == "dr_grpo" else GRPO_FORMS[form]
    scale = given.take("scale_rewards")
    stage["scale"] = {True: "group", False: "none"}.get(scale, scale) if isinstance(scale, bool) else scale
    stage["level"] = given.take("importance_sampling_level")
    if stage["level"] == "token":
        del stage["level"]
    beta = given.take("beta")
    stage["kl"] = {"coef": beta, "estimator": "k3", "where": "loss"} if beta else {"coef": 0.0}
    if delta := given.take("delta"):
        stage["dual_clip"] = delta
    if entropy := given.take("entropy_coef"):
        stage["entropy_coef"] = entropy


def _rloo(given: _Given, stage: dict[str, Any]) -> None:
    _on_policy(given, stage)
    stage |= {"baseline": "leave_one_out", "scale": "batch" if given.take("normalize_advantages") else "none",
              "reduce": float(stage["sampling"]["max_new_tokens"]),
              "kl": {"coef": given.take("beta"), "estimator": "k1", "where": "reward"}}  # fmt: skip
    if clip := given.take("reward_clip_range"):
        stage["shaping"]["clip"] = max(clip)


OWN: dict[str, Callable[[_Given, dict[str, Any]], None]] = {
    "sft": _sft, "reward": _reward, "dpo": _dpo, "kto": _kto, "grpo": _grpo, "rloo": _rloo,
}  # fmt: skip
