"""Every type of causal language model that transformers knows: read, packed, sampled from, adapted and saved
by keel as by transformers itself, or refused in a line."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.insert(0, str(Path(__file__).parent))
import checks
import zoo

ROOT = Path(__file__).parents[2]
# full, windowed and chunked attention, state space. All others are run by `make test-architectures`; linear
# attention, convolution and experts are sampled and trained by default in tests/rollout and tests/models.
ALWAYS = ("llama", "gemma3_text", "llama4_text", "mamba2")
MANY = pytest.mark.architectures
# parameters of types that cannot be smaller, most of them for pictures and sounds
BIG = {"got_ocr2": 2.6e6, "phi4_multimodal": 1.5e6, "deepseek_v4": 4e5, "xlstm": 5e5}


def _types(*always: str) -> list[object]:
    return [pytest.param(kind, marks=() if kind in always else MANY) for kind in zoo.kinds()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("architectures")


@pytest.mark.parametrize("check", checks.CHECKS)
@pytest.mark.parametrize("kind", _types(*ALWAYS))
def test_a_type_is_right_or_refused(kind: str, check: str, folder: Path) -> None:
    outcome = checks.outcome(check, kind, folder)
    assert outcome.sound, f"{outcome.state}: {outcome.said}"


@pytest.mark.parametrize("kind", _types(*ALWAYS))
def test_a_type_is_tiny_and_causal(kind: str) -> None:
    """Else the checks would take long, or hold for no reason."""
    model = zoo.build(kind)
    assert sum(p.numel() for p in model.parameters()) <= BIG.get(kind, 2e5)
    ids = torch.tensor([checks.rows_of()[2]])
    other = ids.clone()
    other[0, 30] += 1
    with torch.no_grad():
        one, two = (model(input_ids=x, use_cache=False).logits[0] for x in (ids, other))
    assert one.shape == (ids.shape[1], zoo.VOCAB)
    assert float((one[:30] - two[:30]).abs().max()) < 1e-4
    assert float((one[30:] - two[30:]).abs().max()) > 1e-2


def test_each_type_that_transformers_knows_is_tried_or_left_out_with_a_reason() -> None:
    assert set(zoo.LEFT_OUT) <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    tried = [*zoo.kinds(), *zoo.LEFT_OUT]
    assert sorted(tried) == sorted([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *zoo.VARIANTS])
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    table = page.partition("<!-- architectures -->")[2].partition("<!-- end of architectures -->")[0]
    lines = [line for line in table.splitlines() if line.startswith(("| ", "- "))]
    named = [name for line in lines for name in line.strip("|- ").split(" | ")[0].split(": ")[0].split(", ")]
    assert [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if named.count(kind) != 1] == []


@MANY
@pytest.mark.parametrize("kind", zoo.kinds())
def test_a_type_goes_through_the_stages(kind: str, folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("architectures", ROOT / "benchmarks" / "architectures.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    outcome = script.through_stages(kind, folder)
    assert outcome.sound, f"{outcome.state}: {outcome.said}"
