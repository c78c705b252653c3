"""Sample replies for the page: the first ones, never picked ones."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from keel.report.notes import is_number, mapping, short
from keel.report.reading import StageRun
from keel.report.wording import number

SHOWN = 6  # prompts of an evaluation
DURING = 2  # replies at the first and at the last recorded step of PPO
LONGEST = 20_000  # characters of a prompt or a reply, as it is shown
MOST_TURNS, MOST_PARTS, MOST_MODELS = 100, 40, 100
_LONGEST_NAME = 200
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
        index, model = row.get("index", 0), short(row.get("model", ""), _LONGEST_NAME)
        if isinstance(index, int) and len(known := by_index.setdefault(index, {})) < MOST_MODELS:
            known.setdefault(model, row)
        if len(by_index) > shown:
            del by_index[max(by_index)]
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
    names = sorted(scores, key=lambda name: name == "total")[-MOST_PARTS:]
    parts = [_part(short(name, _LONGEST_NAME), scores[name]) for name in names]
    remarks = [f"proxy {number(row['proxy'], 2)}"] if is_number(row.get("proxy")) else []
    for name, value in list(mapping(row.get("rewards")).items())[:MOST_PARTS]:
        remarks += [f"{short(name, _LONGEST_NAME)} {number(value, 2)}"] if is_number(value) else []
    remarks += [f"KL {number(row['kl'], 1)} nats"] if is_number(row.get("kl")) else []
    remarks += [f"{number(row['length'])} tokens"] if is_number(row.get("length")) else []
    if reason := short(row.get("stop_reason") or "", _LONGEST_NAME):
        remarks.append(_STOPS.get(reason, reason))
    return Reply(model, position, _text(row.get("completion", "")), parts, remarks)


def _part(name: str, value: Any) -> tuple[str, str, float | None]:
    if not is_number(value):
        return name, "–", None
    share = round(100 * value, 1) if 0 <= value <= 1 else None
    return name, number(float(value), 2), share


def _turns(prompt: object) -> list[tuple[str, str]]:
    """Turns of a prompt: those of a conversation, or of a plain text that marks them in Anthropic's way."""
    if isinstance(prompt, list):
        return _bounded([mapping(turn) for turn in prompt[:MOST_TURNS]])
    text = short(prompt, LONGEST).strip()
    pieces = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    if len(pieces) < 3 or pieces[0].strip():
        return [("", text)]
    turns = [(role, content.strip()) for role, content in zip(pieces[1::2], pieces[2::2])][:MOST_TURNS]
    return [(role, content) for role, content in turns if content] or [("", text)]


def _bounded(turns: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Turns with at most `LONGEST` characters together."""
    shown: list[tuple[str, str]] = []
    room = LONGEST
    for turn in turns:
        if room <= 0:
            return [*shown, ("", "…")]
        content = short(turn.get("content", ""), room)
        shown.append((short(turn.get("role", ""), 40), content))
        room -= len(content)
    return shown


def _text(completion: object) -> str:
    if isinstance(completion, list):
        turns = [_turn(mapping(turn)) for turn in completion[:MOST_TURNS]]
        return short("\n\n".join(filter(None, turns)), LONGEST).strip()
    return short(completion, LONGEST).strip()


def _turn(turn: Mapping[str, Any]) -> str:
    """A turn in words: what is thought, what is said, what is called (→), what a tool answers (←)."""
    content, asked = turn.get("content"), turn.get("tool_calls")
    said = "" if content is None else short(content, LONGEST).strip()
    if turn.get("role") == "tool":
        return f"← {short(turn.get('name') or 'tool', 40)}: {said}"
    asked = asked if isinstance(asked, list) else []
    calls = [mapping(mapping(call).get("function", call)) for call in asked]
    lines = [f"→ {short(call.get('name'), 80)}({_arguments(call.get('arguments'))})" for call in calls]
    thought = short(turn.get("reasoning_content") or "", LONGEST).strip()
    thought = f"<think>\n{thought}\n</think>" if thought else ""
    return "\n".join(filter(None, [thought, said, *lines[:MOST_PARTS]]))


def _arguments(value: object) -> str:
    if not isinstance(value, dict):
        return "" if value is None else short(value, LONGEST)
    given = list(value.items())[:MOST_PARTS]
    return ", ".join(f"{short(name, 80)}={json.dumps(one, ensure_ascii=False)}" for name, one in given)
