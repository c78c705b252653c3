"""Prompts and replies as text: for people, for reward functions, and for tokenizers of other models."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from keel.data.chat.special import eos_ids, id_of, named_specials, special_ids
from keel.data.chat.template import Transcript, opened_tag, template_facts
from keel.types import Conversation, Message, Prompt

_TAGS = re.compile(r"(?:</?[\w.:-]+>\s*)+$")
_TAIL = 24  # tokens at a prompt's end that hold the tag of an open thought, however it is cut


def prompt_text(tokenizer: PreTrainedTokenizerBase | None, prompt: Prompt) -> str:
    """The prompt as text: for tokenizers of other models, reward functions and samples.

    A conversation is rendered by the tokenizer's template, generation prompt included; without a tokenizer it
    becomes "role: content" lines.
    """
    if isinstance(prompt, str):
        return prompt
    if tokenizer is None:
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
    transcript = Transcript(tokenizer, prompt)
    return transcript.text(transcript.render(len(prompt), generation=True)).string


def completion_text(completion: str | Conversation) -> str:
    """The reply as text, without its role."""
    return completion if isinstance(completion, str) else "\n".join(turn["content"] for turn in completion)


def own_text(completion: str | Conversation) -> str:
    """What the model itself said, as text: of an episode with tools without what these answered, and without
    turns that only call. A thought that stands beside a turn is put before it, in <think> tags."""
    if isinstance(completion, str):
        return completion
    own = (turn for turn in completion if turn["role"] != "tool")
    return "\n".join(filter(None, map(_with_thought, own)))


def _with_thought(turn: Message) -> str:
    thought = turn.get("reasoning_content")
    return f"<think>\n{thought}\n</think>\n{turn['content']}".rstrip() if thought else turn["content"]


def user_text(prompt: Prompt) -> str:
    """What the user said last."""
    if isinstance(prompt, str):
        return prompt
    return next((turn["content"] for turn in reversed(prompt) if turn["role"] == "user"), "")


def opened_thought(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The tag of a thought that a prompt's tokens leave open, as "<think>"; "" where they open none."""
    return opened_tag(str(tokenizer.decode(list(ids[-_TAIL:]), skip_special_tokens=False)))


def prompt_tags(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The tags that a prompt's tokens end in, as the template begins a reply: "<think>\\n", or
    "<think>\\n\\n</think>\\n\\n"; "" where they end in none."""
    match = _TAGS.search(str(tokenizer.decode(list(ids[-_TAIL:]), skip_special_tokens=False)))
    return match[0] if match else ""


def reply_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, tags: bool = True) -> str:
    """Sampled tokens as text, without EOS, pad and what else stands around turns.

    tags: special tokens that belong to the reply (`<think>`, `<tool_call>`) are shown, as rewards that ask
    for a form need it; without, the text for readers who want the answer alone.
    """
    special = special_ids(tokenizer)
    if not tags or special.isdisjoint(ids):
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))
    hidden = named_specials(tokenizer)
    if tokenizer.chat_template and tokenizer.eos_token_id is not None:
        hidden |= template_facts(tokenizer).structure
    outside = {id_of(tokenizer, token) for token in hidden} | set(eos_ids(tokenizer))
    kept = [i for i in ids if i not in outside]
    shown = not special.isdisjoint(kept)
    return str(tokenizer.decode(kept, skip_special_tokens=not shown))
