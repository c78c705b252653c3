"""Whether a teacher can be asked about a student's tokens."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from keel.errors import UsageError
from keel.models.load import ModelSource, context_length, load_tokenizer, model_config
from keel.models.tokenizer import known_ids
from keel.rundir.stage_run import StageRun


def difference(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> str | None:
    """Where two tokenizers differ in what the student's ids stand for; None where the teacher can be given
    them as they are. Tokens that the teacher alone has do not matter."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    pad = student.pad_token if student.pad_token_id == known_ids(student) - 1 else None
    for token, number in sorted(ours.items(), key=lambda item: item[1]):
        if theirs.get(token) != number and token != pad:  # a pad of its own is drawn by nobody
            there = theirs.get(token)
            has = "has no such token" if there is None else f"calls it {there}"
            return f"{token!r} is {number} to the student, and the teacher {has}"
    return None


def check(
    config: Any,
    source: ModelSource | None,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    stage_run: StageRun,
) -> PreTrainedTokenizerBase | None:
    """The teacher's tokenizer where it reads the student's replies as text (`rl.through_text`), since it has
    other tokens; None where it reads their ids. UsageError for a teacher that cannot be asked what the
    settings ask for, or not about so many tokens. No weights are read.

    longest: the student's tokens of a prompt and its reply at most.
    """
    assert source is not None
    assert source.path is not None
    theirs = load_tokenizer(source.path, trust_remote_code=source.trust_remote_code)
    where = f"{stage_run.name}: teacher {source.path}"
    if (differs := difference(tokenizer, theirs)) is not None:
        if (said := refusal(config, differs)) is not None:
            raise UsageError(f"{where} {said}")
        stage_run.note(f"the teacher has another tokenizer ({differs}): it is asked through text")
        return theirs
    model = model_config(source)
    if (rows := model.get_text_config().vocab_size) < known_ids(tokenizer):
        raise UsageError(f"{where} has {rows} rows for the {known_ids(tokenizer)} tokens of its tokenizer")
    if (room := context_length(model)) is not None and longest > room:
        raise UsageError(
            f"{where} reads {room} tokens, and a prompt and its reply take up to {longest}: lower max_length "
            "or sampling.max_new_tokens"
        )
    if theirs.chat_template is not None and theirs.chat_template != tokenizer.chat_template:
        stage_run.note("the teacher reads prompts in the student's chat template, which is not its own")
    return None


def refusal(config: Any, differs: str) -> str | None:
    """What is wrong with settings that ask for more than a teacher of other tokens can say; None where all is
    well. differs: as of `difference`."""
    if (asked := _needs_distributions(config)) is None:
        return None
    return (
        f"has another tokenizer ({differs}), so it is asked through text, about what the student said and "
        f"nothing else, and {asked}; or take a teacher of the student's family"
    )


def _needs_distributions(config: Any) -> str | None:
    """What of the settings needs a teacher's distribution over the student's tokens, as a remedy; None for
    nothing."""
    if config.divergence != "reverse_kl":
        return f"`divergence: {config.divergence}` needs its whole distribution: set reverse_kl"
    if config.top_k is not None:
        return "`top_k` needs its likeliest tokens: leave it out"
    if config.demonstrations is not None:
        return "replies of the data are not the student's: leave `demonstrations` out"
    if config.uses_tools:
        return "episodes with tools are no single text: leave `tools` and `environment` out"
    return None
