"""A row that a stage would stop at for its length is found before the first stage trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from keel.config import parse
from keel.errors import DataError
from keel.pipeline import lengths
from keel.pipeline.pipeline import Pipeline
from keel.pipeline.preflight import Sources

LONG = " the cat" * 60
TURNS = [{"role": "user", "content": "the cat?"}]
LENGTH = {"kind": "length", "high": 3}
SAMPLING = {"max_new_tokens": 4}


@pytest.fixture
def rows(tmp_path: Path):
    """Write rows to a file and return its path."""

    def go(*content: dict[str, Any]) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        return str(path)

    return go


@pytest.fixture
def check(tmp_path: Path, tiny_model, data):
    """Measure the rows of a stage that starts from another one, which has not run."""

    def go(stage: dict[str, Any], **more: Any) -> list[str]:
        first = {"kind": "sft", "model": str(tiny_model), "data": str(data.demonstrations)}
        model = {"models": ["first"]} if stage["kind"] == "evaluate" else {"model": "first"}
        config = parse(
            {"name": "tiny", "device": "cpu", "stages": {"first": first, "s": model | stage | more}}
        )
        said: list[str] = []
        lengths.check(Sources(config, tmp_path / "run", said.append), "s")
        return said

    return go


STAGES = [
    (
        {"kind": "sft"},
        {"prompt": "the cat?", "completion": " is red."},
        {"prompt": LONG, "completion": " red."},
    ),
    ({"kind": "sft"}, {"text": "the cat."}, {"text": LONG}),
    (
        {"kind": "reward"},
        {"prompt": "the?", "chosen": " red.", "rejected": " cat."},
        {"prompt": LONG, "chosen": " red.", "rejected": " cat."},
    ),
    (
        {"kind": "dpo"},
        {"prompt": "the?", "chosen": " red.", "rejected": " cat."},
        {"prompt": LONG, "chosen": " cat.", "rejected": " red."},
    ),
    (
        {"kind": "dpo", "loss": "kto"},
        {"prompt": "the?", "completion": " red.", "label": True},
        {"prompt": LONG, "completion": " red.", "label": True},
    ),
    ({"kind": "grpo", "reward": LENGTH, "sampling": SAMPLING}, {"prompt": "the?"}, {"prompt": LONG}),
    ({"kind": "best_of_n", "reward": LENGTH, "sampling": SAMPLING}, {"prompt": "the?"}, {"prompt": LONG}),
    ({"kind": "evaluate", "reward": LENGTH, "sampling": SAMPLING}, {"prompt": "the?"}, {"prompt": LONG}),
]


@pytest.mark.parametrize(("stage", "good", "bad"), STAGES, ids=lambda value: value.get("kind"))
def test_a_row_that_is_too_long_is_found_in_every_kind_of_stage(stage, good, bad, rows, check):
    source = rows(good, good, bad)
    with pytest.raises(
        DataError, match=r"rows\.jsonl:3: \d+ tokens, more than the \d+ of stage 's'; set too_long"
    ):
        check(stage, data=source)
    assert check(stage, data=source, too_long="skip") == []
    assert check(stage, data=source, too_long="truncate") == []
    assert check(stage, data=rows(good, good)) == []


def test_a_reply_that_cannot_be_cut_is_found_too(rows, check):
    source = rows({"prompt": "the?", "completion": " red."}, {"prompt": "the?", "completion": LONG})
    with pytest.raises(DataError, match=r"rows\.jsonl:2: .*response alone is longer.*too_long: skip"):
        check({"kind": "sft"}, data=source, too_long="truncate")


def test_what_helps_the_first_row_helps_the_later_ones_too(rows, check):
    """Told to truncate, the user would come back with the next row, whose reply cannot be cut."""
    good, long = {"prompt": "the?", "completion": " red."}, {"prompt": LONG, "completion": " red."}
    hopeless = {"prompt": "the?", "completion": LONG}
    with pytest.raises(DataError, match=r"jsonl:2: .*; so are 1 later rows; set too_long: truncate or skip"):
        check({"kind": "sft"}, data=rows(good, long, long))
    with pytest.raises(
        DataError, match=r"jsonl:2: .*; the response alone of 1 is longer.*\(too_long: skip\)"
    ):
        check({"kind": "sft"}, data=rows(good, long, hopeless))


def test_prompts_leave_room_for_replies(rows, check):
    """A prompt fits by itself, and not with the reply that is sampled behind it."""
    source = rows({"prompt": "the cat" + " the cat" * 3})
    stage = {"kind": "grpo", "reward": LENGTH, "data": source}
    assert check(stage, sampling={"max_new_tokens": 2}) == []
    with pytest.raises(DataError, match=r"rows\.jsonl:1: "):
        check(stage, sampling={"max_new_tokens": 47})


def test_the_rows_evaluated_on_are_measured(rows, check, data):
    source = rows({"prompt": LONG, "completion": " red."})
    with pytest.raises(DataError, match=r"rows\.jsonl:1: "):
        check({"kind": "sft", "data": str(data.demonstrations)}, eval_data=source)


def test_a_row_that_the_template_cannot_write_is_found(rows, check, tiny_model):
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    turns = [*TURNS, {"role": "assistant", "content": "", "tool_calls": [call]}]
    source = rows({"messages": [*TURNS, {"role": "assistant", "content": "red."}]}, {"messages": turns})
    template = "{% for m in messages %}{{ m['role'] + ': ' + (m['content'] or '') + eos_token }}{% endfor %}"
    with pytest.raises(DataError, match=r"s: .*rows\.jsonl:2: .*tool_calls"):
        check(
            {"kind": "sft", "data": source},
            model={
                "path": str(tiny_model),
                "chat_template": template + "{% if add_generation_prompt %}assistant: {% endif %}",
            },
        )


def test_a_row_without_turns_has_no_template_around_it(rows, check, monkeypatch):
    """Rows that cannot be too long are not encoded: all but the first one of their form, and the long one."""
    encoded: list[str] = []
    measure = lengths._measure_one

    def measured(reader: Any, record: Any, *more: Any) -> Any:
        encoded.append(record.prompt)
        return measure(reader, record, *more)

    monkeypatch.setattr(lengths, "_measure_one", measured)
    short = [{"prompt": f"the cat is {n}?", "completion": " it is so, so it is."} for n in range(10, 20)]
    room = 48 - len(short[0]["prompt"]) - len(short[0]["completion"])
    assert lengths._AROUND <= room < 16  # fewer than a template writes around one turn
    check({"kind": "sft"}, data=rows(*short, {"prompt": "the " * 7, "completion": " it is so, so it is."}))
    assert encoded == ["the cat is 10?", "the " * 7]


def test_a_limit_on_time_is_said(rows, check, monkeypatch):
    monkeypatch.setattr(lengths, "BUDGET", -1.0)
    monkeypatch.setattr(lengths, "EVERY", 2)
    good = {"prompt": "the?", "completion": " red."}
    (line,) = check({"kind": "sft"}, data=rows(*[good] * 5))
    assert "the lengths of 1 of 5 rows were checked" in line


def test_a_run_stops_before_its_first_stage(rows, tmp_path, tiny_model, data):
    source = rows({"prompt": LONG, "completion": " red."}, {"prompt": "the?", "completion": " red."})
    stages = {
        "first": {"kind": "sft", "model": str(tiny_model), "data": str(data.demonstrations)},
        "last": {"kind": "sft", "model": "first", "data": source},
    }
    run = tmp_path / "run"
    with pytest.raises(DataError, match="of stage 'last'"):
        Pipeline(parse({"name": "tiny", "device": "cpu", "stages": stages}), run).run()
    assert not run.exists()
