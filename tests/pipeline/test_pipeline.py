"""The stage graph: what runs again and what does not, what is checked before anything is touched, what a cut
leaves."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import keel
from keel.config import parse, read
from keel.errors import DataError, KeelError, MachineError, UsageError
from keel.models import precision
from keel.models.load import ModelSource, causal_lm
from keel.pipeline import following, stage_graph
from keel.pipeline import pipeline as pipelines
from keel.pipeline.pipeline import Pipeline, locked

STAGES = ("base", "sft", "reward", "ppo", "judge")


class Stopped(BaseException):
    """Stands for Ctrl-C."""


@pytest.fixture(scope="module")
def chain(whole: Mapping[str, Any]) -> dict[str, Any]:
    """One stage of each kind, two steps each but PPO's four."""
    stages = {name: {**whole["stages"][name]} for name in STAGES}
    for name in ("base", "sft", "reward"):
        stages[name] |= {"max_steps": 3}
    stages["reward"] |= {"normalize": 4}
    stages["ppo"] |= {"epochs": 1, "mini_batch": None}
    stages["judge"] |= {"models": ["sft", "ppo"]}
    return {"stages": stages}


def _config(chain: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """The chain's config with some settings changed: {"reward.lr": 1e-4}."""
    config: dict[str, Any] = {"name": "tiny", "threads": 1, "device": "cpu", **copy.deepcopy(dict(chain))}
    for dotted, value in changes.items():
        stage, _, setting = dotted.partition(".")
        if setting:
            config["stages"][stage][setting] = value
        else:
            config[stage] = value
    return config


@pytest.fixture(scope="module")
def chain_run(run: Any, chain: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chain, run once and undisturbed. Tests read or copy it."""
    folder = tmp_path_factory.mktemp("chain") / "run"
    run(chain, folder)
    return folder


@pytest.fixture
def finished(chain_run: Path, tmp_path: Path) -> None:
    """The chain has run in the directory of `go`."""
    shutil.copytree(chain_run, tmp_path / "run")


Go = Callable[..., list[str]]


@pytest.fixture
def go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Go:
    """Run a config in the same directory; returns the names of the stages that were worked on."""
    worked: list[str] = []
    dispatch = following.run_stage
    monkeypatch.setattr(
        following, "run_stage", lambda stage, run: (worked.append(run.name), dispatch(stage, run))[1]
    )
    monkeypatch.setattr(Pipeline, "_report", lambda self: None)

    def call(
        config: dict[str, Any], *, stop_at: tuple[str, int] | None = None, say: Any = str, **options: Any
    ) -> list[str]:
        worked.clear()

        def progress(stage: str, step: int, steps: int, metrics: Mapping[str, float]) -> None:
            if (stage, step) == stop_at:
                raise Stopped

        pipeline = Pipeline(parse(config), tmp_path / "run", say, progress)
        pipeline.run(**options)
        return list(worked)

    return call


def _content(directory: Path) -> dict[str, bytes]:
    """What must not depend on how often a run was interrupted."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted((directory / "stages").rglob("*"))
        if path.is_file() and path.name not in ("times.jsonl", "stage.json")
    }


# ---------------------------------------------------------------- the cache


@pytest.mark.usefixtures("finished")
def test_a_second_run_trains_nothing_and_touches_nothing(go, chain, tmp_path):
    before = _content(tmp_path / "run"), (tmp_path / "run" / "stages" / "ppo" / "stage.json").read_text()
    assert go(_config(chain)) == []
    assert (
        _content(tmp_path / "run"),
        (tmp_path / "run" / "stages" / "ppo" / "stage.json").read_text(),
    ) == before
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert {facts["status"] for facts in manifest["stages"].values()} == {"done before"}


@pytest.mark.slow  # why, and that nothing else runs: test_a_stage_that_is_run_again_says_why
@pytest.mark.usefixtures("finished")
def test_a_changed_setting_reruns_its_stage_and_what_follows_from_it(go, chain):
    assert go(_config(chain, **{"reward.lr": 2e-3})) == ["reward", "ppo", "judge"]
    assert go(_config(chain, **{"reward.lr": 2e-3, "ppo.gamma": 0.9})) == ["ppo", "judge"]


@pytest.mark.parametrize("change", [{"seed": 1}, {"threads": 2}, {"device": "meta"}])
def test_what_all_stages_depend_on_reruns_all(go, chain, tmp_path, change):
    first, second = (Pipeline(parse(_config(chain, **c)), tmp_path / "run") for c in ({}, change))
    assert all(first.fingerprint(name) != second.fingerprint(name) for name in STAGES)


def test_changed_data_reruns_what_reads_it(go, chain, tmp_path):
    copies: dict[str, Any] = {}
    for stage, settings in chain["stages"].items():
        target = tmp_path / f"{stage}.jsonl"
        shutil.copyfile(settings["data"], target)
        copies[f"{stage}.data"] = str(target)
    copies["ppo.updates"] = 1
    go(_config(chain, **copies))
    with (tmp_path / "reward.jsonl").open("a") as handle:
        handle.write(json.dumps({"prompt": "the cat?", "chosen": " it is red.", "rejected": " no."}) + "\n")
    pipeline = Pipeline(parse(_config(chain, **copies)), tmp_path / "run")
    assert [name for name in STAGES if not pipeline.is_done(name)] == ["reward", "ppo", "judge"]


def test_changed_weights_of_a_model_from_outside_rerun_what_starts_from_it(go, data, tiny_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    config = {
        "name": "tiny",
        "threads": 1,
        "device": "cpu",
        "stages": {
            "sft": {
                "kind": "sft",
                "model": str(model),
                "data": str(data.demonstrations),
                "max_steps": 1,
                "batch_size": 2,
            }
        },
    }
    assert go(config) == ["sft"]
    assert go(config) == []
    other = causal_lm(ModelSource(str(model)), 0)
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    other.save_pretrained(model)
    assert go(config) == ["sft"]


def test_a_changed_tokenizer_reruns_the_new_model_that_takes_it(go, data, tiny_model, tmp_path):
    folder = tmp_path / "tokenizer"
    shutil.copytree(tiny_model, folder)
    init = {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = {"init": init, "tokenizer": str(folder)}
    base = {
        "kind": "pretrain",
        "model": model,
        "data": str(data.text),
        "max_steps": 1,
        "batch_size": 2,
        "max_length": 16,
    }
    config = _config({"stages": {"base": base}})
    assert go(config) == ["base"]
    assert go(config) == []
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    said: list[str] = []
    assert go(config, say=said.append) == ["base"]
    assert f"base: run again, since '{folder}' changed, which it starts from" in said


@pytest.mark.usefixtures("finished")
def test_a_model_that_was_deleted_is_trained_again_with_the_same_bytes(go, chain, tmp_path):
    before = _content(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "stages" / "sft" / "model")
    (tmp_path / "run" / "stages" / "ppo" / "model" / "model.safetensors").unlink()
    pipeline = Pipeline(parse(_config(chain)), tmp_path / "run")
    assert [name for name in STAGES if not pipeline.is_done(name)] == ["sft", "ppo"]
    said: list[str] = []
    with pytest.raises(UsageError, match="its input 'sft' is not done"):
        go(_config(chain), only="reward")
    assert go(_config(chain), say=said.append) == ["sft", "ppo"]
    assert "sft: run again, since its model is no longer there" in said
    assert _content(tmp_path / "run") == before


@pytest.mark.usefixtures("finished")
def test_a_stage_that_is_run_again_says_why(go, chain, tmp_path, monkeypatch):
    def again(**changes: Any) -> list[str]:
        said: list[str] = []
        go(_config(chain, **changes), say=said.append)
        return [line for line in said if ": run again" in line]

    assert again() == []
    assert again(**{"reward.lr": 2e-3}) == [
        "reward: run again, since settings changed (lr 0.001 → 0.002)",
        "ppo: run again, since 'reward' changed, which it starts from",
        "judge: run again, since 'ppo', 'reward' changed, which it starts from",
    ]
    with pytest.raises(
        Stopped
    ):  # what was only begun says why as well, and what is gone on with says nothing
        go(_config(chain, **{"reward.lr": 2e-3, "ppo.kl": {"coef": 0.3}}), stop_at=("ppo", 3))
    assert again(**{"reward.lr": 2e-3, "ppo.kl": {"coef": 0.3}}) == [
        "judge: run again, since 'ppo' changed, which it starts from"
    ]
    monkeypatch.setattr(stage_graph, "code_prints", lambda kind: {"rl/loop.py": "other code"})
    said: list[str] = []
    with pytest.raises(Stopped):
        go(_config(chain), say=said.append, stop_at=("base", 1))
    first = next(line for line in said if ": run again" in line)
    assert first.startswith(
        "base: run again, since keel's code changed (accel/__init__.py, accel/attention.py, "
    )


@pytest.mark.parametrize("name", STAGES)
def test_the_mark_of_being_done_is_written_last(chain, chain_run, name):
    stage = chain_run / "stages" / name
    kind = chain["stages"][name]["kind"]
    assert json.loads((stage / "fingerprint.json").read_text())["settings"]["kind"] == kind
    files = [path for path in stage.rglob("*") if path.is_file()]
    assert max(files, key=lambda path: path.stat().st_mtime_ns).name == "stage.json"


@pytest.mark.usefixtures("finished")
def test_fresh_forgets_what_was_done(go, chain, tmp_path):
    before = _content(tmp_path / "run")
    first = _config(chain)
    first["stages"] = {name: first["stages"][name] for name in ("base", "sft")}
    assert go(first, fresh=True) == ["base", "sft"]
    assert _content(tmp_path / "run") == before
    assert go(_config(chain), fresh=True, only="ppo") == ["ppo"]
    assert go(_config(chain)) == []


@pytest.mark.usefixtures("finished")
def test_an_ensemble_that_is_done_is_not_trained_again(go, chain, tmp_path):
    config = _config(chain, **{"reward.members": 2})
    config["stages"] = {name: config["stages"][name] for name in ("base", "sft", "reward")}
    assert go(config) == ["reward"]
    assert go(config) == []


@pytest.mark.usefixtures("finished")
def test_the_resolved_config_is_the_same_run(go, chain, tmp_path):
    resolved = tmp_path / "run" / "config.yaml"
    assert read(resolved) == parse(_config(chain))
    assert go(yaml.safe_load(resolved.read_text())) == []


# ---------------------------------------------------------------- interruption


def test_a_run_that_goes_on_in_another_precision_says_so(go, chain, tmp_path, monkeypatch):
    config = _config({"stages": {"base": chain["stages"]["base"]}})
    with pytest.raises(Stopped):
        go(config, stop_at=("base", 3))
    monkeypatch.setattr(precision, "fast_in_bfloat16", lambda device: True)  # a machine with AMX
    said: list[str] = []
    assert go(config, say=said.append) == ["base"]
    facts = json.loads((tmp_path / "run" / "stages" / "base" / "stage.json").read_text())["facts"]
    assert [note for note in facts["notes"] if "products were in float32 up to step" in note]
    assert any("are in bfloat16 from there on" in line for line in said)


@pytest.mark.parametrize("place", [("reward", 3), ("ppo", 3)])
def test_an_interrupted_run_goes_on_and_ends_as_an_undisturbed_one(go, chain, chain_run, tmp_path, place):
    with pytest.raises(Stopped):
        go(_config(chain), stop_at=place)
    assert not (tmp_path / "run" / "stages" / place[0] / "stage.json").exists()
    said: list[str] = []
    assert go(_config(chain), say=said.append) == list(STAGES[STAGES.index(place[0]) :])
    assert f"{place[0]}: going on after step 2" in said
    assert not any("products were in" in line for line in said)
    assert _content(tmp_path / "run") == _content(chain_run)


@pytest.mark.usefixtures("finished")
def test_a_stage_at_work_does_not_show_its_old_model(go, chain, tmp_path):
    with pytest.raises(Stopped):
        go(_config(chain, **{"reward.lr": 2e-3}), stop_at=("reward", 2))
    assert not (tmp_path / "run" / "stages" / "reward" / "model").exists()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert {name: facts["status"] for name, facts in manifest["stages"].items()} == {
        "base": "done before",
        "sft": "done before",
        "reward": "not run",
        "ppo": "not run",
        "judge": "not run",
    }
    assert manifest["stages"]["ppo"]["seconds"] is None


def test_checkpoints_of_other_settings_are_not_gone_on_with(go, chain, chain_run, tmp_path):
    def up_to_ppo() -> None:
        shutil.copytree(chain_run, tmp_path / "run")
        for name in ("ppo", "judge"):
            shutil.rmtree(tmp_path / "run" / "stages" / name)

    up_to_ppo()
    with pytest.raises(Stopped):
        go(_config(chain), stop_at=("ppo", 3))
    changed = _config(chain, **{"ppo.lr": 5e-4})
    del changed["stages"]["judge"]
    go(changed)
    continued = _content(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    up_to_ppo()
    go(changed)
    assert _content(tmp_path / "run") == continued


# ---------------------------------------------------------------- one stage alone


def test_only_needs_its_inputs_done(go, chain, chain_run, tmp_path):
    with pytest.raises(UsageError, match="its input 'sft' is not done"):
        go(_config(chain), only="ppo")
    assert not (tmp_path / "run").exists()
    shutil.copytree(chain_run, tmp_path / "run")
    with pytest.raises(UsageError, match="its input 'reward' is not done with these settings"):
        go(_config(chain, **{"reward.lr": 2e-3}), only="ppo")
    assert go(_config(chain, **{"ppo.lr": 2e-3}), only="ppo") == ["ppo"]
    with pytest.raises(UsageError, match="no stage 'pop'; the config has base, sft"):
        go(_config(chain), only="pop")


# ---------------------------------------------------------------- nothing is touched when something is wrong


def _rows(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_bad_row_of_the_last_stage_is_found_before_the_first_one_starts(go, chain, tmp_path):
    bad = _rows(tmp_path / "prompts.jsonl", {"prompt": "the cat?"}, {"prompt": " "})
    with pytest.raises(DataError, match=r"prompts\.jsonl:2: \"prompt\" is only whitespace"):
        go(_config(chain, **{"judge.data": bad}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cuda:7"}, "device 'cuda:7' cannot be used"),
        ({"device": "gpu"}, "there is no device 'gpu'; write auto, cpu, cuda, cuda:1 or mps"),
        ({"sft.model": "./nowhere"}, r"no stage, folder or hub model '\./nowhere'"),
        ({"sft.model": "bas"}, "did you mean the stage 'base'"),
        ({"sft.model": "nobody/no-such-model"}, "model 'nobody/no-such-model' cannot be loaded"),
        ({"base.model": {"init": {"model_type": "lama"}}}, "model type 'lama' cannot be loaded"),
        (
            {"base.model": {"init": {"model_type": "llama", "hidden_sizes": 8}}},
            "llama has no setting 'hidden_sizes'",
        ),
        ({"sft.max_length": 4096}, "sft: max_length 4096 exceeds the model's context of 48"),
        ({"judge.sampling": {"max_new_tokens": 48}}, "judge: sampling.max_new_tokens 48 leaves no room"),
        ({"judge.gold": "world:helpdsk"}, "did you mean 'helpdesk'"),
        ({"judge.gold": "world:helpdesk"}, r"prompts\.jsonl:1: world:helpdesk cannot judge replies to it"),
        ({"ppo.data": "world:helpdesk/prompt"}, "prompts"),
    ],
)
def test_what_cannot_work_is_found_before_anything_is_touched(go, chain, tmp_path, changes, reason):
    with pytest.raises(UsageError, match=reason):
        go(_config(chain, **changes))
    assert not (tmp_path / "run").exists()


def test_a_language_model_is_no_reward_model_and_the_other_way_round(
    go, chain, tiny_model, tiny_reward, tmp_path
):
    with pytest.raises(UsageError, match="is no reward model"):
        go(_config(chain, **{"ppo.reward": str(tiny_model)}))
    with pytest.raises(UsageError, match=r"is no whole causal language model: it has no lm_head\.weight"):
        causal_lm(ModelSource(str(tiny_reward)), 0)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_no_model(go, chain, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="cannot be loaded"):
        go(_config(chain, **{"sft.model": str(tmp_path / "empty")}))
    assert not (tmp_path / "run").exists()


def test_one_process_a_run_directory(go, chain, tmp_path):
    first = Pipeline(parse(_config(chain)), tmp_path / "run")
    first.directory.mkdir()
    with locked(first.directory), pytest.raises(KeelError, match="another process is working in") as caught:
        go(_config(chain))
    assert caught.value.exit_code == 1
    assert not (tmp_path / "run" / "stages").exists()


# ---------------------------------------------------------------- what a run leaves


def test_a_report_that_fails_costs_no_model(chain, tmp_path, monkeypatch):
    def fail(directory: Path) -> None:
        raise ValueError("no ink")

    monkeypatch.setattr(pipelines.report, "write", fail)
    said: list[str] = []
    config = _config({"stages": {"base": chain["stages"]["base"]}})
    Pipeline(parse(config), tmp_path / "run", said.append).run()
    assert (tmp_path / "run" / "stages" / "base" / "model" / "model.safetensors").exists()
    assert any("ValueError: no ink" in line for line in said)


def test_manifest_says_what_the_run_was_made_of(go, chain, tiny_model, tmp_path):
    config = _config({"stages": {"sft": {**chain["stages"]["sft"], "model": str(tiny_model)}}})
    go(config)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["versions"]["keel"] == keel.__version__
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["hardware"]["device"] == "cpu"
    assert manifest["hardware"]["threads"] == 1
    facts = manifest["stages"]["sft"]
    assert facts["status"] == "done"
    assert len(facts["inputs"][str(tiny_model)]) == 64
    assert not list((tmp_path / "run").rglob("*.partial*"))
    assert not (tmp_path / "run" / "stages" / "sft" / "checkpoints").exists()


# ---------------------------------------------------------------- micro_batch: auto


def _auto(chain: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    base = {**chain["stages"]["base"], "batch_size": 8, "micro_batch": "auto", **changes}
    return {"name": "tiny", "threads": 1, "device": "cpu", "stages": {"base": base}}


def _tries(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Stages that run out of memory with more than `most` examples at a time; the numbers that are tried."""
    tried, dispatch = list[int](), following.run_stage

    def go(stage: Any, run: Any) -> Any:
        tried.append(stage.micro_batch)
        if stage.micro_batch > most:
            raise torch.OutOfMemoryError("no room")
        return dispatch(stage, run)

    monkeypatch.setattr(following, "run_stage", go)
    return tried


def test_auto_takes_what_fits_and_goes_on_with_half_where_it_does_not(chain, tmp_path, monkeypatch):
    said, tried = list[str](), _tries(monkeypatch, most=2)
    pipeline = Pipeline(parse(_auto(chain)), tmp_path / "run", said.append, fit=lambda pipeline, name: 7)
    pipeline.run()
    assert tried == [7, 4, 2]
    assert "base: 4 examples at a time do not fit; half as many from here" in said
    assert json.loads((tmp_path / "run/stages/base/stage.json").read_text())["facts"]["micro_batch"] == 2
    # begun again after a kill, it goes on with what it had; without anybody who reckons, it begins with all
    (tmp_path / "run/stages/base/stage.json").unlink()
    Pipeline(parse(_auto(chain)), tmp_path / "run", str, fit=lambda pipeline, name: 8).run()
    Pipeline(parse(_auto(chain, lr=1e-4)), tmp_path / "run", str).run()
    assert tried == [7, 4, 2, 2, 8, 4, 2]


@pytest.mark.parametrize(("asked", "tries"), [("auto", [8, 4, 2, 1]), (8, [8])])
def test_what_does_not_fit_at_all_ends_the_run(chain, tmp_path, monkeypatch, asked, tries):
    tried = _tries(monkeypatch, most=0)
    with pytest.raises(MachineError, match="memory is used up") as ended:
        Pipeline(parse(_auto(chain, micro_batch=asked)), tmp_path / "run", str).run()
    assert isinstance(ended.value.__cause__, torch.OutOfMemoryError)
    assert tried == tries


def test_auto_is_the_same_run_as_the_number_it_comes_to(chain, tmp_path):
    for name, asked in (("auto", "auto"), ("number", 4)):
        config = parse(_auto(chain, micro_batch=asked))
        Pipeline(config, tmp_path / name, str, fit=lambda pipeline, name: 4).run()
    one, other = (tmp_path / n / "stages/base/model/model.safetensors" for n in ("auto", "number"))
    assert one.read_bytes() == other.read_bytes()
