"""A model card: what a model was trained on, how, what was measured, what was found, under which licence."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

import keel
from keel.export.models import Model
from keel.models.model_card import HERE, licence, licence_text, usage_in
from keel.report import health
from keel.report.reading import Run, StageRun

WHAT = {
    "language model": "a causal language model",
    "reward model": "a reward model: a sequence classifier with one output",
    "classifier": "a text classifier",
}


def card(model: Model) -> str:
    """The card of a stage's model, as Markdown with a YAML head."""
    assert model.run is not None
    assert model.stage is not None
    run, stage = model.run, model.stage
    chain = list(_chain(run, stage))
    base = next((path for one in chain if (path := _path(one)) and _stage(run, path) is None), None)
    head = _head(model, chain, base)
    what = WHAT.get(str(stage.shown_as.config.leaves), "a model")
    parts = [
        f"# {model.name}",
        f"{what.capitalize()}, trained with [keel](https://pypi.org/project/keel-rlhf/) {keel.__version__} "
        f"(stage `{stage.name}`, {stage.kind})" + (f" from `{base}`." if base else " from new weights."),
        _use(model),
        "## How it came about\n\n" + "\n".join(_steps(run, chain)),
        "## Measures\n\n" + (_measures(run, stage) or "Nothing was held out to measure it on."),
        "## Diagnosis\n\n" + _diagnosis(run, chain),
        "## Settings\n\nWhat was set for this stage; every default of the run is in its `config.yaml`.\n\n"
        f"```yaml\n{yaml.safe_dump(_changed(stage), sort_keys=False, allow_unicode=True).strip()}\n```",
        "## Licence\n\n" + licence_text(head.get("license"), base),
    ]
    top = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    return f"---\n{top}---\n\n" + "\n\n".join(parts) + "\n"


def _head(model: Model, chain: list[StageRun], base: str | None) -> dict[str, Any]:
    hub_base = base if base and not Path(base).exists() else None
    sets = sorted({
        source for one in chain for source in _sources(one.settings)
        if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not Path(source).exists()
    })  # fmt: skip
    scores = model.scores
    head: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification" if scores else "text-generation",
        "tags": ["keel", "rlhf", model.stage.kind if model.stage else "model"],
        "base_model": hub_base,
        "datasets": sets,
        "license": licence(base) if base else None,
    }
    return {key: value for key, value in head.items() if value}


def _use(model: Model) -> str:
    """What the card that the stage saved says of its use, with the model's name for the folder."""
    saved = model.folder / "README.md"
    found = usage_in(saved.read_text(encoding="utf-8")) if saved.is_file() else None
    if found is not None:
        return found.replace(HERE, f'from_pretrained("{model.name}")')
    auto = "AutoModelForSequenceClassification" if model.scores else "AutoModelForCausalLM"
    return (
        "## Usage\n\n```python\n"
        f"from transformers import AutoTokenizer, {auto}\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{model.name}")\n'
        f'model = {auto}.from_pretrained("{model.name}")\n```'
    )


def _chain(run: Run, stage: StageRun) -> Iterator[StageRun]:
    """The stages that a model went through, the last first."""
    seen: set[str] = set()
    current: StageRun | None = stage
    while current is not None and current.name not in seen:
        seen.add(current.name)
        yield current
        current = _stage(run, _path(current))


def _path(stage: StageRun) -> str | None:
    model = stage.settings.get("model")
    return model.get("path") if isinstance(model, Mapping) else model


def _stage(run: Run, name: str | None) -> StageRun | None:
    return next((stage for stage in run.stages if stage.name == name), None)


def _sources(settings: Mapping[str, Any]) -> list[str]:
    given = settings.get("data") or []
    parts = given.values() if isinstance(given, Mapping) else [given]
    flat = [source for part in parts for source in (part if isinstance(part, list) else [part])]
    return [str(source.get("source", "")) if isinstance(source, Mapping) else str(source) for source in flat]


def _steps(run: Run, chain: list[StageRun]) -> Iterator[str]:
    for number, stage in enumerate(reversed(chain), 1):
        data, facts = stage.record.get("data"), stage.record.get("facts") or {}
        trained = facts.get("trained_parameters")
        said = [f"data: {data}" if data else "", f"{facts['steps']:,} steps" if facts.get("steps") else ""]
        said += [f"{trained:,} trained parameters" if trained else ""]
        said += [f"rewards: {', '.join(_rewards(stage))}" if _rewards(stage) else ""]
        yield f"{number}. `{stage.name}` ({stage.kind}): {'; '.join(filter(None, said)) or 'as configured'}"


def _rewards(stage: StageRun) -> list[str]:
    given = stage.settings.get("reward") or []
    terms = given if isinstance(given, list) else [given]
    return [
        str(term.get("label") or term.get("model") or term.get("kind") or term)
        if isinstance(term, Mapping)
        else str(term)
        for term in terms
    ]


def _measures(run: Run, stage: StageRun) -> str:
    """The stage's own measures, then what evaluate stages found of it; intervals are of 95 %."""
    rows = [(name, _value(value)) for name, value in stage.result.items() if _value(value)]
    for judge in run.with_models:
        of_model = judge.result["models"].get(stage.name) or {}
        rows += [
            (f"{judge.name}: {name}", _value(value)) for name, value in of_model.items() if _value(value)
        ]
    if not rows:
        return ""
    lines = [f"| {name} | {value} |" for name, value in rows]
    return "| measure | value (95 % interval, n) |\n|---|---|\n" + "\n".join(lines)


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return ""
    if isinstance(value, int | float):
        return f"{value:.4g}"
    if isinstance(value, Mapping) and "mean" in value:
        text = f"{value['mean']:.4g}"
        if "low" in value and "high" in value:
            text += f" ({value['low']:.4g} to {value['high']:.4g}"
            text += f", n = {value['n']})" if "n" in value else ")"
        return text
    return ""


def _diagnosis(run: Run, chain: list[StageRun]) -> str:
    names = {stage.name for stage in chain}
    lines: list[str] = []
    for name, found in health.diagnoses(run).items():
        if name in names:
            lines += [
                f"- `{name}`, step {line.step}: {line.level}, {line.name}: {line.evidence}"
                for line in health.lines(found)
            ]
            if not health.lines(found):
                lines.append(f"- `{name}`: nothing was found in its training")
    return "\n".join(lines) or "No stage learned from its own samples: there is nothing to diagnose."


def _changed(stage: StageRun) -> dict[str, Any]:
    """The settings that differ from a kind's defaults."""
    fields = stage.shown_as.config.model_fields
    kept: dict[str, Any] = {}
    for name, value in stage.settings.items():
        field = fields.get(name)
        default: Any = (
            field.get_default(call_default_factory=True)
            if field is not None and not field.is_required()
            else None
        )
        plain = default.model_dump(mode="json") if hasattr(default, "model_dump") else default
        if field is None or field.is_required() or value != plain:
            kept[name] = value
    return kept
