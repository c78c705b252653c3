"""Several machines: what is run on each, what is said of one that fails, and two that are really one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import keel as keel_package
from keel.cli import consent, dashboard, doctor_ranks, ranks
from keel.cli import launch as launching
from keel.cli import main as command_line
from keel.cli.main import app
from keel.distributed import group, launch, nodes, records
from keel.distributed.launch import Node, Outcome
from keel.distributed.nodes import Host
from keel.distributed.records import Record
from keel.errors import UsageError

Differences = Callable[[Path, Path], list[str]]


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path


# ---------------------------------------------------------------- what is run where


def test_a_file_of_hosts(tmp_path: Path) -> None:
    path = tmp_path / "hosts.txt"
    path.write_text("# ours\nann@node-a slots=8\n\nnode-b   # without slots\n10.0.0.7 slots=4\n")
    assert nodes.read_hosts(path) == [Host("ann@node-a", 8), Host("node-b"), Host("10.0.0.7", 4)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node-a 8\n", r"hosts.txt:1: write \[user@\]host"),
        ("node-a slots=0\n", r"hosts.txt:1: write"),
        ("-oProxyCommand=x\n", r"hosts.txt:1: write"),
        ("node-a;rm\n", r"hosts.txt:1: write"),
        ("node-a\nann@node-a\n", "hosts.txt:2: ann@node-a stands there twice"),
        ("# none\n", "no host in it"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_none_of_hosts_is_refused(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "hosts.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=message):
        nodes.read_hosts(path)


def test_each_machine_has_its_ranks_and_all_know_where_they_meet() -> None:
    found = launching.parts([Host("ann@node-a", 8), Host("node-b"), Host("node-c")], 4, 29512)
    assert [str(part.node) for part in found] == [
        "0/16@node-a:29512", "8/16@node-a:29512", "12/16@node-a:29512",
    ]  # fmt: skip
    assert [part.ranks for part in found] == [8, 4, 4]
    assert Node.parse("8/16@node-a:29512") == found[1].node
    with pytest.raises(UsageError, match="how many ranks on node-b"):
        launching.parts([Host("node-a", 8), Host("node-b")], None, 29500)
    for wrong in ("8/8@a:1", "0/2@a", "0/2@a:70000", "a"):
        with pytest.raises(UsageError, match="write FIRST/OF@HOST:PORT"):
            Node.parse(wrong)


def test_a_dry_run_prints_what_would_be_run(
    data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config_file: Callable[..., Path]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth 1")
    monkeypatch.setenv("OPENAI_API_KEY", "hush")
    stage = {"kind": "sft", "model": "a/b", "data": str(data.demonstrations)}
    config_file(tmp_path / "c.yaml", {"tuned": stage})
    (tmp_path / "hosts.txt").write_text("node-a\nann@node-b\n")
    line = "launch c.yaml seed=3 --nodes hosts.txt --nproc 8 --name x --dry-run"
    one, other = CliRunner().invoke(app, line.split(), catch_exceptions=False).stdout.splitlines()
    assert one.startswith("ssh -o BatchMode=yes ")
    assert " node-a 'cd " in one
    assert " ann@node-b 'cd " in other
    assert "--nproc 8 --node 8/16@node-a:29500 --while-stdin" in other
    assert "-m keel run c.yaml seed=3 --runs runs --name x" in one
    assert "eth 1" in one
    assert "hush" not in one + other


def test_options_that_have_no_effect_are_refused(tmp_path: Path) -> None:
    config, hosts = tmp_path / "c.yaml", tmp_path / "hosts"
    config.write_text("name: c\nstages:\n  s: {kind: sft, model: m, data: d.jsonl}\n")
    hosts.write_text("node-a\n")
    for line, message in (
        ("run c.yaml --node 0/2@a:1", "--node needs --nproc"),
        ("run c.yaml --max-restarts 2", "--max-restarts needs --nproc"),
        ("run c.yaml --nproc 2 --node 0/2@a:1 --max-restarts 2", "whoever starts all machines"),
    ):
        words = line.split()
        at = {words[i]: words[i + 1] for i in range(2, len(words), 2)}
        with pytest.raises(UsageError, match=message):
            ranks.place_of(
                at.get("--node"), int(at["--nproc"]) if "--nproc" in at else None,
                int(at.get("--max-restarts", 0)),
            )  # fmt: skip
    for line, message in (
        ("doctor --nproc 2", "no effect without --distributed"),
        ("doctor m --distributed", "looks at machines, not at a model"),
        ("doctor --distributed --nproc 1", "nothing to try with one rank"),
        ("doctor --distributed --shared /no/such", "there is no such folder"),
        ("doctor --engine vllm", "--engine has no effect without --distributed"),
        ("doctor --distributed --api-key-env K", "--api-key-env has no effect without --engine"),
        ("doctor --distributed --engine gpu-box", "is no address"),
        ("doctor --ssh x", "--ssh has no effect without --distributed"),
        ("doctor --port 1", "--port has no effect without --distributed"),
        ("doctor --distributed --bench", "--bench and --threads have no effect with --distributed"),
        ("doctor --distributed --threads 2", "--bench and --threads have no effect with --distributed"),
        ("doctor --distributed --nodes h --node 0/2@a:1", "with --nodes leave it out"),
        ("doctor --distributed --ssh 'a", "No closing quotation"),
        (f"launch {config} --slurm --nproc 2 --ssh x", "--ssh has no effect with --slurm"),
        (f"launch {config} --slurm --nproc 2 --dry-run", "--dry-run has no effect with --slurm"),
        (f"launch {config} --slurm --nproc 2 --port 3", "--port has no effect with --slurm"),
        (f"launch {config} --slurm --nproc 1000", "at most 256 ranks"),
        (f"launch {config} --nodes {hosts} --nproc 2 --ssh 'a", "No closing quotation"),
    ):
        outcome = CliRunner().invoke(app, line.split())
        assert isinstance(outcome.exception, UsageError), line
        assert message in str(outcome.exception)


def test_a_run_that_fails_is_started_again_and_nothing_is_forgotten_twice() -> None:
    given: list[list[str]] = []

    def start(arguments: Any) -> Outcome:
        given.append(list(arguments))
        return Outcome(1, "rank 1 of 2 on h was killed") if len(given) < 3 else Outcome(0)

    assert ranks.again(start, ["run", "c.yaml", "--fresh"], 5) == Outcome(0)
    assert given == [["run", "c.yaml", "--fresh"], ["run", "c.yaml"], ["run", "c.yaml"]]
    for code, interrupted in ((2, False), (130, True), (3, False)):
        given.clear()
        ended = Outcome(code, "x", interrupted)
        assert ranks.again(lambda arguments, ended=ended: given.append(arguments) or ended, [], 5) == ended
        assert len(given) == 1
    given.clear()
    assert ranks.again(lambda arguments: given.append([]) or Outcome(1, "x"), [], 2).code == 1
    assert len(given) == 3


# ---------------------------------------------------------------- what is said of one that fails


def test_ranks_of_one_machine_are_named_by_their_numbers_among_all(tmp_path: Path) -> None:
    node = Node(2, 4, "node-a", 29500)
    killed = launch.outcome([1, -9], {2: Record(2, "b", "lost", "gone", 1, 0.0)}, tmp_path, node)
    assert killed.line.startswith("rank 3 of 4 on ")
    assert not killed.lost
    lost = {number: Record(number, "b", "lost", "the others do not answer", 1, 0.0) for number in (2, 3)}
    assert launch.outcome([1, 1], lost, tmp_path, node).lost
    assert not launch.outcome([1, 1], {n - 2: r for n, r in lost.items()}, tmp_path).lost


def local(name: str, text: str) -> tuple[Host, list[str]]:
    return Host(name), ["bash", "-c", text]


def test_the_machine_that_failed_first_ends_all_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose ranks only lost the others is not to blame, though it ended before."""
    shown: list[tuple[str, str, bool]] = []
    waiting = local("c", "trap '' TERM; cat; echo over")  # ends with its standard input
    lost = local("a", f"echo 'keel: rank 0 of 6 on a: the others do not answer' >&2; exit {nodes.LOST}")
    own = local("b", "sleep 0.3; echo 'keel: rank 3 of 6 on b: the disk is full' >&2; exit 1")
    started = time.monotonic()
    outcome = nodes.run([lost, own, waiting], lambda host, line, out: shown.append((host.name, line, out)))
    assert outcome == Outcome(1, "rank 3 of 6 on b: the disk is full")
    assert time.monotonic() - started < 5
    assert ("b", "keel: rank 3 of 6 on b: the disk is full", False) in shown
    assert nodes.run([local("a", "echo 1"), local("b", "true")], lambda *_: None) == Outcome(0)
    unreachable = nodes.run([local("a", "exit 255"), waiting], lambda *_: None)
    assert unreachable == Outcome(1, "a: ssh did not get there, or lost the connection: try `ssh a`")
    usage = nodes.run([local("a", "echo 'keel: no stage' >&2; exit 2"), waiting], lambda *_: None)
    assert usage == Outcome(2, "no stage")
    with pytest.raises(UsageError, match="there is no nossh here"):
        nodes.run([(Host("a"), ["nossh", "a"])], lambda *_: None)


def test_the_store_listens_where_the_other_ranks_are_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch's own listens on all interfaces."""

    def listens_at(port: int) -> list[str]:
        names = ("tcp", "tcp6")
        rows = [line.split() for name in names for line in Path(f"/proc/net/{name}").read_text().splitlines()]
        return [
            row[1].rpartition(":")[0] for row in rows if row[1].endswith(f":{port:04X}") and row[3] == "0A"
        ]

    store = launch.hold_store(None)
    assert listens_at(store.port) == ["0100007F"]
    with pytest.raises(UsageError, match=r"cannot be listened at .* choose another"):
        launch.hold_store(Node(0, 2, "127.0.0.1", store.port))
    # a name that leads to the loopback interface here leads others to another one
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    elsewhere = launch._listening(Node(0, 2, "node-a", 1024 + store.port % 60000))
    assert elsewhere.getsockname()[0] == "0.0.0.0"
    elsewhere.close()


# ---------------------------------------------------------------- SLURM


@pytest.fixture
def slurm_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs the script of a config with stand-ins for scontrol, srun and keel. codes: of each attempt, those
    that the launchers of the two machines end with. srun returns the highest of its tasks' codes, and keel
    leaves the code of a launcher that knows the cause."""
    monkeypatch.chdir(tmp_path)
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    script(stand_ins / "scontrol", "#!/bin/sh\nprintf 'node-a\\nnode-b\\n'\n")
    script(
        stand_ins / "srun",
        "#!/bin/bash\n"
        'echo "$*" > options\n'
        "while [[ $1 == --* ]]; do shift; done\n"
        "echo >> attempts\n"
        "highest=0\n"
        "for node in 0 1; do\n"
        '  code=0; SLURM_NODEID=$node "$@" >> said || code=$?\n'
        "  ((highest = code > highest ? code : highest))\n"
        "done\n"
        "exit $highest\n",
    )
    python = script(
        stand_ins / "python",
        f"#!{sys.executable}\n"
        "import json, os, sys\n"
        f"sys.path.insert(0, {str(Path(keel_package.__file__).parents[1])!r})\n"
        "from keel.distributed import records\n"
        "print(*sys.argv[1:], sep='|', end='|\\n')\n"
        "attempt = len(open('attempts').readlines()) - 1\n"
        "code = json.load(open('codes.json'))[attempt][int(os.environ['SLURM_NODEID'])]\n"
        "records.leave_code(os.environ[records.CODES], code)\n"
        "sys.exit(code)\n",
    )
    environment = {
        **os.environ, "PATH": f"{stand_ins}:{os.environ['PATH']}", "SLURM_JOB_ID": "20007",
        "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node-[a-b]",
    }  # fmt: skip

    def run(text: str, codes: list[list[int]]) -> subprocess.CompletedProcess[str]:
        job = script(tmp_path / "job.sh", text.replace(sys.executable, str(python)))
        (tmp_path / "codes.json").write_text(json.dumps(codes))
        return subprocess.run(["bash", str(job)], env=environment, capture_output=True, text=True, timeout=60)

    return run


def test_a_script_for_slurm_starts_one_launcher_a_machine_and_starts_it_again(
    tmp_path: Path, slurm_job: Callable[..., Any]
) -> None:
    """The first attempt fails, the second does not."""
    text = launching.slurm(["run", "my config.yaml", "--fresh"], Path("runs/demo"), "2", 4, 1)
    done = slurm_job(text, [[1, nodes.LOST], [0, 0]])
    subprocess.run(["bash", "-n", "job.sh"], check=True)
    assert "#SBATCH --nodes=2" in text
    assert "#SBATCH --job-name=keel-demo" in text
    assert done.returncode == 0, done.stderr
    assert "keel: starting again, 1 of at most 1 times" in done.stderr
    of_first, of_second, *again = (tmp_path / "said").read_text().splitlines()
    start = "-m|keel|run|my config.yaml|"
    assert of_first == f"{start}--fresh|--nproc|4|--node|0/8@node-a:20007|"
    assert of_second == f"{start}--fresh|--nproc|4|--node|4/8@node-a:20007|"
    assert again == [f"{start}--nproc|4|--node|{first}/8@node-a:20007|" for first in (0, 4)]
    assert not list((tmp_path / "runs" / "demo").iterdir())
    for wrong in ({"count": "hosts.txt", "nproc": 1}, {"count": "2", "nproc": None}):
        with pytest.raises(UsageError, match="--slurm"):
            launching.slurm([], Path("runs/demo"), restarts=0, **wrong)


@pytest.mark.parametrize(
    ("codes", "ended", "attempts"),
    [
        ([1, 130], 1, 2),  # a rank died on one machine, and somebody ended the launcher of the other
        ([nodes.LOST, 137], 137, 2),  # a launcher was killed
        ([nodes.LOST, 2], 2, 1),  # a wrong config, data that are missing
        ([3, nodes.LOST], 3, 1),  # it waits for people
        ([130, 130], 130, 1),
        ([nodes.LOST, 130], 130, 1),
    ],
)
def test_a_script_for_slurm_goes_by_the_machine_that_knows_the_cause(
    codes: list[int], ended: int, attempts: int, tmp_path: Path, slurm_job: Callable[..., Any]
) -> None:
    """Not by the highest code, which srun returns: that may be of a machine that was only ended."""
    text = launching.slurm(["run", "c.yaml"], Path("runs/my run"), "2", 4, 1)
    done = slurm_job(text, [codes] * 2)
    assert done.returncode == ended, done.stderr
    assert len((tmp_path / "attempts").read_text().splitlines()) == attempts
    assert "--kill-on-bad-exit=0" in (tmp_path / "options").read_text()


@pytest.mark.parametrize(("code", "left"), [(0, []), (1, ["1\n"]), (2, ["2\n"]), (130, []), (nodes.LOST, [])])
def test_a_launcher_leaves_the_code_of_a_cause_that_it_knows(
    code: int, left: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ranks do not: the folder is not in their environment."""
    monkeypatch.setenv(records.CODES, str(tmp_path))
    seen: list[bool] = []
    monkeypatch.setattr(
        command_line.boundary, "guarded", lambda work: seen.append(records.CODES in os.environ) or code
    )
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert (ended.value.code, seen) == (code, [False])
    assert [file.read_text() for file in tmp_path.iterdir()] == left


# ---------------------------------------------------------------- ranks that somebody else has started


@pytest.mark.parametrize("answer", ["y", "n"])
def test_of_torchruns_ranks_the_first_one_asks_and_the_others_go_by_what_it_is_told(
    answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank after the other in this process; a mapping stands for torch's store."""
    asked: list[bool] = []

    def asks(place: Path, settings: Any, given: bool) -> None:
        asked.append(group.is_first())
        if answer == "n":
            raise UsageError("nothing was run")

    class Store(dict[str, bytes]):
        set, check, get = dict.__setitem__, lambda self, keys: keys[0] in self, dict.__getitem__

    monkeypatch.setattr(consent, "to_run", asks)
    store = Store()
    for rank in (0, 1):
        monkeypatch.setattr(group, "_group", group.Group(rank, 2, store=store))
        monkeypatch.setattr(group, "_words", 0)
        with (
            contextlib.nullcontext() if answer == "y" else pytest.raises(UsageError, match="nothing was run")
        ):
            consent.of_first(tmp_path, Any, False)
    assert asked == [True]


def test_of_torchruns_ranks_the_first_one_opens_the_dashboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    monkeypatch.setattr(
        dashboard, "beside", lambda run, say, keep: opened.append(run) or contextlib.nullcontext()
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        with command_line._watched(tmp_path, True, False):
            assert opened == ([] if rank == "1" else [tmp_path])


def test_one_rank_is_started_again_too(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--nproc 1 --max-restarts N` is watched by a launcher, as more ranks are."""
    started: list[tuple[Any, ...]] = []

    def start(command: Any, size: int, environment: Any, node: Any) -> Outcome:
        started.append((command, size, dict(environment), node))
        return Outcome(1, "rank 0 of 1 on h was killed") if len(started) < 3 else Outcome(0)

    asked: list[Any] = []
    monkeypatch.setattr(consent, "of_first", lambda *about: asked.append(about))
    monkeypatch.setattr(launch, "run", start)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    line = ["run", str(config), "--runs", str(tmp_path), "--nproc", "1"]
    outcome = CliRunner().invoke(app, [*line, "--max-restarts", "2"])
    assert outcome.exit_code == 0, outcome.output
    assert [(size, environment, node) for _, size, environment, node in started] == [(1, {}, None)] * 3
    assert len(asked) == 1


# ---------------------------------------------------------------- what the doctor makes of it


def measured(**more: Any) -> dict[str, Any]:
    rank = {
        "python": "3.11", "torch": "2.13", "keel": "0.2", "cards": 0, "interface": None, "time": 100.0,
        "address": "10.0.0.1",
    }  # fmt: skip
    return {
        "backend": "gloo", "seconds_to_join": 0.5, "shared": None,
        "ranks": [{**rank, "rank": 0, "host": "a"}, {**rank, "rank": 1, "host": "b"}],
        "reductions": [{"bytes": 2**25, "seconds": 0.03, "bytes_per_second": 1e9, "wrong": 0}],
        **more,
    }  # fmt: skip


def test_the_doctor_says_what_to_mend() -> None:
    assert all(check.ok for check in doctor_ranks.of_measured(measured()))
    ill = measured(
        reductions=[{"bytes": 2**25, "seconds": 9.0, "bytes_per_second": 4e6, "wrong": 0}],
        shared={"folder": "/s", "failed": {"1": "it does not see the file of rank 0"}, "seconds": 10.0,
                "locks": True, "free_bytes": 0},
    )  # fmt: skip
    ill["ranks"][1] |= {"torch": "2.6", "time": 400.0, "address": "127.0.1.1"}
    found = {check.name: check for check in doctor_ranks.of_measured(ill) if not check.ok}
    assert set(found) == {"versions", "clocks", "names", "all-reduce of 32 MiB", "shared folder"}
    assert all(check.mend for check in found.values())
    assert "torch 2.13 on a, 2.6 on b" in found["versions"].found
    assert "GLOO_SOCKET_IFNAME" in found["names"].mend
    assert "/s, rank 1: it does not see" in found["shared folder"].found
    unlocked = measured(
        shared={"folder": "/s", "failed": {}, "seconds": 0.0, "locks": False, "free_bytes": 2**40}
    )
    assert [c.name for c in doctor_ranks.of_measured(unlocked) if not c.ok] == ["locks"]


# ---------------------------------------------------------------- two machines that are one


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    """Options of two machines, both this one, reached by a stand-in for ssh."""
    (tmp_path / "hosts.txt").write_text("localhost\nann@127.0.0.1\n")
    ssh = script(tmp_path / "ssh", '#!/bin/sh\nshift\nexec sh -c "$*"\n')
    return ["--nodes", str(tmp_path / "hosts.txt"), "--ssh", str(ssh)]


def keel(*arguments: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "keel", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.fixture
def config(tmp_path: Path, all_kinds: dict[str, Any], config_file: Callable[..., Path]) -> Path:
    stage = {**all_kinds["tuned"], "max_steps": 6, "save_every": 1, "batch_size": 4}
    return config_file(tmp_path / "config.yaml", {"tuned": stage}, distributed={"timeout": 20})


@pytest.mark.ranks
def test_two_machines_leave_the_bytes_of_one_with_as_many_ranks(
    config: Path, two: list[str], tmp_path: Path, differences: Differences
) -> None:
    done = keel("launch", config, *two, "--nproc", 1, "--port", 29611, "--runs", tmp_path, "--name", "two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "localhost | report: " in done.stdout
    assert "ann@127.0.0.1 | " not in done.stdout  # the first rank alone speaks
    one = keel("run", config, "--nproc", 2, "--runs", tmp_path, "--name", "one")
    assert one.returncode == 0, one.stderr[-3000:]
    assert differences(tmp_path / "one", tmp_path / "two") == ["config.yaml"]  # which holds its name


@pytest.mark.ranks
def test_a_rank_that_is_killed_on_one_machine_ends_both_and_the_restart_goes_on(
    config: Path, two: list[str], tmp_path: Path, differences: Differences
) -> None:
    command = [sys.executable, "-m", "keel", "launch", str(config), *two, "--nproc", "1", "--port", "29612"]
    command += ["--runs", str(tmp_path), "--name", "killed", "--max-restarts", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    log, until = tmp_path / "killed" / "stages" / "tuned" / "metrics.jsonl", time.monotonic() + 120
    while not (log.exists() and log.read_text()) and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(_rank_of("killed", "1"), signal.SIGKILL)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said[-3000:]
    assert "keel: rank 1 of 2 on " in said
    assert "SIGKILL" in said
    assert "keel: starting again, 1 of at most 1 times" in said
    assert "going on after step" in said
    one = keel("run", config, "--nproc", 2, "--runs", tmp_path, "--name", "one")
    assert one.returncode == 0, one.stderr[-3000:]
    assert differences(tmp_path / "one", tmp_path / "killed") == ["config.yaml"]


def _rank_of(name: str, rank: str) -> int:
    """The process of a run that has this rank."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if name.encode() in words and f"RANK={rank}".encode() in environment:
            return int(folder.name)
    raise AssertionError(f"no rank {rank}")


@pytest.mark.ranks
def test_the_doctor_tries_both_machines(two: list[str], tmp_path: Path) -> None:
    found = keel(
        "doctor", "--distributed", "--nproc", 1, *two, "--port", 29613, "--shared", tmp_path, "--json"
    )
    assert found.returncode == 0, found.stderr[-3000:]
    facts = json.loads(found.stdout)
    assert facts["ok"]
    assert len(facts["measured"]["ranks"]) == 2
    assert {c["name"] for c in facts["checks"]} >= {"process group", "all-reduce of 32 MiB", "shared folder"}
    assert facts["measured"]["reductions"][-1]["bytes_per_second"] > 0
    assert not list(tmp_path.glob(".keel-doctor-*"))


@pytest.mark.ranks
def test_the_doctor_tells_of_ranks_that_do_not_meet_and_of_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        found = keel("doctor", "--distributed", "--port", port, "--json")
        assert found.returncode == 1
        bad = [check for check in json.loads(found.stdout)["checks"] if not check["ok"]]
        assert [check["name"] for check in bad] == ["port"]
        assert "--port" in bad[0]["mend"]
        refused = keel("run", tmp_path / "c.yaml", "--nproc", 1, "--node", f"0/2@localhost:{port}")
        assert refused.returncode == 2


@pytest.mark.ranks
@pytest.mark.parametrize("count", [1, 2])
def test_ranks_on_one_machine_are_started_again(
    count: int, config: Path, tmp_path: Path, differences: Differences
) -> None:
    command = [sys.executable, "-m", "keel", "run", str(config), "--nproc", str(count)]
    command += ["--runs", str(tmp_path)]
    command += ["--name", "again", "--max-restarts", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    log, until = tmp_path / "again" / "stages" / "tuned" / "metrics.jsonl", time.monotonic() + 120
    while not (log.exists() and log.read_text()) and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(_rank_of("again", "0"), signal.SIGKILL)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said[-3000:]
    assert said.count("keel: starting again") == 1
    one = keel("run", config, "--nproc", count, "--runs", tmp_path, "--name", "one")
    assert one.returncode == 0
    assert differences(tmp_path / "one", tmp_path / "again") == ["config.yaml"]
