"""The checks before a run load a tokenizer once, and no check sees what another has done to it."""

from __future__ import annotations

import pytest

from keel.config import parse
from keel.errors import UsageError
from keel.pipeline import kept_tokenizers
from keel.pipeline.kept_tokenizers import KeptTokenizers
from keel.pipeline.pipeline import Pipeline
from keel.plan import disk, planner


@pytest.fixture
def loaded(monkeypatch):
    """The places that tokenizers were loaded from."""
    seen, load = [], kept_tokenizers.load_tokenizer
    monkeypatch.setattr(
        kept_tokenizers, "load_tokenizer", lambda place, **more: (seen.append(place), load(place, **more))[1]
    )
    return seen


def test_the_checks_of_a_run_and_a_plan_load_it_once(loaded, tiny_model, data, tmp_path):
    sft = {"kind": "sft", "model": str(tiny_model), "data": str(data.demonstrations), "max_steps": 1}
    dpo = {"kind": "dpo", "model": str(tiny_model), "data": str(data.pairs), "max_steps": 1}
    config = parse({"name": "x", "stages": {"sft": sft, "dpo": dpo}})
    pipeline = Pipeline(config, tmp_path / "x", room=disk.room)
    planner.plan(pipeline)
    assert loaded == [str(tiny_model)]
    pipeline.run(only="sft")
    assert loaded == [str(tiny_model)] * 2  # a run's files may have changed since the plan


def test_what_one_sets_on_it_no_other_sees(loaded, tiny_model):
    kept = KeptTokenizers()
    with kept.kept(), kept.kept():
        one = kept.load(str(tiny_model))
        before = one.chat_template
        one.chat_template = "{{ messages }}"
        pad, one.pad_token = one.pad_token, one.eos_token
        assert pad != one.pad_token
        assert kept.load(str(tiny_model)).pad_token == pad
        assert kept.load(str(tiny_model)).chat_template == before
        assert loaded == [str(tiny_model)]
        kept.load(str(tiny_model), trust_remote_code=True)
        assert len(loaded) == 2  # asked for otherwise: nothing that was kept
    kept.load(str(tiny_model))
    kept.load(str(tiny_model))
    assert len(loaded) == 4  # outside nothing is kept


def test_a_folder_without_one_is_an_error_each_time(loaded, tmp_path):
    kept = KeptTokenizers()
    with kept.kept():
        for _ in range(2):
            with pytest.raises(UsageError, match=str(tmp_path)):
                kept.load(str(tmp_path))
    assert len(loaded) == 2
