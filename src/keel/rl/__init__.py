"""The stages that learn from their own samples: PPO and GRPO."""
