"""Pretraining, supervised fine-tuning and the reward model do what their settings say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from keel.config import RewardConfig, SFTConfig
from keel.errors import DataError, UsageError
from keel.evaluation.measures import mean_interval
from keel.models import optim
from keel.models.load import ModelSource, causal_lm, load_tokenizer
from keel.rewards import learned
from keel.rollout import KeelEngine
from keel.stages import language, prepare, reward_pairs, sft
from keel.stages import reward as reward_stage
from keel.stages.loop_utils import copy_state
from keel.types import DemonstrationRecord, PreferenceRecord, TextRecord, Vote

LORA = {"r": 4, "alpha": 8}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
}


@pytest.fixture
def run_stage(run: Any, tiny_model: Path, data: Any, tmp_path: Path) -> Any:
    """Run one stage on the tiny model; returns its directory and its metrics."""

    def go(kind: str, name: str = "run", **settings: Any) -> tuple[Path, list[dict[str, float]]]:
        rows = {"pretrain": data.text, "sft": data.demonstrations, "reward": data.pairs}[kind]
        defaults = {
            "kind": kind,
            "model": str(tiny_model),
            "data": str(rows),
            "lr": 1e-3,
            "batch_size": 6,
            "epochs": 10,
            "max_steps": 3,
        }
        more = {"normalize": 8, "sampling": {"max_new_tokens": 4}} if kind == "reward" else {}
        run({"stages": {"stage": defaults | more | settings}}, tmp_path / name)
        stage = tmp_path / name / "stages" / "stage"
        return stage, [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]

    return go


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        pytest.param("pretrain", None, id="pretrain", marks=pytest.mark.slow),
        pytest.param("sft", LORA, id="sft-lora"),
        pytest.param("reward", None, id="reward"),
        pytest.param("pretrain", LORA, id="pretrain-lora", marks=pytest.mark.slow),
        pytest.param("sft", None, id="sft", marks=pytest.mark.slow),
        pytest.param("reward", LORA, id="reward-lora", marks=pytest.mark.slow),
    ],
)
def test_micro_batches_and_gradient_checkpointing_change_memory_and_not_results(
    kind: str, lora: Any, run_stage: Any
) -> None:
    settings = {"lora": lora, "max_length": 24}
    _, whole = run_stage(kind, "whole", **settings)
    stage, split = run_stage(kind, "split", micro_batch=4, gradient_checkpointing=True, **settings)
    _, by_tokens = run_stage(kind, "tokens", micro_tokens=50, **settings)
    assert len(whole) == len(split) == len(by_tokens) == 3
    times = [json.loads(line) for line in (stage / "times.jsonl").read_text().splitlines()]
    for phase in ("train", "optimizer"):
        assert all(row[f"{phase}/roofline"] > 0 for row in times), phase
    for one, other, third in zip(whole, split, by_tokens, strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-4)
        assert third == pytest.approx(one, rel=1e-3, abs=1e-4)
    kind_of_model = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    _, info = kind_of_model.from_pretrained(stage / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_early_stopping_keeps_the_best_weights(run_stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A held-out loss made to rise after the second evaluation."""
    losses, weights = iter([2.0, 1.0, 3.0, 4.0, 5.0, 6.0]), []

    def rising(model: Any, *_: Any) -> dict[str, float]:
        weights.append(copy_state(model))
        return {"eval_loss": next(losses), "eval_mean_token_accuracy": 0.0}

    monkeypatch.setattr(language, "evaluate", rising)
    stage, rows = run_stage("sft", eval_every=1, patience=2, max_steps=6)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    kept = AutoModelForCausalLM.from_pretrained(stage / "model").state_dict()
    assert all(torch.equal(kept[k], v) for k, v in weights[1].items() if k in kept)


def test_conversations_are_trained_on_the_answers_alone(data: Any, run_stage: Any, tiny_model: Path) -> None:
    stage, rows = run_stage("sft", data=str(data.chats), max_steps=30, lr=1e-2)
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert AutoTokenizer.from_pretrained(stage / "model").chat_template


def encoded(record: Any, tiny_model: Path, stage_run: Any, **settings: Any) -> tuple[Any, Any]:
    tokenizer = load_tokenizer(str(tiny_model))
    config = SFTConfig.model_validate({"kind": "sft", "model": "m", "data": "d", **settings})
    too_long = prepare.TooLong(stage_run, config.too_long, config.max_length)
    return tokenizer, sft.encode([record], tokenizer, config, too_long)[0]


def test_the_loss_is_on_the_completion_and_its_eos_or_on_all(tiny_model: Path, stage_run: Any) -> None:
    record = DemonstrationRecord("the cat?", " it is red.")
    tokenizer, row = encoded(record, tiny_model, stage_run)
    assert tokenizer.decode(row.ids) == "the cat? it is red.<|end|>"
    counted = [t for t, counts in zip(row.ids, row.counts, strict=True) if counts]
    assert tokenizer.decode(counted) == " it is red.<|end|>"
    _, row = encoded(record, tiny_model, stage_run, loss_on="all")
    assert all(row.counts)


def test_a_conversation_is_a_row_a_turn_where_the_template_cuts_history(
    tiny_model: Path, stage_run: Any
) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' or loop.last %}{{ m.content + ' ' }}{% endif %}"
        "{% endfor %}"
    )
    turns = [
        {"role": r, "content": f"the {c}"}
        for r, c in zip(("user", "assistant") * 2, ("cat", "red", "owl", "hat"))
    ]
    config = SFTConfig.model_validate({"kind": "sft", "model": "m", "data": "d"})
    rows = sft.encode([TextRecord(tuple(turns))], tokenizer, config, prepare.TooLong(stage_run, "error", 64))
    texts = [tokenizer.decode(row.ids) for row in rows]
    assert texts == ["the cat the red <|end|>", "the cat the owl the hat <|end|>"]


def test_a_row_that_is_too_long_is_an_error_or_left_out_or_loses_its_prompts_start(
    tiny_model: Path, stage_run: Any
) -> None:
    record = DemonstrationRecord("the owl? " * 9 + "the cat?", " it is red.", origin="rows.jsonl:3")
    with pytest.raises(DataError, match=r"rows.jsonl:3: \d+ tokens, more than the 12 of stage"):
        encoded(record, tiny_model, stage_run, max_length=12)
    with pytest.raises(DataError, match="no usable row is left of 1"):
        encoded(record, tiny_model, stage_run, max_length=12, too_long="skip")
    tokenizer, row = encoded(record, tiny_model, stage_run, max_length=12, too_long="truncate")
    assert len(row.ids) == 12
    assert tokenizer.decode(row.ids).endswith("the cat? it is red.<|end|>")
    with pytest.raises(DataError, match="response alone is longer"):
        encoded(
            DemonstrationRecord("a", " red" * 40, origin="x"),
            tiny_model,
            stage_run,
            max_length=12,
            too_long="truncate",
        )
    turns = ({"role": "user", "content": "the cat? " * 20}, {"role": "assistant", "content": "red"})
    talk = TextRecord(turns, origin="x")
    with pytest.raises(UsageError, match="no token of the answer is left"):
        encoded(talk, tiny_model, stage_run, max_length=12, too_long="truncate")


@pytest.fixture
def untrained(tmp_path: Path, tokenizer: Any) -> Any:
    """Save a seeded model of some type with the tokenizer, and return its folder."""

    def go(kind: str, **more: Any) -> str:
        torch.manual_seed(0)
        sizes = LLAMA | {"num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
        config = AutoConfig.for_model(kind, **sizes | {"initializer_range": 0.1, "pad_token_id": 0} | more)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
        return str(tmp_path / kind)

    return go


def test_packing_leaves_attention_windows_as_they_are(
    run_stage: Any, untrained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Examples longer than the window, several in a row: every loss of the stage is that of them apart."""
    place, own = untrained("mistral", sliding_window=8), language.loss
    seen: list[tuple[float, float]] = []

    def compared(model: Any, rows: Any, pad_id: int, denominator: float) -> Any:
        value, measured = own(model, rows, pad_id, denominator)
        if rows[0].segments is not None:
            with torch.no_grad():
                apart = [own(model, [one], pad_id, denominator)[0] for row in rows for one in _apart(row)]
            seen.append((float(value), float(sum(apart))))
        return value, measured

    monkeypatch.setattr(language, "loss", compared)
    run_stage("sft", model=place, packing=True)
    assert seen
    assert [one for one, _ in seen] == pytest.approx([other for _, other in seen], abs=1e-5)


def _apart(row: language.LanguageRow) -> list[language.LanguageRow]:
    """The examples of a packed row."""
    numbers = list(row.segments or ())
    return [
        language.LanguageRow(
            [token for token, own in zip(row.ids, numbers, strict=True) if own == number],
            [counts for counts, own in zip(row.counts, numbers, strict=True) if own == number],
        )
        for number in dict.fromkeys(numbers)
    ]


def test_packing_is_refused_before_anything_is_trained(
    run_stage: Any, untrained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the config where that tells; by a trial of the model where it does not."""
    place = untrained("lfm2", layer_types=["conv", "full_attention"])
    with pytest.raises(UsageError, match=r"^stage: lfm2 .* layers hand a state .* set packing: false$"):
        run_stage("sft", "told", model=place, packing=True)
    monkeypatch.setattr("keel.pipeline.preflight.carries_state", lambda config: False)
    with pytest.raises(UsageError, match=r"^stage: lfm2 .*states .* differ .* set packing: false$"):
        run_stage("sft", "tried", model=place, packing=True)
    assert not (tmp_path / "tried" / "stages" / "stage" / "metrics.jsonl").exists()
    run_stage("sft", "apart", model=place, packing=False)
    run_stage("pretrain", "text", model=place, max_length=16)  # pieces of a text are no examples


# ---------------------------------------------------------------- reward


def _record(p: float | None, *votes: tuple[str, Any], margin: float | None = None) -> PreferenceRecord:
    return PreferenceRecord("the cat?", " it is red.", " so", p, margin, tuple(Vote(*vote) for vote in votes))


@pytest.mark.parametrize(
    ("labels", "shares"), [("soft", [1.0, 0.75, 0.5, 0.25]), ("majority", [1.0, 1.0, 0.5, 0.0])]
)
def test_votes_are_kept_as_shares_or_collapsed_as_the_config_says(
    labels: str, shares: list[float], tiny_reward: Path, stage_run: Any
) -> None:
    reward = learned.load(str(tiny_reward), device=torch.device("cpu"))
    config = RewardConfig.model_validate({"kind": "reward", "model": "m", "data": "d", "labels": labels})
    too_long = prepare.TooLong(stage_run, "error", 48)
    records = [_record(None), _record(0.75, margin=1.5), _record(0.5), _record(0.25)]
    for found_labels in reward_stage._labelled(config, stage_run, records, records):  # to train on, held out
        found = reward_pairs.encode(records, found_labels, reward, too_long, prepare.EqualPairs(stage_run))
        assert [pair.p_chosen for pair in found] == shares
        assert [pair.margin for pair in found] == [0.0, 1.5, 0.0, 0.0]
        assert reward.tokenizer.decode(found[0].chosen["input_ids"]) == "the cat? it is red.<|end|>"
        assert reward.tokenizer.decode(found[0].rejected["input_ids"]) == "the cat? so<|end|>"


def test_labels_by_reliability_are_for_training_and_held_out_pairs_keep_their_votes(stage_run: Any) -> None:
    config = RewardConfig.model_validate(
        {"kind": "reward", "model": "m", "data": "d", "labels": "reliability"}
    )
    agreed = [_record(1.0, ("a", "chosen"), ("b", "chosen"))] * 20
    alone = _record(0.5, ("a", "chosen"), ("c", "rejected"))
    kept, held = reward_stage._labelled(config, stage_run, [*agreed, alone], [alone])
    assert kept[-1] > 0.7  # a is known to be right, c is not
    assert held == [0.5]
    counts = [_record(0.5, ("", "chosen"), ("", "rejected"))] * 3
    with pytest.raises(DataError, match=r"labels: reliability.*two annotators who are named.*labels: soft"):
        reward_stage._labelled(config, stage_run, counts, [])


def test_the_former_name_of_labels_is_still_read() -> None:
    base = {"kind": "reward", "model": "m", "data": "d"}
    assert RewardConfig.model_validate({**base, "votes": "majority"}).labels == "majority"
    assert "votes" not in RewardConfig.model_validate({**base, "votes": "soft"}).model_dump()
    with pytest.raises(ValidationError, match="votes"):
        RewardConfig.model_validate({**base, "votes": "soft", "labels": "majority"})


@pytest.mark.parametrize("members", [1, 2])
def test_a_reward_stage_trains_on_estimated_labels_and_says_what_it_thinks_of_the_annotators(
    members: int, run_stage: Any, data: Any, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in data.pairs.read_text().splitlines()][:24]
    for i, row in enumerate(rows):
        third = "rejected" if i % 2 else "chosen"
        votes = [("a", "chosen"), ("b", "tie" if i % 6 == 0 else "chosen"), ("c", third)]
        row["votes"] = [{"annotator": who, "choice": choice} for who, choice in votes]
    path = tmp_path / "voted.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {"normalize": 0, "sampling": {}}
    stage, _ = run_stage("reward", data=str(path), labels="reliability", members=members, **more)
    found = json.loads((stage / "result.json").read_text())["annotators"]
    assert (found["pairs"], found["votes"]) == (24, 72)
    assert found["unanimous"]["mean"] == pytest.approx(8 / 24)
    assert set(found) == {"pairs", "votes", "unanimous", "alpha", "fleiss", "cohen", "reliability"}
    right = {name: one["dawid_skene"] for name, one in found["reliability"].items()}
    assert right["a"] > 0.85 > 0.75 > right["c"]
    assert found["reliability"]["c"]["votes"] == 24


def test_the_scale_is_that_of_samples_of_the_starting_model(
    run_stage: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The samples' scores by the saved model itself, as transformers loads it."""
    sampled: list[Any] = []

    class Spy(KeelEngine):
        def generate(self, request: Any, *args: Any, **kwargs: Any) -> Any:
            state = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
            assert all(torch.equal(value, state[name]) for name, value in self.model.state_dict().items())
            sampled.extend(super().generate(request, *args, **kwargs))
            return sampled

    monkeypatch.setattr(reward_stage, "KeelEngine", Spy)
    stage, _ = run_stage("reward", normalize=16)
    model = AutoModelForSequenceClassification.from_pretrained(stage / "model").eval()
    with torch.no_grad():
        rows = [torch.tensor([[*c.prompt_ids, *c.ids]]) for c in sampled]
        scores = torch.stack([model.score(model.model(row).last_hidden_state[0, -1])[0] for row in rows])
    loaded = learned.load(str(stage / "model"), device=torch.device("cpu"))
    assert len(rows) == 16
    assert (loaded.mean, loaded.std) == pytest.approx((scores.mean().item(), scores.std().item()), rel=1e-4)


@pytest.mark.parametrize(
    ("normalize", "lora"),
    [
        pytest.param(0, None, id="0-full"),
        pytest.param(256, LORA, id="256-lora"),
        pytest.param(0, LORA | {"target_modules": ["query"]}, id="0-lora on queries"),
        pytest.param(256, None, id="256-full", marks=pytest.mark.slow),
        pytest.param(0, LORA, id="0-lora", marks=pytest.mark.slow),
        pytest.param(
            256, LORA | {"target_modules": ["query"]}, id="256-lora on queries", marks=pytest.mark.slow
        ),
    ],
)
def test_an_encoder_becomes_a_reward_model(
    lora: Any, normalize: int, run_stage: Any, tiny_bert: Path
) -> None:
    stage, rows = run_stage(
        "reward", model=str(tiny_bert), lora=lora, max_steps=12, lr=1e-2, normalize=normalize, sampling={}
    )
    assert rows[-1]["loss"] < rows[0]["loss"]
    reward = learned.load(str(stage / "model"), device=torch.device("cpu"))
    assert reward.is_encoder
    assert (reward.mean, reward.std) != (0.0, 1.0)
    result = json.loads((stage / "result.json").read_text())
    assert result["normalized_on"] > 100  # the comparisons' own completions: an encoder cannot be sampled


def test_a_classifier_of_several_classes_is_refused_as_a_start(
    run_stage: Any, tiny_model: Path, tmp_path: Path
) -> None:
    AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3).save_pretrained(
        tmp_path / "three"
    )
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "three")
    with pytest.raises(UsageError, match="3 outputs; a reward model has 1"):
        run_stage("reward", model=str(tmp_path / "three"), normalize=0, sampling={})


@pytest.mark.parametrize("which", ["tiny_model", pytest.param("tiny_bert", marks=pytest.mark.slow)])
def test_a_head_on_a_backbone_in_half_precision_learns_by_small_steps(
    which: str, run_stage: Any, request: pytest.FixtureRequest
) -> None:
    """With a learning rate that a head in bfloat16 would not notice."""
    path = str(request.getfixturevalue(which))
    model = {"path": path, "dtype": "bfloat16"}
    heads = []
    for lr in (1e-9, 1e-5):
        stage, _ = run_stage(
            "reward", str(lr), model=model, lora=LORA, lr=lr, warmup=0, normalize=0, sampling={}
        )
        found = AutoModelForSequenceClassification.from_pretrained(stage / "model", dtype=torch.float32)
        heads.append((found.score if which == "tiny_model" else found.classifier).weight)
    assert 0 < (heads[0] - heads[1]).abs().median() < 1e-4
    with pytest.raises(UsageError, match="bfloat16"):
        run_stage("reward", "full", model=model, normalize=0, sampling={})


def test_settings_of_samples_that_are_not_drawn_are_refused(
    run_stage: Any, tiny_bert: Path, tiny_reward: Path, tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    new = {"init": {"model_type": "llama", **LLAMA}, "tokenizer": str(tmp_path / "tokenizer")}
    for model in (str(tiny_bert), str(tiny_reward), new):
        with pytest.raises(UsageError, match="`normalize` has no effect"):
            run_stage("reward", model=model, normalize=8, sampling={})
        with pytest.raises(UsageError, match="`sampling` has no effect"):
            run_stage("reward", model=model, normalize=256, sampling={"max_new_tokens": 4})
    run_stage("reward", "new", model=new, normalize=0, sampling={})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"normalize": 1}, "normalize"),
        ({"sampling": {"max_new_tokens": 24}, "max_length": 24}, "max_new_tokens 24 leaves no room"),
        ({"sampling": {"max_new_tokens": 4, "stop": [""]}}, "at least 1 character"),
    ],
)
def test_what_stands_in_the_way_of_the_scale_is_found_before_any_training(
    settings: dict[str, Any], message: str, run_stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optim, "step", lambda *_: pytest.fail("a gradient step was taken"))
    with pytest.raises((UsageError, ValueError), match=message):
        run_stage("reward", **settings)


def test_the_scale_of_one_sample_is_refused_in_the_stage_too(data: Any, stage_run: Any) -> None:
    config = RewardConfig.model_construct(normalize=1)
    with pytest.raises(UsageError, match="one score has no spread"):
        reward_stage._samples_a_language_model(config, stage_run, ModelSource("m"))


def test_a_new_tokenizer_takes_what_the_model_takes_and_not_what_it_was_trained_on(run_stage: Any) -> None:
    new = {"vocab_size": 300, "init": {"model_type": "llama", **LLAMA}}
    stage, _ = run_stage("pretrain", "new", model=new, max_length=16)
    assert AutoTokenizer.from_pretrained(stage / "model").model_max_length == 48


@pytest.mark.parametrize("marked", [True, False])
def test_texts_with_turn_marks_of_their_own_are_said_in_facts_and_card(
    marked: bool, run_stage: Any, roomy_model: Path, tmp_path: Path
) -> None:
    """The model's template writes turns otherwise: whoever talks to it through that is told."""
    prompt = "\n\nHuman: the cat?\n\nAssistant:" if marked else "the cat?"
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"{prompt}", "completion": f" {i}"}) + "\n" for i in range(9))
    )
    stage, _ = run_stage("sft", model=str(roomy_model), data=str(path), holdout=0)
    facts = json.loads((stage / "stage.json").read_text())["facts"]
    assert facts.get("turn_marks") == (["\n\nHuman:", "\n\nAssistant:"] if marked else None)
    card = (stage / "model" / "README.md").read_text()
    assert ("writes them otherwise" in card) == marked


@pytest.mark.parametrize("packed", [False, True])
def test_the_held_out_loss_of_each_row_is_read_several_rows_at_a_time(tiny_model, monkeypatch, packed):
    """As one row at a time, which it took before; the interval is over rows, each by its tokens."""
    model = causal_lm(ModelSource(str(tiny_model)), 0)
    ids = [[5, 6, 7, 8, 9, 10, 11][:length] for length in (7, 3, 5, 2, 6)]
    rows = [
        language.LanguageRow(row, [k != 1 for k in range(len(row))], [k // 3 for k in range(len(row))])
        if packed
        else language.LanguageRow(row, [k != 1 for k in range(len(row))])
        for row in ids
        if len(row) > 2
    ]
    config = SFTConfig.model_validate({"kind": "sft", "model": "a/b", "data": "d.jsonl", "micro_batch": 2})
    forwards, read = [], language.head_inputs
    monkeypatch.setattr(
        language, "head_inputs", lambda *a, **k: (forwards.append(len(a[1])), read(*a, **k))[1]
    )
    found = language.summary(model.train(), rows, 0, config)
    assert len(forwards) == 2  # four rows, two at a time
    tokens = sum(row.counted for row in rows)
    with torch.no_grad():
        alone = [language.loss(model, [row], 0, tokens / len(rows)) for row in rows]
    assert found["eval_loss"] == pytest.approx(mean_interval([float(value) for value, _ in alone]), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["eval_loss"]["mean"]))
    accuracy = sum(float(measured["accuracy"]) for _, measured in alone) / len(rows)
    assert found["mean_token_accuracy"] == pytest.approx(accuracy, rel=1e-5)
    assert language.evaluate(model, rows, 0, config)["eval_loss"] == pytest.approx(found["eval_loss"]["mean"])
