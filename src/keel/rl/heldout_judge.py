"""The held-out judge of a stage: a reward that nothing is trained on, asked now and then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from keel import worlds
from keel.config import OnPolicy
from keel.models.shared_base import Base
from keel.rewards.mixture import Mixture, Rated
from keel.rundir.stage_run import StageRun
from keel.stages import build_rewards
from keel.stages.gold import gold_of, world_of
from keel.types import Completion, Prompt

JUDGED = 64  # training prompts that are judged where the config holds none out


class Asked(Protocol):
    """A prompt with the other columns of its row."""

    @property
    def prompt(self) -> Prompt: ...
    @property
    def columns(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Judge:
    """One of the two."""

    gold: worlds.World | None
    rewards: Mixture | None
    opened: Sequence[build_rewards.LoadedReward] = ()  # what the rewards hold in memory


def open_judge(
    config: OnPolicy,
    run: StageRun,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    base: Base | None = None,
) -> Judge | None:
    """What `judge` names, on `base` where it can be; None without. longest: tokens of a prompt and its
    response at most."""
    settings = config.judge
    if settings is None:
        return None
    if settings.gold is not None:
        return Judge(worlds.load(world_of(settings.gold)), None)
    terms = settings.reward or []
    opened = build_rewards.load_rewards(
        terms, run, dtype=config.model.dtype, trust_remote_code=config.model.trust_remote_code, base=base
    )
    if config.uses_tools:
        build_rewards.check_episodes(opened, tokenizer, f"{run.name}: judge")
    rewards = build_rewards.mixture(
        opened,
        run,
        tokenizer,
        longest,
        normalize=len(terms) > 1,
        batch_size=config.rows_at_once or config.batch_size,
    )
    return Judge(None, rewards, opened)


def scores(
    judge: Judge | None,
    tasks: Sequence[Asked],
    completions: Sequence[Completion],
    tokenizer: PreTrainedTokenizerBase,
) -> Tensor:
    """(B,) what the judge says of each response: a world's total gold reward, or the weighted sum of the
    rewards. nan where a language model that may be silent said nothing."""
    if judge is None:
        return torch.zeros(len(tasks))
    if judge.rewards is not None:
        columns = build_rewards.columns_of(tasks)
        batch = build_rewards.batch_of([task.prompt for task in tasks], completions, columns, tokenizer)
        with build_rewards.whole_here(judge.opened):
            rated = judge.rewards.score(batch)
        return rated.total.masked_fill(~spoken_of(rated), float("nan"))
    assert judge.gold is not None
    pairs = zip(tasks, completions, strict=True)
    return torch.tensor(
        [
            gold_of(judge.gold, task.prompt, completion, task.columns, tokenizer)["total"]
            for task, completion in pairs
        ]
    )


def spoken_of(rated: Rated) -> Tensor:
    """(B,) bool: no judge was silent. Elsewhere a mean of others counts, which tells nothing new."""
    return ~torch.tensor(rated.silent or [False] * len(rated.total), dtype=torch.bool)


def error(judged: Tensor) -> float:
    """Standard error of the mean of (N,) values; 0 for a single one."""
    return (judged.double().std() / len(judged) ** 0.5).item() if len(judged) > 1 else 0.0
