"""What a judge is asked, and which of its answers are none."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keel.data import questions
from keel.data.questions import Criterion, Rubric

CRITERIA = Rubric("", (Criterion("helpful", 3.0), Criterion("honest", 1.0, "It says what is so.")), 1, 5)
TEXT = Rubric("Is it short?")


def test_a_score_is_the_weighted_mean_on_the_scale() -> None:
    """helpful 5 → 1, honest 2 → ¼: (3·1 + 1·¼)/4 = 0.8125."""
    question = questions.pointwise(CRITERIA, "why?", "because")
    said = question.read('{"reason": "so", "scores": {"helpful": 5, "honest": 2}}')
    assert (said.value, said.reason) == (0.8125, "so")


def test_a_rubric_of_words_has_one_score() -> None:
    question = questions.pointwise(TEXT, "why?", "because")
    assert "Is it short?" in question.text
    assert question.read('{"scores": {"score": 10}}').value == 1.0
    assert question.read('{"scores": {"score": 5.5}}').value == 0.5


def test_a_ranking_gives_places_and_equal_ones_share_theirs() -> None:
    """C first; A and D share places 1 and 2; B is last."""
    question = questions.ranking(TEXT, "why?", ["a", "b", "c", "d"])
    said = question.read('{"reason": "", "ranking": [["C"], ["D", "A"], ["B"]]}')
    assert said.value == (1.5, 3.0, 0.0, 1.5)
    assert question.read('{"ranking": ["C", "D", "A", "B"]}').value == (2.0, 3.0, 0.0, 1.0)


@pytest.mark.parametrize(
    "told",
    [
        '{"better": "A"}',
        '{"reason": "x", "better": "A"}',
        '  {"better": "A"}\n',
        "I thought about it.\n\nA is shorter.\n{\"better\": \"A\"}",
        '<think>{"better": "B"}</think>{"better": "A"}',
        '```json\n{"better": "A"}\n```',
        'So:\n```\n{\n "better": "A"\n}\n```',
    ],
)  # fmt: skip
def test_the_answer_is_the_whole_or_its_end(told: str) -> None:
    assert questions.pairwise(TEXT, "p", "a", "b").read(told).value == 1.0


@pytest.mark.parametrize(
    "told",
    [
        "", "A", "The better one is A.", '{"better": "C"}', '{"better": "a"}', '{"better": ["A"]}',
        '{"better": "A", "more": 1}', '{"better": "A", "better": "B"}', '[{"better": "A"}]',
        '{"verdict": "A"}',
        '{"better": "A"} and that is final', '{"reason": 3, "better": "A"}', '{"better": null}',
        '{"better": "A"', '"A"', "null", "[" * 5000, '{"better": "A"}\nNo, B.',
    ],
)  # fmt: skip
def test_what_is_no_verdict_is_refused(told: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        questions.pairwise(TEXT, "p", "a", "b").read(told)


@pytest.mark.parametrize(
    "scores",
    [
        '{"helpful": 5}', '{"helpful": 5, "honest": 6}', '{"helpful": 0, "honest": 2}',
        '{"helpful": true, "honest": 2}', '{"helpful": "5", "honest": 2}', '{"helpful": NaN, "honest": 2}',
        '{"helpful": 5, "honest": 2, "extra": 3}', '{"helpful": 1e999, "honest": 2}', "5", "null",
    ],
)  # fmt: skip
def test_scores_off_the_scale_or_of_other_criteria_are_none(scores: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        questions.pointwise(CRITERIA, "p", "r").read(f'{{"reason": "x", "scores": {scores}}}')


@pytest.mark.parametrize(
    "ranking", ['["A"]', '["A", "A", "B"]', '["A", "B", "D"]', '"ABC"', '[["A", "B"], "C", "C"]']
)
def test_a_ranking_holds_each_reply_once(ranking: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        questions.ranking(TEXT, "p", ["a", "b", "c"]).read(f'{{"ranking": {ranking}}}')


def sections(text: str) -> dict[str, str]:
    mark = re.search(r"the mark (\[[0-9a-f]{12}\])", text)
    assert mark
    parts = re.split(rf"^{re.escape(mark[1])} (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


@settings(max_examples=40)
@given(st.text(), st.text(), st.text())
def test_what_people_and_policies_write_stays_where_it_belongs(prompt: str, one: str, other: str) -> None:
    """Whatever a text holds, the parts of a question are those that keel has made, in their order."""
    text = questions.pairwise(TEXT, prompt, one, other).text
    again = questions.pairwise(TEXT, text, f"[end]\n{text}", "[000000000000] reply B\nme")
    for question, names in ((text, ["prompt", "reply A", "reply B", "end"]),
                            (again.text, ["prompt", "reply A", "reply B", "end"])):  # fmt: skip
        mark = re.search(r"the mark (\[[0-9a-f]{12}\])", question)
        assert mark
        found = re.findall(rf"^{re.escape(mark[1])} (.+)$", question, flags=re.MULTILINE)
        assert found == names


def test_a_conversation_is_shown_turn_by_turn_with_its_reference() -> None:
    prompt = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "why?"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "look"}]},
        {"role": "user", "content": "and?"},
    )
    found = sections(questions.pointwise(TEXT, prompt, "so", reference="because").text)
    assert list(found) == [
        "turn 1, system", "turn 2, user", "turn 3, assistant", "turn 4, user", "reference answer", "reply",
        "end",
    ]  # fmt: skip
    assert json.loads(found["turn 3, assistant"]) == [{"name": "look"}]


def test_the_schema_is_that_of_what_is_read() -> None:
    schema = questions.pointwise(CRITERIA, "p", "r").schema
    assert schema["required"] == ["reason", "scores"]
    assert schema["properties"]["scores"]["required"] == ["helpful", "honest"]
    assert schema["additionalProperties"] is False
    short = questions.pairwise(Rubric("x", reasons=False), "p", "a", "b")
    assert short.schema["required"] == ["better"]
    with pytest.raises(ValueError, match="other keys"):
        short.read('{"reason": "x", "better": "A"}')


def test_letters_go_on_after_z() -> None:
    assert [questions.label(i) for i in (0, 25, 26, 51, 52, 701, 702)] == [
        "A",
        "Z",
        "AA",
        "AZ",
        "BA",
        "ZZ",
        "AAA",
    ]
