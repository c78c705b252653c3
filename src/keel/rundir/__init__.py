"""The run directory: the contract between a run and whoever reads it."""
