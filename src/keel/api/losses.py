# pyright: strict
"""`keel.losses`: the losses and estimators that every stage calls, as pure functions on tensors.

    policy        PPO's clipped loss and its kin (dual clip, asymmetric clip, GSPO, CISPO), importance weights
    value         the clipped value loss
    advantages    GAE, group-relative advantages (GRPO, Dr. GRPO), leave-one-out (RLOO)
    kl            estimates of the KL divergence from sampled tokens, and the exact one
    preference    DPO, robust DPO, IPO, KTO, ORPO, SimPO
    reward_model  Bradley–Terry, with margin, soft labels and centring
    lm            cross-entropy of language modelling
    masked        masked sums and means, log-probabilities of tokens

Each docstring has the equation and its source. They know tensors and masks and nothing else of keel: no
config, no model, no device. A mask is True where a position counts.

    >>> import torch
    >>> loss, metrics = reward_model.bradley_terry(torch.tensor([1.0]), torch.tensor([1.0]))
    >>> round(loss.item(), 4), metrics["accuracy"].item()  # equal scores: log 2, and half a point
    (0.6931, 0.5)
"""

from __future__ import annotations

from keel.algorithms import advantages, kl, lm, masked, policy, preference, reward_model, value

__all__ = ["advantages", "kl", "lm", "masked", "policy", "preference", "reward_model", "value"]
