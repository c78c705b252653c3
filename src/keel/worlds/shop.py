"""shop: a clerk of a shop, who looks orders up and pays money back by the rules, with tools.

A customer asks for a refund of an order, or where it is. `look_up` tells what the shop knows of an order,
`refund` pays back. Money is due where a refund is asked for and the order is damaged, lost, or was delivered
at most `WINDOW` days ago; then all of its price. What counts is what the clerk does: looked up before
anything is paid, and what is due paid back, no more and no less.

The clerks of `text` and `demonstrations` are hasty: many decide without a look, and of the others many decide
wrongly. So a model that imitates them fulfils some 3 in 10 wishes, and knows all that it takes to do better.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

from keel.errors import DataError
from keel.worlds import streams

__all__ = ["CHAT_TEMPLATE", "TOOLS", "Environment", "gold", "gold_of_turns", "name", "rows", "splits"]

name = "shop"
splits: Mapping[str, str] = {
    "text": (
        "dialogues of hasty clerks with their calls and what tools answered, as text, and calls without a "
        "dialogue, for pretraining"
    ),
    "demonstrations": "the same as conversations with tools (messages, tools)",
    "prompts": "what customers ask, with their order (prompt, order, item, price, state, days, wants)",
    "test_prompts": "the same of orders that no other split has",
}
DEFAULT_ROWS = {"text": 12000, "demonstrations": 2000, "prompts": 4000, "test_prompts": 256}
WINDOW = 14  # days after delivery within which money is paid back
TEST_SHARE = 0.15  # of all orders are in test_prompts only
DIALOGUES, CALLS_OF_A_ROW = 0.6, 3  # share of rows of text, and orders in each of the others
LOOKS, DECIDES = 0.6, 0.55  # shares of clerks who look an order up, and of those who then decide rightly

# Tools and calls in plain words, an end of turn behind each reply: what a model with a tokenizer of its own
# needs no more of. The config of a run gives it as `chat_template`.
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if loop.first and tools %}Tools:{% for t in tools %} {{ t.function.name }}"
    "({{ t.function.parameters.properties | join(', ') }}){% endfor %}{{ '\\n' }}{% endif %}"
    "{% if m.role == 'assistant' %}Assistant: {{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "{{ eos_token }}{{ '\\n' if not loop.last or add_generation_prompt }}"
    "{% elif m.role == 'tool' %}Tool: {{ m.content }}{{ '\\n' }}"
    "{% elif m.role == 'system' %}{{ m.content }}{{ '\\n' }}"
    "{% else %}User: {{ m.content }}{{ '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
END = "<|end|>"  # EOS of the tokenizers that a pretrain stage trains

_LETTERS = "ABCDEFGH"
_ITEMS = ("lamp", "chair", "book", "radio", "shirt", "clock", "table", "phone")
_REFUNDS = (
    "Please refund order {order}.",
    "I want my money back for order {order}.",
    "I want a refund for order {order}.",
)
_QUESTIONS = ("Where is order {order}?", "What about order {order}?")


@dataclass(frozen=True, slots=True)
class Order:
    """What the shop knows of an order."""

    number: str
    item: str
    price: int  # euros
    state: str  # "delivered" | "damaged" | "lost" | "on its way"
    days: int  # since it was delivered; 0 where it was not

    @property
    def line(self) -> str:
        """As `look_up` tells it."""
        state = f"delivered {self.days} days ago" if self.state == "delivered" else self.state
        return f"{self.item}, {self.price} euro, {state}"

    def due(self, wants: str) -> int:
        """Euros to pay back."""
        returns = self.state in ("damaged", "lost") or (self.state == "delivered" and self.days <= WINDOW)
        return self.price if wants == "refund" and returns else 0


@dataclass
class Environment:
    """One customer's order, and what is done about it. The public methods besides `reset` and `get_reward`
    are the clerk's tools."""

    order: Order | None = None
    wants: str = "refund"
    looked_up: bool = False  # before anything was paid
    paid: dict[str, int] = field(default_factory=dict[str, int])

    def reset(
        self, order: str, item: str, price: int, state: str, days: int, wants: str, **_: Any
    ) -> str | None:
        """Begin with a row of `prompts`."""
        self.order, self.wants = Order(order, item, int(price), state, int(days)), wants
        self.looked_up, self.paid = False, {}
        return None

    def look_up(self, order: str) -> str:
        """
        Look up what the shop knows of an order.

        Args:
            order: Number of the order, such as A12.
        """
        known = self._known(order)
        self.looked_up = self.looked_up or not self.paid
        return known.line

    def refund(self, order: str, amount: int) -> str:
        """
        Pay money back for an order.

        Args:
            order: Number of the order, such as A12.
            amount: Euros to pay back.
        """
        known = self._known(order)
        paid = self.paid.get(order, 0) + int(amount)
        if int(amount) <= 0 or paid > known.price:
            raise ValueError("more than the order cost" if int(amount) > 0 else "nothing to pay back")
        self.paid[order] = paid
        return f"{int(amount)} euro paid back"

    def get_reward(self) -> float:
        """1 where the order was looked up before anything was paid, and what was due was paid; else 0."""
        return self._parts()["total"]

    def _parts(self) -> dict[str, float]:
        """What was done: `looked_up`, `outcome` (what was due was paid), and `total`, both."""
        assert self.order is not None
        due = self.order.due(self.wants)
        outcome = float(self.paid == ({self.order.number: due} if due else {}))
        looked_up = float(self.looked_up)
        return {"looked_up": looked_up, "outcome": outcome, "total": looked_up * outcome}

    def _known(self, order: str) -> Order:
        if self.order is None or order != self.order.number:
            raise ValueError(f"there is no order {order}")
        return self.order


def _schema(tool: str, description: str, **arguments: tuple[str, str]) -> dict[str, Any]:
    properties = {key: {"type": kind, "description": text} for key, (kind, text) in arguments.items()}
    parameters = {"type": "object", "properties": properties, "required": list(arguments)}
    function = {"name": tool, "description": description, "parameters": parameters}
    return {"type": "function", "function": {**function, "return": {"type": "string"}}}


_NUMBER = ("string", "Number of the order, such as A12.")
# What transformers makes of the methods of `Environment`, written out: a world needs no transformers.
TOOLS: Sequence[Mapping[str, Any]] = (
    _schema("look_up", "Look up what the shop knows of an order.", order=_NUMBER),
    _schema(
        "refund",
        "Pay money back for an order.",
        order=_NUMBER,
        amount=("integer", "Euros to pay back."),
    ),
)


# ---------------------------------------------------------------- judging


def gold(prompt: str, completion: str, columns: Mapping[str, Any]) -> dict[str, float]:
    """As `gold_of_turns`, of a reply as text, all of whose calls (<tool_call>{…}</tool_call>) are run."""
    turns: list[Any] = []
    for text in re.findall(r"<tool_call>(.*?)</tool_call>", completion, re.DOTALL):
        try:
            call = json.loads(text)
        except ValueError:
            continue
        turns += [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": ""}]
    return gold_of_turns(turns, columns)


def gold_of_turns(turns: Sequence[Mapping[str, Any]], columns: Mapping[str, Any]) -> dict[str, float]:
    """`looked_up`: the order was looked up before anything was paid. `outcome`: what was due was paid. total:
    both. From the calls of an episode alone, those behind which a tool has answered.

    DataError where the columns do not say what the order was.
    """
    environment = Environment()
    try:
        environment.reset(**{str(key): value for key, value in columns.items()})
    except (TypeError, ValueError) as error:
        raise DataError(f"world:{name}: the row says nothing of the order: {error}") from None
    for turn, following in pairwise(turns):
        if turn.get("tool_calls") and following["role"] == "tool":
            for call in turn["tool_calls"]:
                _run(environment, call.get("function", call))
    return environment._parts()


def _run(environment: Environment, call: Any) -> str:
    """What a tool answers, or why it does not."""
    tools = {"look_up": environment.look_up, "refund": environment.refund}
    try:
        return tools[call["name"]](**call["arguments"])
    except Exception as error:  # whatever a model calls it with
        return str({"error": str(error)})


# ---------------------------------------------------------------- rows


def rows(split: str, rows: int | None, seed: int, **options: Any) -> Iterator[dict[str, Any]]:
    """Rows of `split`, see `keel.worlds.World.rows`."""
    streams.check_request(name, split, splits, rows, options)
    make = {
        "text": _text_row,
        "demonstrations": _demonstration_row,
        "prompts": _prompt_row,
        "test_prompts": _prompt_row,
    }[split]
    count = DEFAULT_ROWS[split] if rows is None else rows
    draw = partial(streams.row_random, name, split, seed)
    return (make(rng, _order(rng, split == "test_prompts")) for rng in map(draw, range(count)))


def _order(rng: random.Random, is_test: bool) -> Order:
    """A random order from one side of the division into orders of the test and all others, which is decided
    by the number."""
    while True:
        number = f"{rng.choice(_LETTERS)}{rng.randint(10, 99)}"
        if (streams.fraction(f"shop/{number}") < TEST_SHARE) == is_test:
            break
    state = rng.choices(("delivered", "damaged", "lost", "on its way"), (45, 20, 15, 20))[0]
    days = rng.randint(2, 30) if state == "delivered" else 0
    return Order(number, rng.choice(_ITEMS), 5 * rng.randint(2, 19), state, days)


def _asked(rng: random.Random, order: Order) -> tuple[str, str]:
    """(what the customer wants, in which words)."""
    wants = "refund" if rng.random() < 0.8 else "status"
    return wants, rng.choice(_REFUNDS if wants == "refund" else _QUESTIONS).format(order=order.number)


def _prompt_row(rng: random.Random, order: Order) -> dict[str, Any]:
    wants, words = _asked(rng, order)
    return {
        "prompt": [{"role": "user", "content": words}],
        "order": order.number,
        "item": order.item,
        "price": order.price,
        "state": order.state,
        "days": order.days,
        "wants": wants,
    }


def _dialogue(rng: random.Random, order: Order) -> list[dict[str, Any]]:
    """A customer and a hasty clerk."""
    wants, words = _asked(rng, order)
    environment = Environment(order, wants)
    turns: list[dict[str, Any]] = [{"role": "user", "content": words}]

    def call(tool: str, **arguments: Any) -> str:
        function = {"name": tool, "arguments": arguments}
        answer = _run(environment, function)
        calls = [{"type": "function", "function": function}]
        turns.append({"role": "assistant", "content": "", "tool_calls": calls})
        turns.append({"role": "tool", "name": tool, "content": answer})
        return answer

    looks, due = rng.random() < LOOKS, order.due(wants) > 0
    if looks:
        call("look_up", order=order.number)
    pays = due == (rng.random() < DECIDES) if looks else rng.random() < 0.5
    reply = "No refund for this order." if wants == "refund" else "It is on its way."
    if looks and wants == "status":
        reply = f"It is {order.line.split(', ')[-1]}."
    if pays:
        amount = order.price if looks else 5 * rng.randint(2, 19)
        failed = call("refund", order=order.number, amount=amount).startswith("{")
        reply = "Sorry, that did not work." if failed else f"I paid back {amount} euro."
    return [*turns, {"role": "assistant", "content": reply}]


def _demonstration_row(rng: random.Random, order: Order) -> dict[str, Any]:
    return {"messages": _dialogue(rng, order), "tools": [dict(tool) for tool in TOOLS]}


def _text_row(rng: random.Random, order: Order) -> dict[str, Any]:
    """A dialogue, or calls by themselves: how a number or a price goes from words into a call, and nothing of
    when to call."""
    if rng.random() < DIALOGUES:
        return {"text": as_text(_dialogue(rng, order))}
    lines: list[str] = []
    for one in (order, *(_order(rng, False) for _ in range(CALLS_OF_A_ROW - 1))):
        words = rng.choice(_REFUNDS + _QUESTIONS).format(order=one.number)
        lines.append(words + _call_text("look_up", order=one.number))
        lines.append(f"{one.number}: {one.line}" + _call_text("refund", order=one.number, amount=one.price))
    return {"text": "\n".join(lines)}


def _call_text(tool: str, **arguments: Any) -> str:
    """A call as `CHAT_TEMPLATE` writes it, in a dialogue behind a space."""
    return f" <tool_call>{json.dumps({'name': tool, 'arguments': arguments})}</tool_call>"


def as_text(turns: Sequence[Mapping[str, Any]]) -> str:
    """A dialogue as `CHAT_TEMPLATE` writes it, with the tools of the shop."""
    lines = ["Tools: look_up(order) refund(order, amount)"]
    for turn in turns:
        words = turn["content"]
        if turn["role"] == "assistant":
            calls = (
                json.dumps(call["function"], ensure_ascii=False) for call in turn.get("tool_calls") or ()
            )
            words += "".join(f"<tool_call>{call}</tool_call>" for call in calls) + END
        speaker = {"assistant": "Assistant", "tool": "Tool"}.get(turn["role"], "User")
        lines.append(f"{speaker}: {words}")
    return "\n".join(lines)
