"""Everything that computes in a model's place or changes a foreign class. Knows torch and transformers, and nothing else of keel."""
