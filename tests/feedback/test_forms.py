"""From shown positions to the item's own order, and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keel.errors import UsageError
from keel.feedback.forms import FormError, answer_of, fields_of
from keel.feedback.locales import Translator
from keel.feedback.wording import said
from keel.votes.kinds import Answer, Project, Scale

PAIR, STRONG = Project("p"), Project("p", strength=True)
RATING = Project("p", task="rating", scales=(Scale("kind"), Scale("true", 0, 10)))
RANKING, EDIT, THUMBS = (Project("p", task=task) for task in ("ranking", "edit", "thumbs"))


def test_the_left_side_is_the_reply_that_stood_there():
    assert answer_of(PAIR, (0, 1), {"choice": "a"}).choice == "a"
    assert answer_of(PAIR, (1, 0), {"choice": "a"}).choice == "b"
    assert answer_of(PAIR, (1, 0), {"choice": "tie"}).choice == "tie"
    assert answer_of(STRONG, (1, 0), {"choice": "b:3"}) == Answer("a", strength=3)


def test_a_ranking_names_replies_not_positions():
    fields = {"place-0": "1", "place-1": "3", "place-2": "1"}
    assert answer_of(RANKING, (2, 0, 1), fields).ranking == [[1, 2], [0]]


def _answers():
    comment = st.sampled_from(["", "because"])
    pair = st.builds(Answer, choice=st.sampled_from(["a", "b", "tie", "both_bad"]), comment=comment)
    strong = st.builds(
        Answer, choice=st.sampled_from(["a", "b"]), strength=st.integers(1, 3), comment=comment
    )
    ratings = st.fixed_dictionaries({"kind": st.integers(1, 5), "true": st.integers(0, 10)})
    rating = st.builds(Answer, ratings=ratings, comment=comment)
    ranking = st.sampled_from([[[0], [1], [2]], [[2, 1], [0]], [[0, 1, 2]], [[1], [0, 2]]])
    return st.one_of(
        st.tuples(st.just(PAIR), pair, st.permutations([0, 1])),
        st.tuples(st.just(STRONG), strong, st.permutations([0, 1])),
        st.tuples(st.just(RATING), rating, st.just([0])),
        st.tuples(st.just(RANKING), st.builds(Answer, ranking=ranking), st.permutations([0, 1, 2])),
        st.tuples(st.just(EDIT), st.builds(Answer, text=st.just("better\n")), st.just([0])),
        st.tuples(st.just(THUMBS), st.builds(Answer, choice=st.sampled_from(["up", "down"])), st.just([0])),
    )


@given(_answers())
def test_a_form_that_is_filled_with_an_answer_gives_it_back(case):
    project, answer, shown = case
    back = answer_of(project, shown, fields_of(project, answer, shown))
    if answer.ranking is not None:
        assert [sorted(group) for group in answer.ranking] == back.ranking
    else:
        assert back == answer


@pytest.mark.parametrize(
    ("project", "fields", "key"),
    [
        (PAIR, {}, "problem.choice"),
        (PAIR, {"choice": "c"}, "problem.choice"),
        (PAIR, {"choice": "a:2"}, "problem.strength"),
        (STRONG, {"choice": "a"}, "problem.strength"),
        (STRONG, {"choice": "a:4"}, "problem.strength"),
        (THUMBS, {"choice": "a"}, "problem.choice"),
        (RATING, {"rating-0": "5"}, "problem.rating"),
        (RATING, {"rating-0": "6", "rating-1": "0"}, "problem.rating"),
        (RATING, {"rating-0": "٣", "rating-1": "0"}, "problem.rating"),
        (RANKING, {"place-0": "1", "place-1": "4"}, "problem.place"),
        (EDIT, {"text": " \n"}, "problem.text"),
    ],
)
def test_what_is_no_answer_is_refused(project, fields, key):
    with pytest.raises(FormError) as error:
        answer_of(project, (0, 1) if project.task != "rating" else (0,), fields)
    assert error.value.key == key
    assert Translator("ko")(key)


def test_a_choice_that_the_project_does_not_allow_is_refused():
    with pytest.raises((FormError, UsageError)):
        answer_of(Project("p", allow=()), (0, 1), {"choice": "tie"})


def test_an_answer_in_words_has_the_letters_that_were_seen():
    words = Translator("en")
    assert said(PAIR, Answer("a"), (1, 0), words) == "B is better"
    assert said(PAIR, Answer("a"), None, words) == "A is better"
    assert said(STRONG, Answer("b", strength=3), (1, 0), words) == "A much better"
    assert said(RANKING, Answer(ranking=[[1, 2], [0]]), (2, 0, 1), words) == "A = C > B"
    assert said(RATING, Answer(ratings={"kind": 2, "helpful": 3}), (0,), words) == "kind 2, Helpful 3"
