from __future__ import annotations

import math

import pytest

from keel.data.records import describe, detect, parse, readable_as, unknown_turn_keys
from keel.errors import DataError
from keel.types import DemonstrationRecord, PreferenceRecord, PromptRecord, TextRecord, UnpairedRecord, Vote

USER = {"role": "user", "content": "Hello"}
GOOD = {"role": "assistant", "content": "Hi!"}
BAD = {"role": "assistant", "content": "What?"}
SYSTEM = {"role": "system", "content": ""}
NAN = float("nan")


def refusal(row, kind):
    with pytest.raises(DataError) as caught:
        parse(row, kind, "data/hh.jsonl:12")
    return str(caught.value)


# ---------------------------------------------------------------- detection


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        (["text"], "text"),
        (["text", "label"], "text"),
        (["messages"], "text"),
        (["prompt", "prompt_id", "messages"], "text"),
        (["prompt"], "prompt"),
        (["prompt", "answer"], "prompt"),
        (["prompt", "completion"], "demonstration"),
        (["prompt", "completion", "label"], "unpaired"),
        (["prompt", "chosen", "rejected"], "preference"),
        (["chosen", "rejected"], "preference"),
        (["prompt", "chosen", "rejected", "messages", "score_chosen"], "preference"),
    ],
)
def test_type_is_detected_from_the_columns(columns, kind):
    assert detect(dict.fromkeys(columns, "x")) == kind


def test_columns_that_make_no_type_are_named():
    with pytest.raises(DataError, match="question, answer"):
        detect({"question": "2+2?", "answer": "4"})


def test_narrowing():
    assert readable_as({"prompt": 1, "chosen": 1, "rejected": 1}) == ("preference", "demonstration", "prompt")
    assert readable_as({"prompt": 1, "completion": 1}) == ("demonstration", "prompt")
    # A thumbs-down completion must not be imitated.
    assert readable_as({"prompt": 1, "completion": 1, "label": 1}) == ("unpaired", "prompt")
    assert readable_as({"text": 1}) == ("text",)


def test_description():
    assert describe("preference", False) == "preference, standard"
    assert describe("prompt", True) == "prompt-only, conversational"


# ---------------------------------------------------------------- good rows


def test_standard_rows():
    assert parse({"text": "a", "label": 1}, "text", "f:1") == TextRecord("a", {"label": 1}, "f:1")
    assert parse({"prompt": "a", "answer": 4}, "prompt", "f:1") == PromptRecord("a", {"answer": 4}, "f:1")
    row = {"prompt": "a", "completion": " b", "id": 7}
    assert parse(row, "demonstration", "f:1") == DemonstrationRecord("a", " b", {"id": 7}, "f:1")
    pair = {"prompt": "a", "chosen": "b", "rejected": "c", "id": 7}
    assert parse(pair, "preference", "f:1") == PreferenceRecord(
        "a", "b", "c", columns={"id": 7}, origin="f:1"
    )


def test_conversational_rows():
    assert parse({"messages": [SYSTEM, USER, GOOD]}, "text", "f:1") == TextRecord(
        (SYSTEM, USER, GOOD), {}, "f:1"
    )
    row = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    assert parse(row, "preference", "f:1") == PreferenceRecord((USER,), (GOOD,), (BAD,), origin="f:1")
    row = {"prompt": [USER, USER], "completion": [GOOD], "label": False}
    assert parse(row, "unpaired", "f:1") == UnpairedRecord((USER, USER), (GOOD,), False, origin="f:1")


def test_turns_keep_role_and_content_only():
    row = {"prompt": [{**USER, "tool_calls": None}]}
    assert parse(row, "prompt", "f:1").prompt == (USER,)


def test_sides_that_repeat_the_prompt_are_cut():
    row = {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    assert parse(row, "preference", "f:1") == PreferenceRecord((USER,), (GOOD,), (BAD,), origin="f:1")
    row["prompt"] = "Hello"  # UltraFeedback's form: the prompt as text, the sides as whole conversations
    assert parse(row, "preference", "f:1") == PreferenceRecord((USER,), (GOOD,), (BAD,), origin="f:1")


def test_text_and_turns_together_become_conversational():
    both = DemonstrationRecord((USER,), (GOOD,), origin="f:1")
    assert parse({"prompt": [USER], "completion": "Hi!"}, "demonstration", "f:1") == both
    assert parse({"prompt": "Hello", "completion": [GOOD]}, "demonstration", "f:1") == both
    assert parse({"prompt": "Hello", "completion": [GOOD]}, "prompt", "f:1").prompt == (USER,)


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        (
            "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: yes",
            "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: yellow",
            ("\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant:", " yes", " yellow"),
        ),
        ("The sky is blue.", "The sky is black.", ("The sky is", " blue.", " black.")),
        ("The sky is blue.", "The sky is", ("The sky", " is blue.", " is")),
    ],
)
def test_implicit_prompt_of_text(chosen, rejected, expected):
    record = parse({"chosen": chosen, "rejected": rejected}, "preference", "f:1")
    assert (record.prompt, record.chosen, record.rejected) == expected


def test_implicit_prompt_of_conversations():
    turns = [SYSTEM, USER, GOOD, USER]
    row = {"chosen": [*turns, GOOD], "rejected": [*turns, BAD]}
    assert parse(row, "preference", "f:1") == PreferenceRecord(tuple(turns), (GOOD,), (BAD,), origin="f:1")
    assert parse(row, "prompt", "f:1").prompt == tuple(turns)


def test_implicit_prompt_ends_with_the_user_even_if_both_sides_are_equal():
    row = {"chosen": [USER, GOOD], "rejected": [USER, GOOD]}
    assert parse(row, "prompt", "f:1").prompt == (USER,)
    assert '"chosen" and "rejected" are equal' in refusal(row, "preference")


def test_preference_narrowed_to_its_chosen_side_and_to_its_prompt():
    row = {"prompt": "a", "chosen": "b", "rejected": " ", "id": 7}
    # What is not used need not be valid.
    assert parse(row, "demonstration", "f:1") == DemonstrationRecord(
        "a", "b", {"rejected": " ", "id": 7}, "f:1"
    )
    assert parse(row, "prompt", "f:1").columns == {"chosen": "b", "rejected": " ", "id": 7}
    assert "empty" not in refusal(row, "preference")
    assert '"rejected" is only whitespace' in refusal(row, "preference")


# ---------------------------------------------------------------- votes, shares, margins

PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


def test_votes_are_kept_and_give_the_share_with_ties_half():
    votes = [
        {"annotator": "ann", "choice": "chosen"},
        {"annotator": 2, "choice": "rejected"},
        {"annotator": "cy", "choice": "tie"},
        {"annotator": "di", "choice": "chosen"},
    ]
    record = parse({**PAIR, "votes": votes}, "preference", "f:1")
    assert record.votes == (
        Vote("ann", "chosen"),
        Vote("2", "rejected"),
        Vote("cy", "tie"),
        Vote("di", "chosen"),
    )
    assert record.p_chosen == (2 + 0.5) / 4


def test_votes_as_counts():
    record = parse({**PAIR, "votes": {"chosen": 3, "rejected": 2, "tie": 0}}, "preference", "f:1")
    assert [vote.choice for vote in record.votes] == ["chosen"] * 3 + ["rejected"] * 2
    assert record.p_chosen == 0.6


def test_no_votes_mean_an_unknown_share():
    assert parse({**PAIR, "votes": []}, "preference", "f:1").p_chosen is None
    assert parse(PAIR, "preference", "f:1").p_chosen is None


def test_given_share_and_margin():
    record = parse({**PAIR, "p_chosen": 1, "margin": -0.5}, "preference", "f:1")
    assert (record.p_chosen, record.margin) == (1.0, -0.5)
    votes = {"chosen": 2, "rejected": 1}
    assert parse({**PAIR, "p_chosen": 0.67, "votes": votes}, "preference", "f:1").p_chosen == 2 / 3
    assert "the votes give 0.667" in refusal({**PAIR, "p_chosen": 0.7, "votes": votes}, "preference")


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"p_chosen": 1.2}, '"p_chosen" is 1.2, not between 0 and 1'),
        ({"p_chosen": NAN}, '"p_chosen" is NaN, not a finite number'),
        ({"p_chosen": None}, '"p_chosen" is null, not a finite number'),
        ({"margin": NAN}, '"margin" is NaN, not a finite number'),
        ({"margin": math.inf}, '"margin" is the number inf, not a finite number'),
        ({"margin": "2"}, "\"margin\" is '2', not a finite number"),
        ({"margin": True}, '"margin" is true, not a finite number'),
        ({"votes": None}, '"votes" is null'),
        ({"votes": "chosen"}, "\"votes\" is 'chosen'"),
        ({"votes": {"choosen": 1}}, "\"votes\" counts 'choosen'"),
        ({"votes": {"chosen": -1}}, "the number -1 for 'chosen'"),
        ({"votes": [{"choice": "chosen"}]}, '"votes" entry 1'),
        ({"votes": [{"annotator": "a", "choice": "both"}]}, "\"votes\" entry 1 chose 'both'"),
        ({"votes": [{"annotator": NAN, "choice": "tie"}]}, '"votes" entry 1 has NaN as annotator'),
    ],
)
def test_bad_votes_shares_and_margins(extra, reason):
    assert reason in refusal({**PAIR, **extra}, "preference")


@pytest.mark.parametrize(
    ("value", "label"), [(True, True), (False, False), (1, True), (0, False), (1.0, True)]
)
def test_labels(value, label):
    row = {"prompt": "a", "completion": "b", "label": value}
    assert parse(row, "unpaired", "f:1").label is label


@pytest.mark.parametrize(
    ("value", "shown"), [(NAN, "NaN"), (None, "null"), (2, "the number 2"), ("yes", "'yes'")]
)
def test_bad_labels(value, shown):
    message = refusal({"prompt": "a", "completion": "b", "label": value}, "unpaired")
    assert f'"label" is {shown}, not true or false' in message


# ---------------------------------------------------------------- bad rows


@pytest.mark.parametrize(
    ("row", "kind", "reason"),
    [
        ({**PAIR, "chosen": ""}, "preference", '"chosen" is empty'),
        ({**PAIR, "chosen": " \n"}, "preference", '"chosen" is only whitespace'),
        ({**PAIR, "prompt": ""}, "preference", '"prompt" is empty'),
        ({**PAIR, "prompt": None}, "preference", '"prompt" is null, not text'),
        ({**PAIR, "prompt": NAN}, "prompt", '"prompt" is NaN, not text'),
        ({**PAIR, "chosen": 3}, "preference", '"chosen" is the number 3, not text'),
        ({**PAIR, "chosen": {"a": 1}}, "preference", '"chosen" is an object, not text'),
        ({**PAIR, "chosen": "c"}, "preference", '"chosen" and "rejected" are equal'),
        ({**PAIR, "chosen": [GOOD]}, "preference", "text and the other a list of turns"),
        ({"prompt": "a", "chosen": "b", "rejectd": "c"}, "preference", 'did you mean "rejectd"?'),
        ({"chosen": "yes", "rejected": "no"}, "preference", "do not begin alike"),
        ({"chosen": "A\n\nAssistant:", "rejected": "A\n\nAssistant: b"}, "preference", '"chosen" is empty'),
        ({"text": ""}, "text", '"text" is empty'),
        ({"text": "a\ud83d"}, "text", '"text" holds a lone surrogate (\\ud83d)'),
        ({"text": [USER]}, "text", '"text" must be text'),
        ({"messages": "hello"}, "text", '"messages" must be a list of turns'),
        ({"messages": []}, "text", '"messages" has no turns'),
        ({"messages": ["hello"]}, "text", "\"messages\" turn 1 is 'hello'"),
        ({"messages": [{"from": "human", "value": "a"}]}, "text", 'turn 1 has from, value; it needs "role"'),
        ({"messages": [{"role": "human", "content": "a"}]}, "text", 'did you mean "user"?'),
        ({"messages": [{"role": "asistant", "content": "a"}]}, "text", 'did you mean "assistant"?'),
        ({"messages": [{"role": None, "content": "a"}]}, "text", "the role None"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "text", "turn 2 is null, not text"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "text", "turn 2 is only whitespace"),
        ({"messages": [USER, SYSTEM]}, "text", "turn 2: a system turn may only come first"),
        ({"messages": [USER, GOOD, GOOD]}, "text", "turns 2 and 3 are both the assistant's"),
        ({"messages": [GOOD, USER]}, "text", "turn 1: the assistant speaks before any user"),
        ({"messages": [SYSTEM, GOOD]}, "text", "turn 2: the assistant speaks before any user"),
        ({"prompt": [USER, GOOD]}, "prompt", 'the last turn of "prompt" is the assistant\'s'),
        ({"prompt": [SYSTEM]}, "prompt", "no user turn"),
        (
            {"prompt": [USER], "completion": [USER]},
            "demonstration",
            '"completion" has nothing but the prompt',
        ),
        ({"prompt": [USER], "completion": [GOOD, USER, GOOD]}, "demonstration", "one assistant turn"),
        ({"prompt": [USER], "completion": [SYSTEM, USER, GOOD]}, "demonstration", "one assistant turn"),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, "preference", '"rejected" is empty after the prompt'),
    ],
)
def test_bad_rows_are_named_with_place_and_reason(row, kind, reason):
    message = refusal(row, kind)
    assert message.startswith("data/hh.jsonl:12: ")
    assert reason in message


# ---------------------------------------------------------------- what turns carry besides role and content


@pytest.mark.parametrize(
    "extra",
    [
        {"reasoning_content": "two and two"},
        {"thinking": "two and two"},
        {"weight": 0},
        {"train": False},
        {"name": "ann"},
        {"tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
        {"id": "m-7"},
    ],
)  # fmt: skip
def test_keys_of_a_turn_are_kept(extra):
    record = parse({"messages": [USER, {**GOOD, **extra}]}, "text", "f:1")
    assert isinstance(record, TextRecord)
    assert record.text[1] == {**GOOD, **extra}


def test_a_key_without_a_value_is_no_key():
    record = parse({"messages": [USER, {**GOOD, "tool_calls": None, "name": None}]}, "text", "f:1")
    assert isinstance(record, TextRecord)
    assert record.text[1] == GOOD


def test_text_parts_are_one_text_and_pictures_are_refused():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    record = parse({"messages": [{**USER, "content": parts}, GOOD]}, "text", "f:1")
    assert isinstance(record, TextRecord)
    assert record.text[0] == USER
    picture = {**USER, "content": [*parts, {"type": "image", "image": "x.png"}]}
    assert "'image'" in refusal({"messages": [picture, GOOD]}, "text")
    assert "no pictures" in refusal({"messages": [USER, GOOD], "images": ["x.png"]}, "text")
    assert parse({"messages": [USER, GOOD], "images": []}, "text", "f:1")


def test_tools_and_template_settings_of_a_row_ride_on_its_first_turn():
    tools, settings = [{"function": {"name": "add"}}], {"enable_thinking": False}
    row = {
        "prompt": [USER],
        "chosen": [GOOD],
        "rejected": [BAD],
        "tools": tools,
        "chat_template_kwargs": settings,
    }
    record = parse(row, "preference", "f:1")
    assert isinstance(record, PreferenceRecord)
    assert record.prompt == ({**USER, "tools": tools, "chat_template_kwargs": settings},)
    assert record.columns == {}
    whole = {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD], "tools": tools}
    record = parse(whole, "preference", "f:1")
    assert isinstance(record, PreferenceRecord)
    assert (record.chosen, record.rejected) == ((GOOD,), (BAD,))
    plain = parse({"prompt": "Q", "tools": "hammer"}, "prompt", "f:1")
    assert isinstance(plain, PromptRecord)
    assert plain.columns == {"tools": "hammer"}


def test_tools_written_as_json_are_read():
    record = parse({"messages": [USER, GOOD], "tools": '[{"name": "add"}]'}, "text", "f:1")
    assert isinstance(record, TextRecord)
    assert record.text[0] == {**USER, "tools": [{"name": "add"}]}
    assert "no JSON" in refusal({"messages": [USER, GOOD], "tools": "add"}, "text")


def test_a_call_needs_no_content_and_a_tool_may_answer_nothing():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
    record = parse({"messages": [USER, call, {"role": "tool", "content": ""}, GOOD]}, "text", "f:1")
    assert isinstance(record, TextRecord)
    assert record.text[1]["content"] == ""


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({**GOOD, "weight": 0.5}, '"weight" is the number 0.5'),
        ({**GOOD, "train": 0}, '"train" is the number 0'),
        ({**GOOD, "thinking": 3}, '"thinking" is the number 3'),
        ({**GOOD, "tool_calls": "add"}, "not a list of calls"),
        ({**USER, "tool_calls": [{}]}, "only the assistant"),
    ],
)  # fmt: skip
def test_wrong_values_of_known_keys_are_named(turn, reason):
    turns = [USER, turn] if turn["role"] == "assistant" else [turn, GOOD]
    assert reason in refusal({"messages": turns}, "text")


def test_unknown_keys_are_counted():
    rows = [
        parse({"messages": [{**USER, "id": n}, {**GOOD, "id": n, "weight": 1}]}, "text", "f:1")
        for n in range(3)
    ]
    assert unknown_turn_keys(rows) == {"id": 6}
