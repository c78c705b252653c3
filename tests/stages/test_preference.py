"""Preference optimisation learns what its losses say, whatever the micro-batch, against an untouched
reference."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from keel.config import parse
from keel.data.batches import derive_seed, rows_of_step
from keel.errors import DataError, UsageError
from keel.pipeline.pipeline import Pipeline
from keel.stages import preference, preference_rows, supervised_loop
from keel.stages.preference_rows import Example, Pair, Response

LOSSES = ("sigmoid", "robust", "ipo", "kto", "orpo", "simpo")
TURNS = [{"role": "user", "content": "the cat?"}]


def metrics_of(stage: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


def result_of(stage: Path) -> dict[str, Any]:
    return json.loads((stage / "result.json").read_text())


@pytest.fixture
def stage_of(data: Any, tiny_model: Path) -> Callable[..., dict[str, Any]]:
    def go(**settings: Any) -> dict[str, Any]:
        defaults = {
            "kind": "dpo",
            "model": str(tiny_model),
            "data": str(data.pairs),
            "lr": 3e-3,
            "batch_size": 6,
            "epochs": 10,
            "max_steps": 3,
        }
        return {**defaults, **settings}

    return go


@pytest.fixture
def run_dpo(run: Any, stage_of: Any, tmp_path: Path) -> Callable[..., Path]:
    """Run one stage; returns its directory."""

    def go(name: str = "run", **settings: Any) -> Path:
        return run({"stages": {"dpo": stage_of(**settings)}}, tmp_path / "runs" / name).stage_directory("dpo")

    return go


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., str]:
    def go(name: str, content: Sequence[dict[str, Any]]) -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in content))
        return str(tmp_path / name)

    return go


@pytest.fixture
def looked_into(
    monkeypatch: pytest.MonkeyPatch,
) -> list[tuple[preference.PreferenceSetup, list[Any], list[Any]]]:
    """Setup, rows and held-out rows of each stage that is run, as they are when training ends, before
    adapters merge."""
    seen: list[tuple[preference.PreferenceSetup, list[Any], list[Any]]] = []
    make, fit = preference._objective, supervised_loop.fit

    def objective(setup: preference.PreferenceSetup) -> Any:
        seen.append((setup, [], []))
        return make(setup)

    def fitted(run: Any, config: Any, model: Any, own: Any, held: Any, goal: Any) -> None:
        seen[-1][1].extend(own)
        seen[-1][2].extend(held)
        fit(run, config, model, own, held, goal)

    monkeypatch.setattr(preference, "_objective", objective)
    monkeypatch.setattr(supervised_loop, "fit", fitted)
    return seen


def responses_of(row: Pair | Example) -> tuple[Response, ...]:
    return (row.response,) if isinstance(row, Example) else (row.chosen, row.rejected)


def by_hand(model: Any, response: Response) -> Tensor:
    """Σ log π(token | before) over the response's tokens, from one unpadded forward."""
    ids = torch.tensor([[*response.prompt, *response.ids]])
    logp = model(input_ids=ids).logits[0].log_softmax(-1)
    start = len(response.prompt)
    return torch.stack([logp[t - 1, ids[0, t]] for t in range(start, ids.shape[1])]).sum()


# ---------------------------------------------------------------- learning


def share_of_red(folder: Path) -> float:
    """Of the probability of the four colours after "the cat? it is"."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the cat?")["input_ids"] + tokenizer(" it is")["input_ids"]
    colours = [tokenizer(f" {colour}")["input_ids"][0] for colour in ("red", "blue", "green", "pink")]
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1, colours].softmax(0)[0].item()


# with a reference, with a label a response, without a reference; the others by `make test-slow`
ALWAYS = ("sigmoid", "kto", "orpo")


@pytest.mark.parametrize(
    "loss", [pytest.param(loss, marks=[] if loss in ALWAYS else [pytest.mark.slow]) for loss in LOSSES]
)
def test_each_loss_learns_to_prefer_one_word(loss: str, run_dpo: Any, tiny_model: Path) -> None:
    stage = run_dpo(loss=loss, max_steps=25, batch_size=12, holdout=0.25, eval_every=12)
    lines = metrics_of(stage)
    # without a reference the start is what the untrained model finds likelier, which need not be one half
    start = 0.8 if loss in ("orpo", "simpo") else 0.7
    assert lines[-1]["rewards/accuracies"] > 0.9 > start > lines[0]["rewards/accuracies"]
    assert lines[-1]["rewards/margins"] > lines[0]["rewards/margins"] + 0.1
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["eval_rewards/accuracies"] > 0.9
    assert share_of_red(stage / "model") > 0.6 > 0.4 > share_of_red(tiny_model)
    found = result_of(stage)
    assert found["accuracy"]["low"] > 0.7
    assert found["accuracy"]["n"] == 33  # pairs of three prompts, for KTO too
    assert 0 < found["margin"]["low"] < found["margin"]["mean"] < found["margin"]["high"]
    assert found["eval_loss"] == pytest.approx(lines[-1]["eval_loss"])


@pytest.mark.parametrize(
    "loss", [pytest.param(loss, marks=[] if loss == "kto" else [pytest.mark.slow]) for loss in LOSSES]
)
def test_each_loss_is_the_same_twice(loss: str, run_dpo: Any) -> None:
    settings = {"loss": loss, "max_steps": 3, "batch_size": 12, "holdout": 0.25, "eval_every": 2}
    one, other = run_dpo("one", **settings), run_dpo("other", **settings)
    for name in ("model/model.safetensors", "metrics.jsonl", "result.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    assert not (one / "reference.json").exists()


def test_first_losses_are_those_of_a_policy_that_is_its_reference(
    run_dpo: Any, tmp_path: Path, tokenizer: Any
) -> None:
    """In a model with dropout 0.5 everywhere, which must be off [trap 15]; with and without adapters."""
    torch.manual_seed(0)
    dropout = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    config = GPT2Config(vocab_size=295, n_embd=32, n_layer=2, n_head=4, n_positions=48, **dropout)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    wanted = {"sigmoid": math.log(2), "robust": math.log(2), "ipo": (1 / (2 * 0.1)) ** 2, "kto": 0.5}
    for loss, value in wanted.items():
        for lora in (None, {"r": 2}) if loss == "sigmoid" else (None,):
            settings = {"loss": loss, "lora": lora, "model": str(tmp_path / "m"), "max_steps": 1}
            (line,) = metrics_of(run_dpo(f"{loss}-{bool(lora)}", **settings))
            assert line["loss"] == pytest.approx(value, rel=1e-5)
            assert line["rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_a_policy_goes_on_from_another_and_is_judged(
    run: Any, stage_of: Any, data: Any, tmp_path: Path
) -> None:
    judge = {
        "kind": "evaluate",
        "models": ["first", "second"],
        "data": {"source": str(data.prompts), "rows": 4},
        "sampling": {"max_new_tokens": 4},
    }
    second = stage_of(model="first", reference="first", loss="ipo")
    pipeline = run({"stages": {"first": stage_of(), "second": second, "judge": judge}}, tmp_path)
    assert result_of(pipeline.stage_directory("judge"))["models"]["second"]["kl"]["mean"] > 0
    assert metrics_of(pipeline.stage_directory("second"))[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)


# ---------------------------------------------------------------- the reference


@pytest.mark.parametrize(
    ("loss", "lora"),
    [
        pytest.param("sigmoid", None, id="sigmoid"),
        pytest.param("kto", {"r": 4, "alpha": 64}, id="kto-lora"),
        pytest.param("sigmoid", {"r": 4, "alpha": 64}, id="sigmoid-lora", marks=pytest.mark.slow),
        pytest.param("kto", None, id="kto", marks=pytest.mark.slow),
    ],
)
def test_the_reference_is_what_the_starting_model_says_live(
    loss: str, lora: Any, run_dpo: Any, tiny_model: Path, looked_into: Any
) -> None:
    """Response by response and without padding, EOS included, for every response of every step."""
    run_dpo(loss=loss, lora=lora, micro_batch=4, batch_size=16, max_steps=None, epochs=1)
    setup, own, held = looked_into[0]
    live = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert len(setup.reference) > 100
    for response, logp in setup.reference.items():
        with torch.no_grad():
            wanted = by_hand(live, response).item()
        assert logp == pytest.approx(wanted, abs=1e-4)
        assert response.ids.count(live.config.eos_token_id) == 1
        assert response.ids[-1] == live.config.eos_token_id
    sides = [r for row in own + held for r in responses_of(row)]
    assert set(sides) <= setup.reference.keys()
    assert loss == "kto" or set(sides) == setup.reference.keys()


def test_with_adapters_the_reference_is_the_base_bit_for_bit(
    run_dpo: Any, looked_into: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those taken before training, and the trained model with its adapters off; with them on it has moved."""
    off: list[list[float]] = []

    def summary(setup: preference.PreferenceSetup, *_: Any, **__: Any) -> dict[str, Any]:
        asked = list(setup.reference)

        def now() -> list[float]:
            return preference_rows.scores(setup.model.eval(), asked, setup.pad_id, setup.device, 6)

        with setup.model.disable_adapter():
            off.append(now())
        off.append(now())
        return {}

    monkeypatch.setattr(preference, "_result", summary)
    run_dpo(lora={"r": 4}, lr=1e-2)
    taken = list(looked_into[0][0].reference.values())
    assert off[0] == taken
    assert max(abs(a - b) for a, b in zip(off[1], taken, strict=True)) > 0.1


def test_another_model_can_be_the_reference_and_is_freed_before_training(
    run: Any, stage_of: Any, tmp_path: Path, looked_into: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = run({"stages": {"dpo": stage_of(lr=1e-2)}}, tmp_path / "moved").stage_directory("dpo") / "model"
    alive: list[int] = []
    fit = supervised_loop.fit

    def counted(run: Any, config: Any, model: Any, *rest: Any) -> None:
        kinds = [type(x) for x in gc.get_objects() if type(x) is type(model)]
        alive.append(len(kinds))
        fit(run, config, model, *rest)

    before = sum(type(x).__name__ == "LlamaForCausalLM" for x in gc.get_objects())
    monkeypatch.setattr(supervised_loop, "fit", counted)
    stage = run({"stages": {"dpo": stage_of(reference=str(moved))}}, tmp_path / "run").stage_directory("dpo")
    assert alive == [before + 1]
    live = AutoModelForCausalLM.from_pretrained(moved)
    for response, logp in list(looked_into[1][0].reference.items())[:20]:
        with torch.no_grad():
            assert logp == pytest.approx(by_hand(live, response).item(), abs=1e-4)
    assert abs(metrics_of(stage)[0]["rewards/margins"]) > 0.05


@pytest.mark.parametrize("loss", ["orpo", "simpo"])
def test_losses_without_a_reference_take_none(loss: str, run_dpo: Any, looked_into: Any) -> None:
    run_dpo(loss=loss)
    assert looked_into[0][0].reference == {}


@pytest.mark.parametrize("loss", ["sigmoid", pytest.param("kto", marks=pytest.mark.slow)])
def test_a_run_that_was_cut_off_ends_the_same_and_reads_its_reference_again_from_the_disk(
    loss: str, stage_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse(
        {
            "name": "x",
            "threads": 1,
            "device": "cpu",
            "stages": {"dpo": stage_of(loss=loss, max_steps=4, save_every=1)},
        }
    )
    monkeypatch.setattr(Pipeline, "_report", lambda self: None)
    said: list[str] = []

    class Cut(BaseException):
        pass

    def cut(stage: str, step: int, *_: Any) -> None:
        if step == 3:
            raise Cut

    Pipeline(config, tmp_path / "whole", said.append).run()
    assert sum("the reference reads" in line for line in said) == 1
    with pytest.raises(Cut):
        Pipeline(config, tmp_path / "cut", str, cut).run()
    said.clear()
    Pipeline(config, tmp_path / "cut", said.append).run()
    assert any("going on after step 2" in line for line in said)
    assert not any("the reference reads" in line for line in said)
    for name in ("model/model.safetensors", "metrics.jsonl", "result.json"):
        one, other = (tmp_path / folder / "stages" / "dpo" / name for folder in ("whole", "cut"))
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("loss", "lora"),
    [
        pytest.param("sigmoid", None, id="sigmoid"),
        pytest.param("kto", {"r": 4}, id="kto-lora"),
        pytest.param("sigmoid", {"r": 4}, id="sigmoid-lora", marks=pytest.mark.slow),
        pytest.param("kto", None, id="kto", marks=pytest.mark.slow),
    ],
)
def test_micro_batches_and_gradient_checkpointing_change_memory_and_not_results(
    loss: str, lora: Any, run_dpo: Any
) -> None:
    one = metrics_of(run_dpo("whole", loss=loss, lora=lora))
    other = metrics_of(run_dpo("split", loss=loss, lora=lora, micro_batch=4, gradient_checkpointing=True))
    third = metrics_of(run_dpo("tokens", loss=loss, lora=lora, micro_tokens=90))
    assert len(one) == len(other) == len(third) == 3
    for whole, split in zip([*one, *one], [*other, *third], strict=True):
        clear = {n for n in whole if n != "rewards/accuracies" or whole["step"] > 1}  # else rounding decides
        assert {n: split[n] for n in clear} == pytest.approx({n: whole[n] for n in clear}, rel=1e-3, abs=1e-3)


# ---------------------------------------------------------------- KTO, and other rows


def test_the_kl_is_that_of_the_rows_of_its_step(run_dpo: Any, looked_into: Any) -> None:
    """Though a micro-batch is given part of them; and none is logged that is negative."""
    seen: list[list[Any]] = []
    original = preference.mismatched_kl

    def spy(setup: Any, batch: Any) -> float:
        seen.append(list(batch))
        return original(setup, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preference, "mismatched_kl", spy)
        lines = metrics_of(run_dpo(loss="kto", batch_size=7, micro_batch=2, max_steps=4, holdout=0))
    own, seed = looked_into[0][1], derive_seed(0, "dpo")
    assert seen == [[own[i] for i in rows_of_step(len(own), 7, step, seed)] for step in range(4)]
    assert all(line["kl"] >= 0 for line in lines)


def test_kto_learns_from_completions_with_a_label(run_dpo: Any, rows: Any) -> None:
    animals = ("cat", "dog", "fox", "hen", "owl", "pig")
    content = [
        {"prompt": f"{lead} {a}?", "completion": f" it is {c}.", "label": c == "red"}
        for lead in ("the", "so the") for a in animals for c in ("red", "blue", "pink")
    ]  # fmt: skip
    settings = {"loss": "kto", "data": rows("unpaired.jsonl", content), "max_steps": 25, "batch_size": 9}
    stage = run_dpo(**settings, undesirable_weight=0.5, holdout=0.3, eval_every=5)
    assert share_of_red(stage / "model") > 0.6
    found, last = result_of(stage), metrics_of(stage)[-1]
    assert found["accuracy"]["n"] == 12  # rows of four prompts: there are no pairs
    assert found["accuracy"]["mean"] == pytest.approx(last["eval_rewards/accuracies"], abs=1e-6)
    assert found["margin"]["mean"] == pytest.approx(last["eval_rewards/margins"], abs=1e-4)
    assert found["margin"]["low"] > 0
    one_sided = run_dpo("up", **{**settings, "data": rows("up.jsonl", [r for r in content if r["label"]])})
    assert "rewards/rejected" not in metrics_of(one_sided)[-1]
    assert "margin" not in result_of(one_sided)
    with pytest.raises(DataError, match="wanted: preference"):
        run_dpo("pairs", **{**settings, "loss": "sigmoid"})


def test_undecided_pairs_are_left_out_and_counted_unless_votes_are_soft(run_dpo: Any, rows: Any) -> None:
    pair = {"prompt": "the cat?", "chosen": " it is red.", "rejected": " so."}
    mixed = [{**pair, "p_chosen": p} for p in (1.0, 0.5, 0.8, 0.5, 0.1, 0.9)]
    for votes, undecided in (("hard", 2), ("soft", 0)):
        stage = run_dpo(votes, data=rows("mixed.jsonl", mixed), votes=votes, holdout=0)
        facts = json.loads((stage / "stage.json").read_text())["facts"]
        assert (facts["undecided_pairs"], facts["rows"]) == (undecided, 6 - undecided)
    with pytest.raises(DataError, match="votes of all 2 pairs are undecided"):
        run_dpo("none", data=rows("none.jsonl", [{**pair, "p_chosen": 0.5}] * 2), holdout=0)
    none = [
        {**pair, "prompt": f"the {animal}?", "p_chosen": 0.5} for animal in ("cat", "dog", "fox", "hen") * 2
    ]
    soft = run_dpo("only", data=rows("none.jsonl", none), votes="soft", holdout=0.5)
    assert result_of(soft).keys() == {"margin", "eval_loss"}  # no side to be accurate about


def test_implicit_prompts_and_conversations_are_learned_from(
    run_dpo: Any, rows: Any, looked_into: Any, tokenizer: Any
) -> None:
    implicit = {"chosen": "the cat? it is red.", "rejected": "the cat? it is blue."}
    run_dpo("implicit", data=rows("implicit.jsonl", [implicit] * 6), holdout=0)
    pair = looked_into[-1][1][0]
    assert tokenizer.decode(pair.chosen.prompt) == "the cat? it is"
    assert tokenizer.decode(pair.chosen.ids) == " red.<|end|>"
    talk = {
        "prompt": TURNS,
        "chosen": [{"role": "assistant", "content": "red."}],
        "rejected": [{"role": "assistant", "content": "so."}],
    }
    for loss in ("sigmoid", "kto"):
        stage = run_dpo(loss, data=rows("talk.jsonl", [talk] * 6), loss=loss, holdout=0)
        assert metrics_of(stage)[-1]["rewards/margins"] > 0.01
        assert AutoTokenizer.from_pretrained(stage / "model").chat_template
    pair = looked_into[1][1][0]
    assert tokenizer.decode(pair.chosen.prompt) == "User: the cat?\nAssistant:"
    assert tokenizer.decode(pair.chosen.ids) == " red.<|end|>"


# ---------------------------------------------------------------- what is refused


def test_an_encoder_is_refused_as_the_policy(run_dpo: Any, tiny_bert: Path) -> None:
    with pytest.raises(
        UsageError, match=r"is no language model that can write: it is an encoder \(its type is bert"
    ):
        run_dpo(model=str(tiny_bert))


def test_a_reference_that_reads_other_tokens_or_fewer_is_refused(run_dpo: Any, tmp_path: Path) -> None:
    for name, settings, message in (
        ("words", {"vocab_size": 310, "n_positions": 48}, r"a vocabulary of 295, the reference .* of 310"),
        ("short", {"vocab_size": 295, "n_positions": 24}, "reads 24 tokens; set max_length: 24"),
    ):
        model = GPT2LMHeadModel(
            GPT2Config(n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, **settings)
        )
        model.save_pretrained(tmp_path / name)
        with pytest.raises(UsageError, match=message):
            run_dpo(name, reference=str(tmp_path / name))
    run_dpo("fits", reference=str(tmp_path / "short"), max_length=24)
