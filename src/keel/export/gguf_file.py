"""A language model as one GGUF file, which llama.cpp and what is built on it read.

Written by the `gguf` package for the types below; for others by llama.cpp's own converter, where that is on
the PATH. What llama.cpp does otherwise than transformers is undone here: it rotates neighbouring pairs of a
Llama's queries and keys, transformers halves, so the rows of the two matrices change places.
"""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keel.data import chat
from keel.errors import KeelError, UsageError
from keel.models.load import ModelSource, causal_lm, context_length, load_tokenizer, model_config

CONVERTER = "convert_hf_to_gguf.py"
ARCHITECTURES = {  # model type → GGUF's name for what llama.cpp computes
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gpt2": "gpt2",
}
# what llama.cpp calls a way to split text before it is merged, by the pattern of a tokenizer's file
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    rf"{_WORDS}|\p{{N}}{_REST}": "qwen2",
    rf"{_WORDS}|\p{{N}}{{1,3}}{_REST}": "llama-bpe",
}
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # token types of GGUF


def write(model: Path, out: Path, dtype: str = "float32", *, name: str = "") -> None:
    """Write the model in a folder to the file `out`; dtype: of its matrices (float32, float16, bfloat16).

    UsageError for a type that nobody here can write, for a tokenizer that llama.cpp has no like of, and where
    the `gguf` package is missing.
    """
    if out.exists():
        raise UsageError(f"{out} is there already; it was not overwritten")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    config = model_config(ModelSource(str(model)))
    if config.model_type not in ARCHITECTURES:
        _convert(model, partial, dtype, config.model_type)
    else:
        _write(model, partial, config, dtype, name or model.name)
    partial.replace(out)


def _convert(model: Path, out: Path, dtype: str, kind: str) -> None:
    """By llama.cpp's converter."""
    converter = shutil.which(CONVERTER)
    if converter is None:
        raise UsageError(
            f"keel writes GGUF of {', '.join(ARCHITECTURES)}, not of {kind}; put llama.cpp's {CONVERTER} on "
            "the PATH, which knows more"
        )
    kinds = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
    done = subprocess.run(
        [converter, str(model), "--outfile", str(out), "--outtype", kinds[dtype]],
        capture_output=True,
        text=True,
    )
    if done.returncode or not out.exists():
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise KeelError(f"{CONVERTER} cannot convert {model}: {reason}")


def _write(model: Path, out: Path, config: Any, dtype: str, name: str) -> None:
    gguf = _package()
    tokenizer = load_tokenizer(str(model))
    writer = gguf.GGUFWriter(out, ARCHITECTURES[config.model_type])
    writer.add_name(name)
    _add_sizes(gguf, writer, config)
    add_vocabulary(writer, tokenizer, config.vocab_size)
    network = causal_lm(ModelSource(str(model)), 0)
    architecture = next(
        key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == ARCHITECTURES[config.model_type]
    )
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    kept: dict[int, str] = {}
    for key, tensor in network.state_dict().items():
        if tensor.data_ptr() in kept:  # a tied head is the embeddings
            continue
        kept[tensor.data_ptr()] = key
        target = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise UsageError(f"{model}: GGUF has no name for the weight {key} of a {config.model_type}")
        _add(gguf, writer, target, arranged(key, tensor, config), dtype)
    frequencies = _rope_factors(config)
    if frequencies is not None:
        writer.add_tensor("rope_freqs.weight", frequencies)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _package() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise UsageError("--to gguf needs the package gguf: pip install 'keel-rlhf[export]'") from None


def _add(gguf: Any, writer: Any, name: str, tensor: torch.Tensor, dtype: str) -> None:
    """Matrices in `dtype`, vectors in float32, which llama.cpp wants them in."""
    values = np.ascontiguousarray(tensor.detach().float().numpy())
    if values.ndim == 1 or dtype == "float32":
        writer.add_tensor(name, values)
    elif dtype == "float16":
        writer.add_tensor(name, values.astype(np.float16))
    else:
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def arranged(key: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """A weight as llama.cpp has it: queries and keys of Llama with their rows in pairs, GPT-2's matrices
    turned."""
    if config.model_type == "gpt2":
        turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
        return tensor.T.contiguous() if key.endswith(turned) else tensor
    if ARCHITECTURES[config.model_type] == "llama":
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        part = key.split(".")[-2] if "." in key else ""
        if part in heads:
            count = heads[part]
            halves = tensor.view(count, 2, tensor.shape[0] // count // 2, *tensor.shape[1:])
            return halves.transpose(1, 2).reshape(tensor.shape)
    return tensor


# ---------------------------------------------------------------- sizes


def _add_sizes(gguf: Any, writer: Any, config: Any) -> None:
    hidden, heads = config.hidden_size, config.num_attention_heads
    context = context_length(config) or 2048
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ()
    if isinstance(window, int) and (
        any("sliding" in kind for kind in kinds) or config.model_type == "mistral"
    ):
        context = min(context, window)  # within which a window hides nothing; llama.cpp has none here
    writer.add_context_length(context)
    writer.add_embedding_length(hidden)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or _inner(config))
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    if config.model_type == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    width = getattr(config, "head_dim", None) or hidden // heads
    writer.add_rope_dimension_count(width)
    writer.add_key_length(width)
    writer.add_value_length(width)
    rope = _rope(config)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind not in ("default", "llama3"):
        raise UsageError(f"keel writes no GGUF of rotary positions of the kind {kind!r}")


def _inner(config: Any) -> int:
    return getattr(config, "n_inner", None) or 4 * config.hidden_size


def _rope(config: Any) -> Mapping[str, Any]:
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return {"rope_theta": getattr(config, "rope_theta", 10000.0), **found}


def _rope_factors(config: Any) -> np.ndarray[Any, Any] | None:
    """(d / 2,) what llama.cpp divides each frequency by, where they are stretched as Llama 3's; else None."""
    if config.model_type == "gpt2":
        return None
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequencies = float(rope["rope_theta"]) ** -(np.arange(0, width, 2) / width)
    waves, factor = 2 * np.pi / frequencies, float(rope["factor"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    old = float(rope["original_max_position_embeddings"])
    smooth = (old / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    found = np.where(waves < old / high, 1.0, np.where(waves > old / low, factor, between))
    return found.astype(np.float32)


# ---------------------------------------------------------------- tokenizer


def add_vocabulary(writer: Any, tokenizer: Any, rows: int) -> None:
    """The tokens, how text is cut into them, the special ids and the chat template. UsageError for a
    tokenizer that llama.cpp has no like of."""
    file = json.loads(tokenizer.backend_tokenizer.to_str())
    if file["model"]["type"] != "BPE":
        raise UsageError(f"GGUF: no tokenizer of the kind {file['model']['type']} is written")
    spaced = bool(file["model"].get("byte_fallback"))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in file["model"]["merges"]]
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(max(rows, len(by_id)))]
    writer.add_tokenizer_model("llama" if spaced else "gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([_type(tokenizer, i, by_id.get(i)) for i in range(len(tokens))])
    if spaced:
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(scores(tokens, merges))
        writer.add_add_space_prefix(_prepends(file))
    else:
        writer.add_tokenizer_pre(pre_tokenizer(file))
        writer.add_token_merges(merges)
    ids: dict[Callable[[int], None], Any] = {
        writer.add_bos_token_id: tokenizer.bos_token_id,
        writer.add_eos_token_id: chat.eos_id(tokenizer),
        writer.add_pad_token_id: tokenizer.pad_token_id,
        writer.add_unk_token_id: tokenizer.unk_token_id,
    }
    for add, value in ids.items():
        if isinstance(value, int):
            add(value)
    ends = chat.stop_ids(tokenizer, ())
    if len(ends) > 1:
        writer.add_eot_token_id(ends[-1])
    first = tokenizer("a")["input_ids"][:1]
    writer.add_add_bos_token(bool(first) and first[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _type(tokenizer: Any, token: int, text: str | None) -> int:
    if text is None:
        return UNUSED
    added = tokenizer.added_tokens_decoder.get(token)
    if token == tokenizer.unk_token_id and token not in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        return UNKNOWN
    if added is not None:
        return CONTROL if added.special else USER
    return BYTE if len(text) == 6 and text.startswith("<0x") and text.endswith(">") else NORMAL


def scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Of tokens cut as by SentencePiece: the earlier a merge, the higher; what no merge makes, the lowest."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault(pair.replace(" ", ""), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _prepends(file: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text: by a normaliser (`Prepend`) or by Metaspace."""
    parts = [file.get("normalizer") or {}, file.get("pre_tokenizer") or {}]
    flat = [
        part for one in parts for part in (*one.get("normalizers", ()), *one.get("pretokenizers", ()), one)
    ]
    return any(
        part.get("type") == "Prepend"
        or (part.get("type") == "Metaspace" and part.get("prepend_scheme") != "never")
        for part in flat
    )


def pre_tokenizer(file: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer cuts text. UsageError where it has none."""
    found = file.get("pre_tokenizer") or {}
    parts = found.get("pretokenizers") or [found]
    kinds = [part.get("type") for part in parts]
    last = parts[-1]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if kinds == ["ByteLevel"] and last.get("use_regex", True):
            return "gpt-2"
        if (
            kinds == ["Digits", "ByteLevel"]
            and parts[0].get("individual_digits")
            and last.get("use_regex", True)
        ):
            return "smollm"
        pattern = parts[0].get("pattern", {}).get("Regex") if kinds == ["Split", "ByteLevel"] else None
        if pattern in PATTERNS and not last.get("use_regex", True):
            return PATTERNS[pattern]
    raise UsageError(
        "GGUF: llama.cpp knows no tokenizer that cuts text as this one "
        f"({', '.join(map(str, kinds)) or 'no pre-tokenizer'})"
    )
