"""Talking to a model: `keel chat`."""

from __future__ import annotations

import datetime
from typing import Any

from keel.data import chat
from keel.data.batches import derive_seed
from keel.errors import UsageError
from keel.models.load import ModelSource, causal_lm, context_length, load_tokenizer
from keel.models.tokenizer import knows_conversations
from keel.rollout import GenerationRequest, KeelEngine
from keel.types import Message, Sampling

_UNTAUGHT = (
    "this model was trained on plain text, and turns reach it in keel's default template, a form that it has "
    "not seen: keel.generate asks it with plain text; a stage of kind sft teaches it conversations"
)


class Talk:
    """A conversation that remembers its turns as long as they fit the context."""

    def __init__(
        self, model: str, temperature: float, max_new_tokens: int, seed: int, date: str | None = None
    ) -> None:
        """date: the day that the model's template writes, if it writes one, as 2026-11-28; None: today.
        UsageError for what is no day."""
        self.date = _day(date)
        self.tokenizer: Any = load_tokenizer(model)
        self.model = causal_lm(ModelSource(model), 0).eval()
        known = knows_conversations(self.model.config, self.tokenizer)
        self.note = "" if known else _UNTAUGHT  # for whoever talks
        chat.with_chat_template(self.tokenizer)
        self.sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature)
        self.seed = seed
        self.turns: list[Message] = []
        self.count = 0

    def answer(self, text: str) -> str:
        """The model's reply to one more turn of the user. UsageError if even this turn alone is too long."""
        self.turns.append({"role": "user", "content": text})
        self.count += 1
        limit = context_length(self.model.config)
        prompt = self._prompt()
        while limit is not None and len(prompt) + self.sampling.max_new_tokens > limit:
            if len(self.turns) == 1:
                raise UsageError(
                    f"{len(prompt)} tokens and --max-new-tokens {self.sampling.max_new_tokens} exceed the "
                    f"model's context of {limit}"
                )
            del self.turns[:2]  # the oldest question and its answer
            prompt = self._prompt()
        seed = derive_seed("chat", self.seed, self.count)
        request = GenerationRequest.of(self.tokenizer, [prompt], self.sampling, seed)
        completion = KeelEngine(self.model).generate(request)[0]
        reply = chat.reply_text(self.tokenizer, completion.ids).strip()
        self.turns.append({"role": "assistant", "content": reply})
        return reply

    def _prompt(self) -> list[int]:
        with chat.on_date(self.date, given=self.date is not None):
            return list(chat.prompt_ids(self.tokenizer, tuple(self.turns)))


def _day(text: str | None) -> datetime.date | None:
    try:
        return None if text is None else datetime.date.fromisoformat(text)
    except ValueError:
        raise UsageError(f"--date {text!r} is no day: write it as 2026-11-28") from None
