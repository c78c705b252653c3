"""`keel export` and `keel push`: a run's model for other programs."""

from __future__ import annotations

from pathlib import Path

from keel.errors import UsageError
from keel.export import gguf_file, hub, models, ollama

FORMS = ("gguf", "hub", "ollama")
DTYPES = ("float32", "float16", "bfloat16")


def export(place: str, form: str, out: Path | None, dtype: str) -> Path:
    """Write a model in another form; where it was written. UsageError for what cannot be."""
    if form not in FORMS:
        raise UsageError(f"--to {form!r} is not one of {', '.join(FORMS)}")
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if form == "hub" and dtype != "float32":
        raise UsageError("--dtype has no effect with --to hub: the weights stay as they were saved")
    model = models.find(place)
    target = out or Path(f"{model.name}.gguf" if form == "gguf" else f"{model.name}-{form}")
    if form == "hub":
        hub.write(model, target)
        return target
    if model.scores:
        raise UsageError(f"{place}: a reward model has no form in {form}; use --to hub")
    (gguf_file if form == "gguf" else ollama).write(model.folder, target, dtype, name=model.name)
    return target


def push(place: str, repo: str, *, private: bool, revision: str | None) -> str:
    """Upload a model; its address."""
    return hub.push(models.find(place), repo, private=private, revision=revision)
