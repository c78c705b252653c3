"""An environment written for TRL 1.16 with a tokenizer, a template and scripted replies: what keel and TRL
play the same episodes with. Run as a script, with TRL 1.16 on the path, it prints TRL's episodes as JSON."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

TEMPLATE = (
    "{% if tools %}<|system|>{% for t in tools %}{{ t | tojson }}{% endfor %}<|stop|>\n{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}<|user|><tool>{{ m.content }}</tool><|stop|>\n"
    "{% elif m.role == 'assistant' %}<|assistant|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|stop|>\n"
    "{% else %}<|{{ m.role }}|>{{ m.content }}<|stop|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
RESPONSES = {  # as transformers' tokenizers carry it, and TRL needs it
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close_pattern": r"</tool_call>\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|stop\|>\s*", "content": "text"},
    },
}


class Till:
    """A till, as a user of TRL would write it."""

    def __init__(self) -> None:
        self.total = 0
        self.resets = 0

    def reset(self, **kwargs: Any) -> str | None:
        self.total = kwargs["start"]
        self.resets += 1
        return f" The till holds {self.total}." if kwargs["told"] else None

    def add(self, amount: int) -> str:
        """
        Put money into the till.

        Args:
            amount: How much.
        """
        if amount < 0:
            raise ValueError("nothing is taken out")
        self.total += amount
        return f"{self.total} in the till"

    async def count(self) -> int:
        """
        Count the money in the till.
        """
        return self.total

    def get_reward(self) -> float:
        return float(self.total)


def double(number: int) -> int:
    """
    Double a number.

    Args:
        number: The number.
    """
    return 2 * number


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


STOP = "<|stop|>"
# prompt → the turns that are sampled for it, in order; and its row
EPISODES: list[tuple[str, dict[str, Any], list[str]]] = [
    ("Say hello.", {"start": 1, "told": False}, [f"Hello.{STOP}"]),
    ("Add five.", {"start": 2, "told": True}, [f"So.{call('add', amount=5)}{STOP}", f"Done.{STOP}"]),
    (
        "Add three and four, and double six.",
        {"start": 3, "told": False},
        [
            f"{call('add', amount=3)}{call('add', amount=4)}{STOP}",
            f"{call('double', number=6)}{STOP}",
            f"{call('count')}{STOP}",
            f"It is all done.{STOP}",
        ],
    ),
    ("Take one.", {"start": 4, "told": True}, [f"{call('add', amount=-1)}{STOP}", f"No.{STOP}"]),
    ("Sell it.", {"start": 5, "told": False}, [f"{call('sell', what='it')}{STOP}", f"I cannot.{STOP}"]),
    ("Be odd.", {"start": 6, "told": False}, [f"{call('add', money=1)}{STOP}", f"Hm.{STOP}"]),
    ("Go on and on.", {"start": 7, "told": False}, [f"{call('add', amount=1)}{STOP}"] * 9),
    ("Write much.", {"start": 8, "told": False}, [f"{call('add', amount=1)}{'x' * 220}{STOP}", f"y{STOP}"]),
    ("Write more.", {"start": 1, "told": False}, [f"{call('add', amount=1)}{'x' * 262}{STOP}", f"y{STOP}"]),
    ("Be cut off.", {"start": 9, "told": False}, [f"{call('add', amount=1)}{STOP}", "z" * 400]),
]
MOST, TURNS = 330, 4  # tokens and turns of an episode


def tokenizer() -> Any:
    path = Path(__file__).parents[1] / "data" / "tokenizers_for_tests.py"
    spec = importlib.util.spec_from_file_location("tokenizers_for_tests", path)
    assert spec is not None
    assert spec.loader is not None
    kinds = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kinds)
    made = kinds.make_tokenizer("bytes", TEMPLATE, STOP)
    made.response_template = RESPONSES
    return made


def scripts(tokens: Any) -> list[list[list[int]]]:
    """(episode, turn) → the ids that are sampled, cut to what an episode may have."""
    return [
        [tokens(turn, add_special_tokens=False)["input_ids"][:MOST] for turn in turns]
        for _, _, turns in EPISODES
    ]


def of_trl() -> list[dict[str, Any]]:
    """The episodes by TRL's own loop: `GRPOTrainer._generate`, with its sampling replaced by the script."""
    from trl.trainer.grpo_trainer import GRPOTrainer  # pyright: ignore[reportMissingImports]

    tokens, script = tokenizer(), scripts(tokenizer())
    environments = [Till() for _ in EPISODES]
    turn_of = [0] * len(EPISODES)
    by_prompt: dict[tuple[int, ...], int] = {}

    def single_turn(self: Any, prompt_ids: Any, *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        drawn = []
        for place, ids in enumerate(prompt_ids):
            known = [n for start, n in by_prompt.items() if tuple(ids[: len(start)]) == start]
            number = known[0] if known else place
            by_prompt.setdefault(tuple(ids), number)
            drawn.append(list(script[number][turn_of[number]]))
            turn_of[number] += 1
        return drawn, None

    prompts = []
    for (words, row, _), environment in zip(EPISODES, environments, strict=True):
        told = environment.reset(prompt=[{"role": "user", "content": words}], **row)
        prompts.append([{"role": "user", "content": words + (told or "")}])
    methods = [environments[0].add, environments[0].count]
    bound = [{"add": e.add, "double": double} for e in environments]
    trainer: Any = types.SimpleNamespace(
        accelerator=types.SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x),
        model=types.SimpleNamespace(
            training=True, config=types.SimpleNamespace(max_position_embeddings=100_000)
        ),
        state=types.SimpleNamespace(num_input_tokens_seen=0),
        rollout_func=None, use_vllm=False, vllm_mode="", num_generations=1, num_generations_eval=1,
        processing_class=tokens, _tokenizer=tokens, _is_vlm=False, chat_template=None,
        chat_template_kwargs={},
        tools=[double, *methods], environment_factories={None: Till}, _env_tools={None: [double, *methods]},
        _batch_environments=[None] * len(EPISODES), max_completion_length=MOST,
        max_tool_calling_iterations=TURNS - 1, _sync_tool_dicts=bound,
        _async_tool_dicts=[{"count": e.count} for e in environments],
        _metrics=defaultdict(lambda: defaultdict(list)),
        eos_token_ids=[tokens.eos_token_id],
    )  # fmt: skip
    for name in ("_tokenize_prompts", "_get_tool_suffix_ids", "_tool_call_loop", "_generate"):
        setattr(trainer, name, types.MethodType(getattr(GRPOTrainer, name), trainer))
    trainer._generate_single_turn = types.MethodType(single_turn, trainer)
    loop = _loop()
    trainer.async_loop = loop
    prompt_ids, ids, mask, messages, *_ = trainer._generate(prompts)
    return [
        {
            "prompt_ids": [int(i) for i in p],
            "ids": [int(i) for i in c],
            "own": [bool(m) for m in own],
            "turns": turns,
            "reward": environment.get_reward(),
        }
        for p, c, own, turns, environment in zip(prompt_ids, ids, mask, messages, environments, strict=True)
    ]


def _loop() -> Any:
    """An event loop in a thread, as the trainer starts one for coroutines."""
    import asyncio
    import threading

    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


if __name__ == "__main__":
    json.dump(of_trl(), sys.stdout)
