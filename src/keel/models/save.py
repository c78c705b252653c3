"""What a stage leaves: a folder that `from_pretrained` reads, never half-written."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keel import accel
from keel.data import chat
from keel.errors import UsageError
from keel.models.load import score_head
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
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write what `from_pretrained` reads, plus a model card, the adapter that was merged in, and copies of an
    ensemble's other members. The model is left as transformers made it. Replaces `directory` by rename: never
    half-written. check: is given the folder first; if it raises, `directory` stays as it was."""
    partial, old = (directory.with_name(f".{directory.name}.{kind}") for kind in ("partial", "old"))
    for left_over in (partial, old):
        shutil.rmtree(left_over, ignore_errors=True)
    _name_ends(model, tokenizer)
    try:
        accel.restore(model).save_pretrained(partial)
        _forget_calls(tokenizer)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
        if adapter is not None:
            adapter.write(partial / "adapter", directory / "adapter")
        for number, member in enumerate(members, 2):
            shutil.copytree(member, partial / "members" / str(number))
    except BaseException:  # half a model would keep a full disk full
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if check is not None:
        check(partial)
    if directory.exists():
        directory.rename(old)
    partial.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def _name_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write into a model's configs the pad, and of a decoder every id that ends its replies: another engine
    stops where a rollout of keel stops."""
    if tokenizer.eos_token_id is None and tokenizer.pad_token_id is None:
        return
    generates = model.can_generate()
    configs: list[Any] = [model.config, model.config.get_text_config()]
    if generates and getattr(model, "generation_config", None) is not None:
        configs.append(model.generation_config)
    pad = chat.ensure_pad(tokenizer)
    ends = _ends(tokenizer) if generates or score_head(model) is not None else ()
    for config in configs:
        config.pad_token_id = pad
        if ends:
            config.eos_token_id = ends[0] if len(ends) == 1 else list(ends)
    if generates:
        _make_valid(model)


def _ends(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends a reply; those of EOS alone where the chat template cannot be used."""
    if tokenizer.eos_token_id is None:
        return ()
    try:
        return chat.stop_ids(tokenizer, ())
    except UsageError:
        return chat.eos_ids(tokenizer)


def _make_valid(model: Any) -> None:
    """transformers refuses to save a generation_config whose sampling settings have no effect, which some
    published models have: they are meant to sample."""
    generation: Any = getattr(model, "generation_config", None)
    if generation is None:
        return
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True


def _forget_calls(tokenizer: PreTrainedTokenizerBase) -> None:
    """Truncation and padding of the last call stay in a fast tokenizer, and would be written into
    tokenizer.json: whoever reads that file without transformers would have every text cut."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
