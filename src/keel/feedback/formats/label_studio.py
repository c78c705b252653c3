"""Label Studio's tasks with their annotations, as its JSON export writes and its import reads them.

A task's `data` has `prompt`, `answer1`, `answer2` … as plain text, and under `keel` the item as it is, which
is also where sources stand: Label Studio sends all of `data` to the annotator's browser, shown or not, so
leave them out (`sources=False`) for a blind comparison. A person stands in the `meta` of each result, which
Label Studio keeps. Its own place, `completed_by`, is left out: an import with an address that is none of its
users' is refused as a whole (1.23, `tasks/serializers.py`). In its own exports that is who is read.

    pairwise  Pairwise (left, right), else Choices (tie, both_bad, cannot_judge); Rating `strength`
    thumbs    Choices (up, down, cannot_judge)      rating   Rating or Number, one a scale
    ranking   Ranker; ties stand in the result's meta       edit     TextArea `edited`
    a comment is a TextArea `comment`

Sources: https://labelstud.io/guide/export#Label-Studio-JSON-format-of-annotated-tasks and the tags' pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

from keel.data.values import shown as in_words
from keel.feedback.formats.base import (
    Invalid,
    Row,
    answer_of,
    iso,
    item_json,
    item_of,
    key_of,
    plain_text,
    seconds_of,
    text_or_turns,
)
from keel.votes.answers import scales_of
from keel.votes.kinds import Answer, NewItem, PastJudgement, Project, Reply, Task

_CHOICES = {
    "tie": "tie", "same": "tie", "equal": "tie", "both good": "tie", "both_good": "tie",
    "both_bad": "both_bad", "both bad": "both_bad", "neither": "both_bad",
    "cannot_judge": "cannot_judge", "cannot judge": "cannot_judge", "unsure": "cannot_judge",
    "up": "up", "thumbs up": "up", "good": "up", "down": "down", "thumbs down": "down", "bad": "down",
    "left": "a", "right": "b", "a": "a", "b": "b", "answer1": "a", "answer2": "b",
}  # fmt: skip


def is_task(row: Row) -> bool:
    return isinstance(row.get("data"), Mapping) and (
        "annotations" in row or "predictions" in row or set(row) <= {"id", "data", "meta"}
    )


# ---------------------------------------------------------------- out


def write(
    items: Sequence[NewItem],
    votes_of: Mapping[str, Sequence[PastJudgement]],
    task: Task,
    *,
    sources: bool = True,
) -> Iterator[dict[str, Any]]:
    """A task an item, with an annotation a vote."""
    for number, item in enumerate(items, 1):
        kept = item_json(item)
        if not sources:
            kept["replies"] = [{"content": reply["content"]} for reply in kept["replies"]]
        data: dict[str, Any] = {"prompt": plain_text(item.prompt)}
        data |= {f"answer{i}": plain_text(reply.content) for i, reply in enumerate(item.replies, 1)}
        if task == "ranking":
            data["answers"] = [
                {"id": str(i), "title": f"Reply {i}", "body": plain_text(reply.content)}
                for i, reply in enumerate(item.replies, 1)
            ]
        data["keel"] = {**kept, "task": task}
        yield {
            "id": number,
            "data": data,
            "annotations": [_annotation(vote, task) for vote in votes_of.get(item.key, ())],
            "predictions": [],
        }


def _annotation(vote: PastJudgement, task: Task) -> dict[str, Any]:
    meta: dict[str, Any] = {"person": vote.person}
    if vote.is_model:
        meta["is_model"] = True
    if vote.shown is not None:
        meta["shown"] = list(vote.shown)
    if vote.at is not None:
        meta["at"] = vote.at
    if vote.seconds is not None:
        meta["seconds"] = vote.seconds
    row: dict[str, Any] = {
        "was_cancelled": False,
        "result": [_with_meta(result, n, meta) for n, result in enumerate(_results(vote.answer, task))],
    }
    if vote.seconds is not None:
        row["lead_time"] = vote.seconds
    if vote.at is not None:
        row["created_at"] = iso(vote.at)
    return row


def _with_meta(result: dict[str, Any], number: int, meta: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": f"keel-{number}", **result, "meta": {**meta, **result.get("meta", {})}}


def _results(answer: Answer, task: Task) -> Iterator[dict[str, Any]]:
    if answer.choice in ("a", "b") and task == "pairwise":
        side = {"a": "left", "b": "right"}[answer.choice]
        yield _result("pairwise", "choice", "answer1,answer2", selected=side)
    elif answer.choice is not None:
        yield _result("choices", "verdict", "prompt", choices=[answer.choice])
    if answer.strength is not None:
        yield _result("rating", "strength", "prompt", rating=answer.strength)
    for name, value in (answer.ratings or {}).items():
        yield _result("number", name, "answer1", number=value)
    if answer.ranking is not None:
        flat = [str(reply + 1) for group in answer.ranking for reply in group]
        groups = [list(group) for group in answer.ranking]
        yield {**_result("ranker", "ranking", "answers", ranker={"rank": flat}), "meta": {"groups": groups}}
    if answer.text is not None:
        yield _result("textarea", "edited", "answer1", text=[answer.text])
    if answer.comment:
        yield _result("textarea", "comment", "prompt", text=[answer.comment])


def _result(kind: str, name: str, of: str, **value: Any) -> dict[str, Any]:
    return {"from_name": name, "to_name": of, "type": kind, "value": value}


def labelling_config(project: Project) -> str:
    """The XML that a Label Studio project needs to show these tasks and take these answers."""
    inside = ['  <Header value="Prompt"/>', '  <Text name="prompt" value="$prompt"/>']
    if project.task == "pairwise":
        inside += [
            '  <Pairwise name="choice" toName="answer1,answer2" leftClass="a" rightClass="b"/>',
            '  <Text name="answer1" value="$answer1"/>',
            '  <Text name="answer2" value="$answer2"/>',
        ]
        inside += _choices(
            [choice for choice in project.allow if choice in ("tie", "both_bad", "cannot_judge")]
        )
        if project.strength:
            inside.append('  <Rating name="strength" toName="prompt" maxRating="3"/>')
    elif project.task == "ranking":
        inside += [
            '  <List name="answers" value="$answers" title="Replies"/>',
            '  <Ranker name="ranking" toName="answers"/>',
        ]
    else:
        inside.append('  <Text name="answer1" value="$answer1"/>')
        if project.task == "thumbs":
            inside += _choices(["up", "down", *(c for c in project.allow if c == "cannot_judge")])
        elif project.task == "edit":
            inside.append('  <TextArea name="edited" toName="answer1" value="$answer1" maxSubmissions="1"/>')
        else:
            inside += [
                f"  <Header value={quoteattr(scale.name)}/>\n  <Number name={quoteattr(scale.name)} "
                f'toName="answer1" min="{scale.low}" max="{scale.high}"/>'
                for scale in scales_of(project)
            ]
    if project.comment:
        inside.append('  <TextArea name="comment" toName="prompt" placeholder="Comment"/>')
    return "\n".join(["<View>", *inside, "</View>"]) + "\n"


def _choices(values: Sequence[str]) -> list[str]:
    if not values:
        return []
    lines = [f"    <Choice value={quoteattr(value)}/>" for value in values]
    return ['  <Choices name="verdict" toName="prompt" choice="single-radio">', *lines, "  </Choices>"]


# ---------------------------------------------------------------- in


def read(row: Row) -> tuple[Task, NewItem, list[PastJudgement]]:
    """A task's item and the votes of its annotations; cancelled ones are none."""
    data = row["data"]
    results = [
        (annotation, [r for r in annotation.get("result") or () if isinstance(r, Mapping)])
        for annotation in row.get("annotations") or ()
        if not annotation.get("was_cancelled")
    ]
    kept = data.get("keel")
    if isinstance(kept, Mapping) and "key" in kept:
        item, task = item_of(kept), kept.get("task", "pairwise")
    else:
        item = _item(row, data)
        task = _task([r for _, found in results for r in found], item)
    votes = [_vote(annotation, found, item, task) for annotation, found in results if found]
    return task, item, votes


def _item(row: Row, data: Row) -> NewItem:
    names = [name for name in data if str(name)[-1:].isdigit() and str(name)[:-1] + "1" in data]
    names = sorted(names, key=lambda name: (str(name)[:-1], str(name)[-1]))
    if not names:
        names = [n for n in ("answer", "response", "reply", "completion", "output", "text") if n in data][:1]
    asks = next((n for n in ("prompt", "question", "instruction", "input") if n in data), None)
    if asks is None or not names:
        raise Invalid(
            f"the task's data ({', '.join(map(str, data))}) must have a prompt and replies, as prompt, "
            "answer1, answer2"
        )
    contents = [text_or_turns(data[name], str(name)) for name in names]
    key = row.get("id")
    return NewItem(
        key=str(key) if key is not None else key_of(data[asks], contents),
        prompt=text_or_turns(data[asks], asks),
        replies=[Reply(content) for content in contents],
        columns={k: v for k, v in data.items() if k != asks and k not in names and v is not None},
    )


def _task(results: Sequence[Row], item: NewItem) -> Task:
    kinds = {str(result.get("type")) for result in results}
    if "ranker" in kinds or len(item.replies) > 2:
        return "ranking"
    if len(item.replies) == 2:
        return "pairwise"
    if kinds & {"rating", "number"}:
        return "rating"
    return "thumbs" if "choices" in kinds else "edit"


def _vote(annotation: Row, results: Sequence[Row], item: NewItem, task: Task) -> PastJudgement:
    meta = next((r["meta"] for r in results if isinstance(r.get("meta"), Mapping)), {})
    values: dict[str, Any] = {}
    for result in results:
        values = _merged(values, _said(result, item, task))
    by = annotation.get("completed_by")
    person = meta.get("person") or (by.get("email") or by.get("id") if isinstance(by, Mapping) else by)
    at = meta.get("at", seconds_of(annotation.get("created_at")))
    seconds = meta.get("seconds", annotation.get("lead_time"))
    return PastJudgement(
        item.key,
        "unknown" if person is None else str(person),
        answer_of(values),
        None if at is None else float(at),
        None if seconds is None else float(seconds),
        tuple(meta["shown"]) if meta.get("shown") is not None else None,
        bool(meta.get("is_model")),
    )


def _merged(values: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    if "ratings" in values and "ratings" in more:
        more = {**more, "ratings": {**values["ratings"], **more["ratings"]}}
    return {**values, **more}


def _said(result: Row, item: NewItem, task: Task) -> dict[str, Any]:
    """What one result says, as a part of an answer; {} for a tag that is none of keel's."""
    kind, name, value = str(result.get("type")), str(result.get("from_name")), result.get("value") or {}
    if kind == "pairwise":
        side = value.get("selected")
        if side not in ("left", "right"):
            raise Invalid(f'"selected" is {in_words(side)}, not left or right')
        return {"choice": "a" if side == "left" else "b"}
    if kind == "choices" and task in ("pairwise", "thumbs"):
        chosen = value.get("choices") or [None]
        choice = _CHOICES.get(str(chosen[0]).strip().lower())
        if choice is None:
            raise Invalid(f"the choice {in_words(chosen[0])} is none that is known")
        return {"choice": choice}
    if kind in ("rating", "number") and task in ("pairwise", "rating"):
        number = value.get(kind)
        if task == "pairwise":
            return {"strength": number} if name == "strength" else {}
        return {"ratings": {name: number}}
    if kind == "ranker" and task == "ranking":
        return {"ranking": _ranking(result, value, item)}
    if kind == "textarea":
        text = value.get("text")
        text = "\n".join(map(str, text)) if isinstance(text, Sequence) and not isinstance(text, str) else text
        return {"text": text} if task == "edit" and name != "comment" else {"comment": text or ""}
    return {}


def _ranking(result: Row, value: Row, item: NewItem) -> list[list[int]]:
    meta = result.get("meta")
    if isinstance(meta, Mapping) and meta.get("groups"):
        return [list(group) for group in meta["groups"]]
    order = next((v for v in (value.get("ranker") or {}).values() if v), [])
    ids = [str(i) for i in range(1, len(item.replies) + 1)]
    if sorted(map(str, order)) != sorted(ids):
        raise Invalid(
            f"a ranking of {in_words(order)} does not name each of {len(ids)} replies by its number"
        )
    return [[ids.index(str(one))] for one in order]
