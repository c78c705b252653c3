"""keel: the whole RLHF pipeline on one machine."""

__version__ = "0.1.0"
