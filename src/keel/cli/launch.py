"""`keel launch`: one config on several machines, by ssh or by SLURM. Each machine runs `keel run --nproc N
--node …`, which anybody may type there as well."""

from __future__ import annotations

import os
import re
import shlex
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from keel.api.terminal import show
from keel.cli import ranks
from keel.cli.progress import say
from keel.distributed import nodes, records
from keel.distributed.launch import Node, Outcome
from keel.distributed.nodes import Host
from keel.errors import UsageError

# what a machine is told of this one's environment; keys of APIs are not: a command line is no place for them
TOLD = ("PYTHONPATH", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "HF_HOME", "HF_HUB_OFFLINE", "KEEL_ACCEL")
TOLD_PREFIXES = ("NCCL_", "GLOO_", "TORCH_NCCL_")
_PLAIN = re.compile(r"[\w.:-]+")


@dataclass(frozen=True, slots=True)
class Part:
    """What one machine does."""

    host: Host
    ranks: int
    node: Node


def parts(hosts: Sequence[Host], nproc: int | None, port: int) -> list[Part]:
    """The ranks of each machine, in the order of the file. UsageError where nobody says how many."""
    counts: list[int] = []
    for host in hosts:
        if (count := host.ranks or nproc) is None:
            raise UsageError(
                f"how many ranks on {host.name}? Give --nproc N, or slots=N in the file of hosts"
            )
        if count > ranks.LARGEST:
            raise UsageError(f"{count} ranks on {host.name}: at most {ranks.LARGEST} on one machine")
        counts.append(count)
    total, meet = sum(counts), hosts[0].address
    firsts = [sum(counts[:number]) for number in range(len(counts))]
    return [
        Part(host, count, Node(first, total, meet, port))
        for host, count, first in zip(hosts, counts, firsts, strict=True)
    ]


def commands(
    found: Sequence[Part], arguments: Sequence[str], ssh: Sequence[str] | None = None
) -> list[tuple[Host, list[str]]]:
    """What is run here for each machine. arguments: of keel, without those that say which machine it is."""
    return [
        (
            part.host,
            nodes.remote(part.host, Path.cwd(), told(os.environ), _on(part, arguments), ssh or nodes.SSH),
        )
        for part in found
    ]


def _on(part: Part, arguments: Sequence[str]) -> list[str]:
    place = ["--nproc", str(part.ranks), "--node", str(part.node), "--while-stdin"]
    return [sys.executable, "-m", "keel", *arguments, *place]


def told(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that other machines are told."""
    return {
        name: value for name, value in environment.items() if name in TOLD or name.startswith(TOLD_PREFIXES)
    }


def run(
    found: Sequence[Part],
    arguments: Sequence[str],
    ssh: Sequence[str] | None = None,
    restarts: int = 0,
    *,
    plain: bool = False,
) -> Outcome:
    """Run keel with these arguments on all machines, their output behind their names. restarts: as of
    `ranks.again`. plain: what the first one writes on standard output stands alone there."""
    lock, first = threading.Lock(), found[0].host

    def tell(host: Host, line: str, is_output: bool) -> None:
        with lock:
            if is_output and plain and host is first:
                show(line)
            else:
                show(f"{host.name} | {line}", sys.stdout if is_output and not plain else sys.stderr)

    return ranks.again(lambda given: nodes.run(commands(found, given, ssh), tell), arguments, restarts)


def ended(outcome: Outcome) -> int:
    """The exit code, with one line on stderr for what went wrong."""
    if outcome.code:
        say(f"keel: {outcome.line}")
    return outcome.code


def words(ssh: str) -> list[str]:
    """The words of `--ssh`. UsageError for a quote that does not end."""
    try:
        return shlex.split(ssh)
    except ValueError as error:
        raise UsageError(f"--ssh {ssh}: {error}: write a command as a shell reads it") from None


def hosts_of(given: str | None) -> list[Host]:
    """Of the file that `--nodes` names."""
    if given is None:
        raise UsageError("--nodes FILE: a file with one host a line")
    return nodes.read_hosts(Path(given))


# ---------------------------------------------------------------- SLURM

_SCRIPT = """\
#!/bin/bash
# Made by `keel launch --slurm`. Submit it: sbatch job.sh
# Add what your site asks for (--partition, --account); without cards take --gpus-per-node out.
#SBATCH --job-name={job}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={ranks}
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
set -euo pipefail

cd {folder}
ranks={ranks}      # on each machine
restarts={restarts}   # of a job one of whose ranks fails; it goes on from the last checkpoint
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))
command=({command})

for ((attempt = 0; ; attempt++)); do
  # One task a machine: it starts the ranks there and watches them. None is ended for another's sake, since
  # ranks that lose the others end by themselves. srun returns the highest code, be it of a machine that only
  # lost the others; so each one that knows the cause leaves its own code in a file.
  code=0 codes={directory}/slurm-$SLURM_JOB_ID-$attempt
  rm -rf -- "$codes" && mkdir -p -- "$codes"
  RANKS="$ranks" MEET="$first:$port" {codes}="$codes" srun --kill-on-bad-exit=0 --cpu-bind=none \\
    bash -c 'exec "$@" --nproc "$RANKS" --node "$((SLURM_NODEID * RANKS))/$((SLURM_NNODES * RANKS))@$MEET"' \\
    keel "${{command[@]}}" || code=$?
  cause=$(cat -- "$codes"/* 2> /dev/null | sort -n | tail -n 1) || true
  rm -rf -- "$codes"
  if ((code)); then code=${{cause:-$code}}; fi
  # 0: done. 2: bad usage, config or data. 3: it waits for people. 130: interrupted.
  case "$code" in 0 | 2 | 3 | 130) exit "$code" ;; esac
  if ((attempt >= restarts)); then exit "$code"; fi
  echo "keel: starting again, $((attempt + 1)) of at most $restarts times" >&2{fresh}
done
"""


def slurm(
    arguments: Sequence[str], directory: Path, count: str | None, nproc: int | None, restarts: int
) -> str:
    """A script for sbatch that runs keel with these arguments on `count` machines. directory: the run's,
    which all of them see."""
    if count is not None and not re.fullmatch(r"[1-9]\d{0,3}", count):
        raise UsageError(f"--nodes {count} with --slurm: give a number of machines; SLURM chooses which")
    if nproc is None:
        raise UsageError("--slurm needs --nproc N: the ranks (cards) of each machine")
    if nproc > ranks.LARGEST:
        raise UsageError(f"--nproc {nproc}: at most {ranks.LARGEST} ranks on one machine")
    again = "\n  command=({})".format(
        shlex.join([sys.executable, "-m", "keel", *(a for a in arguments if a != ranks.FRESH)])
    )
    return _SCRIPT.format(
        job=f"keel-{directory.name}" if _PLAIN.fullmatch(directory.name) else "keel",
        nodes=count or "1",
        ranks=nproc,
        restarts=restarts,
        folder=shlex.quote(str(Path.cwd())),
        directory=shlex.quote(str(directory)),
        codes=records.CODES,
        command=shlex.join([sys.executable, "-m", "keel", *arguments]),
        fresh=again if ranks.FRESH in arguments else "",
    )
