"""Each command: what it prints where, in which form, and how it ends."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

from keel import __version__
from keel.config import RunConfig, read

KEEL = [sys.executable, "-m", "keel"]


def _process(arguments: list[object], **more: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [*KEEL, *map(str, arguments)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # a shell's background job ignores SIGINT, and its children would inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **more,
    )  # pyright: ignore[reportCallIssue]


# ---------------------------------------------------------------- run, report


def test_run_says_the_result_on_stdout_and_the_rest_on_stderr(keel, write, chain):
    judge = {**chain["judge"], "models": ["sft"], "reward": {"kind": "length", "high": 9}}
    done = keel("run", write("tiny.yaml", {"sft": chain["sft"], "judge": judge}))
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[-1] == "report: runs/tiny/report.html"
    assert any(line.startswith("judge") for line in lines)  # the table of measures
    assert "sft: done in" not in done.out
    assert "sft: done in" in done.err
    assert "sft: 48 rows · prompt-completion, standard · data0/demonstrations.jsonl" in done.err
    assert Path("runs/tiny/report.html").stat().st_size > 10_000


def test_run_as_json(keel, write, chain):
    path = write("tiny.yaml", chain)
    done = keel("run", path, "--json", "--runs", "elsewhere", "--name", "mine")
    assert done.code == 0, done.err
    assert done.json["run"] == "elsewhere/mine"
    assert [*done.json["stages"]] == ["sft", "reward", "ppo", "judge"]
    assert {facts["status"] for facts in done.json["stages"].values()} == {"done"}
    assert done.json["stages"]["judge"]["result"]["models"].keys() == {"sft", "ppo"}
    again = keel("run", path, "--json", "--runs", "elsewhere", "--name", "mine")
    assert {facts["status"] for facts in again.json["stages"].values()} == {"done before"}
    assert again.json["stages"]["ppo"]["result"] == done.json["stages"]["ppo"]["result"]
    assert "sft: done before, unchanged" in again.err
    report = keel("report", "elsewhere/mine", "--json")
    assert report.code == 0, report.err
    assert report.json["stages"]["judge"] == {"status": "done before"}
    assert report.json["results"]["judge"] == done.json["stages"]["judge"]["result"]
    assert Path(report.json["report"]).exists()


@pytest.mark.usefixtures("no_report")
def test_progress_is_lines_when_nobody_watches(keel, write, chain):
    done = keel("run", write("tiny.yaml", {"sft": {**chain["sft"], "max_steps": 20}}))
    steps = [line for line in done.err.splitlines() if line.startswith("sft ")]
    assert [line.split()[1] for line in steps] == [f"{step}/20" for step in range(2, 21, 2)]
    assert all(" loss " in line for line in steps)
    assert "\r" not in done.err
    assert "\x1b" not in done.err
    assert "\x1b" not in done.out


@pytest.mark.usefixtures("no_report")
def test_overrides_and_name_reach_the_run(keel, write, chain):
    path = write("tiny.yaml", {"sft": chain["sft"]})
    assert keel("run", path, "sft.max_steps=1", "seed=4", "--name", "other").code == 0
    config = read(Path("runs/other/config.yaml"))
    assert (config.seed, config.stages["sft"].max_steps, config.name) == (4, 1, "other")  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.usefixtures("no_report")
def test_only_and_fresh(keel, write, chain):
    path = write("tiny.yaml", {"sft": chain["sft"], "again": {**chain["sft"], "model": "sft"}})
    early = keel("run", path, "--only", "again")
    assert early.code == 2
    assert "its input 'sft' is not done" in early.err
    assert not Path("runs").exists()
    assert keel("run", path).code == 0
    fresh = keel("run", path, "--only", "again", "--fresh")
    assert fresh.code == 0
    assert "again: done in" in fresh.err
    assert "sft: done" not in fresh.err


def test_report_of_nothing(keel):
    missing = keel("report", "runs/nowhere")
    assert missing.code == 2
    assert missing.out == ""
    assert "keel: no run at runs/nowhere" in missing.err


def test_report_of_a_run_that_was_cut_off(keel, write, chain, monkeypatch):
    from keel.rl import ppo

    def fail(*_: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(ppo, "run", fail)
    failed = keel("run", write("tiny.yaml", chain))
    assert failed.code == 1
    line = failed.err.splitlines()[-1]
    assert line.startswith("keel: unexpected RuntimeError: out of luck (pipeline/following.py:")
    assert "This is a fault of keel, please report it; --traceback shows the whole" in line
    assert "Traceback" not in failed.err
    cut = keel("report", "runs/tiny", "--json")
    assert cut.code == 0, cut.err
    assert cut.json["results"].keys() == {"sft", "reward"}
    assert cut.json["stages"]["ppo"] == cut.json["stages"]["judge"] == {"status": "not run"}


def test_the_whole_of_an_error_is_shown_when_asked(keel, write, monkeypatch):
    monkeypatch.setenv("KEEL_TRACEBACK", "0")
    missing = keel("--traceback", "run", "nowhere.yaml")
    assert missing.code == 2
    assert "Traceback (most recent call last)" in missing.err
    assert missing.err.splitlines()[-1].startswith("keel: ")
    monkeypatch.setenv("KEEL_TRACEBACK", "0")
    assert "Traceback" not in keel("run", "nowhere.yaml").err


# ---------------------------------------------------------------- plan


def test_plan_says_what_would_be_done_and_does_nothing(keel, write, chain):
    planned = keel("plan", write("tiny.yaml", chain), "--json")
    assert planned.code == 0, planned.err
    sft, reward, ppo, judge = planned.json["stages"]
    assert (sft["rows"], sft["type"], sft["steps"], sft["tokens_measured"]) == (48, "demonstration", 2, True)
    assert sft["parameters"] == ppo["parameters"] == judge["parameters"] > reward["parameters"] > 10_000
    assert reward["inputs"] == ["sft"]
    assert (ppo["steps"], ppo["episodes"], ppo["gradient_steps"]) == (2, 4, 2)
    assert judge["rows"] == 3
    assert not any(stage["done"] for stage in planned.json["stages"])
    assert not Path("runs").exists()


def test_plan_as_text(keel, write, chain):
    planned = keel("plan", write("tiny.yaml", chain))
    assert planned.code == 0
    assert "ppo (ppo) ← sft, reward" in planned.out
    assert "2 updates · 4 episodes · 2 gradient steps" in planned.out


@pytest.mark.usefixtures("no_report")
def test_plan_counts_the_steps_that_run_takes(keel, write, chain):
    stages = {
        "base": {
            "kind": "pretrain",
            "data": {"source": "world:helpdesk/text", "rows": 60},
            "batch_size": 8,
            "model": {
                "vocab_size": 300,
                "init": {
                    "model_type": "llama",
                    "hidden_size": 16,
                    "intermediate_size": 16,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "max_position_embeddings": 32,
                },
            },
        },
        "sft": {**chain["sft"], "max_steps": None, "epochs": 1.5, "batch_size": 7},
        "reward": {**chain["reward"], "max_steps": None, "epochs": 0.5, "batch_size": 5},
    }
    path = write("tiny.yaml", stages)
    first = {stage["stage"]: stage for stage in keel("plan", path, "--json").json["stages"]}
    assert keel("run", path).code == 0
    taken = {
        name: json.loads(Path(f"runs/tiny/stages/{name}/stage.json").read_text())["facts"]["steps"]
        for name in stages
    }
    assert {name: first[name]["steps"] for name in ("sft", "reward")} == {
        n: taken[n] for n in ("sft", "reward")
    }
    second = {stage["stage"]: stage for stage in keel("plan", path, "--json").json["stages"]}
    assert not first["base"]["tokens_measured"]  # no tokenizer yet
    assert second["base"]["tokens_measured"]
    assert second["base"]["steps"] == pytest.approx(taken["base"], rel=0.1)
    assert all(stage["done"] for stage in second.values())


def test_plan_on_bad_data(keel, write, sft):
    rows = write("rows.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}])
    planned = keel("plan", write("tiny.yaml", {"sft": sft(data=str(rows))}), "--json")
    assert planned.code == 2
    assert planned.out == ""
    assert 'rows.jsonl:2: "completion" is empty' in planned.err


def test_plan_without_the_model_does_not_need_a_network(keel, write, sft):
    planned = keel("plan", write("tiny.yaml", {"sft": sft(model="nobody/no-such-model")}))
    assert planned.code == 0, planned.err
    assert "parameters unknown until the model is here" in planned.out


# ---------------------------------------------------------------- chat


def test_chat_answers_one_prompt(keel, tiny_model):
    answers = [
        keel("chat", tiny_model, "--prompt", "the cat?", "--max-new-tokens", 5, "--seed", s, "--json")
        for s in (1, 1, 2)
    ]
    assert [a.code for a in answers] == [0, 0, 0], answers[0].err
    assert answers[0].json["prompt"] == "the cat?"
    assert answers[0].json["completion"] == answers[1].json["completion"] != answers[2].json["completion"]


@pytest.mark.usefixtures("no_report")
def test_chat_finds_the_model_of_a_stage_and_takes_a_line_a_turn(keel, write, chain, monkeypatch):
    keel("run", write("tiny.yaml", {"sft": chain["sft"]}))
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat?\nthe dog?\n"))
    talked = keel("chat", "runs/tiny/stages/sft", "--max-new-tokens", 4, "--json")
    assert talked.code == 0, talked.err
    assert [json.loads(line)["prompt"] for line in talked.out.splitlines()] == ["the cat?", "the dog?"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("nobody/no-such-model", "--prompt", "hi"), "'nobody/no-such-model' cannot be loaded"),
        (("no-such-model", "--prompt", "hi"), "no model at no-such-model: give a folder, a hub id"),
        (("{reward}", "--prompt", "hi"), "is no whole causal language model"),
        (("{model}", "--prompt", "the cat? " * 40), "exceed the model's context of 48"),
        (("{model}", "--prompt", "hi", "--max-new-tokens", "0"), "--max-new-tokens"),
        (("{model}", "--prompt", "hi", "--temperature", "-1"), "--temperature"),
    ],
)
def test_chat_that_cannot_be(keel, tiny_model, tiny_reward, arguments, reason):
    refused = keel("chat", *(a.format(model=tiny_model, reward=tiny_reward) for a in arguments))
    assert refused.code == 2
    assert refused.out == ""
    assert reason in " ".join(refused.err.replace("│", " ").split())


def test_a_run_is_no_model_and_a_path_into_a_folder_is_no_hub_id(keel, tmp_path):
    (tmp_path / "runs" / "mine" / "stages" / "sft" / "model").mkdir(parents=True)
    for command in ("chat", "doctor"):
        assert (
            "runs/mine is a run: name a stage of it, runs/mine/stages/{sft}" in keel(command, "runs/mine").err
        )
        assert "no model at runs/other: give a folder" in keel(command, "runs/other").err


# ---------------------------------------------------------------- recipes, schema, doctor, help


def test_recipes_are_listed_shown_and_copied(keel):
    listed = keel("recipes", "--json").json
    assert {"helpdesk", "hh-rlhf", "llama2-7b"} <= listed.keys()
    named = keel("recipes").out
    assert all(name in named for name in listed)
    shown = keel("recipes", "show", "helpdesk").out
    assert keel("recipes", "copy", "helpdesk").out == "helpdesk.yaml\n"
    assert Path("helpdesk.yaml").read_text() == shown
    assert read(Path("helpdesk.yaml")).name == "helpdesk"
    again = keel("recipes", "copy", "helpdesk")
    assert again.code == 2
    assert "is there already; it was not overwritten" in again.err
    assert keel("recipes", "copy", "hh-rlhf", "other.yaml").code == 0
    assert "no folder nowhere" in keel("recipes", "copy", "hh-rlhf", "nowhere/mine.yaml").err


def test_a_recipe_is_run_by_its_name_even_beside_a_folder_of_that_name(keel):
    Path("helpdesk").mkdir()
    planned = keel(
        "plan", "helpdesk", "base.data.rows=20", "sft.data.rows=20", "reward.data.rows=20", "--json"
    )
    assert planned.code == 0, planned.err
    assert [s["stage"] for s in planned.json["stages"]] == ["base", "sft", "reward", "ppo", "judge"]


@pytest.mark.parametrize(
    "arguments",
    [("run", "helpdsk"), ("plan", "helpdsk"), ("recipes", "show", "helpdsk"), ("recipes", "copy", "x")],
)
def test_unknown_recipe(keel, arguments):
    refused = keel(*arguments)
    assert refused.code == 2
    assert "helpdesk, hh-rlhf" in refused.err


def test_schema_describes_every_setting(keel):
    schema = keel("schema").json
    assert schema["properties"].keys() == RunConfig.model_fields.keys()
    assert schema["$defs"]["PPOConfig"]["properties"]["clip"]["description"].startswith("ε")


def test_a_renamed_key_is_noted_once_on_stderr(keel, write):
    term = {"kind": "length", "high": 3, "only": "x.jsonl"}
    path = write(
        "old.yaml", {"s": {"kind": "evaluate", "models": ["m"], "reward": [term], "data": "y.jsonl"}}
    )
    done = keel("plan", str(path))
    assert done.err.count("`only` (kind: length) is now called `source_filter`") == 1
    assert done.err.startswith("keel: note: ")
    assert ".py:" not in done.err  # no place in the code


def test_doctor_measures_the_machine_and_keeps_it(keel, monkeypatch, tmp_path):
    monkeypatch.setenv("KEEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("keel.models.machine_speed.fastest", lambda device, dtype, tries: 2e9)
    monkeypatch.setattr("keel.models.machine_speed.reading", lambda device, size, tries: 3e9)
    found = keel("doctor", "--bench", "--json").json
    assert found["flops"]["bfloat16"] == 2e9
    assert found["threads"] == torch.get_num_threads()
    kept = json.loads((tmp_path / "cache" / "machine.json").read_text())
    assert [entry["flops"] for entry in kept.values()] == [found["flops"]]
    text = keel("doctor", "--bench").out
    assert "2 GFLOP/s" in text
    assert str(tmp_path / "cache" / "machine.json") in text


@pytest.mark.parametrize(
    ("given", "said"),
    [(("some/model", "--bench"), "give it no model"), (("--threads", "2"), "no effect without --bench")],
)
def test_doctor_refuses_what_has_no_effect(keel, given, said):
    outcome = keel("doctor", *given)
    assert outcome.code == 2
    assert said in outcome.err


def test_doctor(keel):
    facts = keel("doctor", "--json")
    assert facts.code == 0
    assert facts.json["missing"] == []
    assert {"keel", "python", "torch", "transformers", "cuda", "cores"} <= facts.json.keys()
    assert "all that keel needs is here" in keel("doctor").out


def test_doctor_tells_what_a_models_files_say(keel, tiny_model):
    told = keel("doctor", str(tiny_model)).out
    assert "model type llama" in told
    assert "a reply ends with <|end|>" in told
    assert keel("doctor", str(tiny_model), "--json").json["facts"] == told.strip().splitlines()
    missing = keel("doctor", "no/such/folder")
    assert missing.code == 2
    assert "no model at no/such/folder: give a folder" in missing.err


def test_doctor_takes_a_stage_too_and_says_where_no_model_is(keel, tiny_model, tmp_path):
    stage = tmp_path / "stages" / "sft"
    shutil.copytree(tiny_model, stage / "model")
    assert keel("doctor", str(stage)).out == keel("doctor", str(tiny_model)).out
    assert "is a run: name a stage of it" in keel("doctor", str(tmp_path)).err
    (tmp_path / "empty").mkdir()
    assert "there is no config.json in this folder" in keel("doctor", str(tmp_path / "empty")).err


def test_doctor_names_what_is_missing(keel, monkeypatch):
    import importlib.metadata

    def version(package: str) -> str:
        if package == "peft":
            raise importlib.metadata.PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr("keel.cli.doctor.version", version)
    ill = keel("doctor", "--json")
    assert ill.code == 1
    assert ill.json["missing"] == ["peft"]


def test_wrong_use_is_2_and_help_is_0(keel):
    assert keel("--help").code == 0
    assert keel("run", "--help").code == 0
    assert keel("run").code == 2
    assert keel("walk").code == 2
    assert keel("run", "helpdesk", "--quickly").code == 2


# ---------------------------------------------------------------- a process of its own


def test_no_color_is_honoured():
    bare = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TERM")}
    coloured = []
    for more in ({}, {"NO_COLOR": "1"}):
        environment = {**bare, "FORCE_COLOR": "1", "TERM": "xterm-256color", **more}
        done = subprocess.run([*KEEL, "--help"], capture_output=True, text=True, check=True, env=environment)
        coloured.append(re.search(r"\x1b\[[0-9;]*3[0-7]m", done.stdout) is not None)
    assert coloured == [True, False]


AT_END = """
import atexit, gc, json, sys

def left():
    scan = sys.modules["transformers.utils.import_utils"].create_import_structure_from_path
    with open({file!r}, "w") as file:
        json.dump({{"modules": [*sys.modules], "collects": gc.isenabled(), "frozen": gc.get_freeze_count(),
                   "read": scan.cache_info().misses}}, file)

atexit.register(left)
"""
NO_USE = {  # what is installed beside keel, and training on rows has no use for
    "scipy", "sklearn", "pandas", "datasets", "peft", "matplotlib", "fastapi",
    "sqlalchemy", "tensorboard", "trackio", "torch.utils.tensorboard", "torchvision", "bitsandbytes", "ray",
}  # fmt: skip


def test_stdout_of_a_process_is_json_and_nothing_else_and_it_loads_what_it_needs(
    write, chain, tmp_path, monkeypatch
):
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(AT_END.format(file=str(tmp_path / "end.json")))
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
    process = _process(["run", write("tiny.yaml", {"sft": chain["sft"]}), "--json"], cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(out)["stages"]["sft"]["status"] == "done"
    # nothing but keel's own lines: no bars, no warnings of libraries
    assert all(line.startswith(("sft", "report")) for line in err.splitlines()), err
    assert "\r" not in err
    end = json.loads((tmp_path / "end.json").read_text())
    assert "torch" in end["modules"]
    assert NO_USE & set(end["modules"]) == set()
    assert end["collects"]
    assert end["frozen"] > 200_000  # what was imported is not looked at again
    folders = sum(place.is_dir() for place in (Path(transformers.__file__).parent / "models").iterdir())
    assert end["read"] < 1.5 * folders  # transformers' models are looked through once, not twice


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_interrupted_run_ends_with_130_and_the_same_command_goes_on(write, chain, tmp_path, number, keel):
    path = write("tiny.yaml", {"sft": {**chain["sft"], "max_steps": 100, "save_every": 5, "epochs": 100}})
    process = _process(["run", path], cwd=tmp_path)
    checkpoints = tmp_path / "runs" / "tiny" / "stages" / "sft" / "checkpoints"
    deadline = time.monotonic() + 60
    while not list(checkpoints.glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "keel: interrupted; the same command goes on from the last checkpoint"
    assert "Traceback" not in err
    assert out == ""
    reached = int(max(checkpoints.glob("step-*")).name.removeprefix("step-"))
    assert 5 <= reached < 100
    if number == signal.SIGTERM:
        return
    again = keel("run", path)
    assert again.code == 0, again.err
    assert f"sft: going on after step {reached}" in again.err
    steps = [
        json.loads(line)["step"]
        for line in Path("runs/tiny/stages/sft/metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [*range(1, 101)]


def test_a_terminal_gets_bars_and_stdout_does_not(write, chain, tmp_path):
    pty = pytest.importorskip("pty")
    leader, follower = pty.openpty()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TERM": "xterm-256color", "COLUMNS": "100"}
    process = subprocess.Popen(
        [*KEEL, "run", str(write("tiny.yaml", {"sft": chain["sft"]})), "--json"],
        env=environment, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=follower,
    )  # fmt: skip
    os.close(follower)
    drawn = b""
    while True:
        try:
            block = os.read(leader, 65536)
        except OSError:  # the other side is closed
            break
        if not block:
            break
        drawn += block
    os.close(leader)
    out = process.stdout.read() if process.stdout else ""
    assert process.wait(timeout=60) == 0, drawn.decode()
    assert "━" in drawn.decode()  # a bar …
    assert "2/2" in drawn.decode()  # … that was filled
    assert json.loads(out)["stages"]["sft"]["status"] == "done"


def test_a_run_that_fails_ends_with_1(keel, write, chain):
    failed = keel(
        "run",
        write("tiny.yaml", {"sft": {**chain["sft"], "lr": 1e15, "max_steps": 9, "max_grad_norm": None}}),
    )
    assert failed.code == 1
    assert failed.err.splitlines()[-1].startswith("keel: sft")
    assert "not finite" in failed.err.splitlines()[-1] or " is nan at step" in failed.err.splitlines()[-1]
    assert failed.out == ""
    assert not Path("runs/tiny/stages/sft/model").exists()
    report = keel("report", "runs/tiny", "--json")
    assert report.json["results"] == {}


def test_the_version_is_printed(keel):
    done = keel("--version")
    assert (done.code, done.out) == (0, f"keel {__version__}\n")
