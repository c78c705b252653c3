"""A server that holds the trainer's weights: found or started, given them, checked, and had again when it is
gone.

The weights are taken from the policy into a folder whenever they have changed, and pushed from there, as
often as it takes. A push counts only once

1. every step of it was answered,
2. the server's version token (or the adapter's name, which is new with each push) is the one that was set,
3. the server gives a short text the log-probabilities that the trainer gives it, and not those of older
   weights (`push_check`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from keel.distributed import sharded
from keel.errors import EngineError, UsageError
from keel.models.load import context_length
from keel.models.precision import compute_dtype, computing
from keel.models.tokenizer import known_ids
from keel.rollout.vllm import asking, served, weights
from keel.rollout.vllm.asking import StaleError, Weights
from keel.rollout.vllm.push_check import PushCheck
from keel.rollout.vllm.server import Launch, Server, is_cpu, program_of, wait_until_ready
from keel.rollout.vllm.wire import DownError, FailedError, RefusedError, Wire

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from keel.rollout.vllm.on_ray import ActorServer

PAUSE = 0.5  # seconds before a server that answers nothing of use is asked again
PROBED = 32  # tokens of the text that a push is checked with
CLEARING = 20  # tries to clear the prefix cache, which fails while a request is being let go


@dataclass(frozen=True, slots=True, eq=False)
class Taken:
    """The model's weights as they were when they were taken."""

    bits: tuple[int, ...]  # `weights.print_of`
    place: Path  # the folder that holds them
    logps: torch.Tensor  # (N − 1,) that they give the text of the probe


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Where a server is, or how one is started, and how patiently it is asked."""

    address: str | None = None  # None: start one
    key: str | None = field(default=None, repr=False)
    key_named: bool = False  # whether the config names a key
    environment: str | None = None
    devices: str | None = None
    group: str | None = None  # Ray's placement group that a started one stands in; None: beside this process
    dtype: str | None = None  # None: what the trainer multiplies in
    args: tuple[str, ...] = ()
    whole: bool = False  # push all weights where adapters are trained, too
    concurrency: int = 256
    timeout: float = 600.0
    patience: float = 900.0
    restarts: int = 3
    sleep: bool = False
    trust_remote_code: bool = False


class Holder:
    """A server with the model's weights. Arguments as of `VllmEngine`.

    `pushes`, `restarts`: how often weights were pushed, and the server came back.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: ServerSettings,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase | None,
        length: int | None,
        say: Callable[[str], None],
    ) -> None:
        self.model, self.settings, self.folder = model, settings, folder.resolve()
        self.tokenizer, self.length, self.say = tokenizer, length, say
        self.adapters = weights.has_adapters(model) and not settings.whole
        self.pushes = self.restarts = 0
        self.version = ""  # the server's own, as 0.32.0
        self.wire: Wire | None = None
        self.vocab = int(model.config.get_text_config().vocab_size)
        self._server: Server | ActorServer | None = None
        self._base = ""  # the name of the served model
        self._taken: Taken | None = None  # what is sampled with
        self._held: tuple[Taken, Weights] | None = None  # what the server was given last
        self._arrived = PushCheck()
        self._untied = False  # whether a head that shares its weights is written with its own
        self._at_start = False  # whether it has the weights that it was started on
        self._adapters_there: list[str] = []
        self._token = secrets.token_hex(4)
        self._asleep = self._closed = False
        self._text = self._text_of_probe()

    def drop(self) -> None:
        """What the server holds is not known any more: the next `hold` pushes."""
        self._held = None

    # ------------------------------------------------------------ the trainer's weights

    def take(self) -> None:
        """Write the weights into a folder, where they have changed since."""
        now = weights.print_of(self.model)
        if self._taken is not None and self._taken.bits == now:
            return
        if self._taken is None:
            for left in self.folder.glob("keel-*"):  # of a run that was killed
                shutil.rmtree(left, ignore_errors=True)
        place, before = self.folder / f"keel-{self._token}-{time.monotonic_ns()}", self._taken
        if self.settings.address is None and self._server is None:
            self._server = self._prepared()
            place = place if self.adapters else self._start
        if self.adapters:
            weights.write_adapter(self.model, place)
        elif place != self._start:
            weights.write_whole(self.model, place, self._dtype(), untied=self._untied)
        self._taken = Taken(now, place, _logps_of(self.model, self._text))
        if before is not None and before.place != self._start and not self.adapters:
            shutil.rmtree(before.place, ignore_errors=True)

    def hold(self) -> Weights:
        """See to it that the server is there, awake, and holds the weights that were taken. EngineError once
        it is closed: who samples in a thread starts no other server then."""
        self._check_open()
        if self.wire is None:
            self.wire = self._connect()
        self._wake()
        taken = self._taken
        assert taken is not None
        held = self._held
        if held is None or held[0] is not taken:
            self._held = None
            self._held = held = taken, self._push(taken)
        return held[1]

    def _push(self, taken: Taken) -> Weights:
        """Give the server what was taken, and check that it has it."""
        self.pushes += 1
        name = f"keel-{self._token}-{self.pushes}"
        try:
            new = self._push_adapter(name, taken) if self.adapters else self._push_whole(name, taken)
        except RefusedError as refused:
            raise EngineError(
                f"{self.where()} does not take the weights: {refused}{self._push_hint(refused)}"
            ) from None
        except FailedError as failed:
            sees = f"it must see the folder {self.folder} (rollout.folder)"
            raise FailedError(
                failed.status, f"{failed.reason}, when it was given the weights; {sees}"
            ) from None
        self._check(new, taken)
        return new

    def _push_adapter(self, name: str, taken: Taken) -> Weights:
        """The adapter, under a name of its own: one that did not arrive is unknown, and one of before has
        another name."""
        assert self.wire is not None
        self.wire.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(taken.place)})
        self._clear_cache()
        for old in self._adapters_there:
            with contextlib.suppress(RefusedError):
                self.wire.post("/v1/unload_lora_adapter", {"lora_name": old})
        self._adapters_there = [name]
        for place in self.folder.glob(f"keel-{self._token}-*"):
            if place != taken.place:
                shutil.rmtree(place, ignore_errors=True)
        return Weights(name, None)

    def _push_whole(self, name: str, taken: Taken) -> Weights:
        """All weights, in place. The version is changed before the first of them moves, so that nothing that
        is sampled meanwhile bears the old one, nor the new one before all are there."""
        wire = self.wire
        assert wire is not None
        wire.post("/update_weight_version", {"new_version": f"{name}-on-its-way"})
        if not (self._at_start and taken.place == self._start):
            self._at_start = False
            call = {"method": "reload_weights", "kwargs": {"weights_path": str(taken.place)}}
            wire.post("/collective_rpc", call)
        self._clear_cache()
        wire.post("/update_weight_version", {"new_version": name})
        told = wire.get("/weight_info")
        version = told.get("weight_version") if isinstance(told, dict) else told
        if version != name:
            raise StaleError(f"after a push it says that its weights are {version!r}, not {name!r}")
        return Weights(self._base, name)

    def _clear_cache(self) -> None:
        """Forget keys and values that older weights made."""
        assert self.wire is not None
        for _ in range(CLEARING):
            told = self.wire.post("/reset_prefix_cache")
            if isinstance(told, dict) and told.get("success") is True:
                return
            time.sleep(0.1)
        raise FailedError(200, "its prefix cache, made by older weights, is not cleared")

    def _check(self, new: Weights, taken: Taken) -> None:
        """EngineError where the server does not give a text the trainer's log-probabilities: it holds other
        weights, older ones perhaps, or computes another model."""
        assert self.wire is not None
        try:
            told = self.wire.post(asking.ROUTE, asking.probe(self._text, new))
        except RefusedError as refused:
            raise EngineError(
                f"{self.where()} does not answer for new weights: {refused}{self.hint(refused)}"
            ) from None
        theirs = torch.tensor(asking.probed(told, self._text), dtype=torch.float64)
        widths = {self._dtype(), compute_dtype(self.model, sharded.device_of(self.model))}
        if fault := self._arrived.fault(taken.logps, theirs, widths):
            raise EngineError(
                f"{self.where()} does not hold the policy's weights: {fault}; nothing was sampled. It "
                "serves another model, or cannot load this one in place (vLLM's CPU package: one whose head "
                "shares its weights with the embeddings, unless keel starts the server)"
            )

    @property
    def gap(self) -> float:
        """|log π of the trainer − of the server| a token at the last push."""
        return self._arrived.gap

    def _dtype(self) -> torch.dtype:
        """The server's precision, where keel says it."""
        if self.settings.dtype is not None:
            return getattr(torch, self.settings.dtype)
        own = compute_dtype(self.model, sharded.device_of(self.model))
        return torch.float32 if own == torch.float64 else own

    def _text_of_probe(self) -> list[int]:
        """Ids that every push is checked with."""
        known = self.vocab if self.tokenizer is None else min(self.vocab, known_ids(self.tokenizer))
        room = context_length(self.model.config) or PROBED + 1
        length = max(2, min(PROBED, room - 1, PROBED if self.length is None else self.length - 1))
        return torch.randint(known, (length,), generator=torch.Generator().manual_seed(0)).tolist()

    def _push_hint(self, refused: RefusedError) -> str:
        if refused.status in (401, 403, 405):
            return self.hint(refused)
        if refused.status == 404 and not self.adapters:
            return self.hint(refused)
        return f"; it must see the folder {self.folder} (rollout.folder)"

    # ------------------------------------------------------------ a server that is there

    def _connect(self) -> Wire:
        """The server, found or started, and what it must be."""
        settings = self.settings
        if settings.address is not None:
            wire = Wire(settings.address, settings.key, settings.timeout)
            wait_until_ready(wire, settings.patience)
        else:
            server = self._server
            assert server is not None  # since weights were taken
            server.start()
            self._at_start = True
            self.say(f"a vLLM server starts at {server.address} (its log: {server.log})")
            wire = Wire(server.address, server.key, settings.timeout)
            try:
                wait_until_ready(wire, settings.patience, lambda: server.alive, server.last_words)
            except BaseException:
                server.stop()
                raise
        self._look_at(wire)
        return wire

    def _prepared(self) -> Server | ActorServer:
        """A server to start, and the folder that it starts on."""
        program, dtype = program_of(self.settings.environment), self._dtype()
        if self.settings.sleep and is_cpu(program):
            raise UsageError("`rollout.sleep` needs CUDA: the CPU package of vLLM cannot sleep; leave it out")
        # the CPU package packs a head's weights anew only where they come under its own name (0.32.0)
        self._untied = is_cpu(program) and not self.adapters and weights.is_tied(self.model)
        weights.write_start(
            self.model, self.tokenizer, self._start, dtype, folded=not self.adapters, untied=self._untied
        )
        most = context_length(self.model.config)
        length = most if self.length is None else min(self.length + 1, most or self.length + 1)
        launch = Launch(
            program, str(self._start), str(dtype).removeprefix("torch."), length,
            weights.rank_of(self.model) if self.adapters else None, devices=self.settings.devices,
            sleep=self.settings.sleep, trust_remote_code=self.settings.trust_remote_code,
            args=self.settings.args,
        )  # fmt: skip
        log, group = self.folder / "server.log", self.settings.group
        if group is None:
            return Server(launch, log)
        from keel.rollout.vllm.on_ray import ActorServer

        return ActorServer(launch, log, group, self.settings.patience, self.say)

    def _look_at(self, wire: Wire) -> None:
        """Read from a server what it serves. EngineError for one that cannot be used, with what to change."""
        try:
            told = served.look(wire)
        except RefusedError as refused:
            raise EngineError(f"{self.where()} cannot be used: {refused}{self.hint(refused)}") from None
        self.version = told.version
        if told.logprobs != served.PROCESSED:
            raise EngineError(
                f"{self.where()} gives {told.logprobs}, and log-probabilities must be those that tokens are "
                f"drawn with: start it with --logprobs-mode {served.PROCESSED}, or by `keel engine serve`"
            )
        if self.adapters and not told.takes_adapters:
            raise EngineError(
                f"{self.where()} takes no adapters: start it by `keel engine serve --lora-rank "
                f"{weights.rank_of(self.model)}`, or set rollout.push: whole"
            )
        if told.room is not None and self.length is not None and self.length > told.room:
            raise UsageError(
                f"{self.where()} has room for {told.room} tokens, and a prompt and its response may have "
                f"{self.length}: start it with a larger --max-model-len"
            )
        self._base, self._held, self._asleep = told.base, None, False
        self._adapters_there.clear()

    def lost(self, reason: str) -> None:
        """After a round that brought too little: a server that is gone is started again or waited for."""
        self._check_open()
        self._held = None
        if self.wire is not None:
            try:
                if self._server is None or self._server.alive:
                    self.wire.get("/health", timeout=min(10.0, self.settings.timeout))
                    time.sleep(PAUSE)
                    return  # it is there
            except RefusedError as refused:
                raise EngineError(f"{self.where()} cannot be used: {refused}") from None
            except DownError as down:
                reason = f"{reason}; {down}"
            self.wire = None
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

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError(f"{self.where()} is not asked any more: its stage has ended")

    @property
    def _start(self) -> Path:
        """The folder that a server is started on."""
        return self.folder / "start"

    def where(self) -> str:
        address = self.settings.address or (self._server and self._server.address)
        return f"the vLLM server at {address}"

    def hint(self, refused: RefusedError) -> str:
        """What a user can do about a refusal."""
        if refused.status == 401:
            named = self.settings.key_named
            return (
                "; the key in the variable of rollout.api_key_env is not its own"
                if named
                else "; set rollout.api_key_env to the variable with its key"
            )
        if refused.status in (403, 404, 405):
            return "; start it by `keel engine serve`, which opens the routes that keel needs"
        return ""

    # ------------------------------------------------------------ sleep, and the end

    def _wake(self) -> None:
        if self._asleep and self.wire is not None:
            self._said_of_sleep("/wake_up")
            self._asleep = False

    def rest(self) -> None:
        if self.settings.sleep and self.wire is not None and not self._asleep:
            self._said_of_sleep("/sleep?level=1")
            self._asleep = True

    def _said_of_sleep(self, route: str) -> None:
        assert self.wire is not None
        try:
            self.wire.post(route)
        except RefusedError as refused:
            raise EngineError(
                f"{self.where()} cannot sleep: {refused}; start it with --enable-sleep-mode, or leave "
                "rollout.sleep out"
            ) from None
        except DownError:
            if route == "/wake_up":
                raise
            self.wire = None  # the next call looks for it

    def close(self) -> None:
        """End a server that was started here, and clear what was pushed to one that was not. Requests of
        another thread end at once.

        Weights go first: a server takes seconds to end, for which a launcher that ends a rank, or a second
        Ctrl-C, does not wait."""
        self._closed = True
        if self.wire is not None:
            self.wire.close()
        for left in [self._start, *self.folder.glob(f"keel-{self._token}-*")]:
            shutil.rmtree(left, ignore_errors=True)
        if self.wire is not None and self._server is None:
            other = dataclasses.replace(self.wire)
            for old in self._adapters_there:
                with contextlib.suppress(DownError, RefusedError):
                    other.post("/v1/unload_lora_adapter", {"lora_name": old}, timeout=10.0)
        if self._server is not None:  # the rest stays, since another thread may be about to use it
            self._server.stop()


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
