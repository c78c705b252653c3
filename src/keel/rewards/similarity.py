"""Closeness in meaning to a reference text, by a sentence-embedding model of the sentence-transformers
format.

The format is read here with transformers alone: modules.json lists the parts (Transformer, Pooling,
Normalize), 1_Pooling/config.json says how token states become one vector, sentence_bert_config.json how long
a text may be (Sentence-BERT, 1908.10084). A plain encoder without these files is pooled by the mean.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel
from transformers.utils.hub import cached_file

from keel.data import chat
from keel.errors import UsageError
from keel.models.load import ModelSource, load_tokenizer, model_config
from keel.models.precision import computing
from keel.rewards.classifier import encoded, explained, longest_input, padded, pretrained
from keel.rewards.rules import column_of
from keel.types import Conversation, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Pooling = Literal["mean", "cls"]


@dataclass(frozen=True, slots=True)
class Embedder:
    """A model that turns a text into one vector."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pooling: Pooling  # "mean": of the states of all tokens; "cls": the state of the first
    max_length: int | None  # tokens; a longer text keeps its start
    lower_case: bool = False  # whether texts are put into lower case first


class Similarity:
    """r(x, y) = cos(e(y), e(y*)), with e the embedding and y* the text in the column `to`. Range [−1, 1].

    None for a row without a reference. Texts longer than the model reads keep their start. path: a directory
    or hub id, safetensors only. UsageError for a model of parts other than Transformer, Pooling by mean or
    first token, and Normalize; and, at the first call, if the data have no column `to`.
    """

    def __init__(
        self,
        path: str,
        to: str,
        *,
        device: torch.device | str = "cpu",
        batch_size: int = 64,
        dtype: str = "float32",
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"batch_size {batch_size} must be at least 1")
        self.to, self.batch_size = to, batch_size
        source = ModelSource(path, dtype=dtype, trust_remote_code=trust_remote_code, revision=revision)
        self.embedder = load(source)
        cast("torch.nn.Module", self.embedder.model).to(device)  # in place

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[str | Conversation], **columns: Any
    ) -> list[float | None]:
        """One reward a completion."""
        references = column_of(columns, self.to)
        pairs = [
            (chat.own_text(completion), reference)
            for completion, reference in zip(completions, references, strict=True)
            if reference is not None
        ]
        cosines = iter(self.cosines(pairs).tolist())
        return [None if reference is None else next(cosines) for reference in references]

    def cosines(self, pairs: Sequence[tuple[str, str]]) -> Tensor:
        """(N,) cos of the two embeddings of each pair. A text that stands in several pairs is embedded
        once."""
        row_of = {text: i for i, text in enumerate(dict.fromkeys(text for pair in pairs for text in pair))}
        vectors = embed(self.embedder, list(row_of), batch_size=self.batch_size)
        left, right = ([row_of[pair[side]] for pair in pairs] for side in (0, 1))
        return (vectors[left] * vectors[right]).sum(dim=1).clamp(-1, 1)


def embed(embedder: Embedder, texts: Sequence[str], *, batch_size: int = 64) -> Tensor:
    """(N, d) embeddings of length 1, float32 on the CPU, in the order given."""
    texts = [text.lower() for text in texts] if embedder.lower_case else texts
    rows = encoded(embedder.tokenizer, texts, embedder.max_length)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    vectors = torch.zeros(len(rows), embedder.model.config.hidden_size)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        inputs, _ = padded(
            [rows[i] for i in part], chat.ensure_pad(embedder.tokenizer), embedder.model.device
        )
        with torch.no_grad(), computing(embedder.model, embedder.model.device):
            states = embedder.model(**inputs).last_hidden_state.float()
        vectors[part] = pool(states, inputs["attention_mask"].bool(), embedder.pooling).cpu()
    return normalize(vectors, dim=1)


def pool(states: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """(B, S, d) states and (B, S) mask → (B, d): Σ_t m_t h_t / Σ_t m_t for "mean", h_0 for "cls"."""
    if pooling == "cls":
        return states[:, 0]
    return torch.where(mask[..., None], states, 0.0).sum(dim=1) / mask.sum(dim=1, keepdim=True)


def load(source: ModelSource) -> Embedder:
    """A sentence-embedding model by the files of its folder. UsageError for parts that are not known here."""
    pooling, folder = _parts(source)
    settings = _json(source, f"{folder}sentence_bert_config.json") or {}
    _no_prompt(source)
    inner = replace(source, path=str(Path(str(source.path)) / folder)) if folder else source
    config = model_config(inner)
    tokenizer = load_tokenizer(
        str(inner.path), trust_remote_code=source.trust_remote_code, revision=source.revision
    )
    limits = [n for n in (settings.get("max_seq_length"), longest_input(config, tokenizer)) if n is not None]
    model = pretrained(AutoModel, inner, config).eval()
    return Embedder(
        model, tokenizer, pooling, min(limits, default=None), bool(settings.get("do_lower_case", False))
    )


def _parts(source: ModelSource) -> tuple[Pooling, str]:
    """How modules.json says to pool, and the folder of its Transformer with a slash ("" for the model's
    own)."""
    modules = _json(source, "modules.json")
    if modules is None:
        return "mean", ""
    pooling: Pooling = "mean"
    folder = ""
    for module in modules:
        kind, path = module["type"].rpartition(".")[2], module["path"]
        if kind == "Transformer" and path:
            if not Path(str(source.path)).is_dir():
                raise UsageError(
                    f"{source.path!r} keeps its model in {path}/: give a downloaded folder instead"
                )
            folder = f"{path}/"
        elif kind == "Pooling":
            pooling = _pooling(source, f"{path}/config.json")
        elif kind not in ("Transformer", "Normalize"):
            raise UsageError(
                f"{source.path!r} has a {kind} module; a similarity reward reads models of Transformer, "
                "Pooling and Normalize"
            )
    return pooling, folder


def _pooling(source: ModelSource, file: str) -> Pooling:
    settings = _json(source, file)
    if settings is None:
        raise UsageError(f"{source.path!r} has no {file}, which its modules.json names")
    prefix, known = "pooling_mode_", {"mean": "mean", "mean_tokens": "mean", "cls": "cls", "cls_token": "cls"}
    modes = [
        key.removeprefix(prefix) for key, on in settings.items() if key.startswith(prefix) and on is True
    ]
    if mode := settings.get("pooling_mode"):  # sentence-transformers' later form of the file
        modes += [mode] if isinstance(mode, str) else mode
    if len(modes) != 1 or modes[0] not in known:
        raise UsageError(
            f"{source.path!r} pools by {' and '.join(modes) or 'nothing'}; a similarity reward knows mean "
            "and cls"
        )
    return "mean" if known[modes[0]] == "mean" else "cls"


def _no_prompt(source: ModelSource) -> None:
    """A default prompt would stand in front of every text; leaving it out would give other vectors, in
    silence."""
    settings = _json(source, "config_sentence_transformers.json") or {}
    if name := settings.get("default_prompt_name"):
        raise UsageError(
            f"{source.path!r} puts its prompt {name!r} before every text, which is not supported"
        )


def _json(source: ModelSource, file: str) -> Any:
    """A file of the model's folder or hub repository; None if there is none."""
    with explained(f"{source.path}/{file}", str(source.path)):
        cached = cached_file(
            str(source.path), file, revision=source.revision, _raise_exceptions_for_missing_entries=False
        )
        return None if cached is None else json.loads(Path(cached).read_text(encoding="utf-8"))
