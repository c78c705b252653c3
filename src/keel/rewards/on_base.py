"""Reward models that are adapters: on the policy's base they take no weights of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from keel.models import adapters
from keel.models.load import ModelSource, load_tokenizer, model_config
from keel.models.shared import Base
from keel.rewards import learned
from keel.rewards.learned import RewardModel
from keel.types import UsageError


def load_members(
    path: str,
    base: Base,
    *,
    dtype: str,
    trust_remote_code: bool,
    say: Callable[[str], None],
    quantize: str | None = None,
) -> list[RewardModel]:
    """As `learned.load_members`, each member on `base` if its adapter was trained there. `say` is told of one that was not,
    and takes memory of its own. UsageError if it is an adapter alone, which is nothing without its base, and for a
    `quantize` without effect."""
    places, bare = [path], adapters.is_bare(path)
    if not bare:
        source = ModelSource(path, trust_remote_code=trust_remote_code)
        places += learned.other_members(model_config(source), path)
    found: list[RewardModel] = []
    for place in places:
        folder = adapters.folder_of(place)
        if folder is not None and adapters.belongs_to(folder, base.source):
            if quantize is not None:
                raise UsageError(
                    f"reward model {place!r}: `quantize` has no effect: it is an adapter on the base, which `model.quantize` is for"
                )
            found.append(on(base, place, folder, trust_remote_code=trust_remote_code))
            continue
        why = (
            "all of its weights were trained" if folder is None else "its adapter was trained on another base"
        )
        if bare:
            raise UsageError(f"reward model {place!r} cannot be used: {why}, and there is no whole model")
        say(f"the reward model {place!r} takes memory of its own: {why}")
        device = next(base.model.parameters()).device
        found.append(
            learned.load(
                place, device=device, dtype=dtype, trust_remote_code=trust_remote_code, quantize=quantize
            )
        )
    return found


def on(base: Base, place: str, folder: Path, *, trust_remote_code: bool = False) -> RewardModel:
    """The reward model at `place` as its adapter, in `folder`, on the base. UsageError for an adapter without a score head."""
    model = base.scorer(0)
    bare = adapters.is_bare(place)
    saved = None if bare else model_config(ModelSource(place, trust_remote_code=trust_remote_code))
    scale = getattr(saved, "keel_reward", None)
    if scale is not None:
        model.config.keel_reward = scale
    if "score" not in (adapters.settings_of(folder).modules_to_save or ()):
        raise UsageError(f"adapter {str(folder)!r} has no score head: it is none of a reward model")
    own_words = not bare or (Path(place) / "tokenizer_config.json").is_file()
    words = place if own_words else str(base.source.path)
    tokenizer = load_tokenizer(words, trust_remote_code=trust_remote_code)
    return learned.wrap(adapters.put_on(model, folder), tokenizer)
