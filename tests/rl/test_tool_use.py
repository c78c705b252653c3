"""Stages with tools: what a config may say, what a run writes, and that it goes on to the same bytes."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from keel.config import GRPOConfig, PPOConfig, parse
from keel.errors import DataError, KeelError, UsageError
from keel.pipeline.trust import code_of
from keel.report.reading import read as read_run
from keel.report.replies import during
from keel.rewards.shaping import RunningScale
from keel.rl import loop, rollout
from keel.rl.grpo import GRPO
from keel.rl.ppo import PPO
from keel.rl.rollout import LoopState
from keel.rl.setup import open_stage
from keel.rollout import GenerationRequest, KeelEngine
from keel.stages import best_of_n, evaluate
from keel.types import Completion
from keel.worlds import shop

CODE = '''
class Counter:
    """As TRL's users write them."""

    def reset(self, seed, start=0, **kwargs):
        self.total, self.kwargs = start + seed % 5, kwargs
        return None if kwargs.get("silent") else f" From {self.total}."

    def add(self, amount: int) -> str:
        """
        Add.

        Args:
            amount: How much.
        """
        self.total += amount
        return str(self.total)

    def get_reward(self) -> float:
        return float(self.total)


def shout(word: str) -> str:
    """
    Say it loudly.

    Args:
        word: What.
    """
    return word.upper()


def by_environment(completions, environments, **kwargs):
    return [environment.total / 10 for environment in environments]
'''


BOUND = """

class Bound(Counter):
    def __init__(self):
        import threading
        self.thread = threading.current_thread()

    def reset(self, seed, start=0, **kwargs):
        import threading
        assert threading.current_thread() is self.thread
        super().reset(seed, start, silent=True)
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "counter.py"
    path.write_text(CODE, encoding="utf-8")
    return path


@pytest.fixture
def settings(clerk: Path) -> dict[str, Any]:
    return {
        "kind": "grpo", "model": str(clerk), "environment": "world:shop", "reward": {"kind": "environment"},
        "data": {"source": "world:shop/prompts", "rows": 8}, "batch_size": 8, "samples_per_prompt": 4,
        "updates": 3, "max_turns": 3, "lr": 1e-2, "sampling": {"max_new_tokens": 100}, "kl": {"coef": 0.1},
    }  # fmt: skip


def scripted(monkeypatch: pytest.MonkeyPatch, says: Callable[[str, int], str]) -> list[GenerationRequest]:
    """The engine writes what `says` of the text so far and the row's number. Returns what it was asked."""
    asked: list[GenerationRequest] = []
    real = KeelEngine.generate

    def generate(self: KeelEngine, request: GenerationRequest, count: Any = None) -> list[Completion]:
        asked.append(request)
        tokenizer = generate.tokenizer  # pyright: ignore[reportFunctionMemberAccess]
        done = []
        assert request.limits is not None
        for number, (prompt, most) in enumerate(zip(request.prompts, request.limits, strict=True)):
            text = says(tokenizer.decode(list(prompt)), number)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"][:most]
            reason = "eos" if ids[-1] == request.stop_ids[0] else "length"
            done.append(Completion(tuple(prompt), tuple(ids), reason, (-1.0,) * len(ids)))
        if count is not None:
            count.useful, count.computed = count.useful + 1, count.computed + 1
        return done

    from transformers import AutoTokenizer

    monkeypatch.setattr(KeelEngine, "generate", generate)
    monkeypatch.delattr(KeelEngine, "converse")  # so that episodes go in rounds, each a request
    generate.real, generate.open = real, AutoTokenizer  # pyright: ignore[reportFunctionMemberAccess]
    return asked


def with_tokenizer(clerk: Path) -> None:
    KeelEngine.generate.tokenizer = KeelEngine.generate.open.from_pretrained(clerk)  # pyright: ignore


def a_clerk(text: str, number: int) -> str:
    """Looks the order up, then pays back what it cost or nothing, by its number."""
    item = next(item for item in shop._ITEMS if f"the {item}" in text)
    said = text.rpartition("Assistant:")[0]
    if "Tool:" not in said:
        return f' <tool_call>{{"name": "look_up", "arguments": {{"item": "{item}"}}}}</tool_call><|end|>'
    if "paid" not in said and number % 2:
        price = said.partition("Tool: ")[2].partition(" euro")[0]
        arguments = f'{{"item": "{item}", "amount": {price}}}'
        return f' <tool_call>{{"name": "refund", "arguments": {arguments}}}</tool_call><|end|>'
    return " Done.<|end|>"


# ---------------------------------------------------------------- what a config may say


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"environment": None}, "has no meaning without `environment`"),
        ({"environment": None, "reward": {"kind": "length", "high": 4}}, "`max_turns` has no effect without"),
        ({"tools": ["a.py:f", "a.py:f"]}, "names a function twice"),
        ({"max_turns": 0}, "greater than or equal to 1"),
        ({"tool_timeout": 0}, "greater than 0"),
        ({"on_tool_error": "stop"}, "'show' or 'end'"),
        ({"reward": {"kind": "environment", "at": "turn"}}, "where whole episodes are compared"),
        (
            {
                "reward": {"kind": "environment", "at": "turn"}, "baseline": "none", "scale": "batch",
                "shaping": {"normalize": "running"},
            },
            "does not go with `shaping.normalize: running`",
        ),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(change: Any, reason: str, settings: Any) -> None:
    with pytest.raises(ValueError, match=reason):
        GRPOConfig.model_validate(settings | change)


def test_only_stages_that_play_episodes_take_the_environments_reward(settings: Any) -> None:
    best = {k: settings[k] for k in ("model", "reward", "data")} | {"kind": "best_of_n"}
    with pytest.raises(
        UsageError, match="has no meaning without `environment`, which stages have that sample"
    ):
        parse({"name": "x", "stages": {"best": best}})
    turn = {"environment": "world:shop", "reward": {"kind": "environment", "at": "turn"}}
    with pytest.raises(UsageError, match="`at: turn` of the environment's reward has no effect in best_of_n"):
        parse({"name": "x", "stages": {"best": {**best, **turn}}})
    with pytest.raises(UsageError, match="`max_turns` has no effect without"):
        parse({"name": "x", "stages": {"best": {**best, "reward": "r", "max_turns": 3}}})
    collect = {"kind": "collect", "model": "m", "data": "d", "pairs": 2, "annotators": "people"}
    with pytest.raises(UsageError, match="collect plays no episodes, since a comparison has one reply"):
        parse({"name": "x", "stages": {"collect": {**collect, "environment": "world:shop"}}})
    sft = {"kind": "sft", "model": "m", "data": "d", "tools": ["a.py:f"]}
    with pytest.raises(UsageError, match="tools"):
        parse({"name": "x", "stages": {"sft": sft}})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"environment": "{code}:Nothing"}, "no function 'Nothing'"),
        ({"environment": "{code}:shout"}, "has no method `reset`|missing 1 required"),
        ({"tools": ["{code}:Counter"]}, "is a class, not a function"),
        ({"environment": "world:helpdesk"}, "world:helpdesk has no environment"),
        ({"tools": ["{code}:by_environment"]}, "needs type hints, and a docstring"),
    ],
)
def test_tools_that_cannot_be_used_are_told_by_name(
    change: Any, reason: str, settings: Any, code: Path, run: Any, tmp_path: Path
) -> None:
    named = json.loads(json.dumps(change).replace("{code}", str(code)))
    with pytest.raises(KeelError, match=reason):
        run({"stages": {"grpo": settings | named}}, tmp_path / "run")
    assert not (tmp_path / "run" / "stages" / "grpo" / "model").exists()


def test_prompts_must_be_conversations_and_templates_show_tools(
    settings: Any, data: Any, tiny_model: Path, run: Any, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="need prompts that are conversations"):
        run({"stages": {"grpo": settings | {"data": str(data.prompts)}}}, tmp_path / "one")
    few = {"model": str(tiny_model), "sampling": {"max_new_tokens": 20}, "too_long": "truncate"}
    with pytest.raises(UsageError, match='grpo: the chat template shows no "tool'):
        run({"stages": {"grpo": settings | few}}, tmp_path / "two")


def test_code_that_a_config_brings_is_named_before_it_runs(settings: Any, code: Path) -> None:
    more = {"environment": f"{code}:Counter", "tools": [f"{code}:shout"]}
    config = parse({"name": "x", "stages": {"grpo": settings | more}})
    assert code_of(config) == [
        f"grpo: tool or environment {code}:shout ({code})",
        f"grpo: tool or environment {code}:Counter ({code})",
    ]
    assert code_of(parse({"name": "x", "stages": {"grpo": settings}})) == []


# ---------------------------------------------------------------- what a run does


def test_a_run_learns_from_its_own_tokens_alone_and_shows_whole_episodes(
    settings: Any, clerk: Path, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = scripted(monkeypatch, a_clerk)
    with_tokenizer(clerk)
    seen: list[Any] = []
    of = loop.MicroBatch.of
    monkeypatch.setattr(loop.MicroBatch, "of", lambda *a, **k: seen.append(of(*a, **k)) or seen[-1])
    judged = {
        "judge": "world:shop",
        "eval_every": 1,
        "eval_data": {"source": "world:shop/test_prompts", "rows": 4},
    }
    run({"stages": {"grpo": settings | judged | {"kl": {"coef": 0.0}}}}, tmp_path / "run")
    stage = tmp_path / "run" / "stages" / "grpo"
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    tokenizer = KeelEngine.generate.tokenizer  # pyright: ignore
    for batch in seen:
        trained = tokenizer.decode(batch.tokens.tolist())
        assert "Tool:" not in trained
        assert trained.count("<|end|>") == trained.count("<tool_call>") + trained.count("Done.")
    assert len(asked[0].prompts) == 4  # the held-out prompts, first
    assert "Tools: look_up(item) refund(item, amount)\nUser:" in tokenizer.decode(list(asked[0].prompts[0]))
    for row in rows[1:]:
        assert row["rollout/turns"] == 2.5
        assert row["tools/call_frequency"] == 1.5
        assert row["tools/failure_frequency"] == 0
        assert 0 < row["rollout/context_length"] < 100
        assert row["rewards/environment/mean"] == row["objective/scores"]
        assert row["eval/judge"] == row["eval/objective/scores"]  # the world judges as its environment does
    samples = [json.loads(line) for line in (stage / "samples.jsonl").read_text().splitlines()]
    for sample in samples:
        roles = [turn["role"] for turn in sample["completion"]]
        assert roles == ["assistant", "tool"] * (len(roles) // 2) + ["assistant"]
    shown = during(next(s for s in read_run(tmp_path / "run").stages if s.name == "grpo"))
    words = shown[1].replies[0].text
    assert words.startswith('→ look_up(item="')
    assert "\n\n← look_up: " in words
    assert words.endswith("Done.")


def test_a_run_that_was_cut_off_goes_on_to_the_same_bytes(
    settings: Any, clerk: Path, run: Any, tmp_path: Path, differences: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, a_clerk)
    with_tokenizer(clerk)
    stages = {"stages": {"grpo": settings | {"save_every": 1, "updates": 2, "batch_size": 4}}}
    run(stages, tmp_path / "whole")
    update = loop.OnPolicyLoop.update

    def cut(self: Any, number: int) -> None:
        if number == 2:
            raise KeyboardInterrupt
        update(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(loop.OnPolicyLoop, "update", cut)
        with pytest.raises(KeyboardInterrupt):
            run(stages, tmp_path / "cut")
    run(stages, tmp_path / "cut")
    assert differences(tmp_path / "whole", tmp_path / "cut") == []
    shutil.rmtree(tmp_path / "cut")


def test_the_engine_itself_plays_a_run(settings: Any, run: Any, tmp_path: Path, differences: Any) -> None:
    """An untrained model, which calls nothing that can be read: every token is its own."""
    for name in ("one", "two"):
        few = {"updates": 1, "batch_size": 4, "sampling": {"max_new_tokens": 16}}
        run({"stages": {"grpo": settings | few}}, tmp_path / name)
    assert differences(tmp_path / "one", tmp_path / "two") == []


def test_environments_begin_with_their_rows_and_samples_of_a_prompt_alike(
    settings: Any, code: Path, clerk: Path, stage_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`reset` is given the row, the prompt and a seed; what it returns stands behind the question, in the
    tokens and for rewards; a function that names `environments` is given the objects."""
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": [{"role": "user", "content": f"Count {n}."}], "start": 10 * n} for n in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    reward = [
        {"kind": "environment"},
        {"kind": "python", "function": f"{code}:by_environment", "isolate": False, "weight": 0.0},
    ]
    config = GRPOConfig.model_validate(
        settings
        | {"environment": f"{code}:Counter", "tools": [f"{code}:shout"], "data": str(data), "reward": reward}
    )
    call = ' <tool_call>{"name": "add", "arguments": {"amount": 3}}</tool_call><|end|>'
    scripted(monkeypatch, lambda text, number: call if "Tool:" not in text else " Done.<|end|>")
    with_tokenizer(clerk)
    tasks, _, setup = open_stage(config, stage_run, sharing="none")
    batch, _ = rollout.collect(setup, tasks[:2], RunningScale(), 5)
    totals = batch.rated.by_name["environment"]
    assert len(set(totals[:4])) == len(set(totals[4:])) == 1
    assert totals[4] - totals[0] in range(6, 15)
    assert batch.rated.by_name["by_environment"] == [pytest.approx(t / 10) for t in totals]
    texts = [setup.tokenizer.decode(list(c.prompt_ids)) for c in batch.completions]
    assert texts[0] == (
        f"Tools: shout(word) add(amount)\nUser: Count 0. From {int(totals[0]) - 3}.\nAssistant:"
    )
    assert len(setup.tool_use.pool) == 8 if setup.tool_use else False
    again, _ = rollout.collect(setup, tasks[:2], RunningScale(), 5)
    assert again.completions == batch.completions
    bound: Any = setup.tool_use and setup.tool_use.too_long
    bound.limit = 10
    with pytest.raises(DataError, match=r"Counter\.reset makes a prompt of \d+ tokens, more than the 10"):
        rollout.collect(setup, tasks[:1], RunningScale(), 5)
    bound.policy = "skip"
    with pytest.raises(DataError, match=r"`too_long: skip` knows only the rows; make room"):
        rollout.collect(setup, tasks[:1], RunningScale(), 5)
    bound.policy = "truncate"
    cut, _ = rollout.collect(setup, tasks[:2], RunningScale(), 5)
    assert [c.prompt_ids for c in cut.completions] == [c.prompt_ids[-10:] for c in batch.completions]
    (said,) = (note for note in stage_run.facts["notes"] if "Counter.reset" in note)
    assert "longer than 10 tokens: they are cut from their start" in said


def test_ppo_is_paid_by_turn_where_it_is_earned(
    settings: Any, code: Path, clerk: Path, stage_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What changed in a turn stands at its last own token; the sum is what the environment says in the end;
    values and advantages know the model's tokens alone."""
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": [{"role": "user", "content": "Count."}], "silent": True}) + "\n")
    grpo = {k: v for k, v in settings.items() if k != "samples_per_prompt"}
    config = PPOConfig.model_validate(
        grpo
        | {
            "kind": "ppo", "environment": f"{code}:Counter", "data": str(data), "batch_size": 2, "gamma": 1.0,
            "reward": {"kind": "environment", "at": "turn", "weight": 2.0}, "kl": {"coef": 0.0},
            "sharing": "trunk", "lam": 1.0, "whiten_advantages": False,
        }
    )  # fmt: skip
    call = ' <tool_call>{"name": "add", "arguments": {"amount": 3}}</tool_call><|end|>'
    scripted(monkeypatch, lambda text, number: call if text.count("Tool:") < 2 else " Done.<|end|>")
    with_tokenizer(clerk)
    tasks, _, setup = open_stage(config, stage_run, sharing="trunk")
    batch, _ = rollout.collect(setup, tasks[:1] * 2, RunningScale(), 5)
    episodes, _ = PPO(setup).advantages(batch, 0.0)
    dialogue = batch.completions[0].dialogue
    assert dialogue is not None
    start = dialogue.turn_rewards[0] - 3
    assert dialogue.turn_rewards == (start + 3, start + 6, start + 6)
    paid = {end: 2 * gain for end, gain in zip(dialogue.ends, (start + 3, 3.0, 0.0), strict=True)}
    expected = [paid.get(place, 0.0) for place in range(len(dialogue.own))]
    assert episodes.rewards[0].tolist() == pytest.approx(expected)
    assert episodes.rewards[0].sum() == pytest.approx(2 * (start + 6))
    own = torch.tensor(dialogue.own)
    assert torch.equal(episodes.mask[0], own)
    returns = torch.tensor(expected)[own].flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(episodes.returns[0][own], returns)
    assert not episodes.advantages[0][~own].any()
    assert not episodes.values[0][~own].any()


def test_the_gradient_does_not_know_what_tools_said(
    settings: Any, clerk: Path, stage_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probabilities of context tokens have no part in the loss: whatever stands there in the tensors, the
    gradient is the same."""
    scripted(monkeypatch, a_clerk)
    with_tokenizer(clerk)
    config = GRPOConfig.model_validate(settings | {"kl": {"coef": 0.1, "estimator": "k2", "where": "loss"}})
    tasks, _, setup = open_stage(config, stage_run, sharing="none")
    setup.roles.policy.double()
    setup.roles.reference.double()
    batch = loop.collect(GRPO(setup, tasks), tasks[:2], LoopState(0.1, RunningScale()), 1)
    assert not batch.episodes.mask.all(dim=1).any()
    found = []
    for junk in (0.0, float("nan"), 1e6):
        episodes = batch.episodes
        for name in ("logp", "ref_logp", "advantages"):
            column = getattr(episodes, name)
            column[~episodes.mask] = junk
        for parameter in setup.roles.policy.parameters():
            parameter.grad = None
        sizes = loop.Sizes.of(episodes)
        loop.backward(GRPO(setup, tasks), episodes, range(8), 0.1, sizes, first=False, policy_learns=True)
        found.append([p.grad.clone() for p in setup.roles.policy.parameters() if p.grad is not None])
    assert found[0]
    assert any(grad.abs().sum() > 0 for grad in found[0])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_groups_that_are_replaced_are_paid_by_their_own_turns(
    settings: Any, code: Path, clerk: Path, stage_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": [{"role": "user", "content": f"Count {n}."}], "silent": True} for n in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = GRPOConfig.model_validate(
        settings
        | {
            "environment": f"{code}:Counter", "data": str(data), "advantage": "gae", "resample": 1,
            "reward": {"kind": "environment", "at": "turn"}, "kl": {"coef": 0.0},
        }
    )  # fmt: skip
    rounds: list[int] = []

    def says(text: str, number: int) -> str:
        """In the first sampling all of a group do the same; in the second each another thing, in more
        tokens."""
        if "Tool:" in text:
            return " Done.<|end|>"
        amount = 100 + number if rounds[-1] else 3
        return f' <tool_call>{{"name": "add", "arguments": {{"amount": {amount}}}}}</tool_call><|end|>'

    collect = rollout.collect

    def counted(*args: Any, **more: Any) -> Any:
        rounds.append(len(rounds))
        return collect(*args, **more)

    monkeypatch.setattr(rollout, "collect", counted)
    scripted(monkeypatch, says)
    with_tokenizer(clerk)
    tasks, _, setup = open_stage(config, stage_run, sharing="none")
    method = GRPO(setup, tasks)
    collected = method.collect(tasks[:2], LoopState(0.0, RunningScale()), 1)
    assert rounds == [0, 1]
    batch = collected.experience
    episodes, _ = method.advantages(batch, 0.0)
    for row, completion in enumerate(batch.completions):
        dialogue = completion.dialogue
        assert dialogue is not None
        first, last = dialogue.turn_rewards
        paid = {dialogue.ends[0]: first, dialogue.ends[1]: last - first}
        expected = [paid.get(place, 0.0) for place in range(episodes.mask.shape[1])]
        assert episodes.rewards[row].tolist() == pytest.approx(expected)


def test_a_row_that_the_environments_reward_is_not_for_is_paid_nothing_by_turn(
    settings: Any, code: Path, clerk: Path, stage_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / f"{name}.jsonl" for name in ("counted", "other")]
    for file in files:
        file.write_text(
            json.dumps({"prompt": [{"role": "user", "content": "Count."}], "silent": True}) + "\n"
        )
    reward = [
        {"kind": "environment", "at": "turn", "source_filter": str(files[0])},
        {"kind": "repetition", "n": 2, "weight": 0.5, "source_filter": str(files[1])},
    ]
    config = GRPOConfig.model_validate(
        settings
        | {
            "environment": f"{code}:Counter", "data": [str(file) for file in files], "baseline": "none",
            "scale": "none", "reward": reward, "kl": {"coef": 0.0},
        }
    )  # fmt: skip
    call = ' <tool_call>{"name": "add", "arguments": {"amount": 3}}</tool_call><|end|>'
    scripted(monkeypatch, lambda text, number: call if "Tool:" not in text else " Done.<|end|>")
    with_tokenizer(clerk)
    tasks, _, setup = open_stage(config, stage_run, sharing="none")
    batch, _ = rollout.collect(setup, list(tasks), RunningScale(), 5)
    episodes, _ = GRPO(setup, tasks).advantages(batch, 0.0)
    for row, said in enumerate(batch.rated.by_name["environment"]):
        paid = episodes.rewards[row].nonzero().flatten().tolist()
        dialogue = batch.completions[row].dialogue
        assert dialogue is not None
        assert (dialogue.ends[0] in paid) == (said is not None)
        assert episodes.rewards[row].sum() == pytest.approx(batch.rewards[row])
    assert {said is None for said in batch.rated.by_name["environment"]} == {True, False}


def test_a_held_out_judge_knows_of_episodes_too(
    settings: Any, code: Path, clerk: Path, tiny_reward: Path, stage_run: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A function that names `environments` is given them; a reward model that reads text, which would see the
    first turn alone, is refused before anything is sampled."""
    judge = {"reward": {"kind": "python", "function": f"{code}:by_environment", "isolate": False}}
    more = {"environment": f"{code}:Counter", "judge": judge, "eval_every": 1}
    call = ' <tool_call>{"name": "add", "arguments": {"amount": 3}}</tool_call><|end|>'
    scripted(monkeypatch, lambda text, number: call if "Tool:" not in text else " Done.<|end|>")
    with_tokenizer(clerk)
    tasks, _, setup = open_stage(GRPOConfig.model_validate(settings | more), stage_run, sharing="none")
    measures = rollout.final_measures(setup, tasks[:4])
    assert measures["judge"]["mean"] == pytest.approx(measures["scores"]["mean"] / 10)
    other = {"judge": {"reward": str(tiny_reward)}, "eval_every": 1}
    with pytest.raises(UsageError, match="judge: a reward model with another tokenizer than the policy's"):
        open_stage(GRPOConfig.model_validate(settings | other), stage_run, sharing="none")


# ---------------------------------------------------------------- stages that sample and do not learn so


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def lengths_of_samplers(monkeypatch: pytest.MonkeyPatch, stage: Any) -> list[int | None]:
    """The longest sequence that each engine is opened for: unknown, as `reset` may add to a prompt."""
    found: list[int | None] = []
    plain = stage.open_sampler

    def opening(*given: Any, length: int | None, **more: Any) -> Any:
        found.append(length)
        return plain(*given, length=length, **more)

    monkeypatch.setattr(stage, "open_sampler", opening)
    return found


def roles(turns: list[Any]) -> str:
    return "".join(turn["role"][0] for turn in turns)


def test_evaluate_plays_episodes_and_judges_what_was_done(
    clerk: Path, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the environment's reward and the world's gold, which are the same; the best of two among episodes
    that begin alike."""
    scripted(monkeypatch, a_clerk)
    with_tokenizer(clerk)
    lengths = lengths_of_samplers(monkeypatch, evaluate)
    stage = {
        "kind": "evaluate", "models": [str(clerk)], "environment": "world:shop", "gold": "world:shop",
        "reward": {"kind": "environment"}, "data": {"source": "world:shop/test_prompts", "rows": 12},
        "best_of": [2], "max_turns": 3, "sampling": {"max_new_tokens": 100},
    }  # fmt: skip
    run({"stages": {"judge": stage}}, tmp_path / "run")
    folder = tmp_path / "run" / "stages" / "judge"
    assert lengths == [None, None]
    found = json.loads((folder / "result.json").read_text())["models"]
    plain, best = found[str(clerk)], found[f"{clerk} best of 2"]
    assert plain["gold"] == plain["proxy"]
    assert (plain["turns"]["mean"], plain["calls"]["mean"], plain["failed_calls"]["mean"]) == (2.5, 1.5, 0)
    assert plain["gold/looked_up"]["mean"] == 1.0
    assert 0 < plain["gold"]["mean"] <= best["gold"]["mean"] < 1
    samples = lines(folder / "samples.jsonl")
    assert {roles(row["completion"]) for row in samples} == {"ata", "atata"}
    assert all(row["length"] < 100 and row["kl"] == pytest.approx(0, abs=1e-4) for row in samples[:12])
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"prompt": "Refund the lamp."}\n')
    with pytest.raises(UsageError, match="need prompts that are conversations"):
        run({"stages": {"judge": stage | {"data": str(plain), "gold": None}}}, tmp_path / "odd")


def test_the_thread_of_a_stages_tools_ends_with_it_and_an_evaluation_has_one_for_all_models(
    settings: Any, clerk: Path, code: Path, run: Any, stage_run: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Environments are made in the thread that uses them: an object may be bound to it."""
    code.write_text(CODE + BOUND, encoding="utf-8")
    begun: list[threading.Thread] = []
    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda self: begun.append(self) or start(self))
    call = ' <tool_call>{"name": "add", "arguments": {"amount": 3}}</tool_call><|end|>'
    scripted(monkeypatch, lambda text, number: call if "Tool:" not in text else " Done.<|end|>")
    with_tokenizer(clerk)
    other = shutil.copytree(clerk, tmp_path / "other")
    data = {"source": "world:shop/prompts", "rows": 4}
    shared = {"environment": f"{code}:Bound", "data": data, "reward": {"kind": "environment"}}
    judge = {"kind": "evaluate", "models": [str(clerk), str(other)], "sampling": {"max_new_tokens": 100}}
    run({"stages": {"judge": judge | shared}}, tmp_path / "run")
    assert ended(begun) == 2  # the first also says what both templates are to show
    begun.clear()
    open_stage(GRPOConfig.model_validate(settings | shared), stage_run, sharing="none")
    stage_run.end()
    assert ended(begun) == 1


def ended(threads: list[threading.Thread]) -> int:
    """How many threads of tools there were, all of which have ended or are about to."""
    mine = [thread for thread in threads if thread.name == "keel-tools"]
    for thread in mine:
        thread.join(10)
        assert not thread.is_alive()
    return len(mine)


def test_an_evaluation_counts_what_cut_episodes_off(
    clerk: Path, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turns, a turn that is too long, or an answer that leaves no tokens. Of a call whose answer the model
    was not shown the environment and the gold reward both know."""
    most = 100
    tokenizer: Any = None

    def says(text: str, number: int) -> str:
        turn = a_clerk(text.partition("Assistant:")[0] + "Assistant:", number)  # looks up, in each turn
        size = len(tokenizer(turn, add_special_tokens=False)["input_ids"])
        longer = 0 if "Tool:" in text else (0, most - size - 3, most)[number % 3]
        return "!" * longer + turn

    scripted(monkeypatch, says)
    with_tokenizer(clerk)
    tokenizer = KeelEngine.generate.tokenizer  # pyright: ignore
    stage = {
        "kind": "evaluate", "models": [str(clerk)], "environment": "world:shop", "gold": "world:shop",
        "reward": {"kind": "environment"}, "data": {"source": "world:shop/test_prompts", "rows": 6},
        "max_turns": 2, "sampling": {"max_new_tokens": most},
    }  # fmt: skip
    run({"stages": {"judge": stage}}, tmp_path / "run")
    folder = tmp_path / "run" / "stages" / "judge"
    found = json.loads((folder / "result.json").read_text())["models"][str(clerk)]
    ends = ("truncated", "out_of_turns", "no_room_for_answer", "gold/looked_up")
    assert [found[name]["mean"] for name in ends] == pytest.approx([1, 1 / 3, 1 / 3, 2 / 3])
    assert found["gold"] == found["proxy"]
    assert [roles(row["completion"]) for row in lines(folder / "samples.jsonl")] == ["ata", "at", "a"] * 2


def test_evaluate_shows_what_the_environment_said_first(
    clerk: Path, code: Path, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = scripted(monkeypatch, lambda text, number: " Done.<|end|>")
    with_tokenizer(clerk)
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": [{"role": "user", "content": "Count."}], "start": 10}) + "\n")
    stage = {
        "kind": "evaluate", "models": [str(clerk)], "environment": f"{code}:Counter", "data": str(data),
        "reward": [
            {"kind": "environment"},
            {"kind": "python", "function": f"{code}:by_environment", "isolate": False},
        ],
        "best_of": [2], "sampling": {"max_new_tokens": 100},
    }  # fmt: skip
    run({"stages": {"judge": stage}}, tmp_path / "run")
    samples = lines(tmp_path / "run" / "stages" / "judge" / "samples.jsonl")
    total = samples[0]["rewards"]["environment"]
    assert samples[0]["rewards"]["by_environment"] == pytest.approx(total / 10)
    assert [row["prompt"][-1]["content"] for row in samples] == [f"Count. From {total:.0f}."] * 2
    assert len({tuple(request.prompts[0]) for request in asked}) == 1  # every round begins alike


def test_best_of_n_learns_the_best_episodes_own_tokens(
    settings: Any, clerk: Path, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, a_clerk)
    with_tokenizer(clerk)
    lengths = lengths_of_samplers(monkeypatch, best_of_n)
    rows: list[Any] = []
    fit = best_of_n.language.fit
    monkeypatch.setattr(best_of_n.language, "fit", lambda *given: rows.extend(given[4]) or fit(*given))
    shared = {
        key: settings[key] for key in ("model", "environment", "reward", "data", "max_turns", "sampling")
    }
    stage = {
        **shared, "kind": "best_of_n", "samples_per_prompt": 2, "max_steps": 1, "batch_size": 4, "holdout": 0,
    }  # fmt: skip
    run({"stages": {"best": stage}}, tmp_path / "run")
    folder = tmp_path / "run" / "stages" / "best"
    best = lines(folder / "best.jsonl")
    assert lengths == [None]
    assert len(best) == len(rows) == 8
    assert {roles(row["completion"]) for row in best} == {"ata", "atata"}
    tokenizer = KeelEngine.generate.tokenizer  # pyright: ignore
    for row, kept in zip(rows, best, strict=True):
        assert kept["reward"] == 1.0  # looked up, and one of two does what is due
        trained = tokenizer.decode(
            [token for token, counts in zip(row.ids, row.counts, strict=True) if counts]
        )
        assert "Tool:" not in trained
        assert trained.count("<|end|>") == trained.count("<tool_call>") + trained.count("Done.")
        assert len(row.ids) == len(row.counts)
