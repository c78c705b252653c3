"""Text and conversations into tokens: the only code that knows chat templates, EOS and padding tokens.

Prompt and response are tokenised apart, because that is the boundary a rollout has: the model continues from
the prompt's last token, and training must see the same tokens as sampling. A response ends in EOS exactly
once.

What people wrote is content: a "<|end|>" in a prompt, a completion or a turn is read as the characters it is
made of, never as the special token. Only the template and keel itself write special tokens. Two exceptions,
by convention: plain text for language modelling (documents may have EOS between them), and EOS at the very
end of a reply, which many data sets bring and which is the response's own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import jinja2

from keel.errors import DataError, UsageError
from keel.types import Conversation, Message, Prompt, TextRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n' }}"
    "{% else %}{{ 'Assistant: ' + message['content'] + eos_token + '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# Guards: they stand around special tokens in content. Unicode reserves these two for internal use.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


def with_chat_template(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The same tokenizer, given DEFAULT_CHAT_TEMPLATE if it has no template of its own."""
    if not tokenizer.chat_template:
        eos_id(tokenizer)
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    return tokenizer


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """The tokens a rollout starts from: never empty, never with an EOS added after them.

    Plain text begins with BOS where the tokenizer adds it; a conversation is what its template makes of it,
    with the generation prompt.
    """
    if not isinstance(prompt, str):
        text = _render(tokenizer, _guarded(tokenizer, prompt), generation=True)
        return _encode_guarded(tokenizer, text) or [_first_id(tokenizer)]
    return _encode_plain(tokenizer, prompt, content=True) or [_first_id(tokenizer)]


def completion_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: str | Conversation
) -> list[int]:
    """The tokens of the response to `prompt`, with EOS as the last one.

    EOS is not repeated if the text or the template brings it already [trl PR 4908], and what a template
    writes after it (ChatML's newline) is left out, since no rollout would get that far. UsageError if the
    template renders the prompt differently once the reply is there, so that there is no boundary.
    """
    if isinstance(prompt, str) != isinstance(completion, str):
        raise UsageError("prompt and completion must both be text or both be conversations")
    if isinstance(prompt, str) or isinstance(completion, str):
        ids = _encode_content(tokenizer, _without_final_eos(tokenizer, str(completion)))
        return [*ids, eos_id(tokenizer)]
    prompt, completion = _guarded(tokenizer, prompt), _guarded(tokenizer, completion)
    before = _render(tokenizer, prompt, generation=True)
    text = _reply_text(tokenizer, before, _render(tokenizer, (*prompt, *completion)), completion)
    return [*_encode_guarded(tokenizer, _without_final_eos(tokenizer, text)), eos_id(tokenizer)]


def text_ids(tokenizer: PreTrainedTokenizerBase, record: TextRecord) -> tuple[list[int], list[bool]]:
    """Tokens (S,) of a text or a whole conversation, and the mask (S,) of those that count in the loss.

    Plain text counts as a whole, and special tokens written in it are special tokens. In a conversation the
    assistant's turns count, each with its EOS or end of turn. Both end in EOS exactly once. DataError for a
    conversation without an assistant turn, UsageError if the template renders earlier turns differently once
    later ones are there.
    """
    if isinstance(record.text, str):
        ids = _encode_plain(tokenizer, _without_final_eos(tokenizer, record.text))
        ids.append(eos_id(tokenizer))
        return ids, [True] * len(ids)

    turns = _guarded(tokenizer, record.text)
    if all(turn["role"] != "assistant" for turn in turns):
        raise DataError(f'{record.origin}: "messages" has no assistant turn to learn from')
    whole, eos = _render(tokenizer, turns), _string(tokenizer.eos_token)
    ids: list[int] = []
    mask: list[bool] = []

    def add(tokens: list[int], counts: bool) -> None:
        ids.extend(tokens)
        mask.extend([counts] * len(tokens))

    done = 0  # characters of `whole` that are tokenised
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = _render(tokenizer, turns[:index], generation=True)
        after = _render(tokenizer, turns[: index + 1])
        reply = _reply_text(tokenizer, before, after, turns[index : index + 1])
        if not whole.startswith(after):
            raise _not_nested()
        add(_encode_guarded(tokenizer, whole[done : len(before)]), False)
        body = _without_final_eos(tokenizer, reply)
        add(_encode_guarded(tokenizer, body), True)
        done = len(before) + len(reply)
        template_ends_it = bool(eos) and whole.startswith(eos, done)
        if template_ends_it or body != reply:
            add([eos_id(tokenizer)], True)
        done += len(eos) if template_ends_it else 0
    if turns[-1]["role"] != "assistant":
        add(_encode_guarded(tokenizer, whole[done:]), False)
    if ids[-1] != eos_id(tokenizer):
        add([eos_id(tokenizer)], turns[-1]["role"] == "assistant")
    return ids, mask


# ---------------------------------------------------------------- text for people and for foreign tokenizers


def prompt_text(tokenizer: PreTrainedTokenizerBase | None, prompt: Prompt) -> str:
    """The prompt as text: for tokenizers of other models, reward functions and samples.

    A conversation is rendered by the tokenizer's template, generation prompt included; without a tokenizer it
    becomes "role: content" lines.
    """
    if isinstance(prompt, str):
        return prompt
    if tokenizer is None:
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
    return _render(tokenizer, prompt, generation=True)


def completion_text(completion: str | Conversation) -> str:
    """The reply as text, without its role."""
    return completion if isinstance(completion, str) else "\n".join(turn["content"] for turn in completion)


def user_text(prompt: Prompt) -> str:
    """What the user said last."""
    if isinstance(prompt, str):
        return prompt
    return next((turn["content"] for turn in reversed(prompt) if turn["role"] == "user"), "")


# ---------------------------------------------------------------- special tokens


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of EOS. UsageError if the tokenizer has none: no response could ever end."""
    eos = cast("int | None", tokenizer.eos_token_id)
    if eos is None:
        raise UsageError(
            "the tokenizer has no EOS token, so responses could not end; set `eos_token` in its files"
        )
    return eos


def added_vocab(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Token → id for the tokens that were added to the vocabulary, special ones among them."""
    return cast("Any", tokenizer).get_added_vocab()  # every tokenizer has it, though not its base class


def stop_ids(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> tuple[int, ...]:
    """Ids that end a response: EOS first, then the stop strings that are special tokens; `stops.stop_texts`
    has the others."""
    special = added_vocab(tokenizer)
    return tuple(dict.fromkeys([eos_id(tokenizer), *(special[text] for text in stop if text in special)]))


def ensure_pad(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with. A tokenizer without one gets EOS as its pad token.

    That is harmless here: padding is on the right and every mask comes from lengths, never from comparing ids
    with the pad token, so a real EOS still counts. `padding_side` is left alone [trl 6663].
    """
    pad = cast("int | None", tokenizer.pad_token_id)
    if pad is None:
        pad = eos_id(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    return pad


# ---------------------------------------------------------------- inside


def _render(tokenizer: PreTrainedTokenizerBase, turns: Conversation, generation: bool = False) -> str:
    if not tokenizer.chat_template:
        raise UsageError(
            "the data are conversations, but the tokenizer has no chat template: set `chat_template`"
        )
    try:
        text = tokenizer.apply_chat_template(
            cast("list[dict[str, str]]", list(turns)), tokenize=False, add_generation_prompt=generation
        )
    except jinja2.TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise UsageError(f"the chat template refuses the roles {roles}: {error}") from None
    text = _string(text)
    if any(turn["role"] == "system" and turn["content"].strip() not in text for turn in turns):
        raise UsageError(
            "the chat template leaves out the system message (of the data, or set as `system`); give another "
            "`chat_template`, or do without the message"
        )
    return text


def _reply_text(tokenizer: PreTrainedTokenizerBase, before: str, after: str, reply: Conversation) -> str:
    """What a template adds for a reply: `after` without `before`, up to the EOS it writes (not included)."""
    if not after.startswith(before):
        raise _not_nested()
    text = after[len(before) :]
    eos = _string(tokenizer.eos_token)
    in_content = sum(turn["content"].count(eos) for turn in reply) if eos else 0
    return text[: text.rindex(eos)] if eos and text.count(eos) > in_content else text


def _not_nested() -> UsageError:
    return UsageError(
        "the chat template renders earlier turns differently once later ones are there, so prompt and reply "
        "cannot be told apart; give a plainer one as `chat_template`"
    )


def _without_final_eos(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text without EOS strings at its end (data sets often bring one), so that EOS can be added once."""
    eos = _string(tokenizer.eos_token)
    while eos and text.rstrip().endswith(eos):
        text = text.rstrip().removesuffix(eos)
    return text


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False) -> list[int]:
    # verbose: too long a sequence is the caller's to count and report, with the row's name
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _encode_plain(tokenizer: PreTrainedTokenizerBase, text: str, content: bool = False) -> list[int]:
    """Tokens with what the tokenizer adds in front (BOS), without what it adds behind (EOS)."""
    encode = _encode_content if content else _encode
    ids = encode(tokenizer, text, special=True)
    bare = len(encode(tokenizer, text))
    while len(ids) > bare and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def _encode_content(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False) -> list[int]:
    """As `_encode`, with the special tokens in `text` read as the characters they are made of."""
    if _specials(tokenizer).search(text) is None:
        return _encode(tokenizer, text, special)
    return list(
        tokenizer(text, add_special_tokens=special, verbose=False, split_special_tokens=True)["input_ids"]
    )


def _encode_guarded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of what a template made of `_guarded` turns: its own special tokens are special, the guarded are
    not."""
    ids: list[int] = []
    for index, part in enumerate(re.split(f"{_OPEN}(.+?){_CLOSE}", text, flags=re.DOTALL)):
        if part:
            ids += _encode_content(tokenizer, part) if index % 2 else _encode(tokenizer, part)
    return ids


def _guarded(tokenizer: PreTrainedTokenizerBase, turns: Conversation) -> Conversation:
    """The turns with every special token in their content between guards, and no EOS at the end of a
    reply."""
    pattern = _specials(tokenizer)

    def content(turn: Message) -> str:
        text = turn["content"]
        text = _without_final_eos(tokenizer, text) if turn["role"] == "assistant" else text
        return pattern.sub(lambda match: f"{_OPEN}{match[0]}{_CLOSE}", text)

    return tuple(Message(role=turn["role"], content=content(turn)) for turn in turns)


_patterns: WeakKeyDictionary[Any, tuple[int, re.Pattern[str]]] = WeakKeyDictionary()


def _specials(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """What matches each of the tokenizer's special tokens, and the guards. Found once a tokenizer and
    vocabulary."""
    known = _patterns.get(tokenizer)
    if known is None or known[0] != len(tokenizer):
        added = tokenizer.added_tokens_decoder.values()
        strings = {token.content for token in added if token.special}
        longest_first = sorted(filter(None, strings), key=lambda text: (-len(text), text))
        pattern = re.compile("|".join(map(re.escape, [*longest_first, _OPEN, _CLOSE])))
        known = _patterns[tokenizer] = (len(tokenizer), pattern)
    return known[1]


def _first_id(tokenizer: PreTrainedTokenizerBase) -> int:
    bos = cast("int | None", tokenizer.bos_token_id)
    return eos_id(tokenizer) if bos is None else bos


def _string(value: object) -> str:
    return value if isinstance(value, str) else ""
