"""How many rows keel's own engine samples at the same time."""

from __future__ import annotations

from typing import Any, cast

import pytest

from keel.config import parse
from keel.errors import UsageError
from keel.rl import setup


def stage(**settings: Any) -> Any:
    common = {"kind": "grpo", "model": "m", "data": "d", "reward": "r", **settings}
    return parse({"name": "x", "stages": {"s": common}}).stages["s"]


@pytest.mark.parametrize(("rollout", "slots"), [({}, 64), ({"concurrency": 256}, 256)])
def test_the_engine_has_the_slots_of_the_config(rollout: dict[str, Any], slots: int) -> None:
    engine: Any = setup.open_engine(stage(rollout=rollout), *cast("tuple[Any, Any, Any]", (None,) * 3), None)
    assert engine.batch_size == slots


def test_they_are_refused_where_something_else_samples() -> None:
    with pytest.raises(UsageError, match=r"`rollout.concurrency` has no effect with `engine: reference`"):
        stage(engine="reference", rollout={"concurrency": 8})
    evaluate = {
        "kind": "evaluate",
        "models": ["m"],
        "data": "d",
        "reward": "r",
        "rollout": {"concurrency": 8},
    }
    with pytest.raises(UsageError, match=r"`rollout.concurrency` has no effect with `rollout.engine: keel`"):
        parse({"name": "x", "stages": {"e": evaluate}})
    assert stage(rollout={"engine": "vllm"}).rollout.rows_at_once == 256
