"""Data sets of two replies and a verdict on them. Each says in its docstring which value prefers the
first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from keel.data.formats.base import (
    TIE,
    Format,
    LeftOut,
    Made,
    Row,
    Turns,
    answered,
    asked,
    choice_of,
    has_mapping,
    list_of,
    number_of,
    one,
    pair,
    rest,
    text_of,
    value_of,
)
from keel.data.values import is_list, shown

# What each side counts in a vote; a person's vote for the first is worth one.
_POINTS = {"first": 1, "second": -1, TIE: 0}


def _of_votes(
    row: Row, prompt: str | Turns, first: str, second: str, votes: list[dict[str, Any]], *used: str
) -> Made:
    """A pair whose better side is the one that more people prefer; ties count for neither."""
    better = sum(_POINTS[vote["choice"]] for vote in votes)
    return pair(prompt, answered(first), answered(second), better, votes=votes, columns=rest(row, *used))


def _pandalm(row: Row) -> Iterable[Made]:
    """annotator1 … annotatorN: 1 prefers response1, 2 response2, 0 neither."""
    names = sorted((name for name in row if name.startswith("annotator")), key=lambda name: (len(name), name))
    sides = {1: "first", 2: "second", 0: TIE}
    votes = [{"annotator": name, "choice": sides[choice_of(row, name, (0, 1, 2))]} for name in names]
    prompt = asked(text_of(row, "instruction"), text_of(row, "input"))
    used = ("instruction", "input", "response1", "response2", *names)
    yield _of_votes(row, prompt, text_of(row, "response1"), text_of(row, "response2"), votes, *used)


def _helpsteer2_preference(row: Row) -> Iterable[Made]:
    """preference_strength from −3 to 3: below 0 prefers response_1, above 0 response_2."""
    strength = _strength(row, "preference_strength")
    first, second = answered(text_of(row, "response_1")), answered(text_of(row, "response_2"))
    columns = rest(row, "response_1", "response_2")
    yield pair(helpsteer_prompt(text_of(row, "prompt")), first, second, -strength, columns=columns)


def _helpsteer3(row: Row) -> Iterable[Made]:
    """overall_preference from −3 to 3: below 0 prefers response1, above 0 response2. The votes of
    individual_preference are kept where most of them say the same."""
    strength = _strength(row, "overall_preference")
    votes: list[dict[str, Any]] = []
    for entry in row.get("individual_preference") or ():
        score = _strength(entry, "score")
        votes.append({"annotator": "", "choice": "first" if score < 0 else "second" if score > 0 else TIE})
    better = sum(_POINTS[vote["choice"]] for vote in votes)
    if (better > 0) - (better < 0) != (strength < 0) - (strength > 0):
        votes = []
    first, second = answered(text_of(row, "response1")), answered(text_of(row, "response2"))
    columns = rest(row, "context", "response1", "response2", "individual_preference")
    yield pair(list_of(row, "context"), first, second, -strength, votes=votes, columns=columns)


def _strength(row: Row, name: str) -> float:
    strength = number_of(row, name)
    if not -3 <= strength <= 3:
        raise ValueError(f'"{name}" is {strength:g}, not between -3 and 3')
    return strength


def helpsteer_prompt(text: str) -> Turns:
    """A prompt of HelpSteer; that of several rounds has a mark before each further turn."""
    turns: Turns = []
    for number, piece in enumerate(text.split("<extra_id_1>")):
        mark, line, content = piece.partition("\n")
        if number and line and mark in ("User", "Assistant"):
            turns.append({"role": mark.lower(), "content": content.strip()})
        elif piece.strip():
            turns += asked(piece.strip())
    return turns


def _shp(row: Row) -> Iterable[Made]:
    """labels: 1 prefers human_ref_A, 0 human_ref_B."""
    better = 1 if choice_of(row, "labels", (0, 1)) == 1 else -1
    first, second = answered(text_of(row, "human_ref_A")), answered(text_of(row, "human_ref_B"))
    columns = rest(row, "history", "human_ref_A", "human_ref_B", "labels")
    yield pair(asked(text_of(row, "history")), first, second, better, columns=columns)


def _webgpt(row: Row) -> Iterable[Made]:
    """score_0, score_1: the higher one is preferred; equal ones are a tie."""
    question = value_of(row, "question")
    prompt = text_of(question, "full_text") if isinstance(question, Mapping) else text_of(row, "question")
    better = number_of(row, "score_0") - number_of(row, "score_1")
    first, second = answered(text_of(row, "answer_0")), answered(text_of(row, "answer_1"))
    columns = rest(row, "question", "answer_0", "answer_1")
    yield pair(asked(prompt), first, second, better, columns=columns)


def _summarize(row: Row) -> Iterable[Made]:
    """choice: the index, 0 or 1, of the better summary; the worker's vote. A post is continued by its
    summary, as in the paper (2009.01325, appendix B.2): plain text, no turns."""
    info, (first, second) = value_of(row, "info"), _two(list_of(row, "summaries"), "summaries")
    post = info.get("post") or info.get("article")
    if not isinstance(post, str):
        raise ValueError('"info" has neither a "post" nor an "article"')
    head = [("SUBREDDIT: r/", info.get("subreddit")), ("TITLE: ", info.get("title"))]
    lines = [f"{name}{value}" for name, value in head if value]
    prompt = "\n".join([*lines, f"{'POST: ' if info.get('post') else 'ARTICLE: '}{post}", "TL;DR:"])
    picked = choice_of(row, "choice", (0, 1))
    worker = row.get("worker")
    vote = {"annotator": worker, "choice": ("first", "second")[picked]}
    yield pair(
        prompt,
        f" {text_of(first, 'text').strip()}",
        f" {text_of(second, 'text').strip()}",
        1 - 2 * picked,
        votes=[vote] if isinstance(worker, str) else [],
        columns=rest(row, "info", "summaries", "choice", "worker"),
    )


def _pku(label: str) -> Any:
    def rows(row: Row) -> Iterable[Made]:
        better = 1 - 2 * choice_of(row, label, (0, 1))
        first, second = answered(text_of(row, "response_0")), answered(text_of(row, "response_1"))
        columns = rest(row, "response_0", "response_1")
        yield pair(asked(text_of(row, "prompt")), first, second, better, columns=columns)

    rows.__doc__ = f"{label}: 0 prefers response_0, 1 response_1."
    return rows


def _arena(row: Row) -> Iterable[Made]:
    """winner: model_a, model_b, or a tie (tie, tie (bothbad), both_bad). Only votes on a first reply are
    pairs: from the second round on the sides have different histories."""
    winner = str(value_of(row, "winner"))
    better = {"model_a": 1, "model_b": -1}.get(winner)
    if better is None:
        if winner not in ("tie", "tie (bothbad)", "both_bad", "bothbad"):
            raise ValueError(f'"winner" is {shown(row["winner"])}, not model_a, model_b or a tie')
        better = 0
    first, second = list_of(row, "conversation_a"), list_of(row, "conversation_b")
    replies = sum(turn["role"] == "assistant" for turn in first)
    if (number_of(row, "turn") if "turn" in row else replies) != 1:
        yield LeftOut("vote on later rounds")
        return
    start = next((i for i, turn in enumerate(first) if turn["role"] == "assistant"), 0)
    if not start or first[:start] != second[:start] or len(second) <= start:
        raise ValueError('"conversation_a" and "conversation_b" do not ask the same and get a reply')
    judge = row.get("judge")
    choice = "first" if better > 0 else "second" if better else TIE
    votes = [{"annotator": judge, "choice": choice}] if isinstance(judge, str) else []
    columns = rest(row, "conversation_a", "conversation_b", "winner", "judge")
    yield pair(_turns(first[:start]), _turns([first[start]]), _turns([second[start]]), better,
               votes=votes, columns=columns)  # fmt: skip


def _turns(turns: list[Any]) -> Turns:
    """Role and content alone: the arena's turns have more keys, which templates would be given."""
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _arena_table(row: Row) -> Iterable[Made]:
    """winner_model_a, winner_model_b, winner_tie: the one that is 1. prompt and responses are JSON lists, one
    entry a round."""
    flags = [choice_of(row, f"winner_{name}", (0, 1)) for name in ("model_a", "model_b", "tie")]
    if sum(flags) != 1:
        raise ValueError("not one of winner_model_a, winner_model_b and winner_tie is 1")
    prompts, first, second = (list_of(row, name) for name in ("prompt", "response_a", "response_b"))
    if not len(prompts) == len(first) == len(second):
        raise ValueError('"prompt", "response_a" and "response_b" have different numbers of rounds')
    if len(prompts) != 1:
        yield LeftOut("vote on later rounds")
        return
    columns = rest(row, "response_a", "response_b", "winner_model_a", "winner_model_b", "winner_tie")
    if first[0] is None or second[0] is None:
        raise ValueError("a response is null")
    yield pair(
        asked(prompts[0]), answered(first[0]), answered(second[0]), flags[0] - flags[1], columns=columns
    )


def _llmbar(row: Row) -> Iterable[Made]:
    """label: 1 prefers output_1, 2 output_2."""
    better = 3 - 2 * choice_of(row, "label", (1, 2))
    first, second = answered(text_of(row, "output_1")), answered(text_of(row, "output_2"))
    yield pair(
        asked(text_of(row, "input")),
        first,
        second,
        better,
        columns=rest(row, "input", "output_1", "output_2"),
    )


def _rewardbench(row: Row) -> Iterable[Made]:
    """chosen is the better one."""
    first, second = answered(text_of(row, "chosen")), answered(text_of(row, "rejected"))
    yield pair(asked(text_of(row, "prompt")), first, second, 1, columns=rest(row))


def _rewardbench2(row: Row) -> Iterable[Made]:
    """chosen and rejected are lists; each of the first is better than each of the second."""
    prompt, columns = asked(text_of(row, "prompt")), rest(row)
    for chosen in list_of(row, "chosen"):
        for rejected in list_of(row, "rejected"):
            yield pair(prompt, answered(chosen), answered(rejected), 1, columns=columns)


def _label_studio(row: Row) -> Iterable[Made]:
    """value.selected of a pairwise result: left prefers the first text of the task, right the second. They
    are answer1 and answer2 of the task's data, or another pair of columns that end in 1 and 2."""
    data = value_of(row, "data")
    first, second = _sides(data)
    votes: list[dict[str, Any]] = []
    for annotation in list_of(row, "annotations"):
        if annotation.get("was_cancelled"):
            continue
        results = [r for r in annotation.get("result") or () if r.get("type") == "pairwise"]
        if not results:
            continue
        selected = choice_of(results[0].get("value") or {}, "selected", ("left", "right"))
        by = annotation.get("completed_by")
        person = by.get("email") or by.get("id") if isinstance(by, Mapping) else by
        votes.append(
            {
                "annotator": "" if person is None else person,
                "choice": "first" if selected == "left" else "second",
            }
        )
    if not votes:
        yield LeftOut("task that nobody has judged")
        return
    columns = {**rest(row, "data", "annotations", "predictions"), **rest(data, "prompt", first, second)}
    better = sum(_POINTS[vote["choice"]] for vote in votes)
    replies = answered(text_of(data, first)), answered(text_of(data, second))
    yield pair(asked(text_of(data, "prompt")), *replies, better, votes=votes, columns=columns)


def _sides(data: Row) -> tuple[str, str]:
    """The two columns that are compared: of one name, with 1 and 2 behind it."""
    found = [name for name in data if str(name).endswith("1") and f"{str(name)[:-1]}2" in data]
    if len(found) != 1:
        raise ValueError(
            f"the task's data ({', '.join(map(str, data))}) must have one pair of columns like answer1 and "
            "answer2, left and right as they were shown"
        )
    return found[0], f"{found[0][:-1]}2"


def _argilla(row: Row) -> Iterable[Made]:
    """Each answer to the question names the better field itself (response-1), or ranks both (rank 1 is the
    best)."""
    question, answers = _argilla_answers(row)
    fields = [
        name for name in row if name.rstrip("0123456789").rstrip("-_ ") in ("response", "reply", "answer")
    ]
    if len(fields) != 2:
        raise ValueError(
            f"two fields response-1 and response-2 are wanted; it has {', '.join(map(str, row))}"
        )
    votes = [{"annotator": person, "choice": _argilla_choice(value, fields)} for person, value in answers]
    if not votes:
        yield LeftOut("record that nobody has judged")
        return
    asks = next(
        (name for name in ("prompt", "instruction", "question") if isinstance(row.get(name), str)), None
    )
    if asks is None:
        raise ValueError("there is no field prompt, instruction or question")
    used = (asks, *fields, *(name for name in row if name.startswith(question)))
    first, second = (text_of(row, name) for name in fields)
    yield _of_votes(row, asked(text_of(row, asks)), first, second, votes, *used)


def _argilla_answers(row: Row) -> tuple[str, list[tuple[Any, Any]]]:
    """The question's name, and (person, value) for each answer that was submitted: of version 1 in a list of
    objects, of version 2 in columns side by side."""
    for name, value in row.items():
        if name.endswith(".responses") and is_list(value):
            people = row.get(f"{name}.users") or [""] * len(value)
            states = row.get(f"{name}.status") or ["submitted"] * len(value)
            entries = zip(people, value, states, strict=True)
            return name.removesuffix(".responses"), [
                (p, v) for p, v, state in entries if state == "submitted"
            ]
        if (
            is_list(value)
            and all(isinstance(v, Mapping) and {"user_id", "value"} <= {*v} for v in value)
            and value
        ):
            done = [v for v in value if v.get("status", "submitted") == "submitted"]
            return name, [(v["user_id"] or "", v["value"]) for v in done]
    raise ValueError('there are no answers to a question, as "preference" or "preference.responses"')


def _argilla_choice(value: Any, fields: list[str]) -> str:
    if is_list(value):
        ranks = {entry.get("value"): entry.get("rank") for entry in value if isinstance(entry, Mapping)}
        first, second = (ranks.get(name) for name in fields)
        if isinstance(first, int) and isinstance(second, int):
            ahead = first - second
            return "first" if ahead < 0 else "second" if ahead > 0 else TIE
    if value in fields:
        return ("first", "second")[fields.index(value)]
    if isinstance(value, str) and value.lower() == TIE:
        return TIE
    raise ValueError(f"an answer is {shown(value)}: it must name {fields[0]} or {fields[1]}, or rank them")


def _two(values: list[Any], name: str) -> tuple[Any, Any]:
    if len(values) != 2:
        raise ValueError(f'"{name}" has {len(values)} entries, not two')
    return values[0], values[1]


def _texts(row: Row) -> bool:
    """Whether chosen and rejected are lists of texts, not of turns."""
    return all(
        is_list(row[n]) and row[n] and all(isinstance(v, str) for v in row[n]) for n in ("chosen", "rejected")
    )


def _has_pairwise(row: Row) -> bool:
    return has_mapping(row, "annotations", "result") and any(
        isinstance(result, Mapping) and result.get("type") == "pairwise"
        for annotation in row["annotations"]
        for result in annotation.get("result") or ()
    )


_PKU = ("prompt", "response_0", "response_1", "better_response_id", "safer_response_id")
PAIRS = (
    Format(
        "pandalm",
        "PandaLM",
        "preference",
        ("instruction", "input", "response1", "response2", "annotator1"),
        one(_pandalm),
    ),
    Format(
        "helpsteer2_preference",
        "HelpSteer2 preference",
        "preference",
        ("prompt", "response_1", "response_2", "preference_strength"),
        one(_helpsteer2_preference),
    ),
    Format(
        "helpsteer3",
        "HelpSteer3",
        "preference",
        ("context", "response1", "response2", "overall_preference"),
        one(_helpsteer3),
    ),
    Format("shp", "SHP", "preference", ("history", "human_ref_A", "human_ref_B", "labels"), one(_shp)),
    Format(
        "webgpt",
        "WebGPT comparisons",
        "preference",
        ("question", "answer_0", "answer_1", "score_0", "score_1"),
        one(_webgpt),
    ),
    Format(
        "summarize", "summarize-from-feedback", "preference", ("info", "summaries", "choice"), one(_summarize)
    ),
    Format(
        "pku_saferlhf", "PKU-SafeRLHF, by helpfulness", "preference", _PKU, one(_pku("better_response_id"))
    ),
    Format(
        "pku_saferlhf_safety", "PKU-SafeRLHF, by safety", "preference", (), one(_pku("safer_response_id"))
    ),
    Format(
        "arena",
        "Chatbot Arena",
        "preference",
        ("model_a", "model_b", "winner", "conversation_a", "conversation_b"),
        one(_arena),
    ),
    Format(
        "arena_table",
        "Chatbot Arena table",
        "preference",
        ("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b", "winner_tie"),
        one(_arena_table),
    ),
    Format("llmbar", "LLMBar", "preference", ("input", "output_1", "output_2", "label"), one(_llmbar)),
    Format(
        "rewardbench2",
        "RewardBench 2",
        "preference",
        ("prompt", "chosen", "rejected", "subset"),
        one(_rewardbench2),
        _texts,
    ),
    Format(
        "rewardbench",
        "RewardBench",
        "preference",
        ("prompt", "chosen", "rejected", "chosen_model", "rejected_model", "subset"),
        one(_rewardbench),
        lambda row: isinstance(row["chosen"], str) and isinstance(row["rejected"], str),
    ),
    Format(
        "label_studio",
        "Label Studio",
        "preference",
        ("annotations", "data"),
        one(_label_studio),
        _has_pairwise,
    ),
    Format("argilla", "Argilla", "preference", (), one(_argilla)),
)
