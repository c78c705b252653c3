"""What a stage leaves: a folder that `from_pretrained` reads, never half-written."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from keel import accel
from keel.data import chat
from keel.models.lora import AdapterFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    card: str,
    members: Sequence[Path] = (),
    adapter: AdapterFiles | None = None,
) -> None:
    """Write what `from_pretrained` reads, plus a model card, the adapter that was merged in, and copies of an
    ensemble's other members. The model is left as transformers made it. Replaces `directory` by rename: never
    half-written."""
    partial, old = (directory.with_name(f".{directory.name}.{kind}") for kind in ("partial", "old"))
    for left_over in (partial, old):
        shutil.rmtree(left_over, ignore_errors=True)
    _name_ends(model, tokenizer)
    accel.restore(model).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "README.md").write_text(card, encoding="utf-8")
    if adapter is not None:
        adapter.write(partial / "adapter")
    for number, member in enumerate(members, 2):
        shutil.copytree(member, partial / "members" / str(number))
    if directory.exists():
        directory.rename(old)
    partial.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def _name_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write into a language model's configs every id that ends its replies, and the pad: another engine stops
    where a rollout of keel stops."""
    generation = getattr(model, "generation_config", None)
    if generation is None or tokenizer.eos_token_id is None or not model.can_generate():
        return
    ends = chat.stop_ids(tokenizer, ())
    for config in (model.config, generation):
        config.eos_token_id = ends[0] if len(ends) == 1 else list(ends)
        if getattr(config, "pad_token_id", None) is None:  # a config that holds another may lack it
            config.pad_token_id = chat.ensure_pad(tokenizer)
