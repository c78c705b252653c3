"""Rollouts: sampling completions, and scoring them token by token."""
