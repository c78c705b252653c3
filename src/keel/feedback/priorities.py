"""Which items people should judge first: those of which reward models are unsure.

A project with the order "uncertain" hands out the items with the highest priority first, and a share of items
at random beside them; which of the two an item was stands with each vote (`how`), so that estimates of
agreement or of win rates can be made from the random ones alone and stay unbiased.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keel.errors import UsageError
from keel.votes.kinds import ItemRow, Text

if TYPE_CHECKING:
    from keel.votes.store import Store

Array = np.ndarray[Any, Any]
Scorer = Callable[[Sequence[Text], Sequence[Text]], Array]  # prompts, replies → (M, B) raw scores


def rank(store: Store, project: str, rewards: Sequence[str]) -> int:
    """Give the open items of a project a priority by reward models; how many got one. Known answers (gold)
    get none.

    rewards: folders, hub ids or runs/NAME/stages/STAGE of one model or several, ensembles among them.
    UsageError for a task that no reward model can tell about, and for models that cannot be read.
    """
    task = store.project(project).task
    if task not in ("pairwise", "ranking"):
        raise UsageError(
            f"a {task} project cannot be ranked: reward models tell which of two replies is better"
        )
    if not rewards or not all(rewards):
        raise UsageError("give one reward model or more")
    items = [row for row in store.items(project) if row.gold is None and row.missing > 0]
    if not items:
        return 0
    values = of_items(items, scorer(rewards))
    return store.set_priorities(project, {row.key: v for row, v in zip(items, values, strict=True)})


def of_items(items: Sequence[ItemRow], score: Scorer) -> list[float]:
    """A priority for each item: `information` of its pair, of a ranking the mean over its pairs."""
    prompts = [row.prompt for row in items for _ in row.replies]
    replies = [reply.content for row in items for reply in row.replies]
    scores = score(prompts, replies)
    found: list[float] = []
    start = 0
    for row in items:
        own = scores[:, start : start + len(row.replies)]
        start += len(row.replies)
        differences = np.stack([own[:, i] - own[:, j] for i, j in combinations(range(own.shape[1]), 2)])
        found.append(float(information(differences.T).mean()))
    return found


def information(differences: Array) -> Array:
    """(M, N) r_m(first) − r_m(second) of M models on N pairs → (N,) how much a vote would tell, in nats.

    With one model: the entropy of its own forecast, H(σ(Δ)), the highest where it holds both sides for
    equal. With several: the mutual information of the vote and the model (BALD, 1112.5745),

        H(mean_m σ(Δ_m)) − mean_m H(σ(Δ_m)),

    the highest where each is sure and they contradict each other: what all hold for even is noise that no
    vote settles. Scores are raw, so that σ(Δ) is a Bradley–Terry forecast.
    """
    p = 1 / (1 + np.exp(-np.clip(differences, -60, 60)))
    if len(p) == 1:
        return _entropy(p[0])
    return _entropy(p.mean(axis=0)) - _entropy(p).mean(axis=0)


def _entropy(p: Array) -> Array:
    p = np.clip(p, 1e-12, 1 - 1e-12)
    return -(p * np.log(p) + (1 - p) * np.log1p(-p))


def scorer(rewards: Sequence[str]) -> Scorer:
    """Raw scores by all members of these reward models, on the device there is. UsageError for a model that
    is none."""
    import torch

    from keel.data import chat
    from keel.rewards import learned

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    members: list[Any] = []
    for name in rewards:
        inside = Path(name) / "model"
        place = str(inside) if (inside / "config.json").exists() else name
        members += learned.load_members(place, device=device, dtype="auto")
    for member in members:
        chat.with_chat_template(member.tokenizer)

    def score(prompts: Sequence[Text], replies: Sequence[Text]) -> Array:
        rows = [_typed(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]
        scores = [
            learned.score(m, [learned.encode(m, *learned.as_trained(m, *row)) for row in rows])
            for m in members
        ]
        return torch.stack(scores).double().numpy()

    return score


def _typed(prompt: Text, reply: Text) -> tuple[Any, Any]:
    """A prompt and its reply as training has them: both text, or both turns."""
    if isinstance(prompt, str) and isinstance(reply, str):
        return prompt, reply
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answer = [{"role": "assistant", "content": reply}] if isinstance(reply, str) else reply
    return tuple(dict(turn) for turn in turns), tuple(dict(turn) for turn in answer)
