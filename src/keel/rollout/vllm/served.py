"""What a server says that it serves."""

from __future__ import annotations

from dataclasses import dataclass

from keel.errors import EngineError
from keel.rollout.vllm.wire import Wire

PROCESSED = "processed_logprobs"  # log-probabilities of the distribution that tokens are drawn from


@dataclass(frozen=True, slots=True)
class Served:
    """A vLLM server's answers about itself."""

    version: str  # as 0.32.0
    base: str  # the name of the model that it was started with
    room: int | None  # tokens of a prompt and its response
    logprobs: str  # the mode of its log-probabilities
    takes_adapters: bool


def look(wire: Wire) -> Served:
    """Ask a server that is well. RefusedError and DownError as of `Wire`; EngineError for one that answers
    like no vLLM server."""
    try:
        version = str((wire.get("/version") or {}).get("version", "unknown"))
        served = wire.get("/v1/models")["data"]
        base = next(one for one in served if one.get("parent") is None)
        told = wire.get("/server_info?config_format=json")["vllm_config"]
        mode, room = str(told["model_config"]["logprobs_mode"]), base.get("max_model_len")
        adapters = bool(told.get("lora_config"))
        return Served(version, str(base["id"]), room if isinstance(room, int) else None, mode, adapters)
    except (KeyError, TypeError, AttributeError, StopIteration) as error:
        raise EngineError(
            f"{wire.address} answers like no vLLM server ({type(error).__name__}: {error})"
        ) from None
