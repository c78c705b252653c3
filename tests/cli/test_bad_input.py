"""What a user gets wrong: one clear message and exit code 2, or a correct run. Never a traceback, never a
silent loss."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from keel.models.load import load_tokenizer

pytestmark = pytest.mark.usefixtures("no_report")
GOOD = {"prompt": "the cat?", "completion": " it is red."}


def _refused(outcome: Any, *reasons: str) -> None:
    """Exit code 2, nothing on stdout, one message that says all of `reasons`, and nothing written."""
    assert outcome.code == 2, outcome.err
    assert outcome.out == ""
    assert outcome.err.startswith("keel: ")
    for reason in reasons:
        assert reason in outcome.err
    assert "Traceback" not in outcome.err
    assert not Path("runs").exists()


# ---------------------------------------------------------------- data


@pytest.mark.parametrize(
    ("row", "reasons"),
    [
        ({"prompt": "the cat?", "completion": ""}, ['"completion" is empty']),
        ({"prompt": "the cat?", "completion": " \n"}, ['"completion" is only whitespace']),
        ({"prompt": "the cat?", "completion": None}, ['"completion" is']),
        ({"prompt": float("nan"), "completion": " red."}, ['"prompt" is NaN']),
        ({"prompt": "the cat?", "completion": " red.", "weight": float("nan")}, ['"weight" is NaN']),
        ({"prompt": "the cat?", "completion": 7}, ['"completion" is the number 7']),
        ('{"prompt": "the cat?", "completion": ', ["not JSON at column"]),
        ({"prompt": "the cat?"}, ['"completion" is missing; the row has prompt']),
        ("", None),
    ],
)
@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_bad_row_is_named_by_file_and_line(keel, write, sft, row, reasons, command):
    rows = write("rows.jsonl", [GOOD, GOOD, row])
    outcome = keel(command, write("tiny.yaml", {"sft": sft(data=str(rows), batch_size=1, holdout=0)}))
    if reasons is None:  # an empty line is no row
        assert outcome.code == 0, outcome.err
    else:
        _refused(outcome, f"{rows}:3", *reasons)


def test_a_bad_row_is_skipped_and_counted_when_asked(keel, write, sft):
    rows = write("rows.jsonl", [GOOD, {"prompt": "the cat?", "completion": ""}, "{", GOOD, {"prompt": "x"}])
    path = write(
        "tiny.yaml", {"sft": sft(data={"source": str(rows), "on_bad": "skip"}, holdout=0, batch_size=1)}
    )
    done = keel("run", path, "--json")
    assert done.code == 0, done.err
    assert "sft: 2 rows · prompt-completion, standard" in done.err
    assert "3 skipped" in done.err
    facts = json.loads(Path("runs/tiny/stages/sft/stage.json").read_text())
    assert facts["rows"] == 2
    assert "3 skipped" in facts["data"]
    assert "3 skipped" in keel("plan", path).out


def test_wrong_columns_come_with_the_rename_that_helps(keel, write, sft):
    rows = write("rows.jsonl", [{"question": "the cat?", "answer": " it is red."}] * 3)
    path = write("tiny.yaml", {"sft": sft(data=str(rows), batch_size=1, holdout=0)})
    _refused(
        keel("run", path),
        f"{rows}:1",
        "columns: question, answer",
        "columns: {prompt: question, completion: answer}",
    )
    done = keel("run", path, "sft.data.columns={prompt: question, completion: answer}")
    assert done.code == 0, done.err


@pytest.mark.parametrize("command", ["run", "plan"])
def test_one_prompt_cannot_be_held_out_of_itself(keel, write, sft, command):
    rows = write("rows.jsonl", [GOOD] * 3)
    path = write("tiny.yaml", {"sft": sft(data=str(rows), batch_size=1)})
    _refused(keel(command, path), "sft: all 3 rows have one prompt", "`eval_data`", "`holdout: 0`")


def test_data_of_another_stage_are_refused(keel, write, chain, data):
    chain["reward"]["data"] = str(data.demonstrations)
    _refused(
        keel("run", write("tiny.yaml", chain)),
        "demonstrations.jsonl:1",
        "wanted: preference",
        "missing: chosen",
    )


def test_a_missing_file_names_the_nearest(keel, write, sft, tmp_path):
    write("demonstrations.jsonl", [GOOD])
    path = write("tiny.yaml", {"sft": sft(data=str(tmp_path / "demonstration.jsonl"))})
    _refused(keel("run", path), "no file", f"did you mean {tmp_path / 'demonstrations.jsonl'}?")


def test_a_hub_data_set_that_cannot_be_had(keel, write, sft):
    _refused(
        keel("run", write("tiny.yaml", {"sft": sft(data="nobody/no-such-data")})),
        "nobody/no-such-data",
        "could not be loaded",
    )


# ---------------------------------------------------------------- longer than the context


LONG = {"prompt": "the cat?", "completion": " it is red." * 30}
LONG_PROMPT = {"prompt": "the cat? " * 30, "completion": " it is red."}


def test_a_response_longer_than_the_context_is_an_error(keel, write, sft):
    rows = write("rows.jsonl", [GOOD, GOOD, LONG])
    outcome = keel("run", write("tiny.yaml", {"sft": sft(data=str(rows), batch_size=1, holdout=0)}))
    assert outcome.code == 2
    assert f"keel: {rows}:3: " in outcome.err
    way = "its response alone is longer; leave such rows out (too_long: skip)"  # truncate would not help
    assert f"more than the 48 of stage 'sft'; {way}" in outcome.err
    assert not Path("runs/tiny/stages/sft/model").exists()


def test_a_response_longer_than_the_context_is_left_out_and_counted(keel, write, sft):
    rows = write("rows.jsonl", [GOOD, GOOD, LONG])
    done = keel(
        "run", write("tiny.yaml", {"sft": sft(data=str(rows), batch_size=1, holdout=0, too_long="skip")})
    )
    assert done.code == 0, done.err
    assert "sft: longer than 48 tokens: 0 rows cut, 1 left out" in done.err
    assert json.loads(Path("runs/tiny/stages/sft/stage.json").read_text())["facts"]["rows_left_out"] == 1


def test_truncation_cuts_prompts_and_never_a_response(keel, write, sft):
    rows = write("rows.jsonl", [GOOD, LONG_PROMPT])
    settings = {"batch_size": 1, "holdout": 0, "too_long": "truncate"}
    done = keel("run", write("tiny.yaml", {"sft": sft(data=str(rows), **settings)}))
    assert done.code == 0, done.err
    assert "sft: longer than 48 tokens: 1 rows cut, 0 left out" in done.err
    rows = write("rows.jsonl", [GOOD, LONG])
    refused = keel("run", write("tiny.yaml", {"sft": sft(data=str(rows), **settings)}))
    assert refused.code == 2
    assert f"{rows}:2" in refused.err
    assert "its response alone is longer" in refused.err


def test_all_rows_too_long_is_no_success(keel, write, sft):
    rows = write("rows.jsonl", [LONG, LONG])
    outcome = keel("run", write("tiny.yaml", {"sft": sft(data=str(rows), too_long="skip", holdout=0)}))
    assert outcome.code == 2
    assert "no usable row is left of 2" in outcome.err


@pytest.mark.parametrize("policy", ["error", pytest.param("skip", marks=pytest.mark.slow), "truncate"])
def test_comparisons_and_prompts_longer_than_the_context(keel, write, chain, policy):
    short = [
        {"prompt": f"the {a}?", "chosen": " it is red.", "rejected": " it is pink."}
        for a in ("cat", "dog", "fox", "hen")
    ]
    long = {"prompt": "the cat? " * 30, "chosen": " it is red.", "rejected": " it is pink."}
    endless = {"prompt": "the cat?", "chosen": " it is red." * 30, "rejected": " it is pink."}
    pairs = write("pairs.jsonl", [*short, long, *([endless] if policy == "skip" else [])])
    for stage in ("reward", "ppo", "judge"):
        chain[stage] |= {"data": str(pairs), "too_long": policy}
    chain["reward"]["holdout"] = 0
    done = keel("run", write("tiny.yaml", chain))
    if policy == "error":
        assert done.code == 2
        assert f"keel: {pairs}:5: " in done.err
        return
    assert done.code == 0, done.err
    facts = {
        name: json.loads(Path(f"runs/tiny/stages/{name}/stage.json").read_text())["facts"] for name in chain
    }
    key, count = ("rows_left_out", [2, 1, 1]) if policy == "skip" else ("rows_cut", [1, 1, 1])
    assert [facts[name][key] for name in ("reward", "ppo", "judge")] == count
    assert facts["reward"]["rows"] == (4 if policy == "skip" else 5)
    samples = [
        json.loads(line) for line in Path("runs/tiny/stages/judge/samples.jsonl").read_text().splitlines()
    ]
    assert len(samples) == 2 * 5


def test_rows_left_out_of_training_do_not_come_back_to_set_the_scale(keel, write, chain):
    short = [
        {"prompt": f"the {a}?", "chosen": " it is red.", "rejected": " it is pink."}
        for a in ("cat", "dog", "fox", "hen")
    ]
    endless = {"prompt": "the cat?", "chosen": " it is red." * 30, "rejected": " it is pink."}
    chain["reward"] |= {
        "data": str(write("pairs.jsonl", [*short, endless])),
        "too_long": "skip",
        "normalize": 0,
        "holdout": 0,
    }
    del chain["reward"]["sampling"]
    done = keel("run", write("tiny.yaml", {"sft": chain["sft"], "reward": chain["reward"]}), "--json")
    assert done.code == 0, done.err
    assert done.json["stages"]["reward"]["result"]["normalized_on"] == 8


# ---------------------------------------------------------------- config


def test_an_unknown_key_names_the_nearest(keel, write, chain):
    chain["ppo"]["kl"] = {"coeff": 0.1}
    _refused(keel("run", write("tiny.yaml", chain)), "stages.ppo.kl.coeff: unknown key; did you mean 'coef'?")


def test_an_override_of_an_unknown_stage(keel, write, chain):
    _refused(
        keel("run", write("tiny.yaml", chain), "pppo.updates=3"),
        "'pppo.updates=3': no stage or setting 'pppo'",
        "'ppo'",
    )


def test_a_stage_named_later(keel, write, sft):
    _refused(
        keel("run", write("tiny.yaml", {"a": sft(model="b"), "b": sft()})),
        "stage 'a' uses 'b', which comes after it",
    )


def test_a_device_that_is_not_there(keel, write, chain):
    _refused(keel("run", write("tiny.yaml", chain), "device=cuda:9"), "device 'cuda:9' cannot be used")


def test_a_model_that_is_not_there(keel, write, chain, tmp_path):
    nowhere = tmp_path / "nowhere"
    _refused(keel("run", write("tiny.yaml", chain), f"sft.model={nowhere}"), f"'{nowhere}'")
    _refused(keel("run", write("tiny.yaml", chain), f"ppo.reward={nowhere}"), f"'{nowhere}'")
    _refused(
        keel("run", write("tiny.yaml", chain), "sft.model=nobody/no-such-model"),
        "'nobody/no-such-model' cannot be loaded",
    )


def test_a_model_saved_as_a_pickle_is_not_read(keel, write, sft, tiny_model, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    outcome = keel("run", write("tiny.yaml", {"sft": sft(model=str(folder))}))
    assert outcome.code == 2
    assert "cannot be loaded" in outcome.err
    assert "safetensors" in outcome.err


def test_a_missing_config(keel):
    _refused(keel("run", "nowhere.yaml"), "no config at nowhere.yaml")


def test_a_setting_without_effect(keel, write, chain):
    chain["judge"]["sampling"] = {"temperature": 0, "top_p": 0.9}
    _refused(
        keel("run", write("tiny.yaml", chain)),
        "stages.judge.sampling: `top_p` has no effect with `temperature` 0",
    )


# ---------------------------------------------------------------- pad and EOS


def _with_pad(folder: Path, target: Path, pad: str | None) -> Path:
    """A copy of a model folder whose tokenizer and config have another pad token, or none."""
    shutil.copytree(folder, target)
    tokenizer = copy.deepcopy(load_tokenizer(str(folder)))
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(target)
    config = json.loads((target / "config.json").read_text())
    config["pad_token_id"] = tokenizer.pad_token_id
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.fixture
def logs(keel, write, chain):
    """Metrics and samples of the chain on a given model and reward model."""

    def go(name: str, model: Path, reward: Path | None = None) -> dict[str, bytes]:
        changed = copy.deepcopy(chain)
        changed["sft"]["model"] = str(model)
        changed["sft"]["batch_size"] = changed["reward"]["batch_size"] = changed["ppo"]["batch_size"] = 4
        if reward is not None:
            term = {"kind": "learned", "model": str(reward), "name": "reward"}
            changed["ppo"]["reward"] = changed["judge"]["reward"] = [term]
            del changed["reward"]
        done = keel("run", write(f"{name}.yaml", changed))
        assert done.code == 0, done.err
        files = Path("runs", name, "stages").glob("*/*.jsonl")
        return {str(Path(*p.parts[-2:])): p.read_bytes() for p in files if p.name != "times.jsonl"}

    return go


def test_pad_equal_to_eos_or_none_changes_nothing(logs, tiny_model, tokenizer, tmp_path):
    """[trl PR 5303, PR 3200]: the real EOS must stay in the attention, the loss and the score."""
    expected = logs("own", tiny_model)
    assert len(expected) == 5  # metrics of sft, reward and ppo, samples of ppo and judge
    equal = _with_pad(tiny_model, tmp_path / "equal", tokenizer.eos_token)
    assert load_tokenizer(str(equal)).pad_token_id == tokenizer.eos_token_id
    assert logs("equal", equal) == expected
    without = _with_pad(tiny_model, tmp_path / "without", None)
    assert load_tokenizer(str(without)).pad_token_id is None
    assert logs("without", without) == expected


def test_a_reward_model_without_a_pad_token_scores_the_same(logs, tiny_model, tiny_reward, tmp_path):
    """[trl 937]: with `pad_token_id` None the score is read at a pad."""
    without = _with_pad(tiny_reward, tmp_path / "without", None)
    assert logs("without", tiny_model, without) == logs("own", tiny_model, tiny_reward)


def test_what_data_and_names_hold_is_no_command_to_a_terminal(keel, write, sft):
    """In an error, and in the line of a data set that is fine."""
    rows = write("rows\x1b[31m.jsonl", [GOOD, {"prompt": "\x1b]0;x\x07", "completion": 7}])
    outcome = keel("run", write("tiny.yaml", {"sft": sft(data=str(rows), batch_size=1, holdout=0)}))
    assert outcome.code == 2
    assert "rows\\u001b[31m.jsonl:2" in outcome.err
    assert "\x1b" not in outcome.err + outcome.out
