"""Each format on rows of its shape, with texts of our own: the side that its label prefers is `chosen`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keel.config import parse
from keel.data.formats import FORMATS, PLAIN, detect
from keel.data.load import load, summary
from keel.errors import DataError, UsageError
from keel.types import DataSource, PreferenceRecord

ANY = ("preference", "unpaired", "demonstration", "text", "prompt")


def read(
    tmp_path: Path, content: list[dict[str, Any]], accept: Any = ("preference",), **settings: Any
) -> Any:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return load([DataSource(str(path), **settings)], accept, 0)


def said(part: Any) -> str:
    return part if isinstance(part, str) else part[-1]["content"]


def sides(dataset: Any) -> list[tuple[str, str]]:
    return [(said(r.chosen).strip(), said(r.rejected).strip()) for r in dataset.records]


# ---------------------------------------------------------------- two replies and a verdict

# format → (a row whose verdict is the argument, verdicts that prefer the first, the second, neither)
Verdict = tuple[Callable[[Any], dict[str, Any]], list[Any], list[Any], list[Any]]


def chat(*texts: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def arena(winner: Any) -> dict[str, Any]:
    return {
        "question_id": "q1", "model_a": "m", "model_b": "n", "winner": winner, "judge": "someone", "turn": 1,
        "conversation_a": chat("ask", "one"), "conversation_b": chat("ask", "two"), "language": "English",
    }  # fmt: skip


def studio(*selected: str) -> dict[str, Any]:
    return {
        "id": 3,
        "data": {"prompt": "ask", "answer1": "one", "answer2": "two"},
        "annotations": [
            {
                "completed_by": n,
                "was_cancelled": False,
                "result": [{"type": "pairwise", "from_name": "pw", "value": {"selected": side}}],
            }
            for n, side in enumerate(selected, 1)
        ],
        "predictions": [],
    }


def argilla(*values: Any) -> dict[str, Any]:
    answers = [{"user_id": f"u{n}", "value": v, "status": "submitted"} for n, v in enumerate(values)]
    discarded = {"user_id": "x", "value": "response-1", "status": "discarded"}
    return {
        "prompt": "ask", "response-1": "one", "response-2": "two", "preference": [*answers, discarded],
        "preference-suggestion": None, "external_id": None, "metadata": "{}",
    }  # fmt: skip


def ranked(*ranks: int) -> list[dict[str, Any]]:
    return [{"rank": rank, "value": f"response-{n}"} for n, rank in enumerate(ranks, 1)]


VERDICTS: dict[str, Verdict] = {
    "pandalm": (
        lambda votes: {
            "idx": 0, "instruction": "do", "input": "this", "response1": "one", "response2": "two",
            **{f"annotator{n}": vote for n, vote in enumerate(votes, 1)},
        },
        [(1, 1, 1), (1, 1, 2), (1, 0, 0)],
        [(2, 2, 2), (2, 1, 2), (0, 0, 2)],
        [(0, 0, 0), (1, 2, 0)],
    ),
    "helpsteer2_preference": (
        lambda strength: {
            "prompt": "ask", "response_1": "one", "response_2": "two", "preference_strength": strength,
            "preference_statement": "…", "split": "train",
        },
        [-3, -2, -1], [3, 2, 1], [0],
    ),
    "helpsteer3": (
        lambda score: {
            "domain": "general", "language": "english", "context": chat("ask"), "response1": "one",
            "response2": "two", "overall_preference": score,
            "individual_preference": [{"score": score, "reasoning": "…", "feedback": "…"}] * 2,
        },
        [-3, -2, -1], [3, 2, 1], [0],
    ),
    "shp": (
        lambda label: {
            "post_id": "p", "domain": "d", "history": "ask", "human_ref_A": "one", "human_ref_B": "two",
            "labels": label, "score_A": 5, "score_B": 9, "score_ratio": 1.8,
        },
        [1], [0], [],
    ),
    "webgpt": (
        lambda scores: {
            "question": {"dataset": "d", "id": "1", "full_text": "ask"}, "answer_0": "one", "answer_1": "two",
            "score_0": scores, "score_1": -scores, "quotes_0": {"title": [], "extract": []},
        },
        [1.0, 0.33], [-0.67, -1.0], [0.0],
    ),
    "summarize": (
        lambda choice: {
            "info": {"id": "t", "post": "ask", "title": "a title", "subreddit": "advice", "article": None},
            "summaries": [{"text": " one", "policy": "a"}, {"text": " two", "policy": "b"}],
            "choice": choice, "worker": "w1", "batch": "b", "split": "train",
        },
        [0], [1], [],
    ),
    "pku_saferlhf": (
        lambda better: {
            "prompt": "ask", "response_0": "one", "response_1": "two", "is_response_0_safe": better == 1,
            "is_response_1_safe": better == 0, "better_response_id": better, "safer_response_id": 1 - better,
        },
        [0], [1], [],
    ),
    "pku_saferlhf_safety": (
        lambda safer: {
            "prompt": "ask", "response_0": "one", "response_1": "two", "is_response_0_safe": safer == 0,
            "is_response_1_safe": safer == 1, "better_response_id": 1 - safer, "safer_response_id": safer,
        },
        [0], [1], [],
    ),
    "arena": (arena, ["model_a"], ["model_b"], ["tie", "tie (bothbad)", "both_bad"]),
    "arena_table": (
        lambda winner: {
            "id": 1, "model_a": "m", "model_b": "n", "prompt": '["ask"]', "response_a": '["one"]',
            "response_b": '["two"]',
            **{f"winner_{name}": int(name == winner) for name in ("model_a", "model_b", "tie")},
        },
        ["model_a"], ["model_b"], ["tie"],
    ),
    "llmbar": (
        lambda label: {"input": "ask", "output_1": "one", "output_2": "two", "label": label}, [1], [2], []
    ),
    "label_studio": (
        lambda votes: studio(*votes), [["left"], ["left", "left", "right"]], [["right"]], [["left", "right"]]
    ),
    "argilla": (
        lambda votes: argilla(*votes),
        [["response-1"], [ranked(1, 2)], ["response-1", "tie"]],
        [["response-2"], [ranked(2, 1)]],
        [["tie"], [ranked(1, 1)], ["response-1", "response-2"]],
    ),
}  # fmt: skip
NAMED = ("pku_saferlhf_safety", "argilla")  # never found by their columns


def settings_of(name: str) -> dict[str, Any]:
    return {"format": name} if name in NAMED else {}


@pytest.mark.parametrize("name", VERDICTS)
def test_the_preferred_side_is_chosen_and_ties_are_left_out_or_kept(name: str, tmp_path: Path) -> None:
    row, first, second, ties = VERDICTS[name]
    for verdict in first:
        assert sides(read(tmp_path, [row(verdict)], **settings_of(name))) == [("one", "two")]
    for verdict in second:
        assert sides(read(tmp_path, [row(verdict)], **settings_of(name))) == [("two", "one")]
    rows = [row(verdict) for verdict in [*first, *ties, *second]]
    dataset = read(tmp_path, rows, **settings_of(name))
    assert sides(dataset) == [("one", "two")] * len(first) + [("two", "one")] * len(second)
    assert all(record.p_chosen is None or record.p_chosen > 0.5 for record in dataset.records)
    made = len(first) + len(second)
    expected = f"format {FORMATS[name].title}: {len(rows)} rows → {made} pairs"
    if ties:
        expected += f", {len(ties)} tie{'s' * (len(ties) > 1)} left out"
        kept = read(tmp_path, rows, ties="keep", **settings_of(name))
        assert [r.p_chosen for r in kept.records].count(0.5) == len(ties)
        assert len(kept.records) == len(rows)
    assert expected in summary(dataset)


@pytest.mark.parametrize("name", VERDICTS)
def test_an_unknown_verdict_is_an_error_that_names_file_and_row(name: str, tmp_path: Path) -> None:
    row, (good, *_), *_ = VERDICTS[name]
    bad: dict[str, Any] = {
        "pandalm": (1, 1, 3), "helpsteer2_preference": 4, "helpsteer3": "better", "shp": 2, "webgpt": None,
        "summarize": 2, "pku_saferlhf": 2, "pku_saferlhf_safety": -1, "arena": "model_c",
        "arena_table": "model_c", "llmbar": 0, "label_studio": ["up"], "argilla": ["response-3"],
    }  # fmt: skip
    broken = row(bad[name]) if name != "webgpt" else {**row(1.0), "score_0": None}
    title = FORMATS[name].title
    with pytest.raises(DataError, match=rf"rows.jsonl:2: format {title}: "):
        read(tmp_path, [row(good), broken], **settings_of(name))
    dataset = read(tmp_path, [row(good), broken], on_bad="skip", **settings_of(name))
    assert (len(dataset.records), dataset.skipped) == (1, 1)


def test_votes_of_several_people_are_kept(tmp_path: Path) -> None:
    row = VERDICTS["pandalm"][0]((2, 2, 0))
    (record,) = read(tmp_path, [row]).records
    assert record.p_chosen == pytest.approx(5 / 6)
    assert [(v.annotator, v.choice) for v in record.votes] == [
        ("annotator1", "chosen"), ("annotator2", "chosen"), ("annotator3", "tie"),
    ]  # fmt: skip
    (record,) = read(tmp_path, [studio("left", "right", "right")]).records
    assert [(v.annotator, v.choice) for v in record.votes] == [
        ("1", "rejected"),
        ("2", "chosen"),
        ("3", "chosen"),
    ]
    (record,) = read(tmp_path, [argilla("response-2")], format="argilla").records
    assert [(v.annotator, v.choice) for v in record.votes] == [
        ("u0", "chosen")
    ]  # the discarded one is not there
    (record,) = read(tmp_path, [VERDICTS["summarize"][0](1)]).records
    assert [(v.annotator, v.choice) for v in record.votes] == [("w1", "chosen")]


def test_votes_against_the_overall_verdict_are_not_kept(tmp_path: Path) -> None:
    row = {**VERDICTS["helpsteer3"][0](-1), "individual_preference": [{"score": 2}, {"score": 1}]}
    (record,) = read(tmp_path, [row]).records
    assert said(record.chosen) == "one"
    assert record.p_chosen is None


def test_argilla_of_version_2(tmp_path: Path) -> None:
    row = {
        "id": "1", "status": "completed", "instruction": "ask", "response1": "one", "response2": "two",
        "preference.responses": ["response2", "response1", "response2"],
        "preference.responses.users": ["u", "v", "w"],
        "preference.responses.status": ["submitted", "discarded", "submitted"],
    }  # fmt: skip
    (record,) = read(tmp_path, [row], format="argilla").records
    assert said(record.chosen) == "two"
    assert [vote.annotator for vote in record.votes] == ["u", "w"]


def test_votes_on_later_rounds_are_left_out_and_counted(tmp_path: Path) -> None:
    later = {
        **arena("model_a"), "turn": 2,
        "conversation_a": chat("ask", "one", "more", "x"), "conversation_b": chat("ask", "two", "more", "y"),
    }  # fmt: skip
    assert "2 rows → 1 pairs, 1 vote on later rounds left out" in summary(
        read(tmp_path, [later, arena("model_b")])
    )
    judged_first = {**later, "turn": 1}  # both rounds are shown, the first one is judged
    assert sides(read(tmp_path, [judged_first])) == [("one", "two")]


def test_tables_write_numbers_as_text(tmp_path: Path) -> None:
    path = tmp_path / "shp.csv"
    path.write_text("history,human_ref_A,human_ref_B,labels\nask,one,two,0\nask again,one,two,1\n")
    assert sides(load([DataSource(str(path))], ["preference"], 0)) == [("two", "one"), ("one", "two")]


# ---------------------------------------------------------------- rankings


def aspect(*ratings: str) -> dict[str, Any]:
    names = ("instruction_following", "honesty", "truthfulness", "helpfulness")
    return {name: {"Rating": rating, "Rationale": "…"} for name, rating in zip(names, ratings)}


def test_ultrafeedback_by_the_mean_rating_and_not_by_overall_score(tmp_path: Path) -> None:
    completions = [
        {"model": "a", "response": "bad", "annotations": aspect("1", "1", "2", "1"), "overall_score": 10.0},
        {"model": "b", "response": "good", "annotations": aspect("5", "N/A", "5", "4"), "overall_score": 8.0},
        {"model": "c", "response": "as bad", "annotations": aspect("1", "2", "1", "1"), "overall_score": 2.0},
    ]
    row = {"source": "s", "instruction": "ask", "models": ["a", "b", "c"], "completions": completions}
    dataset = read(tmp_path, [row])
    assert sides(dataset) == [("good", "bad"), ("good", "as bad")]
    assert "1 rows → 2 pairs, 1 tie left out" in summary(dataset)
    assert dataset.records[1].origin.endswith("rows.jsonl:1 (2)")


def test_helpsteer_pairs_neighbours_with_one_prompt(tmp_path: Path) -> None:
    def row(prompt: str, response: str, helpfulness: int) -> dict[str, Any]:
        other = dict.fromkeys(("correctness", "coherence", "complexity", "verbosity"), 2)
        return {"prompt": prompt, "response": response, "helpfulness": helpfulness, **other}

    rounds = "first<extra_id_1>Assistant\nreply\n<extra_id_1>User\nsecond"
    rows = [
        row("a", "low", 1),
        row("a", "high", 4),
        row("b", "alone", 3),
        row(rounds, "x", 4),
        row(rounds, "y", 0),
    ]
    dataset = read(tmp_path, rows)
    assert sides(dataset) == [("high", "low"), ("x", "y")]
    assert [turn["content"] for turn in dataset.records[1].prompt] == ["first", "reply", "second"]
    assert "1 reply without another one to its prompt beside it left out" in summary(dataset)


def test_ranked_replies_are_pairs_by_their_ranks(tmp_path: Path) -> None:
    row = {"prompt": "p", "completions": ["x", "y", "z"], "ranks": [2, 1, 2]}
    dataset = read(tmp_path, [row])
    assert [(r.chosen, r.rejected) for r in dataset.records] == [("y", "x"), ("y", "z")]  # a tie is left out
    with pytest.raises(DataError, match='"ranks" are 2 for 3 completions'):
        read(tmp_path, [{**row, "ranks": [1, 2]}])


def test_nectar_rank_1_is_the_best(tmp_path: Path) -> None:
    answers = [{"answer": f"r{rank}", "model": "m", "rank": rank} for rank in (2, 1, 3)]
    row = {"prompt": "\n\nHuman: ask\n\nAssistant: ", "answers": answers, "turns": 1, "num_responses": 3}
    dataset = read(tmp_path, [row])
    assert sides(dataset) == [("r1", "r2"), ("r2", "r3"), ("r1", "r3")]
    assert dataset.records[0].prompt == ({"role": "user", "content": "ask"},)


def reply(text: str, rank: int | None, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "text": text, "rank": rank, "replies": list(replies), **more}


def ask(text: str, *replies: dict[str, Any]) -> dict[str, Any]:
    return {"role": "prompter", "text": text, "rank": None, "replies": list(replies)}


TREE = ask(
    "ask",
    reply("worse", 1),
    reply("best", 0, ask("more", reply("b", 1), reply("a", 0))),
    reply("gone", 2, deleted=True),
    reply("unranked", None),
)
PAIRS_OF_TREE = [(["ask"], "best", "worse"), (["ask", "best", "more"], "a", "b")]


def pairs_of(dataset: Any) -> list[tuple[list[str], str, str]]:
    return [([t["content"] for t in r.prompt], said(r.chosen), said(r.rejected)) for r in dataset.records]


def flat(message: dict[str, Any], tree: str, parent: str | None = None) -> list[dict[str, Any]]:
    name = f"{parent or tree}/{message['text']}"
    row = {k: v for k, v in message.items() if k != "replies"}
    row |= {"message_id": name, "parent_id": parent, "message_tree_id": tree, "lang": "en"}
    return [row, *(r for below in message["replies"] for r in flat(below, tree, name))]


def test_oasst_rank_0_is_the_best_at_every_depth(tmp_path: Path) -> None:
    nested = {"message_tree_id": "t", "tree_state": "ready", "prompt": TREE}
    empty = {"message_tree_id": "u", "prompt": ask("nobody", reply("alone", 0))}
    dataset = read(tmp_path, [nested, empty])
    assert pairs_of(dataset) == PAIRS_OF_TREE
    assert "2 rows → 2 pairs, 1 tree without ranked replies left out" in summary(dataset)


def test_oasst_messages_are_put_together(tmp_path: Path) -> None:
    rows = [*flat(TREE, "t"), *flat(TREE, "u")]
    assert pairs_of(read(tmp_path, rows)) == PAIRS_OF_TREE * 2
    with pytest.raises(DataError, match="must stand one after the other"):
        read(tmp_path, [*rows[:3], *flat(TREE, "u"), *rows[3:]])
    half = len(rows) // 2
    lost = [*rows[:half], *(row for row in rows[half:] if row["text"] != "best")]
    assert "1 message without its parent left out" in summary(read(tmp_path, lost))


def test_rewardbench_and_its_second_version(tmp_path: Path) -> None:
    row = {
        "prompt": "ask", "chosen": "one", "rejected": "two", "chosen_model": "m", "rejected_model": "n",
        "subset": "s", "id": 7,
    }  # fmt: skip
    dataset = read(tmp_path, [row])
    assert sides(dataset) == [("one", "two")]
    assert dataset.records[0].columns["subset"] == "s"
    row = {
        "id": "1", "prompt": "ask", "chosen": ["a", "b"], "rejected": ["x", "y"], "num_correct": 2,
        "num_incorrect": 2, "subset": "Ties", "models": ["m"],
    }  # fmt: skip
    assert sides(read(tmp_path, [row])) == [("a", "x"), ("a", "y"), ("b", "x"), ("b", "y")]


# ---------------------------------------------------------------- conversations


def test_sharegpt(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "2+2"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "four", "weight": 1},
    ]
    (record,) = read(tmp_path, [{"conversations": turns, "system": "be brief"}], ["text"]).records
    assert [turn["role"] for turn in record.text] == ["system", "user", "assistant", "tool", "assistant"]
    assert record.text[2]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 2}}
    assert record.text[4] == {"role": "assistant", "content": "four", "weight": 1}
    pair = {"conversations": turns[:1], "chosen": turns[3], "rejected": {"from": "gpt", "value": "five"}}
    assert sides(read(tmp_path, [pair])) == [("four", "five")]
    with pytest.raises(DataError, match="'narrator', not one of human, "):
        read(tmp_path, [{"conversations": [turns[0], {"from": "narrator", "value": "x"}]}], ["text"])


def test_alpaca(tmp_path: Path) -> None:
    rows = [
        {"instruction": "translate", "input": "chat", "output": "cat"},
        {
            "instruction": "say hi",
            "input": "",
            "output": "hi",
            "history": [["ask", "reply"]],
            "system": "be kind",
        },
    ]
    first, second = read(tmp_path, rows, ["demonstration"]).records
    assert first.prompt == ({"role": "user", "content": "translate\n\nchat"},)
    assert said(first.completion) == "cat"
    assert [turn["content"] for turn in second.prompt] == ["be kind", "ask", "reply", "say hi"]
    assert read(tmp_path, rows, ["prompt"]).records[0].prompt == first.prompt


def test_openai_messages_with_tools(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    turns = [
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "4"},
        {"role": "assistant", "content": "four", "weight": 0},
    ]
    row = {"messages": turns, "tools": tools, "parallel_tool_calls": False}
    (record,) = read(tmp_path, [row], ["text"]).records
    assert record.text[0]["tools"] == tools
    assert record.text[1]["tool_calls"][0]["function"]["arguments"] == {"a": 2}
    assert record.text[3]["weight"] == 0
    older = {"messages": turns[:1] + turns[3:], "functions": [tools[0]["function"]]}
    assert read(tmp_path, [older], ["text"]).records[0].text[0]["tools"] == tools
    pair = {
        "input": {"messages": turns[:1], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [{"role": "assistant", "content": "four"}],
        "non_preferred_output": [{"role": "assistant", "content": "five"}],
    }
    assert sides(read(tmp_path, [pair])) == [("four", "five")]


# ---------------------------------------------------------------- finding and naming


def test_every_format_is_told_from_every_other(tmp_path: Path) -> None:
    for name, (row, first, *_) in VERDICTS.items():
        found = detect(row(first[0]), ANY)
        assert (found.name if found else None) == {
            "pku_saferlhf_safety": "pku_saferlhf",
            "argilla": None,
        }.get(name, name)
    for row in (
        {"prompt": "p", "chosen": "a", "rejected": "b", "subset": "s"},
        {"text": "t"},
        {"prompt": "p"},
    ):
        assert detect(row, ANY) is None


def test_rows_that_are_wanted_as_they_are_stay_so(tmp_path: Path) -> None:
    rows = flat(TREE, "t")
    assert [r.text for r in read(tmp_path, rows, ["text"]).records][:2] == ["ask", "worse"]
    row = VERDICTS["pku_saferlhf"][0](0)
    (record,) = read(tmp_path, [row], ["prompt"], format=PLAIN).records
    assert record.prompt == "ask"
    with pytest.raises(DataError, match="wanted: preference"):
        read(tmp_path, [row], format=PLAIN)


def test_a_named_format_is_applied_whatever_the_columns(tmp_path: Path) -> None:
    row = {"question": "ask", "a": "one", "b": "two", "best": 0}
    columns = {"history": "question", "human_ref_A": "a", "human_ref_B": "b", "labels": "best"}
    assert sides(read(tmp_path, [row], format="shp", columns=columns)) == [("two", "one")]
    with pytest.raises(
        DataError, match=r'rows.jsonl:1: format SHP: "labels" is missing; it has question, a, b, best'
    ):
        read(tmp_path, [row], format="shp")


def test_formats_of_a_mixture_and_of_a_config(tmp_path: Path) -> None:
    path = tmp_path / "arena.jsonl"
    path.write_text(json.dumps(arena("model_b")) + "\n")
    other = tmp_path / "shp.jsonl"
    other.write_text(json.dumps(VERDICTS["shp"][0](1)) + "\n")
    stage = {"kind": "reward", "model": "m", "data": [{"source": str(path), "format": "arena"}, str(other)]}
    config = parse({"name": "t", "stages": {"reward": stage}})
    dataset = load(*config.stages["reward"].main_data()[0], 0)
    assert sides(dataset) == [("two", "one"), ("one", "two")]
    assert "format Chatbot Arena: 1 rows → 1 pairs" in summary(dataset)
    assert "format SHP: 1 rows → 1 pairs" in summary(dataset)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"format": "pandaml"}, "there is no format 'pandaml'; did you mean pandalm"),
        ({"format": "keel", "ties": "keep"}, "`ties` has no effect with `format: keel`"),
        (
            {
                "format": "shp",
                "pairs": {"first": "a", "second": "b", "label": "l", "first_wins": [1], "second_wins": [2]},
            },
            "`format` and `pairs` both say",
        ),
        (
            {"pairs": {"first": "a", "second": "b", "label": "l", "first_wins": [1], "second_wins": ["1"]}},
            "the value '1' of `label` is listed twice",
        ),
    ],
)
def test_settings_that_cannot_be_meant(settings: dict[str, Any], reason: str) -> None:
    stage = {"kind": "reward", "model": "m", "data": {"source": "d.jsonl", **settings}}
    with pytest.raises(UsageError, match=reason):
        parse({"name": "t", "stages": {"reward": stage}})


def test_ties_without_a_format_have_no_effect(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="`ties` has no effect"):
        read(tmp_path, [{"prompt": "p", "chosen": "a", "rejected": "b"}], ties="keep")


def test_pairs_of_any_data_set_by_its_own_label(tmp_path: Path) -> None:
    def row(winner: Any) -> dict[str, Any]:
        return {"prompt": "ask", "left": "one", "right": "two", "winner": winner, "id": 3}

    pairs = {
        "first": "left", "second": "right", "label": "winner", "first_wins": ["L", 1],
        "second_wins": ["R", 2], "ties": ["="],
    }  # fmt: skip
    dataset = read(tmp_path, [row("R"), row("L"), row("="), row(2), row("1")], pairs=pairs)
    assert sides(dataset) == [("two", "one"), ("one", "two"), ("two", "one"), ("one", "two")]
    assert "format pairs by winner: 5 rows → 4 pairs, 1 tie left out" in summary(dataset)
    with pytest.raises(DataError, match=r'rows.jsonl:2: .*"winner" is \'M\', which is none of the values'):
        read(tmp_path, [row("L"), row("M")], pairs=pairs)


def test_equal_sides_are_left_out_and_no_row_left_is_said(tmp_path: Path) -> None:
    row = {**VERDICTS["shp"][0](1), "human_ref_B": "one"}
    dataset = read(tmp_path, [row, VERDICTS["shp"][0](1)])
    assert "2 rows → 1 pairs, 1 equal pair left out" in summary(dataset)
    with pytest.raises(
        DataError, match=r"no row is left \(format Chatbot Arena: 1 rows → 0 pairs, 1 tie left out\)"
    ):
        read(tmp_path, [arena("tie")])


def test_rows_are_counted_as_far_as_they_are_read(tmp_path: Path) -> None:
    dataset = read(tmp_path, [VERDICTS["shp"][0](1)] * 5, rows=2)
    assert "2 rows · " in summary(dataset)
    assert "format SHP: 2 rows → 2 pairs" in summary(dataset)


def test_records_are_preferences_with_the_other_columns(tmp_path: Path) -> None:
    (record,) = read(tmp_path, [VERDICTS["shp"][0](0)]).records
    assert isinstance(record, PreferenceRecord)
    assert record.columns["domain"] == "d"
    assert "labels" not in record.columns
    assert (record.p_chosen, record.votes) == (None, ())
