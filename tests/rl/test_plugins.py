"""A policy loss, an advantage estimator and a rollout engine of another package, found by a name in a
config."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from keel import plugins
from keel.config import GRPOConfig, PPOConfig, parse
from keel.distributed import group
from keel.errors import NotFiniteError, UsageError
from keel.plugins import fingerprint
from keel.rl import loop
from keel.rl.algorithm import Surrogate
from keel.rl.grpo import GRPO
from keel.rl.ppo import PPO
from keel.rl.rollout import LoopState, RunningScale, Setup
from keel.rl.setup import open_stage
from keel.rollout import KeelEngine, ReferenceEngine

_spec = spec_from_file_location("plugin_packages", Path(__file__).with_name("plugin_packages.py"))
assert _spec is not None
assert _spec.loader is not None
packages = module_from_spec(_spec)
_spec.loader.exec_module(packages)

LOSSES = """
    import torch
    from keel.algorithms import policy
    from keel.algorithms.masked import masked_mean

    def reinforce(logp, old_logp, advantages, mask, *, denominator, weights=None, scale=1.0):
        loss = masked_mean(-scale * advantages * logp, mask, denominator=denominator)
        return loss, {"surrogate": loss.detach()}

    def same(logp, old_logp, advantages, mask, *, denominator, **settings):
        settings.pop("ref_logp")
        return policy.clipped(logp, old_logp, advantages, mask, denominator=denominator, **settings)

    def anchored(logp, old_logp, advantages, mask, *, denominator, ref_logp):
        assert ref_logp.shape == logp.shape
        return masked_mean((logp - ref_logp) ** 2, mask, denominator=denominator), {}

    def unreduced(logp, old_logp, advantages, mask, *, denominator):
        return -advantages * logp, {}

    def bare(logp, old_logp, advantages, mask, *, denominator):
        return -(advantages * logp).sum() / denominator

    def detached(logp, old_logp, advantages, mask, *, denominator):
        return (advantages * logp).sum().detach() / denominator, {}

    def wide_metric(logp, old_logp, advantages, mask, *, denominator):
        return -(advantages * logp).sum() / denominator, {"gap": logp - old_logp}

    def not_a_number(logp, old_logp, advantages, mask, *, denominator):
        return (logp * float("nan")).sum() / denominator, {}

    def endless(logp, old_logp, advantages, mask, *, denominator):
        return logp.sum() / denominator + float("inf"), {}

    def two_arguments(logp, advantages, *, denominator):
        return logp.sum(), {}

    def no_denominator(logp, old_logp, advantages, mask):
        return logp.sum(), {}

    constant = 3
"""
LOSS_NAMES = (
    "reinforce same anchored unreduced bare detached wide_metric not_a_number endless two_arguments "
    "no_denominator constant"
)
ESTIMATORS = """
    import torch
    from keel.algorithms.advantages import Advantages, gae

    def to_go(rewards, mask, *, gamma=1.0):
        returns = gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)[1]
        return Advantages(returns, returns)

    def by_gae(rewards, mask, *, values, gamma, lam, bonus=0.0):
        return Advantages(*gae(rewards + bonus, values, mask, gamma, lam))

    def one_each(rewards, mask):
        return Advantages(rewards.sum(dim=1), rewards.sum(dim=1))

    def a_tensor(rewards, mask):
        return rewards

    def infinite(rewards, mask):
        return Advantages(rewards / 0, rewards)
"""
ENGINES = """
    from dataclasses import replace
    from keel.rollout import Completion, KeelEngine, ScriptedEngine

    class Backwards:
        def __init__(self, model, times=1):
            self.engine, self.times = KeelEngine(model), times

        def generate(self, request, count=None):
            done = self.engine.generate(request, count)
            return [replace(c, hidden=None) for c in done[:: (-1) ** self.times]]

    def own(model):
        return WithoutHidden(model)

    class WithoutHidden:
        def __init__(self, model):
            self.engine = KeelEngine(model)

        def generate(self, request, count=None):
            return [replace(c, hidden=None, logp=()) for c in self.engine.generate(request)]

    def script(model):
        return ScriptedEngine([[5, 6, 1], [7, 1]])

    def nothing(model):
        return object()
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One package for each of the three groups, on the path."""
    names = {name: name for name in LOSS_NAMES.split()}
    packages.install(tmp_path / "site", "my_losses", LOSSES, {"keel.policy_losses": names})
    estimators = {name: name for name in ("to_go", "by_gae", "one_each", "a_tensor", "infinite")}
    packages.install(tmp_path / "site", "my_estimators", ESTIMATORS, {"keel.advantages": estimators})
    engines = {"backwards": "Backwards", "own": "own", "script": "script", "nothing": "nothing"}
    packages.install(tmp_path / "site", "my_engines", ENGINES, {"keel.engines": engines})
    os.utime(tmp_path / "site", (1, 1))  # as packages that have been there: they are looked for once
    monkeypatch.syspath_prepend(tmp_path / "site")
    return tmp_path / "site"


@pytest.fixture
def stage(data: Any, tiny_model: Path, tiny_reward: Path) -> Callable[..., dict[str, Any]]:
    """Settings of a tiny stage."""

    def settings(kind: str = "ppo", **more: Any) -> dict[str, Any]:
        return {
            "kind": kind,
            "model": str(tiny_model),
            "reward": str(tiny_reward),
            "data": str(data.prompts),
            "batch_size": 8,
            "mini_batch": 4,
            "updates": 2,
            "epochs": 2,
            "lr": 1e-3,
            "sampling": {"max_new_tokens": 5},
            **({"samples_per_prompt": 4} if kind == "grpo" else {}),
            **more,
        }

    return settings


@pytest.fixture
def trained(run: Any, stage: Any, tmp_path: Path) -> Callable[..., tuple[Path, list[dict[str, float]]]]:
    """Run one stage: its folder and its metrics."""

    def go(name: str, kind: str = "ppo", **more: Any) -> tuple[Path, list[dict[str, float]]]:
        run({"stages": {"rl": stage(kind, **more)}}, tmp_path / name)
        folder = tmp_path / name / "stages" / "rl"
        return folder, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    return go


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return all(torch.equal(a[name], b[name]) for name in a)


def refused(stage: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse({"name": "x", "stages": {"rl": stage}})


# ---------------------------------------------------------------- policy losses


@pytest.mark.usefixtures("installed")
def test_a_policy_loss_of_another_package_is_what_trains(trained: Any) -> None:
    args = {"policy_loss": "reinforce", "policy_loss_args": {"scale": 2.0}}
    folder, rows = trained("two", **args)
    assert all(row["policy/surrogate"] == pytest.approx(row["loss/policy_avg"]) for row in rows)
    assert all("policy/clipfrac_avg" not in row for row in rows)
    assert all(row["policy/approxkl_avg"] > 0 and row["val/ratio_first"] == 1.0 for row in rows)
    assert not same(folder, trained("one", policy_loss="reinforce")[0])
    assert not same(folder, trained("clipped")[0])


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("kind", ["ppo", pytest.param("grpo", marks=pytest.mark.slow)])
def test_a_policy_loss_that_does_what_keels_does_trains_the_same_weights(kind: str, trained: Any) -> None:
    settings = {"dual_clip": 3.0, "importance_cap": 2.0}
    one, rows = trained("plugin", kind, policy_loss="same", **settings)
    other, expected = trained("own", kind, **settings)
    assert same(one, other)
    extra = {"policy/dual_clipfrac"}
    assert [{k: v for k, v in row.items() if k not in extra} for row in rows] == expected


@pytest.mark.usefixtures("installed")
def test_a_policy_loss_gets_the_reference_where_it_asks_for_it(trained: Any) -> None:
    _, rows = trained("run", policy_loss="anchored", lr=1e-2, updates=3)
    assert rows[0]["loss/policy_avg"] >= 0


@pytest.mark.parametrize("policy_loss", [pytest.param("clipped", marks=pytest.mark.slow), "cispo"])
def test_ppo_and_grpo_take_each_of_keels_own(policy_loss: str, trained: Any) -> None:
    for kind in ("ppo", "grpo"):
        assert len(trained(kind, kind, policy_loss=policy_loss)[1]) == 2


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"policy_loss": "reinforced"}, "adds a policy loss 'reinforced'; did you mean 'reinforce'"),
        ({"policy_loss": "clip"}, "did you mean 'clipped'"),
        ({"policy_loss": "xyz"}, "adds a policy loss 'xyz'; there are anchored, bare, cispo"),
        ({"policy_loss": "constant"}, "'constant' is int, which cannot be called"),
        ({"policy_loss": "two_arguments"}, "'two_arguments' cannot be called as keel calls it"),
        ({"policy_loss": "no_denominator"}, "'no_denominator' must take a keyword `denominator`"),
        (
            {"policy_loss": "reinforce", "policy_loss_args": {"scales": 1.0}},
            "'reinforce' takes no argument `scales`; did you mean `scale`",
        ),
        (
            {"policy_loss": "reinforce", "policy_loss_args": {"denominator": 1.0}},
            "`denominator` is passed by keel",
        ),
        ({"policy_loss_args": {"clip_low": 0.1}}, "`clip_low` is passed by keel"),
        ({"policy_loss": "reinforce", "clip": 0.1}, "`clip` has no effect with `policy_loss: reinforce`"),
        ({"policy_loss": "anchored", "importance_cap": 2.0}, "`importance_cap` has no effect with"),
    ],
)
def test_a_policy_loss_that_cannot_work_is_refused_before_anything_is_loaded(
    more: Any, message: str, stage: Any
) -> None:
    refused(stage(**more), message)


def test_one_name_of_two_packages_is_refused(installed: Path, stage: Any) -> None:
    packages.install(installed, "other_losses", LOSSES, {"keel.policy_losses": {"reinforce": "reinforce"}})
    refused(stage(policy_loss="reinforce"), "added by several packages: my_losses 1.0, other_losses 1.0")


def test_a_package_does_not_take_the_place_of_keels_own(installed: Path, stage: Any) -> None:
    packages.install(installed, "other_losses", LOSSES, {"keel.policy_losses": {"clipped": "reinforce"}})
    refused(stage(), "'clipped', which is keel's own name")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("unreduced", UsageError, "must return a loss of shape (), not one of shape (4, 5)"),
        ("bare", UsageError, "must return (loss, metrics), not Tensor"),
        ("detached", UsageError, "returned a loss without a gradient"),
        ("wide_metric", UsageError, "the metric 'gap' must have shape (), not (4, 5)"),
        ("not_a_number", NotFiniteError, "rl: policy loss 'not_a_number' is nan"),
    ],
)
def test_a_policy_loss_that_returns_something_else_is_named(
    name: str, error: type[Exception], message: str, trained: Any
) -> None:
    with pytest.raises(error, match=re.escape(message).replace(r"\(4,\ 5\)", r"\(4, \d\)")):
        trained("run", policy_loss=name, control="off")


@pytest.mark.usefixtures("installed")
def test_a_policy_loss_that_is_not_finite_on_one_rank_of_several_is_met_by_all_in_the_gradient(
    stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raised there it would leave the others waiting at another place."""
    config: Any = parse({"name": "run", "stages": {"rl": stage(policy_loss="endless")}}).stages["rl"]
    surrogate = Surrogate(config, "rl")
    logp, mask = torch.zeros(2, 3, requires_grad=True), torch.ones(2, 3, dtype=torch.bool)
    batch: Any = SimpleNamespace(
        advantages=torch.ones(2, 3), mask=mask, denominator=6.0, ref_logp=None, weights=None
    )
    with pytest.raises(NotFiniteError, match="is inf"):
        surrogate(logp, logp.detach(), batch)
    monkeypatch.setattr(group, "_group", group.Group(0, 2))
    loss, _ = surrogate(logp, logp.detach(), batch)
    loss.backward()
    assert logp.grad is not None
    assert bool(logp.grad.isnan().all())


@pytest.mark.usefixtures("installed")
def test_a_policy_loss_that_is_nan_is_rolled_back_where_control_says_so(trained: Any) -> None:
    folder, rows = trained(
        "run", policy_loss="not_a_number", control={"on_finding": "rollback", "attempts": 1}
    )
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events][:2] == ["finding", "rollback"]
    assert rows[0].keys() == {"step", "episode"}


def test_the_old_name_of_the_setting_is_read_with_a_note(stage: Any) -> None:
    with pytest.warns(FutureWarning, match="`objective` .*is now called `policy_loss`"):
        config = GRPOConfig.model_validate(stage("grpo", objective="cispo", preset="cispo"))
    assert config.policy_loss == "cispo"
    with pytest.raises(UsageError, match="former name of `policy_loss`"):
        parse({"name": "x", "stages": {"rl": stage("grpo", objective="cispo", policy_loss="cispo")}})
    tree = {"name": "x", "stages": {"rl": stage("grpo", objective="cispo")}}
    assert parse(tree, "x", ["rl.policy_loss=clipped"]).stages["rl"].policy_loss == "clipped"


# ---------------------------------------------------------------- advantage estimators


@pytest.mark.usefixtures("installed")
def test_an_estimator_that_does_what_keels_does_trains_the_same_weights(trained: Any) -> None:
    one, _ = trained("plugin", advantage="by_gae", lam=0.9)
    assert same(one, trained("own", lam=0.9)[0])
    assert same(one, trained("named", advantage="gae", lam=0.9)[0])
    assert not same(one, trained("bonus", advantage="by_gae", lam=0.9, advantage_args={"bonus": 1.0})[0])


@pytest.mark.usefixtures("installed")
def test_an_estimator_takes_the_place_of_grpos_baseline(stage: Any, stage_run: Any) -> None:
    config = GRPOConfig.model_validate(
        stage("grpo", advantage="to_go", preset="dr_grpo", samples_per_prompt=1)
    )
    prompts, _, setup = open_stage(config, stage_run, sharing="none")
    batch = loop.collect(GRPO(setup, prompts), prompts[:8], LoopState(0.0, RunningScale()), 1)
    episodes = batch.episodes
    expected = torch.where(episodes.mask, batch.experience.rewards[:, None], 0.0)
    torch.testing.assert_close(episodes.advantages, expected)


@pytest.mark.parametrize("name", ["group_relative", "leave_one_out"])
def test_ppo_may_compare_the_samples_of_a_prompt(name: str, open_ppo: Any) -> None:
    settings = {"advantage": name, "samples_per_prompt": 4, "whiten_advantages": False, "kl": {"coef": 0.0}}
    prompts, setup = open_ppo(**settings)
    episodes = loop.collect(PPO(setup), prompts[:2], LoopState(0.0, RunningScale()), 1).episodes
    of_response = episodes.advantages[:, 0].view(2, 4)
    torch.testing.assert_close(of_response.sum(dim=1), torch.zeros(2), rtol=0, atol=1e-5)
    assert of_response.abs().max() > 0.01
    assert episodes.returns[:, 0].tolist() == pytest.approx(episodes.rewards.sum(dim=1).tolist())


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("ppo", {"advantage": "gea"}, "adds an advantage estimator 'gea'; did you mean 'gae'"),
        ("ppo", {"advantage": "to_go", "lam": 0.9}, "`lam` has no effect with `advantage: to_go`"),
        ("ppo", {"advantage_args": {"x": 1}}, "`advantage_args` has no effect without `advantage`"),
        ("ppo", {"advantage": "to_go", "advantage_args": {"bonus": 1}}, "takes no argument `bonus`"),
        ("ppo", {"advantage": "leave_one_out"}, "needs `samples_per_prompt` of 2 or more"),
        (
            "grpo",
            {"advantage": "to_go", "baseline": "leave_one_out"},
            "`baseline` has no effect with `advantage",
        ),
    ],
)
def test_an_estimator_that_cannot_work_is_refused_before_anything_is_loaded(
    kind: str, more: Any, message: str, stage: Any
) -> None:
    refused(stage(kind, **more), message)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("one_each", UsageError, r"`advantages` must have the shape \(8, \d\) of the mask, not \(8,\)"),
        ("a_tensor", UsageError, "must return keel.algorithms.advantages.Advantages, not Tensor"),
        ("infinite", NotFiniteError, "rl: advantage estimator 'infinite': `advantages` are not finite"),
    ],
)
def test_an_estimator_that_returns_something_else_is_named(
    name: str, error: type[Exception], message: str, trained: Any
) -> None:
    with pytest.raises(error, match=message):
        trained("run", advantage=name, control="off")


# ---------------------------------------------------------------- engines


@pytest.mark.slow  # as tests/rollout/test_engine.py, by its name in a config
def test_the_reference_engine_samples_the_same_tokens(trained: Any) -> None:
    texts = []
    for engine in ("keel", "reference"):
        folder, rows = trained(engine, engine=engine, lr=1e-9)
        texts.append((folder / "samples.jsonl").read_text().splitlines())
        assert all(row["rollout/sampler_drift"] < 1e-5 for row in rows)
    one, other = ([json.loads(row) for row in rows] for rows in texts)
    assert [row["completion"] for row in one] == [row["completion"] for row in other]


def test_the_config_decides_which_engine_is_opened(open_ppo: Any) -> None:
    engines = {"keel": KeelEngine, "reference": ReferenceEngine}
    for name, kind in engines.items():
        setup: Setup[PPOConfig] = open_ppo(engine=name)[1]
        assert type(setup.engine) is kind
        assert setup.engine.model is setup.roles.policy


@pytest.mark.usefixtures("installed")
def test_an_engine_of_another_package_samples(trained: Any) -> None:
    folder, rows = trained("script", engine="script")
    ids = {row["length"] for row in map(json.loads, (folder / "samples.jsonl").read_text().splitlines())}
    assert ids == {2, 3}
    assert all(row["rollout/response_length"] == 2.5 and row["val/ratio_first"] == 1.0 for row in rows)
    assert all(row["rollout/sampler_drift"] > 1 for row in rows)  # the script claims log-probabilities of −1


@pytest.mark.usefixtures("installed")
def test_an_engine_that_knows_no_log_probabilities_trains_by_the_trainers_own(trained: Any) -> None:
    one, rows = trained("plugin", engine="own")
    other, _ = trained("own", old_logp="trainer")
    assert same(one, other)
    assert all("rollout/sampler_drift" not in row for row in rows)
    with pytest.raises(UsageError, match="`importance_cap` needs the log-probabilities of the sampler"):
        trained("cap", engine="own", importance_cap=2.0)


@pytest.mark.usefixtures("installed")
def test_an_engine_that_cannot_work_is_refused(trained: Any, stage: Any) -> None:
    refused(stage(engine="scripts"), "adds a rollout engine 'scripts'; did you mean 'script'")
    refused(stage(engine_args={"x": 1}), "`engine_args` has no effect with `engine: keel`")
    refused(stage(engine="own", engine_args={"x": 1}), "rollout engine 'own' takes no argument `x`")
    with pytest.raises(UsageError, match="engine 'backwards', prompt 0: the completion is one of another"):
        trained("backwards", engine="backwards")
    assert len(trained("twice", engine="backwards", engine_args={"times": 2})[1]) == 2
    with pytest.raises(UsageError, match="'nothing' opens as object, which has no `generate`"):
        trained("nothing", engine="nothing")


# ---------------------------------------------------------------- all three


@pytest.mark.usefixtures("installed")
def test_a_stage_says_what_it_uses_of_other_packages(stage: Any) -> None:
    assert PPOConfig.model_validate(stage()).plugins() == []
    config = PPOConfig.model_validate(stage(policy_loss="reinforce", advantage="to_go", engine="script"))
    assert config.plugins() == [
        ("keel.policy_losses", "reinforce"), ("keel.advantages", "to_go"), ("keel.engines", "script"),
    ]  # fmt: skip
    assert len({fingerprint(*named) for named in config.plugins()}) == 3


def test_what_was_installed_a_moment_ago_is_found_and_the_rest_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package's folder is there before the file in it that says what it adds."""
    site = tmp_path / "site"
    packages.install(site, "my_rewards", "def brief(): ...", {"keel.rewards": {"brief": "brief"}})
    (adds,) = site.glob("*.dist-info/entry_points.txt")
    later, now = adds.rename(adds.with_name("later")), time.time() + 3600  # whatever the clock does meanwhile
    os.utime(site, (now, now))
    monkeypatch.setattr(sys, "path", [str(site)])
    reads: list[str] = []
    read = plugins.entry_points
    monkeypatch.setattr(plugins, "entry_points", lambda group: reads.append(group) or read(group=group))
    assert plugins.names("keel.rewards") == ()
    later.rename(adds)
    assert plugins.names("keel.rewards") == ("brief",)
    assert len(reads) == 2
    os.utime(site, (1, 1))
    assert [plugins.names("keel.rewards") for _ in range(3)] == [("brief",)] * 3
    assert len(reads) == 3


@pytest.mark.slow  # a process that finds a kind of stage: tests/pipeline/test_plugins.py
def test_the_command_finds_what_is_installed(installed: Path, stage: Any, tmp_path: Path) -> None:
    settings = stage(policy_loss="reinforce", advantage="to_go", engine="script", updates=1)
    config = {"name": "mine", "device": "cpu", "threads": 1, "stages": {"rl": settings}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    path = os.pathsep.join([str(installed), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [
        sys.executable,
        "-m",
        "keel",
        "run",
        str(tmp_path / "config.yaml"),
        "--runs",
        str(tmp_path / "runs"),
    ]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (row,) = (tmp_path / "runs" / "mine" / "stages" / "rl" / "metrics.jsonl").read_text().splitlines()
    assert "policy/surrogate" in json.loads(row)
