"""The recipe `human-loop` from end to end, with simulated people: pairs, votes, reward model, PPO, new pairs.
Minutes; `make test-slow`."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sqlalchemy")

from keel.config import read
from keel.errors import WaitingError
from keel.pipeline.pipeline import Pipeline
from keel.votes import open_store
from keel.votes.kinds import Answer
from keel.worlds import helpdesk

RECIPE = Path(__file__).parents[2] / "recipes" / "human-loop.yaml"
SMALL = [
    "threads=1", "device=cpu", "base.data.rows=1500", "ppo.updates=2", "ppo.batch_size=16",
    "ppo.mini_batch=16", "ppo.micro_batch=16", "judge.data.rows=8", "reward.normalize=16",
]  # fmt: skip


def helpful(prompt: Any, replies: Any, rng: random.Random) -> str:
    """What somebody says who mostly sees which reply is better."""
    asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    gold = [helpdesk.gold(asked, str(reply), {})["total"] for reply in replies]
    if gold[0] == gold[1]:
        return "tie"
    return "ab"[(gold[1] > gold[0]) ^ (rng.random() < 0.1)]


def vote_on_everything(db: str, project: str, names: tuple[str, ...] = ("kim", "lee")) -> int:
    """Simulated people take turns until nothing is left. How often they voted."""
    rng, votes = random.Random(0), 0
    with open_store(db, create=False) as store:
        people = [store.add_person(f"{name}-{project}") for name in names]
        waiting = True
        while waiting:
            waiting = False
            for person in people:
                given = store.next_item(project, person.id)
                if given is None:
                    continue
                by_side = sorted(zip(given.shown, given.replies, strict=True), key=lambda pair: pair[0])
                choice = helpful(given.prompt, [reply.content for _, reply in by_side], rng)
                store.cast(project, person.id, given.item, Answer(choice=choice), f"{given.item}", 4.0)
                waiting, votes = True, votes + 1
    return votes


@pytest.mark.slow
def test_sixty_votes_make_a_reward_model_a_policy_and_new_pairs(tmp_path: Path) -> None:
    db = f"sqlite:///{tmp_path / 'label.db'}"
    config = read(RECIPE, [*SMALL, f"asked.label.db={db}", f"asked-again.label.db={db}"])
    folder = tmp_path / "human-loop"

    def again() -> Pipeline:
        pipeline = Pipeline(config, folder, str)
        pipeline.run()
        return pipeline

    with pytest.raises(
        WaitingError, match=r"(\d+) of \1 votes on \1 pairs are missing, in the project human-loop-asked"
    ):
        again()
    assert 40 < vote_on_everything(db, "human-loop-asked") <= 64
    with pytest.raises(
        WaitingError, match=r"asked-again: \d+ of \d+ votes .* the project human-loop-asked-again"
    ):
        again()
    result = json.loads((folder / "stages/reward/result.json").read_text())
    assert result["accuracy"]["n"] >= 1
    assert (folder / "stages/ppo/model/model.safetensors").exists()
    with open_store(db, create=False) as store:
        new = {item.prompt[-1]["content"]: item for item in store.items("human-loop-asked-again")}
        assert 40 < len(new) <= 64
        assert all(reply.source == "ppo" for item in new.values() for reply in item.replies)
    trained = (folder / "stages/ppo/fingerprint").read_text()
    # votes on the new pairs end the run, and train nothing again
    vote_on_everything(db, "human-loop-asked-again")
    pipeline = again()
    assert all(pipeline.is_done(name) for name in config.stages)
    assert (folder / "stages/ppo/fingerprint").read_text() == trained
    # somebody changes an old vote: reward model and policy are trained again
    with open_store(db, create=False) as store:
        person = store.person_named("kim-human-loop-asked")
        past = store.history("human-loop-asked", person.id)[0]
        other = "b" if past.answer.choice == "a" else "a"
        store.cast("human-loop-asked", person.id, past.item, Answer(choice=other), "changed")
    fresh = Pipeline(config, folder, str)
    assert [name for name in config.stages if not fresh.is_done(name)] == [
        "asked", "reward", "ppo", "judge", "asked-again",
    ]  # fmt: skip
