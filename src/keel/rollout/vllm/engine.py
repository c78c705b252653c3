"""The engine: a server that holds the trainer's weights, asked for responses until all of them are there.

A server holds copies of the weights, so every call compares: what the policy's trained weights are now
(`print_of`) against what the server was last given. Where they differ they are pushed, and the push counts
only once

1. every step of it was answered,
2. the server's version token (or the adapter's name, which is new with each push) is the one that was set,
3. the server gives a short text the log-probabilities that the trainer gives it.

Each response is then taken only if the server says that all of its tokens were drawn by that version. A
server that is gone is started again (or waited for, where only its address is known), given the weights anew,
and asked for those rows that it did not answer: each by its own seed, and each once.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from keel.errors import EngineError, UsageError
from keel.models.load import context_length
from keel.models.precision import compute_dtype, computing
from keel.rollout.protocol import GenerationRequest, TokenCount
from keel.rollout.sampling import check_context
from keel.rollout.vllm import asking, weights
from keel.rollout.vllm.asking import GarbageError, StaleError, Weights
from keel.rollout.vllm.server import Launch, Server, is_cpu, program_of, wait_until_ready
from keel.rollout.vllm.wire import DownError, FailedError, RefusedError, Wire
from keel.types import Completion

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROUNDS = 4  # in a row that bring no response, after which a server is given up
PAUSE = 0.5  # seconds before a server that answers nothing of use is asked again
PROBED = 32  # tokens of the text that a push is checked with
APART = {torch.float32: 0.05, torch.float64: 0.05}  # nats a token that a probe may differ
APART_HALF = 0.5  # in 16 bit
CLEARING = 20  # tries to clear the prefix cache, which fails while a request is being let go


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Where a server is, or how one is started, and how patiently it is asked."""

    address: str | None = None  # None: start one
    key: str | None = field(default=None, repr=False)
    key_named: bool = False  # whether the config names a key
    environment: str | None = None
    devices: str | None = None
    dtype: str | None = None  # None: what the trainer multiplies in
    args: tuple[str, ...] = ()
    whole: bool = False  # push all weights where adapters are trained, too
    concurrency: int = 256
    timeout: float = 600.0
    patience: float = 900.0
    restarts: int = 3
    sleep: bool = False
    trust_remote_code: bool = False


class VllmEngine:
    """An `Engine`: samples from a vLLM server that is given the model's weights whenever they have changed.

    model: on any device; its forward is asked once a push. folder: through which weights go, seen by the
    server too, and where a started server's log is. length: tokens of the longest prompt and its response,
    for which a started server makes room; None: the model's context. say: told what a user should know.

    `pushes`, `restarts`, `asked_again`: how often weights were pushed, the server came back, and rows were
    asked for once more.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: ServerSettings,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        length: int | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.model, self.settings, self.folder = model, settings, folder.resolve()
        self.tokenizer, self.length, self.say = tokenizer, length, say
        self.adapters = weights.has_adapters(model) and not settings.whole
        self.pushes = self.restarts = self.asked_again = 0
        self.version = ""  # the server's own, as 0.32.0
        self.gap = 0.0  # |log π of the trainer − of the server| a token at the last probe
        self._wire: Wire | None = None
        self._server: Server | None = None
        self._started_with: tuple[int, ...] | None = None  # the print of what a started server was started on
        self._base = ""  # the name of the served model
        self._held: tuple[tuple[int, ...], Weights] | None = None  # what the server was given last
        self._token = secrets.token_hex(4)
        self._asleep = False
        self._vocab = int(model.config.get_text_config().vocab_size)

    # ------------------------------------------------------------ sampling

    def generate(self, request: GenerationRequest, count: TokenCount | None = None) -> list[Completion]:
        """One completion a prompt, in order, drawn by the model's weights as they are now.

        EngineError where the server cannot be had, does not take the weights, or does not answer; UsageError
        for what it would do otherwise than asked."""
        check_context(self.model, request.prompts, request.sampling, request.limits)
        asking.check(request.sampling, self._vocab)
        done: dict[int, Completion] = {}
        unstopped: set[int] = set()  # rows whose stop strings the server does not look for
        idle, reason = 0, ""
        while len(done) < len(request.prompts):
            missing = [row for row in range(len(request.prompts)) if row not in done]
            before = len(done) + len(unstopped)
            try:
                held = self._hold(request.prompts[missing[0]])
                reason = self._ask(request, missing, held, done, unstopped)
            except (DownError, StaleError, GarbageError) as error:
                self._held = None
                reason = str(error)
            if len(done) == len(request.prompts):
                break
            self.asked_again += len(request.prompts) - len(done)
            idle = idle + 1 if len(done) + len(unstopped) == before else 0
            if idle == ROUNDS:
                raise EngineError(f"{self._where()} gives no responses: {reason}")
            if reason:
                self._recover(reason)
        self._rest()
        completions = [done[row] for row in range(len(request.prompts))]
        if count is not None:  # the server counts what it computes for itself
            tokens = sum(map(len, {tuple(prompt) for prompt in request.prompts}))
            tokens += sum(len(one.ids) - 1 for one in completions)
            count.useful, count.computed = count.useful + tokens, count.computed + tokens
        return completions

    def _ask(
        self,
        request: GenerationRequest,
        rows: Sequence[int],
        held: Weights,
        done: dict[int, Completion],
        unstopped: set[int],
    ) -> str:
        """Ask for some rows and put what comes into `done`; why rows are missing, "" where none had to be.

        UsageError for a request that the server refuses, which no other try would change."""
        assert self._wire is not None
        faults: list[str] = []
        bodies = [asking.body(request, row, held, self._vocab, stops=row not in unstopped) for row in rows]

        def took(number: int, answer: Any) -> None:
            row = rows[number]
            if isinstance(answer, RefusedError):
                if answer.status != 404 or not self.adapters:  # else an adapter that it no longer knows
                    raise answer
                self._held = None
                faults.append(str(answer))
                return
            try:
                found = asking.completion(request, row, answer, held, stops=row not in unstopped)
            except (GarbageError, StaleError) as error:
                self._held = None if isinstance(error, StaleError) else self._held
                faults.append(str(error))
                return
            if found is None:
                unstopped.add(row)
            else:
                done[row] = found

        try:
            down = self._wire.many(asking.ROUTE, bodies, self.settings.concurrency, took)
        except RefusedError as refused:
            raise EngineError(f"{self._where()} refuses to sample: {refused}{self._hint(refused)}") from None
        if down is not None:
            self._held = None
            return str(down)
        return faults[0] if faults else ""

    # ------------------------------------------------------------ a server that is there

    def _connect(self) -> Wire:
        """The server, found or started, and what it must be."""
        settings = self.settings
        if settings.address is not None:
            wire = Wire(settings.address, settings.key, settings.timeout)
            wait_until_ready(wire, settings.patience)
        else:
            server = self._server = self._server or self._prepared()
            server.start()
            self.say(f"a vLLM server starts at {server.address} (its log: {server.log})")
            wire = Wire(server.address, server.key, settings.timeout)
            try:
                wait_until_ready(wire, settings.patience, lambda: server.alive, server.last_words)
            except BaseException:
                server.stop()
                raise
        self._look_at(wire)
        return wire

    def _prepared(self) -> Server:
        """A server to start, and the folder that it starts on."""
        program, start = program_of(self.settings.environment), self.folder / "start"
        dtype = self._dtype()
        weights.write_start(self.model, self.tokenizer, start, dtype, folded=not self.adapters)
        self._started_with = None if self.adapters else weights.print_of(self.model)
        most = context_length(self.model.config)
        length = most if self.length is None else min(self.length + 1, most or self.length + 1)
        launch = Launch(
            program, str(start), str(dtype).removeprefix("torch."), length,
            weights.rank_of(self.model) if self.adapters else None, devices=self.settings.devices,
            sleep=self.settings.sleep, trust_remote_code=self.settings.trust_remote_code,
            args=self.settings.args,
        )  # fmt: skip
        if self.settings.sleep and is_cpu(program):
            raise UsageError("`rollout.sleep` needs CUDA: the CPU package of vLLM cannot sleep; leave it out")
        return Server(launch, self.folder / "server.log")

    def _look_at(self, wire: Wire) -> None:
        """Read from a server what it serves. EngineError for one that cannot be used, with what to change."""
        try:
            self.version = str((wire.get("/version") or {}).get("version", "unknown"))
            served = wire.get("/v1/models")["data"]
            base = next(one for one in served if one.get("parent") is None)
            told = wire.get("/server_info?config_format=json")["vllm_config"]
            mode = told["model_config"]["logprobs_mode"]
            room = base.get("max_model_len")
        except RefusedError as refused:
            raise EngineError(f"{self._where()} cannot be used: {refused}{self._hint(refused)}") from None
        except (KeyError, TypeError, AttributeError, StopIteration) as error:
            raise EngineError(
                f"{wire.address} answers like no vLLM server ({type(error).__name__}: {error})"
            ) from None
        if mode != "processed_logprobs":
            raise EngineError(
                f"{self._where()} gives {mode}, and log-probabilities must be those that tokens are drawn "
                "with: start it with --logprobs-mode processed_logprobs, or by `keel engine serve`"
            )
        if self.adapters and not told.get("lora_config"):
            raise EngineError(
                f"{self._where()} takes no adapters: start it by `keel engine serve --lora-rank "
                f"{weights.rank_of(self.model)}`, or set rollout.push: whole"
            )
        if isinstance(room, int) and self.length is not None and self.length > room:
            raise UsageError(
                f"{self._where()} has room for {room} tokens, and a prompt and its response may have "
                f"{self.length}: start it with a larger --max-model-len"
            )
        self._base, self._held, self._asleep = str(base["id"]), None, False

    def _recover(self, reason: str) -> None:
        """After a round that brought too little: a server that is gone is started again or waited for."""
        self._held = None
        if self._wire is not None:
            try:
                if self._server is None or self._server.alive:
                    self._wire.get("/health", timeout=min(10.0, self.settings.timeout))
                    time.sleep(PAUSE)
                    return  # it is there
            except RefusedError as refused:
                raise EngineError(f"{self._where()} cannot be used: {refused}") from None
            except DownError as down:
                reason = f"{reason}; {down}"
            self._wire = None
        self.restarts += 1
        if self.settings.address is not None:
            self.say(f"the vLLM server at {self.settings.address} is gone ({reason}); keel waits for it")
            return
        assert self._server is not None
        words = "" if self._server.alive else f": {self._server.last_words()}"
        if self.restarts > self.settings.restarts:
            raise EngineError(
                f"the vLLM server died {self.restarts} times ({reason}){words}; `rollout.restarts` says how "
                "often it is started again"
            )
        self.say(f"the vLLM server is gone ({reason}){words}; it is started again")

    def _where(self) -> str:
        address = self.settings.address or (self._server and self._server.address)
        return f"the vLLM server at {address}"

    def _hint(self, refused: RefusedError) -> str:
        """What a user can do about a refusal."""
        if refused.status in (401, 403):
            named = self.settings.key_named
            return (
                "; the key in the variable of rollout.api_key_env is not its own"
                if named
                else "; set rollout.api_key_env to the variable with its key"
            )
        if refused.status in (404, 405):
            return "; start it by `keel engine serve`, which opens the routes that weights are pushed by"
        return ""

    # ------------------------------------------------------------ the trainer's weights

    def _hold(self, text: Sequence[int]) -> Weights:
        """See to it that the server is there, awake, and holds the model's weights. text: what a push is
        checked with."""
        if self._wire is None:
            self._wire = self._connect()
        self._wake()
        now = weights.print_of(self.model)
        if self._held is None or self._held[0] != now:
            self._held = None
            self._held = now, self._push(now, text)
        return self._held[1]

    def _push(self, now: tuple[int, ...], text: Sequence[int]) -> Weights:
        """Give the server the model's weights, and check that it has them."""
        self.pushes += 1
        name = f"keel-{self._token}-{self.pushes}"
        try:
            new = self._push_adapter(name) if self.adapters else self._push_whole(name, now)
        except RefusedError as refused:
            raise EngineError(
                f"{self._where()} does not take the weights: {refused}{self._push_hint(refused)}"
            ) from None
        except FailedError as failed:
            sees = f"it must see the folder {self.folder} (rollout.folder)"
            raise FailedError(
                failed.status, f"{failed.reason}, when it was given the weights; {sees}"
            ) from None
        self._check(new, text)
        return new

    def _push_adapter(self, name: str) -> Weights:
        """The adapter, under a name of its own: one that did not arrive is unknown, and one of before has
        another name."""
        assert self._wire is not None
        place = self.folder / name
        weights.write_adapter(self.model, place)
        self._wire.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(place)})
        self._clear_cache()
        for old in self.folder.glob(f"keel-{self._token}-*"):
            if old != place:
                with contextlib.suppress(RefusedError):  # a server that was started since does not know it
                    self._wire.post("/v1/unload_lora_adapter", {"lora_name": old.name})
                shutil.rmtree(old, ignore_errors=True)
        return Weights(name, None)

    def _push_whole(self, name: str, now: tuple[int, ...]) -> Weights:
        """All weights, in place. The version is changed before the first of them moves, so that nothing that
        is sampled meanwhile bears the old one, nor the new one before all are there."""
        wire, place = self._wire, self.folder / name
        assert wire is not None
        wire.post("/update_weight_version", {"new_version": f"{name}-on-its-way"})
        if self._started_with == now and self.pushes == 1:
            self._started_with = None  # it was started on them
        else:
            try:
                weights.write_whole(self.model, place, self._dtype())
                call = {"method": "reload_weights", "kwargs": {"weights_path": str(place)}}
                wire.post("/collective_rpc", call)
            finally:
                shutil.rmtree(place, ignore_errors=True)
        self._clear_cache()
        wire.post("/update_weight_version", {"new_version": name})
        told = wire.get("/weight_info")
        version = told.get("weight_version") if isinstance(told, dict) else told
        if version != name:
            raise StaleError(f"after a push it says that its weights are {version!r}, not {name!r}")
        return Weights(self._base, name)

    def _clear_cache(self) -> None:
        """Forget keys and values that older weights made."""
        assert self._wire is not None
        for _ in range(CLEARING):
            told = self._wire.post("/reset_prefix_cache")
            if isinstance(told, dict) and told.get("success") is True:
                return
            time.sleep(0.1)
        raise FailedError(200, "its prefix cache, made by older weights, is not cleared")

    def _check(self, new: Weights, text: Sequence[int]) -> None:
        """EngineError where the server does not give a text the trainer's log-probabilities: it holds other
        weights, or computes another model."""
        assert self._wire is not None
        ids = (list(text) * 2)[: max(2, min(PROBED, len(text)))]
        try:
            theirs = asking.probed(self._wire.post(asking.ROUTE, asking.probe(ids, new)), ids)
        except RefusedError as refused:
            raise EngineError(f"{self._where()} does not answer for new weights: {refused}") from None
        ours = _logps_of(self.model, ids)
        self.gap = (ours - torch.tensor(theirs, dtype=torch.float64)).abs().mean().item()
        widths = {self._dtype(), compute_dtype(self.model, next(self.model.parameters()).device)}
        most = max(APART.get(width, APART_HALF) for width in widths)
        if not self.gap <= most:
            raise EngineError(
                f"{self._where()} does not hold the policy's weights: its log-probabilities of a text differ "
                f"by {self.gap:.3g} nats a token (at most {most} is rounding); nothing was sampled. It "
                "serves another model, or cannot load this one in place"
            )

    def _dtype(self) -> torch.dtype:
        """The server's precision, where keel says it."""
        if self.settings.dtype is not None:
            return getattr(torch, self.settings.dtype)
        own = compute_dtype(self.model, next(self.model.parameters()).device)
        return torch.float32 if own == torch.float64 else own

    def _push_hint(self, refused: RefusedError) -> str:
        if refused.status in (401, 403, 405):
            return self._hint(refused)
        if refused.status == 404 and not self.adapters:
            return self._hint(refused)
        return f"; it must see the folder {self.folder} (rollout.folder)"

    # ------------------------------------------------------------ sleep, and the end

    def _wake(self) -> None:
        if self._asleep and self._wire is not None:
            self._said_of_sleep("/wake_up")
            self._asleep = False

    def _rest(self) -> None:
        if self.settings.sleep and self._wire is not None and not self._asleep:
            self._said_of_sleep("/sleep?level=1")
            self._asleep = True

    def _said_of_sleep(self, route: str) -> None:
        assert self._wire is not None
        try:
            self._wire.post(route)
        except RefusedError as refused:
            raise EngineError(
                f"{self._where()} cannot sleep: {refused}; start it with --enable-sleep-mode, or leave "
                "rollout.sleep out"
            ) from None
        except DownError:
            if route == "/wake_up":
                raise
            self._wire = None  # the next call looks for it

    def facts(self) -> dict[str, Any]:
        """What a report says of the server."""
        return {
            "engine": f"vllm {self.version}", "pushes": self.pushes, "restarts": self.restarts,
            "asked_again": self.asked_again,
        }  # fmt: skip

    def close(self) -> None:
        """End a server that was started here, and clear what was pushed to one that was not."""
        if self._wire is not None and self._server is None and self.adapters:
            for old in self.folder.glob(f"keel-{self._token}-*"):
                with contextlib.suppress(DownError, RefusedError):
                    self._wire.post("/v1/unload_lora_adapter", {"lora_name": old.name}, timeout=10.0)
        self._wire = self._held = None
        if self._server is not None:
            self._server.stop()
        for left in [self.folder / "start", *self.folder.glob(f"keel-{self._token}-*")]:
            shutil.rmtree(left, ignore_errors=True)


def _logps_of(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """(N − 1,) log-probabilities of a text's tokens behind the first, over the whole vocabulary, float64."""
    device = next(model.parameters()).device
    was = model.training
    try:
        with torch.no_grad(), computing(model, device):
            logits = model.eval()(input_ids=torch.tensor([list(ids)], device=device), use_cache=False).logits[
                0
            ]
    finally:
        model.train(was)
    found = logits[:-1].double().log_softmax(-1)
    return found.gather(-1, torch.tensor(ids[1:], device=device)[:, None]).squeeze(-1).cpu()
