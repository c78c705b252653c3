"""What is computed does not depend on how many ranks compute it: gradients, metrics, results and weights of
every kind of stage in float64, on 1, 2, 3 and 4 processes, with whole weights (ddp) and with cut ones (fsdp).

On 4 all that can go wrong on 3 does: rows that are not shared evenly, ranks without any. So 3 has a part of
the kinds only."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

WEIGHT = 1e-6  # of a weight, after all steps
SCORED_IN_FLOAT32, IN_FLOAT32 = ("reward", "reward-lora", "ensemble"), 1e-6  # scores of held-out pairs
TINY = 1e-9  # a gradient that is nothing but rounding: of a bias of keys, say


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    assert one.shape == other.shape
    return float((one - other).abs().max() / one.abs().max().clamp(min=1e-12))


def numbers(value: Any, path: str = "") -> dict[str, float]:
    """Every number in JSON, by where it stands."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in numbers(item, f"{path}/{key}").items()}
    if isinstance(value, list):
        return {k: v for i, item in enumerate(value) for k, v in numbers(item, f"{path}/{i}").items()}
    return {path: float(value)} if isinstance(value, (int, float)) else {}


def logged(run: Path, stage: str) -> dict[str, float]:
    folder = run / "stages" / stage
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return numbers([*lines, json.loads((folder / "result.json").read_text())])


TOGETHER = [
    ("few_kinds", 2, "ddp"),
    ("few_kinds", 2, "fsdp"),
    *(
        pytest.param((kinds, ranks, strategy), marks=pytest.mark.ranks)
        for kinds, ranks in (("all_kinds", 2), ("few_kinds", 3), ("all_kinds", 4))
        for strategy in ("ddp", "fsdp")
    ),
]


@pytest.fixture(params=TOGETHER, ids=lambda case: f"{case[0]}-{case[2]}-{case[1]}")
def runs(request: Any, in_float64: Callable[..., Path]) -> tuple[dict[str, Any], Path, Path]:
    """Stages; their run on one process, and on several."""
    kinds, ranks, strategy = request.param
    stages = request.getfixturevalue(kinds)
    strategies = (strategy,) if kinds == "few_kinds" else ("ddp", "fsdp")
    return stages, in_float64(stages, 1, "ddp") / "ddp", in_float64(stages, ranks, *strategies) / strategy


def compare(alone: Path, together: Path, stages: Iterable[str], gradient: float, number: float) -> None:
    expected, found = (torch.load(run / "gradients.pt") for run in (alone, together))
    assert len(expected) == len(found) > 0
    for step, (one, other) in enumerate(zip(expected, found, strict=True)):
        assert len(one) == len(other), step
        pairs = [(a, b) for a, b in zip(one, other, strict=True) if float(a.abs().max()) > TINY]
        worst = max((apart(a, b) for a, b in pairs), default=0.0)
        assert worst < gradient, f"step {step} of all stages: {worst:.1e}"
    for stage in stages:
        before, after = logged(alone, stage), logged(together, stage)
        assert before.keys() == after.keys(), stage
        for name, value in before.items():
            if name == "/0/rewards/accuracies":
                continue  # at its start a policy is its reference: the sign of what is rounding alone
            within = max(number, IN_FLOAT32 if stage in SCORED_IN_FLOAT32 else 0.0)
            close = math.isclose(value, after[name], rel_tol=within, abs_tol=within)
            assert close, f"{stage}{name}: {value} and {after[name]}"
        for path in sorted((alone / "stages" / stage / "model").rglob("*.safetensors")):
            weights, others = load_file(path), load_file(together / path.relative_to(alone))
            assert weights.keys() == others.keys()
            for name, tensor in weights.items():
                gap = float((tensor - others[name]).abs().max())
                assert gap < WEIGHT, f"{stage}, {name}: {gap:.1e}"


def test_gradients_metrics_results_and_weights_are_those_of_one_process(runs) -> None:
    stages, alone, together = runs
    assert len(torch.load(alone / "gradients.pt")) >= len(stages)
    compare(alone, together, stages, gradient=1e-10, number=1e-9)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("kinds", "gradient", "ranks"),
    [
        *((("ppo", "grpo", "grpo-ahead", "grpo-partial"), 1e-10, ranks) for ranks in (2, 3, 4)),
        *((("distill", "online-dpo"), 1e-10, ranks) for ranks in (2, 4)),
        *((("ppo-adapters",), 1e-10, ranks) for ranks in (2, 4)),
    ],
)
def test_three_updates_of_on_policy_kinds_are_those_of_one_process(
    kinds: tuple[str, ...], gradient: float, ranks: int, in_float64: Any, on_policy_kinds: dict[str, Any]
) -> None:
    stages = {kind: on_policy_kinds[kind] for kind in kinds}
    alone, together = (in_float64(stages, count, "ddp") / "ddp" for count in (1, ranks))
    compare(alone, together, stages, gradient=gradient, number=1e-6)


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_updates_of_policies_critics_and_references_that_are_cut_are_those_of_one_process(
    ranks: int, in_float64: Any, on_policy_kinds: dict[str, Any]
) -> None:
    """With three ranks one has no prompts of what grpo samples again, with four none at all. The sampler's
    own log π, which one process takes for π_old where nothing else is asked for, are kept in float32."""
    kinds = ("ppo", "grpo", "grpo-ahead", "grpo-partial")
    stages = {f"cut-{kind}": {**on_policy_kinds[kind], "old_logp": "trainer"} for kind in kinds}
    alone, together = (in_float64(stages, 1, "ddp") / "ddp", in_float64(stages, ranks, "fsdp") / "fsdp")
    compare(alone, together, stages, gradient=1e-10, number=1e-6)
    critics = [load_file(run / "stages/cut-ppo/critic/model.safetensors") for run in (alone, together)]
    assert all(float((critics[0][n] - critics[1][n]).abs().max()) < WEIGHT for n in critics[0])


@pytest.mark.ranks
def test_weights_in_host_memory_are_those_of_one_process(
    in_float64: Any, all_kinds: dict[str, Any], on_policy_kinds: dict[str, Any]
) -> None:
    """On the CPU they lie there anyway: torch is told so, and what it does then changes no number."""
    stages = {f"host-{name}": {**all_kinds[name], "max_steps": 1} for name in ("tuned", "classes", "reward")}
    stages["host-ppo"] = {**on_policy_kinds["ppo"], "old_logp": "trainer", "updates": 2}
    alone, together = (in_float64(stages, 1, "ddp") / "ddp", in_float64(stages, 2, "offload") / "offload")
    compare(alone, together, [name for name in stages if name != "host-reward"], 1e-10, 1e-6)


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [2, 4])
def test_students_teachers_and_pairs_that_are_cut_are_those_of_one_process(
    ranks: int, in_float64: Any, on_policy_kinds: dict[str, Any], clerk: Path, monkeypatch: Any
) -> None:
    """A teacher with the student's tokens is asked in the loss, one with its own while samples are scored:
    of these it takes log π, which the sampler would keep in float32, hence without the faster paths."""
    monkeypatch.setenv("KEEL_ACCEL", "0")
    distill, pairs = on_policy_kinds["distill"], on_policy_kinds["online-dpo"]
    text = {key: value for key, value in distill.items() if key != "demonstrations"}
    stages = {
        "cut-distill": distill,
        "cut-distill-lora": {**distill, "lora": {"r": 2}, "updates": 2},
        "cut-distill-text": {**text, "teacher": str(clerk), "divergence": "reverse_kl", "updates": 2},
        "cut-online-dpo": {**pairs, "old_logp": "trainer"},
    }
    alone, together = (in_float64(stages, 1, "ddp") / "ddp", in_float64(stages, ranks, "fsdp") / "fsdp")
    compare(alone, together, stages, gradient=1e-10, number=1e-6)


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [2, 4])
def test_roles_on_one_base_that_is_cut_are_those_of_one_process(
    ranks: int, in_float64: Any, one_base_kinds: dict[str, Any]
) -> None:
    """Scores of the reward model are kept in float32 where they leave it."""
    alone, together = (
        in_float64(one_base_kinds, 1, "ddp") / "ddp", in_float64(one_base_kinds, ranks, "fsdp") / "fsdp",
    )  # fmt: skip
    compare(alone, together, one_base_kinds, gradient=1e-10, number=1e-6)
    for path in alone.glob("stages/*/critic/**/*.safetensors"):
        other = load_file(together / path.relative_to(alone))
        assert all(float((tensor - other[n]).abs().max()) < WEIGHT for n, tensor in load_file(path).items())


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    ("kind", "more", "gradient"),
    [
        ("ppo", {"lora": {"r": 2}}, 1e-10),
        ("grpo", {"lora": {"r": 2}}, 1e-10),
        ("ppo", {"sharing": "trunk"}, 1e-10),
        ("ppo", {"sharing": "trunk", "lora": {"r": 2}}, 1e-10),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_adapters_and_value_heads_that_are_cut_are_those_of_one_process(
    kind: str, more: dict[str, Any], gradient: float, ranks: int, in_float64: Any,
    on_policy_kinds: dict[str, Any],
) -> None:  # fmt: skip
    """The reference is the policy with its adapters off."""
    name = f"cut-{kind}-{'-'.join(more)}"
    stages = {name: {**on_policy_kinds[kind], "old_logp": "trainer", **more}}
    alone, together = (in_float64(stages, 1, "ddp") / "ddp", in_float64(stages, ranks, "fsdp") / "fsdp")
    compare(alone, together, stages, gradient=gradient, number=max(1e-6, gradient))
    for path in (alone / "stages" / name).rglob("*.safetensors"):  # the value head's and the adapters', too
        other = load_file(together / path.relative_to(alone))
        assert all(float((tensor - other[n]).abs().max()) < WEIGHT for n, tensor in load_file(path).items())


@pytest.mark.ranks
@pytest.mark.parametrize(("ranks", "strategy"), [(2, "ddp"), (2, "fsdp"), (4, "fsdp")])
@pytest.mark.parametrize("more", [{}, {"lora": {"r": 2}}], ids=["whole", "adapters"])
def test_a_run_goes_back_to_its_healthy_weights_as_one_process_does(
    more: dict[str, Any], ranks: int, strategy: str, in_float64: Any, on_policy_kinds: dict[str, Any]
) -> None:
    """The third gradient is none on the last rank: weights and optimiser of the start come back, and what
    follows is the same to rounding."""
    name = "back-adapters" if more else "back-whole"
    stage = {**on_policy_kinds["grpo"], "old_logp": "trainer", "resample": 0, "save_every": 1, **more}
    stages = {name: {**stage, "control": {"on_finding": "rollback"}}}
    alone, together = (
        in_float64(stages, count, way, how="nan") / way for count, way in ((1, "ddp"), (ranks, strategy))
    )
    compare(alone, together, stages, gradient=1e-10, number=1e-6)
    events = (alone / "stages" / name / "events.jsonl").read_bytes()
    assert b'"rollback"' in events
    assert events == (together / "stages" / name / "events.jsonl").read_bytes()


@pytest.mark.ranks
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_best_of_n_are_those_that_one_process_finds(
    strategy: str, in_float64: Any, data: Any, tiny_model: Path, tiny_reward: Path
) -> None:
    stage = {
        "kind": "best_of_n", "model": str(tiny_model), "reward": str(tiny_reward), "data": str(data.prompts),
        "samples_per_prompt": 3, "batch_size": 5, "micro_batch": 2, "max_steps": 2, "lr": 1e-3,
        "sampling": {"max_new_tokens": 6},
    }  # fmt: skip
    stages = {"best": stage}
    alone, together = (in_float64(stages, 1, "ddp") / "ddp", in_float64(stages, 2, strategy) / strategy)
    compare(alone, together, stages, gradient=1e-10, number=1e-6)


def silent_at_times(judge: Any, text: str) -> Any:
    """A verdict by the characters of the replies; none of a third of the replies, and of the rankings."""
    replies = {name: reply for name, reply in judge.shown(text).items() if name.startswith("reply")}
    totals = {name.removeprefix("reply "): sum(map(ord, reply)) for name, reply in replies.items()}
    if sum(totals.values()) % 3 == 0:
        return judge.said("I would rather not say.")
    if '"scores"' in text:
        return judge.said(json.dumps({"reason": "", "scores": {"score": 1 + totals["reply"] % 10}}))
    places: dict[int, list[str]] = {}
    for name, total in totals.items():
        places.setdefault(total % 7, []).append(name)
    return judge.said(json.dumps({"reason": "", "ranking": [places[key] for key in sorted(places)]}))


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [2, 3])
def test_what_counts_for_a_silent_judge_is_that_of_one_process(
    ranks: int, in_float64: Any, on_policy_kinds: dict[str, Any], data: Any, tiny_model: Path,
    scripted_judge: Any,
) -> None:  # fmt: skip
    """Where a prompt's only reply, or all of them, have no verdict the mean of all counts. The prompts of the
    ranking come twice in an update, and their replies are compared with each other. A judge's own measures
    are of all samples, not means of the ranks'."""
    pytest.importorskip("openai")
    judge = scripted_judge(lambda text, number: silent_at_times(scripted_judge, text))
    term = {
        "kind": "judge", "model": "scripted", "address": judge.address, "rubric": "judge", "tries": 1,
        "on_failure": "none",
    }  # fmt: skip
    rewards = [term, {"kind": "length", "high": 4, "slack": 4}]
    left_out = ("eval_data", "eval_every", "resample")
    grpo = {key: value for key, value in on_policy_kinds["grpo"].items() if key not in left_out}
    stages = {
        f"judged-{ranks}": {**on_policy_kinds["ppo"], "old_logp": "trainer", "reward": rewards},
        f"ranked-{ranks}": {
            **grpo, "data": {"source": str(data.prompts), "rows": 3}, "updates": 2, "batch_size": 12,
            "mini_batch": 6, "old_logp": "trainer", "reward": [{**term, "mode": "ranking"}, rewards[1]],
        },
        f"judge-{ranks}": {
            "kind": "evaluate", "models": [str(tiny_model)], "best_of": [2], "data": str(data.prompts),
            "sampling": {"max_new_tokens": 6}, "reward": rewards,
        },
    }  # fmt: skip
    alone, together = (in_float64(stages, count, "ddp") / "ddp" for count in (1, ranks))
    kinds = list(stages)[:2]
    # where few rewards differ gradients are small, and Adam makes more of their rounding
    compare(alone, together, kinds, gradient=1e-6, number=1e-6)
    for kind in kinds:
        found = logged(alone, kind)
        assert any(0 < found[name] < 1 for name in found if name.endswith("logged/judge/unanswered"))
        assert found["/0/objective/scores_std"] > 0.1
    for name in ("result.json", "samples.jsonl"):
        texts = [(run / "stages" / f"judge-{ranks}" / name).read_text() for run in (alone, together)]
        rows = [text.splitlines() if name.endswith("l") else [text] for text in texts]
        one, other = (numbers([json.loads(row) for row in some]) for some in rows)
        assert len(one) > 20
        assert one == pytest.approx(other, rel=1e-6, abs=1e-6)


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [2, 4])
def test_episodes_with_tools_are_those_of_one_process(
    ranks: int, in_float64: Any, episode_kinds: dict[str, Any]
) -> None:
    """Environments begin alike, every turn draws alike whatever other episodes have ended, and each prompt
    stands beside its own response."""
    alone, together = (
        in_float64(episode_kinds, count, "ddp", how="episodes") / "ddp" for count in (1, ranks)
    )
    compare(alone, together, episode_kinds, gradient=1e-10, number=1e-6)
    for kind in episode_kinds:
        numbers_of = logged(alone, kind)
        assert 1 < numbers_of["/0/rollout/turns"] < 4
        assert numbers_of["/0/rewards/environment/std"] > 0
        expected, found = (
            [json.loads(line) for line in (run / "stages" / kind / "samples.jsonl").read_text().splitlines()]
            for run in (alone, together)
        )
        assert len({row["prompt"][-1]["content"] for row in expected}) > 1
        for one, other in zip(expected, found, strict=True):
            assert all(one[key] == other[key] for key in ("prompt", "completion", "stop_reason", "length"))


@pytest.mark.ranks
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_episodes_that_are_judged_or_chosen_are_those_of_one_process(
    strategy: str, in_float64: Any, episode_kinds: dict[str, Any]
) -> None:
    """Where weights are cut, episodes go in rounds; on one process in one stream."""
    asked = ("model", "environment", "max_turns", "data", "sampling")
    played = {key: episode_kinds["grpo"][key] for key in asked} | {"reward": {"kind": "environment"}}
    model = played.pop("model")
    stages = {
        "best": {
            **played, "kind": "best_of_n", "model": model, "samples_per_prompt": 2, "batch_size": 2,
            "max_steps": 1, "lr": 1e-3, "holdout": 0,
        },
        "judge": {**played, "kind": "evaluate", "models": [model], "best_of": [2]},
    }  # fmt: skip
    alone, together = (
        in_float64(stages, count, way, how="episodes") / way for count, way in ((1, "ddp"), (2, strategy))
    )
    compare(alone, together, ("best",), gradient=1e-10, number=1e-6)
    for name in ("stages/best/best.jsonl", "stages/judge/samples.jsonl"):
        expected, found = (
            [json.loads(line) for line in (run / name).read_text().splitlines()] for run in (alone, together)
        )
        assert len(expected) == len(found) > 4
        for one, other in zip(expected, found, strict=True):
            assert all(one[key] == other[key] for key in ("prompt", "completion", "stop_reason", "length"))
    measures, others = (
        numbers(json.loads((run / "stages/judge/result.json").read_text())) for run in (alone, together)
    )
    assert measures == pytest.approx(others, rel=1e-6, abs=1e-6)


def test_files_are_those_that_one_process_leaves(runs) -> None:
    stages, alone, together = runs
    for stage in stages:
        left, other = (
            {str(p.relative_to(run)) for p in (run / "stages" / stage).rglob("*") if p.is_file()}
            for run in (alone, together)
        )
        assert left == other
