"""What a config may say: unknown keys, settings without effect, stages that do not fit, overrides."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from keel.config import RunConfig, SFTConfig, parse, read
from keel.config.settings import Settings
from keel.errors import DeprecationNote, UsageError

NEW = {"init": {"model_type": "llama"}}


def _config(**stages: Any) -> dict[str, Any]:
    return {"name": "tiny", "stages": stages}


def _sft(**settings: Any) -> dict[str, Any]:
    return {"kind": "sft", "model": "m", "data": "d.jsonl", **settings}


def _reward(**settings: Any) -> dict[str, Any]:
    return {"kind": "reward", "model": "m", "data": "d.jsonl", **settings}


def _ppo(**settings: Any) -> dict[str, Any]:
    return {"kind": "ppo", "model": "m", "reward": "r", "data": "d.jsonl", **settings}


def _pretrain(**settings: Any) -> dict[str, Any]:
    return {"kind": "pretrain", "model": NEW, "data": "d.jsonl", **settings}


def _evaluate(**settings: Any) -> dict[str, Any]:
    return {"kind": "evaluate", "models": ["m"], "data": "d.jsonl", **settings}


def _refusal(config: dict[str, Any]) -> str:
    with pytest.raises(UsageError) as caught:
        parse(config)
    return str(caught.value)


def _written(tmp_path: Path, config: dict[str, Any] | str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(
        config if isinstance(config, str) else yaml.safe_dump(config, sort_keys=False), encoding="utf-8"
    )
    return path


def test_a_micro_batch_is_so_many_rows_or_so_many_tokens() -> None:
    assert "give one of them" in _refusal(_config(s=_sft(micro_batch=2, micro_tokens=64)))
    assert parse(_config(s=_sft(micro_tokens=64))).stages["s"].micro_tokens == 64  # pyright: ignore


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize(
    ("config", "place", "nearest"),
    [
        ({**_config(s=_sft()), "sed": 1}, "sed", "seed"),
        (_config(s=_sft(epoch=1)), "stages.s.epoch", "epochs"),
        (_config(s=_sft(model={"pth": "m"})), "stages.s.model.pth", "path"),
        (_config(s=_sft(data={"source": "d.jsonl", "colums": {}})), "stages.s.data.0.colums", "columns"),
        (_config(s=_sft(lora={"rr": 4})), "stages.s.lora.rr", "r"),
        (_config(s=_ppo(kl={"coeff": 0.1})), "stages.s.kl.coeff", "coef"),
        (_config(s=_ppo(ptx={"data": "d.txt", "coeff": 1})), "stages.s.ptx.coeff", "coef"),
        (_config(s=_ppo(sampling={"max_tokens": 3})), "stages.s.sampling.max_tokens", "max_new_tokens"),
        (_config(s=_evaluate(sampling={"topp": 0.9})), "stages.s.sampling.topp", "top_p"),
        (
            _config(s=_ppo(reward=[{"kind": "learned", "model": "m", "combin": "min"}])),
            "stages.s.reward.0.combin",
            "combine",
        ),  # `reward` is a setting here, and the name of a kind of stage elsewhere
        (
            _config(s=_ppo(reward=[{"kind": "classifier", "model": "m", "lable": 1}])),
            "stages.s.reward.0.lable",
            "label",
        ),
        (
            _config(sft=_pretrain(votes="soft")),
            "stages.sft.votes",
            "betas",
        ),  # a stage named like another kind
    ],
)
def test_unknown_key_names_the_nearest(config, place, nearest):
    message = _refusal(config)
    assert f"{place}: unknown key" in message
    assert f"{nearest!r}" in message or "known: " in message
    if nearest != "betas":
        assert f"did you mean {nearest!r}?" in message


def test_setting_of_another_kind_of_stage_is_unknown():
    # PPO samples without filters, because a cut distribution biases the ratio
    assert "stages.s.sampling.top_p: unknown key" in _refusal(_config(s=_ppo(sampling={"top_p": 0.9})))


def test_unknown_or_missing_kind():
    assert "unknown kind 'sftt'; did you mean 'sft'?" in _refusal(_config(s=_sft(kind="sftt")))
    config = _sft()
    del config["kind"]
    assert "stages.s: `kind` is missing; known: pretrain" in _refusal(_config(s=config))


def test_all_mistakes_are_told_at_once():
    message = _refusal(_config(a=_sft(lr=-1), b=_reward(batch_size=0)))
    assert "stages.a.lr" in message
    assert "stages.b.batch_size" in message


def test_nan_is_no_setting():
    assert "stages.s.lr" in _refusal(_config(s=_sft(lr=float("nan"))))
    assert "stages.s.clip" in _refusal(_config(s=_ppo(clip=float("nan"))))


def test_short_and_long_forms_are_the_same():
    short = parse(_config(s=_sft(data="d.jsonl", model="m")))
    long = parse(_config(s=_sft(data=[{"source": "d.jsonl"}], model={"path": "m"})))
    assert short == long


def test_resolved_config_reads_back_as_itself():
    config = parse(
        _config(
            b=_pretrain(schedule="constant"),
            s=_sft(model="b", eval_data="e.jsonl"),
            r=_reward(model="s", normalize=0),
            p=_ppo(model="s", reward="r", epochs=1),
            e=_evaluate(models=["s", "p"], sampling={"temperature": 0}),
        )
    )
    again = yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    assert parse(again) == config


# ---------------------------------------------------------------- settings without effect


@pytest.mark.parametrize(
    ("stage", "reason"),
    [
        (_pretrain(too_long="skip"), "`too_long` has no effect in pretrain"),
        (_sft(schedule="constant", lr_floor=0.1), "`lr_floor` has no effect"),
        (_sft(eval_data="e.jsonl", holdout=0.1), "`holdout` has no effect"),
        (_sft(holdout=0, eval_every=5), "`eval_every` has no effect"),
        (_sft(patience=2), "`patience` has no effect"),
        (_sft(model={"path": "m", "tokenizer": "t"}), "have no effect with `path`"),
        (_sft(model={"path": "m", "vocab_size": 300}), "have no effect with `path`"),
        (_pretrain(model={**NEW, "tokenizer": "t", "vocab_size": 300}), "`vocab_size` has no effect"),
        (_pretrain(model={**NEW, "revision": "main"}), "`revision` has no effect"),
        (_reward(normalize=0, sampling={"max_new_tokens": 8}), "`sampling` has no effect"),
        (_reward(sampling={"temperature": 0, "top_k": 5}), "`top_k` has no effect"),
        (_evaluate(sampling={"temperature": 0, "top_p": 0.9}), "`top_p` has no effect"),
        (_evaluate(comparisons="c.jsonl"), "`comparisons` has no effect without one reward model"),
        (_evaluate(models=["m", "m"]), "names 'm' twice"),
        (_evaluate(reference="other"), "is not one of `models`"),
        (_ppo(max_steps=3), "`max_steps` would have no effect"),
        (_ppo(kl={"horizon": 10}), "`kl.horizon` has no effect without `kl.target`"),
        (_ppo(eval_every=2), "work together"),
        (_ppo(patience=2), "`patience` has no effect"),
        (_ppo(epochs=1, max_approx_kl=0.1), "`max_approx_kl` has no effect"),
        (_ppo(epochs=1, desired_kl=0.2), "`desired_kl` has no effect"),
        (_ppo(epochs=1, mini_batch=64, batch_size=64, dual_clip=3), "`dual_clip` has no effect"),
    ],
)
def test_setting_without_effect_is_refused(stage, reason):
    assert reason in _refusal(_config(s=stage))


def test_no_limit_is_said_where_there_would_be_none_anyway():
    assert isinstance(parse(_config(s=_ppo(epochs=1, desired_kl=None))), RunConfig)


@pytest.mark.parametrize(
    ("stage", "reason"),
    [
        (_ppo(sampling={"temperature": 0}), "nothing to explore"),
        (_ppo(lora={"dropout": 0.1}), "`lora.dropout` must be 0"),
        (_ppo(batch_size=10, mini_batch=4), "not a multiple of `mini_batch`"),
        (_ppo(batch_size=10, samples_per_prompt=4), "not a multiple of `samples_per_prompt`"),
        (_ppo(shaping={"center": "prompt"}), "a lone sample has no peers"),
        (_ppo(critic_warmup=100, updates=100), "leaves none"),
        (_ppo(model=NEW), "PPO starts from a trained model"),
        (_ppo(kl={"where": "loss"}), "needs estimator k2 or k3"),
        (_ppo(kl={"coef": 0, "target": 1}), "can never adapt"),
        (_sft(model=NEW), "a new model needs `model.tokenizer`"),
        (_reward(model=NEW), "a new model needs `model.tokenizer`"),
        (_sft(betas=[0.9, 1.0]), "stages.s.betas.1: must be less than 1, not 1.0"),
        (_sft(betas=[-0.1, 0.9]), "stages.s.betas.0: must be at least 0, not -0.1"),
        (_sft(model={"path": "m", "dtype": "bfloat16"}), "weights in bfloat16 are too coarse to be trained"),
        (_ppo(epochs=1, clip=0.1), "`clip` has no effect with one gradient step"),
        (_ppo(sharing="adapters", lora=None), "`sharing: adapters` trains adapters, but `lora` is null"),
        (_sft(model={"path": "m", "quantize": "4bit"}), "weights in 4bit cannot be trained themselves"),
        (
            _sft(model={"path": "m", "quantize": "4bit", "dtype": "float32"}, lora={}),
            "`quantize` needs `dtype: bfloat16`",
        ),
        (
            _sft(model={**NEW, "tokenizer": "t", "quantize": "8bit"}, lora={}),
            "those of a new model are all trained",
        ),
        (_ppo(reference_quantize="4bit", lora={}), "`reference_quantize` has no effect with `lora`"),
        (_ppo(reference_quantize="4bit", reference_dtype="auto"), "needs a `reference_dtype` of 16 bit"),
        (
            _ppo(lora={}, reward={"kind": "length", "high": 3}, offload=True),
            "`offload` has no effect: there is no reward model",
        ),
        (_ppo(reference_quantize="8bit", offload=True), "`offload` is for models in full precision"),
        (_ppo(value_coef=0, critic_warmup=1), "`critic_warmup` has no effect with `value_coef` 0"),
        (_reward(normalize=1), "`normalize` 1 gives no spread to scale by: use at least 2, or 0"),
        (_sft(model={}), "either `path` or `init`"),
        (_sft(model={"path": "m", **NEW}), "either `path` or `init`"),
        (_sft(lr="small"), "stages.s.lr: must be a number, not 'small'"),
        (_sft(batch_size=0.5), "stages.s.batch_size: must be a whole number, not 0.5"),
        (
            _sft(lora=8),
            "stages.s.lora: must be a mapping of settings, not 8; write {} for the defaults, or {r: 8}",
        ),
        (
            {"kind": "evaluate", "models": "sft", "data": "d.jsonl"},
            "stages.s.models: must be a list, not 'sft'; write [sft, ppo]",
        ),
        ({"kind": "sft", "data": "d.jsonl"}, "stages.s.model: missing; a stage, a folder or a hub id"),
    ],
)
def test_setting_that_cannot_work_is_refused(stage, reason):
    assert reason in _refusal(_config(s=stage))


def test_adapters_and_16_bit_that_follow_from_other_settings_stand_in_the_resolved_config():
    stages = {
        "p": _ppo(sharing="adapters"),
        "g": _ppo(kind="grpo", samples_per_prompt=2, sharing="adapters", lora={"r": 4}),
        "s": _sft(model={"path": "m", "quantize": "8bit"}, lora={}),
    }
    config = parse(_config(**stages))
    resolved = config.model_dump(mode="json")
    tree = resolved["stages"]
    assert tree["p"]["lora"]["r"] == 16
    assert tree["g"]["lora"]["r"] == 4
    assert tree["s"]["model"]["dtype"] == "bfloat16"
    assert parse(resolved) == config


def test_the_bounds_themselves_are_fine():
    config = parse(_config(s=_sft(betas=[0, 0.999]), r=_reward(normalize=2), q=_reward(normalize=0)))
    assert config.stages["s"].betas == (0, 0.999)  # pyright: ignore[reportAttributeAccessIssue]


def test_steps_are_said_to_be_of_the_optimiser_or_updates():
    fields = SFTConfig.model_fields
    assert (
        fields["max_steps"].description
        == "Stop after this many optimiser steps. Not for PPO, which counts `updates`."
    )
    assert str(fields["save_every"].description).startswith(
        "Optimiser steps between checkpoints (updates, for PPO)"
    )


def test_one_gradient_step_is_counted_by_mini_batches_too():
    assert parse(_config(s=_ppo(epochs=1, mini_batch=32, batch_size=64, dual_clip=3)))


# ---------------------------------------------------------------- stages and what they take


def test_a_stage_named_later_is_refused():
    assert "stage 's' uses 'p', which comes after it" in _refusal(_config(s=_sft(model="p"), p=_pretrain()))
    assert "stage 's' uses 's', which is that stage itself" in _refusal(_config(s=_sft(model="s")))


@pytest.mark.parametrize(
    ("stages", "reason"),
    [
        (
            {"r": _reward(), "s": _sft(model="r")},
            "ppo or grpo or online_dpo or distill or dpo or best_of_n, but 'r'",
        ),
        (
            {"s": _sft(), "p": _ppo(reward="s")},
            "`reward` needs a stage of kind reward, but 's' is of kind sft",
        ),
        ({"r": _reward(), "p": _ppo(reward="r", reference="r")}, "`reference` needs"),
        ({"r": _reward(), "e": _evaluate(models=["r"])}, "`models` needs"),
        ({"s": _sft(), "e": _evaluate(models=["s"], reward="s")}, "`reward` needs a stage of kind reward"),
        ({"e": _evaluate(), "s": _sft(model="e")}, "but 'e' is of kind evaluate"),
    ],
)
def test_a_stage_of_the_wrong_kind_is_refused(stages, reason):
    assert reason in _refusal(_config(**stages))


def test_a_reward_model_may_be_trained_further():
    assert parse(_config(r=_reward(), again=_reward(model="r")))
    message = _refusal(_config(r=_reward(members=3), again=_reward(model="r")))
    assert "stage 'again': `model` is an ensemble of 3" in message


def _term(kind: str, model: str, **settings: Any) -> dict[str, Any]:
    return {"kind": kind, "model": model, "name": "t", **settings}


_GENRES = {"kind": "classifier", "model": "m", "data": {"verse": "v.txt", "prose": "p.txt"}}


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("combine", [None, "mean", "min"])
def test_what_an_ensemble_says_is_for_ensembles(members, combine):
    stages = {"r": _reward(members=members), "p": _ppo(reward=[_term("learned", "r", combine=combine)])}
    if members == 1 and combine is not None:
        message = _refusal(_config(**stages))
        assert "stage 'p': reward 't': `combine` has no effect: 'r' trains a single reward model" in message
    else:
        assert parse(_config(**stages))


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        ("verse", None),
        (1, None),
        (None, "needs a `label`; those of 'c' are 'prose' (0), 'verse' (1)"),
        ("drama", "'c' has no `label` 'drama'; its labels are 'prose' (0), 'verse' (1)"),
        (2, "'c' has no `label` 2"),
    ],
)
def test_a_label_is_one_of_the_classifiers_own(label, reason):
    stages = {"c": _GENRES, "e": _evaluate(reward=[_term("classifier", "c", label=label)])}
    if reason is None:
        assert parse(_config(**stages))
    else:
        assert f"stage 'e': reward 't'{': it ' if label is None else ': '}{reason}" in _refusal(
            _config(**stages)
        )


def _best(**settings: Any) -> dict[str, Any]:
    return {"kind": "best_of_n", "model": "m", "reward": "r", "data": "d.jsonl", **settings}


@pytest.mark.parametrize("stage", [_ppo, _best, _evaluate])
def test_a_reward_is_for_a_source_that_there_is(stage):
    def length(**settings: Any) -> dict[str, Any]:
        return {"kind": "length", "high": 3, **settings}

    assert parse(_config(s=stage(reward=[length(source_filter="d.jsonl")])))
    assert parse(
        _config(
            s=stage(reward=[length(source_filter="e.jsonl"), length(name="b")], data=["d.jsonl", "e.jsonl"])
        )
    )
    message = _refusal(_config(s=stage(reward=[length(source_filter="x.jsonl")])))
    assert "reward 'length': `source_filter` names 'x.jsonl', which is no source of `data`" in message
    message = _refusal(
        _config(s=stage(reward=[length(source_filter="d.jsonl")], data=["d.jsonl", "e.jsonl"]))
    )
    assert "no reward is for the rows of 'e.jsonl'" in message


def test_held_out_prompts_have_a_reward_too():
    reward = [{"kind": "length", "high": 3, "source_filter": "d.jsonl"}]
    held = {"eval_data": "e.jsonl", "eval_every": 1}
    assert "no reward is for the rows of 'e.jsonl'" in _refusal(_config(s=_ppo(reward=reward, **held)))
    assert parse(_config(s=_ppo(reward=reward, **{**held, "eval_data": "d.jsonl"})))


@pytest.mark.parametrize("stage", [_ppo, _best, _evaluate])
def test_rewards_that_all_weigh_nothing_are_refused(stage):
    logged = {"kind": "length", "high": 3, "weight": 0}
    assert "every reward has `weight` 0" in _refusal(_config(s=stage(reward=[logged])))
    assert parse(_config(s=stage(reward=[logged, "r"])))


# ---------------------------------------------------------------- renamed keys


def _former(former: bool) -> dict[str, Any]:
    """A config with each renamed key, under its former name or today's."""
    source, penalty, labels = (
        ("only", "caution", "votes") if former else ("source_filter", "std_penalty", "labels")
    )
    term = {"kind": "learned", "model": "m", "combine": "mean_minus_std", penalty: 2.0, source: "d.jsonl"}
    return _config(r=_reward(**{labels: "majority"}), p=_ppo(reward=[term]))


def test_a_former_key_still_works_and_names_the_new_one(tmp_path):
    with pytest.warns(DeprecationNote) as notes:
        old = parse(_former(True))
    said = {str(note.message) for note in notes}
    assert said == {
        "`only` (kind: learned) is now called `source_filter`; write that",
        "`caution` (kind: learned) is now called `std_penalty`; write that",
        "`votes` (kind: reward) is now called `labels`; write that",
    }
    assert old == parse(_former(False))
    with pytest.warns(DeprecationNote):
        assert read(_written(tmp_path, _former(True))) == old


def test_the_new_keys_and_a_resolved_config_bring_no_note(tmp_path):
    with pytest.warns(DeprecationNote):
        resolved = parse(_former(True)).model_dump(mode="json")
    assert {"source_filter", "std_penalty"} <= resolved["stages"]["p"]["reward"][0].keys()
    assert not {"only", "caution"} & resolved["stages"]["p"]["reward"][0].keys()
    assert "votes" not in resolved["stages"]["r"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(_written(tmp_path, resolved)) == parse(_former(False))


@pytest.mark.parametrize(("former", "key"), [("only", "source_filter"), ("caution", "std_penalty")])
def test_a_former_key_beside_the_new_one_is_refused(former, key):
    term = _former(False)["stages"]["p"]["reward"][0]
    message = _refusal(_config(p=_ppo(reward=[{**term, former: term[key]}])))
    assert f"`{former}` is the former name of `{key}`" in message


@pytest.mark.parametrize("in_file", [True, False])
@pytest.mark.parametrize("override", ["p.reward.0.caution=3.0", "p.reward.0.std_penalty=3.0"])
def test_an_override_replaces_a_renamed_key_whichever_name_the_file_uses(tmp_path, in_file, override):
    path = _written(tmp_path, _former(in_file))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationNote)
        term = read(path, [override]).stages["p"].reward[0]  # pyright: ignore
    assert term.std_penalty == 3.0


def test_a_key_that_is_renamed_in_one_kind_only_stays_what_it_is_in_another(tmp_path):
    """`votes` was the reward stage's `labels`; a dpo stage has `votes`, and no `labels`."""
    path = _written(tmp_path, _config(s={"kind": "dpo", "model": "m", "data": "d.jsonl"}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(path, ["s.votes=soft"]).stages["s"].votes == "soft"  # pyright: ignore
    message = _refusal(_config(s={"kind": "dpo", "model": "m", "data": "d.jsonl", "labels": "soft"}))
    assert "unknown key" in message


def test_the_schema_shows_the_new_key_and_marks_the_former_one():
    groups = RunConfig.model_json_schema()["$defs"]
    for group, former, key in (
        ("LearnedTerm", "caution", "std_penalty"), ("LengthTerm", "only", "source_filter"),
        ("RewardConfig", "votes", "labels"),
    ):  # fmt: skip
        properties = groups[group]["properties"]
        assert properties[former]["deprecated"] is True
        assert properties[former]["description"] == f"Former name of `{key}`."
        assert "deprecated" not in properties[key]
    assert "only" not in RunConfig.model_json_schema()["$defs"]["DPOConfig"]["properties"]


# ---------------------------------------------------------------- presets


def _grpo(**settings: Any) -> dict[str, Any]:
    return {"kind": "grpo", "model": "m", "reward": "r", "data": "d.jsonl", **settings}


def test_a_place_that_a_list_lacks_is_named():
    said = _refusal(_config(s={**_grpo(), "betas": [None]}))
    assert "stages.s.betas.0: must be a number" in said
    assert "stages.s.betas.1: missing" in said


def test_a_constant_length_is_finite():
    for length in (float("inf"), float("nan")):
        assert "s.reduce: must be a finite number" in _refusal(_config(s=_grpo(reduce=length)))
    assert "must be a positive, finite length" in _refusal(_config(s=_grpo(reduce=0.0)))


@pytest.mark.parametrize(
    ("preset", "place"), [("dr_grpo", "reduce"), ("rloo", "reduce"), ("dapo", "reward.1.max_length")]
)
def test_an_override_of_the_longest_response_reaches_what_a_preset_makes_of_it(tmp_path, preset, place):
    """Also in a run's own config, where the preset is written out: there, the old length is refused."""
    path = _written(tmp_path, _config(s=_grpo(preset=preset, sampling={"max_new_tokens": 32})))
    stage = read(path, ["s.sampling.max_new_tokens=128"]).stages["s"]
    assert (stage.reduce if place == "reduce" else stage.reward[1].max_length) == 128
    resolved = _written(tmp_path, read(path).model_dump(mode="json"))
    assert read(resolved).stages["s"].sampling.max_new_tokens == 32
    with pytest.raises(UsageError, match=rf"`{place}` is 32 in `preset: {preset}`, but .* is 128"):
        read(resolved, ["s.sampling.max_new_tokens=128"])
    both = read(resolved, ["s.sampling.max_new_tokens=128", f"s.{place}=128"]).stages["s"]
    assert both.sampling.max_new_tokens == 128


@pytest.mark.parametrize("given", [{"sampling": {"max_new_tokens": 32.0}}, {"batch_size": "32"}])
def test_a_preset_is_not_lost_on_a_number_that_is_whole_but_no_integer(given):
    stage = parse(_config(s=_grpo(preset="gspo", **given))).stages["s"]
    assert stage.level == "sequence"
    assert stage.mini_batch == stage.batch_size // 4


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "two words"])
def test_name_of_a_run_is_the_name_of_a_folder(name):
    assert "name" in _refusal({**_config(s=_sft()), "name": name})


# ---------------------------------------------------------------- reading and overriding


def test_overrides_are_yaml(tmp_path):
    config = read(
        _written(tmp_path, _config(s=_sft(), p=_ppo(model="s"))),
        ["s.lr=1e-4", "stages.s.lora={r: 4}", "p.kl.coef=0.3", "p.kl.target=null", "seed=7", "s.epochs=3"],
    )
    sft, ppo = config.stages["s"], config.stages["p"]
    assert (sft.lr, sft.lora.r, sft.epochs, config.seed) == (1e-4, 4, 3.0, 7)
    assert (ppo.kl.coef, ppo.kl.target) == (0.3, None)


def test_override_reaches_into_short_forms_and_lists(tmp_path):
    stages = {
        "s": _sft(eval_data="e.jsonl"),
        "e": _evaluate(models=["s", "x"], reward="r", comparisons="c.jsonl"),
    }
    config = read(
        _written(tmp_path, _config(**stages)),
        [
            "s.data.rows=5",
            "s.model.revision=v2",
            "s.eval_data.on_bad=skip",
            "e.comparisons.rows=9",
            "e.models.1=y",
        ],
    )
    sft, evaluate = config.stages["s"], config.stages["e"]
    assert (sft.data[0].source, sft.data[0].rows) == ("d.jsonl", 5)
    assert (sft.model.path, sft.model.revision) == ("m", "v2")
    assert (sft.eval_data[0].source, sft.eval_data[0].on_bad) == ("e.jsonl", "skip")
    assert (evaluate.comparisons[0].source, evaluate.comparisons[0].rows) == ("c.jsonl", 9)
    assert evaluate.models == ["s", "y"]


def test_override_into_a_mixture_needs_a_place_and_loses_nothing(tmp_path):
    mixture = [{"source": "a.jsonl", "weight": 1}, {"source": "b.jsonl", "weight": 2}]
    path = _written(tmp_path, _config(s=_sft(data=mixture)))
    with pytest.raises(UsageError, match="a list of 2; 'rows' must be a place in it"):
        read(path, ["s.data.rows=5"])
    assert [d.source for d in read(path, ["s.data.1.rows=5"]).stages["s"].data] == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("p.kl.coef=0.1", "no stage or setting 'p'"),
        ("sftt.lr=1", "did you mean 'sft'?"),
        ("stages.sftt.lr=1", "no stage 'sftt'; did you mean 'sft'?"),
        ("sft.lr", "is not an override: write dotted.key=value"),
        ("=1", "is not an override"),
        ("sft.lr=[1", "the value is not YAML"),
        ("sft.lr=fast", "stages.sft.lr"),
        ("sft.lrr=1", "stages.sft.lrr: unknown key; did you mean 'lr'?"),
    ],
)
def test_override_that_cannot_be_is_named(tmp_path, override, message):
    with pytest.raises(UsageError) as caught:
        read(_written(tmp_path, _config(sft=_sft())), [override])
    assert message in str(caught.value)


def test_override_changes_one_place_even_when_yaml_shares_it(tmp_path):
    text = """
    name: tiny
    stages:
      s: {kind: sft, model: m, data: &rows {source: d.jsonl}}
      r: {kind: reward, model: s, data: *rows}
    """
    config = read(_written(tmp_path, text), ["s.data.rows=5"])
    assert config.stages["s"].data[0].rows == 5
    assert config.stages["r"].data[0].rows is None


def test_a_key_written_twice_is_refused_not_dropped(tmp_path):
    stage = "  s: {kind: sft, model: m, data: DATA}\n"
    text = "name: tiny\nstages:\n" + stage.replace("DATA", "a.jsonl") + stage.replace("DATA", "b.jsonl")
    with pytest.raises(UsageError, match=r"the key 's' appears twice"):
        read(_written(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a mapping"),
        ("- a\n", "is not a mapping"),
        ("a: [", "cannot be read as YAML"),
        ("stages: {}", "name"),
    ],
)
def test_file_that_is_no_config(tmp_path, text, message):
    with pytest.raises(UsageError, match=message):
        read(_written(tmp_path, text))


def test_what_is_wrong_with_yaml_is_said_in_one_line(tmp_path):
    with pytest.raises(UsageError) as caught:
        read(_written(tmp_path, "name: a\nstages: [a"))
    message = str(caught.value)
    assert message.endswith("expected ',' or ']', but got '<stream end>' (line 2, column 11)"), message
    assert "\n" not in message


def test_an_override_replaces_the_former_name_of_grpos_policy_loss(tmp_path):
    path = _written(tmp_path, _config(s=_ppo(kind="grpo", objective="cispo")))
    config = read(path, ["s.policy_loss=clipped"])
    assert config.stages["s"].policy_loss == "clipped"  # pyright: ignore


def test_missing_config(tmp_path):
    with pytest.raises(UsageError, match="no config at"):
        read(tmp_path / "nowhere.yaml")


def test_numbers_in_exponent_form_are_numbers(tmp_path):
    # YAML 1.1 takes 2e-5 for text
    text = "name: tiny\nstages: {s: {kind: sft, model: m, data: d.jsonl, lr: 2e-5}}\n"
    assert read(_written(tmp_path, text)).stages["s"].lr == 2e-5


def test_config_cannot_be_changed_after_validation():
    config = parse(_config(s=_sft()))
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3
    assert isinstance(config, RunConfig)


def test_the_runs_dtype_is_that_of_every_stage_that_does_not_say_another():
    stages = {
        "base": {
            "kind": "pretrain",
            "model": {"init": {"model_type": "llama"}, "dtype": "auto"},
            "data": "a.txt",
        },
        "sft": {"kind": "sft", "model": "base", "data": "b.jsonl"},
        "small": {
            "kind": "sft",
            "model": {"path": "base", "quantize": "4bit"},
            "lora": {},
            "data": "b.jsonl",
        },
        "judge": {"kind": "evaluate", "models": ["sft"], "gold": "world:helpdesk", "data": "c.jsonl"},
    }
    found = parse({"name": "run", "dtype": "float32", "stages": stages}).stages
    assert [found[name].model.dtype for name in ("base", "sft", "small")] == ["auto", "float32", "bfloat16"]  # pyright: ignore
    assert found["judge"].dtype == "float32"  # pyright: ignore
    found = parse({"name": "run", "stages": stages}).stages
    assert [found[name].model.dtype for name in ("sft", "small")] == ["auto", "bfloat16"]  # pyright: ignore
    with pytest.raises(UsageError, match="dtype"):
        parse({"name": "run", "dtype": "half", "stages": stages})


def test_a_stage_without_a_run_around_it_and_a_list_of_stages_are_shown_how_to_be_written():
    assert "is one stage alone: put its settings below a name" in _refusal(_sft())
    assert "stages: must be a mapping, not a list; it maps the names" in _refusal(
        {"name": "x", "stages": [_sft()]}
    )
    assert "stages: missing; a mapping from the names" in _refusal({"name": "x"})


def test_a_file_of_rows_is_no_config(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    with pytest.raises(UsageError, match="is no config: a config is a YAML file with `name` and `stages`"):
        read(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("lr", float("inf"), "lr: must be a finite number, not inf"),
        ("lr", 1e308, "`lr` is 1e+308"),
        ("epochs", float("inf"), "epochs: must be a finite number"),
        ("weight_decay", float("nan"), "weight_decay"),
        ("max_grad_norm", float("inf"), "max_grad_norm: must be a finite number"),
        ("lora", {"r": 2**64}, "`r` is too large: at most 2,147,483,647"),
        ("lora", {"r": 2**40}, "`r` is too large: at most 2,147,483,647"),
        ("batch_size", 2**31, "`batch_size` is too large"),
        (
            "model",
            {"init": {"model_type": "llama", "x": float("inf")}, "tokenizer": "t"},
            "`init.x` is inf: it must be a finite number",
        ),
        ("model", "m" * 100_000, "at most 4,000 may stand"),
        ("data", "d" * 100_000, "at most 4,000 may stand"),
    ],
)
def test_what_no_setting_can_mean_is_refused(setting, value, message):
    stage = {"kind": "sft", "model": "a/b", "data": "x.jsonl", setting: value}
    with pytest.raises(UsageError) as error:
        parse({"name": "x", "stages": {"sft": stage}})
    assert message in str(error.value)
    assert len(str(error.value)) < 400


def _groups():
    waiting = [Settings]
    while waiting:
        group = waiting.pop()
        waiting += group.__subclasses__()
        yield group


def test_a_truth_value_is_no_number_in_any_setting():
    """pydantic alone would read true as 1; also within lists and mappings of numbers."""
    asked = 0
    for group in _groups():
        for name, field in group.model_fields.items():
            try:
                taken = TypeAdapter(field.annotation).validate_python(1)
            except ValidationError:
                continue
            if isinstance(taken, bool) or field.annotation is Any:
                continue
            with pytest.raises(ValidationError, match=rf"`{name}`: true is no number"):
                group.model_validate({name: True})
            asked += 1
    assert asked > 100
    stage = {"kind": "evaluate", "models": ["a"], "reward": "r", "data": "d", "best_of": [2, True]}
    assert "`best_of`: true is no number" in _refusal({"name": "x", "stages": {"s": stage}})
    made = parse({"name": "x", "stages": {"s": {**_sft(), "lr": "1e-5"}}})  # as YAML 1.1 reads 1e-5
    assert made.stages["s"].lr == 1e-5  # pyright: ignore[reportAttributeAccessIssue]


def test_a_seed_may_be_large():
    assert parse(
        {"name": "x", "seed": 2**62, "stages": {"s": {"kind": "sft", "model": "a/b", "data": "d"}}}
    ).seed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: " + "[" * 1500, "nested too deep"),
        ("a: &a [*a]", "perhaps stands within itself"),
        (
            "x0: &x0 [1]\n"
            + "".join(f"x{i + 1}: &x{i + 1} [{', '.join([f'*x{i}'] * 9)}]\n" for i in range(9)),
            "more than 100,000 values",
        ),
        ("when: 2026-99-99", "month must be in 1..12"),
        ("n: " + "9" * 5000, "cannot be read as YAML"),
        ("a: {b: 1, b: 2}", "the key 'b' appears twice"),
    ],
)
def test_yaml_that_leads_astray_is_one_line(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        read(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
