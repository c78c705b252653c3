"""Checkpoints of weights that are cut over ranks: each rank writes its parts, another number of ranks reads
them, and nothing in them is run."""

from __future__ import annotations

import io
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from keel.distributed import launch, parts

RANK = """
import sys, time
from pathlib import Path
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from keel.distributed import group
from keel.rundir.stage_run import StageRun

def wholes():
    numbers = torch.Generator().manual_seed(5)
    # of uneven rows, of fewer rows than ranks, of one row, in half precision
    sizes = {"even": (12, 3), "uneven": (7, 2), "few": (2,), "one": (1, 4)}
    found = {name: torch.randn(size, generator=numbers) for name, size in sizes.items()}
    return {**found, "half": torch.randn(5, 2, generator=numbers).bfloat16()}

def state(cut):
    return {
        "policy": {name: cut(x) for name, x in wholes().items()},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": cut(wholes()["uneven"] * 2)}},
                      "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0]}]},
        "best": None,
    }

class Like:
    __call__ = lambda self, path, tensor: tensor
    def __init__(self, cut): self.tensors = {n: cut(x * 0) for n, x in wholes().items()}
    def like(self, path):
        return self.tensors[path[1] if path[0] == "policy" else "uneven"]

run = StageRun("s", Path(sys.argv[1]), 0, torch.device("cpu"), str, None)
(run.directory).mkdir(exist_ok=True)

def same(one, other):
    if isinstance(one, torch.Tensor):
        full = other.full_tensor() if isinstance(other, DTensor) else other
        assert full.dtype == one.dtype and torch.equal(full, one)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one: same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other): same(a, b)
    else:
        assert one == other

slow = sys.argv[2] == "slow"
with group.joined("cpu", sys.argv[3], 10 if slow else 30):
    if slow and not group.is_first():  # its disk is, for longer than a collective may take
        reading = FileSystemReader.read_data
        FileSystemReader.read_data = lambda *given: (time.sleep(14), reading(*given))[1]
    mesh = init_device_mesh("cpu", (group.size(),)) if group.size() > 1 else None
    cut = lambda x: distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None)
    if sys.argv[2] == "write":
        run.save(4, state(cut), {"seen": 7})
    else:
        place = Like(cut) if group.is_sharded() else None
        found = run.restore(place)
        if sys.argv[2] == "broken":
            assert found is None
        else:
            assert found.step == 4 and found.values == {"seen": 7}
            if place is not None:
                assert all(isinstance(x, DTensor) for x in found.tensors["policy"].values())
            same(state(lambda x: x), found.tensors)
"""
WHOLE = """
import errno, resource, signal, sys
from pathlib import Path
import torch
from torch.distributed.tensor import DTensor
from keel.distributed import group, sharded
from keel.rundir import machine_faults
from keel.rundir.stage_run import StageRun

run = StageRun("s", Path(sys.argv[1]), 0, torch.device("cpu"), str, None)
run.directory.mkdir(exist_ok=True)

def plain(value):
    if isinstance(value, dict): return {key: plain(item) for key, item in value.items()}
    return value.full_tensor() if isinstance(value, DTensor) else value

with group.joined("cpu", sys.argv[3], 30):
    torch.manual_seed(3)
    model = torch.nn.Linear(3, 5)
    if group.is_sharded(): sharded.shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    if sys.argv[2] == "write":
        for _ in range(2):
            model(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
        run.save(2, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "best": None})
    else:
        placed = sharded.Placing({"model": model, "best": model}, {"optimizer": optimizer})
        found = run.restore(placed)
        model.load_state_dict(found.tensors["model"])
        optimizer.load_state_dict(found.tensors["optimizer"])
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "best": None}
        told = plain(state)
        if group.is_first(): torch.save(told, sys.argv[4])
        if sys.argv[2] == "full":
            if not group.is_first():
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900))
            try:
                run.save(found.step + 1, state)
                raise AssertionError("it was written")
            except Exception as error:
                told = str(error) if group.is_first() else str(machine_faults.explain(error))
                assert ("rank 1 of 2: " if group.is_first() else "limit on the size") in told, repr(error)
        else:
            run.save(found.step + 1, state)
"""
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


def on_ranks(ranks: int, script: Path, *arguments: object) -> None:
    command = [sys.executable, str(script), *map(str, arguments)]
    outcome = launch.run(command, ranks, {**ENVIRONMENT, "KEEL_TRACEBACK": "1"})
    assert outcome.code == 0, outcome.line


@pytest.mark.ranks
def test_what_two_ranks_write_is_read_by_any_number_and_a_broken_part_is_found(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    run = tmp_path / "run"
    on_ranks(2, script, run, "write", "fsdp")
    (folder,) = (run / "checkpoints").iterdir()
    written = {path.name: path.read_bytes() for path in (folder / "parts").iterdir()}
    assert sorted(written) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    assert json.loads((folder / "values.json").read_text())["parts"].keys() == written.keys()
    on_ranks(2, script, tmp_path / "again", "write", "fsdp")
    other = next((tmp_path / "again" / "checkpoints").iterdir()) / "parts"
    assert written == {path.name: path.read_bytes() for path in other.iterdir()}
    for ranks, strategy in ((1, "ddp"), (3, "fsdp"), (2, "fsdp"), (2, "ddp")):
        on_ranks(ranks, script, run, "read", strategy)
    on_ranks(2, script, run, "slow", "fsdp")
    for (name, content), ranks in zip(written.items(), (1, 2, 1)):
        (folder / "parts" / name).write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        if ranks == 2:
            (folder / "parts" / name).unlink()
        on_ranks(ranks, script, run, "broken", "fsdp")
        (folder / "parts" / name).write_bytes(content)
    on_ranks(1, script, run, "read", "ddp")


@pytest.mark.ranks
def test_a_whole_checkpoint_is_gone_on_with_in_parts_and_a_full_disk_of_one_rank_costs_none(
    tmp_path: Path,
) -> None:
    """A whole one is what earlier versions of keel left, and what a run with ddp leaves."""
    script, run, told = tmp_path / "rank.py", tmp_path / "run", [tmp_path / f"{i}.pt" for i in range(4)]
    script.write_text(WHOLE)
    on_ranks(1, script, run, "write", "ddp")
    (begun,) = (run / "checkpoints").iterdir()
    assert sorted(path.name for path in begun.iterdir()) == ["tensors.pt", "values.json"]
    expected = torch.load(begun / "tensors.pt")
    for number, (ranks, strategy, what) in enumerate(
        [(2, "fsdp", "go on"), (2, "fsdp", "full"), (2, "ddp", "go on"), (1, "ddp", "go on")]
    ):
        on_ranks(ranks, script, run, what, strategy, told[number])
        found = torch.load(told[number])
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        (left,) = (run / "checkpoints").iterdir()  # nothing begun, and nothing older
        assert left.name == f"step-{3 + number - (number > 0):06d}"
        assert (left / "parts").exists() == (number < 2)


class Evil:
    def __reduce__(self) -> Any:
        return print, ("run",)


@pytest.mark.parametrize("evil", [Evil(), Path("/"), io.StringIO, json.loads])
def test_an_index_of_parts_runs_nothing(evil: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(pickle.UnpicklingError, match="an index of parts holds no"):
        parts._Index(io.BytesIO(pickle.dumps({"storage_data": evil}))).load()
    assert capsys.readouterr().out == ""


def test_a_state_that_nobody_has_cut_is_left_as_it_is() -> None:
    state = {"model": {"w": 1}, "groups": [{"betas": (0.9, 0.99)}], "best": None}
    assert parts.split(state) == (state, {})
    assert parts.read(Path("nowhere"), state, lambda path: None) is state
