"""What memory a process may take, by the machine, its control groups and the ranks beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from keel.accel import cpu_linear, processor


def written(root: Path, limits: dict[str, str]) -> Path:
    for name, limit in limits.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{limit}\n")
    return root


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/\n", {"memory.max": "4096"}, 4096),  # as a container sees it
        ("0::/job/step\n", {"job/memory.max": "8192", "job/step/memory.max": "max"}, 8192),  # Slurm
        ("0::/job/step\n", {"job/memory.max": "8192", "job/step/memory.max": "512"}, 512),
        (
            "5:memory:/slurm/uid_0\n1:cpu:/\n",
            {
                "memory/memory.limit_in_bytes": str(2**63 - 4096),
                "memory/slurm/memory.limit_in_bytes": "7000",
                "memory/slurm/uid_0/memory.limit_in_bytes": "9000",
            },
            7000,
        ),
        ("0::/job\n", {"job/memory.max": "max"}, None),
        (None, {}, None),
    ],
)
def test_the_least_limit_of_all_groups_that_a_process_stands_in_counts(
    groups: str | None, limits: dict[str, str], expected: int | None, tmp_path: Path
) -> None:
    root, named = written(tmp_path / "fs", limits), tmp_path / "cgroup"
    if groups is not None:
        named.write_text(groups)
    assert min(processor._granted(root, named), default=None) == expected


def test_ranks_on_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "_memory", lambda: 2**40)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = cpu_linear.packed_at_most(32)
    assert alone == 2**37
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert cpu_linear.packed_at_most(32) == alone // 4
    assert cpu_linear.packed_at_most(31) == cpu_linear.PACKED_AT_MOST
