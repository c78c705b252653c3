"""Stages that read rows from files as they read them from memory: the same bytes, also when what was made of
the rows is found again."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from keel.config import ClassifierConfig, EvaluateConfig, parse
from keel.data import load as loading
from keel.data.stored import records as stored
from keel.data.stored.cache import Cache
from keel.data.stored.inputs import InputSink, StoredInputs
from keel.data.stored.tokens import Preparation
from keel.models.load import load_tokenizer
from keel.pipeline.pipeline import PREPARED, Pipeline
from keel.rewards import learned
from keel.stages import classifier, evaluate, lazy_rows, prepare, scored_pairs
from keel.types import PreferenceRecord

TURN: Any = ({"role": "assistant", "content": "it is."},)
ASKED = [f"{lead} {animal}?" for lead in ("the", "so the") for animal in ("cat", "dog", "fox", "owl")]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "IN_MEMORY", 2)
    monkeypatch.setattr(loading, "_LARGE", 0)


def test_inputs_of_a_file_are_those_that_were_put_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"input_ids": list(range(n % 9)), "token_type_ids": [n % 2] * (n % 9)} for n in range(1, 2500)]

    def made(name: str) -> Any:
        with InputSink(Cache(tmp_path), lambda: name) as sink:
            for row in rows:
                sink.add(row)
            return sink.done({"made_from": []})

    assert made("none") == rows
    of_files(monkeypatch)
    found = made("inputs-x")
    assert isinstance(found, StoredInputs)
    assert list(found) == rows
    assert found[-1] == rows[-1]
    assert found[1020:1030] == rows[1020:1030]
    assert found.sizes().tolist() == [n % 9 for n in range(1, 2500)]


def in_file(rows: list[Any], cache: Cache, name: str) -> Any:
    with stored.RecordSink(cache, lambda: name) as sink:
        for row in rows:
            sink.add(row)
        return sink.done({})


def test_a_classifiers_rows_are_the_same_from_files_and_found_again(
    stage_run: Any, tiny_bert: Path, texts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(str(tiny_bert))
    stage_run.preparation = Preparation(Cache(tmp_path / "cache"))

    def made(**settings: Any) -> tuple[list[Any], tuple[int, int], list[int]]:
        config = ClassifierConfig.model_validate(
            {"kind": "classifier", "model": "m", "data": texts, "holdout": 0.3, **settings}
        )
        too_long = prepare.TooLong(stage_run, config.too_long, 12 if config.passages else 48)
        trained, held_out = classifier._texts(config, stage_run)
        rows = classifier._rows(config, stage_run, tokenizer, trained, too_long)
        held = classifier._rows(config, stage_run, tokenizer, held_out, too_long)
        sizes = [len(row.inputs["input_ids"]) for row in rows]
        assert list(lazy_rows.sizes(rows, lambda row: len(row.inputs["input_ids"]))) == sizes
        return [*rows, *held], (too_long.cut, too_long.left_out), sizes

    kinds: tuple[dict[str, Any], ...] = ({"too_long": "skip"}, {"too_long": "truncate"}, {"passages": True})
    plain = [made(**kind) for kind in kinds]
    assert [counts for _, counts, _ in plain] == [(0, 2), (2, 0), (0, 0)]
    of_files(monkeypatch)
    assert [made(**kind) for kind in kinds] == plain
    assert len(list((tmp_path / "cache").glob("inputs-*"))) >= 3
    with monkeypatch.context() as without:
        without.setattr(classifier, "encoded", None)  # what is found again does not need it
        without.setattr(classifier, "_passages", None)
        assert [made(**kind) for kind in kinds] == plain
    edited = tmp_path / "edited.py"  # after an edit of the code that makes rows, none of before are taken
    edited.write_text(Path(str(classifier.__file__)).read_text() + "\n")
    monkeypatch.setattr(classifier, "__file__", str(edited))
    monkeypatch.setattr(classifier, "_passages", lambda *_: [{"input_ids": [1]}])
    assert {len(row.inputs["input_ids"]) for row in made(passages=True)[0]} == {1}


def test_comparisons_are_scored_the_same_from_files(
    stage_run: Any, tiny_reward: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scored_pairs, "AT_ONCE", 3)
    rows = [
        PreferenceRecord(
            asked, " red.", f" so{' so' * (9 * i)}.", 0.25 * (i % 5), votes=(), columns={"kind": "a"}
        )
        for i, asked in enumerate(ASKED)
    ]
    rows += [replace(rows[0], prompt=({"role": "user", "content": "so?"},), chosen=TURN, rejected=TURN)]
    config = EvaluateConfig.model_validate(
        {"kind": "evaluate", "models": ["m"], "reward": "r", "data": "d", "comparisons": "c",
         "subset": "kind", "too_long": "skip"}
    )  # fmt: skip
    reward = learned.load(str(tiny_reward), device=torch.device("cpu"))
    stage_run.preparation = Preparation(Cache(tmp_path / "cache"))

    def made(records: Any) -> dict[str, Any]:
        found = scored_pairs.compared(stage_run, config, [reward], records)
        return {
            field.name: value.tolist()
            if hasattr(value := getattr(found, field.name), "tolist")
            else list(value)
            for field in fields(found)
        }

    plain = made(rows)
    assert 4 < len(plain["votes"]) < len(rows)  # some are longer than the reward model reads
    of_files(monkeypatch)
    assert made(in_file(rows, Cache(tmp_path / "rows"), "rows-x")) == plain
    assert list((tmp_path / "cache").glob("inputs-*"))
    edited = tmp_path / "edited.py"  # another way to read a reply, and the folder of before is there
    edited.write_text(Path(str(learned.__file__)).read_text() + "\n")
    monkeypatch.setattr(learned, "__file__", str(edited))
    read = learned.encode
    monkeypatch.setattr(learned, "encode", lambda *a: {k: v[-3:] for k, v in read(*a).items()})
    other = made(in_file(rows, Cache(tmp_path / "again"), "rows-x"))
    assert other["votes"] == plain["votes"]
    assert other["chosen"] != plain["chosen"]


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, str]:
    """Texts of two labels, of all lengths, some of them twice, and conversations."""
    found = {
        label: write(
            tmp_path / f"{label}.jsonl",
            [{"text": f"the {animal} is {colour}{', so it is' * (i % 3)}."} for i, animal in enumerate(ASKED)]
            + [{"text": "the cat is red."}, {"text": "the cat is red."}, {"text": "so " * 60}],
        )
        for label, colour in (("warm", "red"), ("cold", "blue"))
    }
    rows = [[TURN[0] | {"role": "user"}, TURN[0] | {"content": f"it is so {i}."}] for i in range(5)]
    return {**found, "talk": write(tmp_path / "talk.jsonl", [{"messages": turns} for turns in rows])}


@pytest.fixture
def stages(
    tiny_model: Path, tiny_bert: Path, tiny_reward: Path, texts: dict[str, str], tmp_path: Path
) -> dict[str, Any]:
    """An evaluation with prompts and comparisons of both forms and of all lengths; two classifiers, one of
    which cuts texts into passages; and an encoder that reads comparisons."""
    turns = [[{"role": "user", "content": asked}] for asked in ASKED[:4]]
    prompts = [{"prompt": prompt} for prompt in [*ASKED, *turns, "so " * 90]]
    pairs = [
        {
            "prompt": asked,
            "chosen": " it is red.",
            "rejected": f" it is{' so' * (7 * i)}.",
            "kind": f"k{i % 2}",
        }
        for i, asked in enumerate(ASKED)
    ]
    talks = [
        {"prompt": turn, "chosen": [{"role": "assistant", "content": "red."}],
         "rejected": [{"role": "assistant", "content": "blue."}]}
        for turn in turns
    ]  # fmt: skip
    few = {"model": str(tiny_bert), "max_steps": 2, "batch_size": 4, "holdout": 0.3, "lr": 1e-3}
    return {
        "judge": {
            "kind": "evaluate", "models": [str(tiny_model)], "reward": str(tiny_reward), "best_of": [2],
            "data": write(tmp_path / "prompts.jsonl", prompts), "too_long": "skip", "subset": "kind",
            "comparisons": write(tmp_path / "pairs.jsonl", [*pairs, *talks]),
            "sampling": {"max_new_tokens": 5}, "batch_size": 4,
        },
        "whole": {"kind": "classifier", "data": texts, "too_long": "skip", **few},
        "rm": {
            "kind": "reward", "normalize": 0, "data": write(tmp_path / "all.jsonl", [*pairs, pairs[0]]),
            "too_long": "skip", "max_length": 24, **few,
        },
        "passages": {"kind": "classifier", "data": texts, "passages": True, "max_length": 12, **few},
    }  # fmt: skip


@pytest.mark.slow
def test_evaluate_classifier_and_encoders_end_with_the_same_bytes(
    stages: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "AT_ONCE", 5)  # in parts, the last of which is smaller
    monkeypatch.setattr(scored_pairs, "AT_ONCE", 3)
    config = parse({"name": "twins", "threads": 1, "device": "cpu", "stages": stages})

    def made(directory: Path) -> dict[str, bytes]:
        pipeline = Pipeline(config, directory, lambda line: None)
        pipeline._report = lambda: None  # pyright: ignore[reportAttributeAccessIssue]
        pipeline.run()
        kinds = ("model/*.safetensors", "model/tokenizer.json", "*.jsonl", "result.json")
        files = [file for kind in kinds for file in directory.glob(f"stages/*/{kind}")]
        facts = {
            f"{path.parent.name}/facts": repr({k: v for k, v in json.loads(path.read_text())["facts"].items()
                                               if k != "peak_memory_mib"}).encode()
            for path in directory.glob("stages/*/stage.json")
        }  # fmt: skip
        return facts | {
            str(file.relative_to(directory)): file.read_bytes()
            for file in files
            if file.name != "times.jsonl"
        }

    plain = made(tmp_path / "memory")
    assert len(plain) > 12
    result = json.loads(plain["stages/judge/result.json"])
    assert result["reward_model"]["by_subset"].keys() == {"k0", "k1"}
    assert len(plain["stages/judge/samples.jsonl"].splitlines()) == 2 * 12  # the long prompt is left out
    assert not (tmp_path / "memory" / PREPARED).exists()

    of_files(monkeypatch)
    assert made(tmp_path / "files") == plain
    kinds = [path.name.partition("-")[0] for path in (tmp_path / "files" / PREPARED).iterdir()]
    assert kinds.count("inputs") >= 5  # comparisons; of each classifier what is trained on, and what is not
    shutil.rmtree(tmp_path / "files" / "stages")
    monkeypatch.setattr("keel.stages.classifier.encoded", None)  # what is found again does not need it
    assert made(tmp_path / "files") == plain
