"""`keel bench reward`: scores of a reward model, an ensemble, a classifier or a judge on a benchmark's
questions, and what comes of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch

import keel
from keel.config import parse
from keel.config.reading import read_mapping
from keel.config.rewards import JudgeTerm, LearnedTerm, RewardTerm
from keel.data import chat
from keel.errors import RewardError, UsageError
from keel.evaluation import reward_bench, reward_bench_files
from keel.evaluation.reward_bench import Benchmark, Question, Scored
from keel.models.hub import may_be_on_hub
from keel.report import reward_bench as page
from keel.rewards import functions, learned
from keel.rewards.judge.judging import Compared, Judge
from keel.rewards.mixture import Batch, from_function
from keel.rundir.checkpoint import write_json, write_text
from keel.rundir.stage_run import Progress, StageRun
from keel.stages import build_rewards, judges
from keel.types import DataSource, StopReason

AT_ONCE = 64  # questions between two steps of the progress
DTYPES = ("auto", "float32", "bfloat16", "float16")
_FILES = (".yaml", ".yml")
Score = Callable[[Sequence[Question]], list[Scored]]


@dataclass
class Bench:
    """One model on one benchmark."""

    model: str
    on: str
    benchmark: str | None
    out: Path | None
    batch_size: int = 16
    dtype: str = "auto"
    trust: bool = False
    say: Callable[[str], None] = print
    progress: Progress = lambda stage, step, steps, metrics: None
    cut: int = field(default=0, init=False)  # replies that the model reads only the beginning of

    def __post_init__(self) -> None:
        if self.benchmark is not None and self.benchmark not in get_args(Benchmark):
            known = ", ".join(get_args(Benchmark))
            raise UsageError(f"--benchmark {self.benchmark!r} is not one of {known}")
        if self.dtype not in DTYPES:
            raise UsageError(f"--dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")

    @property
    def directory(self) -> Path:
        """Where everything goes."""
        if self.out is not None:
            return self.out
        names = (_name(self.model), _name(self.on))
        return Path("bench") / "-on-".join(names)

    def run(self) -> dict[str, Any]:
        """1. the reward  2. the questions  3. scores  4. the rule  5. files. What is wrong with the first
        two is found before any model is loaded."""
        term = term_of(self.model, self.trust)
        _check_term(term)
        kind, questions, skipped = self._questions()
        reward_bench.check(kind, questions)
        if (
            kind == "llmbar"
            and isinstance(term, JudgeTerm)
            and term.mode == "pairwise"
            and not term.both_orders
        ):
            raise UsageError("LLMBar is judged in both orders: leave out `both_orders: false`")
        self.directory.mkdir(parents=True, exist_ok=True)
        stage_run = self._stage_run()
        if isinstance(term, JudgeTerm):
            judges.check_machine(term, f"judge {term.log_name!r}")
        score = self._scorer(term, stage_run, kind)
        scored: list[Scored] = []
        for start in range(0, len(questions), AT_ONCE):
            some = score(questions[start : start + AT_ONCE])
            scored += [_turned(one) for one in some] if term.weight < 0 else some
            self.progress("bench", len(scored), len(questions), {})
        found = {
            "model": self.model,
            "reward": term.kind,
            "on": self.on,
            "keel": keel.__version__,
            **reward_bench.result(kind, questions, scored, judge=isinstance(term, JudgeTerm)),
            "cut": self.cut,
            "skipped": skipped,
        }
        self._write(found, questions, scored)
        return found

    def _questions(self) -> tuple[Benchmark, Sequence[Question], int]:
        """Of which benchmark they are, the questions, and how many rows were left out."""
        if Path(self.on).suffix.lower() in _FILES:
            if self.benchmark not in (None, "pairs"):
                raise UsageError(
                    f"--benchmark {self.benchmark} has no effect with {self.on}: a data source holds pairs"
                )
            return "pairs", *reward_bench_files.pairs(sources_of(self.on), self.on)
        kind, questions = reward_bench_files.read(self.on, self.benchmark)  # pyright: ignore[reportArgumentType]
        return kind, questions, 0

    def _stage_run(self) -> StageRun:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return StageRun("bench", self.directory, 0, device, place_of, lambda sources, accept: None, self.say)

    def _write(self, found: dict[str, Any], questions: Sequence[Question], scored: Sequence[Scored]) -> None:
        errors = reward_bench.errors(questions, scored)
        rows = [
            {"id": q.id, "subset": q.subset, "right": q.right, "scores": s.scores}
            | ({} if s.in_front is None else {"in_front": s.in_front, "behind": s.behind})
            for q, s in zip(questions, scored, strict=True)
        ]
        for name, lines in (("scores.jsonl", rows), ("errors.jsonl", errors)):
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            write_text(self.directory / name, text)
        write_json(self.directory / "result.json", found)
        page.write(self.directory / "report.html", found, errors)

    # ------------------------------------------------------------ who scores

    def _scorer(self, term: RewardTerm, stage_run: StageRun, kind: Benchmark) -> Score:
        published = kind != "pairs"  # whose prompts are what a user says
        if isinstance(term, LearnedTerm):
            members = learned.load_members(
                place_of(term.model), device=stage_run.device, dtype=self.dtype, trust_remote_code=self.trust,
                quantize=term.quantize,
            )  # fmt: skip
            turns = published and members[0].tokenizer.chat_template is not None
            return lambda asked: self._learned(term, members, _in_turns(asked) if turns else asked)
        loaded = build_rewards.load_rewards(
            [term], stage_run, dtype=self.dtype, trust_remote_code=self.trust
        )[0]
        if isinstance(loaded.judge, Judge):
            judge = loaded.judge
            return lambda asked: _judged(judge, _in_turns(asked) if published else asked)
        assert loaded.function is not None
        rewarder = from_function(term.log_name, loaded.function)
        return lambda asked: _by_function(rewarder, asked)

    def _learned(
        self, term: LearnedTerm, members: Sequence[learned.RewardModel], asked: Sequence[Question]
    ) -> list[Scored]:
        """By a reward model, or by the members of an ensemble on their own scales."""
        inputs = [[self._encoded(members[0], q, reply) for reply in q.replies] for q in asked]
        rows = [row for own in inputs for row in own]
        together = [i for i, own in enumerate(inputs) for _ in own]
        by_member = [
            learned.score(member, rows, batch_size=self.batch_size, together=together) for member in members
        ]
        if len(members) == 1:
            scores = by_member[0]
        else:
            scaled = torch.stack([(s - m.mean) / m.std for s, m in zip(by_member, members, strict=True)])
            penalty = 1.0 if term.std_penalty is None else term.std_penalty
            scores = learned.combined(scaled, term.combine or "mean", penalty)
        return _grouped(asked, scores.tolist())

    def _encoded(self, member: learned.RewardModel, question: Question, reply: Any) -> learned.Inputs:
        try:
            return learned.encode(member, question.prompt, reply)
        except UsageError:  # the reply alone is too long: what fits of its beginning is scored
            self.cut += 1
            text = chat.completion_text(reply)
            return learned.encode_sampled(member, question.prompt, text, ended=False)


def term_of(model: str, trust: bool) -> RewardTerm:
    """The reward that MODEL names: a reward model, or what a YAML file says. UsageError for a file that is no
    reward, and for code without --trust."""
    if Path(model).suffix.lower() not in _FILES:
        return LearnedTerm.model_validate({"kind": "learned", "model": model})
    tree = _line_of(model, "reward")
    stage = {"kind": "best_of_n", "model": "./policy", "data": "prompts.jsonl", "reward": tree}
    terms = parse({"name": "bench", "stages": {"bench": stage}}, model).stages["bench"].reward_terms()
    if len(terms) != 1:
        raise UsageError(f"{model} holds {len(terms)} rewards: give one")
    if terms[0].kind in ("python", "plugin") and not trust:
        raise UsageError(f"{model} names Python of its own: --trust runs it")
    build_rewards.check(terms, model)
    return terms[0]


def _line_of(file: str, key: str) -> Any:
    """What a YAML file says; of a line of a config, `KEY: {…}`, what stands there. UsageError where more
    stands beside it, which would have no effect."""
    tree = read_mapping(Path(file))
    if key not in tree:
        return tree
    if beside := [name for name in tree if name != key]:
        raise UsageError(
            f"{file}: `{beside[0]}` has no effect beside `{key}`: write it within, or leave it out"
        )
    return tree[key]


def sources_of(file: str) -> list[DataSource]:
    """The data sources that a YAML file says, as `data` of a config. UsageError for anything else."""
    stage = {"kind": "reward", "model": "./model", "data": _line_of(file, "data")}
    data: Any = parse({"name": "bench", "stages": {"bench": stage}}, file).stages["bench"]
    return [source.plain() for source in data.data]


def _check_term(term: RewardTerm) -> None:
    """UsageError for a reward that says nothing of a benchmark's replies."""
    if term.kind == "overlong" or (term.kind == "length" and term.unit == "tokens"):
        hint = "; set `unit: words`" if term.kind == "length" else ""
        raise UsageError(
            f"`kind: {term.kind}` counts the tokens of a policy, and a benchmark's replies are text{hint}"
        )


def _turned(one: Scored) -> Scored:
    """What a reward of negative weight, a penalty, says: the other way round."""
    scores = tuple(None if score is None else -score for score in one.scores)
    sides = (None if side is None else 1 - side for side in (one.in_front, one.behind))
    return Scored(scores, *sides)


def place_of(model: str) -> str:
    """A folder, or a hub id; of a stage's folder the model in it. UsageError for what is not there."""
    place = Path(model).expanduser()
    if not place.exists() and (model.count("/") > 1 or not may_be_on_hub(model)):
        raise UsageError(
            f"no model at {model}: give a folder, a hub id (OWNER/NAME) or runs/NAME/stages/STAGE"
        )
    inside = place / "model"
    return str(inside) if (inside / "config.json").exists() else str(place) if place.exists() else model


def _name(place: str) -> str:
    """A path as part of a folder's name."""
    path = Path(place)
    parts = [part for part in path.with_suffix("").parts if part not in ("/", ".", "..", "stages", "model")]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts[-2:])) or "model"


def _in_turns(asked: Sequence[Question]) -> list[Question]:
    """Prompts and replies of plain text as what a user and an assistant say."""
    return [
        replace(
            q,
            prompt=({"role": "user", "content": q.prompt},) if isinstance(q.prompt, str) else q.prompt,
            replies=tuple(
                ({"role": "assistant", "content": r},) if isinstance(r, str) else r for r in q.replies
            ),
        )
        for q in asked
    ]


def _grouped(asked: Sequence[Question], values: Sequence[float | None]) -> list[Scored]:
    rest = iter(values)
    return [Scored(tuple(next(rest) for _ in question.replies)) for question in asked]


def _by_function(rewarder: Any, asked: Sequence[Question]) -> list[Scored]:
    """By a reward that judges one reply at a time."""
    rows = [(q, reply) for q in asked for reply in q.replies]
    ended: list[StopReason] = ["eos"] * len(rows)
    ids = [[0]] * len(rows)
    batch = Batch([q.prompt for q, _ in rows], [reply for _, reply in rows], ids, ended, ids, {})
    return _grouped(asked, rewarder(batch))


def _judged(judge: Judge, asked: Sequence[Question]) -> list[Scored]:
    """By a language model. A pairwise one is asked about two replies in both orders."""
    if judge.against or judge.reference:
        raise UsageError("`against` and `reference` name columns, and a benchmark's questions have none")
    if judge.mode == "pairwise" and all(len(q.replies) == 2 for q in asked):
        compared = judge.compare([(q.prompt, q.replies[0], q.replies[1]) for q in asked])
        _check(judge, asked, [(one.why, not one.given_up) if one.why else None for one in compared])
        return [_of_pair(one) for one in compared]
    judged = judge.judge([q.prompt for q in asked], [q.replies for q in asked])
    gone = [next((w for w in own if w is not None), None) for own in judged.why]
    _check(judge, asked, [(w.reason, w.asked) if w else None for w in gone])
    return [Scored(tuple(scores)) for scores in judged.scores]


def _of_pair(one: Compared) -> Scored:
    better = one.better
    if better is None:
        return Scored((None, None))
    return Scored((better, 1 - better), one.in_front, one.behind)


def _check(judge: Judge, asked: Sequence[Question], why: Sequence[tuple[str, bool] | None]) -> None:
    """RewardError, with the question, where one has no verdict and `on_failure` is error."""
    missing = [(i, reason, was_asked) for i, (reason, was_asked) in
               ((i, w) for i, w in enumerate(why) if w is not None)]  # fmt: skip
    if missing and judge.on_failure == "error":
        i, reason, _ = next((one for one in missing if one[2]), missing[0])
        shown = functions.sample([q.prompt for q in asked], i).partition(", ")[2]
        raise RewardError(
            f"judge {judge.name!r} has no verdict on {asked[i].id} ({shown}): {reason}; what it said is "
            "kept, and the same command goes on (on_failure: none counts such questions as a draw)"
        )
