"""What a stage evaluates on was not trained on: by prompt, in every kind of stage, and said where it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers
from transformers import AutoTokenizer

from keel.config import ClassifierConfig, RunConfig, Supervised, parse
from keel.data.identity import prompt_key
from keel.errors import DataError, UsageError
from keel.pipeline.preflight import Sources
from keel.stages import classifier, prepare
from keel.types import Record

PROMPTS = [f"question {n}?" for n in range(8)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pairs(prompts: list[str]) -> list[dict[str, Any]]:
    return [{"prompt": p, "chosen": f"a{n}", "rejected": f"b{n}"} for p in prompts for n in range(5)]


ROWS: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "pairs": ("preference", pairs(PROMPTS), {"kind": "reward"}),
    "dpo": ("preference", pairs(PROMPTS), {"kind": "dpo"}),
    "thumbs": (
        "unpaired",
        [{"prompt": p, "completion": f"a{n}", "label": n < 2} for p in PROMPTS for n in range(5)],
        {"kind": "dpo", "loss": "kto"},
    ),
    "demonstrations": (
        "demonstration",
        [{"prompt": p, "completion": f"a{n}"} for p in PROMPTS for n in range(5)],
        {"kind": "sft"},
    ),
    "chats": (
        "text",
        [
            {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": f"a{n}"}]}
            for p in PROMPTS
            for n in range(5)
        ],
        {"kind": "sft"},
    ),
    "texts": ("text", [{"text": p} for p in PROMPTS for _ in range(5)], {"kind": "pretrain"}),
}


def config_of(path: str, **settings: Any) -> RunConfig:
    return parse({"name": "t", "device": "cpu", "stages": {"one": {"model": "m", "data": path, **settings}}})


def divided(config: RunConfig, accept: Any, stage_run: Any) -> tuple[list[Record], list[Record]]:
    stage = config.stages["one"]
    assert isinstance(stage, Supervised)
    return prepare.train_and_eval(stage, stage_run, (accept,))[1:]


@pytest.mark.parametrize("name", ROWS)
def test_no_prompt_is_trained_on_and_evaluated_on(name: str, tmp_path: Path, stage_run: Any) -> None:
    kind, rows, settings = ROWS[name]
    path = write(tmp_path / "rows.jsonl", rows)
    train, held_out = divided(config_of(path, holdout=0.25, **settings), kind, stage_run)
    assert len(train) + len(held_out) == 40
    assert len(held_out) == 10
    assert not {prompt_key(record) for record in train} & {prompt_key(record) for record in held_out}
    facts = stage_run.facts
    assert (facts["distinct_prompts"], facts["held_out_seen"]) == (8, 0)
    assert facts["duplicate_rows"] == (32 if name == "texts" else 0)


def test_rows_of_a_group_stay_together(tmp_path: Path, stage_run: Any) -> None:
    rows = [{**row, "user": n // 2} for n, row in enumerate(pairs(PROMPTS)[::5])]
    path = write(tmp_path / "rows.jsonl", rows)
    config = config_of(path, kind="reward", holdout=0.25, group="user")
    train, held_out = divided(config, "preference", stage_run)
    assert len(held_out) == 2
    assert not {r.columns["user"] for r in train} & {r.columns["user"] for r in held_out}
    with pytest.raises(DataError, match=r"rows.jsonl:1 has no column 'author', which `group` names"):
        divided(config_of(path, kind="reward", group="author"), "preference", stage_run)


@pytest.mark.parametrize("settings", [{"holdout": 0}, {"eval_data": "e.jsonl"}])
def test_a_group_without_effect_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="`group` has no effect without `holdout`"):
        config_of("d.jsonl", kind="reward", group="user", **settings)


# ---------------------------------------------------------------- the line of the data


def lines(tmp_path: Path, **stages: Any) -> dict[str, str]:
    config = parse({"name": "t", "device": "cpu", "stages": stages})
    return Sources(config, tmp_path / "run").check(list(stages))


def test_the_line_says_what_is_held_out_and_what_repeats(tmp_path: Path, tiny_model: Path) -> None:
    rows = pairs(PROMPTS)
    turned = {"prompt": rows[0]["prompt"], "chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]}
    path = write(tmp_path / "rows.jsonl", [*rows, rows[1], turned])
    stage = {"kind": "reward", "model": str(tiny_model), "data": path, "holdout": 0.12}
    said = lines(tmp_path, reward=stage)["reward"]
    assert " · 8 prompts · 1 row repeats earlier ones · 1 pair labelled both ways · " in said
    assert said.endswith(" · 5 held out, 1 prompt of their own")


def test_one_prompt_is_an_error_before_anything_is_trained(tmp_path: Path, tiny_model: Path) -> None:
    path = write(tmp_path / "rows.jsonl", pairs(PROMPTS[:1]))
    with pytest.raises(DataError, match=r"reward: all 5 rows have one prompt.*or set `holdout: 0`"):
        lines(tmp_path, reward={"kind": "reward", "model": str(tiny_model), "data": path})
    assert lines(tmp_path, reward={"kind": "reward", "model": str(tiny_model), "data": path, "holdout": 0})[
        "reward"
    ].endswith(" · 1 prompt")


def test_the_line_says_how_much_of_eval_data_is_trained_on(
    tmp_path: Path, tiny_model: Path, stage_run: Any
) -> None:
    path = write(tmp_path / "rows.jsonl", pairs(PROMPTS))
    held_out = write(tmp_path / "held.jsonl", pairs(["new?", PROMPTS[3] + " "]))
    stage = {"kind": "reward", "model": str(tiny_model), "data": path, "eval_data": held_out}
    said = lines(tmp_path, reward=stage)["reward"]
    assert said.endswith(" · 5 of 10 rows of eval_data have a prompt that is trained on")
    divided(config_of(path, kind="reward", eval_data=held_out), "preference", stage_run)
    assert stage_run.facts["held_out_seen"] == 5


def test_the_line_says_which_stages_train_on_what_is_judged(tmp_path: Path, tiny_model: Path) -> None:
    path = write(tmp_path / "rows.jsonl", pairs(PROMPTS))
    asked = write(tmp_path / "asked.jsonl", [{"prompt": p} for p in ["new?", *PROMPTS[:3]]])
    stages = {
        "sft": {"kind": "sft", "model": str(tiny_model), "data": path},
        "apart": {"kind": "sft", "model": str(tiny_model), "data": path},
        "dpo": {"kind": "dpo", "model": "sft", "data": path},
        "judge": {
            "kind": "evaluate",
            "models": ["dpo"],
            "reward": [{"kind": "length", "high": 9}],
            "data": asked,
            "sampling": {"max_new_tokens": 6},
        },
    }
    said = lines(tmp_path, **stages)["judge"]
    assert said.endswith(" · 3 of 4 rows of its data have a prompt that is trained on by sft, dpo")
    new = write(tmp_path / "new.jsonl", [{"prompt": "new?"}])
    stages["judge"]["data"] = new
    assert "trained on" not in lines(tmp_path, **stages)["judge"]


# ---------------------------------------------------------------- pairs that are equal as tokens


@pytest.mark.parametrize("loss", [None, "sigmoid", "kto"])
def test_pairs_equal_after_tokenising_are_left_out_and_counted(
    loss: str | None, run: Any, tmp_path: Path, tiny_bert: Path, tiny_model: Path
) -> None:
    rows = [
        {"prompt": f"the {animal}", "chosen": "red", "rejected": "so"}
        for animal in ("cat", "dog", "fox", "owl")
    ]
    rows.append({"prompt": "the pig", "chosen": "Red", "rejected": "red"})  # one text without capitals
    few = {"data": write(tmp_path / "rows.jsonl", rows), "max_steps": 1, "batch_size": 2, "holdout": 0}
    if loss is None:
        stage: dict[str, Any] = {"kind": "reward", "model": str(tiny_bert), **few}
    else:
        folder = shutil.copytree(tiny_model, tmp_path / "lower")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.save_pretrained(folder)
        stage = {"kind": "dpo", "loss": loss, "model": str(folder), **few}
    done = run({"stages": {"one": stage}}, tmp_path / "run").stage_directory("one")
    facts = json.loads((done / "stage.json").read_text())["facts"]
    assert facts["equal_pairs"] == 1
    assert facts["rows"] == (8 if loss == "kto" else 4)


# ---------------------------------------------------------------- a classifier's texts


def texts_of(stage_run: Any, tmp_path: Path, sea: list[str], home: list[str], **settings: Any) -> Any:
    data = {
        label: write(tmp_path / f"{label}.jsonl", [{"text": text} for text in texts])
        for label, texts in (("sea", sea), ("home", home))
    }
    config = ClassifierConfig.model_validate({"kind": "classifier", "model": "m", "data": data, **settings})
    train, held_out = classifier._texts(config, stage_run)
    return [{label: [t.text for t in texts] for label, texts in part.items()} for part in (train, held_out)]


def test_a_text_under_two_labels_is_never_held_out_and_equal_texts_stay_together(
    stage_run: Any, tmp_path: Path
) -> None:
    said: list[str] = []
    stage_run.say = said.append
    sea, home = ["s1", "s1", "both", "s2", "s3"], ["both", "h1", "h2", "h2"]
    for seed in range(8):
        stage_run.seed = seed
        train, held_out = texts_of(stage_run, tmp_path, sea, home, holdout=0.4)
        for label, texts in (("sea", sea), ("home", home)):
            assert sorted(train[label] + held_out[label]) == sorted(texts)
            assert held_out[label]
            assert not {*held_out[label]} & {*train["sea"], *train["home"]}
    assert said[0] == "stage: 2 texts repeat earlier ones of their label, 1 stand under two labels"
    facts = stage_run.facts
    assert (facts["distinct_prompts"], facts["duplicate_rows"], facts["contradictions"]) == (6, 2, 1)


def test_texts_that_all_stand_under_two_labels_are_on_one_side_under_both(
    stage_run: Any, tmp_path: Path
) -> None:
    for seed in range(8):
        stage_run.seed = seed
        train, held_out = texts_of(stage_run, tmp_path, ["a", "b", "c"], ["a", "b"], holdout=0.4)
        assert not {*held_out["sea"], *held_out["home"]} & {*train["sea"], *train["home"]}
        assert held_out["home"]
        assert held_out["sea"]


def test_texts_of_eval_data_that_are_trained_on_are_said(stage_run: Any, tmp_path: Path) -> None:
    said: list[str] = []
    stage_run.say = said.append
    path = write(tmp_path / "other.jsonl", [{"text": "a"}, {"text": "new"}])
    texts_of(stage_run, tmp_path, ["a", "b"], ["c", "d"], eval_data={"sea": path, "home": path})
    assert said == ["stage: 2 texts of eval_data are trained on"]
