"""Episodes of several turns with tools, keel's rollout against TRL 1.16's, in pairs in one run: tokens of the
model a second, on the same Llama of 7.3 M parameters, the same environment and the same prompts.

    python benchmarks/episodes.py --peer PYTHON [--pairs N] [--threads N] [--episodes N] [--turns N]

PYTHON is an interpreter that has TRL 1.16. Both sides play the class `Desk` below, which is written as TRL's
`environment_factory` takes it: 64 episodes (8 prompts, 8 samples of each) of 4 turns, each of which ends with
a call of its tool; what the last one calls is not run, on either side. TRL's rollout is that of a
`GRPOTrainer` (`_generate` as `_generate_and_score_completions` calls it, without vLLM), keel's that of a
`grpo` stage. Resetting environments and asking for rewards is not timed.

The model is made to call, not trained: each of its tokens says by its embedding what may come next. In a turn
it writes words, each the last with a chance of 1 in WORDS, then a call, then the end of its turn. So turns
differ in length as a policy's do, the sides draw other words at the same odds, and neither can leave a turn
out. Each measurement is a process of its own, which plays one prompt's episodes to warm up and then a batch;
the sides take turns. Only the model's own tokens count, not what stands between its turns. Seconds of
processor stand beside seconds, for machines that others use as well.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SAMPLES, MOST, WORDS = (
    8,
    1024,
    24,
)  # of a prompt; tokens of an episode; the model's words of a turn, on average
VOCABULARY, TEXTS = 2048, 2000
STOP, OPEN, CLOSE = "<|stop|>", "<tool_call>", "</tool_call>"
CALL, BRACES = '{"name": "work", "arguments": {"number": ', "}}"
SPECIAL = ("<|pad|>", STOP, "<|user|>", "<|assistant|>", "<|system|>")
LLAMA: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}
TEMPLATE = (
    "{% if tools %}<|system|>{% for t in tools %}{{ t | tojson }}{% endfor %}<|stop|>\n{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}<|user|><tool>{{ m.content }}</tool><|stop|>\n"
    "{% elif m.role == 'assistant' %}<|assistant|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|stop|>\n"
    "{% else %}<|{{ m.role }}|>{{ m.content }}<|stop|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
RESPONSES: dict[str, Any] = {  # how TRL reads a call; keel reads it by the template
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "tool_calls": {
            "open": OPEN,
            "close_pattern": r"</tool_call>\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|stop\|>\s*", "content": "text"},
    },
}
SYLLABLES = ("ba", "ce", "di", "fo", "gu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "zu")


def words(rng: random.Random, count: int) -> str:
    """Random words of two or three syllables."""
    return " ".join("".join(rng.choices(SYLLABLES, k=rng.choice((2, 3)))) for _ in range(count))


class Desk:
    """A desk that answers whatever work it is given with a note."""

    made = 0

    def __init__(self) -> None:
        self._number, Desk.made = Desk.made, Desk.made + 1
        self.reset()

    def reset(self, row: int = 0, **columns: Any) -> None:
        self.done, self._rng = 0, random.Random(f"{row}/{self._number}")

    def work(self, number: int) -> str:
        """
        Do a piece of work.

        Args:
            number: Which piece of work to do.
        """
        self.done += 1
        return f"{number}: {words(self._rng, 12)}"

    def get_reward(self) -> float:
        return float(self.done)


# ---------------------------------------------------------------- a model that calls, the same for both sides


def prepare(folder: Path, prompts: int, mean: int) -> None:
    """The model, its tokenizer and the prompts, in `folder`."""
    rng = random.Random(0)
    tokenizer = _tokenizer([words(rng, 20) for _ in range(TEXTS)])
    _model(tokenizer, mean).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [
        {"prompt": [{"role": "user", "content": f"Do all of this: {words(rng, 24)}."}], "row": number}
        for number in range(prompts)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _tokenizer(texts: Sequence[str]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made: Any = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    size = VOCABULARY - len(SPECIAL) - 4
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    schema = 'type function name work description Do a piece of work parameters {"type": "object"} properties'
    made.train_from_iterator([*texts, *[schema] * 20], trainer)
    made.add_special_tokens(list(SPECIAL))
    made.add_tokens([AddedToken(text, normalized=False) for text in (OPEN, CALL, BRACES, CLOSE)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=SPECIAL[0], eos_token=STOP, padding_side="left",
        chat_template=TEMPLATE,
    )  # fmt: skip


def _model(tokenizer: Any, mean: int) -> Any:
    """Each embedding carries one of a few directions so strongly that the head sees little else: what kind of
    token was read. The head's rows say by it what comes next."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    ids = tokenizer.convert_tokens_to_ids
    config = LlamaConfig(
        vocab_size=len(tokenizer), pad_token_id=ids(SPECIAL[0]), eos_token_id=ids(STOP), bos_token_id=None,
        **LLAMA,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    plain = [i for token, i in tokenizer.get_vocab().items() if token[0] == "Ġ" and token[1:].isalpha()]
    digits = [ids(digit) for digit in "0123456789"]
    # what was read → what may follow, and how likely beside the rest; everything else is taken for a word
    follows: list[tuple[list[int], dict[int, float]]] = [
        (
            [],
            {**dict.fromkeys(plain, 1.0), ids(OPEN): len(plain) / (mean - 1)},
        ),
        ([ids(OPEN)], {ids(CALL): 1.0}),
        ([ids(CALL)], dict.fromkeys(digits, 1.0)),
        (digits, {ids(BRACES): 1.0}),
        ([ids(BRACES)], {ids(CLOSE): 1.0}),
        ([ids(CLOSE)], {ids(STOP): 1.0}),
    ]
    directions = torch.eye(config.hidden_size)[: len(follows)]
    kind = torch.zeros(len(tokenizer), dtype=torch.long)
    logits = torch.full((len(tokenizer), len(follows)), -30.0)
    for number, (read, next_ones) in enumerate(follows):
        kind[read] = number
        for token, odds in next_ones.items():
            logits[token, number] = torch.tensor(odds).log()
    with torch.no_grad():
        model.model.embed_tokens.weight += 50 * directions[kind]
        model.lm_head.weight += logits @ directions / config.hidden_size**0.5
    return model.eval()


# ---------------------------------------------------------------- one batch of episodes, by each side


def of_keel(folder: Path, turns: int, dtype: str) -> Callable[..., dict[str, float]]:
    """Plays a batch as a `grpo` stage does, and says what it took."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from keel.config import parse
    from keel.data import chat
    from keel.models.precision import prepare_model
    from keel.rollout import KeelEngine
    from keel.rundir.stage_run import StageRun
    from keel.stages.lazy_rows import PromptExample
    from keel.stages.tool_use import open_tools

    stage = {
        "kind": "grpo", "model": str(folder), "data": str(folder / "rows.jsonl"), "updates": 1,
        "environment": f"{__file__}:Desk", "reward": {"kind": "environment"}, "max_turns": turns,
        "samples_per_prompt": SAMPLES, "sampling": {"max_new_tokens": MOST},
    }  # fmt: skip
    config: Any = parse({"name": "bench", "stages": {"stage": stage}}).stages["stage"]
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    prepare_model(model, dtype)
    stage_run = StageRun("stage", folder, 0, torch.device("cpu"), str, load_data=lambda data, accept: None)
    tools, engine = open_tools(config, stage_run, tokenizer), KeelEngine(model)
    assert tools is not None
    rows = _rows(folder)
    ids = [tuple(chat.prompt_ids(tokenizer, tools.render(tuple(row["prompt"])))) for row in rows]
    prompts = [
        PromptExample(tuple(row["prompt"]), own, {"row": row["row"]})
        for row, own in zip(rows, ids, strict=True)
        for _ in range(SAMPLES)
    ]

    def play(seed: int, episodes: int | None = None) -> dict[str, float]:
        begun = tools.begin(prompts[:episodes], seed, SAMPLES)
        start, worked = time.perf_counter(), time.process_time()
        done = tools.play(
            engine, begun, config.sampling.plain(), seed, keep_head_inputs=config.trusts_sampler, count=None
        )
        seconds, worked = time.perf_counter() - start, time.process_time() - worked
        dialogues = [c.dialogue for c in done if c.dialogue is not None]
        return {
            "seconds": seconds,
            "worked": worked,
            "tokens": sum(len(c.own_ids) for c in done),
            "turns": sum(len(dialogue.ends) for dialogue in dialogues),
            "calls": sum(dialogue.calls for dialogue in dialogues),
            "context": sum(len(c.ids) - len(c.own_ids) for c in done),
        }

    return play


def of_trl(folder: Path, turns: int) -> Callable[..., dict[str, float]]:
    """Plays a batch as a `GRPOTrainer` does, and says what it took."""
    import datasets
    import torch
    import trl  # pyright: ignore[reportMissingImports]
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.response_template = RESPONSES
    rows = _rows(folder)
    inputs = [row for row in rows for _ in range(SAMPLES)]
    settings = trl.GRPOConfig(
        output_dir=str(folder / "out"), num_generations=SAMPLES, per_device_train_batch_size=len(inputs),
        max_completion_length=MOST, max_tool_calling_iterations=turns - 1, beta=0.0, report_to="none",
        use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False, seed=0, temperature=1.0,
    )  # fmt: skip
    trainer: Any = trl.GRPOTrainer(
        model=str(folder), args=settings, train_dataset=datasets.Dataset.from_list(rows),
        environment_factory=Desk, processing_class=tokenizer,
    )  # fmt: skip
    taken, generate = dict[str, float](), trainer._generate

    def timed(prompts: Any) -> Any:
        start, worked = time.perf_counter(), time.process_time()
        made = generate(prompts)
        _, ids, mask, messages, *_ = made
        taken.update(
            seconds=time.perf_counter() - start,
            worked=time.process_time() - worked,
            tokens=sum(map(sum, mask)),
            turns=sum(turn["role"] == "assistant" for turns in messages for turn in turns),
            calls=sum(turn["role"] == "tool" for turns in messages for turn in turns),
            context=sum(map(len, ids)) - sum(map(sum, mask)),
        )
        return made

    trainer._generate = timed

    def play(seed: int, episodes: int | None = None) -> dict[str, float]:
        torch.manual_seed(seed)
        trainer.model.train()
        trainer._generate_and_score_completions([dict(row) for row in inputs[:episodes]])
        return dict(taken)

    return play


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- measuring


def side(settings: argparse.Namespace) -> None:
    """In a process of its own: one prompt's episodes to warm up, then a batch; its sums as a line of JSON."""
    import torch

    torch.set_num_threads(settings.threads)
    if settings.side == "keel":
        play = of_keel(settings.folder, settings.turns, settings.dtype)
    else:
        play = of_trl(settings.folder, settings.turns)
    play(0, SAMPLES)
    print(json.dumps(play(settings.seed + 1)))


def measured(settings: argparse.Namespace, which: str, folder: Path, seed: int) -> dict[str, float]:
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(settings.threads), "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    command = [
        settings.peer if which == "trl" else sys.executable, __file__, "--side", which, "--folder",
        str(folder), "--threads", str(settings.threads), "--turns", str(settings.turns), "--seed", str(seed),
        "--dtype", settings.dtype,
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{which} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(settings: argparse.Namespace) -> None:
    """Two lines a pair, and the medians."""
    found: dict[str, list[dict[str, float]]] = {"trl": [], "keel": []}
    heads = (
        f"{'':<6}{'tokens':>8}{'turns':>7}{'calls':>7}{'context':>9}",
        f"{'seconds':>9}{'of processor':>14}",
    )
    print(*heads, f"{'tokens/s':>10}", sep="")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, settings.episodes // SAMPLES, settings.words)
        for seed in range(settings.pairs):
            for which, measures in found.items():
                one = measured(settings, which, folder, seed)
                measures.append(one)
                counts = (
                    f"{one['tokens']:>8.0f}{one['turns']:>7.0f}{one['calls']:>7.0f}{one['context']:>9.0f}"
                )
                times = f"{one['seconds']:>9.2f}{one['worked']:>14.2f}{one['tokens'] / one['seconds']:>10.0f}"
                print(f"{which:<6}{counts}{times}", flush=True)
    for what, name in (("seconds", "second"), ("worked", "second of processor")):
        theirs, ours = ([one["tokens"] / one[what] for one in found[which]] for which in ("trl", "keel"))
        ratios = [b / a for a, b in zip(theirs, ours, strict=True)]
        print(
            f"tokens a {name}, medians of {settings.pairs} pairs: TRL {statistics.median(theirs):.0f}, keel "
            f"{statistics.median(ours):.0f}; in a pair keel has {statistics.median(ratios):.2f} times TRL's "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", default=sys.executable, help="an interpreter with TRL 1.16")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--words", type=int, default=WORDS, help="the model's words of a turn, on average")
    parser.add_argument("--dtype", default="float32", help="of keel's model; auto: keel's default")
    parser.add_argument("--side", choices=["keel", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.side:
        side(settings)
    else:
        compare(settings)


if __name__ == "__main__":
    main()
