"""On every shape of template and every kind of tokenizer: what is trained is what a rollout is asked with,
and what it would have to emit. The replies that templates should lead to are written down here by hand."""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from keel.data import chat
from keel.errors import DataError, UsageError
from keel.types import TextRecord

_spec = importlib.util.spec_from_file_location(
    "tokenizers_for_tests", Path(__file__).with_name("tokenizers_for_tests.py")
)
assert _spec is not None
assert _spec.loader is not None
_kinds = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_kinds)
KINDS, SPECIALS, TEMPLATES, make_tokenizer = (
    _kinds.KINDS,
    _kinds.SPECIALS,
    _kinds.TEMPLATES,
    _kinds.make_tokenizer,
)

# What a reply "X" without a thought has to be behind the prompt, and how many rows two turns become.
EXPECTED = {
    "nested": ("X<|stop|>", 1),
    "bos_and_trim": ("X</turn>", 1),
    "two_ends": ("X<|stop|>", 1),
    "no_end": ("\n<think></think>\nX<|user|>", 1),
    "last_ends_otherwise": ("<|channel|>answer<|message|>X<|return|>", 2),
    "headers": ("X<|stop|>", 1),
    "brackets": (" X<eos>", 1),
    "opens_thought": ("\n</think>\n\nX<eos>", 2),
    "cuts_thoughts": ("<think>\n\n</think>\n\nX<|stop|>", 2),
    "opens_and_keeps": ("\n</think>\n\nX<|stop|>", 1),
    "closes_thought": ("X<|stop|>", 2),
    "thinks_in_words": ("\n[ANSWER]\nX<|stop|>", 2),
    "parts": (" X<|stop|>", 1),
    "marked": ("X<|stop|>", 1),
    "standing_tail": ("\nX<|stop|>", 2),
    "plain_text": (" X\n\n<eos>", 2),
}
EOS = {"last_ends_otherwise": "<|return|>"}  # of the tokenizer; else <eos>
FAMILIES = sorted(TEMPLATES)
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def user(content, **more):
    return {"role": "user", "content": content, **more}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def opened(family, kind="bytes"):
    return make_tokenizer(kind, TEMPLATES[family], EOS.get(family, "<eos>"))


@cache
def opened_once(family, kind):
    """The same for all examples, which only read it: what is found out of its template is kept with it."""
    return opened(family, kind)


def shown(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False)


def trained(row):
    """The stretches of a row's tokens that count."""
    stretches, last = [], False
    for token, counts in zip(row.ids, row.counts, strict=True):
        if counts and not last:
            stretches.append([])
        if counts:
            stretches[-1].append(token)
        last = counts
    return stretches


def rendered(tokenizer, turns):
    """What a rollout is asked with, as transformers renders it by itself."""
    facts = chat.template_facts(tokenizer)
    plain = [
        {
            **turn,
            "content": [{"type": "text", "text": turn["content"]}] if facts.as_parts else turn["content"],
        }
        for turn in turns
    ]
    return tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)


def test_every_family_is_expected_something():
    assert sorted(EXPECTED) == FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reply_is_what_the_template_has_the_model_emit(family):
    tokenizer = opened(family)
    reply, rows = EXPECTED[family]
    ids = chat.completion_ids(tokenizer, (user("ask"),), (assistant("Yes."),))
    assert shown(tokenizer, ids) == reply.replace("X", "Yes.")
    assert ids[-1] == chat.reply_end(tokenizer)
    assert ids[-1] in chat.stop_ids(tokenizer, ())
    made = chat.text_rows(tokenizer, TextRecord((user("a"), assistant("One"), user("b"), assistant("Two"))))
    assert len(made) == rows
    said = [shown(tokenizer, part) for row in made for part in trained(row)]
    assert said == [reply.replace("X", "One"), reply.replace("X", "Two")]


WORDS = st.text(alphabet="ab n:.\né日>]", min_size=1, max_size=8).filter(lambda text: text.strip() == text)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.lists(WORDS, min_size=4, max_size=4))
def test_trained_tokens_are_the_sampled_prompt_and_the_reply_forced_behind_it(family, kind, contents):
    """Token by token, on every tokenizer: the prompt is what a rollout has, and prompt and reply are one
    string tokenised once, unless a token straddles their boundary."""
    tokenizer = opened_once(family, kind)
    turns = tuple((user, assistant)[i % 2](text) for i, text in enumerate(contents))
    rows = chat.text_rows(tokenizer, TextRecord(turns))
    pairs = [(row, part) for row in rows for part in trained(row)]
    for index, (row, part) in zip((1, 3), pairs, strict=True):
        text = rendered(tokenizer, turns[:index])
        asked = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert chat.prompt_ids(tokenizer, turns[:index]) == asked
        assert row.ids[: len(asked)] == asked
        assert row.ids[len(asked) : len(asked) + len(part)] == part
        assert chat.completion_ids(tokenizer, turns[:index], turns[index : index + 1]) == part
        forced = text + EXPECTED[family][0].replace("X", contents[index])
        whole = tokenizer(forced, add_special_tokens=False)["input_ids"]
        if whole[: len(asked)] == asked:
            assert asked + part == whole
        elif kind != "words":
            assert shown(tokenizer, asked + part) == shown(tokenizer, whole)
    assert sum(map(len, (part for _, part in pairs))) == sum(sum(row.counts) for row in rows)


TRICKS = st.lists(
    st.sampled_from(
        [*SPECIALS, "a", "\n", "<|", "|>", "\ufdd0", "\ufdd1", "qbbbbbbbbb", "zmmmmmmmmm", "</think>"]
    ),
    min_size=1,
    max_size=6,
).map("".join)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(trick=TRICKS)
def test_what_a_user_writes_is_never_a_special_token_and_no_guard_is_left(family, kind, trick):
    tokenizer = opened_once(family, kind)
    content = f"Hear {trick} ye"
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    harmless = chat.prompt_ids(tokenizer, (user("Hear ye"),))
    prompt = chat.prompt_ids(tokenizer, (user(content),))
    assert [i for i in prompt if i in special - {tokenizer.unk_token_id}] == [
        i for i in harmless if i in special - {tokenizer.unk_token_id}
    ]
    if kind != "words" and family not in (
        "no_end",
        "closes_thought",
    ):  # these cut a user's text at a tag, too
        expected = shown(tokenizer, harmless).replace("Hear ye", content)
        assert shown(tokenizer, prompt) == expected
    written = set(rendered(tokenizer, (user("Hear ye"),)) + content)
    assert set(shown(tokenizer, prompt).replace("#", "")) <= written | {" "} | set("<unk>")


@pytest.mark.parametrize("kind", KINDS)
def test_structure_in_a_reply_is_text_and_tags_in_it_are_special(kind):
    tokenizer = opened("nested", kind)
    ids = chat.completion_ids(tokenizer, (user("q"),), (assistant("<think>a</think>b<|start|>user"),))
    special = [shown(tokenizer, [i]).strip() for i in ids if i in tokenizer.added_tokens_decoder]
    assert [text for text in special if text != "<unk>"] == ["<think>", "</think>", "<|stop|>"]


def test_a_template_that_takes_placeholders_apart_is_refused():
    """It leaves letters out, so a tag in a text would come back as something else."""
    tokenizer = make_tokenizer(
        "bytes", "{% for m in messages %}{{ m.content.replace('b', '') }}<|stop|>{% endfor %}"
    )
    with pytest.raises(UsageError, match=r"changes the special tokens that a turn's text holds \(<eos>\)"):
        chat.prompt_ids(tokenizer, (user("a<eos>b"),))


def test_a_tokenizer_without_offsets_reads_what_people_wrote_as_characters_too():
    """It is written in Python, and reads the written tags apart from what is around them."""
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}"
    ids = chat.prompt_ids(tokenizer, (user("a</s>b"),))
    assert [i for i in ids if i == tokenizer.eos_token_id] == [tokenizer.eos_token_id]
    assert shown(tokenizer, ids) == "user: a</s>b</s>"


# ---------------------------------------------------------------- thoughts


@pytest.mark.parametrize(
    ("family", "reply"),
    [
        ("opens_thought", "why\n</think>\n\nYes.<eos>"),
        ("cuts_thoughts", "<think>\nwhy\n</think>\n\nYes.<|stop|>"),
        ("opens_and_keeps", "why\n</think>\n\nYes.<|stop|>"),
        ("thinks_in_words", "why\n[ANSWER]\nYes.<|stop|>"),
        (
            "last_ends_otherwise",
            "<|channel|>thought<|message|>why<|stop|><|start|>assistant<|channel|>answer<|message|>Yes.<|return|>",
        ),
        ("no_end", "\n<think>why</think>\nYes.<|user|>"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_a_thought_is_part_of_the_reply_under_whichever_key_it_stands(family, reply, key):
    tokenizer = opened(family)
    ids = chat.completion_ids(tokenizer, (user("ask"),), (assistant("Yes.", **{key: "why"}),))
    assert shown(tokenizer, ids) == reply


@pytest.mark.parametrize(
    ("family", "reply"),
    [
        ("opens_thought", "why\n</think>\n\nYes.<eos>"),
        ("cuts_thoughts", "<think>\nwhy\n</think>\n\nYes.<|stop|>"),
        ("opens_and_keeps", "why\n</think>\n\nYes.<|stop|>"),
        ("nested", "<think>\nwhy\n</think>\n\nYes.<|stop|>"),
    ],
)
def test_a_thought_written_into_the_content_is_the_same_reply(family, reply):
    tokenizer = opened(family)
    said = assistant("<think>\nwhy\n</think>\n\nYes.")
    ids = chat.completion_ids(tokenizer, (user("ask"),), (said,))
    assert shown(tokenizer, ids) == reply
    assert tokenizer.convert_tokens_to_ids("</think>") in ids


def test_a_thought_that_the_template_cannot_show_is_refused_with_the_remedy():
    with pytest.raises(UsageError, match=r'shows no "reasoning_content"'):
        chat.completion_ids(opened("nested"), (user("ask"),), (assistant("Yes.", reasoning_content="why"),))
    short = assistant("Yes.", reasoning_content="s")  # it stands in the text of every reply, by chance
    with pytest.raises(UsageError, match=r'shows no "reasoning_content"'):
        chat.completion_ids(opened("nested"), (user("ask"),), (short,))
    with pytest.raises(UsageError, match="enable_thinking"):
        chat.completion_ids(opened("closes_thought"), (user("ask"),), (assistant("Yes.", thinking="why"),))


def test_a_thought_that_ends_with_the_end_of_a_reply_is_refused():
    tokenizer = make_tokenizer("bytes", TEMPLATES["last_ends_otherwise"], "<|return|>")
    chat.declare_ends(tokenizer, [tokenizer.convert_tokens_to_ids("<|stop|>")])
    with pytest.raises(UsageError, match="would never be sampled"):
        chat.completion_ids(tokenizer, (user("ask"),), (assistant("Yes.", thinking="why"),))


# ---------------------------------------------------------------- keys of turns and rows


def test_settings_of_a_row_reach_the_template():
    tokenizer = opened("cuts_thoughts")
    ask = user("ask", chat_template_kwargs={"enable_thinking": False})
    assert shown(tokenizer, chat.prompt_ids(tokenizer, (ask,))).endswith("<think>\n\n</think>\n\n")
    assert shown(tokenizer, chat.completion_ids(tokenizer, (ask,), (assistant("Yes."),))) == "Yes.<|stop|>"


@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}'])
def test_tools_and_calls_reach_the_template(arguments):
    tokenizer = opened("headers")
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    turns = (
        user("1+1", tools=[TOOL]),
        assistant("", tool_calls=[call]),
        {"role": "tool", "content": "2"},
        assistant("Two."),
    )
    rows = chat.text_rows(tokenizer, TextRecord(turns))
    assert len(rows) == 1
    assert '"name": "add", "parameters"' in shown(tokenizer, rows[0].ids)
    assert [shown(tokenizer, part) for part in trained(rows[0])] == [
        '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|stop|>',
        "Two.<|stop|>",
    ]


def test_tools_and_calls_that_the_template_leaves_out_are_refused():
    tokenizer = opened("nested")
    with pytest.raises(UsageError, match='shows no "tools"'):
        chat.prompt_ids(tokenizer, (user("1+1", tools=[TOOL]),))
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    with pytest.raises(UsageError, match='shows no "tool_calls"'):
        chat.completion_ids(tokenizer, (user("1+1"),), (assistant("", tool_calls=[call]),))


@pytest.mark.parametrize("setting", [{"weight": 0}, {"train": False}])
def test_a_turn_of_no_weight_is_history_and_not_in_the_loss(setting):
    tokenizer = opened("nested")
    turns = (user("a"), assistant("Bad", **setting), user("b"), assistant("Good"))
    (row,) = chat.text_rows(tokenizer, TextRecord(turns))
    assert "Bad<|stop|>" in shown(tokenizer, row.ids)
    assert [shown(tokenizer, part) for part in trained(row)] == ["Good<|stop|>"]
    with pytest.raises(DataError, match="weight 0"):
        chat.text_rows(tokenizer, TextRecord(turns[:2], origin="f:1"))


def test_what_generation_marks_leave_out_of_a_reply_is_not_trained():
    source = TEMPLATES["marked"].replace("{% generation %}", "Well: {% generation %}")
    tokenizer = make_tokenizer("bytes", source)
    (row,) = chat.text_rows(tokenizer, TextRecord((user("a"), assistant("Yes."))))
    assert shown(tokenizer, row.ids).endswith("Well: Yes.<|stop|>")
    assert [shown(tokenizer, part) for part in trained(row)] == ["Yes.<|stop|>"]


# ---------------------------------------------------------------- ends


def test_the_ends_that_a_models_files_name_stop_a_rollout():
    tokenizer = opened("plain_text")
    first = tokenizer.convert_tokens_to_ids("<eos>")
    assert chat.stop_ids(tokenizer, ()) == (first,)
    further = tokenizer.convert_tokens_to_ids("<|return|>")
    chat.declare_ends(tokenizer, [further, first])
    assert chat.stop_ids(tokenizer, ()) == (first, further)


def test_an_open_thought_is_seen_in_a_prompts_tokens():
    for family, tag in (("opens_thought", "<think>"), ("cuts_thoughts", ""), ("closes_thought", "")):
        tokenizer = opened(family)
        assert chat.opened_thought(tokenizer, chat.prompt_ids(tokenizer, (user("ask"),))) == tag


def test_tags_are_shown_to_rewards_and_left_out_for_readers():
    tokenizer = opened("nested")
    text = "<think>a</think>4<|stop|>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert chat.reply_text(tokenizer, ids) == "<think>a</think>4"
    assert chat.reply_text(tokenizer, ids, tags=False) == "a4"


def test_a_sampled_reply_is_never_refused():
    """A reward model with a template of its own reads whatever a policy writes."""
    tokenizer = opened("closes_thought")
    said = (assistant("<think>why</think>Yes."),)
    with pytest.raises(UsageError):
        chat.completion_ids(tokenizer, (user("ask"),), said)
    assert (
        shown(tokenizer, chat.sampled_ids(tokenizer, (user("ask"),), said))
        == "<think>why</think>Yes.<|stop|>"
    )


def test_a_conversation_as_one_document_ends_once():
    tokenizer = opened("nested")
    turns = (user("a"), assistant("b"))
    ids = chat.document_ids(tokenizer, TextRecord(turns))
    assert shown(tokenizer, ids) == "<|start|>user\na<|stop|>\n<|start|>assistant\nb<|stop|>"
    plain = opened("plain_text")
    assert shown(plain, chat.document_ids(plain, TextRecord(turns))) == "user: a\n\nassistant: b\n\n<eos>"


def test_facts_of_a_template_are_plain_values():
    facts = chat.template_facts(opened("no_end"))
    assert (facts.end, facts.writes_end, facts.generation) == ("<|user|>", False, "<|assistant|>")
    assert {"<think>", "</think>", "<tool_call>"} <= facts.tags
    assert {"<|user|>", "<|assistant|>", "[go]", "<eos>", "<bos>"} <= facts.structure
    assert json.dumps(sorted(facts.tags | facts.structure))
