"""Reward models read by length, whatever the padding; and by text where tokenizers differ."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from keel.data import chat
from keel.errors import UsageError
from keel.models.load import ModelSource, scorer
from keel.rewards import learned

ROWS = [[5, 6, 7, 1], [9, 1], [40, 41, 42, 43, 44, 45, 1], [8, 8, 8]]


def alone(folder: Path, row: list[int]) -> float:
    """The head's output at the last token of one unpadded row, from the backbone itself."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    with torch.no_grad():
        hidden = model.model(torch.tensor([row])).last_hidden_state
    return (hidden[0, -1] @ model.score.weight[0]).item()


def test_a_score_is_the_heads_at_the_rows_last_token(tiny_reward: Path) -> None:
    reward = learned.load(str(tiny_reward), device=torch.device("cpu"))
    expected = [alone(tiny_reward, row) for row in ROWS]
    assert len({round(x, 3) for x in expected}) == 4
    for size in (1, 2, 4):
        scores = learned.score(reward, [{"input_ids": row} for row in ROWS], batch_size=size)
        torch.testing.assert_close(scores, torch.tensor(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", ["pad is None", "pad is eos", "pads on the left"])
def test_trap_23_the_score_is_that_of_the_last_token_whatever_the_pad_token(
    tiny_reward: Path, change: str
) -> None:
    """[trl 937, 2778; gpt-neox PR 1285] Also row 3, which does not end in EOS."""
    reward = learned.load(str(tiny_reward), device=torch.device("cpu"))
    tokenizer = copy.deepcopy(reward.tokenizer)
    if change == "pad is None":
        tokenizer.pad_token = None
        reward.model.config.pad_token_id = None
    elif change == "pad is eos":
        tokenizer.pad_token = tokenizer.eos_token
        reward.model.config.pad_token_id = tokenizer.eos_token_id
    else:
        tokenizer.padding_side = "left"
    scores = learned.score(learned.wrap(reward.model, tokenizer), [{"input_ids": row} for row in ROWS])
    torch.testing.assert_close(
        scores, torch.tensor([alone(tiny_reward, row) for row in ROWS]), rtol=0, atol=1e-5
    )
    if change == "pads on the left":
        assert tokenizer.padding_side == "left"


def test_the_scale_of_the_reward_stage_travels_with_the_model(tiny_reward: Path, tiny_model: Path) -> None:
    reward = learned.load(str(tiny_reward), device=torch.device("cpu"))
    assert (reward.mean, reward.std, reward.scaled) == (0.5, 2.0, True)
    foreign = learned.wrap(scorer(ModelSource(str(tiny_model)), 0), reward.tokenizer)
    assert (foreign.mean, foreign.std, foreign.scaled) == (0.0, 1.0, False)


def test_a_language_model_is_no_reward_model(tiny_model: Path) -> None:
    with pytest.raises(UsageError, match=r"no reward model .*LlamaForCausalLM"):
        learned.load(str(tiny_model), device=torch.device("cpu"))


def test_a_classifier_of_two_classes_is_no_reward_model(
    tiny_model: Path, tmp_path: Path, tokenizer: Any
) -> None:
    AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="2 outputs; a reward model has 1"):
        learned.load(str(tmp_path), device=torch.device("cpu"))


def test_trap_28_an_encoder_reads_text_with_its_own_tokenizer(tiny_bert: Path) -> None:
    """[trl 1979, 3595] Against transformers' own call on the pair, unpadded."""
    model = scorer(ModelSource(str(tiny_bert)), 3).eval()
    reward = learned.wrap(model, AutoTokenizer.from_pretrained(tiny_bert))
    assert reward.is_encoder
    pairs = [("the cat?", " it is red."), ("so the pig?", " it is blue, so it is."), ("the owl?", "")]
    scores = learned.score(
        reward, [learned.encode_sampled(reward, prompt, text, True) for prompt, text in pairs]
    )
    for (prompt, text), score in zip(pairs, scores.tolist(), strict=True):
        with torch.no_grad():
            expected = model(**reward.tokenizer(prompt, text, return_tensors="pt")).logits.item()
        assert score == pytest.approx(expected, abs=1e-5)


def test_trap_28_a_conversation_reaches_an_encoder_as_text(tiny_bert: Path) -> None:
    reward = learned.wrap(
        scorer(ModelSource(str(tiny_bert)), 3).eval(), AutoTokenizer.from_pretrained(tiny_bert)
    )
    prompt = ({"role": "user", "content": "the cat?"},)
    inputs = learned.encode_sampled(reward, prompt, " it is red.", True)
    tokens = reward.tokenizer.convert_ids_to_tokens(inputs["input_ids"])
    assert (
        "".join(tokens).replace("##", "") == "[CLS]user[UNK]thecat?[SEP]itisred.[SEP]"
    )  # ":" is no word of this one
    assert inputs["token_type_ids"] == [0] * (tokens.index("[SEP]") + 1) + [1] * (
        len(tokens) - tokens.index("[SEP]") - 1
    )


def test_a_response_that_was_cut_off_gets_no_eos(tiny_reward: Path) -> None:
    reward = learned.load(str(tiny_reward), device=torch.device("cpu"))
    whole = learned.encode_sampled(reward, "the cat?", " it is red.", True)["input_ids"]
    cut = learned.encode_sampled(reward, "the cat?", " it is red.", False)["input_ids"]
    assert whole == [*cut, reward.tokenizer.eos_token_id]
    assert reward.tokenizer.decode(cut) == "the cat? it is red."


def test_what_is_too_long_loses_the_prompts_start_and_nothing_of_the_response(
    tiny_reward: Path, tiny_bert: Path
) -> None:
    decoder = learned.load(str(tiny_reward), device=torch.device("cpu"))
    ids = learned.encode(decoder, "the cat? " * 30, " it is red.")["input_ids"]
    assert len(ids) == 48
    assert decoder.tokenizer.decode(ids).endswith("the cat?  it is red.<|end|>")
    encoder = learned.wrap(
        scorer(ModelSource(str(tiny_bert)), 3).eval(), AutoTokenizer.from_pretrained(tiny_bert)
    )
    ids = learned.encode(encoder, "the cat? " * 30, " it is red.")["input_ids"]
    assert len(ids) <= 48
    assert encoder.tokenizer.decode(ids).endswith("the cat? [SEP] it is red. [SEP]")
    with pytest.raises(UsageError, match="does not fit a reward model that reads 48"):
        learned.encode(decoder, "the cat?", " it is red." * 30)


def test_a_sampled_response_that_is_too_long_by_itself_is_scored_as_far_as_it_fits(
    tiny_reward: Path, tiny_bert: Path
) -> None:
    """After the prompt's last token, from the response's start; a conversation's too. Such are counted."""
    decoder = learned.load(str(tiny_reward), device=torch.device("cpu"))
    encoder = learned.wrap(
        scorer(ModelSource(str(tiny_bert)), 3).eval(), AutoTokenizer.from_pretrained(tiny_bert)
    )
    prompts: list[Any] = ["the cat?", "the cat?", ({"role": "user", "content": "the cat?"},)]
    texts = [" it is red.", " it is red." + " so" * 60, "it is red." + " so" * 60]
    for reward, starts in ((decoder, ("?", ":")), (encoder, ("[CLS]?[SEP]", "[CLS]?[SEP]"))):
        rows, cut = learned.encode_samples(reward, prompts, texts, [True, True, False])
        assert cut == 2
        assert rows[0] == learned.encode(reward, "the cat?", " it is red.")
        for row, start, prompt, text in zip(rows[1:], starts, prompts[1:], texts[1:], strict=True):
            assert len(row["input_ids"]) == 48
            read = reward.tokenizer.decode(row["input_ids"]).replace(" ", "")
            assert read.startswith(f"{start}itisred.soso")
            assert read.removesuffix("[SEP]").endswith("soso")  # the EOS was cut off with the end
            assert learned.encode_sampled(reward, prompt, text, True) == row
        assert torch.isfinite(learned.score(reward, rows)).all()


def test_a_cut_off_response_leaves_the_room_of_its_eos_to_the_prompt(tiny_reward: Path) -> None:
    reward = learned.load(str(tiny_reward), device=torch.device("cpu"))
    row = learned.encode_sampled(reward, "the cat? " * 30, " it is red.", False)["input_ids"]
    assert len(row) == 48
    assert reward.tokenizer.decode(row).endswith("the cat?  it is red.")


def test_ids_are_read_by_a_decoder_with_the_policys_tokenizer_only(
    tiny_reward: Path, tiny_bert: Path, tokenizer: Any
) -> None:
    decoder = learned.load(str(tiny_reward), device=torch.device("cpu"))
    assert learned.reads_ids_of(decoder, tokenizer)
    assert not learned.reads_ids_of(decoder, AutoTokenizer.from_pretrained(tiny_bert))
    encoder = learned.wrap(scorer(ModelSource(str(tiny_bert)), 3), tokenizer)
    assert not learned.reads_ids_of(encoder, tokenizer)


def test_ids_that_would_not_fit_the_reward_model_are_refused_up_front(tiny_reward: Path) -> None:
    reward = learned.load(str(tiny_reward), device=torch.device("cpu"))
    learned.check_room(reward, 48, "ppo")
    with pytest.raises(UsageError, match=r"ppo: .* up to 49 tokens, but the reward model reads 48"):
        learned.check_room(reward, 49, "ppo")


def test_only_tokenizers_with_the_same_ids_and_template_read_each_others_ids(
    tokenizer: Any, tiny_bert: Path
) -> None:
    twin = copy.deepcopy(tokenizer)
    assert learned.same_tokenizer(tokenizer, twin)
    assert not learned.same_tokenizer(tokenizer, AutoTokenizer.from_pretrained(tiny_bert))
    twin.chat_template = "{{ messages[0]['content'] }}"
    assert not learned.same_tokenizer(tokenizer, twin)
    grown = copy.deepcopy(tokenizer)
    grown.add_tokens(["<new>"])
    assert not learned.same_tokenizer(tokenizer, grown)


# ---------------------------------------------------------------- ensembles


def ensemble_of(count: int, tiny_reward: Path, folder: Path, *, present: int) -> Path:
    """A folder that says it is an ensemble of `count`, with its first member and the others up to `present`
    there."""
    shutil.copytree(tiny_reward, folder)
    config = json.loads((folder / "config.json").read_text())
    config["keel_reward"] = {"mean": 0.5, "std": 2.0, "members": count}
    (folder / "config.json").write_text(json.dumps(config))
    for number in range(2, present + 1):
        shutil.copytree(tiny_reward, folder / "members" / str(number))
    return folder


def test_an_ensemble_without_one_of_its_members_is_refused(tiny_reward: Path, tmp_path: Path) -> None:
    whole = ensemble_of(3, tiny_reward, tmp_path / "whole", present=3)
    assert len(learned.load_members(str(whole), device=torch.device("cpu"))) == 3
    part = ensemble_of(3, tiny_reward, tmp_path / "part", present=2)
    with pytest.raises(UsageError, match=r"an ensemble of 3 reward models, but member 3 is not there"):
        learned.load_members(str(part), device=torch.device("cpu"))


@pytest.mark.parametrize("cached", ["everything", "the first member", "nothing"])
def test_the_members_of_an_ensemble_on_the_hub_are_brought_too(
    cached: str, tiny_reward: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, from the cache as the hub's client lays it out; what is not in it is an error, never one
    member alone."""
    repository = tmp_path / "hub" / "models--owner--judge"
    if cached != "nothing":
        present = 2 if cached == "everything" else 1
        ensemble_of(2, tiny_reward, repository / "snapshots" / "0123abc", present=present)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    if cached == "everything":
        members = learned.load_members("owner/judge", device=torch.device("cpu"))
        assert [member.scaled for member in members] == [True, True]
        return
    reason = "member 2 is not there" if cached == "the first member" else "'owner/judge' cannot be loaded"
    with pytest.raises(UsageError, match=reason):
        learned.load_members("owner/judge", device=torch.device("cpu"))


def test_members_that_cannot_be_downloaded_are_an_error(
    tiny_reward: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = learned.model_config(ModelSource(str(ensemble_of(2, tiny_reward, tmp_path / "e", present=1))))

    def unreachable(path: str, allow_patterns: list[str]) -> str:
        assert (path, allow_patterns) == ("owner/judge", ["members/*"])
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(UsageError, match=r"its members cannot be downloaded: no route to the hub"):
        learned.other_members(config, "owner/judge")


CHATML = (  # as ChatML, a newline behind the end of a turn, in few tokens
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
CHATS = [("Hi", "Yes"), ("What?", "No."), ("a", "")]


def from_elsewhere(tiny_model: Path, folder: Path, *, pad: str, template: str | None = CHATML) -> Any:
    """A reward model as TRL 1.16 saves one: nothing of keel's in its config, the pad that it trained with."""
    config = AutoConfig.from_pretrained(tiny_model, num_labels=1)
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, config=config)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token if pad == "eos" else tokenizer.pad_token
    if template is not None:
        tokenizer.chat_template = template
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", ["own", "eos"])
@pytest.mark.parametrize("template", [CHATML, CHATML.replace("+ eos_token ", ""), None])
def test_a_reward_model_from_elsewhere_scores_as_its_own_class_does(
    tiny_model: Path, tmp_path: Path, pad: str, side: str, template: str | None
) -> None:
    """On conversations as its template renders them, padded on either side; with pad == EOS its class reads
    the token before EOS, or the newline behind."""
    model = from_elsewhere(tiny_model, tmp_path / "m", pad=pad, template=template)
    reward = learned.load(str(tmp_path / "m"), device=torch.device("cpu"))
    assert not reward.scaled
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in CHATS]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m", padding_side=side)
    batch = tokenizer.apply_chat_template(
        turns, padding=True, return_dict=True, return_tensors="pt", tokenizer_kwargs={"padding_side": side}
    )
    with torch.no_grad():
        places = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        theirs = model(**batch, position_ids=places).logits[:, 0]
    encoded = [learned.encode(reward, tuple(pair[:1]), tuple(pair[1:])) for pair in turns]
    torch.testing.assert_close(learned.score(reward, encoded), theirs, rtol=0, atol=1e-4)
    sampled = [learned.encode_sampled(reward, tuple(pair[:1]), pair[1]["content"], True) for pair in turns]
    assert sampled == encoded


def test_ids_of_a_policy_get_what_the_template_of_a_reward_model_from_elsewhere_writes_behind_them(
    tiny_model: Path, tmp_path: Path
) -> None:
    from_elsewhere(tiny_model, tmp_path / "m", pad="own")
    reward = learned.load(str(tmp_path / "m"), device=torch.device("cpu"))
    prompt = ({"role": "user", "content": "Hi"},)
    reply = chat.completion_ids(reward.tokenizer, prompt, ({"role": "assistant", "content": "Yes"},))
    newline = reward.tokenizer("\n")["input_ids"]
    assert learned.whole(reward, prompt, reply) == [*reply, *newline]
    assert learned.whole(reward, prompt, reply[:-1]) == reply[:-1]  # cut off
    assert learned.whole(reward, "Hi", reply) == reply


def test_a_reward_model_that_its_own_class_reads_otherwise_is_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_elsewhere(tiny_model, tmp_path / "m", pad="own")
    plain = learned.scores_at
    monkeypatch.setattr(learned, "scores_at", lambda *given: plain(*given) + 1)
    with pytest.raises(UsageError, match="it is read in a way that keel does not know"):
        learned.load(str(tmp_path / "m"), device=torch.device("cpu"))


def test_a_reward_model_of_keels_says_where_it_is_read(tiny_reward: Path) -> None:
    reward = learned.load(str(tiny_reward), device=torch.device("cpu"))
    assert reward.reading is None
    assert reward.model.config.keel_reward["read_at"] == "end of the reply"


def test_a_conversation_in_keels_own_template_ends_with_the_end_of_its_reply(tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert tokenizer.apply_chat_template(turns, return_dict=False)[-1] == tokenizer.eos_token_id
    assert chat.ending(tokenizer) == (tokenizer.eos_token_id,)
