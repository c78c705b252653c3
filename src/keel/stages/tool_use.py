"""Tools and an environment of a stage: found by name, shown to the chat template, and played with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from keel import worlds
from keel.config import Stage
from keel.config.rewards import EnvironmentTerm
from keel.config.tools import WORLD, WithTools
from keel.data import chat
from keel.data.batches import derive_seed
from keel.errors import DataError, RewardError, UsageError
from keel.rewards import loading
from keel.rollout import tools as called
from keel.rollout.episodes import Episode, Player, Rules
from keel.rollout.protocol import Engine, GenerationRequest, Rows, TokenCount
from keel.rundir.stage_run import StageRun
from keel.stages.lazy_rows import PromptExample
from keel.stages.prepare import TooLong
from keel.types import Completion, Conversation, Message, Prompt, Sampling


@dataclass
class ToolUse:
    """The tools of a stage, and how its episodes are played."""

    stage_run: StageRun
    player: Player
    tools: Sequence[called.Tool]
    make: Callable[[], Any] | None  # of an environment; None: there is none
    pool: list[Any]  # environments that were made, each used again after a reset
    too_long: TooLong | None = None  # what becomes of a prompt that has no room, once it was begun

    @property
    def stage(self) -> str:
        """Its name, for messages."""
        return self.stage_run.name

    def read_by(self, tokenizer: PreTrainedTokenizerBase) -> ToolUse:
        """The same tools, environments and thread with another tokenizer's template. UsageError where that
        cannot show tools."""
        template = _template(tokenizer, self.player.template.tools, self.stage)
        return replace(self, player=replace(self.player, tokenizer=tokenizer, template=template))

    def close(self) -> None:
        """End the thread that tools run in, and forget the environments that were made in it."""
        self.player.caller.close()
        self.pool.clear()

    def render(self, prompt: Prompt) -> Prompt:
        """A prompt whose template is told of the tools. UsageError for one that is plain text."""
        if isinstance(prompt, str):
            raise UsageError(
                f"{self.stage}: `tools` and `environment` need prompts that are conversations: a chat "
                "template shows a model its tools"
            )
        return self.player.template.with_tools(prompt)

    def begin(
        self, prompts: Sequence[PromptExample], seed: int, samples: int, rows: Rows | None = None
    ) -> list[PromptExample]:
        """The prompts with environments that were reset to their rows, and with what `reset` returned behind
        the last of the user's turns. samples: of one prompt, which stand side by side and begin alike. rows:
        which of all rows of the seed these are.

        RewardError for a `reset` that fails, DataError for a prompt that becomes too long by it, unless such
        prompts are cut."""
        if self.make is None:
            return list(prompts)
        while len(self.pool) < len(prompts):
            self.pool.append(_made(self.make, self.player.caller, self.stage))
        numbers = range(len(prompts)) if rows is None else rows.numbers
        return [
            self._begun(prompt, environment, derive_seed(seed, "environment", number // samples))
            for prompt, environment, number in zip(prompts, self.pool, numbers)
        ]

    def play(
        self,
        engine: Engine,
        prompts: Sequence[PromptExample],
        sampling: Sampling,
        seed: int,
        *,
        keep_head_inputs: bool = False,
        count: TokenCount | None = None,
        rows: Rows | None = None,
    ) -> list[Completion]:
        """Episodes on prompts that `begin` gave. rows: which of all rows of the seed these are."""
        episodes = [
            Episode(prompt.ids, self.tools_of(prompt.environment), prompt.environment) for prompt in prompts
        ]
        completions = self.player.play(
            engine, episodes, sampling, seed, keep_head_inputs=keep_head_inputs, count=count, rows=rows
        )
        late = {id(episode.environment) for episode in episodes if episode.late}
        self.pool[:] = [environment for environment in self.pool if id(environment) not in late]
        return completions

    def tools_of(self, environment: Any) -> Mapping[str, called.Tool]:
        """By name: the stage's own, and those of an environment."""
        methods = [] if environment is None else called.methods_of(environment)
        return called.by_name([*self.tools, *methods])

    def _begun(self, example: PromptExample, environment: Any, seed: int) -> PromptExample:
        """One prompt after a reset. A row's own column `seed` goes before the one that is derived."""
        prompt = cast(Conversation, example.prompt)
        columns = {**example.columns, "prompt": [dict(turn) for turn in prompt]}
        arguments = called.accepted(environment.reset, columns, {"seed": seed})
        outcome = self.player.caller.call(environment.reset, arguments)
        reset = f"{type(environment).__name__}.reset"
        name = f"{self.stage}: {reset}"
        asked = " ".join(chat.user_text(prompt).split())[:60]
        if outcome.raised is not None:
            raise RewardError(
                f"{name} raised {type(outcome.raised).__name__}: {outcome.error} (prompt {asked!r})"
            ) from outcome.raised
        if outcome.value is None:
            return replace(example, environment=environment)
        if not isinstance(outcome.value, str):
            raise UsageError(f"{name} returned a {type(outcome.value).__name__}: it returns None or text")
        last = cast(Message, {**prompt[-1], "content": prompt[-1]["content"] + outcome.value})
        told = (*prompt[:-1], last)
        ids = self._that_fit(chat.prompt_ids(self.player.tokenizer, self.render(told)), reset, asked)
        return replace(example, prompt=told, ids=ids, environment=environment)

    def _that_fit(self, ids: Sequence[int], name: str, asked: str) -> tuple[int, ...]:
        """The tokens of a prompt that was begun, cut from their start where `too_long` says so. name: of the
        `reset` that lengthened it. DataError where there is no room; a row cannot be left out any more."""
        bound = self.too_long
        if bound is None or bound.limit is None or len(ids) <= bound.limit:
            return tuple(ids)
        if bound.policy != "truncate":
            late = "; `too_long: skip` knows only the rows" if bound.policy == "skip" else ""
            raise DataError(
                f"{self.stage}: {name} makes a prompt of {len(ids)} tokens, more than the {bound.limit} that "
                f"there is room for (prompt {asked!r}){late}; make room (max_length, max_new_tokens), or "
                "cut such prompts (too_long: truncate)"
            )
        self.stage_run.note(
            f"what {name} returns makes prompts longer than {bound.limit} tokens: they are cut from their "
            "start, where templates list the tools"
        )
        return tuple(ids[-bound.limit :])


def sampled(
    tools: ToolUse | None,
    engine: Engine,
    prompts: Sequence[PromptExample],
    sampling: Sampling,
    seed: int,
    *,
    tokenizer: PreTrainedTokenizerBase,
    samples: int = 1,
    begin: int | None = None,
    rows: Rows | None = None,
) -> tuple[Sequence[PromptExample], list[Completion]]:
    """A response to each prompt, with tools an episode; and the prompts as these began. samples: of one
    prompt, which stand side by side. begin: the seed that environments begin with; `seed` where None. rows:
    which of all rows of the seed the prompts are."""
    if tools is None:
        ids = [prompt.ids for prompt in prompts]
        return prompts, engine.generate(GenerationRequest.of(tokenizer, ids, sampling, seed, rows=rows))
    begun = tools.begin(prompts, seed if begin is None else begin, samples, rows)
    return begun, tools.play(engine, begun, sampling, seed, rows=rows)


def open_tools(config: WithTools, stage_run: StageRun, tokenizer: PreTrainedTokenizerBase) -> ToolUse | None:
    """What the config's `tools` and `environment` name, until the stage ends; None where it names neither.
    UsageError for what is not there or is no tool or environment, and where the chat template cannot show
    tools."""
    if not config.uses_tools:
        return None
    stage = stage_run.name
    tools = [loading.load(name, f"{stage}: tools") for name in config.tools]
    make = _environment(config.environment, stage) if config.environment else None
    caller = called.Caller(config.tool_timeout)
    stage_run.at_end(caller.close)
    pool = [] if make is None else [_made(make, caller, stage)]
    terms = [term for term in config.reward_terms() if isinstance(term, EnvironmentTerm)]
    by_turn = any(term.at == "turn" for term in terms)
    rules = Rules(config.max_turns, config.on_tool_error, bool(terms), by_turn)
    template = _template(tokenizer, _schemas(tools, pool, rules, stage), stage)
    rollout: Any = getattr(config, "rollout", None)
    engine = getattr(config, "engine_name", "vllm" if rollout and rollout.vllm else "keel")
    return ToolUse(stage_run, Player(tokenizer, template, caller, rules, engine), tools, make, pool)


def _schemas(
    tools: Sequence[called.Tool], pool: Sequence[Any], rules: Rules, stage: str
) -> list[dict[str, Any]]:
    """Of the stage's own tools and of an environment's. UsageError for one that is none, and without any."""
    try:
        if pool:
            _check(pool[0], rules.reward)
        functions = called.by_name([*tools, *(called.methods_of(pool[0]) if pool else ())])
        if not functions:
            raise UsageError("the environment has no public method besides `reset` that a model could call")
        return [called.schema_of(tool) for tool in functions.values()]
    except UsageError as error:
        raise UsageError(f"{stage}: {error}") from None


def _template(
    tokenizer: PreTrainedTokenizerBase, schemas: Sequence[Mapping[str, Any]], stage: str
) -> chat.ToolTemplate:
    """The tokenizer's template with the tools. UsageError where it cannot show them."""
    try:
        return chat.ToolTemplate.open(tokenizer, schemas)
    except UsageError as error:
        raise UsageError(f"{stage}: {error}") from None


def check(config: Stage, stage: str) -> None:
    """UsageError for tools and an environment of a config that are not there. Nothing of them is run."""
    for name in config.tool_code():
        loading.look(name, f"{stage}: tools and environment")
    environment = getattr(config, "environment", None)
    if environment and environment.startswith(WORLD):
        worlds.environment(environment.removeprefix(WORLD))


def _environment(name: str, stage: str) -> Callable[[], Any]:
    if name.startswith(WORLD):
        return worlds.environment(name.removeprefix(WORLD))
    return loading.load(name, f"{stage}: environment", classes=True)


def _made(make: Callable[[], Any], caller: called.Caller, stage: str) -> Any:
    """One environment."""
    outcome = caller.call(make, {})
    if outcome.raised is not None:
        raise RewardError(
            f"{stage}: the environment cannot be made: {type(outcome.raised).__name__}: {outcome.error}"
        ) from outcome.raised
    return outcome.value


def _check(environment: Any, rewards: bool) -> None:
    """UsageError for an environment without what is asked of it."""
    kind = type(environment).__name__
    if not callable(getattr(environment, "reset", None)):
        raise UsageError(f"environment {kind} has no method `reset`")
    if rewards and not callable(getattr(environment, "get_reward", None)):
        raise UsageError(
            f"`reward: {{kind: environment}}`, but environment {kind} has no method `get_reward`"
        )
