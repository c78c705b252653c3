"""Low-rank adapters: put on a model, merged into it, and as files beside the merged model that go on a base
again."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from keel import accel
from keel.data.batches import derive_seed
from keel.errors import UsageError
from keel.models import lora_targets, ties
from keel.models.checkpoint_files import fault_in, json_object
from keel.models.load import ModelSource
from keel.models.seeding import seeded

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

HALF_PRECISION = (torch.float16, torch.bfloat16)
SETTINGS, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
STAGES = "stages"  # the folder in which a run's models lie


@dataclass(frozen=True, slots=True)
class Adapters:
    """LoRA settings (2106.09685)."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | Sequence[str] = field(default="all-linear")
    target_parameters: str | Sequence[str] | None = None  # weights of experts: see lora_targets


def add_adapters(model: PreTrainedModel, adapters: Adapters, seed: int, *, train_head: bool = False) -> Any:
    """Wrap with LoRA adapters; only they (and a classifier's head, if asked) are trained, in float32 at
    least."""
    settings = settings_for(model, adapters, train_head=train_head)
    with seeded(derive_seed("adapters", seed)):
        wrapped = with_adapters(model, settings)
    _try(wrapped)
    return wrapped


def settings_for(model: PreTrainedModel, adapters: Adapters, *, train_head: bool = False) -> PeftConfig:
    """peft's settings of adapters on a model. UsageError where it has none of the layers that are named."""
    import peft

    targets = (
        adapters.target_modules if isinstance(adapters.target_modules, str) else list(adapters.target_modules)
    )
    lora_targets.check_names(model, targets)
    return peft.LoraConfig(
        r=adapters.r, lora_alpha=adapters.alpha, lora_dropout=adapters.dropout, target_modules=targets,
        target_parameters=lora_targets.target_parameters(model, adapters.target_parameters),
        exclude_modules=(lora_targets.left_out(model) or None) if targets == "all-linear" else None,
        modules_to_save=head_modules(model) if train_head else None,
    )  # fmt: skip


def _try(model: Any) -> None:
    """UsageError where a forward of two tokens fails with the adapters on: they are on what is no product.
    Where another rank has the weights it tries them."""
    if next(model.parameters()).is_meta:
        return
    ids = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    was = model.training
    more = {"use_cache": False} if model.get_base_model().can_generate() else {}
    try:
        with accel.disabled(), torch.no_grad():
            model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), **more)
    except (RuntimeError, AttributeError, TypeError, ValueError, IndexError, AssertionError) as error:
        if not _reads(model, ids, more):
            return  # it cannot do with so short a text, whatever is on it
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"lora: a {type(model.get_base_model()).__name__} cannot be read with these adapters ({reason}); "
            "name other layers in `target_modules`"
        ) from error
    finally:
        model.train(was)


def _reads(model: Any, ids: Tensor, more: Mapping[str, Any]) -> bool:
    """Whether the model without its adapters reads the ids."""
    try:
        with model.disable_adapter(), accel.disabled(), torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), **more)
    except Exception:  # whatever its own code raises
        return False
    return True


def with_adapters(model: PreTrainedModel, settings: PeftConfig) -> Any:
    """A model wrapped by peft; what is trained is in float32 at least. UsageError for settings that do not
    fit it."""
    import peft

    try:
        wrapped = peft.get_peft_model(model, settings)
    except ValueError as error:
        raise UsageError(f"lora: {error}") from None
    ties.check(wrapped)
    for module in wrapped.modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad and p.dtype in HALF_PRECISION]
        for parameter in own:  # a step of AdamW is below what half precision resolves
            parameter.data = parameter.data.float()
        if own:
            module.register_forward_pre_hook(_in_own_precision)
    return wrapped


def head_modules(model: PreTrainedModel) -> list[str]:
    """Names of a classifier's modules that a language model does not have: those outside of its backbone, and
    the backbone's pooler."""
    prefix = model.base_model_prefix
    heads: dict[str, Any] = {name: child for name, child in model.named_children() if name != prefix}
    heads[f"{prefix}.pooler"] = getattr(getattr(model, prefix, None), "pooler", None)
    return [
        name
        for name, module in heads.items()
        if module is not None and any(True for _ in module.parameters())
    ]


def _in_own_precision(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A float32 module on a backbone of lower precision: what it is given is cast first."""
    dtype = next(module.parameters()).dtype
    return tuple(x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)


def merged(model: Any) -> Any:
    """The plain model with adapters folded in. Weights that are shared or quantised stay as they are: those
    that adapters are folded into are opened once more, on the CPU and in full precision."""
    if not hasattr(model, "merge_and_unload"):
        return model
    to_merge = with_own_weights(model)
    ties.untie(to_merge)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings", category=UserWarning)
        return to_merge.merge_and_unload()


def with_own_weights(model: Any) -> Any:
    """A model whose adapters may be merged into its weights: itself, or where these are shared or quantised
    the same adapters on the same base, opened once more."""
    afresh = getattr(model, "keel_afresh", None)
    return model if afresh is None or not hasattr(model, "peft_config") else _on(model, afresh())


def _on(model: PeftModel, plain: PreTrainedModel) -> Any:
    """The adapter of `model` on `plain`, the same base with weights of its own in full precision. `model`
    stays as it is."""
    from peft import set_peft_model_state_dict

    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain.config = config
    wrapped = with_adapters(plain, copy.deepcopy(model.active_peft_config))
    set_peft_model_state_dict(wrapped, _tensors(model))
    return wrapped.eval()


# ---------------------------------------------------------------- as files


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """What peft's `from_pretrained` reads (the trained head is among the tensors), and which weights it
    belongs on."""

    settings: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    base: str  # `identity` of the weights under it
    place: Path | None = None  # the base's folder; None for one of the hub

    def write(self, folder: Path, home: Path | None = None) -> None:
        """Write the three files; the same adapter gives the same bytes. home: where the folder will be. The
        way from there to a base of the same run is noted, so that both can be moved together."""
        folder.mkdir(parents=True)
        _write_settings(folder, self.settings)
        note = {"identity": self.base}
        if self.place is not None:
            ends = self.place.resolve(), (home or folder).resolve()
            if Path(os.path.commonpath(ends)).name == STAGES:
                note["path"] = os.path.relpath(*ends)
        (folder / BASE).write_text(json.dumps(note) + "\n", encoding="utf-8")
        save_file(dict(self.tensors), folder / WEIGHTS, metadata={"format": "pt"})


def _write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    text = json.dumps(settings, indent=2, sort_keys=True, default=sorted)  # peft keeps sets
    (folder / SETTINGS).write_text(text + "\n", encoding="utf-8")


def follow_base(folder: Path) -> None:
    """Let an adapter that was moved with its run name its base where that is now.

    peft opens a base by a whole path or a hub id, so the settings hold one. Nothing is changed where that
    path is still there, or where the noted way leads to other weights.
    """
    try:
        note, settings = json_object(folder / BASE), json_object(folder / SETTINGS)
    except UsageError:
        return  # who opens it is told
    way, named = note.get("path"), settings.get("base_model_name_or_path")
    if not way or (named and Path(named).exists()):
        return
    base = (folder.resolve() / way).resolve()
    if base.is_dir() and identity(ModelSource(str(base))) == note.get("identity"):
        _write_settings(folder, {**settings, "base_model_name_or_path": str(base)})


def base_of(folder: Path) -> str | None:
    """The hub id of the base of an adapter; None for one that lies in a folder of this machine."""
    named = json_object(folder / SETTINGS).get("base_model_name_or_path")
    return None if not named or Path(named).is_absolute() else named


def files_of(model: Any, source: ModelSource) -> AdapterFiles | None:
    """The adapter of a model, before it is merged; None where the model has none or starts from nothing.

    Its settings call the base by what peft opens from anywhere: a whole path, or a hub id with its revision.
    """
    if not hasattr(model, "peft_config") or source.path is None:
        return None
    scores, folder = "SequenceClassification" in type(model.get_base_model()).__name__, Path(source.path)
    settings = model.active_peft_config.to_dict() | {
        "base_model_name_or_path": str(folder.resolve()) if folder.exists() else source.path,
        "revision": source.revision,
        "inference_mode": True,
        "task_type": "SEQ_CLS" if scores else "CAUSAL_LM",
    }
    return AdapterFiles(settings, _tensors(model), identity(source), folder if folder.exists() else None)


def _tensors(model: PeftModel) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in found.items()}


def put_on(model: PreTrainedModel, folder: Path) -> Any:
    """A model with the frozen adapter of a folder on it, in evaluation mode. UsageError for one that does not
    fit."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    settings = settings_of(folder)
    settings.inference_mode = False  # so that it is in float32, as it was when it was trained
    try:
        tensors = load_file(folder / WEIGHTS)
        wrapped = with_adapters(model, settings)
        own = get_peft_model_state_dict(wrapped, save_embedding_layers=False).keys()
        # peft saves the base's matrix beside an adapter on embeddings or the head
        whole = get_peft_model_state_dict(wrapped, save_embedding_layers=True)
        beside = (tensors.keys() - own) & whole.keys()
        if lacks := own ^ (tensors.keys() - beside):
            raise UsageError(f"adapter {str(folder)!r} does not fit its base: {min(lacks)}")
        if others := [name for name in beside if not torch.equal(tensors[name].to(whole[name]), whole[name])]:
            raise UsageError(
                f"adapter {str(folder)!r} does not fit its base: it was trained on another {min(others)}"
            )
        set_peft_model_state_dict(wrapped, {name: tensors[name] for name in own})
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        reason = fault_in(str(folder)) or error
        raise UsageError(f"adapter {str(folder)!r} cannot be loaded: {reason}") from None
    return wrapped.requires_grad_(False).eval()


def settings_of(folder: Path) -> Any:
    """The settings of an adapter, peft's LoraConfig. UsageError for one that is no LoRA."""
    import peft

    try:
        found = peft.PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = fault_in(str(folder)) or error
        raise UsageError(f"adapter {str(folder)!r} cannot be loaded: {reason}") from None
    if not isinstance(found, peft.LoraConfig):
        raise UsageError(f"adapter {str(folder)!r} is of type {found.peft_type}; keel reads LoRA")
    return found


def folder_of(place: str) -> Path | None:
    """Where the adapter of a saved model lies: in its folder `adapter`, or in the folder itself where there
    is nothing but an adapter; of a hub id, which is downloaded (offline: what the cache has). None for a
    model without one."""
    root = Path(place)
    if not root.exists():
        try:
            wanted = [f"adapter/{name}" for name in (SETTINGS, WEIGHTS, BASE)] + [SETTINGS, WEIGHTS]
            root = Path(huggingface_hub.snapshot_download(place, allow_patterns=wanted))
        except (OSError, ValueError):
            return None
    return next((at for at in (root / "adapter", root) if (at / SETTINGS).is_file()), None)


def is_bare(place: str) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (Path(place) / SETTINGS).is_file() and not (Path(place) / "config.json").is_file()


def belongs_to(folder: Path, source: ModelSource) -> bool:
    """Whether an adapter was trained on these weights: by what keel noted of them, else by the name that peft
    noted."""
    note = folder / BASE
    if note.is_file():
        return json_object(note).get("identity") == identity(source)
    name = settings_of(folder).base_model_name_or_path
    if not name or source.path is None:
        return False
    return name == source.path or (Path(name).is_dir() and identity(ModelSource(name)) == identity(source))


def identity(source: ModelSource) -> str:
    """What tells the weights of a checkpoint from others, wherever it lies and in whatever precision it is
    opened: a hash of its safetensors files; for one that cannot be found on this machine its name."""
    assert source.path is not None
    folder = Path(source.path)
    if not folder.is_dir():
        try:
            folder = Path(
                huggingface_hub.snapshot_download(
                    source.path,
                    revision=source.revision,
                    local_files_only=True,
                    allow_patterns=["*.safetensors"],
                )
            )
        except (OSError, ValueError):
            return f"{source.path}@{source.revision or 'main'}"
    files = sorted(folder.glob("*.safetensors"))
    return _hash(tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files))


@cache
def _hash(files: tuple[tuple[str, int, int], ...]) -> str:
    """Of the content of files; their sizes and times are there so that changed ones are read again."""
    total = hashlib.sha256()
    for path, *_ in files:
        with Path(path).open("rb") as handle:
            while part := handle.read(1 << 24):
                total.update(part)
    return f"sha256:{total.hexdigest()}"
