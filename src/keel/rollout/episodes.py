"""Episodes of several turns with tools: the model writes, tools answer, the model goes on.

An episode is one stream of tokens. What the model wrote stays as it was sampled; behind each of its turns
stand the tokens in which the chat template shows what tools answered and begins the next turn. Nothing is
decoded and tokenised again. Only the model's own tokens are trained.

An episode whose turn has ended leaves its slot in the engine, its tools run, one after the other, and it
takes the next slot that is free; what it has read stays read. Engines that cannot do that play in rounds
(`rollout.rounds`): all whose turn it is are one request, each turn reads its episode so far again, and a
round waits for its longest turn. The tokens are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from keel.data import chat
from keel.data.chat import Call, Said, ToolTemplate
from keel.rollout.protocol import Engine, GenerationRequest, NextTurn, Rows, TakesTurns, TokenCount
from keel.rollout.rounds import in_rounds
from keel.rollout.tools import Caller, Tool, reward_of, text_of_error, text_of_result
from keel.types import Completion, Dialogue, Message, Sampling, StopReason


@dataclass(frozen=True, slots=True)
class Rules:
    """What bounds an episode besides its tokens."""

    max_turns: int  # of the model; what the last one calls is not run
    on_error: Literal["show", "end"]  # what a failed call does
    reward: bool = False  # whether the environment is asked at the end
    by_turn: bool = False  # and after each turn


@dataclass
class Episode:
    """One episode on its way."""

    prompt_ids: tuple[int, ...]
    tools: Mapping[str, Tool]
    environment: Any = None
    ids: list[int] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)
    logp: list[float] | None = field(default_factory=list)  # None: the engine does not know them
    hidden: list[Tensor] | None = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    turns: list[Message] = field(default_factory=list)
    unheard: tuple[Message, ...] = ()
    stop: str = ""
    stop_reason: StopReason | None = None  # None while it goes on
    calls: int = 0
    failures: int = 0
    late: bool = False  # a call did not come back, which may still change the environment
    turn_rewards: list[float] = field(default_factory=list)
    reward: float | None = None

    def says(self, turn: Completion, limit: int) -> None:
        """One more turn of the model, cut to `limit` tokens."""
        ids = turn.ids[:limit]
        cut = len(ids) < len(turn.ids)
        self.ids += ids
        self.own += [True] * len(ids)
        self.ends.append(len(self.ids) - 1)
        self.logp = None if self.logp is None or not turn.logp else [*self.logp, *turn.logp[: len(ids)]]
        if self.hidden is not None:
            self.hidden = None if turn.hidden is None else [*self.hidden, turn.hidden[: len(ids)]]
        self.stop = "" if cut else turn.stop
        self.stop_reason = "length" if cut else turn.stop_reason

    def hears(self, context: Sequence[int]) -> None:
        """What stands before the model's next turn."""
        self.ids += context
        self.own += [False] * len(context)
        if self.logp is not None:
            self.logp += [0.0] * len(context)
        self.stop_reason = None

    def completion(self) -> Completion:
        """The episode as a response."""
        assert self.stop_reason is not None
        dialogue = Dialogue(
            tuple(self.own), tuple(self.ends), tuple(self.turns), self.calls, self.failures, self.reward,
            tuple(self.turn_rewards), self.unheard,
        )  # fmt: skip
        hidden = torch.cat(self.hidden) if self.hidden else None
        return Completion(
            self.prompt_ids, tuple(self.ids), self.stop_reason, tuple(self.logp or ()), self.stop, hidden,
            dialogue,
        )  # fmt: skip


@dataclass(frozen=True)
class Player:
    """What every episode of a stage is played with."""

    tokenizer: PreTrainedTokenizerBase
    template: ToolTemplate
    caller: Caller
    rules: Rules
    engine_name: str = "keel"  # for messages

    def play(
        self,
        engine: Engine,
        episodes: Sequence[Episode],
        sampling: Sampling,
        seed: int,
        *,
        keep_head_inputs: bool = False,
        count: TokenCount | None = None,
        rows: Rows | None = None,
    ) -> list[Completion]:
        """The episodes to their ends, in order. sampling.max_new_tokens bounds all tokens of an episode
        behind its prompt, those of the context included. The same seed gives the same tokens, where the
        tools answer the same, whatever other episodes are played and when they end. rows: which of all rows
        of the seed these are.

        RewardError where `get_reward` fails or too many tools are stuck, UsageError where the engine returns
        something else than was asked of it."""
        most = sampling.max_new_tokens
        request = GenerationRequest.of(
            self.tokenizer, [episode.prompt_ids for episode in episodes], sampling, seed,
            keep_head_inputs=keep_head_inputs, limits=[most] * len(episodes),
            rows=rows or Rows(range(len(episodes)), len(episodes)),
        )  # fmt: skip

        def answer(number: int, turn: Completion) -> NextTurn | None:
            episode = episodes[number]
            self._taken(episode, turn, most)
            if episode.stop_reason is not None:
                return None
            return NextTurn((*episode.prompt_ids, *episode.ids), most - len(episode.ids))

        if isinstance(engine, TakesTurns):
            engine.converse(request, answer, count)
        else:
            in_rounds(engine, request, answer, count, name=self.engine_name)
        for episode in episodes:
            if self.rules.reward:
                last = episode.turn_rewards[-1:]
                episode.reward = last[0] if last else self._reward(episode)
        return [episode.completion() for episode in episodes]

    def _taken(self, episode: Episode, turn: Completion, most: int) -> None:
        """A turn of the model; tools answer it, or the episode is over. most: tokens of an episode."""
        before, limit = (*episode.prompt_ids, *episode.ids), most - len(episode.ids)
        episode.says(turn, limit)
        said = self._said(episode, before, turn.ids[:limit])
        episode.turns.append(said.message())
        self._answered(episode, said, len(episode.ends), most)
        if self.rules.by_turn:
            episode.turn_rewards.append(self._reward(episode))

    def _said(self, episode: Episode, before: Sequence[int], ids: Sequence[int]) -> Said:
        """What a turn says, without the token or the string that ended it. Calls are read before that is cut
        off, since the string may be their closing mark."""
        by_token = episode.stop_reason == "stop" and not episode.stop
        said = self.template.said(before, ids[:-1] if by_token else ids)
        cut = said.content.find(episode.stop) if episode.stop else -1
        return said if cut < 0 else said._replace(content=said.content[:cut].rstrip())

    def _answered(self, episode: Episode, said: Said, turn: int, most: int) -> None:
        """Run what a turn calls and put the answers behind it; or leave the episode ended."""
        if episode.stop_reason == "length" or not (said.calls or said.problem):
            return
        if turn >= self.rules.max_turns:
            episode.stop_reason = "turns"
            return
        failures = episode.failures
        answers = [self._answer(episode, call) for call in said.calls]
        if said.problem:
            episode.calls, episode.failures = episode.calls + 1, episode.failures + 1
            answers = [("unknown", text_of_error(said.problem))]
        messages = [{"role": "tool", "name": name, "content": text} for name, text in answers]
        if self.rules.on_error == "end" and episode.failures > failures:
            episode.turns += cast(Any, messages)  # for people to see; the model is not shown them
            episode.stop_reason = "tool"
            return
        context = self.template.answer_ids(answers)
        if episode.stop:  # a string ended the turn, so that its end is still to come
            context = (chat.reply_end(self.tokenizer), *context)
        if len(episode.ids) + len(context) >= most:  # no token would be left to go on with
            episode.unheard = tuple(cast(Any, messages))
            episode.stop_reason = "length"
            return
        episode.turns += cast(Any, messages)
        episode.hears(context)

    def _answer(self, episode: Episode, call: Call) -> tuple[str, str]:
        """(name, text) of what a call came to."""
        episode.calls += 1
        tool = episode.tools.get(call.name)
        if tool is None:
            episode.failures += 1
            return call.name, text_of_error(f"Tool {call.name} not found.")
        outcome = self.caller.call(tool, call.arguments)
        if outcome.raised is not None:
            episode.failures += 1
            episode.late = episode.late or isinstance(outcome.raised, TimeoutError)
            return call.name, text_of_error(outcome.error)
        return call.name, text_of_result(outcome.value)

    def _reward(self, episode: Episode) -> float:
        environment = episode.environment
        function: Callable[[], Any] = environment.get_reward
        first = next((turn["content"] for turn in episode.turns), "")
        where = f"an episode that begins {' '.join(str(first).split())[:60]!r}"
        return reward_of(self.caller.call(function, {}), environment, where)
