"""`keel doctor --distributed --engine`: a server that can sample for a run, and ways in which one cannot."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from keel.cli import doctor_engine
from keel.errors import UsageError
from keel.rollout.vllm import server

_place = Path(__file__).parents[1] / "rollout" / "scripted_vllm.py"
_spec = importlib.util.spec_from_file_location("scripted_vllm", _place)
assert _spec is not None
assert _spec.loader is not None
scripted_vllm = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(scripted_vllm)


@pytest.fixture
def served(tiny_model: Path) -> Any:
    made = scripted_vllm.ScriptedVllm(tiny_model)
    yield made
    made.kill()


def test_a_server_that_samples_is_well_and_its_speed_is_told(served: Any) -> None:
    check = doctor_engine.examine(served.address, None)
    assert check.ok, check
    assert f"room for {served.room} tokens, takes no adapters" in check.found
    assert "16 × 16 tokens at" in check.found
    assert served.count(scripted_vllm.GENERATE) == 1 + doctor_engine.ROWS


def test_a_key_is_sent_and_a_missing_one_is_named(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = scripted_vllm.ScriptedVllm(tiny_model, key="s3cret")
    monkeypatch.setenv("ENGINE_KEY", "s3cret")
    try:
        assert doctor_engine.examine(made.address, "ENGINE_KEY").ok
        without = doctor_engine.examine(made.address, None)
    finally:
        made.kill()
    assert not without.ok
    assert "401" in without.found
    assert "--api-key-env" in without.mend


def test_each_way_in_which_a_server_cannot_sample_is_one_line(served: Any, tiny_model: Path) -> None:
    raw = scripted_vllm.ScriptedVllm(tiny_model, mode="raw_logprobs")
    check = doctor_engine.examine(raw.address, None)
    raw.kill()
    assert (check.ok, "gives raw_logprobs" in check.found) == (False, True)
    assert "--logprobs-mode processed_logprobs" in check.mend
    gone = doctor_engine.examine(raw.address, None)
    assert (gone.ok, "does not answer" in gone.found) == (False, True)

    served.script = lambda route, body, number: (200, {"data": 1}) if route == "/v1/models" else None
    odd = doctor_engine.examine(served.address, None)
    assert (odd.ok, "answers like no vLLM server" in odd.found) == (False, True)
    served.script = lambda route, body, number: (404, {"error": "x"}) if route == "/server_info" else None
    closed = doctor_engine.examine(served.address, None)
    assert (closed.ok, "404" in closed.found, "keel engine serve" in closed.mend) == (False, True, True)
    served.script = lambda route, body, number: (
        (200, {"choices": []}) if route == scripted_vllm.GENERATE else None
    )
    mute = doctor_engine.examine(served.address, None)
    assert (mute.ok, "does not sample" in mute.found) == (False, True)


def test_the_installed_environment_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(server.PLACE, str(tmp_path))
    none = doctor_engine.examine("vllm", None)
    assert (none.ok, none.mend) == (False, "keel engine install vllm")
    program = tmp_path / "vllm" / "bin" / "vllm"
    program.parent.mkdir(parents=True)
    program.touch()
    assert "what keel did not install" in doctor_engine.examine("vllm", None).found
    note = {"device": "cpu", "package": server.PINS["cpu"]}
    (tmp_path / "vllm" / server.NOTE).write_text(json.dumps(note))
    assert doctor_engine.examine("vllm", None).ok


@pytest.mark.parametrize(
    ("engine", "key_env", "said"),
    [
        ("vllm", "KEY", "has no effect with --engine vllm"),
        ("gpu-box:8000", None, "is no address"),
        ("http://me:pw@gpu-box:8000", None, "holds no key"),
        ("http://gpu-box:8000", "NO_SUCH_VARIABLE", "NO_SUCH_VARIABLE is not set"),
    ],
)
def test_what_is_no_engine_is_refused(engine: str, key_env: str | None, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        doctor_engine.checked(engine, key_env)
