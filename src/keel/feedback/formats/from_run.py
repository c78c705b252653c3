"""Pairs straight from a run: what two of its models said to the same prompts.

They are the samples of an evaluate stage that judged both models; where there is none, the models answer the
prompts of one now. Each pair names the models as its replies' sources, which no annotator is sent.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keel.data.batches import derive_seed, permutation
from keel.errors import UsageError
from keel.feedback.formats.base import Labels, key_of
from keel.votes.kinds import NewItem, Reply, Text

if TYPE_CHECKING:
    from keel.config import RunConfig, Stage

Said = list[tuple[Text, dict[str, Text]]]  # a prompt, and each model's reply to it


def read(run: Path, models: Sequence[str], pairs: int = 200, seed: int = 0) -> Labels:
    """At most `pairs` pairs of replies, one a prompt, of prompts drawn by the seed; of three models or more
    each two in turn. Equal and empty replies make no pair and are counted.

    UsageError for a path that is no run, fewer than two models, a model that the run does not have, and a run
    without prompts.
    """
    if not (run / "config.yaml").exists():
        raise UsageError(f"no run at {run}: there is no config.yaml in it")
    if len(set(models)) < 2:
        raise UsageError(f"pairs need two models or more, not {', '.join(models) or 'none'}")
    from keel.config import read as read_config

    config = read_config(run / "config.yaml")
    said = _samples(run, config, models) or _generated(run, config, models, pairs, seed)
    sides = list(itertools.combinations(models, 2))
    order = permutation(len(said), derive_seed("from-run", seed), 0)
    items: list[NewItem] = []
    equal = 0
    for number, index in enumerate(order):
        prompt, replies = said[index]
        first, second = sides[number % len(sides)]
        a, b = (said.strip() if isinstance(said, str) else said for said in (replies[first], replies[second]))
        if not a or not b or a == b:
            equal += 1
            continue
        key = key_of(prompt, first, a, second, b)
        items.append(NewItem(key, prompt, [Reply(a, first), Reply(b, second)]))
        if len(items) == pairs:
            break
    unique = list({item.key: item for item in items}.values())
    if not unique:
        raise UsageError(f"{run}: the models said the same to each of {len(said)} prompts")
    notes = (f"{equal} prompts with equal or empty replies left out",) if equal else ()
    if len(unique) < pairs:
        notes += (f"there are only {len(unique)} pairs",)
    return Labels("pairwise", unique, (), notes)


def _samples(run: Path, config: RunConfig, models: Sequence[str]) -> Said:
    """The samples of the evaluate stage that has most prompts which all the models answered."""
    found: Said = []
    for name, stage in config.stages.items():
        path = run / "stages" / name / "samples.jsonl"
        if stage.kind != "evaluate" or not path.exists():
            continue
        by_index: dict[int, dict[str, Text]] = {}
        prompts: dict[int, Text] = {}
        for line in path.read_text(encoding="utf-8").split("\n"):
            row = json.loads(line) if line else {}
            if row.get("model") in models:
                by_index.setdefault(row["index"], {})[row["model"]] = row["completion"]
                prompts[row["index"]] = row["prompt"]
        whole = [index for index, replies in by_index.items() if set(models) <= replies.keys()]
        if len(whole) > len(found):
            turns = _as_written(config, stage, prompts)
            found = [(turns.get(index, prompts[index]), by_index[index]) for index in whole]
    return found


def _as_written(config: RunConfig, stage: Stage, asked: Mapping[int, Text]) -> dict[int, Text]:
    """Index → the prompt as its data has it, of prompts that are text: samples of version 0.1 hold what the
    user said last. Those that the data, as they are now, do not have are left out."""
    from keel.data import chat

    texts = {index: prompt for index, prompt in asked.items() if isinstance(prompt, str)}
    if not texts:
        return {}

    try:
        prompts = _prompts(config, stage)
    except UsageError:  # the data are elsewhere now
        return {}
    by_text: dict[str, list[Any]] = {}
    for prompt in prompts:
        by_text.setdefault(chat.user_text(prompt), []).append(prompt)
    found: dict[int, Text] = {}
    for index, text in texts.items():
        same_place = index < len(prompts) and chat.user_text(prompts[index]) == text
        if same_place or len(by_text.get(text, ())) == 1:
            found[index] = _turns(prompts[index] if same_place else by_text[text][0])
    return found


def _generated(run: Path, config: RunConfig, models: Sequence[str], pairs: int, seed: int) -> Said:
    """The models answer prompts of the run, as the stage that has them samples."""
    folders = {model: _folder(run, config, model) for model in models}
    kinds = ("evaluate", "ppo", "grpo", "online_dpo", "distill", "collect", "best_of_n")
    stages = [s for kind in kinds for s in config.stages.values() if s.kind == kind and s.main_data()]
    if not stages:
        raise UsageError(f"{run} has no stage with prompts, and no samples of {', '.join(models)} to compare")
    stage = stages[0]
    if getattr(stage, "uses_tools", False):
        raise UsageError(
            f"{run} has no samples of {', '.join(models)} to compare, and its prompts are for episodes with "
            "tools: run an evaluate stage of these models with the same `tools` and `environment`"
        )
    prompts = _prompts(config, stage)
    # some prompts get equal replies: a quarter more are asked than pairs are wanted
    order = permutation(len(prompts), derive_seed("from-run prompts", seed), 0)[: pairs + pairs // 4 + 4]
    asked = [prompts[index] for index in order]
    said = {
        model: _answers(folder, asked, config, stage, derive_seed("from-run", seed, model))
        for model, folder in folders.items()
    }
    return [
        (_turns(prompt), {model: replies[i] for model, replies in said.items()})
        for i, prompt in enumerate(asked)
    ]


def _answers(folder: str, prompts: Sequence[Any], config: RunConfig, stage: Stage, seed: int) -> list[str]:
    """A model's replies, drawn as the stage draws."""
    from keel.data import chat
    from keel.models.load import ModelSource, causal_lm, disable_dropout, load_tokenizer
    from keel.pipeline.device import device_of
    from keel.rollout import GenerationRequest, KeelEngine
    from keel.rollout.engine import text_of
    from keel.types import Sampling

    model = causal_lm(ModelSource(folder), 0).to(device_of(config)).eval().requires_grad_(False)
    disable_dropout(model)
    tokenizer = chat.with_chat_template(load_tokenizer(folder))
    sampling = Sampling() if stage.replies is None else stage.replies.plain()
    ids = [chat.prompt_ids(tokenizer, prompt) for prompt in prompts]
    done = KeelEngine(model, 64).generate(GenerationRequest.of(tokenizer, ids, sampling, seed))
    return [text_of(tokenizer, completion) for completion in done]


def _prompts(config: RunConfig, stage: Stage) -> list[Any]:
    from keel.data.load import load
    from keel.types import PromptRecord

    sources, accept = stage.main_data()[0]
    dataset = load(sources, accept, config.seed)
    return [record.prompt for record in dataset.records if isinstance(record, PromptRecord)]


def _folder(run: Path, config: RunConfig, model: str) -> str:
    """Where a model of a run lies. UsageError for one that it does not have."""
    folder = run / "stages" / model / "model"
    if model in config.stages:
        if not (folder / "config.json").exists():
            raise UsageError(f"the stage {model!r} of {run} has left no model; run it first")
        return str(folder)
    if Path(model).is_dir():
        return model
    raise UsageError(f"{run} has no stage {model!r}; it has {', '.join(config.stages)}")


def _turns(prompt: Any) -> Text:
    return prompt if isinstance(prompt, str) else [dict(turn) for turn in prompt]
