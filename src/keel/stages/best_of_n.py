"""Best-of-n: sample, score, keep the best of each prompt, fine-tune on them. The baseline that every RL run
must beat.

What the sampling alone would cost in KL is known: log n − (n − 1)/n nats at most (2009.01325, 2401.01879).
The fine-tuned model only imitates it; its own KL is measured by `evaluate`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from keel.config import BestOfNConfig
from keel.data import chat
from keel.data.batches import derive_seed
from keel.data.holdout import Split, split_holdout
from keel.distributed import group
from keel.errors import DataError
from keel.evaluation.measures import mean_interval
from keel.evaluation.policies import best_of_n_kl
from keel.models.load import ModelSource, causal_lm
from keel.rollout.engine import text_of
from keel.rollout.vllm.shared import idle
from keel.rundir.checkpoint import write_text
from keel.rundir.stage_files import read_own
from keel.rundir.stage_run import StageRun
from keel.stages import build_rewards, language, lazy_rows, prepare, tool_use
from keel.stages.lazy_rows import PromptExample
from keel.stages.loop_utils import SAMPLES_KEPT, micro_batches
from keel.stages.samplers import open_sampler
from keel.types import Completion, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHOSEN = "best.jsonl"  # the best response to each prompt, as ids and text
SAMPLE_KEYS = ("prompt", "completion", "rewards", "reward", "mean", "length", "stop_reason")
PROMPTS_AT_ONCE = 32


def run(config: BestOfNConfig, stage_run: StageRun) -> dict[str, Any]:
    """1. prompts  2. n scored samples of each  3. the best ones  4. supervised fine-tuning  5. save."""
    dataset = prepare.read(stage_run, config.data, ("prompt",))
    source = prepare.source_of(config.model, stage_run)
    tokenizer = prepare.open_tokenizer(
        config.model, stage_run, conversational=dataset.conversational, reads=dataset.records
    )
    prepare.look_for_marks(stage_run, tokenizer, dataset.records)
    limit = prepare.limit_of(config, stage_run, source)
    room = prepare.room_of(stage_run, limit, config.sampling.max_new_tokens)
    chat.stop_ids(tokenizer, config.sampling.stop)
    too_long = prepare.TooLong(stage_run, config.too_long, room)

    tools = tool_use.open_tools(config, stage_run, tokenizer)
    if tools:
        tools.too_long = too_long
    tasks = lazy_rows.of_prompts(
        dataset.records, tokenizer, too_long,
        lambda record, ids: PromptExample(record.prompt, ids, record.columns),
        tools.render if tools else lambda prompt: prompt,
    )  # fmt: skip
    too_long.report()
    chosen = stage_run.directory / CHOSEN
    if not group.from_first(chosen.exists):
        best_rows = _sample(config, stage_run, source, tokenizer, tasks, tools)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in best_rows)
        group.only_first(lambda: write_text(chosen, lines))
    best = group.from_first(lambda: read_own(chosen, lines=True))
    kept = [row for row in best if config.min_reward is None or row["reward"] >= config.min_reward]
    if not kept:
        raise DataError(
            f"{stage_run.name}: no response reaches min_reward {config.min_reward}; nothing is left to learn "
            "from"
        )
    rows = [_row(row) for row in kept]
    split = _split(config, stage_run, [row["prompt_ids"] for row in kept])
    sampled = len(tasks) * config.samples_per_prompt
    stage_run.facts |= {"prompts": len(tasks), "samples": sampled, "kept": len(kept)}

    model = prepare.opened(lambda: causal_lm(source, language.model_seed(stage_run)), source, config)
    model = prepare.to_train(model, config, stage_run)
    trained, evaluated = [rows[i] for i in split.train], [rows[i] for i in split.held_out]
    result = language.fit(stage_run, config, model, chat.ensure_pad(tokenizer), trained, evaluated)
    stage_run.samples([{key: row[key] for key in SAMPLE_KEYS} for row in kept[:SAMPLES_KEPT]])
    prepare.save_model(
        stage_run, model, tokenizer, config, "A language model fine-tuned on the best of its own samples"
    )
    return result | {
        "reward_best": mean_interval([row["reward"] for row in best]),
        "reward_mean": mean_interval([row["mean"] for row in best]),
        "kl_bound": best_of_n_kl(config.samples_per_prompt),
        "kept": len(kept) / len(best),
    }  # fmt: skip


def _sample(
    config: BestOfNConfig,
    stage_run: StageRun,
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[PromptExample],
    tools: tool_use.ToolUse | None,
) -> list[dict[str, Any]]:
    """The best response to each prompt, and the mean reward of all n. One that was cut off is chosen only
    where none ended. Several ranks share the prompts."""
    sampling, n = config.sampling.plain(), config.samples_per_prompt
    model = causal_lm(source, 0).to(stage_run.device).eval().requires_grad_(False)
    loaded = build_rewards.load_rewards(
        config.reward, stage_run, dtype=config.model.dtype, trust_remote_code=config.model.trust_remote_code
    )
    if tools:
        build_rewards.check_episodes(loaded, tokenizer, stage_run.name)
    longest = max(lazy_rows.sizes(tasks, lambda task: len(task.ids))) + sampling.max_new_tokens
    rewards = build_rewards.mixture(
        loaded, stage_run, tokenizer, longest, normalize=len(config.reward) > 1, batch_size=config.batch_size
    )
    engine = open_sampler(
        config.rollout, model, stage_run, tokenizer, batch_size=PROMPTS_AT_ONCE * n,
        length=None if tools else longest,  # what a `reset` puts behind a prompt is not known yet
        trust_remote_code=config.model.trust_remote_code,
    )  # fmt: skip

    def answered(numbered: tuple[int, Sequence[PromptExample]]) -> list[Any]:
        number, part = numbered
        best_rows: list[dict[str, Any]] = []
        repeated = [task for task in part for _ in range(n)]
        seed = derive_seed(stage_run.seed, "samples", number)
        begun, done = tool_use.sampled(
            tools, engine, repeated, sampling, seed, tokenizer=tokenizer, samples=n
        )
        columns = build_rewards.columns_of(begun)
        rated = rewards.score(build_rewards.batch_of([one.prompt for one in begun], done, columns, tokenizer))
        totals = rated.total.tolist()
        for start in range(0, len(done), n):
            of_prompt = range(start, start + n)
            best = max(of_prompt, key=lambda i: (done[i].ended, totals[i], -i))
            best_rows.append(_chosen(begun[best].prompt, done[best], tokenizer) | {
                "reward": totals[best], "mean": sum(totals[i] for i in of_prompt) / n,
                "rewards": {name: values[best] for name, values in rated.by_name.items()},
            })  # fmt: skip
        if group.size() == 1:
            so_far = number * PROMPTS_AT_ONCE + len(part)
            stage_run.say(f"{stage_run.name}: {so_far} of {len(tasks)} prompts answered {n} times")
        return best_rows

    parts = group.mapped(
        list(enumerate(micro_batches(tasks, PROMPTS_AT_ONCE))), answered, lambda: idle(engine)
    )
    return [row for rows in parts for row in rows]


def _split(config: BestOfNConfig, stage_run: StageRun, prompts: Sequence[Sequence[int]]) -> Split:
    """The best responses to train on and to evaluate on, no prompt on both sides."""
    numbers: dict[tuple[int, ...], int] = {}
    keys = [numbers.setdefault(tuple(prompt), len(numbers)) for prompt in prompts]
    try:
        return split_holdout(keys, config.holdout, stage_run.seed)
    except ValueError:
        raise DataError(
            f"{stage_run.name}: all {len(keys):,} rows have one prompt, so that none can be held out apart "
            "from those trained on; set `holdout: 0`"
        ) from None


def _chosen(prompt: Prompt, completion: Completion, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    dialogue = completion.dialogue
    said = text_of(tokenizer, completion) if dialogue is None else list(dialogue.happened)
    return {
        "prompt": prompt, "completion": said, "prompt_ids": completion.prompt_ids, "ids": completion.ids,
        "length": len(completion.own_ids), "stop_reason": completion.stop_reason,
        **({} if dialogue is None else {"own": dialogue.own}),
    }  # fmt: skip


def _row(best: dict[str, Any]) -> language.LanguageRow:
    """The ids as they were sampled; the response counts, its stop token included. Of an episode with tools
    the model's own tokens."""
    prompt, response = best["prompt_ids"], best["ids"]
    own = best.get("own") or [True] * len(response)
    return language.LanguageRow([*prompt, *response], [False] * len(prompt) + list(own))
