"""Frozen weights in 8 or 4 bits, by bitsandbytes."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from keel.errors import UsageError

OLDEST = (0, 48)  # of bitsandbytes: the first that moves 8-bit weights between devices
KINDS = {"8bit": "int8", "4bit": "int4"}  # a config's word → that of keel.plan.model_memory


def check() -> None:
    """UsageError unless bitsandbytes is here, and new enough. It is kept from saying at every product that it
    casts."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    way_out = "install it (`pip install 'bitsandbytes>=0.48'`), or leave `quantize` out"
    try:
        version = importlib.import_module("bitsandbytes").__version__
    except (ImportError, RuntimeError, OSError) as error:
        raise UsageError(
            f"quantize needs bitsandbytes, which cannot be loaded ({error}): {way_out}"
        ) from None
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise UsageError(f"quantize needs bitsandbytes 0.48 or newer; here is {version}: {way_out}")


def rest_in(dtype: str) -> str:
    """The precision of what is not quantised, for a model that would be in `dtype`: always in 16 bit."""
    return "bfloat16" if dtype in ("auto", "float32") else dtype


def options(quantize: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `from_pretrained`: LLM.int8 (2208.07339) for 8bit, NF4 (2305.14314) for 4bit; none for
    None. The blocks' matrices are quantised; embeddings, norms and heads stay in `dtype`, in which everything
    is computed."""
    if quantize is None:
        return {}
    check()
    settings = (
        BitsAndBytesConfig(load_in_8bit=True)
        if quantize == "8bit"
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    )
    return {"quantization_config": settings}


def settled(model: Any) -> Any:
    """The model with one way to compute: on some CPUs bitsandbytes repacks 4-bit weights at the first forward
    in evaluation mode, and what comes after it is rounded otherwise, so that a resumed run would not end with
    the same bytes."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model
