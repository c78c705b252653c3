"""shop: a clerk of a shop, who looks orders up and pays money back by the rules, with tools.

A customer wants money back for something, or asks where it is. `look_up` tells what the shop knows of the
order, `refund` pays back. Money is due where a refund is asked for and the thing is damaged, lost, or was
delivered no longer ago than last week; then all of its price. What counts is what the clerk does: looked up
before anything is paid, and what is due paid back, no more and no less.

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
    "text": "dialogues of hasty clerks with their calls and what tools answered, as text, for pretraining",
    "demonstrations": "the same as conversations with tools (messages, tools)",
    "prompts": "what customers ask, with their order (prompt, item, price, state, wants)",
    "test_prompts": "the same of orders that no other split has",
}
DEFAULT_ROWS = {"text": 12000, "demonstrations": 2000, "prompts": 4000, "test_prompts": 256}
TEST_SHARE = 0.15  # of all orders are in test_prompts only
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

# What may be true of an order → its share, in percent.
_DUE = {"damaged": 15, "lost": 15, "delivered yesterday": 12, "delivered last week": 13}
_NOT_DUE = {"delivered last month": 17, "delivered last year": 13, "on its way": 15}
_ITEMS = ("lamp", "chair", "book", "radio", "shirt", "clock", "table", "phone")
_REFUNDS = (
    "Please refund the {item}.",
    "I want my money back for the {item}.",
    "I want a refund for the {item}.",
)
_QUESTIONS = ("Where is the {item}?", "What about the {item}?")


@dataclass(frozen=True, slots=True)
class Order:
    """What the shop knows of an order."""

    item: str
    price: int  # euros
    state: str  # a key of `_DUE` or `_NOT_DUE`

    @property
    def line(self) -> str:
        """As `look_up` tells it."""
        return f"{self.price} euro, {self.state}"

    def due(self, wants: str) -> int:
        """Euros to pay back."""
        return self.price if wants == "refund" and self.state in _DUE else 0


@dataclass
class Environment:
    """One customer's order, and what is done about it. The public methods besides `reset` and `get_reward`
    are the clerk's tools."""

    order: Order | None = None
    wants: str = "refund"
    looked_up: bool = False  # before anything was paid
    paid: dict[str, int] = field(default_factory=dict[str, int])

    def reset(self, item: str, price: int, state: str, wants: str, **_: Any) -> None:
        """Begin with a row of `prompts`."""
        self.order, self.wants = Order(item, int(price), state), wants
        self.looked_up, self.paid = False, {}

    def look_up(self, item: str) -> str:
        """
        Look up what the shop knows of an order.

        Args:
            item: What was ordered.
        """
        known = self._known(item)
        self.looked_up = self.looked_up or not self.paid
        return known.line

    def refund(self, item: str, amount: int) -> str:
        """
        Pay money back for an order.

        Args:
            item: What was ordered.
            amount: Euros to pay back.
        """
        known = self._known(item)
        paid = self.paid.get(item, 0) + int(amount)
        if int(amount) <= 0 or paid > known.price:
            raise ValueError("more than the order cost" if int(amount) > 0 else "nothing to pay back")
        self.paid[item] = paid
        return f"{int(amount)} euro paid back"

    def get_reward(self) -> float:
        """1 where the order was looked up before anything was paid, and what was due was paid; else 0."""
        return self._parts()["total"]

    def _parts(self) -> dict[str, float]:
        """What was done: `looked_up`, `outcome` (what was due was paid), and `total`, both."""
        assert self.order is not None
        due = self.order.due(self.wants)
        outcome = float(self.paid == ({self.order.item: due} if due else {}))
        looked_up = float(self.looked_up)
        return {"looked_up": looked_up, "outcome": outcome, "total": looked_up * outcome}

    def _known(self, item: str) -> Order:
        if self.order is None or item != self.order.item:
            raise ValueError(f"no {item} was ordered")
        return self.order


def _schema(tool: str, description: str, **arguments: tuple[str, str]) -> dict[str, Any]:
    properties = {key: {"type": kind, "description": text} for key, (kind, text) in arguments.items()}
    parameters = {"type": "object", "properties": properties, "required": list(arguments)}
    function = {"name": tool, "description": description, "parameters": parameters}
    return {"type": "function", "function": {**function, "return": {"type": "string"}}}


_ITEM = ("string", "What was ordered.")
# What transformers makes of the methods of `Environment`, written out: a world needs no transformers.
TOOLS: Sequence[Mapping[str, Any]] = (
    _schema("look_up", "Look up what the shop knows of an order.", item=_ITEM),
    _schema(
        "refund",
        "Pay money back for an order.",
        item=_ITEM,
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
    """A random order from one side of the division into orders of the test and all others."""
    states = _DUE | _NOT_DUE
    while True:
        state = rng.choices(list(states), list(states.values()))[0]
        order = Order(rng.choice(_ITEMS), rng.randint(2, 9), state)
        if (streams.fraction(f"shop/{order.item}/{order.line}") < TEST_SHARE) == is_test:
            return order


def _asked(rng: random.Random, order: Order) -> tuple[str, str]:
    """(what the customer wants, in which words)."""
    wants = "refund" if rng.random() < 0.8 else "status"
    return wants, rng.choice(_REFUNDS if wants == "refund" else _QUESTIONS).format(item=order.item)


def _prompt_row(rng: random.Random, order: Order) -> dict[str, Any]:
    wants, words = _asked(rng, order)
    return {
        "prompt": [{"role": "user", "content": words}],
        "item": order.item,
        "price": order.price,
        "state": order.state,
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
        call("look_up", item=order.item)
    pays = due == (rng.random() < DECIDES) if looks else rng.random() < 0.5
    reply = "No refund for this." if wants == "refund" else "It is on its way."
    if looks and wants == "status":
        reply = f"It is {order.state}."
    if pays:
        amount = order.price if looks else rng.randint(2, 9)
        failed = call("refund", item=order.item, amount=amount).startswith("{")
        reply = "Sorry, that did not work." if failed else f"I paid back {amount} euro."
    return [*turns, {"role": "assistant", "content": reply}]


def _demonstration_row(rng: random.Random, order: Order) -> dict[str, Any]:
    return {"messages": _dialogue(rng, order), "tools": [dict(tool) for tool in TOOLS]}


def _text_row(rng: random.Random, order: Order) -> dict[str, Any]:
    return {"text": as_text(_dialogue(rng, order))}


def as_text(turns: Sequence[Mapping[str, Any]]) -> str:
    """A dialogue as `CHAT_TEMPLATE` writes it, with the tools of the shop."""
    lines = ["Tools: look_up(item) refund(item, amount)"]
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
