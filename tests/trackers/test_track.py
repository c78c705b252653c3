"""`track` in a config: how it is written, what is refused, and that it changes no result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from keel.config import RunConfig, parse
from keel.errors import UsageError
from keel.pipeline.pipeline import Pipeline
from keel.trackers import process


def config(track: Any, **stage: Any) -> dict[str, Any]:
    sft = {"kind": "sft", "model": "somewhere/base", "data": "x.jsonl", **stage}
    return {"name": "tiny", "threads": 1, "device": "cpu", "track": track, "stages": {"sft": sft}}


@pytest.mark.parametrize(
    ("written", "kinds"),
    [
        ("trackio", ["trackio"]),
        (["wandb", {"kind": "mlflow", "uri": "http://127.0.0.1:5000"}], ["wandb", "mlflow"]),
        ({"kind": "tensorboard", "folder": "all"}, ["tensorboard"]),
        ([], []),
        (None, []),
    ],
)
def test_a_name_a_mapping_or_a_list(written: Any, kinds: list[str]) -> None:
    read = parse(config(written))
    assert [tracker.kind for tracker in read.track] == kinds
    assert parse(read.model_dump(mode="json")).track == read.track  # as a run's config.yaml is read again


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("tracko", "unknown tracker 'tracko'; did you mean 'trackio'?"),
        ("x", "unknown tracker 'x'; known: trackio, wandb, tensorboard, mlflow"),
        (["trackio", "trackio"], "`track` names 'trackio' twice: give each tracker once"),
        ({"kind": "wandb", "entty": "me"}, "unknown key; did you mean 'entity'?"),
        ({"kind": "mlflow", "uri": "https://me:secret@host"}, "put the secret into the environment variable"),
        ({"project": "x"}, "`kind` is missing"),
        (3, "track"),
    ],
)
def test_what_is_refused(written: Any, message: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(config(written))
    assert message in str(error.value)
    assert "secret" not in str(error.value).replace("the secret", "")


def test_the_schema_knows_every_form(recorder: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    whole = RunConfig.model_json_schema()
    schema = whole["properties"]["track"] | {"$defs": whole["$defs"]}
    validator = jsonschema.validators.validator_for(schema)(schema)
    for written in (
        "trackio",
        ["wandb"],
        {"kind": "mlflow", "uri": "http://x"},
        {"kind": "recorder", "args": {}},
    ):
        validator.validate(written)


def test_a_missing_extra_ends_the_run_before_anything(
    data: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(process.MODULES, "wandb", "no_such_module_of_anybody")
    pipeline = Pipeline(
        parse(config("wandb", model=str(tiny_model), data=str(data.demonstrations))), tmp_path / "run", str
    )
    with pytest.raises(UsageError, match="track: wandb is not installed: pip install"):
        pipeline.run()
    assert not (tmp_path / "run").exists()


def test_a_tracked_run_is_the_same_run(
    data: Any, tiny_model: Path, tmp_path: Path, recorder: Path, run: Any
) -> None:
    stage = {"model": str(tiny_model), "data": str(data.demonstrations), "max_steps": 3, "batch_size": 4}
    track = {"kind": "recorder", "args": {"path": str(recorder)}}
    tracked = run(config(track, **stage), tmp_path / "tracked")
    bare = run(config([], **stage), tmp_path / "bare")
    assert tracked.fingerprint("sft") == bare.fingerprint("sft")
    own, other = tracked.stage_directory("sft"), bare.stage_directory("sft")
    for file in ("metrics.jsonl", "result.json", "model/model.safetensors"):
        assert (own / file).read_bytes() == (other / file).read_bytes()
    received = [json.loads(line) for line in recorder.read_text().splitlines()]
    logged = [json.loads(line) for line in (own / "metrics.jsonl").read_text().splitlines()]
    sent = [row for row in received if row.get("numbers")]
    assert [_metrics(row) for row in sent] == logged
    assert all(any(name.startswith("time/") for name in row["numbers"]) for row in sent)
    assert received[-1] == {"closed": True}
    # turned on later, what was done before is sent too
    late = config(track | {"args": {"path": str(tmp_path / "late.jsonl")}}, **stage)
    run(late, tmp_path / "bare")
    rows = [json.loads(line) for line in (tmp_path / "late.jsonl").read_text().splitlines()]
    assert [_metrics(row) for row in rows if row.get("numbers")] == logged


def _metrics(row: Mapping[str, Any]) -> dict[str, Any]:
    """What was sent, as metrics.jsonl has it."""
    numbers = {name: value for name, value in row["numbers"].items() if not name.startswith("time/")}
    return {"step": row["step"], **numbers}
