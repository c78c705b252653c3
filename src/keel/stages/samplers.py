"""What a stage samples with, as its `rollout` says: keel's own engine, or a vLLM server."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from keel.config.sampler import AT_ONCE, SamplerConfig
from keel.distributed import engine_place, group, sharded
from keel.errors import UsageError
from keel.models.precision import compute_dtype
from keel.rollout import Engine, KeelEngine
from keel.rollout.vllm import ServerSettings, SharedEngine, VllmEngine
from keel.rollout.vllm.server import is_cpu, program_of
from keel.rundir.stage_run import StageRun

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FOLDER = "engine"  # of a stage: the server's log, and weights on their way to it


def check_machine(settings: SamplerConfig, where: str) -> None:
    """UsageError where vLLM or the key of its server is missing. where: the stage, for messages."""
    if not settings.vllm:
        return
    try:
        key_of(settings)
        if settings.address is None:
            program_of(settings.environment)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def key_of(settings: SamplerConfig) -> str | None:
    """The key of the server, from the environment; None where it needs none. UsageError for an empty one."""
    if settings.api_key_env is None:
        return None
    key = os.environ.get(settings.api_key_env, "").strip()
    if not key:
        raise UsageError(
            f"the environment variable {settings.api_key_env} (`rollout.api_key_env`) is not set"
        )
    return key


def card_note(settings: SamplerConfig) -> str | None:
    """What is said where several ranks have a card each and share a server that is started beside them: it
    takes the first card that it sees, which is the first rank's. None where it has cards of its own, or
    gives its card back."""
    if not settings.placeable:
        return None
    return (
        "the vLLM server shares the first rank's card: give it one of its own (`rollout.devices`, and one "
        "rank fewer by --nproc), let it sleep while keel trains (`rollout.sleep: true`), or name a server "
        "elsewhere (`rollout.address`)"
    )


def on_processor(settings: SamplerConfig) -> bool:
    """Whether vLLM's package for processors is the one that a server is started from."""
    try:
        return is_cpu(program_of(settings.environment))
    except UsageError:  # which is said where the server is to be started
        return False


def print_of(place: Path) -> str:
    """Some letters that tell a folder from others of its name: two runs may share a folder for weights."""
    return f"{zlib.crc32(str(place).encode()):08x}"


def open_sampler(
    settings: SamplerConfig,
    model: PreTrainedModel,
    run: StageRun,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 64,
    length: int | None = None,
    trust_remote_code: bool = False,
) -> Engine:
    """The engine on a model. batch_size: rows that keel's own samples at the same time. length: tokens of the
    longest prompt and its response. A server that is started for it ends with the stage. Several ranks share
    one, which the first has."""
    if not settings.vllm:
        return KeelEngine(model, batch_size)
    if group.size() == 1:
        return _open_server(settings, model, run, tokenizer, length, trust_remote_code)
    engine = None
    beside = engine_place.reserved() is None
    if beside and group.device_type() == "cuda" and (note := card_note(settings)) is not None:
        run.note(note)
    if group.is_first():
        engine = _open_server(settings, model, run, tokenizer, length, trust_remote_code)
    return SharedEngine(model, engine, tokenizer)


def _open_server(
    settings: SamplerConfig,
    model: PreTrainedModel,
    run: StageRun,
    tokenizer: PreTrainedTokenizerBase,
    length: int | None,
    trust_remote_code: bool,
) -> VllmEngine:
    """A server that this process alone has. Of a model that is cut over ranks it is given the whole one."""
    dtype = settings.dtype
    if sharded.is_cut(model):  # which is whole on the CPU, that may compute in another precision
        own = compute_dtype(model, run.device)
        dtype = dtype or str(torch.float32 if own == torch.float64 else own).removeprefix("torch.")
        model = sharded.modules_of(model)
    shared = run.directory / FOLDER
    if settings.folder:  # which other runs may use, too
        whose = run.directory.resolve()  # RUNS/NAME/stages/STAGE
        shared = Path(settings.folder).expanduser() / f"{whose.parts[-3]}-{run.name}-{print_of(whose)}"
    engine = VllmEngine(
        model,
        ServerSettings(
            address=settings.address, key=key_of(settings), key_named=settings.api_key_env is not None,
            environment=settings.environment, devices=settings.devices, dtype=dtype,
            group=engine_place.reserved() if settings.placeable else None,
            args=tuple(settings.args), whole=settings.push == "whole",
            concurrency=settings.concurrency or AT_ONCE["vllm"],
            timeout=settings.timeout, patience=settings.patience, restarts=settings.restarts,
            sleep=settings.sleep, trust_remote_code=trust_remote_code,
        ),
        shared, tokenizer, length, lambda line: run.say(f"{run.name}: {line}"),
    )  # fmt: skip

    def end() -> None:
        engine.close()
        run.facts.setdefault("engines", []).append(engine.facts())

    run.at_end(end)
    return engine
