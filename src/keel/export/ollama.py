"""A folder that `ollama create` takes: the model as GGUF, and a Modelfile with its template and its stops.

Ollama knows Go templates only. One is made from what the chat template writes around the turns of a
conversation, and used if it gives the same text for conversations of several shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keel.data import chat
from keel.errors import UsageError
from keel.export import gguf_file
from keel.models.load import ModelSource, context_length, load_tokenizer, model_config

FILE = "model.gguf"
SYSTEM, ASKED, SAID, AGAIN = "\ufdd0S\ufdd1", "\ufdd0U\ufdd1", "\ufdd0A\ufdd1", "\ufdd0V\ufdd1"


def write(model: Path, out: Path, dtype: str = "float32", *, name: str = "") -> None:
    """Write the folder. UsageError for what GGUF or Ollama cannot hold."""
    if out.exists():
        raise UsageError(f"{out} is there already; it was not overwritten")
    tokenizer = load_tokenizer(str(model))
    text = modelfile(tokenizer, context_length(model_config(ModelSource(str(model)))))
    gguf_file.write(model, out / FILE, dtype, name=name)
    (out / "Modelfile").write_text(text, encoding="utf-8")


def modelfile(tokenizer: Any, context: int | None) -> str:
    """The Modelfile. UsageError for a chat template that Ollama cannot have."""
    turns = Turns.of(tokenizer)
    stops = [tokenizer.convert_ids_to_tokens(i) for i in chat.stop_ids(tokenizer, ())]
    lines = [f"FROM ./{FILE}", f'TEMPLATE """{turns.as_go()}"""']
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops]
    lines += [f"PARAMETER num_ctx {context}"] if context else []
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


@dataclass(frozen=True, slots=True)
class Turns:
    """What a chat template writes around what is said, by who says it."""

    system: tuple[str, str] | None  # before and behind; None where it refuses one
    user: tuple[str, str]
    assistant: tuple[str, str]
    asks: str  # the generation prompt

    @classmethod
    def of(cls, tokenizer: Any) -> Turns:
        """Read off what it writes. UsageError where turns are not simply one after the other."""
        bos = str(tokenizer.bos_token or "")
        adds = list(tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id]

        def rendered(turns: Sequence[tuple[str, str]], *, ask: bool) -> str:
            messages = [{"role": role, "content": content} for role, content in turns]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
            return text.removeprefix(bos) if adds and bos else text

        user, said = ("user", ASKED), ("assistant", SAID)
        try:
            asks = _rest(rendered([user], ask=True), rendered([user], ask=False))
            first = _around(rendered([user], ask=False), ASKED)
            longer = rendered([user, said, ("user", AGAIN)], ask=False)
            middle = _rest(longer, rendered([user], ask=False))
            before, behind = _around(middle[: -len(AGAIN + first[1])], SAID)
            behind = behind.removesuffix(first[0])
        except Exception as error:
            raise UsageError(f"ollama: the chat template is no row of turns: {error}") from None
        try:
            whole = rendered([("system", SYSTEM), user], ask=False)
            system = _around(whole[: -len("".join((first[0], ASKED, first[1])))], SYSTEM)
        except Exception:  # templates refuse by any error
            system = None
        found = cls(system, first, (before, behind), asks)
        found._check(rendered)
        return found

    def _check(self, rendered: Any) -> None:
        """UsageError unless the pieces give what the template gives."""
        one = [("user", "What is it?"), ("assistant", "A fox."), ("user", "Which?")]
        conversations = [one[:1], one, [*one, ("assistant", "Red."), ("user", "And?")]]
        if self.system is not None:
            conversations += [[("system", "Be brief."), *turns] for turns in conversations]
        for turns in conversations:
            if self.text(turns) != rendered(turns, ask=True):
                raise UsageError(
                    "ollama: the chat template is no row of turns, which is all that a template of Ollama's "
                    "can be; use --to gguf, which carries the template itself"
                )

    def text(self, turns: Sequence[tuple[str, str]]) -> str:
        """A conversation as these pieces write it, up to where the model goes on."""
        pieces = {"system": self.system or ("", ""), "user": self.user, "assistant": self.assistant}
        return "".join(content.join(pieces[role]) for role, content in turns) + self.asks

    def as_go(self) -> str:
        """As a template of Ollama's."""
        parts = [("user", self.user), ("assistant", self.assistant)]
        if self.system is not None:
            parts.insert(0, ("system", self.system))
        cases = [
            f'{{{{ {"if" if number == 0 else "else if"} eq .Role "{role}" }}}}{_go(before)}{{{{ .Content }}}}'
            f"{_go(behind)}"
            for number, (role, (before, behind)) in enumerate(parts)
        ]
        return "{{ range .Messages }}" + "".join(cases) + "{{ end }}{{ end }}" + _go(self.asks)


def _go(text: str) -> str:
    """Text that stands for itself in a Go template within three quotes."""
    if '"""' in text:
        raise UsageError("ollama: the chat template writes three quotes, which no Modelfile can hold")
    return text.replace("{{", '{{ "{{" }}') if "{{" in text else text


def _around(text: str, content: str) -> tuple[str, str]:
    before, found, behind = text.partition(content)
    if not found:
        raise ValueError("it leaves out or changes what is said")
    return before, behind


def _rest(longer: str, shorter: str) -> str:
    if not longer.startswith(shorter):
        raise ValueError("a longer conversation does not begin as a shorter one")
    return longer[len(shorter) :]
