"""What a model's own files say of it, read once, and said in plain words for `keel plan` and `keel doctor`.

Config (the text part of a nested one), generation_config, tokenizer and chat template each know a part: which
tokens end a turn, which one pads, who writes BOS, how many ids there are, how far the model sees.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from keel.accel.batch_layout import WINDOWS
from keel.accel.layer_kinds import carries_state
from keel.data import chat
from keel.errors import UsageError
from keel.models.load import ModelSource, context_length, load_tokenizer, model_config
from keel.models.tokenizer import knows_conversations


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model as its files describe it. Token ids come with the text that they stand for."""

    model_type: str
    context: int | None  # tokens; None: the config does not say
    layers: dict[str, int]  # kind of attention or mixer → how many layers; empty: the config does not say
    window: int | None  # tokens that a windowed or chunked layer sees; None: every layer sees all
    embeddings: int  # rows of the embeddings
    tokens: int  # ids that the tokenizer knows
    eos: tuple[tuple[int, str], ...]  # the tokenizer's first, then those of config and generation_config
    reply_end: tuple[int, str]  # what keel trains as the end of a reply
    stops: tuple[tuple[int, str], ...]  # what ends a rollout
    pad: tuple[int, str] | None  # None: EOS is used
    bos: tuple[int, str] | None
    tokenizer_adds_bos: bool
    template: chat.TemplateFacts | None  # None: the tokenizer has no chat template
    template_error: str  # why the template cannot be used; "" where it can
    tags: tuple[str, ...]  # special tokens that stand within replies, as <think>
    carries_state: bool  # some layers hand a state from token to token
    knows_conversations: bool = True  # False: keel trained it on plain text alone

    def describe(self) -> list[str]:
        """Lines for people: each fact, and what keel does about it where that is not plain."""
        lines = [f"model type {self.model_type}", self._context(), self._vocabulary()]
        lines.append(f"EOS: {_listed(self.eos)}")
        others = [stop for stop in self.stops if stop != self.reply_end]
        lines.append(
            f"a reply ends with {_named(self.reply_end)}, which is trained"
            + (f"; a rollout stops at {_listed(others)} as well" if others else "")
        )
        lines.append("pad: none of its own, EOS is used" if self.pad is None else f"pad: {_named(self.pad)}")
        lines.append(self._bos())
        return [*lines, *self._template(), *reading(self.carries_state, self.window, self.context)]

    def _context(self) -> str:
        seen = (
            "context: the config does not say"
            if self.context is None
            else f"context: {self.context:,} tokens"
        )
        if self.layers:
            seen += "; layers: " + ", ".join(f"{count} {kind}" for kind, count in self.layers.items())
        return seen + (f"; a window of {self.window:,} tokens" if self.window is not None else "")

    def _vocabulary(self) -> str:
        counts = f"vocabulary: {self.embeddings:,} rows of embeddings, {self.tokens:,} tokens"
        if self.tokens > self.embeddings:
            return f"{counts}: the tokenizer is longer, and its last tokens have no row"
        spare = self.embeddings - self.tokens
        return f"{counts}; {spare:,} rows stand for no token" if spare else counts

    def _bos(self) -> str:
        if self.bos is None:
            return "BOS: none"
        template = "writes it" if self.template is not None and self.template.writes_bos else "writes none"
        tokenizer = "adds it" if self.tokenizer_adds_bos else "adds none"
        where = (
            f"the template {template}, and nothing is added to it" if self.template else "no chat template"
        )
        return f"BOS: {_named(self.bos)}; to plain text the tokenizer {tokenizer}; {where}"

    def _template(self) -> list[str]:
        if self.template_error:
            return [f"chat template: cannot be used: {self.template_error}"]
        if self.template is None:
            return ["chat template: none; conversations are given keel's own"]
        facts, lines = self.template, ["chat template: its own"]
        if not self.knows_conversations:
            lines.append("it was trained on plain text, and has seen no conversation in this template")
        if facts.refuses:
            lines.append(f"it refuses a plain conversation: {facts.refuses}")
        if not facts.end:
            lines.append("it writes no token at the end of a reply; EOS is added")
        elif not facts.writes_end:
            lines.append(f"it writes nothing behind a last reply; {facts.end}, which comes next, is its end")
        if facts.opens:
            lines.append(f"its generation prompt opens a thought ({facts.opens}): replies begin within it")
        if facts.marks:
            lines.append("it marks what the assistant says ({% generation %})")
        if facts.as_parts:
            lines.append("it takes contents as lists of parts")
        if self.tags:
            lines.append(f"tags that are special tokens in replies: {' '.join(self.tags)}")
        return lines


def reading(
    state: bool, window: int | None, limit: int | None, *, packing: bool = True, sampling: bool = True
) -> list[str]:
    """What keel does with layers that do not simply attend to all tokens before, where it packs examples or
    samples. state: whether some hand a state from token to token. limit: tokens of the longest row; None:
    unknown."""
    lines: list[str] = []
    if packing and state:
        lines.append(
            "packing is refused: layers hand a state from token to token, also from one example of a row to "
            "the next"
        )
    if packing and not state and window is not None and (limit is None or window < limit):
        lines.append(
            f"packing: examples of more than {window:,} tokens are read by their positions, which keeps "
            "windows; tried before training"
        )
    if sampling and state:
        lines.append(
            "rollouts: by the cache that the model makes itself, in groups of rows that are equally far"
        )
    return lines


def reading_of(config: PreTrainedConfig, longest: int | None, *, packing: bool, sampling: bool) -> list[str]:
    """`reading`, of a config. longest: tokens of a row, where something bounds them below the context."""
    limit = longest or context_length(config)
    window = _window(config.get_text_config())
    return reading(carries_state(config), window, limit, packing=packing, sampling=sampling)


def read_facts(path: str, *, trust_remote_code: bool = False, revision: str | None = None) -> ModelFacts:
    """The facts of a model directory or hub id, without loading weights. UsageError where there is none."""
    source = ModelSource(path, trust_remote_code=trust_remote_code, revision=revision)
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code, revision=revision)
    return facts_of(model_config(source), tokenizer)


def facts_of(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> ModelFacts:
    """The facts of a config and a tokenizer that `load_tokenizer` has read."""
    text = config.get_text_config()
    template, error = None, ""
    if tokenizer.chat_template:
        try:
            template = chat.template_facts(tokenizer)
        except UsageError as found:
            error = str(found)
    end = chat.eos_id(tokenizer) if error else chat.reply_end(tokenizer)
    stops = chat.eos_ids(tokenizer) if error else chat.stop_ids(tokenizer, ())
    added = list(cast(Any, tokenizer("a")["input_ids"]))
    bos = cast("int | None", tokenizer.bos_token_id)
    return ModelFacts(
        model_type=config.model_type, context=context_length(text), layers=_layers(text),
        window=_window(text),
        embeddings=text.vocab_size, tokens=len(tokenizer), eos=_with_text(tokenizer, chat.eos_ids(tokenizer)),
        reply_end=_with_text(tokenizer, [end])[0], stops=_with_text(tokenizer, stops),
        pad=next(iter(_with_text(tokenizer, _given(tokenizer.pad_token_id))), None),
        bos=next(iter(_with_text(tokenizer, _given(bos))), None),
        tokenizer_adds_bos=bool(added) and added[0] == bos,
        template=template, template_error=error, tags=tuple(sorted(template.tags)) if template else (),
        carries_state=carries_state(config), knows_conversations=knows_conversations(config, tokenizer),
    )  # fmt: skip


def _given(token: Any) -> list[int]:
    return [] if token is None else [token]


def _layers(config: PreTrainedConfig) -> dict[str, int]:
    kinds: Sequence[str] = (
        getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    )
    return {kind.replace("_", " "): count for kind, count in Counter(kinds).items()}


def _window(config: PreTrainedConfig) -> int | None:
    """Tokens that its windowed layers see; None where all see everything."""
    kinds = getattr(config, "layer_types", None)
    if getattr(config, "use_sliding_window", True) is False:
        return None
    if kinds is not None and not any("sliding" in kind or "chunked" in kind for kind in kinds):
        return None
    sizes = (getattr(config, name, None) for name in WINDOWS)
    return next((size for size in sizes if isinstance(size, int)), None)


def _with_text(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> tuple[tuple[int, str], ...]:
    return tuple((i, str(tokenizer.convert_ids_to_tokens(i))) for i in ids)


def _named(token: tuple[int, str]) -> str:
    return f"{token[1]} ({token[0]})"


def _listed(tokens: Iterable[tuple[int, str]]) -> str:
    return ", ".join(map(_named, tokens))
