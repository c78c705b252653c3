"""Real chat templates through keel, each with a tokenizer of the special tokens that it names: what is
rendered, what is refused and why, which token ends a reply, how many rows a conversation of two turns
becomes.

    python benchmarks/chat_templates.py FOLDER… [--write docs/models.md]

FOLDER holds *.jinja files: the chat templates of models, one a file. The tokenizer is one token a byte, so
that every text can be shown again; its EOS is that of the published model, as far as FAMILIES knows it. With
--write the table of docs/models.md is written anew, between its two marks.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from keel.data import chat
from keel.errors import UsageError
from keel.types import TextRecord

# part of a file's name → EOS of the tokenizer, and what generation_config names besides
FAMILIES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("gemma-?4", "<turn|>", ("<|tool_response>",)),
    ("diffusion_gemma", "<eos>", ("<turn|>",)),
    ("gemma", "<eos>", ("<end_of_turn>",)),
    ("phi-?3", "<|endoftext|>", ("<|end|>",)),
    ("glm", "<|endoftext|>", ("<|user|>", "<|observation|>")),
    ("moonshotai-kimi-k2", "[EOS]", ("<|im_end|>",)),
    ("gigachat", "</s>", ("<|message_sep|>",)),
    ("reka", "<|endoftext|>", ("<sep>",)),
    ("deepseek", "<｜end▁of▁sentence｜>", ()),
    ("gpt-?oss", "<|return|>", ("<|call|>", "<|endoftext|>")),
    ("apertus", "<|assistant_end|>", ()),
    ("apriel|solar", "<|end|>", ()),
    ("seed-oss", "<seed:eos>", ()),
    ("cohere", "<|END_OF_TURN_TOKEN|>", ()),
    ("nemotron-nano-v2", "<SPECIAL_12>", ()),
    ("minimax-m2", "[e~[", ()),
    ("mistral|devstral|llava", "</s>", ()),
    ("llama-?4", "<|eot|>", ("<|end_of_text|>", "<|eom|>")),
    ("llama-?3|functionary|firefunction", "<|eot_id|>", ()),
    ("granite", "<|end_of_text|>", ()),
    ("smolvlm|idefics", "<end_of_utterance>", ()),
    ("muse", "<|eot|>", ()),
    ("rwkv", "<|endoftext|>", ()),
)
USUAL = ("<|im_end|>", ())
SPECIAL = re.compile(
    r"<\|[^|<>\s]{1,40}\|?>|<[a-z_]{1,40}\|>|<｜[^｜]{1,40}｜>|<(?:start|end)_of_[a-z]+>|</?[\w:]*think>"
    r"|\[/?[A-Z_]{3,30}\]|<SPECIAL_\d+>|\[e~\[|\]~!?b\[|<seed:[a-z_]+>|<sep>"
    r"|</?tool_(?:call|response)s?>|</?s>|<bos>|<eos>"
)
BEGIN, END = "<!-- templates -->", "<!-- end of templates -->"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one template."""

    name: str
    end: str
    rows: int | None  # None: refused
    reply: str  # what a reply "A" is behind the prompt, end included
    note: str


def tokenizer_of(template: str, eos: str, ends: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token a byte, and the special tokens that the template names; what it needs for BOS is <s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    texts = sorted({*SPECIAL.findall(template), eos, *ends, "<s>", "<pad>"})
    inner.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in texts])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=eos,
        pad_token="<pad>",
        bos_token="<s>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    chat.declare_ends(tokenizer, [tokenizer.convert_tokens_to_ids(text) for text in ends])
    return tokenizer


def opened(path: Path) -> PreTrainedTokenizerFast:
    """A tokenizer for a template's file."""
    name = path.stem.lower()
    eos, ends = next(((e, more) for part, e, more in FAMILIES if re.search(part, name)), USUAL)
    return tokenizer_of(path.read_text(encoding="utf-8"), eos, ends)


def conversation(**of_reply: Any) -> TextRecord:
    """Two questions with their replies; of_reply: further keys of each reply."""
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", **of_reply}] * 2
    return TextRecord(tuple(turns))  # pyright: ignore[reportArgumentType]


def tried(path: Path) -> Outcome:
    """One template with a conversation of two turns, and with thoughts."""
    tokenizer = opened(path)
    try:
        facts = chat.template_facts(tokenizer)
        rows = chat.text_rows(tokenizer, conversation())
    except UsageError as error:
        return Outcome(path.stem, "", None, "", str(error))
    first = [token for token, counts in zip(rows[0].ids, rows[0].counts) if counts]
    first = first[: first.index(chat.reply_end(tokenizer)) + 1]
    notes = []
    if facts.opens:
        notes.append(f"the prompt opens {facts.opens}")
    if facts.marks:
        notes.append("marks replies")
    try:
        chat.text_rows(tokenizer, conversation(reasoning_content="Why."))
    except UsageError as error:
        notes.append("thoughts refused: " + re.split("; |, ", str(error))[0])
    return Outcome(path.stem, facts.end, len(rows), tokenizer.decode(first), "; ".join(notes))


def table(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """The lines of the table."""
    yield "| template | ends with | a reply `A` is | rows of two turns | notes |"
    yield "|---|---|---|---|---|"
    for one in outcomes:
        if one.rows is None:
            yield f"| {one.name} | | | refused | {_cell(one.note)} |"
        else:
            end, reply = _cell(f"`{one.end}`" if one.end else "EOS"), _cell(f"`{one.reply}`")
            yield f"| {one.name} | {end} | {reply} | {one.rows} | {_cell(one.note)} |"


def _cell(text: str) -> str:
    return text.replace("\n", "⏎").replace("|", "¦")


def main() -> None:
    """Print the table, or write it into a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    paths = sorted(
        (p for folder in arguments.folders for p in folder.glob("*.jinja")), key=lambda p: p.stem.lower()
    )
    outcomes = [tried(path) for path in paths]
    refused = sum(one.rows is None for one in outcomes)
    lines = [f"{len(outcomes)} templates, {refused} refused.", "", *table(outcomes)]
    if arguments.write is None:
        print("\n".join(lines))
        return
    before, _, rest = arguments.write.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    arguments.write.write_text("\n".join([before + BEGIN, *lines, END + after]), encoding="utf-8")


if __name__ == "__main__":
    main()
