"""The textbook's sum of a method's models, and what stands beside it."""

from __future__ import annotations

import json

import pytest

from keel.errors import UsageError
from keel.plan import rule_of_thumb

LLAMA = "meta-llama/Llama-2-70b-hf"


def test_ppo_with_four_models_of_70_b_is_840_gb_on_12_cards():
    column = rule_of_thumb.columns(LLAMA, "ppo")[0]
    expected = {"policy": 280e9, "reference": 140e9, "reward": 140e9, "critic": 280e9}
    assert column.roles == pytest.approx(expected)
    assert column.total == pytest.approx(840e9)
    assert column.cards == 12


def test_the_optimizer_is_counted_on_the_exact_number_of_parameters():
    n = 68_976_648_192
    adamw = next(column for column in rule_of_thumb.columns(LLAMA, "ppo") if column.name == "AdamW")
    assert adamw.total == 2 * 16 * n + 2 * 2 * n


def test_one_4_bit_base_is_less_than_a_single_16_bit_model():
    shared = rule_of_thumb.columns(LLAMA, "ppo")[-1]
    assert "reference" not in shared.roles
    assert shared.total < 2 * 68_976_648_192


def test_json_has_the_sum():
    tree = json.loads(rule_of_thumb.as_json(LLAMA, "ppo"))
    assert tree["columns"]["textbook"]["total"] == 840 * 10**9


@pytest.mark.parametrize(
    ("name", "method", "said"), [("nobody/none", "ppo", "shape"), (LLAMA, "ppx", "method")]
)
def test_unknown_models_and_methods_are_refused(name, method, said):
    with pytest.raises(UsageError, match=said):
        rule_of_thumb.columns(name, method)
