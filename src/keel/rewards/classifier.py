"""A text classifier as a reward: how sure it is of one of its labels."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification

from keel.algorithms.masked import at_least_float32
from keel.data import chat
from keel.data.batches import length_mask, pad
from keel.distributed import sharded
from keel.errors import UsageError
from keel.models.checkpoint_files import fault_in
from keel.models.load import ModelSource, context_length, load_tokenizer, model_config, score_head
from keel.models.logprobs import backbone, head_dtype
from keel.models.precision import computing, mark_precision, weights
from keel.types import Conversation, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Output = Literal["probability", "log_probability", "logit", "decision"]
Reads = Literal["completion", "prompt+completion"]


class Classifier:
    """r(x, y) = p, log p or z of one label, by a sequence-classification model with its own tokenizer.

    z are the model's outputs, one a label. p = softmax(z)_label; where labels do not exclude each other (the
    model has one output, or its config says multi_label_classification) p = σ(z_label). Range: [0, 1] for
    "probability", (−∞, 0] for "log_probability", any number for "logit"; "decision" is 1 where the label is
    what the classifier decides on (the likeliest of labels that exclude each other, else p > ½) and 0
    elsewhere, so that its mean is a share.

    It reads the completion, or the prompt too ("prompt+completion": text joined as it stands; of a
    conversation "role: content" lines, the reply's among them). What is longer than the model's context keeps
    its start: the end of a long completion is not judged.

    path: a directory or hub id, safetensors only. label: its name in the config's id2label or its index; may
    be left out for a model with one output. UsageError if the model is no trained classifier, or has no such
    label (the message lists those that it has).
    """

    def __init__(
        self,
        path: str,
        label: str | int | None = None,
        *,
        output: Output = "log_probability",
        reads: Reads = "completion",
        device: torch.device | str = "cpu",
        batch_size: int = 64,
        dtype: str = "float32",
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> None:
        for setting, value, known in (("output", output, Output), ("reads", reads, Reads)):
            if value not in get_args(known):
                raise UsageError(f"{setting}: {value!r} is not one of {', '.join(get_args(known))}")
        if batch_size < 1:
            raise UsageError(f"batch_size {batch_size} must be at least 1")
        source = ModelSource(path, dtype=dtype, trust_remote_code=trust_remote_code, revision=revision)
        config = model_config(source)
        kinds = getattr(config, "architectures", None) or []
        if not any("SequenceClassification" in kind for kind in kinds):
            raise UsageError(
                f"{path!r} is no text classifier (its architecture is {', '.join(kinds) or 'unknown'})"
            )
        self.label = label_index(config, label, path)
        self.output, self.reads, self.batch_size = output, reads, batch_size
        self.tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code, revision=revision)
        self.model = pretrained(AutoModelForSequenceClassification, source, config).to(device).eval()
        self.max_length = longest_input(config, self.tokenizer)

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str | Conversation],
        **columns: Any,
    ) -> list[float | None]:
        """One reward a completion."""
        texts = [self._text(*pair) for pair in zip(prompts, completions, strict=True)]
        return [*self.of_label(self.logits(texts)).tolist()]

    def logits(self, texts: Sequence[str]) -> Tensor:
        """(B, L) outputs z, float32 on the CPU, in the order given; texts of similar length share a
        forward."""
        rows = encoded(self.tokenizer, texts, self.max_length)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
        z, pad_id = torch.zeros(len(rows), self.model.config.num_labels), chat.ensure_pad(self.tokenizer)
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            with torch.no_grad():
                z[part] = forward(self.model, [rows[i] for i in part], pad_id).float().cpu()
        return z

    def of_label(self, logits: Tensor) -> Tensor:
        """(B, L) → (B,): the reward by the formula above."""
        z = logits[:, self.label]
        if self.output == "logit":
            return z
        alone = logits.shape[1] == 1 or self.model.config.problem_type == "multi_label_classification"
        if self.output == "decision":
            return (z > 0 if alone else logits.argmax(dim=1) == self.label).float()
        log_p = logsigmoid(z) if alone else logits.log_softmax(dim=1)[:, self.label]
        return log_p if self.output == "log_probability" else log_p.exp()

    def _text(self, prompt: Prompt, completion: str | Conversation) -> str:
        reply = chat.own_text(completion)
        if self.reads == "completion":
            return reply
        if isinstance(prompt, str):
            return prompt + reply
        return chat.prompt_text(None, (*prompt, {"role": "assistant", "content": reply}))


def forward(model: PreTrainedModel, rows: Sequence[Mapping[str, list[int]]], pad_id: int) -> Tensor:
    """(B, L) outputs z of one padded batch, with gradient. rows: of `encoded`.

    A decoder is read at the last token by its length, as a reward model is: pad may be EOS, or missing.
    """
    inputs, lengths = padded(rows, pad_id, sharded.device_of(model))
    head = score_head(model)
    if head is None:
        with computing(model, inputs["input_ids"].device):
            return at_least_float32(model(**inputs).logits)
    with computing(model, inputs["input_ids"].device):
        hidden = backbone(model)(input_ids=inputs["input_ids"], use_cache=False).last_hidden_state
    last = hidden[torch.arange(len(rows)), lengths - 1]
    return head(last.to(head_dtype(head)))


def label_index(config: PreTrainedConfig, label: str | int | None, path: str) -> int:
    """The index of a label given by name or index. UsageError, with all labels, for one that the model has
    not."""
    names = {int(index): str(name) for index, name in (config.id2label or {}).items()}
    if label is None and len(names) == 1:
        return 0
    if isinstance(label, int) and not isinstance(label, bool) and label in names:
        return label
    matches = [index for index, name in names.items() if name == label]
    if len(matches) != 1:
        known = ", ".join(f"{name!r} ({index})" for index, name in sorted(names.items()))
        wrong = (
            "needs a label"
            if label is None
            else f"has no label {label!r}"
            if not matches
            else f"has {label!r} twice"
        )
        raise UsageError(f"classifier {path!r} {wrong}; its labels are {known}")
    return matches[0]


# ---------------------------------------------------------------- models that read text (`similarity` too)


def pretrained(kind: Any, source: ModelSource, config: PreTrainedConfig) -> Any:
    """A model of an auto class, from safetensors, with every weight from its files (a pooler's aside).

    UsageError if it cannot be loaded or lacks weights, which transformers would make up.
    """
    # fork_rng: transformers initialises a missing pooler at random, which must not move the caller's seed
    with explained(f"model {source.path!r}", str(source.path)), torch.random.fork_rng():
        model, info = kind.from_pretrained(
            str(source.path), config=config, dtype=weights(source.dtype), use_safetensors=True,
            output_loading_info=True, trust_remote_code=source.trust_remote_code, revision=source.revision,
        )  # fmt: skip
    headless = kind is not AutoModelForSequenceClassification
    missing = [key for key in info["missing_keys"] if not (headless and key.startswith("pooler."))]
    if missing:
        raise UsageError(f"model {source.path!r} is incomplete: it has no {min(missing)}")
    return mark_precision(model, source.dtype)


@contextlib.contextmanager
def explained(what: str, place: str | None = None) -> Iterator[None]:
    """Turn what goes wrong with a model's files into one message; keep load reports off a user's terminal.

    place: folder or hub id of the files, so that a broken one is named.
    """
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except UsageError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
        fault = None if place is None else fault_in(place)
        reason = fault or (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{what} cannot be loaded: {reason}") from error
    finally:
        transformers.utils.logging.set_verbosity(level)


def longest_input(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Tokens that a model reads at most: its context or its tokenizer's limit, whichever is less; None
    without either."""
    limits = [context_length(config), tokenizer.model_max_length]
    # a tokenizer without a limit says 10³⁰
    known = [limit for limit in limits if limit is not None and limit < 10**9]
    return min(known) if known else None


def encoded(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int | None
) -> list[dict[str, list[int]]]:
    """What the model reads for each text, special tokens included; one that is too long keeps its start. No
    row is empty: a text without any token becomes one pad."""
    if not texts:
        return []
    side, tokenizer.truncation_side = tokenizer.truncation_side, "right"
    try:
        columns = tokenizer(
            list(texts), truncation=max_length is not None, max_length=max_length, verbose=False
        )
    finally:
        tokenizer.truncation_side = side
    keys = [key for key in ("input_ids", "token_type_ids") if key in columns]
    empty = {"input_ids": [chat.ensure_pad(tokenizer)], "token_type_ids": [0]}
    return [{key: list(columns[key][i]) or empty[key] for key in keys} for i in range(len(texts))]


def padded(
    rows: Sequence[Mapping[str, list[int]]], pad_id: int, device: torch.device | str
) -> tuple[dict[str, Tensor], Tensor]:
    """Rows of `encoded` as a model's inputs, (B, S) each, padded on the right; and their lengths (B,)."""
    ids, lengths = pad([row["input_ids"] for row in rows], pad_id)
    inputs = {key: pad([row[key] for row in rows], 0)[0] for key in rows[0] if key != "input_ids"}
    inputs |= {"input_ids": ids, "attention_mask": length_mask(lengths, ids.shape[1]).long()}
    return {key: value.to(device) for key, value in inputs.items()}, lengths.to(device)
