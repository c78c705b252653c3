"""What a world's gold reward says of a model's own response."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from keel import worlds
from keel.data import chat
from keel.rollout.engine import text_of
from keel.types import Completion, Prompt


def world_of(gold: str) -> str:
    """The world's name in `world:NAME`, or `world:NAME/SPLIT`."""
    return gold.removeprefix("world:").partition("/")[0]


def gold_of(
    world: worlds.World,
    prompt: Prompt,
    completion: Completion,
    columns: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, float]:
    """Parts and `total` of a response; of a whole episode, where the world knows of tools. columns: the other
    ones of the prompt's row."""
    of_turns: Any = getattr(world, "gold_of_turns", None)
    if completion.dialogue is not None and of_turns is not None:
        return of_turns(completion.dialogue.happened, columns)
    return world.gold(chat.user_text(prompt), text_of(tokenizer, completion), columns)
