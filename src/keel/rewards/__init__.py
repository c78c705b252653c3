"""Rewards: learned models, and the way from a score to a reward."""
