"""Bradley–Terry strengths where one thing has won, or lost, everything."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from keel.evaluation.order import Comparisons, bradley_terry, order

NAMES = ("a", "b", "c", "d", "extra")


def votes(extra_wins: float | None) -> Comparisons:
    """Of each two of four the one that comes first wins three of four times; the extra one meets each of them
    once and always gets `extra_wins`, or is not there at all."""
    met = [(i, j, point) for i, j in combinations(range(4), 2) for point in (1.0, 1.0, 1.0, 0.0)]
    if extra_wins is not None:
        met += [(4, i, extra_wins) for i in range(4)]
    first, second, points = (np.array(column) for column in zip(*met, strict=True))
    names = NAMES if extra_wins is not None else NAMES[:4]
    return Comparisons(first, second, points, np.arange(len(met)), names)


@pytest.mark.parametrize(("extra_wins", "best_first"), [(0.0, "a b c d extra"), (1.0, "extra a b c d")])
def test_one_that_never_wins_or_loses_leaves_the_others_apart(extra_wins: float, best_first: str) -> None:
    with_extra, alone = bradley_terry(votes(extra_wins)).strength, bradley_terry(votes(None)).strength
    assert np.isfinite(with_extra).all()
    assert [NAMES[i] for i in np.argsort(-with_extra)] == best_first.split()
    np.testing.assert_allclose(np.diff(with_extra[:4]), np.diff(alone), rtol=0.15)
    told = order(votes(extra_wins))
    assert told is not None
