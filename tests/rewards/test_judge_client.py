"""Servers that are killed, slow, overloaded, confused or strange; what was said and what it cost, kept."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keel.data import questions
from keel.data.questions import Rubric, Verdict
from keel.errors import BudgetError, RewardError
from keel.rewards.judge import client
from keel.rewards.judge.client import Endpoint, Remote, Unanswered, retry_after
from keel.rewards.judge.ledger import Ledger

pytest.importorskip("openai")
RUBRIC = Rubric("red is good")
RED = '{"reason": "r", "scores": {"score": 10}}'
Ask = Callable[..., Any]


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)


def asked(*replies: str) -> list[questions.Question]:
    return [questions.pointwise(RUBRIC, "the cat?", reply) for reply in replies]


def remote(judge: Any, ledger: Ledger | None = None, *, stop: bool = True, **settings: Any) -> Remote:
    address = judge if isinstance(judge, str) else judge.address
    endpoint = Endpoint(address, "scripted", **{"tries": 3, "timeout": 2.0, **settings})
    return Remote(endpoint, ledger or Ledger(None, "s/judge"), stop_at_failure=stop)


def test_verdicts_come_in_the_order_of_the_questions(scripted_judge: Ask) -> None:
    judge = scripted_judge()
    replies = ["it is red.", "it is blue.", "red", "no"] * 3 + [f"red {i}" for i in range(20)]
    said = remote(judge, concurrency=5).ask(asked(*replies))
    assert [v.value for v in said] == [float("red" in reply) for reply in replies]
    assert len(judge.asked) == len(set(replies))  # equal questions are asked once


def test_the_answer_is_asked_for_as_a_schema_and_without_other_peoples_keys(
    scripted_judge: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-address")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-secret")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "project-secret")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: Bearer of-another-secret")
    judge = scripted_judge()
    remote(judge).ask(asked("red"))
    remote(judge, key="mine").ask(asked("red"))
    body, headers = judge.bodies[0], judge.headers
    assert body["response_format"]["json_schema"]["schema"]["required"] == ["reason", "scores"]
    assert (body["temperature"], body["max_tokens"], body["model"]) == (0.0, 1024, "scripted")
    assert headers[0]["authorization"] == "Bearer none"
    assert headers[1]["authorization"] == "Bearer mine"
    assert not [value for one in headers for value in one.values() if "secret" in value]


def test_a_server_without_schemas_is_asked_for_json_and_one_without_that_by_words(
    scripted_judge: Ask,
) -> None:
    def script(text: str, number: int) -> Any:
        kind = judge.bodies[number].get("response_format", {}).get("type")
        if kind:
            return scripted_judge.said(status=400, raw=json.dumps({"error": {"message": kind}}).encode())
        return scripted_judge.likes_red(text)

    judge = scripted_judge(script)
    asking = remote(judge, tries=1)
    assert [v.value for v in asking.ask(asked("red", "blue"))] == [1.0, 0.0]
    before = len(judge.asked)
    asking.ask(asked("pink"))
    assert len(judge.asked) == before + 1  # what works is remembered


def test_a_model_with_another_name_for_the_limit_is_asked_by_it(scripted_judge: Ask) -> None:
    def script(text: str, number: int) -> Any:
        if "max_tokens" in judge.bodies[number]:
            error = {"error": {"message": "use max_completion_tokens instead"}}
            return scripted_judge.said(status=400, raw=json.dumps(error).encode())
        return scripted_judge.likes_red(text)

    judge = scripted_judge(script)
    assert remote(judge, tries=1).ask(asked("red"))[0].value == 1.0
    assert judge.bodies[-1]["max_completion_tokens"] == 1024


@pytest.mark.parametrize("status", [408, 429, 500, 503, 529])
def test_a_status_that_passes_is_waited_for(status: int, scripted_judge: Ask) -> None:
    def script(text: str, number: int) -> Any:
        return scripted_judge.said(status=status) if number < 2 else scripted_judge.likes_red(text)

    judge = scripted_judge(script)
    ledger = Ledger(None, "s/judge")
    assert remote(judge, ledger).ask(asked("red"))[0].value == 1.0
    assert (len(judge.asked), ledger.calls) == (3, 3)  # those that brought nothing count, too


def test_retry_after_holds_for_all_questions(scripted_judge: Ask) -> None:
    times: list[float] = []

    def script(text: str, number: int) -> Any:
        times.append(time.monotonic())
        if number == 0:
            return scripted_judge.said(status=429, headers={"retry-after": "0.4"})
        return scripted_judge.likes_red(text)

    judge = scripted_judge(script)
    said = remote(judge, concurrency=1).ask(asked("red", "blue", "pink"))
    assert [v.value for v in said] == [1.0, 0.0, 0.0]
    assert min(t - times[0] for t in times[1:]) >= 0.4


def test_retry_after_is_a_number_or_a_date() -> None:
    assert retry_after({}) == 0.0
    assert retry_after({"retry-after": "7"}) == 7.0
    assert retry_after({"retry-after-ms": "250", "retry-after": "7"}) == 0.25
    assert retry_after({"retry-after": "-3"}) == 0.0
    assert retry_after({"retry-after": "soon"}) == 0.0
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0
    assert retry_after({"retry-after": "Wed, 21 Oct 2099 07:28:00 GMT"}) > 1e9


def test_who_asks_to_be_left_alone_for_hours_is_down(scripted_judge: Ask) -> None:
    judge = scripted_judge(lambda text, n: scripted_judge.said(status=429, headers={"retry-after": "7200"}))
    said = remote(judge).ask(asked("red"))[0]
    assert isinstance(said, Unanswered)
    assert "status 429, and it asks to be left alone for 7200 s" in said.reason
    assert len(judge.asked) == 1


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (
            b'{"error": {"message": "You exceeded your current quota."}}',
            "status 429: You exceeded your current quota.",
        ),
        (b"overloaded", "status 429: overloaded"),
        (b"<html>429 Too Many Requests</html>", "status 429"),
        (b'{"detail": "no such model"}', "status 429: no such model"),
        (b'{"detail": [1]}', "status 429"),
    ],
)
def test_what_a_server_says_beside_its_status_is_told(raw: bytes, reason: str, scripted_judge: Ask) -> None:
    judge = scripted_judge(lambda text, n: scripted_judge.said(status=429, raw=raw))
    (said,) = remote(judge, tries=1).ask(asked("red"))
    assert said.reason == reason


def test_a_killed_server_is_an_end_that_says_so(scripted_judge: Ask) -> None:
    judge = scripted_judge()
    asking = remote(judge)
    asking.ask(asked("red"))
    judge.kill()
    said = asking.ask(asked("blue", "pink"))
    gone = f"{judge.address} cannot be reached"
    assert all(isinstance(one, Unanswered) and gone in one.reason for one in said)
    assert "refused" in said[0].reason.lower()


def test_a_server_that_hangs_up_is_asked_again(scripted_judge: Ask) -> None:
    def script(text: str, number: int) -> Any:
        return scripted_judge.said(hang_up=True) if number == 0 else scripted_judge.likes_red(text)

    assert remote(scripted_judge(script)).ask(asked("red"))[0].value == 1.0


@pytest.mark.parametrize("how", [{"wait": 5.0}, {"drip": 0.05}])
def test_a_slow_server_is_given_up_on_even_where_it_drips(how: dict[str, float], scripted_judge: Ask) -> None:
    judge = scripted_judge(lambda text, n: scripted_judge.said(RED, **how))
    begun = time.monotonic()
    said = remote(judge, timeout=0.3, tries=2).ask(asked("red"))[0]
    assert isinstance(said, Unanswered)
    assert "no answer within 0.3 s" in said.reason
    assert time.monotonic() - begun < 2


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"content": "Nice one!"}, "its answer cannot be read: 'Nice one!'"),
        ({"content": ""}, "its answer has no text"),
        ({"content": RED, "finish": "length"}, "cut off at `max_new_tokens` 1024"),
        ({"raw": b"<html>hello</html>"}, "no chat completion"),
        ({"raw": b"{}"}, "no chat completion"),
        ({"raw": b'{"choices": []}'}, "no chat completion"),
        ({"raw": b"\xff\xfe{"}, "no chat completion"),
        ({"raw": b'{"choices": [{"message": 5}]}'}, "no chat completion"),
    ],
)
def test_garbage_is_asked_for_again_and_then_named(
    said: dict[str, Any], reason: str, scripted_judge: Ask
) -> None:
    judge = scripted_judge(lambda text, n: scripted_judge.said(**said))
    found = remote(judge, tries=2).ask(asked("red"))[0]
    assert isinstance(found, Unanswered)
    assert reason in found.reason
    assert len(judge.asked) == 2
    assert judge.asked[1].endswith("give the JSON object alone.") == ("content" in said)


def test_one_unanswered_question_stops_the_others_or_leaves_them(scripted_judge: Ask) -> None:
    def script(text: str, number: int) -> Any:
        return scripted_judge.said("?") if "bad" in text else scripted_judge.likes_red(text)

    replies = ["bad", *(f"red {i}" for i in range(12))]
    judge = scripted_judge(script)
    said = remote(judge, concurrency=1, stop=False).ask(asked(*replies))
    assert isinstance(said[0], Unanswered)
    assert [v.value for v in said[1:]] == [1.0] * 12
    judge = scripted_judge(script)
    said = remote(judge, concurrency=1).ask(asked(*replies))
    assert len(judge.asked) == 3
    assert [one.asked for one in said] == [True] + [False] * 12


@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_a_refusal_ends_the_whole_without_the_key(status: int, scripted_judge: Ask) -> None:
    error = {"error": {"message": "wrong key sk-42secret"}}
    said = {
        "status": status,
        "raw": json.dumps(error).encode(),
        "headers": {"location": "http://127.0.0.1:1/"},
    }
    judge = scripted_judge(lambda text, n: scripted_judge.said(**said))
    named = rf"{judge.address} \(model scripted\) refuses to answer: status {status}"
    with pytest.raises(RewardError, match=named) as raised:
        remote(judge, key="sk-42secret", stop=False).ask(asked("red", "blue"))
    assert "sk-42secret" not in str(raised.value)
    assert "sk-42secret" not in repr(remote(judge, key="sk-42secret").endpoint)


def test_a_question_that_a_server_will_not_take_ends_alone(scripted_judge: Ask) -> None:
    def script(text: str, number: int) -> Any:
        error = json.dumps({"error": {"message": "too many tokens"}}).encode()
        return scripted_judge.said(status=413, raw=error) if "bad" in text else scripted_judge.likes_red(text)

    judge = scripted_judge(script)
    said = remote(judge, stop=False).ask(asked("bad", "red"))
    assert isinstance(said[0], Unanswered)
    assert said[0].reason == "status 413: too many tokens"
    assert said[1].value == 1.0


# ---------------------------------------------------------------- the ledger


def test_what_was_said_is_not_asked_again(scripted_judge: Ask, tmp_path: Path) -> None:
    judge, file = scripted_judge(), tmp_path / "run" / "judge.jsonl"
    remote(judge, Ledger(file, "grpo/judge")).ask(asked("red", "blue"))
    again = Ledger(file, "grpo/judge")
    assert (again.calls, again.tokens) == (2, 14)
    judge.kill()
    elsewhere = "http://127.0.0.1:9/v1"  # who serves the model is no part of what it says
    assert [v.value for v in remote(elsewhere, again).ask(asked("blue", "red"))] == [0.0, 1.0]
    assert Ledger(file, "evaluate/judge").calls == 0  # a budget is a stage's
    changed = remote(elsewhere, again, temperature=0.5).ask(asked("red"))[0]
    assert isinstance(changed, Unanswered)


def test_another_process_that_tears_a_line_costs_no_other_line(scripted_judge: Ask, tmp_path: Path) -> None:
    """A ledger that is opened while others write changes none of their bytes."""
    judge, file = scripted_judge(), tmp_path / "judge.jsonl"
    one = remote(judge, Ledger(file, "s/judge"))
    one.ask(asked("red"))
    with file.open("ab") as handle:
        handle.write(b'{"key": "torn')
    before = file.read_bytes()
    other = remote(judge, Ledger(file, "s/judge"))
    assert file.read_bytes() == before
    one.ask(asked("blue"))
    other.ask(asked("red", "blue"))
    assert one.ledger.calls == other.ledger.calls == Ledger(file, "s/judge").calls == len(judge.asked) == 2


def test_a_torn_or_changed_line_is_passed_over_and_asked_again(scripted_judge: Ask, tmp_path: Path) -> None:
    judge, file = scripted_judge(), tmp_path / "judge.jsonl"
    remote(judge, Ledger(file, "s/judge"), concurrency=1).ask(asked("red", "blue", "pink"))
    lines = file.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b'\\"score\\": 1', b'\\"score\\": 9')
    file.write_bytes(b"".join(lines[:2]) + lines[2][:40])
    told: list[str] = []
    ledger = Ledger(file, "s/judge", say=told.append)
    assert told == [f"{file}: 2 broken lines are passed over; what they held is asked again"]
    assert len(ledger.answers) == 1
    before = len(judge.asked)
    assert [v.value for v in remote(judge, ledger).ask(asked("red", "blue", "pink"))] == [1.0, 0.0, 0.0]
    assert len(judge.asked) == before + 2
    assert len(Ledger(file, "s/judge").answers) == 3  # what follows a torn line begins on its own


@pytest.mark.parametrize(
    "content", [b"\x00\xff\n", b"[1]\n", b'{"sum": 1}\n', b"nonsense", b'{"key": 1}\n\n\n']
)
def test_a_strange_ledger_is_no_ledger(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "judge.jsonl").write_bytes(content)
    ledger = Ledger(tmp_path / "judge.jsonl", "s/judge")
    ledger.begin("k")
    ledger.end("k", "told", 3)
    assert Ledger(tmp_path / "judge.jsonl", "s/judge").answers == {"k": "told"}


def test_a_budget_of_calls_is_kept_to_the_call(scripted_judge: Ask, tmp_path: Path) -> None:
    judge, file = scripted_judge(), tmp_path / "judge.jsonl"
    replies = [f"red {i}" for i in range(20)]
    with pytest.raises(BudgetError, match=r"s/judge: its budget is spent \(6 of 6 calls\).*raise `budget`"):
        remote(judge, Ledger(file, "s/judge", calls=6), concurrency=4).ask(asked(*replies))
    assert len(judge.asked) == 6
    with pytest.raises(BudgetError):
        remote(judge, Ledger(file, "s/judge", calls=6)).ask(asked(*replies))
    assert len(judge.asked) == 6
    said = remote(judge, Ledger(file, "s/judge", calls=20)).ask(asked(*replies))
    assert all(isinstance(one, Verdict) for one in said)
    assert len(judge.asked) == 20  # none twice


def test_processes_of_a_run_share_answers_and_budget(scripted_judge: Ask, tmp_path: Path) -> None:
    judge, file = scripted_judge(), tmp_path / "judge.jsonl"
    one, other = (remote(judge, Ledger(file, "s/judge", calls=3), concurrency=1) for _ in range(2))
    one.ask(asked("red", "blue"))
    assert [v.value for v in other.ask(asked("blue", "red"))] == [0.0, 1.0]
    assert len(judge.asked) == 2
    other.ask(asked("pink"))
    with pytest.raises(BudgetError, match=r"3 of 3 calls"):
        one.ask(asked("green"))
    assert one.ledger.calls == other.ledger.calls == len(judge.asked) == 3
    file.unlink()  # somebody wants to ask again
    other.ledger.most_calls = 9
    other.ask(asked("grey"))
    assert other.ledger.calls == 4


def test_calls_that_other_processes_have_under_way_are_spent(tmp_path: Path) -> None:
    """Also those that nobody ends, whose process was killed."""
    file = tmp_path / "judge.jsonl"
    one, other = (Ledger(file, "s/judge", calls=3) for _ in range(2))
    one.begin("a")
    other.begin("b")
    other.end("b", "told", 7)
    Ledger(file, "t/judge", calls=1).begin("a")  # a budget is a stage's
    one.begin("c")
    for ledger in (one, other):
        with pytest.raises(BudgetError, match="3 of 3 calls"):
            ledger.begin("d")
    one.end("a", None, 5)
    again = Ledger(file, "s/judge")
    assert (again.calls, again.tokens, again.answers) == (3, 12, {"b": "told"})
    Ledger(file, "s/judge", calls=4).begin("d")


def test_processes_that_ask_at_once_do_not_both_take_the_last_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = Ledger._check
    monkeypatch.setattr(Ledger, "_check", lambda ledger: (check(ledger), time.sleep(0.005)))
    begun: list[int] = []
    ready = threading.Barrier(6)

    def ask(number: int) -> None:
        ledger = Ledger(tmp_path / "judge.jsonl", "s/judge", calls=20)  # one a thread, as one a process
        ready.wait()
        with contextlib.suppress(BudgetError):
            for _ in range(21):
                ledger.begin("k")
                begun.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(begun) == 20


def test_a_budget_of_tokens_ends_after_what_is_under_way(scripted_judge: Ask) -> None:
    judge, ledger = scripted_judge(), Ledger(None, "s/judge", tokens=20)
    with pytest.raises(BudgetError, match="21 of 20 tokens"):
        remote(judge, ledger, concurrency=1).ask(asked("a", "b", "c", "d", "e"))
    assert len(judge.asked) == 3


def test_an_interrupt_ends_the_wait(scripted_judge: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reaches the thread that waits, whatever the event loop does."""
    judge = scripted_judge(lambda text, n: scripted_judge.said(RED, wait=30))
    waited = client.threading.Thread.join

    def interrupted(self: Any, timeout: float | None = None) -> None:
        if timeout is not None or self.name != "keel-judge":
            return waited(self, timeout)
        waited(self, 0.2)
        raise KeyboardInterrupt

    monkeypatch.setattr(client.threading.Thread, "join", interrupted)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        remote(judge, timeout=60.0).ask(asked("red"))
    assert time.monotonic() - begun < 5


def test_a_key_that_a_server_gives_back_is_kept_nowhere(scripted_judge: Ask, tmp_path: Path) -> None:
    key = "sk-4711-secret"
    judge = scripted_judge(
        lambda text, n: scripted_judge.said(json.dumps({"reason": f"you are {key}", "scores": {"score": 10}}))
    )
    file = tmp_path / "judge.jsonl"
    (verdict,) = remote(judge, ledger=Ledger(file, "judge"), key=key).ask(asked("red"))
    assert isinstance(verdict, Verdict)
    assert (verdict.value, verdict.reason) == (1.0, "you are …")
    assert key not in file.read_text()
