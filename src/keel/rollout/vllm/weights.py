"""What a server is given: the folder that it is started on, and after each update the adapters or all
weights.

Files are in the names of the Hugging Face formats, which vLLM reads; adapters are folded in without touching
the model, one layer at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from keel.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WIDTHS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of an element
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM reserves room for


def print_of(model: nn.Module) -> tuple[int, ...]:
    """A number of the bits of each weight that training changes: what the server holds is the trainer's as
    long as they are the same. One pass over the weights. Of weights that are cut over ranks this one's
    parts."""
    own = [getattr(p.detach(), "to_local", p.detach)() for p in model.parameters() if p.requires_grad]
    sums = [p.contiguous().view(WIDTHS[p.element_size()]).sum(dtype=torch.int64) for p in own]
    return tuple(torch.stack([one.to(sums[0].device) for one in sums]).tolist()) if sums else ()


def has_adapters(model: nn.Module) -> bool:
    """Whether adapters are what is trained."""
    return hasattr(model, "get_base_model")


def rank_of(model: Any) -> int:
    """The rank that a server must have room for."""
    r = int(model.active_peft_config.r)
    fitting = next((rank for rank in RANKS if rank >= r), None)
    if fitting is None:
        raise UsageError(
            f"vllm takes adapters up to rank {RANKS[-1]}, and `lora.r` is {r}: set rollout.push: whole"
        )
    return fitting


def plain_of(model: Any) -> PreTrainedModel:
    """The model under the adapters, whose modules are still wrapped."""
    return model.get_base_model() if has_adapters(model) else model


def write_start(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    dtype: torch.dtype,
    *,
    folded: bool,
    untied: bool = False,
) -> None:
    """What a server is started on: a whole model with its config and tokenizer. folded: with the adapters
    folded in; else what is under them. untied: as `write_whole`."""
    _write_model(model, folder, dtype, folded=folded, untied=untied)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"dtype": str(dtype).removeprefix("torch."), "use_cache": True}
    if untied:
        config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_whole(model: Any, folder: Path, dtype: torch.dtype, *, untied: bool = False) -> None:
    """All weights, adapters folded in, in the server's precision. untied: a head that shares its weights with
    the embeddings is written with its own."""
    _write_model(model, folder, dtype, folded=True, untied=untied)


def is_tied(model: Any) -> bool:
    """Whether the head shares its weights with the embeddings."""
    plain = plain_of(model)
    head, embeddings = plain.get_output_embeddings(), plain.get_input_embeddings()
    return head is not None and getattr(head, "weight", None) is getattr(embeddings, "weight", None)


def write_adapter(model: Any, folder: Path) -> None:
    """The adapter that is trained, as peft's `from_pretrained` and vLLM read it."""
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True)
    found = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: value.detach().to("cpu").contiguous() for name, value in found.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = model.active_peft_config.to_dict() | {"inference_mode": True, "task_type": "CAUSAL_LM"}
    text = json.dumps(settings, indent=2, sort_keys=True, default=sorted)  # peft keeps sets
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")


def _write_model(model: Any, folder: Path, dtype: torch.dtype, *, folded: bool, untied: bool) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    plain: Any = plain_of(model)
    before = plain.config.dtype, plain.config.architectures
    with torch.no_grad():
        tensors = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in _named(plain, folded=folded)
        }
        tensors = _apart(tensors) if untied else _tied_again(plain, tensors)
    try:
        plain.save_pretrained(folder, state_dict=tensors)
    finally:
        plain.config.dtype, plain.config.architectures = before


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each name with a tensor of its own."""
    seen: set[int] = set()
    for name, value in tensors.items():
        if value.data_ptr() in seen:
            tensors[name] = value.clone()
        seen.add(value.data_ptr())
    return tensors


def _named(plain: nn.Module, *, folded: bool) -> Iterator[tuple[str, Tensor]]:
    """The weights and buffers of a model by the names they have without adapters."""
    deltas = dict(_deltas(plain)) if folded else {}
    for name, value in plain.state_dict().items():
        if ".lora_" in name or "lora_magnitude_vector" in name:
            continue
        delta = deltas.get(name)
        yield name.replace(".base_layer.", "."), value.detach() if delta is None else value + delta.to(value)


def _deltas(plain: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What the active adapters add to which weight, by its name among the wrapped modules."""
    from peft.tuners.lora import LoraLayer

    for name, module in plain.named_modules():
        if isinstance(module, LoraLayer):
            parts = [module.get_delta_weight(adapter) for adapter in module.active_adapters]  # pyright: ignore
            if parts:
                yield f"{name}.base_layer.weight", torch.stack(parts).sum(0)


def _tied_again(plain: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A cast gives every name a tensor of its own: those that are one weight become one again, so that it is
    written once, as the format has it."""
    first: dict[int, str] = {}
    shared: dict[str, Tensor] = {}
    for name, value in plain.state_dict().items():
        clean = name.replace(".base_layer.", ".")
        if clean in tensors:
            shared[clean] = (
                tensors[first.setdefault(value.data_ptr(), clean)] if value.numel() else tensors[clean]
            )
    return shared
