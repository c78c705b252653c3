# pyright: strict
"""The files of a model folder: which one is broken, and what a checkpoint holds that no model takes."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from transformers.utils import hub

from keel.errors import UsageError

POINTER = b"version https://git-lfs"  # how the file begins that stands for one in git's large file storage
OBJECTS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "model.safetensors.index.json",
    "adapter_config.json",
)
_hub: Any = hub
MOST_LAYERS, MOST_ROWS = 10_000, 2**31
_SIZE = re.compile(r"layers?$|heads$|_size$|_dim$|n_embd$|experts$|positions$")
AGAIN = "download or copy it again"
# Tensors that a language model may leave in its checkpoint: buffers that it computes itself, parts that read
# images and sound, heads that predict further tokens, BERT's for whole texts, and TRL's value head.
UNUSED = re.compile(
    r"inv_freq$|masked_bias$|(?:attn|attention)\.bias$|position_ids$|\.version$|\.pooler\.|seq_relationship"
    r"|^v_head\.|vis|image|audio|speech|multi_modal|mtp|nextn"
    r"|talker|code2wav"
)
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. UsageError, which names file and remedy, where there is something else."""
    if (fault := _fault_of_object(path)) is not None:
        raise UsageError(fault)
    return json.loads(path.read_bytes())


def fault_in(place: str) -> str | None:
    """What is wrong with a file of a model or adapter, by folder or hub id (what the cache has of it), with
    the remedy; None where all can be read."""
    folder = Path(place)
    if not folder.is_dir():
        found = None
        with contextlib.suppress(OSError, ValueError):
            found = _hub.cached_file(place, "config.json", local_files_only=True)
        if found is None:
            return None
        folder = Path(found).parent
    faults = [_fault_of_object(path) for name in OBJECTS if (path := folder / name).is_file()]
    faults += [_fault_of_text(path) for path in sorted(folder.glob("chat_template*.jinja"))]
    faults += [fault_of_weights(path) for path in sorted(folder.glob("*.safetensors"))]
    found_fault = next((fault for fault in faults if fault is not None), None)
    return found_fault or _missing_shard(folder)


def fault_of_weights(path: Path) -> str | None:
    """What is wrong with a safetensors file, by its header and its length; None: nothing."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        begin = handle.read(8)
        if (begin + handle.read(len(POINTER) - 8)) == POINTER:
            return _pointer(path)
        length = int.from_bytes(begin, "little")
        handle.seek(8)
        header = handle.read(length) if 8 + length <= size else b""
    try:
        tensors = cast("dict[str, dict[str, Any]]", json.loads(header))
        ends = [part["data_offsets"][1] for name, part in tensors.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{path} is cut short or no safetensors file ({size:,} bytes): {AGAIN}"
    whole = 8 + length + max(ends, default=0)
    if size < whole:
        return f"{path} is cut short ({size:,} of {whole:,} bytes): {AGAIN}"
    return None


def fault_of_dtypes(folder: Path) -> str | None:
    """What is wrong with the dtypes of a folder's weights: whole numbers, of which its config does not say
    what they stand for; None: nothing, or no file can be read. transformers would take them for the
    weights."""
    if "quantization_config" in json_object(folder / "config.json"):
        return None
    for path in sorted(folder.glob("*.safetensors")):
        for name, part in _header(path).items():
            if name.endswith(("weight", "bias")) and str(part["dtype"]).startswith(("I", "U", "BOOL")):
                return (
                    f"{path}: {name} holds whole numbers ({part['dtype']}), and no `quantization_config` of "
                    "config.json says what they stand for"
                )
    return None


def _header(path: Path) -> dict[str, dict[str, Any]]:
    """Name → dtype, shape and place of each tensor of a safetensors file; empty where it is none."""
    try:
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header = handle.read(length) if length < path.stat().st_size else b""
        tensors = cast("dict[str, dict[str, Any]]", json.loads(header))
        return {name: part for name, part in tensors.items() if name != "__metadata__" and "dtype" in part}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _fault_of_text(path: Path) -> str | None:
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return f"{path} is no text (UTF-8): {AGAIN}"
    return None


def _fault_of_object(path: Path) -> str | None:
    content = path.read_bytes()
    if content.startswith(POINTER):
        return _pointer(path)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):  # JSONDecodeError and UnicodeDecodeError
        return f"{path} is no JSON, or cut short: {AGAIN}"
    if not isinstance(value, dict):
        return f"{path} holds {_kind(value)} where a JSON object belongs: {AGAIN}"
    return None


def fault_of_sizes(config: object, where: str = "") -> str | None:
    """A size in a model's config that no model has, for which transformers would fill the memory; None: all
    are plausible."""
    values = cast("dict[str, object]", config) if isinstance(config, dict) else {}
    for name, value in values.items():
        if isinstance(value, dict):
            fault = fault_of_sizes(cast("object", value), f"{where}{name}.")
            if fault is not None:
                return fault
        elif isinstance(value, int) and _SIZE.search(name):
            most = MOST_LAYERS if "layer" in name else MOST_ROWS
            if value > most:
                return f"{where}{name} is {value:,}, which no model has (at most {most:,})"
    return None


def _kind(value: object) -> str:
    if value is None:
        return "null"
    return {"list": "a list", "str": "a string", "bool": "a truth value"}.get(
        type(value).__name__, "a number"
    )


def _pointer(path: Path) -> str:
    return f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder"


def _missing_shard(folder: Path) -> str | None:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return None
    shards = json.loads(index.read_bytes()).get("weight_map")
    if not isinstance(shards, dict):
        return f"{index} has no weight_map: {AGAIN}"
    names = sorted({str(name) for name in cast("dict[str, Any]", shards).values()})
    missing = next((name for name in names if not (folder / name).is_file()), None)
    return None if missing is None else f"{folder / missing} is not there, which {index.name} names: {AGAIN}"


def without_place(keys: Iterable[str], config: Any, backbone: str, *, head: bool) -> list[str]:
    """Of the tensors in a checkpoint that a model took no notice of: those that tell that it is another
    model. They lie in its text layers, or with `head` outside of its backbone, as a reward model's score.

    backbone: the prefix of its names (transformers' `base_model_prefix`).
    """
    text = config.get_text_config()
    layers = getattr(text, "num_hidden_layers", None)
    further = getattr(text, "num_nextn_predict_layers", None) or 0
    found: list[str] = []
    for key in keys:
        number = _LAYER.search(key)
        predicts_further = (
            number is not None
            and isinstance(layers, int)
            and layers <= int(number.group(1)) < layers + further
        )
        if UNUSED.search(key) or predicts_further or not (head or key.startswith(f"{backbone}.")):
            continue
        found.append(key)
    return sorted(found)
