"""Text and conversations into tokens: the only code that knows chat templates, EOS and padding tokens.

A reply is what a rollout would produce. At each assistant turn the prompt is the template's rendering of the
history at that point, with the generation prompt; the reply is what the model must then emit, its thought
included, up to and with the token that ends the turn. Prompt and reply are one string, tokenised once:
training sees the tokens that sampling makes. A conversation is one row where each prompt begins with all that
came before it, and a row a turn where the template renders history otherwise (thoughts cut, another end of
the last turn).

What people wrote is content: a "<|end|>" in a prompt or a turn is read as the characters it is made of, never
as the special token. Only the template and keel itself write special tokens. Three exceptions: plain text for
language modelling (documents may have EOS between them); EOS at the very end of a reply, which many data sets
bring and which is the response's own; and tags in a reply that the model would emit as special tokens
(`<think>`, `<tool_call>`), which are no part of what the template writes around turns.
"""

from keel.data.chat.batching import batched
from keel.data.chat.marks import marks_of, strange_to_template, template_for
from keel.data.chat.rendering import asks_for_date, on_date
from keel.data.chat.reply import reply_end
from keel.data.chat.special import added_vocab, declare_ends, ensure_pad, eos_id, eos_ids
from keel.data.chat.template import (
    DEFAULT_CHAT_TEMPLATE,
    TemplateFacts,
    closing_tag,
    opened_tag,
    template_facts,
    with_chat_template,
)
from keel.data.chat.text import (
    completion_text,
    opened_thought,
    own_text,
    prompt_tags,
    prompt_text,
    reply_text,
    user_text,
)
from keel.data.chat.tool_calls import Call, Said, ToolTemplate
from keel.data.chat.turns import (
    TextRow,
    completion_ids,
    document_ids,
    ending,
    is_trained,
    prompt_ids,
    sampled_ids,
    stop_ids,
    text_ids,
    text_rows,
)

__all__ = [
    "DEFAULT_CHAT_TEMPLATE",
    "Call",
    "Said",
    "TemplateFacts",
    "TextRow",
    "ToolTemplate",
    "added_vocab",
    "asks_for_date",
    "batched",
    "closing_tag",
    "completion_ids",
    "completion_text",
    "declare_ends",
    "document_ids",
    "ending",
    "ensure_pad",
    "eos_id",
    "eos_ids",
    "is_trained",
    "marks_of",
    "on_date",
    "opened_tag",
    "opened_thought",
    "own_text",
    "prompt_ids",
    "prompt_tags",
    "prompt_text",
    "reply_end",
    "reply_text",
    "sampled_ids",
    "stop_ids",
    "strange_to_template",
    "template_facts",
    "template_for",
    "text_ids",
    "text_rows",
    "user_text",
    "with_chat_template",
]  # fmt: skip
