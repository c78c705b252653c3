"""Reward models as adapters on the policy's base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from keel.errors import UsageError
from keel.models import lora
from keel.models.load import ModelSource, load_tokenizer, model_config
from keel.models.shared_base import Base
from keel.rewards import learned
from keel.rewards.learned import RewardModel


def load_members_on_base(
    path: str,
    base: Base,
    *,
    dtype: str,
    trust_remote_code: bool,
    say: Callable[[str], None],
    quantize: str | None = None,
) -> list[RewardModel]:
    """As `learned.load_members`, with each member as an adapter on `base` where its adapter was trained
    there.

    A member that was not is loaded by itself; `say` is told, since it takes memory of its own. UsageError if
    such a member is an adapter without a model, and for a `quantize` without effect.
    """
    paths, bare = [path], lora.is_bare(path)
    if not bare:
        source = ModelSource(path, trust_remote_code=trust_remote_code)
        paths += learned.other_members(model_config(source), path)
    models: list[RewardModel] = []
    for member in paths:
        folder = lora.folder_of(member)
        if folder is not None and lora.belongs_to(folder, base.source):
            if quantize is not None:
                raise UsageError(
                    f"reward model {member!r}: `quantize` has no effect: it is an adapter on the base, "
                    "which `model.quantize` is for"
                )
            models.append(put_on_base(base, member, folder, trust_remote_code=trust_remote_code))
            continue
        adapter = "its adapter was trained on another base"
        why = "all of its weights were trained" if folder is None else adapter
        if bare:
            raise UsageError(f"reward model {member!r} cannot be used: {why}, and there is no whole model")
        say(f"the reward model {member!r} takes memory of its own: {why}")
        device = next(base.model.parameters()).device
        models.append(
            learned.load(
                member, device=device, dtype=dtype, trust_remote_code=trust_remote_code, quantize=quantize
            )
        )
    return models


def put_on_base(base: Base, path: str, folder: Path, *, trust_remote_code: bool = False) -> RewardModel:
    """The reward model at `path` as its adapter, which lies in `folder`, on the base. UsageError for an
    adapter without a score head."""
    model = base.scorer(0)
    bare = lora.is_bare(path)
    saved = None if bare else model_config(ModelSource(path, trust_remote_code=trust_remote_code))
    scale = getattr(saved, "keel_reward", None)
    if scale is not None:
        model.config.keel_reward = scale
    if "score" not in (lora.settings_of(folder).modules_to_save or ()):
        raise UsageError(f"adapter {str(folder)!r} has no score head: it is none of a reward model")
    has_tokenizer = not bare or (Path(path) / "tokenizer_config.json").is_file()
    tokenizer_path = path if has_tokenizer else str(base.source.path)
    tokenizer = load_tokenizer(tokenizer_path, trust_remote_code=trust_remote_code)
    return learned.wrap(lora.put_on(model, folder), tokenizer)
