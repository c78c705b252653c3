"""Micro-batches, accumulation, padding and packing leave the stages' gradients as they are, in float64.

The expected gradient is worked out here, example by example and without padding, from the model's own
forward.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from keel.models.load import ModelSource, scorer
from keel.rewards import learned
from keel.rewards.shaping import RunningScale
from keel.rl import loop, rollout
from keel.rl.ppo import PPO
from keel.rl.rollout import LoopState
from keel.rl.setup import make_optimizers
from keel.stages import language, reward
from keel.stages.language import LanguageRow
from keel.stages.loop_utils import micro_batches
from keel.types import Episodes

EXACT = {"rtol": 0, "atol": 1e-10}


def gradients(*modules: nn.Module) -> list[Tensor]:
    """The gradients so far, which are cleared."""
    found = [p.grad for m in modules for p in m.parameters() if p.grad is not None]
    for m in modules:
        m.zero_grad(set_to_none=True)
    return found


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(found) == len(expected) > 0
    assert max(float(g.abs().max()) for g in expected) > 1e-3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


# ---------------------------------------------------------------- language modelling


def causal(architecture: str, tiny_model: Path) -> Any:
    torch.manual_seed(2)
    small = {"vocab_size": 300, "initializer_range": 0.2}
    match architecture:
        case "gpt2":  # positions are learned
            settings = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            model = GPT2LMHeadModel(
                GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=48, **settings, **small)
            )
        case "gpt_neox":  # positions are rotations
            sizes = {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 64,
            }
            model = GPTNeoXForCausalLM(GPTNeoXConfig(max_position_embeddings=48, **sizes, **small))
        case _:
            model = AutoModelForCausalLM.from_pretrained(tiny_model)
    return model.double().train()


def examples() -> list[LanguageRow]:
    """Prompts that do not count and answers that do, of very different lengths."""
    lengths = [(3, 4), (1, 9), (5, 1), (2, 2), (1, 1)]
    g = torch.Generator().manual_seed(4)
    ids = [torch.randint(2, 290, (p + r,), generator=g).tolist() for p, r in lengths]
    return [LanguageRow(x, [False] * p + [True] * r) for x, (p, r) in zip(ids, lengths, strict=True)]


def expected_language(model: Any, rows: Sequence[LanguageRow]) -> list[Tensor]:
    """∇ of −Σ log π(token | before) over counted tokens / their number, one example at a time."""
    number = sum(sum(row.counts[1:]) for row in rows)
    for row in rows:
        logp = model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        total = sum(-logp[t - 1, row.ids[t]] for t in range(1, len(row.ids)) if row.counts[t])
        (total / number).backward()
    return gradients(model)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("size", [None, 1, 2, 3])
def test_language_split_accumulation_and_padding(
    architecture: str, size: int | None, tiny_model: Path
) -> None:
    model, rows = causal(architecture, tiny_model), examples()
    expected = expected_language(model, rows)
    tokens = sum(row.counted for row in rows)
    for part in micro_batches(rows, size):
        language.loss(model, part, 0, tokens)[0].backward()
    assert_same(gradients(model), expected)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("groups", [[[0, 1, 2, 3, 4]], [[4, 0], [1, 3], [2]], [[1], [0], [3, 2, 4]]])
@pytest.mark.parametrize("size", [None, 1])
def test_language_packing(
    architecture: str, groups: list[list[int]], size: int | None, tiny_model: Path
) -> None:
    """Attention, positions and losses of a packed example are those it has alone, also when all tokens
    count."""
    from keel.stages.sft import _pack

    for loss_on_all in (False, True):
        rows = [LanguageRow(row.ids, [True] * len(row.ids)) if loss_on_all else row for row in examples()]
        model = causal(architecture, tiny_model)
        expected = expected_language(model, rows)
        packed = [_pack([rows[i] for i in group]) for group in groups]
        tokens = sum(row.counted for row in packed)
        assert tokens == sum(sum(row.counts[1:]) for row in rows)
        for part in micro_batches(packed, size):
            language.loss(model, part, 0, tokens)[0].backward()
        assert_same(gradients(model), expected)


def test_a_packed_row_needs_its_segments(tiny_model: Path) -> None:
    """The test above can fail: the same tokens in one row without segments give another gradient."""
    model, rows = causal("llama", tiny_model), examples()
    expected = expected_language(model, rows)
    joined = LanguageRow([t for row in rows for t in row.ids], [c for row in rows for c in row.counts])
    language.loss(model, [joined], 0, sum(row.counted for row in rows))[0].backward()
    with pytest.raises(AssertionError):
        assert_same(gradients(model), expected)


# ---------------------------------------------------------------- reward


def pairs_of(rows: Sequence[Sequence[int]], **extra: Any) -> list[reward.RewardPair]:
    sides: list[learned.Inputs] = [
        {"input_ids": list(row), **{k: v(row) for k, v in extra.items()}} for row in rows
    ]
    labels = [(1.0, 0.0), (0.7, 0.3), (0.5, 0.0), (0.0, 1.2)]
    return [reward.RewardPair(sides[2 * i], sides[2 * i + 1], *labels[i]) for i in range(4)]


def expected_reward(
    score: Callable[[learned.Inputs], Tensor], model: Any, pairs: Sequence[reward.RewardPair]
) -> list[Tensor]:
    for pair in pairs:
        chosen, rejected = score(pair.chosen), score(pair.rejected)
        x, p = chosen - rejected - pair.margin, pair.p_chosen
        loss = (
            p * torch.log1p(torch.exp(-x))
            + (1 - p) * torch.log1p(torch.exp(x))
            + 0.1 * (chosen + rejected) ** 2
        )
        (loss / len(pairs)).backward()
    return gradients(model)


@pytest.mark.parametrize("size", [None, 1, 3])
def test_reward_split_accumulation_and_padding(size: int | None, tiny_model: Path, tokenizer: Any) -> None:
    model = scorer(ModelSource(str(tiny_model)), 3).double().train()
    g = torch.Generator().manual_seed(4)
    pairs = pairs_of([torch.randint(2, 290, (n,), generator=g).tolist() for n in (3, 9, 1, 2, 12, 5, 4, 4)])

    def score(side: learned.Inputs) -> Tensor:
        hidden = model.model(torch.tensor([side["input_ids"]])).last_hidden_state[0, -1]
        return hidden @ model.score.weight[0]

    expected = expected_reward(score, model, pairs)
    for part in micro_batches(pairs, size):
        reward.loss(learned.RewardModel(model, tokenizer), part, 0.1, len(pairs))[0].backward()
    assert_same(gradients(model), expected)


@pytest.mark.parametrize("size", [None, 1, 3])
def test_reward_of_an_encoder(size: int | None, tiny_bert: Path, tokenizer: Any) -> None:
    model = scorer(ModelSource(str(tiny_bert)), 3).double().eval()
    g = torch.Generator().manual_seed(4)
    rows = [torch.randint(5, 50, (n,), generator=g).tolist() for n in (3, 9, 2, 2, 12, 5, 4, 4)]
    pairs = pairs_of(rows, token_type_ids=lambda row: [0] + [1] * (len(row) - 1))

    def score(side: learned.Inputs) -> Tensor:
        return model(**{key: torch.tensor([value]) for key, value in side.items()}).logits[0, 0]

    expected = expected_reward(score, model, pairs)
    for part in micro_batches(pairs, size):
        reward.loss(learned.RewardModel(model, tokenizer), part, 0.1, len(pairs))[0].backward()
    assert_same(gradients(model), expected)


# ---------------------------------------------------------------- PPO

T_, EPS, VEPS, BETA, ENTROPY, VALUE = 0.8, 0.2, 0.15, 0.3, 0.05, 0.5  # the settings below


def in_float64(setup: rollout.Setup) -> rollout.Setup:
    judges = [model.model for one in setup.opened for model in one.models]
    for module in (setup.roles.policy, setup.roles.reference, *judges, *setup.roles.value_modules):
        module.double()
    return setup


def ppo_settings(sharing: str, **more: Any) -> dict[str, Any]:
    return {
        "sharing": sharing,
        "clip": EPS,
        "value_clip": VEPS,
        "value_coef": VALUE,
        "entropy_coef": ENTROPY,
        "kl": {"coef": BETA, "where": "loss", "estimator": "k2"},
        "sampling": {"max_new_tokens": 8, "temperature": T_},
        **more,
    }


def episodes_by_hand(setup: rollout.Setup) -> Episodes:
    """Five responses of lengths 4, 1, 7, 2, 3; old values near enough that clips bind at some tokens and not
    at all."""
    prompts, lengths = [2, 5, 1, 3, 4], [4, 1, 7, 2, 3]
    g = torch.Generator().manual_seed(8)
    ids = torch.zeros(5, 8 + 7, dtype=torch.long)
    for i, (p, n) in enumerate(zip(prompts, lengths, strict=True)):
        ids[i, : p + n] = torch.randint(2, 290, (p + n,), generator=g)
    mask = torch.arange(7)[None] < torch.tensor(lengths)[:, None]

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(5, 7, dtype=torch.float64, generator=g)

    with torch.no_grad():
        logp, values = zip(
            *(response(setup, ids[i, : p + n], p) for i, (p, n) in enumerate(zip(prompts, lengths)))
        )
    columns = [
        nn.utils.rnn.pad_sequence([x[1] if isinstance(x, tuple) else x for x in c], batch_first=True)
        for c in (logp, values)
    ]
    fields = {
        "logp": columns[0] + noise(0.2),
        "ref_logp": columns[0] + noise(0.5),
        "values": columns[1] + noise(0.2),
        "rewards": noise(1.0),
        "advantages": noise(1.0),
        "returns": columns[1] + noise(1.0),
    }
    return Episodes(
        ids, torch.tensor(prompts), mask, **{k: torch.where(mask, v, 0.0) for k, v in fields.items()}
    )


def response(setup: rollout.Setup, ids: Tensor, prompt: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """(all log-probabilities, those of the tokens) and values of one response, from one unpadded forward."""
    roles = setup.roles
    output = roles.policy(input_ids=ids[None], output_hidden_states=True)
    logp = (output.logits[0, prompt - 1 : -1] / T_).log_softmax(-1)
    if roles.value_head is not None:
        values = roles.value_head(output.hidden_states[-1][0, prompt - 1 : -1])[:, 0]
    else:
        values = roles.critic.score(roles.critic.model(ids[None]).last_hidden_state[0, prompt - 1 : -1])[:, 0]
    return (logp, logp.gather(1, ids[prompt:, None])[:, 0]), values


def expected_ppo(setup: rollout.Setup, e: Episodes, rows: Sequence[int]) -> list[Tensor]:
    """Every term of the loss, written out for one response at a time."""
    number = int(e.mask[list(rows)].sum())
    bound = {"policy": 0, "value": 0}
    for i in rows:
        p, n = int(e.prompt_lengths[i]), int(e.mask[i].sum())
        (all_logp, logp), values = response(setup, e.ids[i, : p + n], p)
        total = torch.zeros((), dtype=torch.float64)
        for t in range(n):
            ratio, a = (logp[t] - e.logp[i, t]).exp(), e.advantages[i, t]
            clipped = ratio.clamp(1 - EPS, 1 + EPS) * a
            bound["policy"] += int(clipped < ratio * a)
            total = total - torch.minimum(ratio * a, clipped)
            old, target = e.values[i, t], e.returns[i, t]
            near = old + (values[t] - old).clamp(-VEPS, VEPS)
            bound["value"] += int((near - target) ** 2 > (values[t] - target) ** 2)
            total = total + VALUE * 0.5 * torch.maximum((values[t] - target) ** 2, (near - target) ** 2)
            total = total + ENTROPY * (all_logp[t].exp() * all_logp[t]).sum()
            total = total + BETA * 0.5 * (logp[t] - e.ref_logp[i, t]) ** 2
        (total / number).backward()
    assert all(0 < count < number for count in bound.values()), bound
    return gradients(setup.roles.policy, *setup.roles.value_modules)


@pytest.mark.parametrize("sharing", ["separate", "trunk"])
@pytest.mark.parametrize("size", [None, 1, 2, 3])
def test_ppo_split_accumulation_and_padding(
    sharing: str, size: int | None, open_ppo: Any, loss_of: Any
) -> None:
    setup = in_float64(open_ppo(**ppo_settings(sharing))[1])
    e, rows = episodes_by_hand(setup), [3, 0, 2, 1, 4]
    expected = expected_ppo(setup, e, rows)
    tokens, totals = int(e.mask[rows].sum()), dict[str, float]()
    for part in micro_batches(rows, size):
        loss = loss_of(PPO(setup), e, part, tokens, BETA)
        loss.loss.backward()
        for name, value in loss.metrics.items():
            totals[name] = totals.get(name, 0.0) + value
    assert_same(gradients(setup.roles.policy, *setup.roles.value_modules), expected)
    assert totals == pytest.approx(loss_of(PPO(setup), e, rows, tokens, BETA).metrics, rel=1e-6)


@pytest.mark.parametrize("sharing", ["separate", "trunk"])
def test_ppo_wider_padding_changes_nothing(sharing: str, open_ppo: Any, loss_of: Any) -> None:
    """More columns of padding on every tensor, filled with what must never count."""
    setup = in_float64(open_ppo(**ppo_settings(sharing))[1])
    e, rows = episodes_by_hand(setup), [0, 1, 2, 3, 4]
    expected = expected_ppo(setup, e, rows)
    wide = {}
    for field in dataclasses.fields(e):
        value = getattr(e, field.name)
        if isinstance(value, Tensor) and value.dim() == 2:
            filler = {torch.bool: False, torch.long: 7}.get(value.dtype, math.nan)
            value = torch.cat([value, torch.full((5, 3), filler, dtype=value.dtype)], dim=1)
        wide[field.name] = value
    loss_of(PPO(setup), Episodes(**wide), rows, int(e.mask.sum()), BETA).loss.backward()
    assert_same(gradients(setup.roles.policy, *setup.roles.value_modules), expected)


@pytest.mark.parametrize("sharing", ["separate", "trunk"])
@pytest.mark.usefixtures("read_apart")
def test_ppo_learns_from_the_same_gradient_whatever_the_micro_batch(
    sharing: str, open_ppo: Any, data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through collect() and learn(): what the optimiser is given at its first step, pretraining mix
    included."""
    seen: dict[str, list[Tensor]] = {}
    sizes = {"whole": {}, "1": {"micro_batch": 1}, "3": {"micro_batch": 3}, "tokens": {"micro_tokens": 40}}
    for size, settings in sizes.items():
        ptx = {"data": str(data.text), "batch_size": 5}
        tasks, setup = open_ppo(**ppo_settings(sharing, epochs=2, ptx=ptx, **settings))
        in_float64(setup)
        collected = loop.collect(PPO(setup), tasks[:8], LoopState(BETA, RunningScale()), 5)
        assert len(set(collected.episodes.mask.sum(dim=1).tolist())) >= 1

        def keep(optimizer: Any, *_: Any, setup: rollout.Setup = setup, size: str = size) -> dict[str, float]:
            if size not in seen:
                seen[size] = gradients(setup.roles.policy, *setup.roles.value_modules)
            return {"grad_norm": 0.0, "lr": 0.0}

        monkeypatch.setattr(loop.optim, "step", keep)
        loop.learn(
            PPO(setup),
            make_optimizers(setup.config, setup.roles),
            collected.episodes,
            1,
            LoopState(BETA, RunningScale()),
        )
    for size in ("1", "3", "tokens"):
        assert_same(seen[size], seen["whole"])


@pytest.mark.parametrize("sharing", ["separate", "trunk"])
def test_the_ratio_of_the_first_update_is_exactly_1(sharing: str, open_ppo: Any) -> None:
    """Scored in parts of 3, 3 and 2 and trained in parts of 3 and 1, each with its own padding, in
    float32."""
    tasks, setup = open_ppo(sharing=sharing, micro_batch=3, mini_batch=4)
    collected = loop.collect(PPO(setup), tasks[:8], LoopState(0.05, RunningScale()), 5)
    optimizers = make_optimizers(setup.config, setup.roles)
    metrics = loop.learn(
        PPO(setup), optimizers, collected.episodes, 1, LoopState(0.05, RunningScale())
    ).metrics
    assert metrics["val/ratio_first"] == 1.0
    assert metrics["policy/logp_mismatch"] < 1e-5  # and the scored log-probabilities were the policy's own
    assert metrics["val/ratio"] != 1.0
