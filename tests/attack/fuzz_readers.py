"""Coverage-guided fuzzing of what reads other people's files, with atheris (libFuzzer).

    python tests/attack/fuzz_readers.py [data config votes run] --minutes 10 [--out build/fuzz]

A reader may refuse what it is given, with one of keel's errors in a few lines, and nothing else: any other
exception, a hang over 20 s and memory over 4 GB are findings. An input of each kind of finding (its exception
and the line of keel that raised it) is kept under OUT/TARGET/found; what covers new branches is kept under
OUT/TARGET/corpus, from which the next run goes on. Exit code 3 where anything was found.

`test_fuzz_found.py` reads every input that was ever found, without atheris.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

LONGEST_MESSAGE = 6000  # characters of a refusal; a config may list many keys
SECONDS, MEGABYTES = 20, 4096
GOOD = {"prompt": "a?", "completion": " b."}
PAIR = {"prompt": "a?", "chosen": " b", "rejected": " c"}
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SCORED = {"response": "b", "annotations": {"helpful": {"Rating": "3"}}}
RANKED = {"role": "assistant", "text": "b", "rank": 0}
PICKED = {"result": [{"type": "pairwise", "value": {"selected": "left"}}]}
VOTED = {"replies": [{"text": "b"}, {"text": "c"}], "votes": [{"person": "p", "choice": "a"}]}
ROWS: tuple[list[dict[str, Any]], ...] = (
    [GOOD, {**GOOD, "source": "x", "n": [1, {"a": None}]}],
    [{**PAIR, "votes": {"chosen": 2, "tie": 1}, "margin": 0.5}, PAIR],
    [{**PAIR, "votes": [{"annotator": "x", "choice": "chosen"}], "p_chosen": 1.0}],
    [{**GOOD, "label": True}, {**GOOD, "label": 0}],
    [{"messages": TURNS, "tools": [], "chat_template_kwargs": {"a": 1}}],
    [{"messages": [TURNS[0], {**TURNS[1], "weight": 0}]}],
    [{"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": [{"role": "assistant", "content": "c"}]}],
    [{"text": "a b"}, {"text": "c"}],
    [{"prompt": "a", "completions": ["b", "c"], "ranks": [1, 2]}],
    [{"prompt": "a", "answers": [{"answer": "b", "rank": 1}, {"answer": "c", "rank": 2.0}]}],
    [{"question": "a", "answer_0": "b", "answer_1": "c", "score_0": 1, "score_1": -1}],
    [{"instruction": "a", "completions": [SCORED, {**SCORED, "response": "c"}]}],
    [{"message_tree_id": "1", "prompt": {"role": "prompter", "text": "a", "replies": [RANKED]}}],
    [{"data": {"prompt": "a", "answer1": "b", "answer2": "c"}, "annotations": [PICKED]}],
    [{"conversation_a": TURNS, "conversation_b": TURNS, "winner": "model_a", "turn": 1, "judge": "x"}],
    [{"key": "k", "prompt": "a", **VOTED}],
)
SUFFIXES = (".jsonl", ".json", ".csv", ".txt", ".parquet", ".jsonl.gz", ".csv.gz")
CONFIG = """name: a
seed: 1
rounds: null
stages:
  sft: {kind: sft, model: {path: m, chat_template: null}, data: [{source: d.jsonl, rows: 3}], lr: 1e-5}
  reward: {kind: reward, model: sft, data: pairs.jsonl, members: 2, lora: {r: 8}}
  ppo: {kind: ppo, model: sft, reward: reward, data: p.jsonl, kl: {coef: 0.1, target: 6}}
  grpo: {kind: grpo, model: sft, reward: [{kind: regex, pattern: a}], data: p.jsonl, clip_high: 0.3}
  dpo: {kind: dpo, model: sft, data: pairs.jsonl, loss: simpo, gamma: 0.5}
  judge: {kind: evaluate, models: [sft, ppo], reward: reward, gold: world:helpdesk, data: p.jsonl}
"""
RUN_FILES = (
    *("config.yaml", "manifest.json", "stages/ppo/stage.json", "stages/ppo/metrics.jsonl"),
    *("stages/ppo/samples.jsonl", "stages/ppo/events.jsonl", "stages/ppo/fingerprint", ".lock"),
    *("stages/judge/samples.jsonl", "stages/judge/result.json", "stages/reward/result.json"),
)
WORDS = r"""
prompt completion chosen rejected label text messages role content votes annotator choice margin
p_chosen tool_calls weight NaN -Infinity 1e999 \ud800 null true [[[[ {"a": kind stages model models
reward data source init !!int !!pairs &a *a <<: 2026-02-31 .inf 0x mean low high step event finding
rollback checks fingerprint reference calibration bins best_of rounds
"""


# ---------------------------------------------------------------- targets: bytes in, keel's errors out


def read_data(content: bytes, folder: Path) -> None:
    """The first byte says in which form the rest is, the second how it is read."""
    from keel.data import load
    from keel.errors import KeelError
    from keel.types import DataSource

    form, how, rest = content[:1] or b"\0", content[1:2] or b"\0", content[2:]
    suffix = SUFFIXES[form[0] % len(SUFFIXES)]
    path = folder / f"rows{suffix}"
    path.write_bytes(gzip.compress(rest, 1, mtime=0) if suffix.endswith(".gz") and how[0] & 8 else rest)
    kinds: Any = ("preference", "unpaired", "demonstration", "text", "prompt")
    source = DataSource(
        str(path),
        on_bad="skip" if how[0] & 1 else "error",
        ties="keep" if how[0] & 2 else "skip",
        system="s" if how[0] & 4 else None,
    )
    kinds = kinds[how[0] >> 4 & 3 :]
    try:
        found = load.load([source], kinds, 0)
    except KeelError as error:
        check_refusal(error)
        return
    assert len(found.records) or found.skipped, "no row and no word"
    load.summary(found)
    for record in found.records:
        values = [
            getattr(record, name, "a") for name in ("text", "prompt", "completion", "chosen", "rejected")
        ]
        assert all(value.strip() and value.encode() for value in values if isinstance(value, str))


def read_config(content: bytes, folder: Path) -> None:
    """YAML, then overrides, each behind a NUL. What is accepted can be written out and read again."""
    import yaml

    from keel import config
    from keel.errors import UsageError
    from keel.pipeline.pipeline import resolved

    text, *overrides = content.split(b"\0")
    path = folder / "config.yaml"
    path.write_bytes(text)
    try:
        found = config.read(path, [one.decode("utf-8", "replace") for one in overrides[:4]])
    except UsageError as error:
        check_refusal(error)
        return
    again = config.parse(yaml.safe_load(yaml.safe_dump(resolved(found))))
    assert again == found, "what was written out is another config"


def read_votes(content: bytes, folder: Path) -> None:
    """Items and votes of any tool's form; the first byte says of which."""
    from keel.errors import KeelError
    from keel.feedback import formats

    form, rest = content[:1] or b"\0", content[1:]
    path = folder / f"votes{(*formats.SUFFIXES,)[form[0] % 3]}"
    path.write_bytes(rest)
    named = (None, *formats.READS)[form[0] // 3 % (1 + len(formats.READS))]
    if named == "potato":
        named = None
    try:
        labels = formats.read(path, format=named)
    except KeelError as error:
        check_refusal(error)
        return
    for to in formats.WRITES:
        try:
            for row in formats.rows_of(labels, to):
                formats.line_of(row)
        except KeelError as error:
            check_refusal(error)


def read_run(content: bytes, folder: Path) -> None:
    """A run directory in which one file is the rest of the input; the first byte says which, and whether the
    page is made, which takes longest."""
    from keel.cli import diagnose
    from keel.diagnosis import logs
    from keel.errors import KeelError
    from keel.report import page, reading, summary
    from keel.report.notes import Notes
    from keel.rundir import kept, run_status, stage_files, worker

    name = RUN_FILES[(content[:1] or b"\0")[0] % len(RUN_FILES)]
    run = folder / "run"
    if not run.exists():
        made_up_run(run)
    path = run / name
    before = path.read_bytes() if path.exists() else None
    path.write_bytes(content[1:])
    try:
        with mock.patch.object(page, "get_plotlyjs", str):  # four megabytes a page
            text = page.render(reading.read(run, Notes(strict=False))) if content[:1] >= b"\x80" else ""
        lines = summary(run)
        assert len(text) < 10_000_000, "the page is too long"
        assert len(lines) < 2_000_000, "the summary is too long"
        text.encode("utf-8", "backslashreplace")
        for facts in run_status.manifest(run).items():
            run_status.status(run, *facts)
        run_status.results(run)
        worker.worker(run)
        list(kept.listed(run))
        stage_files.read_mark(run / "stages" / "ppo")
        for show in (lambda: reading.read(run), lambda: diagnose.diagnose(run), lambda: logs.lines(path)):
            try:
                show()
            except KeelError as error:
                check_refusal(error)
    except KeelError as error:
        check_refusal(error)
    finally:
        if before is None:
            path.unlink()
        else:
            path.write_bytes(before)


TARGETS: dict[str, Callable[[bytes, Path], None]] = {
    "data": read_data,
    "config": read_config,
    "votes": read_votes,
    "run": read_run,
}


def check_refusal(error: Exception) -> None:
    assert str(error).strip(), "refused without a word"
    assert len(str(error)) < LONGEST_MESSAGE, "a refusal as long as a book"
    assert "Traceback" not in str(error)


def made_up_run(run: Path) -> None:
    """A small run of three stages."""
    measure = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    models = {name: {"gold": measure, "proxy": measure, "kl": measure} for name in ("sft", "ppo")}
    bins = [{"confidence": 0.6, "share": measure}]
    rows = [
        {"step": i, "objective/kl": i * 0.1, "objective/scores": i * 0.2, "loss": 1 / i} for i in range(1, 9)
    ]
    sample = {
        "model": "sft",
        "index": 0,
        "step": 1,
        "prompt": "a?",
        "completion": "b",
        "proxy": 0.1,
        "kl": 0.2,
    }
    finding = {"event": "finding", "step": 2, "check": "kl_high", "severity": "warn"}
    finding |= {"evidence": "e", "cause": "c", "remedy": "r"}
    action = {
        "event": "rollback",
        "step": 3,
        "to": 1,
        "checks": ["kl_high"],
        "kl_coef": 0.1,
        "lr_factor": 0.5,
    }
    kinds = (("sft", "sft"), ("ppo", "ppo"), ("judge", "evaluate"))
    stages = {name: {"kind": kind, "fingerprint": "f"} for name, kind in kinds}
    files: dict[str, Any] = {
        "config.yaml": CONFIG.encode(),
        "manifest.json": {"name": "a", "versions": {"keel": "0"}, "hardware": {"cores": 2}, "stages": stages},
        "stages/ppo/stage.json": {"kind": "ppo", "fingerprint": "f", "seconds": 3.0, "rows": 9},
        "stages/ppo/metrics.jsonl": rows,
        "stages/ppo/samples.jsonl": [sample, {**sample, "step": 2, "rewards": {"a": 1.0}}],
        "stages/ppo/events.jsonl": [finding, action],
        "stages/ppo/fingerprint": b"f",
        "stages/judge/stage.json": {"kind": "evaluate", "fingerprint": "f"},
        "stages/judge/result.json": {
            "reference": "sft",
            "models": models,
            "reward_model": {"accuracy": measure, "calibration": {"ece": 0.1, "bins": bins}},
        },
        "stages/judge/samples.jsonl": [sample, {**sample, "model": "ppo", "gold": {"total": 0.5}}],
        "stages/reward/result.json": {"accuracy": measure},
    }
    for name, value in files.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(value, list):
            value = "".join(json.dumps(row) + "\n" for row in value).encode()
        (run / name).write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())


# ---------------------------------------------------------------- what it begins with


def seeds(target: str) -> Iterator[bytes]:
    """Good inputs, from which others are made."""
    if target == "config":
        yield CONFIG.encode()
        yield CONFIG.encode() + b"\0sft.lr=1e-3\0seed=2\0ppo.kl.coef=0.2"
        for line in CONFIG.splitlines()[4:]:
            yield f"name: b\nstages:\n{line}\n".encode()
    elif target == "run":
        with tempfile.TemporaryDirectory() as folder:
            made_up_run(Path(folder))
            for number, name in enumerate(RUN_FILES):
                path = Path(folder) / name
                for page in (0, -(-128 // len(RUN_FILES)) * len(RUN_FILES)):
                    yield bytes([number + page]) + (path.read_bytes() if path.exists() else b"{}")
    else:
        for rows in ROWS:
            lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
            head = b"\0" if target == "votes" else b"\0\0"
            yield head + lines
            yield (b"\1" if target == "votes" else b"\1\1") + json.dumps(rows).encode()
            if target == "data":
                yield b"\4\0" + parquet(rows)
        table = b'prompt,chosen,rejected,votes,margin\na,b,c,"{""chosen"": 1}",0.5\n'
        yield (b"\2" if target == "votes" else b"\2\0") + table
        if target == "data":
            yield b"\3\0a\nb\n\nc\n"
            yield b"\5\0" + gzip.compress(b'{"text": "a"}\n', mtime=0)


def parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    except (pyarrow.ArrowException, NotImplementedError):  # an object without keys
        return b"PAR1"
    return buffer.getvalue()


# ---------------------------------------------------------------- one target, in this process


def kind_of(error: BaseException) -> str:
    """What makes a finding another one: the exception, and the innermost line of keel's or of this file."""
    own = (os.sep + "keel" + os.sep, os.path.basename(__file__))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if any(part in f.filename for part in own)]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "nowhere"
    return f"{type(error).__name__} at {where}"


def fuzz(target: str, minutes: float, out: Path) -> None:
    """Fuzz one target; does not return."""
    import atheris  # pyright: ignore[reportMissingImports]

    with atheris.instrument_imports(include=["keel", "yaml"], enable_loader_override=False):
        for warm in seeds(target):  # imports what it needs, and shows that the good ones pass
            with tempfile.TemporaryDirectory() as folder:
                TARGETS[target](warm, Path(folder))
    found, corpus = out / "found", out / "corpus"
    for folder in (found, corpus):
        folder.mkdir(parents=True, exist_ok=True)
    for content in seeds(target):
        (corpus / hashlib.sha1(content).hexdigest()).write_bytes(content)
    dictionary = out / "words.dict"
    escaped = ["".join(f"\\x{byte:02x}" for byte in word.encode()) for word in WORDS.split()]
    dictionary.write_text("".join(f'"{word}"\n' for word in escaped))
    place, known = Path(tempfile.mkdtemp(prefix="keel-fuzz-")), {path.stem for path in found.glob("*.txt")}

    def one(content: bytes) -> None:
        try:
            TARGETS[target](content, place)
        except Exception as error:
            kind = kind_of(error)
            name = hashlib.sha1(kind.encode()).hexdigest()[:12]
            if name not in known:
                known.add(name)
                (found / f"{name}.bin").write_bytes(content)
                (found / f"{name}.txt").write_text(f"{kind}\n{traceback.format_exc()}")

    flags = [
        f"-max_total_time={round(minutes * 60)}",
        f"-timeout={SECONDS}",
        f"-rss_limit_mb={MEGABYTES}",
        f"-artifact_prefix={found}/",
        f"-dict={dictionary}",
        *("-max_len=4096", "-print_final_stats=1", "-verbosity=1"),
    ]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], one)
    atheris.Fuzz()


# ---------------------------------------------------------------- all targets, each in a process of its own


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", help=", ".join(TARGETS))
    parser.add_argument("--minutes", type=float, default=10, help="for each target")
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"))
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    targets = given.targets or list(TARGETS)
    if unknown := [name for name in targets if name not in TARGETS]:
        parser.error(f"no target {unknown[0]!r}; known: {', '.join(TARGETS)}")
    if given.in_this_process:
        fuzz(targets[0], given.minutes, given.out)
    try:
        import atheris  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        print("fuzzing needs atheris: pip install 'keel-rlhf[fuzz]'", file=sys.stderr)
        return 2
    bad = 0
    for target in targets:
        out = given.out / target
        shutil.rmtree(out / "found", ignore_errors=True)
        command = [sys.executable, __file__, target, "--minutes", str(given.minutes), "--out", str(out)]
        command.append("--in-this-process")
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
        said = [
            line for line in done.stderr.splitlines() if line.startswith(("stat::", "#")) or "DONE" in line
        ]
        findings = sorted((out / "found").glob("*.txt"))
        ended = list((out / "found").glob("*-*"))
        bad += len(findings) + len(ended) + (done.returncode != 0 and not ended)
        print(f"{target}: {len(findings)} findings, {len(ended)} hangs or crashes, exit {done.returncode}")
        for line in said[-8:]:
            print(f"  {line}")
        for path in findings:
            print(f"  {path.read_text().splitlines()[0]}: {path.with_suffix('.bin')}")
        for path in ended:
            print(f"  {path}")
        if done.returncode and not ended:
            print(done.stderr[-2000:])
    return 3 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
