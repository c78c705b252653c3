"""Three people on the same 999 pairs (PandaLM's test set): how they agree, and how much each is to be
believed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import krippendorff
import numpy as np
import pandas
import pytest
from crowdkit.aggregation import DawidSkene
from statsmodels.stats.inter_rater import cohens_kappa, fleiss_kappa

from keel.data.records import parse
from keel.evaluation import annotators, reliability
from keel.types import PreferenceRecord, Vote

pytestmark = pytest.mark.real
PEOPLE = ("annotator1", "annotator2", "annotator3")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    if "KEEL_REAL_DATA" not in os.environ:
        pytest.skip("KEEL_REAL_DATA names no folder of real data")
    path = next(Path(os.environ["KEEL_REAL_DATA"]).rglob("pandalm/testset-v1.json"))
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def votes(rows: list[dict[str, Any]]) -> annotators.Votes:
    """Which response they prefer, as the file says it: 0 neither, 1, 2."""
    return annotators.of_table([[row[who] for who in PEOPLE] for row in rows], 3, PEOPLE)


@pytest.fixture(scope="module")
def pairs(rows: list[dict[str, Any]]) -> list[PreferenceRecord]:
    """The same as comparisons, `chosen` being what most prefer, as data sets have it."""
    found = []
    for i, row in enumerate(rows):
        replies = [row[f"response{number}"] for number in (1, 2)]
        if not all(isinstance(reply, str) and reply.strip() for reply in replies) or replies[0] == replies[1]:
            continue  # nothing to compare; one reply of the file is not even text
        said = [row[who] for who in PEOPLE]
        chosen, rejected = (1, 2) if said.count(1) >= said.count(2) else (2, 1)
        choice = {0: "tie", chosen: "chosen", rejected: "rejected"}
        pair = {
            "prompt": f"{row['instruction']}\n{row['input']}",
            "chosen": row[f"response{chosen}"],
            "rejected": row[f"response{rejected}"],
            "votes": [{"annotator": who, "choice": choice[vote]} for who, vote in zip(PEOPLE, said)],
        }
        record = parse(pair, "preference", f"pandalm:{i}")
        assert isinstance(record, PreferenceRecord)
        found.append(record)
    return found


def test_agreement_is_that_of_the_libraries(votes: annotators.Votes) -> None:
    counts, said = votes.counts(), votes.choice.reshape(-1, 3)
    for level in ("nominal", "ordinal"):
        other = krippendorff.alpha(reliability_data=said.T, level_of_measurement=level, value_domain=range(3))
        assert annotators.krippendorff_alpha(counts, level) == pytest.approx(other, abs=1e-6)
    assert annotators.fleiss_kappa(counts) == pytest.approx(fleiss_kappa(counts), abs=1e-6)
    for (one, other), (kappa, n) in annotators.pairwise_kappa(votes).items():
        crossed = np.zeros((3, 3))
        np.add.at(crossed, (said[:, PEOPLE.index(one)], said[:, PEOPLE.index(other)]), 1)
        assert n == 999
        assert kappa == pytest.approx(cohens_kappa(crossed).kappa, abs=1e-6)
    assert (counts.max(axis=1) == 3).sum() == 879


def test_reliability_is_that_of_crowd_kit(votes: annotators.Votes) -> None:
    found = reliability.dawid_skene(votes, tolerance=0.0, most=25)
    table = pandas.DataFrame(
        {"task": votes.item, "worker": [PEOPLE[a] for a in votes.annotator], "label": votes.choice}
    )
    other = DawidSkene(n_iter=25, tol=-np.inf).fit(table)
    np.testing.assert_allclose(found.posterior, other.probas_.sort_index()[[0, 1, 2]].to_numpy(), atol=1e-6)
    print({who: round(float(r), 3) for who, r in zip(PEOPLE, found.reliability)})
    assert found.reliability.min() > 0.85


def test_a_made_up_annotator_who_guesses_is_found_out(pairs: list[PreferenceRecord]) -> None:
    rng, choices = np.random.default_rng(0), ("chosen", "rejected", "tie")
    with_guesses = [
        PreferenceRecord(
            r.prompt,
            r.chosen,
            r.rejected,
            r.p_chosen,
            None,
            (*r.votes, Vote("guess", choices[rng.integers(3)])),
        )
        for r in pairs
    ]
    found = reliability.of_annotators(with_guesses)
    assert found is not None
    print(annotators.agreement(pairs), found)
    for measure in ("dawid_skene", *(["bradley_terry"] if "bradley_terry" in found["guess"] else [])):
        assert min(found, key=lambda who: found[who][measure]) == "guess"
        assert all(found[who][measure] > 0.8 for who in PEOPLE)
    assert found["guess"]["dawid_skene"] < 0.6
    honest = np.array(reliability.labels(pairs, "reliability"), dtype=float)
    spoilt = np.array(reliability.labels(with_guesses, "reliability"), dtype=float)
    assert np.abs(honest - spoilt).mean() < 0.05
