"""What a run would take: rows, tokens, steps, memory, without training."""
