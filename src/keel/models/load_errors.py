"""What is said where a model, a tokenizer or a config cannot be loaded: one line, with its remedy."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

from keel.errors import UsageError
from keel.models.checkpoint_files import fault_in

NO_TOKENIZER = (
    "it has no token for any text: put the tokenizer's files (tokenizer.json and tokenizer_config.json) into "
    "the folder, or name another one as `model.tokenizer`"
)
WHOLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # dtypes whose extremes torch can tell
EXPECTED = (OSError, ValueError, KeyError, ImportError, TypeError, RuntimeError, StrictDataclassError)


@contextlib.contextmanager
def explained(what: str, kind: str) -> Iterator[None]:
    """Turn transformers' many load errors into one message; keep its progress bars off a user's terminal."""
    transformers.utils.logging.disable_progress_bar()
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except UsageError as error:  # of a file, with its remedy
        raise UsageError(f"{kind} {what!r} cannot be loaded: {error}") from None
    except Exception as error:
        fault = fault_in(what) if kind in ("model", "tokenizer") else None
        if fault is not None:
            raise UsageError(f"{kind} {what!r} cannot be loaded: {fault}") from error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if type(error) is not Exception and not isinstance(error, EXPECTED):
            # of a config that makes transformers divide by nothing, and the like
            lines[0] = f"{type(error).__name__}: {lines[0]}"
        reason = _no_model_at(what) if kind in ("model", "tokenizer") else None
        if kind == "tokenizer" and "instantiate the backend tokenizer" in lines[0]:
            reason = reason or NO_TOKENIZER
        reason = reason or " ".join(line.strip() for line in lines[: 1 + lines[0].rstrip().endswith(":")])
        if "trust_remote_code" in str(error):
            reason += " Set `trust_remote_code` if you trust its author"
        raise UsageError(f"{kind} {what!r} cannot be loaded: {reason}") from error
    finally:
        transformers.utils.logging.set_verbosity(level)


def _no_model_at(path: str) -> str | None:
    """What is wrong with a path that holds no model at all; None where there is more to say. transformers
    takes such a path for a hub id, and a folder for one of a tokenizer that it cannot convert."""
    folder = Path(path)
    if folder.is_dir():
        if any(
            (folder / name).exists() for name in ("config.json", "tokenizer.json", "tokenizer_config.json")
        ):
            return None
        inside = folder / "model"
        return f"the model is in {inside}" if inside.is_dir() else "there is no config.json in this folder"
    looks_like_a_path = path.count("/") > 1 or path.startswith((".", "/", "~"))
    return "there is no such folder" if looks_like_a_path and not folder.exists() else None


def require_finite(model: Any, path: str) -> None:
    """UsageError, which names one, for a checkpoint with weights that are NaN or infinite: all that such a
    model says is. One pass over the weights."""
    for name, weight in model.named_parameters():
        if weight.is_meta or weight.dtype not in WHOLE or not weight.numel():
            continue
        low, high = torch.aminmax(weight.detach())
        if not (low.isfinite() and high.isfinite()):
            raise UsageError(
                f"model {path!r} cannot be loaded: {name} is not finite (NaN or infinite): the training that "
                "made it went wrong, or the file is damaged; take an earlier checkpoint, or download it again"
            )
