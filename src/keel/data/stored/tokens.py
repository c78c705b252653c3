"""Rows as tokens: of each record its prompt and its replies, or of a text its rows with their masks.

They depend on the rows and the tokenizer alone, not on a stage's settings; cutting and leaving out come
after. So stages with the same tokenizer share one folder of them. The work is cut into tasks of consecutive
rows; each makes one file, in this process or in a worker, with the same bytes.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow
from transformers import PreTrainedTokenizerBase

from keel.data import chat
from keel.data.chat import rendering
from keel.data.stored.arrow import BLOCK, Array, Blocks, BlockWriter, list_of, offsets_of
from keel.data.stored.cache import FACTS, Cache, name_of
from keel.data.stored.plain import PlainRows
from keel.data.stored.records import FilledRows, JoinedRows, PickedRows, Rows, StoredRows, release
from keel.types import PreferenceRecord, PromptRecord, Record, TextRecord

TASK = 4 * BLOCK  # records of a task
BATCH = 512  # records whose texts are tokenised in one call
Tokens = tuple[list[int], ...]
# (prompt, reply) or (prompt, chosen, rejected); of a text (ids, mask of what counts), the mask as 0 and 1
_TOKEN_LISTS = pyarrow.list_(pyarrow.int32())
SCHEMA = pyarrow.schema(
    [("record", pyarrow.int64()), *((name, _TOKEN_LISTS) for name in ("first", "second", "third"))]
)


def tokens_of(tokenizer: PreTrainedTokenizerBase, record: Record) -> list[Tokens]:
    """A record as tokens: one entry, of a text one for each row that it is trained as."""
    if isinstance(record, TextRecord):
        return [(row.ids, list(map(int, row.counts))) for row in chat.text_rows(tokenizer, record)]
    prompt = chat.prompt_ids(tokenizer, record.prompt)
    if isinstance(record, PromptRecord):
        return [(prompt,)]
    sides = (record.chosen, record.rejected) if isinstance(record, PreferenceRecord) else (record.completion,)
    return [(prompt, *(chat.completion_ids(tokenizer, record.prompt, side) for side in sides))]


def each(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Record]) -> Iterator[tuple[int, Record, Tokens]]:
    """Every record with its number and its tokens, in order; tokenised in batches."""
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        with chat.batched(tokenizer, batch):
            made = [tokens_of(tokenizer, record) for record in batch]
        for number, (record, entries) in enumerate(zip(batch, made, strict=True), start):
            for tokens in entries:
                yield number, record, tokens


class TokenRows(Sequence[Tokens]):
    """The tokens of a folder, entry by entry. Several entries may be of one record: `record` says of
    which."""

    def __init__(self, folder: Path, cache: Cache | None = None) -> None:
        self.folder, self._cache = folder, cache
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        self.parts: int = facts["parts"]  # lists of an entry
        self._files = [Blocks(folder / name) for name in facts["files"]]
        self._starts = np.cumsum([0, *facts["entries"]])
        self._reads = 0

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: Any) -> Any:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        within = int(index) - int(self._starts[number])
        self._reads += 1
        if self._reads % 4096 == 0:
            self.release()
        block = self._files[number].block(within // BLOCK)
        return tuple(_cell(block.column(1 + part), within % BLOCK) for part in range(self.parts))

    def lengths(self) -> Array:
        """(N, parts) tokens of every list."""
        found = [
            np.stack([np.diff(offsets_of(block.column(1 + part))) for part in range(self.parts)], axis=1)
            for block in self._each_block()
        ]
        return np.concatenate(found) if found else np.zeros((0, self.parts), dtype=np.int32)

    def record(self) -> Array:
        """(N,) the number of each entry's record."""
        found = [block.column(0).to_numpy().copy() for block in self._each_block()]
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)

    def release(self) -> None:
        """Let go of the memory that reading has taken."""
        for file in self._files:
            file.release()

    def _each_block(self) -> Iterator[pyarrow.RecordBatch]:
        for file in self._files:
            for number in range(len(file)):
                yield file.block(number)
            file.release()


def _cell(column: Any, index: int) -> list[int]:
    offsets = offsets_of(column)
    return np.asarray(column.values)[offsets[index] : offsets[index + 1]].tolist()


# ---------------------------------------------------------------- making them


@dataclass(frozen=True, slots=True)
class Task:
    """Records `start` … `stop` − 1, to be written to one file."""

    number: int
    start: int
    stop: int

    @property
    def file(self) -> str:
        return f"tokens-{self.number:06d}.arrow"


def work(
    rows: Sequence[Record], tokenizer: PreTrainedTokenizerBase, task: Task, folder: Path
) -> tuple[int, int]:
    """Do one task. Returns how many entries it has made, and how many lists each has."""
    writer, entries, parts = BlockWriter(folder / task.file, SCHEMA), 0, 0
    waiting: list[tuple[int, Tokens]] = []
    try:
        for start in range(task.start, task.stop, BLOCK):
            some = rows[start : min(start + BLOCK, task.stop)]
            for number, _, tokens in each(tokenizer, some):
                waiting.append((start + number, tokens))
                entries, parts = entries + 1, max(parts, len(tokens))
            while len(waiting) >= BLOCK:
                write_block(writer, waiting[:BLOCK])
                waiting = waiting[BLOCK:]
        if waiting:
            write_block(writer, waiting)
    finally:
        writer.close()
        release(rows)
    return entries, parts


def write_block(writer: BlockWriter, entries: Sequence[tuple[int, Tokens]]) -> None:
    """One block of entries, each the number of its record and at most three lists."""
    lists = [
        list_of([tokens[part] if part < len(tokens) else [] for _, tokens in entries], pyarrow.int32())
        for part in range(3)
    ]
    numbers = [number for number, _ in entries]
    writer.write({"record": numbers, "first": lists[0], "second": lists[1], "third": lists[2]})


@dataclass
class Preparation:
    """How rows are made ready: where they are kept, by how many processes, and who is told how far it is."""

    cache: Cache = field(default_factory=Cache)
    workers: int = 1
    progress: Callable[[str, int, int], None] = lambda what, done, of: None


def tokenised(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, preparation: Preparation, what: str
) -> TokenRows:
    """The rows as tokens, from the cache if they have been made before. An error is that of the first row in
    order that has one. what: names the pass where its progress is shown."""
    from keel.data.stored.worker import do  # which starts processes; small data never come here

    cache = preparation.cache
    name = name_of("tokens", rows_print(rows), tokenizer_print(tokenizer))
    if (folder := cache.find(name)) is not None:
        return TokenRows(folder, cache)
    tasks = [
        Task(number, start, min(start + TASK, len(rows)))
        for number, start in enumerate(range(0, len(rows), TASK))
    ]
    with cache.making(name) as folder:
        made = do(rows, tokenizer, tasks, folder, preparation, what)
        facts = {
            "files": [task.file for task in tasks],
            "entries": [entries for entries, _ in made],
            "parts": max(parts for _, parts in made),
            "made_from": folders_of(rows),
        }
        (folder / FACTS).write_text(json.dumps(facts), encoding="utf-8")
    return TokenRows(cache.place / name, cache)


def rows_print(rows: Sequence[Record]) -> str:
    """What tells these rows from others: the names of the folders they lie in, the numbers of those taken."""
    match rows:
        case StoredRows():
            return rows.folder.name
        case PickedRows():
            return f"{rows_print(rows.rows)}[{hashlib.sha256(rows.indices.tobytes()).hexdigest()}]"
        case FilledRows():
            return f"{rows_print(rows.rows)}+{list(rows.names)}"
        case JoinedRows():
            return "+".join(map(rows_print, rows.parts))
        case PlainRows():
            return f"{rows_print(rows.rows)}:plain"
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def folders_of(rows: Sequence[Record]) -> list[str]:
    """The names of the folders that rows lie in."""
    match rows:
        case StoredRows():
            return [rows.folder.name]
        case PickedRows() | FilledRows() | PlainRows():
            return folders_of(rows.rows)
        case JoinedRows():
            return sorted({name for part in rows.parts for name in folders_of(part)})
    return []


def tokenizer_print(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that the tokens of a text depend on. A template that writes today's date depends on
    it."""
    if tokenizer.is_fast:
        parts = json.loads(cast(Any, tokenizer).backend_tokenizer.to_str())
        parts = {key: value for key, value in parts.items() if key not in ("truncation", "padding")}
    else:
        parts = {"vocabulary": tokenizer.get_vocab(), "settings": repr(sorted(tokenizer.init_kwargs.items()))}
    template = str(tokenizer.chat_template)
    more = [
        type(tokenizer).__qualname__,
        template,
        f"{rendering.today()} {datetime.date.today()}" if chat.asks_for_date(template, given=True) else "",
        repr(sorted(tokenizer.special_tokens_map.items())),
        repr(sorted((i, repr(token)) for i, token in tokenizer.added_tokens_decoder.items())),
        repr(getattr(tokenizer, "keel_end_ids", ())),
        repr(getattr(tokenizer, "split_special_tokens", None)),
    ]
    return hashlib.sha256(json.dumps([parts, more], sort_keys=True).encode()).hexdigest()
