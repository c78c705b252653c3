"""Sentence embeddings of a tiny BERT, against pooling written out by hand, one text at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from keel.errors import UsageError
from keel.models.load import ModelSource
from keel.rewards import similarity
from keel.rewards.similarity import Similarity

TEXTS = ["the cat is red.", "so the pig is blue, so it is.", "owl", "it is it is it is pink."]
MODULES = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]


def describe(
    folder: Path, modules: list[tuple[str, str]], pooling: dict[str, Any] | None = None, **settings: Any
) -> None:
    """The files that sentence-transformers writes beside a model."""
    rows = [
        {"idx": i, "name": str(i), "path": p, "type": f"sentence_transformers.models.{k}"}
        for i, (p, k) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(rows))
    if pooling is not None:
        (folder / "1_Pooling").mkdir(exist_ok=True)
        (folder / "1_Pooling" / "config.json").write_text(
            json.dumps({"word_embedding_dimension": 32, **pooling})
        )
    if settings:
        (folder / "sentence_bert_config.json").write_text(json.dumps(settings))


@pytest.fixture
def model(tiny_bert: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bert, tmp_path / "model"))


def states(folder: Path, text: str, length: int = 48) -> list[list[float]]:
    """The last hidden states of one unpadded text, token by token."""
    bert = AutoModel.from_pretrained(folder).eval()
    inputs = AutoTokenizer.from_pretrained(folder)(
        text, return_tensors="pt", truncation=True, max_length=length
    )
    with torch.no_grad():
        return bert(**inputs).last_hidden_state[0].tolist()


def by_hand(folder: Path, text: str, pooling: str = "mean", length: int = 48) -> list[float]:
    rows = states(folder, text, length)
    pooled = rows[0] if pooling == "cls" else [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    norm = sum(x * x for x in pooled) ** 0.5
    return [x / norm for x in pooled]


def cosine(one: list[float], other: list[float]) -> float:
    return sum(x * y for x, y in zip(one, other, strict=True))


def embeddings(folder: Path, texts: list[str], **settings: Any) -> torch.Tensor:
    return similarity.embed(similarity.load(ModelSource(str(folder))), texts, **settings)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize(
    "mode", ["plain", "mean", "cls", "mean, as newer files say it", "cls, as newer files say it"]
)
def test_embeddings_are_pooled_as_the_folder_says(model: Path, mode: str, batch_size: int) -> None:
    pooling = "cls" if mode.startswith("cls") else "mean"
    old = {
        "pooling_mode_cls_token": mode == "cls",
        "pooling_mode_mean_tokens": mode == "mean",
        "pooling_mode_max_tokens": False,
    }
    if mode != "plain":
        describe(model, MODULES, {"pooling_mode": pooling} if "newer" in mode else old)
    expected = torch.tensor([by_hand(model, text, pooling) for text in TEXTS])
    torch.testing.assert_close(embeddings(model, TEXTS, batch_size=batch_size), expected, rtol=0, atol=1e-5)


def test_the_mean_is_over_the_tokens_that_count() -> None:
    """By hand: (1 + 3)/2 and (2 + 6)/2; what stands at the pad, even NaN, does not count."""
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [float("nan"), 9.0]]])
    mask = torch.tensor([[True, True, False]])
    assert similarity.pool(hidden, mask, "mean").tolist() == [[2.0, 4.0]]
    assert similarity.pool(hidden, mask, "cls").tolist() == [[1.0, 2.0]]


def test_the_reward_is_the_cosine_with_the_rows_own_reference(model: Path) -> None:
    reward = Similarity(str(model), "reference", batch_size=2)
    found = reward(
        prompts=["?"] * 5,
        completions=[TEXTS[0], TEXTS[1], [{"role": "assistant", "content": TEXTS[0]}], TEXTS[0], TEXTS[3]],
        completion_ids=[[1]] * 5,
        reference=[TEXTS[1], TEXTS[2], TEXTS[1], None, [{"role": "assistant", "content": TEXTS[3]}]],
    )
    first, second = (cosine(by_hand(model, a), by_hand(model, b)) for a, b in (TEXTS[:2], TEXTS[1:3]))
    assert first != pytest.approx(second, abs=1e-3)
    expected = [first, second, first, None, 1.0]
    assert [None if v is None else pytest.approx(v, abs=1e-5) for v in expected] == found
    assert reward(prompts=["?"], completions=["x"], reference=[None]) == [None]


def test_a_reference_that_many_samples_share_is_embedded_once(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = Similarity(str(model), "reference")
    seen: list[str] = []
    embed = similarity.embed
    monkeypatch.setattr(
        similarity, "embed", lambda e, texts, **kw: (seen.extend(texts), embed(e, texts, **kw))[1]
    )
    reward(prompts=["?"] * 3, completions=[TEXTS[0], TEXTS[1], TEXTS[0]], reference=[TEXTS[2]] * 3)
    assert sorted(seen) == sorted(TEXTS[:3])


def test_a_text_keeps_its_start_up_to_the_models_own_limit(model: Path) -> None:
    long = "the cat is red. " * 30
    torch.testing.assert_close(
        embeddings(model, [long])[0], torch.tensor(by_hand(model, long, length=48)), rtol=0, atol=1e-5
    )
    describe(model, MODULES, {"pooling_mode_mean_tokens": True}, max_seq_length=6, do_lower_case=False)
    short = torch.tensor(by_hand(model, long, length=6))
    torch.testing.assert_close(embeddings(model, [long])[0], short, rtol=0, atol=1e-5)


def test_do_lower_case_is_done_before_the_tokenizer(model: Path) -> None:
    describe(model, MODULES, {"pooling_mode_mean_tokens": True}, max_seq_length=48, do_lower_case=True)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "do_lower_case": False}))
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["normalizer"]["lowercase"] = False
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    upper, lower = (
        AutoTokenizer.from_pretrained(model)(text)["input_ids"] for text in ("The CAT", "the cat")
    )
    assert upper != lower
    torch.testing.assert_close(*embeddings(model, ["The CAT", "the cat"]))


def test_a_transformer_in_a_folder_of_its_own(tiny_bert: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bert, tmp_path / "0_Transformer")
    describe(tmp_path, [("0_Transformer", "Transformer"), MODULES[1]], {"pooling_mode_cls_token": True})
    (tmp_path / "0_Transformer" / "sentence_bert_config.json").write_text('{"max_seq_length": 5}')
    expected = torch.tensor([by_hand(tiny_bert, text, "cls", 5) for text in TEXTS])
    torch.testing.assert_close(embeddings(tmp_path, TEXTS), expected, rtol=0, atol=1e-5)


def test_an_empty_text_has_an_embedding_too(tiny_model: Path, model: Path) -> None:
    """Of BERT's two special tokens; a tokenizer that adds none leaves nothing, which is close to nothing:
    cosine 0."""
    torch.testing.assert_close(embeddings(model, [""])[0], torch.tensor(by_hand(model, "")))
    reward = Similarity(str(tiny_model), "reference")
    texts = ["the cat", "", "the cat"]
    assert reward(prompts=["?"] * 3, completions=["", "", "the cat"], reference=texts)[:1] == [0.0]
    assert embeddings(tiny_model, texts).isfinite().all()


def test_loading_leaves_the_callers_random_state_alone(model: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    Similarity(str(model), "reference")  # the tiny BERT has no pooler, so transformers draws one
    torch.testing.assert_close(torch.rand(3), expected)


def test_other_parts_are_refused_by_name(model: Path) -> None:
    describe(model, [*MODULES[:2], ("2_Dense", "Dense")], {"pooling_mode_mean_tokens": True})
    with pytest.raises(UsageError, match="has a Dense module"):
        Similarity(str(model), "reference")
    for pooling, said in (
        ({"pooling_mode_max_tokens": True}, "max_tokens"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "mean_tokens and cls_token"),
        ({"pooling_mode": "lasttoken"}, "lasttoken"),
        ({}, "nothing"),
    ):
        describe(model, MODULES, pooling)
        with pytest.raises(UsageError, match=f"pools by {said}; a similarity reward knows mean and cls"):
            Similarity(str(model), "reference")
    shutil.rmtree(model / "1_Pooling")
    with pytest.raises(UsageError, match=r"has no 1_Pooling/config\.json"):
        Similarity(str(model), "reference")


def test_a_default_prompt_is_refused(model: Path) -> None:
    (model / "config_sentence_transformers.json").write_text(
        '{"prompts": {"q": "query: "}, "default_prompt_name": "q"}'
    )
    with pytest.raises(UsageError, match="puts its prompt 'q' before every text"):
        Similarity(str(model), "reference")
    (model / "config_sentence_transformers.json").write_text('{"prompts": {}, "default_prompt_name": null}')
    Similarity(str(model), "reference")


def test_broken_files_and_missing_models_are_named(model: Path, tmp_path: Path) -> None:
    (model / "modules.json").write_text("{")
    with pytest.raises(UsageError, match=r"modules\.json cannot be loaded"):
        Similarity(str(model), "reference")
    with pytest.raises(UsageError, match=r"none.*cannot be loaded"):
        Similarity(str(tmp_path / "none"), "reference")


def test_a_column_that_is_nowhere_is_named(model: Path) -> None:
    with pytest.raises(UsageError, match="no column 'refrence'; did you mean 'reference'"):
        Similarity(str(model), "refrence")(prompts=["?"], completions=["x"], reference=["y"])
