"""Models in and out, in the Hugging Face formats. Safe by default: safetensors only, no remote code."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils.hub import cached_file

from keel.accel.modules import dropout_rates
from keel.data import chat
from keel.data.batches import derive_seed
from keel.errors import UsageError
from keel.models import experts, quantize
from keel.models.causality import require_causal
from keel.models.checkpoint_files import fault_of_dtypes, fault_of_sizes, json_object, without_place
from keel.models.embeddings import adopt_vocabulary, resized, with_whole_embeddings
from keel.models.load_errors import NO_TOKENIZER, explained, require_finite
from keel.models.precision import mark_precision, weights
from keel.models.seeding import seed_head, seeded
from keel.models.shared_vocabulary import share_vocabulary

COUNT_FROM_PAD = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "roberta-prelayernorm",
    "camembert",
    "mpnet",
    "longformer",
)
CONFIG = "config.json"
GENERIC = (
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
)  # classes of tokenizers that are what their file says


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Which model, in plain values: a path or hub id, or a configuration to build a new one from."""

    path: str | None = None
    init: Mapping[str, Any] | None = None
    dtype: str = "float32"  # see keel.models.precision
    trust_remote_code: bool = False
    revision: str | None = None
    quantize: str | None = None  # "8bit" or "4bit": see keel.models.quantize
    router_coef: float | None = None  # weight of the balancing loss of experts; None: as the config asks
    rows: int | None = None  # the embeddings are to have at least as many: see `resized`


def load_tokenizer(path: str, *, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """The tokenizer of a model directory or hub id, which also knows what the model's files name as EOS
    (`chat.eos_ids`). UsageError if there is none."""
    with explained(path, "tokenizer"):
        if _says_all(Path(path)):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        else:
            tokenizer = AutoTokenizer.from_pretrained(
                path, trust_remote_code=trust_remote_code, revision=revision
            )
        added = tokenizer.added_tokens_decoder
        if not set(tokenizer.get_vocab().values()) - {i for i, token in added.items() if token.special}:
            raise UsageError(NO_TOKENIZER)  # transformers has made one up of the model's type
        share_vocabulary(tokenizer)
        chat.declare_ends(tokenizer, _declared_ends(path, revision, set(added)))
    return tokenizer


def _declared_ends(path: str, revision: str | None, special: set[int]) -> list[int]:
    """The EOS ids of a model's config and generation_config. An id that stands for ordinary text is a default
    that nobody has set for this vocabulary, and ends nothing."""
    ends: list[Any] = []
    for name in ("generation_config.json", CONFIG):
        try:
            file = cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        except OSError:  # a tokenizer without a model
            file = None
        values = json_object(Path(file)) if file else {}
        parts = [part for part in (values, values.get("text_config")) if isinstance(part, dict)]
        for part in parts:
            named = part.get("eos_token_id")
            ends += named if isinstance(named, list) else [named]
    return [i for i in dict.fromkeys(ends) if isinstance(i, int) and i in special]


def _says_all(folder: Path) -> bool:
    """Whether a folder's tokenizer is of no family, and its file all there is to it. AutoTokenizer would make
    one of the family that the model belongs to all the same, which splits texts otherwise (Qwen 2 in
    transformers 5; what a hub id names still goes through it)."""
    place = folder / "tokenizer_config.json"
    if not place.is_file() or not (folder / "tokenizer.json").is_file():
        return False
    named = json_object(place)
    return named.get("tokenizer_class") in GENERIC and "auto_map" not in named


def model_config(source: ModelSource) -> Any:
    """The transformers configuration, without loading weights. UsageError for an unknown model or field."""
    if source.init is not None:
        values = dict(source.init)
        kind = values.pop("model_type")
        if fault := fault_of_sizes(values):
            raise UsageError(f"model.init: {fault}")
        with explained(kind, "model type"):
            config = AutoConfig.for_model(kind, **values)
        defaults = AutoConfig.for_model(kind).to_dict()
        unknown = [key for key in values if key not in defaults and not hasattr(type(config), key)]
        if unknown:
            raise UsageError(f"model.init: {kind} has no setting {unknown[0]!r}")
        for key, value in values.items():
            if isinstance(value, bool) and type(defaults.get(key)) in (int, float):
                raise UsageError(f"model.init: `{key}`: {str(value).lower()} is no number")
        return config
    with explained(str(source.path), "model"):
        stamp = None if source.trust_remote_code else _stamp(Path(str(source.path)))
        if stamp is None:  # a hub's, whose snapshot transformers looks up, or of the folder's own code
            return _read_config(source)
        known = str(source.path), os.path.abspath(str(source.path)), source.revision
        if known not in _configs or _configs[known][0] != stamp:
            _configs[known] = stamp, _read_config(source)
        return copy.deepcopy(_configs[known][1])


# a stage asks for it a dozen times, and reading it looks into each file of weights
_configs: dict[tuple[str, str, str | None], tuple[Any, Any]] = {}


def _stamp(folder: Path) -> tuple[Any, ...] | None:
    """By what the files behind a folder's config are told from changed ones; None without such a folder."""
    try:
        paths = (folder / CONFIG, *sorted(folder.glob("*.safetensors")))
        found = [(path.name, path.stat()) for path in paths]
    except OSError:
        return None
    return tuple((name, at.st_mtime_ns, at.st_size, at.st_ino) for name, at in found)


def _read_config(source: ModelSource) -> Any:
    """UsageError for sizes or weights that cannot be, and transformers' own errors."""
    place = Path(str(source.path)) / CONFIG
    if place.is_file() and (fault := fault_of_sizes(json_object(place))):
        raise UsageError(f"{place}: {fault}")
    if place.is_file() and (fault := fault_of_dtypes(place.parent)):
        raise UsageError(fault)
    return AutoConfig.from_pretrained(
        str(source.path), trust_remote_code=source.trust_remote_code, revision=source.revision
    )


def causal_lm(source: ModelSource, seed: int, *, vocab: PreTrainedTokenizerBase | None = None) -> Any:
    """A causal language model. A new one (`init`) is seeded and gets its vocabulary and special ids from
    `vocab`, a tokenizer. UsageError for a checkpoint without all of its weights, such as a reward model's,
    and for a model that sees what stands behind a token."""
    config = model_config(source)
    dtype = weights(source.dtype)
    if source.init is None:
        with explained(str(source.path), "model"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(source.path),
                config=config,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=source.trust_remote_code,
                revision=source.revision,
                **quantize.options(source.quantize, dtype),
            )
        model, info = loaded
        if info["missing_keys"]:  # transformers would make them up
            raise UsageError(
                f"model {str(source.path)!r} is no whole causal language model: it has no "
                f"{min(info['missing_keys'])}"
            )
        require_finite(model, str(source.path))
        _require_no_other(model, source, info["unexpected_keys"], head=True)
        if source.quantize is not None:
            quantize.settled(model).keel_afresh = partial(causal_lm, replace(source, quantize=None), seed)
        experts.mark(resized(model, source.rows), source.router_coef)
        require_causal(model, str(source.path))
        return mark_precision(with_whole_embeddings(model), source.dtype)
    if vocab is not None:
        adopt_vocabulary(config, vocab, source.init)
    with seeded(derive_seed("init", seed)):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    experts.mark(model, source.router_coef)
    require_causal(model, f"a new {config.model_type}")
    return mark_precision(with_whole_embeddings(model), source.dtype)


def scorer(
    source: ModelSource,
    seed: int,
    *,
    vocab: PreTrainedTokenizerBase | None = None,
    labels: Sequence[str] | None = None,
) -> Any:
    """A sequence-classification model with one output, for use as a reward model or critic; with one output
    for each of `labels`, in their order, for use as a classifier.

    From a language model's checkpoint the backbone is taken and a new score head is seeded (std 1/√(d+1), as
    in 2009.01325); a checkpoint that has such a head keeps it. UsageError for one with other outputs, and for
    one that lacks other weights than a new head's: transformers would make them up.
    """
    config = model_config(source)
    trained = source.init is None and is_classifier(config)
    _set_outputs(config, labels, source.path if trained else None)
    dtype, new_head = weights(source.dtype), True
    if source.init is not None:
        if vocab is not None:
            adopt_vocabulary(config, vocab, source.init)
        with seeded(derive_seed("init", seed)):
            model = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    else:
        with explained(str(source.path), "model"), seeded(derive_seed("init", seed)):
            model, info = AutoModelForSequenceClassification.from_pretrained(
                str(source.path),
                config=config,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=source.trust_remote_code,
                revision=source.revision,
                **quantize.options(source.quantize, dtype),
            )
        if source.quantize is not None:
            again = replace(source, quantize=None)
            quantize.settled(model).keel_afresh = partial(scorer, again, seed, vocab=vocab, labels=labels)
        require_finite(model, str(source.path))
        new_head = "score.weight" in info["missing_keys"]
        _require_no_other(model, source, info["unexpected_keys"], head=False)
        lacks = _from_tied_head(model, source, set(info["missing_keys"]))
        missing = sorted(key for key in lacks if trained or not _in_head(key, model.base_model_prefix))
        if missing:
            kind = ("reward model" if labels is None else "classifier") if trained else "language model"
            raise UsageError(f"model {str(source.path)!r} is no whole {kind}: it has no {missing[0]}")
    resized(model, source.rows)
    head = score_head(model)
    if head is not None and new_head:
        seed_head(head, derive_seed("head", seed))
    return mark_precision(with_whole_embeddings(model), source.dtype)


def _require_no_other(model: Any, source: ModelSource, unused: Iterable[str], *, head: bool) -> None:
    """UsageError for a checkpoint that holds more than the model: one of another kind, or with more layers
    than its config says. head: also what lies beside the backbone counts, as a reward model's score."""
    extra = without_place(unused, model.config, model.base_model_prefix, head=head)
    if not extra:
        return
    kind = "causal language model" if head else "model of its config"
    inside = any(key.startswith(f"{model.base_model_prefix}.") for key in extra)
    remedy = "its config.json is another model's" if inside else "it is a reward model or a classifier"
    raise UsageError(
        f"model {str(source.path)!r} is no {kind}: it holds {extra[0]}, which such a model has no place for; "
        f"{remedy}"
    )


def _from_tied_head(model: Any, source: ModelSource, missing: set[str]) -> set[str]:
    """Fill the embeddings of a scorer from a language model's checkpoint that ties them to its head and
    stores the head alone. Returns the keys that are still missing."""
    embeddings = model.get_input_embeddings()
    name = next(f"{name}.weight" for name, module in model.named_modules() if module is embeddings)
    if name not in missing or not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return missing
    language_model = causal_lm(replace(source, quantize=None, rows=None), 0)
    with torch.no_grad():
        embeddings.weight.copy_(language_model.get_input_embeddings().weight)
    return missing - {name}


def scorer_without_weights(source: ModelSource) -> Any:
    """What `scorer` makes, in shape alone: its config and modules, on the meta device. Errors are those of
    its outputs."""
    config = model_config(source)
    _set_outputs(config, None, source.path if source.init is None and is_classifier(config) else None)
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(
            config, trust_remote_code=source.trust_remote_code
        )


def reads_last_token(source: ModelSource) -> bool:
    """Whether the classifier of a source has a head on every position and is read at the last token, as
    decoders; encoders pool by themselves. No weights are read."""
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(
            model_config(source), trust_remote_code=source.trust_remote_code
        )
    return score_head(model) is not None


def _set_outputs(config: Any, labels: Sequence[str] | None, trained: str | None) -> None:
    """Write one output, or one for each label, into the config. UsageError if a trained head has others."""
    if labels is None:
        if trained is not None and config.num_labels != 1:
            raise UsageError(f"{trained!r} has {config.num_labels} outputs; a reward model has 1")
        config.num_labels = 1
        return
    names = dict(enumerate(labels))
    if trained is not None and {int(i): str(name) for i, name in config.id2label.items()} != names:
        known = ", ".join(map(str, config.id2label.values()))
        raise UsageError(
            f"{trained!r} tells apart {known}, the data {', '.join(labels)}; start from a model without "
            "such a head"
        )
    config.id2label, config.label2id = names, {name: i for i, name in names.items()}
    config.problem_type = "single_label_classification"


def is_classifier(config: PreTrainedConfig) -> bool:
    """Whether a checkpoint with this config has a trained head that scores whole sequences."""
    kinds = getattr(config, "architectures", None) or ()
    return any("SequenceClassification" in kind or "RewardModel" in kind for kind in kinds)


def _in_head(key: str, backbone: str) -> bool:
    """Whether a weight lies outside of the backbone, or in its pooler, which language models do without."""
    return not key.startswith(f"{backbone}.") or key.startswith(f"{backbone}.pooler.")


def score_head(model: nn.Module) -> nn.Linear | None:
    """The head that scores every position of a decoder; None for an encoder (BERT-type), which pools by
    itself."""
    return getattr(model, "score", None)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass; in train mode only. To be called after `add_adapters`.

    The embeddings' output is made to require a gradient, without which none would reach adapters in
    checkpointed layers. UsageError for a model that cannot do it.
    """
    # older releases of transformers 5 know the second name only, newer ones warn of it
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise UsageError(f"gradient_checkpointing: {error}") from None
    model.enable_input_require_grads()


def context_length(config: PreTrainedConfig) -> int | None:
    """Longest sequence the model takes, in tokens; None when its config does not say.

    Of a model with `longrope` (Phi-3, Phi-4) the context that it was first trained with: beyond it the angles
    of every row depend on the longest row of a forward, so that a row would not be what it is alone.
    """
    config = config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:  # XLNet says −1 for no limit
            # RoBERTa and its kin number positions from the pad token's id + 1, so that many rows are never
            # used
            counted = (config.pad_token_id or 0) + 1 if config.model_type in COUNT_FROM_PAD else 0
            return min([value - counted, *_original_contexts(config)])
    return None


def _original_contexts(config: PreTrainedConfig) -> list[int]:
    """The contexts up to which a config with `longrope` turns all rows alike."""
    rope: Any = getattr(config, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]  # one for each kind of layer
    named = [
        part.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        for part in parts
        if part.get("rope_type") == "longrope"
    ]
    return [size for size in named if isinstance(size, int)]


def disable_dropout(model: nn.Module) -> None:
    """Dropout to 0 everywhere, so that train and eval mode give the same numbers (ratios need that).

    A rate may be a Dropout module, a number that a layer keeps (layer drop and drop path included), or one
    that a layer reads from the config (Falcon). The config that is saved with the model keeps its rates.
    """
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name in dropout_rates(module):
            setattr(module, name, 0.0)
    saved = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)
    copies: dict[int, Any] = {}  # of configs by identity, without dropout
    for module in saved.modules():
        config = vars(module).get("config")
        if module is saved or not isinstance(config, PreTrainedConfig) or not dropout_rates(config):
            continue
        if id(config) not in copies:
            copies[id(config)] = copy.deepcopy(config)
            for name in dropout_rates(config):
                setattr(copies[id(config)], name, 0.0)
        module.config = copies[id(config)]


def count_parameters(model: nn.Module, *, trainable: bool = False) -> int:
    """Parameters."""
    return sum(size_of(p) for p in model.parameters() if p.requires_grad or not trainable)


def size_of(parameter: nn.Parameter) -> int:
    """Numbers in it; of a 4-bit one, which is stored two in a byte, as many as it stands for."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)
