"""What needs no second process: how rows are dealt, and what is said of ranks that ended."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keel.config import parse
from keel.config.sampler import SamplerConfig
from keel.distributed import group, launch, records
from keel.distributed.records import Record
from keel.errors import KeelError, LostRankError, RewardError, UsageError
from keel.pipeline import following
from keel.pipeline.stage_kinds import OWN_KINDS
from keel.rewards.mixture import Answers, Batch, Mixture, WeightedReward
from keel.rl import sampled
from keel.rollout.score_responses import Scored
from keel.stages import build_rewards, samplers
from keel.types import Completion


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 6))
def test_every_row_is_dealt_once_and_no_rank_has_a_rows_worth_more_than_another(sizes, ranks):
    shares = group.deal(sizes, ranks)
    assert sorted(i for share in shares for i in share) == list(range(len(sizes)))
    assert len(shares) == ranks
    tokens = [sum(sizes[i] for i in share) for share in shares]
    assert max(tokens) - min(tokens) <= max(sizes, default=0)
    assert all(share == sorted(share) for share in shares)


def test_rows_of_equal_length_are_dealt_in_equal_numbers_and_few_rows_leave_ranks_without():
    assert [len(share) for share in group.deal([7] * 9, 3)] == [3, 3, 3]
    assert sorted(map(len, group.deal([5, 9], 4))) == [0, 0, 1, 1]
    assert group.deal([], 2) == [[], []]


def test_a_process_alone_waits_for_nobody():
    assert group.size() == 1
    assert group.is_first()
    assert group.mapped([3, 4], lambda x: x + 1) == [4, 5]
    assert group.from_first(lambda: {"a": 1}) == {"a": 1}
    assert group.summed({"a": 1.5}) == {"a": 1.5}
    assert group.gathered("x") == ["x"]
    group.agree("anything", object())


def test_an_environment_that_says_nothing_is_named(monkeypatch):
    monkeypatch.setenv("RANK", "one")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="WORLD_SIZE"):
        group.launched()
    monkeypatch.setenv("RANK", "1")
    assert group.launched() == (1, 2, 0)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert group.launched() is None


# ---------------------------------------------------------------- what is said of ranks that ended


def left(
    rank: int, kind: records.Kind, line: str, code: int = 1, time: float = 0.0, host: str = "h"
) -> Record:
    return Record(rank, host, kind, line, code, time)


def said(folder: Path, codes: list[int | None], *found: tuple[int, Record]) -> launch.Outcome:
    return launch.outcome(codes, dict(found), folder)


def test_the_rank_that_raised_first_is_named_and_not_those_that_lost_it(tmp_path):
    lost = left(0, "lost", "the others do not answer", time=1.0)
    own = left(1, "own", "the disk is full", time=2.0)
    outcome = said(tmp_path, [1, 1], (0, lost), (1, own))
    assert outcome == launch.Outcome(1, "rank 1 of 2 on h: the disk is full")


def test_what_is_wrong_on_every_rank_and_what_is_bad_usage_names_no_place(tmp_path):
    both = [(i, left(i, "own", "the gradient is not finite", time=i)) for i in range(2)]
    assert said(tmp_path, [1, 1], *both).line == "the gradient is not finite"
    usage = left(0, "own", "no stage 'x'", code=2)
    assert said(tmp_path, [2, None], (0, usage)) == launch.Outcome(2, "no stage 'x'")


def test_a_rank_that_was_killed_is_named_with_its_signal(tmp_path):
    lost = left(0, "lost", "the others do not answer")
    outcome = said(tmp_path, [1, -9], (0, lost))
    assert outcome.code == 1
    assert "rank 1 of 2" in outcome.line
    assert "SIGKILL" in outcome.line


def test_a_rank_that_ended_without_a_word_is_named_with_its_last_line(tmp_path):
    (tmp_path / "rank-1.log").write_text("starting\nFatal Python error: Segmentation fault\n\n")
    line = said(tmp_path, [None, 3]).line
    assert "ended with code 3: Fatal Python error" in line


def test_a_rank_that_hangs_is_named_by_who_looked_for_it(tmp_path):
    hung = left(1, "hung", "has not answered for 30 s", host="there")
    assert said(tmp_path, [1, None], (0, hung)).line == "rank 1 of 2 on there: has not answered for 30 s"
    late = left(0, "lost", "timed out")
    assert "did not come to where the others waited" in said(tmp_path, [1, None], (0, late)).line


def test_a_record_is_left_once_and_only_where_somebody_reads_it(tmp_path, monkeypatch):
    records.leave("own", "nobody reads this", 1)
    monkeypatch.setenv(records.FOLDER, str(tmp_path))
    monkeypatch.setenv("RANK", "1")
    records.leave("own", "first", 1)
    records.leave("lost", "second", 1)
    (tmp_path / "rank-7.json").write_text("{")
    found = records.read(tmp_path)
    assert [(number, record.line) for number, record in found.items()] == [(1, "first")]


def test_ranks_are_started_with_their_numbers_and_the_first_failure_ends_all(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "FOR_OTHERS", 0.2)  # nobody else knows anything
    script = (
        "import os, pathlib, sys, time\n"
        f"out = pathlib.Path({str(tmp_path)!r}) / os.environ['RANK']\n"
        "out.write_text(' '.join(os.environ[n] for n in ('WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR')))\n"
        "sys.exit(4) if os.environ['RANK'] == '1' else time.sleep(60 if len(sys.argv) > 1 else 0)\n"
    )
    outcome = launch.run([sys.executable, "-c", script, "wait"], 2)
    assert (tmp_path / "0").read_text() == "2 0 127.0.0.1"
    assert (tmp_path / "1").read_text() == "2 1 127.0.0.1"
    assert outcome.code == 1
    assert "rank 1 of 2" in outcome.line
    assert "code 4" in outcome.line


# ---------------------------------------------------------------- responses of several ranks


def _sampled(rows: list[int]) -> sampled.Sampled:
    """Responses number `rows`, each of as many tokens as its number tells, all 100 + its number."""
    lengths = [1 + row % 3 for row in rows]
    width = max(lengths)
    of_token = torch.tensor([[float(row)] * n + [0.0] * (width - n) for row, n in zip(rows, lengths)])
    ids = torch.tensor([[7] + [100 + row] * n + [0] * (width - n) for row, n in zip(rows, lengths)])
    scored = Scored(ids, torch.ones(len(rows)), of_token > 0, *[of_token] * 4)
    completions = tuple(Completion((7,), (100 + row,) * n, "eos") for row, n in zip(rows, lengths))
    return sampled.Sampled(tuple(f"prompt {row}" for row in rows), completions, scored, True)


def test_responses_of_three_ranks_stand_in_the_order_of_their_prompts(monkeypatch):
    shares = [sampled.Dealt([1], [2, 3], 6), sampled.Dealt([0, 2], [0, 1, 4, 5], 6), sampled.Dealt([], [], 6)]
    made = [(share.rows, _sampled(share.rows) if share.rows else None) for share in shares]
    monkeypatch.setattr(group, "gathered", lambda own: made)
    whole, expected = sampled.together(shares[0], made[0][1], 0), _sampled(list(range(6)))
    assert whole.prompts == expected.prompts
    assert whole.completions == expected.completions
    for name in ("ids", "mask", "logp"):
        assert getattr(whole.scored, name).equal(getattr(expected.scored, name))


def test_replies_to_equal_prompts_are_one_ranks_where_they_are_compared(monkeypatch):
    def dealt(prompts: Any, rank: int) -> sampled.Dealt:
        monkeypatch.setattr(group, "_group", group.Group(rank, 2))
        return sampled.deal(prompts, 2)

    assert [dealt("abcab", rank).prompts for rank in (0, 1)] == [[0, 2, 3], [1, 4]]
    assert [dealt(range(5), rank).prompts for rank in (0, 1)] == [[0, 2, 4], [1, 3]]
    assert dealt("abcab", 1) == sampled.Dealt([1, 4], [2, 3, 8, 9], 10)


class Said:
    """What the ranks of a run tell each other, one after the other; the last of them is heard by all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
        self.size, self.patch = size, monkeypatch

    def of(self, work: Callable[[int], Any]) -> list[Any]:
        """What each rank's work returns or raises."""
        told: list[Any] = []
        self.patch.setattr(group, "all_here", lambda: None)
        self.patch.setattr(group, "gathered", lambda value: told.append(value) or list(told))
        for rank in range(self.size):  # nobody hears the others yet
            self.patch.setattr(group, "_group", group.Group(rank, self.size))
            with contextlib.suppress(KeelError, RuntimeError, LookupError):
                work(rank)
        found: list[Any] = []
        self.patch.setattr(group, "gathered", lambda value: list(told))
        for rank in range(self.size):
            self.patch.setattr(group, "_group", group.Group(rank, self.size))
            try:
                found.append(work(rank))
            except KeelError as error:
                found.append(error)
        return found


def test_what_one_rank_cannot_do_ends_all_at_the_same_place(monkeypatch):
    def work(rank: int) -> int:
        if rank:
            raise RewardError(f"rank {rank} has no verdict")
        return rank

    found = Said(monkeypatch, 3).of(lambda rank: group.gathered_or_error(lambda: work(rank)))
    assert [(type(one), str(one)) for one in found] == [(RewardError, "rank 1 has no verdict")] * 3
    assert all(group.met_by_all(one) for one in found)
    assert Said(monkeypatch, 2).of(lambda rank: group.gathered_or_error(lambda: rank)) == [[0, 1]] * 2
    with pytest.raises(UsageError) as met, group.alike():
        raise UsageError("on all")
    assert group.met_by_all(met.value)


def test_what_counts_for_a_silent_judge_does_not_depend_on_how_samples_are_dealt(monkeypatch):
    """Rank 0 has prompt p and r, rank 1 q. Of p one reply has a verdict, of q and r none, so that for these
    the mean of all counts: what rank 1 alone could not know. One rank has no samples."""
    said = {"a": 1.0, "b": None, "c": None, "d": None, "e": 0.5, "f": None}
    rewards = Mixture(
        [WeightedReward("judge", 1.0, lambda b: [said[c] for c in b.completions], neutral=True)]
    )
    prompts = [5, 5, 6, 6, 7, 7]

    def ask(rows: Sequence[int]) -> Answers | None:
        if not rows:
            return None
        replies = ["abcdef"[row] for row in rows]
        ids = [[prompts[row]] for row in rows]
        batch = Batch(["p"] * len(rows), replies, [[7]] * len(rows), ["eos"] * len(rows), ids, {})
        reasons = [None if said[reply] is not None else f"{reply} was late" for reply in replies]
        batch.logged.log_extra("judge/no_verdict", reasons)
        batch.logged.log_metric(
            "judge/unanswered", sum(r is not None for r in reasons) / len(rows), len(rows)
        )
        return rewards.ask(batch)

    alone = build_rewards.rated_by_all(rewards, lambda: ask(range(6)), range(6))
    assert alone.total.tolist() == [1.0, 1.0, 0.75, 0.75, 0.5, 0.5]
    shares = [[0, 1, 4, 5], [2, 3], []]
    found = Said(monkeypatch, 3).of(
        lambda rank: build_rewards.rated_by_all(rewards, lambda: ask(shares[rank]), shares[rank])
    )
    for one in found:
        assert one.total.equal(alone.total)
        assert (one.by_name, one.silent) == (alone.by_name, alone.silent)
        assert one.logged.extra == alone.logged.extra
        logged = one.logged.metrics["judge/unanswered"]
        assert sum(logged) / len(logged) == pytest.approx(4 / 6)
    assert found[1].rows([2, 3]).total.tolist() == [0.75, 0.75]
    assert found[1].rows([2]).silent == (True,)


# ---------------------------------------------------------------- kinds


def _config(**stages: Any) -> Any:
    return parse({"name": "tiny", "stages": stages})


def test_what_cannot_be_cut_over_ranks_is_refused_by_its_setting(monkeypatch):
    length = {"kind": "length", "high": 9}
    config = _config(
        tuned={"kind": "sft", "model": "a/b", "data": "rows.jsonl"},
        rl={"kind": "grpo", "model": "tuned", "data": "rows.jsonl", "reward": length},
        best={"kind": "best_of_n", "model": "tuned", "data": "rows.jsonl", "reward": length},
        pairs={
            "kind": "collect", "model": "tuned", "data": "rows.jsonl", "pairs": 4, "annotators": "people",
        },
    )  # fmt: skip
    cut = config.model_copy(
        update={"distributed": config.distributed.model_copy(update={"strategy": "fsdp"})}
    )
    for one in (config, cut):
        following.check_kinds(one, list(one.stages))
    grpo = cut.stages["rl"]
    for rollout in ({"partial": 4}, {"partial": 4, "engine": "vllm"}, {"ahead": 1, "engine": "vllm"}):
        older = type(grpo).model_validate(grpo.model_dump() | {"rollout": rollout, "importance_cap": 2.0})
        for one in (config, cut):
            following.check_kinds(one.model_copy(update={"stages": {"rl": older}}), ["rl"])
    on_one_base = type(grpo).model_validate(grpo.model_dump() | {"sharing": "adapters", "lora": {"r": 2}})
    following.check_kinds(cut.model_copy(update={"stages": {"rl": on_one_base}}), ["rl"])
    other = type(grpo).model_validate(grpo.model_dump() | {"offload": True})
    with pytest.raises(UsageError, match=r"'rl': `offload` does not go with .* fsdp; set ddp"):
        following.check_kinds(cut.model_copy(update={"stages": {"rl": other}}), ["rl"])


def test_a_kind_that_knows_nothing_of_ranks_runs_on_the_first_alone(monkeypatch):
    monkeypatch.setattr(group, "_group", group.Group(0, 2, "fsdp"))
    seen: list[tuple[int, bool]] = []
    monkeypatch.setattr(
        following, "run_stage", lambda stage, run: seen.append((group.size(), group.is_sharded())) or {}
    )
    stage = _config(
        pairs={"kind": "collect", "model": "a/b", "data": "r.jsonl", "pairs": 4, "annotators": "people"}
    ).stages["pairs"]
    assert not OWN_KINDS["collect"].ranks
    assert following.call(stage, Any, None, Any) == {}
    assert seen == [(1, False)]
    assert group.size() == 2


def test_what_others_met_in_their_rows_is_in_the_first_ranks_record(monkeypatch):
    noted: list[str] = []
    run: Any = SimpleNamespace(facts={"responses_cut_for_reward": 2, "notes": ["a"]}, note=noted.append)
    monkeypatch.setattr(group, "gathered", lambda own: [own, (["b"], 3), ([], 0)])
    following._share_facts(run)
    assert run.facts["responses_cut_for_reward"] == 5
    assert noted == ["a", "b"]
    monkeypatch.setattr(group, "gathered", lambda own: [own, ([], 0)])
    nothing: Any = SimpleNamespace(facts={})
    following._share_facts(nothing)
    assert nothing.facts == {}


def test_ranks_that_read_other_rows_are_told(monkeypatch):
    monkeypatch.setattr(group, "_group", group.Group(0, 2))
    monkeypatch.setattr(group, "gathered", lambda value: [value, [3]])
    with pytest.raises(LostRankError, match="ranks 0 and 1 differ in the rows"):
        group.agree("the rows", [2])


def test_settings_of_ranks_are_read_and_change_no_fingerprint():
    config = parse({"name": "t", "distributed": {"strategy": "fsdp"}, "stages": json.loads(
        '{"s": {"kind": "sft", "model": "a/b", "data": "rows.jsonl"}}')})  # fmt: skip
    assert config.distributed.strategy == "fsdp"
    with pytest.raises(UsageError, match="strategy"):
        parse({"name": "t", "distributed": {"strategy": "zero"}, "stages": {"s": {"kind": "sft"}}})
    for strategy in ("ddp", "auto"):
        settings = {"strategy": strategy, "offload": True}
        with pytest.raises(UsageError, match="`offload` is of weights that are cut over ranks: set `strat"):
            parse({"name": "t", "distributed": settings, "stages": {"s": {"kind": "sft"}}})


def test_in_which_precision_ranks_gather_is_of_weights_that_are_cut() -> None:
    stages = {"s": {"kind": "sft", "model": "a/b", "data": "rows.jsonl"}}
    settings = {"strategy": "fsdp", "mixed_precision": False}
    assert not parse({"name": "t", "distributed": settings, "stages": stages}).distributed.mixed_precision
    with pytest.raises(UsageError, match="`mixed_precision` is of weights that are cut over ranks"):
        parse({"name": "t", "distributed": {"mixed_precision": False}, "stages": stages})


def test_parts_in_host_memory_are_said_to_be_there(monkeypatch):
    for kind, words in (("cuda", "they lie in host memory"), ("cpu", "changes nothing on the CPU")):
        monkeypatch.setattr(group, "_group", group.Group(0, 2, "fsdp", None, kind, True))
        assert group.is_offloaded()
        assert words in following._of_offload()
    monkeypatch.setattr(group, "_group", group.Group(0, 2, "ddp", None, "cuda", True))
    assert not group.is_offloaded()


@pytest.mark.parametrize(
    ("more", "told"),
    [({}, True), ({"devices": "3"}, False), ({"sleep": True}, False), ({"address": "http://h:8000"}, False)],
)
def test_a_server_that_would_share_the_first_ranks_card_is_told_of(more: dict[str, Any], told: bool) -> None:
    note = samplers.card_note(SamplerConfig.model_validate({"engine": "vllm", **more}))
    assert (note is not None) == told
    if note is not None:
        assert all(remedy in note for remedy in ("`rollout.devices`", "`rollout.sleep", "`rollout.address`"))
    assert samplers.card_note(SamplerConfig.model_validate({"engine": "keel"})) is None
