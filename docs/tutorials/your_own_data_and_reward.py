# %% [markdown]
# # Your own data and reward
#
# Rows of yours in JSON lines, a reward of yours in Python, GRPO with it, and the samples read. The task is
# a toy that a tiny model learns in seconds: take an order in a few words, politely.

# %%
import json
from pathlib import Path

import pandas as pd
from figures import curves

import keel

# %% [markdown]
# ## 1. Rows
#
# A row's columns say what it is: `text` is for language modelling, `prompt` with `completion` a
# demonstration, `prompt` alone a prompt, `prompt` with `chosen` and `rejected` a comparison. Other columns
# are kept and handed to rewards; here `drink`.

# %%
NAMES = ("Ann", "Bob", "Cid", "Dora", "Eve", "Finn", "Gus", "Hal")
DRINKS = ("tea", "milk", "water", "juice")
ENDS = (", please.", ".", " now!", ", and be quick.")


def write(file: str, rows: list[dict]) -> Path:
    path = Path(file)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


orders = [(name, drink) for name in NAMES for drink in DRINKS]
demonstrations = [
    {"prompt": f"{name} wants {drink}:", "completion": f" {drink} for {name}{end}"}
    for name, drink in orders
    for end in ENDS
]
text = [{"text": row["prompt"] + row["completion"]} for row in demonstrations]
prompts = [{"prompt": f"{name} wants {drink}:", "drink": drink} for name, drink in orders]
write("text.jsonl", text * 4)
write("demonstrations.jsonl", demonstrations)
write("prompts.jsonl", prompts)
print(json.dumps(demonstrations[0]))

# %% [markdown]
# `keel.load_data` reads rows as a stage would. A bad row is named by file and line, with the reason, before
# any model is loaded:

# %%
write("broken.jsonl", [demonstrations[0], {"prompt": "Bob wants tea:", "completion": ""}])
try:
    keel.load_data("broken.jsonl")
except keel.DataError as error:
    print(error)

# %%
data = keel.load_data("prompts.jsonl")
print(len(data.records), data.kind, data.records[0])

# %% [markdown]
# So is a setting. A key that is not known names its nearest match, and a setting that would do nothing is
# refused:

# %%
for settings in ({"epoch": 3}, {"schedule": "constant", "lr_floor": 0.1}):
    try:
        keel.plan_run({"sft": {"kind": "sft", "model": "gpt2", "data": "demonstrations.jsonl", **settings}})
    except keel.UsageError as error:
        print(error)

# %% [markdown]
# ## 2. A reward
#
# A function with TRL's signature: lists of prompts and completions and the data's columns by name, a list
# of numbers back, None where it does not apply. It stands in a file, so that the run can say which reward
# it was trained on, and a change of the file runs again what depends on it.

# %%
REWARDS = '''"""Rewards for taking orders."""


def polite(prompts, completions, drink, **columns):
    """1 for the right drink with a please at the end, half of it without, else 0."""
    return [
        0.0 if ordered not in completion else 1.0 if completion.endswith("please.") else 0.5
        for completion, ordered in zip(completions, drink)
    ]
'''
_ = Path("orders.py").write_text(REWARDS, encoding="utf-8")

# %% [markdown]
# Try it before it trains anything. What it gets wrong now, the policy will find later.

# %%
import orders as rewards

tries = [" tea for Bob, please.", " tea for Bob now!", " milk for Bob, please.", "tea tea tea please."]
scores = rewards.polite(["Bob wants tea:"] * 4, tries, drink=["tea"] * 4)
print(pd.DataFrame({"completion": tries, "reward": scores}).to_string(index=False))

# %% [markdown]
# The last line earns a full point, too. This reward can be hacked; the demonstrations and a KL penalty keep
# the policy near replies that people would write. [Is the improvement real?](is_the_improvement_real.md)
# lets one go wrong on purpose.
#
# ## 3. GRPO
#
# No critic: each prompt is answered several times, and a reply's advantage is how much better it was than
# its group (2402.03300):
#
#     Â_i = (r_i − mean(r)) / (std(r) + 10⁻⁴)

# %%
import torch

group = torch.tensor([1.0, 0.5, 0.5, 0.0, 0.5, 0.5, 0.5, 0.5])  # two groups of four
print([round(value, 2) for value in keel.losses.advantages.group_relative(group, 4).tolist()])

# %% [markdown]
# A group whose rewards are all equal teaches nothing: its advantages are exactly 0.

# %%
llama = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.06,
}
stages = {
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
    "grpo": {
        "kind": "grpo",
        "model": "sft",
        "reward": "python:orders.polite",
        "data": "prompts.jsonl",
        "updates": 16,
        "batch_size": 64,
        "samples_per_prompt": 8,
        "mini_batch": 32,
        "lr": 5e-4,
        "kl": {"coef": 0.01},
        "sampling": {"max_new_tokens": 24},
    },
}
print(keel.plan_run(stages, "threads=1").table()[["kind", "rows", "steps"]].to_string())

# %%
run = keel.run(stages, "dtype=float32", "threads=1", name="orders", progress=False)
log = run.metrics("grpo")
curves("GRPO: reward", {"reward": log["objective/scores"].items()}, x="update", y="mean reward")

# %% [markdown]
# ## 4. Read the samples
#
# A curve that rises says that *something* earns more. Samples say what.

# %%
samples = run.samples("grpo")
reward = next(name for name in samples.columns if name.startswith("rewards/"))
shown = ["step", "prompt", "completion", reward, "stop_reason"]
first, last = samples[samples["step"] == 1], samples[samples["step"] == samples["step"].max()]
print(pd.concat([first.head(4), last.head(4)])[shown].to_string(index=False))

# %% [markdown]
# The trained policy is a model like any other, for `transformers` as for keel:

# %%
print(
    keel.generate(
        run.model_path("grpo"), ["Eve wants juice:", "Bob wants milk:"], max_new_tokens=24, temperature=0
    )
)

# %% [markdown]
# Calling `keel.run` again with the same stages does nothing, since all is done. After a change in
# `orders.py` the policy would be trained again, and pretraining and SFT would stay as they are. For your
# own model, put its path or hub id where `base` stands and leave the first stage out.
