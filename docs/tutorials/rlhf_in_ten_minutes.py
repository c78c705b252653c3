# %% [markdown]
# # RLHF from text to policy in ten minutes
#
# The whole pipeline on a small world: pretraining, supervised fine-tuning, a reward model from comparisons,
# PPO under a KL constraint, and a judge. Each part has its equation, the code that computes it, the stage
# that uses it, a plot, and what to look at.
#
# **The settings here are tiny**, so that all of it runs in a minute or two on one core. They show the
# mechanics. They do not show quality: for that, `keel run helpdesk` trains the same stages on the same
# world long enough to learn it.

# %%
import torch
from figures import curves, intervals

import keel

torch.manual_seed(0)
stages = {
    "base": {
        "kind": "pretrain",
        "data": {"source": "world:helpdesk/text", "rows": 5000},
        "model": {
            "vocab_size": 512,
            "init": {
                "model_type": "llama",
                "hidden_size": 64,
                "intermediate_size": 160,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "max_position_embeddings": 256,
                "tie_word_embeddings": True,
                "initializer_range": 0.06,
            },
        },
        "max_length": 128,
        "batch_size": 8,
        "lr": 5e-3,
    },
    "sft": {
        "kind": "sft",
        "model": "base",
        "data": {"source": "world:helpdesk/demonstrations", "rows": 120},
        "batch_size": 8,
        "lr": 1e-3,
    },
    "reward": {
        "kind": "reward",
        "model": "sft",
        "data": {"source": "world:helpdesk/comparisons", "rows": 2000},
        "batch_size": 16,
        "lr": 1e-3,
        "sampling": {"max_new_tokens": 64},
    },
    "ppo": {
        "kind": "ppo",
        "model": "sft",
        "reward": "reward",
        "data": {"source": "world:helpdesk/prompts", "rows": 400},
        "sharing": "trunk",
        "updates": 10,
        "batch_size": 32,
        "samples_per_prompt": 4,
        "mini_batch": 16,
        "micro_batch": 16,
        "epochs": 2,
        "lr": 5e-4,
        "lam": 1.0,
        "value_lr": 1e-3,
        "value_coef": 0.01,
        "shaping": {"center": "prompt", "missing_stop_penalty": 2.0},
        "kl": {"coef": 0.05},
        "sampling": {"max_new_tokens": 64},
    },
    "judge": {
        "kind": "evaluate",
        "models": ["sft", "ppo"],
        "reward": "reward",
        "gold": "world:helpdesk",
        "data": {"source": "world:helpdesk/test_prompts", "rows": 128},
        "sampling": {"max_new_tokens": 64},
    },
}


def train(stage: str) -> keel.Run:
    """Run one stage of the config; what comes before it is done by then."""
    return keel.run(stages, "dtype=float32", "threads=1", name="tutorial", only=stage, progress=False)


# %% [markdown]
# ## 1. Pretraining
#
# A language model gives the next token a probability. Pretraining makes the text that there is likely:
#
#     L = −1/|M| · Σ_{t ∈ M} log π(x_t | x_{<t})
#
# The loss is a function of logits, labels and a mask, and nothing else. With probability ½ on the right
# token it is log 2 ≈ 0.693 nats. The last position does not count, so its label may be anything.

# %%
logits = torch.tensor([[[0.0, 0.0], [0.0, 0.0], [9.0, -9.0]]])  # (B, T, V)
labels = torch.tensor([[1, 0, -100]])
mask = torch.tensor([[True, True, False]])
loss, metrics = keel.losses.lm.cross_entropy(logits, labels, mask)
print(f"loss {loss:.4f} nats")

# %%
run = train("base")
log = run.metrics("base")
curves("Pretraining", {"loss": log["loss"].items()}, y="loss in nats")

# %% [markdown]
# **What to look at.** A loss that starts near log V (here log 512 ≈ 6.2: all tokens alike) and falls
# steeply, then slowly. A loss that stays at its start means a learning rate far too low or data that do not
# reach the model; one that jumps means a rate too high.

# %% [markdown]
# ## 2. Supervised fine-tuning
#
# The same loss on demonstrations, with the mask on the *reply*: the model should learn to answer, not to
# ask.

# %%
prompt = keel.load_data("world:helpdesk/prompts", rows=1).records[0].prompt
run = train("sft")
print("prompt:", prompt[-1]["content"])
for stage in ("base", "sft"):
    (reply,) = keel.generate(run.model_path(stage), [prompt], max_new_tokens=64, temperature=0.7)
    print(f"{stage:>6}:", reply.strip())

# %% [markdown]
# **What to look at.** Read samples; the loss says little here. Replies should have the form of the
# demonstrations and end by themselves.

# %% [markdown]
# ## 3. A reward model from comparisons
#
# People see two replies to one prompt and say which is better. Bradley–Terry (2203.02155, eq. 1) reads the
# chance of that from a difference of scores:
#
#     L = −log σ(r_φ(x, y_w) − r_φ(x, y_l))
#
# Only differences count. Adding a constant to every score changes nothing, so a raw score has no unit.

# %%
chosen, rejected = torch.tensor([1.0, 0.2]), torch.tensor([0.0, 0.5])
loss, metrics = keel.losses.reward_model.bradley_terry(chosen, rejected)
shifted, _ = keel.losses.reward_model.bradley_terry(chosen + 100, rejected + 100)
print(f"loss {loss:.4f}, shifted by 100 {shifted:.4f}, ranked as the votes say {metrics['accuracy']:.0%}")

# %%
run = train("reward")
log = run.metrics("reward")
curves(
    "Reward model", {"accuracy, mean of 10 steps": log["accuracy"].rolling(10).mean().items()}, y="accuracy"
)

# %%
print(run.result("reward").loc[["accuracy", "margin"]].round(3).to_string())
model = keel.RewardModel(run.model_path("reward"))
pair = keel.load_data("world:helpdesk/test_comparisons", rows=1).records[0]
for name, reply in (("chosen", pair.chosen), ("rejected", pair.rejected)):
    print(f"{name:>9} {model.score([pair.prompt], [reply])[0]:+.2f}  {reply[-1]['content']}")

# %% [markdown]
# **What to look at.** `accuracy` on held-out pairs, with its interval: ½ is a coin. 1 is not to be had,
# since people disagree: of the labellers of InstructGPT two agreed in 73 % of the cases (2203.02155,
# section 3.4). A policy can be no better than what it is told by this model.

# %% [markdown]
# ## 4. PPO under a KL constraint
#
# The policy writes a reply, the reward model scores it, and every token pays for moving away from the
# reference:
#
#     r_t = −β (log π(a_t|s_t) − log π_ref(a_t|s_t)) + [t = T] r_φ(x, y)
#
# Without the KL term the policy would find whatever the reward model is wrong about. First the estimate of
# the KL from sampled tokens, then the rewards of one reply of three tokens that was scored 1.0:

# %%
logp = torch.tensor([[-1.0, -0.5, -2.0]])  # log π(a_t | s_t)
ref_logp = torch.tensor([[-1.2, -0.9, -1.9]])
mask = torch.ones(1, 3, dtype=torch.bool)
kl = keel.losses.kl.estimate(logp, ref_logp, "k1")
rewards = -0.05 * kl
rewards[0, -1] += 1.0
print("KL by token", [round(value, 3) for value in kl[0].tolist()], f"sum {kl.sum():.2f} nats")
print("rewards    ", [round(value, 3) for value in rewards[0].tolist()])

# %% [markdown]
# The critic V guesses how a reply will end. Advantages say how much better each step was than guessed (GAE,
# 1506.02438):
#
#     δ_t = r_t + γ V(s_{t+1}) − V(s_t)
#     Â_t = δ_t + γ λ Â_{t+1}
#
# and the clipped loss (1707.06347, eq. 7) raises the probability of what was better, as long as the ratio
# stays near 1:
#
#     ρ_t = π(a_t|s_t) / π_old(a_t|s_t)
#     L = −min(ρ_t Â_t, clip(ρ_t, 1 − ε, 1 + ε) Â_t)

# %%
values = torch.tensor([[0.3, 0.5, 0.8]])
advantages, returns = keel.losses.advantages.gae(rewards, values, mask, gamma=1.0, lam=0.95)
print("advantages", [round(value, 3) for value in advantages[0].tolist()])
same, metrics = keel.losses.policy.clipped(logp, logp, advantages, mask)
moved, after = keel.losses.policy.clipped(logp + 0.4, logp, advantages, mask)
print(f"before a step: loss {same:.3f}, ratio {metrics['ratio']:.2f}, clipped {metrics['clipfrac']:.0%}")
print(f"after a big one: loss {moved:.3f}, ratio {after['ratio']:.2f}, clipped {after['clipfrac']:.0%}")

# %%
run = train("ppo")
log = run.metrics("ppo")
curves("PPO: the score", {"score": log["objective/scores"].items()}, x="update", y="reward model's score")

# %%
curves("PPO: the distance", {"KL": log["objective/kl"].items()}, x="update", y="KL in nats a reply")

# %% [markdown]
# **What to look at.** Score and KL together. A score that rises at a KL of a few nats is learning; a score
# that rises with the KL without end is on the way to reward hacking. At the first step the ratio is
# exactly 1. `run.diagnose()` looks at the logs for you:

# %%
for stage, found in run.diagnose().items():
    print(f"{stage}: {len(found.findings)} findings in {found.steps} updates")
    for finding in found.findings:
        print(f"  {finding.severity} {finding.check}: {finding.evidence}")

# %% [markdown]
# ## 5. The judge
#
# The reward model was what PPO optimised, so its score cannot say whether replies are better. This world
# has a *gold* reward that no stage trains on; with people, it is their votes on new pairs.

# %%
run = train("judge")
result = run.result("judge")
gold = {name: result.loc[(name, "gold"), ["mean", "low", "high"]].tolist() for name in ("sft", "ppo")}
intervals("Gold reward, 95 % intervals", gold, "gold reward")

# %%
print(keel.compare(run).verdict)

# %% [markdown]
# **What to look at.** Whether the intervals leave room for "no difference". With settings this small they
# often do, and then nothing was shown. [Is the improvement real?](is_the_improvement_real.md) goes on from
# here.
#
# The other way from comparisons to a policy takes one stage and no reward model. DPO (2305.18290, eq. 7) is
# the Bradley–Terry loss on the policy's own log-probabilities:

# %%
sums = [
    torch.tensor([value]) for value in (-12.0, -15.0, -13.0, -14.0)
]  # log π(y_w), log π(y_l), log π_ref of both
losses, metrics = keel.losses.preference.dpo(*sums, beta=0.1)
print(f"DPO loss {losses[0]:.4f}, implicit rewards' margin {metrics['rewards/margins'][0]:.2f}")
