"""Bugs that shipped in other libraries, at the level of stages: one test each, named after its number in
docs/traps.

Those of single functions are tested beside them (tests/golden, tests/data, tests/rewards, tests/models). The
numbers in brackets point to the public threads.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import itertools
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import BaseModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import keel
from keel import errors, plugins, types
from keel.config import RewardConfig, RunConfig, parse
from keel.config.episodes import ToolUse
from keel.config.stage import Stage
from keel.config.tools import WithTools
from keel.config.tracking import TRACKERS
from keel.data.batches import rows_of_step
from keel.data.formats.labelled import KEYS as PAIR_KEYS
from keel.errors import UsageError
from keel.models.load import ModelSource, causal_lm
from keel.rewards import learned
from keel.rewards.mixture import Rated
from keel.rewards.shaping import RunningScale
from keel.rl import loop, rollout
from keel.rl.ppo import PPO
from keel.rl.rollout import LoopState
from keel.rl.setup import make_optimizers
from keel.rollout import GenerationRequest, KeelEngine
from keel.stages import language, reward
from keel.stages.language import LanguageRow
from keel.types import Completion
from keel.worlds import gym

START = LoopState(0.0, RunningScale())
QUIET = {"kl": {"coef": 0.0}, "shaping": {"normalize": "none", "clip": None, "missing_stop_penalty": 0.0}}


class Steps:
    """Counts the optimisers' steps and keeps the gradient norm that each was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.norms: list[float] = []
        original = torch.optim.AdamW.step

        def step(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            gradients = [
                p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
            ]
            self.norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in gradients)))
            return original(optimizer, *args, **kwargs)

        monkeypatch.setattr(torch.optim.AdamW, "step", step)


def ppo_stage(data: Any, tiny_model: Path, tiny_reward: Path, **settings: Any) -> dict[str, Any]:
    defaults = {
        "kind": "ppo",
        "model": str(tiny_model),
        "reward": str(tiny_reward),
        "data": str(data.prompts),
        "lr": 1e-3,
        "batch_size": 8,
        "updates": 2,
        "epochs": 3,
        "sampling": {"max_new_tokens": 5},
    }
    return {"stages": {"ppo": defaults | settings}}


def metrics_of(pipeline: Any, stage: str = "ppo") -> list[dict[str, float]]:
    return [
        json.loads(line)
        for line in (pipeline.stage_directory(stage) / "metrics.jsonl").read_text().splitlines()
    ]


def with_completions(monkeypatch: pytest.MonkeyPatch, endings: Sequence[tuple[tuple[int, ...], Any]]) -> None:
    """Let the engine return these responses, in order, whatever the model."""

    def generate(_: Any, request: GenerationRequest, count: Any = None) -> list[Completion]:
        asked = zip(request.prompts, endings, strict=True)
        return [Completion(tuple(p), ids, reason) for p, (ids, reason) in asked]

    monkeypatch.setattr(KeelEngine, "generate", generate)


def with_scores(monkeypatch: pytest.MonkeyPatch, scores: Sequence[float]) -> None:
    """Let the reward be these scores, whatever the reward model."""

    def rate(setup: Any, tasks: Any, completions: Any, update: int, dealt: Any) -> Rated:
        term = setup.rewards.terms[0]
        raw = torch.tensor(scores)
        scaled = (raw - term.mean) / term.std
        return Rated(scaled, raw, scaled, {term.name: list(scores)})

    monkeypatch.setattr(rollout, "rate", rate)


# ---------------------------------------------------------------- optimiser and accumulation


@pytest.mark.parametrize(
    ("mini_batch", "steps"), [(None, 1), pytest.param(4, 2, marks=pytest.mark.slow), (2, 4)]
)
def test_trap_01_mini_batch_decides_the_number_of_optimiser_steps(
    mini_batch: int | None,
    steps: int,
    run: Any,
    data: Any,
    tiny_model: Path,
    tiny_reward: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """[trl 5645] Two updates of three epochs, policy and critic."""
    count = Steps(monkeypatch)
    run(ppo_stage(data, tiny_model, tiny_reward, mini_batch=mini_batch), tmp_path)
    assert len(count.norms) == 2 * 3 * steps * 2


def test_trap_01_statistics_of_steps_that_were_not_taken_are_not_averaged_in(
    run: Any, data: Any, tiny_model: Path, tiny_reward: Path, tmp_path: Path
) -> None:
    """[trl 7012] The entropy of a nearly uniform policy over 300 tokens, after the epochs were ended
    early."""
    settings = {"epochs": 8, "mini_batch": 2, "max_approx_kl": 1e-9, "lr": 1e-2}
    rows = metrics_of(run(ppo_stage(data, tiny_model, tiny_reward, **settings), tmp_path))
    for row in rows:
        assert row["policy/epochs"] == 1
        assert row["policy/entropy_avg"] > 0.7 * math.log(300)
        assert row["val/ratio"] == pytest.approx(1, abs=0.5)


@dataclasses.dataclass(frozen=True)
class Everything:
    """A run over all stages with every setting in use, and what was seen of it."""

    pipeline: Any
    norms: list[float]  # of each gradient that an optimiser was given
    read: set[str]  # settings that keel read, but those that only its config did


@contextlib.contextmanager
def settings_read() -> Iterator[set[str]]:
    """The settings that are read within it."""
    read: set[str] = set()
    original = BaseModel.__getattribute__
    package = str(Path(keel.__file__).parent)

    def watch(group: Any, name: str) -> Any:
        if not name.startswith("_") and name in type(group).model_fields:
            frame = sys._getframe(1)
            if frame.f_code.co_name in ("loss_settings", "advantage_settings", "reduction"):
                frame = frame.f_back or frame  # which the config asks as well, to check them
            caller = frame.f_code
            if caller.co_filename.startswith(package) and (
                Path(caller.co_filename).parent.name != "config"
                or caller.co_name
                in (
                    "inputs",
                    "references",
                    "log_name",
                    "trusts_sampler",
                    "world",
                    "_judges_of",
                    "interpolation",
                    "demonstrated",
                    "vllm",
                )
            ):
                read.add(f"{type(group).__name__}.{name}")
        return original(group, name)

    with pytest.MonkeyPatch.context() as watching:
        watching.setattr(BaseModel, "__getattribute__", watch)
        yield read


def all_rewards(folder: Path, tiny_bert: Path, address: str) -> list[dict[str, Any]]:
    """A term of each kind; `plugin` is one that `added_reward` adds."""
    own = str(Path(__file__).parent / "stages" / "rewards_for_tests.py") + ":red"
    return [
        {"kind": "answer", "source_filter": None},
        {"kind": "verdict"},
        {"kind": "verdict", "name": "scored", "mode": "pointwise"},
        {"kind": "format"},
        {"kind": "regex", "pattern": "r"},
        {"kind": "length", "high": 3},
        {"kind": "repetition"},
        {"kind": "keywords", "words": ["red"]},
        {"kind": "overlong", "max_length": 6, "buffer": 2},
        {"kind": "similarity", "model": str(tiny_bert), "to": "answer"},
        {"kind": "classifier", "model": "genre", "label": "a"},
        {"kind": "gym"},
        {"kind": "code", "sandbox": "none"},
        {"kind": "python", "function": own},
        {"kind": "plugin", "function": "brief", "isolate": False},  # its package is here alone
        {"kind": "learned", "model": "reward", "combine": "mean"},
        {
            "kind": "judge",
            "model": "scripted",
            "address": address,
            "rubric": [{"name": "red"}],
        },
    ]


@contextlib.contextmanager
def added_reward(folder: Path) -> Iterator[None]:
    """As if a package with a reward were installed."""
    (folder / "keel_brief.py").write_text(
        "def brief(prompts, completions, **more):\n    return [1.0] * len(prompts)\n"
    )
    added = EntryPoint("brief", "keel_brief:brief", "keel.rewards")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setattr(plugins, "entry_points", lambda group: [added] if group == added.group else [])
        yield


def streamed_and_with_tools(base: dict[str, Any], clerk: Path, folder: Path) -> dict[str, Any]:
    (folder / "texts.jsonl").write_text(
        "".join(json.dumps({"text": "the cat " * 9}) + "\n" for _ in range(2))
    )
    streamed = {"data": str(folder / "texts.jsonl"), "stream": True, "shuffle_buffer": 4, "max_steps": 1}
    tools = {
        "kind": "grpo",
        "model": str(clerk),
        "environment": "world:shop",
        "reward": {"kind": "environment"},
        "data": {"source": "world:shop/prompts", "rows": 4},
        "batch_size": 4,
        "samples_per_prompt": 2,
        "updates": 1,
        "max_turns": 2,
        "sampling": {"max_new_tokens": 40},
        "curriculum": {"by": "wants"},
    }
    return {"streamed": {**base, **streamed}, "tools": tools}


@pytest.fixture(scope="module")
def all_stages(
    whole: Any, tiny_bert: Path, standing_judge: Any, clerk: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A stage of each kind, and with each setting, of at most two steps; `max_grad_norm` 0.01."""
    folder = tmp_path_factory.mktemp("everything")
    stages = copy.deepcopy(whole["stages"])
    stages["sft"]["lora"] = {"r": 2}
    stages["sft"]["model"] = {"path": "base"}
    (task,) = gym.rows("gym:gcd", 1, 0, {})
    checked = {"tests": ["assert True"], "gym": task["gym"]}
    rows = [
        {"prompt": "the cat?", "answer": "red", "better": "A", "score": 3, **checked},
        {"prompt": "so the dog?", "answer": "blue", "better": "tie", "score": 10, **checked},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stages["genre"] = {
        "kind": "classifier",
        "model": str(tiny_bert),
        "data": dict.fromkeys("ab", whole["stages"]["base"]["data"]),
        "max_length": 16,
        "batch_size": 4,
        "max_steps": 1,
    }
    alone = {"eval_data": None, "eval_every": None, "patience": None, "judge": None}
    stages["grpo"] = {**stages["grpo"], "judge": {"reward": [{"kind": "length", "high": 3}]}}
    stages["all-rewards"] = {
        **stages["grpo"],
        **alone,
        "reward": all_rewards(folder, tiny_bert, standing_judge.address),
        "data": str(folder / "rows.jsonl"),
        "advantage": "group_relative",
    }
    stages["reward"]["members"] = 2
    direct = {key: stages["grpo"][key] for key in ("model", "data", "sampling", "eval_data", "eval_every")}
    direct |= {"batch_size": 4, "updates": 2, "patience": 3}
    stages["distilled"] = {
        "kind": "distill",
        "teacher": "base",
        "demonstrations": {"data": stages["sft"]["data"], "share": 0.5},
        **direct,
    }
    stages["online"] = {"kind": "online_dpo", "reward": "reward", **direct}
    stages["collected"] = {
        "kind": "collect",
        "model": "sft",
        "data": {"source": "world:helpdesk/prompts", "rows": 4},
        "pairs": 2,
        "annotators": [
            "world:helpdesk",
            {"judge": {"model": "scripted", "address": standing_judge.address}},
        ],
        "too_long": "truncate",
        "sampling": {"max_new_tokens": 4},
    }
    stages |= streamed_and_with_tools(stages["base"], clerk, folder)
    for stage in stages.values():  # a setting that is read at all is read by then
        stage |= {key: min(stage[key], 2) for key in ("updates", "max_steps") if key in stage}
        if stage["kind"] not in ("evaluate", "collect"):
            stage["max_grad_norm"] = 0.01
    return stages


@pytest.fixture(scope="module")
def everything(run: Any, all_stages: Any, tmp_path_factory: pytest.TempPathFactory) -> Everything:
    """Those stages, run once for all tests that look at every stage."""
    folder = tmp_path_factory.mktemp("everything")
    with pytest.MonkeyPatch.context() as patch, added_reward(folder), settings_read() as read:
        count = Steps(patch)
        pipeline = run({"stages": all_stages}, folder / "run")
    assert pipeline.config.stages.keys() == all_stages.keys()
    return Everything(pipeline, count.norms, read)


def test_trap_02_max_grad_norm_is_applied_in_every_stage(everything: Everything, whole: Any) -> None:
    """[TRL 1.12] What the optimisers are given is clipped; what is logged is the norm before that."""
    norms = everything.norms
    for name in whole["stages"].keys() - {"judge"}:
        assert all(
            row["grad_norm"] > 0.02
            for row in metrics_of(everything.pipeline, name)
            if row["step"] > (name == "ppo-trunk")  # at step 0 a judge is asked
        )
    assert len(norms) > 40
    assert max(norms) <= 0.01 * (1 + 1e-4)
    assert sorted(norms)[len(norms) // 2] == pytest.approx(0.01, rel=1e-3)


def test_trap_03_the_loss_is_per_token_of_the_whole_step(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[verl 906, 7200; trl 2615, 6369, 6380] A long and a short row in micro-batches of their own weigh by
    their tokens."""
    model = causal_lm(ModelSource(str(tiny_model)), 0).double().eval()
    rows = [
        LanguageRow([5, 6, 7, 8, 9, 10, 11, 12], [True] * 8),
        LanguageRow([40, 41], [True] * 2),
        LanguageRow([3, 4, 5, 6], [False, False, False, True]),
    ]
    losses = []
    for row in rows:
        logp = model(input_ids=torch.tensor([row.ids])).logits[0, :-1].log_softmax(-1)
        losses += [-logp[t - 1, row.ids[t]].item() for t in range(1, len(row.ids)) if row.counts[t]]
    assert len(losses) == 7 + 1 + 1
    tokens = sum(row.counted for row in rows)
    parts = [language.loss(model, [row], 0, tokens)[0].item() for row in rows]
    assert sum(parts) == pytest.approx(sum(losses) / 9, rel=1e-12)
    assert language.loss(model, rows, 0, tokens)[0].item() == pytest.approx(sum(losses) / 9, rel=1e-12)


@pytest.mark.parametrize(
    "kind", ["sft", "trunk", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("reward", "ppo"))]
)
def test_trap_04_nothing_clears_the_gradient_within_a_step(
    kind: str,
    run: Any,
    data: Any,
    tiny_model: Path,
    tiny_reward: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """[trl 583] The first gradient of a whole step and of one in micro-batches of 1 have the same norm."""
    norms = []
    for size in (None, 1):
        count = Steps(monkeypatch)
        if kind in ("ppo", "trunk"):
            sharing = "separate" if kind == "ppo" else "trunk"
            stages = ppo_stage(
                data,
                tiny_model,
                tiny_reward,
                sharing=sharing,
                micro_batch=size,
                updates=1,
                epochs=1,
                max_grad_norm=None,
            )
        else:
            rows = data.pairs if kind == "reward" else data.demonstrations
            stage = {
                "kind": kind,
                "model": str(tiny_model),
                "data": str(rows),
                "batch_size": 8,
                "max_steps": 1,
                "micro_batch": size,
                "max_grad_norm": None,
            }
            stages = {"stages": {"stage": stage | ({"normalize": 0} if kind == "reward" else {})}}
        run(stages, tmp_path / str(size))
        norms.append(count.norms[:1] if kind != "ppo" else count.norms[:2])
        monkeypatch.undo()
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


# ---------------------------------------------------------------- masks and rewards


def test_trap_07_the_score_is_paid_at_the_last_response_token(
    open_ppo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[trl 3750] Through collect(), for prompts and responses of different lengths, the stop token
    included."""
    tasks, setup = open_ppo(batch_size=4, **QUIET)
    with_completions(
        monkeypatch, [((7, 8, 9, 1), "eos"), ((7, 1), "eos"), ((1,), "eos"), ((7, 8, 9, 10, 11), "length")]
    )
    with_scores(monkeypatch, [3.0, 4.0, 5.0, 6.0])
    collected = loop.collect(PPO(setup), tasks[:4], START, 0)
    assert collected.episodes.rewards.tolist() == [
        [0, 0, 0, 3, 0],
        [0, 4, 0, 0, 0],
        [5, 0, 0, 0, 0],
        [0, 0, 0, 0, 6],
    ]
    assert collected.episodes.mask.sum(dim=1).tolist() == [4, 2, 1, 5]


def test_trap_08_the_penalty_for_a_missing_stop_knows_the_configured_stop(
    open_ppo: Any, tokenizer: Any
) -> None:
    """[trl PR 5338] With real samples: who ended at "." or EOS pays nothing, who was cut off pays."""
    stop = [".", "a", "e it", "so"]  # some of them several tokens
    sampling = {"max_new_tokens": 12, "temperature": 1.5, "stop": stop}
    shaping = {"normalize": "none", "clip": None, "missing_stop_penalty": 2.5}
    tasks, setup = open_ppo(batch_size=12, sampling=sampling, shaping=shaping, kl={"coef": 0.0})
    collected = loop.collect(PPO(setup), tasks, START, 3)
    reasons = {c.stop_reason for c in collected.experience.completions}
    assert {"stop", "length"} <= reasons

    def stopped(ids: Any) -> bool:
        text = tokenizer.decode(list(ids), skip_special_tokens=True)
        return tokenizer.eos_token_id in ids or any(string in text for string in stop)

    for completion, score, paid in zip(
        collected.experience.completions,
        collected.experience.rated.raw,
        collected.episodes.rewards.sum(dim=1),
        strict=True,
    ):
        ended = stopped(completion.ids)
        assert not stopped(completion.ids[:-1])
        assert paid.item() == pytest.approx(score.item() - (0.0 if ended else 2.5), abs=1e-5)


def test_trap_09_the_real_eos_counts_where_pad_is_eos(
    open_ppo: Any, monkeypatch: pytest.MonkeyPatch, run: Any, data: Any, tiny_model: Path, tmp_path: Path
) -> None:
    """[trl PR 5303, PR 3200] PPO trains and scores it; so does SFT, with the same numbers as with a pad of
    its own."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    results, rows = [], []
    for path in (tiny_model, tmp_path / "model"):
        tasks, setup = open_ppo(batch_size=3, model=str(path), **QUIET)
        with_completions(monkeypatch, [((7, 8, 1), "eos"), ((1,), "eos"), ((7, 8, 9, 10), "length")])
        collected = loop.collect(PPO(setup), tasks[:3], START, 0)
        assert collected.episodes.mask.tolist() == [
            [True, True, True, False],
            [True, False, False, False],
            [True] * 4,
        ]
        assert (collected.episodes.logp[collected.episodes.mask] < 0).all()
        results.append(collected)
        stage = {
            "kind": "sft",
            "model": str(path),
            "data": str(data.demonstrations),
            "batch_size": 6,
            "max_steps": 2,
        }
        rows.append(
            metrics_of(run({"stages": {"sft": stage}}, tmp_path / f"run-{path.name}-{len(rows)}"), "sft")
        )
    assert torch.equal(results[0].experience.rated.raw, results[1].experience.rated.raw)
    assert torch.equal(results[0].episodes.logp, results[1].episodes.logp)
    for one, other in zip(*rows, strict=True):
        assert one == pytest.approx(other, rel=1e-6)


# ---------------------------------------------------------------- log-probabilities and ratios


@pytest.mark.parametrize("sharing", ["separate", "trunk"])
def test_trap_11_the_ratio_of_the_first_update_is_exactly_1(
    sharing: str, run: Any, data: Any, tiny_model: Path, tiny_reward: Path, tmp_path: Path
) -> None:
    """[verl 6280, 2088; trl 6789] Though scored and trained in different micro-batches; and the scored values
    agree."""
    settings = {
        "sharing": sharing,
        "micro_batch": 3,
        "mini_batch": 4,
        "updates": 4,
        "sampling": {"max_new_tokens": 9, "temperature": 0.7},
    }
    rows = metrics_of(run(ppo_stage(data, tiny_model, tiny_reward, **settings), tmp_path))
    assert [row["val/ratio_first"] for row in rows] == [1.0] * 4
    assert max(row["policy/logp_mismatch"] for row in rows) < 2e-5
    assert all(row["val/ratio"] != 1.0 for row in rows)


def test_trap_11_the_ratio_is_1_even_where_other_kernels_scored(
    open_ppo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if another batch shape had rounded otherwise: the mismatch is reported, and does not get into the
    ratio."""
    tasks, setup = open_ppo(batch_size=5, micro_batch=1, epochs=2, clip=1e-3)
    lengths = (4, 1, 7, 2, 3)  # shares of 17 tokens, whose sum is only rounded to 1
    with_completions(monkeypatch, [((*range(7, 6 + n), 1), "eos") for n in lengths])
    collected = loop.collect(PPO(setup), tasks[:5], START, 0)
    noise = 1e-3 * torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    e = dataclasses.replace(collected.episodes, logp=collected.episodes.logp + noise)
    assert sum(float(torch.tensor(n / 17)) for n in lengths) != 1.0
    metrics = loop.learn(PPO(setup), make_optimizers(setup.config, setup.roles), e, 1, START).metrics
    assert metrics["val/ratio_first"] == 1.0
    assert metrics["policy/logp_mismatch"] == pytest.approx(noise[e.mask].abs().max().item(), rel=0.02)


def test_trap_12_log_probabilities_and_entropy_are_those_of_the_scaled_logits(
    open_ppo: Any, loss_of: Any
) -> None:
    """[trl PR 3029; OpenRLHF PR 857, PR 1319; prime-rl PR 697] While scoring and again while learning."""
    tasks, setup = open_ppo(batch_size=4, sampling={"max_new_tokens": 6, "temperature": 0.5})
    collected = loop.collect(PPO(setup), tasks[:4], START, 0)
    e, entropies = collected.episodes, []
    for i, c in enumerate(collected.experience.completions):
        p, n = len(c.prompt_ids), len(c.ids)
        with torch.no_grad():
            logits = setup.roles.policy(torch.tensor([[*c.prompt_ids, *c.ids]])).logits[0, p - 1 : -1]
        logp = (logits / 0.5).log_softmax(-1)
        torch.testing.assert_close(
            e.logp[i, :n], logp[torch.arange(n), torch.tensor(c.ids)], rtol=0, atol=1e-5
        )
        entropies += (-(logp.exp() * logp).sum(-1)).tolist()
    tokens = int(e.mask.sum())
    loss = loss_of(PPO(setup), e, range(4), tokens, 0.0, on_policy=True)
    assert loss.mismatch.largest < 1e-5
    assert loss.metrics["policy/entropy_avg"] == pytest.approx(sum(entropies) / tokens, rel=1e-4)


@pytest.mark.parametrize("key", ["top_p", "top_k"])
def test_trap_13_ppo_has_no_setting_that_cuts_the_distribution(
    key: str, data: Any, tiny_model: Path, tiny_reward: Path
) -> None:
    """[trl 6789] It would renormalise what is sampled from, and bias the ratio."""
    config = ppo_stage(
        data, tiny_model, tiny_reward, sampling={"max_new_tokens": 4, key: 0.9 if key == "top_p" else 5}
    )
    with pytest.raises(UsageError, match=f"sampling.{key}: unknown key"):
        parse({"name": "x", **config})


def test_trap_14_rollouts_are_never_decoded_and_tokenised_again(
    open_ppo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[trl 5224] Ids that no tokenizer would produce reach reward model and update as they were sampled."""
    tasks, setup = open_ppo(batch_size=2)
    letters = tuple(setup.tokenizer.convert_tokens_to_ids(list("red")))
    assert list(letters) != setup.tokenizer("red")["input_ids"]
    with_completions(monkeypatch, [((*letters, 1), "eos"), ((0, 1), "eos")])
    read: list[list[int]] = []
    original = learned.forward
    monkeypatch.setattr(
        learned,
        "forward",
        lambda r, rows, *more: read.extend(row["input_ids"] for row in rows) or original(r, rows, *more),
    )

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a rollout was decoded or tokenised")

    monkeypatch.setattr(type(setup.tokenizer), "decode", refuse)
    monkeypatch.setattr(type(setup.tokenizer), "__call__", refuse)
    collected = loop.collect(PPO(setup), tasks[:2], START, 0)
    wanted = [[*tasks[0].ids, *letters, 1], [*tasks[1].ids, 0, 1]]
    assert sorted(read) == sorted(wanted)
    assert [
        row[: len(ids)] for row, ids in zip(collected.episodes.ids.tolist(), wanted, strict=True)
    ] == wanted


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trap_15_no_dropout_while_ratios_are_taken(
    checkpointing: bool, open_ppo: Any, tmp_path: Path, tokenizer: Any, loss_of: Any
) -> None:
    """The update's log-probabilities are the scored ones in a model with dropout 0.5 everywhere."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    dropout = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    GPT2LMHeadModel(
        GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=48, **dropout)
    ).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    tasks, setup = open_ppo(batch_size=4, model=str(tmp_path / "m"), gradient_checkpointing=checkpointing)
    collected = loop.collect(PPO(setup), tasks[:4], START, 0)
    loss = loss_of(PPO(setup), collected.episodes, range(4), 20, 0.0, on_policy=True)
    assert loss.mismatch.largest < 1e-5


def test_trap_15_greedy_decoding_is_refused_in_ppo(data: Any, tiny_model: Path, tiny_reward: Path) -> None:
    config = ppo_stage(data, tiny_model, tiny_reward, sampling={"max_new_tokens": 4, "temperature": 0})
    with pytest.raises(UsageError, match=r"greedy.* nothing to explore"):
        parse({"name": "x", **config})


# ---------------------------------------------------------------- KL


@pytest.mark.parametrize("where", ["reward", "loss"])
def test_trap_16_a_larger_coefficient_keeps_the_policy_nearer(
    where: str, run: Any, data: Any, tiny_model: Path, tiny_reward: Path, tmp_path: Path
) -> None:
    """[verl a65c9157; slime PR 399] A flipped sign would drive it away, one that is never applied would do
    nothing."""
    kls = {}
    for coef in (0.0, 2.0):
        kl = {"coef": coef, "where": where, "estimator": "k1" if where == "reward" else "k2"}
        settings = {"kl": kl, "updates": 12, "lr": 5e-3, "batch_size": 24, "epochs": 2}
        rows = metrics_of(run(ppo_stage(data, tiny_model, tiny_reward, **settings), tmp_path / str(coef)))
        kls[coef] = sum(row["objective/kl_exact"] for row in rows[-4:]) / 4
    assert 0 < kls[2.0] < 0.5 * kls[0.0]


def test_trap_16_the_kl_is_in_the_reward_or_in_the_loss_and_never_in_both(
    open_ppo: Any, loss_of: Any
) -> None:
    """[NeMo PR 2530]"""
    for where, estimator in (("reward", "k1"), ("loss", "k2")):
        kl = {"coef": 0.7, "where": where, "estimator": estimator}
        tasks, setup = open_ppo(batch_size=4, **{**QUIET, "kl": kl})
        with torch.no_grad():
            setup.roles.policy.lm_head.weight.mul_(1.3)
        collected = loop.collect(PPO(setup), tasks[:4], LoopState(0.7, RunningScale()), 0)
        e = collected.episodes
        per_token = e.rewards.clone()
        per_token[torch.arange(4), e.mask.sum(dim=1) - 1] -= collected.experience.rated.raw
        wanted = -0.7 * (e.logp - e.ref_logp) if where == "reward" else torch.zeros_like(per_token)
        torch.testing.assert_close(per_token, torch.where(e.mask, wanted, 0.0), rtol=0, atol=1e-5)
        with_kl, without = (
            loss_of(PPO(setup), e, range(4), int(e.mask.sum()), coef, on_policy=True).loss.item()
            for coef in (0.7, 0.0)
        )
        penalty = 0.7 * 0.5 * ((e.logp - e.ref_logp)[e.mask] ** 2).mean().item()
        assert penalty > 0.001
        assert with_kl - without == pytest.approx(0.0 if where == "reward" else penalty, abs=1e-4 * penalty)


def test_trap_17_k1_as_a_loss_is_refused(data: Any, tiny_model: Path, tiny_reward: Path) -> None:
    """[trl 4967] Its expected gradient is 0: it would constrain nothing."""
    with pytest.raises(UsageError, match="k1 is 0"):
        parse({"name": "x", **ppo_stage(data, tiny_model, tiny_reward, kl={"coef": 0.1, "where": "loss"})})


def test_trap_18_the_controller_is_given_nats_per_response(
    run: Any, data: Any, tiny_model: Path, tiny_reward: Path, tmp_path: Path
) -> None:
    """(verl, OpenRLHF) Each β from the one before it and the KL of its batch, a sum over each response's
    tokens."""
    kl = {"coef": 0.3, "target": 0.4, "horizon": 16}
    settings = {"kl": kl, "updates": 6, "lr": 1e-2, "sampling": {"max_new_tokens": 9}}
    rows = metrics_of(run(ppo_stage(data, tiny_model, tiny_reward, **settings), tmp_path))
    for before, after in itertools.pairwise(rows):
        error = max(-0.2, min(0.2, before["objective/kl_exact"] / 0.4 - 1))
        assert after["objective/kl_coef"] == pytest.approx(
            before["objective/kl_coef"] * (1 + error * 8 / 16), rel=1e-9
        )
        assert before["rollout/response_length"] > 5
    assert any(
        row["objective/kl_exact"] > 0.4 > row["objective/kl_exact"] / row["rollout/response_length"]
        for row in rows
    )


def test_trap_18_the_kl_of_a_batch_is_a_sum_over_each_responses_tokens(open_ppo: Any) -> None:
    tasks, setup = open_ppo(batch_size=4)
    with torch.no_grad():
        setup.roles.policy.lm_head.weight.mul_(1.3)
    collected = loop.collect(PPO(setup), tasks[:4], START, 0)
    sums = []
    for c in collected.experience.completions:
        with torch.no_grad():
            ids = torch.tensor([[*c.prompt_ids, *c.ids]])
            p, q = (
                m(input_ids=ids).logits[0, len(c.prompt_ids) - 1 : -1].log_softmax(-1)
                for m in (setup.roles.policy, setup.roles.reference)
            )
        sums.append((p.exp() * (p - q)).sum().item())
    assert collected.experience.kl == pytest.approx(sum(sums) / 4, rel=1e-4)
    assert collected.metrics["objective/kl_exact"] == pytest.approx(sum(sums) / 4, rel=1e-4)


def test_trap_20_a_group_shares_its_prompt(open_ppo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """[Search-R1 88] Samples of one prompt stand together, and each is centred by its own peers."""
    tasks, setup = open_ppo(
        batch_size=6, samples_per_prompt=3, **{**QUIET, "shaping": {**QUIET["shaping"], "center": "prompt"}}
    )
    with_scores(monkeypatch, [1.0, 2.0, 6.0, 104.0, 104.0, 107.0])
    collected = loop.collect(PPO(setup), tasks[:2], START, 0)
    assert [c.prompt_ids for c in collected.experience.completions] == [tasks[0].ids] * 3 + [tasks[1].ids] * 3
    assert len({c.ids for c in collected.experience.completions[:3]}) > 1
    assert collected.episodes.rewards.sum(dim=1).tolist() == [
        1 - 4,
        2 - 3.5,
        6 - 1.5,
        104 - 105.5,
        104 - 105.5,
        107 - 104,
    ]


# ---------------------------------------------------------------- reward models, tokenizers


@pytest.fixture(scope="module")
def reward_rows(run: Any, data: Any, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The metrics of a reward stage on the tiny model with another pad token and padding side."""

    def go(pad: str, side: str) -> list[dict[str, float]]:
        folder = tmp_path_factory.mktemp("padded")
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        tokenizer.padding_side = side
        if pad != "its own":
            tokenizer.pad_token = tokenizer.eos_token if pad == "eos" else None
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        model.config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        stage = {
            "kind": "reward",
            "model": str(folder / "model"),
            "data": str(data.pairs),
            "batch_size": 6,
            "max_steps": 2,
            "normalize": 0,
        }
        pipeline = run({"stages": {"reward": stage}}, folder / "run")
        saved = AutoTokenizer.from_pretrained(pipeline.stage_directory("reward") / "model")
        assert saved.padding_side == side
        return metrics_of(pipeline, "reward")

    return go


@pytest.fixture(scope="module")
def plain_rows(reward_rows: Any) -> list[dict[str, float]]:
    return reward_rows("its own", "right")


@pytest.mark.parametrize(
    ("pad", "side"),
    [
        ("eos", "right"),
        ("none", "left"),
        *(pytest.param(*of, marks=pytest.mark.slow) for of in (("its own", "left"), ("eos", "left"))),
        pytest.param("none", "right", marks=pytest.mark.slow),
    ],
)
def test_trap_23_and_29_a_run_reads_rewards_at_the_last_token_and_leaves_the_padding_side(
    pad: str, side: str, reward_rows: Any, plain_rows: list[dict[str, float]]
) -> None:
    """[trl 937, 2778, 6663; gpt-neox PR 1285] The whole reward stage on a model with that tokenizer: the same
    losses."""
    for one, other in zip(plain_rows, reward_rows(pad, side), strict=True):
        assert one == pytest.approx(other, rel=1e-6)


def test_trap_25_accuracy_is_counted_over_all_pairs(tiny_reward: Path) -> None:
    """(OpenRLHF) Batches of 2, 2 and 1: a mean of their means would weigh the last pair double; a tie does
    not count."""
    scorer = learned.load(str(tiny_reward), device=torch.device("cpu"))
    g = torch.Generator().manual_seed(0)
    sides: list[learned.Inputs] = [
        {"input_ids": torch.randint(2, 290, (4,), generator=g).tolist()} for _ in range(10)
    ]
    scores = learned.score(scorer, sides).tolist()
    better = [scores[2 * i] > scores[2 * i + 1] for i in range(5)]
    labels = [1.0, 1.0, 0.5, 0.8, 0.0]
    pairs = [reward.RewardPair(sides[2 * i], sides[2 * i + 1], labels[i], 0.0) for i in range(5)]
    right = [better[0], better[1], better[3], not better[4]]
    config = RewardConfig.model_validate({"kind": "reward", "model": "m", "data": "d", "batch_size": 2})
    _, result = reward.evaluate(scorer, pairs, config)
    assert result["accuracy"]["n"] == 4
    assert result["accuracy"]["mean"] == sum(right) / 4
    means = [sum(right[:2]) / 2, float(right[2]), float(right[3])]
    assert sum(means) / 3 != sum(right) / 4


def test_trap_25_the_training_accuracy_does_not_depend_on_the_micro_batch(
    run: Any, data: Any, tiny_model: Path, tmp_path: Path
) -> None:
    rows = []
    for size in (None, 1, 3):
        stage = {
            "kind": "reward",
            "model": str(tiny_model),
            "data": str(data.pairs),
            "batch_size": 8,
            "max_steps": 3,
            "normalize": 0,
        }
        rows.append(
            metrics_of(run({"stages": {"r": {**stage, "micro_batch": size}}}, tmp_path / str(size)), "r")
        )
    for whole, ones, threes in zip(*rows, strict=True):
        assert whole["accuracy"] == ones["accuracy"] == threes["accuracy"]
        assert whole["accuracy"] * 8 == int(whole["accuracy"] * 8)


# ---------------------------------------------------------------- users' standing complaints


def test_trap_negative_kl_the_controller_steers_by_one_that_cannot_be(open_ppo: Any) -> None:
    """[trl 925, 1005, 417] The sampled estimate is negative for some responses; the exact one for none."""
    tasks, setup = open_ppo(batch_size=12)
    with torch.no_grad():
        setup.roles.policy.lm_head.weight.mul_(1.1)
    collected = loop.collect(PPO(setup), tasks, START, 0)
    assert (collected.experience.scored.exact_kl[collected.experience.scored.mask] > -1e-6).all()
    assert ((collected.experience.scored.logp - collected.experience.scored.ref_logp).sum(dim=1) < 0).any()


def test_trap_a_gradient_that_is_not_finite_stops_the_run(
    run: Any, data: Any, tiny_model: Path, tiny_reward: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[OpenRLHF 1120] A loud error that names the update, and no weights from after it."""
    with_scores(monkeypatch, [float("nan")] * 8)
    with pytest.raises(errors.KeelError, match="ppo"):
        run(ppo_stage(data, tiny_model, tiny_reward), tmp_path)
    assert not (tmp_path / "stages" / "ppo" / "model").exists()
    assert not (tmp_path / "stages" / "ppo" / "stage.json").exists()


def groups_of_settings() -> dict[str, type[BaseModel]]:
    """Every group of settings that the run's config reaches, by name."""
    found: dict[str, type[BaseModel]] = {}

    def visit(annotation: Any) -> None:
        if (
            isinstance(annotation, type)
            and issubclass(annotation, BaseModel)
            and annotation.__name__ not in found
        ):
            found[annotation.__name__] = annotation
            for field in annotation.model_fields.values():
                visit(field.annotation)
        for inner in get_args(annotation):
            visit(inner)

    visit(RunConfig)
    return found


REFUSED = {  # inherited settings that a stage has no use for: giving one is an error
    "PretrainConfig.too_long": {"kind": "pretrain", "too_long": "skip"},
    "PPOConfig.max_steps": {"kind": "ppo", "reward": "r", "max_steps": 3},
    "GRPOConfig.max_steps": {"kind": "grpo", "reward": "r", "max_steps": 3},
    "DistillConfig.max_steps": {"kind": "distill", "teacher": "t", "max_steps": 3},
    "OnlineDPOConfig.max_steps": {"kind": "online_dpo", "reward": "r", "max_steps": 3},
    "BestOfNConfig.group": {"kind": "best_of_n", "reward": "r", "group": "user"},
    "BestOfNConfig.eval_data": {"kind": "best_of_n", "reward": "r", "eval_data": "other.jsonl"},
}


def test_trap_every_setting_is_read_by_something(everything: Everything) -> None:
    """Settings that are validated, documented and read by nothing: each is watched during a run over all
    stages.

    Not counted: what the config does with them itself, and writing them all out.
    """
    package = str(Path(keel.__file__).parent)
    read = set(everything.read)
    plain = {
        "DataConfig": types.DataSource,
        "SamplingConfig": types.Sampling,
        "FilteredSamplingConfig": types.Sampling,
    }
    settings = {f"{name}.{key}" for name, group in groups_of_settings().items() for key in group.model_fields}
    elsewhere = attributes_read()
    for name, value in plain.items():  # handed on whole, by plain(): all its fields are read somewhere
        read |= {f"{name}.{field.name}" for field in dataclasses.fields(value) if field.name in elsewhere}
    read |= {f"PairsConfig.{key}" for key in PAIR_KEYS}  # handed on as a mapping
    by_one_code = (*ToolUse.model_fields, "curriculum")
    for kind in ("PPOConfig", "OnlineDPOConfig", "DistillConfig"):
        read |= {f"{kind}.{key}" for key in by_one_code if f"GRPOConfig.{key}" in read}
    tool_keys = WithTools.model_fields.keys() - Stage.model_fields.keys()
    for kind in ("EvaluateConfig", "BestOfNConfig"):  # by one code, too
        read |= {f"{kind}.{key}" for key in tool_keys if f"GRPOConfig.{key}" in read}
    of_teacher = {key for key in ("dtype", "quantize") if f"PPOConfig.reference_{key}" in read}
    read |= {f"DistillConfig.teacher_{key}" for key in of_teacher}  # in the reference's place, by one code
    read |= {
        f"VerdictsConfig.{key}" for key in ("mode", "rubric", "reasons", "scale")
    }  # handed on as a mapping
    # by several processes alone: tests/distributed
    keys = ("strategy", "timeout", "offload", "mixed_precision")
    read |= {f"DistributedConfig.{key}" for key in keys if key in elsewhere}
    read |= {"RunConfig.distributed"} & {f"RunConfig.{name}" for name in elsewhere}
    read |= {"ControlConfig.reward_bound"} & {
        f"ControlConfig.{name}" for name in elsewhere
    }  # of `Conditions`
    read |= {"RunConfig.description"} & {f"RunConfig.{name}" for name in elsewhere}  # `keel recipes` shows it
    # read while the config is: test_grpo.py says what a preset becomes, and a term's kind is the class that
    # it is read as
    expanded = {"GRPOConfig.preset"} | {name for name in settings if name.endswith("Term.kind")}
    # written out as stages before that: test_rounds.py
    expanded |= {"RunConfig.dtype"}  # in every stage: test_config.py
    expanded |= {"RunConfig.rounds", *(name for name in settings if name.startswith("RoundsConfig."))}
    if "streams" in elsewhere:  # a property of the config, which reads it
        expanded |= {"PretrainConfig.stream"}
    if "FunctionTerm.timeout" in read:  # of a process of its own, as a plug-in's is outside of this test
        expanded |= {"PluginTerm.timeout"}
    read |= read_by_name(package)
    read |= {"CollectConfig.label"} if "votes_in" in elsewhere else set()
    expanded |= {f"{kind.title()}Config.kind" for kind in TRACKERS}  # the class that it is read as
    expanded |= {"PluginTrackerConfig.kind", "PluginTrackerConfig.args"}  # tests/trackers has a plug-in
    left = settings - read - REFUSED.keys() - expanded
    assert not left, sorted(left)


def read_by_name(package: str) -> set[str]:
    """Settings of groups that are handed on whole, as the source of what takes them names them."""
    sources = {
        path.stem: path.read_text(encoding="utf-8")
        for path in (*Path(package, "trackers").glob("to_*.py"), Path(package, "stages", "people.py"))
    }
    read: set[str] = set()
    for kind in TRACKERS:  # a tracker is made with its settings, by name
        (made_with,) = re.findall(r"def __init__\(self, (.*)\)", sources[f"to_{kind}"])
        read |= {f"{kind.title()}Config.{key}" for key in re.findall(r"(\w+): ", made_with)}
    read |= {f"LabelConfig.{key}" for key in re.findall(r"\blabel\.(\w+)", sources["people"])}
    sampler = Path(package, "stages", "samplers.py").read_text(encoding="utf-8")  # tests/rollout/test_vllm.py
    return read | {
        f"{name}.{key}" for name in ("SamplerConfig", "RolloutConfig")
        for key in re.findall(r"\bsettings\.(\w+)", sampler)
    }  # fmt: skip


def attributes_read() -> set[str]:
    """Names of attributes read anywhere in keel but in the config."""
    trees = [
        ast.parse(p.read_text(encoding="utf-8"))
        for p in Path(keel.__file__).parent.rglob("*.py")
        if p.parent.name != "config"
    ]
    return {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("setting", REFUSED)
def test_trap_a_setting_without_effect_is_refused(setting: str) -> None:
    with pytest.raises(UsageError, match=f"`{setting.partition('.')[2]}`.* no effect"):
        parse({"name": "x", "stages": {"s": {"model": "m", "data": "d", **REFUSED[setting]}}})


def test_trap_every_setting_is_described() -> None:
    bare = [
        f"{name}.{key}"
        for name, group in groups_of_settings().items()
        for key, f in group.model_fields.items()
        if not f.description
    ]
    assert bare == []


def test_trap_every_logged_name_is_a_plain_string_in_the_code(everything: Everything, whole: Any) -> None:
    """Names are written out where they are logged, so that they can be searched for."""
    sources = "".join(path.read_text() for path in Path(keel.__file__).parent.rglob("*.py"))
    for stage in whole["stages"]:
        log = everything.pipeline.stage_directory(stage) / "metrics.jsonl"
        names = {
            name
            for line in (log.read_text().splitlines() if log.exists() else ())
            for name in json.loads(line)
        }
        names = {re.sub("^rewards/(.+)/(mean|std|applies)$", r"rewards/{name}/\2", name) for name in names}
        assert [name for name in names if not re.search(rf'"{re.escape(name)}"', sources)] == []


def test_every_row_is_seen_once_in_each_pass() -> None:
    """No short last batch, none left out: passes follow each other, and step k is the same however it is
    reached."""
    seen = [row for step in range(7) for row in rows_of_step(14, 6, step, 5)]
    assert [sorted(seen[i : i + 14]) for i in (0, 14, 28)] == [list(range(14))] * 3
    assert seen[:14] != seen[14:28]
    assert rows_of_step(14, 6, 4, 5) == seen[24:30]
