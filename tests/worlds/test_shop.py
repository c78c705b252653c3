"""shop: what is due is due by the rules, the environment and the gold reward agree, and the template of a run
is the form of its text."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import get_json_schema

import keel
from keel import worlds
from keel.config import read
from keel.data import chat
from keel.errors import DataError, UsageError
from keel.models.tokenizer import train_tokenizer
from keel.rollout.tools import methods_of
from keel.worlds import shop


def row(**changes: Any) -> dict[str, Any]:
    return {"item": "lamp", "price": 5, "state": "delivered last week", "wants": "refund", **changes}


@pytest.mark.parametrize(
    ("changes", "due"),
    [
        ({}, 5),
        ({"state": "delivered yesterday"}, 5),
        ({"state": "delivered last month"}, 0),
        ({"state": "damaged"}, 5),
        ({"state": "lost"}, 5),
        ({"state": "on its way"}, 0),
        ({"wants": "status"}, 0),
    ],
)
def test_what_is_due(changes: dict[str, Any], due: int) -> None:
    for paid in (0, 3, 5):
        for looks in (True, False):
            environment = shop.Environment()
            assert environment.reset(**row(**changes)) is None
            if looks:
                assert environment.look_up("lamp").startswith("5 euro, ")
            if paid:
                environment.refund("lamp", paid)
            assert environment.get_reward() == float(looks and paid == due)


def test_a_look_after_the_money_is_gone_is_no_look() -> None:
    environment = shop.Environment()
    environment.reset(**row())
    environment.refund("lamp", 5)
    environment.look_up("lamp")
    assert environment.get_reward() == 0
    environment.reset(**row())
    with pytest.raises(ValueError, match="no book was ordered"):
        environment.look_up("book")
    with pytest.raises(ValueError, match="more than the order cost"):
        environment.refund("lamp", 6)
    environment.look_up("lamp")
    environment.refund("lamp", 4)
    environment.refund("lamp", 1)
    assert environment.get_reward() == 1


def test_gold_judges_an_episode_by_its_calls_as_the_environment_does() -> None:
    rng = random.Random(0)
    for given in shop.rows("prompts", 60, 0):
        environment, turns = shop.Environment(), []
        environment.reset(**given)
        for _ in range(rng.randint(0, 3)):
            name = rng.choice(["look_up", "refund", "steal"])
            arguments = {"item": rng.choice([given["item"], "car"])}
            if name == "refund":
                arguments["amount"] = rng.choice([given["price"], 1, "many"])
            call = {"name": name, "arguments": arguments}
            answer = shop._run(environment, call)
            turns += [
                {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
                {"role": "tool", "name": name, "content": answer},
            ]
        turns.append({"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look_up"}}]})
        judged = shop.gold_of_turns(turns, given)
        assert judged["total"] == environment.get_reward()
        text = "".join(
            f"<tool_call>{shop.json.dumps(turn['tool_calls'][0]['function'])}</tool_call>"
            for turn in turns[:-1]
            if turn["role"] == "assistant"
        )
        assert shop.gold("", text + "<tool_call>{</tool_call>", given) == judged
    with pytest.raises(DataError, match="says nothing of the order"):
        shop.gold("", "", {"item": "lamp"})


def test_the_schemas_are_those_that_transformers_makes_of_the_methods() -> None:
    made = [get_json_schema(method) for method in methods_of(shop.Environment())]
    assert made == list(shop.TOOLS)


def test_hasty_clerks_fulfil_three_wishes_in_ten() -> None:
    rows = shop.rows("demonstrations", 600, 0)
    prompts = shop.rows("prompts", 600, 0)
    done = 0.0
    for index in range(600):
        rng = shop.streams.row_random("shop", "demonstrations", 0, index)
        order = shop._order(rng, False)
        turns = shop._dialogue(rng, order)
        assert turns == next(rows)["messages"]
        first = turns[0]["content"]
        wants = "status" if first.startswith(("Where", "What")) else "refund"
        columns = {"item": order.item, "price": order.price, "state": order.state, "wants": wants}
        done += shop.gold_of_turns(turns, columns)["total"]
        next(prompts)
    assert 0.25 < done / 600 < 0.38


def test_orders_of_the_test_occur_nowhere_else() -> None:
    def orders(split: str, count: int) -> set[tuple[Any, ...]]:
        return {(r["item"], r["price"], r["state"]) for r in shop.rows(split, count, 0)}

    test = orders("test_prompts", 800)
    assert len(test) > 20
    assert not test & orders("prompts", 3000)
    texts = "\n".join(r["text"] for r in shop.rows("text", 1500, 0))
    assert not any(f'"{i}"}}}}</tool_call><|end|>\nTool: {p} euro, {s}' in texts for i, p, s in test)
    assert any(
        f'"{i}"}}}}</tool_call><|end|>\nTool: {p} euro, {s}' in texts for i, p, s in orders("prompts", 9)
    )


def test_the_recipes_template_writes_what_the_text_says() -> None:
    """Pretraining, SFT and rollouts see one form."""
    template = read(Path(__file__).parents[2] / "recipes" / "tools.yaml").stages["base"].model.chat_template  # pyright: ignore
    texts = [given["text"] for given in shop.rows("text", 300, 0)]
    tokenizer = train_tokenizer(texts, 384, 256)
    for source in (shop.CHAT_TEMPLATE, template):
        tokenizer.chat_template = source
        for index, given in enumerate(shop.rows("demonstrations", 30, 0)):
            rng = shop.streams.row_random("shop", "demonstrations", 0, index)
            turns = shop._dialogue(rng, shop._order(rng, False))
            rendered = tokenizer.apply_chat_template(given["messages"], tools=given["tools"], tokenize=False)
            assert rendered == shop.as_text(turns)
        opened = chat.ToolTemplate.open(tokenizer, shop.TOOLS)
        answer = tokenizer.decode(list(opened.answer_ids([("look_up", "5 euro, lost")])))
        assert answer == "\nTool: 5 euro, lost\nAssistant:"


def test_only_the_shop_has_an_environment() -> None:
    assert worlds.environment("shop") is shop.Environment
    with pytest.raises(UsageError, match="world:helpdesk has no environment; these have one: world:shop"):
        worlds.environment("helpdesk")


@pytest.mark.slow  # two minutes
def test_the_recipe_learns_to_look_first_with_a_seed_whose_pretraining_cannot_copy(tmp_path: Path) -> None:
    """Within 8 minutes the gold reward rises from below 0.4 to above 0.8."""
    recipe = Path(__file__).parents[2] / "recipes" / "tools.yaml"
    overrides = ("seed=1", "threads=1", "device=cpu", "stages.grpo.eval_every=40")
    done = keel.run(recipe, *overrides, runs=tmp_path, progress=False)
    gold = done.metrics("grpo")["eval/judge"].dropna()
    assert gold.iloc[0] < 0.4
    assert gold.iloc[-1] > 0.8
