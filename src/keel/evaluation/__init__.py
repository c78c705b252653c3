"""Measures of reward models and policies, with intervals."""
