"""A reward model as a reward: it scores completions, by token ids if it has the policy's tokenizer, else by
text."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import huggingface_hub
import torch
from torch import Tensor

from keel.accel import batch_layout
from keel.accel.cpu_linear import cast_cache
from keel.data import chat
from keel.data.batches import by_length, length_mask, pad
from keel.distributed import sharded
from keel.errors import UsageError
from keel.models.load import (
    ModelSource,
    context_length,
    is_classifier,
    load_tokenizer,
    model_config,
    score_head,
    scorer,
)
from keel.models.logprobs import head_dtype, scores_at
from keel.models.precision import computing
from keel.models.quantize import rest_in
from keel.types import Conversation, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_TRIED, _TOLERANCE = 8, 2e-2  # tokens of the trial; what half precision may round
# What a model reads for one text: input_ids, and token_type_ids for some encoders.
Inputs = dict[str, list[int]]
Form = Literal["text", "conversations", "both"]  # of the comparisons that a reward model was trained on


@dataclass(frozen=True, slots=True)
class Reading:
    """How a decoder that was trained elsewhere (by TRL 1.16, say) is asked: with all that its template writes
    of a conversation, and read where transformers' own class reads it, at the last token that is no pad."""

    ending: tuple[int, ...]  # what its template writes at a reply's end, in place of the end alone
    pad: int | None  # of its config; None: read at the last token


@dataclass(frozen=True, slots=True)
class RewardModel:
    """r_φ, its tokenizer, its scale, and where it is read.

    The Bradley–Terry loss fixes differences of scores only, so the scale is set afterwards, by the scores of
    samples of the SFT model.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    mean: float = 0.0  # of the scores of SFT samples
    std: float = 1.0
    scaled: bool = False  # whether it was given a scale; without one, mean 0 and std 1 say nothing
    reading: Reading | None = None  # None: as keel trains one, read at the token that ends a reply
    prompts: Form | None = None  # what it was trained on; None: nothing says it

    @property
    def is_encoder(self) -> bool:
        """Whether it reads prompt and completion as a pair of texts (BERT-type), not as one sequence."""
        return score_head(self.model) is None


def load(
    path: str,
    *,
    device: torch.device,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    seed: int = 0,
    quantize: str | None = None,
) -> RewardModel:
    """A trained reward model from a directory or hub id. UsageError if it has no trained score head, more
    than one output, or lacks any of its weights."""
    dtype = rest_in(dtype) if quantize else dtype
    source = ModelSource(path, dtype=dtype, trust_remote_code=trust_remote_code, quantize=quantize)
    return wrap(
        scorer_of_trained(source, seed).to(device).eval(),
        load_tokenizer(path, trust_remote_code=trust_remote_code),
    )


def load_members(
    path: str,
    *,
    device: torch.device,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    quantize: str | None = None,
) -> list[RewardModel]:
    """A reward model, or all members of an ensemble: the model in `path` itself and those in
    `path`/members/2, 3 …, which are downloaded if `path` is a hub id. UsageError, also offline, if one of
    them is missing."""
    source = ModelSource(path, trust_remote_code=trust_remote_code)
    return [
        load(folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code, quantize=quantize)
        for folder in (path, *other_members(model_config(source), path))
    ]


def other_members(config: PreTrainedConfig, path: str) -> list[str]:
    """The folders of an ensemble's members 2, 3 …; `config` is the first member's, which says how many there
    are. UsageError if one is missing."""
    count = (getattr(config, "keel_reward", None) or {}).get("members", 1)
    folder = Path(path)
    if not folder.is_dir() and count > 1:
        folder = _downloaded(path, count)
    member_folders = [
        member for member in (folder / "members").glob("*") if (member / "config.json").is_file()
    ]
    numbers = sorted(int(member.name) for member in member_folders if member.name.isdigit())
    missing = next((number for number in range(2, count + 1) if number not in numbers), None)
    if missing is not None:
        raise UsageError(
            f"{path!r} is an ensemble of {count} reward models, but member {missing} is not there "
            f"(members/{missing}); bring the whole folder"
        )
    return [str(folder / "members" / str(number)) for number in numbers]


def _downloaded(path: str, count: int) -> Path:
    """A hub model's snapshot with the members of an ensemble in it; offline, what the cache has of it."""
    try:
        return Path(huggingface_hub.snapshot_download(path, allow_patterns=["members/*"]))
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"{path!r} is an ensemble of {count} reward models, but its members cannot be downloaded: "
            f"{reason}"
        ) from error


def combined(
    scores: Tensor, combine: Literal["mean", "min", "mean_minus_std"], std_penalty: float = 1.0
) -> Tensor:
    """(M, B) normalised scores of M members → (B,): what the ensemble says (2310.02743).

    mean; the worst case, min; or mean − λ·std with λ = `std_penalty` and the population's standard
    deviation: where the members disagree, some of them are wrong.
    """
    match combine:
        case "mean":
            return scores.mean(dim=0)
        case "min":
            return scores.amin(dim=0)
        case "mean_minus_std":
            return scores.mean(dim=0) - std_penalty * scores.std(dim=0, correction=0)


def scorer_of_trained(source: ModelSource, seed: int) -> Any:
    """A sequence-classification model as it was saved; UsageError for a language model without a trained
    head."""
    check_config(model_config(source), str(source.path))
    return scorer(source, seed)


def check_config(config: PreTrainedConfig, path: str) -> None:
    """UsageError unless this is the config of a sequence classifier with one output."""
    if not is_classifier(config):
        kinds = getattr(config, "architectures", None) or []
        raise UsageError(
            f"{path!r} is no reward model (its architecture is {', '.join(kinds) or 'unknown'}): train one "
            "with a reward stage"
        )
    if config.num_labels != 1:
        raise UsageError(f"{path!r} has {config.num_labels} outputs; a reward model has 1")


def wrap(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> RewardModel:
    """With the scale that keel's reward stage left in the model's config (`keel_reward`); `scaled` says if it
    did. A decoder without is read as transformers reads it; UsageError where that cannot be."""
    scale = getattr(model.config, "keel_reward", None)
    if scale is None:
        if score_head(model) is None:
            return RewardModel(model, tokenizer)
        pad = model.config.get_text_config().pad_token_id
        reward = RewardModel(model, tokenizer, reading=Reading(chat.ending(tokenizer), pad))
        _check_reading(reward)
        return reward
    mean, std, prompts = float(scale["mean"]), float(scale["std"]), scale.get("prompts")
    return RewardModel(model, tokenizer, mean, std, scaled=True, prompts=prompts)


def _check_reading(reward: RewardModel) -> None:
    """UsageError unless a text and its pads score here what transformers' own class gives them."""
    model: Any = reward.model
    rows = model.config.get_text_config().vocab_size
    ids = [(7 * i + 1) % rows for i in range(_TRIED)]
    ids = [token for token in ids if reward.reading is None or token != reward.reading.pad]
    with torch.no_grad():
        row = torch.tensor([ids], device=next(model.parameters()).device)
        theirs = float(model(input_ids=row, attention_mask=torch.ones_like(row)).logits)
        ours = float(_forward(reward, [{"input_ids": ids}]))
    if abs(theirs - ours) > _TOLERANCE * max(1.0, abs(theirs)):
        raise UsageError(
            f"the reward model's own class scores a text {theirs:.4g}, its head at the last token {ours:.4g}"
            ": it is read in a way that keel does not know"
        )


def whole(reward: RewardModel, prompt: Prompt, response: Sequence[int]) -> list[int]:
    """The ids of a response as the model was trained on them: of a conversation, with all that its template
    writes at a reply's end. A response that was cut off stays as it is."""
    if reward.reading is None or isinstance(prompt, str) or not response:
        return [*response]
    if response[-1] != chat.reply_end(reward.tokenizer):
        return [*response]
    return [*response[:-1], *reward.reading.ending]


def encode(
    reward: RewardModel, prompt: Prompt, completion: str | Conversation, max_length: int | None = None
) -> Inputs:
    """What the model reads for a complete response (its end of sequence included).

    Longer than `max_length` (or the context): the prompt loses its start, never the response; UsageError when
    the response alone is too long.
    """
    limit = max_length or _context(reward)
    if reward.is_encoder:
        return _encode_pair(reward, chat.prompt_text(None, prompt), chat.completion_text(completion), limit)
    response = whole(reward, prompt, chat.completion_ids(reward.tokenizer, prompt, completion))
    return {"input_ids": fit(chat.prompt_ids(reward.tokenizer, prompt), response, limit)}


def encode_sampled(reward: RewardModel, prompt: Prompt, text: str, ended: bool) -> Inputs:
    """As `encode`, for a sampled response given as text; one that was cut off (`ended` False) gets no EOS.

    Departure from `encode`: training goes on whatever the policy writes, so a response that is too long by
    itself is no error. What fits from its start is scored, after the prompt's last token; `encode_samples`
    counts such.
    """
    return _encode_sampled(reward, prompt, text, ended)[0]


def encode_samples(
    reward: RewardModel, prompts: Sequence[Prompt], texts: Sequence[str], ended: Sequence[bool]
) -> tuple[list[Inputs], int]:
    """(B) sampled responses as the model reads them, and how many of them lost their end to its context."""
    encoded = [_encode_sampled(reward, *sample) for sample in zip(prompts, texts, ended, strict=True)]
    return [inputs for inputs, _ in encoded], sum(cut for _, cut in encoded)


def _encode_sampled(reward: RewardModel, prompt: Prompt, text: str, ended: bool) -> tuple[Inputs, bool]:
    """What the model reads, and whether the response lost its end."""
    completion: str | Conversation = text
    if not isinstance(prompt, str):
        completion = ({"role": "assistant", "content": text.strip()},)
    limit = _context(reward)
    if reward.is_encoder:
        asked, answer = chat.prompt_text(None, prompt), chat.completion_text(completion)
        try:
            return _encode_pair(reward, asked, answer, limit), False
        except UsageError:
            ids = reward.tokenizer(asked, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            asked = reward.tokenizer.decode(ids[-1:])
            encoded = reward.tokenizer(
                asked, answer, truncation="only_second", max_length=limit, split_special_tokens=True
            )
            return _read(encoded), True
    response = chat.sampled_ids(reward.tokenizer, prompt, completion)
    response = whole(reward, prompt, response) if ended else response[:-1]
    kept = response if limit is None else response[: limit - 1]
    ids = fit(chat.prompt_ids(reward.tokenizer, prompt), kept, limit)
    return {"input_ids": ids}, len(kept) < len(response)


def fit(prompt: Sequence[int], response: Sequence[int], limit: int | None) -> list[int]:
    """prompt + response within `limit` tokens: the prompt gives way, from its start."""
    if limit is None or len(prompt) + len(response) <= limit:
        return [*prompt, *response]
    room = limit - len(response)
    if room < 1:
        raise UsageError(
            f"a response of {len(response)} tokens does not fit a reward model that reads {limit}"
        )
    return [*prompt[-room:], *response]


@cast_cache()
def score(
    reward: RewardModel,
    inputs: Sequence[Inputs],
    *,
    batch_size: int = 64,
    together: Sequence[Hashable] | None = None,
    each: Callable[[Sequence[list[int]], Callable[[list[int]], Tensor]], list[Tensor]] | None = None,
) -> Tensor:
    """(B,) raw scores, float32 on the CPU, in the order given. Batches are made of similar lengths, and of
    rows with the same value of `together`, which begin alike. each: calls a function with each batch, as
    `distributed.group.mapped` does on several ranks; by default one after the other."""

    def of(part: list[int]) -> Tensor:
        alike = None if together is None else [together[i] for i in part]
        with torch.no_grad():
            return forward(reward, [inputs[i] for i in part], alike).float().cpu()

    scores = torch.zeros(len(inputs))
    parts = by_length([len(item["input_ids"]) for item in inputs], batch_size, together=together)
    for part, found in zip(parts, each(parts, of) if each else map(of, parts), strict=True):
        scores[part] = found
    return scores


def forward(
    reward: RewardModel, inputs: Sequence[Inputs], together: Sequence[Hashable] | None = None
) -> Tensor:
    """(B,) raw scores of one batch, with gradient, in the order given; rows of similar length share a
    forward, those with the same value of `together`, which begin alike, before others."""
    sizes = [len(item["input_ids"]) for item in inputs]
    parts = by_length(sizes, batch_layout.best_rows_of(reward.model), together=together)
    scores = torch.cat([_forward(reward, [inputs[i] for i in part]) for part in parts])
    order = torch.tensor([i for part in parts for i in part])
    return scores[order.argsort().to(scores.device)]


def _forward(reward: RewardModel, inputs: Sequence[Inputs]) -> Tensor:
    """One padded forward. A decoder is read at the last token by its length, not by looking for pads: pad may
    be EOS, or missing."""
    device = sharded.device_of(reward.model)
    ids, lengths = pad([item["input_ids"] for item in inputs], _pad_id(reward))
    ids, lengths = ids.to(device), lengths.to(device)
    if reward.is_encoder:
        keys = [key for key in inputs[0] if key != "input_ids"]
        extra = {key: pad([item[key] for item in inputs], 0)[0].to(device) for key in keys}
        mask = length_mask(lengths, ids.shape[1]).long()
        with computing(reward.model, device):
            logits = reward.model(input_ids=ids, attention_mask=mask, **extra).logits
            return logits.squeeze(-1).to(head_dtype(reward.model))
    if reward.reading is not None:
        lengths = torch.tensor([_read_to(row["input_ids"], reward.reading.pad) for row in inputs]).to(lengths)
    last = torch.arange(len(inputs), device=device) * ids.shape[1] + lengths - 1
    return scores_at(reward.model, ids, last)


def _read_to(ids: Sequence[int], pad_id: int | None) -> int:
    """Tokens up to and with the last that is no pad, where transformers reads a decoder; 1 where all are."""
    return next((i + 1 for i in reversed(range(len(ids))) if ids[i] != pad_id), 1)


def _pad_id(reward: RewardModel) -> int:
    """What a forward is padded with, which reads no pad: the tokenizer's, or 0 where that has no row, on a
    base whose adapter was trained with one row more."""
    pad_id = chat.ensure_pad(reward.tokenizer)
    return pad_id if pad_id < reward.model.config.get_text_config().vocab_size else 0


def same_tokenizer(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether ids of one can be read by the other: same vocabulary, but for a pad that `give_own_pad` added
    to one of them, same special ids, same chat template."""
    keys = ("eos_token_id", "bos_token_id", "chat_template")
    return one is other or (
        all(getattr(one, k) == getattr(other, k) for k in keys)
        and _without_pad(one, other) == _without_pad(other, one)
    )


def _without_pad(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> dict[str, int]:
    """The vocabulary of one, without its last token where that is its pad and the other has one less."""
    vocabulary, pad = one.get_vocab(), one.pad_token_id
    if pad == len(one) - 1 == len(other):
        del vocabulary[str(one.pad_token)]
    return vocabulary


def reads_ids_of(reward: RewardModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the reward model can be given the ids of a policy with this tokenizer, with no text between.
    Compares whole vocabularies: to be asked once, not once a batch."""
    return not reward.is_encoder and same_tokenizer(reward.tokenizer, tokenizer)


def check_room(reward: RewardModel, longest: int, where: str) -> None:
    """UsageError unless sequences of up to `longest` ids fit the model. Ids are scored as they are, so
    nothing would shorten them."""
    limit = _context(reward)
    longest += 0 if reward.reading is None else max(0, len(reward.reading.ending) - 1)
    if limit is not None and longest > limit:
        raise UsageError(
            f"{where}: a prompt and its response take up to {longest} tokens, but the reward model reads "
            f"{limit}; lower max_length or sampling.max_new_tokens"
        )


def _encode_pair(reward: RewardModel, prompt: str, completion: str, limit: int | None) -> Inputs:
    encoded = reward.tokenizer(prompt, completion, split_special_tokens=True)
    excess = len(encoded["input_ids"]) - (limit or len(encoded["input_ids"]))
    if excess > 0:
        ids = reward.tokenizer(prompt, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        kept = ids[excess:]
        if not kept:
            raise UsageError(
                f"a response of {len(encoded['input_ids'])} tokens with its prompt does not fit a reward "
                f"model that reads {limit}"
            )
        shorter = reward.tokenizer.decode(kept)
        encoded = reward.tokenizer(
            shorter, completion, truncation="only_first", max_length=limit, split_special_tokens=True
        )
    return _read(encoded)


def _read(encoded: Mapping[str, Any]) -> Inputs:
    return {key: list(encoded[key]) for key in ("input_ids", "token_type_ids") if key in encoded}


def _context(reward: RewardModel) -> int | None:
    return context_length(reward.model.config)


def as_trained(reward: RewardModel, prompt: Prompt, completion: str | Conversation) -> Any:
    """Prompt and completion in the form that the model was trained on: where that is conversations alone, a
    text is the user's turn, and its completion the reply."""
    if reward.prompts != "conversations" or not isinstance(prompt, str):
        return prompt, completion
    asked: Prompt = ({"role": "user", "content": prompt},)
    said = completion if not isinstance(completion, str) else ({"role": "assistant", "content": completion},)
    return asked, said


def other_form(reward: RewardModel, conversational: bool) -> str:
    """What is to be said where a reward model is asked about conversations, or about text, and was trained on
    the other; "" where it was not."""
    if reward.prompts in (None, "both", "conversations" if conversational else "text"):
        return ""
    trained, asked = ("plain text", "conversations") if conversational else ("conversations", "plain text")
    return (
        f"was trained on {trained}, and these prompts are {asked}, a form that it has not seen: its scores "
        f"say less of them. Train it on comparisons that are {asked}, or give prompts that are {trained}"
    )


def save_scale(
    model: PreTrainedModel, mean: float, std: float, members: int = 1, prompts: Form | None = None
) -> None:
    """Leave the scale in the model's config, where `wrap` finds it again, with where the model is read and
    what it was trained on; and of an ensemble its size, for `other_members`."""
    more: dict[str, Any] = {"members": members} if members > 1 else {}
    more |= {"prompts": prompts} if prompts else {}
    model.config.keel_reward = {"mean": mean, "std": std, "read_at": "end of the reply", **more}
