"""Files of a run, a model, a tokenizer, a checkpoint, a cache: cut, emptied, swapped, of the wrong type. The
command says which file and what to do, or does the work again; it never crashes and never takes rubbish for
truth."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.attack

STAGES = ("sft", "ppo", "judge")
RUBBISH = b"\x93NUMPY\xff\xfe\0 not what it was"
Breaks = Callable[[Path], None]


def empty(path: Path) -> None:
    path.write_bytes(b"")


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rubbish(path: Path) -> None:
    path.write_bytes(RUBBISH)


def a_list(path: Path) -> None:
    path.write_text("[1, 2]")


def null(path: Path) -> None:
    path.write_text("null")


def text(path: Path) -> None:
    path.write_text('"a"')


def deep(path: Path) -> None:
    path.write_text("[" * 100_000)


def wrong_types(path: Path) -> None:
    """Each value of the object by one of another type."""
    path.write_text(json.dumps({key: _other(value) for key, value in json.loads(path.read_text()).items()}))


def no_keys(path: Path) -> None:
    path.write_text("{}")


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x40
    path.write_bytes(bytes(content))


def flipped_number(path: Path) -> None:
    """A bit of the largest tensor: what lies between tensors means nothing."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as packed:
        numbers = packed.read(max(packed.infolist(), key=lambda part: part.file_size))
    content[content.index(numbers) + len(numbers) // 2] ^= 0x40
    path.write_bytes(bytes(content))


def header_lies(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes((2**40).to_bytes(8, "little") + content[8:])


def gone(path: Path) -> None:
    path.unlink()


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def unreadable_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\xff")


def _other(value: Any) -> Any:
    return {"dict": [1], "list": {"a": 1}, "str": 3, "bool": "x"}.get(type(value).__name__, {"b": []})


@pytest.fixture(scope="module")
def made(forked: Any, every_kind: Any, write_config: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of three stages."""
    place = tmp_path_factory.mktemp("made")
    stages = {name: every_kind[name] for name in STAGES}
    stages["judge"] = {**stages["judge"], "models": ["sft", "ppo"]}
    write_config(place, stages)
    ended = forked("run", "config.yaml", cwd=place, timeout=120)
    assert ended.code == 0, ended.err
    return place


RUN = "runs/r/"
# file of a done run, how it is broken: `run` makes what it lost again, or refuses; `report`, `diagnose` and
# `compare` show the rest, or refuse
SFT, MODEL = f"{RUN}stages/sft/", f"{RUN}stages/sft/model/"
OF_JSON = (empty, half, rubbish, a_list, null, wrong_types, no_keys, deep)
IN_RUN: list[tuple[str, Breaks]] = [
    *((f"{SFT}stage.json", how) for how in OF_JSON),
    *((f"{SFT}fingerprint", how) for how in (empty, unreadable_text, gone, folder)),
    *((f"{SFT}fingerprint.json", how) for how in (empty, rubbish, a_list, wrong_types, gone)),
    *((f"{RUN}stages/ppo/result.json", how) for how in (empty, rubbish, a_list, wrong_types, gone)),
    *((f"{RUN}stages/judge/result.json", how) for how in (half, null, wrong_types, deep)),
    *((f"{RUN}stages/ppo/metrics.jsonl", how) for how in (empty, half, rubbish, a_list, text, gone)),
    *((f"{RUN}stages/ppo/samples.jsonl", how) for how in (empty, half, rubbish, a_list, gone)),
    *((f"{RUN}stages/ppo/times.jsonl", how) for how in (half, rubbish, a_list)),
    *((f"{RUN}manifest.json", how) for how in OF_JSON),
    *((f"{RUN}config.yaml", how) for how in (empty, rubbish, a_list, text, gone)),
    *((f"{MODEL}model.safetensors", how) for how in (empty, half, rubbish, flipped, header_lies, gone)),
    *((f"{MODEL}config.json", how) for how in (empty, half, a_list, wrong_types, no_keys, gone)),
    *((f"{MODEL}tokenizer.json", how) for how in (empty, half, a_list, no_keys, gone)),
    *((f"{MODEL}tokenizer_config.json", how) for how in (empty, a_list, wrong_types)),
    *((f"{MODEL}chat_template.jinja", how) for how in (unreadable_text, empty)),
    *((f"{MODEL}generation_config.json", how) for how in (empty, a_list, wrong_types)),
    *((f"{RUN}.lock", how) for how in (gone, folder, loop)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "how"), IN_RUN, ids=[f"{n.removeprefix(RUN)}-{h.__name__}" for n, h in IN_RUN]
)
def test_a_broken_file_of_a_run_is_named_or_made_again(
    name: str, how: Breaks, made: Path, forked: Any, tmp_path: Path
) -> None:
    place = tmp_path / "copy"
    shutil.copytree(made, place, symlinks=True)
    before = {path: path.read_bytes() for path in (place / RUN).rglob("model.safetensors")}
    how(place / name)
    commands = (["report", RUN], ["diagnose", RUN], ["compare", RUN], ["clean", RUN], ["plan", "config.yaml"])
    for command in (*commands, ["run", "config.yaml"]):
        ended = forked(*command, cwd=place, timeout=60)
        ended.assert_clean()
        if ended.code not in (0, 3):
            ended.assert_refused()
            assert Path(name).name in ended.err or "stages/" in ended.err or "run" in ended.err, ended.err
    if ended.code == 0:  # what `run` left is what the undisturbed one left
        for path, content in before.items():
            assert path.read_bytes() == content, path


# ---------------------------------------------------------------- a run in the middle, its checkpoint broken

IN_CHECKPOINT: list[tuple[str, Breaks]] = [
    *(("values.json", how) for how in (empty, half, rubbish, a_list, wrong_types, no_keys, gone)),
    *(("tensors.pt", how) for how in (empty, half, rubbish, flipped_number, gone, a_list)),
]


@pytest.mark.parametrize(("name", "how"), IN_CHECKPOINT, ids=[f"{n}-{h.__name__}" for n, h in IN_CHECKPOINT])
def test_a_broken_checkpoint_is_said_and_the_stage_begins_again(
    name: str, how: Breaks, made: Path, forked: Any, tmp_path: Path, differences: Any
) -> None:
    place = tmp_path / "copy"
    shutil.copytree(made, place)
    shutil.rmtree(place / RUN / "stages" / "sft")
    before, checkpoint = 1, None
    while checkpoint is None:
        forked("run", "config.yaml", cwd=place, kill={"signals": ["SIGKILL"], "before": before}, timeout=60)
        checkpoint = next((place / RUN).glob("stages/sft/checkpoints/step-*"), None)
        before += 4
        assert before < 120
    how(checkpoint / name)
    ended = forked("run", "config.yaml", cwd=place, timeout=60)
    ended.assert_clean()
    assert ended.code == 0, ended.err
    assert "checkpoint" in ended.err
    assert differences(made / RUN, place / RUN) == []


# ---------------------------------------------------------------- the machine says no

LIMITS: dict[str, Any] = {
    "a file may not grow": {"limits": {"RLIMIT_FSIZE": 20_000}},
    "few files": {"limits": {"RLIMIT_NOFILE": 6}},
    "some files": {"limits": {"RLIMIT_NOFILE": 9}},
}


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_is_one_line_and_without_it_the_command_goes_on(
    name: str, made: Path, forked: Any, tmp_path: Path, differences: Any
) -> None:
    place = tmp_path / "copy"
    place.mkdir()
    shutil.copy(made / "config.yaml", place)
    ended = forked("run", "config.yaml", cwd=place, timeout=60, **LIMITS[name])
    ended.assert_refused()
    assert ended.code == 1, ended.err
    again = forked("run", "config.yaml", cwd=place, timeout=120)
    again.assert_clean()
    assert again.code == 0, again.err
    assert differences(made / RUN, place / RUN) == []


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 60 MB, mounted; skips where nothing can be."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() or os.system(f"mount -t tmpfs -o size=60m tmpfs {place} 2>/dev/null"):
        pytest.skip("mounts need root")
    yield place
    os.system(f"umount {place}")


def fill(disk: Path, until: Path) -> None:
    """Take all that is free, once `until` is there."""
    while not until.exists():
        time.sleep(0.001)
    with (disk / "filler").open("wb", buffering=0) as handle, contextlib.suppress(OSError):
        while True:
            handle.write(b"0" * 100_000)


def test_a_disk_that_is_too_small_is_said_before_anything_runs(
    disk: Path, made: Path, forked: Any, tmp_path: Path
) -> None:
    shutil.copy(made / "config.yaml", tmp_path)
    assert not os.system(f"mount -o remount,size=300k {disk}")
    ended = forked("run", "config.yaml", "--runs", disk, cwd=tmp_path, timeout=60)
    ended.assert_refused("Nothing was run")
    assert ended.code == 1
    assert not list(disk.glob("r/stages/*/model"))


def test_a_disk_that_fills_up_is_one_line_and_with_room_the_command_goes_on(
    disk: Path, made: Path, forked: Any, tmp_path: Path, differences: Any
) -> None:
    shutil.copy(made / "config.yaml", tmp_path)
    filling = threading.Thread(target=fill, args=(disk, disk / "r" / "stages" / "sft"), daemon=True)
    filling.start()
    ended = forked("run", "config.yaml", "--runs", disk, cwd=tmp_path, timeout=60)
    filling.join(5)
    ended.assert_refused("no space is left on the disk")
    assert ended.code == 1
    (disk / "filler").unlink()
    again = forked("run", "config.yaml", "--runs", disk, cwd=tmp_path, timeout=120)
    again.assert_clean()
    assert again.code == 0, again.err
    assert differences(made / RUN, disk / "r") == []


def test_a_read_only_place_is_one_line(made: Path, forked: Any, tmp_path: Path) -> None:
    place = tmp_path / "copy"
    place.mkdir()
    shutil.copy(made / "config.yaml", place)
    (place / "runs").write_text("a file where the folder belongs")
    forked("run", "config.yaml", cwd=place, timeout=60).assert_refused("runs")
    forked("run", "config.yaml", "--runs", "/proc/nowhere", cwd=place, timeout=60).assert_refused(
        "/proc/nowhere"
    )
    forked("run", "config.yaml", "--runs", "a" * 300, cwd=place, timeout=60).assert_refused("too long")
