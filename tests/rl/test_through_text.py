"""A teacher that is asked through text: chunks by hand, and what they come to with the same tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from keel.algorithms.distillation import compare
from keel.data import chat
from keel.errors import UsageError
from keel.models.tokenizer import train_tokenizer
from keel.rl.through_text import chunks, ends_of, gaps
from keel.types import Completion


@pytest.mark.parametrize(
    ("student", "teacher", "found"),
    [
        ([2, 5, 6], [1, 3, 5, 6], [(2, 3), (3, 4)]),  # ab|cde|f, a|bc|de|f
        ([1, 2, 3], [1, 2, 3], [(1, 1), (2, 2), (3, 3)]),
        ([3], [1, 2, 3], [(1, 3)]),
        ([0, 2, 2, 4], [2, 4, 4], [(3, 1), (4, 3)]),  # tokens that add nothing
        ([None, 2, None, 4], [1, 2, 4], [(2, 2), (4, 3)]),  # within a character
        ([2, 3], [1, 4], []),
        ([], [], []),
    ],
)
def test_chunks_end_where_both_tokenisations_do(student: Any, teacher: Any, found: Any) -> None:
    assert chunks(student, teacher) == found


def test_ends_are_counted_without_the_space_around_a_text(tokenizer: Any) -> None:
    ids = tokenizer(" it is é")["input_ids"]
    text, ends = ends_of(tokenizer, ids)
    assert text == "it is é"
    assert ends[-1] == 7
    assert None in ends  # the first byte of é is no character
    assert [end for end in ends if end is not None] == sorted(end for end in ends if end is not None)


@pytest.fixture
def models(tiny_model: Path) -> tuple[Any, Any]:
    student, teacher = (AutoModelForCausalLM.from_pretrained(tiny_model).double() for _ in range(2))
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return student, teacher


def _logp(model: Any, prompt: list[int], reply: list[int], vocab: int) -> torch.Tensor:
    ids = torch.tensor([[*prompt, *reply]])
    said = model(input_ids=ids).logits[0, len(prompt) - 1 : -1, :vocab] / 0.8
    return said.log_softmax(dim=-1).gather(-1, ids[0, len(prompt) :, None]).squeeze(-1).detach()


def test_with_the_same_tokenizer_every_token_is_a_chunk(models: Any, tokenizer: Any) -> None:
    """Also its end, whose token is no text; a reply that was cut off has none."""
    student, teacher = models
    prompt = chat.prompt_ids(tokenizer, "the cat?")
    whole = chat.completion_ids(tokenizer, "the cat?", " it is red.")
    rows = [whole, whole[:-1]]
    reasons: list[Any] = ["eos", "length"]
    done = [Completion(tuple(prompt), tuple(ids), why) for ids, why in zip(rows, reasons, strict=True)]
    vocab = len(tokenizer)
    logp = torch.zeros(2, len(whole), dtype=torch.float64)
    for row, ids in enumerate(rows):
        logp[row, : len(ids)] = _logp(student, prompt, ids, vocab)
    found = gaps(
        teacher, (tokenizer, tokenizer), ["the cat?"] * 2, done, logp, temperature=0.8,
        device=torch.device("cpu"), micro_batch=1,
    )  # fmt: skip
    for row, ids in enumerate(rows):
        expected = _logp(teacher, prompt, ids, vocab) - logp[row, : len(ids)]
        torch.testing.assert_close(found.gap[row, : len(ids)], expected)
        assert found.mask[row].tolist() == [True] * len(ids) + [False] * (len(whole) - len(ids))
    torch.testing.assert_close(found.sampled_kl, -found.gap.sum(dim=1))


def test_a_chunk_of_several_tokens_has_one_gap(models: Any, tokenizer: Any) -> None:
    """The teacher reads letter by letter: a token of the student's is several of its own."""
    student, teacher = models
    letters = train_tokenizer(["x"], 258, 48)
    apart = chat.completion_ids(letters, "the cat?", " it is red.")
    prompt, whole = (
        chat.prompt_ids(tokenizer, "the cat?"),
        chat.completion_ids(tokenizer, "the cat?", " it is red."),
    )
    assert len(apart) > len(whole)
    logp = _logp(student, prompt, whole, len(tokenizer))[None]
    done = [Completion(tuple(prompt), tuple(whole), "eos")]
    found = gaps(
        teacher, (tokenizer, letters), ["the cat?"], done, logp, temperature=0.8, device=torch.device("cpu")
    )
    theirs = _logp(teacher, chat.prompt_ids(letters, "the cat?"), apart, len(letters))
    assert found.sampled_kl.item() == pytest.approx((logp.sum() - theirs.sum()).item())
    assert found.mask.all()


def test_of_a_reply_as_much_is_compared_as_the_teacher_has_room_for(models: Any, tokenizer: Any) -> None:
    """It has more tokens of the teacher's than of the student's."""
    student, teacher = models
    letters = train_tokenizer(["x"], 258, 48)
    prompt = chat.prompt_ids(tokenizer, "the cat?")
    reply = chat.completion_ids(tokenizer, "the cat?", " it is red.")
    logp = _logp(student, prompt, reply, len(tokenizer))[None]
    done = [Completion(tuple(prompt), tuple(reply), "eos")]

    def asked() -> Any:
        both = tokenizer, letters
        return gaps(teacher, both, ["the cat?"], done, logp, temperature=0.8, device=torch.device("cpu"))

    whole, taken = asked(), len(chat.prompt_ids(letters, "the cat?"))
    teacher.config.max_position_embeddings = taken + 6
    part = asked()
    assert 0 < part.mask.sum() < whole.mask.sum()
    torch.testing.assert_close(part.gap[part.mask], whole.gap[part.mask])
    teacher.config.max_position_embeddings = taken
    with pytest.raises(UsageError, match="take a teacher that reads more"):
        asked()


def test_the_sampled_gradient_is_that_of_the_reverse_kl_in_expectation() -> None:
    """Over all tokens of a vocabulary, each with its probability, whatever the baseline."""
    torch.manual_seed(0)
    logits, teacher = (2 * torch.randn(1, 9, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    loss = compare(logits, teacher, torch.tensor([0])).loss.sum()
    (expected,) = torch.autograd.grad(loss, logits)
    y, z = logits.log_softmax(dim=-1), teacher.log_softmax(dim=-1)
    weights = (y.exp() * (z - y - 1.7)).detach()
    (found,) = torch.autograd.grad(-(weights * y).sum(), logits)
    torch.testing.assert_close(found, expected)
