"""Models: loading, roles, forward passes, optimiser."""
