"""Sample replies for the page: the first ones, never picked ones."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from keel.report.reading import StageRun
from keel.report.wording import number

SHOWN = 6  # prompts of an evaluation
DURING = 2  # replies at the first and at the last recorded step of PPO
_STOPS = {
    "eos": "ended by itself",
    "stop": "ended at a stop token",
    "length": "cut off",
    "turns": "out of turns",
    "tool": "ended by a tool that failed",
}


class Reply(NamedTuple):
    """One reply with what was measured on it."""

    model: str
    position: int  # of the model, for its colour
    text: str
    parts: list[tuple[str, str, float | None]]  # (name, value, value in percent when it is a share)
    remarks: list[str]  # "proxy 1.20", "KL 3.1 nats", …


class Sample(NamedTuple):
    """A prompt and its replies."""

    label: str
    prompt: list[tuple[str, str]]  # (role, text); the role is "" for plain text
    replies: list[Reply]


def side_by_side(stage: StageRun, shown: int = SHOWN) -> list[Sample]:
    """The first `shown` prompts by index, each with the reply of every model, the reference first."""
    models = list(stage.result.get("models") or {})
    by_index: dict[int, dict[str, dict[str, Any]]] = {}
    for row in stage.samples():
        by_index.setdefault(int(row.get("index", 0)), {}).setdefault(str(row.get("model", "")), row)
    reference = stage.result.get("reference")
    samples = []
    for index in sorted(by_index)[:shown]:
        rows = by_index[index]
        ordered = sorted(
            rows, key=lambda name: (name != reference, models.index(name) if name in models else 99)
        )
        prompt = _turns(next(iter(rows.values())).get("prompt", ""))
        found = [_reply(name, models.index(name) if name in models else 0, rows[name]) for name in ordered]
        samples.append(Sample(f"Prompt {index + 1}", prompt, found))
    return samples


def during(stage: StageRun, shown: int = DURING) -> list[Sample]:
    """The first replies recorded at the first and at the last step of a PPO stage."""
    first: list[dict[str, Any]] = []
    last: list[dict[str, Any]] = []
    for row in stage.samples():
        if not first or (row.get("step") == first[0].get("step") and len(first) < shown):
            first.append(row)
        elif row.get("step") == first[0].get("step"):
            continue
        elif not last or row.get("step") != last[0].get("step"):
            last = [row]
        elif len(last) < shown:
            last.append(row)
    return [
        Sample(f"Update {row.get('step', '–')}", _turns(row.get("prompt", "")), [_reply("", 1, row)])
        for row in (*first, *last)
    ]


def _reply(model: str, position: int, row: dict[str, Any]) -> Reply:
    gold = row.get("gold")
    scores = gold if isinstance(gold, dict) else {} if gold is None else {"gold": gold}
    parts = [_part(name, scores[name]) for name in sorted(scores, key=lambda name: name == "total")]
    remarks = [f"proxy {number(row['proxy'], 2)}"] if _is_number(row.get("proxy")) else []
    rewards = row.get("rewards")
    for name, value in rewards.items() if isinstance(rewards, dict) else ():
        remarks += [f"{name} {number(value, 2)}"] if _is_number(value) else []
    remarks += [f"KL {number(row['kl'], 1)} nats"] if _is_number(row.get("kl")) else []
    remarks += [f"{number(row['length'])} tokens"] if _is_number(row.get("length")) else []
    remarks += (
        [_STOPS.get(str(row["stop_reason"]), str(row["stop_reason"]))] if row.get("stop_reason") else []
    )
    return Reply(model, position, _text(row.get("completion", "")), parts, remarks)


def _part(name: str, value: Any) -> tuple[str, str, float | None]:
    if not _is_number(value):
        return name, "–", None
    share = round(100 * value, 1) if 0 <= value <= 1 else None
    return name, number(float(value), 2), share


def _turns(prompt: object) -> list[tuple[str, str]]:
    """Turns of a prompt: those of a conversation, or of a plain text that marks them in Anthropic's way."""
    if isinstance(prompt, list):
        return [(str(turn.get("role", "")), str(turn.get("content", ""))) for turn in prompt]
    text = str(prompt).strip()
    pieces = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    if len(pieces) < 3 or pieces[0].strip():
        return [("", text)]
    turns = [(role, content.strip()) for role, content in zip(pieces[1::2], pieces[2::2])]
    return [(role, content) for role, content in turns if content] or [("", text)]


def _text(completion: object) -> str:
    if isinstance(completion, list):
        return "\n\n".join(filter(None, map(_turn, completion))).strip()
    return str(completion).strip()


def _turn(turn: dict[str, Any]) -> str:
    """A turn in words: what is said, what is called (→), what a tool answers (←)."""
    said = str(turn.get("content") or "").strip()
    if turn.get("role") == "tool":
        return f"← {turn.get('name') or 'tool'}: {said}"
    calls = [call.get("function", call) for call in turn.get("tool_calls") or () if isinstance(call, dict)]
    lines = [f"→ {call.get('name')}({_arguments(call.get('arguments'))})" for call in calls]
    return "\n".join(filter(None, [said, *lines]))


def _arguments(value: object) -> str:
    if not isinstance(value, dict):
        return "" if value is None else str(value)
    return ", ".join(f"{name}={json.dumps(one, ensure_ascii=False)}" for name, one in value.items())


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
