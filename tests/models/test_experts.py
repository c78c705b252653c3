"""The balancing loss of mixtures of experts is transformers' own, in every loss that trains their model."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from keel.errors import UsageError
from keel.models import experts
from keel.models.load import checkpoint_activations
from keel.models.logprobs import head_inputs
from keel.models.lora import Adapters, add_adapters
from keel.stages import language
from keel.stages.language import LanguageRow

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "jetmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
LENGTHS = (9, 5)


def _model(kind: str, *, asks: bool = True, coef: float | None = None) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **KINDS[kind], "output_router_logits": asks})
    return experts.mark(AutoModelForCausalLM.from_config(config).eval(), coef)


def _rows() -> list[LanguageRow]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(2, 64, (length,), generator=generator).tolist() for length in LENGTHS]
    return [LanguageRow(ids, [True] * len(ids)) for ids in rows]


def _theirs(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' own loss and balancing loss of the rows, padded."""
    width = max(LENGTHS)
    ids = torch.tensor([[*row.ids, *[0] * (width - len(row.ids))] for row in _rows()])
    mask = (torch.arange(width) < torch.tensor(LENGTHS)[:, None]).long()
    labels = torch.where(mask.bool(), ids, -100)
    output = model(
        input_ids=ids, attention_mask=mask, labels=labels, output_router_logits=True, use_cache=False
    )
    return output.loss, output.aux_loss


def _gradient(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_a_language_model_has_transformers_own_balancing_loss(kind: str) -> None:
    model = _model(kind)
    whole, balancing = _theirs(model)
    expected = _gradient(model, whole)
    loss, measured = language.loss(model, _rows(), 0, sum(row.counted for row in _rows()))
    assert float(measured["router_aux_loss"]) == pytest.approx(float(balancing), rel=1e-5)
    assert float(loss) == pytest.approx(float(whole), rel=1e-5)
    for name, gradient in _gradient(model, loss).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6, msg=name)


def test_the_config_asks_for_it_or_the_setting_does_and_a_zero_leaves_it_out() -> None:
    rows, tokens = _rows(), sum(row.counted for row in _rows())
    plain, without = language.loss(_model("mixtral", asks=False), rows, 0, tokens)
    assert "router_aux_loss" not in without
    assert "router_aux_loss" not in language.loss(_model("mixtral", coef=0.0), rows, 0, tokens)[1]
    loss, measured = language.loss(_model("mixtral", asks=False, coef=0.5), rows, 0, tokens)
    assert float(loss) == pytest.approx(float(plain) + 0.5 * float(measured["router_aux_loss"]), rel=1e-6)


def test_it_is_no_part_of_an_evaluation() -> None:
    model, rows = _model("mixtral"), _rows()
    with torch.no_grad():
        assert "router_aux_loss" not in language.loss(model, rows, 0, 12)[1]


def test_micro_batches_add_up_to_their_mean_by_counted_tokens() -> None:
    model, rows = _model("mixtral"), _rows()
    tokens = sum(row.counted for row in rows)
    parts = [language.loss(model, [row], 0, tokens)[1]["router_aux_loss"] for row in rows]
    alone = [language.loss(model, [row], 0, row.counted)[1]["router_aux_loss"] for row in rows]
    expected = sum(row.counted * float(value) for row, value in zip(rows, alone, strict=True)) / tokens
    assert float(sum(parts)) == pytest.approx(expected, rel=1e-6)


def test_padding_is_left_out_whatever_it_holds() -> None:
    """The same rows in a wider batch have the same balancing loss."""
    model, rows = _model("mixtral"), _rows()
    ids = torch.tensor([[*row.ids, *[0] * (20 - len(row.ids))] for row in rows])
    other = torch.where(ids == 0, 7, ids)
    found = []
    for batch in (ids, other):
        with experts.collecting(model) as routed:
            head_inputs(model, batch, torch.tensor([3]), lengths=torch.tensor(LENGTHS))
        found.append(float(routed.mean()))
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert found[0] == pytest.approx(float(_theirs(model)[1]), rel=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_under_lora_and_with_recomputed_activations_it_is_the_same(checkpointing: bool) -> None:
    model = _model("qwen3_moe")
    expected = float(_theirs(model)[1])
    wrapped = add_adapters(model, Adapters(r=2), 0)
    if checkpointing:
        checkpoint_activations(wrapped)
    wrapped.train()
    loss, measured = language.loss(wrapped, _rows(), 0, 12)
    assert float(measured["router_aux_loss"]) == pytest.approx(expected, rel=1e-5)
    loss.backward()


@pytest.mark.usefixtures("accel_on")
def test_packed_rows_have_it_without_their_padding() -> None:
    model, rows = _model("mixtral"), _rows()
    ids = [token for row in rows for token in row.ids]
    packed = LanguageRow(ids, [True] * len(ids), [0] * LENGTHS[0] + [1] * LENGTHS[1])
    short = LanguageRow(rows[1].ids, [True] * LENGTHS[1], [0] * LENGTHS[1])
    _, apart = language.loss(model, rows, 0, 12)
    _, together = language.loss(model, [packed], 0, 12)
    assert float(together["router_aux_loss"]) == pytest.approx(float(apart["router_aux_loss"]), rel=1e-5)
    assert torch.isfinite(language.loss(model, [packed, short], 0, 16)[0])


def test_a_weight_for_a_model_without_such_a_loss_is_refused(tiny_model: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with pytest.raises(UsageError, match="router_aux_loss_coef has no effect: llama"):
        experts.mark(model, 0.1)


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "ppo", pytest.param("grpo", marks=pytest.mark.slow)])
def test_every_stage_that_trains_a_language_model_logs_it_and_learns_from_it(
    kind: str, tokenizer: Any, tiny_reward: Any, data: Any, run: Any, tmp_path: Any
) -> None:
    torch.manual_seed(0)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {**SIZES, **ids, "vocab_size": len(tokenizer), "num_local_experts": 4, "initializer_range": 0.1}
    config = AutoConfig.for_model("mixtral", **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    common = {"batch_size": 4, "micro_batch": 2, "lr": 1e-3}
    sampled = {
        "data": str(data.prompts), "updates": 2, "reward": str(tiny_reward), "epochs": 1,
        "sampling": {"max_new_tokens": 4},
    }  # fmt: skip
    own = {
        "sft": {"data": str(data.demonstrations), "max_steps": 2},
        "dpo": {"data": str(data.pairs), "max_steps": 2},
        "kto": {"data": str(data.pairs), "max_steps": 2, "loss": "kto"},
        "grpo": {**sampled, "samples_per_prompt": 2},
        "ppo": {**sampled, "sharing": "trunk"},
    }[kind]
    weights = []
    for coef in (0.5, None):
        model = {"path": str(tmp_path / "moe"), "router_aux_loss_coef": coef}
        stage = {"kind": "dpo" if kind == "kto" else kind, "model": model, **common, **own}
        folder = tmp_path / str(coef)
        run({"stages": {"stage": stage}}, folder)
        lines = [json.loads(x) for x in (folder / "stages/stage/metrics.jsonl").read_text().splitlines()]
        name = "policy/router_aux_loss" if kind in ("grpo", "ppo") else "router_aux_loss"
        found = [line.get(name) for line in lines]
        # two experts of four a token: 2 where all get the same, at most 4
        assert all(value is not None and 1.5 < value < 4 for value in found) if coef else not any(found)
        saved = AutoModelForCausalLM.from_pretrained(folder / "stages/stage/model")
        weights.append(saved.model.layers[0].mlp.gate.weight)
    assert not torch.equal(*weights)
