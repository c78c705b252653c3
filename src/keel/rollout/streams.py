"""Rows in several streams at once, each on its own thread.

A step of 64 rows of a small model is some hundred operations of ten to a hundred microseconds. Divided among
threads inside each of them, much of the time goes into beginning and ending them together, and into those
that torch does not divide. Here each thread has a part of the slots and of the prompts and computes by itself
(torch's operations let other Python threads run), and nothing waits for anything until the end.

Which rows stand in which stream depends on the request, the slots and the number of threads alone, never on
which thread is faster: the same request gives the same bytes. What it costs: a product has fewer rows, and
each stream reads all weights; so a stream has `LEAST` slots or more, and large matrices are not read so.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from keel.accel import decode_graphs
from keel.accel.patches import enabled
from keel.models.precision import as_here
from keel.rollout.drawn import Asked
from keel.rollout.protocol import TokenCount
from keel.rollout.stream import Stream
from keel.types import Completion

LEAST = 32  # slots of a stream
AT_MOST = 2**26  # bytes of a model's matrices, which each stream reads in each step
MOST = 4  # streams: beyond, threads wait for Python's interpreter, which runs one of them at a time


def sample_in_streams(
    asked: Asked, batch_size: int, steps: decode_graphs.Captured | None
) -> list[Completion]:
    """One completion a prompt, in order; through as many streams as there are threads and rows for."""
    slots = min(batch_size, len(asked.prompts))
    count = min(torch.get_num_threads(), slots // LEAST, MOST)
    layers = asked.step and asked.step.whole
    if layers is None or layers.nbytes > AT_MOST or count < 2 or not enabled("decode_streams"):
        return Stream(asked, batch_size, steps).run()
    parts = shared_out(asked.prompts, count)
    room = [slots // count + (number < slots % count) for number in range(count)]
    streams = [Stream(part_of(asked, rows), most, None) for rows, most in zip(parts, room, strict=True)]
    done = _together([as_here(stream.run) for stream in streams], streams)
    for stream in streams:
        asked.work.computed += stream.asked.work.computed
        asked.work.passes += stream.asked.work.passes
    found: dict[int, Completion] = {}
    for rows, completions in zip(parts, done, strict=True):
        found.update(zip(rows, completions, strict=True))
    return [found[row] for row in range(len(asked.prompts))]


def shared_out(prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """The rows of each of `count` streams: about as many, of about the same lengths, equal prompts in one
    stream as far as that goes."""
    most = -(-len(prompts) // count)
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(tuple(prompt), []).append(row)
    pieces = [
        rows[first : first + most]
        for prompt, rows in sorted(groups.items(), key=lambda item: (-len(item[0]), item[0]))
        for first in range(0, len(rows), most)
    ]
    parts: list[list[int]] = [[] for _ in range(count)]
    for piece in pieces:
        min(parts, key=len).extend(piece)
    return parts


def part_of(asked: Asked, rows: Sequence[int]) -> Asked:
    """What is asked of some rows, with counts and a list of its own."""
    index = torch.tensor(rows, device=asked.draws.device)
    return replace(
        asked, prompts=[asked.prompts[row] for row in rows], draws=asked.draws[index],
        limits=asked.limits[index], seen=None if asked.seen is None else [], work=TokenCount(),
    )  # fmt: skip


def _together(
    runs: Sequence[Callable[[], list[Completion]]], streams: Sequence[Stream]
) -> list[list[Completion]]:
    """What each returns, called at the same time, each with its share of the threads; the first in this
    thread. The error of one ends all, and is raised; so does Ctrl-C while others are waited for, and a thread
    that the machine refuses."""
    threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()
    done: list[list[Completion]] = [[] for _ in runs]
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            torch.set_num_threads(max(1, threads // len(runs)))  # of this thread
            with torch.inference_mode(inference):
                done[number] = runs[number]()
        except BaseException as error:
            errors.append(error)
            _stop(streams)

    others = [threading.Thread(target=run, args=(number,)) for number in range(1, len(runs))]
    begun: list[threading.Thread] = []
    try:
        for other in others:
            other.start()
            begun.append(other)
        run(0)
        for other in others:
            other.join()
    except BaseException:  # none of them may go on with a model that its owner has back
        _stop(streams)
        for other in begun:
            other.join()
        raise
    finally:
        torch.set_num_threads(threads)  # MKL has one number for all threads
    if errors:
        raise errors[0]
    return done


def _stop(streams: Sequence[Stream]) -> None:
    for stream in streams:
        stream.stop()
