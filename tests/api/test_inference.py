"""keel.RewardModel and keel.generate: trained models give outside of a run what they gave inside of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

import keel
from keel.data import chat
from keel.models.load import ModelSource, causal_lm, load_tokenizer, scorer

PROMPTS = ["the cat?", "so the dog?"]
CHATS = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]


# ---------------------------------------------------------------- reward models


def test_scores_are_those_that_the_run_logged(finished: keel.Run) -> None:
    tokenizer = load_tokenizer(str(finished.model_path("reward")))
    logged = finished.samples("ppo")
    logged = logged[logged["stop_reason"] == "eos"]
    # the run scores the ids that were sampled; a text is read alike only where its tokens are the usual ones
    again = [
        len(chat.completion_ids(tokenizer, *both)) for both in zip(logged["prompt"], logged["completion"])
    ]
    logged = logged[logged["length"] == again]
    assert len(logged) > 1, "some whole responses to compare"
    model = keel.RewardModel(finished.model_path("reward"))
    scores = model.score(list(logged["prompt"]), list(logged["completion"]))
    assert scores == pytest.approx(list(logged["rewards/reward"]), abs=1e-4)


def test_a_score_is_transformers_own(tiny_reward: Path) -> None:
    model: Any = AutoModelForSequenceClassification.from_pretrained(tiny_reward).eval()
    tokenizer = load_tokenizer(str(tiny_reward))
    for prompt, completion in zip(PROMPTS, (" it is red.", " so.")):
        ids = tokenizer(prompt + completion)["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([ids])).logits.item()
        (score,) = keel.RewardModel(tiny_reward).score([prompt], [completion])
        assert score == pytest.approx(expected, abs=1e-5)


def test_batches_and_order_do_not_matter(tiny_reward: Path) -> None:
    model = keel.RewardModel(str(tiny_reward), device="cpu", dtype="float32")
    prompts, replies = (
        PROMPTS * 3,
        [" red.", " it is pink, so pink it is.", ".", " so.", " is is.", " it is blue."],
    )
    one_by_one = [model.score([p], [r])[0] for p, r in zip(prompts, replies)]
    assert model.score(prompts, replies, batch_size=2) == pytest.approx(one_by_one, abs=1e-5)
    assert model.score([], []) == []


def test_a_conversation_goes_through_the_template(tiny_reward: Path) -> None:
    model = keel.RewardModel(tiny_reward)
    as_text = model.score(CHATS, ["it is red.", "so."])
    as_messages = model.score(
        CHATS, [[{"role": "assistant", "content": "it is red."}], [{"role": "assistant", "content": "so."}]]
    )
    assert as_text == as_messages
    assert as_text != pytest.approx(model.score(PROMPTS, ["it is red.", "so."]), abs=1e-3)


def test_an_ensemble_combines_its_members(finished: keel.Run) -> None:
    model = keel.RewardModel(finished.path / "stages" / "rewards")
    assert model.members == 2
    assert "2 members" in repr(model)
    replies = [" it is red.", " so."]
    members = torch.tensor(model.member_scores(PROMPTS, replies))
    assert members.shape == (2, 2)
    assert not torch.equal(members[0], members[1])
    assert model.score(PROMPTS, replies) == pytest.approx(members.mean(0).tolist())
    assert model.score(PROMPTS, replies, combine="min") == pytest.approx(members.amin(0).tolist())
    spread = (members[0] - members[1]).abs() / 2
    cautious = model.score(PROMPTS, replies, combine="mean_minus_std", std_penalty=3.0)
    assert cautious == pytest.approx((members.mean(0) - 3 * spread).tolist(), abs=1e-5)


def test_what_is_no_reward_model_is_refused(tiny_model: Path, tiny_reward: Path, tmp_path: Path) -> None:
    with pytest.raises(keel.UsageError, match="is no reward model"):
        keel.RewardModel(tiny_model)
    classifier = scorer(ModelSource(str(tiny_model)), 0, labels=["bad", "good"])
    classifier.save_pretrained(tmp_path)
    shutil.copy(tiny_model / "tokenizer.json", tmp_path)
    with pytest.raises(keel.UsageError, match=r"classifier of 2 labels \(bad, good\), not a reward model"):
        keel.RewardModel(tmp_path)
    with pytest.raises(keel.UsageError, match="nowhere"):
        keel.RewardModel("nowhere/at-all")
    with pytest.raises(keel.UsageError, match="device 'cuda:97' cannot be used"):
        keel.RewardModel(tiny_reward, device="cuda:97")


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        (["a"], [], "1 prompts and 0 completions"),
        ("a", ["b"], "prompts is a list"),
        (CHATS[0], ["b"], "prompts is a list of conversations, not one"),
        (
            ["a"],
            [[{"role": "assistant", "content": "b"}]],
            "completion 0 is a conversation, but its prompt is text",
        ),
        ([[{"role": "usr", "content": "a"}]], ["b"], "prompt 0: a message is"),
        ([[]], ["b"], "prompt 0 has no messages"),
        (["a"], [" red" * 200], "does not fit"),
    ],
)
def test_bad_input_to_score_is_a_usage_error(
    tiny_reward: Path, prompts: Any, completions: Any, message: str
) -> None:
    with pytest.raises(keel.UsageError, match=message):
        keel.RewardModel(tiny_reward).score(prompts, completions)


def test_settings_without_effect_are_refused(tiny_reward: Path, finished: keel.Run) -> None:
    with pytest.raises(keel.UsageError, match="single reward model"):
        keel.RewardModel(tiny_reward).score(["a"], ["b"], combine="min")
    with pytest.raises(keel.UsageError, match="no effect without"):
        keel.RewardModel(finished.model_path("rewards")).score(["a"], ["b"], std_penalty=2.0)


# ---------------------------------------------------------------- samples


def test_greedy_is_transformers_own(tiny_model: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    tokenizer = load_tokenizer(str(tiny_model))
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        expected = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        assert keel.generate(tiny_model, [prompt], max_new_tokens=12, temperature=0) == [expected]


def test_n_samples_differ_and_the_seed_decides(tiny_model: Path) -> None:
    first = keel.generate(tiny_model, PROMPTS, n=4, max_new_tokens=8, seed=3)
    assert [len(replies) for replies in first] == [4, 4]
    assert len({*first[0]}) > 1
    assert keel.generate(tiny_model, PROMPTS, n=4, max_new_tokens=8, seed=3) == first
    assert keel.generate(tiny_model, PROMPTS, n=4, max_new_tokens=8, seed=4) != first
    assert keel.generate(tiny_model, PROMPTS, n=1, max_new_tokens=8) == [
        [reply] for reply in keel.generate(tiny_model, PROMPTS, max_new_tokens=8)
    ]
    assert keel.generate(tiny_model, []) == []


def test_a_loaded_model_gives_the_same_and_is_left_alone(tiny_model: Path) -> None:
    model, tokenizer = causal_lm(ModelSource(str(tiny_model)), 0), load_tokenizer(str(tiny_model))
    assert isinstance(model, PreTrainedModel)
    model.train()
    tokenizer.pad_token, tokenizer.chat_template = None, None
    texts = keel.generate(model, CHATS, tokenizer=tokenizer, max_new_tokens=8)
    assert texts == keel.generate(tiny_model, CHATS, max_new_tokens=8, dtype="float32")
    assert model.training
    assert tokenizer.pad_token is None
    assert tokenizer.chat_template is None


def test_a_conversation_gets_the_generation_prompt(tiny_model: Path) -> None:
    tokenizer = chat.with_chat_template(load_tokenizer(str(tiny_model)))
    rendered = tokenizer.apply_chat_template(CHATS[0], tokenize=False, add_generation_prompt=True)
    assert keel.generate(tiny_model, [CHATS[0]], max_new_tokens=8, temperature=0) == keel.generate(
        tiny_model, [rendered], max_new_tokens=8, temperature=0
    )


def test_a_stop_string_ends_a_text_and_is_left_out(tiny_model: Path) -> None:
    whole = keel.generate(tiny_model, PROMPTS * 4, max_new_tokens=24)
    stopped = keel.generate(tiny_model, PROMPTS * 4, max_new_tokens=24, stop=["e"])
    assert any("e" in text for text in whole)
    assert stopped == [text.partition("e")[0] for text in whole]


def test_a_stage_and_its_model_are_one(finished: keel.Run) -> None:
    short: Any = {"temperature": 0, "max_new_tokens": 8}
    texts = keel.generate(finished.model_path("sft"), PROMPTS, **short)
    assert keel.generate(finished.path / "stages" / "sft", PROMPTS, **short) == texts


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, "n must be 1 or more"),
        ({"n": 2, "temperature": 0}, "n has no effect at temperature 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"top_p": 0.0}, "top_p must be"),
        ({"top_k": -1}, "top_k must be"),
        ({"min_p": 1.0}, "min_p must be"),
        ({"stop": "x"}, "stop is a list"),
        ({"max_new_tokens": 400}, "exceed the model's context"),
    ],
)
def test_bad_settings_of_generate_are_usage_errors(tiny_model: Path, settings: Any, message: str) -> None:
    with pytest.raises(keel.UsageError, match=message):
        keel.generate(tiny_model, PROMPTS, **settings)


def test_bad_input_to_generate_is_a_usage_error(tiny_model: Path, tiny_reward: Path) -> None:
    answered = [*CHATS[0], {"role": "assistant", "content": "red"}]
    with pytest.raises(keel.UsageError, match="prompt 0 ends with the assistant's turn"):
        keel.generate(tiny_model, [answered])
    with pytest.raises(keel.UsageError, match="prompts is a list"):
        keel.generate(tiny_model, "the cat?")
    model: Any = causal_lm(ModelSource(str(tiny_model)), 0)
    with pytest.raises(keel.UsageError, match="needs its `tokenizer`"):
        keel.generate(model, PROMPTS)
    with pytest.raises(keel.UsageError, match="no effect on a model that is loaded"):
        keel.generate(model, PROMPTS, tokenizer=load_tokenizer(str(tiny_model)), device="cpu")
    with pytest.raises(keel.UsageError, match="no whole causal language model"):
        keel.generate(tiny_reward, PROMPTS)
