"""Values that travel between keel's parts: records of data, rollouts, errors.

Every value is frozen. Every tensor field says its shape and symbol; B counts sequences, S positions of
`prompt + response` (right-padded), T positions of the response alone. A mask is True where it counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:  # a config and a report need no torch
    from torch import Tensor


class _Turn(TypedDict):
    role: str
    content: str


class Message(_Turn, total=False):
    """One turn of a conversation, in the form of the Hugging Face chat templates.

    Keys that are not named here are kept, and reach the template too. What belongs to the whole conversation,
    `tools` and `chat_template_kwargs`, rides on its first turn.
    """

    reasoning_content: str  # the thought before the reply; `thinking` and `reasoning` are other names for it
    thinking: str
    reasoning: str
    tool_calls: Sequence[Mapping[str, Any]]
    tool_call_id: str
    name: str
    weight: float  # 0: an assistant turn that is not in the loss
    train: bool  # False: the same
    tools: Sequence[Mapping[str, Any]]
    chat_template_kwargs: Mapping[str, Any]  # as enable_thinking


Conversation = tuple[Message, ...]
Prompt = str | Conversation  # what the model is given: plain text, or turns that end with the user's
RecordType = Literal["text", "prompt", "demonstration", "preference", "unpaired"]
StopReason = Literal["eos", "stop", "length", "turns", "tool"]
"""What ended a response: EOS; another stop token or string; its most tokens; of an episode with tools, its
most turns; a tool that failed (`on_tool_error: end`)."""


@dataclass(frozen=True, slots=True)
class Vote:
    """One annotator's judgement of a pair."""

    annotator: str
    choice: Literal["chosen", "rejected", "tie"]


@dataclass(frozen=True, slots=True)
class TextRecord:
    """Language modelling: plain text, or a whole conversation (`messages`)."""

    text: str | Conversation
    columns: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""  # where the row came from, "file.jsonl:12"


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """Prompt-only. `columns` holds the row's other columns; reward functions receive them."""

    prompt: Prompt
    columns: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""


@dataclass(frozen=True, slots=True)
class DemonstrationRecord:
    """Prompt-completion: what a good answer looks like."""

    prompt: Prompt
    completion: str | Conversation
    columns: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""


@dataclass(frozen=True, slots=True)
class PreferenceRecord:
    """A comparison. The votes are kept as they were given; `p_chosen` is the share that preferred
    `chosen`."""

    prompt: Prompt
    chosen: str | Conversation
    rejected: str | Conversation
    p_chosen: float | None = None  # in [0, 1]; ties count one half; None when nobody's votes are known
    margin: float | None = None  # how much better, in reward units; None when unknown
    votes: tuple[Vote, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""


@dataclass(frozen=True, slots=True)
class UnpairedRecord:
    """One completion with a thumb up (True) or down (False)."""

    prompt: Prompt
    completion: str | Conversation
    label: bool = True
    columns: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""


Record = TextRecord | PromptRecord | DemonstrationRecord | PreferenceRecord | UnpairedRecord


@dataclass(frozen=True, slots=True)
class DataSource:
    """One source of rows, in plain values: what `config.py` validates and `data/load.py` reads."""

    source: str  # a path, a hub id, world:NAME/SPLIT, gym:NAME or label:PROJECT
    rows: int | None = None  # at most this many rows (how many to make, for a world)
    weight: float | None = None  # share in a mixture; None: as many rows as the source has
    split: str = "train"  # split of a hub data set
    columns: Mapping[str, str] = field(default_factory=dict)  # keel's column name → the file's
    rewrite: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # column → pattern → replacement
    system: str | None = None  # a system turn before every prompt; plain prompts become conversations
    on_bad: Literal["error", "skip"] = "error"
    strict: bool = False  # unknown columns and keys of turns are refused
    format: str | None = None  # a name in `data.formats`; None: by the columns, "keel": rows as they are
    verdicts: Mapping[str, Any] | None = None  # judged rows as questions (`data.verdicts`)
    pairs: Mapping[str, Any] | None = None  # how two replies and a label are a pair (`data.formats.labelled`)
    ties: Literal["skip", "keep"] = "skip"  # what a format does with pairs without a better side
    options: Mapping[str, Any] = field(default_factory=dict)  # a world's own settings, a project's
    where: Mapping[str, str] = field(
        default_factory=dict
    )  # the source's column → the value its rows must have


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn. `temperature` 0 means greedy."""

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()  # strings that end a response, besides EOS
    vocab: int | None = None  # ids from here on stand for no token and are never drawn; None: every id may be


@dataclass(frozen=True, slots=True)
class Dialogue:
    """What happened in a response of several turns with tools: who wrote which token, and what was said."""

    own: tuple[bool, ...]  # (T,) True at the model's own tokens; what tools answered is context
    ends: tuple[int, ...]  # where in (T,) the last token of each of the model's turns stands
    turns: Conversation  # the model's, with their tool_calls, and the tools' answers, in order
    calls: int = 0  # of tools that were run, or could not be
    failures: int = 0  # of those that raised, took too long, were unknown or could not be read
    reward: float | None = None  # what the environment said at the end, where it was asked
    turn_rewards: tuple[float, ...] = ()  # what it said after each turn, where it was asked
    unheard: Conversation = ()  # what tools answered last, where that left no tokens to go on with

    @property
    def happened(self) -> Conversation:
        """All that was said, also what the model was not shown."""
        return (*self.turns, *self.unheard)


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled response as the engine saw it: token ids, never text."""

    prompt_ids: tuple[int, ...]
    # response tokens; the last one is the stop token, or holds the end of the stop string, unless stop_reason
    # is "length"
    ids: tuple[int, ...]
    stop_reason: StopReason
    logp: tuple[
        float, ...
    ] = ()  # log of the probability each response token was drawn with, by the sampler's own logits
    stop: str = ""  # the string in its text that ended it, where it was no token of its own
    # (N, d) what the sampler's head was given for each of the model's own tokens, while it is of use
    hidden: Tensor | None = field(default=None, compare=False, repr=False)
    dialogue: Dialogue | None = None  # of an episode with tools; None: every token is the model's own

    @property
    def ended(self) -> bool:
        """Whether it ended by itself, with a stop token; False for one that was cut off, which had no tokens
        or no turns left."""
        return self.stop_reason not in ("length", "turns")

    @property
    def own_ids(self) -> tuple[int, ...]:
        """(N,) the tokens that the model itself wrote, in order."""
        if self.dialogue is None:
            return self.ids
        return tuple(token for token, own in zip(self.ids, self.dialogue.own, strict=True) if own)


@dataclass(frozen=True, slots=True)
class Episodes:
    """A batch of scored rollouts, ready for the update. Everything is from before the first gradient step."""

    ids: Tensor  # (B, S) prompt + response, right-padded
    prompt_lengths: Tensor  # (B,) tokens of each prompt
    # (B, T) True at response tokens, the stop token included; of an episode with tools at the model's own
    mask: Tensor
    logp: Tensor  # (B, T) log π_old(a_t | s_t)
    ref_logp: Tensor  # (B, T) log π_ref(a_t | s_t)
    values: Tensor  # (B, T) V_old(s_t)
    rewards: Tensor  # (B, T) shaped rewards r_t
    advantages: Tensor  # (B, T) Â_t
    returns: Tensor  # (B, T) R_t; zeros without a critic
    weights: Tensor | None = None  # (B, T) truncated importance weights min(π_trainer/π_sampler, cap)
    logp_from_sampler: bool = False  # whether `logp` are the numbers that the tokens were drawn with
