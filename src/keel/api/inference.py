# pyright: strict
"""`keel.RewardModel` and `keel.generate`: trained models at work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal, cast, overload

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keel.data import chat, stops
from keel.errors import UsageError
from keel.models.load import ModelSource, causal_lm, is_classifier, load_tokenizer, model_config
from keel.models.shared_vocabulary import copied
from keel.rewards import learned
from keel.rollout import engine
from keel.types import Conversation, Message, Prompt, Sampling

Turns = Sequence[Mapping[str, str]]  # messages: [{"role": "user", "content": "…"}, …]
Text = str | Turns
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
ROLES = ("system", "user", "assistant")


class RewardModel:
    """A trained reward model, or an ensemble of them: it says how good a completion is."""

    def __init__(
        self,
        path: str | PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: Dtype = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        """path: a folder with a model, a stage of a run (runs/NAME/stages/STAGE), or a hub id; any sequence
        classifier with one output will do. device: None is CUDA where there is one. dtype: "auto" keeps
        weights in float32 and computes in bfloat16 on hardware that is fast in it.

        UsageError for a language model, a classifier with several labels, and a model that lacks weights.
        """
        self.path = _model_folder(path)
        self.device = _device(device)
        config = model_config(ModelSource(self.path, trust_remote_code=trust_remote_code))
        if is_classifier(config) and config.num_labels > 1:
            labels = ", ".join(str(label) for label in config.id2label.values())
            raise UsageError(
                f"{self.path!r} is a classifier of {config.num_labels} labels ({labels}), not a reward "
                "model, which has one output; in a config it is a reward of kind `classifier` with a `label`"
            )
        self._members = learned.load_members(
            self.path, device=self.device, dtype=dtype, trust_remote_code=trust_remote_code
        )

    def __repr__(self) -> str:
        ensemble = f", {self.members} members" if self.members > 1 else ""
        return f"RewardModel({self.path!r}{ensemble})"

    @property
    def members(self) -> int:
        """How many reward models it is made of: 1 but for an ensemble."""
        return len(self._members)

    def score(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        *,
        combine: Literal["mean", "min", "mean_minus_std"] = "mean",
        std_penalty: float = 1.0,
        batch_size: int = 64,
    ) -> list[float]:
        """(B,) prompts and completions → (B,) scores, as a run logs them under `rewards/NAME`.

        A single model gives its raw score, which has no unit: only differences on one prompt mean something.
        An ensemble gives what `combine` makes of its members' scores, each on the scale of its SFT samples:
        their mean, the worst case, or mean − std_penalty·std (2310.02743).

        A prompt is text or messages; a completion is text, or messages where the prompt is. To a model that
        keel trained on conversations alone, a text is the user's turn: "Hello" scores as
        [{"role": "user", "content": "Hello"}] does. Each counts as a whole response, its end of sequence
        included. Sequences longer than the model's context lose the start
        of their prompt. UsageError for lists of different lengths, and for a completion too long by itself.
        """
        if self.members == 1 and (combine != "mean" or std_penalty != 1.0):
            raise UsageError("`combine` and `std_penalty` have no effect: this is a single reward model")
        if std_penalty != 1.0 and combine != "mean_minus_std":
            raise UsageError('`std_penalty` has no effect without combine="mean_minus_std"')
        scores = self._scores(prompts, completions, batch_size)
        return _floats(scores[0] if self.members == 1 else learned.combined(scores, combine, std_penalty))

    def member_scores(
        self, prompts: Sequence[Text], completions: Sequence[Text], *, batch_size: int = 64
    ) -> list[list[float]]:
        """M lists of (B,) scores, one a member; arguments as in `score`. The members of an ensemble are each
        on the scale of their SFT samples, so where they differ they disagree."""
        return [_floats(scores) for scores in self._scores(prompts, completions, batch_size)]

    def _scores(self, prompts: Sequence[Text], completions: Sequence[Text], batch_size: int) -> torch.Tensor:
        """(M, B)."""
        _check_list(prompts, "prompts")
        _check_list(completions, "completions")
        if len(prompts) != len(completions):
            raise UsageError(f"{len(prompts)} prompts and {len(completions)} completions: one for each")
        if not prompts:
            return torch.zeros(self.members, 0)
        pairs = [_pair(i, *both) for i, both in enumerate(zip(prompts, completions))]
        scores: list[torch.Tensor] = []
        for member in self._members:
            chat.with_chat_template(member.tokenizer)
            asked = (learned.as_trained(member, *pair) for pair in pairs)
            encoded = [learned.encode(member, prompt, completion) for prompt, completion in asked]
            raw = learned.score(member, encoded, batch_size=batch_size)
            scores.append(raw if self.members == 1 else (raw - member.mean) / member.std)
        return torch.stack(scores)


@overload
def generate(
    model: str | PathLike[str] | PreTrainedModel,
    prompts: Sequence[Text],
    *,
    n: None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    dtype: Dtype = "auto",
    trust_remote_code: bool = False,
) -> list[str]: ...


@overload
def generate(
    model: str | PathLike[str] | PreTrainedModel,
    prompts: Sequence[Text],
    *,
    n: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    dtype: Dtype = "auto",
    trust_remote_code: bool = False,
) -> list[list[str]]: ...


def generate(
    model: str | PathLike[str] | PreTrainedModel,
    prompts: Sequence[Text],
    *,
    n: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    dtype: Dtype = "auto",
    trust_remote_code: bool = False,
) -> list[str] | list[list[str]]:
    """A completion of each prompt; with `n`, a list of n for each.

    model: a folder, a stage of a run, a hub id, or a loaded model of transformers with its `tokenizer`
    (faster, where it is asked often; neither is changed). A prompt is text, or messages, which go through the
    chat template. temperature 0 is greedy. stop: strings that end a completion, besides EOS; they are left
    out of its text. The same arguments give the same texts, and a prompt's do not depend on the others'
    texts. device, dtype and trust_remote_code are for a model that is loaded here; see `RewardModel`.

    UsageError for settings out of range or without effect, and for a prompt that leaves no room in the
    context.
    """
    _check_list(prompts, "prompts")
    copies = 1 if n is None else n
    if copies < 1:
        raise UsageError(f"n must be 1 or more, not {n}")
    if copies > 1 and temperature == 0:
        raise UsageError("n has no effect at temperature 0: greedy decoding gives the same text n times")
    turns = [_prompt(i, prompt) for i, prompt in enumerate(prompts)]
    sampling = _sampling(max_new_tokens, temperature, top_p, top_k, min_p, stop)
    network, words = _opened(model, tokenizer, device, dtype, trust_remote_code)
    asked = [chat.prompt_ids(words, prompt) for prompt in turns for _ in range(copies)]
    texts = _sampled(network, words, asked, sampling, seed, batch_size) if asked else []
    if n is None:
        return texts
    return [texts[i : i + n] for i in range(0, len(texts), n)]


# ---------------------------------------------------------------- parts


def _sampled(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seed: int,
    batch_size: int,
) -> list[str]:
    """The engine's texts: the one place of this package that calls it."""
    completions = engine.generate(
        model,
        prompts,
        sampling,
        stop_ids=chat.stop_ids(tokenizer, sampling.stop),
        stop_texts=stops.stop_texts(tokenizer, sampling.stop),
        pad_id=chat.ensure_pad(tokenizer),
        seed=seed,
        batch_size=batch_size,
    )
    return [engine.text_of(tokenizer, completion) for completion in completions]


def _opened(
    model: str | PathLike[str] | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    device: str | torch.device | None,
    dtype: Dtype,
    trust_remote_code: bool,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The network and a tokenizer of our own, with a chat template."""
    if isinstance(model, (str, PathLike)):
        place = _model_folder(model)
        words = tokenizer or load_tokenizer(place, trust_remote_code=trust_remote_code)
        network = causal_lm(ModelSource(place, dtype=dtype, trust_remote_code=trust_remote_code), 0)
        return network.to(_device(device)).eval(), chat.with_chat_template(copied(words))
    if tokenizer is None:
        raise UsageError("a loaded model needs its `tokenizer`")
    if device is not None or dtype != "auto":
        raise UsageError("`device` and `dtype` have no effect on a model that is loaded already")
    return model, chat.with_chat_template(copied(tokenizer))


def _sampling(
    max_new_tokens: int, temperature: float, top_p: float, top_k: int, min_p: float, stop: Sequence[str]
) -> Sampling:
    """Checked settings."""
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens must be 1 or more, not {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise UsageError(f"temperature must be 0 or more, not {temperature}")
    if not 0 < top_p <= 1:
        raise UsageError(f"top_p must be in (0, 1], not {top_p}")
    if top_k < 0:
        raise UsageError(f"top_k must be 0 (off) or more, not {top_k}")
    if not 0 <= min_p < 1:
        raise UsageError(f"min_p must be in [0, 1), not {min_p}")
    if isinstance(stop, str):
        raise UsageError(f"stop is a list of strings: write [{stop!r}]")
    return Sampling(max_new_tokens, temperature, top_p, top_k, min_p, tuple(stop))


def _floats(scores: torch.Tensor) -> list[float]:
    return [float(score) for score in scores]


def _device(device: str | torch.device | None) -> torch.device:
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {str(name)!r} cannot be used: {str(error).splitlines()[0]}") from None
    return torch.device(name)


def _model_folder(path: str | PathLike[str]) -> str:
    """What from_pretrained takes: of a stage's directory the model in it."""
    inside = Path(path) / "model"
    return str(inside) if (inside / "config.json").exists() else fspath(path)


def _check_list(values: Sequence[Text], what: str) -> None:
    if isinstance(values, (str, Mapping)):
        raise UsageError(f"{what} is a list, not a single one: write [{what.removesuffix('s')}]")
    if values and isinstance(values[0], Mapping):
        raise UsageError(f"{what} is a list of conversations, not one: write [messages]")


def _pair(i: int, prompt: Text, completion: Text) -> tuple[Prompt, str | Conversation]:
    """A prompt and its completion in one form: text stays text, a reply to a conversation is a message."""
    asked = _prompt(i, prompt)
    if isinstance(completion, str):
        if isinstance(asked, str):
            return asked, completion
        return asked, (Message(role="assistant", content=completion),)
    if isinstance(asked, str):
        raise UsageError(f"completion {i} is a conversation, but its prompt is text")
    return asked, _turns(f"completion {i}", completion)


def _prompt(i: int, prompt: Text) -> Prompt:
    if isinstance(prompt, str):
        return prompt
    turns = _turns(f"prompt {i}", prompt)
    if turns[-1]["role"] == "assistant":
        raise UsageError(f"prompt {i} ends with the assistant's turn: there is nothing to answer")
    return turns


def _turns(where: str, turns: Sequence[Any]) -> Conversation:
    """Messages as keel holds them. UsageError for anything else."""
    checked: list[Message] = []
    for turn in turns:
        fields = cast("Mapping[str, Any]", turn) if isinstance(turn, Mapping) else None
        role, content = (None, None) if fields is None else (fields.get("role"), fields.get("content"))
        if role not in ROLES or not isinstance(content, str):
            raise UsageError(
                f'{where}: a message is {{"role": one of {", ".join(ROLES)}, "content": text}}, not {turn!r}'
            )
        checked.append(Message(role=role, content=content))
    if not checked:
        raise UsageError(f"{where} has no messages")
    return tuple(checked)
