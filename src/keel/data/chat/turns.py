"""Prompts and replies as tokens: a reply is what a rollout would produce."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from keel.data.chat.encoding import encode_plain, encode_prompt, encode_text, plain_reply_after, reply_after
from keel.data.chat.reply import Reply, end_pattern, reply_end
from keel.data.chat.special import (
    added_vocab,
    eos_id,
    eos_ids,
    first_id,
    without_final_eos,
)
from keel.data.chat.template import Transcript
from keel.errors import DataError, UsageError
from keel.types import Conversation, Message, Prompt, TextRecord


class TextRow(NamedTuple):
    """Tokens (S,) of a row to train on, and the mask (S,) of those that count in the loss."""

    ids: list[int]
    counts: list[bool]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """The tokens a rollout starts from: never empty, never with an EOS added after them.

    Plain text begins with BOS where the tokenizer adds it; a conversation is what its template makes of it,
    with the generation prompt.
    """
    if isinstance(prompt, str):
        return encode_plain(tokenizer, prompt, content=True) or [first_id(tokenizer)]
    transcript = Transcript(tokenizer, prompt)
    text = transcript.text(transcript.render(len(prompt), generation=True))
    return encode_prompt(tokenizer, text) or [first_id(tokenizer)]


def completion_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: str | Conversation
) -> list[int]:
    """The tokens of the response to `prompt`, with the token that ends it as the last one.

    That is EOS for plain text, and for a conversation the token by which the template ends a reply. It is not
    repeated if the text brings it already [trl PR 4908], and what a template writes after it (ChatML's
    newline) is left out, since no rollout would get that far. UsageError if the template leaves out what the
    reply says.
    """
    if isinstance(prompt, str) != isinstance(completion, str):
        raise UsageError("prompt and completion must both be text or both be conversations")
    if isinstance(prompt, str) or isinstance(completion, str):
        text = without_final_eos(tokenizer, str(completion))
        return [*plain_reply_after(tokenizer, str(prompt), text), eos_id(tokenizer)]
    transcript = Transcript(tokenizer, (*prompt, *completion))
    return Reply(transcript, len(prompt)).ids()[1]


def sampled_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: str | Conversation
) -> list[int]:
    """As `completion_ids`, for what another model has sampled, which must never be refused: where the
    template leaves out part of such a reply, its text as it is follows the prompt."""
    try:
        return completion_ids(tokenizer, prompt, completion)
    except UsageError:
        if isinstance(prompt, str) or isinstance(completion, str):
            raise
    transcript = Transcript(tokenizer, (*prompt, *completion))
    asked = transcript.text(transcript.render(len(prompt), generation=True))
    said = transcript.text("\n".join(str(turn["content"]) for turn in transcript.copies[0][len(prompt) :]))
    ids = encode_prompt(tokenizer, asked) or [first_id(tokenizer)]
    return [*reply_after(tokenizer, ids, asked, said), reply_end(tokenizer)]


def text_rows(tokenizer: PreTrainedTokenizerBase, record: TextRecord) -> list[TextRow]:
    """The rows that a text or a conversation is trained as.

    Plain text is one row, counts as a whole, and ends in EOS exactly once; special tokens written in it are
    special. In a conversation the assistant's turns count, each with the token that ends it, save those with
    `weight` 0 or `train` false. A turn follows in the same row where the row's tokens are the first ones of
    what a rollout is asked with at that turn; where the template renders the history otherwise by then, it
    begins a row of its own. DataError for a conversation without an assistant turn that is trained.
    """
    if isinstance(record.text, str):
        ids = encode_plain(tokenizer, without_final_eos(tokenizer, record.text))
        ids.append(eos_id(tokenizer))
        return [TextRow(ids, [True] * len(ids))]
    turns = record.text
    replies = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not replies:
        raise DataError(f'{record.origin}: "messages" has no assistant turn to learn from')
    trained = [i for i in replies if is_trained(turns[i])]
    if not trained:
        raise DataError(
            f'{record.origin}: every assistant turn of "messages" has weight 0: nothing is trained'
        )
    transcript = Transcript(tokenizer, turns)
    rows: list[TextRow] = []
    for index in trained:
        turn = Reply(transcript, index)
        prompt, reply = turn.ids()
        counts = turn.counts(reply)
        if rows and prompt[: len(rows[-1].ids)] == rows[-1].ids:
            row = rows.pop()
            counts = [*row.counts, *[False] * (len(prompt) - len(row.ids)), *counts]
        else:
            counts = [*[False] * len(prompt), *counts]
        rows.append(TextRow(prompt + reply, counts))
    return rows


def text_ids(tokenizer: PreTrainedTokenizerBase, record: TextRecord) -> tuple[list[int], list[bool]]:
    """The row of a record that is trained as one. UsageError for a conversation that becomes several."""
    rows = text_rows(tokenizer, record)
    if len(rows) > 1:
        raise UsageError(
            "the chat template renders earlier turns differently once later ones are there: "
            f"the conversation is {len(rows)} rows"
        )
    return rows[0]


def document_ids(tokenizer: PreTrainedTokenizerBase, record: TextRecord) -> list[int]:
    """Tokens of a text or a whole conversation as one document, which ends in EOS or an end of turn."""
    if isinstance(record.text, str):
        return text_rows(tokenizer, record)[0].ids
    transcript = Transcript(tokenizer, record.text)
    string = transcript.render(len(record.text))
    ends = end_pattern(transcript)
    matches = list(ends.finditer(string))
    if matches and not string[matches[-1].end() :].strip():
        return encode_text(tokenizer, transcript.text(string[: matches[-1].end()]))
    return [*encode_text(tokenizer, transcript.text(string)), eos_id(tokenizer)]


def ending(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the chat template writes at the end of a conversation whose last turn is a reply: the token that
    ends the reply and all behind it (ChatML's newline); nothing where it writes no such token."""
    end = reply_end(tokenizer)
    if not tokenizer.chat_template:
        return (end,)
    transcript = Transcript(
        tokenizer, ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    )
    ids = encode_text(tokenizer, transcript.text(transcript.render(2)))
    last = next((i for i in reversed(range(len(ids))) if ids[i] == end), None)
    return () if last is None else tuple(ids[last:])


def is_trained(turn: Message) -> bool:
    """Whether a reply counts in the loss: not with `weight` 0 or `train` false."""
    return turn.get("train", True) is not False and turn.get("weight", 1) != 0


def stop_ids(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> tuple[int, ...]:
    """Ids that end a response: the tokenizer's EOS first, then every other EOS of the model's files, the
    template's end of a reply, and the stop strings that are special tokens; `stops.stop_texts` has the
    others."""
    special = added_vocab(tokenizer)
    strings = (special[text] for text in stop if text in special)
    return tuple(dict.fromkeys([*eos_ids(tokenizer), reply_end(tokenizer), *strings]))
