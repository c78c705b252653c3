"""Models side by side on the same prompts: proxy, gold, KL from the reference, length, win rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keel import worlds
from keel.config import EvaluateConfig, ModelConfig
from keel.data import chat
from keel.data.batches import derive_seed
from keel.data.load import Dataset
from keel.evaluation.measures import accuracy
from keel.evaluation.policies import Judged, measures, sample_row
from keel.models.load import ModelSource, causal_lm, context_length, disable_dropout, model_config
from keel.rewards import learned
from keel.rollout.engine import generate, text_of
from keel.rollout.score import score
from keel.runlog import StageRun
from keel.stages import inputs
from keel.stages.update import micro_batches
from keel.types import PreferenceRecord, PromptRecord, Record, UsageError


def run(config: EvaluateConfig, run: StageRun) -> dict[str, Any]:
    """1. prompts  2. the reference's completions  3. each other model's, on the same random draws  4. measures."""
    dataset = inputs.read(run, config.data, ("prompt",))
    records, room = _that_fit(run, config, dataset)
    comparisons = inputs.read(run, config.comparisons, ("preference",)).records if config.comparisons else ()
    reference_name = config.reference or config.models[0]
    reference = _open(run, reference_name, config.dtype)
    reward = (
        learned.load(run.resolve(config.reward), device=run.device, dtype=config.dtype)
        if config.reward
        else None
    )
    judged: dict[str, list[Judged]] = {}
    run.restore()
    for name in [reference_name, *(m for m in config.models if m != reference_name)]:
        run.say(f"{run.name}: {name} answers {len(records)} prompts")
        judged[name] = _judge(run, config, name, records, room, reference, reward, dataset.conversational)
    for name in config.models:
        run.samples([sample_row(name, index, row) for index, row in enumerate(judged[name])])
    result: dict[str, Any] = {"reference": reference_name, "models": {}}
    for name in config.models:
        result["models"][name] = measures(
            judged[name], None if name == reference_name else judged[reference_name]
        )
    if reward is not None and comparisons:
        result["reward_model"] = {"accuracy": _accuracy(run, config, reward, comparisons)}
    run.facts |= {"rows": len(records)}
    return result


def _that_fit(
    run: StageRun, config: EvaluateConfig, dataset: Dataset
) -> tuple[list[PromptRecord], int | None]:
    """The prompts that every model has room for, and that room in tokens: all models answer the same ones."""
    contexts = [context_length(model_config(ModelSource(run.resolve(name)))) for name in config.models]
    room = min((c - config.sampling.max_new_tokens for c in contexts if c is not None), default=None)
    if room is not None and room < 1:
        raise UsageError(
            f"{run.name}: sampling.max_new_tokens {config.sampling.max_new_tokens} leaves no room for a prompt"
        )
    tokenizers = [_tokenizer(run, name, dataset.conversational) for name in config.models]
    too_long = inputs.TooLong(run, config.too_long, room)

    def fitting(record: Record) -> PromptRecord | None:
        assert isinstance(record, PromptRecord)
        length = max(len(chat.prompt_ids(tokenizer, record.prompt)) for tokenizer in tokenizers)
        return record if too_long.fits(record, length) else None

    records = inputs.encode_all(run, dataset.records, fitting)
    too_long.report()
    return records, room


def _tokenizer(run: StageRun, name: str, conversational: bool) -> Any:
    return inputs.open_tokenizer(ModelConfig(path=name), run, conversational=conversational)  # pyright: ignore[reportCallIssue]


def _open(run: StageRun, name: str, dtype: str) -> Any:
    model = (
        causal_lm(ModelSource(run.resolve(name), dtype=dtype), 0).to(run.device).eval().requires_grad_(False)
    )
    disable_dropout(model)
    return model


def _judge(
    run: StageRun, config: EvaluateConfig, name: str, records: Sequence[PromptRecord], room: int | None, reference: Any,
    reward: learned.RewardModel | None, conversational: bool,
) -> list[Judged]:  # fmt: skip
    """One model's completions of all prompts, in order."""
    tokenizer = _tokenizer(run, name, conversational)
    model, sampling, pad_id = (
        _open(run, name, config.dtype),
        config.sampling.plain(),
        chat.ensure_pad(tokenizer),
    )
    stop_ids = chat.stop_ids(tokenizer, sampling.stop)
    gold = worlds.load(config.gold.removeprefix("world:").partition("/")[0]) if config.gold else None
    same = model.config.vocab_size == reference.config.vocab_size
    if not same:
        raise UsageError(
            f"{run.name}: {name!r} has a vocabulary of {model.config.vocab_size}, the reference {reference.config.vocab_size}; their KL is not defined"
        )
    prompts = [chat.prompt_ids(tokenizer, record.prompt)[-(room or 0) :] for record in records]
    same_ids = reward is not None and learned.reads_ids_of(reward, tokenizer)
    if reward is not None and same_ids:
        learned.check_room(reward, max(map(len, prompts)) + sampling.max_new_tokens, run.name)
    done = generate(
        model, prompts, sampling, stop_ids=stop_ids, pad_id=pad_id, seed=derive_seed(run.seed, "evaluate"), batch_size=config.batch_size,
    )  # fmt: skip
    kls: list[float] = []
    for part in micro_batches(done, config.batch_size):
        scored = score(
            part, model, reference, temperature=sampling.temperature or 1.0, pad_id=pad_id, device=run.device,
            micro_batch=config.batch_size,
        )  # fmt: skip
        kls += scored.exact_kl.sum(dim=1).tolist()
    texts = [text_of(tokenizer, completion) for completion in done]
    proxies: list[float | None] = [None] * len(records)
    if reward is not None:
        if same_ids:
            rows: list[learned.Inputs] = [{"input_ids": [*c.prompt_ids, *c.ids]} for c in done]
        else:
            ended = [c.stop_reason != "length" for c in done]
            rows, cut = learned.encode_samples(reward, [record.prompt for record in records], texts, ended)
            if cut:
                run.say(
                    f"{run.name}: {cut} replies of {name} are longer than the reward model reads and scored by their start"
                )
        proxies = list(learned.score(reward, rows, batch_size=config.batch_size).tolist())
    judged: list[Judged] = []
    for record, completion, text, kl, proxy in zip(records, done, texts, kls, proxies, strict=True):
        prompt = chat.user_text(record.prompt)
        parts = gold.gold(prompt, text, record.columns) if gold else None
        judged.append(
            Judged(prompt, text.strip(), kl, len(completion.ids), completion.stop_reason, proxy, parts)
        )
    return judged


def _accuracy(
    run: StageRun, config: EvaluateConfig, reward: learned.RewardModel, records: Sequence[Any]
) -> dict[str, float]:
    """Over all pairs that the reward model can read; others are an error, or left out and counted (`too_long`)."""
    pairs, sides, left_out = [], [], 0
    for pair in (record for record in records if isinstance(record, PreferenceRecord)):
        try:
            encoded = [learned.encode(reward, pair.prompt, side) for side in (pair.chosen, pair.rejected)]
        except UsageError as error:
            if config.too_long == "error":
                raise UsageError(f"{pair.origin}: {error}; set too_long: skip") from None
            left_out += 1
            continue
        pairs.append(pair)
        sides += encoded
    if left_out:
        run.say(f"{run.name}: {left_out} comparisons left out, longer than the reward model reads")
    if not pairs:
        raise UsageError(f"{run.name}: the reward model can read none of {len(records)} comparisons")
    scores = learned.score(reward, sides, batch_size=config.batch_size).tolist()
    return accuracy(scores[0::2], scores[1::2], [p.p_chosen for p in pairs])
