# %% [markdown]
# # Is the improvement real?
#
# A reward that went up shows that the policy earns more of that reward. Whether its replies are better is
# another question. This page asks it with the means that keel has: intervals, the KL divergence, a reward
# that nothing is trained on, seeds, and `keel.compare`.
#
# To see a failure, we build one: a proxy reward with a hole that a tiny model finds within seconds. The
# settings are tiny, and so is the task. The questions are those of a real run.

# %%
import json
from pathlib import Path

import torch
from figures import curves, intervals

import keel

# %% [markdown]
# ## 1. How much do n prompts say?
#
# Each measure of keel comes with its 95 % interval, mean ± 1.96·s/√n over the prompts. Here a model is
# right in 60 % of all cases, judged on 16, 64 and 256 of them:

# %%
generator = torch.Generator().manual_seed(0)
right = (torch.rand(256, generator=generator) < 0.6).double()


def interval(values: torch.Tensor, z: float = 1.96) -> tuple[float, float, float]:
    """Mean, low, high."""
    mean, half = values.mean().item(), z * values.std().item() / len(values) ** 0.5
    return mean, mean - half, mean + half


measures = {f"{n} prompts": interval(right[:n]) for n in (16, 64, 256)}
intervals("The same model, judged on n prompts", measures, "share right")

# %% [markdown]
# On 16 prompts a model at 60 % cannot be told from a coin. Four times the prompts halve the interval. Two
# models on the *same* prompts are compared pair by pair, which is narrower still: `keel.compare` does so.
#
# ## 2. A proxy with a hole
#
# Orders are to be taken politely. The proxy counts how often a reply says please. What we want is one
# please, at the end of the right order. The demonstrations for Ann overdo it, so the policy can find the
# hole.


# %%
def write(file: str, rows: list[dict]) -> None:
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


names, drinks = ("Ann", "Bob", "Cid", "Dora", "Eve", "Finn", "Gus", "Hal"), ("tea", "milk", "water", "juice")
ends = dict.fromkeys(names, (", please.", ".", " now!")) | {"Ann": (", please.", ", please please.")}
orders = [(name, drink) for name in names for drink in drinks]
demonstrations = [
    {"prompt": f"{name} wants {drink}:", "completion": f" {drink} for {name}{end}"}
    for name, drink in orders
    for end in ends[name]
]
write("text.jsonl", [{"text": row["prompt"] + row["completion"]} for row in demonstrations] * 4)
write("demonstrations.jsonl", demonstrations)
write("prompts.jsonl", [{"prompt": f"{name} wants {drink}:", "drink": drink} for name, drink in orders])

REWARDS = '''"""What is paid for, and what is wanted."""


def proxy(prompts, completions, **columns):
    """How often a reply says please."""
    return [float(completion.count("please")) for completion in completions]


def wanted(prompts, completions, drink, **columns):
    """1 for the right drink and one please at the end, half of it without a please, else 0."""
    return [
        0.0 if ordered not in completion or completion.count("please") > 1
        else 1.0 if completion.endswith("please.") else 0.5
        for completion, ordered in zip(completions, drink)
    ]
'''
Path("taking_orders.py").write_text(REWARDS, encoding="utf-8")

llama = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.06,
}
start = {
    "base": {
        "kind": "pretrain",
        "data": "text.jsonl",
        "model": {"vocab_size": 300, "init": llama},
        "max_length": 48,
        "batch_size": 8,
        "lr": 5e-3,
        "epochs": 4,
    },
    "sft": {
        "kind": "sft",
        "model": "base",
        "data": "demonstrations.jsonl",
        "batch_size": 16,
        "lr": 1e-3,
        "epochs": 4,
    },
}

# %% [markdown]
# The policy is trained on `proxy`. `wanted` has weight 0: it is measured at every update, and no gradient
# comes from it. With a real task that second reward is a held-out reward model, trained on other
# comparisons, or people.

# %%
both = [
    {"kind": "python", "function": "taking_orders.proxy", "name": "proxy"},
    {"kind": "python", "function": "taking_orders.wanted", "name": "wanted", "weight": 0.0},
]
free = {
    "kind": "grpo",
    "model": "sft",
    "reward": both,
    "data": "prompts.jsonl",
    "updates": 24,
    "batch_size": 64,
    "samples_per_prompt": 8,
    "mini_batch": 32,
    "lr": 4e-4,
    "kl": {"coef": 0.0},
    "sampling": {"max_new_tokens": 24},
}
near = {**free, "kl": {"coef": 0.5}}  # the same with a KL penalty
judge = {
    "kind": "evaluate",
    "models": ["sft", "free", "near"],
    "reward": both,
    "data": "prompts.jsonl",
    "sampling": {"max_new_tokens": 24},
}
stages = {**start, "free": free, "near": near, "judge": judge}
runs = [
    keel.run(stages, "dtype=float32", "threads=1", f"seed={seed}", name=f"seed-{seed}", progress=False)
    for seed in (0, 1, 2)
]

# %%
log = runs[0].metrics("free")
curves(
    "Trained on the proxy, without a KL penalty",
    {"proxy": log["rewards/proxy/mean"].items(), "wanted": log["rewards/wanted/mean"].items()},
    x="update",
    y="mean reward",
)

# %% [markdown]
# **What to look at.** The two curves part. While they rise together the policy learns manners; from where
# `wanted` falls it learns the hole. The proxy alone would have shown a success.
#
# ## 3. The price in KL
#
# How far a policy went from where it began is measured in nats, and reward against KL is the picture to
# draw (2210.10760): every gain is bought with distance, and the same distance should be compared with the
# same distance.

# %%
lines = {}
for name in ("free", "near"):
    log = runs[0].metrics(name)
    lines[name] = list(zip(log["objective/kl"], log["rewards/wanted/mean"]))
curves("What is wanted, by the distance from SFT", lines, x="KL in nats", y="wanted")

# %%
replies = runs[0].samples("free")
print(replies[replies["step"] == replies["step"].max()]["completion"].head(4).to_string(index=False))

# %% [markdown]
# keel looks for such signs in the logs of every run, without a second reward:

# %%
for stage, found in runs[0].diagnose().items():
    for finding in found.findings:
        print(f"{stage}: {finding.check} from update {finding.step}: {finding.evidence}")

# %% [markdown]
# ## 4. Seeds
#
# An interval over prompts says how sure we are of *this* policy. Training again with another seed gives
# another policy. What is claimed of a method needs several, and the interval over them (Student's, since
# they are few):

# %%
found = keel.compare(*runs)
print(found)

# %% [markdown]
# The comparison says itself that it ranked by the proxy alone. So it ranks the hacked policy first. The
# measure that nothing was trained on ranks otherwise:

# %%
wanted = {}
for model in ("sft", "free", "near"):
    means = [run.result("judge").loc[(model, "reward/wanted"), "mean"] for run in runs]
    wanted[model] = interval(torch.tensor(means), z=4.303)  # Student's t for 2 degrees of freedom
intervals("What is wanted, over three seeds", wanted, "wanted")

# %% [markdown]
# ## 5. A list to go through
#
# 1. Is the difference larger than its interval, on enough prompts?
# 2. Does it hold over seeds, or was one lucky?
# 3. At which KL? Compare at equal distance, and with best-of-n (`best_of` of an evaluate stage), which
#    needs no training.
# 4. Who says so? The reward that was optimised cannot be the judge. Take a gold reward, a reward model
#    trained on other comparisons (`judge` of a PPO stage watches one while it trains), or people.
# 5. Did anyone read samples?
