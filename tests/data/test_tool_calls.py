"""How templates write calls is found by having them write one, and read back; those that cannot are
refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from keel.data import chat
from keel.data.chat.tool_calls import JsonReader, TemplateReader
from keel.errors import UsageError

_spec = importlib.util.spec_from_file_location(
    "tokenizers_for_tests", Path(__file__).with_name("tokenizers_for_tests.py")
)
assert _spec is not None
assert _spec.loader is not None
_kinds = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_kinds)


def _tool(name: str, **arguments: str) -> dict[str, Any]:
    properties = {key: {"type": kind, "description": "what"} for key, kind in arguments.items()}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": "Do.", "parameters": parameters}}


TOOLS = [_tool("now"), _tool("add", number="integer", label="string", exact="boolean")]


def _chatml(
    call: str, tool: str = "<|start|>user\n<res>{{ m.content }}</res><|stop|>\n", more: str = ""
) -> str:
    """A template with a form of calls and of answers."""
    return (
        "{% if tools %}<|start|>system\n{{ tools | tojson }}<|stop|>\n{% endif %}{% for m in messages %}"
        "{% if m.role == 'tool' %}"
        + tool
        + "{% elif m.role == 'assistant' %}<|start|>assistant\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{% set f = c.function %}"
        + call
        + "{% endfor %}"
        + more
        + "<|stop|>\n"
        "{% else %}<|start|>{{ m.role }}\n{{ m.content }}<|stop|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )


HERMES = '<tool_call>\n{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}\n</tool_call>'
FORMS = {  # as the families write them
    "Hermes, Qwen 2.5 and 3": HERMES,
    "Mistral": "[go] [{{ {'name': f.name, 'arguments': f.arguments} | tojson }}]",
    "Llama 3": '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}',
    "OpenAI": "<tool_call>{{ {'type': 'function', 'function': f} | tojson }}</tool_call>",
    "arguments as JSON in text": (
        '<tool_call>{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson | tojson }}}</tool_call>'
    ),
    "Qwen 3.5": (
        "<tool_call>\n<function={{ f.name }}>\n{% for k, v in f.arguments.items() %}<parameter={{ k }}>\n"
        "{{ v if v is string else v | tojson }}\n</parameter>\n{% endfor %}</function>\n</tool_call>"
    ),
    "GLM": (
        "<tool_call>{{ f.name }}\n{% for k, v in f.arguments.items() %}<arg_key>{{ k }}</arg_key>\n"
        "<arg_value>{{ v if v is string else v | tojson }}</arg_value>\n{% endfor %}</tool_call>"
    ),
}


def _opened(template: str, tools: list[dict[str, Any]] | None = None) -> chat.ToolTemplate:
    return chat.ToolTemplate.open(_kinds.make_tokenizer("bytes", template, "<|stop|>"), tools or TOOLS)


@pytest.mark.parametrize("form", FORMS)
def test_a_call_is_read_as_its_template_writes_it(form: str) -> None:
    opened = _opened(_chatml(FORMS[form]))
    tokenizer = opened.tokenizer
    arguments = {"number": -12, "label": 'two "words" {é}', "exact": False}
    turns: Any = [
        {"role": "user", "content": "q", "tools": TOOLS},
        {
            "role": "assistant",
            "content": "I will.",
            "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": arguments}}],
        },
    ]
    prompt = chat.prompt_ids(tokenizer, turns[:1])
    whole = tokenizer.apply_chat_template(turns, tools=TOOLS, tokenize=False)
    text = whole[len(tokenizer.decode(prompt)) :].removesuffix("\n")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    said = opened.said(prompt, ids)
    if form == "Llama 3":  # whose calls have no mark: a reply with words before it is words
        assert said.calls == ()
        ids = tokenizer(text.removeprefix("I will."), add_special_tokens=False)["input_ids"]
        said = opened.said(prompt, ids)
    else:
        assert said.content == "I will."
    assert said.calls == (("add", arguments),)
    assert said.message()["role"] == "assistant"
    expected = TemplateReader if form in ("Qwen 3.5", "GLM") else JsonReader
    assert isinstance(opened.reader, expected)


def test_a_reply_without_a_call_is_a_reply() -> None:
    for form in FORMS.values():
        opened = _opened(_chatml(form))
        ids = opened.tokenizer("It is 4 {so}.<|stop|>", add_special_tokens=False)["input_ids"]
        assert opened.said([], ids) == ("It is 4 {so}.", (), "", "")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('<tool_call>{"name": "add", "arguments": {</tool_call>', "the call cannot be read: "),
        ('<tool_call>{"name": 3, "arguments": {}}</tool_call>', 'it has no "name"'),
        ('<tool_call>{"name": "add", "arguments": [1]}</tool_call>', '"arguments" are no object'),
        ('<tool_call>{"name": "add", "arguments": {"number": NaN}}</tool_call>', "nan is no number"),
        ('<tool_call>{"name": "add", "arguments": {"number": 1e999}}</tool_call>', "inf is no number"),
        ('<tool_call>{"name": "now"}', "does not end with </tool_call>"),
        ("<tool_call>" + "[" * 100_000, "the call cannot be read: "),
    ],
)
def test_what_looks_like_a_call_and_is_none_is_told(text: str, problem: str) -> None:
    opened = _opened(_chatml(HERMES))
    said = opened.said([], opened.tokenizer(text, add_special_tokens=False)["input_ids"])
    assert said.calls == ()
    assert problem in said.problem
    good = opened.said([], opened.tokenizer('<tool_call>{"name": "now"}</tool_call>')["input_ids"])
    assert good.calls == (("now", {}),)


def test_half_characters_become_question_marks() -> None:
    """Which JSON may hold and no file does."""
    opened = _opened(_chatml(HERMES))
    text = '<tool_call>{"name": "add", "arguments": {"label": "\\ud800"}}</tool_call>'
    said = opened.said([], opened.tokenizer(text, add_special_tokens=False)["input_ids"])
    assert said.calls == (("add", {"label": "?"}),)


def test_a_thought_before_a_call_is_no_content() -> None:
    opened = _opened(_chatml(HERMES))
    text = '<think>\nWhich?\n</think>\n\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    said = opened.said([], opened.tokenizer(text, add_special_tokens=False)["input_ids"])
    assert (said.thought, said.content, said.calls) == ("Which?", "", (("now", {}),))


def test_answers_stand_as_the_template_writes_them() -> None:
    opened = _opened(_chatml(HERMES))
    ids = opened.answer_ids([("now", "12:00"), ("add", "5")])
    assert opened.tokenizer.decode(list(ids)) == (
        "\n<|start|>user\n<res>12:00</res><|stop|>\n<|start|>user\n<res>5</res><|stop|>\n<|start|>assistant\n"
    )


def test_the_header_that_ends_a_turn_is_not_written_twice() -> None:
    """Where nothing ends a reply but what comes next (GLM), the model has written that."""
    template = (
        "{% for m in messages %}{% if loop.first and tools %}<|system|>{{ tools | tojson }}{% endif %}"
        "{% if m.role == 'tool' %}<|user|>res: {{ m.content }}"
        "{% elif m.role == 'assistant' %}<|assistant|>{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
        "{% else %}<|user|>{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = _kinds.make_tokenizer("bytes", template, "<eos>")
    opened = chat.ToolTemplate.open(tokenizer, TOOLS)
    assert tokenizer.decode(list(opened.answer_ids([("now", "12")]))) == "res: 12<|assistant|>"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (chat.DEFAULT_CHAT_TEMPLATE, 'shows no "tool'),
        (_chatml("{{ f.name }}"), "which keel cannot read back"),
        (_chatml("{{ f.name }}({{ f.arguments }})"), "which keel cannot read back"),
        (_chatml(HERMES, tool=""), "does not show what tools answer"),
        (
            "{% if messages[-1].role == 'tool' %}late {% endif %}" + _chatml(HERMES),
            "writes a call otherwise once a tool has answered",
        ),
        (_chatml(HERMES, tool="{{ raise_exception('no tools') }}"), "no tools"),
    ],
)
def test_a_template_that_cannot_show_tools_is_refused(template: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        _opened(template)
