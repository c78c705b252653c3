"""Decisions on findings made by hand."""

from __future__ import annotations

import pytest

from keel.diagnosis.control import Action, decide, raised
from keel.diagnosis.findings import Conditions, Finding
from keel.diagnosis.watch import Watch, replay


def finding(check: str = "kl_too_high", severity: str = "act") -> Finding:
    return Finding(check, severity, 7, "", "", "")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("policy", ["off", "warn", "adjust", "rollback", "stop"])
def test_only_what_is_to_be_acted_on_leads_to_an_action(policy):
    assert decide([finding(severity="warn"), finding(severity="note")], policy, 0, 3) is None
    assert decide([], policy, 0, 3) is None


def test_each_policy_does_what_it_says():
    assert decide([finding()], "off", 0, 3) is None
    assert decide([finding()], "warn", 0, 3) is None
    assert decide([finding()], "adjust", 0, 3) == Action("adjust", ("kl_too_high",), True, True)
    assert decide([finding("clip_fraction")], "adjust", 0, 3) == Action(
        "adjust", ("clip_fraction",), False, True
    )
    assert decide([finding("reward_implausible")], "adjust", 0, 3) == Action(
        "adjust", ("reward_implausible",), True, False
    )
    assert decide([finding("clip_fraction")], "rollback", 0, 3) == Action(
        "rollback", ("clip_fraction",), True, True
    )
    assert decide([finding()], "stop", 0, 3) == Action("stop", ("kl_too_high",))


def test_what_no_change_helps_is_not_adjusted_but_rolled_back():
    assert decide([finding("kl_negative")], "adjust", 0, 3) is None
    assert decide([finding("kl_negative")], "rollback", 0, 3) == Action(
        "rollback", ("kl_negative",), True, True
    )


def test_changes_of_several_findings_add_up():
    both = [finding("clip_fraction"), finding("reward_implausible"), finding("repetition", "warn")]
    assert decide(both, "adjust", 0, 3) == Action(
        "adjust", ("clip_fraction", "reward_implausible"), True, True
    )


def test_attempts_end():
    assert decide([finding()], "adjust", 3, 3) is None
    assert decide([finding()], "rollback", 2, 3) == Action("rollback", ("kl_too_high",), True, True)
    assert decide([finding()], "rollback", 3, 3) == Action("stop", ("kl_too_high",))


def test_the_coefficient_is_raised_by_half():
    assert raised(0.2) == pytest.approx(0.3)
    assert raised(0.0) == 0.0


ROWS = [{"step": u, "objective/kl_exact": 30.0} for u in range(1, 41)]


def test_after_an_action_windows_begin_anew_and_what_lasts_is_found_again():
    watch, found = replay(ROWS, Conditions(kl_target=6.0), acted=[10])
    assert [f.step for f in found] == [10, 20]
    assert watch.history.since == 10


def test_a_watch_that_is_resumed_says_what_one_that_was_not_says():
    undisturbed, found = replay(ROWS, Conditions(kl_target=6.0), acted=[10])
    for cut in (5, 10, 15, 25):
        resumed, before = replay(ROWS[:cut], Conditions(kl_target=6.0), acted=[10])
        assert isinstance(resumed, Watch)
        for row in ROWS[cut:]:
            before += resumed.see(row["step"], row)
            if row["step"] == 10:
                resumed.acted(10)
        assert before == found
        assert resumed.history == undisturbed.history
