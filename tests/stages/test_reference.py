"""The reference policy's precision, and rewards that are meant for one source of several."""

from __future__ import annotations

import pytest
import torch

from keel.config import parse
from keel.errors import UsageError
from keel.rl import rollout


def test_a_reference_in_16_bit_is_the_same_policy_in_half_the_memory(open_ppo, stage_run):
    tasks, whole = open_ppo(old_logp="trainer")
    assert stage_run.computes_in == "float32"  # what a checkpoint remembers
    _, half = open_ppo(old_logp="trainer", reference_dtype="float16")
    assert {p.dtype for p in half.roles.reference.parameters()} == {torch.float16}
    assert {p.dtype for p in half.roles.policy.parameters()} == {torch.float32}
    done = rollout.sample(half, tasks[:8], 1)
    rough, exact = rollout.score_tokens(half, done), rollout.score_tokens(whole, done)
    assert torch.equal(exact.logp, exact.ref_logp)
    assert torch.equal(rough.logp, exact.logp)
    assert 0 < (rough.ref_logp - exact.ref_logp).abs().max() < 0.01
    assert rough.ref_logp.dtype == torch.float32


def test_a_reference_of_another_stage_has_its_precision_too(open_ppo, tiny_model):
    _, setup = open_ppo(reference=str(tiny_model), reference_dtype="bfloat16")
    assert {p.dtype for p in setup.roles.reference.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"reference_dtype": "float16", "lora": {}}, "`reference_dtype` has no effect with `lora`"),
        (
            {"data": ["a.jsonl", "b.jsonl"], "reward": [{"kind": "answer", "source_filter": "a.json"}]},
            r"'answer': `source_filter` names 'a.json', which is no source of `data` or `eval_data`; "
            r"there are a.jsonl, b.jsonl",
        ),
    ],
)
def test_settings_without_effect_are_refused(settings, reason):
    ppo = {"kind": "ppo", "model": "m", "reward": "r", "data": "d.jsonl", **settings}
    with pytest.raises(UsageError, match=reason):
        parse({"name": "x", "stages": {"ppo": ppo}})
