"""Shared fixtures: a tokenizer, a model, data and runs small enough for every test to train for real."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# not the user's own, and the same for all processes: none of them reads keel's code twice
os.environ["KEEL_CACHE"] = str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "keel")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a background job; Ctrl-C is tested
    signal.signal(signal.SIGINT, signal.default_int_handler)
if gc.isenabled():  # what is imported is all kept: see `pytest_collection_finish`
    gc.disable()

import pytest
import torch
from hypothesis import settings
from transformers import (
    AutoConfig,
    BertConfig,
    BertForMaskedLM,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
)

import keel
from keel.accel import batch_layout, cpu_linear, norm_and_rope, patches
from keel.accel.modules import HOOKS
from keel.config import PPOConfig, parse
from keel.data import chat
from keel.data.load import load
from keel.models import machine_speed, packing, precision, row_trial
from keel.models.load import ModelSource, scorer
from keel.models.tokenizer import train_tokenizer
from keel.pipeline.pipeline import Pipeline
from keel.rewards import learned
from keel.rl import rollout
from keel.rl.algorithm import Algorithm, LogprobMismatch, MicroBatch
from keel.rl.measures import StepMeasures
from keel.rl.setup import open_stage
from keel.rundir.stage_run import StageRun
from keel.types import Episodes
from keel.worlds import shop

settings.register_profile("any machine", deadline=None)  # how long an example takes says how busy it is
settings.load_profile("any machine")

torch.set_num_threads(1)


def pytest_configure() -> None:
    """In a second working tree the installed keel may be that of another one: its tests would pass or fail by
    what stands there."""
    root, tested = Path(__file__).resolve().parents[1], Path(keel.__file__).resolve()
    if not tested.is_relative_to(root):
        raise pytest.UsageError(
            f"these tests are of {root}, the keel that is imported is {tested}: set PYTHONPATH={root / 'src'}"
        )


def pytest_collection_finish() -> None:
    """Modules and tests, a million objects, stay to the end. Collecting garbage, which every stage does when
    it is done, looks at what came after them alone: a third of the suite's time went into looking at them."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)  # from 700: thousands of times it looked in vain
    gc.enable()


# ---------------------------------------------------------------- trials, once for models that are alike

TRIED_EACH = ("accel", "architectures", "attack", "evening", "models", "real", "rollout")  # folders
WHERE_FROM = ("_name_or_path", "name_or_path", "_commit_hash")  # of a config, of a model


class TriedOnce:
    """keel tries each of its fast paths on every model that it opens (`keel.accel.patches`), which takes
    longer than the few steps that most tests train. Here a trial that passed is not run again for a model
    that is alike: class, sizes, config, precision, modes, hooks. One that did not pass is run each time.

    Left out: a model whose weights alone make a path wrong. The folders of `TRIED_EACH` and whoever asks for
    `accel_on` try every model, and so do all tests with `KEEL_TRY_EACH=1`.
    """

    def __init__(self, tried: Callable[[Callable[[], str | None]], str | None]) -> None:
        self.on = False
        self._tried, self._passed = tried, set[Any]()

    def __call__(self, trial: Callable[[], str | None]) -> str | None:
        try:
            autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
            asked = _alike(trial), torch.is_grad_enabled(), *autocast, patches.switched_off()
        except (TypeError, ValueError):  # what is unknown here, or not there yet
            return self._tried(trial)
        if self.on and asked in self._passed:
            return None
        why = self._tried(trial)
        if self.on and why is None:
            self._passed.add(asked)
        return why


def _alike(value: Any) -> Any:
    """What a trial's outcome depends on, to look it up by: the same for models that differ in their weights
    alone. TypeError for what is unknown."""
    if value is None or isinstance(value, (bool, int, float, str, type, torch.dtype, torch.device)):
        return value
    if isinstance(value, torch.nn.Module):
        configs = {id(one): one for part in value.modules() if (one := vars(part).get("config")) is not None}
        tied = len({id(p) for p in value.parameters()})
        parts = tuple(_of_module(name, part) for name, part in value.named_modules())
        return parts, tuple(map(_alike, configs.values())), tied
    if isinstance(value, PreTrainedConfig):
        settings = sorted((key, repr(one)) for key, one in vars(value).items() if key not in WHERE_FROM)
        return type(value), tuple(settings)
    if isinstance(value, (tuple, list)):
        return tuple(map(_alike, value))
    if isinstance(value, FunctionType):
        held = [cell.cell_contents for cell in value.__closure__ or ()]
        return value.__code__, _alike(held), _alike(value.__defaults__)
    if isinstance(value, MethodType):
        return value.__func__, _alike(value.__self__)
    if is_dataclass(value):
        return type(value), tuple(_alike(getattr(value, one.name)) for one in fields(value))
    if type(value).__module__.startswith("keel."):  # made of a model that stands beside it
        return type(value), _alike(getattr(value, "get_base_model", lambda: None)())
    raise TypeError(type(value).__name__)


def _of_module(name: str, part: torch.nn.Module) -> Any:
    own = vars(part)
    kinds = (bool, int, float, str, list, tuple)
    plain = {key: one for key, one in own.items() if isinstance(one, kinds) and key not in WHERE_FROM}
    tensors = [
        (key, type(one), one.shape, one.dtype, one.requires_grad)
        for key, one in (*part._parameters.items(), *part._buffers.items())
        if one is not None
    ]
    hooks = [hook for name in HOOKS for hook in (own.get(name) or {}).values()]
    around = tuple(getattr(hook, "__qualname__", type(hook).__name__) for hook in hooks)
    return name, type(part), type(part).forward, "forward" in own, repr(plain), tuple(tensors), around


tried_once = TriedOnce(patches.tried)
for _module in (patches, norm_and_rope, cpu_linear, row_trial, packing):
    _module.tried = tried_once


@pytest.fixture
def trials() -> type[TriedOnce]:
    """For the tests of the tests."""
    return TriedOnce


_modules_kept = 0


def _keep_modules() -> None:
    """As `pytest_collection_finish`, for what tests have imported since: plotly, datasets, peft."""
    global _modules_kept
    if len(sys.modules) > _modules_kept + 100:
        gc.collect()
        gc.freeze()
        _modules_kept = len(sys.modules)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    _keep_modules()
    folder = item.path.relative_to(Path(__file__).parent).parts[0]
    each = folder in TRIED_EACH or "accel_on" in getattr(item, "fixturenames", ())
    tried_once.on = not each and os.environ.get("KEEL_TRY_EACH", "0") == "0"


ANIMALS = ("cat", "dog", "fox", "hen", "owl", "pig")
COLOURS = ("red", "blue", "green", "pink")
TEXTS = [f"the {animal} is {colour}, so {colour} it is." for animal in ANIMALS for colour in COLOURS]
LLAMA = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 48,
}  # fmt: skip


@dataclass(frozen=True)
class Data:
    """Files of rows, one a record type."""

    text: Path
    demonstrations: Path  # answers end by themselves and name any colour
    pairs: Path  # an answer with "red" is always preferred
    prompts: Path
    chats: Path  # conversational demonstrations


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(autouse=True, scope="session")
def _shared_runs_in_float32() -> Iterator[None]:
    """As `_in_float32`, for what several tests share, which is made before it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "fast_in_bfloat16", lambda device: False)
        yield


@pytest.fixture(autouse=True, scope="session")
def _measures_small_products() -> None:
    """A run that knows no speed of the machine measures it. Where bfloat16 is slow, a product of the usual
    size takes seconds."""
    machine_speed.SIDE["cpu"] = 256


@pytest.fixture(autouse=True)
def _in_float32() -> Iterator[None]:
    """`dtype: auto`, the default, is float32 in tests, whatever processor they run on; those that test
    bfloat16 ask for it."""
    with pytest.MonkeyPatch.context() as patch:  # of its own: a test may undo what it patched
        patch.setattr(precision, "fast_in_bfloat16", lambda device: False)
        yield


@pytest.fixture
def accel_on() -> Iterator[None]:
    """For tests of the fast paths themselves: on, also where `KEEL_ACCEL=0` switches them off for the other
    tests."""
    with patches.all_enabled():
        yield


@pytest.fixture
def read_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that begin alike are not read as one: which rows share a forward then leaves no trace in the last
    digits."""
    monkeypatch.setattr(batch_layout, "WORTH", 0.0)


@dataclass(frozen=True)
class WholeLoss:
    """The critic's and the policy's loss of some rows as one, and what was measured."""

    loss: torch.Tensor
    metrics: dict[str, float]
    mismatch: LogprobMismatch


@pytest.fixture
def loss_of() -> Callable[..., WholeLoss]:
    """The loss of some rows of a mini-batch, as the loop has it but with one graph for all of its parts."""

    def whole(
        algorithm: Algorithm,
        episodes: Episodes,
        rows: Iterable[int],
        denominator: float,
        kl_coef: float,
        *,
        on_policy: bool = False,
        policy_learns: bool = True,
    ) -> WholeLoss:
        batch = MicroBatch.of(
            episodes,
            list(rows),
            torch.device("cpu"),
            denominator=denominator,
            kl_coef=kl_coef,
            on_policy=on_policy,
            policy_learns=policy_learns,
        )
        measures, losses = StepMeasures(), list[torch.Tensor]()
        if (critic := algorithm.critic_loss(batch)) is not None:
            measures.add_critic(critic)
            losses.append(critic.loss)
        output = algorithm.loss(batch)
        measures.add(output)
        return WholeLoss(torch.stack([*losses, output.loss]).sum(), measures.metrics(), measures.mismatch)

    return whole


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("data")
    questions = [f"{lead} {animal}?" for lead in ("the", "so the") for animal in ANIMALS]
    demonstrations = [{"prompt": q, "completion": f" it is {c}."} for q in questions for c in COLOURS]
    pairs = [
        {"prompt": q, "chosen": f" it is red{end}", "rejected": f" it is {c}{end}"}
        for q in questions
        for c in COLOURS[1:]
        for end in (".", "")
    ]
    pairs += [
        {"prompt": q, "chosen": " it is red.", "rejected": rejected}
        for q in questions
        for rejected in (".", " so.", " so it is.", " is.", " pink pink.")
    ]
    chats = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": f"it is {c}."}]}
        for q in questions
        for c in COLOURS[:2]
    ]
    return Data(
        _write(folder / "text.jsonl", [{"text": text} for text in TEXTS]),
        _write(folder / "demonstrations.jsonl", demonstrations),
        _write(folder / "pairs.jsonl", pairs),
        _write(folder / "prompts.jsonl", [{"prompt": q} for q in questions]),
        _write(folder / "chats.jsonl", chats),
    )


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Byte-level BPE of 300 tokens with EOS and a pad token of its own. Never changed: deep-copy to change
    it."""
    return chat.with_chat_template(train_tokenizer(TEXTS * 2, 300, 48))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A seeded, untrained Llama saved with the tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, initializer_range=0.1, **LLAMA,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def roomy_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A smaller one, untrained too, with room for the messages of a world."""
    folder = tmp_path_factory.mktemp("roomy") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.1,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=1024,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


Run = Callable[[Mapping[str, Any], Path], Pipeline]


@pytest.fixture(scope="session")
def run() -> Run:
    """Validate a config, run it into a directory, and return the pipeline."""

    def go(config: Mapping[str, Any], directory: Path) -> Pipeline:
        pipeline = Pipeline(
            parse({"name": "tiny", "threads": 1, "device": "cpu", **config}), directory, lambda line: None
        )
        pipeline._report = lambda: None  # takes longer than the stages here, and has tests of its own
        pipeline.run()
        return pipeline

    return go


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs leave no report, which takes as long as a stage here."""
    monkeypatch.setattr(Pipeline, "_report", lambda self: None)


@pytest.fixture(scope="session")
def whole(data: Data) -> dict[str, Any]:
    """Every stage, every way to share models, a few steps each."""
    common = {"batch_size": 4, "micro_batch": 3, "save_every": 2}
    ppo = {
        "kind": "ppo",
        "model": "sft",
        "reward": "reward",
        "data": str(data.prompts),
        "updates": 4,
        "epochs": 2,
        "mini_batch": 2,
        "lr": 1e-3,
        "sampling": {"max_new_tokens": 6},
        "kl": {"coef": 0.1, "target": 0.5, "horizon": 40},
        **common,
    }
    held = {"eval_data": {"source": str(data.prompts), "rows": 4}, "eval_every": 2}
    stages = {
        "base": {
            "kind": "pretrain",
            "data": str(data.text),
            "model": {"vocab_size": 300, "init": {"model_type": "llama", **LLAMA}},
            "max_length": 16,
            "max_steps": 6,
            "eval_every": 2,
            "patience": 2,
            **common,
        },
        "sft": {
            "kind": "sft",
            "model": "base",
            "data": str(data.demonstrations),
            "lr": 1e-3,
            "max_steps": 5,
            **common,
        },
        "reward": {
            "kind": "reward",
            "model": "sft",
            "data": str(data.pairs),
            "lr": 1e-3,
            "max_steps": 5,
            "normalize": 8,
            "eval_every": 2,
            "sampling": {"max_new_tokens": 6},
            **common,
        },
        "rewards": {
            "kind": "reward",
            "model": "sft",
            "data": str(data.pairs),
            "lr": 1e-3,
            "max_steps": 3,
            "members": 2,
            "normalize": 0,
            **common,
        },
        "reward-lora": {
            "kind": "reward",
            "model": "sft",
            "data": str(data.pairs),
            "lr": 1e-2,
            "max_steps": 3,
            "normalize": 0,
            "lora": {"r": 2},
            **common,
        },
        "dpo-lora": {
            "kind": "dpo",
            "model": "sft",
            "data": str(data.pairs),
            "lr": 1e-3,
            "max_steps": 3,
            "lora": {"r": 2},
            **common,
        },
        "dpo": {
            "kind": "dpo",
            "model": "sft",
            "data": str(data.pairs),
            "lr": 1e-3,
            "max_steps": 5,
            "eval_every": 2,
            "patience": 2,
            **common,
        },
        "kto": {
            "kind": "dpo",
            "model": "sft",
            "reference": "base",
            "data": str(data.pairs),
            "loss": "kto",
            "lr": 1e-3,
            "max_steps": 4,
            **common,
        },
        "ppo": {**ppo, **held, "patience": 3, "shaping": {"normalize": "running"}},
        "ppo-trunk": {
            **ppo,
            "sharing": "trunk",
            "critic_warmup": 1,
            "samples_per_prompt": 2,
            "shaping": {"center": "prompt"},
            "ptx": {"data": str(data.text), "batch_size": 2},
        },
        "ppo-adapters": {**ppo, "sharing": "adapters", "reward": "reward-lora", "lora": {"r": 2}},
        "grpo": {
            "kind": "grpo",
            "model": "sft",
            "reward": ["reward", {"kind": "length", "high": 4, "slack": 4}],
            "data": str(data.prompts),
            "updates": 4,
            "epochs": 2,
            "mini_batch": 2,
            "samples_per_prompt": 2,
            "resample": 1,
            "lr": 1e-3,
            "importance_cap": 2.0,
            "sampling": {"max_new_tokens": 6},
            "kl": {"coef": 0.1, "target": 0.5, "horizon": 40},
            **held,
            "patience": 3,
            **common,
        },
        "best": {
            "kind": "best_of_n",
            "model": "sft",
            "reward": "reward",
            "data": str(data.prompts),
            "samples_per_prompt": 3,
            "lr": 1e-3,
            "max_steps": 4,
            "sampling": {"max_new_tokens": 6},
            **common,
        },
        "judge": {
            "kind": "evaluate",
            "models": ["sft", "ppo", "ppo-trunk", "grpo"],
            "reward": "reward",
            "data": str(data.prompts),
            "comparisons": str(data.pairs),
            "sampling": {"max_new_tokens": 6},
            "batch_size": 8,
        },
    }
    return {"stages": stages}


@pytest.fixture(scope="session")
def tiny_reward(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tokenizer: Any) -> Path:
    """An untrained reward model on the tiny Llama, with a scale as keel's reward stage leaves it."""
    folder = tmp_path_factory.mktemp("tiny") / "reward"
    model = scorer(ModelSource(str(tiny_model)), 5)
    model.config.pad_token_id = tokenizer.pad_token_id
    learned.save_scale(model, 0.5, 2.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def stage_run(tmp_path: Path) -> StageRun:
    """A stage at work outside of any pipeline."""
    return StageRun(
        "stage",
        tmp_path,
        11,
        torch.device("cpu"),
        resolve=str,
        load_data=lambda sources, accept: load(sources, accept, 0),
    )


OpenPPO = Callable[..., tuple[list[rollout.PromptExample], rollout.Setup]]


@pytest.fixture
def open_ppo(tiny_model: Path, tiny_reward: Path, data: Data, stage_run: StageRun) -> OpenPPO:
    """PPO's prompts and models for given settings, before the first update."""

    def go(**settings: Any) -> tuple[list[rollout.PromptExample], rollout.Setup]:
        defaults = {
            "kind": "ppo",
            "model": str(tiny_model),
            "reward": str(tiny_reward),
            "data": str(data.prompts),
            "batch_size": 8,
            "updates": 3,
            "sampling": {"max_new_tokens": 8},
        }
        config = PPOConfig.model_validate(defaults | settings)
        tasks, _, setup = open_stage(config, stage_run, sharing=config.sharing)
        return tasks, setup

    return go


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained BERT encoder with a WordPiece tokenizer of its own, which splits text quite
    differently."""
    folder = tmp_path_factory.mktemp("tiny") / "bert"
    words = sorted({*" ".join(TEXTS).replace(",", " ,").replace(".", " .").split(), *"?.,", "it", "is", "so"})
    letters = [chr(c) for c in range(97, 123)]
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *words,
        *(w for w in letters if w not in words),
        *(f"##{c}" for c in letters),
    ]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)})
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=48,
        initializer_range=0.2,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def differences() -> Callable[[Path, Path], list[str]]:
    """Files that differ between two run directories, or are in one only; times aside."""
    of_the_clock = {"times.jsonl", "stage.json", "manifest.json", ".lock"}  # a lock names its process

    def contents(directory: Path) -> dict[str, bytes]:
        files = [path for path in directory.rglob("*") if path.is_file() and path.name != "report.html"]
        here = str(directory.resolve()).encode()  # an adapter names its base by a whole path
        return {
            str(p.relative_to(directory)): b""
            if p.name in of_the_clock
            else p.read_bytes().replace(here, b".")
            for p in files
        }

    def compare(one: Path, other: Path) -> list[str]:
        a, b = contents(one), contents(other)
        assert a
        return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))

    return compare


SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 101,
    "max_position_embeddings": 48,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "vocab_size": 101,
        "n_positions": 48,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "gpt_neox": SIZES,
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 24},
    "gemma2": {**GROUPED, "head_dim": 24},
    "phi3": {**GROUPED, "pad_token_id": 0, "eos_token_id": 0},
    "bert": SIZES,
    "roberta": SIZES,
    "distilbert": {
        "dim": 64,
        "hidden_dim": 160,
        "n_layers": 3,
        "n_heads": 4,
        "vocab_size": 101,
        "max_position_embeddings": 48,
    },
}


@pytest.fixture(scope="session")
def config_of() -> Callable[..., Any]:
    """A configuration of a family that keel knows block by block, small, with settings of one's own."""
    return lambda kind, **more: AutoConfig.for_model(kind, **{**CONFIGS[kind], **more})


# ---------------------------------------------------------------- a language model that judges, by a script


@dataclass(frozen=True)
class Said:
    """What a scripted judge does with a request."""

    content: str = ""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    raw: bytes | None = None  # the body, in place of a chat completion
    wait: float = 0.0  # seconds before the answer
    drip: float = 0.0  # seconds between two bytes of it
    hang_up: bool = False
    finish: str = "stop"


def shown_to_judge(text: str) -> dict[str, str]:
    """What a question shows as data: its name → the text."""
    mark = re.search(r"the mark (\[[0-9a-f]{12}\])", text)
    assert mark
    parts = re.split(rf"^{re.escape(mark[1])} (.+)$", text, flags=re.MULTILINE)
    return {name: content.strip("\n") for name, content in zip(parts[1::2], parts[2::2])}


def likes_red(text: str, number: int = 0, liked: str = "red") -> Said:
    """A judge that likes "red", or another text, and else nothing."""
    replies = {n.removeprefix("reply "): r for n, r in shown_to_judge(text).items() if n.startswith("reply")}
    likes = {name: liked in reply for name, reply in replies.items()}
    if '"scores"' in text:
        names = re.findall(r'"(\w+)": a number', text)
        score = 10 if likes["reply"] else 1
        return Said(json.dumps({"reason": "by colour", "scores": dict.fromkeys(names, score)}))
    if '"better"' in text:
        better = "tie" if likes["A"] == likes["B"] else "A" if likes["A"] else "B"
        return Said(json.dumps({"reason": "by colour", "better": better}))
    groups = [[n for n in likes if likes[n]], [n for n in likes if not likes[n]]]
    return Said(json.dumps({"reason": "by colour", "ranking": [group for group in groups if group]}))


class ScriptedJudge:
    """A server on this machine that speaks OpenAI's chat completions. script: (question, its number) → what
    is said."""

    def __init__(self, script: Callable[[str, int], Said] = likes_red) -> None:
        self.script, self.asked, self.headers = script, list[str](), list[dict[str, str]]()
        self.bodies: list[dict[str, Any]] = []
        lock, judge = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(judge.asked)
                    judge.asked.append(body["messages"][0]["content"])
                    judge.bodies.append(body)
                    judge.headers.append({k.lower(): v for k, v in self.headers.items()})
                judge._say(self, judge.script(judge.asked[number], number), number)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def _say(self, handler: BaseHTTPRequestHandler, said: Said, number: int) -> None:
        time.sleep(said.wait)
        if said.hang_up:
            handler.close_connection = True
            return
        choice = {
            "index": 0, "finish_reason": said.finish,
            "message": {"role": "assistant", "content": said.content},
        }  # fmt: skip
        whole = {
            "id": str(number), "object": "chat.completion", "created": 0, "model": "scripted",
            "choices": [choice], "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7},
        }  # fmt: skip
        body = json.dumps(whole).encode() if said.raw is None else said.raw
        try:
            handler.send_response(said.status)
            headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **said.headers}
            for name, value in headers.items():
                handler.send_header(name, value)
            handler.end_headers()
            for byte in [bytes([b]) for b in body] if said.drip else [body]:
                handler.wfile.write(byte)
                time.sleep(said.drip)
        except OSError:  # nobody listens any more
            handler.close_connection = True

    def kill(self) -> None:
        """The server is gone, and its port with it."""
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def scripted_judge() -> Iterator[Callable[..., ScriptedJudge]]:
    """Judges by a script, which end with the test."""
    started: list[ScriptedJudge] = []

    def start(script: Callable[[str, int], Said] = likes_red) -> ScriptedJudge:
        started.append(ScriptedJudge(script))
        return started[-1]

    start.said, start.shown, start.likes_red = Said, shown_to_judge, likes_red  # pyright: ignore[reportFunctionMemberAccess]
    yield start
    for one in started:
        one.kill()


@pytest.fixture(scope="session")
def standing_judge() -> Iterator[ScriptedJudge]:
    """A judge that likes red, for as long as there are tests."""
    judge = ScriptedJudge()
    yield judge
    judge.kill()


CHROMIUM_ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Chromium, once for all tests in a browser; every host but this machine's own is out of its reach."""
    sync_api = pytest.importorskip("playwright.sync_api")
    path = os.environ.get("CHROMIUM", "/usr/bin/chromium")
    if not Path(path).exists():
        pytest.skip(f"no Chromium at {path}; CHROMIUM names another place")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path,
            args=[*CHROMIUM_ARGUMENTS, "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"],
        )
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def clerk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the shop's template, untrained."""
    folder = tmp_path_factory.mktemp("clerk") / "model"
    tokenizer = train_tokenizer((row["text"] for row in shop.rows("text", 300, 0)), 384, 256)
    tokenizer.chat_template = shop.CHAT_TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=256, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
