"""Pure functions on tensors: losses, advantages, estimators. They know masks, and nothing else of keel.

B counts sequences (or pairs), T response positions, V the vocabulary. `docs/papers.md` maps paper to
function.
"""

from __future__ import annotations
