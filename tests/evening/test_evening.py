"""A new user's evening: raw files as people have them, each through `keel plan` and `keel run`, with what the
messages say done to the letter.

At most one correction is needed, no row is lost without a word, and what keel says of the result is what
transformers says of the same files.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

sys.path.insert(0, str(Path(__file__).parent))
from following import apply, settings_in
from shapes import SHAPES, Raw, Text

pytestmark = pytest.mark.evening
STEPS = {"max_steps": 2, "batch_size": 4, "lr": 1e-3}


# ---------------------------------------------------------------- the evening


@pytest.mark.parametrize("shape", list(SHAPES))
def test_a_raw_file_becomes_a_model(shape: str, keel: Any, tmp_path: Path, bases: dict[str, Path]) -> None:
    raw = SHAPES[shape](tmp_path)
    base = bases["tools" if shape == "openai_tools" else "plain"]
    stage: dict[str, Any] = {
        "kind": raw.kind, "model": str(base), "data": raw.path.name, "eval_data": raw.path.name, **STEPS,
        **({"normalize": 0} if raw.kind == "reward" else {}),
        **({"max_length": 32} if raw.kind == "pretrain" else {}),
    }  # fmt: skip
    config = tmp_path / "mine.yaml"
    corrections: list[str] = []
    for command in ("plan", "run"):
        while True:
            settings = {"name": "mine", "threads": 1, "device": "cpu", "stages": {"one": stage}}
            config.write_text(yaml.safe_dump(settings), encoding="utf-8")
            done = keel(command, config)
            assert "Traceback" not in done.err
            if done.code == 0:
                break
            assert done.code == 2, done.err  # a message for the user, no fault of keel's
            corrections.append(done.err)
            assert len(corrections) <= raw.corrections, "\n".join(corrections)
            apply(stage, settings_in(done.err, raw.fills))
        if command == "plan":
            planned = done.out
    assert len(corrections) == raw.corrections
    folder = tmp_path / "runs" / "mine" / "stages" / "one"
    _every_row_is_accounted_for(raw, folder, planned + done.err)
    _numbers_are_those_of_transformers(raw, folder, base)


def _every_row_is_accounted_for(raw: Raw, folder: Path, said: str) -> None:
    """Rows of the file = rows used + rows that a message counts."""
    stage = json.loads((folder / "stage.json").read_text())
    facts, line = stage["facts"], stage["data"]

    def number(pattern: str, text: str = line) -> int:
        return sum(int(one.replace(",", "")) for one in re.findall(pattern, text))

    ties, skipped = number(r"([\d,]+) ties left out"), number(r"([\d,]+) skipped")
    mapped = re.findall(r": ([\d,]+) rows → ([\d,]+)", line)
    read = number(r"([\d,]+) rows · ")
    truth = len(raw.texts or raw.demonstrations or raw.pairs or raw.labelled)
    cut = facts.get("rows_left_out", 0) // 2  # of `data` and of `eval_data`, which are the same here
    assert facts.get("rows_cut", 0) == 0
    if mapped:
        assert (int(mapped[0][0]), int(mapped[0][1])) == (raw.rows, truth)
    else:
        assert raw.rows == read + skipped + ties
    assert raw.left_out == ties + skipped + cut
    assert facts["rows"] == truth or raw.kind == "pretrain"
    if cut:
        assert re.search(rf"\b{2 * cut} left out", said)


# ---------------------------------------------------------------- the same numbers elsewhere


def _numbers_are_those_of_transformers(raw: Raw, folder: Path, base: Path) -> None:
    result = json.loads((folder / "result.json").read_text())
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "model")
    if raw.kind in ("sft", "pretrain"):
        model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
        rows = _documents(tokenizer, raw) if raw.kind == "pretrain" else _replies(tokenizer, raw)
        losses = [loss for ids, counted in rows for loss in _losses(model, ids, counted)]
        assert result["eval_loss"]["mean"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    elif raw.kind == "classifier":
        model: Any = AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
        right = [
            model.config.id2label[int(_scores(model, tokenizer(text)["input_ids"]).argmax())] == label
            for text, label in raw.labelled
        ]
        assert result["accuracy"]["mean"] == pytest.approx(sum(right) / len(right))
    elif raw.kind == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
        scored = (
            [float(_scores(model, _whole(tokenizer, prompt, side))) for side in (good, bad)]
            for prompt, good, bad in raw.pairs
        )
        margins = [good - bad for good, bad in scored]
        assert result["margin"]["mean"] == pytest.approx(sum(margins) / len(margins), abs=1e-4)
        assert result["accuracy"]["mean"] == pytest.approx(sum(m > 0 for m in margins) / len(margins))
    else:
        policy, reference = (
            AutoModelForCausalLM.from_pretrained(place).eval() for place in (folder / "model", base)
        )
        margins = []
        for prompt, good, bad in raw.pairs:
            gaps = [
                sum(_losses(reference, *_reply(tokenizer, prompt, side)))
                - sum(_losses(policy, *_reply(tokenizer, prompt, side)))
                for side in (good, bad)
            ]
            margins.append(0.1 * (gaps[0] - gaps[1]))
        assert result["margin"]["mean"] == pytest.approx(sum(margins) / len(margins), abs=1e-4)


def _rendered(tokenizer: Any, turns: Any, *, more: bool = False) -> str:
    given = dict(turns[0]) if turns and "role" not in turns[0] else {}
    return tokenizer.apply_chat_template(
        turns[bool(given) :], tools=given.get("tools"), tokenize=False, add_generation_prompt=more
    )


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _reply(tokenizer: Any, prompt: Text, reply: str) -> tuple[list[int], list[bool]]:
    """Tokens of a prompt and its reply, and which of them are learned: the reply with its end."""
    whole = _whole(tokenizer, prompt, reply)
    start = _ids(tokenizer, prompt if isinstance(prompt, str) else _rendered(tokenizer, prompt, more=True))
    assert whole[: len(start)] == start
    return whole, [position >= len(start) for position in range(len(whole))]


def _whole(tokenizer: Any, prompt: Text, reply: str) -> list[int]:
    if isinstance(prompt, str):
        return [*_ids(tokenizer, prompt), *_ids(tokenizer, reply), tokenizer.eos_token_id]
    return _ids(tokenizer, _rendered(tokenizer, [*prompt, {"role": "assistant", "content": reply}]))


def _replies(tokenizer: Any, raw: Raw) -> list[tuple[list[int], list[bool]]]:
    if raw.demonstrations:
        return [_reply(tokenizer, prompt, reply) for prompt, reply in raw.demonstrations]
    rows: list[tuple[list[int], list[bool]]] = []
    for turns in raw.texts:
        ids, counted, end = list[int](), list[bool](), 0
        for number, turn in enumerate(turns):
            if turn.get("role") != "assistant":
                continue
            before = _rendered(tokenizer, turns[:number], more=True)
            reply = _rendered(tokenizer, turns[: number + 1])[len(before) :].rstrip("\n")
            for text, learned in ((before[end:], False), (reply, True)):
                ids += _ids(tokenizer, text)
                counted += [learned] * (len(ids) - len(counted))
            end = len(before) + len(reply)
        rows.append((ids, counted))
    return rows


def _documents(tokenizer: Any, raw: Raw) -> list[tuple[list[int], list[bool]]]:
    """All texts, each with its end, one behind the other and cut into rows that share a token."""
    ids = [i for text in raw.texts for i in (*_ids(tokenizer, str(text)), tokenizer.eos_token_id)]
    return [(ids[start : start + 32], [True] * 32) for start in range(0, len(ids) - 1, 31)]


def _losses(model: Any, ids: list[int], counted: list[bool]) -> list[float]:
    with torch.no_grad():
        logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [-float(logp[at - 1, ids[at]]) for at in range(1, len(ids)) if counted[at]]


def _scores(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long)).logits[0]
