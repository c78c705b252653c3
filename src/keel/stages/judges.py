"""Opens the language models that judge: at an address, or in this process through keel's engine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from keel.config.judge import AnnotatorJudge, JudgeSettings
from keel.config.rewards import JudgeTerm
from keel.data import chat
from keel.data.batches import derive_seed
from keel.data.questions import Criterion, Question, Rubric, Verdict
from keel.distributed import group
from keel.errors import UsageError
from keel.models.load import (
    ModelSource,
    causal_lm,
    context_length,
    disable_dropout,
    load_tokenizer,
    model_config,
)
from keel.rewards.judge.client import Endpoint, Remote, Unanswered, library
from keel.rewards.judge.judging import Asked, Judge
from keel.rewards.judge.ledger import FILE, Ledger
from keel.rollout import GenerationRequest, KeelEngine
from keel.rollout.engine import text_of
from keel.rollout.sampling import uniform_draws
from keel.rundir.stage_run import StageRun
from keel.types import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def of_reward(term: JudgeTerm, stage_run: StageRun, *, dtype: str, trust_remote_code: bool) -> Judge:
    """The judge of a reward term. UsageError for a model that cannot be opened, a missing key or client."""
    return Judge(
        term.log_name,
        _asked(term, term.log_name, stage_run, dtype, trust_remote_code),
        rubric_of(term, term.scale),
        mode=term.mode,
        both_orders=term.both_orders,
        on_failure=term.on_failure,
        against=term.against,
        reference=term.reference,
    )


def of_annotator(
    settings: AnnotatorJudge, stage_run: StageRun, *, dtype: str, trust_remote_code: bool
) -> Judge:
    """The judge that compares pairs beside people."""
    name = settings.log_name
    asked = _asked(settings, name, stage_run, dtype, trust_remote_code)
    return Judge(
        name, asked, rubric_of(settings), mode="pairwise", both_orders=settings.both_orders,
        on_failure=settings.on_failure,
    )  # fmt: skip


def check_machine(settings: JudgeSettings, where: str) -> None:
    """UsageError where the client or the key is missing. where: the setting, for messages."""
    if settings.in_process:
        return
    try:
        library()
        key_of(settings)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def check_room(settings: JudgeSettings, context: int | None, where: str) -> None:
    """UsageError where an answer fills the context of a model in this process. where: the setting."""
    if context is not None and settings.max_new_tokens >= context:
        raise UsageError(
            f"{where}: `max_new_tokens` {settings.max_new_tokens} leaves no room for a question in its "
            f"model's context of {context}; lower it"
        )


def key_of(settings: JudgeSettings) -> str | None:
    """The key of the address, from the environment; None where it needs none. UsageError for an empty one."""
    if settings.api_key_env is None:
        return None
    key = os.environ.get(settings.api_key_env, "").strip()
    if not key:
        raise UsageError(f"the environment variable {settings.api_key_env} (`api_key_env`) is not set")
    return key


def rubric_of(settings: JudgeSettings, scale: tuple[int, int] = (1, 10)) -> Rubric:
    """What a judge judges by."""
    given = settings.rubric
    if isinstance(given, str):
        return Rubric(given, (), *scale, reasons=settings.reasons)
    criteria = tuple(Criterion(one.name, one.weight, one.description) for one in given)
    return Rubric("", criteria, *scale, reasons=settings.reasons)


def ledger_file(stage_run: StageRun) -> Path:
    """Where a run keeps what its judges said: in its directory, beside `stages`."""
    directory = stage_run.directory
    return (directory.parents[1] if directory.parent.name == "stages" else directory) / FILE


def _asked(
    settings: JudgeSettings, name: str, stage_run: StageRun, dtype: str, trust_remote_code: bool
) -> Asked:
    if settings.in_process:
        return Local(settings, stage_run, dtype, trust_remote_code)
    endpoint = Endpoint(
        str(settings.address), settings.model, key_of(settings), settings.temperature,
        settings.max_new_tokens, settings.tries, settings.timeout,
        max(1, settings.concurrency // group.size()),  # each rank asks about its own samples
    )  # fmt: skip
    ledger = Ledger(
        ledger_file(stage_run), f"{stage_run.name}/{name}", calls=settings.budget.calls,
        tokens=settings.budget.tokens, say=lambda line: stage_run.say(f"{stage_run.name}: {line}"),
    )  # fmt: skip
    library()

    def spent(calls: int, tokens: int) -> None:
        stage_run.facts.setdefault("judges", {})[name] = {"calls": calls, "tokens": tokens}

    def at_the_end() -> None:  # what other processes of the run have asked, too
        ledger.catch_up()
        spent(ledger.calls, ledger.tokens)

    stage_run.at_end(at_the_end)
    return Remote(endpoint, ledger, stop_at_failure=settings.on_failure == "error", spent=spent)


class Local:
    """A language model in this process, through keel's engine. The same questions get the same answers, so
    nothing is kept: a question is asked once, and not again where its answer cannot be read."""

    def __init__(
        self, settings: JudgeSettings, stage_run: StageRun, dtype: str, trust_remote_code: bool
    ) -> None:
        place = stage_run.resolve(settings.model)
        source = ModelSource(place, dtype=dtype, trust_remote_code=trust_remote_code)
        check_room(settings, context_length(model_config(source)), f"judge {settings.model!r}")
        model = causal_lm(source, 0).to(stage_run.device).eval().requires_grad_(False)
        disable_dropout(model)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(place, trust_remote_code=trust_remote_code)
        self.context = context_length(model.config)
        self.engine = KeelEngine(model)
        self.sampling = Sampling(settings.max_new_tokens, settings.temperature or 0.0)
        self.seed = derive_seed(stage_run.seed, "judge", settings.model)

    def ask(self, questions: Sequence[Question]) -> list[Verdict | Unanswered]:
        """A verdict on each question, or why there is none."""
        ids = [self._ids(question) for question in questions]
        room = None if self.context is None else self.context - self.sampling.max_new_tokens
        fitting = [i for i, own in enumerate(ids) if room is None or len(own) <= room]
        found: list[Verdict | Unanswered] = [
            Unanswered(f"the question takes {len(own)} tokens, and its context has room for {room}")
            for own in ids
        ]
        if fitting:
            prompts = [ids[i] for i in fitting]
            request = GenerationRequest.of(self.tokenizer, prompts, self.sampling, self.seed)
            request = replace(request, draws=self._draws(prompts))
            for i, completion in zip(fitting, self.engine.generate(request), strict=True):
                found[i] = self._read(questions[i], completion)
        return found

    def _draws(self, prompts: Sequence[Sequence[int]]) -> Tensor | None:
        """(N, max_new_tokens) random numbers, which follow from a question's tokens: its answer depends
        neither on what else is asked nor on which process asks. None where nothing is drawn."""
        if self.sampling.temperature == 0:
            return None
        seeds = [derive_seed(self.seed, tuple(prompt)) for prompt in prompts]
        return torch.cat([uniform_draws(1, self.sampling, seed) for seed in seeds])

    def _ids(self, question: Question) -> list[int]:
        """As a turn of a chat; as plain text for a model without a chat template."""
        if self.tokenizer.chat_template is None:
            return chat.prompt_ids(self.tokenizer, f"{question.text}\n")
        return chat.prompt_ids(self.tokenizer, ({"role": "user", "content": question.text},))

    def _read(self, question: Question, completion: Any) -> Verdict | Unanswered:
        if not completion.ended:
            return Unanswered(f"its answer was cut off at `max_new_tokens` {self.sampling.max_new_tokens}")
        told = text_of(self.tokenizer, completion)
        try:
            return question.read(told)
        except ValueError as error:
            return Unanswered(f"its answer cannot be read ({error}): {' '.join(told.split())[:80]!r}")
