"""Reward functions as a user of TRL writes them."""


def short_tokens(prompts, completions, completion_ids, **kwargs):
    """The share of a response's tokens below 150: no model has to know anything to earn it."""
    return [sum(token < 150 for token in ids) / len(ids) for ids in completion_ids]


def red(prompts, completions, **kwargs):
    return [1.0 if "red" in completion else 0.0 for completion in completions]


def sometimes(prompts, completions, **kwargs):
    return [None if "cat" in prompt else 1.0 for prompt in prompts]


def broken(prompts, completions, **kwargs):
    raise ValueError("no")


def too_few(prompts, completions, **kwargs):
    return [1.0]


def not_a_number(prompts, completions, **kwargs):
    return [float("nan")] * len(completions)
