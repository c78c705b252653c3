"""The plan: parameters, tokens and steps as the run would have them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer, DistilBertConfig

from keel.config import parse
from keel.data.holdout import split_holdout
from keel.models.load import load_tokenizer
from keel.pipeline.pipeline import Pipeline
from keel.plan import model_memory, planner, text
from keel.plan.stage_memory import Lengths

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}

Plan = Callable[..., dict[str, dict[str, Any]]]


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """The plan's entry of each stage."""

    def go(**stages: dict[str, Any]) -> dict[str, dict[str, Any]]:
        config = parse({"name": "tiny", "threads": 1, "device": "cpu", "stages": stages})
        entries = planner.plan(Pipeline(config, tmp_path / "run"))
        return {entry["stage"]: entry for entry in entries}

    return go


def _pretrain(data: Any, **settings: Any) -> dict[str, Any]:
    stage = {
        "kind": "pretrain",
        "data": str(data.text),
        "model": {"init": LLAMA},
        "max_steps": 1,
        "batch_size": 2,
    }
    return {**stage, **settings}


# ---------------------------------------------------------------- how models are read


def test_what_is_special_about_reading_a_model_is_planned(plan, data, tmp_path, tokenizer):
    """Only where it matters: a stage that packs, or samples."""
    sizes = {name: value for name, value in LLAMA.items() if name != "model_type"} | {"vocab_size": 300}
    for kind, more in {
        "mistral": {"sliding_window": 8},
        "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    }.items():
        AutoConfig.for_model(kind, **sizes | more).save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
    common = {"data": str(data.demonstrations), "max_steps": 1}
    entries = plan(
        plain={"kind": "sft", "model": str(tmp_path / "mistral"), **common},
        packed={"kind": "sft", "model": str(tmp_path / "mistral"), "packing": True, **common},
        short={
            "kind": "sft", "model": str(tmp_path / "mistral"), "packing": True, "max_length": 8,
            "too_long": "truncate", **common,
        },
        judged={
            "kind": "evaluate", "models": [str(tmp_path / "lfm2")], "data": str(data.demonstrations),
            "sampling": {"max_new_tokens": 4},
        },
    )  # fmt: skip
    assert entries["plain"]["reading"] == entries["short"]["reading"] == []
    assert "8 tokens are read by their positions" in entries["packed"]["reading"][0]
    assert "the cache that the model makes itself" in entries["judged"]["reading"][0]
    assert entries["judged"]["reading"][0] in text.as_text([*entries.values()])


# ---------------------------------------------------------------- parameters


def test_an_encoder_is_planned_as_the_reward_model_it_will_be(plan, run, data, tiny_bert, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    sizes = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16}
    DistilBertConfig(vocab_size=len(tokenizer), **sizes).save_pretrained(tmp_path / "d")
    tokenizer.save_pretrained(tmp_path / "d")
    reward = {"kind": "reward", "data": str(data.pairs), "max_steps": 1, "batch_size": 2, "normalize": 0}
    stages = {"bert": {**reward, "model": str(tiny_bert)}, "distil": {**reward, "model": str(tmp_path / "d")}}
    planned = plan(**stages)
    assert planned["distil"]["parameters"] > 10_000  # transformers has no way to write with this one
    done = run({"stages": {"bert": stages["bert"]}}, tmp_path / "run")
    facts = json.loads((done.stage_directory("bert") / "stage.json").read_text())
    assert planned["bert"]["parameters"] == facts["parameters"]


@pytest.mark.parametrize("model", [{"vocab_size": 300}, {}, {"init": {**LLAMA, "vocab_size": 512}}])
def test_a_new_model_has_the_embeddings_of_its_vocabulary(plan, data, model):
    size = model.get("vocab_size") or model.get("init", {}).get("vocab_size") or 4096
    planned = plan(base=_pretrain(data, model={"init": LLAMA, **model}))["base"]["parameters"]
    smaller = plan(base=_pretrain(data, model={"init": {**LLAMA, "vocab_size": 260}}))["base"]["parameters"]
    assert planned - smaller == (size - 260) * LLAMA["hidden_size"]


def test_a_new_model_has_the_embeddings_of_the_tokenizer_it_is_given(plan, run, data, tiny_model, tmp_path):
    base = _pretrain(data, model={"init": LLAMA, "tokenizer": str(tiny_model)}, max_length=16)
    planned = plan(base=base)["base"]["parameters"]
    done = run({"stages": {"base": base}}, tmp_path / "run")
    assert planned == json.loads((done.stage_directory("base") / "stage.json").read_text())["parameters"]


# ---------------------------------------------------------------- tokens


def test_each_chain_is_measured_by_its_own_tokenizer(plan, run, data, tmp_path):
    """Two tokenizers are trained in one config; the second sees words whole, the first hardly any."""
    bases = {
        name: _pretrain(data, model={"init": LLAMA, "vocab_size": size})
        for name, size in (("a", 260), ("b", 400))
    }
    sft = {"kind": "sft", "data": str(data.demonstrations), "max_steps": 1, "batch_size": 2}
    stages = {**bases, "sft_a": {**sft, "model": "a"}, "sft_b": {**sft, "model": "b"}}
    assert not any(entry["tokens_measured"] for entry in plan(**stages).values())
    done = run({"stages": bases}, tmp_path / "run")
    planned = plan(**stages)
    for name in bases:
        tokenizer = load_tokenizer(str(done.stage_directory(name) / "model"))
        texts = [json.loads(line) for line in data.demonstrations.read_text().splitlines()]
        expected = sum(len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) for row in texts)
        assert planned[f"sft_{name}"]["tokens"] == expected
    assert planned["sft_a"]["tokens"] > planned["sft_b"]["tokens"]
    changed = plan(**{**stages, "a": {**bases["a"], "lr": 0.1}})
    assert changed["sft_b"]["tokens_measured"]
    assert not changed["sft_a"]["tokens_measured"]  # the tokenizer that lies there is of other settings


def test_a_model_that_is_only_evaluated_brings_its_tokenizer(plan, data, tiny_model):
    stage = {
        "kind": "evaluate",
        "models": [str(tiny_model)],
        "data": str(data.prompts),
        "sampling": {"max_new_tokens": 4},
    }
    entry = plan(judge=stage)["judge"]
    assert entry["tokens_measured"]
    assert entry["parameters"] > 10_000


def _demonstrations(rows: int) -> str:
    """Each with a prompt of its own, of one length."""
    return "".join(f'{{"prompt": "the cat {n:04}?", "completion": " red."}}\n' for n in range(rows))


@pytest.mark.parametrize(("rows", "exact"), [(planner.SAMPLE, True), (planner.SAMPLE + 1, False)])
def test_extrapolated_tokens_are_marked(plan, tiny_model, tmp_path, rows, exact):
    path = tmp_path / "rows.jsonl"
    path.write_text(_demonstrations(rows))
    entry = plan(sft={"kind": "sft", "model": str(tiny_model), "data": str(path)})["sft"]
    assert entry["tokens_measured"] is exact
    assert ("≈" not in text.as_text([entry])) is exact


def test_the_rows_that_are_measured_are_spread_over_the_data(plan, tiny_model, tmp_path):
    short, long = (
        '{"prompt": "a", "completion": "b"}\n',
        json.dumps({"prompt": "A", "completion": "b" * 39}) + "\n",
    )
    path = tmp_path / "rows.jsonl"
    path.write_text(short * 500 + long * 500)
    entry = plan(sft={"kind": "sft", "model": str(tiny_model), "data": str(path)})["sft"]
    tokenizer = load_tokenizer(str(tiny_model))
    expected = sum(500 * len(tokenizer(text)["input_ids"]) for text in ("ab", "A" + "b" * 39))
    assert entry["tokens"] == pytest.approx(expected, rel=0.01)


# ---------------------------------------------------------------- steps


@pytest.mark.parametrize(("rows", "holdout"), [(1, 0.5), (2, 0.01), (40, 0.3), (1500, 0.9), (40, 0)])
def test_steps_leave_out_the_rows_that_are_held_out(plan, tiny_model, tmp_path, rows, holdout):
    path = tmp_path / "rows.jsonl"
    path.write_text(_demonstrations(rows))
    stage = {"kind": "sft", "model": str(tiny_model), "data": str(path), "batch_size": 1, "holdout": holdout}
    assert plan(sft=stage)["sft"]["steps"] == len(split_holdout(range(rows), holdout, 0).train)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("pairs", {"loss": "kto"}),
        pytest.param("pairs", {"loss": "kto", "holdout": 0}, marks=pytest.mark.slow),
        pytest.param("pairs", {}, marks=pytest.mark.slow),
        ("pairs", {"votes": "soft"}),
        ("labels", {"loss": "kto"}),
    ],
)
def test_steps_of_preferences_are_those_of_the_loop(plan, run, tiny_model, tmp_path, kind, settings):
    """KTO learns from both sides of a pair; a pair that votes leave undecided is learned from with soft votes
    only."""
    path = tmp_path / "rows.jsonl"
    rows: list[dict[str, Any]] = [
        {"prompt": f"the cat {i}?", "chosen": " red", "rejected": " so", "p_chosen": (1.0, 0.5, 0.8)[i % 3]}
        for i in range(11)
    ]
    if kind == "labels":
        rows = [{"prompt": f"the cat {i}?", "completion": " red", "label": i % 2 == 0} for i in range(11)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {
        "kind": "dpo",
        "model": str(tiny_model),
        "data": str(path),
        "batch_size": 2,
        "epochs": 1.5,
        "holdout": 0.3,
        **settings,
    }
    planned = plan(dpo=stage)["dpo"]["steps"]
    done = run({"stages": {"dpo": stage}}, tmp_path / "run")
    assert planned == json.loads((done.stage_directory("dpo") / "stage.json").read_text())["facts"]["steps"]


# ---------------------------------------------------------------- memory


def test_memory_is_planned_by_role_and_phase(plan, data, tiny_model):
    sft = {"kind": "sft", "model": str(tiny_model), "data": str(data.demonstrations), "batch_size": 4}
    reward = {"kind": "reward", "model": "sft", "data": str(data.pairs), "batch_size": 2, "normalize": 0}
    ppo = {
        "kind": "ppo",
        "model": "sft",
        "reward": "reward",
        "data": str(data.prompts),
        "batch_size": 4,
        "updates": 1,
        "sampling": {"max_new_tokens": 4},
    }
    planned = plan(sft=sft, reward=reward, ppo=ppo, shared={**ppo, "sharing": "trunk"})
    memory = planned["ppo"]["memory"]
    assert set(memory["phases"]) == {"rollout", "score", "forward", "train"}
    assert set(memory["phases"]["train"]) == {"policy", "reference", "critic", "reward"}
    assert memory["phases"]["train"]["policy"]["weights"] == 4 * planned["ppo"]["parameters"]
    assert memory["phases"]["train"]["policy"]["optimizer"] == 8 * planned["ppo"]["parameters"]
    assert memory["phases"]["rollout"]["policy"]["kv_cache"] > 0
    assert "critic" not in planned["shared"]["memory"]["phases"]["train"]
    assert planned["shared"]["memory"]["peak"] < memory["peak"]
    assert "by role" in text.as_text([planned["ppo"]])


def test_one_base_is_planned_as_what_is_held(plan, run, data, tiny_model, tmp_path):
    """A reward model that will be, or was, an adapter on the policy's base takes no base of its own."""
    lora = {"r": 2}
    sft = {
        "kind": "sft",
        "model": str(tiny_model),
        "data": str(data.demonstrations),
        "batch_size": 4,
        "max_steps": 1,
    }
    reward = {
        "kind": "reward",
        "model": "sft",
        "data": str(data.pairs),
        "batch_size": 2,
        "normalize": 0,
        "lora": lora,
        "max_steps": 1,
    }
    ppo = {
        "kind": "ppo",
        "model": "sft",
        "reward": "reward",
        "data": str(data.prompts),
        "batch_size": 4,
        "updates": 1,
        "lora": lora,
        "sampling": {"max_new_tokens": 4},
        "sharing": "adapters",
    }
    grpo = {**ppo, "kind": "grpo", "samples_per_prompt": 2}
    chain = {"sft": sft, "reward": reward, "whole": {**reward, "lora": None}}
    planned = plan(
        **chain, ppo=ppo, grpo=grpo, mixed={**ppo, "reward": "whole"}, apart={**ppo, "sharing": "separate"}
    )
    weights = {
        name: {role: kinds["weights"] for role, kinds in entry["memory"]["phases"]["train"].items()}
        for name, entry in planned.items() if name in ("ppo", "grpo", "mixed", "apart")
    }  # fmt: skip
    base, hidden = 4 * planned["ppo"]["parameters"], 32
    adapter = weights["ppo"]["policy"] - base
    assert 0 < adapter < 0.2 * base
    assert weights["ppo"] == {
        "policy": base + adapter,
        "critic": adapter + 4 * hidden,
        "reward": adapter + 4 * hidden,
    }
    assert weights["grpo"] == {"policy": base + adapter, "reward": adapter + 4 * hidden}
    assert weights["mixed"]["reward whole"] > 0.6 * base
    assert weights["apart"]["reward"] == weights["mixed"]["reward whole"]
    assert planned["ppo"]["memory"]["peak"] < planned["apart"]["memory"]["peak"]
    made = run({"stages": {"sft": sft, "reward": reward}}, tmp_path / "made")
    places = {
        "model": str(made.stage_directory("sft") / "model"),
        "reward": str(made.stage_directory("reward") / "model"),
    }
    again = plan(ppo={**ppo, **places})["ppo"]["memory"]["phases"]["train"]
    assert {role: kinds["weights"] for role, kinds in again.items()} == weights["ppo"]


def test_what_rests_on_the_cpu_is_counted_where_it_works(plan, data, tiny_model, tiny_reward):
    ppo = {
        "kind": "ppo",
        "model": str(tiny_model),
        "reward": str(tiny_reward),
        "data": str(data.prompts),
        "batch_size": 4,
        "updates": 1,
        "sampling": {"max_new_tokens": 4},
        "sharing": "trunk",
        "offload": True,
    }
    phases = plan(ppo=ppo)["ppo"]["memory"]["phases"]
    assert {name: set(roles) for name, roles in phases.items()} == {
        "rollout": {"policy"},
        "score": {"policy", "reward"},
        "forward": {"policy", "reference"},
        "train": {"policy"},
    }


def _activations(entry: dict[str, Any], role: str) -> int:
    return entry["memory"]["phases"]["train"][role]["activations"]


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_a_prompt_that_both_sides_of_a_pair_share_is_planned_to_be_read_once(
    plan, tiny_model, tmp_path, kind
):
    """Against rows as long, of which all is response."""
    rows = {"shared": ("the cat is red, so " * 3, " red", " so"), "apart": ("the", " cat" * 22, " red" * 22)}
    stages = {}
    for name, (prompt, chosen, rejected) in rows.items():
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        (tmp_path / name).with_suffix(".jsonl").write_text(8 * (json.dumps(row) + "\n"))
        stages[name] = {
            "kind": kind,
            "model": str(tiny_model),
            "data": str(tmp_path / f"{name}.jsonl"),
            "batch_size": 8,
            "holdout": 0,
        }
    planned = plan(**stages)
    lengths = [sum(planned[name]["memory"]["longest"].values()) for name in rows]
    assert lengths[0] == pytest.approx(lengths[1], abs=2)
    role = "policy" if kind == "dpo" else "model"
    shared, apart = (_activations(planned[name], role) for name in rows)
    assert shared < 0.7 * apart


def test_samples_of_a_prompt_are_planned_to_share_it_as_far_as_they_share_a_mini_batch(
    plan, data, tiny_model
):
    ppo = {
        "kind": "ppo",
        "model": str(tiny_model),
        "reward": {"kind": "length", "low": 1, "high": 9},
        "data": str(data.prompts),
        "batch_size": 16,
        "sampling": {"max_new_tokens": 3},
    }
    group = {**ppo, "samples_per_prompt": 4}
    planned = plan(one=ppo, four=group, mini={**group, "mini_batch": 4}, few={**ppo, "mini_batch": 4})
    one, four, mini, few = (_activations(planned[name], "policy") for name in ("one", "four", "mini", "few"))
    assert four < 0.8 * one
    assert mini == few  # drawn at random from 16, all 4 may be of different prompts


def test_rows_of_a_pretraining_mix_and_demonstrations_are_planned_as_long_as_they_are(
    plan: Any, data: Any, tiny_model: Path, tmp_path: Path
) -> None:
    """Not as long as the samples beside which they are learned from."""
    (tmp_path / "long.jsonl").write_text(4 * (json.dumps({"text": "the cat is red, so " * 6}) + "\n"))
    row = {"prompt": "the", "completion": " cat is red, so" * 6}
    (tmp_path / "replies.jsonl").write_text(4 * (json.dumps(row) + "\n"))
    common = {
        "model": str(tiny_model), "data": str(data.prompts), "batch_size": 8, "mini_batch": 4,
        "sampling": {"max_new_tokens": 3},
    }  # fmt: skip
    ppo = {"kind": "ppo", "reward": {"kind": "length", "low": 1, "high": 9}, **common}
    distill = {"kind": "distill", "teacher": str(tiny_model), **common}
    planned = plan(
        short={**ppo, "ptx": {"data": str(data.text), "batch_size": 4}},
        long={**ppo, "ptx": {"data": str(tmp_path / "long.jsonl"), "batch_size": 4}},
        own=distill,
        taught={**distill, "demonstrations": {"data": str(tmp_path / "replies.jsonl"), "share": 0.5}},
    )

    def activations(name: str, phase: str) -> float:
        return planned[name]["memory"]["phases"][phase]["policy"]["activations"]

    assert activations("long", "ptx") > 2 * activations("short", "ptx")
    assert activations("long", "train") == activations("short", "train")
    assert activations("taught", "train") > 2 * activations("own", "train")


def test_what_episodes_keep_between_their_turns_is_planned(
    plan: Any, clerk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_memory, "sampling_logits", lambda *_: 0.0)  # else those of prompts are fullest
    grpo = {
        "kind": "grpo", "model": str(clerk), "data": {"source": "world:shop/prompts", "rows": 4},
        "batch_size": 4, "samples_per_prompt": 2, "reward": {"kind": "length", "low": 1, "high": 9},
        "sampling": {"max_new_tokens": 200},
    }  # fmt: skip
    planned = plan(plain=grpo, episodes={**grpo, "environment": "world:shop"})
    plain, episodes = (
        planned[name]["memory"]["phases"]["rollout"]["policy"]["kv_cache"] for name in ("plain", "episodes")
    )
    # one layer of one is there twice; a quarter of the cache waits, and a quarter is read
    assert episodes == pytest.approx(plain * 2.5 / 2)


def test_no_row_takes_more_than_the_one_that_is_planned_for():
    rows = [Lengths(90, 10, 5), Lengths(0, 60, 60), Lengths(20, 70, 1)]
    assert Lengths.of_all(rows) == Lengths(30, 70, 60)
    assert Lengths.of_all(rows).within(64) == Lengths(0, 64, 60)
    assert Lengths.of_all([Lengths(3, 2), Lengths(1, 1)]) == Lengths(3, 2)


def test_weights_in_4_bit_are_planned_without_bitsandbytes(plan, data):
    model = {"path": "meta-llama/Llama-2-7b-hf", "quantize": "4bit"}
    sft = {"kind": "sft", "model": model, "data": str(data.demonstrations), "lora": {}}
    held = plan(sft=sft)["sft"]["memory"]["phases"]["train"]["model"]["weights"]
    assert held < 0.7 * 6_738_415_616  # half a byte a weight and its scales; embeddings, head and adapters


def test_a_common_model_that_is_not_here_is_planned_with(plan, data):
    entry = plan(sft={"kind": "sft", "model": "openai-community/gpt2", "data": str(data.demonstrations)})[
        "sft"
    ]
    assert entry["parameters"] == 124_439_808
    assert entry["memory"]["phases"]["train"]["model"]["weights"] == 4 * 124_439_808


def test_memory_of_an_unknown_model_is_unknown(plan, data):
    entry = plan(sft={"kind": "sft", "model": "nobody/none", "data": str(data.demonstrations)})["sft"]
    assert entry["memory"] is None
    assert "memory unknown" in text.as_text([entry])


# ---------------------------------------------------------------- micro_batch: auto


def test_auto_is_the_largest_half_that_fits_into_what_is_free(plan, data, monkeypatch):
    stage = _pretrain(data, batch_size=12, max_length=32)
    peaks = {
        rows: plan(base={**stage, "micro_batch": rows})["base"]["memory"]["peak"] for rows in (12, 6, 3, 2, 1)
    }
    for room, expected in ((peaks[12], 12), (peaks[12] - 1, 6), (peaks[3], 3), (peaks[2], 2), (1, 1)):
        monkeypatch.setattr(planner, "free_memory", lambda device, room=room: room / planner.USABLE + 1e-3)
        entry = plan(base={**stage, "micro_batch": "auto"})["base"]
        assert entry["micro_batch"] == expected
        assert entry["memory"]["peak"] == peaks[expected]
        assert f"micro_batch {expected} here" in text.as_text([entry])


def test_of_a_shape_that_nobody_knows_auto_says_nothing(tmp_path, data):
    model = {"path": "nobody/unheard-of"}
    sft = {"kind": "sft", "model": model, "data": str(data.demonstrations), "micro_batch": "auto"}
    config = parse({"name": "tiny", "stages": {"sft": sft}})
    assert planner.micro_batch(Pipeline(config, tmp_path / "run"), "sft") is None


def test_a_teacher_is_held_and_read_in_the_gradient_steps(plan, data, tiny_model):
    """It is asked nothing while samples are scored: there is no such phase."""
    stage = {
        "kind": "distill",
        "model": str(tiny_model),
        "teacher": str(tiny_model),
        "data": str(data.prompts),
    }
    short = {"sampling": {"max_new_tokens": 8}, "batch_size": 4}
    memory = plan(distill={**stage, **short})["distill"]["memory"]
    assert memory["phases"].keys() == {"rollout", "train"}
    step = memory["phases"]["train"]
    assert step["reference"].keys() == {"weights"}
    assert step["policy"]["weights"] == step["reference"]["weights"] > 0
    assert memory["card_peak"] > 0
    judged = {"kind": "judge", "model": str(tiny_model), "mode": "pairwise", "max_new_tokens": 8}
    online = {"kind": "online_dpo", "model": str(tiny_model), "data": str(data.prompts), "reward": judged}
    phases = plan(online={**online, **short})["online"]["memory"]["phases"]
    assert phases["score"]["reward judge"]["kv_cache"] > 0  # it writes its verdict


def test_what_a_server_samples_takes_no_memory_here(plan, data, tiny_model):
    """Neither keys and values, nor what the head was given."""
    common = {"data": str(data.prompts), "sampling": {"max_new_tokens": 8}}
    away = {"rollout": {"engine": "vllm", "address": "http://127.0.0.1:9"}}
    model, red = str(tiny_model), [{"kind": "keywords", "words": ["red"]}]
    learns = {"model": model, "batch_size": 4, **common}
    stages = {
        "grpo": {"kind": "grpo", "reward": red, "samples_per_prompt": 2, **learns},
        "distill": {"kind": "distill", "teacher": model, **learns},
        "best": {"kind": "best_of_n", "reward": red, **learns},
        "judge": {"kind": "evaluate", "models": [model], **common},
        "pairs": {"kind": "collect", "model": model, "pairs": 2, "annotators": "people", **common},
    }
    here = plan(**stages)
    there = plan(**{name: {**stage, **away} for name, stage in stages.items()})
    for name in stages:
        phase = "samples" if name == "best" else "rollout"
        before, after = (entries[name]["memory"]["phases"][phase] for entries in (here, there))
        role = next(iter(after))
        assert before[role]["kv_cache"] > 0
        assert after[role] == {"weights": before[role]["weights"]} | {
            kind: before[role][kind] for kind in ("optimizer", "gradients") if kind in after[role]
        }, name


def test_replies_of_the_data_are_planned_beside_the_students_own(plan, data, tiny_model):
    short = {"data": str(data.prompts), "batch_size": 4, "sampling": {"max_new_tokens": 8}}
    stage = {"kind": "distill", "model": str(tiny_model), "teacher": str(tiny_model), **short}
    taught = {"demonstrations": {"data": str(data.demonstrations), "share": 0.5}}
    alone, both = (plan(distill={**stage, **more})["distill"]["memory"] for more in ({}, taught))
    steps = [memory["phases"]["train"]["policy"]["activations"] for memory in (alone, both)]
    assert steps[1] > 1.5 * steps[0]
