"""Conversations with any engine: all rows whose turn it is are one request, and read again in each.

What an engine that keeps what it has read (`TakesTurns`) does in its own order is defined here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from keel.rollout.protocol import (
    Answer,
    Engine,
    GenerationRequest,
    NextTurn,
    Rows,
    TokenCount,
    check_completions,
    turn_seed,
)


def in_rounds(
    engine: Engine,
    request: GenerationRequest,
    answer: Answer,
    count: TokenCount | None = None,
    *,
    name: str = "keel",
) -> None:
    """As of `TakesTurns.converse`. name: of the engine, for messages. UsageError where the engine returns
    something else than was asked of it."""
    rows = request.rows or Rows(range(len(request.prompts)), len(request.prompts))
    limits = request.limits or [request.sampling.max_new_tokens] * len(request.prompts)
    going: Mapping[int, NextTurn] = {
        i: NextTurn(prompt, limit)
        for i, (prompt, limit) in enumerate(zip(request.prompts, limits, strict=True))
    }
    turn = 0
    while going:
        asked = replace(
            request,
            prompts=[one.prompt for one in going.values()],
            limits=[one.limit for one in going.values()],
            rows=Rows([rows.numbers[row] for row in going], rows.of),
            seed=turn_seed(request.seed, turn),
            draws=None if turn else request.draws,
        )
        completions = engine.generate(asked, count)
        check_completions(name, asked, completions)
        answered = [
            (row, answer(row, completion)) for row, completion in zip(going, completions, strict=True)
        ]
        going, turn = {row: one for row, one in answered if one is not None}, turn + 1
