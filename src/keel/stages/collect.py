"""Comparisons of a policy's own replies, to refresh a reward model on what the policy has become (2203.02155,
2204.05862).

Left out: pairs are drawn from one model at one temperature; none is chosen for what it would teach.

Annotators of a world vote at once. For people the run stops after the replies are written, or waits, and goes
on when there are votes enough: in the project of `keel label` that it has opened, or in a file beside them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keel import worlds
from keel.config import CollectConfig, ModelConfig
from keel.data import chat
from keel.data.batches import derive_seed, permutation
from keel.errors import DataError, WaitingError
from keel.models.load import ModelSource, causal_lm, context_length, disable_dropout, model_config
from keel.rollout import GenerationRequest
from keel.rollout.engine import text_of
from keel.rundir.checkpoint import write_text
from keel.rundir.stage_files import read_own
from keel.rundir.stage_run import StageRun
from keel.stages import judged_pairs, lazy_rows, people, prepare
from keel.stages.judged_pairs import JudgeVotes
from keel.stages.people import CHOICES, PAIRS, VOTES, Heard, Voted
from keel.stages.samplers import open_sampler
from keel.types import Completion, PromptRecord, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from keel.config.collect import LabelConfig

COMPARISONS = "comparisons.jsonl"  # pairs and votes, as rows of type preference
_WORDS = {"a": 1.0, "tie": 0.5, "b": 0.0}  # what a reviewer said, as P(a is better)
TRIES = 4  # draws of a second reply, until it differs from the first


def run(config: CollectConfig, stage_run: StageRun) -> dict[str, Any]:
    """1. prompts  2. two replies to each  3. votes  4. comparisons."""
    dataset = prepare.read(stage_run, config.data, ("prompt",))
    tasks, tokenizer = _tasks(config, stage_run, dataset.records, dataset.conversational)
    pairs_file = stage_run.directory / PAIRS
    if not pairs_file.exists():
        write_text(pairs_file, _lines(_pairs(config, stage_run, tasks, tokenizer)))
    pairs = _read(pairs_file)
    if not pairs:
        raise DataError(
            f"{stage_run.name}: the model gave no two different replies to any of {len(tasks)} prompts"
        )
    shown = pairs[: config.voted_pairs]  # to people, or the world's annotators
    if config.world is None:
        heard = _votes_of_people(config, stage_run, shown)
        stage_run.facts["votes_print"] = heard.print
    else:
        heard = Heard(tuple(_votes_of_world(config.world, stage_run, shown, [r for r, _ in tasks])), {}, 0, 0)
    judged = judged_pairs.ask(config, stage_run, pairs)
    labels, of_judges = (
        judged_pairs.weigh(stage_run, pairs, heard.votes, heard.words, judged) if judged else ({}, {})
    )
    rows = comparisons(pairs, heard.votes, heard.words, labels, judged)
    if not rows:
        raise DataError(f"{stage_run.name}: every pair was skipped: no comparison is left")
    write_text(stage_run.directory / COMPARISONS, _lines(rows))
    stage_run.facts |= {"rows": len(rows)}
    stage_run.say(
        f"{stage_run.name}: {len(rows)} comparisons, {len(tasks) - len(pairs)} prompts without two different "
        "replies"
    )
    return {
        "comparisons": len(rows), "same": len(tasks) - len(pairs), "skipped": len(pairs) - len(rows),
        "votes": sum(len(row["votes"] if "votes" in row else row["people_votes"]) for row in rows),
        "truncated": sum(pair["cut"] for pair in pairs) / (2 * len(pairs)),
        **({"judges": of_judges} if judged else {}),
    }  # fmt: skip


def votes_print(directory: Path, label: LabelConfig | None) -> str | None:
    """What people have said of a stage's pairs so far, as a short text; None where nobody has said
    anything. UsageError where the database of the pairs' project is not there."""
    pairs = _read(directory / PAIRS)
    heard = people.hear(directory, label, pairs) if pairs else None
    return heard.print if heard is not None and (heard.votes or heard.words) else None


def comparisons(
    pairs: Sequence[Mapping[str, Any]],
    votes: Sequence[Voted],
    words: Mapping[int, str] | None = None,
    labels: Mapping[int, float] | None = None,
    judged: Sequence[JudgeVotes] = (),
) -> list[dict[str, Any]]:
    """Rows of type preference: what more votes prefer is chosen, the first reply where none does. Pairs that
    somebody skipped, or on which nobody decided, are left out.

    words: pair → what a reviewer said, a, b or tie; that is the pair's label then, as `p_chosen`, and the
    votes are kept as `people_votes`. labels: pair → P(a is better) by people and judges together, a label in
    the same way. judged: what judges said, pair by pair, kept as `judge_votes`.
    """
    by_pair: dict[int, list[Voted]] = {}
    for vote in votes:
        if vote.choice != "abstain":
            by_pair.setdefault(vote.pair, []).append(vote)
    rows: list[dict[str, Any]] = []
    for place, pair in enumerate(pairs):
        votes_on_pair, word = by_pair.get(pair["pair"], []), (words or {}).get(pair["pair"])
        choices = [vote.choice for vote in votes_on_pair]
        p_a = _WORDS[word] if word is not None else (labels or {}).get(pair["pair"])
        if word is None and ("skip" in choices or (not votes_on_pair and p_a is None)):
            continue
        a_wins = choices.count("a") >= choices.count("b") if p_a is None else p_a >= 0.5
        names = {"a": "chosen", "b": "rejected"} if a_wins else {"a": "rejected", "b": "chosen"}
        sides = {names[side]: _reply(pair["prompt"], pair[side]) for side in ("a", "b")}
        named = [
            {"annotator": vote.annotator, "choice": names.get(vote.choice, "tie")} for vote in votes_on_pair
        ]
        row = {"prompt": pair["prompt"], "chosen": sides["chosen"], "rejected": sides["rejected"]}
        if p_a is None:
            row["votes"] = named
        else:
            row |= {"p_chosen": p_a if a_wins else round(1 - p_a, 6), "people_votes": named}
        if judged:
            said = [(one.name, one.choices[place]) for one in judged]
            row["judge_votes"] = [
                {"annotator": name, "choice": names.get(choice, "tie")} for name, choice in said if choice
            ]
        rows.append(row)
    return rows


# ---------------------------------------------------------------- replies


def _tasks(
    config: CollectConfig, stage_run: StageRun, records: Sequence[Record], conversational: bool
) -> tuple[list[tuple[PromptRecord, tuple[int, ...]]], Any]:
    """`pairs` prompts with their ids, drawn by the stage's seed, and the tokenizer. DataError where there are
    too few."""
    settings = ModelConfig.model_validate(
        {"path": config.model, "trust_remote_code": config.trust_remote_code}
    )
    tokenizer = prepare.open_tokenizer(settings, stage_run, conversational=conversational, reads=records)
    context = context_length(model_config(_source(config, stage_run)))
    room = prepare.room_of(stage_run, context, config.sampling.max_new_tokens)
    too_long = prepare.TooLong(stage_run, config.too_long, room)

    fitting = lazy_rows.of_prompts(records, tokenizer, too_long, lambda record, ids: (record, ids))
    too_long.report()
    if len(fitting) < config.pairs:
        raise DataError(
            f"{stage_run.name}: `pairs` is {config.pairs}, but there are {len(fitting)} prompts: give more, "
            "or fewer pairs"
        )
    order = permutation(len(fitting), derive_seed(stage_run.seed, "prompts"), 0)
    return [fitting[index] for index in order[: config.pairs]], tokenizer


def _source(config: CollectConfig, stage_run: StageRun) -> ModelSource:
    return ModelSource(
        stage_run.resolve(config.model), dtype=config.dtype, trust_remote_code=config.trust_remote_code
    )


def _pairs(
    config: CollectConfig,
    stage_run: StageRun,
    tasks: Sequence[tuple[PromptRecord, tuple[int, ...]]],
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict[str, Any]]:
    """Two replies to each prompt; prompts whose second reply stays the first, or of which one is empty, are
    left out."""
    model = causal_lm(_source(config, stage_run), 0).to(stage_run.device).eval().requires_grad_(False)
    disable_dropout(model)
    length = max(len(ids) for _, ids in tasks) + config.sampling.max_new_tokens
    engine = open_sampler(
        config.rollout, model, stage_run, tokenizer, batch_size=config.batch_size, length=length,
        trust_remote_code=config.trust_remote_code,
    )  # fmt: skip

    def sample(indices: Sequence[int], *what: object) -> list[Completion]:
        prompts, seed = [tasks[i][1] for i in indices], derive_seed(stage_run.seed, *what)
        return engine.generate(GenerationRequest.of(tokenizer, prompts, config.sampling.plain(), seed))

    everything = range(len(tasks))
    first = sample(everything, "a")
    second = sample(everything, "b", 0)
    stage_run.say(f"{stage_run.name}: {len(tasks)} prompts answered twice")
    for turn in range(1, TRIES):
        same = [i for i in everything if _alike(tokenizer, first[i], second[i])]
        again = sample(same, "b", turn) if same else []
        for i, completion in zip(same, again, strict=True):
            second[i] = completion
    rows: list[dict[str, Any]] = []
    for i in everything:
        a, b = (text_of(tokenizer, completion).strip() for completion in (first[i], second[i]))
        if a and b and a != b:
            cut = sum(completion.stop_reason == "length" for completion in (first[i], second[i]))
            rows.append({"pair": i, "prompt": tasks[i][0].prompt, "a": a, "b": b, "cut": cut})
    return rows


def _alike(tokenizer: PreTrainedTokenizerBase, one: Completion, other: Completion) -> bool:
    return text_of(tokenizer, one).strip() == text_of(tokenizer, other).strip()


def _reply(prompt: object, text: str) -> str | list[dict[str, str]]:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


# ---------------------------------------------------------------- votes


def _votes_of_world(
    name: str, stage_run: StageRun, pairs: Sequence[Mapping[str, Any]], records: Sequence[PromptRecord]
) -> list[Voted]:
    world = worlds.annotators(name)
    voted: list[Voted] = []
    for pair in pairs:
        record, rng = records[pair["pair"]], random.Random(derive_seed(stage_run.seed, "votes", pair["pair"]))
        votes = world.votes(chat.user_text(record.prompt), pair["a"], pair["b"], record.columns, rng)
        voted += [Voted(pair["pair"], who, choice) for who, choice in votes]
    return voted


def _votes_of_people(config: CollectConfig, stage_run: StageRun, pairs: Sequence[Mapping[str, Any]]) -> Heard:
    """What people say, once there are votes enough; until then WaitingError, or a wait where the run is to
    wait. DataError for a line of the file that is no vote."""
    title = f"{stage_run.directory.parents[1].name} {stage_run.name}"
    project = people.open_pairs(stage_run.directory, title, config.label, pairs, config.model)
    said = False
    while (heard := people.hear(stage_run.directory, config.label, pairs)).missing:
        reason = _waiting(config, stage_run, heard, len(pairs), project)
        if not stage_run.waits:
            raise WaitingError(f"{reason}; the same command then goes on")
        if not said:
            stage_run.say(f"{reason}; the run waits, and goes on by itself")
            said = True
        stage_run.progress(stage_run.name, heard.wanted - heard.missing, heard.wanted, {})
        people.pause()
    return heard


def _waiting(
    config: CollectConfig, stage_run: StageRun, heard: Heard, pairs: int, project: str | None
) -> str:
    """What is missing, and where people say it."""
    if project is not None:
        return (
            f"{stage_run.name}: {heard.missing} of {heard.wanted} votes on {pairs} pairs are missing, in the "
            f"project {project}. People vote on the pages of: {people.how_to_vote(config.label)}"
        )
    missing = f"{heard.missing} of {pairs} pairs wait for people, in {stage_run.directory / PAIRS}"
    return (
        f'{stage_run.name}: {missing}. Write a line {{"pair": 0, "annotator": "NAME", "choice": "a"}} for '
        f"each (choice: {', '.join(CHOICES)}; several annotators a pair are welcome) into "
        f"{stage_run.directory / VOTES}, or set `label: {{}}` to have the pairs in the pages of keel label"
    )


# ---------------------------------------------------------------- files


def _raw(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split("\n") if path.exists() else []


def _read(path: Path) -> list[dict[str, Any]]:
    return read_own(path, lines=True) if path.exists() else []


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
