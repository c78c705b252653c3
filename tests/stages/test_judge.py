"""A language model as the reward of a run and as an annotator: end to end, cut off, resumed, out of
budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from keel.config import parse
from keel.config.rewards import JudgeTerm
from keel.data import questions
from keel.distributed import group
from keel.errors import BudgetError, RewardError, UsageError
from keel.pipeline.pipeline import Pipeline
from keel.rewards.judge import client, ledger
from keel.stages import collect as collect_stage
from keel.stages import evaluate, judged_pairs, judges
from keel.stages.judged_pairs import JudgeVotes
from keel.stages.people import Voted

pytest.importorskip("openai")


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)


@pytest.fixture
def grpo(tiny_model: Path, data: Any) -> Any:
    """A tiny GRPO stage that a judge rewards."""

    def make(address: str | None, *, more: Any = None, **judge: Any) -> dict[str, Any]:
        term = {"kind": "judge", "model": "scripted", "address": address, "rubric": "red is good", "tries": 2}
        return {
            "kind": "grpo", "model": str(tiny_model), "data": str(data.prompts), "reward": {**term, **judge},
            "updates": 3, "batch_size": 8, "samples_per_prompt": 4, "lr": 1e-3, "save_every": 10,
            "sampling": {"max_new_tokens": 6}, **(more or {}),
        }  # fmt: skip

    return make


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def stage(config: dict[str, Any], directory: Path) -> Pipeline:
    return Pipeline(
        parse({"name": "tiny", "threads": 1, "device": "cpu", "stages": {"grpo": config}}), directory, str
    )


@pytest.mark.parametrize(
    "mode",
    [
        "pointwise",
        pytest.param("pairwise", marks=pytest.mark.slow),
        pytest.param("ranking", marks=pytest.mark.slow),
    ],
)
def test_a_judge_rewards_grpo_end_to_end(
    mode: str, grpo: Any, scripted_judge: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And the key is written nowhere."""
    monkeypatch.setenv("JUDGE_KEY", "sk-secret-4711")
    # a letter that an untrained model writes now and then
    judge = scripted_judge(lambda text, n: scripted_judge.likes_red(text, liked="e"))
    config = grpo(judge.address, mode=mode, api_key_env="JUDGE_KEY", more={"updates": 2})
    told: list[str] = []
    settings = parse({"name": "tiny", "threads": 1, "device": "cpu", "stages": {"grpo": config}})
    pipeline = Pipeline(settings, tmp_path / "run", told.append)
    pipeline._report = lambda: None
    pipeline.run()
    folder = tmp_path / "run" / "stages" / "grpo"
    metrics = lines(folder / "metrics.jsonl")
    assert all(0 <= row["rewards/judge/mean"] <= 1 and row["rewards/judge/applies"] == 1 for row in metrics)
    assert any(row["rewards/judge/std"] > 0 for row in metrics)
    relative = {"rewards/logged/judge/position_bias", "rewards/logged/judge/disagreement"}
    assert (relative <= metrics[0].keys()) == (mode != "pointwise")
    sample = lines(folder / "samples.jsonl")[0]
    assert sample.get("extra", {}).get("judge/reason") == ("by colour" if mode == "pointwise" else None)
    assert len(judge.asked) == len(set(judge.asked)) == len(lines(tmp_path / "run" / "judge.jsonl"))
    assert {one["authorization"] for one in judge.headers} == {"Bearer sk-secret-4711"}
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [path for path in written if b"sk-secret" in path.read_bytes()]
    assert "sk-secret" not in "".join(told)


def test_a_run_whose_judge_is_killed_goes_on_and_asks_nothing_twice(
    grpo: Any, run: Any, scripted_judge: Any, differences: Any, tmp_path: Path
) -> None:
    two = {"updates": 2}
    whole = scripted_judge()
    run({"stages": {"grpo": grpo(whole.address, more=two)}}, tmp_path / "whole")

    def dies(text: str, number: int) -> Any:
        return scripted_judge.said(hang_up=True) if number > 9 else scripted_judge.likes_red(text)

    first = scripted_judge(dies)
    with pytest.raises(
        RewardError, match=r"reward 'judge' has no verdict on sample \d+, prompt '.*cannot be reached"
    ):
        run({"stages": {"grpo": grpo(first.address, concurrency=1, more=two)}}, tmp_path / "run")
    folder = tmp_path / "run" / "stages" / "grpo"
    done = len(lines(folder / "metrics.jsonl"))
    assert done == 1
    assert (
        folder / "checkpoints" / f"step-{done:06d}"
    ).is_dir()  # what was done is kept, whatever save_every
    second = scripted_judge()  # the same model, served elsewhere: nothing is done again
    run({"stages": {"grpo": grpo(second.address, more=two)}}, tmp_path / "run")
    answered = first.asked[:10]
    assert not set(answered) & set(second.asked)
    assert sorted(set(answered) | set(second.asked)) == sorted(set(whole.asked))
    assert set(differences(tmp_path / "run", tmp_path / "whole")) == {
        "judge.jsonl", "config.yaml",  # who answered, and in which order
    }  # fmt: skip


@pytest.mark.slow
def test_a_spent_budget_ends_a_run_and_a_larger_one_goes_on(
    grpo: Any, run: Any, scripted_judge: Any, tmp_path: Path
) -> None:
    judge = scripted_judge()
    for _ in range(2):  # the second time nothing is asked
        spent = r"grpo/judge: its budget is spent \(12 of 12 calls\)"
        with pytest.raises(BudgetError, match=spent) as raised:
            run({"stages": {"grpo": grpo(judge.address, budget={"calls": 12})}}, tmp_path / "run")
        assert raised.value.exit_code == 1
        assert len(judge.asked) == 12
    folder = tmp_path / "run" / "stages" / "grpo"
    assert list((folder / "checkpoints").glob("step-*"))
    run({"stages": {"grpo": grpo(judge.address, budget={"calls": 1000})}}, tmp_path / "run")
    assert len(lines(folder / "metrics.jsonl")) == 3
    assert len(judge.asked) == len(set(judge.asked)) > 12
    facts = json.loads((folder / "stage.json").read_text())["facts"]
    assert facts["judges"] == {"judge": {"calls": len(judge.asked), "tokens": 7 * len(judge.asked)}}


def test_what_changes_no_result_is_in_no_fingerprint(grpo: Any, tmp_path: Path) -> None:
    def print_of(**judge: Any) -> str:
        return stage(grpo(judge.pop("address", "http://localhost:1/v1"), **judge), tmp_path).fingerprint(
            "grpo"
        )

    before = print_of()
    idle = {
        "address": "https://elsewhere/v1", "concurrency": 3, "timeout": 5.0, "tries": 9,
        "budget": {"calls": 5},
        "api_key_env": "KEY",
    }  # fmt: skip
    assert {print_of(**{name: value}) for name, value in idle.items()} == {before}
    decisive = {
        "model": "other",
        "rubric": "blue is good",
        "scale": [1, 5],
        "temperature": 0.5,
        "reasons": False,
    }
    changed = [print_of(**{name: value}) for name, value in decisive.items()]
    assert len({before, *changed}) == len(decisive) + 1


def test_a_missing_key_or_client_is_said_before_anything_runs(
    grpo: Any, run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(
        UsageError, match=r"grpo: judge 'judge': the environment variable JUDGE_KEY .*is not set"
    ):
        run({"stages": {"grpo": grpo("http://localhost:1/v1", api_key_env="JUDGE_KEY")}}, tmp_path / "run")
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(UsageError, match=r"judge 'judge':.*pip install 'keel-rlhf\[judge\]'"):
        run({"stages": {"grpo": grpo("http://localhost:1/v1")}}, tmp_path / "run")
    assert not (tmp_path / "run" / "stages").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"address": "localhost:8000"}, "is no address"),
        ({"address": "http://user:key@host/v1"}, "an address holds no key"),
        ({"address": "http://host/v1?key=3"}, "an address holds no key"),
        ({"address": "http://host/v1/chat/completions"}, "leave /chat/completions out"),
        ({"address": None, "concurrency": 2}, "`concurrency` has no effect without `address`"),
        ({"address": None, "tries": 6, "budget": {"calls": 2}}, "`budget` has no effect without `address`"),
        ({"rubric": " "}, "`rubric` is blank"),
        ({"rubric": [{"name": "a"}, {"name": "a"}]}, "two criteria 'a'"),
        ({"scale": [5, 1]}, "second end must be above"),
        ({"mode": "ranking", "scale": [1, 5]}, "`scale` has no effect with `mode: ranking`"),
        ({"both_orders": False}, "`both_orders` has no effect with `mode: pointwise`"),
        ({"against": "best"}, "`against` has no effect with `mode: pointwise`"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    change: dict[str, Any], reason: str, grpo: Any, tmp_path: Path
) -> None:
    config = grpo("http://localhost:1/v1", tries=6)
    config["reward"] |= change
    with pytest.raises(UsageError, match=reason):
        stage(config, tmp_path)


@pytest.mark.parametrize(
    "more",
    [
        {"eval_every": 1, "eval_data": "p.jsonl"},
        {"judge": {"reward": {"kind": "judge", "model": "m", "mode": "ranking"}}, "eval_every": 1},
    ],
)
def test_replies_are_not_ranked_where_a_prompt_has_one(
    more: dict[str, Any], grpo: Any, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="has one reply a prompt: set `mode: pointwise`"):
        stage(grpo("http://localhost:1/v1", more=more, mode="ranking"), tmp_path)


def test_a_column_that_no_row_has_is_said_before_anything_runs(grpo: Any, run: Any, tmp_path: Path) -> None:
    config = grpo("http://localhost:1/v1", reference="truth")
    with pytest.raises(UsageError, match=r"the data have no column 'truth' \(`reference`\)"):
        run({"stages": {"grpo": config}}, tmp_path / "run")


@pytest.mark.slow
def test_a_model_in_this_process_judges_too(grpo: Any, run: Any, tiny_model: Path, tmp_path: Path) -> None:
    """An untrained one says nothing that can be read: an error with the sample, or None beside another
    reward."""
    local = {"model": str(tiny_model), "tries": 6, "max_new_tokens": 8}
    long = "the question takes .* tokens, and its context has room for 40"
    with pytest.raises(RewardError, match=f"no verdict on sample 0, prompt '.*': {long}"):
        run({"stages": {"grpo": grpo(None, **local)}}, tmp_path / "run")
    config = grpo(None, **local, on_failure="none", more={"updates": 1})
    config["reward"] = [config["reward"], {"kind": "length", "high": 4}]
    run({"stages": {"grpo": config}}, tmp_path / "other")
    metrics = lines(tmp_path / "other" / "stages" / "grpo" / "metrics.jsonl")
    assert {row["rewards/judge/applies"] for row in metrics} == {0.0}
    assert {row["rewards/logged/judge/unanswered"] for row in metrics} == {1.0}
    assert not (tmp_path / "other" / "judge.jsonl").exists()


def test_a_model_in_this_process_without_room_for_a_question_is_said_before_anything_runs(
    grpo: Any, tiny_model: Path, tmp_path: Path
) -> None:
    """The default answer is longer than many a small model's context."""
    with pytest.raises(
        UsageError, match=r"judge 'judge': `max_new_tokens` 1024 leaves no room .* of 48; lower"
    ):
        stage(grpo(None, model=str(tiny_model), tries=6), tmp_path / "run").run()
    assert not (tmp_path / "run" / "stages" / "grpo" / "metrics.jsonl").exists()


def test_a_model_in_this_process_is_read_as_a_server_is(
    stage_run: Any, roomy_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    term = JudgeTerm(kind="judge", model=str(roomy_model), max_new_tokens=8)  # pyright: ignore[reportCallIssue]
    judge = judges.of_reward(term, stage_run, dtype="float32", trust_remote_code=False)
    asked = questions.pairwise(judge.rubric, "p", "a", "b")
    monkeypatch.setattr(judges, "text_of", lambda tokenizer, completion: '{"reason": "x", "better": "B"}')
    found = judge.asked.ask([asked])[0]
    assert getattr(found, "value", None) == 0.0 or "cut off" in getattr(found, "reason", "")


def test_what_a_model_in_this_process_draws_follows_from_the_question(
    stage_run: Any, roomy_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else is asked beside it, on another rank say."""
    from keel.config.rewards import JudgeTerm
    from keel.data import questions
    from keel.stages import judges

    settings: dict[str, Any] = {
        "kind": "judge",
        "model": str(roomy_model),
        "max_new_tokens": 8,
        "temperature": 1.0,
    }
    judge = judges.of_reward(JudgeTerm(**settings), stage_run, dtype="float32", trust_remote_code=False)
    drawn: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        judges.Local, "_read", lambda self, question, completion: drawn.append(completion.ids)
    )
    one, other = (questions.pairwise(judge.rubric, "p", "a", reply) for reply in ("b", "c"))
    judge.asked.ask([one, other, one])
    judge.asked.ask([other])
    assert drawn[0] == drawn[2] != drawn[1] == drawn[3]


@pytest.mark.parametrize(("concurrency", "ranks", "each"), [(8, 1, 8), (8, 3, 2), (2, 4, 1)])
def test_the_requests_at_the_same_time_are_those_of_all_ranks(
    concurrency: int, ranks: int, each: int, stage_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    term = JudgeTerm(kind="judge", model="m", address="http://localhost:1/v1", concurrency=concurrency)  # pyright: ignore[reportCallIssue]
    monkeypatch.setattr(group, "_group", group.Group(0, ranks))
    judge = judges.of_reward(term, stage_run, dtype="float32", trust_remote_code=False)
    assert judge.asked.endpoint.concurrency == each


# ---------------------------------------------------------------- an annotator


@pytest.fixture
def collect(roomy_model: Path) -> Any:
    def make(*judges: dict[str, Any], **more: Any) -> dict[str, Any]:
        entries = [
            {"judge": {"model": "scripted", "rubric": "red is good", "tries": 2, **one}} for one in judges
        ]
        return {
            "kind": "collect", "model": str(roomy_model), "pairs": 26, "sampling": {"max_new_tokens": 8},
            "data": {"source": "world:helpdesk/prompts", "rows": 30},
            "annotators": ["world:helpdesk", *entries], **more,
        }  # fmt: skip

    return make


def test_judges_vote_beside_others_and_count_only_where_they_are_reliable(
    collect: Any, run: Any, scripted_judge: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The world's annotators prefer the longer reply here; one judge does too, the other the reply in
    front."""
    from keel.worlds import helpdesk

    def votes(prompt: str, a: str, b: str, columns: Any, rng: Any) -> list[tuple[str, str]]:
        return [(who, "a" if (len(a), a) > (len(b), b) else "b") for who in ("kim", "lee", "ann")]

    monkeypatch.setattr(helpdesk, "votes", votes)

    def longer(text: str, number: int) -> Any:
        shown = scripted_judge.shown(text)
        one, other = shown["reply A"], shown["reply B"]
        better = "A" if (len(one), one) > (len(other), other) else "B"
        return scripted_judge.said(json.dumps({"reason": "", "better": better}))

    good = scripted_judge(longer)
    front = scripted_judge(lambda text, n: scripted_judge.said('{"better": "A"}'))
    judges = [{"address": good.address, "name": "good"}, {"address": front.address, "model": "o/front"}]
    run({"stages": {"asked": collect(*judges, voted_pairs=22)}}, tmp_path / "run")
    folder = tmp_path / "run" / "stages" / "asked"
    result = json.loads((folder / "result.json").read_text())
    pairs, rows = lines(folder / "pairs.jsonl"), lines(folder / "comparisons.jsonl")
    assert result["judges"]["good"]["counts"] is True
    assert result["judges"]["good"]["reliability"]["n"] == 22
    assert result["judges"]["good"]["disagreement"] == 0
    assert result["judges"]["front"] | {"reliability": 0} == {
        "reliability": 0, "counts": False, "unanswered": 0.0, "position_bias": 1.0, "disagreement": 1.0,
    }  # fmt: skip
    assert len(rows) == len(pairs) > 22  # those that nobody but the judges saw are there, too
    for pair, row in zip(pairs, rows, strict=True):
        longest = max((pair["a"], pair["b"]), key=lambda text: (len(text), text))
        assert row["chosen"][0]["content"] == longest
        assert {vote["annotator"]: vote["choice"] for vote in row["judge_votes"]} == {
            "good": "chosen", "front": "tie",
        }  # fmt: skip
    assert [len(row["people_votes"]) for row in rows] == [3] * 22 + [0] * (len(rows) - 22)
    assert min(row["p_chosen"] for row in rows[:22]) > max(row["p_chosen"] for row in rows[22:]) > 0.8
    before = len(good.asked)
    run({"stages": {"asked": collect(*judges, voted_pairs=21)}}, tmp_path / "run")
    assert len(good.asked) == before  # another number of votes, and not a question more


def test_a_judge_that_shares_few_pairs_with_people_does_not_count(stage_run: Any) -> None:
    """Nor are pairs that it alone has seen compared."""
    told: list[str] = []
    stage_run.say = told.append
    pairs = [{"pair": i, "prompt": "p", "a": "one", "b": "two"} for i in range(30)]
    votes = [Voted(i, who, "a") for i in range(19) for who in ("kim", "lee")]
    judged = [JudgeVotes("judge", ("a",) * 30, None)]
    labels, measures = judged_pairs.weigh(stage_run, pairs, votes, {}, judged)
    assert labels == {}
    assert measures["judge"]["counts"] is False
    shared = "stage: judge and people both compared 19 pairs, and 20 are needed"
    assert told == [f"{shared}: its word does not count"]
    rows = collect_stage.comparisons(pairs, votes, {}, labels, judged)
    assert len(rows) == 19
    assert all("votes" in row and "p_chosen" not in row and len(row["judge_votes"]) == 1 for row in rows)


def test_a_reviewers_word_stays_the_label_and_counts_as_the_truth(stage_run: Any) -> None:
    pairs = [{"pair": i, "prompt": "p", "a": "one", "b": "two"} for i in range(40)]
    words = dict.fromkeys(range(30), "a")
    judged = [JudgeVotes("judge", ("a",) * 29 + ("b",) * 11, None)]
    labels, _ = judged_pairs.weigh(stage_run, pairs, [], words, judged)
    rows = collect_stage.comparisons(pairs, [], words, labels, judged)
    assert [row["p_chosen"] for row in rows[:30]] == [1.0] * 30
    assert [row["chosen"] for row in rows[30:]] == ["two"] * 10
    assert all(0.8 < row["p_chosen"] < 1 for row in rows[30:])
    assert rows[29]["judge_votes"] == [{"annotator": "judge", "choice": "rejected"}]


@pytest.mark.slow
def test_an_annotator_without_a_verdict_is_named_or_left_out(
    collect: Any, run: Any, scripted_judge: Any, tmp_path: Path
) -> None:
    judge = scripted_judge(lambda text, n: scripted_judge.said("hm"))
    with pytest.raises(
        RewardError, match=r"annotator 'scripted' has no verdict on pair \d+ .*cannot be read: 'hm'"
    ):
        run({"stages": {"asked": collect({"address": judge.address})}}, tmp_path / "run")
    silent = {"address": judge.address, "on_failure": "none", "tries": 1}
    run({"stages": {"asked": collect(silent)}}, tmp_path / "run")
    folder = tmp_path / "run" / "stages" / "asked"
    assert json.loads((folder / "result.json").read_text())["judges"]["scripted"]["unanswered"] == 1.0
    assert all(row["judge_votes"] == [] for row in lines(folder / "comparisons.jsonl"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"annotators": [{"judge": {"model": "m"}}]}, "language models alone"),
        ({"annotators": ["people", "world:helpdesk"]}, "names people and world:helpdesk"),
        (
            {"annotators": ["people", {"judge": {"model": "m"}}, {"judge": {"model": "o/m"}}]},
            "two judges are called 'm'",
        ),
        ({"annotators": "people", "voted_pairs": 3}, "`voted_pairs` has no effect without a judge"),
        ({"voted_pairs": 27}, "is more than the 26 `pairs`"),
        ({"annotators": "kim"}, "annotators"),
    ],
)
def test_annotators_that_cannot_be_are_refused(change: dict[str, Any], reason: str, collect: Any) -> None:
    with pytest.raises(UsageError, match=reason):
        parse({"name": "x", "stages": {"asked": {**collect({"address": "http://localhost:1/v1"}), **change}}})


def test_a_judge_that_may_be_silent_takes_nothing_from_a_sample(
    grpo: Any, scripted_judge: Any, tmp_path: Path
) -> None:
    """Of a run with another reward beside it: where one reply got no verdict, its sum has the mean of its
    group's others in it."""
    silent = iter([True] * 2)  # both tries of one question

    def says(text: str, number: int) -> Any:
        if next(silent, False):
            return scripted_judge.said("?")
        return scripted_judge.likes_red(text, liked="e")

    more = {"updates": 1, "batch_size": 4, "samples_per_prompt": 4}
    config = grpo(scripted_judge(says).address, on_failure="none", concurrency=1, more=more)
    config["reward"] = [
        config["reward"],
        {"kind": "length", "unit": "characters", "high": 9999, "name": "one"},
    ]
    pipeline = stage(config, tmp_path / "run")
    pipeline._report = lambda: None
    pipeline.run()
    folder = tmp_path / "run" / "stages" / "grpo"
    (row,) = lines(folder / "metrics.jsonl")
    assert row["rewards/judge/applies"] == 0.75
    assert row["rewards/logged/judge/unanswered"] == 0.25
    assert row["objective/scores"] == pytest.approx(1 + row["rewards/judge/mean"])
    assert sorted(r["rewards"]["judge"] is None for r in lines(folder / "samples.jsonl")) == [False] * 3 + [
        True
    ]


def test_evaluate_measures_what_the_judge_spoke_of_and_counts_the_rest(
    run: Any, data: Any, tiny_model: Path, scripted_judge: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """A reply without a verdict ends no evaluation, and is no 0 of the proxy."""

    def says(text: str, number: int) -> Any:
        return scripted_judge.said("?") if number in (1, 2) else scripted_judge.likes_red(text, liked="")

    term = {
        "kind": "judge", "model": "m", "address": scripted_judge(says).address, "tries": 1, "concurrency": 1,
    }  # fmt: skip
    stage = {
        "kind": "evaluate", "models": [str(tiny_model)], "data": str(data.prompts),
        "sampling": {"max_new_tokens": 6}, "reward": {**term, "on_failure": "none"},
    }  # fmt: skip
    written = evaluate._write_samples

    def later(*arguments: Any) -> None:  # another process of the run asks last
        ledger.Ledger(tmp_path / "run" / ledger.FILE, "end/judge").end("k", "{}", 5)
        written(*arguments)

    monkeypatch.setattr(evaluate, "_write_samples", later)
    run({"stages": {"end": stage}}, tmp_path / "run")
    folder = tmp_path / "run" / "stages" / "end"
    spent = len(lines(tmp_path / "run" / ledger.FILE))
    assert json.loads((folder / "stage.json").read_text())["facts"]["judges"]["judge"]["calls"] == spent
    monkeypatch.undo()
    (measures,) = json.loads((folder / "result.json").read_text())["models"].values()
    rows = lines(folder / "samples.jsonl")
    silent = [row for row in rows if "proxy" not in row]
    assert 2 <= len(silent) < len(rows)  # equal replies are asked about once
    assert measures["proxy"]["mean"] == 1
    assert measures["proxy"]["n"] == len(rows) - len(silent)
    assert measures["unanswered"]["mean"] == pytest.approx(len(silent) / len(rows))
    stage["reward"]["address"] = scripted_judge(lambda text, n: scripted_judge.said("?")).address
    with pytest.raises(RewardError, match=r"no reward applies .*\(judge: its answer cannot be read: '\?'\)"):
        run({"stages": {"end": stage}}, tmp_path / "mute")
