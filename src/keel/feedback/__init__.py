"""Where people judge: the labelling app (`keel label`), its statistics and its formats.

Needs the extra `keel-rlhf[label]`; nothing else of keel imports this package's web parts.
"""
