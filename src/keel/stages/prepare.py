"""What a stage starts from (model, tokenizer, tokenised rows) and what it leaves (a model with a card)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

import keel
from keel.config import DataConfig, LoraConfig, ModelConfig, Supervised, Training
from keel.data import chat
from keel.data.batches import derive_seed
from keel.data.holdout import hold_out
from keel.data.identity import shared
from keel.data.load import Dataset
from keel.data.stored.records import picked
from keel.distributed import group, sharded
from keel.errors import DataError, UsageError
from keel.models import model_card
from keel.models.load import ModelSource, checkpoint_activations, context_length, load_tokenizer, model_config
from keel.models.lora import Adapters, add_adapters, files_of
from keel.models.lora_targets import notes
from keel.models.saved_check import save_checked
from keel.models.tokenizer import check_reads, knows_conversations, rows_needed
from keel.rundir.stage_run import StageRun
from keel.types import DemonstrationRecord, PreferenceRecord, Record, RecordType, TextRecord, UnpairedRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

READ_FIRST, READ_CHARACTERS = 64, 2_000  # texts, and of each, that a tokenizer is tried on


def source_of(config: ModelConfig, stage_run: StageRun) -> ModelSource:
    """The config's model with another stage's name replaced by where that stage's model lies."""
    source = source_without_rows(config, stage_run)
    if not config.resize:
        return source
    path = str(source.path)
    tokenizer = load_tokenizer(path, trust_remote_code=config.trust_remote_code, revision=config.revision)
    return replace(source, rows=rows_needed(source, tokenizer, resize=True))


def source_without_rows(config: ModelConfig, stage_run: StageRun) -> ModelSource:
    """As `source_of`, as the model is before it is resized."""
    path = stage_run.resolve(config.path) if config.path else None
    init = config.init.model_dump() if config.init else None
    return ModelSource(
        path,
        init,
        config.dtype,
        config.trust_remote_code,
        config.revision,
        config.quantize,
        config.router_aux_loss_coef,
    )


def open_tokenizer(
    config: ModelConfig,
    stage_run: StageRun,
    *,
    conversational: bool = False,
    reads: Sequence[Record] = (),
    teaches: bool = False,
) -> Any:
    """The model's tokenizer, with the config's chat template, or keel's default one where conversations need
    one. reads: rows, of which it must know the words (`check_reads`). teaches: whether the stage is there to
    teach the template; others note where conversations meet a model that has seen none."""
    path = config.tokenizer or (stage_run.resolve(config.path) if config.path else None)
    if path is None:
        raise UsageError(f"{stage_run.name}: a new model needs `tokenizer`; only a pretrain stage trains one")
    tokenizer = load_tokenizer(path, trust_remote_code=config.trust_remote_code, revision=config.revision)
    known = False
    if config.path:
        source = source_without_rows(config, stage_run)
        rows_needed(source, tokenizer, resize=config.resize)
        known = knows_conversations(model_config(source), tokenizer)
    if config.chat_template:
        tokenizer.chat_template = config.chat_template
    elif conversational:
        if config.path and not known and not teaches:
            stage_run.note(_untaught(config.path, tokenizer))
        chat.with_chat_template(tokenizer)
    tokenizer.keel_conversations = known or conversational  # for `save_model`
    chat.ensure_pad(tokenizer)
    check_reads(tokenizer, first_words(_words(reads)), path)
    return tokenizer


def _untaught(model: str, tokenizer: PreTrainedTokenizerBase) -> str:
    template = "its chat template" if tokenizer.chat_template else "keel's default template"
    return (
        f"the model {model} was trained on plain text; these rows are conversations, and reach it in "
        f"{template}, a form that it has not seen. Train it on conversations first (a stage of kind sft), "
        "give rows as text, or name the template that its texts had (model.chat_template)"
    )


def first_words(texts: Iterable[str]) -> Iterator[str]:
    """The starts of the first texts, which a tokenizer is tried on."""
    return (text[:READ_CHARACTERS] for text in islice(texts, READ_FIRST))


def _words(records: Sequence[Record]) -> Iterator[str]:
    """What people wrote in rows."""
    for record in records:
        parts = [record.text if isinstance(record, TextRecord) else record.prompt]
        if isinstance(record, DemonstrationRecord | UnpairedRecord):
            parts.append(record.completion)
        if isinstance(record, PreferenceRecord):
            parts += [record.chosen, record.rejected]
        for part in parts:
            yield chat.completion_text(part)


def adapters_of(config: LoraConfig) -> Adapters:
    """The config's adapters as `models.lora` takes them."""
    targets = (
        config.target_modules if isinstance(config.target_modules, str) else tuple(config.target_modules)
    )
    parameters = config.target_parameters
    parameters = tuple(parameters) if isinstance(parameters, list) else parameters
    return Adapters(config.r, config.alpha, config.dropout, targets, parameters)


def to_train(
    model: PreTrainedModel, config: Training, stage_run: StageRun, *, train_head: bool = False
) -> Any:
    """The model on its device, with adapters and checkpointed activations where the config asks for them. One
    that is cut over ranks goes there as it is cut, unit by unit, so that no card has it whole; but for packed
    rows, which are tried on it first."""
    if not group.is_sharded() or getattr(config, "packing", False):
        cast("nn.Module", model).to(stage_run.device)
    if config.lora:
        seed = derive_seed(stage_run.seed, "model")
        model = add_adapters(model, adapters_of(config.lora), seed, train_head=train_head)
        for line in notes(model):
            stage_run.say(f"{stage_run.name}: {line}")
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    return model


def opened(work: Callable[[], Any], source: ModelSource, config: Training) -> Any:
    """A model that is to be trained. Where its weights will be cut over ranks the first one alone opens it;
    but for code that a model brings, which each imports, and for packed rows, which are tried on it first."""
    by_each = source.trust_remote_code or source.quantize or getattr(config, "packing", False)
    return work() if by_each else sharded.opened(work)


def read(stage_run: StageRun, data: Sequence[DataConfig], accept: Sequence[RecordType]) -> Dataset:
    """The validated rows of a data setting (the pipeline has read them once already)."""
    return stage_run.load_data([source.plain() for source in data], accept)


def train_and_eval(
    config: Supervised, stage_run: StageRun, accept: Sequence[RecordType]
) -> tuple[Dataset, Sequence[Record], Sequence[Record]]:
    """The data set, and its rows to train on and to evaluate on."""
    dataset = read(stage_run, config.data, accept)
    repeats = dataset.keys.repeats()
    stage_run.facts |= {
        "distinct_prompts": repeats.prompts,
        "duplicate_rows": repeats.duplicates,
        "contradictions": repeats.contradictions,
    }
    if config.eval_data is not None:
        evaluated = read(stage_run, config.eval_data, (dataset.kind,))
        stage_run.facts["held_out_seen"] = shared(evaluated.keys.prompts, dataset.keys.prompts)
        return dataset, dataset.records, evaluated.records
    split = hold_out(
        dataset.records, dataset.keys, config.holdout, stage_run.seed, config.group, f"{stage_run.name}: "
    )
    stage_run.facts["held_out_seen"] = 0  # by the way they are chosen
    return dataset, picked(dataset.records, split.train), picked(dataset.records, split.held_out)


def look_for_marks(
    stage_run: StageRun, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record]
) -> None:
    """Say, and record in the stage's facts, where texts bring turn marks of their own that the model's chat
    template does not write: `keel chat` and whoever else uses the template would speak a form that the model
    is not trained on."""
    marks = chat.marks_of(records)
    if marks is None or not chat.strange_to_template(tokenizer, marks):
        return
    stage_run.facts["turn_marks"] = list(marks)
    has = (
        "the model's chat template"
        if tokenizer.chat_template
        else "keel's chat template, for want of another,"
    )
    stage_run.note(
        f"the texts write turns as {marks[0]!r} and {marks[1]!r}, {has} does not: prompts "
        "that go through it have a form that is not trained on. Give the model the template of the texts: "
        f'model.chat_template: "{_escaped(chat.template_for(marks))}"'
    )


def _escaped(text: str) -> str:
    """As it stands between double quotes in YAML."""
    return text.replace("\\", "\\\\").replace('"', '\\"')


def limit_of(config: Training, stage_run: StageRun, source: ModelSource) -> int | None:
    """Longest sequence in tokens: `max_length` or the context; UsageError if max_length exceeds the
    context."""
    context = context_length(model_config(source))
    if config.max_length is not None and context is not None and config.max_length > context:
        raise UsageError(
            f"{stage_run.name}: max_length {config.max_length} exceeds the model's context of {context}"
        )
    return config.max_length or context


def room_of(stage_run: StageRun, limit: int | None, max_new_tokens: int) -> int | None:
    """Tokens that a prompt may have within `limit`, with the response behind it; None: any number. UsageError
    for none."""
    room = None if limit is None else limit - max_new_tokens
    if room is not None and room < 1:
        raise UsageError(
            f"{stage_run.name}: sampling.max_new_tokens {max_new_tokens} leaves no room for a prompt within "
            f"{limit} tokens"
        )
    return room


@dataclass
class TooLong:
    """What `too_long` does with rows, and how many it did it to."""

    stage_run: StageRun
    policy: str
    limit: int | None
    cut: int = 0
    left_out: int = 0

    def fits(self, record: Record, length: int, truncatable: bool = True) -> bool:
        """True: keep the row as it is or cut it. False: leave it out. DataError when rows must not be too
        long."""
        if self.limit is None or length <= self.limit:
            return True
        if self.policy == "error" or (self.policy == "truncate" and not truncatable):
            raise too_long_error(
                record, length, self.limit, self.stage_run.name, self.policy, hopeless=int(not truncatable)
            )
        self.cut += self.policy == "truncate"
        self.left_out += self.policy == "skip"
        return self.policy == "truncate"

    def report(self) -> None:
        """Say how many rows were cut and left out, and record both in the stage's facts."""
        if self.cut or self.left_out:
            self.stage_run.say(
                f"{self.stage_run.name}: longer than {self.limit} tokens: {self.cut} rows cut, "
                f"{self.left_out} left out"
            )
        self.stage_run.facts |= {"rows_cut": self.cut, "rows_left_out": self.left_out}


def too_long_error(
    record: Record, length: int, limit: int, stage: str, policy: str, *, rows: int = 1, hopeless: int = 0
) -> DataError:
    """What is said of a row of `length` tokens that a stage may not have, the first of `rows`; the response
    alone of `hopeless` of them is too long, so that cutting does not help."""
    said = f"{record.origin}: {length} tokens, more than the {limit} of stage {stage!r}"
    said += f"; so are {rows - 1:,} later rows" if rows > 1 else ""
    if policy == "error" and not hopeless:
        return DataError(f"{said}; set too_long: truncate or skip, or make room (max_length, max_new_tokens)")
    of = "its response alone is longer" if rows == 1 else f"the response alone of {hopeless:,} is longer"
    return DataError(f"{said}; {of}; leave such rows out (too_long: skip)")


@dataclass
class EqualPairs:
    """Counts pairs whose sides are the same tokens: they teach nothing, and are left out."""

    stage_run: StageRun
    count: int = 0

    def differ(self, chosen: Sequence[int], rejected: Sequence[int]) -> bool:
        """Whether the sides differ, as the model reads them: after tokenising and cutting."""
        equal = list(chosen) == list(rejected)
        self.count += equal
        return not equal

    def report(self) -> None:
        """Say how many pairs were left out, and record it in the stage's facts."""
        if self.count:
            what = "pair" if self.count == 1 else "pairs"
            self.stage_run.say(
                f"{self.stage_run.name}: {self.count:,} {what} left out, whose sides are the same tokens"
            )
        self.stage_run.facts["equal_pairs"] = self.count


def encode_all(
    stage_run: StageRun, records: Sequence[Record], encode: Callable[[Record], Any], *, needed: bool = True
) -> list[Any]:
    """Encode every record; None results (left out) are dropped. DataError when nothing is left and the rows
    are `needed`, as those to train on are."""
    rows = [row for row in map(encode, records) if row is not None]
    if records and not rows and needed:
        raise DataError(f"stage {stage_run.name!r}: no usable row is left of {len(records)}")
    return rows


def _form(stage_run: StageRun, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the card says of a form of prompts that is not the chat template's."""
    marks = stage_run.facts.get("turn_marks")
    if marks:
        return (
            f"\nTurns were written as `{marks[0]!r}` and `{marks[1]!r}` in what it was trained on. Its chat\n"
            "template writes them otherwise: give it prompts as text with these marks, not as messages.\n"
        )
    if tokenizer.chat_template and getattr(tokenizer, "keel_conversations", None) is False:
        return (
            "\nIt was trained on plain text alone, and has seen no conversation in its chat template, which\n"
            "is keel's default: give it prompts as text, not as messages.\n"
        )
    return ""


def save_model(
    stage_run: StageRun,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: Training,
    what: str,
    members: Sequence[Path] = (),
) -> None:
    """Save to the stage's `model/`, adapters merged in and beside it in adapter/; copies of `members` go with
    it, as members/2, 3 … The model is used up. NotSavedError unless the saved model is the trained one.

    Of several ranks the first writes, and the others wait for it."""
    plain = sharded.whole(model)
    group.only_first(lambda: _save(stage_run, plain, tokenizer, config, what, members))


def _save(
    stage_run: StageRun,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: Training,
    what: str,
    members: Sequence[Path],
) -> None:
    data = (
        [source for sources in config.data.values() for source in sources]
        if isinstance(config.data, dict)
        else config.data
    )
    named = config.model.path or f"a new {config.model.init.model_type if config.model.init else ''} model"
    about = (
        f"{what}, trained by keel {keel.__version__} ({config.kind}) from {named} on "
        f"{', '.join(source.source for source in data)}. `keel export RUN/{stage_run.name} --to hub` writes "
        "a card with settings, measures and diagnosis." + _form(stage_run, tokenizer)
    )
    head = {"library_name": "transformers", "tags": ["keel", "rlhf", config.kind]}
    base = stage_run.resolve(config.model.path) if config.model.path else None
    plain: Any = model
    plain = plain.get_base_model() if hasattr(plain, "get_base_model") else plain
    knows = getattr(tokenizer, "keel_conversations", None)
    if knows is not None and config.kind != "classifier":
        plain.config.keel_conversations = knows
    card = model_card.saved(head, stage_run.name, about, base, plain, tokenizer, called=config.model.path)
    adapter = files_of(model, source_of(config.model, stage_run))
    save_checked(
        model, tokenizer, stage_run.directory / "model", card, members, adapter,
        trust_remote_code=config.model.trust_remote_code, say=stage_run.say,
    )  # fmt: skip
