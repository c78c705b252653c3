"""What the metrics of a run say about its health, and what to do about it: pure functions, no model and no
tensor."""
