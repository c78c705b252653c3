"""What keel saves, opened by others: the same logits, scores and tokens each time.

    python benchmarks/round_trips.py [FOLDER]

Tiny models of several types are trained for a step or two by keel, saved, exported, and opened by
transformers, peft, TRL, llama.cpp (through llama-cpp-python) and lm-eval; reward models of TRL's are used by
keel. A line each: what was compared, the largest difference, and whether it holds. What is not installed is
said and left out. Exit code 1 where something differs. Not part of CI: it needs `pip install gguf trl
llama-cpp-python lm-eval`.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from keel.config import parse
from keel.data import chat
from keel.export import gguf_file
from keel.models.load import load_tokenizer
from keel.models.tokenizer import train_tokenizer
from keel.pipeline.pipeline import Pipeline
from keel.rewards import learned

SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.1,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SMALL, "tie_word_embeddings": False},
    "llama, tied": {"model_type": "llama", **SMALL, "tie_word_embeddings": True},
    "llama, rope of 3.1": {"model_type": "llama", **SMALL, "rope_parameters": LLAMA3},
    "mistral": {"model_type": "mistral", **SMALL, "sliding_window": None},
    "qwen2": {"model_type": "qwen2", **SMALL},
    "qwen3": {"model_type": "qwen3", **SMALL, "head_dim": 16},
    "gpt2": {
        "model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128,
        "initializer_range": 0.1,
    },
}  # fmt: skip
# llama.cpp looks GELU up in a table of 16-bit numbers. Beside transformers with such a GELU the gap is within
# the limit of other types, a line of its own; what is left are arguments that rounding puts on another 16-bit
# step: 1e-6 of noise on them moves the logits by 1e-4 to 5e-4
LIMITS = {"gpt2": 5e-3}
COLOURS = ("red", "blue", "green", "pink")
TEXTS = [
    f"the {animal} is {colour}, so {colour} it is." for animal in ("cat", "dog", "fox") for colour in COLOURS
]
PROMPTS = ("the cat is", " the dog\nis 42, so", "café: <|im_start|> no token!", "  spaces  and\ttabs ")


class Report:
    """Lines of a table; whether all held."""

    def __init__(self) -> None:
        self.ok = True

    def line(self, who: str, what: str, gap: float, limit: float) -> None:
        held = gap <= limit
        self.ok &= held
        print(f"| {who} | {what} | {gap:.1e} | {'holds' if held else 'DIFFERS'} |", flush=True)

    def left_out(self, who: str, why: str) -> None:
        print(f"| {who} | left out: {why} | | |", flush=True)

    def failed(self, who: str, what: str, error: Exception) -> None:
        self.ok = False
        reason = (str(error).splitlines() or [""])[0]
        print(f"| {who} | {what}: {type(error).__name__}: {reason} | | FAILED |", flush=True)


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def largest(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).abs().max())


def base(folder: Path, settings: dict[str, Any], tokenizer: Any) -> Path:
    """A seeded model of a type with a tokenizer of keel's."""
    torch.manual_seed(0)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    values = {**settings, **special, "vocab_size": len(tokenizer) + 3}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trained(folder: Path, model: Path) -> Path:
    """A run of sft with LoRA and a reward model on the model."""
    rows = {
        "sft.jsonl": [{"prompt": "the cat is", "completion": f" {c}."} for c in COLOURS],
        "pairs.jsonl": [
            {"prompt": "the dog is", "chosen": " red.", "rejected": f" {c}."} for c in COLOURS[1:]
        ],
    }
    for name, lines in rows.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = {"max_steps": 2, "batch_size": 4, "lr": 1e-3, "holdout": 0}
    config = parse({
        "name": "round", "threads": 1, "device": "cpu", "stages": {
            "sft": {"kind": "sft", "model": str(model), "data": str(folder / "sft.jsonl"), "lora": {"r": 4},
                    **common},
            "reward": {"kind": "reward", "model": "sft", "data": str(folder / "pairs.jsonl"), "normalize": 0,
                       **common},
        },
    })  # fmt: skip
    pipeline = Pipeline(config, folder / "run", lambda line: None)
    pipeline._report = lambda: None  # pyright: ignore[reportAttributeAccessIssue]
    pipeline.run()
    return folder / "run" / "stages"


def with_peft(report: Report, name: str, model: Path, stages: Path, ids: torch.Tensor) -> None:
    """The adapter on its base against the merged model."""
    import peft

    on_base = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model), stages / "sft/model/adapter"
    )
    whole = AutoModelForCausalLM.from_pretrained(stages / "sft/model")
    report.line("peft", f"{name}: adapter on its base", largest(on_base(ids).logits, whole(ids).logits), 1e-3)


def with_transformers(report: Report, name: str, stages: Path) -> None:
    """A reward model's scores by keel and by transformers' class, padded on the right and alone."""
    folder = stages / "reward/model"
    reward = learned.load(str(folder), device=torch.device("cpu"))
    inputs = [learned.encode(reward, "the dog is", text) for text in (" red.", " a green one.")]
    expected = learned.score(reward, inputs)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = load_tokenizer(str(folder)).pad(inputs, padding_side="right", return_tensors="pt")
    report.line(
        "transformers", f"{name}: reward, padded", largest(theirs(**batch).logits.squeeze(-1), expected), 1e-4
    )
    alone = torch.cat([theirs(input_ids=torch.tensor([i["input_ids"]])).logits.squeeze(-1) for i in inputs])
    report.line("transformers", f"{name}: reward, alone", largest(alone, expected), 1e-4)


def with_llama_cpp(report: Report, name: str, folder: Path, ids: torch.Tensor) -> None:
    """Float32 logits of llama.cpp, and how it cuts prompts, with and without BOS."""
    import llama_cpp

    out = folder.parent / f"{name.replace(' ', '-').replace(',', '')}.gguf"
    gguf_file.write(folder, out)
    llama = llama_cpp.Llama(
        str(out), n_ctx=64, n_batch=64, n_threads=1, logits_all=True, verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
    )  # fmt: skip
    tokenizer = load_tokenizer(str(folder))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for what, row in (
            ("as it is", ids[0].tolist()),
            ("after BOS", [tokenizer.bos_token_id, *ids[0].tolist()]),
        ):
            if None in row:
                continue
            llama.reset()
            llama.eval(row)
            theirs = torch.tensor(llama.scores[: len(row)])
            ours = model(torch.tensor([row])).logits[0]
            said = f"{name}: float32 logits of a prompt {what}"
            report.line("llama.cpp", said, largest(theirs, ours), LIMITS.get(name, 1e-3))
            if model.config.model_type == "gpt2":
                acts = [block.mlp.act for block in model.transformer.h]
                for block in model.transformer.h:
                    block.mlp.act = _GeluOfATable()
                said += ", GELU by a table in both"
                report.line("llama.cpp", said, largest(theirs, model(torch.tensor([row])).logits[0]), 1e-3)
                for block, act in zip(model.transformer.h, acts, strict=True):
                    block.mlp.act = act
    wrong = 0
    for prompt in PROMPTS:
        expected = tokenizer(prompt, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        wrong += llama.tokenize(prompt.encode(), add_bos=False, special=False) != expected
    report.line("llama.cpp", f"{name}: prompts cut otherwise, of {len(PROMPTS)}", float(wrong), 0)


class _GeluOfATable(torch.nn.Module):
    """GELU (tanh) as `ggml_vec_gelu_f32` has it: between −10 and 10 its argument and its value are 16-bit
    numbers, below 0 and above x."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, torch.zeros_like(x), torch.where(x >= 10, x, value))


def with_trl(report: Report, folder: Path, stages: Path) -> None:
    """TRL's own trainers open keel's models as they are, and take a step."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    common = {
        "max_steps": 1, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "bf16": False,
        "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no",
    }  # fmt: skip
    pairs = Dataset.from_list([
        {"prompt": "the dog is", "chosen": " red.", "rejected": f" {colour}."} for colour in COLOURS[1:] * 2
    ])  # fmt: skip
    texts = Dataset.from_list([{"text": row["prompt"] + row["chosen"]} for row in pairs])
    policy, reward = str(stages / "sft/model"), str(stages / "reward/model")
    jobs: dict[str, Callable[[], Any]] = {
        "SFTTrainer on a keel policy": lambda: SFTTrainer(
            policy, SFTConfig(str(folder / "trl-sft"), max_length=32, **common),
            train_dataset=texts,
        ),
        "RewardTrainer on a keel reward model": lambda: RewardTrainer(
            reward, RewardConfig(str(folder / "trl-reward"), max_length=32, **common), train_dataset=pairs
        ),
        "GRPOTrainer with a keel reward model": lambda: GRPOTrainer(
            policy, reward, GRPOConfig(
                str(folder / "trl-grpo"), num_generations=2, max_completion_length=4, **common,
            ), train_dataset=pairs.select_columns("prompt"),
        ),
    }  # fmt: skip
    ids = torch.arange(2, 14)[None]
    ours = {
        "policy": AutoModelForCausalLM.from_pretrained(policy)(ids).logits,
        "reward": AutoModelForSequenceClassification.from_pretrained(reward)(ids).logits,
    }
    for what, make in jobs.items():
        try:
            trainer = make()
            is_reward = what.startswith("RewardTrainer")
            found = trainer.model.eval()(ids).logits
            gap = largest(found, ours["reward" if is_reward else "policy"])
            if what.startswith("GRPO"):
                gap = max(gap, largest(trainer.reward_funcs[0](ids).logits, ours["reward"]))
            loss = trainer.train().training_loss
            report.line("TRL", f"{what}: its logits, then a step (loss {loss:.3f})", gap, 1e-4)
        except Exception as error:  # a peer's own error is the finding
            report.failed("TRL", what, error)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ASKED = [f"the {animal}?" for animal in ("cat", "dog", "fox", "hen", "owl", "pig")]
TRL_REWARDS = {  # what TRL's reward model reads → (settings of its base, a chat template, whether pad is EOS)
    "texts": (MODELS["llama"], "", False),
    "texts, pad is EOS": (MODELS["qwen2"], "", True),
    "conversations, ChatML": (MODELS["llama"], CHATML, False),
    "conversations, ChatML, pad is EOS": (MODELS["qwen3"], CHATML, True),
}


def by_trl(report: Report, folder: Path) -> None:
    """A reward model that TRL's RewardTrainer has trained and saved, as the reward of an evaluate stage: the
    scores of its samples against transformers' own class, on the ids that TRL's tokenisation gives."""
    for name, (settings, template, same) in TRL_REWARDS.items():
        place = folder / f"by-trl-{len(name)}"
        try:
            tokenizer = train_tokenizer(TEXTS * 3, 320, 128)
            if template:
                tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
                tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
                tokenizer.chat_template = template
            if same:
                tokenizer.pad_token = tokenizer.eos_token
            model = base(place / "base", settings, tokenizer)
            reward = _trained_by_trl(place, model, bool(template))
            run = _judged_by(place, model, reward, bool(template))
            gap, count = _against_its_class(run / "judge", reward, bool(template))
            report.line("keel", f"reward model of TRL, {name}: scores of {count} samples", gap, 1e-4)
        except Exception as error:  # of a peer: it is the finding
            report.failed("keel", f"reward model of TRL, {name}", error)


def _turns(text: str, chat_like: bool, role: str = "user") -> Any:
    return [{"role": role, "content": text}] if chat_like else text


def _trained_by_trl(place: Path, model: Path, chat_like: bool) -> Path:
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    rows = [
        {
            "prompt": _turns(asked, chat_like),
            "chosen": _turns("it is red.", chat_like, "assistant"),
            "rejected": _turns(f"it is {colour}.", chat_like, "assistant"),
        }
        for asked in ASKED
        for colour in COLOURS[1:]
    ]
    settings = RewardConfig(
        str(place / "trl"), max_steps=20, per_device_train_batch_size=6, learning_rate=1e-3, max_length=64,
        report_to=[], use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer = RewardTrainer(str(model), settings, train_dataset=Dataset.from_list(rows))
    trainer.train()
    trainer.save_model(str(place / "reward"))
    return place / "reward"


def _judged_by(place: Path, model: Path, reward: Path, chat_like: bool) -> Path:
    """A run of keel: a policy whose replies are words, judged by the reward model."""
    rows: list[dict[str, Any]] = []
    for number, asked in enumerate(ASKED):
        said = f"it is {COLOURS[number % 4]}."
        turns = [*_turns(asked, True), *_turns(said, True, "assistant")]
        rows.append({"messages": turns} if chat_like else {"prompt": asked, "completion": said})
    (place / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [{"prompt": _turns(asked, chat_like)} for asked in ASKED * 4]
    (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    config = parse({
        "name": "by-trl", "threads": 1, "device": "cpu", "stages": {
            "sft": {"kind": "sft", "model": str(model), "data": str(place / "sft.jsonl"), "epochs": 60,
                    "batch_size": 6, "lr": 3e-3, "holdout": 0},
            "judge": {"kind": "evaluate", "models": ["sft"], "reward": str(reward),
                      "data": str(place / "prompts.jsonl"), "sampling": {"max_new_tokens": 12}},
        },
    })  # fmt: skip
    pipeline = Pipeline(config, place / "run", lambda line: None)
    pipeline._report = lambda: None  # pyright: ignore[reportAttributeAccessIssue]
    pipeline.run()
    return place / "run" / "stages"


def _against_its_class(judge: Path, folder: Path, chat_like: bool) -> tuple[float, int]:
    """The largest difference of a sample's score, over those that ended and whose text lost no bytes."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    gaps: list[float] = []
    for row in map(json.loads, (judge / "samples.jsonl").read_text().splitlines()):
        if row["stop_reason"] != "eos" or "\ufffd" in row["completion"]:
            continue
        if chat_like:
            said = _turns(row["completion"].strip(), True, "assistant")
            text = tokenizer.apply_chat_template([*row["prompt"], *said], tokenize=False)
        else:
            text = row["prompt"] + row["completion"] + tokenizer.eos_token
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            score = model(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long)
            ).logits
        gaps.append(abs(float(score) - row["proxy"]))
    if len(gaps) < 6:
        raise ValueError(f"only {len(gaps)} samples can be compared")
    return max(gaps), len(gaps)


def with_lm_eval(report: Report, stages: Path) -> None:
    """lm-eval's log-likelihoods of a keel folder against transformers'."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder = str(stages / "sft/model")
    judge = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=1)
    asked = Instance("loglikelihood", {}, ("the cat is", " red."), 0)
    found = judge.loglikelihood([asked], disable_tqdm=True)[0][0]
    tokenizer = load_tokenizer(folder)
    context, whole = tokenizer("the cat is")["input_ids"], tokenizer("the cat is red.")["input_ids"]
    logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([whole])).logits[
        0
    ]
    logp = logits.log_softmax(-1)
    ours = sum(float(logp[i - 1, whole[i]]) for i in range(len(context), len(whole)))
    report.line("lm-eval", "log-likelihood of a reply", abs(found - ours), 1e-3)


def main() -> int:
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = chat.with_chat_template(train_tokenizer(TEXTS * 3, 320, 128))
    report = Report()
    print("| opened by | compared | largest difference | |\n|---|---|---|---|")
    ids = torch.arange(2, len(tokenizer), 17)[None]  # from everywhere in the vocabulary
    llama = installed("llama_cpp") and installed("gguf")
    for name, settings in MODELS.items():
        place = folder / name.replace(" ", "-").replace(",", "")
        model = base(place / "base", settings, tokenizer)
        stages = trained(place, model)
        with torch.no_grad():
            with_peft(report, name, model, stages, ids)
            with_transformers(report, name, stages)
        if llama:
            try:
                with_llama_cpp(report, name, stages / "sft/model", ids)
            except Exception as error:  # of a peer: it is the finding
                report.failed("llama.cpp", name, error)
    if not llama:
        report.left_out("llama.cpp", "llama-cpp-python or gguf is not installed")
    last = folder / "llama" / "run" / "stages"
    if installed("trl"):
        with_trl(report, folder, last)
        by_trl(report, folder)
    else:
        report.left_out("TRL", "trl is not installed")
    if installed("lm_eval"):
        with_lm_eval(report, last)
    else:
        report.left_out("lm-eval", "lm_eval is not installed")
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
