"""A folder for a hub: the model as it was saved, with a card that says how it came about; and its upload."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from keel.errors import KeelError, UsageError
from keel.export.card import card
from keel.export.models import Model
from keel.models import lora


def write(model: Model, out: Path) -> None:
    """Copy the model's folder to `out`, which must not be there, with a full card. An adapter goes along only
    where its base is on the hub, too."""
    if out.exists():
        raise UsageError(f"{out} is there already; it was not overwritten")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(model.folder, partial)
    adapter = partial / "adapter"
    if (adapter / lora.SETTINGS).is_file() and lora.base_of(adapter) is None:
        shutil.rmtree(adapter)  # its base is a folder of this machine; the model has it merged in
    if model.run is not None:
        (partial / "README.md").write_text(card(model), encoding="utf-8")
    partial.rename(out)


def push(model: Model, repo: str, *, private: bool = True, revision: str | None = None) -> str:
    """Upload what `write` writes to a model repository, which is made where it is not there; its address.
    UsageError for a bad name and where nobody is logged in."""
    api: Any = huggingface_hub.HfApi()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        write(model, folder)
        try:
            address = api.create_repo(repo, repo_type="model", private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo, branch=revision, exist_ok=True)
            api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                revision=revision,
                commit_message=f"{model.name}, by keel",
            )
        except HFValidationError as error:
            raise UsageError(f"{repo!r} is no name of a repository (OWNER/NAME): {error}") from None
        except (HfHubHTTPError, OSError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status in (401, 403):
                raise UsageError(
                    f"the hub refuses to write to {repo!r}: log in with `hf auth login`, as somebody who may"
                ) from None
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise KeelError(f"{repo!r} could not be pushed: {reason}; the same command tries again") from None
    return str(address)
